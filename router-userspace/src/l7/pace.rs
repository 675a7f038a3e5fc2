//! How a client keeps up with one body: its bytes against the time that the gateway has waited for it.
//!
//! Kept by [`crate::l7::client`] for the body that is on its way. Only waiting counts, so that a body whose
//! other side is slow is never the client's fault. Time is an argument.

use std::time::Duration;

use tokio::time::Instant;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    bytes: u64,
    /// Handed over, and not known to be taken.
    untaken: u64,
    /// How long the gateway has waited for the client, up to the last time that it did not.
    waited: Duration,
    /// Since when it does so again.
    since: Option<Instant>,
}

impl Pace {
    /// So many bytes have come from the client.
    pub(super) fn came(&mut self, len: usize) {
        self.bytes += len as u64;
    }

    /// So many bytes wait for the client to take them, and what was handed over before is taken; 0: that
    /// was all there is yet.
    pub(super) fn hand_over(&mut self, len: usize, now: Instant) {
        self.bytes += std::mem::replace(&mut self.untaken, len as u64);
        self.set_waits(len > 0, || now);
    }

    /// Whether it is the client that is waited for; `now` is asked for where that changes.
    pub(super) fn set_waits(&mut self, waits: bool, now: impl FnOnce() -> Instant) {
        match (waits, self.since) {
            (true, None) => self.since = Some(now()),
            (false, Some(since)) => {
                self.waited += now().saturating_duration_since(since);
                self.since = None;
            }
            _ => {}
        }
    }

    /// When the gateway will have waited for longer than `grace` and the time that the bytes are worth, if it
    /// is waiting.
    pub(super) fn deadline(&self, grace: Duration, bytes_per_second: u32) -> Option<Instant> {
        let rate = u64::from(bytes_per_second);
        let earned = self.bytes.saturating_mul(1000).checked_div(rate)?;
        let allowed = grace.saturating_add(Duration::from_millis(earned));
        // No clock gets to a deadline that cannot be said.
        self.since?.checked_add(allowed.saturating_sub(self.waited))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(10);

    #[test]
    fn only_time_spent_waiting_counts() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pace = Pace::default();
        assert_eq!(pace.deadline(GRACE, 100), None);
        pace.set_waits(true, || at(0));
        assert_eq!(pace.deadline(GRACE, 100), Some(at(10)));
        pace.came(500);
        assert_eq!(pace.deadline(GRACE, 100), Some(at(15)));
        pace.set_waits(false, || at(4));
        assert_eq!(pace.deadline(GRACE, 100), None);
        pace.set_waits(true, || at(1000));
        assert_eq!(pace.deadline(GRACE, 100), Some(at(1011)));
        assert_eq!(pace.deadline(GRACE, 0), None);
    }

    #[test]
    fn what_is_not_taken_earns_nothing() {
        let start = Instant::now();
        let mut pace = Pace::default();
        pace.hand_over(1_000_000, start);
        assert_eq!(pace.deadline(GRACE, 100), Some(start + GRACE));
        pace.hand_over(0, start);
        assert_eq!(pace.deadline(GRACE, 100), None);
        pace.hand_over(1, start);
        let earned = Duration::from_secs(10_000);
        assert_eq!(pace.deadline(GRACE, 100), Some(start + GRACE + earned));
    }
}
