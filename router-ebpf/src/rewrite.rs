//! Address and port translation: the `nat` forwarding mode, both directions.
//!
//! Checksums are updated by what changed (RFC 1624), so a packet that was broken when it came is
//! as broken when it leaves and its receiver notices.

use router_common::checksum::Delta;
use router_common::{BackendEntry, FlowEntry, IPPROTO_UDP, Ports};

use crate::packet::Packet;

/// Client to VIP becomes gateway to backend.
#[inline(always)]
pub fn to_backend(packet: &mut Packet, backend: &BackendEntry, nat_port: u16) {
    translate(
        packet,
        Translation {
            source: backend.source.v4_word(),
            destination: backend.address.v4_word(),
            ports: Ports::new(nat_port, backend.port),
            source_mac: backend.source_mac,
            destination_mac: backend.destination_mac,
        },
    )
}

/// Backend to gateway becomes VIP to client.
#[inline(always)]
pub fn to_client(packet: &mut Packet, backend: &BackendEntry, flow: &FlowEntry) {
    translate(
        packet,
        Translation {
            source: backend.vip.v4_word(),
            destination: flow.client.v4_word(),
            ports: Ports::new(flow.ports.destination(), flow.ports.source()),
            source_mac: flow.local_mac,
            destination_mac: flow.client_mac,
        },
    )
}

/// The headers a packet leaves with.
struct Translation {
    source: u32,
    destination: u32,
    ports: Ports,
    source_mac: [u8; 6],
    destination_mac: [u8; 6],
}

#[inline(always)]
fn translate(packet: &mut Packet, to: Translation) {
    // SAFETY: `Packet::parse` checked that all the headers these point into lie in the frame.
    unsafe {
        let ip = &mut *packet.ip;
        let addresses = Delta::default()
            .word32(ip.source, to.source)
            .word32(ip.destination, to.destination);
        let l4 = addresses.word32(packet.key.ports.word(), to.ports.word());
        let checksum = *packet.checksum;
        *packet.checksum = if packet.key.proto == IPPROTO_UDP {
            l4.apply_udp(checksum)
        } else {
            l4.apply(checksum)
        };
        // TTL and protocol share a 16-bit word of the header. `Packet::parse` refused a TTL of 0 and 1.
        let old = u16::from_ne_bytes([ip.ttl, ip.proto]);
        let new = u16::from_ne_bytes([ip.ttl - 1, ip.proto]);
        ip.checksum = addresses.word16(old, new).apply(ip.checksum);
        ip.ttl -= 1;
        ip.source = to.source;
        ip.destination = to.destination;
        *packet.ports = to.ports.word();
        (*packet.eth).source = to.source_mac;
        (*packet.eth).destination = to.destination_mac;
    }
}
