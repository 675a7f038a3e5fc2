use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::Arc;

use crate::route::{Backend, Origin};

/// What the kernel holds after some operations; refuses any that would leave a packet in the void.
#[derive(Clone, Default)]
struct Kernel {
    backends: BTreeMap<u32, BackendEntry>,
    /// Of ids that are free again.
    generations: BTreeMap<u32, u16>,
    /// The ids in a ring; which slots they have is `maglev`'s business.
    rings: BTreeMap<u32, BTreeSet<u32>>,
    vips: BTreeMap<VipKey, VipInfo>,
    addresses: HashMap<Addr, u32>,
    prefilter: HashMap<u32, u64>,
}

impl Kernel {
    fn apply(&mut self, op: &MapOp) {
        match op.clone() {
            MapOp::SetBackend { id, entry } => {
                assert_ne!(id, router_common::NO_BACKEND);
                self.backends.insert(id, entry);
            }
            MapOp::ClearBackend { id, generation } => {
                let gone = self.backends.remove(&id).expect("a backend that was there");
                assert_eq!(gone.generation, generation);
                self.generations.insert(id, generation);
            }
            MapOp::SetRing { ring, slots } => {
                self.rings.insert(ring, slots.iter().copied().collect());
            }
            MapOp::SetVip { key, info } => {
                self.vips.insert(key, info);
            }
            MapOp::RemoveVip { key } => {
                self.vips.remove(&key).expect("a VIP that was there");
            }
            MapOp::SetVipAddress { addr, vips: 0 } => {
                self.addresses
                    .remove(&addr)
                    .expect("an address that was there");
            }
            MapOp::SetVipAddress { addr, vips } => {
                self.addresses.insert(addr, vips);
            }
            MapOp::SetPrefilter { word, bits } => {
                self.prefilter.insert(word, bits);
            }
        }
        self.check();
    }

    /// Whatever a packet finds leads to a backend of its VIP.
    fn check(&self) {
        for (key, info) in &self.vips {
            if info.backends == 0 {
                continue;
            }
            for id in self.rings.get(&info.ring).expect("a VIP's ring") {
                let backend = self.backends.get(id).expect("a ring's backend");
                assert_eq!(
                    (backend.vip, backend.vip_port, backend.proto),
                    (key.addr(), key.port(), key.proto())
                );
            }
        }
    }

    fn serving(&self, vip: Vip) -> BTreeSet<SocketAddr> {
        let Some(info) = self.vips.get(&key_of(vip)) else {
            return BTreeSet::new();
        };
        if info.backends == 0 {
            return BTreeSet::new();
        }
        let ids = self.rings[&info.ring].iter();
        ids.map(|id| SocketAddr::new(self.backends[id].address.ip(), self.backends[id].port))
            .collect()
    }

    fn prefilter_knows(&self, addr: IpAddr, kind: u32) -> bool {
        let (word, bit) = prefilter_bit(Addr::from(addr));
        self.prefilter.get(&word).copied().unwrap_or(0) >> (bit + kind) & 1 == 1
    }
}

fn vip(number: u8) -> Vip {
    Vip {
        proto: Proto::Tcp,
        address: IpAddr::from([192, 0, 2, number]),
        port: 80,
    }
}

fn address(host: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, host], 8080))
}

fn pool(hosts: &BTreeSet<u8>) -> Pool {
    let backend = |host: &u8| Arc::new(Backend::new(address(*host), Origin::Nats));
    Pool {
        backends: hosts.iter().map(backend).collect(),
        balance: None,
        route_service_url: None,
    }
}

const DRAIN: Duration = Duration::from_secs(60);

/// A planner and the kernel it writes.
struct Bench {
    planner: Planner,
    kernel: Kernel,
    next_hops: HashMap<IpAddr, NextHop>,
    unhealthy: imbl::HashSet<SocketAddr>,
    now: Instant,
}

impl Bench {
    fn new(vips: u32, backends: u32) -> Bench {
        Bench {
            planner: Planner::new(vips, backends),
            kernel: Kernel::default(),
            next_hops: (1..=32).map(|host| (address(host).ip(), hop(1))).collect(),
            unhealthy: Default::default(),
            now: Instant::now(),
        }
    }

    fn plan(&mut self, vip: Vip, hosts: &[u8]) -> Plan {
        let hosts: BTreeSet<u8> = hosts.iter().copied().collect();
        let world = World {
            now: self.now,
            drain: DRAIN,
            next_hops: &self.next_hops,
            unhealthy: &self.unhealthy,
        };
        let wanted = pool(&hosts);
        let plan = self
            .planner
            .plan(vip, (!hosts.is_empty()).then_some(&wanted), &world);
        for op in &plan.ops {
            self.kernel.apply(op);
        }
        plan
    }
}

impl Bench {
    /// A new agent that finds what the kernel holds.
    fn restart(&mut self, vips: u32, backends: u32) {
        let kernel = &self.kernel;
        let found_vips = kernel
            .vips
            .iter()
            .map(|(key, info)| (*key, *info))
            .collect();
        let free = kernel.generations.iter().map(|(id, generation)| {
            let entry = BackendEntry {
                generation: *generation,
                ..BackendEntry::default()
            };
            (*id, entry)
        });
        let used = kernel.backends.iter().map(|(id, entry)| (*id, *entry));
        let found: BTreeMap<u32, BackendEntry> = free.chain(used).collect();
        self.planner = Planner::new(vips, backends);
        for op in self
            .planner
            .adopt(found_vips, found.into_iter().collect(), self.now, DRAIN)
        {
            self.kernel.apply(&op);
        }
    }
}

fn hop(last: u8) -> NextHop {
    NextHop {
        ifindex: 3,
        source_mac: [2, 0, 0, 0, 0, 0],
        destination_mac: [2, 0, 0, 0, 0, last],
        source: IpAddr::from([10, 0, 0, 254]),
    }
}

fn addresses(hosts: &[u8]) -> BTreeSet<SocketAddr> {
    hosts.iter().map(|host| address(*host)).collect()
}

#[test]
fn a_pool_that_did_not_change_costs_no_operation() {
    let mut bench = Bench::new(4, 16);
    assert!(!bench.plan(vip(1), &[1, 2]).ops.is_empty());
    assert_eq!(bench.plan(vip(1), &[1, 2]), Plan::default());
}

#[test]
fn a_removed_backend_drains_and_is_cleared_after_its_time() {
    let mut bench = Bench::new(4, 16);
    bench.plan(vip(1), &[1, 2]);
    bench.plan(vip(1), &[2]);
    assert_eq!(bench.kernel.serving(vip(1)), addresses(&[2]));
    assert_eq!(bench.kernel.backends.len(), 2);
    assert_eq!(bench.planner.drained(bench.now), []);
    bench.now += DRAIN;
    assert_eq!(bench.planner.drained(bench.now), [vip(1)]);
    bench.plan(vip(1), &[2]);
    assert_eq!(bench.kernel.backends.len(), 1);
}

#[test]
fn a_backend_that_comes_back_while_it_drains_keeps_its_id() {
    let mut bench = Bench::new(4, 16);
    bench.plan(vip(1), &[1, 2]);
    let before = bench.kernel.backends.clone();
    bench.plan(vip(1), &[2]);
    bench.plan(vip(1), &[1, 2]);
    assert_eq!(bench.kernel.backends, before);
}

#[test]
fn a_drain_ends_early_when_no_flow_is_left() {
    let mut bench = Bench::new(4, 16);
    bench.plan(vip(1), &[1, 2]);
    bench.plan(vip(1), &[2]);
    bench.planner.end_drains(bench.now, |_| false);
    assert_eq!(bench.planner.drained(bench.now), []);
    bench.planner.end_drains(bench.now, |_| true);
    assert_eq!(bench.planner.drained(bench.now), [vip(1)]);
}

#[test]
fn a_backend_without_next_hop_waits_for_it() {
    let mut bench = Bench::new(4, 16);
    let hop = bench.next_hops.remove(&address(1).ip()).unwrap();
    bench.plan(vip(1), &[1, 2]);
    assert_eq!(bench.kernel.serving(vip(1)), addresses(&[2]));
    bench.next_hops.insert(address(1).ip(), hop);
    bench.plan(vip(1), &[1, 2]);
    assert_eq!(bench.kernel.serving(vip(1)), addresses(&[1, 2]));
}

#[test]
fn a_next_hop_that_changes_is_written_to_the_backend_alone() {
    let mut bench = Bench::new(4, 16);
    bench.plan(vip(1), &[1, 2]);
    bench.next_hops.insert(address(1).ip(), hop(9));
    let plan = bench.plan(vip(1), &[1, 2]);
    assert!(
        matches!(plan.ops[..], [MapOp::SetBackend { .. }]),
        "{:?}",
        plan.ops
    );
}

#[test]
fn an_unhealthy_backend_gets_no_new_flows_unless_all_are() {
    let mut bench = Bench::new(4, 16);
    bench.unhealthy.insert(address(1));
    bench.plan(vip(1), &[1, 2]);
    assert_eq!(bench.kernel.serving(vip(1)), addresses(&[2]));
    bench.unhealthy.insert(address(2));
    bench.plan(vip(1), &[1, 2]);
    assert_eq!(bench.kernel.serving(vip(1)), addresses(&[1, 2]));
}

#[test]
fn what_does_not_fit_is_refused_and_the_rest_served() {
    let mut bench = Bench::new(1, 2);
    assert_eq!(
        bench.plan(vip(1), &[1, 2, 3]).refused,
        [(address(3), Refusal::BackendsFull)]
    );
    assert_eq!(bench.kernel.serving(vip(1)), addresses(&[1, 2]));
    assert_eq!(
        bench.plan(vip(2), &[4]).refused,
        [(address(4), Refusal::VipsFull)]
    );
    assert_eq!(bench.kernel.serving(vip(2)), addresses(&[]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_kernel_serves_exactly_what_is_registered(
        steps in prop::collection::vec(
            (1u8..4, prop::collection::btree_set(1u8..8, 0..5), 0u64..80), 1..30),
    ) {
        let mut bench = Bench::new(3, 32);
        let mut wanted: BTreeMap<u8, Vec<u8>> = BTreeMap::new();
        for (number, hosts, seconds) in steps {
            bench.now += Duration::from_secs(seconds);
            for vip in bench.planner.drained(bench.now) {
                let IpAddr::V4(v4) = vip.address else { unreachable!("all are IPv4") };
                bench.plan(vip, &wanted.get(&v4.octets()[3]).cloned().unwrap_or_default());
            }
            let hosts: Vec<u8> = hosts.into_iter().collect();
            prop_assert_eq!(bench.plan(vip(number), &hosts).refused, []);
            wanted.insert(number, hosts);
            for (number, hosts) in &wanted {
                prop_assert_eq!(bench.kernel.serving(vip(*number)), addresses(hosts));
            }
            for key in bench.kernel.vips.keys() {
                prop_assert!(bench.kernel.prefilter_knows(key.addr().ip(), VIP));
            }
            for backend in bench.kernel.backends.values() {
                prop_assert!(bench.kernel.prefilter_knows(backend.source.ip(), ANSWER));
            }
        }
        // When everything is gone and drained, nothing is left.
        for number in 1..4 {
            bench.plan(vip(number), &[]);
        }
        bench.now += DRAIN;
        for vip in bench.planner.drained(bench.now) {
            bench.plan(vip, &[]);
        }
        prop_assert!(bench.kernel.backends.is_empty() && bench.kernel.vips.is_empty());
        prop_assert!(bench.kernel.addresses.is_empty());
        prop_assert!(bench.kernel.prefilter.values().all(|bits| *bits == 0));
    }

    #[test]
    fn an_adopted_kernel_serves_on_and_needs_no_plan(
        pools in prop::collection::btree_map(1u8..4, prop::collection::btree_set(1u8..8, 1..5), 1..4),
        removed in 1u8..8,
    ) {
        let mut bench = Bench::new(3, 32);
        let mut wanted: BTreeMap<u8, Vec<u8>> = BTreeMap::new();
        for (number, hosts) in &pools {
            let hosts: Vec<u8> = hosts.iter().copied().collect();
            bench.plan(vip(*number), &hosts);
            let rest: Vec<u8> = hosts.into_iter().filter(|host| *host != removed).collect();
            if !rest.is_empty() {
                bench.plan(vip(*number), &rest);
                wanted.insert(*number, rest);
            } else {
                wanted.insert(*number, vec![removed]);
            }
        }
        let before = bench.kernel.clone();
        bench.restart(3, 32);
        for (number, hosts) in &wanted {
            prop_assert_eq!(bench.plan(vip(*number), hosts).ops, vec![]);
        }
        prop_assert_eq!(bench.kernel.backends, before.backends);
        prop_assert_eq!(bench.kernel.prefilter, before.prefilter);
    }

    #[test]
    fn an_agent_that_ends_between_any_two_operations_leaves_nothing_broken(
        before in prop::collection::btree_set(1u8..8, 0..5),
        after in prop::collection::btree_set(1u8..8, 0..5),
        cut in any::<prop::sample::Index>(),
    ) {
        let hosts = |set: &BTreeSet<u8>| set.iter().copied().collect::<Vec<u8>>();
        let mut bench = Bench::new(3, 32);
        bench.plan(vip(1), &hosts(&before));
        let kernel = bench.kernel.clone();
        let ops = bench.plan(vip(1), &hosts(&after)).ops;
        bench.kernel = kernel;
        for op in &ops[..cut.index(ops.len() + 1)] {
            bench.kernel.apply(op);
        }
        bench.restart(3, 32);
        bench.plan(vip(1), &hosts(&after));
        prop_assert_eq!(bench.kernel.serving(vip(1)), addresses(&hosts(&after)));
        for key in bench.kernel.vips.keys() {
            prop_assert!(bench.kernel.prefilter_knows(key.addr().ip(), VIP));
        }
        bench.plan(vip(1), &[]);
        bench.now += DRAIN;
        bench.plan(vip(1), &[]);
        prop_assert!(bench.kernel.backends.is_empty() && bench.kernel.vips.is_empty());
    }
}

#[test]
fn an_id_never_comes_back_in_the_generation_it_left_in() {
    let mut bench = Bench::new(4, 1);
    let mut seen = BTreeSet::new();
    for host in 1..=5 {
        bench.plan(vip(1), &[host]);
        assert!(
            seen.insert(bench.kernel.backends[&1].generation),
            "host {host}"
        );
        bench.plan(vip(1), &[]);
        bench.now += DRAIN;
        bench.plan(vip(1), &[]);
        bench.restart(4, 1);
    }
}

#[test]
fn flows_end_when_the_gateways_address_towards_a_backend_changes() {
    let mut bench = Bench::new(4, 16);
    bench.plan(vip(1), &[1]);
    let before = bench.kernel.backends[&1].generation;
    let source = IpAddr::from([10, 0, 0, 253]);
    bench
        .next_hops
        .insert(address(1).ip(), NextHop { source, ..hop(1) });
    bench.plan(vip(1), &[1]);
    assert_ne!(bench.kernel.backends[&1].generation, before);
    assert!(bench.kernel.prefilter_knows(source, ANSWER));
}
