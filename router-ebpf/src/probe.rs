//! Health checks of the VIP itself, to the backend that they are for.
//!
//! A check of a backend that serves under the VIP's address is a connection of this host to the VIP, with
//! a mark that names the backend. Its packets leave like any other; where they do, this takes those
//! with a mark to that backend in the VIP's mode. No flow is made and no ring is read. The answers come
//! to this host by themselves.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::programs::TcContext;
use router_common::{BackendState, Mode, Verdict, is_probe};

use crate::flows::Steered;
use crate::frame::{Frame, Tcx};
use crate::packet::Fragment;
use crate::stage::{Outcome, Stages};
use crate::{conclude, maps, scratch};

/// Whatever is no check, or of a backend that has left, passes as it is and is not counted.
#[inline(always)]
pub fn run(ctx: &TcContext) -> i32 {
    // SAFETY: the context is valid for the whole run.
    let mark = unsafe { (*ctx.skb.skb).mark };
    if !is_probe(mark) {
        return TC_ACT_UNSPEC;
    }
    let frame = Tcx(ctx);
    if !frame.parse().goes_on() || aim(mark & 0xffff).is_err() {
        return frame.pass();
    }
    // It comes by here again where it leaves for the backend.
    // SAFETY: as above.
    unsafe { (*ctx.skb.skb).mark = 0 };
    let outcome = frame.deliver();
    if outcome.is(Verdict::TooBig) {
        return conclude(&frame, Outcome::refused(Verdict::DoesNotFit));
    }
    conclude(&frame, outcome)
}

/// Steers the packet to a backend, if it is for its VIP and answers do not come back through here.
#[inline(always)]
fn aim(backend_id: u32) -> Result<(), Verdict> {
    let scratch = scratch::get()?;
    let packet = &scratch.packet;
    let (destination, port) = (packet.key.destination, packet.key.ports.destination());
    let backend = maps::BACKENDS
        .get(backend_id)
        .filter(|backend| backend.state != BackendState::Free as u8)
        .ok_or(Verdict::NotForUs)?;
    let vip = maps::VIPS
        .get(backend.vip)
        .filter(|vip| vip.covers(destination, port, packet.key.proto))
        .ok_or(Verdict::NotForUs)?;
    let mode = Mode::from_bits(vip.mode);
    if !mode.is_one_way() || packet.fragment != Fragment::NONE {
        return Err(Verdict::NotForUs);
    }
    scratch.steered = Steered {
        backend_id,
        verdict: Verdict::Probed,
        nat_port: 0,
        mode,
        new: false,
    };
    Ok(())
}
