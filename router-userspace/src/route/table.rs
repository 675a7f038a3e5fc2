//! The route table: the one mutable truth about routes, owned by the agent.
//!
//! [`RouteTable`] takes in what sources announce, forgets what is not repeated in time, and keeps the
//! [`Snapshot`] that is published next. An entry is what one source says of one backend of one route,
//! identified by (route, address, origin); its other properties are those of the last registration.
//! Pure: no clock, no I/O. What a change costs does not depend on the number of routes; a repeated
//! registration renews its leases and nothing else, without an allocation.
//!
//! Only the source that announced an entry changes, withdraws or expires it. Where several sources
//! name an address of a route, it is served as the first of them in the order of [`Origin`] says, and
//! as the next says once that one is gone. An adopted entry goes to whoever speaks of it first.
//!
//! A source may also declare how a route is served. That holds for whatever backends the route has
//! until the source withdraws it, is kept beside the entries, and makes a route without backends only
//! if it answers alone. One that was adopted ends as adopted entries do.

use std::collections::BTreeSet;
use std::hash::BuildHasher;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::config::{PortRange, SourceLimits};
use crate::route::expiry::{self, Expiry, Tick};
use crate::route::{
    Backend, HttpMatch, Origin, Proto, Registered, Registration, RouteEvent, RouteKey,
    Unregistration, Vip,
};
use crate::snapshot::Snapshot;

mod change;
mod declared;
mod held;
mod pools;
mod room;

pub use change::{Change, KeptOut, MAX_TOLD};
use held::Held;
use pools::{find_pool, pool_mut};
pub use room::{
    Bound, MAX_DECLARED, MAX_ENTRIES, MAX_HOST_PATHS, MAX_PATH_CONDITIONS, MAX_POOL_BACKENDS,
};

/// Backends that operators have drained, at all or for a VIP.
pub const MAX_DRAINING: usize = 4096;

/// Leases that [`RouteTable::expire`] looks at in one call: less than a millisecond of work, since many
/// that began together are due together.
pub const MAX_VISITS: usize = 1024;

/// How much the table holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// By host, path and conditions.
    pub http_routes: usize,
    pub vips: usize,
    /// Backends of routes by [`Origin`], in the order of its variants; one that several sources name
    /// counts with each.
    pub entries: [usize; Origin::ALL.len()],
}

pub struct RouteTable {
    /// Slots that [`Self::index`] and [`Self::expiry`] name by number.
    entries: Vec<Option<Entry>>,
    free: Vec<u32>,
    /// By (route, address), of each source.
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
    /// How many there are, in the order of [`Origin`]'s variants.
    by_origin: [usize; Origin::ALL.len()],
    /// Routes with a backend of each, in the same order.
    routes_of: [usize; Origin::ALL.len()],
    limits: [SourceLimits; Origin::ALL.len()],
    /// Backends that come and go too often.
    held: Held,
    /// Of the call that is under way.
    now: Instant,
    /// Which VIPs a backend serves, for changes of its health.
    vips_of: BTreeSet<(SocketAddr, Vip)>,
    expiry: Expiry,
    /// Routes of which a declaration was adopted; another may have taken its place.
    adopted_declarations: Vec<HttpMatch>,
    sources: [Source; Origin::ALL.len()],
    /// What [`Self::register`] finds of each route; kept for its memory.
    found: Vec<Option<u32>>,
    stale_threshold: Duration,
    epoch: Instant,
    http_routes: usize,
    /// What the next [`Self::snapshot`] holds.
    next: Snapshot,
}

/// One backend of one route, as one source has it.
struct Entry {
    route: RouteKey,
    backend: Arc<Backend>,
    /// What the registration said of the whole pool.
    registered: Option<Arc<Registered>>,
    renewed: Tick,
    lifetime: Tick,
    /// When [`Expiry`] holds a visit of this entry; [`Tick::MAX`]: it holds none.
    scheduled: Tick,
}

/// Whether a source can repeat what it announced.
#[derive(Clone, Copy)]
struct Source {
    connected: bool,
    /// When it came back: leases renewed before count as renewed then.
    since: Tick,
}

impl RouteTable {
    pub fn new(stale_threshold: Duration, now: Instant) -> RouteTable {
        RouteTable {
            entries: Vec::new(),
            free: Vec::new(),
            index: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            by_origin: [0; Origin::ALL.len()],
            routes_of: [0; Origin::ALL.len()],
            limits: [SourceLimits::default(); Origin::ALL.len()],
            held: Held::default(),
            now,
            vips_of: BTreeSet::new(),
            expiry: Expiry::default(),
            adopted_declarations: Vec::new(),
            sources: [Source {
                connected: true,
                since: 0,
            }; Origin::ALL.len()],
            found: Vec::new(),
            stale_threshold,
            epoch: now,
            http_routes: 0,
            next: Snapshot::default(),
        }
    }

    pub fn apply(&mut self, event: RouteEvent, now: Instant) -> Change {
        let mut change = Change::default();
        self.now = now;
        match event {
            RouteEvent::Register(registration) => {
                self.register(registration, now, &mut change);
            }
            RouteEvent::Unregister(unregistration) => self.unregister(unregistration, &mut change),
            RouteEvent::Declare(declaration) => self.declare(declaration, &mut change),
            RouteEvent::Withdraw(withdrawal) => self.withdraw(&withdrawal, &mut change),
        }
        change
    }

    /// Removes what is not `allowed` of what sources announced and declared. Looks at all of the table.
    pub fn retain(&mut self, allowed: impl Fn(Origin, &RouteKey) -> bool) -> Change {
        let mut change = Change::default();
        for id in 0..u32::try_from(self.entries.len()).expect("MAX_ENTRIES fits u32") {
            let entry = self.entries[id as usize].as_ref();
            if entry.is_some_and(|entry| !allowed(entry.backend.origin, &entry.route)) {
                self.remove(id, &mut change);
                change.removed += 1;
            }
        }
        self.retain_declared(&allowed, &mut change);
        change
    }

    /// Removes entries whose lease is over, after a look at no more than [`MAX_VISITS`]. Those of a
    /// source that is away stay.
    pub fn expire(&mut self, now: Instant) -> Change {
        let mut change = Change::default();
        self.now = now;
        self.release_due(now, &mut change);
        let now = expiry::tick_before(self.epoch, now);
        for _ in 0..MAX_VISITS {
            let Some(id) = self.expiry.due(now) else {
                break;
            };
            self.visit(id, now, &mut change);
        }
        self.expire_declared(now, &mut change);
        change
    }

    /// Whether [`Self::expire`] left something for its next call.
    pub fn has_due(&self, now: Instant) -> bool {
        self.expiry.has_due(expiry::tick_before(self.epoch, now))
    }

    /// Notes that a source is away, or that what it says is whole. Leases do not end while it is away,
    /// and have their full lifetime again when it is back. What was adopted may be of any source, so it
    /// is kept while one of them is away. A source of which nothing was noted counts as whole.
    pub fn set_connected(&mut self, origin: Origin, connected: bool, now: Instant) {
        let since = expiry::tick_after(self.epoch, now);
        self.sources[origin as usize].set(connected, since);
        let (adopted, speaking) = self
            .sources
            .split_last_mut()
            .expect("adopted is the last of Origin::ALL");
        adopted.set(speaking.iter().all(|source| source.connected), since);
    }

    /// Notes what the health checker found.
    pub fn set_health(&mut self, backend: SocketAddr, healthy: bool) -> Change {
        let changed = match healthy {
            true => self.next.unhealthy.remove(&backend).is_some(),
            false => self.next.unhealthy.insert(backend).is_none(),
        };
        let mut change = Change {
            changed,
            ..Change::default()
        };
        if changed {
            self.next.health_revision += 1;
            change.vips.extend(self.vips_of(backend));
        }
        change
    }

    /// Has a backend drained whatever its registrations say, or undoes that: at both layers, or for one
    /// VIP. Holds for the address, also if it is registered later; [`MAX_DRAINING`] at once, beyond
    /// which nothing changes.
    pub fn set_draining(&mut self, backend: SocketAddr, vip: Option<Vip>, drain: bool) -> Change {
        let Snapshot {
            draining,
            draining_at,
            ..
        } = &mut self.next;
        let full = draining.len() + draining_at.len() >= MAX_DRAINING;
        let changed = match (drain, vip) {
            (true, _) if full => false,
            (true, None) => draining.insert(backend).is_none(),
            (true, Some(vip)) => draining_at.insert((vip, backend)).is_none(),
            (false, None) => draining.remove(&backend).is_some(),
            (false, Some(vip)) => draining_at.remove(&(vip, backend)).is_some(),
        };
        let mut change = Change {
            changed,
            ..Change::default()
        };
        if changed {
            let served = self.vips_of(backend);
            change
                .vips
                .extend(served.filter(|served| vip.is_none_or(|vip| vip == *served)));
        }
        change
    }

    /// The VIPs that a backend serves.
    fn vips_of(&self, backend: SocketAddr) -> impl Iterator<Item = Vip> {
        let first = Vip {
            proto: Proto::Tcp,
            address: Ipv4Addr::UNSPECIFIED.into(),
            ports: PortRange { first: 0, last: 0 },
        };
        let serves = self.vips_of.range((backend, first)..);
        serves
            .take_while(move |(address, _)| *address == backend)
            .map(|(_, vip)| *vip)
    }

    /// Sets the percentage of a pool that must be healthy.
    pub fn set_panic_threshold(&mut self, percent: u8) -> Change {
        let mut change = Change::default();
        if self.next.panic_threshold != percent {
            self.next.panic_threshold = percent;
            self.next.health_revision += 1;
            change.changed = true;
            change.vips.extend(self.next.vips.keys());
        }
        change
    }

    /// Sets the longest lifetime of the leases that are given or renewed from here on.
    pub fn set_stale_threshold(&mut self, stale_threshold: Duration) {
        self.stale_threshold = stale_threshold;
    }

    /// Sets what each source may take from here on, in the order of [`Origin`]'s variants; what is there
    /// stays.
    pub fn set_limits(&mut self, limits: [SourceLimits; Origin::ALL.len()]) {
        self.limits = limits;
    }

    /// The table as it is, under a new revision.
    pub fn snapshot(&mut self) -> Snapshot {
        self.next.revision += 1;
        self.next.clone()
    }

    pub fn size(&self) -> Size {
        Size {
            http_routes: self.http_routes,
            vips: self.next.vips.len(),
            entries: self.by_origin,
        }
    }

    /// Upserts each route of a registration, or none if not all have room.
    fn register(&mut self, registration: Registration, now: Instant, change: &mut Change) {
        let Registration {
            routes,
            backend,
            stale_after,
            balance,
            route_service_url,
        } = registration;
        let now = expiry::tick_after(self.epoch, now);
        let lifetime = stale_after
            .unwrap_or(self.stale_threshold)
            .min(self.stale_threshold);
        let lifetime = expiry::ticks(lifetime);
        let registered = Registered {
            balance,
            route_service_url,
        };
        let registered = registered.shared();
        let mut found = std::mem::take(&mut self.found);
        found.clear();
        let find = |route| self.find(route, backend.address, backend.origin);
        found.extend(routes.iter().map(find));
        if let Err(bound) = self.check_room(&routes, &found, backend.origin) {
            change.full += routes.len() as u64;
            change.bound = Some(bound);
            change.tell(bound, &backend, &routes);
            self.found = found;
            return;
        }
        for (route, known) in routes.into_iter().zip(&found) {
            // A registration may name a route twice, and then the first adds it.
            let known = known.or_else(|| self.find(&route, backend.address, backend.origin));
            let id = match known {
                Some(id) => {
                    self.update(id, &backend, &registered, change);
                    id
                }
                None if backend.origin == Origin::Adopted
                    && self.serving(&route, backend.address).is_some() =>
                {
                    change.shadowed += 1;
                    continue;
                }
                None => self.insert(route, &backend, &registered, change),
            };
            let entry = entry_mut(&mut self.entries, id);
            entry.renewed = now;
            entry.lifetime = lifetime;
            let deadline = now.saturating_add(lifetime);
            if backend.origin.expires() && deadline < entry.scheduled {
                self.expiry.cancel(id, entry.scheduled);
                entry.scheduled = deadline;
                self.expiry.schedule(id, deadline);
            }
        }
        self.found = found;
    }

    fn unregister(&mut self, gone: Unregistration, change: &mut Change) {
        for route in &gone.routes {
            if let Some(id) = self.find(route, gone.address, gone.origin) {
                if is_of(&gone, &entry(&self.entries, id).backend) {
                    self.remove(id, change);
                    change.removed += 1;
                }
            } else if self.serving(route, gone.address).is_some() {
                change.shadowed += 1;
            }
        }
    }

    /// Brings an entry in line with a registration of its source, or of the first that speaks of an
    /// adopted one.
    fn update(
        &mut self,
        id: u32,
        backend: &Arc<Backend>,
        registered: &Option<Arc<Registered>>,
        change: &mut Change,
    ) {
        let entry = entry_mut(&mut self.entries, id);
        if entry.backend == *backend && entry.registered == *registered {
            change.refreshed += 1;
            return;
        }
        entry.registered.clone_from(registered);
        let known = std::mem::replace(&mut entry.backend, Arc::clone(backend));
        self.by_origin[known.origin as usize] -= 1;
        self.by_origin[backend.origin as usize] += 1;
        change.updated += 1;
        if self.is_serving(id) {
            self.serve(id, change);
        } else {
            change.shadowed += 1;
        }
    }

    /// Adds an entry, for which there is room.
    fn insert(
        &mut self,
        route: RouteKey,
        backend: &Arc<Backend>,
        registered: &Option<Arc<Registered>>,
        change: &mut Change,
    ) -> u32 {
        let route = self.make_pool(route);
        let hash = self.hasher.hash_one((&route, backend.address));
        let entry = Entry {
            route,
            backend: Arc::clone(backend),
            registered: registered.clone(),
            renewed: 0,
            lifetime: 0,
            scheduled: Tick::MAX,
        };
        let id = match self.free.pop() {
            Some(id) => {
                self.entries[id as usize] = Some(entry);
                id
            }
            None => {
                self.entries.push(Some(entry));
                u32::try_from(self.entries.len() - 1).expect("MAX_ENTRIES fits u32")
            }
        };
        self.by_origin[backend.origin as usize] += 1;
        let (entries, hasher) = (&self.entries, &self.hasher);
        self.index
            .insert_unique(hash, id, |id| entry_hash(entries, hasher, *id));
        change.added += 1;
        if self.is_serving(id) {
            self.serve(id, change);
        } else {
            change.shadowed += 1;
        }
        id
    }

    fn remove(&mut self, id: u32, change: &mut Change) {
        let served = self.is_serving(id);
        let hash = entry_hash(&self.entries, &self.hasher, id);
        let indexed = self.index.find_entry(hash, |at| *at == id);
        indexed.expect("every entry is indexed").remove();
        let entry = self.entries[id as usize]
            .take()
            .expect("indexed entries are there");
        self.free.push(id);
        self.expiry.cancel(id, entry.scheduled);
        self.by_origin[entry.backend.origin as usize] -= 1;
        if !served {
            change.shadowed += 1;
            return;
        }
        match self.serving(&entry.route, entry.backend.address) {
            Some(next) => self.serve(next, change),
            None => self.take_out(&entry.route, entry.backend.address, change),
        }
    }

    /// Looks at an entry whose time may have come.
    fn visit(&mut self, id: u32, now: Tick, change: &mut Change) {
        let entry = entry_mut(&mut self.entries, id);
        entry.scheduled = Tick::MAX;
        if !entry.backend.origin.expires() {
            return;
        }
        let source = self.sources[entry.backend.origin as usize];
        let renewed = if source.connected {
            entry.renewed.max(source.since)
        } else {
            now
        };
        let deadline = renewed.saturating_add(entry.lifetime);
        if deadline > now {
            entry.scheduled = deadline;
            self.expiry.schedule(id, deadline);
        } else {
            self.remove(id, change);
            change.expired += 1;
        }
    }

    /// What a source said of an address of a route, or what was adopted and so is its to change.
    fn find(&self, route: &RouteKey, address: SocketAddr, origin: Origin) -> Option<u32> {
        let hash = self.hasher.hash_one((route, address));
        let is_it = |id: &u32| {
            let entry = entry(&self.entries, *id);
            let by = entry.backend.origin;
            entry.is_of(route, address) && (by == origin || by == Origin::Adopted)
        };
        self.index.find(hash, is_it).copied()
    }

    /// The entry that an address of a route is served by: that of the source of precedence.
    fn serving(&self, route: &RouteKey, address: SocketAddr) -> Option<u32> {
        let hash = self.hasher.hash_one((route, address));
        let entries = self.index.iter_hash(hash).copied();
        entries
            .filter(|id| entry(&self.entries, *id).is_of(route, address))
            .min_by_key(|id| entry(&self.entries, *id).backend.origin)
    }

    fn is_serving(&self, id: u32) -> bool {
        let entry = entry(&self.entries, id);
        self.serving(&entry.route, entry.backend.address) == Some(id)
    }
}

impl Source {
    fn set(&mut self, connected: bool, since: Tick) {
        if connected && !self.connected {
            self.since = since;
        }
        self.connected = connected;
    }
}

impl Entry {
    fn is_of(&self, route: &RouteKey, address: SocketAddr) -> bool {
        self.backend.address == address && self.route == *route
    }
}

/// Whether the instance that leaves is the one that has the address, as far as both say who they are.
fn is_of(gone: &Unregistration, backend: &Backend) -> bool {
    match (&gone.instance_id, &backend.instance().id) {
        (Some(gone), Some(known)) => gone == known,
        (None, _) | (_, None) => true,
    }
}

fn entry(entries: &[Option<Entry>], id: u32) -> &Entry {
    let entry = entries[id as usize].as_ref();
    entry.expect("indexed entries are there")
}

fn entry_mut(entries: &mut [Option<Entry>], id: u32) -> &mut Entry {
    let entry = entries[id as usize].as_mut();
    entry.expect("indexed entries are there")
}

fn entry_hash(entries: &[Option<Entry>], hasher: &DefaultHashBuilder, id: u32) -> u64 {
    let entry = entry(entries, id);
    hasher.hash_one((&entry.route, entry.backend.address))
}

#[cfg(test)]
mod tests;
