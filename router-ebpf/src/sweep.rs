//! Forgets flows whose time is over and counts the others by backend.
//!
//! The agent runs the program over the table in shares, from BPF_PROG_TEST_RUN, while packets flow.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;
use router_common::{FLOW_WAYS, FlowSlot, FlowState, SWEEP_BUCKETS, Settings, SweepResult};

use crate::{flows, maps};

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
    for way in 0..FLOW_WAYS {
        let word = &slots.slots[way].0;
        let slot = FlowSlot(flows::load(word));
        if slot.is_flow() {
            sweep_slot(
                share,
                settings,
                word,
                slot,
                bucket * FLOW_WAYS as u32 + way as u32,
            );
        }
    }
    0
}

#[inline(always)]
fn sweep_slot(share: &mut Share, settings: &Settings, word: &u64, slot: FlowSlot, index: u32) {
    let Some(entry) = maps::FLOWS.get(index) else {
        return;
    };
    let Some(backend) = maps::BACKENDS.get(entry.backend) else {
        return;
    };
    if !flows::over(slot, entry, backend, settings, share.now) {
        share.result.live += 1;
        if let Some(count) = maps::BACKEND_FLOWS.get_ptr_mut(entry.backend) {
            // SAFETY: the pointer is to the map's value; only the sweep writes it.
            unsafe { *count += 1 };
        }
        return;
    }
    let held = FlowSlot::new(0, share.now, FlowState::Held).0;
    if flows::swap(word, slot.0, held) {
        flows::clear_return(entry.return_hash, index, settings);
        flows::swap(word, held, 0);
        share.result.freed += 1;
    }
}
