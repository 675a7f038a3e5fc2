//! Forgets flows whose time is over and counts the others by backend.
//!
//! The agent runs the program over the table in shares, from BPF_PROG_TEST_RUN, while packets flow.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;
use router_common::{
    FLOW_WAYS, FlowKey, FlowSlot, FlowState, Mode, SWEEP_BUCKETS, Settings, SweepResult,
};

use crate::table::{self, Place};
use crate::verifier::{forget, load};
use crate::vip::Vip;
use crate::{frame, maps, schedule};

/// Sweeps the share that `SWEEP` asks for and leaves the result there.
#[inline(always)]
pub fn run() {
    let Some(request) = maps::SWEEP.get_ptr_mut(0) else {
        return;
    };
    let Ok(settings) = maps::settings() else {
        return;
    };
    let mut share = Share {
        // SAFETY: the pointer is to the map's value; the agent runs one sweep at a time.
        first_bucket: unsafe { (*request).first_bucket },
        now: maps::now(settings),
        result: SweepResult::default(),
    };
    // SAFETY: the callback has the signature the helper asks for, and `share` outlives the call. A
    // helper's loop, because the verifier would follow every turn of one of ours.
    unsafe {
        bpf_loop(
            SWEEP_BUCKETS,
            bucket as *mut c_void,
            core::ptr::from_mut(&mut share).cast(),
            0,
        );
        (*request).result = share.result;
    }
}

struct Share {
    first_bucket: u32,
    now: u32,
    result: SweepResult,
}

/// One turn of the loop; 1 ends it.
extern "C" fn bucket(turn: u32, share: *mut c_void) -> i64 {
    // SAFETY: `run` passes its own `Share`.
    let share = unsafe { &mut *share.cast::<Share>() };
    let Ok(settings) = maps::settings() else {
        return 1;
    };
    let bucket = share.first_bucket + turn;
    let Some(slots) = maps::FLOW_SLOTS.get(bucket) else {
        return 1;
    };
    for way in 0..FLOW_WAYS as u32 {
        let slot = FlowSlot(load(&slots.slots[way as usize].0));
        if slot.is_flow() {
            let way = forget(way, slot.0);
            sweep_slot(share, settings, Place { bucket, way, slot });
        }
    }
    0
}

#[inline(always)]
fn sweep_slot(share: &mut Share, settings: &Settings, place: Place) {
    let Some(entry) = maps::FLOWS.get(place.index()) else {
        return;
    };
    if table::over(place.slot, entry, settings, share.now) {
        if table::forget_flow(place) {
            share.result.freed += 1;
        }
        return;
    }
    if matches!(
        place.slot.state(),
        FlowState::Affinity | FlowState::Fragment
    ) {
        return;
    }
    share.result.live += 1;
    if let Some(count) = maps::BACKEND_FLOWS.get_ptr_mut(place.slot.backend()) {
        // SAFETY: the pointer is to the map's value; only the sweep writes it.
        unsafe { *count += 1 };
    }
    if !Mode::from_bits(entry.mode).translates() {
        count_moved(place.index(), place.slot.backend());
    }
}

/// Counts a flow that the ring would send elsewhere. Verified by itself, as [`crate::stage`] explains.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn count_moved(index: u32, backend: u32) -> u64 {
    let Some(entry) = maps::FLOWS.get(index) else {
        return 0;
    };
    let Some(vip) = maps::VIPS.get(entry.vip) else {
        return 0;
    };
    let key = FlowKey {
        source: entry.client,
        destination: vip.addr,
        ports: entry.ports,
        proto: entry.proto,
    };
    let vip = Vip {
        index: entry.vip,
        entry: vip,
    };
    let home = schedule::slot_of::<frame::Xdp<'_>>(vip, &key).map_or(0, |slot| slot.current());
    if home != backend
        && let Some(count) = maps::MOVED_FLOWS.get_ptr_mut(entry.vip)
    {
        // SAFETY: as above.
        unsafe { *count += 1 };
    }
    0
}
