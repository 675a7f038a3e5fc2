//! What must be refused, and what no frame may do.

use std::cell::RefCell;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use router_common::Verdict;
use viaduct::config::Forwarding;

use crate::fixture::*;
use crate::packets::*;

const MODES: [Forwarding; 6] = [
    Forwarding::Nat,
    Forwarding::Dnat,
    Forwarding::Dsr,
    Forwarding::Ipip,
    Forwarding::Gue,
    Forwarding::L7,
];

/// One VIP of each mode, protocol and family.
fn gateway() -> Gateway {
    let mut gateway = Gateway::new();
    for (host, mode) in (10..).zip(MODES) {
        for family in FAMILIES {
            let backends = [family.backend(1, 80), family.backend(2, 80)];
            gateway.serve(vip("tcp", family.vip(host, 80)), mode, &backends);
            if mode != Forwarding::L7 {
                gateway.serve(vip("udp", family.vip(host, 80)), mode, &backends);
            }
        }
    }
    gateway
}

#[test]
fn a_frame_cut_short_anywhere_is_passed_or_dropped_untouched() {
    let mut gateway = gateway();
    for hook in HOOKS {
        gateway.hook = hook;
        for family in FAMILIES {
            for host in 10..15 {
                for vlan in [0, 100] {
                    // A classifier finds no tag in the frame.
                    if vlan != 0 && hook == Hook::Tcx {
                        continue;
                    }
                    let client = gateway.client(family);
                    let to = family.vip(host, 80);
                    for packet in [tcp(client, to, Segment::Syn, b""), udp(client, to, b"")] {
                        let packet = Packet { vlan, ..packet };
                        cut_short(&mut gateway, &packet);
                    }
                }
            }
        }
    }
}

fn cut_short(gateway: &mut Gateway, packet: &Packet) {
    let frame = packet.frame();
    for len in gateway.hook.shortest(&frame)..frame.len() {
        let out = gateway.send(&frame[..len]);
        let row = format!("{:?}, {len} octets: {out:02x?}", gateway.hook);
        assert!([Action::Pass, Action::Drop].contains(&out.action), "{row}");
        // The kernel pads what is shorter than its smallest frame.
        assert_eq!(out.frame[..len], frame[..len], "{row}");
        if len >= packet.l4() {
            assert_eq!(out.verdict, Verdict::Malformed, "{row}");
        }
    }
}

#[test]
fn headers_that_contradict_themselves_are_refused() {
    let mut gateway = gateway();
    for hook in HOOKS {
        gateway.hook = hook;
        for host in 10..16 {
            let client = gateway.client(Family::V4);
            let packet = tcp(client, Family::V4.vip(host, 80), Segment::Syn, b"");
            // Version and header length, total length.
            for (octet, value) in [
                (14, 0x44),
                (14, 0x40),
                (14, 0x55),
                (14, 0x65),
                (14, 0x4f),
                (17, 0),
                (17, 20),
                (17, 39),
            ] {
                let mut frame = packet.frame();
                frame[octet] = value;
                let row = format!("{hook:?} VIP {host}, octet {octet} = {value:#x}");
                gateway.expect_untouched(&row, &frame, Verdict::Malformed);
            }
            let client = gateway.client(Family::V6);
            let packet = tcp(client, Family::V6.vip(host, 80), Segment::Syn, b"");
            // Version, payload length.
            for (octet, value) in [(14, 0x40), (14, 0x50), (19, 0), (19, 19)] {
                let mut frame = packet.frame();
                frame[octet] = value;
                let row = format!("{hook:?} VIP {host}, octet {octet} = {value:#x}");
                gateway.expect_untouched(&row, &frame, Verdict::Malformed);
            }
        }
    }
}

#[test]
fn a_packet_that_is_longer_than_its_frame_is_refused() {
    let mut gateway = gateway();
    for hook in HOOKS {
        gateway.hook = hook;
        for family in FAMILIES {
            for host in 10..16 {
                let client = gateway.client(family);
                let to = family.vip(host, 80);
                let packet = tcp(client, to, Segment::Syn, &[7; 100]);
                let row = format!("{hook:?} {family:?} VIP {host}");
                let frame = packet.frame();
                for cut in [1, 50, 100] {
                    let cut_short = &frame[..frame.len() - cut];
                    gateway.expect_untouched(&row, cut_short, Verdict::Malformed);
                }
                let datagram = udp(client, to, &[7; 100]);
                let pieces = match family {
                    Family::V4 => fragments_v4(&datagram, 9, 24),
                    Family::V6 => fragments_v6(&datagram, 9, 24),
                };
                for piece in &pieces {
                    let cut_short = &piece[..piece.len() - 1];
                    gateway.expect_untouched(&row, cut_short, Verdict::Malformed);
                }
                // What is padded is whole.
                let padded = [&frame[..], &[0; 6]].concat();
                let verdict = match host {
                    15 => Verdict::HandedUp,
                    _ => Verdict::NewFlow,
                };
                gateway.expect(&row, &padded, verdict);
            }
        }
    }
}

/// A frame of several pages, of which a program sees the first.
#[test]
fn the_length_of_a_large_frame_is_that_of_all_its_pages() {
    let mut gateway = gateway();
    for family in FAMILIES {
        for host in 10..15 {
            let client = gateway.client(family);
            let packet = udp(client, family.vip(host, 80), &[7; 8000]);
            let frame = packet.frame();
            let row = format!("{family:?} VIP {host}");
            let cut_short = &frame[..frame.len() - 1];
            gateway.expect_untouched(&row, cut_short, Verdict::Malformed);
            gateway.expect(&row, &frame, Verdict::TooBig);
        }
    }
}

#[test]
fn time_to_live_is_honoured() {
    let mut gateway = gateway();
    for hook in HOOKS {
        gateway.hook = hook;
        for family in FAMILIES {
            for host in 10..15 {
                for proto in ["tcp", "udp"] {
                    for hops in [0, 1, 2] {
                        let row = format!("{hook:?} {family:?} VIP {host} {proto}, {hops} hops");
                        let (client, to) = (gateway.client(family), family.vip(host, 80));
                        let packet = match proto {
                            "tcp" => tcp(client, to, Segment::Syn, b""),
                            _ => udp(client, to, b"x"),
                        };
                        let frame = Packet { hops, ..packet }.frame();
                        if hops < 2 {
                            gateway.expect_untouched(&row, &frame, Verdict::TtlExpired);
                        } else {
                            gateway.expect(&row, &frame, Verdict::NewFlow);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn chains_of_extension_headers_are_followed_to_a_bound() {
    let mut gateway = gateway();
    for hook in HOOKS {
        gateway.hook = hook;
        for host in 10..15 {
            for count in 0..=8 {
                let client = gateway.client(Family::V6);
                let packet = udp(client, Family::V6.vip(host, 80), b"x");
                let mut rest = packet.frame().split_off(packet.l4());
                let mut number = 17;
                for _ in 0..count {
                    // RFC 8200 §4.6: destination options of 8 octets, padding.
                    rest = [&[number, 0, 1, 4, 0, 0, 0, 0][..], &rest].concat();
                    number = 60;
                }
                let frame = with_extension(&packet, number, &[], &rest);
                let row = format!("{hook:?} VIP {host}, {count} extension headers");
                let verdict = match count {
                    0..=6 => Verdict::NewFlow,
                    _ => Verdict::Malformed,
                };
                gateway.expect(&row, &frame, verdict);
            }
        }
    }
}

#[test]
fn no_frame_is_counted_as_a_contradiction_or_changes_on_its_way_past() {
    // The runner takes a function that changes nothing; only this thread runs it.
    let gateway = RefCell::new(gateway());
    let hook = prop_oneof![Just(Hook::Xdp), Just(Hook::Tcx)];
    let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    let cut = any::<prop::sample::Index>();
    let strategy = (hook, base(), damage, cut, 0u8..4);
    let mut runner = TestRunner::new(Config {
        cases: 6000,
        failure_persistence: None,
        ..Config::default()
    });
    let check = |(hook, mut frame, damage, cut, whole): (
        Hook,
        Vec<u8>,
        Vec<(prop::sample::Index, u8)>,
        prop::sample::Index,
        u8,
    )| {
        for (at, value) in damage {
            // Mostly in the headers.
            let at = at.index(frame.len().min(120));
            frame[at] = value;
        }
        if whole == 0 {
            frame.truncate(14 + cut.index(frame.len() - 14));
        }
        prop_assume!(frame.len() >= hook.shortest(&frame));
        let mut gateway = gateway.borrow_mut();
        gateway.hook = hook;
        let out = gateway.send(&frame);
        prop_assert!(out.verdict != Verdict::Internal);
        if [Action::Pass, Action::Drop].contains(&out.action) {
            prop_assert_eq!(&out.frame[..frame.len()], &frame[..], "{:?}", out.verdict);
        }
        Ok(())
    };
    runner.run(&strategy, check).unwrap();
}

/// Sound frames of every kind, and noise.
fn base() -> impl Strategy<Value = Vec<u8>> {
    let family = prop_oneof![Just(Family::V4), Just(Family::V6)];
    let vlan = prop_oneof![3 => Just(0u16), 1 => Just(100)];
    let sound = (family, 0u16..200, 9u8..17, vlan, 0u8..8, 0usize..80);
    let sound = sound.prop_map(|(family, client, host, vlan, kind, len)| {
        let (from, to) = (family.client(client), family.vip(host, 80));
        let payload = vec![0x5a; len];
        let gateway = std::net::SocketAddr::new(family.gateway(), 1024 + client);
        let packet = match kind {
            0 | 4 => tcp(from, to, Segment::Syn, &payload),
            1 => tcp(from, to, Segment::Ack, &payload),
            2 => tcp(family.backend(1, 80), gateway, Segment::Ack, &payload).at_backends(),
            _ => udp(from, to, &payload),
        };
        let packet = Packet { vlan, ..packet };
        match (kind, family) {
            (4, Family::V4) => icmp(from.ip(), to.ip(), 8, 0, [0; 4], &payload),
            (4, Family::V6) => icmp(from.ip(), to.ip(), 128, 0, [0; 4], &payload),
            (5, Family::V4) => icmp(
                from.ip(),
                to.ip(),
                3,
                4,
                [0; 4],
                &packet.answer(b"").bytes(),
            ),
            (5, Family::V6) => icmp(
                from.ip(),
                to.ip(),
                2,
                0,
                [0; 4],
                &packet.answer(b"").bytes(),
            ),
            (6, Family::V4) => fragments_v4(&packet, client, 8)[len % 2].clone(),
            (6, Family::V6) => fragments_v6(&packet, client.into(), 8)[len % 2].clone(),
            _ => packet.frame(),
        }
    });
    let noise = prop::collection::vec(any::<u8>(), 15..400);
    prop_oneof![9 => sound, 1 => noise]
}
