//! What the kernel's tables must hold for a snapshot, as ordered operations. Pure.
//!
//! [`Planner`] remembers what it last asked for, so the operations for one VIP cost what that VIP's
//! pool costs, whatever else is registered. Each list is safe to stop at any point: backends come
//! before the rings that name them and rings before their VIPs; what leaves goes the other way round.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use router_common::{
    Addr, BackendEntry, BackendState, IPPROTO_TCP, IPPROTO_UDP, PREFILTER_WORDS, VipInfo, VipKey,
    prefilter_bit,
};

use crate::l4::maglev;
use crate::l4::next_hop::NextHop;
use crate::route::{Pool, Proto, Vip};

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
    /// The VIP or the backend is not IPv4.
    AddressFamily,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::VipsFull => "l4.limits.vips is reached",
            Refusal::BackendsFull => "l4.limits.backends is reached",
            Refusal::AddressFamily => "nat forwards IPv4 VIPs to IPv4 backends only",
        })
    }
}

/// What the plan of a VIP depends on beside its pool.
pub struct World<'a> {
    pub now: Instant,
    pub drain: Duration,
    pub next_hops: &'a HashMap<IpAddr, NextHop>,
    pub unhealthy: &'a imbl::HashSet<SocketAddr>,
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
    rings: Slots,
    backends: Slots,
    /// The last generation given to each backend id.
    generations: Vec<u16>,
    prefilter: Prefilter,
    vip_addresses: HashMap<Addr, u32>,
}

/// A VIP as the kernel has it.
#[derive(Debug)]
pub struct PlannedVip {
    ring: u32,
    /// What the ring was built from; empty when the VIP has no backend.
    in_ring: Vec<maglev::Member>,
    published: Option<VipInfo>,
    pub members: BTreeMap<SocketAddr, PlannedMember>,
}

impl PlannedVip {
    fn new(ring: u32) -> PlannedVip {
        PlannedVip {
            ring,
            in_ring: Vec::new(),
            published: None,
            members: BTreeMap::new(),
        }
    }
}

#[derive(Clone, Debug)]
pub struct PlannedMember {
    pub id: u32,
    pub entry: BackendEntry,
    /// Set when the backend left its pool: when its flows are given up.
    pub drain_until: Option<Instant>,
}

impl PlannedMember {
    pub fn state(&self) -> BackendState {
        if self.entry.state == BackendState::Active as u8 {
            BackendState::Active
        } else {
            BackendState::Draining
        }
    }
}

impl Planner {
    /// For maps of these capacities, all empty.
    pub fn new(max_vips: u32, max_backends: u32) -> Planner {
        Planner {
            vips: BTreeMap::new(),
            rings: Slots::new(0, max_vips),
            // Id 0 is "no backend".
            backends: Slots::new(1, max_backends),
            generations: vec![0; max_backends as usize + 1],
            prefilter: Prefilter::default(),
            vip_addresses: HashMap::new(),
        }
    }

    pub fn vips(&self) -> &BTreeMap<Vip, PlannedVip> {
        &self.vips
    }

    /// Takes over what the maps of an earlier agent hold. What it was draining drains anew.
    ///
    /// That agent may have ended between any two operations. The ones returned make whole what it
    /// left: every ring is written again from its backends, what belongs to nothing is cleared.
    pub fn adopt(
        &mut self,
        vips: Vec<(VipKey, VipInfo)>,
        backends: Vec<(u32, BackendEntry)>,
        now: Instant,
        drain: Duration,
    ) -> Vec<MapOp> {
        let mut ops = Vec::new();
        let mut found: BTreeMap<Vip, (VipKey, VipInfo)> = BTreeMap::new();
        for (key, info) in vips {
            found.insert(vip_of(key.addr(), key.port(), key.proto()), (key, info));
        }
        for (id, entry) in backends {
            self.generations[id as usize] = entry.generation;
            if entry.state == BackendState::Free as u8 {
                continue;
            }
            let vip = vip_of(entry.vip, entry.vip_port, entry.proto);
            let Some((_, info)) = found.get(&vip) else {
                let generation = entry.generation;
                ops.push(MapOp::ClearBackend { id, generation });
                continue;
            };
            self.backends.take(id);
            let planned = self
                .vips
                .entry(vip)
                .or_insert_with(|| PlannedVip::new(info.ring));
            let active = entry.state == BackendState::Active as u8;
            let member = PlannedMember {
                id,
                entry,
                drain_until: (!active).then_some(now + drain),
            };
            let address = SocketAddr::new(entry.address.ip(), entry.port);
            planned.members.insert(address, member);
        }
        for (vip, (key, info)) in found {
            if !self.vips.contains_key(&vip) {
                ops.push(MapOp::RemoveVip { key });
                continue;
            }
            self.rings.take(info.ring);
            let mut plan = Plan::default();
            self.set_ring(vip, &mut plan);
            ops.append(&mut plan.ops);
        }
        self.adopt_prefilter(&mut ops);
        ops
    }

    /// Writes each word of the prefilter once: the programs look at it all the while.
    fn adopt_prefilter(&mut self, ops: &mut Vec<MapOp>) {
        let mut unordered = Vec::new();
        for planned in self.vips.values() {
            for member in planned.members.values() {
                self.prefilter
                    .add(member.entry.source, ANSWER, &mut unordered);
            }
        }
        let words: BTreeMap<u32, MapOp> = ops
            .extract_if(.., |op| matches!(op, MapOp::SetPrefilter { .. }))
            .chain(unordered)
            .filter_map(|op| match op {
                MapOp::SetPrefilter { word, .. } => Some((word, op)),
                _ => None,
            })
            .collect();
        ops.extend(words.into_values());
    }

    /// Brings one VIP in line with its pool; `None` when nobody serves it any more.
    pub fn plan(&mut self, vip: Vip, pool: Option<&Pool>, world: &World<'_>) -> Plan {
        let mut plan = Plan::default();
        if !vip.address.is_ipv4() {
            let backends = pool.into_iter().flat_map(|pool| &pool.backends);
            plan.refused
                .extend(backends.map(|backend| (backend.address, Refusal::AddressFamily)));
            return plan;
        }
        if !self.vips.contains_key(&vip) {
            let Some(pool) = pool else { return plan };
            let Some(ring) = self.rings.free() else {
                let all = pool
                    .backends
                    .iter()
                    .map(|backend| (backend.address, Refusal::VipsFull));
                plan.refused.extend(all);
                return plan;
            };
            self.vips.insert(vip, PlannedVip::new(ring));
        }
        let wanted = self.wanted(vip, pool, world, &mut plan);
        self.set_members(vip, &wanted, world, &mut plan);
        self.set_ring(vip, &mut plan);
        self.withdraw_members(vip, &wanted, world, &mut plan);
        self.drop_if_empty(vip, pool.is_none(), &mut plan);
        plan
    }

    /// Ends the drain of backends that no flow uses any more.
    pub fn end_drains(&mut self, now: Instant, unused: impl Fn(u32) -> bool) {
        for planned in self.vips.values_mut() {
            for member in planned.members.values_mut() {
                if member.drain_until.is_some_and(|until| until > now) && unused(member.id) {
                    member.drain_until = Some(now);
                }
            }
        }
    }

    /// Whether there is room for a VIP, or a backend, that was refused before.
    pub fn has_room(&self) -> bool {
        self.rings.has_room() && self.backends.has_room()
    }

    /// VIPs with a member whose drain is over.
    pub fn drained(&self, now: Instant) -> Vec<Vip> {
        let over = |member: &PlannedMember| member.drain_until.is_some_and(|until| until <= now);
        let vips = self
            .vips
            .iter()
            .filter(|(_, planned)| planned.members.values().any(over));
        vips.map(|(vip, _)| *vip).collect()
    }

    /// The pool's backends that can be reached, with the entry each should have but for its id.
    fn wanted(
        &self,
        vip: Vip,
        pool: Option<&Pool>,
        world: &World<'_>,
        plan: &mut Plan,
    ) -> BTreeMap<SocketAddr, BackendEntry> {
        let mut wanted = BTreeMap::new();
        for backend in pool.into_iter().flat_map(|pool| &pool.backends) {
            let address = backend.address;
            if !address.is_ipv4() {
                plan.refused.push((address, Refusal::AddressFamily));
                continue;
            }
            // Without a next hop there is nowhere to send; the VIP is planned again when it is known.
            let Some(hop) = world.next_hops.get(&address.ip()) else {
                continue;
            };
            let entry = BackendEntry {
                vip: Addr::from(vip.address),
                address: Addr::from(address.ip()),
                source: Addr::from(hop.source),
                ifindex: hop.ifindex,
                vip_port: vip.port,
                port: address.port(),
                generation: 0,
                destination_mac: hop.destination_mac,
                source_mac: hop.source_mac,
                proto: proto_number(vip.proto),
                state: BackendState::Active as u8,
                weight: backend.weight,
                reserved: [0; 2],
            };
            wanted.insert(address, entry);
        }
        // An unhealthy backend gets no new flows, unless that would leave none.
        let healthy = |address: &SocketAddr| !world.unhealthy.contains(address);
        if wanted.keys().any(healthy) {
            for (address, entry) in &mut wanted {
                if !healthy(address) {
                    entry.state = BackendState::Draining as u8;
                }
            }
        }
        wanted
    }

    /// Writes the backends that are new or changed, all but those that leave the ring.
    fn set_members(
        &mut self,
        vip: Vip,
        wanted: &BTreeMap<SocketAddr, BackendEntry>,
        world: &World<'_>,
        plan: &mut Plan,
    ) {
        for (address, entry) in wanted {
            let planned = self.vips.get_mut(&vip).expect("planned above");
            let mut entry = *entry;
            if let Some(member) = planned.members.get_mut(address) {
                entry.generation = member.entry.generation;
                member.drain_until = None;
                if member.entry == entry {
                    continue;
                }
                if member.entry.source != entry.source {
                    let old = member.entry.source;
                    self.prefilter.add(entry.source, ANSWER, &mut plan.ops);
                    self.prefilter.remove(old, ANSWER, &mut plan.ops);
                    // Answers to the old address no longer find their flows: end those.
                    entry.generation = next_generation(&mut self.generations, member.id);
                }
                member.entry = entry;
                plan.ops.push(MapOp::SetBackend {
                    id: member.id,
                    entry,
                });
                continue;
            }
            let Some(id) = self.backends.free() else {
                plan.refused.push((*address, Refusal::BackendsFull));
                continue;
            };
            entry.generation = next_generation(&mut self.generations, id);
            let member = PlannedMember {
                id,
                entry,
                drain_until: None,
            };
            planned.members.insert(*address, member);
            self.prefilter.add(entry.source, ANSWER, &mut plan.ops);
            plan.ops.push(MapOp::SetBackend { id, entry });
        }
        // Those that left the pool go on draining; the ring below is built without them.
        let planned = self.vips.get_mut(&vip).expect("planned above");
        for (address, member) in &mut planned.members {
            if !wanted.contains_key(address) && member.drain_until.is_none() {
                member.drain_until = Some(world.now + world.drain);
            }
        }
    }

    fn set_ring(&mut self, vip: Vip, plan: &mut Plan) {
        let planned = self.vips.get_mut(&vip).expect("planned above");
        let active = planned.members.iter().filter(|(_, member)| {
            member.drain_until.is_none() && member.entry.state == BackendState::Active as u8
        });
        let in_ring: Vec<maglev::Member> = active
            .map(|(address, member)| maglev::Member {
                address: *address,
                weight: member.entry.weight,
                id: member.id,
            })
            .collect();
        if in_ring != planned.in_ring {
            if let Some(slots) = maglev::ring(&in_ring) {
                plan.ops.push(MapOp::SetRing {
                    ring: planned.ring,
                    slots,
                });
            }
            planned.in_ring = in_ring;
        }
        let info = VipInfo {
            ring: planned.ring,
            backends: planned.in_ring.len() as u32,
        };
        let first = planned.published.is_none();
        if planned.published != Some(info) {
            planned.published = Some(info);
            plan.ops.push(MapOp::SetVip {
                key: key_of(vip),
                info,
            });
        }
        if first {
            self.add_vip_address(vip, &mut plan.ops);
        }
    }

    /// Marks members that left as draining in the kernel and clears those whose drain is over.
    fn withdraw_members(
        &mut self,
        vip: Vip,
        wanted: &BTreeMap<SocketAddr, BackendEntry>,
        world: &World<'_>,
        plan: &mut Plan,
    ) {
        let planned = self.vips.get_mut(&vip).expect("planned above");
        let mut over = Vec::new();
        for (address, member) in &mut planned.members {
            let Some(until) = member.drain_until else {
                continue;
            };
            if wanted.contains_key(address) {
                continue;
            }
            if until <= world.now {
                over.push(*address);
            } else if member.entry.state != BackendState::Draining as u8 {
                member.entry.state = BackendState::Draining as u8;
                plan.ops.push(MapOp::SetBackend {
                    id: member.id,
                    entry: member.entry,
                });
            }
        }
        for address in over {
            let planned = self.vips.get_mut(&vip).expect("planned above");
            let member = planned.members.remove(&address).expect("found above");
            plan.ops.push(MapOp::ClearBackend {
                id: member.id,
                generation: member.entry.generation,
            });
            self.backends.release(member.id);
            self.prefilter
                .remove(member.entry.source, ANSWER, &mut plan.ops);
        }
    }

    fn drop_if_empty(&mut self, vip: Vip, withdrawn: bool, plan: &mut Plan) {
        let planned = &self.vips[&vip];
        if !withdrawn || !planned.members.is_empty() {
            return;
        }
        let (ring, published) = (planned.ring, planned.published.is_some());
        self.vips.remove(&vip);
        self.rings.release(ring);
        if published {
            self.remove_vip_address(vip, &mut plan.ops);
            plan.ops.push(MapOp::RemoveVip { key: key_of(vip) });
        }
    }

    fn add_vip_address(&mut self, vip: Vip, ops: &mut Vec<MapOp>) {
        let addr = Addr::from(vip.address);
        let vips = self.vip_addresses.entry(addr).or_default();
        *vips += 1;
        ops.push(MapOp::SetVipAddress { addr, vips: *vips });
        self.prefilter.add(addr, VIP, ops);
    }

    fn remove_vip_address(&mut self, vip: Vip, ops: &mut Vec<MapOp>) {
        let addr = Addr::from(vip.address);
        self.prefilter.remove(addr, VIP, ops);
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

pub fn key_of(vip: Vip) -> VipKey {
    VipKey::new(Addr::from(vip.address), vip.port, proto_number(vip.proto))
}

pub fn vip_of(addr: Addr, port: u16, proto: u8) -> Vip {
    let proto = if proto == IPPROTO_UDP {
        Proto::Udp
    } else {
        Proto::Tcp
    };
    Vip {
        proto,
        address: addr.ip(),
        port,
    }
}

fn proto_number(proto: Proto) -> u8 {
    match proto {
        Proto::Tcp => IPPROTO_TCP,
        Proto::Udp => IPPROTO_UDP,
    }
}

/// Another than any flow has that remembers this id; 0 is for entries never used.
fn next_generation(generations: &mut [u16], id: u32) -> u16 {
    let generation = &mut generations[id as usize];
    *generation = generation.checked_add(1).unwrap_or(1);
    *generation
}

/// The two bits of the prefilter.
const VIP: u32 = 0;
const ANSWER: u32 = 1;

/// The destination prefilter with the number of reasons for each bit, since addresses share bits.
#[derive(Default)]
struct Prefilter {
    reasons: HashMap<(u32, u32), u32>,
    words: HashMap<u32, u64>,
}

impl Prefilter {
    fn add(&mut self, addr: Addr, kind: u32, ops: &mut Vec<MapOp>) {
        let (word, bit) = prefilter_bit(addr);
        let reasons = self.reasons.entry((word, bit + kind)).or_default();
        *reasons += 1;
        if *reasons == 1 {
            self.write(word, |bits| bits | 1 << (bit + kind), ops);
        }
    }

    fn remove(&mut self, addr: Addr, kind: u32, ops: &mut Vec<MapOp>) {
        let (word, bit) = prefilter_bit(addr);
        let reasons = self
            .reasons
            .get_mut(&(word, bit + kind))
            .expect("added before");
        *reasons -= 1;
        if *reasons == 0 {
            self.reasons.remove(&(word, bit + kind));
            self.write(word, |bits| bits & !(1 << (bit + kind)), ops);
        }
    }

    fn write(&mut self, word: u32, change: impl Fn(u64) -> u64, ops: &mut Vec<MapOp>) {
        debug_assert!(word < PREFILTER_WORDS);
        let bits = self.words.entry(word).or_default();
        *bits = change(*bits);
        ops.push(MapOp::SetPrefilter { word, bits: *bits });
    }
}

/// The indices of a fixed array, given out lowest first.
struct Slots {
    free: std::collections::BTreeSet<u32>,
    next: u32,
    end: u32,
}

impl Slots {
    fn new(first: u32, count: u32) -> Slots {
        Slots {
            free: Default::default(),
            next: first,
            end: first + count,
        }
    }

    fn has_room(&self) -> bool {
        !self.free.is_empty() || self.next < self.end
    }

    fn free(&mut self) -> Option<u32> {
        if let Some(index) = self.free.pop_first() {
            return Some(index);
        }
        (self.next < self.end).then(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// Marks an index as in use, whoever gave it out.
    fn take(&mut self, index: u32) {
        while self.next <= index {
            self.free.insert(self.next);
            self.next += 1;
        }
        self.free.remove(&index);
    }

    fn release(&mut self, index: u32) {
        self.free.insert(index);
    }
}

#[cfg(test)]
mod tests;
