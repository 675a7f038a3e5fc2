//! What the route table has room for: its bounds, and whether something new is within them.

use std::collections::BTreeSet;
use std::fmt;

use crate::route::policy::HttpPolicy;
use crate::route::table::{RouteTable, find_pool};
use crate::route::{HttpMatch, Origin, Pool, RouteKey};
use crate::snapshot::{HostRoutes, Snapshot};

/// Backends of routes, over all routes.
pub const MAX_ENTRIES: usize = 4_000_000;
/// Backends of one route. A change copies the list of its pool.
pub const MAX_POOL_BACKENDS: usize = 4096;
/// Routes of one host. A change copies the list of its host.
pub const MAX_HOST_PATHS: usize = 4096;
/// Routes with conditions of one host and path. Each is looked at until one holds.
pub const MAX_PATH_CONDITIONS: usize = 64;
/// Routes that are declared, with or without backends.
pub const MAX_DECLARED: usize = 262_144;

/// What keeps a registration out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// [`MAX_ENTRIES`].
    Entries,
    /// [`MAX_POOL_BACKENDS`].
    PoolBackends,
    /// [`MAX_HOST_PATHS`].
    HostPaths,
    /// [`MAX_PATH_CONDITIONS`].
    PathConditions,
    /// [`MAX_DECLARED`].
    Declared,
    /// `guard.limits` of the source: so many routes.
    SourceRoutes(Origin, usize),
    /// `guard.limits` of the source: so many backends.
    SourceBackends(Origin, usize),
    /// `guard.damping`: it came and went too often. The backend is registered, and held out of its pool.
    Flapping,
}

impl RouteTable {
    /// Whether the routes that are not found fit beside what is there. One that is named twice
    /// counts twice against the number of entries.
    pub(super) fn check_room(
        &self,
        routes: &[RouteKey],
        found: &[Option<u32>],
        origin: Origin,
    ) -> Result<(), Bound> {
        let new = || {
            let pairs = routes.iter().zip(found);
            pairs.filter_map(|(route, found)| found.is_none().then_some(route))
        };
        let count = new().count();
        if self.index.len() + count > MAX_ENTRIES {
            return Err(Bound::Entries);
        }
        let limits = self.limits[origin as usize];
        if let Some(most) = limits.backends
            && count > 0
            && self.by_origin[origin as usize] + count > most
        {
            return Err(Bound::SourceBackends(origin, most));
        }
        let mut routes_of = self.routes_of[origin as usize];
        for route in new() {
            let pool = match route {
                RouteKey::Vip(vip) => self.next.vips.get(vip),
                RouteKey::Http(http) => {
                    let pool = find_pool(&self.next, http);
                    if pool.is_none() {
                        check_host(&self.next, http, count, new)?;
                    }
                    pool
                }
            };
            if pool.is_some_and(|pool| pool.backends.len() >= MAX_POOL_BACKENDS) {
                return Err(Bound::PoolBackends);
            }
            if let Some(most) = limits.routes
                && pool.is_none_or(|pool| !has_backend_of(pool, origin))
            {
                routes_of += 1;
                if routes_of > most {
                    return Err(Bound::SourceRoutes(origin, most));
                }
            }
        }
        Ok(())
    }

    /// Whether a declaration fits beside what is there.
    pub(super) fn check_room_to_declare(
        &self,
        route: &HttpMatch,
        policy: &HttpPolicy,
    ) -> Result<(), Bound> {
        if !self.next.declared.contains_key(route) && self.next.declared.len() >= MAX_DECLARED {
            return Err(Bound::Declared);
        }
        if policy.answers_alone() && find_pool(&self.next, route).is_none() {
            let key = RouteKey::Http(route.clone());
            check_host(&self.next, route, 1, || std::iter::once(&key))?;
        }
        Ok(())
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bound::Entries => write!(f, "{MAX_ENTRIES} backends over all routes"),
            Bound::PoolBackends => write!(f, "{MAX_POOL_BACKENDS} backends of one route"),
            Bound::HostPaths => write!(f, "{MAX_HOST_PATHS} routes of one host"),
            Bound::PathConditions => {
                write!(
                    f,
                    "{MAX_PATH_CONDITIONS} routes with conditions of one path"
                )
            }
            Bound::SourceRoutes(origin, most) => {
                write!(
                    f,
                    "no more than guard.limits.{}.routes, {most}",
                    origin.as_str()
                )
            }
            Bound::SourceBackends(origin, most) => {
                write!(
                    f,
                    "no more than guard.limits.{}.backends, {most}",
                    origin.as_str()
                )
            }
            Bound::Flapping => write!(f, "guard.damping: it came and went too often"),
            Bound::Declared => write!(f, "{MAX_DECLARED} declared routes"),
        }
    }
}

/// Whether a source has a backend in the pool. Mostly the first is of it, or none.
pub(super) fn has_backend_of(pool: &Pool, origin: Origin) -> bool {
    pool.backends.iter().any(|backend| backend.origin == origin)
}

/// Whether the host of `route`, which is new, has room for it and the rest of `new`, `count` in all.
fn check_host<'r, I: Iterator<Item = &'r RouteKey>>(
    snapshot: &Snapshot,
    route: &HttpMatch,
    count: usize,
    new: impl Fn() -> I,
) -> Result<(), Bound> {
    let known = snapshot.hosts.get(&route.host).map(|(_, routes)| routes);
    let added = |wanted: &dyn Fn(&HttpMatch) -> bool| {
        let routes = new().filter_map(|route| match route {
            RouteKey::Http(http) if wanted(http) && find_pool(snapshot, http).is_none() => {
                Some(http)
            }
            RouteKey::Http(_) | RouteKey::Vip(_) => None,
        });
        routes.collect::<BTreeSet<&HttpMatch>>().len()
    };
    let of_host = known.map_or(0, HostRoutes::count);
    if of_host + count > MAX_HOST_PATHS
        && of_host + added(&|http| http.host == route.host) > MAX_HOST_PATHS
    {
        return Err(Bound::HostPaths);
    }
    if route.conditions.is_some() {
        let is_beside = |http: &HttpMatch| {
            http.conditions.is_some() && (&http.host, &http.path) == (&route.host, &route.path)
        };
        let known = known.into_iter().flat_map(HostRoutes::conditional);
        let of_path = known.filter(|known| known.path == route.path).count();
        if of_path + added(&is_beside) > MAX_PATH_CONDITIONS {
            return Err(Bound::PathConditions);
        }
    }
    Ok(())
}
