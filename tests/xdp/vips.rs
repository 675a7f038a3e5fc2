//! Which VIP a packet is for, and whether its source may have it.

use std::net::{IpAddr, SocketAddr};

use router_common::{Addr, Verdict, prefilter_bit};
use viaduct::config::Forwarding;
use viaduct::route::Vip;

use crate::fixture::*;
use crate::packets::*;

const MODES: [Forwarding; 5] = [
    Forwarding::Nat,
    Forwarding::Dnat,
    Forwarding::Dsr,
    Forwarding::Ipip,
    Forwarding::Gue,
];

/// The first packet of a flow to `to`.
fn opening(proto: &str, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    match proto {
        "tcp" => tcp(from, to, Segment::Syn, b"").frame(),
        _ => udp(from, to, b"x").frame(),
    }
}

#[test]
fn the_narrowest_vip_that_covers_a_port_has_it() {
    let mut gateway = Gateway::new();
    let mut rows = Vec::new();
    for mode in MODES {
        for family in FAMILIES {
            for proto in ["tcp", "udp"] {
                let exact = gateway.address(family, 443);
                let ip = match exact.is_ipv4() {
                    true => exact.ip().to_string(),
                    false => format!("[{}]", exact.ip()),
                };
                let range = vip(proto, format!("{ip}:1000-2000"));
                let any = gateway.address(family, 443);
                let any_ip = match any.is_ipv4() {
                    true => any.ip().to_string(),
                    false => format!("[{}]", any.ip()),
                };
                let any_vip = vip(proto, format!("{any_ip}:*"));
                let one = vip(proto, exact);
                let inside = vip(proto, SocketAddr::new(exact.ip(), 1500));
                let of_any = vip(proto, SocketAddr::new(any.ip(), 443));
                gateway.serve(range, mode, &[family.backend(1, 1000)]);
                gateway.serve(one, mode, &[family.backend(2, 443)]);
                gateway.serve(inside, mode, &[family.backend(3, 1500)]);
                gateway.serve(any_vip, mode, &[family.backend(4, 1)]);
                gateway.serve(of_any, mode, &[family.backend(5, 443)]);
                let row = format!("{mode:?} {family:?} {proto}");
                rows.push((row.clone(), proto, exact, 443, Some((one, 2))));
                rows.push((row.clone(), proto, exact, 999, None));
                rows.push((row.clone(), proto, exact, 1000, Some((range, 1))));
                rows.push((row.clone(), proto, exact, 1499, Some((range, 1))));
                rows.push((row.clone(), proto, exact, 1500, Some((inside, 3))));
                rows.push((row.clone(), proto, exact, 2000, Some((range, 1))));
                rows.push((row.clone(), proto, exact, 2001, None));
                rows.push((row.clone(), proto, any, 0, Some((any_vip, 4))));
                rows.push((row.clone(), proto, any, 443, Some((of_any, 5))));
                rows.push((row.clone(), proto, any, 65535, Some((any_vip, 4))));
            }
        }
        check(&mut gateway, &rows);
        for vip in gateway.planner.vips().keys().copied().collect::<Vec<_>>() {
            gateway.remove(vip);
        }
        rows.clear();
    }
}

type Row<'a> = (String, &'a str, SocketAddr, u16, Option<(Vip, u8)>);

fn check(gateway: &mut Gateway, rows: &[Row<'_>]) {
    for hook in HOOKS {
        gateway.hook = hook;
        for (row, proto, address, port, found) in rows {
            let family = Family::of(*address);
            let client = gateway.client(family);
            let frame = opening(proto, client, SocketAddr::new(address.ip(), *port));
            let row = format!("{row} port {port}");
            let Some((vip, host)) = found else {
                gateway.expect_untouched(&row, &frame, Verdict::NoSuchVip);
                continue;
            };
            let out = gateway.expect(&row, &frame, Verdict::NewFlow);
            let backend = gateway.backend_of(*vip, &out);
            assert_eq!(backend.ip(), family.backend(*host, 0).ip(), "{row}");
            if row.starts_with("Nat") || row.starts_with("Dnat") {
                // Backends of several ports get packets on the one that was dialed.
                let expected = if vip.is_range() {
                    *port
                } else {
                    backend.port()
                };
                assert_eq!(read(&out.frame).to.port(), expected, "{row}");
            }
        }
    }
}

#[test]
fn an_address_that_the_prefilter_takes_for_a_vip_is_not_counted_as_one() {
    let mut gateway = Gateway::new();
    for family in FAMILIES {
        let address = family.vip(10, 80);
        gateway.serve(
            vip("tcp", address),
            Forwarding::Nat,
            &[family.backend(1, 80)],
        );
        let taken_for = prefilter_bit(Addr::from(address.ip()));
        let alike = |number: u32| {
            let [a, b, c, d] = number.to_be_bytes();
            let ip: IpAddr = match family {
                Family::V4 => [203, b, c, d].into(),
                Family::V6 => [
                    0x2001,
                    0xdb9,
                    0,
                    0,
                    0,
                    a.into(),
                    b.into(),
                    u16::from_be_bytes([c, d]),
                ]
                .into(),
            };
            (prefilter_bit(Addr::from(ip)) == taken_for).then_some(ip)
        };
        let other = (0..1 << 24).find_map(alike).expect("a hash of 16 bits");
        let other = SocketAddr::new(other, 80);
        for hook in HOOKS {
            gateway.hook = hook;
            let client = gateway.client(family);
            let datagram = udp(client, other, &[7; 100]);
            let (pieces, echo) = match family {
                Family::V4 => (fragments_v4(&datagram, 9, 24), 8),
                Family::V6 => (fragments_v6(&datagram, 9, 24), 128),
            };
            let mut sctp = datagram.frame();
            sctp[datagram.l3() + if other.is_ipv4() { 9 } else { 6 }] = 132;
            let [first, later] = pieces;
            for frame in [
                tcp(client, other, Segment::Syn, b"").frame(),
                datagram.frame(),
                first,
                later,
                sctp,
                icmp(client.ip(), other.ip(), echo, 0, [0; 4], b""),
            ] {
                gateway.expect_untouched("another address", &frame, Verdict::NotForUs);
            }
        }
    }
}

#[test]
fn other_traffic_passes_bit_for_bit() {
    let mut gateway = Gateway::new();
    for family in FAMILIES {
        for (host, mode) in (10..).zip(MODES) {
            let vip = vip("tcp", family.vip(host, 80));
            gateway.serve(vip, mode, &[family.backend(host, 80)]);
        }
    }
    let mut arp = vec![0xff; 6];
    arp.extend(CLIENT_MAC);
    arp.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.resize(60, 0);
    for hook in HOOKS {
        gateway.hook = hook;
        gateway.expect_untouched("ARP", &arp, Verdict::NotForUs);
        for family in FAMILIES {
            let client = gateway.client(family);
            let elsewhere = family.vip(200, 80);
            for frame in [
                tcp(client, elsewhere, Segment::Syn, b"x").frame(),
                udp(client, elsewhere, b"x").frame(),
                Packet {
                    vlan: 100,
                    ..tcp(client, elsewhere, Segment::Ack, b"x")
                }
                .frame(),
            ] {
                gateway.expect_untouched("elsewhere", &frame, Verdict::NotForUs);
            }
            for host in 10..15 {
                for frame in [
                    tcp(client, family.vip(host, 81), Segment::Syn, b"x").frame(),
                    udp(client, family.vip(host, 80), b"x").frame(),
                ] {
                    gateway.expect_untouched("no such port", &frame, Verdict::NoSuchVip);
                }
                // A protocol that nobody balances.
                let packet = tcp(client, family.vip(host, 80), Segment::Syn, b"x");
                let mut frame = packet.frame();
                frame[packet.l3() + if packet.from.is_ipv4() { 9 } else { 6 }] = 132;
                gateway.expect_untouched("SCTP", &frame, Verdict::NoSuchVip);
            }
        }
    }
}

#[test]
fn a_vip_of_the_proxy_is_handed_up() {
    let mut gateway = Gateway::new();
    for family in FAMILIES {
        let served = vip("tcp", family.vip(10, 443));
        gateway.serve(served, Forwarding::L7, &[family.backend(1, 8080)]);
        // The proxy needs no registration.
        gateway.serve(vip("tcp", family.vip(11, 443)), Forwarding::L7, &[]);
    }
    for hook in HOOKS {
        gateway.hook = hook;
        for family in FAMILIES {
            for host in [10, 11] {
                for segment in [Segment::Syn, Segment::Ack, Segment::Fin, Segment::Rst] {
                    let client = gateway.client(family);
                    let frame = tcp(client, family.vip(host, 443), segment, b"hello").frame();
                    gateway.expect_untouched("L7", &frame, Verdict::HandedUp);
                }
            }
        }
    }
}

#[test]
fn the_longest_prefix_decides_who_is_served() {
    let mut gateway = Gateway::new();
    let nets = |list: &[&str]| -> Vec<_> {
        list.iter()
            .map(|net| net.parse().expect("a prefix"))
            .collect()
    };
    for mode in [Forwarding::Nat, Forwarding::Ipip] {
        let number = if mode == Forwarding::Nat { 10 } else { 20 };
        for family in FAMILIES {
            for (host, allow, deny) in [
                (0, vec![], vec!["198.51.100.0/24", "2001:db8:c::/48"]),
                (1, vec!["198.51.100.0/24", "2001:db8:c::/48"], vec![]),
                (
                    2,
                    vec![
                        "198.51.100.0/24",
                        "2001:db8:c::/48",
                        "198.51.100.66/32",
                        "2001:db8:c::66/128",
                    ],
                    vec!["198.51.100.64/26", "2001:db8:c::40/122"],
                ),
            ] {
                for proto in ["tcp", "udp"] {
                    let vip = vip(proto, family.vip(number + host, 80));
                    gateway.configure(vip, |config| {
                        config.allow = nets(&allow);
                        config.deny = nets(&deny);
                    });
                    gateway.serve(vip, mode, &[family.backend(1, 80)]);
                }
            }
        }
    }
    // Which of the three lists serve the source.
    let sources = [
        ("198.51.100.1", [false, true, true]),
        ("198.51.100.65", [false, true, false]),
        ("198.51.100.66", [false, true, true]),
        ("198.51.101.1", [true, false, false]),
        ("2001:db8:c::1", [false, true, true]),
        ("2001:db8:c::41", [false, true, false]),
        ("2001:db8:c::66", [false, true, true]),
        ("2001:db8:d::1", [true, false, false]),
    ];
    for (hook, port) in [(Hook::Xdp, 5000), (Hook::Tcx, 5001)] {
        gateway.hook = hook;
        for (source, served) in sources {
            let client = SocketAddr::new(source.parse().expect("an address"), port);
            let family = Family::of(client);
            for number in [10, 20] {
                for (host, served) in (number..).zip(served) {
                    for proto in ["tcp", "udp"] {
                        let frame = opening(proto, client, family.vip(host, 80));
                        let row = format!("{hook:?} {source} to VIP {host}, {proto}");
                        if served {
                            gateway.expect(&row, &frame, Verdict::NewFlow);
                        } else {
                            gateway.expect_untouched(&row, &frame, Verdict::SourceDenied);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn new_flows_beyond_a_rate_are_refused_and_old_ones_go_on() {
    let mut gateway = Gateway::new();
    const RATE: u32 = 8;
    for mode in [Forwarding::Nat, Forwarding::Dsr] {
        for family in FAMILIES {
            for hook in HOOKS {
                gateway.hook = hook;
                for by_source in [true, false] {
                    let address = gateway.address(family, 80);
                    let vip = vip("tcp", address);
                    gateway.configure(vip, |config| match by_source {
                        true => config.source_rate = RATE,
                        false => config.vip_rate = RATE,
                    });
                    gateway.serve(vip, mode, &[family.backend(1, 80)]);
                    let row = format!("{mode:?} {family:?} {hook:?}, by source: {by_source}");
                    beyond_the_rate(&mut gateway, &row, address, by_source, RATE);
                }
            }
        }
    }
}

#[test]
fn a_vip_does_not_inherit_the_count_of_one_that_is_gone() {
    let mut gateway = Gateway::new();
    let family = Family::V4;
    for _ in 0..20 {
        let address = gateway.address(family, 80);
        let vip = vip("udp", address);
        gateway.configure(vip, |config| config.vip_rate = 2);
        gateway.serve(vip, Forwarding::Dsr, &[family.backend(1, 80)]);
        for _ in 0..2 {
            let client = gateway.client(family);
            let frame = opening("udp", client, address);
            gateway.expect("within the rate", &frame, Verdict::NewFlow);
        }
        gateway.remove(vip);
    }
}

fn beyond_the_rate(
    gateway: &mut Gateway,
    row: &str,
    address: SocketAddr,
    by_source: bool,
    rate: u32,
) {
    let family = Family::of(address);
    let ip = gateway.client(family).ip();
    let mut served = Vec::new();
    let mut refused = 0;
    let begin = std::time::Instant::now();
    for port in 20_000..20_200 {
        let client = SocketAddr::new(ip, port);
        let frame = opening("tcp", client, address);
        let out = gateway.send(&frame);
        match out.verdict {
            Verdict::NewFlow => served.push(client),
            Verdict::RateLimited => {
                assert_eq!((out.action, &out.frame), (Action::Drop, &frame), "{row}");
                refused += 1;
            }
            other => panic!("{row}: {other:?}"),
        }
    }
    // A tick is half a second to a second, and another may have begun in between.
    let ticks = begin.elapsed().as_secs_f64() * gateway.datapath.ticks_per_second() + 1.0;
    let most = rate * ticks.ceil() as u32;
    assert!(
        served.len() <= most as usize,
        "{row}: {} served",
        served.len()
    );
    assert!(served.len() + refused == 200 && !served.is_empty(), "{row}");
    for client in &served {
        let ack = tcp(*client, address, Segment::Ack, b"").frame();
        gateway.expect(row, &ack, Verdict::Forwarded);
    }
    if by_source {
        let other = gateway.client(family);
        gateway.expect(row, &opening("tcp", other, address), Verdict::NewFlow);
    }
}

#[test]
fn clients_prove_that_they_exist_while_new_flows_are_too_many() {
    let mut gateway = Gateway::new();
    for mode in [Forwarding::Nat, Forwarding::Dsr] {
        for family in FAMILIES {
            for hook in HOOKS {
                gateway.hook = hook;
                let address = gateway.address(family, 80);
                let vip = vip("tcp", address);
                gateway.configure(vip, |config| {
                    config.vip_rate = 1;
                    config.challenge = true;
                });
                gateway.serve(vip, mode, &[family.backend(1, 80)]);
                let row = format!("{mode:?} {family:?} {hook:?}");
                prove(&mut gateway, &row, address);
            }
        }
    }
}

fn prove(gateway: &mut Gateway, row: &str, address: SocketAddr) {
    let family = Family::of(address);
    // Another tick may begin at any time, which admits one more.
    let (client, challenge) = loop {
        let client = gateway.client(family);
        let out = gateway.send(&opening("tcp", client, address));
        if out.verdict == Verdict::Challenged {
            break (client, out);
        }
        assert_eq!(out.verdict, Verdict::NewFlow, "{row}");
    };
    assert_eq!(challenge.action, gateway.hook.back(), "{row}");
    let asked = read(&challenge.frame);
    assert_eq!((asked.from, asked.to), (address, client), "{row}");
    assert_eq!(asked.transport, Transport::Tcp(Segment::Ack), "{row}");
    // RFC 9293 §3.10.7.3: whoever sent the SYN resets an acknowledgment of something else.
    let number = etherparse::SlicedPacket::from_ethernet(&challenge.frame).expect("a sound frame");
    let Some(etherparse::TransportSlice::Tcp(segment)) = number.transport else {
        panic!("{row}: no TCP")
    };
    let number = segment.acknowledgment_number();
    let rst = |sequence: u32| {
        let packet = tcp(client, address, Segment::Rst, b"");
        let mut frame = packet.frame();
        let at = packet.l4() + 4;
        frame[at..at + 4].copy_from_slice(&sequence.to_be_bytes());
        frame
    };
    let forged = gateway.send(&rst(number.wrapping_add(1)));
    assert_ne!(forged.verdict, Verdict::Proven, "{row}");
    let out = gateway.expect(row, &rst(number), Verdict::Proven);
    assert_eq!(out.action, Action::Drop, "{row}");
    for _ in 0..3 {
        let out = gateway.send(&opening("tcp", client, address));
        let served = [Verdict::NewFlow, Verdict::Forwarded];
        assert!(served.contains(&out.verdict), "{row}: {out:02x?}");
    }
}
