//! Moves bytes between the proxy and a backend on the same host from socket to socket, past TCP.
//!
//! `viaduct_established` runs for every TCP connection of the cgroup that comes to be and looks for
//! those the proxy marked. When the other end turns out to be on this host, both sockets are in
//! `SOCKETS`, and `viaduct_redirect` runs for whatever either sends. It never reads the bytes.
//!
//! The kernel's receiver reads what was redirected before what came by TCP
//! (net/ipv4/tcp_bpf.c, `tcp_bpf_recvmsg`), so each direction goes from redirecting to TCP at most
//! once and never back: bytes by TCP are always the younger ones. That two sockets are the ends of one
//! connection is told by their sequence numbers, which addresses alone would not prove across network
//! namespaces.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(
    not(target_arch = "bpf"),
    allow(
        dead_code,
        unused_imports,
        reason = "only the BPF target has entry points"
    )
)]

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::sk_action::SK_PASS;
use aya_ebpf::bindings::{
    BPF_F_INGRESS, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB,
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, bpf_sock, bpf_sock_ops,
};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::generated::{
    bpf_get_socket_cookie, bpf_msg_redirect_hash, bpf_sk_storage_get,
};
use aya_ebpf::macros::{btf_map, map, sk_msg, sock_ops};
use aya_ebpf::maps::{LruHashMap, PerCpuArray, SockHash};
use aya_ebpf::programs::{SkMsgContext, SockOpsContext};
use core::ptr::{addr_of, from_mut, from_ref, null_mut, read_volatile};
use router_common::{
    SOCKMAP_BYTES, SOCKMAP_MARK, SOCKMAP_MESSAGE_BYTES, SOCKMAP_SOCKETS, SockmapCounter,
};

/// Kernel: include/linux/socket.h.
const AF_INET: u32 = 2;

/// The mark of this agent's connections.
#[unsafe(no_mangle)]
static MARK: u32 = SOCKMAP_MARK;

/// Both ends of each connection, by [`key`]. A socket that closes leaves by itself.
#[map]
static SOCKETS: SockHash<u64> = SockHash::with_max_entries(SOCKMAP_SOCKETS, 0);

/// Connections whose passive end has not been seen. It is within microseconds, or not on this host.
#[map]
static DIALED: LruHashMap<Tuple, Dialed> = LruHashMap::with_max_entries(4096, 0);

/// How many messages the ends of a connection have sent, by the active end's cookie. One that is
/// forgotten goes on by TCP.
#[map]
static SENT: LruHashMap<u64, [u64; 2]> = LruHashMap::with_max_entries(SOCKMAP_SOCKETS, 0);

/// By [`SockmapCounter`].
#[map]
static SOCKMAP_COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(SockmapCounter::COUNT, 0);

#[btf_map]
static ENDS: SkStorage<End> = SkStorage::new();

/// Seen from the active end; addresses and the passive port in the byte order of the context.
#[repr(C)]
#[derive(Clone, Copy)]
struct Tuple {
    active: [u32; 4],
    passive: [u32; 4],
    active_port: u32,
    passive_port: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Dialed {
    /// Of the active end's socket: no two sockets have the same until the host restarts.
    cookie: u64,
    snd_nxt: u32,
    rcv_nxt: u32,
}

/// What the program knows of a socket.
#[repr(C)]
#[derive(Clone, Copy)]
struct End {
    /// Where the other end is in [`SOCKETS`].
    peer: u64,
    /// The other end's messages at our last one.
    heard: u64,
    /// Redirected since the other end last sent, as [`SOCKMAP_BYTES`] counts.
    unread: u32,
    /// Not 0: all goes by TCP from now on.
    by_tcp: u32,
}

#[derive(Clone, Copy)]
enum Side {
    Active = 0,
    Passive = 1,
}

#[inline(always)]
const fn key(cookie: u64, side: Side) -> u64 {
    cookie << 1 | side as u64
}

#[sock_ops]
fn viaduct_established(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => dialed(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(&ctx),
        _ => None,
    };
    1
}

/// connect() has succeeded; nothing has been sent.
#[inline(always)]
fn dialed(ctx: &SockOpsContext) -> Option<()> {
    let sk = socket(ctx)?;
    // SAFETY: `sk` is not null; MARK is never written.
    let (mark, ours) = unsafe { (read_volatile(addr_of!((*sk).mark)), read_volatile(&MARK)) };
    if mark != ours {
        return None;
    }
    // SAFETY: the helper takes the context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let (snd_nxt, rcv_nxt) = sequence_numbers(ctx);
    let (local, remote) = (local(ctx), remote(ctx));
    let tuple = Tuple {
        active: local.0,
        passive: remote.0,
        active_port: local.1,
        passive_port: remote.1,
    };
    join(ctx, cookie, Side::Active)?;
    SENT.insert(cookie, [0; 2], 0).ok()?;
    let dialed = Dialed {
        cookie,
        snd_nxt,
        rcv_nxt,
    };
    DIALED.insert(tuple, dialed, 0).ok()
}

/// The handshake's last segment has come; accept() has not returned.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) -> Option<()> {
    let (local, remote) = (local(ctx), remote(ctx));
    let tuple = Tuple {
        active: remote.0,
        passive: local.0,
        active_port: remote.1,
        passive_port: local.1,
    };
    // SAFETY: copied at once. A value that passes to another connection meanwhile has other sequence
    // numbers.
    let dialed = unsafe { *DIALED.get(tuple)? };
    if sequence_numbers(ctx) != (dialed.rcv_nxt, dialed.snd_nxt) {
        return None;
    }
    let _ = DIALED.remove(tuple);
    join(ctx, dialed.cookie, Side::Passive)?;
    count(SockmapCounter::Connections);
    Some(())
}

#[inline(always)]
fn join(ctx: &SockOpsContext, cookie: u64, side: Side) -> Option<()> {
    let peer = match side {
        Side::Active => Side::Passive,
        Side::Passive => Side::Active,
    };
    let mut new = End {
        peer: key(cookie, peer),
        heard: 0,
        unread: 0,
        by_tcp: 0,
    };
    // SAFETY: the helper takes the context's socket and copies `new`.
    let end = unsafe {
        let map = from_ref(&ENDS).cast_mut().cast();
        let create = BPF_SK_STORAGE_GET_F_CREATE.into();
        bpf_sk_storage_get(map, socket(ctx)?.cast(), from_mut(&mut new).cast(), create)
    };
    if end.is_null() {
        return None;
    }
    // SAFETY: the context is valid for the whole run.
    let ops = unsafe { &mut *ctx.ops };
    SOCKETS
        .update(key(cookie, side), ops, BPF_NOEXIST.into())
        .ok()
}

/// Runs as the sender, which holds its socket's lock.
#[sk_msg]
fn viaduct_redirect(ctx: SkMsgContext) -> u32 {
    redirect(&ctx);
    // Passed, the message goes by TCP unless it was redirected.
    SK_PASS
}

#[inline(always)]
fn redirect(ctx: &SkMsgContext) -> Option<()> {
    // SAFETY: the context is valid for the whole run; the value found is the socket's own, and only
    // its sender is here.
    let end = unsafe {
        let sk = (*ctx.msg).__bindgen_anon_3.sk;
        if sk.is_null() {
            return None;
        }
        let map = from_ref(&ENDS).cast_mut().cast();
        bpf_sk_storage_get(map, sk.cast(), null_mut(), 0)
            .cast::<End>()
            .as_mut()?
    };
    let within_bounds = note(end, ctx.size());
    let redirected = within_bounds && end.by_tcp == 0 && {
        // SAFETY: the helper reads the key and notes the socket it finds.
        let action = unsafe {
            let map = from_ref(&SOCKETS).cast_mut().cast();
            let peer = from_mut(&mut end.peer).cast();
            bpf_msg_redirect_hash(ctx.msg, map, peer, BPF_F_INGRESS.into())
        };
        action == SK_PASS.into()
    };
    if !redirected && end.by_tcp == 0 {
        end.by_tcp = 1;
        count(SockmapCounter::Fallbacks);
    }
    Some(())
}

/// Counts a message of `size` bytes. Whether it may be redirected.
#[inline(always)]
fn note(end: &mut End, size: u32) -> bool {
    let Some(sent) = SENT.get_ptr_mut(end.peer >> 1) else {
        return false;
    };
    // SAFETY: the memory stays the map's, and each end writes its own word. A value that passes to
    // another connection is zero at first, which at worst is not what was heard.
    let heard = unsafe {
        let [active, passive] = &mut *sent;
        let (own, other) = if end.peer & 1 == Side::Passive as u64 {
            (active, passive)
        } else {
            (passive, active)
        };
        *own += 1;
        read_volatile(other)
    };
    if end.heard != heard {
        end.heard = heard;
        end.unread = 0;
    }
    end.unread = end
        .unread
        .saturating_add(size)
        .saturating_add(SOCKMAP_MESSAGE_BYTES);
    end.unread <= SOCKMAP_BYTES
}

#[inline(always)]
fn count(counter: SockmapCounter) {
    if let Some(count) = SOCKMAP_COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the pointer is to this core's value. An interrupt in between may lose one.
        unsafe { *count += 1 };
    }
}

#[inline(always)]
fn socket(ctx: &SockOpsContext) -> Option<*mut bpf_sock> {
    // SAFETY: the context is valid for the whole run.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    (!sk.is_null()).then_some(sk)
}

/// The next one to send, and the next one expected.
#[inline(always)]
fn sequence_numbers(ctx: &SockOpsContext) -> (u32, u32) {
    let ops: *mut bpf_sock_ops = ctx.ops;
    // SAFETY: as above.
    unsafe {
        (
            read_volatile(addr_of!((*ops).snd_nxt)),
            read_volatile(addr_of!((*ops).rcv_nxt)),
        )
    }
}

#[inline(always)]
fn local(ctx: &SockOpsContext) -> ([u32; 4], u32) {
    let ops: *mut bpf_sock_ops = ctx.ops;
    // SAFETY: as above.
    unsafe {
        let port = read_volatile(addr_of!((*ops).local_port));
        if ctx.family() == AF_INET {
            let word = read_volatile(addr_of!((*ops).local_ip4));
            return ([0, 0, 0, word], port);
        }
        let mut words = [0; 4];
        local_v6(ops, &mut words);
        (words, port)
    }
}

#[inline(always)]
fn remote(ctx: &SockOpsContext) -> ([u32; 4], u32) {
    let ops: *mut bpf_sock_ops = ctx.ops;
    // SAFETY: as above. Other than the local one, the port is in network byte order.
    unsafe {
        let port = u32::from_be(read_volatile(addr_of!((*ops).remote_port)));
        if ctx.family() == AF_INET {
            let word = read_volatile(addr_of!((*ops).remote_ip4));
            return ([0, 0, 0, word], port);
        }
        let mut words = [0; 4];
        remote_v6(ops, &mut words);
        (words, port)
    }
}

/// A function of its own, or LLVM merges its reads of the context with those of the other branch, and
/// the verifier takes no offset that varies.
#[inline(never)]
fn local_v6(ops: *mut bpf_sock_ops, words: &mut [u32; 4]) {
    // SAFETY: the caller's context.
    unsafe {
        words[0] = read_volatile(addr_of!((*ops).local_ip6[0]));
        words[1] = read_volatile(addr_of!((*ops).local_ip6[1]));
        words[2] = read_volatile(addr_of!((*ops).local_ip6[2]));
        words[3] = read_volatile(addr_of!((*ops).local_ip6[3]));
    }
}

/// As [`local_v6`].
#[inline(never)]
fn remote_v6(ops: *mut bpf_sock_ops, words: &mut [u32; 4]) {
    // SAFETY: the caller's context.
    unsafe {
        words[0] = read_volatile(addr_of!((*ops).remote_ip6[0]));
        words[1] = read_volatile(addr_of!((*ops).remote_ip6[1]));
        words[2] = read_volatile(addr_of!((*ops).remote_ip6[2]));
        words[3] = read_volatile(addr_of!((*ops).remote_ip6[3]));
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
