use std::sync::Arc;

use proptest::prelude::*;
use router_common::{RING_SIZE, VIP_CHAIN, prefilter_bit, vip_head};

use super::prefilter::{ANSWER, VIP};
use super::*;
use crate::config::{Forwarding, L4Config, Scheduler as Schedule, VipConfig};
use crate::route::{Backend, Origin};

mod flows;
mod policies;
mod rings;

/// What the kernel holds after some operations; refuses any that would leave a packet in the void.
#[derive(Clone, Default)]
struct Kernel {
    backends: BTreeMap<u32, BackendEntry>,
    /// Of ids that are free again.
    generations: BTreeMap<u32, u16>,
    rings: BTreeMap<u32, KernelRing>,
    vips: BTreeMap<u32, VipEntry>,
    heads: BTreeMap<u32, u32>,
    addresses: HashMap<Addr, u32>,
    prefilter: HashMap<u32, u64>,
    sources: BTreeMap<([u8; 4], Addr, u8), u32>,
    quic_servers: HashMap<QuicKey, u32>,
    dnat: bool,
}

#[derive(Clone)]
struct KernelRing {
    slots: Box<[RingSlot]>,
    /// What is in some slot, for a look at all of it.
    current: BTreeSet<u32>,
    previous: BTreeSet<u32>,
}

impl KernelRing {
    fn new(slots: Box<[RingSlot]>) -> KernelRing {
        KernelRing {
            current: slots.iter().map(|slot| slot.current()).collect(),
            previous: slots.iter().map(|slot| slot.previous()).collect(),
            slots,
        }
    }
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
            MapOp::SetRing { vip, slots } => {
                assert_eq!(slots.len(), RING_SIZE);
                self.rings.insert(vip, KernelRing::new(slots));
            }
            MapOp::SetVip { index, entry } if entry == VipEntry::default() => {
                self.vips.remove(&index).expect("a VIP that was there");
            }
            MapOp::SetVip { index, entry } => {
                self.vips.insert(index, entry);
            }
            MapOp::SetVipHead { place, first: 0 } => {
                self.heads.remove(&place);
            }
            MapOp::SetVipHead { place, first } => {
                self.heads.insert(place, first);
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
                // No packet finds anything in it.
                self.prefilter.insert(word, bits);
                return;
            }
            MapOp::SetSource {
                key,
                prefix_len,
                verdict,
            } => {
                self.sources
                    .insert((key.vip, key.source, prefix_len), verdict);
            }
            MapOp::RemoveSource { key, prefix_len } => {
                let gone = self.sources.remove(&(key.vip, key.source, prefix_len));
                assert!(gone.is_some(), "a source that was there");
            }
            MapOp::SetQuicServer { key, backend } => {
                self.quic_servers.insert(key, backend);
            }
            MapOp::RemoveQuicServer { key } => {
                assert!(
                    self.quic_servers.remove(&key).is_some(),
                    "one that was there"
                );
            }
            MapOp::SetDnat { in_use } => self.dnat = in_use,
        }
        self.check();
    }

    /// Whatever a packet finds leads to a backend of its VIP.
    fn check(&self) {
        for (&place, &first) in &self.heads {
            for index in self.chain(first) {
                let entry = &self.vips[&index];
                assert_eq!(place_of(entry), place);
                self.check_vip(index, entry);
            }
        }
        for (key, id) in &self.quic_servers {
            assert_eq!(self.backends[id].vip, key.vip);
        }
    }

    fn check_vip(&self, index: u32, entry: &VipEntry) {
        let Some(ring) = self.rings.get(&index) else {
            assert_eq!(entry.backends, 0, "a VIP's ring");
            return;
        };
        assert!((1..=RING_SIZE as u32).contains(&entry.ring_len));
        for id in &ring.previous {
            let is_nobody = [0, RingSlot::NOBODY].contains(id);
            assert!(is_nobody || self.backends[id].vip == index);
        }
        if entry.backends > 0 {
            for id in &ring.current {
                let backend = self.backends.get(id).expect("a ring's backend");
                assert_eq!(backend.vip, index);
            }
        }
    }

    /// The VIPs of a chain, by index.
    fn chain(&self, first: u32) -> Vec<u32> {
        let mut chain = Vec::new();
        let mut next = first;
        while next != 0 {
            chain.push(next - 1);
            assert!(chain.len() <= VIP_CHAIN as usize);
            next = self.vips.get(&(next - 1)).expect("a VIP in a chain").next;
        }
        chain
    }

    /// The VIP of a packet, as the program finds it.
    fn find(&self, text: &str) -> Option<(u32, VipEntry)> {
        let vip: Vip = text.parse().unwrap();
        let key = key_of(vip);
        let exact = vip_head(key.addr, key.port_first, key.proto, &HASH_KEYS) & VIP_MASK;
        let range = vip_head(key.addr, 0, key.proto, &HASH_KEYS) & VIP_MASK;
        let mut found = [exact, range]
            .into_iter()
            .filter_map(|place| self.heads.get(&place))
            .flat_map(|first| self.chain(*first))
            .map(|index| (index, self.vips[&index]));
        found.find(|(_, entry)| entry.covers(key.addr, key.port_first, key.proto))
    }

    fn serving(&self, vip: Vip) -> BTreeSet<SocketAddr> {
        let Some((index, entry)) = self.entry(vip) else {
            return BTreeSet::new();
        };
        if entry.backends == 0 {
            return BTreeSet::new();
        }
        let ids = self.rings[&index].current.iter();
        ids.map(|id| SocketAddr::new(self.backends[id].address.ip(), self.backends[id].port))
            .collect()
    }

    fn entry(&self, vip: Vip) -> Option<(u32, VipEntry)> {
        let mut vips = self.vips.iter();
        let found = vips.find(|(_, entry)| vip_of(entry) == vip)?;
        Some((*found.0, *found.1))
    }

    fn prefilter_knows(&self, addr: IpAddr, kind: u32) -> bool {
        let (word, bit) = prefilter_bit(Addr::from(addr));
        self.prefilter.get(&word).copied().unwrap_or(0) >> (bit + kind) & 1 == 1
    }

    fn installed(&self) -> Installed {
        let free = self.generations.iter().map(|(id, generation)| {
            let entry = BackendEntry {
                generation: *generation,
                ..BackendEntry::default()
            };
            (*id, entry)
        });
        let used = self.backends.iter().map(|(id, entry)| (*id, *entry));
        let backends: BTreeMap<u32, BackendEntry> = free.chain(used).collect();
        let ring = |index: &u32| {
            let ring = self.rings.get(index);
            let empty = || vec![RingSlot::default(); RING_SIZE].into();
            (*index, ring.map_or_else(empty, |ring| ring.slots.clone()))
        };
        Installed {
            vips: self.vips.iter().map(|(i, entry)| (*i, *entry)).collect(),
            heads: self.heads.iter().map(|(i, first)| (*i, *first)).collect(),
            backends: backends.into_iter().collect(),
            rings: self.vips.keys().map(ring).collect(),
            sources: self
                .sources
                .iter()
                .map(|(&(vip, source, len), verdict)| (SourceKey { vip, source }, len, *verdict))
                .collect(),
            quic_servers: self.quic_servers.iter().map(|(k, v)| (*k, *v)).collect(),
            dnat: self.dnat,
        }
    }
}

const HASH_KEYS: [u64; HASH_WORDS] = router_common::RING_KEYS;
/// Few places, so that VIPs meet.
const VIP_MASK: u32 = 3;

fn place_of(entry: &VipEntry) -> u32 {
    let port = if entry.is_range() {
        0
    } else {
        entry.port_first
    };
    vip_head(entry.addr, port, entry.proto, &HASH_KEYS) & VIP_MASK
}

fn vip(number: u8) -> Vip {
    Vip::new(Proto::Tcp, SocketAddr::from(([192, 0, 2, number], 8080)))
}

fn address(host: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, host], 8080))
}

fn backend(host: u8) -> Backend {
    Backend::new(address(host), Origin::Nats)
}

fn pool_of(backends: impl IntoIterator<Item = Backend>) -> Pool {
    Pool {
        backends: backends.into_iter().map(Arc::new).collect(),
        ..Pool::default()
    }
}

const TICKS_PER_SECOND: f64 = 2.0;
const DRAIN: Duration = Duration::from_secs(60);

/// A planner and the kernel it writes.
struct Bench {
    limits: (u32, u32),
    planner: Planner,
    kernel: Kernel,
    config: L4Config,
    adopted: HashMap<Vip, VipPolicy>,
    next_hops: HashMap<IpAddr, NextHop>,
    unhealthy: imbl::HashSet<SocketAddr>,
    panic_threshold: u8,
    draining: imbl::HashSet<SocketAddr>,
    draining_at: imbl::HashSet<(Vip, SocketAddr)>,
    now: Instant,
}

impl Bench {
    fn new(vips: u32, backends: u32) -> Bench {
        Bench {
            limits: (vips, backends),
            planner: Planner::new(vips, backends, HASH_KEYS, VIP_MASK),
            kernel: Kernel::default(),
            config: L4Config {
                drain: DRAIN,
                ..L4Config::default()
            },
            adopted: HashMap::new(),
            next_hops: (1..=32).map(|host| (address(host).ip(), hop(1))).collect(),
            unhealthy: Default::default(),
            panic_threshold: 0,
            draining: Default::default(),
            draining_at: Default::default(),
            now: Instant::now(),
        }
    }

    /// All VIPs are forwarded in this way.
    fn forwarding(mut self, forwarding: Forwarding) -> Bench {
        self.config.forwarding = forwarding;
        self
    }

    fn with_world<T>(&mut self, run: impl FnOnce(&mut Planner, &World<'_>) -> T) -> T {
        let mut policies = Policies::new(&self.config);
        policies.adopt(|_| self.adopted.clone());
        let world = World {
            now: self.now,
            policies: &policies,
            timeouts: &self.config.timeouts,
            ticks_per_second: TICKS_PER_SECOND,
            next_hops: &self.next_hops,
            unhealthy: &self.unhealthy,
            panic_threshold: self.panic_threshold,
            draining: &self.draining,
            draining_at: &self.draining_at,
        };
        run(&mut self.planner, &world)
    }

    /// Plans without writing.
    fn ops(&mut self, vip: Vip, pool: Option<&Pool>) -> Plan {
        self.with_world(|planner, world| planner.plan(vip, pool, world))
    }

    fn plan(&mut self, vip: Vip, hosts: &[u8]) -> Plan {
        let hosts: BTreeSet<u8> = hosts.iter().copied().collect();
        self.plan_pool(vip, &pool_of(hosts.into_iter().map(backend)))
    }

    /// An empty pool is none.
    fn plan_pool(&mut self, vip: Vip, pool: &Pool) -> Plan {
        let plan = self.ops(vip, (!pool.backends.is_empty()).then_some(pool));
        for op in &plan.ops {
            self.kernel.apply(op);
        }
        plan
    }

    fn settle(&mut self, moved: u32) -> usize {
        let ops = self.planner.settle(self.now, |_| moved);
        for (_, op) in &ops {
            self.kernel.apply(op);
        }
        ops.len()
    }

    /// A new agent that finds what the kernel holds.
    fn restart(&mut self) {
        let (vips, backends) = self.limits;
        self.planner = Planner::new(vips, backends, HASH_KEYS, VIP_MASK);
        let installed = self.kernel.installed();
        for op in self.with_world(|planner, world| planner.adopt(installed, world)) {
            self.kernel.apply(&op);
        }
    }

    fn slots(&self, vip: Vip) -> &[RingSlot] {
        let (index, _) = self.kernel.entry(vip).expect("a VIP that is served");
        &self.kernel.rings[&index].slots
    }

    fn id(&self, host: u8) -> u32 {
        let is_it = |entry: &BackendEntry| entry.address == Addr::from(address(host).ip());
        let mut found = self.kernel.backends.iter();
        *found.find(|(_, entry)| is_it(entry)).expect("a backend").0
    }
}

fn hop(last: u8) -> NextHop {
    NextHop {
        ifindex: 3,
        source_mac: [2, 0, 0, 0, 0, 0],
        destination_mac: [2, 0, 0, 0, 0, last],
        source: IpAddr::from([10, 0, 0, 254]),
        mtu: 1500,
        vlan: 0,
        on_link: true,
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
    assert_eq!(bench.planner.due(bench.now), []);
    bench.now += DRAIN;
    assert_eq!(bench.planner.due(bench.now), [vip(1)]);
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
    assert_eq!(bench.planner.due(bench.now), []);
    bench.planner.end_drains(bench.now, |_| true);
    assert_eq!(bench.planner.due(bench.now), [vip(1)]);
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
fn all_backends_are_used_while_too_few_are_healthy() {
    let mut bench = Bench::new(4, 16);
    bench.panic_threshold = 50;
    bench.unhealthy.insert(address(1));
    bench.plan(vip(1), &[1, 2]);
    assert_eq!(bench.kernel.serving(vip(1)), addresses(&[2]));
    bench.unhealthy.insert(address(2));
    bench.plan(vip(1), &[1, 2, 3]);
    assert_eq!(bench.kernel.serving(vip(1)), addresses(&[1, 2, 3]));
    bench.draining.insert(address(1));
    bench.plan(vip(1), &[1, 2, 3]);
    assert_eq!(
        bench.kernel.serving(vip(1)),
        addresses(&[3]),
        "one of two is exactly the threshold"
    );
}

#[test]
fn a_backend_that_an_operator_drains_gets_no_new_flows_until_that_is_undone() {
    let mut bench = Bench::new(4, 16);
    bench.draining.insert(address(1));
    bench.plan(vip(1), &[1, 2]);
    assert_eq!(bench.kernel.serving(vip(1)), addresses(&[2]));
    assert_eq!(bench.kernel.backends.len(), 2, "its flows go on");
    bench.draining.remove(&address(1));
    bench.plan(vip(1), &[1, 2]);
    assert_eq!(bench.kernel.serving(vip(1)), addresses(&[1, 2]));
}

#[test]
fn a_backend_that_is_drained_for_one_vip_serves_the_others() {
    let mut bench = Bench::new(4, 16);
    bench.draining_at.insert((vip(1), address(1)));
    for number in [1, 2] {
        bench.plan(vip(number), &[1, 2]);
    }
    assert_eq!(bench.kernel.serving(vip(1)), addresses(&[2]));
    assert_eq!(bench.kernel.serving(vip(2)), addresses(&[1, 2]));
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
            for vip in bench.planner.due(bench.now) {
                let IpAddr::V4(v4) = vip.address else { unreachable!("all are IPv4") };
                bench.plan(vip, &wanted.get(&v4.octets()[3]).cloned().unwrap_or_default());
            }
            let hosts: Vec<u8> = hosts.into_iter().collect();
            prop_assert_eq!(bench.plan(vip(number), &hosts).refused, vec![]);
            wanted.insert(number, hosts);
            for (number, hosts) in &wanted {
                prop_assert_eq!(bench.kernel.serving(vip(*number)), addresses(hosts));
            }
            for entry in bench.kernel.vips.values() {
                prop_assert!(bench.kernel.prefilter_knows(entry.addr.ip(), VIP));
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
        for vip in bench.planner.due(bench.now) {
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
        bench.restart();
        for (number, hosts) in &wanted {
            prop_assert_eq!(bench.plan(vip(*number), hosts).ops, vec![]);
        }
        prop_assert_eq!(bench.kernel.backends, before.backends);
        bench.kernel.prefilter.retain(|_, bits| *bits != 0);
        let mut prefilter = before.prefilter;
        prefilter.retain(|_, bits| *bits != 0);
        prop_assert_eq!(bench.kernel.prefilter, prefilter);
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
        bench.restart();
        bench.plan(vip(1), &hosts(&after));
        prop_assert_eq!(bench.kernel.serving(vip(1)), addresses(&hosts(&after)));
        for entry in bench.kernel.vips.values() {
            prop_assert!(bench.kernel.prefilter_knows(entry.addr.ip(), VIP));
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
        bench.restart();
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
