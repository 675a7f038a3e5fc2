//! Taking over what the maps of an earlier agent hold.
//!
//! That agent may have ended between any two operations. The ones returned make whole what it left:
//! what no packet can find is cleared, and every ring is held against its backends.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use router_common::{BackendState, Mode, RingSlot, Scheduler, VIP_CHAIN, VipEntry, vip_flags};

use super::chains::Link;
use super::members::quic_key;
use super::ring::Ring;
use super::{Installed, MapOp, PlannedMember, PlannedVip, Planner, World, vip_of};
use crate::route::Vip;

impl Planner {
    /// Takes over what is installed. What was draining drains anew, and where flows were before a ring
    /// changed is remembered anew.
    pub fn adopt(&mut self, installed: Installed, world: &World<'_>) -> Vec<MapOp> {
        let mut ops = Vec::new();
        let mut found = self.adopt_vips(&installed, &mut ops);
        self.dnat_in_use = installed.dnat;
        for (id, entry) in installed.backends {
            self.generations[id as usize] = entry.generation;
            if entry.state == BackendState::Free as u8 {
                continue;
            }
            match found.get_mut(&entry.vip) {
                Some((vip, planned)) => {
                    self.backends.take(id);
                    let drain = world.policies.policy_of(vip).drain;
                    let drains = entry.state != BackendState::Active as u8;
                    let mut member = PlannedMember::new(id);
                    member.entry = entry;
                    member.drain_until = drains.then_some(world.now + drain);
                    let address = SocketAddr::new(entry.address.ip(), entry.port);
                    planned.members.insert(address, member);
                }
                None => {
                    let generation = entry.generation;
                    ops.push(MapOp::ClearBackend { id, generation });
                }
            }
        }
        for (key, prefix_len, verdict) in installed.sources {
            match found.get_mut(&u32::from_be_bytes(key.vip)) {
                Some((_, planned)) => {
                    planned.sources.insert((key.source, prefix_len), verdict);
                }
                None => ops.push(MapOp::RemoveSource { key, prefix_len }),
            }
        }
        for (key, backend) in installed.quic_servers {
            let owner = found.get_mut(&key.vip);
            let owner = owner.filter(|(_, planned)| planned.has_member(backend));
            match owner {
                Some((_, planned)) => {
                    planned.quic_servers.insert(key.server, backend);
                }
                None => ops.push(MapOp::RemoveQuicServer {
                    key: quic_key(key.vip, key.server),
                }),
            }
        }
        let rings: BTreeMap<u32, _> = installed.rings.into_iter().collect();
        for (index, (vip, mut planned)) in found {
            let slots = rings.get(&index).map(|slots| &slots[..]);
            self.adopt_ring(
                vip,
                &mut planned,
                slots.unwrap_or_default(),
                world,
                &mut ops,
            );
            self.adopt_answers(&mut planned, &mut ops);
            planned.unclaimed_until = Some(world.now + world.policies.policy_of(&vip).drain);
            self.vips.insert(vip, planned);
        }
        self.write_dnat(&mut ops);
        merge_prefilter(&mut ops);
        ops
    }

    /// The VIPs that packets find, by index. Clears all others.
    fn adopt_vips(
        &mut self,
        installed: &Installed,
        ops: &mut Vec<MapOp>,
    ) -> BTreeMap<u32, (Vip, PlannedVip)> {
        let entries: BTreeMap<u32, VipEntry> = installed.vips.iter().copied().collect();
        let mut found = BTreeMap::new();
        for &(place, first) in &installed.heads {
            let Some(chain) = self.chain(place, first, &entries, &found) else {
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

    /// A chain from its head to its end; `None` if it is not one that an agent writes.
    fn chain(
        &self,
        place: u32,
        first: u32,
        entries: &BTreeMap<u32, VipEntry>,
        found: &BTreeMap<u32, (Vip, PlannedVip)>,
    ) -> Option<Vec<Link>> {
        let mut chain: Vec<Link> = Vec::new();
        let mut next = first;
        while let Some(index) = next.checked_sub(1) {
            let entry = *entries.get(&index)?;
            let is_new = !found.contains_key(&index)
                && found.values().all(|(vip, _)| *vip != vip_of(&entry))
                && chain.iter().all(|link| link.index != index);
            if !is_new || self.chains.place(&entry) != place || chain.len() == VIP_CHAIN as usize {
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

impl PlannedVip {
    fn has_member(&self, id: u32) -> bool {
        self.members.values().any(|member| member.id == id)
    }
}

/// Writes each word of the prefilter once: the programs look at it all the while.
fn merge_prefilter(ops: &mut Vec<MapOp>) {
    let words: BTreeMap<u32, MapOp> = ops
        .extract_if(.., |op| matches!(op, MapOp::SetPrefilter { .. }))
        .filter_map(|op| match op {
            MapOp::SetPrefilter { word, .. } => Some((word, op)),
            _ => None,
        })
        .collect();
    ops.extend(words.into_values());
}
