//! A frame becomes a [`Packet`], or is none of ours.
//!
//! Words are loaded as they lie on the wire. An IP header stands at an offset of 14 octets, so the
//! loads are unaligned; the verifier allows that on the architectures that do (kernel:
//! Documentation/bpf/verifier.rst, `CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS`).

use router_common::{
    Addr, FlowKey, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP, Ports, Settings,
    TcpFlags, Verdict, prefilter_bit,
};

use crate::frame::{Frame, at};
use crate::maps;

pub const ETH_LEN: u32 = 14;
/// A tag and the EtherType behind it (IEEE 802.1Q-2022, §9.4).
pub const VLAN_LEN: u32 = 4;
pub const IPV4_LEN: u32 = 20;
pub const IPV6_LEN: u32 = 40;
pub const UDP_LEN: u32 = 8;
/// IANA's numbers, as the half-words lie in a frame.
pub const ETHERTYPE_IPV4: u16 = 0x0800_u16.to_be();
pub const ETHERTYPE_IPV6: u16 = 0x86dd_u16.to_be();
pub const ETHERTYPE_VLAN: u16 = 0x8100_u16.to_be();
const TCP_LEN: u32 = 20;
const ICMP_LEN: u32 = 8;
/// RFC 791 §3.1: the fragment offset; more fragments.
const OFFSET: u16 = 0x1fff;
const MORE: u16 = 0x2000;
/// Don't fragment.
pub const DF: u16 = 0x4000_u16.to_be();
/// Extension headers followed in an IPv6 packet; one with more is malformed to us.
const EXTENSIONS: u32 = 6;

#[repr(C)]
pub struct EthHeader {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype: u16,
}

/// RFC 791 §3.1. Fields as they lie in the frame.
#[repr(C)]
pub struct Ipv4Header {
    pub version_ihl: u8,
    pub tos: u8,
    pub total_len: u16,
    pub id: u16,
    pub fragment: u16,
    pub ttl: u8,
    pub proto: u8,
    pub checksum: u16,
    pub source: u32,
    pub destination: u32,
}

/// RFC 8200 §3. Fields as they lie in the frame.
#[repr(C)]
pub struct Ipv6Header {
    pub version_class_label: u32,
    pub payload_len: u16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u32; 4],
    pub destination: [u32; 4],
}

/// RFC 8200 §4.3 and §4.5: the first octets of an extension header.
#[repr(C)]
struct Extension {
    next_header: u8,
    /// In units of 8 octets beyond the first 8.
    len: u8,
    /// Of a fragment header: offset in units of 8 octets, 2 bits, more fragments.
    fragment: u16,
    id: u32,
}

/// Whether the packet is a piece of a larger one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fragment(u32);

impl Fragment {
    pub const NONE: Fragment = Fragment(0);
    /// It has the ports.
    pub const FIRST: Fragment = Fragment(1);
    pub const LATER: Fragment = Fragment(2);
}

/// An IP packet to an address of ours, whose headers are whole.
#[derive(Clone, Copy)]
pub struct Packet {
    /// Ports are 0 for ICMP and for later fragments.
    pub key: FlowKey,
    /// Where the IP header begins,
    pub l3: u32,
    /// and the one behind it.
    pub l4: u32,
    /// Octets from the IP header on, without padding.
    pub ip_len: u32,
    pub v6: bool,
    pub fragment: Fragment,
    /// All clear but for TCP.
    pub tcp: TcpFlags,
    /// Identification of the datagram that a fragment is of.
    pub ident: u32,
    /// Time to live, or hop limit.
    pub hops: u8,
    /// Tag control information; 0: untagged.
    pub vlan: u16,
    /// The prefilter says that a VIP may have this destination,
    pub to_vip: bool,
    /// or that it may be an answer to the gateway.
    pub to_gateway: bool,
}

impl Packet {
    /// Reads the headers of a frame.
    ///
    /// Traffic for neither a VIP nor a gateway address of ours leaves after the destination is known,
    /// whatever else is wrong with it.
    #[inline(always)]
    pub fn parse<F: Frame>(&mut self, frame: &F, settings: &Settings) -> Result<(), Verdict> {
        let eth = at::<EthHeader>(frame, 0).ok_or(Verdict::NotForUs)?;
        // SAFETY: `at` checked that the header lies in the frame, as for all pointers below.
        let mut ethertype = unsafe { (*eth).ethertype };
        let mut l3 = ETH_LEN;
        let mut vlan = frame.vlan();
        // Two tags are nobody's here.
        if F::TAG_INSIDE && ethertype == ETHERTYPE_VLAN {
            let tag = at::<[u16; 2]>(frame, ETH_LEN).ok_or(Verdict::NotForUs)?;
            // SAFETY: as above.
            let [control, inner] = unsafe { *tag };
            vlan = u16::from_be(control);
            ethertype = inner;
            l3 = ETH_LEN + VLAN_LEN;
        }
        self.l3 = l3;
        self.vlan = vlan;
        match ethertype {
            ETHERTYPE_IPV4 => parse_v4(frame, settings, self, l3),
            ETHERTYPE_IPV6 => parse_v6(frame, settings, self, l3),
            _ => Err(Verdict::NotForUs),
        }
    }

    #[inline(always)]
    fn set_addresses(&mut self, source: Addr, destination: Addr, bits: u64) {
        self.key.source = source;
        self.key.destination = destination;
        self.key.ports = Ports::default();
        self.tcp = TcpFlags(0);
        self.to_vip = bits & 1 != 0;
        self.to_gateway = bits & 2 != 0;
    }

    /// Octets of the frame, without padding.
    #[inline(always)]
    pub fn len(&self) -> u64 {
        (self.l3 + self.ip_len) as u64
    }

    #[inline(always)]
    pub fn is_icmp(&self) -> bool {
        self.key.proto == IPPROTO_ICMP || self.key.proto == IPPROTO_ICMPV6
    }

    /// Where the TCP or UDP checksum lies.
    #[inline(always)]
    pub fn checksum_at(&self) -> u32 {
        // RFC 9293 §3.1; RFC 768.
        self.l4 + if self.key.proto == IPPROTO_TCP { 16 } else { 6 }
    }

    /// What all fragments of the same datagram have in common, in the shape of a flow.
    #[inline(always)]
    pub fn fragment_key(&self) -> FlowKey {
        FlowKey {
            ports: Ports::from_word(self.ident),
            ..self.key
        }
    }
}

#[inline(always)]
fn parse_v4(
    frame: &impl Frame,
    settings: &Settings,
    packet: &mut Packet,
    l3: u32,
) -> Result<(), Verdict> {
    let ip = at::<Ipv4Header>(frame, l3).ok_or(Verdict::NotForUs)?;
    // SAFETY: as in `parse`.
    let ip = unsafe { &*ip };
    let source = Addr::from_v4_word(ip.source);
    let destination = Addr::from_v4_word(ip.destination);
    let bits = prefilter(settings, source, destination, ip.proto)?;
    let header_len = (ip.version_ihl & 0x0f) as u32 * 4;
    let ip_len = u16::from_be(ip.total_len) as u32;
    let proto = ip.proto;
    let fragment = u16::from_be(ip.fragment);
    let fragment = if fragment & OFFSET != 0 {
        Fragment::LATER
    } else if fragment & MORE != 0 {
        Fragment::FIRST
    } else {
        Fragment::NONE
    };
    packet.set_addresses(source, destination, bits);
    packet.key.proto = proto;
    packet.l4 = l3 + header_len;
    packet.ip_len = ip_len;
    packet.v6 = false;
    packet.fragment = fragment;
    packet.ident = ip.id as u32;
    packet.hops = ip.ttl;
    if ip.version_ihl >> 4 != 4 || header_len < IPV4_LEN || proto == IPPROTO_ICMPV6 {
        return Err(refuse(&destination, bits, Verdict::Malformed));
    }
    // Here, and not where it is counted down: an expired packet must not make a flow. An echo request
    // has arrived, and an ICMP error must get through.
    if packet.hops <= 1 && proto != IPPROTO_ICMP {
        return Err(refuse(&destination, bits, Verdict::TtlExpired));
    }
    parse_l4(frame, packet, bits)
}

#[inline(always)]
fn parse_v6(
    frame: &impl Frame,
    settings: &Settings,
    packet: &mut Packet,
    l3: u32,
) -> Result<(), Verdict> {
    let ip = at::<Ipv6Header>(frame, l3).ok_or(Verdict::NotForUs)?;
    // SAFETY: as in `parse`.
    let ip = unsafe { &*ip };
    let source = Addr::from_words(ip.source);
    let destination = Addr::from_words(ip.destination);
    let bits = prefilter(settings, source, destination, ip.next_header)?;
    packet.set_addresses(source, destination, bits);
    packet.key.proto = ip.next_header;
    if u32::from_be(ip.version_class_label) >> 28 != 6 {
        return Err(refuse(&destination, bits, Verdict::Malformed));
    }
    packet.l4 = l3 + IPV6_LEN;
    packet.ip_len = IPV6_LEN + u16::from_be(ip.payload_len) as u32;
    packet.v6 = true;
    packet.fragment = Fragment::NONE;
    packet.hops = ip.hop_limit;
    if !is_ours(ip.next_header) {
        let end = Extensions::unpack(extensions(frame, l3 + IPV6_LEN, ip.next_header));
        let Some(end) = end else {
            return Err(refuse(&destination, bits, Verdict::Malformed));
        };
        packet.key.proto = end.proto;
        packet.fragment = end.fragment;
        packet.l4 = end.l4;
        if end.fragment != Fragment::NONE {
            let id = at::<u32>(frame, end.fragment_at + 4).ok_or(Verdict::Malformed)?;
            // SAFETY: as in `parse`.
            packet.ident = unsafe { *id };
        }
    }
    if packet.hops <= 1 && packet.key.proto != IPPROTO_ICMPV6 {
        return Err(refuse(&destination, bits, Verdict::TtlExpired));
    }
    if packet.key.proto == IPPROTO_ICMP {
        return Err(refuse(&destination, bits, Verdict::Malformed));
    }
    parse_l4(frame, packet, bits)
}

#[inline(always)]
fn parse_l4(frame: &impl Frame, packet: &mut Packet, bits: u64) -> Result<(), Verdict> {
    let destination = &packet.key.destination;
    let l4_len = match packet.key.proto {
        IPPROTO_TCP => TCP_LEN,
        IPPROTO_UDP => UDP_LEN,
        IPPROTO_ICMP | IPPROTO_ICMPV6 => ICMP_LEN,
        _ => return Err(Verdict::NoSuchVip),
    };
    if !frame.holds(packet.l3 + packet.ip_len) {
        return Err(refuse(destination, bits, Verdict::Malformed));
    }
    if packet.fragment == Fragment::LATER {
        return Ok(());
    }
    if packet.ip_len < packet.l4 - packet.l3 + l4_len {
        return Err(refuse(destination, bits, Verdict::Malformed));
    }
    let l4 = packet.l4;
    if packet.key.proto == IPPROTO_TCP {
        let Some(header) = at::<[u8; TCP_LEN as usize]>(frame, l4) else {
            return Err(refuse(destination, bits, Verdict::Malformed));
        };
        // SAFETY: as in `parse`; the flags are octet 13 (RFC 9293 §3.1).
        unsafe {
            packet.key.ports = Ports::from_word(*header.cast());
            packet.tcp = TcpFlags((*header)[13]);
        }
        return Ok(());
    }
    let Some(header) = at::<[u32; 2]>(frame, l4) else {
        return Err(refuse(destination, bits, Verdict::Malformed));
    };
    if packet.key.proto == IPPROTO_UDP {
        // SAFETY: as in `parse`.
        packet.key.ports = Ports::from_word(unsafe { (*header)[0] });
    }
    Ok(())
}

/// Whose packet it may be: bits of the prefilter, at least one.
#[inline(always)]
fn prefilter(
    settings: &Settings,
    source: Addr,
    destination: Addr,
    proto: u8,
) -> Result<u64, Verdict> {
    let look = |addr: Addr| {
        let (word, bit) = prefilter_bit(addr);
        Some(*maps::PREFILTER.get(word)? >> (bit & 63) & 3)
    };
    let mut bits = look(destination).ok_or(Verdict::Internal)?;
    if settings.dnat != 0 {
        bits |= look(source).ok_or(Verdict::Internal)? & 2;
    }
    if bits != 0 {
        return Ok(bits);
    }
    // A router on the way to a backend may tell any client that its packet got no further.
    if settings.dnat != 0 && matches!(proto, IPPROTO_ICMP | IPPROTO_ICMPV6) {
        return Ok(2);
    }
    Err(Verdict::NotForUs)
}

#[inline(always)]
fn is_ours(proto: u8) -> bool {
    matches!(proto, IPPROTO_TCP | IPPROTO_UDP | IPPROTO_ICMPV6)
}

/// Where a chain of extension headers ends.
struct Extensions {
    proto: u8,
    fragment: Fragment,
    l4: u32,
    fragment_at: u32,
}

impl Extensions {
    #[inline(always)]
    fn unpack(word: u64) -> Option<Extensions> {
        if word == 0 {
            return None;
        }
        Some(Extensions {
            proto: word as u8,
            fragment: Fragment((word >> 8) as u32 & 3),
            l4: (word >> 16) as u32 & 0xffff,
            fragment_at: (word >> 32) as u32 & 0xffff,
        })
    }
}

/// Follows extension headers (RFC 8200 §4) from `offset` to the first that is none; 0 if they are cut
/// short or too many. `fragment header's offset:16 | l4:16 | fragment:8 | proto:8`.
#[inline(never)]
fn extensions(frame: &impl Frame, mut offset: u32, mut proto: u8) -> u64 {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;
    let mut fragment = Fragment::NONE;
    let mut fragment_at = 0;
    for _ in 0..EXTENSIONS {
        if !matches!(proto, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION) {
            break;
        }
        if offset > 0x2ff {
            return 0;
        }
        let Some(header) = at::<Extension>(frame, offset) else {
            return 0;
        };
        // SAFETY: as in `parse`.
        let header = unsafe { &*header };
        if proto == FRAGMENT {
            let field = u16::from_be(header.fragment);
            fragment_at = offset;
            proto = header.next_header;
            offset += 8;
            if field & 0xfff8 != 0 {
                fragment = Fragment::LATER;
                break;
            }
            // An atomic fragment is a whole packet (RFC 6946 §4).
            if field & 1 != 0 {
                fragment = Fragment::FIRST;
            }
        } else {
            proto = header.next_header;
            offset += 8 + header.len as u32 * 8;
        }
    }
    if matches!(proto, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION) && fragment != Fragment::LATER
    {
        return 0;
    }
    if offset > 0x2ff {
        return 0;
    }
    (fragment_at as u64) << 32 | (offset as u64) << 16 | (fragment.0 as u64) << 8 | proto as u64
}

/// The verdict on a packet to `destination` that cannot be served: `verdict` if a VIP has that
/// address and the gateway itself does not, else it is none of our business.
#[inline(never)]
fn refuse(destination: &Addr, bits: u64, verdict: Verdict) -> Verdict {
    if bits & 2 == 0 && is_vip_address(*destination) {
        return verdict;
    }
    Verdict::NotForUs
}

#[inline(always)]
pub fn is_vip_address(addr: Addr) -> bool {
    // SAFETY: only whether the key is there matters.
    unsafe { maps::VIP_ADDRESSES.get(addr) }.is_some()
}
