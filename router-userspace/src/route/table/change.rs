//! What calls of the route table did to it, for whoever publishes, counts and logs.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use crate::route::table::Bound;
use crate::route::{Backend, Origin, RouteKey, Vip};

/// What a call did to the table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Whether there is something to publish.
    pub changed: bool,
    /// The VIPs whose pool, or the health in it, changed.
    pub vips: BTreeSet<Vip>,
    pub added: u64,
    pub updated: u64,
    /// Repeated without a difference.
    pub refreshed: u64,
    /// Withdrawn by their source.
    pub removed: u64,
    /// Not repeated in time.
    pub expired: u64,
    /// Noted without effect, because a source of precedence names the same backend.
    pub shadowed: u64,
    /// Refused with their registration, which one of the bounds of this module kept out.
    pub full: u64,
    /// The bound that refused a registration last.
    pub bound: Option<Bound>,
    /// Registrations refused for `guard.limits`.
    pub over_limit: u64,
    /// Backends that were held out of a pool they would have joined.
    pub held: u64,
    /// Some of those, up to [`MAX_TOLD`].
    pub told: Vec<KeptOut>,
}

/// Registrations that `[guard]` keeps out that are told one by one, of a batch.
pub const MAX_TOLD: usize = 16;

/// A registration that a bound kept out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptOut {
    pub origin: Origin,
    pub address: SocketAddr,
    /// The first of its routes.
    pub route: RouteKey,
    pub bound: Bound,
}

impl Change {
    /// Adds what a later call did.
    pub fn merge(&mut self, mut later: Change) {
        self.changed |= later.changed;
        self.vips.append(&mut later.vips);
        self.added += later.added;
        self.updated += later.updated;
        self.refreshed += later.refreshed;
        self.removed += later.removed;
        self.expired += later.expired;
        self.shadowed += later.shadowed;
        self.full += later.full;
        self.bound = later.bound.or(self.bound);
        self.over_limit += later.over_limit;
        self.held += later.held;
        let room = MAX_TOLD.saturating_sub(self.told.len());
        self.told.extend(later.told.into_iter().take(room));
    }

    /// Notes a registration that `[guard]` kept out.
    pub(super) fn tell(&mut self, bound: Bound, backend: &Backend, routes: &[RouteKey]) {
        match bound {
            Bound::SourceRoutes(..) | Bound::SourceBackends(..) => self.over_limit += 1,
            Bound::Flapping => self.held += 1,
            Bound::Entries
            | Bound::PoolBackends
            | Bound::HostPaths
            | Bound::PathConditions
            | Bound::Declared => return,
        }
        if let (Some(route), true) = (routes.first(), self.told.len() < MAX_TOLD) {
            self.told.push(KeptOut {
                origin: backend.origin,
                address: backend.address,
                route: route.clone(),
                bound,
            });
        }
    }

    pub(super) fn touch(&mut self, route: &RouteKey) {
        self.changed = true;
        if let RouteKey::Vip(vip) = route {
            self.vips.insert(*vip);
        }
    }
}
