//! The one immutable view of routes and health that both layers read.
//!
//! The agent publishes a new [`Snapshot`] after each batch of events; it shares all but the changed
//! parts with the one before, so publishing costs what changed and readers hold it for free.

use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;

pub use crate::snapshot::hosts::Hosts;
pub use crate::snapshot::routes::{ConditionalRoute, HostRoute, HostRoutes};

use crate::health::state::in_panic;
use crate::route::policy::HttpPolicy;
use crate::route::{HttpMatch, Pool, Vip};

mod hosts;
mod routes;

/// Routes and health at one revision.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Grows by one with every published change.
    pub revision: u64,
    /// By host as in [`crate::route::HttpMatch`]: exact names and `*.`-wildcards in one map.
    pub hosts: Hosts,
    pub vips: imbl::OrdMap<Vip, Arc<Pool>>,
    /// What sources declare of routes, those without a pool included: one policy of each source, of
    /// which the first in the order of [`Origin`](crate::route::Origin) holds.
    pub declared: imbl::HashMap<HttpMatch, Vec<Arc<HttpPolicy>>>,
    /// Backends that the health checker holds to be down. New requests and flows avoid them unless
    /// their pool is [in panic](Snapshot::in_panic).
    pub unhealthy: imbl::HashSet<SocketAddr>,
    /// Backends that an operator has drained: they get no new requests and flows, as if each of their
    /// registrations had weight 0.
    pub draining: imbl::HashSet<SocketAddr>,
    /// The same for one VIP each: whatever else the backend serves goes on.
    pub draining_at: imbl::HashSet<(Vip, SocketAddr)>,
    /// Percent of a pool that must be healthy; `health.panic_threshold`.
    pub panic_threshold: u8,
    /// Grows with every change of `unhealthy` or `panic_threshold`, so that what follows from them and
    /// from a pool, which never changes, can be kept.
    pub health_revision: u64,
}

impl Snapshot {
    /// Whether so few backends of a pool are healthy that all are used.
    pub fn in_panic(&self, pool: &Pool) -> bool {
        let addresses = pool.backends.iter().map(|backend| backend.address);
        in_panic(addresses, &self.unhealthy, self.panic_threshold)
    }
}

/// The place where the agent publishes and everyone else reads.
pub type Published = Arc<ArcSwap<Snapshot>>;
