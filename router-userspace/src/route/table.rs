//! The route table: the one mutable truth about routes, owned by the agent.
//!
//! [`RouteTable`] takes in what sources announce, forgets what is not repeated in time, and keeps the
//! [`Snapshot`] that is published next. An entry is one backend of one route, identified by (route,
//! address) as in gorouter; its other properties are those of the last registration. Pure: no clock,
//! no I/O. What a change costs does not depend on the number of routes; a repeated registration
//! renews its leases and nothing else, without an allocation.
//!
//! An entry belongs to the source that announced it. Only that source changes, withdraws or expires
//! it, with two exceptions: an adopted entry goes to whoever speaks of it first, and a routes file
//! takes an address over from NATS.
//!
//! A source may also declare how a route is served. That holds for whatever backends the route has
//! until the source withdraws it, is kept beside the entries, and makes a route without backends only
//! if it answers alone.

use std::collections::BTreeSet;
use std::fmt;
use std::hash::BuildHasher;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hashbrown::{DefaultHashBuilder, HashMap, HashTable};

use crate::config::PortRange;
use crate::route::expiry::{self, Expiry, Tick};
use crate::route::policy::HttpPolicy;
use crate::route::{
    Backend, Balance, Declaration, HttpMatch, Origin, Pool, Proto, Registration, RouteEvent,
    RouteKey, Unregistration, Vip, Withdrawal,
};
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

/// Backends that operators have drained, at all or for a VIP.
pub const MAX_DRAINING: usize = 4096;

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
    /// Left alone because the entry belongs to another source.
    pub shadowed: u64,
    /// Refused with their registration, which one of the bounds of this module kept out.
    pub full: u64,
    /// The bound that refused a registration last.
    pub bound: Option<Bound>,
}

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
}

/// How much the table holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// By host, path and conditions.
    pub http_routes: usize,
    pub vips: usize,
    /// Backends of routes by [`Origin`], in the order of its variants.
    pub entries: [usize; 3],
}

pub struct RouteTable {
    /// Slots that [`Self::index`] and [`Self::expiry`] name by number.
    entries: Vec<Option<Entry>>,
    free: Vec<u32>,
    /// By (route, address).
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
    /// How many there are, in the order of [`Origin`]'s variants.
    by_origin: [usize; 3],
    /// What each source declares of a route, in the order of [`Origin`]'s variants.
    declared: HashMap<HttpMatch, Declared>,
    /// Which VIPs a backend serves, for changes of its health.
    vips_of: BTreeSet<(SocketAddr, Vip)>,
    expiry: Expiry,
    sources: [Source; 3],
    /// What [`Self::register`] finds of each route; kept for its memory.
    found: Vec<Option<u32>>,
    stale_threshold: Duration,
    epoch: Instant,
    http_routes: usize,
    /// What the next [`Self::snapshot`] holds.
    next: Snapshot,
}

type Declared = [Option<Arc<HttpPolicy>>; 3];

/// Whose declaration of a route holds if several sources have one: the first of these.
const RANKS: [Origin; 3] = [Origin::File, Origin::Nats, Origin::Adopted];

/// One backend of one route.
struct Entry {
    route: RouteKey,
    backend: Arc<Backend>,
    /// What the registration said of the whole pool; mostly nothing.
    policy: Option<Box<Policy>>,
    renewed: Tick,
    lifetime: Tick,
    /// When [`Expiry`] holds a visit of this entry; [`Tick::MAX`]: it holds none.
    scheduled: Tick,
}

#[derive(PartialEq, Eq)]
struct Policy {
    balance: Option<Balance>,
    route_service_url: Option<Arc<str>>,
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
            by_origin: [0; 3],
            declared: HashMap::new(),
            vips_of: BTreeSet::new(),
            expiry: Expiry::default(),
            sources: [Source {
                connected: true,
                since: 0,
            }; 3],
            found: Vec::new(),
            stale_threshold,
            epoch: now,
            http_routes: 0,
            next: Snapshot::default(),
        }
    }

    pub fn apply(&mut self, event: RouteEvent, now: Instant) -> Change {
        let mut change = Change::default();
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

    /// Removes the routes of VIPs that are not `allowed`.
    pub fn retain_vips(&mut self, allowed: impl Fn(&Vip) -> bool) -> Change {
        let mut change = Change::default();
        let gone: Vec<(Vip, Arc<Pool>)> = self
            .next
            .vips
            .iter()
            .filter(|(vip, _)| !allowed(vip))
            .map(|(vip, pool)| (*vip, Arc::clone(pool)))
            .collect();
        for (vip, pool) in gone {
            for backend in &pool.backends {
                let id = self.find(&RouteKey::Vip(vip), backend.address);
                self.remove(id.expect("every member has an entry"), &mut change);
                change.removed += 1;
            }
        }
        change
    }

    /// Removes every entry whose lease is over. Those of a source that is away stay.
    pub fn expire(&mut self, now: Instant) -> Change {
        let mut change = Change::default();
        let now = expiry::tick_before(self.epoch, now);
        while let Some(id) = self.expiry.due(now) {
            self.visit(id, now, &mut change);
        }
        change
    }

    /// Notes that a source lost or regained its server. Leases do not end while it is away, and have
    /// their full lifetime again when it is back. What was adopted came from NATS and follows it.
    pub fn set_connected(&mut self, origin: Origin, connected: bool, now: Instant) {
        let since = expiry::tick_after(self.epoch, now);
        let followers: &[Origin] = match origin {
            Origin::Nats => &[Origin::Nats, Origin::Adopted],
            Origin::File | Origin::Adopted => &[],
        };
        for follower in followers {
            let source = &mut self.sources[*follower as usize];
            if connected && !source.connected {
                source.since = since;
            }
            source.connected = connected;
        }
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
        let policy = Policy {
            balance,
            route_service_url,
        };
        let mut found = std::mem::take(&mut self.found);
        found.clear();
        found.extend(routes.iter().map(|route| self.find(route, backend.address)));
        if let Err(bound) = self.check_room(&routes, &found) {
            change.full += routes.len() as u64;
            change.bound = Some(bound);
            self.found = found;
            return;
        }
        for (route, known) in routes.into_iter().zip(&found) {
            // A registration may name a route twice, and then the first adds it.
            let known = known.or_else(|| self.find(&route, backend.address));
            let id = match known {
                Some(id) => self.update(id, &backend, &policy, change),
                None => Some(self.insert(route, &backend, &policy, change)),
            };
            let Some(id) = id else { continue };
            let entry = self.entries[id as usize]
                .as_mut()
                .expect("an upserted entry is there");
            entry.renewed = now;
            entry.lifetime = lifetime;
            let deadline = now.saturating_add(lifetime);
            if backend.origin != Origin::File && deadline < entry.scheduled {
                self.expiry.cancel(id, entry.scheduled);
                entry.scheduled = deadline;
                self.expiry.schedule(id, deadline);
            }
        }
        self.found = found;
    }

    /// Whether the routes that are not found fit beside what is there. One that is named twice
    /// counts twice against the number of entries.
    fn check_room(&self, routes: &[RouteKey], found: &[Option<u32>]) -> Result<(), Bound> {
        let new = || {
            let pairs = routes.iter().zip(found);
            pairs.filter_map(|(route, found)| found.is_none().then_some(route))
        };
        let count = new().count();
        if self.index.len() + count > MAX_ENTRIES {
            return Err(Bound::Entries);
        }
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
        }
        Ok(())
    }

    fn unregister(&mut self, gone: Unregistration, change: &mut Change) {
        for route in &gone.routes {
            let Some(id) = self.find(route, gone.address) else {
                continue;
            };
            let owner = self.entries[id as usize]
                .as_ref()
                .map(|entry| entry.backend.origin);
            match owner {
                Some(owner) if owner == gone.origin || owner == Origin::Adopted => {
                    self.remove(id, change);
                    change.removed += 1;
                }
                Some(_) | None => change.shadowed += 1,
            }
        }
    }

    /// Brings an entry in line with a registration; `None` if it belongs to another source.
    fn update(
        &mut self,
        id: u32,
        backend: &Arc<Backend>,
        policy: &Policy,
        change: &mut Change,
    ) -> Option<u32> {
        let entry = self.entries[id as usize]
            .as_mut()
            .expect("indexed entries are there");
        let owner = entry.backend.origin;
        if !may_write(backend.origin, owner) {
            change.shadowed += 1;
            return None;
        }
        if entry.backend == *backend && same_policy(entry.policy.as_deref(), policy) {
            change.refreshed += 1;
            return Some(id);
        }
        entry.backend = Arc::clone(backend);
        entry.policy = boxed(policy);
        if owner != backend.origin {
            self.by_origin[owner as usize] -= 1;
            self.by_origin[backend.origin as usize] += 1;
        }
        let pool = pool_mut(&mut self.next, &entry.route);
        put(pool.expect("an entry's route has a pool"), backend, policy);
        change.updated += 1;
        change.touch(&entry.route);
        Some(id)
    }

    /// Adds an entry, for which there is room.
    fn insert(
        &mut self,
        route: RouteKey,
        backend: &Arc<Backend>,
        policy: &Policy,
        change: &mut Change,
    ) -> u32 {
        let route = self.make_pool(route);
        let pool = pool_mut(&mut self.next, &route).expect("the pool was made sure of");
        put(pool, backend, policy);
        if let RouteKey::Vip(vip) = &route {
            self.vips_of.insert((backend.address, *vip));
        }
        change.added += 1;
        change.touch(&route);
        let hash = self.hasher.hash_one((&route, backend.address));
        let (backend, policy) = (Arc::clone(backend), boxed(policy));
        let origin = backend.origin;
        let entry = Entry {
            route,
            backend,
            policy,
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
        self.by_origin[origin as usize] += 1;
        let (entries, hasher) = (&self.entries, &self.hasher);
        self.index
            .insert_unique(hash, id, |id| entry_hash(entries, hasher, *id));
        id
    }

    /// Makes sure of a pool for `route`, and returns the route in the strings that the snapshot holds
    /// already.
    fn make_pool(&mut self, route: RouteKey) -> RouteKey {
        let http = match route {
            RouteKey::Http(http) => http,
            RouteKey::Vip(vip) => {
                let pool = self.next.vips.entry(vip);
                pool.or_insert_with(|| Arc::new(Pool::default()));
                return route;
            }
        };
        self.next.hosts.add(Arc::clone(&http.host));
        let (host, routes) = self.next.hosts.get(&http.host).expect("just added");
        let host = Arc::clone(host);
        if let Some(known) = routes.get(&http.path, http.conditions.as_deref()) {
            return RouteKey::Http(HttpMatch {
                host,
                path: Arc::clone(known.path),
                conditions: known.conditions.cloned(),
            });
        }
        let pool = Pool {
            policy: self.declared(&http).cloned(),
            ..Pool::default()
        };
        let HttpMatch {
            path, conditions, ..
        } = http;
        let routes = self.next.hosts.get_mut(&host).expect("just added");
        routes.insert(Arc::clone(&path), conditions.clone(), Arc::new(pool));
        self.http_routes += 1;
        RouteKey::Http(HttpMatch {
            host,
            path,
            conditions,
        })
    }

    /// What holds of all that is declared of a route.
    fn declared(&self, route: &HttpMatch) -> Option<&Arc<HttpPolicy>> {
        if self.declared.is_empty() {
            return None;
        }
        let declared = self.declared.get(route)?;
        RANKS
            .iter()
            .find_map(|origin| declared[*origin as usize].as_ref())
    }

    /// Takes in a declaration, if there is room.
    fn declare(&mut self, declaration: Declaration, change: &mut Change) {
        let Declaration { route, policy } = declaration;
        let key = RouteKey::Http(route.clone());
        let makes_pool = policy.answers_alone() && find_pool(&self.next, &route).is_none();
        let room = if !self.declared.contains_key(&route) && self.declared.len() >= MAX_DECLARED {
            Err(Bound::Declared)
        } else if makes_pool {
            check_host(&self.next, &route, 1, || std::iter::once(&key))
        } else {
            Ok(())
        };
        if let Err(bound) = room {
            change.full += 1;
            change.bound = Some(bound);
            return;
        }
        let declared = self.declared.entry(route.clone()).or_default();
        let said = &mut declared[policy.origin as usize];
        if said.as_ref() == Some(&policy) {
            change.refreshed += 1;
            return;
        }
        match said.replace(policy) {
            None => change.added += 1,
            Some(_) => change.updated += 1,
        }
        self.follow_declared(&route, change);
    }

    fn withdraw(&mut self, gone: &Withdrawal, change: &mut Change) {
        let Some(declared) = self.declared.get_mut(&gone.route) else {
            return;
        };
        if declared[gone.origin as usize].take().is_none() {
            return;
        }
        if declared.iter().all(Option::is_none) {
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

    fn remove(&mut self, id: u32, change: &mut Change) {
        let hash = entry_hash(&self.entries, &self.hasher, id);
        let indexed = self.index.find_entry(hash, |at| *at == id);
        indexed.expect("every entry is indexed").remove();
        let entry = self.entries[id as usize]
            .take()
            .expect("indexed entries are there");
        self.free.push(id);
        self.expiry.cancel(id, entry.scheduled);
        self.by_origin[entry.backend.origin as usize] -= 1;
        let address = entry.backend.address;
        let pool = pool_mut(&mut self.next, &entry.route).expect("an entry's route has a pool");
        let at = pool
            .backends
            .binary_search_by_key(&address, |backend| backend.address);
        pool.backends
            .remove(at.expect("an entry's backend is in its pool"));
        let alone = pool
            .policy
            .as_ref()
            .is_some_and(|policy| policy.answers_alone());
        let empty = pool.backends.is_empty() && !alone;
        if let RouteKey::Vip(vip) = &entry.route {
            self.vips_of.remove(&(address, *vip));
        }
        if empty {
            self.remove_pool(&entry.route);
        }
        change.touch(&entry.route);
    }

    fn remove_pool(&mut self, route: &RouteKey) {
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

    /// Looks at an entry whose time may have come.
    fn visit(&mut self, id: u32, now: Tick, change: &mut Change) {
        let entry = self.entries[id as usize]
            .as_mut()
            .expect("visits go with their entries");
        entry.scheduled = Tick::MAX;
        if entry.backend.origin == Origin::File {
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

    fn find(&self, route: &RouteKey, address: SocketAddr) -> Option<u32> {
        let hash = self.hasher.hash_one((route, address));
        let is_it = |id: &u32| {
            let entry = self.entries[*id as usize].as_ref();
            entry.is_some_and(|entry| entry.backend.address == address && entry.route == *route)
        };
        self.index.find(hash, is_it).copied()
    }
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
    }

    fn touch(&mut self, route: &RouteKey) {
        self.changed = true;
        if let RouteKey::Vip(vip) = route {
            self.vips.insert(*vip);
        }
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
            Bound::Declared => write!(f, "{MAX_DECLARED} declared routes"),
        }
    }
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

/// Whether a source may change what another announced.
fn may_write(source: Origin, owner: Origin) -> bool {
    source == owner || owner == Origin::Adopted || (source, owner) == (Origin::File, Origin::Nats)
}

fn same_policy(known: Option<&Policy>, new: &Policy) -> bool {
    match known {
        Some(known) => known == new,
        None => new.balance.is_none() && new.route_service_url.is_none(),
    }
}

fn boxed(policy: &Policy) -> Option<Box<Policy>> {
    let Policy {
        balance,
        route_service_url,
    } = policy;
    let says_something = balance.is_some() || route_service_url.is_some();
    says_something.then(|| {
        Box::new(Policy {
            balance: balance.clone(),
            route_service_url: route_service_url.clone(),
        })
    })
}

/// Puts a backend into a pool and the pool under the policy of this, its latest registration; one
/// that names no algorithm keeps the pool's, as in gorouter.
fn put(pool: &mut Pool, backend: &Arc<Backend>, policy: &Policy) {
    match pool
        .backends
        .binary_search_by_key(&backend.address, |backend| backend.address)
    {
        Ok(at) => pool.backends[at] = Arc::clone(backend),
        // Most pools are small: grow by what is needed, not by doubling.
        Err(at) => {
            pool.backends.reserve_exact(1 + pool.backends.len() / 4);
            pool.backends.insert(at, Arc::clone(backend));
        }
    }
    if policy.balance.is_some() {
        pool.balance.clone_from(&policy.balance);
    }
    pool.route_service_url.clone_from(&policy.route_service_url);
}

fn find_pool<'s>(snapshot: &'s Snapshot, route: &HttpMatch) -> Option<&'s Arc<Pool>> {
    let (_, routes) = snapshot.hosts.get(&route.host)?;
    let known = routes.get(&route.path, route.conditions.as_deref())?;
    Some(known.pool)
}

fn pool_mut<'s>(snapshot: &'s mut Snapshot, route: &RouteKey) -> Option<&'s mut Pool> {
    let pool = match route {
        RouteKey::Vip(vip) => snapshot.vips.get_mut(vip)?,
        RouteKey::Http(http) => {
            let routes = snapshot.hosts.get_mut(&http.host)?;
            routes.get_mut(&http.path, http.conditions.as_deref())?
        }
    };
    Some(Arc::make_mut(pool))
}

fn entry_hash(entries: &[Option<Entry>], hasher: &DefaultHashBuilder, id: u32) -> u64 {
    let entry = entries[id as usize]
        .as_ref()
        .expect("indexed entries are there");
    hasher.hash_one((&entry.route, entry.backend.address))
}

#[cfg(test)]
mod tests;
