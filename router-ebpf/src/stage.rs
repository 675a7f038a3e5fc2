//! The stages of the pipeline, as functions that the verifier looks at one by one.
//!
//! A function whose symbol is global and whose arguments are the context and numbers is verified once,
//! for any arguments, and not again at every call (kernel: Documentation/bpf/verifier.rst). So the cost
//! of loading is the sum of the stages and not their product.

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::programs::{TcContext, XdpContext};
use router_common::Verdict;

use crate::frame::{Dry, Tcx, Xdp};

/// What a stage came to, in the one register that a BPF function returns: `verdict:32 | action:32`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Outcome(u64);

const NO_ACTION: u32 = u32::MAX;
const GOES_ON: u32 = u32::MAX;

impl Outcome {
    /// The next stage has it.
    pub const NEXT: Outcome = Outcome((GOES_ON as u64) << 32 | NO_ACTION as u64);

    /// A packet on its way.
    #[inline(always)]
    pub fn sent(verdict: Verdict, action: i32) -> Outcome {
        Outcome((verdict as u64) << 32 | action as u32 as u64)
    }

    /// The end of a packet, as its verdict has it.
    #[inline(always)]
    pub fn refused(verdict: Verdict) -> Outcome {
        Outcome((verdict as u64) << 32 | NO_ACTION as u64)
    }

    #[inline(always)]
    pub fn goes_on(self) -> bool {
        self.0 >> 32 == GOES_ON as u64
    }

    /// The [`Verdict`]'s number.
    #[inline(always)]
    pub fn verdict(self) -> u32 {
        (self.0 >> 32) as u32
    }

    #[inline(always)]
    pub fn is(self, verdict: Verdict) -> bool {
        self.verdict() == verdict as u32
    }

    #[inline(always)]
    pub fn action(self) -> Option<i32> {
        let action = self.0 as u32;
        (action != NO_ACTION).then_some(action as i32)
    }
}

impl From<Result<Outcome, Verdict>> for Outcome {
    #[inline(always)]
    fn from(result: Result<Outcome, Verdict>) -> Outcome {
        match result {
            Ok(outcome) => outcome,
            Err(verdict) => Outcome::refused(verdict),
        }
    }
}

/// Keeps an argument that a stage does not need: the compiler would pass anything instead, but the
/// verifier wants the context.
#[inline(always)]
fn used<T>(argument: *mut T) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: an instruction that does nothing.
    unsafe {
        core::arch::asm!("{argument} = {argument}", argument = in(reg) argument, options(nostack));
    }
    let _ = argument;
}

pub trait Stages {
    /// Headers to `Scratch::packet`.
    fn parse(&self) -> Outcome;
    /// Takes the proof of a client that was asked for one.
    fn prove(&self) -> Outcome;
    /// The backend of a packet without a flow,
    fn pick(&self) -> Outcome;
    /// and the flow.
    fn open(&self) -> Outcome;
    /// Sends the packet to the backend.
    fn deliver(&self) -> Outcome;
    /// Sends a backend's answer to its client.
    fn lead_back(&self) -> Outcome;
    fn icmp(&self) -> Outcome;
    /// Translates an ICMP error about an answer.
    fn icmp_to_backend(&self) -> Outcome;
    /// Translates an ICMP error about a client's packet.
    fn icmp_to_client(&self) -> Outcome;
    fn later_fragment(&self) -> Outcome;
    /// Tells the client that nobody is there.
    fn reject(&self) -> Outcome;
    /// Tells the client that its packet does not fit.
    fn too_big(&self) -> Outcome;
    /// Asks the client whether it exists.
    fn challenge(&self) -> Outcome;
    /// Logs that the tables contradict each other.
    fn complaint(&self) -> Outcome;
}

macro_rules! stages {
    ($frame:ident, $context:ident, $raw:ty, $(($stage:ident, $symbol:ident, $does:path),)*) => {
        impl Stages for $frame<'_> {
            $(
                #[inline(always)]
                fn $stage(&self) -> Outcome {
                    Outcome($symbol(self.raw()))
                }
            )*
        }

        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            extern "C" fn $symbol(context: *mut $raw) -> u64 {
                used(context);
                let context = $context::new(context);
                Outcome::from($does(&$frame(&context))).0
            }
        )*
    };
}

stages!(
    Xdp,
    XdpContext,
    xdp_md,
    (parse, xdp_parse, crate::parse),
    (prove, xdp_prove, crate::challenge::take),
    (pick, xdp_pick, crate::pick),
    (open, xdp_open, crate::open),
    (deliver, xdp_deliver, crate::rewrite::deliver),
    (lead_back, xdp_lead_back, crate::lead_back),
    (icmp, xdp_icmp, crate::icmp::steer),
    (
        icmp_to_backend,
        xdp_icmp_to_backend,
        crate::icmp::to_backend
    ),
    (icmp_to_client, xdp_icmp_to_client, crate::icmp::to_client),
    (later_fragment, xdp_later_fragment, crate::later_fragment),
    (reject, xdp_reject, crate::answer::reject),
    (too_big, xdp_too_big, crate::answer::too_big),
    (challenge, xdp_challenge, crate::challenge::ask),
    (complaint, xdp_complaint, crate::complaint),
);

stages!(
    Dry,
    XdpContext,
    xdp_md,
    (parse, dry_parse, crate::parse),
    (prove, dry_prove, crate::challenge::take),
    (pick, dry_pick, crate::pick),
    (open, dry_open, crate::open),
    (deliver, dry_deliver, crate::rewrite::deliver),
    (lead_back, dry_lead_back, crate::lead_back),
    (icmp, dry_icmp, crate::icmp::steer),
    (
        icmp_to_backend,
        dry_icmp_to_backend,
        crate::icmp::to_backend
    ),
    (icmp_to_client, dry_icmp_to_client, crate::icmp::to_client),
    (later_fragment, dry_later_fragment, crate::later_fragment),
    (reject, dry_reject, crate::answer::reject),
    (too_big, dry_too_big, crate::answer::too_big),
    (challenge, dry_challenge, crate::challenge::ask),
    (complaint, dry_complaint, crate::complaint),
);

stages!(
    Tcx,
    TcContext,
    __sk_buff,
    (parse, tcx_parse, crate::parse),
    (prove, tcx_prove, crate::challenge::take),
    (pick, tcx_pick, crate::pick),
    (open, tcx_open, crate::open),
    (deliver, tcx_deliver, crate::rewrite::deliver),
    (lead_back, tcx_lead_back, crate::lead_back),
    (icmp, tcx_icmp, crate::icmp::steer),
    (
        icmp_to_backend,
        tcx_icmp_to_backend,
        crate::icmp::to_backend
    ),
    (icmp_to_client, tcx_icmp_to_client, crate::icmp::to_client),
    (later_fragment, tcx_later_fragment, crate::later_fragment),
    (reject, tcx_reject, crate::answer::reject),
    (too_big, tcx_too_big, crate::answer::too_big),
    (challenge, tcx_challenge, crate::challenge::ask),
    (complaint, tcx_complaint, crate::complaint),
);
