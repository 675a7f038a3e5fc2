//! `explain` says what would become of a packet, and changes nothing.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use router_common::{FlowEntry, FlowSlot, Mode, PacketEvent, Verdict};
use viaduct::config::{Forwarding, Scheduler};
use viaduct::route::Vip;

use crate::fixture::*;
use crate::packets::*;

const MODES: [(Forwarding, Mode); 5] = [
    (Forwarding::Nat, Mode::Nat),
    (Forwarding::Dnat, Mode::Dnat),
    (Forwarding::Dsr, Mode::Dsr),
    (Forwarding::Ipip, Mode::Ipip),
    (Forwarding::Gue, Mode::Gue),
];

/// All that packets change, as far as it can be read.
#[derive(Debug, PartialEq)]
struct State {
    counted: Counted,
    flows: Vec<(FlowSlot, FlowEntry)>,
    load: BTreeMap<u32, router_common::BackendLoad>,
}

fn state(gateway: &Gateway) -> State {
    let flows = gateway.datapath.flows();
    let ids = gateway.planner.vips().values();
    let ids = ids.flat_map(|vip| vip.members.values().map(|member| member.id));
    let load = |id| gateway.datapath.load_of(id).expect("BACKEND_LOAD");
    State {
        counted: gateway.counters(),
        flows: flows
            .iter()
            .map(|flow| flow.expect("read the flow table"))
            .map(|flow| (flow.slot, flow.entry))
            .collect(),
        load: ids.map(|id| (id, load(id))).collect(),
    }
}

/// Explains a frame several times; the last explanation.
#[track_caller]
fn explain(gateway: &mut Gateway, row: &str, frame: &[u8]) -> PacketEvent {
    let before = state(gateway);
    let mut last = None;
    for _ in 0..3 {
        let (_, event) = gateway.datapath.explain(frame).expect("explain");
        assert_eq!(
            *last.get_or_insert(event),
            event,
            "{row}: the same each time"
        );
    }
    assert_eq!(state(gateway), before, "{row}: nothing changes");
    last.expect("explained")
}

/// What is explained must then happen.
#[track_caller]
fn explain_and_send(gateway: &mut Gateway, row: &str, frame: &[u8]) -> (PacketEvent, Outcome) {
    let event = explain(gateway, row, frame);
    let out = gateway.send(frame);
    assert_eq!(event.verdict, out.verdict as u32, "{row}: {out:02x?}");
    assert_eq!(event.len, frame.len() as u32, "{row}");
    assert_eq!((event.ifindex, event.monotonic_ns), (INGRESS, 0), "{row}");
    (event, out)
}

fn index(gateway: &Gateway, vip: Vip) -> u32 {
    gateway.planner.vips()[&vip].index()
}

#[test]
fn an_explanation_names_what_then_happens_and_changes_nothing() {
    let mut options = options();
    options.limits.flows = 1024;
    let mut gateway = Gateway::with(&options);
    for (forwarding, mode) in MODES {
        for scheduler in [
            Scheduler::Maglev,
            Scheduler::SourceHash,
            Scheduler::RoundRobin,
            Scheduler::LeastConnections,
        ] {
            for family in FAMILIES {
                for proto in ["tcp", "udp"] {
                    let address = gateway.address(family, 80);
                    let vip = vip(proto, address);
                    gateway.configure(vip, |config| config.scheduler = Some(scheduler));
                    let backends: Vec<_> = (1..4).map(|host| family.backend(host, 80)).collect();
                    gateway.serve(vip, forwarding, &backends);
                    let row = format!("{mode:?} {scheduler:?} {family:?} {proto}");
                    new_and_known(&mut gateway, &row, vip, address, mode);
                    gateway.remove(vip);
                }
            }
        }
    }
}

fn new_and_known(gateway: &mut Gateway, row: &str, vip: Vip, address: SocketAddr, mode: Mode) {
    let client = gateway.client(Family::of(address));
    let tcp_vip = vip.proto == viaduct::route::Proto::Tcp;
    let first = match tcp_vip {
        true => tcp(client, address, Segment::Syn, b""),
        false => udp(client, address, b"x"),
    };
    let second = match tcp_vip {
        true => tcp(client, address, Segment::Ack, b""),
        false => udp(client, address, b"more"),
    };
    for (packet, verdict) in [(&first, Verdict::NewFlow), (&second, Verdict::Forwarded)] {
        let (event, out) = explain_and_send(gateway, row, &packet.frame());
        assert_eq!(out.verdict, verdict, "{row}");
        let backend = gateway.backend_of(vip, &out);
        assert_eq!(event.backend, gateway.id_of(vip, backend), "{row}");
        assert_eq!(event.vip, index(gateway, vip) + 1, "{row}");
        assert_eq!(event.mode, mode as u8, "{row}");
        let from = SocketAddr::new(event.source.ip(), event.source_port);
        let to = SocketAddr::new(event.destination.ip(), event.destination_port);
        assert_eq!((from, to), (client, address), "{row}");
        assert_eq!(event.proto, if tcp_vip { 6 } else { 17 }, "{row}");
        assert!(event.asked_ring + event.asked_table >= 1, "{row}");
        if mode.translates() && verdict == Verdict::Forwarded {
            assert_eq!(event.asked_table, 1, "{row}");
            assert_ne!(event.flow_state, 0, "{row}");
        }
        if mode.translates() {
            let answer = read(&out.frame).answer(b"").frame();
            let (event, _) = explain_and_send(gateway, row, &answer);
            assert_eq!(event.verdict, Verdict::Replied as u32, "{row}");
            assert_eq!(event.backend, gateway.id_of(vip, backend), "{row}");
        }
    }
}

#[test]
fn what_is_refused_is_explained_too() {
    let mut gateway = Gateway::new();
    for family in FAMILIES {
        let served = vip("tcp", family.vip(10, 80));
        gateway.serve(served, Forwarding::Nat, &[family.backend(1, 80)]);
        let empty = vip("tcp", family.vip(11, 80));
        gateway.serve(empty, Forwarding::Nat, &[family.backend(1, 80)]);
        gateway.set_pool(empty, &[]);
        let proxied = vip("tcp", family.vip(12, 80));
        gateway.serve(proxied, Forwarding::L7, &[]);
        let limited = vip("tcp", family.vip(13, 80));
        gateway.configure(limited, |config| config.vip_rate = 1);
        gateway.serve(limited, Forwarding::Dsr, &[family.backend(1, 80)]);
        let denied = vip("tcp", family.vip(14, 80));
        gateway.configure(denied, |config| {
            config.deny = vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()];
        });
        gateway.serve(denied, Forwarding::Dsr, &[family.backend(1, 80)]);
        for (segment, host, verdict, vip) in [
            (Segment::Ack, 10, Verdict::UnknownFlow, Some(served)),
            (Segment::Syn, 11, Verdict::Rejected, Some(empty)),
            (Segment::Syn, 12, Verdict::HandedUp, Some(proxied)),
            (Segment::Syn, 13, Verdict::NewFlow, Some(limited)),
            (Segment::Syn, 14, Verdict::SourceDenied, Some(denied)),
            (Segment::Syn, 99, Verdict::NotForUs, None),
        ] {
            let row = format!("{family:?} VIP {host}");
            let client = gateway.client(family);
            let frame = tcp(client, family.vip(host, 80), segment, b"").frame();
            let (event, _) = explain_and_send(&mut gateway, &row, &frame);
            assert_eq!(event.verdict, verdict as u32, "{row}");
            let vip = vip.map_or(0, |vip| index(&gateway, vip) + 1);
            assert_eq!(event.vip, vip, "{row}");
            if vip == 0 {
                assert_eq!((event.backend, event.asked_ring), (0, 0), "{row}");
            } else {
                assert_eq!(event.source.ip(), client.ip(), "{row}");
            }
        }
    }
}

#[test]
fn sampled_packets_that_find_no_room_are_counted() {
    let mut gateway = Gateway::new();
    let vip = vip("udp", Family::V4.vip(10, 80));
    gateway.serve(vip, Forwarding::Dsr, &[Family::V4.backend(1, 80)]);
    let events = gateway.datapath.take_events().unwrap();
    gateway.datapath.set_sample(1).unwrap();
    let frame = udp(gateway.client(Family::V4), Family::V4.vip(10, 80), b"x").frame();
    for hook in HOOKS {
        gateway.hook = hook;
        for _ in 0..2000 {
            gateway.send(&frame);
        }
    }
    let lost = gateway.datapath.counters().events_lost().unwrap();
    assert!(lost > 0);
    assert_eq!(events.count() as u64 + lost, 4000);
}
