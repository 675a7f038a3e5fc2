//! Hands connections to a VIP of `Mode::L7` to the proxy on this host, whatever address and port its
//! listener has (kernel: Documentation/bpf/prog_sk_lookup.rst).
//!
//! Runs when the kernel looks for the listener of a TCP connection that begins; the packets were
//! passed up by `viaduct` before. Where the proxy's listeners share their port, the kernel spreads
//! connections over all of them.

use aya_ebpf::bindings::sk_action::SK_PASS;
use aya_ebpf::macros::{map, sk_lookup};
use aya_ebpf::maps::SockMap;
use aya_ebpf::programs::SkLookupContext;
use router_common::{
    Addr, FlowKey, IPPROTO_TCP, LISTENER_V4, LISTENER_V6, LISTENERS as COUNT, Mode, Ports,
};

use crate::{maps, vip};

/// Kernel: include/linux/socket.h.
const AF_INET: u32 = 2;

/// The proxy's listener for each family. Written by the agent; a socket that closes leaves by itself.
#[map]
static LISTENERS: SockMap = SockMap::with_max_entries(COUNT, 0);

#[sk_lookup]
fn viaduct_sk_lookup(ctx: SkLookupContext) -> u32 {
    hand_up(&ctx);
    // Without a listener assigned, the kernel looks for one as ever.
    SK_PASS
}

#[inline(always)]
fn hand_up(ctx: &SkLookupContext) -> Option<()> {
    // SAFETY: the kernel's own context, whose fields the verifier lets be read one by one.
    let (protocol, family, port) = unsafe {
        (
            (*ctx.lookup).protocol,
            (*ctx.lookup).family,
            (*ctx.lookup).local_port,
        )
    };
    if protocol != IPPROTO_TCP as u32 {
        return None;
    }
    let (destination, listener) = if family == AF_INET {
        // SAFETY: as above; of an IPv4 packet.
        let word = unsafe { (*ctx.lookup).local_ip4 };
        (Addr::from_v4_word(word), LISTENER_V4)
    } else {
        // SAFETY: as above; of an IPv6 packet.
        let words = unsafe {
            [
                core::ptr::read_volatile(&raw const (*ctx.lookup).local_ip6[0]),
                core::ptr::read_volatile(&raw const (*ctx.lookup).local_ip6[1]),
                core::ptr::read_volatile(&raw const (*ctx.lookup).local_ip6[2]),
                core::ptr::read_volatile(&raw const (*ctx.lookup).local_ip6[3]),
            ]
        };
        (Addr::from_words(words), LISTENER_V6)
    };
    let key = FlowKey {
        source: Addr::default(),
        destination,
        ports: Ports::new(0, port as u16),
        proto: IPPROTO_TCP,
    };
    let vip = vip::find(&key, maps::settings().ok()?)?;
    if vip.entry.mode == Mode::L7 as u8 {
        LISTENERS.redirect_sk_lookup(ctx, listener, 0).ok()?;
    }
    Some(())
}
