//! The cycle that round-robin repeats: how often each backend has its turn, and when. Pure.

use router_common::RING_SIZE;

use crate::l4::maglev::Member;

/// One cycle of `members`, turn to id: each has turns by its weight, spread out evenly, none twice in a
/// row where it can be helped.
///
/// As long as the sum of the weights over their greatest common divisor. Where that exceeds
/// [`RING_SIZE`], weights are scaled down to fit, to one turn at least; members beyond [`RING_SIZE`]
/// get none. Members are expected in the order of their addresses, and 0 is treated as 1.
pub fn cycle(members: &[Member]) -> Vec<u32> {
    let members = &members[..members.len().min(RING_SIZE)];
    let turns = turns(members);
    // The k-th of w turns is due at (k + phase) / w of the cycle. Phases by the golden ratio keep
    // members of equal weight apart.
    const GOLDEN_RATIO: u32 = 0x9e37_79b9;
    let mut cycle = Vec::with_capacity(turns.iter().sum::<u64>() as usize);
    for (index, (member, &turns)) in members.iter().zip(&turns).enumerate() {
        let phase = (index as u32).wrapping_mul(GOLDEN_RATIO);
        for turn in 0..turns {
            let due = (turn << 32 | u64::from(phase)) / turns;
            cycle.push((due, member.id));
        }
    }
    // Stable: of two that are due together the first address comes first.
    cycle.sort_by_key(|(due, _)| *due);
    cycle.into_iter().map(|(_, id)| id).collect()
}

/// How many turns each member has.
fn turns(members: &[Member]) -> Vec<u64> {
    let weights = members.iter().map(|member| u64::from(member.weight.max(1)));
    let divisor = weights.clone().fold(0, greatest_common_divisor).max(1);
    let sum: u64 = weights.clone().sum::<u64>() / divisor;
    let size = RING_SIZE as u64;
    if sum <= size {
        return weights.map(|weight| weight / divisor).collect();
    }
    // One each, and what is left by weight: rounds down, so that the sum fits.
    let (spare, total) = (size - members.len() as u64, sum * divisor);
    weights.map(|weight| 1 + spare * weight / total).collect()
}

fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 {
        a
    } else {
        greatest_common_divisor(b, a % b)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::SocketAddr;

    use proptest::prelude::*;

    use super::*;

    fn members(weights: &[u16]) -> Vec<Member> {
        let member = |(i, &weight): (usize, &u16)| Member {
            address: SocketAddr::from(([10, 0, (i >> 8) as u8, i as u8], 8080)),
            weight,
            id: i as u32 + 1,
        };
        weights.iter().enumerate().map(member).collect()
    }

    fn turns_of(cycle: &[u32]) -> BTreeMap<u32, u64> {
        let mut turns = BTreeMap::new();
        for &id in cycle {
            *turns.entry(id).or_default() += 1;
        }
        turns
    }

    #[test]
    fn equal_members_have_one_turn_each() {
        let cycle = cycle(&members(&[100; 7]));
        assert_eq!(cycle.len(), 7);
        assert_eq!(turns_of(&cycle).len(), 7);
    }

    #[test]
    fn a_heavy_member_does_not_have_all_its_turns_in_a_row() {
        let cycle = cycle(&members(&[500, 100, 100]));
        assert_eq!(cycle.len(), 7);
        let twice = [&cycle[..], &cycle[..]].concat();
        assert!(!twice.windows(4).any(|turns| turns == [1; 4]), "{cycle:?}");
    }

    #[test]
    fn nobody_has_no_cycle() {
        assert_eq!(cycle(&[]), Vec::<u32>::new());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn turns_are_exactly_by_weight(weights in prop::collection::vec(1u16..=50, 1..40)) {
            let turns = turns_of(&cycle(&members(&weights)));
            for (i, &weight) in weights.iter().enumerate() {
                for (j, &other) in weights.iter().enumerate() {
                    let (turn, others) = (turns[&(i as u32 + 1)], turns[&(j as u32 + 1)]);
                    prop_assert_eq!(turn * u64::from(other), others * u64::from(weight));
                }
            }
        }

        #[test]
        fn a_cycle_fits_the_ring(weights in prop::collection::vec(1u16..=1000, 1..2000)) {
            let cycle = cycle(&members(&weights));
            prop_assert!(cycle.len() <= RING_SIZE);
            prop_assert_eq!(turns_of(&cycle).len(), weights.len());
        }
    }
}
