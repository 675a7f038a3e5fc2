//! Established flows against a model of how the program finds their backend.

use router_common::ring_slot;

use super::*;

/// A TCP connection that a client opened.
#[derive(Clone, Debug)]
struct Flow {
    vip: Vip,
    hash: u32,
    backend: (u32, u16),
    seen: Instant,
}

/// The flow table, and the lookup of the modes whose answers do not come back here.
#[derive(Default)]
struct Program {
    /// Backend and generation of a flow, and when its last packet came.
    table: BTreeMap<(Vip, u32), (u32, u16, Instant)>,
}

const LIFETIME: Duration = Duration::from_secs(300);

impl Program {
    /// Where a packet goes.
    fn packet(
        &mut self,
        kernel: &Kernel,
        (vip, hash): (Vip, u32),
        opens: bool,
        now: Instant,
    ) -> Option<(u32, u16)> {
        let (index, entry) = kernel.entry(vip)?;
        let ring = kernel.rings.get(&index)?;
        let scheduler = Scheduler::from_bits(entry.scheduler);
        let slot = ring.slots[ring_slot(hash, entry.ring_len)];
        let tracked = entry.flags & vip_flags::TRACK != 0 || !scheduler.is_hash();
        let asks = tracked || !slot.is_quiet();
        if let Some(&(id, generation, _)) = self.table.get(&(vip, hash)).filter(|_| asks)
            && let Some(backend) = kernel.backends.get(&id)
            && (backend.generation, backend.vip) == (generation, index)
        {
            self.table.insert((vip, hash), (id, generation, now));
            return Some((id, generation));
        }
        let older = !opens && !slot.is_quiet() && slot.previous() != RingSlot::NOBODY;
        let id = if older {
            slot.previous()
        } else if entry.backends > 0 {
            slot.current()
        } else {
            return None;
        };
        let generation = kernel.backends[&id].generation;
        if asks {
            self.table.insert((vip, hash), (id, generation, now));
        }
        Some((id, generation))
    }

    /// Forgets what is over; says which VIPs have flows elsewhere than their slot says, and which
    /// backends have flows.
    fn sweep(&mut self, kernel: &Kernel, now: Instant) -> (BTreeMap<u32, u32>, BTreeSet<u32>) {
        self.table.retain(|_, (.., seen)| now < *seen + LIFETIME);
        let mut moved = BTreeMap::new();
        let mut used = BTreeSet::new();
        for ((vip, hash), (id, ..)) in &self.table {
            used.insert(*id);
            let Some((index, entry)) = kernel.entry(*vip) else {
                continue;
            };
            let slot = kernel.rings[&index].slots[ring_slot(*hash, entry.ring_len)];
            if slot.current() != *id {
                *moved.entry(index).or_default() += 1;
            }
        }
        (moved, used)
    }
}

#[derive(Clone, Debug)]
enum Step {
    Pool(u8, BTreeSet<u8>),
    Health(u8, bool),
    Forwarding(usize),
    Affinity(bool),
    Open(u8, u32),
    /// All flows send, of those that are not idle for long.
    Send,
    Wait(u64),
    Sweep,
    Settle,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1u8..3, prop::collection::btree_set(1u8..6, 0..5)).prop_map(|(v, p)| Step::Pool(v, p)),
        1 => (1u8..6, any::<bool>()).prop_map(|(host, up)| Step::Health(host, up)),
        1 => (0usize..3).prop_map(Step::Forwarding),
        1 => any::<bool>().prop_map(Step::Affinity),
        4 => (1u8..3, any::<u32>()).prop_map(|(vip, hash)| Step::Open(vip, hash)),
        2 => Just(Step::Send),
        2 => (1u64..200).prop_map(Step::Wait),
        2 => Just(Step::Sweep),
        2 => Just(Step::Settle),
        1 => Just(Step::Restart),
    ]
}

/// A gateway under a sequence of steps.
struct Gateway {
    bench: Bench,
    program: Program,
    flows: Vec<Flow>,
    pools: BTreeMap<Vip, Vec<u8>>,
    /// What the last sweep found, until it is settled by.
    swept: Option<BTreeMap<u32, u32>>,
}

impl Gateway {
    fn new(scheduler: Schedule) -> Gateway {
        let mut bench = Bench::new(2, 64).forwarding(Forwarding::Ipip);
        bench.config.timeouts.tcp_established = LIFETIME;
        bench.config.scheduler = scheduler;
        Gateway {
            bench,
            program: Program::default(),
            flows: Vec::new(),
            pools: BTreeMap::new(),
            swept: None,
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Pool(number, hosts) => {
                let hosts: Vec<u8> = hosts.into_iter().collect();
                self.pools.insert(vip(number), hosts);
                self.plan(vip(number));
            }
            Step::Health(host, true) => self.change(|bench| {
                bench.unhealthy.remove(&address(host));
            }),
            Step::Health(host, false) => self.change(|bench| {
                bench.unhealthy.insert(address(host));
            }),
            Step::Forwarding(which) => self.change(|bench| {
                let one_way = [Forwarding::Dsr, Forwarding::Ipip, Forwarding::Gue];
                bench.config.forwarding = one_way[which];
            }),
            Step::Affinity(on) => self.change(|bench| {
                let vip = VipConfig {
                    affinity: on.then_some(LIFETIME),
                    ..VipConfig::new(vip(1))
                };
                bench.config.vip = vec![vip];
            }),
            Step::Open(number, hash) => {
                let (vip, now) = (vip(number), self.bench.now);
                self.flows
                    .retain(|flow| (flow.vip, flow.hash) != (vip, hash));
                let backend = self
                    .program
                    .packet(&self.bench.kernel, (vip, hash), true, now);
                self.flows.extend(backend.map(|backend| Flow {
                    vip,
                    hash,
                    backend,
                    seen: now,
                }));
            }
            Step::Send => self.send(|_| true),
            Step::Wait(seconds) => {
                self.bench.now += Duration::from_secs(seconds);
                let now = self.bench.now;
                self.flows.retain(|flow| now < flow.seen + LIFETIME);
                for vip in self.bench.planner.due(now) {
                    self.plan(vip);
                }
            }
            Step::Sweep => {
                let (moved, used) = self.program.sweep(&self.bench.kernel, self.bench.now);
                self.swept.get_or_insert(moved);
                let unused = |id| !used.contains(&id);
                let before = self.given_up();
                self.bench.planner.end_drains(self.bench.now, unused);
                let given_up = self.given_up();
                let early = |flow: &&Flow| {
                    let id = flow.backend.0;
                    given_up.contains(&id) && !before.contains(&id)
                };
                assert_eq!(self.flows.iter().find(early).map(|flow| flow.hash), None);
            }
            Step::Settle => {
                let (now_moved, _) = self.program.sweep(&self.bench.kernel, self.bench.now);
                let moved = self.swept.take().unwrap_or(now_moved);
                let of = |index: u32| moved.get(&index).copied().unwrap_or(0);
                let ops = self.bench.planner.settle(self.bench.now, of);
                self.write(ops.into_iter().map(|(_, op)| op));
            }
            Step::Restart => {
                self.bench.restart();
                self.send(|_| true);
                self.swept = None;
                let vips: Vec<Vip> = self.pools.keys().copied().collect();
                vips.into_iter().for_each(|vip| self.plan(vip));
            }
        }
    }

    fn change(&mut self, change: impl FnOnce(&mut Bench)) {
        change(&mut self.bench);
        let vips: Vec<Vip> = self.pools.keys().copied().collect();
        vips.into_iter().for_each(|vip| self.plan(vip));
    }

    fn plan(&mut self, vip: Vip) {
        let hosts = self.pools.get(&vip).cloned().unwrap_or_default();
        let pool = pool_of(hosts.into_iter().map(backend));
        let pool = (!pool.backends.is_empty()).then_some(&pool);
        let given_up = self.given_up();
        self.flows
            .retain(|flow| !given_up.contains(&flow.backend.0));
        let plan = self.bench.ops(vip, pool);
        assert_eq!(plan.refused, []);
        self.write(plan.ops);
    }

    /// Backends whose drain is over.
    fn given_up(&self) -> BTreeSet<u32> {
        let planned = self.bench.planner.vips().values();
        let members = planned.flat_map(|planned| planned.members.values());
        let over = |member: &&PlannedMember| {
            let until = member.drain_until;
            until.is_some_and(|until| until <= self.bench.now)
        };
        members.filter(over).map(|member| member.id).collect()
    }

    /// Some of the flows send between any two writes.
    fn write(&mut self, ops: impl IntoIterator<Item = MapOp>) {
        for (i, op) in ops.into_iter().enumerate() {
            self.bench.kernel.apply(&op);
            self.send(|hash| (hash as usize).wrapping_add(i) % 3 == 0);
        }
    }

    fn send(&mut self, sends: impl Fn(u32) -> bool) {
        let (kernel, now) = (&self.bench.kernel, self.bench.now);
        let lives = |flow: &Flow| {
            let backend = kernel.backends.get(&flow.backend.0);
            backend.is_some_and(|backend| backend.generation == flow.backend.1)
        };
        self.flows.retain(lives);
        for flow in self.flows.iter_mut().filter(|flow| sends(flow.hash)) {
            let key = (flow.vip, flow.hash);
            let backend = self.program.packet(kernel, key, false, now);
            assert_eq!(backend, Some(flow.backend), "{flow:?} moved");
            flow.seen = now;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn an_established_flow_stays_while_its_backend_lives_or_drains(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut gateway = Gateway::new(Schedule::Maglev);
        steps.into_iter().for_each(|step| gateway.take(step));
        gateway.send(|_| true);
    }

    #[test]
    fn a_flow_placed_by_turns_stays_while_its_backend_lives_or_drains(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut gateway = Gateway::new(Schedule::RoundRobin);
        steps.into_iter().for_each(|step| gateway.take(step));
        gateway.send(|_| true);
    }
}
