//! Which addresses there are to check: the backends of a snapshot, each once. Pure.
//!
//! [`Members`] follows one snapshot after another by what they do not share, so a registration in a
//! table of a million routes costs what its own pools cost. The checker calls it about once a second;
//! it says what became of which address and knows nothing of probes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use imbl::ordmap::DiffItem;

use crate::route::{Backend, HttpProtocol, Pool, Proto};
use crate::snapshot::{HostRoutes, Snapshot};

/// What a backend is known to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// TCP connections. What it speaks on them is TLS, HTTP/2, or anything: it serves a VIP.
    Tcp,
    /// Requests in HTTP/1, in clear.
    Http,
}

/// An address and what it takes, `None` if it left.
pub type Changed = (SocketAddr, Option<Takes>);

/// The backends of the snapshot followed last. About 60 bytes an address.
#[derive(Default)]
pub struct Members {
    followed: Arc<Snapshot>,
    uses: HashMap<SocketAddr, Uses>,
}

/// How many pools a backend is in, by what they say of it.
#[derive(Clone, Copy, Default)]
struct Uses {
    http: u32,
    tcp: u32,
}

impl Uses {
    fn takes(self) -> Option<Takes> {
        match self {
            Uses { http: 0, tcp: 0 } => None,
            Uses { http: 0, .. } => Some(Takes::Tcp),
            Uses { .. } => Some(Takes::Http),
        }
    }
}

impl Members {
    /// Goes on to `snapshot`, whether newer or not, and returns every address of which something
    /// else is so. Backends that serve UDP VIPs only are left out: there is no telling if they answer.
    pub fn follow(&mut self, snapshot: Arc<Snapshot>) -> Vec<Changed> {
        let before = std::mem::replace(&mut self.followed, snapshot);
        let mut count = Count {
            uses: &mut self.uses,
            before: HashMap::new(),
        };
        let after = &self.followed;
        before
            .hosts
            .diff(&after.hosts, &mut |old, new| count.host(old, new));
        for item in before.vips.diff(&after.vips) {
            let (vip, old, new) = match item {
                DiffItem::Add(vip, new) => (vip, None, Some(new)),
                DiffItem::Update { old, new } => (old.0, Some(old.1), Some(new.1)),
                DiffItem::Remove(vip, old) => (vip, Some(old), None),
            };
            if vip.proto == Proto::Tcp {
                count.pool(old, new, |_| Takes::Tcp);
            }
        }
        let touched = count.before;
        let mut changed = Vec::new();
        for (address, before) in touched {
            let after = self.uses.get(&address).and_then(|uses| uses.takes());
            if after.is_none() {
                self.uses.remove(&address);
            }
            if after != before {
                changed.push((address, after));
            }
        }
        changed
    }
}

/// One step from a snapshot to another.
struct Count<'a> {
    uses: &'a mut HashMap<SocketAddr, Uses>,
    /// What each address took that was counted up or down.
    before: HashMap<SocketAddr, Option<Takes>>,
}

impl Count<'_> {
    fn host(&mut self, old: Option<&HostRoutes>, new: Option<&HostRoutes>) {
        let routes = |routes| Option::into_iter(routes).flat_map(HostRoutes::iter);
        let mut added: HashMap<_, &Arc<Pool>> = routes(new)
            .map(|route| ((route.path, route.conditions), route.pool))
            .collect();
        for old in routes(old) {
            let new = added.remove(&(old.path, old.conditions));
            self.pool(Some(old.pool), new, of_route);
        }
        for new in added.into_values() {
            self.pool(None, Some(new), of_route);
        }
    }

    /// Counts the backends that only one of two versions of a pool has.
    fn pool(
        &mut self,
        old: Option<&Arc<Pool>>,
        new: Option<&Arc<Pool>>,
        takes: impl Fn(&Backend) -> Takes,
    ) {
        let (old, new) = (backends(old), backends(new));
        if std::ptr::eq(old, new) {
            return;
        }
        for backend in old.iter().filter(|backend| !has(new, backend)) {
            *self.uses_of(backend, takes(backend)) -= 1;
        }
        for backend in new.iter().filter(|backend| !has(old, backend)) {
            *self.uses_of(backend, takes(backend)) += 1;
        }
    }

    fn uses_of(&mut self, backend: &Backend, takes: Takes) -> &mut u32 {
        let uses = self.uses.entry(backend.address).or_default();
        self.before
            .entry(backend.address)
            .or_insert_with(|| uses.takes());
        match takes {
            Takes::Tcp => &mut uses.tcp,
            Takes::Http => &mut uses.http,
        }
    }
}

fn backends(pool: Option<&Arc<Pool>>) -> &[Arc<Backend>] {
    pool.map_or(&[], |pool| &pool.backends)
}

/// Whether a pool shares the backend, of which nothing has changed then.
fn has(pool: &[Arc<Backend>], backend: &Arc<Backend>) -> bool {
    let at = pool.binary_search_by_key(&backend.address, |other| other.address);
    at.is_ok_and(|at| Arc::ptr_eq(&pool[at], backend))
}

/// What the route of a host says of its backend.
fn of_route(backend: &Backend) -> Takes {
    match (backend.tls(), backend.protocol) {
        (None, HttpProtocol::Http1) => Takes::Http,
        (Some(_), _) | (None, HttpProtocol::Http2) => Takes::Tcp,
    }
}

#[cfg(test)]
mod tests;
