//! The ways to choose among the backends of a pool that may be used: in turn, the less loaded of two, and
//! by hash; and how much of its weight a backend has that has just joined.

use std::time::Duration;

use rand::Rng;
use tokio::time::Instant;

use crate::l7::balance::turns::Turns;
use crate::l7::balance::{Circumstances, PoolState, hash};
use crate::route::Balance;

/// A backend that has just joined gets this share of its weight, in thousandths, and then more.
const FIRST_SHARE: u64 = 100;

/// Turns that backends in slow start may give up before one of them is taken anyway.
const TURNS_GIVEN_UP: usize = 16;

/// Up to how many counters are summed for each request; the load of larger pools is looked at once
/// in [`LOAD_AGE`].
const LOAD_READS: usize = 512;
const LOAD_AGE: Duration = Duration::from_millis(1);

impl PoolState {
    /// One that `usable` says yes to; `turns` are of those to choose among but by hash.
    pub(super) fn choose(
        &self,
        turns: &Turns,
        at: &Circumstances<'_>,
        usable: impl Fn(usize) -> bool,
        rng: &mut impl Rng,
    ) -> Option<usize> {
        match (at.balance, at.key) {
            (Balance::Hash(by), Some(key)) => {
                let bound = by.balance_percent;
                self.by_hash(key, bound, at, usable)
            }
            (Balance::RoundRobin | Balance::Hash(_), _) => self.in_turn(turns, at, usable, rng),
            (Balance::LeastConnections, _) => self.less_loaded_of_two(turns, at, usable, rng),
        }
    }

    fn in_turn(
        &self,
        turns: &Turns,
        at: &Circumstances<'_>,
        usable: impl Fn(usize) -> bool,
        rng: &mut impl Rng,
    ) -> Option<usize> {
        if !self.ramps(at) {
            let index = turns.next()?;
            if usable(index) {
                return Some(index);
            }
            return turns.any(usable, rng);
        }
        for _ in 0..TURNS_GIVEN_UP {
            let index = turns.next()?;
            if !usable(index) {
                break;
            }
            if rng.random_range(0..1000) < self.share(index, at) {
                return Some(index);
            }
        }
        turns.any(usable, rng)
    }

    /// Mitzenmacher, "The power of two choices in randomized load balancing", TPDS 2001.
    fn less_loaded_of_two(
        &self,
        turns: &Turns,
        at: &Circumstances<'_>,
        usable: impl Fn(usize) -> bool,
        rng: &mut impl Rng,
    ) -> Option<usize> {
        let first = turns.any(&usable, rng)?;
        let Some(second) = turns.any(|index| index != first && usable(index), rng) else {
            return Some(first);
        };
        let ramps = self.ramps(at);
        let weight = |index: usize| {
            let share = if ramps { self.share(index, at) } else { 1000 };
            u64::from(self.targets[index].weight) * share
        };
        // With the request that is to be placed, so that weights count among idle ones too.
        let load_of = |index: usize, other: usize| {
            (self.targets[index].backend.in_flight().total() + 1) * weight(other)
        };
        let second_is_less = load_of(second, first) < load_of(first, second);
        Some(if second_is_less { second } else { first })
    }

    /// The usable target of the best score for the key that is within its bound, or of the best score
    /// if none is.
    fn by_hash(
        &self,
        key: u64,
        bound: Option<u32>,
        at: &Circumstances<'_>,
        usable: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let Some(percent) = bound else {
            return self.best_score(key, at, usable);
        };
        let total = self.load(at.now);
        let weight = |index: usize| u64::from(self.targets[index].weight);
        let indexes = 0..self.targets.len();
        let weights = indexes.filter(|&index| usable(index)).map(weight).sum();
        let has_room = |index: usize| {
            let capacity = hash::capacity(total, weight(index), weights, percent);
            self.targets[index].backend.in_flight().total() < capacity
        };
        self.best_score(key, at, |index| usable(index) && has_room(index))
            .or_else(|| self.best_score(key, at, usable))
    }

    fn best_score(
        &self,
        key: u64,
        at: &Circumstances<'_>,
        usable: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let ramps = self.ramps(at);
        let by_weight = ramps || !self.weights_are_equal;
        let mut best: Option<(u64, f64, usize)> = None;
        for (index, target) in self.targets.iter().enumerate() {
            let score = hash::score(key, target.seed);
            let weighted = if by_weight {
                let share = if ramps { self.share(index, at) } else { 1000 };
                hash::weighted(score, f64::from(target.weight) * share as f64)
            } else {
                0.0
            };
            // Scores are compared before the rest is asked, which costs more.
            let is_better = best.is_none_or(|(best, best_weighted, _)| {
                if by_weight {
                    weighted > best_weighted
                } else {
                    score > best
                }
            });
            if is_better && usable(index) {
                best = Some((score, weighted, index));
            }
        }
        best.map(|(_, _, index)| index)
    }

    /// Requests in flight at all of the backends.
    fn load(&self, now: Instant) -> u64 {
        let reads = self.targets.len()
            * self
                .targets
                .first()
                .map_or(0, |it| it.backend.in_flight().workers());
        if reads > LOAD_READS
            && let Some((at, load)) = self.load.get()
            && now.duration_since(at) < LOAD_AGE
        {
            return load;
        }
        let targets = self.targets.iter();
        let load = targets.map(|it| it.backend.in_flight().total()).sum();
        self.load.set(Some((now, load)));
        load
    }

    /// Whether a backend is in slow start, which is for those that join others.
    fn ramps(&self, at: &Circumstances<'_>) -> bool {
        !at.slow_start.is_zero()
            && self.oldest < self.youngest
            && at.now.duration_since(self.youngest) < at.slow_start
    }

    /// How much of its weight a backend has, in thousandths.
    fn share(&self, index: usize, at: &Circumstances<'_>) -> u64 {
        let age = at.now.duration_since(self.targets[index].backend.since());
        let grown = age.as_secs_f64() / at.slow_start.as_secs_f64();
        ((grown * 1000.0) as u64).clamp(FIRST_SHARE, 1000)
    }
}
