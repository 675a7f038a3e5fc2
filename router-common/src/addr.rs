//! Addresses and ports as they lie in a packet.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IANA protocol number 1 (RFC 792).
pub const IPPROTO_ICMP: u8 = 1;
/// IANA protocol number 58 (RFC 4443).
pub const IPPROTO_ICMPV6: u8 = 58;
/// IANA protocol number 6 (RFC 9293).
pub const IPPROTO_TCP: u8 = 6;
/// IANA protocol number 17 (RFC 768).
pub const IPPROTO_UDP: u8 = 17;

/// An IPv4 or IPv6 address; IPv4 as `::ffff:a.b.c.d` (RFC 4291 §2.5.5.2).
///
/// Four words of four octets each in the order of the wire, so that the packet path loads,
/// compares and hashes words and never bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Addr {
    words: [u32; 4],
}

const V4_MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Addr {
    /// From the word of an IPv4 header as it was loaded.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Addr {
        Addr {
            words: [0, 0, V4_MAPPED, word],
        }
    }

    /// From the words of an IPv6 header as they were loaded.
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Addr {
        Addr { words }
    }

    #[inline(always)]
    pub const fn words(&self) -> &[u32; 4] {
        &self.words
    }

    /// The IPv4 address as the word of a header; meaningless for IPv6.
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.words[3]
    }

    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == V4_MAPPED
    }

    pub fn ip(&self) -> IpAddr {
        let mut octets = [0; 16];
        for (chunk, word) in octets.chunks_exact_mut(4).zip(self.words) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        Ipv6Addr::from(octets).to_canonical()
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Addr {
        let octets = match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let mut words = [0; 4];
        for (word, chunk) in words.iter_mut().zip(octets.chunks_exact(4)) {
            *word = u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        }
        Addr { words }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Addr {
        Addr::from(IpAddr::V4(ip))
    }
}

/// Source and destination port as the first word of a TCP or UDP header.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ports(u32);

impl Ports {
    pub const fn new(source: u16, destination: u16) -> Ports {
        let [a, b] = source.to_be_bytes();
        let [c, d] = destination.to_be_bytes();
        Ports(u32::from_ne_bytes([a, b, c, d]))
    }

    #[inline(always)]
    pub const fn from_word(word: u32) -> Ports {
        Ports(word)
    }

    #[inline(always)]
    pub const fn word(self) -> u32 {
        self.0
    }

    /// The other direction of the same flow.
    #[inline(always)]
    pub const fn reversed(self) -> Ports {
        Ports(self.0.rotate_left(16))
    }

    #[inline(always)]
    pub const fn source(self) -> u16 {
        let [a, b, _, _] = self.0.to_ne_bytes();
        u16::from_be_bytes([a, b])
    }

    #[inline(always)]
    pub const fn destination(self) -> u16 {
        let [_, _, c, d] = self.0.to_ne_bytes();
        u16::from_be_bytes([c, d])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_back_as_itself() {
        for text in ["192.0.2.10", "2001:db8::10", "::1", "0.0.0.0"] {
            let ip: IpAddr = text.parse().unwrap();
            let addr = Addr::from(ip);
            assert_eq!(addr.ip(), ip);
            assert_eq!(addr.is_v4(), ip.is_ipv4());
        }
    }

    #[test]
    fn a_v4_word_is_the_octets_in_order() {
        let addr = Addr::from(Ipv4Addr::new(192, 0, 2, 10));
        assert_eq!(addr.v4_word().to_ne_bytes(), [192, 0, 2, 10]);
        assert_eq!(Addr::from_v4_word(addr.v4_word()), addr);
    }

    #[test]
    fn ports_are_the_first_word_of_the_header() {
        let ports = Ports::new(0x1234, 0x5678);
        assert_eq!(ports.word().to_ne_bytes(), [0x12, 0x34, 0x56, 0x78]);
        assert_eq!((ports.source(), ports.destination()), (0x1234, 0x5678));
    }
}
