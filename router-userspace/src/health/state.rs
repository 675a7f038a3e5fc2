//! When probes change the mind about a backend. Pure.

/// What probes have shown of one backend. A backend is healthy until it is shown not to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    healthy: bool,
    /// Probes in a row that spoke against `healthy`.
    against: u32,
}

impl Default for State {
    fn default() -> State {
        State {
            healthy: true,
            against: 0,
        }
    }
}

impl State {
    pub fn healthy(self) -> bool {
        self.healthy
    }

    /// Takes in one probe: `rise` good ones in a row make a backend healthy, `fall` bad ones the
    /// opposite. Returns whether it flipped.
    pub fn observe(&mut self, good: bool, rise: u32, fall: u32) -> bool {
        if good == self.healthy {
            self.against = 0;
            return false;
        }
        self.against += 1;
        if self.against < if good { rise } else { fall } {
            return false;
        }
        *self = State {
            healthy: good,
            against: 0,
        };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(probes: &str, wanted: &str) {
        let mut state = State::default();
        let seen: String = probes
            .chars()
            .map(|probe| {
                state.observe(probe == '+', 2, 3);
                if state.healthy() { 'H' } else { 'D' }
            })
            .collect();
        assert_eq!(seen, wanted, "{probes}");
    }

    #[test]
    fn it_flips_after_enough_in_a_row() {
        check("---", "HHD");
        check("--+--+---", "HHHHHHHHD");
        check("---+-++", "HHDDDDH");
        check("---++--+---", "HHDDHHHHHHD");
        check("+++", "HHH");
    }

    #[test]
    fn a_flip_is_told_once() {
        let mut state = State::default();
        assert!(state.observe(false, 1, 1));
        assert!(!state.observe(false, 1, 1));
        assert!(state.observe(true, 1, 1));
    }
}
