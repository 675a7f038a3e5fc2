//! How a packet leaves: translated, inside another, or as it is.
//!
//! Checksums are updated by what changed (RFC 1624), so a packet that was broken when it came is
//! as broken when it leaves and its receiver notices.

use router_common::checksum::Delta;
use router_common::{Addr, BackendEntry, FlowEntry, IPPROTO_UDP, Mode, Ports, Settings, Verdict};

use crate::flows::{self, Steered, backend_port};
use crate::frame::{Frame, Room, at};
use crate::packet::{
    DF, ETH_LEN, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_VLAN, EthHeader, Fragment, IPV4_LEN,
    IPV6_LEN, Ipv4Header, Ipv6Header, Packet, UDP_LEN,
};
use crate::stage::Outcome;
use crate::{explain, maps, scratch};

/// IANA protocol numbers of IP in IP: RFC 2003, RFC 2473.
const IPPROTO_IPIP: u8 = 4;
const IPPROTO_IPV6: u8 = 41;
const OUTER_TTL: u8 = 64;

/// RFC 768. Fields as they lie in the frame.
#[repr(C)]
struct UdpHeader {
    source: u16,
    destination: u16,
    len: u16,
    checksum: u16,
}

/// Sends a client's packet to its backend; `TooBig` leaves the frame as it was.
#[inline(always)]
pub fn deliver<F: Frame>(frame: &F) -> Result<Outcome, Verdict> {
    let scratch = scratch::get()?;
    if !F::DRY && scratch.packet.fragment == Fragment::FIRST {
        flows::remember_forwarded_fragments(scratch);
    }
    let (packet, steered) = (&scratch.packet, &scratch.steered);
    if F::DRY {
        explain::note(|event| {
            event.backend = steered.backend_id;
            event.mode = steered.mode as u8;
        });
    }
    let action = to_backend(frame, packet, steered, maps::settings()?)?;
    // A health check is no traffic of the backend's.
    if !F::DRY && steered.verdict as u32 != Verdict::Probed as u32 {
        maps::count_packet(steered.backend_id, packet.len(), steered.new);
    }
    Ok(Outcome::sent(steered.verdict, action))
}

#[inline(always)]
fn to_backend<F: Frame>(
    frame: &F,
    packet: &Packet,
    steered: &Steered,
    settings: &Settings,
) -> Result<i32, Verdict> {
    let backend = maps::BACKENDS
        .get(steered.backend_id)
        .ok_or(Verdict::Internal)?;
    let room = room_of(steered.mode, backend);
    if !frame.fits(packet.ip_len, room.octets, backend.mtu.into()) {
        return Err(Verdict::TooBig);
    }
    match steered.mode {
        Mode::Nat | Mode::Dnat => {
            let translation = Translation {
                source: if matches!(steered.mode, Mode::Nat) {
                    backend.source
                } else {
                    packet.key.source
                },
                destination: backend.address,
                ports: Ports::new(steered.nat_port, backend_port(backend, packet.key.ports)),
            };
            translate(frame, packet, &translation)?;
        }
        Mode::Dsr | Mode::Ipip | Mode::Gue => count_hop(frame, packet)?,
        Mode::L7 => return Err(Verdict::Internal),
    }
    let class = if room.octets == 0 {
        0
    } else {
        traffic_class(frame, packet)
    };
    let l2 = frame
        .resize(packet.l3, room, backend.vlan)
        .ok_or(Verdict::DoesNotFit)?;
    let v6 = if room.octets == 0 { packet.v6 } else { room.v6 };
    let link = Link {
        destination: backend.destination_mac,
        source: backend.source_mac,
        vlan: backend.vlan,
        v6,
    };
    link.write(frame)?;
    if room.octets != 0 {
        wrap(frame, packet, backend, settings, Outer { l2, room, class })?;
    }
    Ok(frame.send(backend.ifindex))
}

/// Sends a backend's answer to its client.
#[inline(always)]
pub fn to_client<F: Frame>(
    frame: &F,
    packet: &Packet,
    flow: &FlowEntry,
) -> Result<Outcome, Verdict> {
    let translation = Translation {
        source: maps::VIPS.get(flow.vip).ok_or(Verdict::Internal)?.addr,
        destination: flow.client,
        ports: flow.ports.reversed(),
    };
    translate(frame, packet, &translation)?;
    let action = back(frame, packet.l3, packet.v6, flow)?;
    if F::DRY {
        explain::note(|event| event.backend = flow.backend.into());
    } else {
        maps::count_reply(flow.backend.into(), packet.len());
    }
    Ok(Outcome::sent(Verdict::Replied, action))
}

/// The Ethernet header of what goes to a flow's client, and there it goes.
#[inline(always)]
pub fn back<F: Frame>(frame: &F, l3: u32, v6: bool, flow: &FlowEntry) -> Result<i32, Verdict> {
    frame
        .resize(l3, Room::NONE, flow.client_vlan)
        .ok_or(Verdict::DoesNotFit)?;
    let link = Link {
        destination: flow.client_mac,
        source: flow.local_mac,
        vlan: flow.client_vlan,
        v6,
    };
    link.write(frame)?;
    Ok(frame.send(flow.client_ifindex))
}

/// An Ethernet header to be written.
pub struct Link {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub vlan: u16,
    pub v6: bool,
}

impl Link {
    /// Writes it to the front of a frame that [`Frame::resize`] made room for it in.
    #[inline(always)]
    pub fn write(&self, frame: &impl Frame) -> Result<(), Verdict> {
        let ethertype = if self.v6 {
            ETHERTYPE_IPV6
        } else {
            ETHERTYPE_IPV4
        };
        let eth = at::<EthHeader>(frame, 0).ok_or(Verdict::Internal)?;
        // SAFETY: `at` checked that the header lies in the frame, as for all pointers below.
        unsafe {
            (*eth).destination = self.destination;
            (*eth).source = self.source;
        }
        // A tag that is kept beside the frame is not in it.
        if self.vlan == 0 || frame.vlan() != 0 {
            // SAFETY: as above.
            unsafe { (*eth).ethertype = ethertype };
            return Ok(());
        }
        let tag = at::<[u16; 2]>(frame, ETH_LEN).ok_or(Verdict::Internal)?;
        // SAFETY: as above.
        unsafe {
            (*eth).ethertype = ETHERTYPE_VLAN;
            *tag = [self.vlan.to_be(), ethertype];
        }
        Ok(())
    }
}

/// What goes in front of a packet in this mode.
#[inline(always)]
fn room_of(mode: Mode, backend: &BackendEntry) -> Room {
    let v6 = !backend.address.is_v4();
    let header = if v6 { IPV6_LEN } else { IPV4_LEN };
    match mode {
        Mode::Ipip => Room {
            octets: header,
            v6,
            udp: false,
            encapsulates: true,
        },
        Mode::Gue => Room {
            octets: header + UDP_LEN,
            v6,
            udp: true,
            encapsulates: true,
        },
        _ => Room::NONE,
    }
}

/// The largest packet that fits on the way to a backend with what this mode puts in front of it.
#[inline(always)]
pub fn inner_mtu(steered: &Steered) -> u32 {
    maps::BACKENDS.get(steered.backend_id).map_or(0, |backend| {
        (backend.mtu as u32).saturating_sub(room_of(steered.mode, backend).octets)
    })
}

/// The addresses and ports a packet leaves with.
pub struct Translation {
    pub source: Addr,
    pub destination: Addr,
    pub ports: Ports,
}

#[inline(always)]
fn translate(frame: &impl Frame, packet: &Packet, to: &Translation) -> Result<(), Verdict> {
    let addresses = Delta::default()
        .address(packet.key.source, to.source)
        .address(packet.key.destination, to.destination);
    // Only the first fragment has the ports, and the checksum of them all.
    if packet.fragment != Fragment::LATER {
        let ports = Delta::default().word32(packet.key.ports.word(), to.ports.word());
        let udp = packet.key.proto == IPPROTO_UDP;
        if !frame.update_checksum(packet.checksum_at(), addresses, ports, udp) {
            return Err(Verdict::Internal);
        }
        let at_ports = at::<u32>(frame, packet.l4).ok_or(Verdict::Internal)?;
        // SAFETY: as in `write`.
        unsafe { *at_ports = to.ports.word() };
    }
    readdress(frame, packet, to, addresses)
}

/// Replaces the addresses of the IP header, which also counts a hop.
#[inline(always)]
pub fn readdress(
    frame: &impl Frame,
    packet: &Packet,
    to: &Translation,
    addresses: Delta,
) -> Result<(), Verdict> {
    if packet.v6 {
        let ip = at::<Ipv6Header>(frame, packet.l3).ok_or(Verdict::Internal)?;
        // SAFETY: as in `write`.
        unsafe {
            (*ip).hop_limit -= 1;
            (*ip).source = *to.source.words();
            (*ip).destination = *to.destination.words();
        }
        return Ok(());
    }
    let ip = at::<Ipv4Header>(frame, packet.l3).ok_or(Verdict::Internal)?;
    // SAFETY: as in `write`.
    unsafe {
        let ip = &mut *ip;
        let [old, new] = hop(ip);
        ip.checksum = addresses.word16(old, new).apply(ip.checksum);
        ip.ttl -= 1;
        ip.source = to.source.v4_word();
        ip.destination = to.destination.v4_word();
    }
    Ok(())
}

/// Counts a hop (RFC 791 §3.2, RFC 2003 §3.1, RFC 8200 §3). `Packet::parse` refused a count of 0 and 1.
#[inline(always)]
fn count_hop(frame: &impl Frame, packet: &Packet) -> Result<(), Verdict> {
    if packet.v6 {
        let ip = at::<Ipv6Header>(frame, packet.l3).ok_or(Verdict::Internal)?;
        // SAFETY: as in `write`.
        unsafe { (*ip).hop_limit -= 1 };
        return Ok(());
    }
    let ip = at::<Ipv4Header>(frame, packet.l3).ok_or(Verdict::Internal)?;
    // SAFETY: as in `write`.
    unsafe {
        let ip = &mut *ip;
        let [old, new] = hop(ip);
        ip.checksum = Delta::default().word16(old, new).apply(ip.checksum);
        ip.ttl -= 1;
    }
    Ok(())
}

/// The 16-bit word that TTL and protocol share, before and after a hop.
#[inline(always)]
fn hop(ip: &Ipv4Header) -> [u16; 2] {
    [ip.ttl, ip.ttl.wrapping_sub(1)].map(|ttl| u16::from_ne_bytes([ttl, ip.proto]))
}

/// Type of service, or traffic class: the outer header gets the same (RFC 2983 §3, RFC 6040 §4.1).
#[inline(always)]
fn traffic_class(frame: &impl Frame, packet: &Packet) -> u8 {
    if packet.v6 {
        return at::<Ipv6Header>(frame, packet.l3).map_or(0, |ip| {
            // SAFETY: as in `write`.
            (u32::from_be(unsafe { (*ip).version_class_label }) >> 20) as u8
        });
    }
    // SAFETY: as in `write`.
    at::<Ipv4Header>(frame, packet.l3).map_or(0, |ip| unsafe { (*ip).tos })
}

/// Where outer headers go.
struct Outer {
    l2: u32,
    room: Room,
    class: u8,
}

/// Writes the outer headers.
#[inline(always)]
fn wrap(
    frame: &impl Frame,
    packet: &Packet,
    backend: &BackendEntry,
    settings: &Settings,
    outer: Outer,
) -> Result<(), Verdict> {
    let proto = if outer.room.udp {
        IPPROTO_UDP
    } else if packet.v6 {
        IPPROTO_IPV6
    } else {
        IPPROTO_IPIP
    };
    // Spreads flows over the queues of the backend, and over equal paths.
    let spread = packet.key.source.words()[3] ^ packet.key.ports.word();
    let spread = router_common::mix(spread);
    let ip_end = if outer.room.v6 {
        let ip = at::<Ipv6Header>(frame, outer.l2).ok_or(Verdict::Internal)?;
        let payload = packet.ip_len + outer.room.octets - IPV6_LEN;
        // SAFETY: as in `write`.
        unsafe {
            // RFC 6438: the flow label of a tunnel is of the flow inside.
            let label = 6 << 28 | (outer.class as u32) << 20 | spread & 0xf_ffff;
            (*ip).version_class_label = label.to_be();
            (*ip).payload_len = (payload as u16).to_be();
            (*ip).next_header = proto;
            (*ip).hop_limit = OUTER_TTL;
            (*ip).source = *backend.source.words();
            (*ip).destination = *backend.address.words();
        }
        outer.l2 + IPV6_LEN
    } else {
        let ip = at::<Ipv4Header>(frame, outer.l2).ok_or(Verdict::Internal)?;
        let total = packet.ip_len + outer.room.octets;
        // SAFETY: as in `write`.
        unsafe {
            write_ipv4(
                &mut *ip,
                total,
                proto,
                outer.class,
                backend.source.v4_word(),
                backend.address.v4_word(),
            );
        }
        outer.l2 + IPV4_LEN
    };
    if !outer.room.udp {
        return Ok(());
    }
    let udp = at::<UdpHeader>(frame, ip_end).ok_or(Verdict::Internal)?;
    // SAFETY: as in `write`.
    unsafe {
        // The dynamic ports (RFC 6335 §6).
        (*udp).source = (0xc000 | spread as u16).to_be();
        (*udp).destination = settings.gue_port.to_be();
        (*udp).len = ((packet.ip_len + UDP_LEN) as u16).to_be();
        // Of a tunnel it may be left out (RFC 768; over IPv6 RFC 6935 §5): what is inside has its own.
        (*udp).checksum = 0;
    }
    Ok(())
}

/// A header without options, of a packet that is not to be fragmented.
#[inline(always)]
pub fn write_ipv4(
    ip: &mut Ipv4Header,
    total: u32,
    proto: u8,
    tos: u8,
    source: u32,
    destination: u32,
) {
    let first = u16::from_ne_bytes([0x45, tos]);
    let total = (total as u16).to_be();
    let hop = u16::from_ne_bytes([OUTER_TTL, proto]);
    ip.version_ihl = 0x45;
    ip.tos = tos;
    ip.total_len = total;
    ip.id = 0;
    ip.fragment = DF;
    ip.ttl = OUTER_TTL;
    ip.proto = proto;
    ip.checksum = Delta::default()
        .plus16(first)
        .plus16(total)
        .plus16(DF)
        .plus16(hop)
        .plus32(source)
        .plus32(destination)
        .finish();
    ip.source = source;
    ip.destination = destination;
}
