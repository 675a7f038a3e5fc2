//! Which backend a flow goes to, and for how long.

use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use router_common::{SweepResult, Verdict};
use viaduct::config::{FlowTimeouts, PortRange};
use viaduct::l4::datapath::Options;

use crate::fixture::*;

fn client(number: u16) -> SocketAddrV4 {
    let [a, b] = (number / 1000).to_be_bytes();
    SocketAddrV4::new(Ipv4Addr::new(198, 51, a, b), 10_000 + number % 1000)
}

/// Opens a connection and returns the backend it went to and the gateway's port.
fn open(gateway: &mut Gateway, from: SocketAddrV4) -> (SocketAddrV4, SocketAddrV4) {
    let out = gateway.send(&tcp(from, VIP, Segment::Syn, b""));
    assert_eq!(out.verdict, Verdict::NewFlow, "{from}");
    let seen = read(&out.frame);
    (seen.to, seen.from)
}

#[test]
fn new_flows_reach_every_backend() {
    let mut gateway = Gateway::serving(&[1, 2, 3]);
    let mut counts: BTreeMap<SocketAddrV4, u32> = BTreeMap::new();
    for number in 0..300 {
        *counts
            .entry(open(&mut gateway, client(number)).0)
            .or_default() += 1;
    }
    assert_eq!(counts.len(), 3);
    // 100 each on average; 50 is more than six standard deviations away.
    assert!(counts.values().all(|count| *count > 50), "{counts:?}");
}

#[test]
fn every_flow_gets_its_own_answers() {
    let mut gateway = Gateway::serving(&[1, 2]);
    let mut flows = Vec::new();
    for number in 0..2000 {
        let client = client(number);
        let (to, from) = open(&mut gateway, client);
        flows.push((client, to, from));
    }
    let ports: HashMap<_, _> = flows
        .iter()
        .map(|(client, to, from)| ((*to, *from), *client))
        .collect();
    assert_eq!(
        ports.len(),
        flows.len(),
        "two flows share a port towards the same backend"
    );
    for (client, to, from) in flows {
        let out = gateway.send(&tcp_reply(to, from, Segment::Ack, b"x"));
        assert_eq!(out.verdict, Verdict::Replied);
        let seen = read(&out.frame);
        assert_eq!((seen.from, seen.to), (VIP, client));
    }
}

#[test]
fn a_removed_backend_keeps_its_flows() {
    let mut gateway = Gateway::serving(&[1, 2, 3]);
    let flows: Vec<_> = (0..100)
        .map(|number| (client(number), open(&mut gateway, client(number))))
        .collect();
    gateway.set_pool("tcp", &[2, 3]);
    for (client, (to, from)) in &flows {
        let out = gateway.send(&tcp(*client, VIP, Segment::Ack, b"more"));
        assert_eq!(out.verdict, Verdict::Forwarded);
        let seen = read(&out.frame);
        assert_eq!((seen.to, seen.from), (*to, *from));
        assert_eq!(
            gateway
                .send(&tcp_reply(*to, *from, Segment::Ack, b""))
                .verdict,
            Verdict::Replied
        );
    }
    for number in 100..200 {
        assert_ne!(
            open(&mut gateway, client(number)).0,
            backend(1),
            "a new flow to a draining backend"
        );
    }
}

#[test]
fn a_new_backend_moves_no_flow() {
    let mut gateway = Gateway::serving(&[1, 2]);
    let flows: Vec<_> = (0..100)
        .map(|number| (client(number), open(&mut gateway, client(number))))
        .collect();
    gateway.set_pool("tcp", &[1, 2, 3, 4]);
    for (client, (to, _)) in flows {
        assert_eq!(
            read(&gateway.send(&tcp(client, VIP, Segment::Ack, b"")).frame).to,
            to
        );
    }
}

#[test]
fn a_drained_backend_gets_nothing_and_its_id_serves_another() {
    let mut gateway = Gateway::serving(&[1]);
    let (to, from) = open(&mut gateway, CLIENT);
    assert_eq!(to, backend(1));
    gateway.set_pool("tcp", &[2]);
    gateway.now += DRAIN;
    gateway.set_pool("tcp", &[2]);
    // Backend 3 takes the id that backend 1 had.
    gateway.set_pool("tcp", &[2, 3]);
    assert_eq!(
        gateway.send(&tcp(CLIENT, VIP, Segment::Ack, b"")).verdict,
        Verdict::UnknownFlow
    );
    assert_eq!(
        gateway
            .send(&tcp_reply(to, from, Segment::Ack, b""))
            .verdict,
        Verdict::NotAReply
    );
    let next = open(&mut gateway, CLIENT).0;
    assert!(next == backend(2) || next == backend(3));
}

#[test]
fn a_vip_whose_backends_all_left_keeps_old_flows_and_takes_no_new_ones() {
    let mut gateway = Gateway::serving(&[1]);
    open(&mut gateway, client(0));
    gateway.set_pool("tcp", &[]);
    assert_eq!(
        gateway
            .send(&tcp(client(0), VIP, Segment::Ack, b""))
            .verdict,
        Verdict::Forwarded
    );
    let out = gateway.send(&tcp(client(1), VIP, Segment::Syn, b""));
    assert_eq!((out.action, out.verdict), (DROP, Verdict::NoBackend));
    gateway.now += DRAIN;
    gateway.set_pool("tcp", &[]);
    let out = gateway.send(&tcp(client(1), VIP, Segment::Syn, b""));
    assert_eq!((out.action, out.verdict), (PASS, Verdict::NoSuchVip));
    gateway.set_pool("udp", &[]);
    gateway.now += DRAIN;
    gateway.set_pool("udp", &[]);
    assert_eq!(
        gateway.send(&udp(client(1), VIP, b"")).verdict,
        Verdict::NotForUs
    );
}

#[test]
fn tcp_in_the_middle_of_nothing_opens_no_flow() {
    let mut gateway = Gateway::serving(&[1]);
    for segment in [Segment::Ack, Segment::Fin, Segment::Rst] {
        let out = gateway.send(&tcp(CLIENT, VIP, segment, b""));
        assert_eq!(
            (out.action, out.verdict),
            (DROP, Verdict::UnknownFlow),
            "{segment:?}"
        );
    }
}

#[test]
fn a_closed_connection_makes_room_for_the_next_on_the_same_port() {
    let mut gateway = Gateway::serving(&[1, 2, 3]);
    let (to, from) = open(&mut gateway, CLIENT);
    gateway.send(&tcp(CLIENT, VIP, Segment::Ack, b""));
    gateway.send(&tcp(CLIENT, VIP, Segment::Fin, b""));
    gateway.send(&tcp_reply(to, from, Segment::Fin, b""));
    // The last ACK still belongs to the old connection; the SYN begins another.
    assert_eq!(
        gateway.send(&tcp(CLIENT, VIP, Segment::Ack, b"")).verdict,
        Verdict::Forwarded
    );
    let (to, from) = open(&mut gateway, CLIENT);
    assert_eq!(
        gateway
            .send(&tcp_reply(to, from, Segment::Ack, b""))
            .verdict,
        Verdict::Replied
    );
}

#[test]
fn a_syn_sent_again_stays_with_its_flow() {
    let mut gateway = Gateway::serving(&[1, 2, 3]);
    let first = open(&mut gateway, CLIENT);
    let out = gateway.send(&tcp(CLIENT, VIP, Segment::Syn, b""));
    assert_eq!(out.verdict, Verdict::Forwarded);
    let seen = read(&out.frame);
    assert_eq!((seen.to, seen.from), first);
}

#[test]
fn the_gateways_own_traffic_with_a_backend_is_passed() {
    let mut gateway = Gateway::serving(&[1]);
    let answer = tcp_reply(
        backend(1),
        SocketAddrV4::new(GATEWAY, 45_000),
        Segment::Ack,
        b"",
    );
    let out = gateway.send(&answer);
    assert_eq!((out.action, out.verdict), (PASS, Verdict::NotAReply));
    assert_eq!(out.frame, answer);
}

#[test]
fn ports_run_out_with_a_verdict_of_their_own() {
    let options = Options {
        nat_ports: PortRange {
            first: 2000,
            last: 2003,
        },
        ..options()
    };
    let mut gateway = Gateway::new(&options, EGRESS);
    gateway.set_pool("udp", &[1]);
    let mut verdicts: BTreeMap<&str, u32> = BTreeMap::new();
    let mut ports = Vec::new();
    for number in 0..200 {
        let out = gateway.send(&udp(client(number), VIP, b""));
        *verdicts.entry(out.verdict.name()).or_default() += 1;
        if out.verdict == Verdict::NewFlow {
            ports.push(read(&out.frame).from.port());
        }
    }
    ports.sort_unstable();
    assert_eq!(ports, [2000, 2001, 2002, 2003]);
    assert_eq!(verdicts[Verdict::PortsExhausted.name()], 196);
}

#[test]
fn a_full_table_refuses_new_flows_and_keeps_the_old() {
    let mut options = options();
    options.limits.flows = 1024;
    let mut gateway = Gateway::new(&options, EGRESS);
    gateway.set_pool("udp", &[1, 2]);
    let mut kept = Vec::new();
    let mut refused = 0;
    for number in 0..2000 {
        let out = gateway.send(&udp(client(number), VIP, b""));
        match out.verdict {
            Verdict::NewFlow => {
                let sent = read(&out.frame);
                gateway.send(&udp_reply(sent.to, sent.from, b""));
                kept.push(client(number));
            }
            Verdict::FlowTableFull => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(
        kept.len() <= 1024 && kept.len() > 900,
        "{} of 1024 places used",
        kept.len()
    );
    assert_eq!(kept.len() + refused, 2000);
    for client in kept {
        assert_eq!(
            gateway.send(&udp(client, VIP, b"")).verdict,
            Verdict::Forwarded
        );
    }
}

#[test]
fn half_open_flows_make_room_for_others() {
    let mut options = options();
    options.limits.flows = 1024;
    let mut gateway = Gateway::new(&options, EGRESS);
    gateway.set_pool("tcp", &[1, 2]);
    let established = client(0);
    open(&mut gateway, established);
    gateway.send(&tcp(established, VIP, Segment::Ack, b""));
    for number in 1..4000 {
        open(&mut gateway, client(number));
    }
    assert_eq!(
        gateway
            .send(&tcp(established, VIP, Segment::Ack, b""))
            .verdict,
        Verdict::Forwarded
    );
}

#[test]
fn the_sweep_counts_live_flows_and_frees_expired_ones() {
    let timeouts = FlowTimeouts {
        udp: Duration::from_millis(1),
        ..FlowTimeouts::default()
    };
    let mut gateway = Gateway::new(
        &Options {
            timeouts,
            ..options()
        },
        EGRESS,
    );
    gateway.set_pool("tcp", &[1]);
    gateway.set_pool("udp", &[2]);
    for number in 0..50 {
        open(&mut gateway, client(number));
        gateway.send(&udp(client(number), VIP, b""));
    }
    sweep_until_left(&mut gateway, 50);
    assert_eq!(gateway.datapath.flows_of(1).unwrap(), 50);
    assert_eq!(gateway.datapath.flows_of(2).unwrap(), 0);
}

#[test]
fn the_sweep_frees_the_return_slots_too() {
    let timeouts = FlowTimeouts {
        udp: Duration::from_millis(1),
        ..FlowTimeouts::default()
    };
    let mut options = options();
    options.timeouts = timeouts;
    options.limits.flows = 1024;
    let mut gateway = Gateway::new(&options, EGRESS);
    gateway.set_pool("udp", &[1]);
    // There are twice as many return slots as flows: the third time around they would be used up.
    for round in 0..4 {
        for number in 0..800 {
            let from = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, round), 10_000 + number);
            let verdict = gateway.send(&udp(from, VIP, b"")).verdict;
            assert_eq!(verdict, Verdict::NewFlow, "flow {number} of round {round}");
        }
        sweep_until_left(&mut gateway, 0);
    }
}

#[test]
fn flows_of_a_backend_that_is_gone_hold_no_place() {
    let mut gateway = Gateway::serving(&[1]);
    open(&mut gateway, CLIENT);
    gateway.set_pool("tcp", &[2]);
    assert_eq!(sweep(&mut gateway).live, 1);
    gateway.now += DRAIN;
    gateway.set_pool("tcp", &[2]);
    let swept = sweep(&mut gateway);
    assert_eq!((swept.live, swept.freed), (0, 1));
}

#[test]
fn forged_datagrams_make_room_for_others() {
    let mut options = options();
    options.limits.flows = 1024;
    let mut gateway = Gateway::new(&options, EGRESS);
    gateway.set_pool("udp", &[1]);
    let sent = read(&gateway.send(&udp(CLIENT, VIP, b"")).frame);
    assert_eq!(
        gateway.send(&udp_reply(sent.to, sent.from, b"")).verdict,
        Verdict::Replied
    );
    for number in 0..4000 {
        assert_eq!(
            gateway.send(&udp(client(number), VIP, b"")).verdict,
            Verdict::NewFlow
        );
    }
    assert_eq!(
        gateway.send(&udp(CLIENT, VIP, b"")).verdict,
        Verdict::Forwarded
    );
}

/// Sweeps the whole table once.
fn sweep(gateway: &mut Gateway) -> SweepResult {
    let mut total = SweepResult::default();
    for share in 0..gateway.datapath.sweep_shares() {
        let result = gateway.datapath.sweep(share).expect("sweep");
        total.live += result.live;
        total.freed += result.freed;
    }
    total
}

/// Sweeps until only so many flows are left; the counts by backend are those of the last pass.
fn sweep_until_left(gateway: &mut Gateway, wanted: u32) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        for id in [1, 2] {
            gateway.datapath.flows_of(id).expect("reset the counts");
        }
        let live = sweep(gateway).live;
        if live == wanted {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{live} flows are left, not {wanted}"
        );
    }
}
