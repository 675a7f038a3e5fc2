//! Warnings that outsiders can cause, and so must not be able to flood the log with.
//!
//! Each kind of warning has a limit of its own, so that one that is frequent does not hide another.
//! Pure: time is an argument.

use std::time::{Duration, Instant};

/// Lets one warning a second through: whoever floods the bus does not flood the log.
#[derive(Clone, Copy, Debug, Default)]
pub struct WarningLimit {
    last: Option<Instant>,
    suppressed: u64,
}

impl WarningLimit {
    /// Whether to warn now, and how many warnings were held back before.
    pub fn allow(&mut self, now: Instant) -> Option<u64> {
        let recent = |last: Instant| now.saturating_duration_since(last) < Duration::from_secs(1);
        if self.last.is_some_and(recent) {
            self.suppressed += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_warning_a_second_tells_how_many_were_held_back() {
        let now = Instant::now();
        let mut limit = WarningLimit::default();
        assert_eq!(limit.allow(now), Some(0));
        assert_eq!(limit.allow(now), None);
        assert_eq!(limit.allow(now), None);
        assert_eq!(limit.allow(now + Duration::from_secs(1)), Some(2));
    }
}
