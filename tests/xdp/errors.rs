//! ICMP errors go to the end whose packet they quote, translated as that packet was.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use etherparse::{Ipv4Header, SlicedPacket};
use router_common::Verdict;
use viaduct::config::Forwarding;

use crate::fixture::*;
use crate::packets::*;

/// Errors of both families: type, code and the second word.
fn kinds(family: Family) -> [(u8, u8, [u8; 4]); 3] {
    match family {
        // Fragmentation needed with an MTU of 1400, time exceeded, parameter problem.
        Family::V4 => [
            (3, 4, [0, 0, 5, 120]),
            (11, 0, [0; 4]),
            (12, 0, [0, 0, 0, 0]),
        ],
        Family::V6 => [(2, 0, [0, 0, 5, 120]), (3, 0, [0; 4]), (1, 1, [0; 4])],
    }
}

/// A router on the way, on the side of `family`.
fn router(family: Family) -> IpAddr {
    match family {
        Family::V4 => "203.0.113.9".parse().expect("an address"),
        Family::V6 => "2001:db8:ffff::9".parse().expect("an address"),
    }
}

/// What an error quotes of a packet: its IP header and `octets` more.
fn quoted(packet: &Packet, octets: usize) -> Vec<u8> {
    let mut quote = packet.bytes();
    quote.truncate(packet.l4() - packet.l3() + octets);
    quote
}

/// The quote of a translated packet differs from the packet in its checksums alone: the transport's is
/// left as it was quoted, and so is what IPv4 hosts may have made of the header's.
#[track_caller]
fn assert_quotes(row: &str, found: &[u8], packet: &Packet, octets: usize) {
    let expected = quoted(packet, octets);
    assert_eq!(found.len(), expected.len(), "{row}");
    let ip = packet.l4() - packet.l3();
    assert_eq!(found[..ip], expected[..ip], "{row}: the quoted IP header");
    let ports = ip..ip + 4;
    assert_eq!(found[ports.clone()], expected[ports], "{row}: the ports");
    if packet.from.is_ipv4() {
        let header = Ipv4Header::from_slice(found).expect("an IPv4 header").0;
        assert_eq!(
            header.header_checksum,
            header.calc_header_checksum(),
            "{row}"
        );
    }
}

/// A sound ICMP error: who sent it to whom with which TTL, and what it quotes.
struct Seen {
    from: IpAddr,
    to: IpAddr,
    hops: u8,
    header: Vec<u8>,
    quote: Vec<u8>,
}

fn read_error(frame: &[u8]) -> Seen {
    let packet = SlicedPacket::from_ethernet(frame).expect("a sound frame");
    assert!(checksum_is_right(&packet), "ICMP checksum: {frame:02x?}");
    match packet.net.as_ref().expect("IP") {
        etherparse::NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            Seen {
                from: IpAddr::from(header.source),
                to: IpAddr::from(header.destination),
                hops: header.time_to_live,
                header: ip.payload().payload[..8].to_vec(),
                quote: ip.payload().payload[8..].to_vec(),
            }
        }
        etherparse::NetSlice::Ipv6(ip) => {
            let header = ip.header().to_header();
            Seen {
                from: IpAddr::from(header.source),
                to: IpAddr::from(header.destination),
                hops: header.hop_limit,
                header: ip.payload().payload[..8].to_vec(),
                quote: ip.payload().payload[8..].to_vec(),
            }
        }
        other => panic!("not IP: {other:?}"),
    }
}

#[test]
fn errors_about_translated_flows_are_translated_in_both_directions() {
    let mut gateway = Gateway::new();
    for (host, mode) in (10..).zip([Forwarding::Nat, Forwarding::Dnat]) {
        for family in FAMILIES {
            for proto in ["tcp", "udp"] {
                let vip = vip(proto, family.vip(host, 80));
                gateway.serve(vip, mode, &[family.backend(host, 8080)]);
            }
        }
    }
    for hook in HOOKS {
        gateway.hook = hook;
        for (host, mode) in (10..).zip([Forwarding::Nat, Forwarding::Dnat]) {
            for family in FAMILIES {
                for proto in ["tcp", "udp"] {
                    let row = format!("{hook:?} {mode:?} {family:?} {proto}");
                    both_directions(&mut gateway, &row, proto, family.vip(host, 80));
                }
            }
        }
    }
}

fn both_directions(gateway: &mut Gateway, row: &str, proto: &str, address: SocketAddr) {
    let family = Family::of(address);
    let client = gateway.client(family);
    let request = match proto {
        "tcp" => tcp(client, address, Segment::Syn, b""),
        _ => udp(client, address, b"a datagram of some length"),
    };
    let sent = read(
        &gateway
            .expect(row, &request.frame(), Verdict::NewFlow)
            .frame,
    );
    let answer = sent.answer(b"an answer of some length");
    let answered = read(&gateway.expect(row, &answer.frame(), Verdict::Replied).frame);
    for (kind, code, rest) in kinds(family) {
        for octets in [8, 20] {
            let row = format!("{row}, type {kind}, {octets} octets quoted");
            // Somebody on the way, or the client, about an answer of the VIP.
            for from in [router(family), client.ip()] {
                let quote = quoted(&answered, octets);
                let frame = icmp(from, address.ip(), kind, code, rest, &quote);
                let out = gateway.expect(&row, &frame, Verdict::ErrorForwarded);
                assert_eq!(out.action, Action::Redirect, "{row}");
                assert_eq!(out.moved, BTreeMap::new(), "{row}");
                assert_eq!(out.frame[..6], BACKEND_MAC, "{row}");
                let seen = read_error(&out.frame);
                assert_eq!((seen.from, seen.to), (from, answer.from.ip()), "{row}");
                assert_eq!(seen.hops, 63, "{row}");
                assert_eq!(seen.header[4..], rest, "{row}");
                let quoted = Packet {
                    hops: answered.hops,
                    ..answer.clone()
                };
                assert_quotes(&row, &seen.quote, &quoted, octets);
            }
            // Somebody behind the gateway, or the backend, about a packet of the client.
            for from in [router(family), sent.to.ip()] {
                let quote = quoted(&sent, octets);
                let frame = from_backend(icmp(from, sent.from.ip(), kind, code, rest, &quote));
                let out = gateway.expect(&row, &frame, Verdict::ErrorForwarded);
                assert_eq!(out.action, gateway.hook.back(), "{row}");
                assert_eq!(out.frame[..6], CLIENT_MAC, "{row}");
                let seen = read_error(&out.frame);
                let visible = match from == sent.to.ip() {
                    true => address.ip(),
                    false => from,
                };
                assert_eq!((seen.from, seen.to), (visible, client.ip()), "{row}");
                assert_eq!(seen.header[4..], rest, "{row}");
                let quoted = Packet {
                    hops: sent.hops,
                    ..request.clone()
                };
                assert_quotes(&row, &seen.quote, &quoted, octets);
            }
        }
    }
}

#[test]
fn errors_about_tunnelled_flows_reach_the_flows_backend_whole() {
    let mut gateway = Gateway::new();
    let rows = [
        (Forwarding::Dsr, Family::V4, Family::V4),
        (Forwarding::Dsr, Family::V6, Family::V6),
        (Forwarding::Ipip, Family::V4, Family::V6),
        (Forwarding::Ipip, Family::V6, Family::V6),
        (Forwarding::Gue, Family::V4, Family::V4),
        (Forwarding::Gue, Family::V6, Family::V4),
    ];
    for (host, (mode, inside, outside)) in (10..).zip(rows) {
        let address = inside.vip(host, 80);
        // Distinguished by their hardware addresses.
        let backends: Vec<_> = (0..4)
            .map(|number| outside.backend(host * 4 + number, 80))
            .collect();
        for (number, backend) in (0..).zip(&backends) {
            let hop = viaduct::l4::next_hop::NextHop {
                destination_mac: [2, 0, 0, 0, 1, number],
                ..next_hop(outside)
            };
            gateway.next_hops.insert(backend.ip(), hop);
        }
        for proto in ["tcp", "udp"] {
            gateway.serve(vip(proto, address), mode, &backends);
            for hook in HOOKS {
                gateway.hook = hook;
                let row = format!("{mode:?} {inside:?} in {outside:?} {proto} {hook:?}");
                for _ in 0..5 {
                    to_the_flows_backend(&mut gateway, &row, proto, address, mode);
                }
            }
        }
    }
}

fn to_the_flows_backend(
    gateway: &mut Gateway,
    row: &str,
    proto: &str,
    address: SocketAddr,
    mode: Forwarding,
) {
    let family = Family::of(address);
    let client = gateway.client(family);
    let request = match proto {
        "tcp" => tcp(client, address, Segment::Syn, b""),
        _ => udp(client, address, b"a datagram of some length"),
    };
    let out = gateway.expect(row, &request.frame(), Verdict::NewFlow);
    let mac = out.frame[..6].to_vec();
    let outer = out.frame.len() - request.frame().len();
    let answer = request.answer(b"the backend answers by itself");
    for (kind, code, rest) in kinds(family) {
        for octets in [8, 20] {
            let quote = quoted(&answer, octets);
            let frame = icmp(router(family), address.ip(), kind, code, rest, &quote);
            let out = gateway.expect(row, &frame, Verdict::ErrorForwarded);
            assert_eq!(out.action, Action::Redirect, "{row}");
            assert_eq!(out.frame[..6], mac, "{row}: the flow's backend");
            assert_eq!(out.frame.len(), frame.len() + outer, "{row}");
            assert_eq!(outer == 0, mode == Forwarding::Dsr, "{row}");
            let mut inside = frame[14..].to_vec();
            match family {
                Family::V4 => {
                    let mut header = Ipv4Header::from_slice(&inside).expect("IPv4").0;
                    header.time_to_live -= 1;
                    header.header_checksum = header.calc_header_checksum();
                    inside[..20].copy_from_slice(&header.to_bytes());
                }
                Family::V6 => inside[7] -= 1,
            }
            assert_eq!(out.frame[14 + outer..], inside, "{row}");
        }
    }
}

#[test]
fn errors_that_quote_no_flow_go_nowhere() {
    let mut gateway = Gateway::new();
    for family in FAMILIES {
        for (host, mode) in [(10, Forwarding::Nat), (11, Forwarding::Ipip)] {
            let vip = vip("tcp", family.vip(host, 80));
            gateway.serve(vip, mode, &[family.backend(host, 80)]);
        }
    }
    for hook in HOOKS {
        gateway.hook = hook;
        for family in FAMILIES {
            let (kind, code, rest) = kinds(family)[0];
            let client = gateway.client(family);
            let address = family.vip(10, 80);
            let error = |packet: &Packet, to: IpAddr| {
                icmp(router(family), to, kind, code, rest, &quoted(packet, 8))
            };
            // A flow that never was; to a VIP that must know, and to no VIP at all.
            let forged = tcp(address, client, Segment::Ack, b"").at_backends();
            let frame = error(&forged, address.ip());
            gateway.expect_untouched("no such flow", &frame, Verdict::UnknownError);
            let other = SocketAddr::new(address.ip(), 81);
            let forged = tcp(other, client, Segment::Ack, b"");
            let frame = error(&forged, address.ip());
            gateway.expect_untouched("no such VIP", &frame, Verdict::NoSuchVip);
            // Of the gateway's own connection.
            let own = SocketAddr::new(family.gateway(), 45_000);
            let forged = tcp(own, family.backend(10, 80), Segment::Ack, b"");
            let frame = error(&forged, family.gateway());
            gateway.expect_untouched("the gateway's own", &frame, Verdict::NotAReply);
            // An error must quote what it is about: the destination of the error is the VIP quoted.
            let forged = tcp(family.vip(11, 80), client, Segment::Ack, b"");
            let frame = error(&forged, address.ip());
            let out = gateway.send(&frame);
            assert_ne!(out.action, Action::Back, "{out:?}");
            // Cut short anywhere.
            let whole = tcp(family.vip(11, 80), client, Segment::Ack, b"");
            let frame = error(&whole, family.vip(11, 80).ip());
            gateway.expect("whole", &frame, Verdict::ErrorForwarded);
            for len in gateway.hook.shortest(&frame)..frame.len() - 4 {
                let out = gateway.send(&frame[..len]);
                assert!(
                    [Action::Pass, Action::Drop].contains(&out.action),
                    "{hook:?} {family:?} {len}: {out:02x?}"
                );
            }
        }
    }
}
