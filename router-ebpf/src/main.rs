//! Viaduct in the kernel: the programs, and what becomes of their verdicts.
//!
//! `viaduct` (XDP) and `viaduct_tcx` run for every frame that comes in. They are one pipeline:
//! [`packet`] reads headers, [`vip`] finds what was dialed, [`flows`] and [`schedule`] the backend,
//! [`rewrite`] sends the packet there, [`icmp`] and [`answer`] do the rest of IP, and this file turns
//! the verdict into an action and a count. `explain` is the same, but changes no map. `sweep` and
//! `clock` never see a packet: the agent runs them by BPF_PROG_TEST_RUN. `viaduct_probe` sends health
//! checks of this host on their way, `viaduct_sk_lookup` hands connections to VIPs of the proxy to it,
//! and the programs of [`local`] translate at the sockets of this host.
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

mod answer;
mod challenge;
mod explain;
mod flows;
mod frame;
mod icmp;
mod local;
mod maps;
mod packet;
mod probe;
mod quic;
mod rewrite;
mod schedule;
mod scratch;
mod sk_lookup;
mod stage;
mod sweep;
mod table;
mod verifier;
mod vip;

use aya_ebpf::bindings::xdp_action::XDP_PASS;
use aya_ebpf::helpers::{bpf_jiffies64, bpf_ktime_get_ns};
use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp};
use aya_ebpf::programs::{SockAddrContext, SockContext, TcContext, XdpContext};
use router_common::{ClockSample, Mode, Verdict, vip_flags};

use crate::flows::Steered;
use crate::frame::{Dry, Frame, Tcx, Xdp};
use crate::packet::Fragment;
use crate::stage::Outcome;
use crate::vip::Vip;

/// The packet path of a network card. `frags`: frames larger than a page come in fragments, of which
/// the first holds all headers (kernel: include/uapi/linux/bpf.h, `BPF_F_XDP_HAS_FRAGS`).
#[xdp(frags)]
fn viaduct(ctx: XdpContext) -> u32 {
    run(&Xdp(&ctx)) as u32
}

/// The packet path of devices whose frames have checksums and segments still to be made.
#[classifier]
fn viaduct_tcx(ctx: TcContext) -> i32 {
    run(&Tcx(&ctx))
}

/// What goes out, by the same devices: sends health checks to the backends that they are for.
#[classifier]
fn viaduct_probe(ctx: TcContext) -> i32 {
    probe::run(&ctx)
}

/// What `viaduct` would do with a frame, left in `EXPLAINED`.
#[xdp(frags)]
fn explain(ctx: XdpContext) -> u32 {
    run(&Dry(&ctx)) as u32
}

#[inline(always)]
fn run<F: Frame>(frame: &F) -> i32 {
    let mut outcome = pipeline(frame);
    if outcome.is(Verdict::NoSuchVip) {
        outcome = for_nobody();
    }
    explain::report(frame, outcome.verdict());
    conclude(frame, outcome)
}

#[inline(always)]
fn pipeline<F: Frame>(frame: &F) -> Outcome {
    let parsed = Outcome::from(parse(frame));
    if !parsed.goes_on() {
        return parsed;
    }
    let Ok(scratch) = scratch::get() else {
        return Outcome::refused(Verdict::Internal);
    };
    let packet = &scratch.packet;
    if packet.fragment == Fragment::LATER {
        return deliver_unanswered(frame, frame.later_fragment());
    }
    if packet.is_icmp() {
        return icmp_error(frame);
    }
    let to_gateway = packet.to_gateway;
    if packet.to_vip {
        let outcome = to_vip(frame);
        if !outcome.is(Verdict::NoSuchVip) {
            return outcome;
        }
    }
    if to_gateway {
        return answer(frame);
    }
    Outcome::refused(Verdict::NoSuchVip)
}

/// A packet to no VIP: one port or protocol of a VIP's address that nobody has, or an address that the
/// prefilter took for another.
#[inline(always)]
fn for_nobody() -> Outcome {
    let is_vip =
        scratch::get().is_ok_and(|scratch| packet::is_vip_address(scratch.packet.key.destination));
    Outcome::refused(match is_vip {
        true => Verdict::NoSuchVip,
        false => Verdict::NotForUs,
    })
}

/// A packet to the gateway.
#[inline(always)]
fn answer<F: Frame>(frame: &F) -> Outcome {
    let outcome = frame.lead_back();
    if !F::DRY
        && outcome.is(Verdict::Replied)
        && let Ok(scratch) = scratch::get()
        && scratch.packet.fragment == Fragment::FIRST
    {
        flows::remember_answer_fragments(scratch);
    }
    outcome
}

#[inline(always)]
fn icmp_error<F: Frame>(frame: &F) -> Outcome {
    let outcome = frame.icmp();
    if outcome.is(Verdict::ErrorForwarded) {
        return frame.icmp_to_backend();
    }
    if outcome.is(Verdict::NotAReply) {
        return frame.icmp_to_client();
    }
    deliver_unanswered(frame, outcome)
}

/// Sends on what a stage found a backend for, but answers nothing: neither ICMP errors nor later
/// fragments may be answered by an error (RFC 1122 §3.2.2).
#[inline(always)]
fn deliver_unanswered<F: Frame>(frame: &F, found: Outcome) -> Outcome {
    if !found.goes_on() {
        return found;
    }
    let outcome = frame.deliver();
    if outcome.is(Verdict::TooBig) {
        return Outcome::refused(Verdict::DoesNotFit);
    }
    outcome
}

/// A client's packet, to its backend.
#[inline(always)]
fn to_vip<F: Frame>(frame: &F) -> Outcome {
    let mut outcome = Outcome::from(choose(frame));
    if outcome.is(Verdict::Proven) {
        outcome = frame.prove();
    }
    if outcome.is(Verdict::UnknownFlow) {
        outcome = Outcome::from(track(frame));
    }
    if outcome.is(Verdict::NewFlow) {
        outcome = frame.pick();
    }
    if outcome.is(Verdict::NewFlow) {
        outcome = frame.open();
    }
    if outcome.is(Verdict::NewFlow) {
        outcome = flows::make_translated();
    }
    if outcome.goes_on() {
        outcome = Outcome::from(rewrite::deliver(frame));
    }
    if outcome.is(Verdict::TooBig) {
        return frame.too_big();
    }
    if outcome.is(Verdict::Rejected) {
        return frame.reject();
    }
    if outcome.is(Verdict::Challenged) {
        return frame.challenge();
    }
    outcome
}

/// Counts the verdict and turns it into an action, unless there is one already.
#[inline(always)]
fn conclude<F: Frame>(frame: &F, outcome: Outcome) -> i32 {
    const PASSED: u32 = 1 << Verdict::NotForUs as u32
        | 1 << Verdict::NoSuchVip as u32
        | 1 << Verdict::NotAReply as u32
        | 1 << Verdict::HandedUp as u32;
    let verdict = outcome.verdict();
    if !F::DRY {
        maps::count_verdict(verdict);
    }
    match outcome.action() {
        Some(action) => action,
        None if PASSED >> (verdict & 31) & 1 == 1 => frame.pass(),
        None => {
            if outcome.is(Verdict::Internal) {
                frame.complaint();
            }
            frame.drop()
        }
    }
}

#[inline(always)]
fn complaint<F: Frame>(frame: &F) -> Result<Outcome, Verdict> {
    frame.complain();
    Err(Verdict::Internal)
}

#[inline(always)]
fn parse<F: Frame>(frame: &F) -> Result<Outcome, Verdict> {
    frame.pull();
    let packet = &mut scratch::get()?.packet;
    if F::DRY {
        explain::begin(frame, packet);
    }
    packet.parse(frame, maps::settings()?)?;
    Ok(Outcome::NEXT)
}

/// `UnknownFlow` asks for [`track`].
#[inline(always)]
fn choose<F: Frame>(_frame: &F) -> Result<Outcome, Verdict> {
    let settings = maps::settings()?;
    let scratch = scratch::get()?;
    let vip = vip::find(&scratch.packet.key, settings).ok_or(Verdict::NoSuchVip)?;
    scratch.vip = vip.index;
    if F::DRY {
        explain::note(|event| {
            event.vip = vip.index + 1;
            event.mode = vip.entry.mode;
        });
    }
    if vip.entry.mode == Mode::L7 as u8 {
        return Err(Verdict::HandedUp);
    }
    if vip.entry.flags & vip_flags::CHALLENGE != 0 && scratch.packet.tcp.rst() {
        return Err(Verdict::Proven);
    }
    let chosen = flows::by_ring_alone::<F>(&scratch.packet, vip, settings);
    scratch.steered = chosen.map_err(|verdict| rejected(vip, verdict))?;
    Ok(Outcome::NEXT)
}

/// `NewFlow` asks for [`pick`].
#[inline(always)]
fn track<F: Frame>(frame: &F) -> Result<Outcome, Verdict> {
    let settings = maps::settings()?;
    let scratch = scratch::get()?;
    let vip = Vip::at(scratch.vip).ok_or(Verdict::Internal)?;
    if vip.entry.flags & vip_flags::QUIC != 0
        && let Some(id) = quic::server(frame, &scratch.packet, vip)
        && let Ok(steered) = flows::by_id(vip, id)
    {
        scratch.steered = steered;
        return Ok(Outcome::NEXT);
    }
    let notes = (&mut scratch.hash, &mut scratch.place);
    scratch.steered = flows::of_client(frame, &scratch.packet, vip, settings, notes)?;
    Ok(Outcome::NEXT)
}

/// `NewFlow` asks for [`open`].
#[inline(always)]
fn pick<F: Frame>(_frame: &F) -> Result<Outcome, Verdict> {
    let scratch = scratch::get()?;
    let vip = Vip::at(scratch.vip).ok_or(Verdict::Internal)?;
    let opens = flows::pick::<F>(scratch).map_err(|verdict| rejected(vip, verdict))?;
    if opens {
        return Err(Verdict::NewFlow);
    }
    Ok(Outcome::NEXT)
}

/// `NewFlow` asks for [`flows::make_translated`].
#[inline(always)]
fn open<F: Frame>(frame: &F) -> Result<Outcome, Verdict> {
    if flows::open(frame, scratch::get()?)? {
        return Err(Verdict::NewFlow);
    }
    Ok(Outcome::NEXT)
}

/// What a client is told where nobody is there, unless its VIP is to be silent.
#[inline(always)]
fn rejected(vip: Vip, verdict: Verdict) -> Verdict {
    if verdict as u32 == Verdict::NoBackend as u32 && vip.entry.flags & vip_flags::SILENT == 0 {
        return Verdict::Rejected;
    }
    verdict
}

/// A packet to the gateway: a backend's answer, to its client.
#[inline(always)]
fn lead_back<F: Frame>(frame: &F) -> Result<Outcome, Verdict> {
    let settings = maps::settings()?;
    let scratch = scratch::get()?;
    let now = maps::now(settings);
    let packet = &scratch.packet;
    flows::of_backend::<F>(&packet.key, packet.tcp, settings, now, &mut scratch.flow)
        .ok_or(Verdict::NotAReply)?;
    rewrite::to_client(frame, &scratch.packet, &scratch.flow)
}

/// A piece of a datagram, to where its first one went.
#[inline(always)]
fn later_fragment<F: Frame>(frame: &F) -> Result<Outcome, Verdict> {
    let settings = maps::settings()?;
    let scratch = scratch::get()?;
    let packet = &scratch.packet;
    let now = maps::now(settings);
    if flows::of_fragment(packet, settings, now, &mut scratch.flow).is_none() {
        return Err(if packet.to_gateway {
            Verdict::NotAReply
        } else if packet::is_vip_address(packet.key.destination) {
            Verdict::Fragment
        } else {
            Verdict::NoSuchVip
        });
    }
    let flow = &scratch.flow;
    if flow.reply != 0 {
        return rewrite::to_client(frame, packet, flow);
    }
    scratch.steered = Steered {
        backend_id: flow.backend.into(),
        mode: Mode::from_bits(flow.mode),
        nat_port: flow.nat_port,
        new: false,
        verdict: Verdict::Forwarded,
    };
    Ok(Outcome::NEXT)
}

/// Declares the programs of a cgroup that are about a socket's peer.
macro_rules! peers {
    ($(($hook:ident, $program:ident, $does:expr),)*) => {
        $(
            #[cgroup_sock_addr($hook)]
            fn $program(ctx: SockAddrContext) -> i32 {
                $does(&ctx)
            }
        )*
    };
}

peers!(
    (connect4, local_connect4, local::connect::<false>),
    (connect6, local_connect6, local::connect::<true>),
    (sendmsg4, local_sendmsg4, local::send::<false>),
    (sendmsg6, local_sendmsg6, local::send::<true>),
    (recvmsg4, local_recvmsg4, local::receive::<false>),
    (recvmsg6, local_recvmsg6, local::receive::<true>),
    (getpeername4, local_getpeername4, local::name_peer::<false>),
    (getpeername6, local_getpeername6, local::name_peer::<true>),
);

/// A socket of this host that is no more.
#[cgroup_sock(sock_release)]
fn local_release(ctx: SockContext) -> i32 {
    local::release(&ctx)
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
