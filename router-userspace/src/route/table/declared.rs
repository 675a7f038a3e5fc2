//! What sources declare of routes, beside the entries of the route table.

use std::sync::Arc;

use crate::route::policy::HttpPolicy;
use crate::route::table::{Change, RouteTable, find_pool, pool_mut};
use crate::route::{Declaration, HttpMatch, RouteKey, Withdrawal};

impl RouteTable {
    /// What holds of all that is declared of a route.
    pub(super) fn declared(&self, route: &HttpMatch) -> Option<&Arc<HttpPolicy>> {
        if self.declared.is_empty() {
            return None;
        }
        self.declared.get(route)?.first()
    }

    /// Takes in a declaration, if there is room.
    pub(super) fn declare(&mut self, declaration: Declaration, change: &mut Change) {
        let Declaration { route, policy } = declaration;
        if let Err(bound) = self.check_room_to_declare(&route, &policy) {
            change.full += 1;
            change.bound = Some(bound);
            return;
        }
        let declared = self.declared.entry(route.clone()).or_default();
        match declared.binary_search_by_key(&policy.origin, |said| said.origin) {
            Ok(at) if declared[at] == policy => {
                change.refreshed += 1;
                return;
            }
            Ok(at) => {
                declared[at] = policy;
                change.updated += 1;
            }
            Err(at) => {
                declared.insert(at, policy);
                change.added += 1;
            }
        }
        self.follow_declared(&route, change);
    }

    pub(super) fn withdraw(&mut self, gone: &Withdrawal, change: &mut Change) {
        let Some(declared) = self.declared.get_mut(&gone.route) else {
            return;
        };
        let Ok(at) = declared.binary_search_by_key(&gone.origin, |said| said.origin) else {
            return;
        };
        declared.remove(at);
        if declared.is_empty() {
            self.declared.remove(&gone.route);
        }
        change.removed += 1;
        self.follow_declared(&gone.route, change);
    }

    /// Brings the pool of a route in line with what is declared of it.
    fn follow_declared(&mut self, route: &HttpMatch, change: &mut Change) {
        let policy = self.declared(route).cloned();
        let alone = policy.as_ref().is_some_and(|policy| policy.answers_alone());
        let key = RouteKey::Http(route.clone());
        match find_pool(&self.next, route) {
            None if !alone => return,
            // It is made with its policy.
            None => drop(self.make_pool(key.clone())),
            Some(pool) if pool.policy == policy => return,
            Some(pool) if pool.backends.is_empty() && !alone => self.remove_pool(&key),
            Some(_) => {
                let pool = pool_mut(&mut self.next, &key).expect("just found");
                pool.policy = policy;
            }
        }
        change.touch(&key);
    }
}
