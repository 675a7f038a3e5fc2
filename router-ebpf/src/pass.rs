//! Passes every packet.
//!
//! A veth queues the frames its peer sends by XDP_TX and never looks at them unless it has an XDP
//! program of its own (kernel: drivers/net/veth.c, `veth_xdp_flush`). Labs and tests attach this one.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(
    not(target_arch = "bpf"),
    allow(
        dead_code,
        unused_imports,
        reason = "only the BPF target has entry points"
    )
)]

use aya_ebpf::bindings::xdp_action::XDP_PASS;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;

#[xdp(frags)]
fn pass(_ctx: XdpContext) -> u32 {
    XDP_PASS
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
