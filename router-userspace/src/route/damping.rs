//! Backends that come and go, held back: route flap damping (RFC 2439) for what is registered.
//!
//! Each time one leaves, a penalty of 1 is added to what is left of earlier ones, which halves with
//! every half-life. Above [`Settings::suppress`] it is suppressed until the penalty has fallen to
//! [`Settings::reuse`]. What suppression means is the caller's: the route table keeps such backends out
//! of their pools. Pure. A leave costs a lookup; nothing is looked at before its time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// Whose penalties are remembered. Beyond, whoever is forgotten first makes room.
pub const MAX_HISTORIES: usize = 65_536;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Above `reuse`.
    pub suppress: f64,
    /// Above 0.
    pub reuse: f64,
    pub half_life: Duration,
    /// The longest suppression after a leave, however many there were.
    pub longest: Duration,
}

#[derive(Clone, Debug)]
pub struct Damping<K> {
    settings: Option<Settings>,
    histories: BTreeMap<K, History>,
    /// When each is reused or forgotten.
    due: BTreeSet<(Instant, K)>,
    suppressed: usize,
}

#[derive(Clone, Debug)]
struct History {
    penalty: f64,
    /// When it was that.
    at: Instant,
    due: Instant,
    suppressed: bool,
}

impl<K> Default for Damping<K> {
    fn default() -> Damping<K> {
        Damping {
            settings: None,
            histories: BTreeMap::new(),
            due: BTreeSet::new(),
            suppressed: 0,
        }
    }
}

impl<K: Ord + Clone> Damping<K> {
    /// Begins anew under other settings, with nobody suppressed; `None` switches it off.
    pub fn set(&mut self, settings: Option<Settings>) {
        if self.settings != settings {
            *self = Damping {
                settings,
                ..Damping::default()
            };
        }
    }

    /// Notes that somebody left.
    pub fn leave(&mut self, key: &K, now: Instant) {
        let Some(settings) = self.settings else {
            return;
        };
        let known = self.histories.remove(key);
        let mut suppressed = false;
        let mut penalty = 1.0;
        if let Some(known) = known {
            self.due.remove(&(known.due, key.clone()));
            self.suppressed -= usize::from(known.suppressed);
            suppressed = known.suppressed;
            penalty += settings.decayed(&known, now);
        } else if self.histories.len() >= MAX_HISTORIES && !self.forget_first() {
            return;
        }
        let penalty = penalty.min(settings.ceiling());
        let suppressed = suppressed || penalty > settings.suppress;
        let history = History {
            penalty,
            at: now,
            due: now + settings.time_to(penalty, suppressed),
            suppressed,
        };
        self.keep(key.clone(), history);
    }

    pub fn is_suppressed(&self, key: &K) -> bool {
        self.suppressed > 0
            && self
                .histories
                .get(key)
                .is_some_and(|known| known.suppressed)
    }

    /// How many are.
    pub fn suppressed(&self) -> usize {
        self.suppressed
    }

    /// The next one that is suppressed no more.
    pub fn reusable(&mut self, now: Instant) -> Option<K> {
        let settings = self.settings?;
        while self.due.first().is_some_and(|(due, _)| *due <= now) {
            let (_, key) = self.due.pop_first().expect("it has a first");
            let history = self.histories.remove(&key).expect("who is due is known");
            if history.suppressed {
                self.suppressed -= 1;
                let penalty = settings.decayed(&history, now);
                let history = History {
                    penalty,
                    at: now,
                    due: now + settings.time_to(penalty, false),
                    suppressed: false,
                };
                self.keep(key.clone(), history);
                return Some(key);
            }
        }
        None
    }

    fn keep(&mut self, key: K, history: History) {
        self.suppressed += usize::from(history.suppressed);
        self.due.insert((history.due, key.clone()));
        self.histories.insert(key, history);
    }

    /// Makes room, unless the one whose time comes first is suppressed until then.
    fn forget_first(&mut self) -> bool {
        let first = self.due.first();
        let first = first.filter(|(_, key)| !self.histories[key].suppressed);
        let Some(first) = first.cloned() else {
            return false;
        };
        self.histories.remove(&first.1);
        self.due.remove(&first)
    }
}

impl Settings {
    /// No penalty is above it, so that no suppression is longer than the longest (section 4.2).
    fn ceiling(&self) -> f64 {
        let lives = self.longest.as_secs_f64() / self.half_life.as_secs_f64();
        self.reuse * lives.exp2()
    }

    fn decayed(&self, history: &History, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(history.at).as_secs_f64();
        history.penalty * (-passed / self.half_life.as_secs_f64()).exp2()
    }

    /// Until it may be reused, or forgotten at half of that.
    fn time_to(&self, penalty: f64, suppressed: bool) -> Duration {
        let end = if suppressed {
            self.reuse
        } else {
            self.reuse / 2.0
        };
        let lives = (penalty / end).log2().max(0.0);
        self.half_life.mul_f64(lives)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SETTINGS: Settings = Settings {
        suppress: 3.0,
        reuse: 0.9,
        half_life: Duration::from_secs(60),
        longest: Duration::from_secs(600),
    };

    fn damping() -> Damping<u32> {
        let mut damping = Damping::default();
        damping.set(Some(SETTINGS));
        damping
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn who_leaves_too_often_is_suppressed_until_the_penalty_has_fallen() {
        let (mut damping, now) = (damping(), Instant::now());
        for _ in 0..3 {
            damping.leave(&1, now);
        }
        assert!(!damping.is_suppressed(&1));
        damping.leave(&1, now);
        damping.leave(&2, now);
        assert!(damping.is_suppressed(&1) && !damping.is_suppressed(&2));
        assert_eq!(damping.reusable(now + seconds(129)), None);
        assert_eq!(
            damping.reusable(now + seconds(130)),
            Some(1),
            "log2(4 / 0.9) lives"
        );
        assert!(!damping.is_suppressed(&1));
        assert_eq!(damping.reusable(now + seconds(300)), None);
        assert_eq!(damping.histories.len(), 0, "all is forgotten");
    }

    #[test]
    fn who_leaves_seldom_is_never_suppressed_and_nobody_for_longer_than_the_longest() {
        let (mut damping, now) = (damping(), Instant::now());
        for time in 0..100 {
            damping.leave(&1, now + seconds(60 * time));
            assert!(!damping.is_suppressed(&1));
        }
        for _ in 0..100_000 {
            damping.leave(&2, now);
        }
        assert!(damping.is_suppressed(&2));
        while damping.reusable(now + seconds(601)).is_some() {}
        assert!(!damping.is_suppressed(&2));
    }

    #[test]
    fn histories_are_bounded_and_other_settings_begin_anew() {
        let (mut damping, now) = (damping(), Instant::now());
        for _ in 0..4 {
            damping.leave(&0, now);
        }
        for key in 1..=2 * u32::try_from(MAX_HISTORIES).unwrap() {
            damping.leave(&key, now);
        }
        assert_eq!(damping.histories.len(), MAX_HISTORIES);
        assert_eq!(damping.due.len(), MAX_HISTORIES);
        assert!(damping.is_suppressed(&0));
        damping.set(None);
        assert!(!damping.is_suppressed(&0));
        damping.leave(&0, now);
        assert_eq!(damping.histories.len(), 0);
    }

    proptest! {
        /// Beside a simulation that adds up every leave there ever was.
        #[test]
        fn it_suppresses_whom_a_simulation_does(
            steps in prop::collection::vec((0_u32..3, 1_u64..90), 1..80),
        ) {
            let (mut damping, begin) = (damping(), Instant::now());
            let mut leaves: [Vec<f64>; 3] = Default::default();
            let mut suppressed = [false; 3];
            let mut now = 0;
            for (key, wait) in steps {
                for second in now..now + wait {
                    let penalty = |leaves: &Vec<f64>| -> f64 {
                        let left = leaves.iter().map(|at| ((at - second as f64) / 60.0).exp2());
                        left.sum()
                    };
                    for (key, suppressed) in suppressed.iter_mut().enumerate() {
                        let penalty = penalty(&leaves[key]);
                        // What lies that close to the bound is due a moment before or after.
                        prop_assume!((penalty - SETTINGS.reuse).abs() > 1e-9);
                        *suppressed &= penalty > SETTINGS.reuse;
                        // The simulation remembers what is worth nothing for suppression any more.
                        if penalty < SETTINGS.reuse / 2.0 {
                            leaves[key].clear();
                        }
                    }
                }
                now += wait;
                let at = begin + seconds(now);
                while damping.reusable(at - seconds(1)).is_some() {}
                damping.leave(&key, at);
                let key = key as usize;
                leaves[key].push(now as f64);
                let penalty: f64 = leaves[key]
                    .iter()
                    .map(|at| ((at - now as f64) / 60.0).exp2())
                    .sum();
                suppressed[key] |= penalty > SETTINGS.suppress;
                for (key, suppressed) in suppressed.iter().enumerate() {
                    let key = u32::try_from(key).unwrap();
                    prop_assert_eq!(damping.is_suppressed(&key), *suppressed);
                }
                prop_assert_eq!(damping.suppressed(), suppressed.iter().filter(|s| **s).count());
            }
        }
    }
}
