//! Which backend a new flow gets.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use router_common::Verdict;
use viaduct::config::{Forwarding, Scheduler};
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

/// Every VIP that can be, with this scheduler, once at each hook.
fn for_every_vip(
    scheduler: Scheduler,
    gateway: &mut Gateway,
    mut check: impl FnMut(&mut Gateway, &str, Vip, SocketAddr),
) {
    for hook in HOOKS {
        gateway.hook = hook;
        for mode in MODES {
            for family in FAMILIES {
                for proto in ["tcp", "udp"] {
                    let address = family.vip(10, 80);
                    let vip = vip(proto, address);
                    gateway.configure(vip, |config| {
                        config.scheduler = Some(scheduler);
                        config.forwarding = Some(mode);
                    });
                    let row = format!("{scheduler:?} {hook:?} {mode:?} {family:?} {proto}");
                    check(gateway, &row, vip, address);
                    gateway.remove(vip);
                }
            }
        }
    }
}

fn opening(vip: Vip, from: SocketAddr) -> Vec<u8> {
    let to = SocketAddr::new(vip.address, vip.ports.first);
    match vip.proto {
        viaduct::route::Proto::Tcp => tcp(from, to, Segment::Syn, b"").frame(),
        viaduct::route::Proto::Udp => udp(from, to, b"x").frame(),
    }
}

/// Opens a flow; its backend.
#[track_caller]
fn open(gateway: &mut Gateway, row: &str, vip: Vip, from: SocketAddr) -> SocketAddr {
    let out = gateway.expect(row, &opening(vip, from), Verdict::NewFlow);
    gateway.backend_of(vip, &out)
}

fn open_many(gateway: &mut Gateway, row: &str, vip: Vip, flows: u32) -> BTreeMap<SocketAddr, u32> {
    let mut counts = BTreeMap::new();
    for _ in 0..flows {
        let client = gateway.client(Family::of(SocketAddr::new(vip.address, 0)));
        *counts.entry(open(gateway, row, vip, client)).or_default() += 1;
    }
    counts
}

fn pool(address: SocketAddr, hosts: std::ops::Range<u8>) -> Vec<SocketAddr> {
    let family = Family::of(address);
    hosts.map(|host| family.backend(host, 80)).collect()
}

#[test]
fn a_client_hashed_by_its_address_has_one_backend() {
    let mut gateway = Gateway::new();
    for_every_vip(
        Scheduler::SourceHash,
        &mut gateway,
        |gateway, row, vip, address| {
            gateway.set_pool(vip, &pool(address, 1..9));
            let mut used = BTreeMap::new();
            for _ in 0..16 {
                let ip = gateway.client(Family::of(address)).ip();
                let backends: Vec<_> = (20_000..20_003)
                    .map(|port| open(gateway, row, vip, SocketAddr::new(ip, port)))
                    .collect();
                assert_eq!(backends, [backends[0]; 3], "{row}");
                *used.entry(backends[0]).or_insert(0) += 1;
            }
            // All of 16 clients on fewer than 3 of 8 backends: a chance below 1e-7.
            assert!(used.len() >= 3, "{row}: {used:?}");
        },
    );
}

#[test]
fn round_robin_takes_turns_by_weight() {
    let mut gateway = Gateway::new();
    for_every_vip(
        Scheduler::RoundRobin,
        &mut gateway,
        |gateway, row, vip, address| {
            let backends = pool(address, 1..4);
            gateway.set_pool(vip, &backends);
            for _ in 0..3 {
                let counts = open_many(gateway, row, vip, 3);
                assert!(
                    counts.values().all(|count| *count == 1),
                    "{row}: {counts:?}"
                );
            }
            let weights = [1, 2, 3];
            let weighted: Vec<_> = backends.iter().copied().zip(weights).collect();
            gateway.set_weights(vip, &weighted);
            let counts = open_many(gateway, row, vip, 12);
            let counts: Vec<_> = backends.iter().map(|backend| counts[backend]).collect();
            assert_eq!(counts, [2, 4, 6], "{row}");
        },
    );
}

#[test]
fn least_connections_fills_whoever_has_fewer() {
    let mut gateway = Gateway::new();
    for_every_vip(
        Scheduler::LeastConnections,
        &mut gateway,
        |gateway, row, vip, address| {
            let backends = pool(address, 1..3);
            gateway.set_pool(vip, &backends[..1]);
            open_many(gateway, row, vip, 40);
            // The second of two choices is the new one in three cases of four, and then it is taken.
            gateway.set_pool(vip, &backends);
            let counts = open_many(gateway, row, vip, 30);
            assert!(counts[&backends[1]] > 12, "{row}: {counts:?}");
            let load = |backend| {
                let id = gateway.id_of(vip, backend);
                gateway.datapath.load_of(id).expect("BACKEND_LOAD").flows
            };
            assert_eq!(load(backends[0]) + load(backends[1]), 70, "{row}");
        },
    );
}

#[test]
fn a_backend_of_weight_0_keeps_what_it_has() {
    let mut gateway = Gateway::new();
    for scheduler in [
        Scheduler::Maglev,
        Scheduler::SourceHash,
        Scheduler::RoundRobin,
        Scheduler::LeastConnections,
    ] {
        for_every_vip(scheduler, &mut gateway, |gateway, row, vip, address| {
            let backends = pool(address, 1..4);
            gateway.set_pool(vip, &backends);
            let clients: Vec<_> = (0..12)
                .map(|_| gateway.client(Family::of(address)))
                .collect();
            let before: Vec<_> = clients
                .iter()
                .map(|client| open(gateway, row, vip, *client))
                .collect();
            let weighted: Vec<_> = backends.iter().copied().zip([0, 100, 100]).collect();
            gateway.set_weights(vip, &weighted);
            for (client, backend) in clients.iter().zip(&before) {
                let frame = match vip.proto {
                    viaduct::route::Proto::Tcp => tcp(*client, address, Segment::Ack, b"").frame(),
                    viaduct::route::Proto::Udp => udp(*client, address, b"more").frame(),
                };
                let out = gateway.expect(row, &frame, Verdict::Forwarded);
                assert_eq!(gateway.backend_of(vip, &out), *backend, "{row}");
            }
            let counts = open_many(gateway, row, vip, 12);
            assert!(!counts.contains_key(&backends[0]), "{row}: {counts:?}");
        });
    }
}

#[test]
fn a_client_with_affinity_comes_back_to_its_backend() {
    let mut gateway = Gateway::new();
    for_every_vip(
        Scheduler::RoundRobin,
        &mut gateway,
        |gateway, row, vip, address| {
            gateway.configure(vip, |config| {
                config.affinity = Some(Duration::from_secs(600))
            });
            let backends = pool(address, 1..5);
            gateway.set_pool(vip, &backends);
            let mut homes = Vec::new();
            for _ in 0..4 {
                let ip = gateway.client(Family::of(address)).ip();
                let home = open(gateway, row, vip, SocketAddr::new(ip, 20_000));
                for port in 20_001..20_004 {
                    let again = open(gateway, row, vip, SocketAddr::new(ip, port));
                    assert_eq!(again, home, "{row}");
                }
                homes.push((ip, home));
            }
            // Each of the four clients took one turn.
            let mut all: Vec<_> = homes.iter().map(|(_, home)| *home).collect();
            all.sort_unstable();
            assert_eq!(all, backends, "{row}");
            // Whose backend takes nothing new gets another, and keeps that.
            gateway.set_pool(vip, &backends[1..]);
            for (ip, home) in homes {
                let next = open(gateway, row, vip, SocketAddr::new(ip, 20_010));
                if home == backends[0] {
                    assert_ne!(next, home, "{row}");
                } else {
                    assert_eq!(next, home, "{row}");
                }
                let again = open(gateway, row, vip, SocketAddr::new(ip, 20_011));
                assert_eq!(again, next, "{row}");
            }
            gateway.configure(vip, |config| config.affinity = None);
        },
    );
}

#[test]
fn affinity_ends_with_its_time() {
    let mut gateway = Gateway::new();
    let address = Family::V4.vip(10, 80);
    let vip = vip("udp", address);
    gateway.configure(vip, |config| {
        config.affinity = Some(Duration::from_millis(1));
        config.scheduler = Some(Scheduler::RoundRobin);
    });
    gateway.set_pool(vip, &pool(address, 1..5));
    let ip = gateway.client(Family::V4).ip();
    let home = open(&mut gateway, "first", vip, SocketAddr::new(ip, 1));
    // A place that is not used is over after a tick or two.
    let deadline = Instant::now() + Duration::from_secs(20);
    while gateway.sweep().live + gateway.sweep().freed == 0 || affinities(&gateway) != 0 {
        assert!(Instant::now() < deadline, "the affinity does not end");
    }
    let next = open(&mut gateway, "after", vip, SocketAddr::new(ip, 2));
    assert_ne!(next, home, "the next turn is another backend's");
}

fn affinities(gateway: &Gateway) -> usize {
    let flows = gateway.datapath.flows();
    let of_affinity = flows.iter().filter(|flow| {
        let flow = flow.as_ref().expect("read the flow table");
        flow.slot.state() == router_common::FlowState::Affinity
    });
    of_affinity.count()
}
