//! Viaduct in the kernel: the programs, and what becomes of their verdicts.
//!
//! `viaduct` runs for every frame that comes in. It is a pipeline of four steps, a module each:
//! [`packet`] reads headers, [`flows`] finds or makes the flow, [`rewrite`] translates, and this file
//! turns the verdict into an XDP action and a count. `sweep` and `clock` never see a packet: the
//! agent runs them by BPF_PROG_TEST_RUN.
//!
//! On any target but bpf the crate is an empty program, so that the workspace builds everywhere.

#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![cfg_attr(
    not(target_arch = "bpf"),
    allow(
        dead_code,
        unused_imports,
        reason = "only the BPF target has entry points"
    )
)]

mod flows;
mod maps;
mod packet;
mod rewrite;
mod sweep;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::helpers::{bpf_jiffies64, bpf_ktime_get_ns, bpf_redirect};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use aya_log_ebpf::warn;
use router_common::{ClockSample, Verdict};

use crate::packet::Packet;

/// The packet path. `frags`: frames larger than a page come in fragments, of which the first holds
/// all headers (kernel: include/uapi/linux/bpf.h, `BPF_F_XDP_HAS_FRAGS`).
#[xdp(frags)]
fn viaduct(ctx: XdpContext) -> u32 {
    match steer(&ctx) {
        Ok(sent) => {
            maps::count_verdict(sent.verdict);
            sent.action
        }
        Err(verdict) => {
            maps::count_verdict(verdict);
            match verdict {
                Verdict::NotForUs | Verdict::NoSuchVip | Verdict::NotAReply => XDP_PASS,
                Verdict::Internal => {
                    warn!(&ctx, "the tables contradict each other; packet dropped");
                    XDP_DROP
                }
                _ => XDP_DROP,
            }
        }
    }
}

/// A packet that was translated and is on its way.
struct Sent {
    verdict: Verdict,
    action: u32,
}

#[inline(always)]
fn steer(ctx: &XdpContext) -> Result<Sent, Verdict> {
    let mut packet = Packet::parse(ctx)?;
    let settings = maps::settings()?;
    let now = maps::now(settings);
    if packet.to_vip
        && let Some((flow, verdict)) = flows::of_client(ctx, &packet, settings, now)?
    {
        let backend = flow.backend;
        rewrite::to_backend(&mut packet, backend, flow.nat_port);
        maps::count_packet(flow.backend_id, packet.len, verdict);
        return Ok(Sent {
            verdict,
            action: send(ctx, backend.ifindex),
        });
    }
    if packet.to_gateway
        && let Some(flow) = flows::of_backend(&packet, settings, now)
    {
        rewrite::to_client(&mut packet, flow.backend, &flow.entry);
        maps::count_reply(flow.entry.backend, packet.len);
        return Ok(Sent {
            verdict: Verdict::Replied,
            action: send(ctx, flow.entry.client_ifindex),
        });
    }
    Err(if packet.to_gateway {
        Verdict::NotAReply
    } else {
        Verdict::NoSuchVip
    })
}

/// Back out where it came in, or through another interface.
#[inline(always)]
fn send(ctx: &XdpContext, ifindex: u32) -> u32 {
    if ctx.ingress_ifindex() as u32 == ifindex {
        return XDP_TX;
    }
    // SAFETY: the helper takes any interface index and only notes it for after the program.
    unsafe { bpf_redirect(ifindex, 0) as u32 }
}

/// Drops what the flow table no longer needs; see [`sweep::run`].
#[xdp]
fn sweep(_ctx: XdpContext) -> u32 {
    sweep::run();
    XDP_PASS
}

/// Notes both clocks, from which the agent learns how long a jiffy is.
#[xdp]
fn clock(_ctx: XdpContext) -> u32 {
    if let Some(sample) = maps::CLOCK.get_ptr_mut(0) {
        // SAFETY: the pointer is to the map's value, and both helpers only read a clock.
        unsafe {
            *sample = ClockSample {
                jiffies: bpf_jiffies64(),
                monotonic_ns: bpf_ktime_get_ns(),
            };
        }
    }
    XDP_PASS
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never linked: every index is checked, and the verifier refuses a program that could get here.
    loop {}
}

// The helpers' own licence check: bpf_ktime_get_ns and the ring buffer ask for GPL compatibility.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(target_arch = "bpf"))]
fn main() {}
