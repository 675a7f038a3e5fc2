//! Which backend of a pool gets a request.
//!
//! A [`PoolState`] is one worker's view of one published pool; it is built when the worker first
//! meets the pool and dropped after the pool has left the snapshot. Round robin takes turns of this
//! worker's requests; least connections and the bound of hashing look at what all workers have in
//! flight. Who is full, and who waits for that, is [`admission`](crate::l7::admission)'s.

use std::cell::{Cell, OnceCell};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Duration;

use http::HeaderMap;
use rand::Rng;
use tokio::time::Instant;

use crate::health::state::in_panic;
use crate::l7::Settings;
use crate::l7::admission::Queue;
use crate::l7::backend::BackendState;
use crate::l7::balance::turns::Turns;
use crate::l7::metrics::{RouteCounters, Traffic};
use crate::l7::retry_budget::RetryBudget;
use crate::l7::router::RouteMatch;
use crate::l7::shared::SharedRoute;
use crate::l7::sticky::{self, Session};
use crate::route::policy::HttpPolicy;
use crate::route::{Backend, Balance, HttpMatch, Pool};
use crate::snapshot::Snapshot;

mod choose;
pub(super) mod hash;
mod target;
mod turns;

pub(super) use self::target::{InstanceHeaders, Target, WantedInstance};

pub(super) struct PoolState {
    /// Tells whether the pool is still published. Weak, for each worker has a state of it.
    pub pool: Weak<Pool>,
    /// What its requests match.
    pub matched: HttpMatch,
    pub balance: Option<Balance>,
    pub policy: Option<Arc<HttpPolicy>>,
    /// Where its requests go first.
    pub route_service_url: Option<Arc<str>>,
    /// In the order of the pool's backends.
    pub targets: Box<[Target]>,
    /// Of a route with a policy, what all workers know.
    pub route: Option<Arc<SharedRoute>>,
    /// Requests that wait for room.
    pub queue: Arc<Queue>,
    pub budget: Rc<RetryBudget>,
    /// This worker's counters of the route.
    pub traffic: Arc<Traffic>,
    all: Turns,
    /// Those of the gateway's zone, if there are others too.
    local: Option<Turns>,
    weights_are_equal: bool,
    /// When the first and the last of the backends were met.
    oldest: Instant,
    youngest: Instant,
    /// Whether the pool was in panic, at which revision of health.
    panic: Cell<Option<(u64, bool)>>,
    /// What was in flight at its backends, and when.
    load: Cell<Option<(Instant, u64)>>,
    /// Targets by their instance id, made when first asked for.
    by_instance: OnceCell<HashMap<Arc<str>, usize>>,
    /// Whether leaving one of the backends wakes the queue.
    is_queue_known: Cell<bool>,
}

/// What a choice depends on beside the pool.
pub(super) struct Circumstances<'a> {
    pub balance: &'a Balance,
    /// What a request of [`Balance::Hash`] is hashed by.
    pub key: Option<u64>,
    pub now: Instant,
    /// Backends to avoid.
    pub unhealthy: &'a imbl::HashSet<SocketAddr>,
    /// Whether they are not to be avoided.
    pub panic: bool,
    /// Backends that an operator has drained.
    pub draining: &'a imbl::HashSet<SocketAddr>,
    /// Indexes of targets that failed this request.
    pub tried: &'a [usize],
    /// Whether backends of the gateway's zone come first.
    pub prefer_local: bool,
    /// How long a new backend takes to its whole share.
    pub slow_start: Duration,
    /// Requests in flight to one backend; 0: no limit.
    pub limit: u32,
}

/// What a request asks of the choice of its backend, the same for all its attempts.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub session: Option<Session>,
    /// What it is hashed by, if its route's balance asks for that and it has it.
    pub key: Option<u64>,
}

/// What became of a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// The index of the target to try.
    Target(usize),
    /// Those that were not tried are all at their limit.
    Full,
    /// There is none that was not tried.
    Nobody,
}

impl Wanted {
    pub(super) fn new(
        pool: &PoolState,
        headers: &HeaderMap,
        client: IpAddr,
        settings: &Settings,
    ) -> Wanted {
        Wanted {
            session: sticky::session(headers, &settings.sticky),
            key: match &pool.balance {
                Some(Balance::Hash(by)) => hash::key(&by.of, headers, client),
                _ => None,
            },
        }
    }

    pub(super) fn balance<'a>(&self, pool: &'a PoolState, settings: &'a Settings) -> &'a Balance {
        match &pool.balance {
            Some(Balance::Hash(_)) if self.key.is_none() => &settings.balance,
            Some(balance) => balance,
            None => &settings.balance,
        }
    }
}

impl PoolState {
    pub(super) fn new(
        found: &RouteMatch<'_>,
        zone: Option<&str>,
        route: Option<Arc<SharedRoute>>,
        budget: Rc<RetryBudget>,
        mut state_of: impl FnMut(&Backend) -> Rc<BackendState>,
        now: Instant,
        rng: &mut impl Rng,
    ) -> PoolState {
        let pool = found.pool;
        let targets: Box<[Target]> = pool
            .backends
            .iter()
            .map(|backend| Target::new(backend, state_of(backend)))
            .collect();
        let weights = || targets.iter().map(|target| target.weight).enumerate();
        let is_local = |index: usize| {
            zone.is_some() && pool.backends[index].instance().availability_zone.as_deref() == zone
        };
        let local = Turns::new(weights().filter(|&(index, _)| is_local(index)), rng);
        let met = || targets.iter().map(|target| target.backend.since());
        PoolState {
            pool: Arc::downgrade(pool),
            matched: HttpMatch {
                host: found.host.into(),
                path: found.path.into(),
                conditions: found.conditions.cloned().map(Arc::new),
            },
            balance: pool.balance().cloned(),
            policy: pool.policy.clone(),
            route_service_url: pool.route_service_url().cloned(),
            route,
            queue: Arc::default(),
            budget,
            traffic: Arc::default(),
            all: Turns::new(weights(), rng),
            local: (1..targets.len()).contains(&local.len()).then_some(local),
            weights_are_equal: targets
                .windows(2)
                .all(|pair| pair[0].weight == pair[1].weight),
            oldest: met().min().unwrap_or(now),
            youngest: met().max().unwrap_or(now),
            panic: Cell::new(None),
            load: Cell::new(None),
            by_instance: OnceCell::new(),
            is_queue_known: Cell::new(false),
            targets,
        }
    }

    /// With the counters that its route has among those.
    pub(super) fn counted_by(mut self, routes: &mut RouteCounters) -> PoolState {
        self.traffic = routes.of(&self.matched);
        self
    }

    /// Whether so few of the pool are healthy that all are used. Looks at the backends once for each
    /// change of health, whatever else is published.
    pub(super) fn in_panic(&self, snapshot: &Snapshot) -> bool {
        if let Some((revision, panic)) = self.panic.get()
            && revision == snapshot.health_revision
        {
            return panic;
        }
        let addresses = self.targets.iter().map(|target| target.backend.address());
        let panic = in_panic(addresses, &snapshot.unhealthy, snapshot.panic_threshold);
        self.panic.set(Some((snapshot.health_revision, panic)));
        panic
    }

    /// The target to try.
    ///
    /// Backends that are ejected, or unhealthy and their pool not in panic, are avoided while there is
    /// another below its limit. Those of weight 0 are never picked: their own registration says so, or
    /// an operator.
    pub(super) fn pick(&self, at: &Circumstances<'_>, rng: &mut impl Rng) -> Choice {
        let untried = |index: usize| !at.tried.contains(&index) && !self.drains(index, at);
        let usable = |index: usize| {
            untried(index) && (at.limit == 0 || self.targets[index].backend.has_room(at.limit))
        };
        let healthy = |index: usize| usable(index) && self.is_healthy(index, at);
        let turns = self.local.as_ref().filter(|_| at.prefer_local);
        let chosen = turns
            .and_then(|local| self.choose(local, at, healthy, rng))
            .or_else(|| self.choose(&self.all, at, healthy, rng))
            .or_else(|| self.choose(&self.all, at, usable, rng));
        match chosen {
            Some(index) => Choice::Target(index),
            None if at.limit != 0 && (0..self.targets.len()).any(untried) => Choice::Full,
            None => Choice::Nobody,
        }
    }

    /// The target that a session is with, unless it is not to be used.
    pub(super) fn pick_instance(&self, instance: &str, at: &Circumstances<'_>) -> Option<usize> {
        let by_instance = self.by_instance.get_or_init(|| {
            let instances = self.targets.iter().enumerate();
            instances
                .filter_map(|(index, target)| Some((target.instance_id.clone()?, index)))
                .collect()
        });
        let index = *by_instance.get(instance)?;
        let usable = !at.tried.contains(&index)
            && !self.drains(index, at)
            && self.is_healthy(index, at)
            && self.targets[index].backend.has_room(at.limit);
        usable.then_some(index)
    }

    /// The index of the instance wanted, of several a different one each time.
    pub(super) fn find(&self, wanted: &WantedInstance<'_>) -> Option<usize> {
        let count = self.targets.len();
        let start = self.all.next()?;
        (0..count)
            .map(|step| (start + step) % count)
            .find(|&index| self.targets[index].is(wanted))
    }

    /// Requests in flight to one backend; 0: no limit.
    pub(super) fn limit(&self, settings: &Settings) -> u32 {
        let route = self.policy.as_ref().map(|policy| &policy.limits);
        route
            .and_then(|limits| limits.requests_per_backend)
            .unwrap_or(settings.limits.requests_per_backend)
    }

    /// Attempts of one request, the first included, where the gateway's are `default`.
    pub(super) fn attempts(&self, default: usize) -> usize {
        let route = self.policy.as_ref().map(|policy| &policy.retries);
        let own = route.and_then(|retries| retries.attempts);
        own.unwrap_or(default).max(1)
    }

    /// Requests in flight on the route; 0: no limit.
    pub(super) fn route_limit(&self) -> u32 {
        let route = self.policy.as_ref().map(|policy| &policy.limits);
        route.and_then(|limits| limits.requests).unwrap_or(0)
    }

    /// How many of the backends are ejected.
    pub(super) fn ejected(&self, now: Instant) -> usize {
        let targets = self.targets.iter();
        targets.filter(|it| it.backend.is_ejected(now)).count()
    }

    /// From here on, who leaves the route or one of its backends wakes its queue.
    pub(super) fn know_queue(&self) {
        if self.is_queue_known.replace(true) {
            return;
        }
        for target in &self.targets {
            target.backend.in_flight().wakes(&self.queue);
        }
        if let Some(route) = &self.route {
            route.in_flight.wakes(&self.queue);
        }
    }

    fn drains(&self, index: usize, at: &Circumstances<'_>) -> bool {
        let target = &self.targets[index];
        target.weight == 0
            || !at.draining.is_empty() && at.draining.contains(&target.backend.address())
    }

    fn is_healthy(&self, index: usize, at: &Circumstances<'_>) -> bool {
        let backend = &self.targets[index].backend;
        !backend.is_ejected(at.now)
            && (at.panic || at.unhealthy.is_empty() || !at.unhealthy.contains(&backend.address()))
    }
}

#[cfg(test)]
mod tests;
