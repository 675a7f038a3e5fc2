//! The backend of a packet, as the VIP's scheduler has it.

use router_common::{
    BackendEntry, BackendState, FlowKey, FlowSlot, FlowState, NO_BACKEND, Ports, RING_KEYS,
    RING_SIZE, RingSlot, Scheduler, Verdict, ring_slot,
};

use crate::frame::Frame;
use crate::table::Place;
use crate::verifier::{load, next};
use crate::vip::Vip;
use crate::{explain, maps, scratch, table};

/// Keeps places of affinity apart from those of flows.
const AFFINITY_SALT: u64 = 0x9e37_79b9_7f4a_7c15;

/// The slot that the ring has for a flow, by hash.
#[inline(always)]
pub fn slot_of<F: Frame>(vip: Vip, key: &FlowKey) -> Result<RingSlot, Verdict> {
    let source_only = vip.entry.scheduler == Scheduler::SourceHash as u8;
    let ports = if source_only {
        Ports::default()
    } else {
        key.ports
    };
    let hash = FlowKey { ports, ..*key }.hash(&RING_KEYS) >> 32;
    read(
        vip,
        ring_slot(hash as u32, vip.entry.ring_len),
        F::DRY.into(),
    )
}

#[inline(always)]
fn read(vip: Vip, slot: usize, dry: u32) -> Result<RingSlot, Verdict> {
    let ring = maps::RINGS.get(vip.index).ok_or(Verdict::Internal)?;
    if slot >= RING_SIZE {
        return Err(Verdict::Internal);
    }
    let content = ring.slots[slot];
    if dry != 0 {
        explain::note(|event| {
            event.asked_ring = 1;
            event.slot = slot as u32;
            event.slot_content = content;
        });
    }
    Ok(content)
}

/// The backend with an id, if it serves the VIP.
#[inline(always)]
pub fn member(vip: Vip, id: u32) -> Option<&'static BackendEntry> {
    let backend = maps::BACKENDS.get(id)?;
    (id != NO_BACKEND && backend.vip == vip.index && backend.state != BackendState::Free as u8)
        .then_some(backend)
}

/// The backend for a new flow.
#[inline(always)]
pub fn choose<F: Frame>(vip: Vip, slot: RingSlot, hash: u64, now: u32) -> Result<u32, Verdict> {
    if let Some(id) = at_once(vip, slot)? {
        return Ok(id);
    }
    match slow(vip.index, slot.0, hash, now, F::DRY.into()) {
        0 => Err(Verdict::Internal),
        id => Ok(id as u32),
    }
}

/// The backend for a new flow where it takes no more than the ring to know.
#[inline(always)]
pub fn at_once(vip: Vip, slot: RingSlot) -> Result<Option<u32>, Verdict> {
    if vip.entry.backends == 0 {
        return Err(Verdict::NoBackend);
    }
    let by_ring = vip.entry.affinity == 0 && Scheduler::from_bits(vip.entry.scheduler).is_hash();
    Ok(by_ring.then_some(slot.current()))
}

/// [`balanced`] for the packet in the scratch. Verified by itself, as [`crate::stage`] explains.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn slow(vip: u32, slot: u32, hash: u64, now: u32, dry: u32) -> u64 {
    let (Ok(scratch), Some(vip)) = (scratch::get(), Vip::at(vip)) else {
        return 0;
    };
    balanced(&scratch.packet.key, vip, RingSlot(slot), hash, now, dry)
}

/// The schedulers that keep count, and affinity in front of any; 0 if that cannot be.
#[inline(always)]
pub fn balanced(key: &FlowKey, vip: Vip, slot: RingSlot, hash: u64, now: u32, dry: u32) -> u64 {
    let Ok(settings) = maps::settings() else {
        return 0;
    };
    if vip.entry.affinity == 0 {
        return scheduled(vip, slot, hash, dry).into();
    }
    let client = FlowKey {
        ports: Ports::new(0, key.ports.destination()),
        ..*key
    };
    let client_hash = client.hash(&settings.hash_keys) ^ AFFINITY_SALT;
    let is_it = |slot: FlowSlot, _| slot.state() as u8 == FlowState::Affinity as u8;
    let mut place = match table::find(client_hash, settings, is_it) {
        Ok(known) => known.unwrap_or(Place::NONE),
        Err(_) => return 0,
    };
    if !place.is_none() {
        let active = member(vip, place.slot.backend())
            .is_some_and(|backend| backend.state == BackendState::Active as u8);
        if active && place.slot.age(now) <= vip.entry.affinity {
            if dry == 0
                && place.slot.seen() != now
                && let Some(word) = place.word()
            {
                let touched = place.slot.touched(now, FlowState::Affinity);
                crate::verifier::swap(word, place.slot.0, touched.0);
            }
            return place.slot.backend().into();
        }
    }
    let id = scheduled(vip, slot, hash, dry);
    if dry != 0 {
        return id.into();
    }
    if place.is_none() {
        place = match table::free_place(client_hash, settings, now) {
            Ok(place) => place,
            // Without a place the client has no affinity; it is served all the same.
            Err(_) => return id.into(),
        };
    }
    let slot = FlowSlot::new(FlowSlot::tag_of(client_hash), id, now, FlowState::Affinity);
    let _ = crate::flows::remember(place, slot, &client, vip);
    id.into()
}

#[inline(always)]
fn scheduled(vip: Vip, slot: RingSlot, hash: u64, dry: u32) -> u32 {
    if Scheduler::from_bits(vip.entry.scheduler).is_hash() {
        return slot.current();
    }
    by_count(vip.index, slot.0, hash, dry) as u32
}

/// The schedulers that keep count. Verified by itself, as [`crate::stage`] explains.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn by_count(vip: u32, slot: u32, hash: u64, dry: u32) -> u64 {
    let slot = RingSlot(slot);
    let Some(vip) = Vip::at(vip) else {
        return slot.current().into();
    };
    let id = match Scheduler::from_bits(vip.entry.scheduler) {
        Scheduler::Maglev | Scheduler::SourceHash => slot.current(),
        Scheduler::RoundRobin => {
            let Some(cursor) = maps::CURSORS.get(vip.index) else {
                return slot.current().into();
            };
            let turn = if dry != 0 { load(cursor) } else { next(cursor) };
            let len = vip.entry.ring_len as u64;
            let turn = if len == 0 { 0 } else { turn % len };
            read(vip, turn as usize, dry).map_or(slot.current(), RingSlot::current)
        }
        Scheduler::LeastConnections => {
            let pick = |hash: u32| {
                read(vip, ring_slot(hash, vip.entry.ring_len), dry).map_or(0, RingSlot::current)
            };
            // The flow's hash is keyed: nobody can choose the two for us.
            let (one, other) = (pick(hash as u32), pick((hash >> 32) as u32));
            if load_of(other) < load_of(one) {
                other
            } else {
                one
            }
        }
    };
    id.into()
}

/// Flows of a backend, packets' and local clients', for its weight, as a fraction with 1000 * 2^16 below.
#[inline(always)]
fn load_of(id: u32) -> u64 {
    let (Some(load), Some(backend)) = (maps::BACKEND_LOAD.get(id), maps::BACKENDS.get(id)) else {
        return u64::MAX;
    };
    let local = maps::LOCAL_FLOWS.get(id).map_or(0, crate::verifier::load) as i64;
    let flows = load.flows + local;
    let flows = if flows < 0 { 0 } else { flows as u64 };
    let weight = if backend.weight == 0 {
        1
    } else {
        backend.weight
    };
    // One more, as if the flow were there: the heavier of two idle ones is taken.
    ((flows + 1) << 16) / weight as u64
}
