//! Whose turn it is: weighted round robin over some of a pool's targets.

use std::cell::Cell;

use rand::Rng;

/// Targets that take turns.
pub(super) struct Turns {
    /// Indexes of targets.
    members: Box<[u32]>,
    /// Running sums of their weights; empty if all weights are equal.
    sums: Box<[u32]>,
    cursor: Cell<u64>,
}

impl Turns {
    /// `members` are indexes of targets with their weights.
    pub(super) fn new(members: impl Iterator<Item = (usize, u16)>, rng: &mut impl Rng) -> Turns {
        let members: Vec<(usize, u16)> = members.collect();
        let sums = if members.windows(2).all(|pair| pair[0].1 == pair[1].1) {
            Box::default()
        } else {
            let sum = |sum: &mut u32, &(_, weight): &(usize, u16)| {
                *sum += u32::from(weight);
                Some(*sum)
            };
            members.iter().scan(0, sum).collect()
        };
        Turns {
            members: members.iter().map(|&(index, _)| index as u32).collect(),
            sums,
            cursor: Cell::new(rng.random()),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// Weighted round robin without state but a counter: multiples of the golden ratio modulo 1
    /// fall evenly into the targets' shares, so that turns of a heavy one are spread out.
    pub(super) fn next(&self) -> Option<usize> {
        const GOLDEN_RATIO: u64 = 0x9E37_79B9_7F4A_7C15;
        let turn = self.cursor.get();
        self.cursor.set(turn.wrapping_add(1));
        let at = match self.sums.last() {
            None => turn.checked_rem(self.members.len() as u64)? as usize,
            Some(&total) => {
                let fraction = turn.wrapping_mul(GOLDEN_RATIO) >> 32;
                let point = ((fraction * u64::from(total)) >> 32) as u32;
                self.sums.partition_point(|&sum| sum <= point)
            }
        };
        Some(self.members[at] as usize)
    }

    /// The first that is usable, from a random place on, so that the neighbour of a dead one does not
    /// get all of its share.
    pub(super) fn any(&self, usable: impl Fn(usize) -> bool, rng: &mut impl Rng) -> Option<usize> {
        let count = self.members.len();
        if count == 0 {
            return None;
        }
        let start = rng.random_range(0..count);
        (0..count)
            .map(|step| self.members[(start + step) % count] as usize)
            .find(|&index| usable(index))
    }
}
