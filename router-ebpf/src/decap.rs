//! Takes the outer headers off what a gateway encapsulated: a backend of mode `ipip` or `gue`, for labs and
//! tests on kernels without such devices.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(
    not(target_arch = "bpf"),
    allow(
        dead_code,
        unused_imports,
        reason = "only the BPF target has entry points"
    )
)]

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::bindings::{BPF_F_ADJ_ROOM_FIXED_GSO, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;

const ETH_LEN: usize = 14;
/// IANA's EtherTypes and protocol numbers.
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const IPIP: u8 = 4;
const IPV6_IN_IP: u8 = 41;
const UDP: u8 = 17;
/// The gateway's default for GUE.
const GUE_PORT: u16 = 6080;

#[classifier]
fn decap(ctx: TcContext) -> i32 {
    if let Some(outer) = outer_headers(&ctx) {
        // What cannot be taken off is seen as it came.
        let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO);
        let _ = ctx.adjust_room(-outer, BPF_ADJ_ROOM_MAC, flags);
    }
    TC_ACT_UNSPEC
}

/// Octets in front of the packet inside; `None` if there is none.
#[inline(always)]
fn outer_headers(ctx: &TcContext) -> Option<i32> {
    let ethertype = u16::from_be(ctx.load(ETH_LEN - 2).ok()?);
    // Where the protocol stands, and the length without options or extensions.
    let (proto_at, len) = match ethertype {
        IPV4 => (9, 20),
        IPV6 => (6, 40),
        _ => return None,
    };
    match ctx.load::<u8>(ETH_LEN + proto_at).ok()? {
        IPIP | IPV6_IN_IP => Some(len as i32),
        UDP => {
            let port = u16::from_be(ctx.load(ETH_LEN + len + 2).ok()?);
            (port == GUE_PORT).then_some(len as i32 + 8)
        }
        _ => None,
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
