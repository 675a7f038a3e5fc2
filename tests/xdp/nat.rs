//! What `nat` mode does to a packet, byte for byte.

use std::net::SocketAddrV4;

use router_common::Verdict;

use crate::fixture::*;

#[test]
fn a_syn_to_the_vip_leaves_for_a_backend() {
    let mut gateway = Gateway::serving(&[1]);
    let out = gateway.send(&tcp(CLIENT, VIP, Segment::Syn, b""));
    assert_eq!((out.action, out.verdict), (REDIRECT, Verdict::NewFlow));
    let seen = read(&out.frame);
    assert_eq!(seen.source_mac, GATEWAY_INNER_MAC);
    assert_eq!(seen.destination_mac, BACKEND_MAC);
    assert_eq!(*seen.from.ip(), GATEWAY);
    assert!((1024..=32767).contains(&seen.from.port()));
    assert_eq!(seen.to, backend(1));
    assert_eq!(seen.ttl, 63);
}

#[test]
fn only_addresses_ports_ttl_and_checksums_change() {
    let mut gateway = Gateway::serving(&[1]);
    let payload: Vec<u8> = (0..=255).collect();
    let frame = udp(CLIENT, VIP, &payload);
    let out = gateway.send(&frame).frame;
    assert_eq!(out.len(), frame.len());
    // Ethernet addresses 0..12; TTL 22, header checksum 24..26, addresses 26..34; ports 34..38; UDP checksum 40..42.
    let rewritten =
        |at: usize| at < 12 || at == 22 || (24..38).contains(&at) || (40..42).contains(&at);
    for at in (0..frame.len()).filter(|at| !rewritten(*at)) {
        assert_eq!(out[at], frame[at], "octet {at}");
    }
}

#[test]
fn the_answer_goes_back_as_the_vip() {
    for (proto, verdict) in [("tcp", Verdict::NewFlow), ("udp", Verdict::NewFlow)] {
        let mut gateway = Gateway::serving(&[1, 2, 3]);
        let request = match proto {
            "tcp" => tcp(CLIENT, VIP, Segment::Syn, b""),
            _ => udp(CLIENT, VIP, b"ping"),
        };
        let out = gateway.send(&request);
        assert_eq!(out.verdict, verdict);
        let sent = read(&out.frame);
        let answer = match proto {
            "tcp" => tcp_reply(sent.to, sent.from, Segment::Ack, b"hello"),
            _ => udp_reply(sent.to, sent.from, b"hello"),
        };
        let out = gateway.send(&answer);
        assert_eq!((out.action, out.verdict), (TX, Verdict::Replied), "{proto}");
        let seen = read(&out.frame);
        assert_eq!(
            seen,
            Seen {
                source_mac: GATEWAY_MAC,
                destination_mac: CLIENT_MAC,
                from: VIP,
                to: CLIENT,
                ttl: 63,
                payload: b"hello".to_vec(),
            }
        );
    }
}

#[test]
fn a_backend_behind_the_same_interface_is_reached_by_tx() {
    let mut gateway = Gateway::new(&options(), INGRESS);
    gateway.set_pool("tcp", &[1]);
    assert_eq!(
        gateway.send(&tcp(CLIENT, VIP, Segment::Syn, b"")).action,
        TX
    );
}

#[test]
fn a_datagram_without_checksum_stays_without() {
    let mut gateway = Gateway::serving(&[1]);
    let mut frame = udp(CLIENT, VIP, b"ping");
    frame[40..42].copy_from_slice(&[0, 0]);
    let out = gateway.send(&frame);
    assert_eq!(out.verdict, Verdict::NewFlow);
    assert_eq!(out.frame[40..42], [0, 0]);
}

#[test]
fn a_broken_checksum_stays_broken() {
    let mut gateway = Gateway::serving(&[1]);
    let mut frame = udp(CLIENT, VIP, b"ping");
    frame[41] ^= 0x55;
    let out = gateway.send(&frame).frame;
    let found = u16::from_be_bytes([out[40], out[41]]);
    let packet = etherparse::SlicedPacket::from_ethernet(&out).unwrap();
    let Some(etherparse::TransportSlice::Udp(udp)) = packet.transport else {
        panic!("not UDP")
    };
    let right = udp
        .to_header()
        .calc_checksum_ipv4_raw(GATEWAY.octets(), backend(1).ip().octets(), udp.payload())
        .unwrap();
    assert_ne!(found, right);
}

#[test]
fn ip_options_are_carried_along() {
    let mut gateway = Gateway::serving(&[1]);
    let mut frame = tcp(CLIENT, VIP, Segment::Syn, b"");
    // One word of no-operation options (RFC 791 §3.1) behind the fixed header.
    frame.splice(34..34, [1, 1, 1, 1]);
    frame[14] = 0x46;
    let total = u16::from_be_bytes([frame[16], frame[17]]) + 4;
    frame[16..18].copy_from_slice(&total.to_be_bytes());
    let sum = etherparse::Ipv4Header::from_slice(&frame[14..])
        .unwrap()
        .0
        .calc_header_checksum();
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    let out = gateway.send(&frame);
    assert_eq!(out.verdict, Verdict::NewFlow);
    assert_eq!(read(&out.frame).to, backend(1));
    assert_eq!(out.frame[34..38], [1, 1, 1, 1]);
}

#[test]
fn answers_follow_the_clients_router() {
    let mut gateway = Gateway::serving(&[1]);
    let sent = read(&gateway.send(&tcp(CLIENT, VIP, Segment::Syn, b"")).frame);
    let other_router = [2, 0, 0, 0, 0, 9];
    gateway.send(&tcp_frame(
        other_router,
        GATEWAY_MAC,
        CLIENT,
        VIP,
        Segment::Ack,
        b"",
        64,
    ));
    let answer = gateway.send(&tcp_reply(sent.to, sent.from, Segment::Ack, b""));
    assert_eq!(read(&answer.frame).destination_mac, other_router);
}

#[test]
fn counters_say_what_each_backend_moved() {
    let mut gateway = Gateway::serving(&[1]);
    let request = tcp(CLIENT, VIP, Segment::Syn, b"");
    let sent = read(&gateway.send(&request).frame);
    gateway.send(&tcp(CLIENT, VIP, Segment::Ack, b"abc"));
    gateway.send(&tcp_reply(sent.to, sent.from, Segment::Ack, b"defgh"));
    let moved = gateway.datapath.counters().backend(1).unwrap();
    assert_eq!(
        (moved.packets, moved.reply_packets, moved.new_flows),
        (2, 1, 1)
    );
    assert_eq!(moved.bytes, 2 * request.len() as u64 + 3);
    assert_eq!(moved.reply_bytes, request.len() as u64 + 5);
}

#[test]
fn two_vips_at_one_address_are_told_apart_by_port_and_protocol() {
    let mut gateway = Gateway::serving(&[1]);
    let other = SocketAddrV4::new(*VIP.ip(), 81);
    gateway.set_vip(format!("tcp/{other}").parse().unwrap(), &[2]);
    assert_eq!(
        read(&gateway.send(&tcp(CLIENT, VIP, Segment::Syn, b"")).frame).to,
        backend(1)
    );
    assert_eq!(
        read(&gateway.send(&tcp(CLIENT, other, Segment::Syn, b"")).frame).to,
        backend(2)
    );
    let out = gateway.send(&udp(CLIENT, other, b""));
    assert_eq!((out.action, out.verdict), (PASS, Verdict::NoSuchVip));
}
