//! What must not be touched, and what must be refused.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use router_common::Verdict;

use crate::fixture::*;

#[test]
fn traffic_for_no_vip_is_passed_bit_for_bit() {
    let mut gateway = Gateway::serving(&[1]);
    let elsewhere = "203.0.113.9:80".parse().unwrap();
    let mut arp = vec![0xff; 6];
    arp.extend(CLIENT_MAC);
    arp.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.resize(60, 0);
    let mut ipv6 = Vec::new();
    etherparse::PacketBuilder::ethernet2(CLIENT_MAC, GATEWAY_MAC)
        .ipv6([0x20; 16], [0x21; 16], 64)
        .tcp(1, 2, 3, 4)
        .write(&mut ipv6, b"")
        .unwrap();
    for frame in [
        tcp(CLIENT, elsewhere, Segment::Syn, b"x"),
        udp(CLIENT, elsewhere, b"x"),
        arp,
        ipv6,
    ] {
        let out = gateway.send(&frame);
        assert_eq!((out.action, out.verdict), (PASS, Verdict::NotForUs));
        assert_eq!(out.frame, frame);
    }
}

#[test]
fn an_unregistered_port_of_a_vip_is_the_hosts_business() {
    let mut gateway = Gateway::serving(&[1]);
    let frame = tcp(CLIENT, "192.0.2.10:81".parse().unwrap(), Segment::Syn, b"");
    let out = gateway.send(&frame);
    assert_eq!((out.action, out.verdict), (PASS, Verdict::NoSuchVip));
    assert_eq!(out.frame, frame);
}

#[test]
fn a_frame_cut_short_anywhere_is_passed_or_dropped_untouched() {
    let mut gateway = Gateway::serving(&[1]);
    for frame in [
        tcp(CLIENT, VIP, Segment::Syn, b"payload"),
        udp(CLIENT, VIP, b"payload"),
    ] {
        let headers = if frame[23] == 6 { 54 } else { 42 };
        for len in 14..headers {
            let out = gateway.send(&frame[..len]);
            assert!([PASS, DROP].contains(&out.action), "{len} octets: {out:?}");
            // The kernel pads what is shorter than its smallest frame.
            assert_eq!(out.frame[..len], frame[..len], "{len} octets");
            if len >= 34 {
                assert_eq!(out.verdict, Verdict::Malformed, "{len} octets");
            }
        }
    }
}

#[test]
fn headers_that_contradict_themselves_are_refused() {
    let mut gateway = Gateway::serving(&[1]);
    let sound = tcp(CLIENT, VIP, Segment::Syn, b"");
    for (octet, value) in [
        (14, 0x44),
        (14, 0x40),
        (14, 0x55),
        (14, 0x4f),
        (17, 20),
        (17, 39),
    ] {
        let mut frame = sound.clone();
        frame[octet] = value;
        let out = gateway.send(&frame);
        assert_eq!(
            (out.action, out.verdict),
            (DROP, Verdict::Malformed),
            "octet {octet} = {value:#x}"
        );
    }
}

#[test]
fn fragments_to_a_vip_are_refused_and_others_passed() {
    let mut gateway = Gateway::serving(&[1]);
    for flags in [[0x20, 0x00], [0x20, 0x10], [0x00, 0x10]] {
        let mut frame = udp(CLIENT, VIP, b"fragment");
        frame[20..22].copy_from_slice(&flags);
        let out = gateway.send(&frame);
        assert_eq!(
            (out.action, out.verdict),
            (DROP, Verdict::Fragment),
            "{flags:?}"
        );
        let mut frame = udp_reply(
            backend(1),
            format!("{GATEWAY}:5000").parse().unwrap(),
            b"fragment",
        );
        frame[20..22].copy_from_slice(&flags);
        let out = gateway.send(&frame);
        assert_eq!((out.action, out.frame), (PASS, frame), "{flags:?}");
    }
}

#[test]
fn time_to_live_is_honoured() {
    let mut gateway = Gateway::serving(&[1]);
    for (ttl, action) in [(0, DROP), (1, DROP), (2, REDIRECT)] {
        let from = std::net::SocketAddrV4::new(*CLIENT.ip(), 50_000 + u16::from(ttl));
        let out = gateway.send(&tcp_frame(
            CLIENT_MAC,
            GATEWAY_MAC,
            from,
            VIP,
            Segment::Syn,
            b"",
            ttl,
        ));
        assert_eq!(out.action, action, "ttl {ttl}: {:?}", out.verdict);
    }
}

#[test]
fn no_frame_aborts_the_program_or_changes_on_its_way_past() {
    // The runner takes a function that changes nothing; only this thread runs it.
    let gateway = std::cell::RefCell::new(Gateway::serving(&[1, 2]));
    let base = prop_oneof![
        Just(tcp(CLIENT, VIP, Segment::Syn, b"payload")),
        Just(udp(CLIENT, VIP, b"payload")),
        Just(udp_reply(
            backend(1),
            format!("{GATEWAY}:2000").parse().unwrap(),
            b"payload"
        )),
    ];
    let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    let strategy = (base, damage, any::<prop::sample::Index>(), any::<bool>());
    let mut runner = TestRunner::new(Config {
        cases: 4096,
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(&strategy, |(mut frame, damage, cut, whole)| {
            for (at, value) in damage {
                let at = at.index(frame.len());
                frame[at] = value;
            }
            if !whole {
                frame.truncate(14 + cut.index(frame.len() - 14));
            }
            let out = gateway.borrow_mut().send(&frame);
            prop_assert!([DROP, PASS, TX, REDIRECT].contains(&out.action));
            if [PASS, DROP].contains(&out.action) {
                prop_assert_eq!(&out.frame[..frame.len()], &frame[..]);
            }
            Ok(())
        })
        .unwrap();
}
