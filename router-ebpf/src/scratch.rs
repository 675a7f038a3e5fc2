//! What one packet's stages hand on to the next: one value a CPU, since a packet is done before the
//! next begins.
//!
//! In a map, and not on the stack, because stages are functions that the verifier looks at one by one:
//! it takes what lies in a map for anything at all, and so needs not follow every way of one stage
//! through all the others.

use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use router_common::{FlowEntry, FlowState, Verdict};

use crate::flows::Steered;
use crate::icmp::Quote;
use crate::packet::Packet;
use crate::table::Place;

#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

pub struct Scratch {
    pub packet: Packet,
    /// Of the VIP, once `packet` is known to be for one.
    pub vip: u32,
    pub steered: Steered,
    /// Of the packet's key, once the flow table was asked,
    pub hash: u64,
    /// and where there is or was a flow with that key.
    pub place: Place,
    /// Of a flow to be made.
    pub state: FlowState,
    /// What an ICMP error in `packet` is about.
    pub quote: Quote,
    /// A copy of the flow that `packet` answers.
    pub flow: FlowEntry,
}

#[inline(always)]
pub fn get() -> Result<&'static mut Scratch, Verdict> {
    let scratch = SCRATCH.get_ptr_mut(0).ok_or(Verdict::Internal)?;
    // SAFETY: this CPU's own value. Programs here do not interrupt each other, and each stage takes
    // it anew.
    Ok(unsafe { &mut *scratch })
}
