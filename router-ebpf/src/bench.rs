//! The packet benchmark's harness.
//!
//! BPF_PROG_TEST_RUN repeats a program on one buffer and does not restore what it rewrote, so `bench`
//! takes off what the last run encapsulated, lays the headers of the next flow and tail-calls the program
//! under test. What that costs is measured with programs that do nothing else: `pass`, and `grow` for
//! the harness's way with programs that encapsulate. `drop` and `tx` are the floors of frames that
//! travel.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(
    not(target_arch = "bpf"),
    allow(
        dead_code,
        unused_imports,
        reason = "only the BPF target has entry points"
    )
)]

use core::hint::black_box;

use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_TX};
use aya_ebpf::helpers::bpf_xdp_adjust_head;
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::{Array, ProgramArray};
use aya_ebpf::programs::XdpContext;

/// Words of 8 octets that are laid of an IPv4 frame, and of an IPv6 one.
const V4_WORDS: usize = 8;
const V6_WORDS: usize = 12;
/// Where the source address ends, less 4, with the destination's end and the ports behind it.
const V4_OFFSETS: [usize; 3] = [26, 30, 34];
const V6_OFFSETS: [usize; 3] = [34, 50, 54];

/// The headers every run begins with.
#[map]
static FRAME: Array<[u64; V6_WORDS]> = Array::with_max_entries(1, 0);

/// Of each flow the last words of source and destination address, and the ports, as they lie in a
/// packet: 524,288 known flows, then 65,536 places for others.
#[map]
static FLOW_HEADERS: Array<[[u16; 2]; 3]> = Array::with_max_entries(589_824, 0);

/// What to lay; written by the benchmark before it runs the program.
#[repr(C)]
struct Stream {
    /// Runs so far.
    runs: u32,
    /// The flows are `first` to `first + mask` of `FLOW_HEADERS`; their number is a power of two.
    first: u32,
    mask: u32,
    /// 1: the number of the run is added to the source, so that every run has one of its own.
    fresh: u32,
    /// Octets of the frame as it is laid.
    len: u32,
    /// 1: IPv6.
    v6: u32,
    /// Octets that `grow` puts in front.
    growth: u32,
}

#[map]
static STREAM: Array<Stream> = Array::with_max_entries(1, 0);

/// Frames that `drop` has ended.
#[map]
static RECEIVED: Array<u64> = Array::with_max_entries(1, 0);

/// The program under test, at 0.
#[map]
static TARGET: ProgramArray = ProgramArray::with_max_entries(1, 0);

#[xdp(frags)]
fn bench(ctx: XdpContext) -> u32 {
    if lay(&ctx).is_some() {
        // SAFETY: the call does not return when it succeeds; the slot is filled before any run.
        unsafe { TARGET.tail_call(&ctx, 0) };
    }
    XDP_ABORTED
}

/// A program under test that encapsulates and does nothing else.
#[xdp(frags)]
fn grow(ctx: XdpContext) -> u32 {
    let Some(stream) = STREAM.get(0) else {
        return XDP_ABORTED;
    };
    // SAFETY: no pointer into the frame is used afterwards.
    unsafe { bpf_xdp_adjust_head(ctx.ctx, -(stream.growth as i32)) };
    XDP_TX
}

#[xdp(frags)]
fn tx(_ctx: XdpContext) -> u32 {
    XDP_TX
}

#[xdp(frags)]
fn drop(_ctx: XdpContext) -> u32 {
    if let Some(received) = RECEIVED.get_ptr_mut(0) {
        // SAFETY: the pointer is to the map's value; the benchmark keeps all frames on one core.
        unsafe { *received += 1 };
    }
    XDP_DROP
}

#[inline(always)]
fn lay(ctx: &XdpContext) -> Option<()> {
    let stream = STREAM.get_ptr_mut(0)?;
    let frame = FRAME.get(0)?;
    // SAFETY: the pointer is to the map's value, and the benchmark is its only user.
    let stream = unsafe { &mut *stream };
    let run = stream.runs;
    stream.runs = run.wrapping_add(1);
    let flow = FLOW_HEADERS.get(stream.first.wrapping_add(run & stream.mask))?;
    // One subtraction first: the verifier lets no other arithmetic be done with a frame's end.
    let len = black_box(ctx.data_end() - ctx.data());
    let grown = len as i32 - stream.len as i32;
    if grown != 0 {
        // SAFETY: pointers into the frame are made after it.
        unsafe { bpf_xdp_adjust_head(ctx.ctx, grown) };
    }
    let mut headers = *flow;
    if stream.fresh != 0 {
        let [a, b] = headers[0].map(|half| u32::from(u16::from_be(half)));
        let source = (a << 16 | b).wrapping_add(run);
        headers[0] = [(source >> 16) as u16, source as u16].map(u16::to_be);
    }
    if stream.v6 != 0 {
        write::<V6_WORDS>(ctx, frame, V6_OFFSETS, headers)
    } else {
        write::<V4_WORDS>(ctx, frame, V4_OFFSETS, headers)
    }
}

#[inline(always)]
fn write<const WORDS: usize>(
    ctx: &XdpContext,
    frame: &[u64; V6_WORDS],
    offsets: [usize; 3],
    headers: [[u16; 2]; 3],
) -> Option<()> {
    let data = ctx.data();
    if data + WORDS * 8 > ctx.data_end() {
        return None;
    }
    let to = data as *mut u64;
    for (at, word) in frame[..WORDS].iter().enumerate() {
        // SAFETY: the words lie before the frame's end, as checked above, and the frame begins where the
        // kernel begins every frame, 256 octets into a page.
        unsafe { *to.add(at) = *word };
    }
    for (offset, [first, second]) in offsets.into_iter().zip(headers) {
        let to = (data + offset) as *mut u16;
        // SAFETY: as above; the offsets are even.
        unsafe {
            *to = first;
            *to.add(1) = second;
        }
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
