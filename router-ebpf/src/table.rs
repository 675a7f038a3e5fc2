//! The flow table: places found, taken and given back.
//!
//! The tables are those of `router_common::FlowEntry`'s module. All cores share them without locks:
//! whoever turns a slot to `Held` by compare-and-swap owns the place, empties the return slot of the
//! flow that was there, writes the entry, fills the new return slot and then the slot itself. Readers
//! copy what they need from the entry and look at the slot they came by once more.

use router_common::{
    BackendEntry, BackendState, FLOW_WAYS, FlowEntry, FlowSlot, FlowState, Mode, RETURN_WAYS,
    ReturnSlot, Settings, Verdict, ticks_since,
};

use crate::maps;
use crate::verifier::{add, forget, load, swap};

/// A slot and what it held when it was looked at.
#[derive(Clone, Copy)]
pub struct Place {
    pub bucket: u32,
    pub way: u32,
    pub slot: FlowSlot,
}

impl Place {
    pub const NONE: Place = Place {
        bucket: u32::MAX,
        way: 0,
        slot: FlowSlot(0),
    };

    #[inline(always)]
    pub fn is_none(self) -> bool {
        self.bucket == u32::MAX
    }

    /// Of its entry in `FLOWS`.
    #[inline(always)]
    pub fn index(self) -> u32 {
        self.bucket * FLOW_WAYS as u32 + self.way
    }

    #[inline(always)]
    pub fn word(self) -> Option<&'static u64> {
        let bucket = maps::FLOW_SLOTS.get(self.bucket)?;
        Some(&bucket.slots[self.way as usize % FLOW_WAYS].0)
    }
}

/// The place of the flow with this hash that `is_it` agrees to.
#[inline(always)]
pub fn find(
    hash: u64,
    settings: &Settings,
    is_it: impl Fn(FlowSlot, u32) -> bool,
) -> Result<Option<Place>, Verdict> {
    let bucket = hash as u32 & settings.bucket_mask;
    let slots = maps::FLOW_SLOTS.get(bucket).ok_or(Verdict::Internal)?;
    let tag = FlowSlot::tag_of(hash);
    for way in 0..FLOW_WAYS as u32 {
        let slot = FlowSlot(load(&slots.slots[way as usize].0));
        if slot.tag() == tag && slot.is_flow() && is_it(slot, bucket * FLOW_WAYS as u32 + way) {
            return Ok(Some(Place {
                bucket,
                way: forget(way, slot.0),
                slot,
            }));
        }
    }
    Ok(None)
}

/// Ticks after which a flow in this state is forgotten.
#[inline(always)]
pub fn timeout(settings: &Settings, state: FlowState) -> u32 {
    settings.timeouts.get(state as usize).copied().unwrap_or(0)
}

/// Whether the backend that made the flow still has that id and may keep its flows.
#[inline(always)]
pub fn serves(backend: &BackendEntry, generation: u16) -> bool {
    backend.generation == generation && backend.state != BackendState::Free as u8
}

/// Whether nothing is left of a flow: its time is over in both directions, or its backend is gone.
#[inline(always)]
pub fn over(slot: FlowSlot, entry: &FlowEntry, settings: &Settings, now: u32) -> bool {
    let Some(backend) = maps::BACKENDS.get(slot.backend()) else {
        return true;
    };
    if !serves(backend, entry.generation) {
        return true;
    }
    let timeout = match slot.state() {
        FlowState::Affinity => maps::VIPS.get(entry.vip).map_or(0, |vip| vip.affinity),
        state => timeout(settings, state),
    };
    slot.age(now) > timeout
        && (!Mode::from_bits(entry.mode).translates()
            || ticks_since(entry.reply_seen.into(), now) > timeout)
}

/// A place for a flow with this hash: a way of its bucket whose flow is over or, failing that, the
/// oldest that is nearly so or never was.
#[inline(always)]
pub fn free_place(hash: u64, settings: &Settings, now: u32) -> Result<Place, Verdict> {
    let bucket = hash as u32 & settings.bucket_mask;
    let slots = maps::FLOW_SLOTS.get(bucket).ok_or(Verdict::Internal)?;
    for way in 0..FLOW_WAYS as u32 {
        let slot = FlowSlot(load(&slots.slots[way as usize].0));
        if slot.0 == 0 {
            return Ok(Place {
                bucket,
                way: forget(way, bucket.into()),
                slot,
            });
        }
    }
    match victim(bucket, now) {
        0 => Err(Verdict::FlowTableFull),
        way => {
            let way = (way - 1) as u32 & (FLOW_WAYS as u32 - 1);
            let word = load(&slots.slots[way as usize % FLOW_WAYS].0);
            Ok(Place {
                bucket,
                way,
                slot: FlowSlot(word),
            })
        }
    }
}

/// The way to make free in a full bucket, plus 1; 0 if every flow there is alive and proven.
///
/// Verified by itself, as [`crate::stage`] explains.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn victim(bucket: u32, now: u32) -> u64 {
    let (Some(slots), Ok(settings)) = (maps::FLOW_SLOTS.get(bucket), maps::settings()) else {
        return 0;
    };
    let mut oldest = 0;
    let mut oldest_age = 0;
    for way in 0..FLOW_WAYS as u32 {
        let slot = FlowSlot(load(&slots.slots[way as usize].0));
        if !slot.is_flow() {
            continue;
        }
        let Some(entry) = maps::FLOWS.get(bucket * FLOW_WAYS as u32 + way) else {
            continue;
        };
        if over(slot, entry, settings, now) {
            return way as u64 + 1;
        }
        // What nobody has answered for may be forged; what the ring knows as well is no loss.
        let doubtful = match slot.state() {
            FlowState::Syn | FlowState::Closing | FlowState::Affinity | FlowState::Fragment => true,
            FlowState::Udp => entry.answered == 0,
            _ => false,
        };
        let age = slot.age(now) + 1;
        if doubtful && age > oldest_age {
            oldest = forget(way + 1, slot.0);
            oldest_age = age;
        }
    }
    oldest.into()
}

/// Takes a place for a flow to be written; the word to give back by [`publish`] or [`vacate`].
#[inline(always)]
pub fn hold(place: Place) -> Result<Held, Verdict> {
    let word = place.word().ok_or(Verdict::Internal)?;
    let held = FlowSlot::new(0, 0, 0, FlowState::Held).0;
    if matches!(place.slot.state(), FlowState::Held) || !swap(word, place.slot.0, held) {
        return Err(Verdict::Contended);
    }
    if place.slot.0 != 0 {
        leave(place.slot.0, place.index());
    }
    Ok(Held { word, held })
}

/// A place that nobody else reads or writes.
pub struct Held {
    word: &'static u64,
    held: u64,
}

impl Held {
    /// Lets everybody see the flow.
    #[inline(always)]
    pub fn publish(self, slot: FlowSlot) {
        swap(self.word, self.held, slot.0);
    }

    /// Leaves the place empty.
    #[inline(always)]
    pub fn vacate(self) {
        swap(self.word, self.held, 0);
    }
}

/// Undoes what a flow has elsewhere. Its slot must be held. Verified by itself, as [`crate::stage`]
/// explains.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn leave(slot: u64, index: u32) -> u64 {
    let slot = FlowSlot(slot);
    let (Some(entry), Ok(settings)) = (maps::FLOWS.get(index), maps::settings()) else {
        return 0;
    };
    if matches!(slot.state(), FlowState::Affinity | FlowState::Fragment) {
        return 0;
    }
    if Mode::from_bits(entry.mode).translates() {
        clear_return(entry.return_hash, index, settings);
    }
    let Some(backend) = maps::BACKENDS.get(slot.backend()) else {
        return 0;
    };
    if backend.generation == entry.generation {
        count_flow(slot.backend(), -1);
    }
    0
}

/// Gives a place back, if it still holds `slot`; whether it did.
#[inline(always)]
pub fn forget_flow(place: Place) -> bool {
    match hold(place) {
        Ok(held) => {
            held.vacate();
            true
        }
        Err(_) => false,
    }
}

/// One flow more or less on a backend.
#[inline(always)]
pub fn count_flow(backend: u32, by: i64) {
    if let Some(load) = maps::BACKEND_LOAD.get(backend) {
        // SAFETY: an i64 is a u64 to the adder.
        let flows = unsafe { &*core::ptr::from_ref(&load.flows).cast::<u64>() };
        add(flows, by as u64);
    }
}

/// The return slots of answers whose hash has this high half, which is all that is kept of it.
#[inline(always)]
pub fn return_bucket(return_hash: u32, settings: &Settings) -> u32 {
    (return_hash >> 8) & (settings.bucket_mask * 2 + 1)
}

/// Takes a return slot, unless another flow's answers have the same hash and so perhaps the same port.
#[inline(always)]
pub fn claim_return(return_hash: u32, index: u32, settings: &Settings) -> bool {
    let Some(bucket) = maps::RETURNS.get(return_bucket(return_hash, settings)) else {
        return false;
    };
    let mut free = RETURN_WAYS as u32;
    for way in 0..RETURN_WAYS {
        let slot = load(&bucket.slots[way].0);
        if slot == 0 {
            free = forget(way as u32, return_hash.into());
        } else if ReturnSlot(slot).hash() == return_hash {
            return false;
        }
    }
    free < RETURN_WAYS as u32
        && swap(
            &bucket.slots[free as usize % RETURN_WAYS].0,
            0,
            ReturnSlot::new(return_hash, index).0,
        )
}

/// Empties the return slot of the flow at `index`, if it still is that flow's.
#[inline(always)]
fn clear_return(return_hash: u32, index: u32, settings: &Settings) {
    let Some(bucket) = maps::RETURNS.get(return_bucket(return_hash, settings)) else {
        return;
    };
    let ours = ReturnSlot::new(return_hash, index).0;
    for way in 0..RETURN_WAYS {
        let slot = &bucket.slots[way].0;
        if load(slot) == ours {
            swap(slot, ours, 0);
            return;
        }
    }
}
