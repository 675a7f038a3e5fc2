//! The Maglev ring: which backend serves each slot. Pure.
//!
//! Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, §3.4:
//! every backend walks the slots in an order of its own and they take turns at claiming the next free
//! one. Losing or gaining a backend leaves most slots as they were, and the ring depends on the
//! members alone, so that gateways side by side send a flow to the same backend.

use std::net::SocketAddr;

use router_common::RING_SIZE;

/// A backend with its share of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    pub address: SocketAddr,
    /// Relative to the other members; 0 is treated as 1.
    pub weight: u16,
    /// What the ring holds for it.
    pub id: u32,
}

/// The ring of `members`, slot to id; `None` without members.
///
/// With equal weights shares differ by at most one slot (§3.4), otherwise by about one turn. Members
/// beyond `RING_SIZE` get no slot. Costs about ten probes a slot.
pub fn ring(members: &[Member]) -> Option<Box<[u32]>> {
    if members.is_empty() {
        return None;
    }
    // The order of turns must not depend on the order of arrival.
    let mut members: Vec<Member> = members.to_vec();
    members.sort_by_key(|member| member.address);
    let mut walks: Vec<Walk> = members
        .iter()
        .map(|member| Walk::new(member.address))
        .collect();
    let mut ring: Vec<u32> = vec![0; RING_SIZE];
    let mut taken = vec![false; RING_SIZE];
    for index in turns(&members) {
        let slot = walks[index].next_free(&taken);
        taken[slot] = true;
        ring[slot] = members[index].id;
    }
    Some(ring.into_boxed_slice())
}

/// Whose turn it is for each slot.
///
/// §3.4: weights alter the relative frequency of turns. The heaviest member has one in each round, one
/// of weight w its k-th in the first round r with r * w >= k * heaviest.
fn turns(members: &[Member]) -> impl Iterator<Item = usize> {
    let weight = |member: &Member| u64::from(member.weight.max(1));
    let heaviest = members.iter().map(weight).max().unwrap_or(1);
    let turns_until = |round: u64| {
        members
            .iter()
            .map(|m| round * weight(m) / heaviest)
            .sum::<u64>()
    };
    // The heaviest alone fills the ring in as many rounds as it has slots.
    let (mut few, mut enough) = (0, RING_SIZE as u64);
    while few + 1 < enough {
        let middle = (few + enough) / 2;
        if turns_until(middle) < RING_SIZE as u64 {
            few = middle;
        } else {
            enough = middle;
        }
    }
    let mut turns = Vec::with_capacity(RING_SIZE + members.len());
    for (index, member) in members.iter().enumerate() {
        let weight = weight(member);
        let until = enough * weight / heaviest;
        turns.extend((1..=until).map(|turn| ((turn * heaviest).div_ceil(weight), index)));
    }
    turns.sort_unstable();
    turns.into_iter().take(RING_SIZE).map(|(_, index)| index)
}

/// One member's way through the slots: `offset`, `offset + skip`, ... modulo the ring's prime size.
struct Walk {
    at: usize,
    skip: usize,
}

impl Walk {
    fn new(address: SocketAddr) -> Walk {
        let hash = hash(address);
        Walk {
            at: (hash >> 32) as usize % RING_SIZE,
            skip: (hash & 0xffff_ffff) as usize % (RING_SIZE - 1) + 1,
        }
    }

    fn next_free(&mut self, taken: &[bool]) -> usize {
        loop {
            let slot = self.at;
            self.at += self.skip;
            if self.at >= RING_SIZE {
                self.at -= RING_SIZE;
            }
            if !taken[slot] {
                return slot;
            }
        }
    }
}

fn hash(address: SocketAddr) -> u64 {
    let octets = match address.ip() {
        std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        std::net::IpAddr::V6(v6) => v6.octets(),
    };
    stable_hash(octets.into_iter().chain(address.port().to_be_bytes()))
}

/// The same on every gateway of every version: FNV-1a (Fowler, Noll and Vo), then the finaliser of
/// MurmurHash3, since FNV's high bits depend little on the last octets.
pub(crate) fn stable_hash(octets: impl IntoIterator<Item = u8>) -> u64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for octet in octets {
        hash = (hash ^ u64::from(octet)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ hash >> 33
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn members(weights: &[u16]) -> Vec<Member> {
        let member = |(i, &weight): (usize, &u16)| Member {
            address: SocketAddr::from(([10, 0, (i >> 8) as u8, i as u8], 8080)),
            weight,
            id: i as u32 + 1,
        };
        weights.iter().enumerate().map(member).collect()
    }

    fn shares(ring: &[u32]) -> BTreeMap<u32, usize> {
        let mut shares = BTreeMap::new();
        for &id in ring {
            *shares.entry(id).or_default() += 1;
        }
        shares
    }

    #[test]
    fn no_members_no_ring() {
        assert_eq!(ring(&[]), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn equal_members_differ_by_one_slot_at_most(count in 1usize..200) {
            let shares = shares(&ring(&members(&vec![100; count])).unwrap());
            let (least, most) = (shares.values().min().unwrap(), shares.values().max().unwrap());
            prop_assert_eq!(shares.len(), count);
            prop_assert!(most - least <= 1);
        }

        #[test]
        fn the_ring_does_not_depend_on_the_order_of_arrival(
            weights in prop::collection::vec(1u16..=1000, 1..40),
            seed: u64,
        ) {
            let ordered = members(&weights);
            let mut shuffled = ordered.clone();
            let mut state = seed;
            for i in (1..shuffled.len()).rev() {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                shuffled.swap(i, (state >> 33) as usize % (i + 1));
            }
            prop_assert_eq!(ring(&ordered), ring(&shuffled));
        }

        #[test]
        fn shares_follow_weights(weights in prop::collection::vec(1u16..=1000, 2..20)) {
            let total: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
            let shares = shares(&ring(&members(&weights)).unwrap());
            for (i, &weight) in weights.iter().enumerate() {
                let wanted = RING_SIZE as f64 * f64::from(weight) / total;
                let got = *shares.get(&(i as u32 + 1)).unwrap_or(&0) as f64;
                prop_assert!((got - wanted).abs() <= 2.0 + wanted * 0.01, "{got} for {wanted}");
            }
        }

        #[test]
        fn a_member_that_leaves_disturbs_few_others(count in 3usize..100, gone in 0usize..100) {
            let all = members(&vec![100; count]);
            let mut rest = all.clone();
            let gone = rest.remove(gone % count);
            let (before, after) = (ring(&all).unwrap(), ring(&rest).unwrap());
            let moved = before
                .iter()
                .zip(&after)
                .filter(|(before, after)| **before != gone.id && before != after)
                .count();
            // §5.3, figure 12: a few percent of the slots beside those that had to move.
            prop_assert!(moved < RING_SIZE / 10, "{moved} of {RING_SIZE} slots moved");
        }
    }
}
