//! What the gateway answers itself: echo requests, packets that nobody takes, packets that do not fit.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use etherparse::{IpNumber, PacketBuilder};
use router_common::Verdict;
use viaduct::config::{Forwarding, Reject};
use viaduct::l4::next_hop::NextHop;

use crate::fixture::*;
use crate::packets::*;

/// Message types (RFC 792, RFC 4443): echo request and reply.
fn echo(family: Family) -> (u8, u8) {
    match family {
        Family::V4 => (8, 0),
        Family::V6 => (128, 129),
    }
}

/// An ICMP packet from the gateway to the client behind [`CLIENT_MAC`], with the TTL of its own packets.
fn from_gateway(from: IpAddr, to: IpAddr, header: (u8, u8, [u8; 4]), payload: &[u8]) -> Vec<u8> {
    let (kind, code, rest) = header;
    let mut frame = icmp(from, to, kind, code, rest, payload);
    frame[..6].copy_from_slice(&CLIENT_MAC);
    frame[6..12].copy_from_slice(&GATEWAY_MAC);
    frame
}

#[test]
fn echo_requests_to_a_vip_are_answered() {
    let mut gateway = Gateway::new();
    for family in FAMILIES {
        let address = family.vip(10, 80);
        gateway.serve(
            vip("tcp", address),
            Forwarding::Dsr,
            &[family.backend(1, 80)],
        );
    }
    for hook in HOOKS {
        gateway.hook = hook;
        for family in FAMILIES {
            let (client, address) = (gateway.client(family).ip(), family.vip(10, 80).ip());
            let (request, reply) = echo(family);
            let rest = [0x12, 0x34, 0, 7];
            for payload in [
                &b""[..],
                b"fifty-six octets are the usual payload of an echo request",
            ] {
                let frame = icmp(client, address, request, 0, rest, payload);
                let out = gateway.expect("echo", &frame, Verdict::EchoAnswered);
                assert_eq!(out.action, hook.back());
                assert_eq!(out.moved, BTreeMap::new());
                let mut expected = from_gateway(address, client, (reply, 0, rest), payload);
                if family == Family::V4 {
                    // Everything but the fields that change is the request's.
                    expected[18..22].copy_from_slice(&frame[18..22]);
                    expected[24..26].copy_from_slice(&frame[24..26]);
                }
                assert_eq!(out.frame, expected, "{hook:?} {family:?}");
            }
            // To somebody else, or no echo request at all: the host's business.
            let neighbour = family.vip(99, 80).ip();
            let frame = icmp(client, neighbour, request, 0, rest, b"");
            gateway.expect_untouched("a neighbour", &frame, Verdict::NotForUs);
            let frame = icmp(client, address, reply, 0, rest, b"");
            gateway.expect_untouched("an echo reply", &frame, Verdict::NoSuchVip);
            let frame = icmp(client, address, request, 0, rest, b"");
            for len in gateway.hook.shortest(&frame)..frame.len() {
                let out = gateway.send(&frame[..len]);
                assert!(
                    [Action::Pass, Action::Drop].contains(&out.action),
                    "{len}: {out:?}"
                );
            }
        }
    }
}

#[test]
fn clients_are_told_that_nobody_is_there() {
    let mut gateway = Gateway::new();
    let mut rows = Vec::new();
    for (host, mode) in (10..).zip([Forwarding::Nat, Forwarding::Dsr, Forwarding::Gue]) {
        for family in FAMILIES {
            for proto in ["tcp", "udp"] {
                let (address, port) = (family.vip(host, 80), 80);
                let vip = vip(proto, address);
                gateway.serve(vip, mode, &[family.backend(host, port)]);
                // Its only backend left, and has no flows.
                gateway.set_pool(vip, &[]);
                rows.push((format!("{mode:?} {family:?} {proto}"), vip, address));
            }
        }
    }
    for hook in HOOKS {
        gateway.hook = hook;
        for (row, vip, address) in &rows {
            let client = gateway.client(Family::of(*address));
            let packets = match row.ends_with("tcp") {
                true => vec![
                    tcp(client, *address, Segment::Syn, b""),
                    tcp(client, *address, Segment::Syn, b"fast open"),
                ],
                false => vec![
                    udp(client, *address, b""),
                    udp(client, *address, &[7; 1000]),
                ],
            };
            for (packet, vlan) in packets
                .iter()
                .flat_map(|packet| [(packet, 0), (packet, 100)])
            {
                if vlan != 0 && hook == Hook::Tcx {
                    continue;
                }
                let packet = Packet {
                    vlan,
                    ..packet.clone()
                };
                let out = gateway.expect(row, &packet.frame(), Verdict::Rejected);
                assert_eq!(out.action, hook.back(), "{row}");
                assert_eq!(out.moved, BTreeMap::new(), "{row}");
                assert_eq!(out.frame, refusal(&packet), "{row}, {hook:?}, VLAN {vlan}");
            }
            gateway.configure(*vip, |config| config.reject = Some(Reject::Drop));
            gateway.set_pool(*vip, &[]);
            let frame = packets[0].frame();
            gateway.expect_untouched(&format!("{row}, silent"), &frame, Verdict::NoBackend);
            gateway.configure(*vip, |config| config.reject = None);
            gateway.set_pool(*vip, &[]);
        }
    }
}

#[test]
fn a_reset_answers_what_it_resets() {
    let mut gateway = Gateway::new();
    for family in FAMILIES {
        let address = family.vip(10, 80);
        let vip = vip("tcp", address);
        gateway.serve(vip, Forwarding::Ipip, &[family.backend(1, 80)]);
        gateway.set_pool(vip, &[]);
        gateway.now += DRAIN;
        // The drain is over, but the VIP is kept by another backend that takes nothing new.
        gateway.set_weights(vip, &[(family.backend(2, 80), 0)]);
        for hook in HOOKS {
            gateway.hook = hook;
            let client = gateway.client(family);
            // A segment of a connection that nobody has any more (RFC 9293 §3.10.7.1).
            let packet = tcp(client, address, Segment::Ack, b"late");
            let out = gateway.expect("ACK", &packet.frame(), Verdict::Rejected);
            assert_eq!(out.frame, refusal(&packet), "{family:?} {hook:?}");
            // A reset is never reset (RFC 9293 §3.5.2).
            let packet = tcp(client, address, Segment::Rst, b"");
            gateway.expect_untouched("RST", &packet.frame(), Verdict::NoBackend);
        }
    }
}

/// RST, or ICMP port unreachable, as the client must get it.
fn refusal(packet: &Packet) -> Vec<u8> {
    let eth = ethernet(GATEWAY_MAC, CLIENT_MAC, packet.vlan, packet.from.is_ipv6());
    let (from, to) = (packet.to, packet.from);
    let mut frame = Vec::new();
    if let Transport::Tcp(segment) = packet.transport {
        let mut header = etherparse::TcpHeader::new(from.port(), to.port(), 0, 0);
        header.rst = true;
        if segment == Segment::Syn {
            header.ack = true;
            header.acknowledgment_number = 1000 + 1 + packet.payload.len() as u32;
        } else {
            header.sequence_number = 2000;
        }
        let eth = PacketBuilder::ethernet2(GATEWAY_MAC, CLIENT_MAC);
        let ip = match (from.ip(), to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => eth.ipv4(from.octets(), to.octets(), 64),
            (IpAddr::V6(from), IpAddr::V6(to)) => eth.ipv6(from.octets(), to.octets(), 64),
            mixed => panic!("addresses of two families: {mixed:?}"),
        };
        ip.tcp_header(header).write(&mut frame, b"").expect("RST");
    } else {
        let (kind, code) = if packet.from.is_ipv6() {
            (1, 4)
        } else {
            (3, 3)
        };
        let quote = quote(packet);
        frame = from_gateway(from.ip(), to.ip(), (kind, code, [0; 4]), &quote);
    }
    [eth, frame.split_off(14)].concat()
}

/// What an ICMP error says of a packet: its IP header and 8 octets of it (RFC 792).
fn quote(packet: &Packet) -> Vec<u8> {
    let len = if packet.from.is_ipv4() { 28 } else { 48 };
    let mut quote = packet.bytes();
    quote.truncate(len);
    quote
}

#[test]
fn clients_are_told_what_fits() {
    let mut gateway = Gateway::new();
    let small = 1280;
    let rows = [
        (Forwarding::Nat, Family::V4, Family::V4, 0),
        (Forwarding::Dnat, Family::V6, Family::V6, 0),
        (Forwarding::Dsr, Family::V4, Family::V4, 0),
        (Forwarding::Dsr, Family::V6, Family::V6, 0),
        (Forwarding::Ipip, Family::V4, Family::V4, 20),
        (Forwarding::Ipip, Family::V4, Family::V6, 40),
        (Forwarding::Ipip, Family::V6, Family::V4, 20),
        (Forwarding::Gue, Family::V6, Family::V6, 48),
        (Forwarding::Gue, Family::V4, Family::V4, 28),
    ];
    for (host, (mode, inside, outside, overhead)) in (10..).zip(rows) {
        let (address, backend) = (inside.vip(host, 80), outside.backend(host, 80));
        let hop = NextHop {
            mtu: small + 100,
            ..next_hop(outside)
        };
        gateway.next_hops.insert(backend.ip(), hop);
        gateway.serve(vip("udp", address), mode, &[backend]);
        let mtu = usize::from(small) + 100 - overhead;
        let headers = if inside == Family::V4 { 28 } else { 48 };
        for hook in HOOKS {
            gateway.hook = hook;
            let row = format!("{mode:?} {inside:?} in {outside:?} {hook:?}");
            let client = gateway.client(inside);
            let fitting = udp(client, address, &vec![7; mtu - headers]);
            gateway.expect(&row, &fitting.frame(), Verdict::NewFlow);
            let packet = udp(client, address, &vec![7; mtu - headers + 1]);
            let out = gateway.expect(&row, &packet.frame(), Verdict::TooBig);
            assert_eq!(out.action, hook.back(), "{row}");
            assert_eq!(out.moved, BTreeMap::new(), "{row}");
            assert_eq!(out.frame, too_big(&packet, mtu as u32), "{row}");
            if inside == Family::V4 {
                let packet = Packet {
                    dont_fragment: false,
                    ..packet
                };
                let row = format!("{row}, may be fragmented");
                gateway.expect_untouched(&row, &packet.frame(), Verdict::DoesNotFit);
            }
        }
    }
}

/// ICMP fragmentation needed (RFC 1191 §4) or packet too big (RFC 4443 §3.2).
fn too_big(packet: &Packet, mtu: u32) -> Vec<u8> {
    let (kind, code) = if packet.from.is_ipv6() {
        (2, 0)
    } else {
        (3, 4)
    };
    let header = (kind, code, mtu.to_be_bytes());
    from_gateway(packet.to.ip(), packet.from.ip(), header, &quote(packet))
}

#[test]
fn a_datagram_is_refused_by_its_first_fragment() {
    let mut gateway = Gateway::new();
    let address = Family::V4.vip(10, 80);
    let vip = vip("udp", address);
    gateway.serve(vip, Forwarding::Nat, &[Family::V4.backend(1, 80)]);
    gateway.set_pool(vip, &[]);
    let client: SocketAddr = "198.51.100.1:5".parse().expect("an address");
    let whole = udp(client, address, &[7; 64]);
    let [first, _] = fragments_v4(&whole, 9, 32);
    let out = gateway.expect("a first fragment", &first, Verdict::Rejected);
    let ip = etherparse::Ipv4Header::from_slice(&out.frame[14..])
        .expect("IPv4")
        .0;
    assert_eq!(
        (ip.protocol, ip.destination),
        (IpNumber::ICMP, [198, 51, 100, 1])
    );
}
