//! Deadlines of leases, by the time each is to be looked at next.
//!
//! A renewed lease is not moved: when its old deadline comes, the route table sees that it was
//! renewed and schedules it again. So a renewal costs nothing here, each lease is visited about once
//! in its lifetime, and no visit scans the table. Each lease stands here once at most, and goes with
//! its entry. Pure: time is an argument, in [`Tick`]s.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Time since the table's epoch in units of [`TICK`]; wraps after 34 years.
pub type Tick = u32;

/// How exact a deadline is.
pub const TICK: Duration = Duration::from_millis(250);

/// What is due when. Ids are the caller's; 8 bytes each.
#[derive(Debug, Default)]
pub struct Expiry {
    visits: BTreeSet<(Tick, u32)>,
}

impl Expiry {
    pub fn schedule(&mut self, id: u32, at: Tick) {
        self.visits.insert((at, id));
    }

    /// Forgets a visit; one that is not planned is no error.
    pub fn cancel(&mut self, id: u32, at: Tick) {
        self.visits.remove(&(at, id));
    }

    /// Takes the earliest visit if it is due.
    pub fn due(&mut self, now: Tick) -> Option<u32> {
        let (at, _) = *self.visits.first()?;
        if at > now {
            return None;
        }
        self.visits.pop_first().map(|(_, id)| id)
    }

    pub fn has_due(&self, now: Tick) -> bool {
        self.visits.first().is_some_and(|(at, _)| *at <= now)
    }

    #[cfg(test)]
    pub fn scheduled(&self, id: u32, at: Tick) -> bool {
        self.visits.contains(&(at, id))
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.visits.len()
    }
}

/// The first tick that is not before `at`, so that nothing is due early.
pub fn tick_after(epoch: Instant, at: Instant) -> Tick {
    let ticks = at
        .saturating_duration_since(epoch)
        .as_nanos()
        .div_ceil(TICK.as_nanos());
    Tick::try_from(ticks).unwrap_or(Tick::MAX)
}

/// The last tick that is over at `now`.
pub fn tick_before(epoch: Instant, now: Instant) -> Tick {
    let ticks = now.saturating_duration_since(epoch).as_nanos() / TICK.as_nanos();
    Tick::try_from(ticks).unwrap_or(Tick::MAX)
}

/// A length of time in ticks, rounded up and at least one.
pub fn ticks(length: Duration) -> Tick {
    let ticks = length.as_nanos().div_ceil(TICK.as_nanos()).max(1);
    Tick::try_from(ticks).unwrap_or(Tick::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visits_come_in_order_and_not_before_their_time() {
        let mut expiry = Expiry::default();
        expiry.schedule(1, 20);
        expiry.schedule(2, 10);
        expiry.schedule(3, 10);
        expiry.schedule(4, 10);
        expiry.cancel(3, 10);
        assert_eq!(expiry.due(9), None);
        let mut due = || expiry.due(25);
        assert_eq!(
            [due(), due(), due(), due()],
            [Some(2), Some(4), Some(1), None]
        );
    }

    #[test]
    fn a_deadline_between_ticks_is_due_at_the_later_one() {
        let epoch = Instant::now();
        let at = epoch + TICK + Duration::from_millis(1);
        assert_eq!(tick_after(epoch, at), 2);
        assert_eq!(tick_before(epoch, at), 1);
        assert_eq!(
            tick_after(epoch, epoch + TICK),
            tick_before(epoch, epoch + TICK)
        );
    }
}
