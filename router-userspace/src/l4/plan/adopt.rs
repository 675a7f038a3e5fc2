//! Taking over what the maps of an earlier agent hold.
//!
//! That agent may have ended between any two operations. The ones returned make whole what it left:
//! what no packet can find is cleared, and every ring is held against its backends.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use router_common::{
    BackendEntry, BackendState, Mode, QuicKey, RingSlot, SOURCE_ALLOW, SOURCE_DENY, Scheduler,
    SourceKey, VIP_CHAIN, VipEntry, vip_flags,
};

use super::chains::Link;
use super::ring::Ring;
use super::sources::{self, Sources};
use super::{Installed, MapOp, PlannedMember, PlannedVip, Planner, World, vip_of};
use crate::config::QuicConfig;
use crate::l4::policy::VipPolicy;
use crate::route::Vip;

/// The VIPs that packets find, by index.
type Found = BTreeMap<u32, (Vip, PlannedVip)>;

impl Planner {
    /// Takes over what is installed. What was draining drains anew, and where flows were before a ring
    /// changed is remembered anew.
    pub fn adopt(&mut self, installed: Installed, world: &World<'_>) -> Vec<MapOp> {
        let mut ops = Vec::new();
        let mut found = self.adopt_vips(&installed, &mut ops);
        self.dnat_in_use = installed.dnat;
        let gone = self.adopt_backends(&mut found, installed.backends, world);
        adopt_lists(
            &mut found,
            installed.sources,
            installed.quic_servers,
            &mut ops,
        );
        ops.extend(gone);
        let rings: BTreeMap<u32, _> = installed.rings.into_iter().collect();
        for (index, (vip, mut planned)) in found {
            let slots = rings.get(&index).map_or(&[][..], |slots| slots);
            self.adopt_ring(vip, &mut planned, slots, world, &mut ops);
            self.adopt_answers(&mut planned, &mut ops);
            planned.unclaimed_until = Some(world.now + world.policies.policy_of(&vip).drain);
            self.vips.insert(vip, planned);
        }
        self.write_dnat(&mut ops);
        // Each word once, since the programs look at it all the while, and all of them: that agent may
        // have left bits that have no reason any more.
        ops.retain(|op| !matches!(op, MapOp::SetPrefilter { .. }));
        ops.extend(self.prefilter.all());
        ops
    }

    /// The policies that what was adopted was made of, as far as they are in the maps; the rest as of
    /// `default`. Planned anew by them, no VIP changes.
    pub fn policies(&self, default: &VipPolicy, ticks_per_second: f64) -> HashMap<Vip, VipPolicy> {
        let vips = self.vips.iter();
        let policies = vips.filter_map(|(vip, planned)| {
            let entry = planned.published.as_ref()?;
            let policy = policy_of(entry, &planned.sources, default, ticks_per_second);
            Some((*vip, policy))
        });
        policies.collect()
    }

    /// The VIPs that packets find, by index. Clears all others.
    fn adopt_vips(&mut self, installed: &Installed, ops: &mut Vec<MapOp>) -> Found {
        let entries: BTreeMap<u32, VipEntry> = installed.vips.iter().copied().collect();
        let mut found = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for &(place, first) in &installed.heads {
            let Some(chain) = self.chain(place, first, &entries, &mut seen) else {
                ops.push(MapOp::SetVipHead { place, first: 0 });
                continue;
            };
            for &Link { index, entry } in &chain {
                self.indices.take(index);
                let mut planned = PlannedVip::new(index);
                planned.published = Some(VipEntry { next: 0, ..entry });
                planned.modes.insert(Mode::from_bits(entry.mode));
                if entry.flags & vip_flags::TRACK != 0 {
                    // Maybe for flows of other modes: which ones is not known.
                    planned.modes.insert(Mode::Nat);
                    planned.modes.extend(installed.dnat.then_some(Mode::Dnat));
                }
                found.insert(index, (vip_of(&entry), planned));
            }
            self.chains.adopt(place, chain);
        }
        for index in entries.keys().filter(|index| !found.contains_key(index)) {
            ops.push(MapOp::SetVip {
                index: *index,
                entry: VipEntry::default(),
            });
        }
        found
    }

    /// Gives each backend to its VIP; returns what clears those that have none.
    fn adopt_backends(
        &mut self,
        found: &mut Found,
        backends: Vec<(u32, BackendEntry)>,
        world: &World<'_>,
    ) -> Vec<MapOp> {
        let mut gone = Vec::new();
        for (id, entry) in backends {
            let generation = entry.generation;
            self.generations[id as usize] = generation;
            if entry.state == BackendState::Free as u8 {
                continue;
            }
            let Some((vip, planned)) = found.get_mut(&entry.vip) else {
                gone.push(MapOp::ClearBackend { id, generation });
                continue;
            };
            self.backends.take(id);
            let drains = entry.state != BackendState::Active as u8;
            let drain = world.policies.policy_of(vip).drain;
            let mut member = PlannedMember::new(id);
            member.entry = entry;
            member.drain_until = drains.then_some(world.now + drain);
            let address = SocketAddr::new(entry.address.ip(), entry.port);
            planned.members.insert(address, member);
        }
        gone
    }

    /// A chain from its head to its end; `None` if it is not one that an agent writes.
    fn chain(
        &self,
        place: u32,
        first: u32,
        entries: &BTreeMap<u32, VipEntry>,
        seen: &mut BTreeSet<Vip>,
    ) -> Option<Vec<Link>> {
        let mut chain: Vec<Link> = Vec::new();
        let mut next = first;
        while let Some(index) = next.checked_sub(1) {
            let entry = *entries.get(&index)?;
            let is_sound = seen.insert(vip_of(&entry)) && self.chains.place(&entry) == place;
            if !is_sound || chain.len() == VIP_CHAIN as usize {
                return None;
            }
            next = entry.next;
            chain.push(Link { index, entry });
        }
        Some(chain)
    }

    /// Holds the ring against the members, and the VIP against its ring.
    fn adopt_ring(
        &mut self,
        vip: Vip,
        planned: &mut PlannedVip,
        slots: &[RingSlot],
        world: &World<'_>,
        ops: &mut Vec<MapOp>,
    ) {
        let before = planned.published.expect("adopted from the maps");
        let scheduler = Scheduler::from_bits(before.scheduler);
        let over = world.flows_over(vip.proto);
        let known: BTreeSet<u32> = planned.members.values().map(|member| member.id).collect();
        let plan = planned.ring_plan(scheduler, Mode::from_bits(before.mode));
        planned.ring = Ring::adopt(
            slots,
            before.ring_len,
            plan.remembers,
            |id| known.contains(&id),
            over,
        );
        planned.ring.set(plan, over);
        let entry = VipEntry {
            backends: planned.ring.backends(),
            ring_len: planned.ring.len(),
            ..before
        };
        if planned.ring.slots() != slots {
            ops.push(planned.write_ring());
        }
        if entry != before {
            self.chains.set(planned.index, entry, ops);
            planned.published = Some(entry);
        }
        self.add_vip_address(before.addr, ops);
        if before.flags & vip_flags::TRACK != 0 {
            planned.track_until = Some(over);
        }
    }

    fn adopt_answers(&mut self, planned: &mut PlannedVip, ops: &mut Vec<MapOp>) {
        for member in planned.members.values_mut() {
            self.prefilter.let_answers(member, &planned.modes, ops);
        }
        if planned.modes.contains(&Mode::Dnat) {
            self.dnat.insert(planned.index);
        }
    }
}

fn policy_of(
    entry: &VipEntry,
    sources: &Sources,
    default: &VipPolicy,
    ticks_per_second: f64,
) -> VipPolicy {
    let has = |flag: u8| entry.flags & flag != 0;
    // Within the tick, so that rounding up leads back to it.
    let time = |ticks: u32| Duration::from_secs_f64((f64::from(ticks) - 0.5) / ticks_per_second);
    let a_second = |a_tick: u32| (f64::from(a_tick) * ticks_per_second) as u32;
    VipPolicy {
        mode: Mode::from_bits(entry.mode),
        scheduler: Scheduler::from_bits(entry.scheduler),
        silent: has(vip_flags::SILENT),
        affinity: (entry.affinity > 0).then(|| time(entry.affinity)),
        allow: sources::prefixes(sources, SOURCE_ALLOW),
        deny: sources::prefixes(sources, SOURCE_DENY),
        source_rate: a_second(entry.source_rate),
        vip_rate: a_second(entry.vip_rate),
        challenge: has(vip_flags::CHALLENGE),
        track: has(vip_flags::TRACK),
        quic: has(vip_flags::QUIC).then_some(QuicConfig {
            server_id_octets: entry.quic_len,
            config: entry.quic_config,
        }),
        ..default.clone()
    }
}

/// Gives sources and server IDs to their VIPs; removes those of others.
fn adopt_lists(
    found: &mut Found,
    sources: Vec<(SourceKey, u8, u32)>,
    quic_servers: Vec<(QuicKey, u32)>,
    ops: &mut Vec<MapOp>,
) {
    for (key, prefix_len, verdict) in sources {
        match found.get_mut(&u32::from_be_bytes(key.vip)) {
            Some((_, planned)) => {
                planned.sources.insert((key.source, prefix_len), verdict);
            }
            None => ops.push(MapOp::RemoveSource { key, prefix_len }),
        }
    }
    let planned = found.iter().flat_map(|(index, (_, planned))| {
        let members = planned.members.values();
        members.map(|member| (*index, member.id))
    });
    let members: BTreeSet<(u32, u32)> = planned.collect();
    for (key, backend) in quic_servers {
        let owner = found.get_mut(&key.vip);
        match owner.filter(|_| members.contains(&(key.vip, backend))) {
            Some((_, planned)) => {
                planned.quic_servers.insert(key.server, backend);
            }
            None => ops.push(MapOp::RemoveQuicServer { key }),
        }
    }
}
