//! The packet benchmark's harness.
//!
//! BPF_PROG_TEST_RUN repeats a program on one buffer and does not restore what it rewrote, so this
//! program lays the headers of the next flow before every run and tail-calls the program under test.
//! What it costs itself is measured with a program that only passes.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(
    not(target_arch = "bpf"),
    allow(
        dead_code,
        unused_imports,
        reason = "only the BPF target has entry points"
    )
)]

use aya_ebpf::bindings::xdp_action::XDP_ABORTED;
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::{Array, ProgramArray};
use aya_ebpf::programs::XdpContext;

/// Octets of Ethernet, IPv4 and TCP headers, in words of 2 octets.
const HALFWORDS: usize = 27;

/// The headers every run begins with.
#[map]
static FRAME: Array<[u16; HALFWORDS]> = Array::with_max_entries(1, 0);

/// Source address, destination address and ports of each flow, as they lie in a packet.
#[map]
static FLOW_HEADERS: Array<[u32; 3]> = Array::with_max_entries(65_536, 0);

/// `[runs so far, flows - 1]`; the number of flows is a power of two. With one flow and the third
/// word set, every run has a source address of its own.
#[map]
static RUNS: Array<[u32; 3]> = Array::with_max_entries(1, 0);

/// The program under test, at 0.
#[map]
static TARGET: ProgramArray = ProgramArray::with_max_entries(1, 0);

#[xdp(frags)]
fn bench(ctx: XdpContext) -> u32 {
    lay(&ctx);
    // SAFETY: the call does not return when it succeeds; the slot is filled before any run.
    unsafe { TARGET.tail_call(&ctx, 0) };
    XDP_ABORTED
}

#[inline(always)]
fn lay(ctx: &XdpContext) -> Option<()> {
    let runs = RUNS.get_ptr_mut(0)?;
    let frame = FRAME.get(0)?;
    let data = ctx.data();
    if data + HALFWORDS * 2 > ctx.data_end() {
        return None;
    }
    // SAFETY: the pointer is to the map's value, and the benchmark is its only user. The headers lie
    // before the frame's end, as checked above: addresses at 26, ports at 34.
    unsafe {
        let run = (*runs)[0];
        (*runs)[0] = run.wrapping_add(1);
        let flow = FLOW_HEADERS.get(run & (*runs)[1])?;
        let to = data as *mut u16;
        for (at, word) in frame.iter().enumerate() {
            *to.add(at) = *word;
        }
        let source = if (*runs)[2] == 0 {
            flow[0]
        } else {
            flow[0].wrapping_add(run.to_be())
        };
        *((data + 26) as *mut u32) = source;
        *((data + 30) as *mut u32) = flow[1];
        *((data + 34) as *mut u32) = flow[2];
    }
    Some(())
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
