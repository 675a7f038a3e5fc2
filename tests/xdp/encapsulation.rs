//! What `dsr`, `ipip` and `gue` put around a packet, byte for byte.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use etherparse::IpNumber;
use router_common::{BackendCounters, Verdict};
use viaduct::config::Forwarding;
use viaduct::l4::next_hop::NextHop;

use crate::fixture::*;
use crate::packets::*;

/// Mode, family of the VIP, family of the backend.
const TUNNELS: [(Forwarding, Family, Family); 10] = [
    (Forwarding::Dsr, Family::V4, Family::V4),
    (Forwarding::Dsr, Family::V6, Family::V6),
    (Forwarding::Ipip, Family::V4, Family::V4),
    (Forwarding::Ipip, Family::V4, Family::V6),
    (Forwarding::Ipip, Family::V6, Family::V6),
    (Forwarding::Ipip, Family::V6, Family::V4),
    (Forwarding::Gue, Family::V4, Family::V4),
    (Forwarding::Gue, Family::V4, Family::V6),
    (Forwarding::Gue, Family::V6, Family::V6),
    (Forwarding::Gue, Family::V6, Family::V4),
];

/// VLANs of the clients' and the backends' side.
const VLANS: [(u16, u16); 4] = [(0, 0), (100, 0), (0, 200), (100, 200)];

#[test]
fn packets_travel_inside_exact_headers() {
    let mut gateway = Gateway::new();
    for (host, (mode, inside, outside)) in (10..).zip(TUNNELS) {
        let address = inside.vip(host, 80);
        let backend = outside.backend(host, 80);
        for proto in ["tcp", "udp"] {
            let row = format!("{mode:?} {inside:?} in {outside:?} {proto}");
            let vip = vip(proto, address);
            for (client_vlan, backend_vlan) in VLANS {
                let hop = NextHop {
                    vlan: backend_vlan,
                    ..next_hop(outside)
                };
                gateway.next_hops.insert(backend.ip(), hop);
                gateway.serve(vip, mode, &[backend]);
                for hook in HOOKS {
                    // A classifier finds no tag in the frame.
                    if hook == Hook::Tcx && client_vlan != 0 {
                        continue;
                    }
                    gateway.hook = hook;
                    let id = gateway.id_of(vip, backend);
                    let row = format!("{row}, {hook:?}, {client_vlan} to {backend_vlan}");
                    let way = Way {
                        mode,
                        backend,
                        id,
                        client_vlan,
                        backend_vlan: if hook == Hook::Xdp { backend_vlan } else { 0 },
                    };
                    carry(&mut gateway, &row, proto, address, &way);
                }
            }
        }
    }
}

/// How a packet travels.
struct Way {
    mode: Forwarding,
    backend: SocketAddr,
    id: u32,
    client_vlan: u16,
    backend_vlan: u16,
}

/// A flow's first packets, with several classes of service.
fn carry(gateway: &mut Gateway, row: &str, proto: &str, address: SocketAddr, way: &Way) {
    let client = gateway.client(Family::of(address));
    let mut spread = None;
    for (class, verdict) in [
        (0, Verdict::NewFlow),
        (0xb9, Verdict::Forwarded),
        (3, Verdict::Forwarded),
    ] {
        let new = verdict == Verdict::NewFlow;
        let packet = match proto {
            "tcp" if new => tcp(client, address, Segment::Syn, b""),
            "tcp" => tcp(client, address, Segment::Ack, b"seventeen octets."),
            _ => udp(client, address, b"ping"),
        };
        let packet = Packet {
            vlan: way.client_vlan,
            class,
            ..packet
        };
        let frame = packet.frame();
        let out = gateway.expect(row, &frame, verdict);
        assert_eq!(out.action, Action::Redirect, "{row}");
        let (expected, of_flow) = carried(&packet, way, &out.frame);
        assert_eq!(out.frame, expected, "{row}, class {class:#x}");
        assert_eq!(*spread.get_or_insert(of_flow), of_flow, "{row}: one flow");
        let counted = BackendCounters {
            packets: 1,
            bytes: frame.len() as u64,
            new_flows: u64::from(new),
            ..BackendCounters::default()
        };
        assert_eq!(out.moved, BTreeMap::from([(way.id, counted)]), "{row}");
    }
}

/// The frame that must come out, and what in it is the gateway's choice: flow label and UDP port.
fn carried(packet: &Packet, way: &Way, out: &[u8]) -> (Vec<u8>, (u32, u16)) {
    let inner = Packet {
        hops: packet.hops - 1,
        ..packet.clone()
    };
    let (v6_inside, v6_outside) = (packet.from.is_ipv6(), way.backend.is_ipv6());
    let link = |v6| ethernet(GATEWAY_INNER_MAC, BACKEND_MAC, way.backend_vlan, v6);
    let mut inside = inner.bytes();
    if way.mode == Forwarding::Dsr {
        return ([link(v6_inside), inside].concat(), (0, 0));
    }
    let l3 = if way.backend_vlan == 0 { 14 } else { 18 };
    let flow_label = match v6_outside {
        true => u32::from_be_bytes([0, out[l3 + 1] & 0xf, out[l3 + 2], out[l3 + 3]]),
        false => 0,
    };
    let mut port = 0;
    let mut proto = match v6_inside {
        true => IpNumber::IPV6,
        false => IpNumber::IPV4,
    };
    if way.mode == Forwarding::Gue {
        let udp = l3 + if v6_outside { 40 } else { 20 };
        port = u16::from_be_bytes([out[udp], out[udp + 1]]);
        assert!(port >= 49152, "source port {port}");
        let mut header = Vec::new();
        // RFC 768; no checksum (RFC 6935 §5).
        for word in [port, GUE_PORT, 8 + inside.len() as u16, 0] {
            header.extend(word.to_be_bytes());
        }
        inside = [header, inside].concat();
        proto = IpNumber::UDP;
    }
    let outer = Outer {
        from: next_hop(Family::of(way.backend)).source,
        to: way.backend.ip(),
        class: packet.class,
        proto,
        flow_label,
    };
    let expected = [link(v6_outside), outer.bytes(inside.len()), inside].concat();
    (expected, (flow_label, port))
}

#[test]
fn flows_spread_over_the_ports_and_labels_of_a_tunnel() {
    let mut gateway = Gateway::new();
    let address = Family::V4.vip(10, 80);
    let backend = Family::V6.backend(1, 80);
    gateway.serve(vip("tcp", address), Forwarding::Gue, &[backend]);
    let mut seen = std::collections::BTreeSet::new();
    for number in 0..200 {
        let syn = tcp(Family::V4.client(number), address, Segment::Syn, b"");
        let out = gateway.expect("SYN", &syn.frame(), Verdict::NewFlow);
        seen.insert((out.frame[54..56].to_vec(), out.frame[15..18].to_vec()));
    }
    // 200 out of 16,384 ports alone: 1.2 meet on average.
    assert!(seen.len() > 190, "{}", seen.len());
}
