//! What `nat` and `dnat` do to a packet and to its answer, byte for byte.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use etherparse::{Ipv4Header, SlicedPacket};
use router_common::{BackendCounters, Verdict};
use viaduct::config::Forwarding;
use viaduct::l4::next_hop::NextHop;

use crate::fixture::*;
use crate::packets::*;

const MODES: [Forwarding; 2] = [Forwarding::Nat, Forwarding::Dnat];

/// The first packet of a flow of either protocol.
fn opening(proto: &str, from: SocketAddr, to: SocketAddr) -> Packet {
    match proto {
        "tcp" => tcp(from, to, Segment::Syn, b""),
        _ => udp(from, to, b"ping"),
    }
}

/// `packet` as a backend must get it; the gateway's port is the one in `out`.
fn translated(packet: &Packet, backend: SocketAddr, mode: Forwarding, out: &Outcome) -> Packet {
    let from = match mode {
        Forwarding::Nat => {
            let port = read(&out.frame).from.port();
            assert!((NAT_PORTS.first..=NAT_PORTS.last).contains(&port), "{port}");
            SocketAddr::new(Family::of(backend).gateway(), port)
        }
        _ => packet.from,
    };
    Packet {
        source_mac: GATEWAY_INNER_MAC,
        destination_mac: BACKEND_MAC,
        from,
        to: backend,
        hops: packet.hops - 1,
        ..packet.clone()
    }
}

#[test]
fn packets_and_their_answers_are_translated_exactly() {
    let mut gateway = Gateway::new();
    for (number, mode) in MODES.into_iter().enumerate() {
        for family in FAMILIES {
            for proto in ["tcp", "udp"] {
                let address = family.vip(10 + number as u8, 80);
                let vip = vip(proto, address);
                gateway.serve(vip, mode, &[family.backend(1 + number as u8, 8080)]);
            }
        }
    }
    for hook in HOOKS {
        gateway.hook = hook;
        for (number, mode) in MODES.into_iter().enumerate() {
            for family in FAMILIES {
                for proto in ["tcp", "udp"] {
                    let address = family.vip(10 + number as u8, 80);
                    let backend = family.backend(1 + number as u8, 8080);
                    let row = format!("{hook:?} {mode:?} {family:?} {proto}");
                    conversation(&mut gateway, &row, proto, mode, address, backend);
                }
            }
        }
    }
}

/// A flow's first two packets and an answer to each.
fn conversation(
    gateway: &mut Gateway,
    row: &str,
    proto: &str,
    mode: Forwarding,
    address: SocketAddr,
    backend: SocketAddr,
) {
    let id = gateway.id_of(vip(proto, address), backend);
    let client = gateway.client(Family::of(address));
    let first = Packet {
        class: 0xb9,
        ..opening(proto, client, address)
    };
    let second = match proto {
        "tcp" => tcp(client, address, Segment::Ack, b"more of it"),
        _ => udp(client, address, b"more"),
    };
    let mut sent = None;
    for (packet, verdict, new_flows) in [
        (&first, Verdict::NewFlow, 1),
        (&second, Verdict::Forwarded, 0),
    ] {
        let frame = packet.frame();
        let out = gateway.expect(row, &frame, verdict);
        let expected = translated(packet, backend, mode, &out);
        assert_eq!(out.frame, expected.frame(), "{row}: {verdict:?}");
        assert_eq!(out.action, Action::Redirect, "{row}");
        let counted = BackendCounters {
            packets: 1,
            bytes: frame.len() as u64,
            new_flows,
            ..BackendCounters::default()
        };
        assert_eq!(out.moved, BTreeMap::from([(id, counted)]), "{row}");
        let port = expected.from.port();
        assert_eq!(*sent.get_or_insert(port), port, "{row}: the gateway's port");

        let answer = expected.answer(b"an answer");
        let frame = answer.frame();
        let out = gateway.expect(row, &frame, Verdict::Replied);
        let expected = Packet {
            source_mac: GATEWAY_MAC,
            destination_mac: CLIENT_MAC,
            from: address,
            to: client,
            hops: 63,
            ..answer
        };
        assert_eq!(out.frame, expected.frame(), "{row}: the answer");
        assert_eq!(out.action, gateway.hook.back(), "{row}");
        let counted = BackendCounters {
            reply_packets: 1,
            reply_bytes: frame.len() as u64,
            ..BackendCounters::default()
        };
        assert_eq!(out.moved, BTreeMap::from([(id, counted)]), "{row}");
    }
}

#[test]
fn tags_are_those_of_each_side() {
    let mut gateway = Gateway::new();
    let sides = [(0, 0), (100, 0), (0, 200), (100, 200)];
    for (host, (client_vlan, backend_vlan)) in (20..).zip(sides) {
        for family in FAMILIES {
            let (address, backend) = (family.vip(host, 80), family.backend(host, 8080));
            let hop = NextHop {
                vlan: backend_vlan,
                ..next_hop(family)
            };
            gateway.next_hops.insert(backend.ip(), hop);
            gateway.serve(vip("tcp", address), Forwarding::Nat, &[backend]);
            let row = format!("{family:?}, {client_vlan} to {backend_vlan}");
            let client = gateway.client(family);
            let packet = Packet {
                vlan: client_vlan,
                ..tcp(client, address, Segment::Syn, b"data")
            };
            let out = gateway.expect(&row, &packet.frame(), Verdict::NewFlow);
            let expected = Packet {
                vlan: backend_vlan,
                ..translated(&packet, backend, Forwarding::Nat, &out)
            };
            assert_eq!(out.frame, expected.frame(), "{row}");
            let answer = expected.answer(b"an answer");
            let out = gateway.expect(&row, &answer.frame(), Verdict::Replied);
            let expected = Packet {
                source_mac: GATEWAY_MAC,
                destination_mac: CLIENT_MAC,
                vlan: client_vlan,
                from: address,
                to: client,
                hops: 63,
                ..answer
            };
            assert_eq!(out.frame, expected.frame(), "{row}: the answer");

            // The classifier has the tag beside the frame, and the kernel writes it after the program.
            if client_vlan == 0 {
                gateway.hook = Hook::Tcx;
                let packet = tcp(gateway.client(family), address, Segment::Syn, b"data");
                let out = gateway.expect(&row, &packet.frame(), Verdict::NewFlow);
                let expected = translated(&packet, backend, Forwarding::Nat, &out);
                assert_eq!(out.frame, expected.frame(), "{row}: tcx");
                gateway.hook = Hook::Xdp;
            }
        }
    }
}

#[test]
fn what_is_odd_about_a_packet_stays_so() {
    let mut gateway = Gateway::new();
    for family in FAMILIES {
        let backends = [family.backend(1, 8080)];
        for proto in ["tcp", "udp"] {
            let vip = vip(proto, family.vip(10, 80));
            gateway.serve(vip, Forwarding::Nat, &backends);
        }
    }
    for hook in HOOKS {
        gateway.hook = hook;
        no_checksum(&mut gateway);
        for family in FAMILIES {
            broken_checksum(&mut gateway, family);
        }
        options_of_ip(&mut gateway);
        extension_headers(&mut gateway);
        padding(&mut gateway);
    }
}

/// A datagram of IPv4 may have none (RFC 768).
fn no_checksum(gateway: &mut Gateway) {
    let client = gateway.client(Family::V4);
    let mut frame = udp(client, Family::V4.vip(10, 80), b"ping").frame();
    frame[40..42].copy_from_slice(&[0, 0]);
    let out = gateway.expect("no checksum", &frame, Verdict::NewFlow);
    assert_eq!(out.frame[40..42], [0, 0]);
}

fn broken_checksum(gateway: &mut Gateway, family: Family) {
    let packet = udp(gateway.client(family), family.vip(10, 80), b"ping");
    let mut frame = packet.frame();
    let at = packet.l4() + 7;
    frame[at] ^= 0x55;
    let out = gateway.expect("a broken checksum", &frame, Verdict::NewFlow);
    let sliced = SlicedPacket::from_ethernet(&out.frame).expect("sound headers");
    assert!(!checksum_is_right(&sliced), "{family:?}");
}

fn options_of_ip(gateway: &mut Gateway) {
    let client = gateway.client(Family::V4);
    let mut frame = tcp(client, Family::V4.vip(10, 80), Segment::Syn, b"").frame();
    // One word of no-operation options (RFC 791 §3.1) behind the fixed header.
    frame.splice(34..34, [1, 1, 1, 1]);
    frame[14] = 0x46;
    let total = u16::from_be_bytes([frame[16], frame[17]]) + 4;
    frame[16..18].copy_from_slice(&total.to_be_bytes());
    let (header, _) = Ipv4Header::from_slice(&frame[14..]).expect("an IPv4 header");
    frame[24..26].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
    let out = gateway.expect("IP options", &frame, Verdict::NewFlow);
    assert_eq!(read(&out.frame).to, Family::V4.backend(1, 8080));
    assert_eq!(out.frame[34..38], [1, 1, 1, 1]);
}

fn extension_headers(gateway: &mut Gateway) {
    let client = gateway.client(Family::V6);
    let packet = udp(client, Family::V6.vip(10, 80), b"ping");
    let transport = packet.frame().split_off(packet.l4());
    // RFC 8200 §4.6: destination options of 16 octets, padding by PadN; behind them UDP.
    let mut options = vec![17, 1, 1, 12];
    options.resize(16, 0);
    let frame = with_extension(&packet, 60, &options, &transport);
    let out = gateway.expect("extension headers", &frame, Verdict::NewFlow);
    let seen = read(&out.frame);
    assert_eq!(seen.to, Family::V6.backend(1, 8080));
    assert_eq!(seen.payload, b"ping");
    assert_eq!(out.frame[packet.l4()..packet.l4() + 16], options);
}

/// Ethernet pads short packets; what IP has is translated, and counted.
fn padding(gateway: &mut Gateway) {
    let address = Family::V4.vip(10, 80);
    let packet = tcp(gateway.client(Family::V4), address, Segment::Syn, b"");
    let mut frame = packet.frame();
    frame.resize(60, 0);
    let out = gateway.expect("padding", &frame, Verdict::NewFlow);
    let backend = Family::V4.backend(1, 8080);
    let expected = translated(&packet, backend, Forwarding::Nat, &out).frame();
    assert_eq!(out.frame[..54], expected);
    let moved = out.moved.values().next().expect("counted");
    assert_eq!(moved.bytes, 54);
}

#[test]
fn frames_leave_by_where_the_other_side_is() {
    let mut gateway = Gateway::new();
    let address = Family::V4.vip(10, 80);
    let vip = vip("tcp", address);
    let backend = Family::V4.backend(1, 8080);
    gateway.serve(vip, Forwarding::Nat, &[backend]);
    for hook in HOOKS {
        gateway.hook = hook;
        let client = gateway.client(Family::V4);
        let syn = tcp(client, address, Segment::Syn, b"");
        let sent = read(&gateway.expect("SYN", &syn.frame(), Verdict::NewFlow).frame);
        // The client's router changed.
        let other_router = [2, 0, 0, 0, 0, 9];
        let ack = Packet {
            source_mac: other_router,
            ..tcp(client, address, Segment::Ack, b"")
        };
        gateway.expect("ACK", &ack.frame(), Verdict::Forwarded);
        let answer = sent.answer(b"");
        let out = gateway.expect("answer", &answer.frame(), Verdict::Replied);
        assert_eq!(read(&out.frame).destination_mac, other_router);
    }
    // The backend is behind the interface that clients are behind.
    let hop = NextHop {
        ifindex: INGRESS,
        ..next_hop(Family::V4)
    };
    gateway.next_hops.insert(backend.ip(), hop);
    gateway.set_pool(vip, &[backend]);
    for hook in HOOKS {
        gateway.hook = hook;
        let syn = tcp(gateway.client(Family::V4), address, Segment::Syn, b"");
        let out = gateway.expect("one interface", &syn.frame(), Verdict::NewFlow);
        assert_eq!(out.action, hook.back());
    }
}
