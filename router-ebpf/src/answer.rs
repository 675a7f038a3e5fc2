//! Packets that the gateway itself answers: echo requests, what no backend can take, what does not fit.
//!
//! An answer is made in the frame that asked for it and goes back where that came from.

use router_common::checksum::Delta;
use router_common::{IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, Verdict};

use crate::frame::{Frame, Room, at};
use crate::packet::{DF, EthHeader, IPV4_LEN, IPV6_LEN, Ipv4Header, Ipv6Header, Packet};
use crate::rewrite::{self, Link, write_ipv4};
use crate::scratch;
use crate::stage::Outcome;

/// Octets that an ICMP error has in front of what it quotes (RFC 792, RFC 4443 §2.1).
const ICMP_LEN: u32 = 8;
/// Of the transport header quoted: the ports (RFC 792).
const QUOTED: u32 = 8;
const HOP_LIMIT: u8 = 64;

/// RFC 792, RFC 4443: types and codes.
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// What is wrong with a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// RFC 792: destination unreachable, port unreachable; RFC 4443 §3.1, code 4.
    PortUnreachable,
    /// RFC 792: fragmentation needed (RFC 1191 §4); RFC 4443 §3.2: packet too big. With the MTU.
    TooBig(u32),
}

/// RFC 9293 §3.1. Words as they lie in the frame.
#[repr(C)]
struct TcpHeader {
    ports: u32,
    sequence: u32,
    acknowledgment: u32,
    offset_flags_window: u32,
    checksum: u16,
    urgent: u16,
}

/// Whether an ICMP packet is an echo request.
#[inline(always)]
pub fn is_echo_request(packet: &Packet, icmp_type: u8) -> bool {
    if packet.v6 {
        icmp_type == ECHO_REQUEST_V6
    } else {
        icmp_type == ECHO_REQUEST
    }
}

/// Answers an echo request (RFC 792, RFC 4443 §4.2).
#[inline(always)]
pub fn echo<F: Frame>(frame: &F, packet: &Packet) -> Result<i32, Verdict> {
    let header = at::<[u8; 4]>(frame, packet.l4).ok_or(Verdict::Malformed)?;
    let reply = if packet.v6 { ECHO_REPLY_V6 } else { ECHO_REPLY };
    // SAFETY: `at` checked that it lies in the frame, as for all pointers below.
    unsafe {
        let [request, code, a, b] = *header;
        let old = u16::from_ne_bytes([request, code]);
        let new = u16::from_ne_bytes([reply, code]);
        // The addresses change places, which a sum does not notice.
        let sum = Delta::default()
            .word16(old, new)
            .apply(u16::from_ne_bytes([a, b]));
        let [a, b] = sum.to_ne_bytes();
        *header = [reply, code, a, b];
    }
    if packet.v6 {
        let ip = at::<Ipv6Header>(frame, packet.l3).ok_or(Verdict::Internal)?;
        // SAFETY: as above.
        unsafe {
            let ip = &mut *ip;
            core::mem::swap(&mut ip.source, &mut ip.destination);
            ip.hop_limit = HOP_LIMIT;
        }
    } else {
        let ip = at::<Ipv4Header>(frame, packet.l3).ok_or(Verdict::Internal)?;
        // SAFETY: as above.
        unsafe {
            let ip = &mut *ip;
            let old = u16::from_ne_bytes([ip.ttl, ip.proto]);
            let new = u16::from_ne_bytes([HOP_LIMIT, ip.proto]);
            ip.checksum = Delta::default().word16(old, new).apply(ip.checksum);
            ip.ttl = HOP_LIMIT;
            core::mem::swap(&mut ip.source, &mut ip.destination);
        }
    }
    turn_back(frame)
}

/// Tells the client that its packet finds nobody: RST for TCP, else port unreachable.
#[inline(always)]
pub fn reject<F: Frame>(frame: &F) -> Result<Outcome, Verdict> {
    let packet = &scratch::get()?.packet;
    let answered = if packet.key.proto == IPPROTO_TCP {
        reset(frame, packet, Reply::Reset)
    } else {
        error(frame, packet, Error::PortUnreachable)
    };
    let action = answered.map_err(|_| Verdict::NoBackend)?;
    Ok(Outcome::sent(Verdict::Rejected, action))
}

/// Tells the client the size that fits on the way to the backend.
#[inline(always)]
pub fn too_big<F: Frame>(frame: &F) -> Result<Outcome, Verdict> {
    let scratch = scratch::get()?;
    let mtu = rewrite::inner_mtu(&scratch.steered);
    let action = error(frame, &scratch.packet, Error::TooBig(mtu))?;
    Ok(Outcome::sent(Verdict::TooBig, action))
}

/// Segments that are made without a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// RFC 9293 §3.10.7.1.
    Reset,
    /// An acknowledgment of something never sent, this: a client that exists resets it with the number
    /// as its sequence (RFC 9293 §3.10.7.3) and tries again.
    Challenge(u32),
}

/// Answers a segment by one without data.
#[inline(always)]
pub fn reset<F: Frame>(frame: &F, packet: &Packet, reply: Reply) -> Result<i32, Verdict> {
    const RST: u32 = 0x04;
    const ACK: u32 = 0x10;
    // A reset is never reset (RFC 9293 §3.5.2).
    if packet.tcp.rst() {
        return Err(Verdict::NoBackend);
    }
    let tcp = at::<TcpHeader>(frame, packet.l4).ok_or(Verdict::Malformed)?;
    // SAFETY: as in `echo`.
    let (sequence, acknowledgment, offset) = unsafe {
        (
            u32::from_be((*tcp).sequence),
            (*tcp).acknowledgment,
            u32::from_be((*tcp).offset_flags_window) >> 28,
        )
    };
    let header = packet.l4 - packet.l3 + offset * 4;
    let data = packet.ip_len.saturating_sub(header);
    let len = data + packet.tcp.syn() as u32 + packet.tcp.fin() as u32;
    let (sequence, acknowledgment, flags) = match reply {
        Reply::Challenge(number) => (0, number.to_be(), ACK),
        Reply::Reset if packet.tcp.ack() => (acknowledgment, 0, RST),
        Reply::Reset => (0, sequence.wrapping_add(len).to_be(), RST | ACK),
    };
    let ip_len = if packet.v6 { IPV6_LEN } else { IPV4_LEN };
    let l4 = packet.l3 + ip_len;
    if !frame.cut(l4 + size_of::<TcpHeader>() as u32) {
        return Err(Verdict::NoBackend);
    }
    let total = ip_len + size_of::<TcpHeader>() as u32;
    write_ip(frame, packet, packet.l3, total, IPPROTO_TCP)?;
    let tcp = at::<TcpHeader>(frame, l4).ok_or(Verdict::Internal)?;
    let words = [
        packet.key.ports.reversed().word(),
        sequence,
        acknowledgment,
        (5 << 28 | flags << 16).to_be(),
    ];
    let mut sum = pseudo_header(packet, size_of::<TcpHeader>() as u32, IPPROTO_TCP);
    for word in words {
        sum = sum.plus32(word);
    }
    // SAFETY: as in `echo`.
    unsafe {
        *tcp = TcpHeader {
            ports: words[0],
            sequence: words[1],
            acknowledgment: words[2],
            offset_flags_window: words[3],
            checksum: sum.finish(),
            urgent: 0,
        };
    }
    turn_back(frame)
}

/// Answers a packet by an ICMP error that quotes it.
#[inline(always)]
pub fn error<F: Frame>(frame: &F, packet: &Packet, error: Error) -> Result<i32, Verdict> {
    let ip_len = if packet.v6 { IPV6_LEN } else { IPV4_LEN };
    if !packet.v6 {
        let ip = at::<Ipv4Header>(frame, packet.l3).ok_or(Verdict::Internal)?;
        // SAFETY: as in `echo`.
        let ip = unsafe { &*ip };
        // What may be fragmented is not too big; what has options is too rare to be quoted.
        if ip.version_ihl != 0x45 || matches!(error, Error::TooBig(_)) && ip.fragment & DF == 0 {
            return Err(Verdict::DoesNotFit);
        }
    }
    let eth = at::<EthHeader>(frame, 0).ok_or(Verdict::Internal)?;
    // SAFETY: as in `echo`.
    let (source, destination) = unsafe { ((*eth).source, (*eth).destination) };
    let room = Room {
        octets: ip_len + ICMP_LEN,
        v6: packet.v6,
        udp: false,
        encapsulates: false,
    };
    let l2 = frame
        .resize(packet.l3, room, packet.vlan)
        .ok_or(Verdict::DoesNotFit)?;
    let quote = ip_len + QUOTED;
    let icmp = l2 + ip_len;
    if !frame.cut(icmp + ICMP_LEN + quote) {
        return Err(Verdict::DoesNotFit);
    }
    let total = ip_len + ICMP_LEN + quote;
    let proto = if packet.v6 {
        IPPROTO_ICMPV6
    } else {
        IPPROTO_ICMP
    };
    write_ip(frame, packet, l2, total, proto)?;
    let (first, rest) = match error {
        Error::PortUnreachable if packet.v6 => (0x0104, 0),
        Error::PortUnreachable => (0x0303, 0),
        Error::TooBig(mtu) if packet.v6 => (0x0200, mtu),
        Error::TooBig(mtu) => (0x0304, mtu & 0xffff),
    };
    let (first, rest) = ((first as u16).to_be(), rest.to_be());
    let mut sum = if packet.v6 {
        pseudo_header(packet, ICMP_LEN + quote, proto)
    } else {
        Delta::default()
    };
    sum = sum.plus16(first).plus32(rest);
    let words = if packet.v6 { 12 } else { 7 };
    for word in 0..12 {
        if word == words {
            break;
        }
        let quoted = at::<u32>(frame, icmp + ICMP_LEN + word * 4).ok_or(Verdict::Internal)?;
        // SAFETY: as in `echo`.
        sum = sum.plus32(unsafe { *quoted });
    }
    let header = at::<[u16; 4]>(frame, icmp).ok_or(Verdict::Internal)?;
    let [a, b, c, d] = rest.to_ne_bytes();
    // SAFETY: as in `echo`.
    unsafe {
        *header = [
            first,
            sum.finish(),
            u16::from_ne_bytes([a, b]),
            u16::from_ne_bytes([c, d]),
        ];
    }
    let link = Link {
        destination: source,
        source: destination,
        vlan: packet.vlan,
        v6: packet.v6,
    };
    link.write(frame)?;
    Ok(frame.send(frame.ifindex()))
}

/// The IP header of an answer, at `offset`.
#[inline(always)]
fn write_ip(
    frame: &impl Frame,
    packet: &Packet,
    offset: u32,
    total: u32,
    proto: u8,
) -> Result<(), Verdict> {
    let (source, destination) = (packet.key.destination, packet.key.source);
    if packet.v6 {
        let ip = at::<Ipv6Header>(frame, offset).ok_or(Verdict::Internal)?;
        // SAFETY: as in `echo`.
        unsafe {
            (*ip).version_class_label = (6_u32 << 28).to_be();
            (*ip).payload_len = ((total - IPV6_LEN) as u16).to_be();
            (*ip).next_header = proto;
            (*ip).hop_limit = HOP_LIMIT;
            (*ip).source = *source.words();
            (*ip).destination = *destination.words();
        }
        return Ok(());
    }
    let ip = at::<Ipv4Header>(frame, offset).ok_or(Verdict::Internal)?;
    // SAFETY: as in `echo`.
    unsafe {
        write_ipv4(
            &mut *ip,
            total,
            proto,
            0,
            source.v4_word(),
            destination.v4_word(),
        );
    }
    Ok(())
}

/// The sum of the pseudo header of an answer (RFC 9293 §3.1, RFC 8200 §8.1).
#[inline(always)]
fn pseudo_header(packet: &Packet, len: u32, proto: u8) -> Delta {
    let (source, destination) = (packet.key.source, packet.key.destination);
    let sum = Delta::default()
        .plus16((len as u16).to_be())
        .plus16((proto as u16).to_be());
    if !packet.v6 {
        return sum.plus32(source.v4_word()).plus32(destination.v4_word());
    }
    let mut sum = sum;
    for word in 0..4 {
        sum = sum
            .plus32(source.words()[word])
            .plus32(destination.words()[word]);
    }
    sum
}

/// Sends a frame back whose Ethernet header is as it came.
#[inline(always)]
fn turn_back<F: Frame>(frame: &F) -> Result<i32, Verdict> {
    let eth = at::<EthHeader>(frame, 0).ok_or(Verdict::Internal)?;
    // SAFETY: as in `echo`.
    unsafe { core::mem::swap(&mut (*eth).source, &mut (*eth).destination) };
    Ok(frame.send(frame.ifindex()))
}
