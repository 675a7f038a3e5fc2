//! The flow of a packet: found, or made for the first packet of one.
//!
//! The tables are those of `router_common::FlowEntry`'s module. All cores share them without locks:
//! whoever turns a slot to `Held` by compare-and-swap owns the place, empties the return slot of the
//! flow that was there, writes the entry, fills the new return slot and then the slot itself. Readers
//! copy what they need from the entry and look at the slot they came by once more.

use core::sync::atomic::{Ordering, compiler_fence};

use aya_ebpf::programs::XdpContext;
use router_common::{
    BackendEntry, BackendState, FLOW_WAYS, FlowEntry, FlowKey, FlowSlot, FlowState, IPPROTO_TCP,
    NO_BACKEND, Ports, RETURN_WAYS, RING_KEYS, RING_SIZE, ReturnSlot, Settings, TcpFlags, Verdict,
    VipKey, mix, ring_slot, ticks_since,
};

use crate::maps;
use crate::packet::Packet;

/// Gateway ports tried for a new flow. A try fails if eight others share its bucket or one its hash.
/// `RETURNS` is never more than half full, where that is one in fifty: all fail once in 10^13 flows,
/// or when the ports towards the backend are nearly used up.
const PORT_TRIES: u32 = 8;

/// A client's flow.
pub struct ClientFlow {
    pub backend_id: u32,
    pub backend: &'static BackendEntry,
    pub nat_port: u16,
}

/// The flow of a client's packet and whether it is new; `None` if nobody registered the VIP.
#[inline(always)]
pub fn of_client(
    ctx: &XdpContext,
    packet: &Packet,
    settings: &Settings,
    now: u32,
) -> Result<Option<(ClientFlow, Verdict)>, Verdict> {
    let hash = packet.key.hash(&settings.hash_keys);
    let bucket = bucket_of(hash, settings);
    let slots = maps::FLOW_SLOTS.get(bucket).ok_or(Verdict::Internal)?;
    let mut known = None;
    for way in 0..FLOW_WAYS {
        let slot = load(&slots.slots[way].0);
        if slot >> 32 != hash as u64 || !FlowSlot(slot).is_flow() {
            continue;
        }
        let index = bucket * FLOW_WAYS as u32 + way as u32;
        let Some(entry) = maps::FLOWS.get(index) else {
            continue;
        };
        if entry.client != packet.key.source
            || entry.ports != packet.key.ports
            || entry.proto != packet.key.proto
        {
            continue;
        }
        let Some(backend) = maps::BACKENDS.get(entry.backend) else {
            continue;
        };
        if backend.vip != packet.key.destination {
            continue;
        }
        let slot = FlowSlot(slot);
        let (backend_id, nat_port) = (entry.backend, entry.nat_port);
        let closed = slot.state() as u8 == FlowState::Closing as u8;
        let another = packet.tcp.opens() && closed;
        if !another && !over(slot, entry, backend, settings, now) {
            compiler_fence(Ordering::SeqCst);
            let again = FlowSlot(load(&slots.slots[way].0));
            if again.hash() != hash || again.state() as u8 == FlowState::Held as u8 {
                return Err(Verdict::Contended);
            }
            follow_client_mac(ctx, packet, entry, index);
            refresh(&slots.slots[way].0, slot, packet, now);
            let flow = ClientFlow {
                backend_id,
                backend,
                nat_port,
            };
            return Ok(Some((flow, Verdict::Forwarded)));
        }
        known = Some((forget(way as u32, slot.0), slot));
        break;
    }
    let Some(backend_id) = choose_backend(packet)? else {
        return Ok(None);
    };
    let (way, slot) = match known {
        Some(place) => place,
        None => free_place(bucket, settings, now)?,
    };
    let flow = create(
        ctx,
        packet,
        settings,
        now,
        hash,
        Place { bucket, way, slot },
        backend_id,
    )?;
    Ok(Some((flow, Verdict::NewFlow)))
}

/// A backend's flow.
pub struct BackendFlow {
    pub entry: FlowEntry,
    pub backend: &'static BackendEntry,
}

/// The flow that a backend's packet answers; `None` if it is the gateway's own business.
#[inline(always)]
pub fn of_backend(packet: &Packet, settings: &Settings, now: u32) -> Option<BackendFlow> {
    let hash = packet.key.hash(&settings.hash_keys);
    let bucket = maps::RETURNS.get(return_bucket_of(hash, settings))?;
    for way in 0..RETURN_WAYS {
        let slot = ReturnSlot(load(&bucket.slots[way].0));
        if slot.hash() != hash || slot.0 == 0 {
            continue;
        }
        let index = slot.entry();
        let Some(entry) = maps::FLOWS.get_ptr_mut(index) else {
            continue;
        };
        // SAFETY: the pointer is to the map's value. Whoever rewrites it empties the return slot
        // first, which is looked at again below.
        let copy = unsafe { *entry };
        compiler_fence(Ordering::SeqCst);
        if load(&bucket.slots[way].0) != slot.0 {
            return None;
        }
        let Some(backend) = maps::BACKENDS.get(copy.backend) else {
            continue;
        };
        if backend.address != packet.key.source
            || backend.source != packet.key.destination
            || packet.key.ports != Ports::new(backend.port, copy.nat_port)
            || copy.proto != packet.key.proto
            || !serves(backend, &copy)
        {
            continue;
        }
        // Once a tick and flow: the line stays clean in every core's cache.
        if copy.reply_seen != now || copy.answered == 0 {
            // SAFETY: as above; a racing store writes the same.
            unsafe {
                (*entry).reply_seen = now;
                (*entry).answered = 1;
            }
        }
        if packet.key.proto == IPPROTO_TCP && (packet.tcp.fin() || packet.tcp.rst()) {
            note_backend_close(index, packet.tcp);
        }
        return Some(BackendFlow {
            entry: copy,
            backend,
        });
    }
    None
}

/// Whether nothing is left of a flow: its time is over in both directions, or its backend is gone.
#[inline(always)]
pub fn over(
    slot: FlowSlot,
    entry: &FlowEntry,
    backend: &BackendEntry,
    settings: &Settings,
    now: u32,
) -> bool {
    let timeout = settings.timeouts[slot.state() as usize & 7];
    !serves(backend, entry)
        || (slot.age(now) > timeout && ticks_since(entry.reply_seen, now) > timeout)
}

/// Empties the return slot of `entry`, if it still is that entry's.
#[inline(always)]
pub fn clear_return(return_hash: u32, index: u32, settings: &Settings) {
    let Some(bucket) = maps::RETURNS.get(return_bucket_of(return_hash, settings)) else {
        return;
    };
    let ours = ReturnSlot::new(return_hash, index).0;
    for way in 0..RETURN_WAYS {
        let slot = &bucket.slots[way].0;
        if load(slot) == ours {
            swap(slot, ours, 0);
            return;
        }
    }
}

#[inline(always)]
pub fn load(word: &u64) -> u64 {
    // SAFETY: a reference is readable; volatile, because other cores write behind it.
    unsafe { core::ptr::read_volatile(word) }
}

/// Compare-and-swap; false if someone else was faster.
///
/// By hand, since Rust's BPF target declares no atomic read-modify-write. The instruction is
/// `BPF_ATOMIC | BPF_CMPXCHG` (RFC 9669 §5.3), Linux 5.12 and later.
#[inline(always)]
#[cfg(target_arch = "bpf")]
pub fn swap(word: &u64, old: u64, new: u64) -> bool {
    let found: u64;
    // SAFETY: the word is a map's, aligned to 8 and writable whatever the reference says.
    unsafe {
        core::arch::asm!(
            "r0 = cmpxchg_64({word} + 0, r0, {new})",
            word = in(reg) core::ptr::from_ref(word).cast_mut(),
            new = in(reg) new,
            inout("r0") old => found,
        );
    }
    found == old
}

#[cfg(not(target_arch = "bpf"))]
pub fn swap(_word: &u64, _old: u64, _new: u64) -> bool {
    false
}

/// The same number, but one the verifier knows nothing of.
///
/// It follows every value that a variable can have, so an index out of a loop of eight multiplies
/// all that comes after by eight. Adding and subtracting something unknown lets it merge them.
#[inline(always)]
#[cfg(target_arch = "bpf")]
fn forget(index: u32, unknown: u64) -> u32 {
    let mut index = u64::from(index);
    // SAFETY: two additions in registers.
    unsafe {
        core::arch::asm!(
            "{index} += {unknown}",
            "{index} -= {unknown}",
            index = inout(reg) index,
            unknown = in(reg) unknown,
            options(pure, nomem, nostack),
        );
    }
    index as u32
}

#[cfg(not(target_arch = "bpf"))]
fn forget(index: u32, _unknown: u64) -> u32 {
    index
}

#[inline(always)]
fn bucket_of(hash: u32, settings: &Settings) -> u32 {
    (hash >> 8) & settings.bucket_mask
}

#[inline(always)]
fn return_bucket_of(hash: u32, settings: &Settings) -> u32 {
    (hash >> 8) & (settings.bucket_mask * 2 + 1)
}

/// Whether the backend that made the flow still has that id and may keep its flows.
#[inline(always)]
fn serves(backend: &BackendEntry, entry: &FlowEntry) -> bool {
    backend.generation == entry.generation && backend.state != BackendState::Free as u8
}

/// Notes that the client was here and what its segment did to the connection.
#[inline(always)]
fn refresh(word: &u64, slot: FlowSlot, packet: &Packet, now: u32) {
    let state = if packet.key.proto == IPPROTO_TCP {
        slot.state().after_client(packet.tcp)
    } else {
        FlowState::Udp
    };
    // Once a tick and flow, not once a packet: the line stays clean in every core's cache.
    if slot.seen() != now || state as u8 != slot.state() as u8 {
        swap(word, slot.0, FlowSlot::new(slot.hash(), now, state).0);
    }
}

/// Answers go where the client's packets come from, also after its router changed.
#[inline(always)]
fn follow_client_mac(ctx: &XdpContext, packet: &Packet, entry: &FlowEntry, index: u32) {
    // SAFETY: the header lies in the frame, as `Packet::parse` checked.
    let eth = unsafe { &*packet.eth };
    let ifindex = ctx.ingress_ifindex() as u32;
    if entry.client_mac == eth.source && entry.client_ifindex == ifindex {
        return;
    }
    if let Some(entry) = maps::FLOWS.get_ptr_mut(index) {
        // SAFETY: the pointer is to the map's value.
        unsafe {
            (*entry).client_mac = eth.source;
            (*entry).local_mac = eth.destination;
            (*entry).client_ifindex = ifindex;
        }
    }
}

#[inline(always)]
fn note_backend_close(index: u32, tcp: TcpFlags) {
    let Some(bucket) = maps::FLOW_SLOTS.get(index / FLOW_WAYS as u32) else {
        return;
    };
    let word = &bucket.slots[index as usize % FLOW_WAYS].0;
    let slot = FlowSlot(load(word));
    let state = slot.state().after_backend(tcp);
    if slot.is_flow() && state as u8 != slot.state() as u8 {
        swap(
            word,
            slot.0,
            FlowSlot::new(slot.hash(), slot.seen(), state).0,
        );
    }
}

/// The backend for a new flow; `None` if nobody registered the VIP.
#[inline(always)]
fn choose_backend(packet: &Packet) -> Result<Option<u32>, Verdict> {
    let key = VipKey::new(
        packet.key.destination,
        packet.key.ports.destination(),
        packet.key.proto,
    );
    // SAFETY: the value is read at once; the agent only ever replaces it whole.
    let Some(vip) = (unsafe { maps::VIPS.get(key) }) else {
        return Ok(None);
    };
    if packet.key.proto == IPPROTO_TCP && !packet.tcp.opens() {
        return Err(Verdict::UnknownFlow);
    }
    if vip.backends == 0 {
        return Err(Verdict::NoBackend);
    }
    let ring = maps::RINGS.get(vip.ring).ok_or(Verdict::Internal)?;
    let slot = ring_slot(packet.key.hash(&RING_KEYS));
    if slot >= RING_SIZE {
        return Err(Verdict::Internal);
    }
    match ring.slots[slot] {
        NO_BACKEND => Err(Verdict::NoBackend),
        id => Ok(Some(id)),
    }
}

/// A way of the bucket whose flow is over or, failing that, the oldest that is nearly so or never was.
#[inline(always)]
fn free_place(bucket: u32, settings: &Settings, now: u32) -> Result<(u32, FlowSlot), Verdict> {
    let slots = maps::FLOW_SLOTS.get(bucket).ok_or(Verdict::Internal)?;
    let mut victim = None;
    let mut victim_age = 0;
    for way in 0..FLOW_WAYS {
        let slot = FlowSlot(load(&slots.slots[way].0));
        match slot.state() {
            FlowState::Free => return Ok((forget(way as u32, slot.0), slot)),
            FlowState::Held => continue,
            state => {
                let Some(entry) = maps::FLOWS.get(bucket * FLOW_WAYS as u32 + way as u32) else {
                    continue;
                };
                let Some(backend) = maps::BACKENDS.get(entry.backend) else {
                    continue;
                };
                if over(slot, entry, backend, settings, now) {
                    return Ok((forget(way as u32, slot.0), slot));
                }
                // What nobody has answered for may be forged.
                let doubtful = match state {
                    FlowState::Syn | FlowState::Closing => true,
                    FlowState::Udp => entry.answered == 0,
                    _ => false,
                };
                if doubtful && (victim.is_none() || slot.age(now) > victim_age) {
                    victim = Some((forget(way as u32, slot.0), slot));
                    victim_age = slot.age(now);
                }
            }
        }
    }
    victim.ok_or(Verdict::FlowTableFull)
}

/// A slot and what it held when it was chosen.
struct Place {
    bucket: u32,
    way: u32,
    slot: FlowSlot,
}

#[inline(always)]
fn create(
    ctx: &XdpContext,
    packet: &Packet,
    settings: &Settings,
    now: u32,
    hash: u32,
    place: Place,
    backend_id: u32,
) -> Result<ClientFlow, Verdict> {
    let backend = maps::BACKENDS.get(backend_id).ok_or(Verdict::Internal)?;
    if backend.state == BackendState::Free as u8 {
        return Err(Verdict::NoBackend);
    }
    let index = place.bucket * FLOW_WAYS as u32 + place.way;
    let word = &maps::FLOW_SLOTS
        .get(place.bucket)
        .ok_or(Verdict::Internal)?
        .slots[place.way as usize % FLOW_WAYS]
        .0;
    let state = if packet.key.proto == IPPROTO_TCP {
        FlowState::Syn
    } else {
        FlowState::Udp
    };
    let held = FlowSlot::new(0, now, FlowState::Held).0;
    if !swap(word, place.slot.0, held) {
        return Err(Verdict::Contended);
    }
    let entry = maps::FLOWS.get_ptr_mut(index).ok_or(Verdict::Internal)?;
    if place.slot.0 != 0 {
        // SAFETY: the pointer is to the map's value, and holding the slot makes this its only writer.
        clear_return(unsafe { (*entry).return_hash }, index, settings);
    }
    let mut number = hash ^ now;
    for _ in 0..PORT_TRIES {
        // Weyl sequence: all tries differ. Mixed, so that no flow follows in the steps of another.
        number = number.wrapping_add(0x9e37_79b9);
        let offset = (mix(number) as u64 * settings.nat_port_count as u64) >> 32;
        let nat_port = settings.nat_port_first.wrapping_add(offset as u16);
        let answer = FlowKey {
            source: backend.address,
            destination: backend.source,
            ports: Ports::new(backend.port, nat_port),
            proto: packet.key.proto,
        };
        let return_hash = answer.hash(&settings.hash_keys);
        // SAFETY: as above; the Ethernet header lies in the frame. Before the return slot is filled,
        // since whoever finds that reads the entry.
        unsafe {
            let eth = &*packet.eth;
            *entry = FlowEntry {
                client: packet.key.source,
                ports: packet.key.ports,
                backend: backend_id,
                client_ifindex: ctx.ingress_ifindex() as u32,
                reply_seen: now,
                return_hash,
                client_mac: eth.source,
                local_mac: eth.destination,
                nat_port,
                generation: backend.generation,
                proto: packet.key.proto,
                answered: 0,
                reserved: [0; 10],
            };
        }
        compiler_fence(Ordering::SeqCst);
        if claim_return(return_hash, index, settings) {
            swap(word, held, FlowSlot::new(hash, now, state).0);
            return Ok(ClientFlow {
                backend_id,
                backend,
                nat_port,
            });
        }
    }
    swap(word, held, 0);
    Err(Verdict::PortsExhausted)
}

/// Takes a return slot, unless another flow's answers have the same hash and so perhaps the same port.
#[inline(always)]
fn claim_return(return_hash: u32, index: u32, settings: &Settings) -> bool {
    let Some(bucket) = maps::RETURNS.get(return_bucket_of(return_hash, settings)) else {
        return false;
    };
    let mut free = RETURN_WAYS as u32;
    for way in 0..RETURN_WAYS {
        let slot = load(&bucket.slots[way].0);
        if slot == 0 {
            free = forget(way as u32, return_hash.into());
        } else if ReturnSlot(slot).hash() == return_hash {
            return false;
        }
    }
    free < RETURN_WAYS as u32
        && swap(
            &bucket.slots[free as usize % RETURN_WAYS].0,
            0,
            ReturnSlot::new(return_hash, index).0,
        )
}
