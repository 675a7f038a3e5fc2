//! Incremental Internet checksums (RFC 1624).
//!
//! A checksum is the one's complement of the one's-complement sum of 16-bit words, so a rewrite can
//! take the old words out and put the new ones in without reading the rest: HC' = ~(~HC + ~m + m')
//! (RFC 1624 §3, equation 3). The sum does not depend on byte order (RFC 1071 §2), so words are
//! added as they were loaded and the result is stored as it is.

use crate::Addr;

/// The words that leave and enter a checksummed range, summed up.
#[derive(Clone, Copy, Debug, Default)]
pub struct Delta(u64);

impl Delta {
    #[inline(always)]
    #[must_use]
    pub const fn word32(self, old: u32, new: u32) -> Delta {
        // Adding 32 bits at a time is the same modulo 2^16 - 1, and a u64 holds 2^32 of them.
        Delta(self.0 + !old as u64 + new as u64)
    }

    #[inline(always)]
    #[must_use]
    pub const fn word16(self, old: u16, new: u16) -> Delta {
        Delta(self.0 + !old as u64 + new as u64)
    }

    #[inline(always)]
    #[must_use]
    pub const fn address(self, old: Addr, new: Addr) -> Delta {
        // The words that make an IPv4 address an [`Addr`] cancel out.
        let (old, new) = (old.words(), new.words());
        self.word32(old[0], new[0])
            .word32(old[1], new[1])
            .word32(old[2], new[2])
            .word32(old[3], new[3])
    }

    /// A word of a sum that is made from nothing.
    #[inline(always)]
    #[must_use]
    pub const fn plus32(self, word: u32) -> Delta {
        Delta(self.0 + word as u64)
    }

    #[inline(always)]
    #[must_use]
    pub const fn plus16(self, word: u16) -> Delta {
        Delta(self.0 + word as u64)
    }

    /// The checksum of all words added, as it lies in a packet.
    #[inline(always)]
    pub const fn finish(self) -> u16 {
        self.apply(0xffff)
    }

    /// Both changes.
    #[inline(always)]
    #[must_use]
    pub const fn and(self, other: Delta) -> Delta {
        Delta(self.0 + other.0)
    }

    /// The same in 32 bits, as the kernel's helpers take it.
    #[inline(always)]
    pub const fn folded(self) -> u32 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        let sum = (sum & 0xffff_ffff) + (sum >> 32);
        sum as u32
    }

    /// The checksum after the change, as it lies in the packet.
    #[inline(always)]
    pub const fn apply(self, checksum: u16) -> u16 {
        let mut sum = self.0 + !checksum as u64;
        sum = (sum & 0xffff_ffff) + (sum >> 32);
        sum = (sum & 0xffff_ffff) + (sum >> 32);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        !(sum as u16)
    }

    /// The same for UDP, where 0 means "no checksum": a sum that comes out as 0 is sent as 0xffff
    /// (RFC 768), and a packet sent without one stays without.
    #[inline(always)]
    pub const fn apply_udp(self, checksum: u16) -> u16 {
        if checksum == 0 {
            return 0;
        }
        match self.apply(checksum) {
            0 => 0xffff,
            sum => sum,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071 §4.1, over words in the machine's order.
    fn full(words: &[u16]) -> u16 {
        let mut sum: u32 = words.iter().map(|&word| u32::from(word)).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    #[test]
    fn the_example_of_rfc_1624_holds() {
        // §4: HC = 0xDD2F, m = 0x5555, m' = 0x3285 gives 0x0000, where equation 2 gave 0xFFFF.
        assert_eq!(
            Delta::default().word16(0x5555, 0x3285).apply(0xdd2f),
            0x0000
        );
    }

    proptest! {
        #[test]
        fn an_update_equals_a_full_sum(
            mut words in prop::collection::vec(any::<u16>(), 3..40),
            new in any::<[u16; 3]>(),
        ) {
            // No header is all zero: it carries a version or a protocol.
            words.push(0x4500);
            let join = |words: &[u16]| u32::from(words[0]) | u32::from(words[1]) << 16;
            let updated = Delta::default()
                .word32(join(&words), join(&new))
                .word16(words[2], new[2])
                .apply(full(&words));
            words[..3].copy_from_slice(&new);
            prop_assert_eq!(updated, full(&words));
        }
    }

    #[test]
    fn udp_never_sends_a_computed_zero_and_keeps_no_checksum() {
        assert_eq!(
            Delta::default().word16(0x5555, 0x3285).apply_udp(0xdd2f),
            0xffff
        );
        assert_eq!(Delta::default().word16(1, 2).apply_udp(0), 0);
    }
}
