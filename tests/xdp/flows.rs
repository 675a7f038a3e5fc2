//! What the flow table keeps, and for how long, in the modes that lead answers back.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use router_common::Verdict;
use viaduct::config::{FlowTimeouts, Forwarding, PortRange};
use viaduct::l4::datapath::Options;
use viaduct::route::Vip;

use crate::fixture::*;
use crate::packets::*;

/// A VIP of its own for each row, with some of its backends.
struct Site {
    family: Family,
    vip: Vip,
    address: SocketAddr,
}

impl Site {
    fn new(gateway: &mut Gateway, family: Family, proto: &str, mode: Forwarding) -> Site {
        let address = gateway.address(family, 80);
        let vip = vip(proto, address);
        gateway.configure(vip, |config| config.forwarding = Some(mode));
        Site {
            family,
            vip,
            address,
        }
    }

    fn backend(&self, host: u8) -> SocketAddr {
        self.family.backend(host, 8080)
    }

    fn set_pool(&self, gateway: &mut Gateway, hosts: &[u8]) {
        let backends: Vec<_> = hosts.iter().map(|host| self.backend(*host)).collect();
        gateway.set_pool(self.vip, &backends);
    }

    /// Opens a connection; the first packet as its backend gets it.
    #[track_caller]
    fn open(&self, gateway: &mut Gateway, client: SocketAddr) -> Packet {
        let syn = tcp(client, self.address, Segment::Syn, b"");
        read(&gateway.expect("SYN", &syn.frame(), Verdict::NewFlow).frame)
    }

    fn clients(&self, gateway: &mut Gateway, count: usize) -> Vec<SocketAddr> {
        (0..count).map(|_| gateway.client(self.family)).collect()
    }

    fn segment(&self, client: SocketAddr, segment: Segment) -> Vec<u8> {
        tcp(client, self.address, segment, b"").frame()
    }
}

#[test]
fn flows_stay_where_they_are() {
    let mut gateway = Gateway::new();
    for hook in HOOKS {
        gateway.hook = hook;
        for family in FAMILIES {
            for mode in [Forwarding::Nat, Forwarding::Dnat] {
                let mut site = || Site::new(&mut gateway, family, "tcp", mode);
                let sites = [site(), site(), site(), site(), site(), site(), site()];
                let [a, b, c, d, e, f, g] = &sites;
                new_flows_reach_every_backend(&mut gateway, a);
                a_removed_backend_keeps_its_flows(&mut gateway, b);
                a_new_backend_moves_no_flow(&mut gateway, c);
                a_closed_connection_makes_room_for_the_next_on_the_same_port(&mut gateway, d);
                a_syn_sent_again_stays_with_its_flow(&mut gateway, e);
                tcp_in_the_middle_of_nothing_opens_no_flow(&mut gateway, f);
                a_backend_of_another_generation_gets_no_old_flow(&mut gateway, g);
                for site in &sites {
                    gateway.remove(site.vip);
                }
            }
        }
    }
}

fn new_flows_reach_every_backend(gateway: &mut Gateway, site: &Site) {
    site.set_pool(gateway, &[1, 2, 3]);
    let mut counts: BTreeMap<SocketAddr, u32> = BTreeMap::new();
    for client in site.clients(gateway, 150) {
        *counts.entry(site.open(gateway, client).to).or_default() += 1;
    }
    assert_eq!(counts.len(), 3);
    // 50 each on average; 20 is more than five standard deviations away.
    assert!(counts.values().all(|count| *count > 20), "{counts:?}");
}

fn a_removed_backend_keeps_its_flows(gateway: &mut Gateway, site: &Site) {
    site.set_pool(gateway, &[1, 2, 3]);
    let clients = site.clients(gateway, 60);
    let flows: Vec<_> = clients
        .iter()
        .map(|client| (*client, site.open(gateway, *client)))
        .collect();
    site.set_pool(gateway, &[2, 3]);
    for (client, sent) in &flows {
        let ack = site.segment(*client, Segment::Ack);
        let seen = read(&gateway.expect("ACK", &ack, Verdict::Forwarded).frame);
        assert_eq!((seen.to, seen.from), (sent.to, sent.from));
        gateway.expect("answer", &sent.answer(b"").frame(), Verdict::Replied);
    }
    for client in site.clients(gateway, 60) {
        let sent = site.open(gateway, client);
        assert_ne!(sent.to, site.backend(1), "a new flow to a draining backend");
    }
}

fn a_new_backend_moves_no_flow(gateway: &mut Gateway, site: &Site) {
    site.set_pool(gateway, &[1, 2]);
    let clients = site.clients(gateway, 60);
    let flows: Vec<_> = clients
        .iter()
        .map(|client| (*client, site.open(gateway, *client)))
        .collect();
    site.set_pool(gateway, &[1, 2, 3, 4]);
    for (client, sent) in flows {
        let ack = site.segment(client, Segment::Ack);
        let out = gateway.expect("ACK", &ack, Verdict::Forwarded);
        assert_eq!(read(&out.frame).to, sent.to);
    }
}

fn a_closed_connection_makes_room_for_the_next_on_the_same_port(
    gateway: &mut Gateway,
    site: &Site,
) {
    site.set_pool(gateway, &[1, 2, 3]);
    let client = gateway.client(site.family);
    let sent = site.open(gateway, client);
    for segment in [Segment::Ack, Segment::Fin] {
        let frame = site.segment(client, segment);
        gateway.expect("client's", &frame, Verdict::Forwarded);
    }
    let fin = Packet {
        transport: Transport::Tcp(Segment::Fin),
        ..sent.answer(b"")
    };
    gateway.expect("backend's FIN", &fin.frame(), Verdict::Replied);
    // The last ACK still belongs to the old connection; the SYN begins another.
    let ack = site.segment(client, Segment::Ack);
    gateway.expect("last ACK", &ack, Verdict::Forwarded);
    let sent = site.open(gateway, client);
    gateway.expect("answer", &sent.answer(b"").frame(), Verdict::Replied);
}

fn a_syn_sent_again_stays_with_its_flow(gateway: &mut Gateway, site: &Site) {
    site.set_pool(gateway, &[1, 2, 3]);
    let client = gateway.client(site.family);
    let first = site.open(gateway, client);
    site.set_pool(gateway, &[4, 5, 6]);
    let syn = site.segment(client, Segment::Syn);
    let again = read(&gateway.expect("SYN again", &syn, Verdict::Forwarded).frame);
    assert_eq!((again.to, again.from), (first.to, first.from));
}

fn tcp_in_the_middle_of_nothing_opens_no_flow(gateway: &mut Gateway, site: &Site) {
    site.set_pool(gateway, &[1]);
    for segment in [Segment::Ack, Segment::Fin, Segment::Rst] {
        let client = gateway.client(site.family);
        let frame = site.segment(client, segment);
        gateway.expect_untouched(&format!("{segment:?}"), &frame, Verdict::UnknownFlow);
    }
}

/// The next backend may have its id, but not its flows.
fn a_backend_of_another_generation_gets_no_old_flow(gateway: &mut Gateway, site: &Site) {
    site.set_pool(gateway, &[1]);
    let client = gateway.client(site.family);
    let sent = site.open(gateway, client);
    let id = gateway.id_of(site.vip, site.backend(1));
    site.set_pool(gateway, &[2]);
    gateway.now += DRAIN;
    site.set_pool(gateway, &[2]);
    site.set_pool(gateway, &[2, 3]);
    assert_eq!(gateway.id_of(site.vip, site.backend(3)), id);
    let ack = site.segment(client, Segment::Ack);
    gateway.expect_untouched("ACK", &ack, Verdict::UnknownFlow);
    let answer = sent.answer(b"").frame();
    let out = gateway.send(&answer);
    assert_eq!(out.action, Action::Pass, "{out:?}");
    let next = site.open(gateway, client).to;
    assert!(next == site.backend(2) || next == site.backend(3));
}

#[test]
fn every_flow_gets_its_own_answers() {
    let mut gateway = Gateway::new();
    let site = Site::new(&mut gateway, Family::V4, "tcp", Forwarding::Nat);
    site.set_pool(&mut gateway, &[1, 2]);
    let clients = site.clients(&mut gateway, 2000);
    let flows: Vec<_> = clients
        .iter()
        .map(|client| (*client, site.open(&mut gateway, *client)))
        .collect();
    let ports: HashMap<_, _> = flows
        .iter()
        .map(|(client, sent)| ((sent.to, sent.from), *client))
        .collect();
    assert_eq!(
        ports.len(),
        flows.len(),
        "two flows share a port towards the same backend"
    );
    for (client, sent) in flows {
        let answer = sent.answer(b"x").frame();
        let seen = read(&gateway.expect("answer", &answer, Verdict::Replied).frame);
        assert_eq!((seen.from, seen.to), (site.address, client));
    }
    // The gateway's own connection to a backend.
    let own = SocketAddr::new(GATEWAY, 45_000);
    let answer = tcp(site.backend(1), own, Segment::Ack, b"").at_backends();
    gateway.expect_untouched("its own", &answer.frame(), Verdict::NotAReply);
}

#[test]
fn a_vip_whose_backends_all_left_keeps_old_flows_and_takes_no_new_ones() {
    let mut gateway = Gateway::new();
    let site = Site::new(&mut gateway, Family::V4, "tcp", Forwarding::Nat);
    let udp_vip = vip("udp", site.address);
    site.set_pool(&mut gateway, &[1]);
    gateway.serve(udp_vip, Forwarding::Nat, &[site.backend(1)]);
    let client = gateway.client(Family::V4);
    site.open(&mut gateway, client);
    site.set_pool(&mut gateway, &[]);
    let ack = site.segment(client, Segment::Ack);
    gateway.expect("ACK", &ack, Verdict::Forwarded);
    let other = gateway.client(Family::V4);
    let syn = site.segment(other, Segment::Syn);
    gateway.expect("SYN", &syn, Verdict::Rejected);
    gateway.now += DRAIN;
    site.set_pool(&mut gateway, &[]);
    gateway.expect_untouched("no such port", &syn, Verdict::NoSuchVip);
    gateway.remove(udp_vip);
    gateway.expect_untouched("no such address", &syn, Verdict::NotForUs);
}

#[test]
fn ports_run_out_with_a_verdict_of_their_own() {
    let mut gateway = Gateway::with(&Options {
        nat_ports: PortRange {
            first: 2000,
            last: 2003,
        },
        ..options()
    });
    let site = Site::new(&mut gateway, Family::V4, "udp", Forwarding::Nat);
    site.set_pool(&mut gateway, &[1]);
    let mut ports = Vec::new();
    for client in site.clients(&mut gateway, 200) {
        let out = gateway.send(&udp(client, site.address, b"").frame());
        if out.verdict == Verdict::NewFlow {
            ports.push(read(&out.frame).from.port());
        } else {
            assert_eq!(
                (out.action, out.verdict),
                (Action::Drop, Verdict::PortsExhausted)
            );
        }
    }
    ports.sort_unstable();
    assert_eq!(ports, [2000, 2001, 2002, 2003]);
}

#[test]
fn a_full_table_refuses_no_flow_that_it_need_not() {
    let mut options = options();
    options.limits.flows = 1024;
    let mut gateway = Gateway::with(&options);
    let site = Site::new(&mut gateway, Family::V4, "udp", Forwarding::Nat);
    site.set_pool(&mut gateway, &[1, 2]);
    let mut kept = Vec::new();
    for client in site.clients(&mut gateway, 2000) {
        let out = gateway.send(&udp(client, site.address, b"").frame());
        match out.verdict {
            // Answered, it is no longer the first to go.
            Verdict::NewFlow => {
                let answer = read(&out.frame).answer(b"");
                gateway.expect("answer", &answer.frame(), Verdict::Replied);
                kept.push(client);
            }
            Verdict::FlowTableFull => assert_eq!(out.action, Action::Drop),
            other => panic!("{other:?}"),
        }
    }
    let len = kept.len();
    assert!(len <= 1024 && len > 900, "{len} of 1024 places used");
    for client in kept {
        let more = udp(client, site.address, b"").frame();
        gateway.expect("kept", &more, Verdict::Forwarded);
    }
    // Where the ring knows the backend too, packets are served without a place.
    let tunnelled = Site::new(&mut gateway, Family::V4, "udp", Forwarding::Dsr);
    let backend = Family::V4.backend(3, 80);
    gateway.serve(tunnelled.vip, Forwarding::Dsr, &[backend]);
    let mut untracked = 0;
    for client in tunnelled.clients(&mut gateway, 200) {
        let frame = udp(client, tunnelled.address, b"").frame();
        let out = gateway.send(&frame);
        assert_eq!(out.action, Action::Redirect, "{out:?}");
        assert_eq!(gateway.backend_of(tunnelled.vip, &out), backend);
        match out.verdict {
            Verdict::Untracked => {
                untracked += 1;
                gateway.expect("again", &frame, Verdict::Untracked);
            }
            verdict => assert_eq!(verdict, Verdict::NewFlow),
        }
    }
    assert!(untracked > 100, "{untracked} of 200");
}

#[test]
fn half_open_flows_make_room_for_others() {
    let mut options = options();
    options.limits.flows = 1024;
    let mut gateway = Gateway::with(&options);
    let site = Site::new(&mut gateway, Family::V4, "tcp", Forwarding::Nat);
    site.set_pool(&mut gateway, &[1, 2]);
    let established = gateway.client(Family::V4);
    site.open(&mut gateway, established);
    let ack = site.segment(established, Segment::Ack);
    gateway.expect("ACK", &ack, Verdict::Forwarded);
    for client in site.clients(&mut gateway, 4000) {
        site.open(&mut gateway, client);
    }
    gateway.expect("ACK", &ack, Verdict::Forwarded);
}

#[test]
fn the_sweep_frees_what_is_over_and_its_return_slots() {
    let mut options = Options {
        timeouts: FlowTimeouts {
            udp: Duration::from_millis(1),
            ..FlowTimeouts::default()
        },
        ..options()
    };
    options.limits.flows = 1024;
    let mut gateway = Gateway::with(&options);
    let site = Site::new(&mut gateway, Family::V4, "tcp", Forwarding::Nat);
    site.set_pool(&mut gateway, &[1]);
    let udp_vip = vip("udp", site.address);
    gateway.serve(udp_vip, Forwarding::Nat, &[site.backend(2)]);
    for client in site.clients(&mut gateway, 50) {
        site.open(&mut gateway, client);
        let datagram = udp(client, site.address, b"").frame();
        gateway.expect("UDP", &datagram, Verdict::NewFlow);
    }
    let ids = [
        gateway.id_of(site.vip, site.backend(1)),
        gateway.id_of(udp_vip, site.backend(2)),
    ];
    assert_eq!(sweep_until_left(&mut gateway, 50, ids), [50, 0]);
    for client in site.clients(&mut gateway, 4000) {
        let datagram = udp(client, site.address, b"").frame();
        gateway.expect("UDP", &datagram, Verdict::NewFlow);
    }
}

/// Sweeps until only so many flows are left; those of two backends in the last sweep.
fn sweep_until_left(gateway: &mut Gateway, wanted: u32, ids: [u32; 2]) -> [u32; 2] {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let live = gateway.sweep().live;
        let counts = ids.map(|id| gateway.datapath.flows_of(id).expect("take the counts"));
        if live == wanted {
            return counts;
        }
        assert!(
            Instant::now() < deadline,
            "{live} flows are left, not {wanted}"
        );
    }
}
