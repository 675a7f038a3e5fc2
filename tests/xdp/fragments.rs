//! First fragments by their ports, later ones where the first went.

use std::net::SocketAddr;

use etherparse::Ipv4Header;
use router_common::Verdict;
use viaduct::config::Forwarding;

use crate::fixture::*;
use crate::packets::*;

const MODES: [Forwarding; 5] = [
    Forwarding::Nat,
    Forwarding::Dnat,
    Forwarding::Dsr,
    Forwarding::Ipip,
    Forwarding::Gue,
];

/// Both pieces of a packet.
fn fragments(packet: &Packet, id: u16) -> [Vec<u8>; 2] {
    match Family::of(packet.from) {
        Family::V4 => fragments_v4(packet, id, 24),
        Family::V6 => fragments_v6(packet, 0x1234_0000 | u32::from(id), 24),
    }
}

#[test]
fn fragments_go_where_their_first_one_goes() {
    let mut gateway = Gateway::new();
    for (host, mode) in (10..).zip(MODES) {
        for family in FAMILIES {
            for proto in ["tcp", "udp"] {
                let backends: Vec<_> = (1..5).map(|host| family.backend(host, 80)).collect();
                gateway.serve(vip(proto, family.vip(host, 80)), mode, &backends);
            }
        }
    }
    let mut id = 0;
    for hook in HOOKS {
        gateway.hook = hook;
        for (host, mode) in (10..).zip(MODES) {
            for family in FAMILIES {
                for proto in ["tcp", "udp"] {
                    for _ in 0..4 {
                        id += 1;
                        let row = format!("{hook:?} {mode:?} {family:?} {proto}");
                        let address = family.vip(host, 80);
                        follow_the_first(&mut gateway, &row, proto, mode, address, id);
                    }
                }
            }
        }
    }
}

fn follow_the_first(
    gateway: &mut Gateway,
    row: &str,
    proto: &str,
    mode: Forwarding,
    address: SocketAddr,
    id: u16,
) {
    let client = gateway.client(Family::of(address));
    let vip = vip(proto, address);
    let whole = match proto {
        "tcp" => {
            let syn = tcp(client, address, Segment::Syn, b"");
            gateway.expect(row, &syn.frame(), Verdict::NewFlow);
            tcp(client, address, Segment::Ack, &[7; 100])
        }
        _ => udp(client, address, &[7; 100]),
    };
    let [first, later] = fragments(&whole, id);
    // Whoever comes before the first, with the ports, is nobody's.
    let early = format!("{row}, too early");
    gateway.expect_untouched(&early, &later, Verdict::Fragment);
    let out = gateway.send(&first);
    let verdict = match proto {
        "tcp" => Verdict::Forwarded,
        _ => Verdict::NewFlow,
    };
    assert_eq!(out.verdict, verdict, "{row}: {out:02x?}");
    let backend = gateway.backend_of(vip, &out);
    let first_out = out.frame;
    for turn in 0..2 {
        let out = gateway.expect(row, &later, Verdict::Forwarded);
        assert_eq!(out.action, Action::Redirect, "{row}");
        assert_eq!(gateway.backend_of(vip, &out), backend, "{row}, turn {turn}");
        assert_eq!(out.frame[..12], first_out[..12], "{row}");
        let outer = out.frame.len() - later.len();
        assert_eq!(outer, first_out.len() - first.len(), "{row}");
        // What is in a later fragment stays as it is.
        let l4 = whole.l4() + if whole.from.is_ipv4() { 0 } else { 8 };
        assert_eq!(out.frame[outer + l4..], later[l4..], "{row}");
        let addresses = |frame: &[u8]| match Family::of(client) {
            Family::V4 => frame[outer + 26..outer + 34].to_vec(),
            Family::V6 => frame[outer + 22..outer + 54].to_vec(),
        };
        assert_eq!(addresses(&out.frame), addresses(&first_out), "{row}");
        if client.is_ipv4() {
            let header = Ipv4Header::from_slice(&out.frame[outer + 14..])
                .expect("IPv4")
                .0;
            assert_eq!(
                header.header_checksum,
                header.calc_header_checksum(),
                "{row}"
            );
            assert_eq!(header.time_to_live, 63, "{row}");
        }
    }
    if matches!(mode, Forwarding::Nat | Forwarding::Dnat) {
        // Put together again, it is the packet that would have come whole.
        let expected = gateway
            .expect(row, &whole.frame(), Verdict::Forwarded)
            .frame;
        let header = whole.l4() + if whole.from.is_ipv4() { 0 } else { 8 };
        let together = [&first_out[header..], &later[header..]].concat();
        assert_eq!(together, expected[whole.l4()..], "{row}: put together");
        answers_too(gateway, row, &read(&expected), address, client, id);
    }
    // Another datagram's is nobody's.
    let [_, other] = fragments(&whole, id + 30_000);
    gateway.expect_untouched(&format!("{row}, another's"), &other, Verdict::Fragment);
}

/// Answers in pieces are led back in pieces.
fn answers_too(
    gateway: &mut Gateway,
    row: &str,
    sent: &Packet,
    address: SocketAddr,
    client: SocketAddr,
    id: u16,
) {
    let row = format!("{row}, answer");
    let answer = sent.answer(&[9; 100]);
    let [first, later] = fragments(&answer, id);
    gateway.expect_untouched(&row, &later, Verdict::NotAReply);
    let out = gateway.expect(&row, &first, Verdict::Replied);
    assert_eq!(out.action, gateway.hook.back(), "{row}");
    let first_out = out.frame;
    let out = gateway.expect(&row, &later, Verdict::Replied);
    let whole = gateway
        .expect(&row, &answer.frame(), Verdict::Replied)
        .frame;
    let seen = read(&whole);
    assert_eq!((seen.from, seen.to), (address, client), "{row}");
    let header = answer.l4() + if client.is_ipv4() { 0 } else { 8 };
    let together = [&first_out[header..], &out.frame[header..]].concat();
    assert_eq!(together, whole[answer.l4()..], "{row}: put together");
    assert_eq!(out.frame[..12], whole[..12], "{row}");
}

#[test]
fn an_atomic_fragment_is_a_whole_packet() {
    // RFC 6946 §4.
    let mut gateway = Gateway::new();
    let address = Family::V6.vip(10, 80);
    for proto in ["tcp", "udp"] {
        gateway.serve(
            vip(proto, address),
            Forwarding::Nat,
            &[Family::V6.backend(1, 80)],
        );
    }
    for hook in HOOKS {
        gateway.hook = hook;
        let client = gateway.client(Family::V6);
        for packet in [
            tcp(client, address, Segment::Syn, b""),
            udp(client, address, b"x"),
        ] {
            let transport = packet.frame().split_off(packet.l4());
            let frame = with_fragment_header(&packet, 77, 0, false, &transport);
            let before = gateway.datapath.flows().iter().count();
            let out = gateway.expect("atomic", &frame, Verdict::NewFlow);
            let after = gateway.datapath.flows().iter().count();
            assert_eq!(after, before + 1, "a flow, and no place for fragments");
            let seen = read(&out.frame);
            assert_eq!(seen.to, Family::V6.backend(1, 80));
        }
    }
}

#[test]
fn fragments_for_nobody_pass_untouched() {
    let mut gateway = Gateway::new();
    for family in FAMILIES {
        gateway.serve(
            vip("udp", family.vip(10, 80)),
            Forwarding::Nat,
            &[family.backend(1, 80)],
        );
    }
    for hook in HOOKS {
        gateway.hook = hook;
        for family in FAMILIES {
            let client = gateway.client(family);
            let elsewhere = udp(client, family.vip(99, 80), &[7; 100]);
            for piece in fragments(&elsewhere, 1) {
                gateway.expect_untouched("elsewhere", &piece, Verdict::NotForUs);
            }
            // The gateway's own, from a backend.
            let own = SocketAddr::new(family.gateway(), 45_000);
            let answer = udp(family.backend(1, 80), own, &[7; 100]).at_backends();
            let [first, later] = fragments(&answer, 2);
            gateway.expect_untouched("its own", &first, Verdict::NotAReply);
            gateway.expect_untouched("its own, later", &later, Verdict::NotAReply);
        }
    }
}
