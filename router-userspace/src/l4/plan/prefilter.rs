//! The destination prefilter, with the number of reasons for each bit, since addresses share bits.

use std::collections::HashMap;

use router_common::{Addr, PREFILTER_WORDS, prefilter_bit};

use super::MapOp;

/// Which bit: a VIP has the address.
pub(super) const VIP: u32 = 0;
/// Answers of backends have it, as their destination (`nat`) or as their source (`dnat`).
pub(super) const ANSWER: u32 = 1;

#[derive(Default)]
pub(super) struct Prefilter {
    reasons: HashMap<(u32, u32), u32>,
    words: HashMap<u32, u64>,
}

impl Prefilter {
    pub(super) fn add(&mut self, addr: Addr, kind: u32, ops: &mut Vec<MapOp>) {
        let (word, bit) = prefilter_bit(addr);
        let reasons = self.reasons.entry((word, bit + kind)).or_default();
        *reasons += 1;
        if *reasons == 1 {
            self.write(word, |bits| bits | 1 << (bit + kind), ops);
        }
    }

    pub(super) fn remove(&mut self, addr: Addr, kind: u32, ops: &mut Vec<MapOp>) {
        let (word, bit) = prefilter_bit(addr);
        let reasons = self
            .reasons
            .get_mut(&(word, bit + kind))
            .expect("added before");
        *reasons -= 1;
        if *reasons == 0 {
            self.reasons.remove(&(word, bit + kind));
            self.write(word, |bits| bits & !(1 << (bit + kind)), ops);
        }
    }

    /// The whole of it.
    pub(super) fn all(&self) -> impl Iterator<Item = MapOp> {
        (0..PREFILTER_WORDS).map(|word| MapOp::SetPrefilter {
            word,
            bits: self.words.get(&word).copied().unwrap_or(0),
        })
    }

    fn write(&mut self, word: u32, change: impl Fn(u64) -> u64, ops: &mut Vec<MapOp>) {
        debug_assert!(word < PREFILTER_WORDS);
        let bits = self.words.entry(word).or_default();
        *bits = change(*bits);
        ops.push(MapOp::SetPrefilter { word, bits: *bits });
    }
}
