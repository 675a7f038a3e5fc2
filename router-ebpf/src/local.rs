//! Clients on this host: what they dial is translated at the socket, and their packets never are.
//!
//! Attached to a cgroup, the programs run when a process in it calls connect(), sendto() and the like,
//! as that process: other than packet programs, which may interrupt them on the same core, so the
//! scratch is not theirs, and counting is atomic. Backends are chosen as for packets, for a client at
//! the loopback address. Whatever mode a VIP is in, the socket talks to the backend's own address; VIPs
//! of the proxy are left alone.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::bpf_set_retval;
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_sk_storage_get};
use aya_ebpf::programs::{SockAddrContext, SockContext};
use core::ptr::{addr_of, addr_of_mut, from_ref, null_mut, read_volatile, write_volatile};
use router_common::{
    Addr, FlowKey, FlowState, IPPROTO_TCP, IPPROTO_UDP, LocalFlow, LocalPeer, LocalPeerKey,
    LocalSocket, Mode, Peer, Ports, RingSlot, Settings, Side, Verdict, is_probe, prefilter_bit,
    ticks_since, vip_flags,
};

use crate::frame::Xdp;
use crate::verifier::{add, load, swap};
use crate::vip::{Rate, Vip};
use crate::{maps, schedule, table, vip};

/// What the programs return: the system call goes on, or fails with EPERM unless they say otherwise.
const ALLOW: i32 = 1;
const REFUSE: i32 = 0;

/// Linux: include/uapi/asm-generic/errno-base.h and errno.h.
const EAGAIN: i32 = 11;
const ECONNREFUSED: i32 = 111;

/// Who a local client is to source lists, affinity and hashing schedulers: ::1, or 127.0.0.1.
const LOOPBACK: Addr = Addr::from_words([0, 0, 0, 1_u32.to_be()]);
const LOOPBACK_V4: Addr = Addr::from_v4_word(0x7f00_0001_u32.to_be());

/// connect(): a connection, or the one peer of a datagram socket.
#[inline(always)]
pub fn connect<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    forget(socket(ctx));
    conclude(dial::<V6>(ctx))
}

/// sendto() and sendmsg() with an address: one datagram.
#[inline(always)]
pub fn send<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    conclude(address::<V6>(ctx))
}

/// recvfrom() and recvmsg() with room for an address: a backend's is shown as the VIP.
#[inline(always)]
pub fn receive<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    let Some(socket) = socket(ctx) else {
        return ALLOW;
    };
    let from = peer::<V6>(ctx);
    if socket.backend == from {
        set_peer::<V6>(ctx, &socket.dialed);
    } else if let Some(vip) = other_side(cookie(ctx), from, Side::Backend) {
        set_peer::<V6>(ctx, &vip.peer);
    }
    ALLOW
}

/// getpeername(): as in [`receive`].
#[inline(always)]
pub fn name_peer<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    if let Some(socket) = socket(ctx)
        && socket.backend == peer::<V6>(ctx)
    {
        set_peer::<V6>(ctx, &socket.dialed);
    }
    ALLOW
}

/// close() of the last descriptor.
#[inline(always)]
pub fn release(ctx: &SockContext) -> i32 {
    // SAFETY: the helper takes the context for the socket; a value it finds is the socket's own.
    let socket = unsafe {
        let map = from_ref(&maps::LOCAL_SOCKETS).cast_mut().cast();
        bpf_sk_storage_get(map, ctx.as_ptr(), null_mut(), 0)
            .cast::<LocalSocket>()
            .as_mut()
    };
    forget(socket);
    ALLOW
}

/// Turns what was found out into what the system call does, and counts it.
#[inline(always)]
fn conclude(outcome: Result<(), Verdict>) -> i32 {
    let Err(verdict) = outcome else { return ALLOW };
    let errno = match verdict {
        Verdict::NotForUs | Verdict::NoSuchVip | Verdict::HandedUp => return ALLOW,
        Verdict::Translated | Verdict::NoBackend => 0,
        Verdict::RateLimited => EAGAIN,
        Verdict::SourceDenied => {
            count(verdict);
            return REFUSE;
        }
        _ => ECONNREFUSED,
    };
    count(verdict);
    if errno == 0 {
        return ALLOW;
    }
    // SAFETY: the helper only notes the number.
    unsafe { bpf_set_retval(-errno) };
    REFUSE
}

/// A backend for a socket that connects. `Translated` is for the count.
#[inline(always)]
fn dial<const V6: bool>(ctx: &SockAddrContext) -> Result<(), Verdict> {
    let dialed = vip_address::<V6>(ctx)?;
    let settings = maps::settings()?;
    let (id, to, flow) = choose::<V6>(ctx, &dialed, settings)?;
    // A socket without memory for it is translated all the same: only its names will be others.
    if let Some(socket) = socket_or_new(ctx) {
        socket.dialed = dialed;
        socket.backend = to;
        if swap(&socket.flow.0, 0, flow.0) {
            count_flow(flow, 1);
        }
    }
    set_peer::<V6>(ctx, &to);
    count_new(id);
    Err(Verdict::Translated)
}

/// The backend for a datagram: the one that the socket's last datagrams for this VIP went to, as long
/// as it serves and they are not too long ago.
#[inline(always)]
fn address<const V6: bool>(ctx: &SockAddrContext) -> Result<(), Verdict> {
    let dialed = vip_address::<V6>(ctx)?;
    let settings = maps::settings()?;
    let now = maps::now(settings);
    let cookie = cookie(ctx);
    if let Some(known) = other_side(cookie, dialed, Side::Dialed)
        && ticks_since(known.seen as u16 as u32, now) <= table::timeout(settings, FlowState::Udp)
        && let Some(backend) = maps::BACKENDS.get(known.backend.into())
        && table::serves(backend, known.generation)
    {
        if known.seen != now {
            known.seen = now;
        }
        let to = known.peer;
        set_peer::<V6>(ctx, &to);
        return Ok(());
    }
    let (id, to, flow) = choose::<V6>(ctx, &dialed, settings)?;
    // So that `receive` looks at the table for this socket at all.
    socket_or_new(ctx).ok_or(Verdict::Internal)?;
    let there = LocalPeer {
        peer: to,
        backend: id as u16,
        generation: flow.generation(),
        seen: now,
    };
    let back = LocalPeer {
        peer: dialed,
        ..there
    };
    // Answers before questions: whoever is sent to must be known when it answers.
    remember(cookie, to, Side::Backend, &back)?;
    remember(cookie, dialed, Side::Dialed, &there)?;
    set_peer::<V6>(ctx, &to);
    count_new(id);
    Err(Verdict::Translated)
}

/// What the socket dials, if it may be a VIP.
#[inline(always)]
fn vip_address<const V6: bool>(ctx: &SockAddrContext) -> Result<Peer, Verdict> {
    let dialed = peer::<V6>(ctx);
    let (word, bit) = prefilter_bit(dialed.addr);
    let bits = maps::PREFILTER.get(word).ok_or(Verdict::Internal)?;
    if *bits >> (bit & 63) & 1 == 0 || is_probe(mark(ctx)) {
        return Err(Verdict::NotForUs);
    }
    Ok(dialed)
}

/// A backend for a client of this host, by its id and address, and what is counted for it.
#[inline(always)]
fn choose<const V6: bool>(
    ctx: &SockAddrContext,
    dialed: &Peer,
    settings: &Settings,
) -> Result<(u32, Peer, LocalFlow), Verdict> {
    let proto = protocol(ctx).ok_or(Verdict::NotForUs)?;
    let cookie = cookie(ctx);
    let key = FlowKey {
        source: source(&dialed.addr),
        destination: dialed.addr,
        // Sockets have no port yet, but numbers of their own.
        ports: Ports::new((cookie ^ cookie >> 16) as u16, dialed.port),
        proto,
    };
    let vip = vip::find(&key, settings).ok_or(Verdict::NoSuchVip)?;
    if vip.entry.mode == Mode::L7 as u8 {
        return Err(Verdict::HandedUp);
    }
    let id = pick(&key, vip, settings)?;
    let backend = schedule::member(vip, id).ok_or(nobody(vip))?;
    if !V6 && !backend.address.is_v4() {
        // An IPv4 socket cannot talk to it; a tunnel from the gateway can.
        return Err(Verdict::NotForUs);
    }
    let flow = LocalFlow::new(id, backend.generation);
    let peer = Peer::new(backend.address, backend.port_for(dialed.port));
    Ok((id, peer, flow))
}

#[inline(always)]
fn pick(key: &FlowKey, vip: Vip, settings: &Settings) -> Result<u32, Verdict> {
    if !vip::admits(vip, &key.source) {
        return Err(Verdict::SourceDenied);
    }
    let now = maps::now(settings);
    // Nobody forges a local client, so there is no challenge.
    if vip::count_new(vip, &key.source, settings, now, false) != Rate::Within {
        return Err(Verdict::RateLimited);
    }
    let slot = schedule::slot_of::<Xdp<'_>>(vip, key)?;
    if let Some(id) = schedule::at_once(vip, slot).map_err(|_| nobody(vip))? {
        return Ok(id);
    }
    let hash = key.hash(&settings.hash_keys);
    match local_slow(vip.index, slot.0, hash, now, key.ports.destination().into()) {
        0 => Err(Verdict::Internal),
        id => Ok(id as u32),
    }
}

/// [`schedule::balanced`] for a client that dialed `port` of a VIP. Verified by itself, as
/// [`crate::stage`] explains.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn local_slow(vip: u32, slot: u32, hash: u64, now: u32, port: u32) -> u64 {
    let Some(vip) = Vip::at(vip) else { return 0 };
    let key = FlowKey {
        source: source(&vip.entry.addr),
        destination: vip.entry.addr,
        ports: Ports::new(0, port as u16),
        proto: vip.entry.proto,
    };
    schedule::balanced(&key, vip, RingSlot(slot), hash, now, 0)
}

/// Who a client of this host is to a VIP.
#[inline(always)]
fn source(vip: &Addr) -> Addr {
    if vip.is_v4() { LOOPBACK_V4 } else { LOOPBACK }
}

/// A VIP that is silent towards packets is left to them.
#[inline(always)]
fn nobody(vip: Vip) -> Verdict {
    if vip.entry.flags & vip_flags::SILENT == 0 {
        Verdict::Rejected
    } else {
        Verdict::NoBackend
    }
}

/// Undoes what the socket dialed before.
#[inline(always)]
fn forget(socket: Option<&mut LocalSocket>) {
    let Some(socket) = socket else { return };
    let flow = LocalFlow(load(&socket.flow.0));
    if flow.0 != 0 && swap(&socket.flow.0, flow.0, 0) {
        count_flow(flow, -1);
    }
    socket.dialed = Peer::default();
    socket.backend = Peer::default();
}

/// One connected socket more or less on a backend, if it still has that id.
#[inline(always)]
fn count_flow(flow: LocalFlow, by: i64) {
    let id = flow.backend();
    if let Some(backend) = maps::BACKENDS.get(id)
        && backend.generation == flow.generation()
        && let Some(flows) = maps::LOCAL_FLOWS.get(id)
    {
        add(flows, by as u64);
    }
}

#[inline(always)]
fn count_new(backend: u32) {
    if let Some(counters) = maps::BACKEND_COUNTERS.get_ptr_mut(backend) {
        // SAFETY: the pointer is to the map's value.
        add(unsafe { &(*counters).new_flows }, 1);
    }
}

#[inline(always)]
fn count(verdict: Verdict) {
    if let Some(packets) = maps::VERDICTS.get_ptr_mut(verdict as u32) {
        // SAFETY: as above.
        add(unsafe { &*packets }, 1);
    }
}

#[inline(always)]
fn other_side(cookie: u64, peer: Peer, side: Side) -> Option<&'static mut LocalPeer> {
    let key = LocalPeerKey {
        cookie,
        peer,
        side: side as u32,
    };
    let found = maps::LOCAL_PEERS.get_ptr_mut(key)?;
    // SAFETY: the memory stays the map's. A value that passes to another key while it is read sends
    // one datagram, or shows one name, of that key.
    Some(unsafe { &mut *found })
}

#[inline(always)]
fn remember(cookie: u64, peer: Peer, side: Side, other: &LocalPeer) -> Result<(), Verdict> {
    let key = LocalPeerKey {
        cookie,
        peer,
        side: side as u32,
    };
    maps::LOCAL_PEERS
        .insert(key, other, 0)
        .map_err(|_| Verdict::FlowTableFull)
}

#[inline(always)]
fn socket(ctx: &SockAddrContext) -> Option<&'static mut LocalSocket> {
    // SAFETY: the socket is the context's, and the value the socket's own.
    unsafe { maps::LOCAL_SOCKETS.get_ptr_mut(ctx).as_mut() }
}

#[inline(always)]
fn socket_or_new(ctx: &SockAddrContext) -> Option<&'static mut LocalSocket> {
    // SAFETY: as above. A new value is all zero.
    unsafe {
        maps::LOCAL_SOCKETS
            .get_or_insert_ptr_mut(ctx, None)
            .as_mut()
    }
}

#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the helper takes the context.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

#[inline(always)]
fn mark(ctx: &SockAddrContext) -> u32 {
    // SAFETY: the verifier knows both pointers to be valid.
    unsafe { read_volatile(addr_of!((*(*ctx.sock_addr).__bindgen_anon_1.sk).mark)) }
}

/// TCP or UDP.
#[inline(always)]
fn protocol(ctx: &SockAddrContext) -> Option<u8> {
    // SAFETY: the context is valid for the whole run.
    let protocol = unsafe { read_volatile(addr_of!((*ctx.sock_addr).protocol)) };
    (protocol == IPPROTO_TCP as u32 || protocol == IPPROTO_UDP as u32).then_some(protocol as u8)
}

/// The peer's address that the system call is about. Word by word: the verifier takes no others.
#[inline(always)]
fn peer<const V6: bool>(ctx: &SockAddrContext) -> Peer {
    let raw: *mut bpf_sock_addr = ctx.sock_addr;
    // SAFETY: as above.
    unsafe {
        let addr = if V6 {
            let words = addr_of!((*raw).user_ip6).cast::<u32>();
            Addr::from_words([
                read_volatile(words),
                read_volatile(words.add(1)),
                read_volatile(words.add(2)),
                read_volatile(words.add(3)),
            ])
        } else {
            Addr::from_v4_word(read_volatile(addr_of!((*raw).user_ip4)))
        };
        let port = read_volatile(addr_of!((*raw).user_port)) as u16;
        Peer::new(addr, u16::from_be(port))
    }
}

#[inline(always)]
fn set_peer<const V6: bool>(ctx: &SockAddrContext, peer: &Peer) {
    let raw: *mut bpf_sock_addr = ctx.sock_addr;
    // SAFETY: as above.
    unsafe {
        if V6 {
            let words = addr_of_mut!((*raw).user_ip6).cast::<u32>();
            let new = peer.addr.words();
            write_volatile(words, new[0]);
            write_volatile(words.add(1), new[1]);
            write_volatile(words.add(2), new[2]);
            write_volatile(words.add(3), new[3]);
        } else {
            write_volatile(addr_of_mut!((*raw).user_ip4), peer.addr.v4_word());
        }
        write_volatile(addr_of_mut!((*raw).user_port), peer.port.to_be() as u32);
    }
}
