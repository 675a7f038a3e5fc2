//! Forgets flows whose time is over and counts the others by backend.
//!
//! The agent runs the program over the table in shares, from BPF_PROG_TEST_RUN, while packets flow.

use router_common::{FLOW_WAYS, FlowSlot, FlowState, SWEEP_BUCKETS, SweepResult};

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
    let now = maps::now(settings);
    // SAFETY: the pointer is to the map's value; the agent runs one sweep at a time.
    let first = unsafe { (*request).first_bucket };
    let mut result = SweepResult::default();
    for offset in 0..SWEEP_BUCKETS {
        let bucket = first + offset;
        if bucket > settings.bucket_mask {
            break;
        }
        let Some(slots) = maps::FLOW_SLOTS.get(bucket) else {
            break;
        };
        for way in 0..FLOW_WAYS {
            let word = &slots.slots[way].0;
            let slot = FlowSlot(flows::load(word));
            if slot.0 == 0 {
                continue;
            }
            let index = bucket * FLOW_WAYS as u32 + way as u32;
            let Some(entry) = maps::FLOWS.get(index) else {
                continue;
            };
            if !flows::expired(slot, entry, settings, now) {
                result.live += 1;
                if let Some(count) = maps::BACKEND_FLOWS.get_ptr_mut(entry.backend) {
                    // SAFETY: the pointer is to the map's value; only the sweep writes it.
                    unsafe { *count += 1 };
                }
                continue;
            }
            // Nobody takes a slot in this state, so the entry stays as it is until it is free.
            let held = FlowSlot::new(0, now, FlowState::Sweeping).0;
            let return_hash = entry.return_hash;
            if flows::swap(word, slot.0, held) {
                flows::clear_return(return_hash, index, settings);
                flows::swap(word, held, 0);
                result.freed += 1;
            }
        }
    }
    // SAFETY: as above.
    unsafe { (*request).result = result };
}
