//! Which backend of a pool gets a request.
//!
//! A [`PoolState`] is one worker's view of one published pool; it is built when the worker first
//! meets the pool and dropped after the pool has left the snapshot. Choosing reads and writes this
//! worker's counters only, so each worker balances its own share of the requests.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use http::HeaderValue;
use rand::Rng;
use tokio::time::Instant;

use crate::health::state::in_panic;
use crate::l7::backend::BackendState;
use crate::route::{Backend, Balance, Pool};
use crate::snapshot::Snapshot;

pub(super) struct PoolState {
    /// Tells whether the pool is still published. Weak, for each worker has a state of it.
    pub pool: Weak<Pool>,
    pub balance: Option<Balance>,
    pub has_route_service: bool,
    /// In the order of the pool's backends.
    pub targets: Box<[Target]>,
    /// Running sums of the weights; empty if all weights are equal.
    cumulative_weights: Box<[u32]>,
    cursor: Cell<u64>,
    /// Whether the pool was in panic, at which revision of health.
    panic: Cell<Option<(u64, bool)>>,
}

/// A backend as a member of a pool.
pub(super) struct Target {
    pub backend: Rc<BackendState>,
    pub instance: InstanceHeaders,
    /// The tag `process_id`.
    process: Option<Arc<str>>,
    weight: u16,
}

/// What the backend is told of itself, made once a pool instead of once a request.
pub(super) struct InstanceHeaders {
    pub app: Option<HeaderValue>,
    pub id: Option<HeaderValue>,
    pub index: Option<HeaderValue>,
}

/// The one instance a request asks for: `X-CF-App-Instance` or `X-CF-Process-Instance`.
pub(super) struct WantedInstance<'a> {
    pub id: &'a [u8],
    pub is_process: bool,
    /// `None`: any of the process.
    pub index: Option<&'a [u8]>,
}

/// What a choice depends on beside the pool.
pub(super) struct Circumstances<'a> {
    pub balance: &'a Balance,
    pub now: Instant,
    /// Backends to avoid.
    pub unhealthy: &'a imbl::HashSet<SocketAddr>,
    /// Whether they are not to be avoided.
    pub panic: bool,
    /// Backends that an operator has drained.
    pub draining: &'a imbl::HashSet<SocketAddr>,
    /// Indexes of targets that failed this request.
    pub tried: &'a [usize],
}

impl PoolState {
    pub(super) fn new(
        pool: &Arc<Pool>,
        mut state_of: impl FnMut(&Backend) -> Rc<BackendState>,
        rng: &mut impl Rng,
    ) -> PoolState {
        let targets: Box<[Target]> = pool
            .backends
            .iter()
            .map(|backend| Target {
                backend: state_of(backend),
                instance: InstanceHeaders::new(backend),
                process: backend.tags.get("process_id").cloned(),
                weight: backend.weight,
            })
            .collect();
        let cumulative_weights = if targets
            .windows(2)
            .all(|pair| pair[0].weight == pair[1].weight)
        {
            Box::default()
        } else {
            let sum = |sum: &mut u32, target: &Target| {
                *sum += u32::from(target.weight);
                Some(*sum)
            };
            targets.iter().scan(0, sum).collect()
        };
        PoolState {
            pool: Arc::downgrade(pool),
            balance: pool.balance().cloned(),
            has_route_service: pool.route_service_url().is_some(),
            targets,
            cumulative_weights,
            cursor: Cell::new(rng.random()),
            panic: Cell::new(None),
        }
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

    /// The index of the target to try, `None` if there is none that was not tried.
    ///
    /// Backends that are ejected, or unhealthy and their pool not in panic, are avoided while there is
    /// another. Those of weight 0 are never picked: their own registration says so, or an operator.
    pub(super) fn pick(&self, at: &Circumstances<'_>, rng: &mut impl Rng) -> Option<usize> {
        let drains = |target: &Target| {
            target.weight == 0
                || !at.draining.is_empty() && at.draining.contains(&target.backend.address())
        };
        let untried = |index: usize| !at.tried.contains(&index) && !drains(&self.targets[index]);
        let healthy = |index: usize| {
            let backend = &self.targets[index].backend;
            untried(index)
                && !backend.is_ejected(at.now)
                && (at.panic
                    || at.unhealthy.is_empty()
                    || !at.unhealthy.contains(&backend.address()))
        };
        match at.balance {
            Balance::RoundRobin | Balance::Hash(_) => {
                let start = self.next_in_turn()?;
                if healthy(start) {
                    return Some(start);
                }
                // From a random place, so that the neighbour of a dead backend does not get all of
                // its share.
                let start = rng.random_range(0..self.targets.len());
                self.scan(start, healthy)
                    .or_else(|| self.scan(start, untried))
            }
            Balance::LeastConnections => self
                .less_loaded_of_two(healthy, rng)
                .or_else(|| self.less_loaded_of_two(untried, rng)),
        }
    }

    /// The index of the instance wanted, of several a different one each time.
    pub(super) fn find(&self, wanted: &WantedInstance<'_>) -> Option<usize> {
        let turn = self.cursor.get();
        self.cursor.set(turn.wrapping_add(1));
        let start = turn.checked_rem(self.targets.len() as u64)? as usize;
        self.scan(start, |index| self.targets[index].is(wanted))
    }

    /// Weighted round robin without state but a counter: multiples of the golden ratio modulo 1
    /// fall evenly into the backends' shares, so that turns of a heavy backend are spread out.
    fn next_in_turn(&self) -> Option<usize> {
        const GOLDEN_RATIO: u64 = 0x9E37_79B9_7F4A_7C15;
        let turn = self.cursor.get();
        self.cursor.set(turn.wrapping_add(1));
        match self.cumulative_weights.last() {
            None => turn
                .checked_rem(self.targets.len() as u64)
                .map(|index| index as usize),
            Some(&total) => {
                let fraction = turn.wrapping_mul(GOLDEN_RATIO) >> 32;
                let point = ((fraction * u64::from(total)) >> 32) as u32;
                Some(self.cumulative_weights.partition_point(|&sum| sum <= point))
            }
        }
    }

    fn scan(&self, start: usize, usable: impl Fn(usize) -> bool) -> Option<usize> {
        let count = self.targets.len();
        (0..count)
            .map(|step| (start + step) % count)
            .find(|&index| usable(index))
    }

    /// Mitzenmacher, "The power of two choices in randomized load balancing", TPDS 2001.
    fn less_loaded_of_two(
        &self,
        usable: impl Fn(usize) -> bool,
        rng: &mut impl Rng,
    ) -> Option<usize> {
        let count = self.targets.len();
        if count == 0 {
            return None;
        }
        let first = self.scan(rng.random_range(0..count), &usable)?;
        let other = |index: usize| index != first && usable(index);
        let Some(second) = self.scan(rng.random_range(0..count), other) else {
            return Some(first);
        };
        let load_of = |index: usize, other: usize| {
            u64::from(self.targets[index].backend.in_flight())
                * u64::from(self.targets[other].weight)
        };
        let second_is_less = load_of(second, first) < load_of(first, second);
        Some(if second_is_less { second } else { first })
    }
}

impl Target {
    fn is(&self, wanted: &WantedInstance<'_>) -> bool {
        let id = if wanted.is_process {
            self.process.as_deref().map(str::as_bytes)
        } else {
            self.instance.app.as_ref().map(HeaderValue::as_bytes)
        };
        let index = self.instance.index.as_ref().map(HeaderValue::as_bytes);
        id == Some(wanted.id) && (wanted.index.is_none() || index == wanted.index)
    }
}

impl InstanceHeaders {
    fn new(backend: &Backend) -> InstanceHeaders {
        let value = |text: &Option<Arc<str>>| {
            text.as_deref()
                .filter(|text| !text.is_empty())
                .and_then(|text| text.parse().ok())
        };
        InstanceHeaders {
            app: value(&backend.app),
            id: value(&backend.instance_id).or_else(|| backend.address.to_string().parse().ok()),
            index: value(&backend.instance_index),
        }
    }
}

#[cfg(test)]
mod tests;
