//! What sources declare of routes, beside the entries of the route table.

use std::sync::Arc;

use crate::route::expiry::{self, Tick};
use crate::route::policy::HttpPolicy;
use crate::route::table::{Change, RouteTable, find_pool, pool_mut};
use crate::route::{Declaration, HttpMatch, Origin, RouteKey, Withdrawal};

impl RouteTable {
    /// What holds of all that is declared of a route.
    pub(super) fn declared(&self, route: &HttpMatch) -> Option<&Arc<HttpPolicy>> {
        if self.next.declared.is_empty() {
            return None;
        }
        self.next.declared.get(route)?.first()
    }

    /// Takes in a declaration, if there is room.
    pub(super) fn declare(&mut self, declaration: Declaration, change: &mut Change) {
        let Declaration { route, policy } = declaration;
        if let Err(bound) = self.check_room_to_declare(&route, &policy) {
            change.full += 1;
            change.bound = Some(bound);
            return;
        }
        let declared = self.next.declared.entry(route.clone()).or_default();
        if policy.origin != Origin::Adopted {
            declared.retain(|said| said.origin != Origin::Adopted);
        } else if !declared.is_empty() {
            change.shadowed += 1;
            return;
        }
        if policy.origin == Origin::Adopted {
            self.adopted_declarations.push(route.clone());
        }
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
        change.changed = true;
        self.follow_declared(&route, change);
    }

    pub(super) fn withdraw(&mut self, gone: &Withdrawal, change: &mut Change) {
        let Some(declared) = self.next.declared.get_mut(&gone.route) else {
            return;
        };
        let Ok(at) = declared.binary_search_by_key(&gone.origin, |said| said.origin) else {
            return;
        };
        declared.remove(at);
        if declared.is_empty() {
            self.next.declared.remove(&gone.route);
        }
        change.removed += 1;
        change.changed = true;
        self.follow_declared(&gone.route, change);
    }

    /// Withdraws the declarations that are not `allowed`.
    pub(super) fn retain_declared(
        &mut self,
        allowed: impl Fn(Origin, &RouteKey) -> bool,
        change: &mut Change,
    ) {
        let mut gone = Vec::new();
        for (route, policies) in &self.next.declared {
            let key = RouteKey::Http(route.clone());
            let origins = policies.iter().map(|policy| policy.origin);
            let refused = origins.filter(|origin| !allowed(*origin, &key));
            gone.extend(refused.map(|origin| Withdrawal {
                route: route.clone(),
                origin,
            }));
        }
        for withdrawal in gone {
            self.withdraw(&withdrawal, change);
        }
    }

    /// Ends what was adopted and no source has spoken of, once all have had their time to.
    pub(super) fn expire_declared(&mut self, now: Tick, change: &mut Change) {
        let adopted = self.sources[Origin::Adopted as usize];
        let grace = expiry::ticks(self.stale_threshold);
        if self.adopted_declarations.is_empty()
            || !adopted.connected
            || adopted.since.saturating_add(grace) > now
        {
            return;
        }
        for route in std::mem::take(&mut self.adopted_declarations) {
            let origin = Origin::Adopted;
            let before = change.removed;
            self.withdraw(&Withdrawal { route, origin }, change);
            change.expired += change.removed - before;
            change.removed = before;
        }
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
