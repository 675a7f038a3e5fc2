//! When a backend is avoided for what it did to requests, and for how long. Pure.
//!
//! All workers share one [`Outlier`] a backend: what one of them found out spares the others the same
//! failure. It is read for each choice and written only when a request fails, or succeeds after one
//! that failed, so the cache line stays with every core.
//!
//! ```text
//!               consecutive_failures, or no connection              until
//!  in use ───────────────────────────────────────────▶ ejected ─────────────▶ on trial
//!    ▲                                                    ▲    first failure     │
//!    └──────────────── a request succeeds ────────────────┴──────────────────────┘
//! ```

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::config::HttpEjection;

/// What the failures of one backend amount to.
#[derive(Debug)]
pub(super) struct Outlier {
    /// What `until_ms` is counted from.
    start: Instant,
    /// One after another.
    failures: AtomicU32,
    /// Ejections since a request succeeded.
    ejections: AtomicU32,
    /// When the last ejection ends; 0: there was none since a request succeeded.
    until_ms: AtomicU64,
}

impl Outlier {
    pub(super) fn new(now: Instant) -> Outlier {
        Outlier {
            start: now,
            failures: AtomicU32::new(0),
            ejections: AtomicU32::new(0),
            until_ms: AtomicU64::new(0),
        }
    }

    pub(super) fn is_ejected(&self, now: Instant) -> bool {
        let until_ms = self.until_ms.load(Ordering::Relaxed);
        until_ms != 0 && self.ms(now) < until_ms
    }

    /// A request has got an answer that is the backend's own.
    pub(super) fn succeeded(&self) {
        // The usual case writes nothing.
        if self.failures.load(Ordering::Relaxed) != 0 {
            self.failures.store(0, Ordering::Relaxed);
        }
        if self.until_ms.load(Ordering::Relaxed) != 0 {
            self.until_ms.store(0, Ordering::Relaxed);
            self.ejections.store(0, Ordering::Relaxed);
        }
    }

    /// A request has failed at the backend. Says whether it has to be ejected for that.
    pub(super) fn failed(&self, config: &HttpEjection) -> bool {
        let failures = self
            .failures
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1);
        let on_trial = self.ejections.load(Ordering::Relaxed) > 0;
        config.consecutive_failures > 0 && (on_trial || failures >= config.consecutive_failures)
    }

    /// Ejects it; says for how long, or `None` if it is ejected already.
    pub(super) fn eject(&self, now: Instant, config: &HttpEjection) -> Option<Duration> {
        let now_ms = self.ms(now);
        let until = self.until_ms.load(Ordering::Relaxed);
        if now_ms < until {
            return None;
        }
        let duration = backoff(self.ejections.load(Ordering::Relaxed), config);
        let ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        // Of several workers that saw it fail, one ejects it.
        self.until_ms
            .compare_exchange(
                until,
                now_ms.saturating_add(ms).max(1),
                Ordering::Relaxed,
                Ordering::Relaxed,
            )
            .ok()?;
        self.ejections.fetch_add(1, Ordering::Relaxed);
        Some(duration)
    }

    fn ms(&self, now: Instant) -> u64 {
        let ms = now.saturating_duration_since(self.start).as_millis();
        u64::try_from(ms).unwrap_or(u64::MAX)
    }
}

/// Whether one more of a pool of `count` may be ejected for bad responses, where `ejected` are.
///
/// Bad responses may have a cause that all backends share, overload above all: who ejects most of a
/// pool makes it worse for the rest.
pub(super) fn may_eject(ejected: usize, count: usize, config: &HttpEjection) -> bool {
    let most = count * config.max_percent as usize / 100;
    count > 1 && ejected < most.max(1)
}

/// `base`, doubled for each ejection before.
fn backoff(before: u32, config: &HttpEjection) -> Duration {
    let factor = 1_u32.checked_shl(before).unwrap_or(u32::MAX);
    config.base.saturating_mul(factor).min(config.max)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config() -> HttpEjection {
        HttpEjection {
            base: Duration::from_secs(1),
            max: Duration::from_secs(5),
            consecutive_failures: 3,
            max_percent: 50,
        }
    }

    #[test]
    fn failures_eject_when_none_of_them_was_followed_by_a_success() {
        let outlier = Outlier::new(Instant::now());
        let fails = || outlier.failed(&config());
        assert_eq!([fails(), fails()], [false, false]);
        outlier.succeeded();
        assert_eq!([fails(), fails(), fails()], [false, false, true]);
    }

    #[test]
    fn zero_consecutive_failures_is_never() {
        let off = HttpEjection {
            consecutive_failures: 0,
            ..config()
        };
        let now = Instant::now();
        let outlier = Outlier::new(now);
        outlier.eject(now, &off);
        assert!((0..100).all(|_| !outlier.failed(&off)));
    }

    #[test]
    fn each_ejection_is_twice_as_long_as_the_one_before_until_a_success() {
        let mut now = Instant::now();
        let outlier = Outlier::new(now);
        let mut ejected_for = || {
            let duration = outlier.eject(now, &config()).unwrap();
            assert!(outlier.is_ejected(now + duration - Duration::from_millis(1)));
            now += duration;
            assert!(!outlier.is_ejected(now));
            duration.as_secs()
        };
        assert_eq!(
            [ejected_for(), ejected_for(), ejected_for(), ejected_for()],
            [1, 2, 4, 5]
        );
        outlier.succeeded();
        assert_eq!(ejected_for(), 1);
    }

    #[test]
    fn a_backend_on_trial_is_ejected_by_its_first_failure() {
        let now = Instant::now();
        let outlier = Outlier::new(now);
        let duration = outlier.eject(now, &config()).unwrap();
        assert!(!outlier.is_ejected(now + duration));
        assert!(outlier.failed(&config()));
    }

    #[test]
    fn an_ejected_backend_is_not_ejected_again() {
        let now = Instant::now();
        let outlier = Outlier::new(now);
        assert!(outlier.eject(now, &config()).is_some());
        assert_eq!(outlier.eject(now, &config()), None);
    }

    #[test]
    fn a_success_that_comes_late_ends_the_ejection() {
        let now = Instant::now();
        let outlier = Outlier::new(now);
        outlier.eject(now, &config());
        outlier.succeeded();
        assert!(!outlier.is_ejected(now));
    }

    proptest! {
        #[test]
        fn one_of_several_may_be_ejected_and_never_all_at_once_up_to_half(
            count in 0_usize..100,
            max_percent in 0_u32..=50,
        ) {
            let config = HttpEjection { max_percent, ..config() };
            let ejected = (0..count).take_while(|&ejected| may_eject(ejected, count, &config)).count();
            prop_assert_eq!(ejected == 0, count < 2);
            prop_assert!(ejected <= (count * max_percent as usize / 100).max(1));
            prop_assert!(count == 0 || ejected < count);
        }

        #[test]
        fn a_backoff_is_never_beyond_its_bounds(before: u32) {
            let duration = backoff(before, &config());
            prop_assert!(duration >= config().base && duration <= config().max);
        }
    }
}
