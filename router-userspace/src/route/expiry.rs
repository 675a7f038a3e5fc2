//! Deadlines of leases, by the time each is to be looked at next.
//!
//! A renewed lease is not moved: when its old deadline comes, the route table sees that it was
//! renewed and schedules it again. So a renewal costs nothing here, each lease is visited about once
//! in its lifetime, and no visit scans the table. Pure: time is an argument, in [`Tick`]s.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Time since the table's epoch in units of [`TICK`]; wraps after 34 years.
pub type Tick = u32;

/// How exact a deadline is.
pub const TICK: Duration = Duration::from_millis(250);

/// What is due when. Ids are the caller's; one may stand here more than once.
#[derive(Debug, Default)]
pub struct Expiry {
    buckets: BTreeMap<Tick, Vec<u32>>,
}

impl Expiry {
    pub fn schedule(&mut self, id: u32, at: Tick) {
        self.buckets.entry(at).or_default().push(id);
    }

    /// Takes the earliest bucket if it is due: its time, and the ids scheduled for it.
    pub fn due(&mut self, now: Tick) -> Option<(Tick, Vec<u32>)> {
        let first = self.buckets.first_entry()?;
        (*first.key() <= now).then(|| first.remove_entry())
    }

    #[cfg(test)]
    pub fn scheduled(&self, id: u32, at: Tick) -> bool {
        self.buckets.get(&at).is_some_and(|ids| ids.contains(&id))
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
    fn buckets_come_in_order_and_not_before_their_time() {
        let mut expiry = Expiry::default();
        expiry.schedule(1, 20);
        expiry.schedule(2, 10);
        expiry.schedule(3, 10);
        assert_eq!(expiry.due(9), None);
        assert_eq!(expiry.due(25), Some((10, vec![2, 3])));
        assert_eq!(expiry.due(25), Some((20, vec![1])));
        assert_eq!(expiry.due(25), None);
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
