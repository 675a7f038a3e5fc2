//! How many retries a route may add to its load. Pure: time is an argument.
//!
//! Retries help while few requests fail; when most do, they multiply the load of backends that are
//! failing under it. So those of a route are bounded by a share of its requests of the last ten
//! seconds, with a minimum for routes of few. One budget for each route and worker, which counts the
//! requests of that worker.

use std::cell::{Cell, RefCell};

use tokio::time::Instant;

use crate::config::HttpRetries;

/// Seconds that are looked back on, each in a bucket of its own.
const WINDOW: usize = 10;

/// The requests and retries of a route in the last [`WINDOW`] seconds.
#[derive(Debug)]
pub(super) struct RetryBudget {
    /// What the buckets' seconds are counted from.
    start: Instant,
    /// The second of the current bucket.
    second: Cell<u64>,
    /// Of the current second, added to its bucket when it is over.
    requests: Cell<u32>,
    buckets: RefCell<[Bucket; WINDOW]>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    requests: u32,
    retries: u32,
}

impl RetryBudget {
    pub(super) fn new(now: Instant) -> RetryBudget {
        RetryBudget {
            start: now,
            second: Cell::new(0),
            requests: Cell::new(0),
            buckets: RefCell::default(),
        }
    }

    /// A request begins.
    pub(super) fn request(&self, now: Instant) {
        self.advance(now);
        self.requests.set(self.requests.get().saturating_add(1));
    }

    /// Whether one more attempt may be made; counts it if so.
    pub(super) fn may_retry(&self, now: Instant, config: &HttpRetries) -> bool {
        self.advance(now);
        let mut buckets = self.buckets.borrow_mut();
        let sum = |of: fn(&Bucket) -> u32| buckets.iter().map(|b| u64::from(of(b))).sum::<u64>();
        let requests = sum(|bucket| bucket.requests) + u64::from(self.requests.get());
        let share = requests * u64::from(config.budget_percent) / 100;
        let least = u64::from(config.min_per_second) * WINDOW as u64;
        if sum(|bucket| bucket.retries) >= share.max(least) {
            return false;
        }
        let current = &mut buckets[self.second.get() as usize % WINDOW];
        current.retries = current.retries.saturating_add(1);
        true
    }

    fn advance(&self, now: Instant) {
        let second = now.saturating_duration_since(self.start).as_secs();
        let before = self.second.get();
        if second <= before {
            return;
        }
        let mut buckets = self.buckets.borrow_mut();
        buckets[before as usize % WINDOW].requests = self.requests.replace(0);
        for passed in (before + 1..=second).take(WINDOW) {
            buckets[passed as usize % WINDOW] = Bucket::default();
        }
        self.second.set(second);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn config(budget_percent: u32, min_per_second: u32) -> HttpRetries {
        HttpRetries {
            budget_percent,
            min_per_second,
            ..HttpRetries::default()
        }
    }

    /// How many retries are allowed at this time.
    fn retries(budget: &RetryBudget, now: Instant, config: &HttpRetries) -> usize {
        (0..10_000)
            .take_while(|_| budget.may_retry(now, config))
            .count()
    }

    #[test]
    fn a_share_of_the_requests_may_be_retried() {
        let now = Instant::now();
        let budget = RetryBudget::new(now);
        for _ in 0..1000 {
            budget.request(now);
        }
        assert_eq!(retries(&budget, now, &config(20, 0)), 200);
        assert_eq!(retries(&budget, now, &config(20, 0)), 0);
    }

    #[test]
    fn a_route_of_few_requests_has_its_minimum() {
        let now = Instant::now();
        let budget = RetryBudget::new(now);
        budget.request(now);
        assert_eq!(retries(&budget, now, &config(20, 3)), 30);
    }

    #[test]
    fn what_is_older_than_the_window_does_not_count() {
        let start = Instant::now();
        let budget = RetryBudget::new(start);
        let at = |second| start + Duration::from_secs(second);
        for _ in 0..100 {
            budget.request(at(0));
        }
        assert_eq!(retries(&budget, at(9), &config(10, 0)), 10);
        assert_eq!(retries(&budget, at(10), &config(10, 0)), 0, "no requests");
        assert_eq!(retries(&budget, at(18), &config(0, 1)), 0, "spent at 9");
        assert_eq!(retries(&budget, at(19), &config(0, 1)), 10);
        assert_eq!(retries(&budget, at(10_000), &config(0, 1)), 10);
    }

    proptest! {
        #[test]
        fn no_window_has_more_retries_than_the_budget(
            steps in prop::collection::vec((0_u64..3000, 0_usize..20, 0_usize..20), 1..60),
        ) {
            let config = config(50, 1);
            let start = Instant::now();
            let budget = RetryBudget::new(start);
            let mut now = start;
            let (mut requests, mut granted) = (Vec::new(), Vec::new());
            for (ms, asked, retried) in steps {
                now += Duration::from_millis(ms);
                let second = (now - start).as_secs();
                for _ in 0..asked {
                    budget.request(now);
                    requests.push(second);
                }
                for _ in 0..retried {
                    let in_window = |times: &[u64]| {
                        times.iter().filter(|&&at| at + WINDOW as u64 > second).count()
                    };
                    let most = (in_window(&requests) / 2).max(WINDOW);
                    let may = budget.may_retry(now, &config);
                    prop_assert_eq!(may, in_window(&granted) < most);
                    if may {
                        granted.push(second);
                    }
                }
            }
        }
    }
}
