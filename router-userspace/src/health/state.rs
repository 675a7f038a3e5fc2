//! When health changes the mind about a backend, and when it does not count. Pure.
//!
//! [`State`] is what active checks say of a backend, [`Passive`] what its clients' unanswered SYNs say;
//! the checker holds both and tells the agent what follows. [`in_panic`] is for both layers: whether a
//! pool is so short of healthy backends that they use all of it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// SYNs without any answer that speak against a backend; fewer are noise.
pub const MIN_UNANSWERED: u64 = 3;
/// How long a backend is first avoided for unanswered SYNs; each further time doubles it.
pub const FIRST_BACKOFF: Duration = Duration::from_secs(5);
/// The longest it is avoided, and how long it must go unsuspected to be trusted as before.
pub const MAX_BACKOFF: Duration = Duration::from_secs(300);

/// Whether all of a pool are to be used, the unhealthy ones too: none of `addresses` is healthy, or
/// less than `panic_threshold` percent are. Then the judgement is more likely wrong than they are.
pub fn in_panic(
    addresses: impl IntoIterator<Item = SocketAddr>,
    unhealthy: &imbl::HashSet<SocketAddr>,
    panic_threshold: u8,
) -> bool {
    if unhealthy.is_empty() {
        return false;
    }
    let (mut healthy, mut all) = (0_u64, 0_u64);
    for address in addresses {
        all += 1;
        healthy += u64::from(!unhealthy.contains(&address));
    }
    all > 0 && (healthy == 0 || healthy * 100 < all * u64::from(panic_threshold))
}

/// What active checks have shown of one backend. A backend is healthy until it is shown not to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    healthy: bool,
    /// Whether the latest check was good; none has been made: not.
    last_good: bool,
    /// Checks in a row that spoke against `healthy`.
    against: u32,
}

impl Default for State {
    fn default() -> State {
        State {
            healthy: true,
            last_good: false,
            against: 0,
        }
    }
}

impl State {
    pub fn healthy(self) -> bool {
        self.healthy
    }

    /// Whether the latest check says that the backend is well, against what anything else says.
    pub fn vouches(self) -> bool {
        self.healthy && self.last_good
    }

    /// Takes in one check: `rise` good ones in a row make a backend healthy, `fall` bad ones the
    /// opposite.
    pub fn observe(&mut self, good: bool, rise: u32, fall: u32) {
        self.last_good = good;
        if good == self.healthy {
            self.against = 0;
            return;
        }
        self.against += 1;
        if self.against >= if good { rise } else { fall } {
            self.healthy = good;
            self.against = 0;
        }
    }
}

/// What layer 4 saw of the SYNs sent to one backend since its last report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unanswered {
    pub backend: SocketAddr,
    /// SYNs of new flows that were sent to it.
    pub syns: u64,
    /// Of these flows, how many it answered.
    pub answered: u64,
}

/// What unanswered SYNs have shown of one backend.
///
/// ```text
///            unanswered               backoff over
///  Trusted ─────────────▶ Out ──────────────────────▶ Trial
///     ▲     for 5 s        ▲                            │ │
///     │                    └────────────────────────────┘ │
///     │                     unanswered: twice as long     │
///     └───────────────────────────────────────────────────┘
///      MAX_BACKOFF without, or from anywhere by any answer
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Passive {
    #[default]
    Trusted,
    /// Avoided until then.
    Out { until: Instant, backoff: Duration },
    /// Used again, and trusted from then on if nothing speaks against it.
    Trial { until: Instant, backoff: Duration },
}

impl Passive {
    pub fn is_out(self) -> bool {
        matches!(self, Passive::Out { .. })
    }

    /// Takes in a report. `vouched`: the latest active check says that the backend is well, which
    /// wins; layer 4 may see one direction only of what it forwards.
    #[must_use]
    pub fn observe(self, report: Unanswered, vouched: bool, now: Instant) -> Passive {
        if report.answered > 0 || vouched {
            return Passive::Trusted;
        }
        if report.syns < MIN_UNANSWERED {
            return self;
        }
        let backoff = match self {
            // What was under way when it was taken out.
            Passive::Out { .. } => return self,
            Passive::Trusted => FIRST_BACKOFF,
            Passive::Trial { backoff, .. } => (backoff * 2).min(MAX_BACKOFF),
        };
        Passive::Out {
            until: now + backoff,
            backoff,
        }
    }

    /// What has become of it by `now`.
    #[must_use]
    pub fn at(self, now: Instant) -> Passive {
        match self {
            Passive::Out { until, backoff } if until <= now => Passive::Trial {
                until: now + MAX_BACKOFF,
                backoff,
            },
            Passive::Trial { until, .. } if until <= now => Passive::Trusted,
            Passive::Trusted | Passive::Out { .. } | Passive::Trial { .. } => self,
        }
    }
}

#[cfg(test)]
mod tests;
