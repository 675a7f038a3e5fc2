//! What the kernel's tables must hold for a snapshot, as ordered operations. Pure.
//!
//! [`Planner`] remembers what it last asked for, so the operations for one VIP cost what that VIP's
//! pool costs, whatever else is registered. Each list is safe to stop at any point: backends come
//! before the rings that name them and rings before their VIPs; what leaves goes the other way round.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use router_common::{
    Addr, BackendEntry, HASH_WORDS, IPPROTO_TCP, IPPROTO_UDP, Mode, QuicKey, RingSlot, Scheduler,
    SourceKey, VipEntry, vip_flags,
};

use crate::config::{FlowTimeouts, PortRange};
use crate::l4::maglev;
use crate::l4::next_hop::NextHop;
use crate::l4::policy::{Policies, VipPolicy};
use crate::route::{Pool, Proto, Vip};

use chains::Chains;
use indices::Indices;
use prefilter::Prefilter;
use ring::Ring;

mod adopt;
mod chains;
mod indices;
mod members;
mod prefilter;
mod ring;
mod sources;

/// One write to one map.
#[derive(Clone, Debug, PartialEq)]
pub enum MapOp {
    SetBackend {
        id: u32,
        entry: BackendEntry,
    },
    /// Leaves the generation behind: flows of whoever had the id must not pass for the next one's.
    ClearBackend {
        id: u32,
        generation: u16,
    },
    /// `RING_SIZE` slots.
    SetRing {
        vip: u32,
        slots: Box<[RingSlot]>,
    },
    /// All zero frees the index.
    SetVip {
        index: u32,
        entry: VipEntry,
    },
    /// Where a chain of VIPs begins: an index plus 1, or 0.
    SetVipHead {
        place: u32,
        first: u32,
    },
    /// How many VIPs have the address; 0 removes it.
    SetVipAddress {
        addr: Addr,
        vips: u32,
    },
    SetPrefilter {
        word: u32,
        bits: u64,
    },
    /// `prefix_len` counts bits of the address, 0..=128: an IPv4 prefix of n bits has 96 + n.
    SetSource {
        key: SourceKey,
        prefix_len: u8,
        verdict: u32,
    },
    RemoveSource {
        key: SourceKey,
        prefix_len: u8,
    },
    SetQuicServer {
        key: QuicKey,
        backend: u32,
    },
    RemoveQuicServer {
        key: QuicKey,
    },
    /// Whether answers may come from a backend's own address.
    SetDnat {
        in_use: bool,
    },
}

/// What the maps of an earlier agent hold, in use or not yet given up.
#[derive(Clone, Debug, Default)]
pub struct Installed {
    /// By index: entries that are not all zero.
    pub vips: Vec<(u32, VipEntry)>,
    /// By place: heads that are not 0.
    pub heads: Vec<(u32, u32)>,
    /// By id: backends in use, and free ids that have a generation.
    pub backends: Vec<(u32, BackendEntry)>,
    /// Of the VIPs above.
    pub rings: Vec<(u32, Box<[RingSlot]>)>,
    /// Key, bits of the address, verdict.
    pub sources: Vec<(SourceKey, u8, u32)>,
    pub quic_servers: Vec<(QuicKey, u32)>,
    pub dnat: bool,
}

/// Why a VIP or a backend of it is not served, though registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    VipsFull,
    BackendsFull,
    ChainFull,
    AddressFamily,
    NotOnLink,
    PortDiffers,
    /// The proxy on this host has no UDP.
    NotTcp,
    QuicServerId,
    QuicServerIdTaken,
}

impl Refusal {
    /// Whether it ends when others leave, without the registration or the configuration changing.
    pub fn is_for_room(self) -> bool {
        matches!(
            self,
            Refusal::VipsFull | Refusal::BackendsFull | Refusal::ChainFull
        )
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::VipsFull => "l4.limits.vips is reached",
            Refusal::BackendsFull => "l4.limits.backends is reached",
            Refusal::ChainFull => "too many VIPs of several ports have this address and protocol",
            Refusal::AddressFamily => {
                "nat, dnat and dsr forward to backends of the VIP's address family only"
            }
            Refusal::NotOnLink => "dsr reaches backends on the gateway's own networks only",
            Refusal::PortDiffers => "dsr, ipip and gue cannot change the port to another than the VIP's",
            Refusal::NotTcp => "l7 serves TCP only",
            Refusal::QuicServerId => {
                "its tag quic_server_id is not the hexadecimal form of l4.vip.quic.server_id_octets octets"
            }
            Refusal::QuicServerIdTaken => "another backend of the VIP has its quic_server_id",
        })
    }
}

/// What the plan of a VIP depends on beside its pool.
pub struct World<'a> {
    pub now: Instant,
    pub policies: &'a Policies,
    /// How long a flow without packets may be alive.
    pub timeouts: &'a FlowTimeouts,
    pub ticks_per_second: f64,
    pub next_hops: &'a HashMap<IpAddr, NextHop>,
    pub unhealthy: &'a imbl::HashSet<SocketAddr>,
    /// Percent of a VIP's backends that must be healthy; with fewer, all are used.
    pub panic_threshold: u8,
    /// Backends that an operator has drained.
    pub draining: &'a imbl::HashSet<SocketAddr>,
    /// The same for one VIP each.
    pub draining_at: &'a imbl::HashSet<(Vip, SocketAddr)>,
}

impl World<'_> {
    /// Whether an operator lets a VIP's backend have no new flows.
    fn drains(&self, vip: Vip, backend: SocketAddr) -> bool {
        self.draining.contains(&backend) || self.draining_at.contains(&(vip, backend))
    }

    /// When a flow of the VIP that has no packet from now on is over.
    fn flows_over(&self, proto: Proto) -> Instant {
        self.now
            + match proto {
                Proto::Tcp => self.timeouts.tcp_established,
                Proto::Udp => self.timeouts.udp,
            }
    }
}

/// The operations for one VIP, and what could not be done.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    pub ops: Vec<MapOp>,
    pub refused: Vec<(SocketAddr, Refusal)>,
}

/// The content of the kernel's tables, VIP by VIP.
pub struct Planner {
    vips: BTreeMap<Vip, PlannedVip>,
    indices: Indices,
    backends: Indices,
    /// The last generation given to each backend id.
    generations: Vec<u16>,
    chains: Chains,
    prefilter: Prefilter,
    vip_addresses: HashMap<Addr, u32>,
    /// Indices of VIPs whose backends answer from their own address.
    dnat: BTreeSet<u32>,
    dnat_in_use: bool,
}

/// A VIP as the kernel has it.
pub struct PlannedVip {
    index: u32,
    ring: Ring,
    /// But for its place in a chain.
    published: Option<VipEntry>,
    pub members: BTreeMap<SocketAddr, PlannedMember>,
    /// Key, bits of the address, verdict.
    sources: BTreeMap<(Addr, u8), u32>,
    quic_servers: BTreeMap<[u8; 8], u32>,
    /// In which answers may still come: that of the policy, and earlier ones.
    modes: BTreeSet<Mode>,
    /// Until when every flow is looked up, whatever the policy says, since it was another before.
    track_until: Option<Instant>,
    /// Whether the policy has every flow looked up.
    tracks: bool,
    slow_start: Duration,
    /// Found without registration when the maps were adopted: how long it waits for one.
    unclaimed_until: Option<Instant>,
}

#[derive(Clone, Debug)]
pub struct PlannedMember {
    pub id: u32,
    pub entry: BackendEntry,
    /// Set when the backend left its pool: when its flows are given up.
    pub drain_until: Option<Instant>,
    /// While it has less than its full share of new flows.
    ramp: Option<Ramp>,
    /// What the prefilter lets through on its account.
    answers: BTreeSet<Addr>,
}

/// A backend's way to its full share, in [`Ramp::STEPS`].
#[derive(Clone, Copy, Debug)]
struct Ramp {
    since: Instant,
    step: u32,
}

impl Planner {
    /// For maps of these capacities, all empty, with VIPs at their [`router_common::vip_head`] under
    /// `hash_keys` and `vip_mask`.
    pub fn new(
        max_vips: u32,
        max_backends: u32,
        hash_keys: [u64; HASH_WORDS],
        vip_mask: u32,
    ) -> Planner {
        Planner {
            vips: BTreeMap::new(),
            indices: Indices::new(0, max_vips),
            // Id 0 is "no backend".
            backends: Indices::new(1, max_backends),
            generations: vec![0; max_backends as usize + 1],
            chains: Chains::new(hash_keys, vip_mask),
            prefilter: Prefilter::default(),
            vip_addresses: HashMap::new(),
            dnat: BTreeSet::new(),
            dnat_in_use: false,
        }
    }

    pub fn vips(&self) -> &BTreeMap<Vip, PlannedVip> {
        &self.vips
    }

    /// Brings one VIP in line with its pool; `None` when nobody serves it any more.
    pub fn plan(&mut self, vip: Vip, pool: Option<&Pool>, world: &World<'_>) -> Plan {
        let mut plan = Plan::default();
        let policy = world.policies.policy_of(&vip);
        let can_be = policy.mode != Mode::L7 || vip.proto == Proto::Tcp;
        let claimed = can_be && (pool.is_some() || world.policies.is_declared(&vip));
        let mut planned = match self.vips.remove(&vip) {
            Some(planned) => planned,
            None if !can_be => {
                plan.refused = refuse_all(vip, pool, Refusal::NotTcp);
                return plan;
            }
            None if !claimed => return plan,
            None => match self.admit(vip) {
                Ok(index) => PlannedVip::new(index),
                Err(refusal) => {
                    plan.refused = refuse_all(vip, pool, refusal);
                    return plan;
                }
            },
        };
        if claimed {
            planned.unclaimed_until = None;
        }
        let wanted = members::wanted(vip, pool, planned.index, policy, world, &mut plan.refused);
        self.note_mode(vip, &mut planned, policy, world);
        self.set_members(&mut planned, &wanted, policy, world, &mut plan);
        self.set_vip(vip, &mut planned, policy, world, &mut plan.ops);
        self.withdraw_members(&mut planned, &wanted, world.now, &mut plan.ops);
        if planned
            .unclaimed_until
            .is_some_and(|until| until <= world.now)
        {
            planned.unclaimed_until = None;
        }
        let waits = planned.unclaimed_until.is_some();
        if claimed || waits || !planned.members.is_empty() {
            self.vips.insert(vip, planned);
        } else {
            self.remove_vip(planned, &mut plan.ops);
        }
        plan
    }

    /// Ends the drain of backends that no flow uses any more, by the flow table.
    pub fn end_drains(&mut self, now: Instant, unused: impl Fn(u32) -> bool) {
        for planned in self.vips.values_mut() {
            let mut ending: Vec<&mut PlannedMember> = planned
                .members
                .values_mut()
                .filter(|member| member.drain_until.is_some_and(|until| until > now))
                .filter(|member| unused(member.id))
                .collect();
            if ending.is_empty() {
                continue;
            }
            // The flow table does not know of flows that the ring alone has placed.
            let remembered = planned.ring.remembered();
            ending.retain(|member| !remembered.contains(&member.id));
            for member in ending {
                member.drain_until = Some(now);
            }
        }
    }

    /// Forgets where flows were that are over, after a sweep of the whole flow table that found `moved`
    /// flows, by VIP index, on another backend than their slot of the ring says.
    pub fn settle(&mut self, now: Instant, moved: impl Fn(u32) -> u32) -> Vec<(Vip, MapOp)> {
        let mut ops = Vec::new();
        let vips: Vec<Vip> = self.vips.keys().copied().collect();
        for vip in vips {
            let mut planned = self.vips.remove(&vip).expect("listed above");
            let mut of_vip = Vec::new();
            let mut changed = planned.ring.expire(now);
            // What the sweep found holds for the ring that it went by.
            let settled = planned.ring.is_settled() && moved(planned.index) == 0;
            if settled && planned.ring.backends() > 0 {
                changed |= planned.ring.quiet();
            }
            if changed {
                of_vip.push(planned.write_ring());
            }
            let waited = planned.track_until.is_some_and(|until| until <= now);
            if waited && (settled || planned.always_asks()) {
                self.end_track(&mut planned, &mut of_vip);
            }
            self.vips.insert(vip, planned);
            ops.extend(of_vip.into_iter().map(|op| (vip, op)));
        }
        ops
    }

    /// Whether there is room for a VIP, or a backend, that was refused before.
    pub fn has_room(&self) -> bool {
        self.indices.has_room() && self.backends.has_room()
    }

    /// VIPs that time alone has changed: a drain is over, or a backend's share grows.
    pub fn due(&self, now: Instant) -> Vec<Vip> {
        let vips = self.vips.iter().filter(|(_, planned)| planned.is_due(now));
        vips.map(|(vip, _)| *vip).collect()
    }

    /// An index for a VIP that is new.
    fn admit(&mut self, vip: Vip) -> Result<u32, Refusal> {
        if !self.chains.has_room(&key_of(vip)) {
            return Err(Refusal::ChainFull);
        }
        self.indices.give().ok_or(Refusal::VipsFull)
    }

    /// Takes note when flows are made in another way from here on: the others must still be found.
    fn note_mode(
        &mut self,
        vip: Vip,
        planned: &mut PlannedVip,
        policy: &VipPolicy,
        world: &World<'_>,
    ) {
        planned.modes.insert(policy.mode);
        planned.slow_start = policy.slow_start;
        planned.tracks = policy.tracks();
        if let Some(before) = &planned.published {
            let changed =
                before.mode != policy.mode as u8 || before.scheduler != policy.scheduler as u8;
            let tracked = before.flags & vip_flags::TRACK != 0;
            let untracked = tracked && !policy.tracks() && planned.track_until.is_none();
            if changed || untracked {
                planned.track_until = Some(world.flows_over(vip.proto));
            }
        }
    }

    /// Brings the VIP itself in line, with its ring and its list of sources.
    fn set_vip(
        &mut self,
        vip: Vip,
        planned: &mut PlannedVip,
        policy: &VipPolicy,
        world: &World<'_>,
        ops: &mut Vec<MapOp>,
    ) {
        let sources = sources::of(policy);
        planned.add_sources(&sources, ops);
        if planned.modes.contains(&Mode::Dnat) {
            self.dnat.insert(planned.index);
            self.write_dnat(ops);
        }
        let before = planned.published;
        let ring = planned.ring_plan(policy.scheduler, policy.mode);
        let ring_changed = planned.ring.set(ring, world.flows_over(vip.proto));
        let entry = planned.entry(vip, policy, world);
        // A ring of turns says nothing of where flows are: none may be placed by it as by a hash.
        let vip_first = before.is_some_and(|before| {
            let hashed = Scheduler::from_bits(before.scheduler).is_hash();
            hashed && !policy.scheduler.is_hash() && before.backends > 0 && entry.backends > 0
        });
        if ring_changed && !vip_first {
            ops.push(planned.write_ring());
        }
        if before != Some(entry) {
            self.chains.set(planned.index, entry, ops);
            planned.published = Some(entry);
        }
        if ring_changed && vip_first {
            ops.push(planned.write_ring());
        }
        if before.is_none() {
            self.add_vip_address(entry.addr, ops);
        }
        planned.remove_sources(&sources, ops);
    }

    /// Flows of earlier modes and schedulers are over.
    fn end_track(&mut self, planned: &mut PlannedVip, ops: &mut Vec<MapOp>) {
        planned.track_until = None;
        let Some(mut entry) = planned.published else {
            return;
        };
        let mode = Mode::from_bits(entry.mode);
        if !planned.tracks {
            entry.flags &= !vip_flags::TRACK;
        }
        if planned.published != Some(entry) {
            self.chains.set(planned.index, entry, ops);
            planned.published = Some(entry);
        }
        planned.modes = BTreeSet::from([mode]);
        for member in planned.members.values_mut() {
            self.prefilter.let_answers(member, &planned.modes, ops);
        }
        if !planned.modes.contains(&Mode::Dnat) {
            self.dnat.remove(&planned.index);
            self.write_dnat(ops);
        }
    }

    fn remove_vip(&mut self, planned: PlannedVip, ops: &mut Vec<MapOp>) {
        if let Some(entry) = planned.published {
            self.remove_vip_address(entry.addr, ops);
            self.chains.remove(planned.index, &entry, ops);
        }
        for &(source, prefix_len) in planned.sources.keys() {
            let key = sources::key(planned.index, source);
            ops.push(MapOp::RemoveSource { key, prefix_len });
        }
        self.indices.release(planned.index);
        self.dnat.remove(&planned.index);
        self.write_dnat(ops);
    }

    fn write_dnat(&mut self, ops: &mut Vec<MapOp>) {
        let in_use = !self.dnat.is_empty();
        if in_use != self.dnat_in_use {
            self.dnat_in_use = in_use;
            ops.push(MapOp::SetDnat { in_use });
        }
    }

    fn add_vip_address(&mut self, addr: Addr, ops: &mut Vec<MapOp>) {
        let vips = self.vip_addresses.entry(addr).or_default();
        *vips += 1;
        ops.push(MapOp::SetVipAddress { addr, vips: *vips });
        self.prefilter.add(addr, prefilter::VIP, ops);
    }

    fn remove_vip_address(&mut self, addr: Addr, ops: &mut Vec<MapOp>) {
        self.prefilter.remove(addr, prefilter::VIP, ops);
        let vips = self
            .vip_addresses
            .get_mut(&addr)
            .expect("added with the VIP");
        *vips -= 1;
        ops.push(MapOp::SetVipAddress { addr, vips: *vips });
        if *vips == 0 {
            self.vip_addresses.remove(&addr);
        }
    }
}

impl PlannedVip {
    fn new(index: u32) -> PlannedVip {
        PlannedVip {
            index,
            ring: Ring::new(),
            published: None,
            members: BTreeMap::new(),
            sources: BTreeMap::new(),
            quic_servers: BTreeMap::new(),
            modes: BTreeSet::new(),
            tracks: false,
            track_until: None,
            slow_start: Duration::ZERO,
            unclaimed_until: None,
        }
    }

    /// Its place in `VIPS` and `RINGS`.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The backends that take new flows, with their present shares.
    fn ring_plan(&self, scheduler: Scheduler, mode: Mode) -> ring::Plan {
        let active = self.members.iter().filter(|(_, member)| member.is_active());
        let members = active.map(|(address, member)| maglev::Member {
            address: *address,
            weight: member.ring_weight(),
            id: member.id,
        });
        ring::Plan {
            kind: match scheduler {
                Scheduler::RoundRobin => ring::Kind::Cycle,
                Scheduler::Maglev | Scheduler::SourceHash | Scheduler::LeastConnections => {
                    ring::Kind::Maglev
                }
            },
            remembers: decides(scheduler, mode),
            members: members.collect(),
        }
    }

    fn entry(&self, vip: Vip, policy: &VipPolicy, world: &World<'_>) -> VipEntry {
        let mut flags = sources::flags(policy);
        let on = |flag: u8, condition: bool| if condition { flag } else { 0 };
        flags |= on(
            vip_flags::TRACK,
            policy.tracks() || self.track_until.is_some(),
        );
        flags |= on(vip_flags::SILENT, policy.silent);
        flags |= on(vip_flags::QUIC, policy.quic.is_some());
        flags |= on(vip_flags::CHALLENGE, policy.challenge);
        let ticks = |time: Duration| (time.as_secs_f64() * world.ticks_per_second).ceil() as u32;
        let a_tick = |a_second: u32| (f64::from(a_second) / world.ticks_per_second).ceil() as u32;
        VipEntry {
            mode: policy.mode as u8,
            scheduler: policy.scheduler as u8,
            flags,
            backends: self.ring.backends(),
            ring_len: self.ring.len(),
            affinity: policy.affinity.map_or(0, ticks),
            source_rate: a_tick(policy.source_rate),
            vip_rate: a_tick(policy.vip_rate),
            quic_len: policy.quic.map_or(0, |quic| quic.server_id_octets),
            quic_config: policy.quic.map_or(0, |quic| quic.config),
            ..key_of(vip)
        }
    }

    /// Whether the flow table is asked for every packet, of whatever flows the ring knows.
    fn always_asks(&self) -> bool {
        let published = self.published.unwrap_or_default();
        let scheduler = Scheduler::from_bits(published.scheduler);
        self.tracks || !decides(scheduler, Mode::from_bits(published.mode))
    }

    fn write_ring(&self) -> MapOp {
        MapOp::SetRing {
            vip: self.index,
            slots: self.ring.slots().into(),
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        let waited = self.unclaimed_until.is_some_and(|until| until <= now);
        let member_is_due = |member: &PlannedMember| {
            let drained = member.drain_until.is_some_and(|until| until <= now);
            let grows = |ramp: Ramp| ramp.step != Ramp::step(ramp.since, now, self.slow_start);
            drained || member.ramp.is_some_and(grows)
        };
        waited || self.members.values().any(member_is_due)
    }
}

/// Whether a quiet slot of the ring alone says where its flows are.
fn decides(scheduler: Scheduler, mode: Mode) -> bool {
    scheduler.is_hash() && !mode.translates()
}

/// An entry of which nothing is said but what it covers.
fn key_of(vip: Vip) -> VipEntry {
    VipEntry {
        addr: Addr::from(vip.address),
        port_first: vip.ports.first,
        port_last: vip.ports.last,
        proto: match vip.proto {
            Proto::Tcp => IPPROTO_TCP,
            Proto::Udp => IPPROTO_UDP,
        },
        ..VipEntry::default()
    }
}

fn vip_of(entry: &VipEntry) -> Vip {
    Vip {
        proto: match entry.proto {
            IPPROTO_UDP => Proto::Udp,
            _ => Proto::Tcp,
        },
        address: entry.addr.ip(),
        ports: PortRange {
            first: entry.port_first,
            last: entry.port_last,
        },
    }
}

/// A VIP that needs no backend stands for itself.
fn refuse_all(vip: Vip, pool: Option<&Pool>, refusal: Refusal) -> Vec<(SocketAddr, Refusal)> {
    match pool {
        Some(pool) => {
            let backends = pool.backends.iter();
            backends.map(|backend| (backend.address, refusal)).collect()
        }
        None => vec![(SocketAddr::new(vip.address, vip.ports.first), refusal)],
    }
}

#[cfg(test)]
mod tests;
