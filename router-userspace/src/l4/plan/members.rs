//! The backends of one VIP: who should serve it, and how each comes and goes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use router_common::{Addr, BackendEntry, BackendState, Mode, QuicKey};

use super::prefilter::{self, Prefilter};
use super::{MapOp, Plan, PlannedMember, PlannedVip, Planner, Ramp, Refusal, World};
use crate::health::state::in_panic;
use crate::l4::next_hop::NextHop;
use crate::l4::policy::VipPolicy;
use crate::route::{Backend, Pool, Proto, Vip};

/// A backend that should serve, with the entry it should have but for generation and id.
pub(super) struct Wanted {
    entry: BackendEntry,
    quic_server: Option<[u8; 8]>,
}

/// The pool's backends that can be reached in the VIP's mode.
pub(super) fn wanted(
    vip: Vip,
    pool: Option<&Pool>,
    index: u32,
    policy: &VipPolicy,
    world: &World<'_>,
    refused: &mut Vec<(SocketAddr, Refusal)>,
) -> BTreeMap<SocketAddr, Wanted> {
    let mut wanted = BTreeMap::new();
    let mut quic_servers = BTreeSet::new();
    for backend in pool.into_iter().flat_map(|pool| &pool.backends) {
        let hop = world.next_hops.get(&backend.address.ip());
        match admit(vip, backend, hop, policy) {
            Ok(Some(server)) if !quic_servers.insert(server) => {
                refused.push((backend.address, Refusal::QuicServerIdTaken));
            }
            Err(refusal) => refused.push((backend.address, refusal)),
            Ok(quic_server) => {
                // Without a next hop there is nowhere to send; the VIP is planned again when it is
                // known. The proxy on this host needs no backend.
                let Some(hop) = hop.filter(|_| policy.mode != Mode::L7) else {
                    continue;
                };
                let drains = backend.weight == 0 || world.drains(vip, backend.address);
                let entry = entry(vip, backend, index, hop, drains);
                wanted.insert(backend.address, Wanted { entry, quic_server });
            }
        }
    }
    avoid_unhealthy(&mut wanted, world);
    wanted
}

/// Whether a backend can serve in the VIP's mode; its QUIC server ID if it has one.
fn admit(
    vip: Vip,
    backend: &Backend,
    hop: Option<&NextHop>,
    policy: &VipPolicy,
) -> Result<Option<[u8; 8]>, Refusal> {
    let same_family = vip.address.is_ipv4() == backend.address.is_ipv4();
    let same_port = vip.is_range() || vip.ports.first == backend.address.port();
    match policy.mode {
        Mode::L7 if vip.proto != Proto::Tcp => return Err(Refusal::NotTcp),
        Mode::Nat | Mode::Dnat | Mode::Dsr if !same_family => return Err(Refusal::AddressFamily),
        Mode::Dsr | Mode::Ipip | Mode::Gue if !same_port => return Err(Refusal::PortDiffers),
        Mode::Dsr if hop.is_some_and(|hop| !hop.on_link) => return Err(Refusal::NotOnLink),
        Mode::Nat | Mode::Dnat | Mode::Dsr | Mode::Ipip | Mode::Gue | Mode::L7 => {}
    }
    let (Some(quic), Some(id)) = (policy.quic, backend.instance().tags.get("quic_server_id"))
    else {
        return Ok(None);
    };
    match server_id(id, usize::from(quic.server_id_octets)) {
        Some(server) => Ok(Some(server)),
        None => Err(Refusal::QuicServerId),
    }
}

/// `octets` octets in hexadecimal digits, then zeros.
fn server_id(text: &str, octets: usize) -> Option<[u8; 8]> {
    let digit = |c: u8| char::from(c).to_digit(16).map(|digit| digit as u8);
    if text.len() != 2 * octets {
        return None;
    }
    let mut server = [0; 8];
    for (octet, pair) in server.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *octet = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(server)
}

fn entry(vip: Vip, backend: &Backend, index: u32, hop: &NextHop, drains: bool) -> BackendEntry {
    let state = match drains {
        true => BackendState::Draining,
        false => BackendState::Active,
    };
    BackendEntry {
        address: Addr::from(backend.address.ip()),
        source: Addr::from(hop.source),
        vip: index,
        ifindex: hop.ifindex,
        destination_mac: hop.destination_mac,
        source_mac: hop.source_mac,
        port: backend.address.port(),
        generation: 0,
        mtu: hop.mtu,
        vlan: hop.vlan,
        weight: backend.weight,
        state: state as u8,
        dialed_port: u8::from(vip.is_range()),
    }
}

/// An unhealthy backend gets no new flows, unless the VIP is in panic. Those that drain do not count.
fn avoid_unhealthy(wanted: &mut BTreeMap<SocketAddr, Wanted>, world: &World<'_>) {
    let active = |wanted: &Wanted| wanted.entry.state == BackendState::Active as u8;
    let candidates = wanted.iter().filter(|(_, wanted)| active(wanted));
    let addresses = candidates.map(|(address, _)| *address);
    if in_panic(addresses, world.unhealthy, world.panic_threshold) {
        return;
    }
    for (address, wanted) in wanted {
        if world.unhealthy.contains(address) {
            wanted.entry.state = BackendState::Draining as u8;
        }
    }
}

impl Planner {
    /// Writes the backends that are new or changed, all but those that leave the ring.
    pub(super) fn set_members(
        &mut self,
        planned: &mut PlannedVip,
        wanted: &BTreeMap<SocketAddr, Wanted>,
        policy: &VipPolicy,
        world: &World<'_>,
        plan: &mut Plan,
    ) {
        // Whoever is first takes everything at once.
        let ramps = !policy.slow_start.is_zero() && planned.ring.backends() > 0;
        for (address, Wanted { entry, .. }) in wanted {
            if !planned.members.contains_key(address) {
                let Some(id) = self.backends.give() else {
                    plan.refused.push((*address, Refusal::BackendsFull));
                    continue;
                };
                planned.members.insert(*address, PlannedMember::new(id));
            }
            let member = planned.members.get_mut(address).expect("just inserted");
            let was_active = member.is_active();
            member.drain_until = None;
            let nat = planned.modes.contains(&Mode::Nat);
            let write = self.renew_member(member, *entry, nat);
            self.prefilter
                .let_answers(member, &planned.modes, &mut plan.ops);
            plan.ops.extend(write);
            member.set_ramp(ramps && !was_active, policy.slow_start, world.now);
        }
        // Those that left the pool go on draining; the ring is built without them.
        for (address, member) in &mut planned.members {
            if !wanted.contains_key(address) && member.drain_until.is_none() {
                member.drain_until = Some(world.now + policy.drain);
            }
        }
        planned.set_quic_servers(wanted, &mut plan.ops);
    }

    fn renew_member(
        &mut self,
        member: &mut PlannedMember,
        mut entry: BackendEntry,
        nat: bool,
    ) -> Option<MapOp> {
        let before = member.entry;
        entry.generation = before.generation;
        // Answers to another address do not find their flows: end those.
        if before.generation == 0 || nat && before.source != entry.source {
            entry.generation = next_generation(&mut self.generations, member.id);
        }
        member.entry = entry;
        let id = member.id;
        (before != entry).then_some(MapOp::SetBackend { id, entry })
    }

    /// Marks members that left as draining in the kernel and clears those whose drain is over.
    pub(super) fn withdraw_members(
        &mut self,
        planned: &mut PlannedVip,
        wanted: &BTreeMap<SocketAddr, Wanted>,
        now: Instant,
        ops: &mut Vec<MapOp>,
    ) {
        let mut over = BTreeMap::new();
        for (address, member) in &mut planned.members {
            let Some(until) = member.drain_until else {
                continue;
            };
            if wanted.contains_key(address) {
                continue;
            }
            if until <= now {
                over.insert(member.id, *address);
            } else if member.entry.state != BackendState::Draining as u8 {
                member.entry.state = BackendState::Draining as u8;
                ops.push(MapOp::SetBackend {
                    id: member.id,
                    entry: member.entry,
                });
            }
        }
        if over.is_empty() {
            return;
        }
        let ids = over.keys().copied().collect();
        if planned.ring.forget(&ids) {
            ops.push(planned.write_ring());
        }
        planned.remove_quic_servers(&ids, ops);
        for (id, address) in over {
            let mut member = planned.members.remove(&address).expect("found above");
            ops.push(MapOp::ClearBackend {
                id,
                generation: member.entry.generation,
            });
            self.backends.release(id);
            self.prefilter
                .let_answers(&mut member, &BTreeSet::new(), ops);
        }
    }
}

impl PlannedVip {
    /// A server ID is its owner's until the owner is cleared, or another backend has it.
    fn set_quic_servers(&mut self, wanted: &BTreeMap<SocketAddr, Wanted>, ops: &mut Vec<MapOp>) {
        let mut owners: BTreeMap<[u8; 8], u32> = BTreeMap::new();
        for (address, wanted) in wanted {
            let member = self.members.get(address);
            if let (Some(server), Some(member)) = (wanted.quic_server, member) {
                owners.insert(server, member.id);
            }
        }
        let leaving: BTreeSet<u32> = self
            .members
            .values()
            .filter(|member| member.drain_until.is_some())
            .map(|member| member.id)
            .collect();
        let index = self.index;
        self.quic_servers.retain(|server, owner| {
            let stays = owners.contains_key(server) || leaving.contains(owner);
            if !stays {
                let key = quic_key(index, *server);
                ops.push(MapOp::RemoveQuicServer { key });
            }
            stays
        });
        for (server, backend) in owners {
            if self.quic_servers.insert(server, backend) != Some(backend) {
                let key = quic_key(index, server);
                ops.push(MapOp::SetQuicServer { key, backend });
            }
        }
    }

    fn remove_quic_servers(&mut self, backends: &BTreeSet<u32>, ops: &mut Vec<MapOp>) {
        let index = self.index;
        self.quic_servers.retain(|server, owner| {
            let stays = !backends.contains(owner);
            if !stays {
                let key = quic_key(index, *server);
                ops.push(MapOp::RemoveQuicServer { key });
            }
            stays
        });
    }
}

pub(super) fn quic_key(index: u32, server: [u8; 8]) -> QuicKey {
    QuicKey {
        vip: index,
        reserved: 0,
        server,
    }
}

impl PlannedMember {
    pub(super) fn new(id: u32) -> PlannedMember {
        PlannedMember {
            id,
            entry: BackendEntry::default(),
            drain_until: None,
            ramp: None,
            answers: BTreeSet::new(),
        }
    }

    /// Whether it takes new flows.
    pub fn is_active(&self) -> bool {
        self.drain_until.is_none() && self.entry.state == BackendState::Active as u8
    }

    /// Its weight, as much of it as it has already.
    pub(super) fn ring_weight(&self) -> u16 {
        let step = self.ramp.map_or(Ramp::STEPS, |ramp| ramp.step);
        // At most the weight, which fits.
        (u32::from(self.entry.weight) * step).div_ceil(Ramp::STEPS) as u16
    }

    fn set_ramp(&mut self, begins: bool, slow_start: Duration, now: Instant) {
        if begins && self.is_active() {
            self.ramp = Some(Ramp {
                since: now,
                step: 1,
            });
        } else if let Some(ramp) = &mut self.ramp {
            ramp.step = Ramp::step(ramp.since, now, slow_start);
        }
        if self.ramp.is_some_and(|ramp| ramp.step == Ramp::STEPS) {
            self.ramp = None;
        }
    }
}

impl Ramp {
    pub(super) const STEPS: u32 = 10;

    /// The step that a backend is at: the first when it joins, the last before `slow_start` is over.
    pub(super) fn step(since: Instant, now: Instant, slow_start: Duration) -> u32 {
        let passed = now.saturating_duration_since(since).as_secs_f64();
        let share = passed / slow_start.as_secs_f64();
        // `as` saturates, and takes NaN for 0: no slow start at all.
        if slow_start.is_zero() {
            return Ramp::STEPS;
        }
        ((share * f64::from(Ramp::STEPS)) as u32 + 1).min(Ramp::STEPS)
    }
}

impl Prefilter {
    /// Lets the answers of a backend through in these modes and no others.
    pub(super) fn let_answers(
        &mut self,
        member: &mut PlannedMember,
        modes: &BTreeSet<Mode>,
        ops: &mut Vec<MapOp>,
    ) {
        let mut answers = BTreeSet::new();
        if modes.contains(&Mode::Nat) {
            answers.insert(member.entry.source);
        }
        if modes.contains(&Mode::Dnat) {
            answers.insert(member.entry.address);
        }
        for addr in answers.difference(&member.answers) {
            self.add(*addr, prefilter::ANSWER, ops);
        }
        for addr in member.answers.difference(&answers) {
            self.remove(*addr, prefilter::ANSWER, ops);
        }
        member.answers = answers;
    }
}

/// Another than any flow has that remembers this id; 0 is for entries never used.
fn next_generation(generations: &mut [u16], id: u32) -> u16 {
    let generation = &mut generations[id as usize];
    *generation = generation.checked_add(1).unwrap_or(1);
    *generation
}
