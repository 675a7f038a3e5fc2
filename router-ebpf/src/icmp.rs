//! ICMP to a VIP or to the gateway: echo requests are answered, errors go to the end whose packet they
//! quote.
//!
//! A quote may be as short as an IP header and 8 octets (RFC 792), which has the ports.

use router_common::checksum::Delta;
use router_common::{Addr, FlowKey, IPPROTO_TCP, IPPROTO_UDP, Mode, Ports, TcpFlags, Verdict};

use crate::flows::{self, backend_port};
use crate::frame::{Dry, Frame, Room, at};
use crate::packet::{IPV6_LEN, Ipv4Header, Ipv6Header, Packet, is_vip_address};
use crate::rewrite::{self, Link, Translation};
use crate::stage::Outcome;
use crate::{answer, maps, scratch, vip};

const ICMP_LEN: u32 = 8;

/// What becomes of an ICMP packet. The next stage is for one that goes to a backend as it is;
/// `ErrorForwarded` asks for [`to_backend`], `NotAReply` for [`to_client`].
#[inline(always)]
pub fn steer<F: Frame>(frame: &F) -> Result<Outcome, Verdict> {
    let settings = maps::settings()?;
    let scratch = scratch::get()?;
    let packet = &scratch.packet;
    let header = at::<[u8; 8]>(frame, packet.l4).ok_or(Verdict::Malformed)?;
    // SAFETY: `at` checked that it lies in the frame, as for all pointers below.
    let kind = unsafe { (*header)[0] };
    if answer::is_echo_request(packet, kind) {
        if !is_vip_address(packet.key.destination) || packet.to_gateway {
            return Err(Verdict::NoSuchVip);
        }
        let action = answer::echo(frame, packet)?;
        return Ok(Outcome::sent(Verdict::EchoAnswered, action));
    }
    if !is_error(packet, kind) {
        return Err(Verdict::NoSuchVip);
    }
    scratch
        .quote
        .read(frame, packet)
        .ok_or(Verdict::NoSuchVip)?;
    let quote = &scratch.quote;
    if packet.to_vip
        && let Some(vip) = vip::find(&quote.flow(), settings)
    {
        let steered = flows::peek::<F>(&quote.flow(), vip, settings);
        scratch.steered = steered.map_err(|_| Verdict::UnknownError)?;
        scratch.steered.verdict = Verdict::ErrorForwarded;
        if packet.hops <= 1 {
            return Err(Verdict::TtlExpired);
        }
        if !scratch.steered.mode.translates() {
            return Ok(Outcome::NEXT);
        }
        return Err(Verdict::ErrorForwarded);
    }
    Err(if packet.to_gateway {
        Verdict::NotAReply
    } else {
        Verdict::NoSuchVip
    })
}

/// RFC 792: destination unreachable, time exceeded, parameter problem; RFC 4443 §3.
#[inline(always)]
fn is_error(packet: &Packet, kind: u8) -> bool {
    if packet.v6 {
        matches!(kind, 1..=4)
    } else {
        matches!(kind, 3 | 11 | 12)
    }
}

/// The packet that an error is about.
#[derive(Clone, Copy)]
pub struct Quote {
    source: Addr,
    destination: Addr,
    ports: Ports,
    proto: u8,
    /// Where its IP header begins,
    l3: u32,
    /// and its ports.
    l4: u32,
}

impl Quote {
    #[inline(always)]
    fn read(&mut self, frame: &impl Frame, packet: &Packet) -> Option<()> {
        let l3 = packet.l4 + ICMP_LEN;
        self.l3 = l3;
        if packet.v6 {
            let ip = at::<Ipv6Header>(frame, l3)?;
            // SAFETY: as in `steer`.
            let ip = unsafe { &*ip };
            self.source = Addr::from_words(ip.source);
            self.destination = Addr::from_words(ip.destination);
            self.proto = ip.next_header;
            self.l4 = l3 + IPV6_LEN;
        } else {
            let ip = at::<Ipv4Header>(frame, l3)?;
            // SAFETY: as in `steer`.
            let ip = unsafe { &*ip };
            self.source = Addr::from_v4_word(ip.source);
            self.destination = Addr::from_v4_word(ip.destination);
            self.proto = ip.proto;
            self.l4 = l3 + (ip.version_ihl & 0x0f) as u32 * 4;
        }
        if !matches!(self.proto, IPPROTO_TCP | IPPROTO_UDP) {
            return None;
        }
        let ports = at::<u32>(frame, self.l4)?;
        // SAFETY: as in `steer`.
        self.ports = Ports::from_word(unsafe { *ports });
        Some(())
    }

    /// The flow of which the quoted packet is the other direction.
    #[inline(always)]
    fn flow(&self) -> FlowKey {
        FlowKey {
            source: self.destination,
            destination: self.source,
            ports: self.ports.reversed(),
            proto: self.proto,
        }
    }
}

/// An error about an answer: the VIP's packet, which its backend sent.
#[inline(always)]
pub fn to_backend<F: Frame>(frame: &F) -> Result<Outcome, Verdict> {
    let scratch = scratch::get()?;
    let (packet, quote, steered) = (&scratch.packet, &scratch.quote, &scratch.steered);
    let key = quote.flow();
    let backend = maps::BACKENDS
        .get(steered.backend_id)
        .ok_or(Verdict::Internal)?;
    let inner = Translation {
        source: backend.address,
        destination: if matches!(steered.mode, Mode::Nat) {
            backend.source
        } else {
            key.source
        },
        ports: Ports::new(backend_port(backend, key.ports), steered.nat_port),
    };
    translate(
        frame,
        packet,
        quote,
        &inner,
        packet.key.source,
        backend.address,
    )?;
    frame
        .resize(packet.l3, Room::NONE, backend.vlan)
        .ok_or(Verdict::DoesNotFit)?;
    let link = Link {
        destination: backend.destination_mac,
        source: backend.source_mac,
        vlan: backend.vlan,
        v6: packet.v6,
    };
    link.write(frame)?;
    let action = frame.send(backend.ifindex);
    Ok(Outcome::sent(Verdict::ErrorForwarded, action))
}

/// An error about a client's packet, on its way from the gateway to a backend.
#[inline(always)]
pub fn to_client<F: Frame>(frame: &F) -> Result<Outcome, Verdict> {
    let settings = maps::settings()?;
    let scratch = scratch::get()?;
    let (packet, quote, flow) = (&scratch.packet, &scratch.quote, &mut scratch.flow);
    // An error does not show that the backend answers: as dry as `explain`.
    flows::of_backend::<Dry<'_>>(&quote.flow(), TcpFlags(0), settings, 0, flow)
        .ok_or(Verdict::NoSuchVip)?;
    if packet.hops <= 1 {
        return Err(Verdict::TtlExpired);
    }
    let backend = maps::BACKENDS
        .get(flow.backend.into())
        .ok_or(Verdict::Internal)?;
    let vip = maps::VIPS.get(flow.vip).ok_or(Verdict::Internal)?.addr;
    let inner = Translation {
        source: flow.client,
        destination: vip,
        ports: flow.ports,
    };
    // What the backend says itself comes from the VIP; a router on the way has an address of its own.
    let source = if packet.key.source == backend.address {
        vip
    } else {
        packet.key.source
    };
    translate(frame, packet, quote, &inner, source, flow.client)?;
    let action = rewrite::back(frame, packet.l3, packet.v6, flow)?;
    Ok(Outcome::sent(Verdict::ErrorForwarded, action))
}

/// Rewrites the quote as `inner`, and the addresses of the error itself.
#[inline(always)]
fn translate(
    frame: &impl Frame,
    packet: &Packet,
    quote: &Quote,
    inner: &Translation,
    source: Addr,
    destination: Addr,
) -> Result<(), Verdict> {
    let inside = Delta::default()
        .address(quote.source, inner.source)
        .address(quote.destination, inner.destination);
    let outside = Delta::default()
        .address(packet.key.source, source)
        .address(packet.key.destination, destination);
    let ports = Delta::default().word32(quote.ports.word(), inner.ports.word());
    if packet.v6 {
        let ip = at::<Ipv6Header>(frame, quote.l3).ok_or(Verdict::Internal)?;
        // SAFETY: as in `steer`.
        unsafe {
            (*ip).source = *inner.source.words();
            (*ip).destination = *inner.destination.words();
        }
    } else {
        let ip = at::<Ipv4Header>(frame, quote.l3).ok_or(Verdict::Internal)?;
        // SAFETY: as in `steer`.
        unsafe {
            (*ip).checksum = inside.apply((*ip).checksum);
            (*ip).source = inner.source.v4_word();
            (*ip).destination = inner.destination.v4_word();
        }
    }
    let at_ports = at::<u32>(frame, quote.l4).ok_or(Verdict::Internal)?;
    // SAFETY: as in `steer`.
    unsafe { *at_ports = inner.ports.word() };
    // An IPv4 header and its checksum sum up to the same as before, and no ICMP checksum of IPv4 has
    // the addresses in it.
    let delta = if packet.v6 {
        outside.and(inside).and(ports)
    } else {
        ports
    };
    let checksum = at::<u16>(frame, packet.l4 + 2).ok_or(Verdict::Internal)?;
    // SAFETY: as in `steer`.
    unsafe { *checksum = delta.apply(*checksum) };
    let outer = Translation {
        source,
        destination,
        ports: Ports::default(),
    };
    rewrite::readdress(frame, packet, &outer, outside)
}
