//! Moves bytes between the proxy and a backend on the same host from socket to socket, past TCP.

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
use aya_ebpf::bindings::{
    BPF_F_INGRESS, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB,
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, bpf_sock_ops, sk_action::SK_PASS, sk_msg_md,
};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_sk_storage_get};
use aya_ebpf::macros::{btf_map, map, sk_msg, sock_ops};
use aya_ebpf::maps::{LruHashMap, PerCpuArray, SockHash};
use aya_ebpf::programs::{SkMsgContext, SockOpsContext};
use core::ptr::{addr_of, from_ref, null_mut, read_volatile};
use router_common::{REQUESTS, RESPONSES, SOCKMAP_BYTES, SOCKMAP_MARK};

const AF_INET: u32 = 2;

#[map]
static SOCKETS: SockHash<u64> = SockHash::with_max_entries(65_536, 0);
#[map]
static DIALED: LruHashMap<Tuple, Dialed> = LruHashMap::with_max_entries(4096, 0);
#[map]
static TURNS: LruHashMap<u64, u64> = LruHashMap::with_max_entries(16_384, 0);
#[map]
static COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(4, 0);
#[btf_map]
static ENDS: SkStorage<End> = SkStorage::new();

#[unsafe(no_mangle)]
static DIRECTIONS: u32 = REQUESTS | RESPONSES;

#[repr(C)]
#[derive(Clone, Copy)]
struct Tuple {
    client: [u32; 4],
    server: [u32; 4],
    client_port: u32,
    server_port: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Dialed {
    cookie: u64,
    snd_nxt: u32,
    rcv_nxt: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct End {
    peer: u64,
    turn: u64,
    sent: u32,
    tcp: u32,
}

fn count(index: u32) {
    if let Some(count) = COUNTS.get_ptr_mut(index) {
        unsafe { *count += 1 };
    }
}

#[sock_ops]
fn viaduct_established(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => active(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => passive(&ctx),
        _ => None,
    };
    1
}

#[inline(always)]
fn active(ctx: &SockOpsContext) -> Option<()> {
    let ops = ctx.ops;
    let sk = unsafe { (*ops).__bindgen_anon_2.sk };
    if sk.is_null() || unsafe { read_volatile(addr_of!((*sk).mark)) } != SOCKMAP_MARK {
        return None;
    }
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let dialed = unsafe {
        Dialed {
            cookie,
            snd_nxt: read_volatile(addr_of!((*ops).snd_nxt)),
            rcv_nxt: read_volatile(addr_of!((*ops).rcv_nxt)),
        }
    };
    let (local, remote, local_port, remote_port) = ends(ctx);
    let tuple = Tuple {
        client: local,
        server: remote,
        client_port: local_port,
        server_port: remote_port,
    };
    let end = end(ctx, BPF_SK_STORAGE_GET_F_CREATE.into())?;
    end.peer = cookie << 1 | 1;
    SOCKETS.update(cookie << 1, unsafe { &mut *ops }, BPF_NOEXIST.into()).ok()?;
    TURNS.insert(cookie, &1, 0).ok()?;
    DIALED.insert(tuple, dialed, 0).ok()
}

#[inline(always)]
fn passive(ctx: &SockOpsContext) -> Option<()> {
    let (local, remote, local_port, remote_port) = ends(ctx);
    let tuple = Tuple {
        client: remote,
        server: local,
        client_port: remote_port,
        server_port: local_port,
    };
    let dialed = unsafe { *DIALED.get(&tuple)? };
    let _ = DIALED.remove(&tuple);
    let ops = ctx.ops;
    let same = unsafe {
        read_volatile(addr_of!((*ops).snd_nxt)) == dialed.rcv_nxt
            && read_volatile(addr_of!((*ops).rcv_nxt)) == dialed.snd_nxt
    };
    if !same {
        count(1);
        return None;
    }
    let end = end(ctx, BPF_SK_STORAGE_GET_F_CREATE.into())?;
    end.peer = dialed.cookie << 1;
    SOCKETS
        .update(dialed.cookie << 1 | 1, unsafe { &mut *ops }, BPF_NOEXIST.into())
        .ok()?;
    count(0);
    Some(())
}

#[sk_msg]
fn viaduct_redirect(ctx: SkMsgContext) -> u32 {
    redirect(&ctx);
    SK_PASS
}

#[inline(always)]
fn redirect(ctx: &SkMsgContext) -> Option<()> {
    let msg: *mut sk_msg_md = ctx.msg;
    let sk = unsafe { (*msg).__bindgen_anon_3.sk };
    if sk.is_null() {
        return None;
    }
    let end = unsafe {
        let map = from_ref(&ENDS).cast_mut().cast();
        bpf_sk_storage_get(map, sk.cast(), null_mut(), 0)
            .cast::<End>()
            .as_mut()?
    };
    let directions = unsafe { read_volatile(&DIRECTIONS) };
    let is_proxy = end.peer & 1 == 1;
    let turn = TURNS.get_ptr_mut(end.peer >> 1);
    if is_proxy {
        if let Some(turn) = turn {
            unsafe { *turn += 1 };
        }
        if directions & REQUESTS == 0 {
            return None;
        }
    } else {
        if directions & RESPONSES == 0 {
            return None;
        }
        let turn = unsafe { *turn? };
        if end.turn != turn {
            end.turn = turn;
            end.sent = 0;
        }
        end.sent = end.sent.saturating_add(ctx.size());
        if end.sent > SOCKMAP_BYTES {
            end.tcp = 1;
            count(3);
        }
    }
    if end.tcp != 0 {
        return None;
    }
    let done = unsafe {
        aya_ebpf::helpers::bpf_msg_redirect_hash(
            msg,
            from_ref(&SOCKETS).cast_mut().cast(),
            (&raw const end.peer).cast_mut().cast(),
            BPF_F_INGRESS.into(),
        )
    };
    if done != SK_PASS.into() {
        end.tcp = 1;
        count(2);
    }
    Some(())
}

#[inline(always)]
fn end(ctx: &SockOpsContext, flags: u64) -> Option<&'static mut End> {
    unsafe {
        let sk = (*ctx.ops).__bindgen_anon_2.sk;
        if sk.is_null() {
            return None;
        }
        let map = from_ref(&ENDS).cast_mut().cast();
        bpf_sk_storage_get(map, sk.cast(), null_mut(), flags)
            .cast::<End>()
            .as_mut()
    }
}

/// Local and remote address and port.
#[inline(always)]
fn ends(ctx: &SockOpsContext) -> ([u32; 4], [u32; 4], u32, u32) {
    let ops: *mut bpf_sock_ops = ctx.ops;
    unsafe {
        let local_port = read_volatile(addr_of!((*ops).local_port));
        let remote_port = u32::from_be(read_volatile(addr_of!((*ops).remote_port)));
        if read_volatile(addr_of!((*ops).family)) == AF_INET {
            let local = read_volatile(addr_of!((*ops).local_ip4));
            let remote = read_volatile(addr_of!((*ops).remote_ip4));
            return ([0, 0, 0, local], [0, 0, 0, remote], local_port, remote_port);
        }
        let mut words = [0; 8];
        ends_v6(ops, &mut words);
        let [a, b, c, d, e, f, g, h] = words;
        ([a, b, c, d], [e, f, g, h], local_port, remote_port)
    }
}

#[inline(never)]
fn ends_v6(ops: *mut bpf_sock_ops, words: &mut [u32; 8]) {
    unsafe {
        words[0] = read_volatile(addr_of!((*ops).local_ip6[0]));
        words[1] = read_volatile(addr_of!((*ops).local_ip6[1]));
        words[2] = read_volatile(addr_of!((*ops).local_ip6[2]));
        words[3] = read_volatile(addr_of!((*ops).local_ip6[3]));
        words[4] = read_volatile(addr_of!((*ops).remote_ip6[0]));
        words[5] = read_volatile(addr_of!((*ops).remote_ip6[1]));
        words[6] = read_volatile(addr_of!((*ops).remote_ip6[2]));
        words[7] = read_volatile(addr_of!((*ops).remote_ip6[3]));
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
