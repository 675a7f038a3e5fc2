//! The pools of the next snapshot: made with a route's first entry, gone with its last.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::route::table::room::has_backend_of;
use crate::route::table::{Bound, Change, Entry, RouteTable, entry};
use crate::route::{Backend, HttpMatch, Origin, Pool, Registered, RouteKey};
use crate::snapshot::Snapshot;

impl RouteTable {
    /// Has an entry's backend join its pool, unless it is held out of it.
    pub(super) fn serve(&mut self, id: u32, change: &mut Change) {
        if self.held.damping.suppressed() == 0 {
            return self.join(id, change);
        }
        let Entry { route, backend, .. } = entry(&self.entries, id);
        let pool = pool_mut(&mut self.next, route).expect("an entry's route has a pool");
        if !self.held.hold(pool, route, backend.address) {
            self.join(id, change);
        } else {
            change.tell(Bound::Flapping, backend, std::slice::from_ref(route));
        }
    }

    /// Puts an entry's backend into its pool, in place of what another source says of the address.
    pub(super) fn join(&mut self, id: u32, change: &mut Change) {
        let entry = entry(&self.entries, id);
        let pool = pool_mut(&mut self.next, &entry.route).expect("an entry's route has a pool");
        let origin = entry.backend.origin;
        self.routes_of[origin as usize] += usize::from(!has_backend_of(pool, origin));
        let replaced = put(pool, &entry.backend, &entry.registered);
        if let Some(replaced) = replaced
            && !has_backend_of(pool, replaced)
        {
            self.routes_of[replaced as usize] -= 1;
        }
        if let RouteKey::Vip(vip) = &entry.route {
            self.vips_of.insert((entry.backend.address, *vip));
        }
        change.touch(&entry.route);
    }

    /// Makes sure of a pool for `route`, and returns the route in the strings of the entries that it
    /// has already.
    pub(super) fn make_pool(&mut self, route: RouteKey) -> RouteKey {
        let mut http = match route {
            RouteKey::Http(http) => http,
            RouteKey::Vip(vip) => {
                let pool = self.next.vips.entry(vip);
                pool.or_insert_with(|| Arc::new(Pool::default()));
                return route;
            }
        };
        if let Some(pool) = find_pool(&self.next, &http) {
            let other = pool.backends.first().map(|backend| backend.address);
            let route = RouteKey::Http(http);
            let other = other.and_then(|address| self.serving(&route, address));
            return other.map_or(route, |id| entry(&self.entries, id).route.clone());
        }
        if http.path.is_empty() {
            // All of them are one in memory.
            http.path = Arc::default();
        }
        let pool = Pool {
            policy: self.declared(&http).cloned(),
            ..Pool::default()
        };
        self.next.hosts.add(&http.host);
        let routes = self.next.hosts.get_mut(&http.host).expect("just added");
        let (path, conditions) = (Arc::clone(&http.path), http.conditions.clone());
        routes.insert(path, conditions, Arc::new(pool));
        self.http_routes += 1;
        RouteKey::Http(http)
    }

    /// Takes an address out of its pool, which goes with its last.
    pub(super) fn take_out(&mut self, route: &RouteKey, address: SocketAddr, change: &mut Change) {
        if self.held.leave(route, address, self.now) {
            return;
        }
        let pool = pool_mut(&mut self.next, route).expect("an entry's route has a pool");
        let at = pool
            .backends
            .binary_search_by_key(&address, |backend| backend.address);
        let gone = pool
            .backends
            .remove(at.expect("an entry's backend is in its pool"));
        if !has_backend_of(pool, gone.origin) {
            self.routes_of[gone.origin as usize] -= 1;
        }
        let serving = pool.backends.len();
        self.release_for(route, serving, change);
        let pool = pool_mut(&mut self.next, route).expect("an entry's route has a pool");
        let alone = pool
            .policy
            .as_ref()
            .is_some_and(|policy| policy.answers_alone());
        let empty = pool.backends.is_empty() && !alone;
        if let RouteKey::Vip(vip) = route {
            self.vips_of.remove(&(address, *vip));
        }
        if empty {
            self.remove_pool(route);
        }
        change.touch(route);
    }

    pub(super) fn remove_pool(&mut self, route: &RouteKey) {
        let http = match route {
            RouteKey::Http(http) => http,
            RouteKey::Vip(vip) => {
                self.next.vips.remove(vip);
                return;
            }
        };
        let routes = self.next.hosts.get_mut(&http.host);
        let routes = routes.expect("a pool's host is there");
        if routes.count() == 1 {
            self.next.hosts.remove(&http.host);
        } else {
            routes.remove(&http.path, http.conditions.as_deref());
        }
        self.http_routes -= 1;
    }
}

/// Puts a backend into a pool and the pool under the policy of this, its latest registration; one
/// that names no algorithm keeps the pool's, as in gorouter. Returns whose backend it takes the place of.
fn put(
    pool: &mut Pool,
    backend: &Arc<Backend>,
    registered: &Option<Arc<Registered>>,
) -> Option<Origin> {
    let replaced = match pool
        .backends
        .binary_search_by_key(&backend.address, |backend| backend.address)
    {
        Ok(at) => {
            let before = std::mem::replace(&mut pool.backends[at], Arc::clone(backend));
            Some(before.origin)
        }
        // Most pools are small: grow by what is needed, not by doubling.
        Err(at) => {
            pool.backends.reserve_exact(1 + pool.backends.len() / 4);
            pool.backends.insert(at, Arc::clone(backend));
            None
        }
    };
    let known = pool.registered.as_ref();
    let known = known.and_then(|known| known.balance.clone());
    let new = registered.as_ref();
    pool.registered = match new.and_then(|new| new.balance.as_ref()).or(known.as_ref()) {
        None => registered.clone(),
        Some(balance) => Registered {
            balance: Some(balance.clone()),
            route_service_url: new.and_then(|new| new.route_service_url.clone()),
        }
        .shared(),
    };
    replaced
}

pub(super) fn find_pool<'s>(snapshot: &'s Snapshot, route: &HttpMatch) -> Option<&'s Arc<Pool>> {
    let (_, routes) = snapshot.hosts.get(&route.host)?;
    let known = routes.get(&route.path, route.conditions.as_deref())?;
    Some(known.pool)
}

pub(super) fn pool_mut<'s>(snapshot: &'s mut Snapshot, route: &RouteKey) -> Option<&'s mut Pool> {
    let pool = match route {
        RouteKey::Vip(vip) => snapshot.vips.get_mut(vip)?,
        RouteKey::Http(http) => {
            let routes = snapshot.hosts.get_mut(&http.host)?;
            routes.get_mut(&http.path, http.conditions.as_deref())?
        }
    };
    Some(Arc::make_mut(pool))
}
