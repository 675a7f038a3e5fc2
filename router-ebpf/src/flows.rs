//! The flow of a packet: found, or made for the first packet of one.
//!
//! Flows of modes that translate are all in the flow table, since their answers are led back by it.
//! Those of the others are where the ring says, and in the table only while the ring is not enough:
//! their slot has changed, the scheduler is no hash, or the protocol has no packet that opens a flow.

use core::sync::atomic::{Ordering, compiler_fence};

use router_common::{
    BackendEntry, FlowEntry, FlowKey, FlowSlot, FlowState, IPPROTO_TCP, Mode, Ports, RETURN_WAYS,
    ReturnSlot, RingSlot, Scheduler, Settings, TcpFlags, Verdict, mix, vip_flags,
};

use crate::frame::{Frame, at};
use crate::packet::{EthHeader, Fragment, Packet};
use crate::scratch::Scratch;
use crate::stage::Outcome;
use crate::table::{self, Place};
use crate::verifier::{add, forget, load, swap};
use crate::vip::{Rate, Vip};
use crate::{challenge, explain, maps, schedule, scratch, vip};

/// Gateway ports tried for a new flow. A try fails if eight others share its bucket or one its hash.
/// `RETURNS` is never more than half full, where that is one in fifty: all fail once in 10^13 flows,
/// or when the ports towards the backend are nearly used up.
const PORT_TRIES: u32 = 8;

/// Keeps places of fragments apart from those of flows.
const FRAGMENT_SALT: u64 = 0xc2b2_ae3d_27d4_eb4f;

/// Where a client's packet goes. No pointers: results of several kinds meet in one place of the stack,
/// where the verifier lets no part of a pointer be.
#[derive(Clone, Copy)]
pub struct Steered {
    pub backend_id: u32,
    /// `Forwarded`, `NewFlow`, `Untracked` or `Probed`.
    pub verdict: Verdict,
    /// The gateway's port towards the backend, in modes that translate.
    pub nat_port: u16,
    pub mode: Mode,
    /// It opens a flow.
    pub new: bool,
}

/// The backend of a packet that the ring alone decides about; `UnknownFlow` where the flow table has a
/// say, and [`of_client`] must be asked.
#[inline(always)]
pub fn by_ring_alone<F: Frame>(
    packet: &Packet,
    vip: Vip,
    settings: &Settings,
) -> Result<Steered, Verdict> {
    if !vip::admits(vip, &packet.key.source) {
        return Err(Verdict::SourceDenied);
    }
    let tcp = packet.key.proto == IPPROTO_TCP;
    if !may_be_decided(vip, tcp) {
        return Err(Verdict::UnknownFlow);
    }
    let slot = schedule::slot_of::<F>(vip, &packet.key)?;
    if !slot.is_quiet() {
        return Err(Verdict::UnknownFlow);
    }
    let opens = packet.tcp.opens();
    if opens {
        admit::<F>(packet, vip, settings, maps::now(settings))?;
    }
    by_ring(vip, slot.current(), opens)
}

/// The backend of a client's packet, by the flow table; `NewFlow` where it is in none, and [`pick`] must
/// find a backend, at the place in the scratch if there is one.
#[inline(always)]
pub fn of_client<F: Frame>(
    frame: &F,
    packet: &Packet,
    vip: Vip,
    settings: &Settings,
    scratch: (&mut u64, &mut Place),
) -> Result<Steered, Verdict> {
    let hash = packet.key.hash(&settings.hash_keys);
    let known = find(&packet.key, vip, hash, settings)?;
    *scratch.0 = hash;
    *scratch.1 = known.unwrap_or(Place::NONE);
    if F::DRY {
        explain::note(|event| event.asked_table = 1);
    }
    let place = known.ok_or(Verdict::NewFlow)?;
    let now = maps::now(settings);
    follow(frame, packet, vip, place, settings, now)?.ok_or(Verdict::NewFlow)
}

/// The backend of a packet that [`of_client`] found no flow for; whether [`open`] is to make one.
#[inline(always)]
pub fn pick<F: Frame>(scratch: &mut Scratch) -> Result<bool, Verdict> {
    let settings = maps::settings()?;
    let now = maps::now(settings);
    let vip = Vip::at(scratch.vip).ok_or(Verdict::Internal)?;
    let packet = &scratch.packet;
    let slot = schedule::slot_of::<F>(vip, &packet.key)?;
    let opens = packet.key.proto != IPPROTO_TCP || packet.tcp.opens();
    let backend_id = if opens {
        admit::<F>(packet, vip, settings, now)?;
        schedule::choose::<F>(vip, slot, scratch.hash, now)?
    } else if Mode::from_bits(vip.entry.mode).translates() {
        return Err(Verdict::UnknownFlow);
    } else {
        older(vip, slot)?
    };
    scratch.steered = by_ring(vip, backend_id, opens)?;
    if F::DRY {
        scratch.steered.nat_port = settings.nat_port_first;
        return Ok(false);
    }
    // A reset of something unknown is passed on, and ends it.
    Ok(opens || !packet.tcp.rst())
}

/// Makes the flow of a packet that [`pick`] found a backend for; whether it is one whose answers are to be
/// led back, and [`make_translated`] must do the rest.
#[inline(always)]
pub fn open<F: Frame>(frame: &F, scratch: &mut Scratch) -> Result<bool, Verdict> {
    let settings = maps::settings()?;
    let now = maps::now(settings);
    let vip = Vip::at(scratch.vip).ok_or(Verdict::Internal)?;
    let packet = &scratch.packet;
    let hash = scratch.hash;
    let mode = Mode::from_bits(vip.entry.mode);
    let backend_id = scratch.steered.backend_id;
    if scratch.place.is_none() {
        scratch.place = match table::free_place(hash, settings, now) {
            Ok(place) => place,
            Err(verdict) if mode.translates() => return Err(verdict),
            Err(_) => {
                scratch.steered.verdict = Verdict::Untracked;
                return Ok(false);
            }
        };
    }
    scratch.state = if packet.key.proto != IPPROTO_TCP {
        FlowState::Udp
    } else if scratch.steered.new {
        FlowState::Syn
    } else {
        FlowState::Established
    };
    if !mode.translates() {
        let tag = FlowSlot::tag_of(hash);
        let flow = FlowSlot::new(tag, backend_id, now, scratch.state);
        if remember(scratch.place, flow, &packet.key, vip) {
            table::count_flow(backend_id, 1);
        } else {
            scratch.steered.verdict = Verdict::Untracked;
        }
        return Ok(false);
    }
    let eth = at::<EthHeader>(frame, 0).ok_or(Verdict::Internal)?;
    scratch.flow.client_ifindex = frame.ifindex();
    // SAFETY: the header lies in the frame, as `at` checked.
    unsafe {
        scratch.flow.client_mac = (*eth).source;
        scratch.flow.local_mac = (*eth).destination;
    }
    Ok(true)
}

/// Makes the flow that [`open`] found a place for, so that its answers are led back. A step of its own,
/// since chains of calls share 512 octets of stack.
#[inline(always)]
pub fn make_translated() -> Outcome {
    match create() {
        0 => Outcome::NEXT,
        1 => Outcome::refused(Verdict::Contended),
        2 => Outcome::refused(Verdict::PortsExhausted),
        _ => Outcome::refused(Verdict::Internal),
    }
}

/// The backend of the flow that `key` names, if there is one; nothing is made or changed.
#[inline(always)]
pub fn peek<F: Frame>(key: &FlowKey, vip: Vip, settings: &Settings) -> Result<Steered, Verdict> {
    let slot = schedule::slot_of::<F>(vip, key)?;
    if slot.is_quiet() && may_be_decided(vip, key.proto == IPPROTO_TCP) {
        return by_ring(vip, slot.current(), false);
    }
    let hash = key.hash(&settings.hash_keys);
    match find(key, vip, hash, settings)? {
        Some(place) => known(vip, place),
        None if Mode::from_bits(vip.entry.mode).translates() => Err(Verdict::UnknownError),
        None => by_ring(vip, older(vip, slot)?, false),
    }
}

/// Whether the ring alone says where packets go whose slot is quiet.
#[inline(always)]
fn may_be_decided(vip: Vip, tcp: bool) -> bool {
    tcp && !Mode::from_bits(vip.entry.mode).translates()
        && Scheduler::from_bits(vip.entry.scheduler).is_hash()
        && vip.entry.affinity == 0
        && vip.entry.flags & vip_flags::TRACK == 0
}

/// The backend with an id, for a packet of a flow that it knows.
#[inline(always)]
pub fn by_id(vip: Vip, backend_id: u32) -> Result<Steered, Verdict> {
    by_ring(vip, backend_id, false)
}

#[inline(always)]
fn by_ring(vip: Vip, backend_id: u32, opens: bool) -> Result<Steered, Verdict> {
    if vip.entry.backends == 0 && opens {
        return Err(Verdict::NoBackend);
    }
    schedule::member(vip, backend_id).ok_or(Verdict::NoBackend)?;
    Ok(Steered {
        backend_id,
        mode: Mode::from_bits(vip.entry.mode),
        nat_port: 0,
        new: opens,
        verdict: if opens {
            Verdict::NewFlow
        } else {
            Verdict::Forwarded
        },
    })
}

/// The backend of a flow that is older than what the table remembers of its slot.
#[inline(always)]
fn older(vip: Vip, slot: RingSlot) -> Result<u32, Verdict> {
    let previous = slot.previous();
    if previous != RingSlot::NOBODY && schedule::member(vip, previous).is_some() {
        return Ok(forget(previous, slot.0.into()));
    }
    if vip.entry.backends == 0 {
        return Err(Verdict::NoBackend);
    }
    Ok(forget(slot.current(), slot.0.into()))
}

/// Whether the VIP takes one more flow of this source now.
#[inline(always)]
fn admit<F: Frame>(
    packet: &Packet,
    vip: Vip,
    settings: &Settings,
    now: u32,
) -> Result<(), Verdict> {
    match vip::count_new(vip, &packet.key.source, settings, now, F::DRY) {
        Rate::Within => Ok(()),
        Rate::VipExceeded if vip.entry.flags & vip_flags::CHALLENGE != 0 && packet.tcp.opens() => {
            if challenge::is_proven(vip.index, now) != 0 {
                Ok(())
            } else {
                Err(Verdict::Challenged)
            }
        }
        Rate::SourceExceeded | Rate::VipExceeded => Err(Verdict::RateLimited),
    }
}

#[inline(always)]
fn find(key: &FlowKey, vip: Vip, hash: u64, settings: &Settings) -> Result<Option<Place>, Verdict> {
    // Where flows of several modes may be, and where one flow taken for another would be answered as
    // that other, the entry is read. Else a false match, once in a million new flows, shares a backend.
    let exact = must_match(vip);
    table::find(hash, settings, |slot, index| {
        if matches!(slot.state(), FlowState::Affinity | FlowState::Fragment) {
            return false;
        }
        if !exact {
            return maps::BACKENDS
                .get(slot.backend())
                .is_some_and(|backend| backend.vip == vip.index);
        }
        maps::FLOWS.get(index).is_some_and(|entry| {
            entry.client == key.source
                && entry.ports == key.ports
                && entry.vip == vip.index
                && entry.proto == key.proto
        })
    })
}

#[inline(always)]
fn must_match(vip: Vip) -> bool {
    Mode::from_bits(vip.entry.mode).translates() || vip.entry.flags & vip_flags::TRACK != 0
}

/// The flow at `place`, as it is.
#[inline(always)]
fn known(vip: Vip, place: Place) -> Result<Steered, Verdict> {
    let backend_id = place.slot.backend();
    let backend = schedule::member(vip, backend_id).ok_or(Verdict::NoBackend)?;
    let (mode, nat_port) = if must_match(vip) {
        let entry = maps::FLOWS.get(place.index()).ok_or(Verdict::Internal)?;
        if !table::serves(backend, entry.generation) {
            return Err(Verdict::NoBackend);
        }
        (entry.mode, entry.nat_port)
    } else {
        (vip.entry.mode, 0)
    };
    Ok(Steered {
        backend_id,
        mode: Mode::from_bits(mode),
        nat_port,
        new: false,
        verdict: Verdict::Forwarded,
    })
}

/// The flow at `place`, noted as seen; `None` if nothing is left of it.
#[inline(always)]
fn follow<F: Frame>(
    frame: &F,
    packet: &Packet,
    vip: Vip,
    place: Place,
    settings: &Settings,
    now: u32,
) -> Result<Option<Steered>, Verdict> {
    let closed = place.slot.state() as u8 == FlowState::Closing as u8;
    if F::DRY {
        explain::note(|event| event.flow_state = place.slot.state() as u8);
    }
    if closed && packet.tcp.opens() {
        return Ok(None);
    }
    let late = place.slot.age(now) > table::timeout(settings, place.slot.state());
    if late {
        let entry = maps::FLOWS.get(place.index()).ok_or(Verdict::Internal)?;
        if table::over(place.slot, entry, settings, now) {
            return Ok(None);
        }
    }
    let Ok(steered) = known(vip, place) else {
        return Ok(None);
    };
    if F::DRY {
        return Ok(Some(steered));
    }
    let word = place.word().ok_or(Verdict::Internal)?;
    if must_match(vip) {
        compiler_fence(Ordering::SeqCst);
        let again = FlowSlot(load(word));
        if again.tag() != place.slot.tag() || !again.is_flow() {
            return Err(Verdict::Contended);
        }
    }
    if steered.mode.translates() {
        follow_client(frame, packet, place.index());
    }
    refresh(word, place.slot, packet, steered.mode, now);
    Ok(Some(steered))
}

/// Notes that the client was here and what its segment did to the connection.
#[inline(always)]
fn refresh(word: &u64, slot: FlowSlot, packet: &Packet, mode: Mode, now: u32) {
    let state = if packet.key.proto != IPPROTO_TCP {
        FlowState::Udp
    } else if !mode.translates() && (packet.tcp.fin() || packet.tcp.rst()) {
        // The backend's side of it does not pass here: what it still sends asks the client for
        // acknowledgements, and those keep the flow.
        FlowState::Closing
    } else {
        slot.state().after_client(packet.tcp)
    };
    // Once a tick and flow, not once a packet: the line stays clean in every core's cache.
    if slot.seen() != now || state as u8 != slot.state() as u8 {
        swap(word, slot.0, slot.touched(now, state).0);
    }
}

/// Answers go where the client's packets come from, also after its router changed.
#[inline(always)]
fn follow_client(frame: &impl Frame, packet: &Packet, index: u32) {
    let (Some(eth), Some(entry)) = (at::<EthHeader>(frame, 0), maps::FLOWS.get_ptr_mut(index))
    else {
        return;
    };
    let ifindex = frame.ifindex();
    // SAFETY: the header lies in the frame, as `at` checked, and the pointer is to the map's value.
    unsafe {
        let eth = &*eth;
        if (*entry).client_mac == eth.source && (*entry).client_ifindex == ifindex {
            return;
        }
        (*entry).client_mac = eth.source;
        (*entry).local_mac = eth.destination;
        (*entry).client_ifindex = ifindex;
        (*entry).client_vlan = packet.vlan;
    }
}

/// Writes a flow that nobody answers through the gateway; whether it could be.
#[inline(always)]
pub fn remember(place: Place, slot: FlowSlot, key: &FlowKey, vip: Vip) -> bool {
    let Some(backend) = maps::BACKENDS.get(slot.backend()) else {
        return false;
    };
    let Some(entry) = maps::FLOWS.get_ptr_mut(place.index()) else {
        return false;
    };
    let Ok(held) = table::hold(place) else {
        return false;
    };
    // SAFETY: the pointer is to the map's value, and holding the slot makes this its only writer.
    unsafe {
        *entry = FlowEntry {
            client: key.source,
            ports: key.ports,
            vip: vip.index,
            backend: slot.backend() as u16,
            generation: backend.generation,
            proto: key.proto,
            mode: vip.entry.mode,
            ..FlowEntry::default()
        };
        if Mode::from_bits(vip.entry.mode).translates() {
            // An affinity: it has no answers to be led back.
            (*entry).mode = Mode::Dsr as u8;
        }
    }
    held.publish(slot);
    true
}

/// Makes the flow of the packet in the scratch, whose answers are led back through the gateway; 0 if it
/// could, 1 if another core was faster, 2 without a free port, 3 if the tables contradict each other.
/// Verified by itself, as [`crate::stage`] explains.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn create() -> u64 {
    match try_create() {
        Ok(()) => 0,
        Err(Verdict::Contended) => 1,
        Err(Verdict::PortsExhausted) => 2,
        Err(_) => 3,
    }
}

#[inline(always)]
fn try_create() -> Result<(), Verdict> {
    let settings = maps::settings()?;
    let scratch = scratch::get()?;
    let vip = Vip::at(scratch.vip).ok_or(Verdict::Internal)?;
    let packet = &scratch.packet;
    let mode = Mode::from_bits(vip.entry.mode);
    let backend_id = scratch.steered.backend_id;
    let backend = schedule::member(vip, backend_id).ok_or(Verdict::NoBackend)?;
    let place = scratch.place;
    let index = place.index();
    let entry = maps::FLOWS.get_ptr_mut(index).ok_or(Verdict::Internal)?;
    let held = table::hold(place)?;
    let now = maps::now(settings);
    let dnat = matches!(mode, Mode::Dnat);
    let mut answer = FlowKey {
        source: backend.address,
        destination: if dnat {
            packet.key.source
        } else {
            backend.source
        },
        ports: Ports::default(),
        proto: packet.key.proto,
    };
    // SAFETY: the pointer is to the map's value, and holding the slot makes this its only writer. Before
    // the return slot is filled, since whoever finds that reads the entry.
    unsafe {
        *entry = FlowEntry {
            client: packet.key.source,
            ports: packet.key.ports,
            vip: vip.index,
            client_ifindex: scratch.flow.client_ifindex,
            return_hash: 0,
            reply_seen: now as u16,
            backend: backend_id as u16,
            generation: backend.generation,
            nat_port: 0,
            client_mac: scratch.flow.client_mac,
            local_mac: scratch.flow.local_mac,
            client_vlan: packet.vlan,
            proto: packet.key.proto,
            mode: mode as u8,
            answered: 0,
            reply: 0,
            reserved: [0; 6],
        };
    }
    let port = backend_port(backend, packet.key.ports);
    let mut number = scratch.hash as u32 ^ now;
    for turn in 0..PORT_TRIES {
        // Weyl sequence: all tries differ. Mixed, so that no flow follows in the steps of another.
        number = number.wrapping_add(0x9e37_79b9);
        let offset = (mix(number) as u64 * settings.nat_port_count as u64) >> 32;
        let mut nat_port = settings.nat_port_first.wrapping_add(offset as u16);
        // The client's own port, unless it has another flow to the same backend by another VIP.
        if dnat && turn == 0 {
            nat_port = packet.key.ports.source();
        }
        answer.ports = Ports::new(port, nat_port);
        let return_hash = (answer.hash(&settings.hash_keys) >> 32) as u32;
        // SAFETY: as above.
        unsafe {
            (*entry).nat_port = nat_port;
            (*entry).return_hash = return_hash;
        }
        compiler_fence(Ordering::SeqCst);
        if table::claim_return(return_hash, index, settings) {
            let tag = FlowSlot::tag_of(scratch.hash);
            held.publish(FlowSlot::new(tag, backend_id, now, scratch.state));
            table::count_flow(backend_id, 1);
            if let Some(load) = maps::BACKEND_LOAD.get(backend_id) {
                add(&load.opened, 1);
            }
            scratch.steered.nat_port = nat_port;
            return Ok(());
        }
    }
    held.vacate();
    Err(Verdict::PortsExhausted)
}

/// The port of the backend that packets with these ports go to.
#[inline(always)]
pub fn backend_port(backend: &BackendEntry, ports: Ports) -> u16 {
    backend.port_for(ports.destination())
}

/// Copies the flow that a backend's packet with this key answers; `None` if it is the gateway's own
/// business.
#[inline(always)]
pub fn of_backend<F: Frame>(
    key: &FlowKey,
    tcp: TcpFlags,
    settings: &Settings,
    now: u32,
    copy: &mut FlowEntry,
) -> Option<()> {
    let hash = (key.hash(&settings.hash_keys) >> 32) as u32;
    let bucket = maps::RETURNS.get(table::return_bucket(hash, settings))?;
    for way in 0..RETURN_WAYS {
        let slot = ReturnSlot(load(&bucket.slots[way].0));
        if slot.hash() != hash || slot.0 == 0 {
            continue;
        }
        let index = forget(slot.entry(), slot.0);
        let entry = maps::FLOWS.get_ptr_mut(index)?;
        // SAFETY: the pointer is to the map's value. Whoever rewrites it empties the return slot
        // first, which is looked at again below.
        *copy = unsafe { *entry };
        compiler_fence(Ordering::SeqCst);
        if load(&bucket.slots[way].0) != slot.0 {
            return None;
        }
        let backend = maps::BACKENDS.get(copy.backend.into())?;
        let to = if copy.mode == Mode::Nat as u8 {
            backend.source
        } else {
            copy.client
        };
        let ports = Ports::new(backend_port(backend, copy.ports), copy.nat_port);
        if backend.address != key.source
            || to != key.destination
            || ports != key.ports
            || copy.proto != key.proto
            || !table::serves(backend, copy.generation)
        {
            return None;
        }
        if F::DRY {
            return Some(());
        }
        // Once a tick and flow: the line stays clean in every core's cache.
        if copy.reply_seen != now as u16 || copy.answered == 0 {
            // SAFETY: as above; a racing store writes the same.
            unsafe {
                (*entry).reply_seen = now as u16;
                (*entry).answered = 1;
            }
            if copy.answered == 0
                && let Some(load) = maps::BACKEND_LOAD.get(copy.backend.into())
            {
                add(&load.answered, 1);
            }
        }
        if tcp.fin() || tcp.rst() {
            note_backend_close(index, tcp.0.into());
        }
        return Some(());
    }
    None
}

/// Verified by itself, as [`crate::stage`] explains.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn note_backend_close(index: u32, tcp: u32) -> u64 {
    let tcp = TcpFlags(tcp as u8);
    let place = Place {
        bucket: index / router_common::FLOW_WAYS as u32,
        way: index % router_common::FLOW_WAYS as u32,
        slot: FlowSlot::default(),
    };
    let Some(word) = place.word() else {
        return 0;
    };
    let slot = FlowSlot(load(word));
    let state = slot.state().after_backend(tcp);
    if slot.is_flow() && state as u8 != slot.state() as u8 {
        swap(word, slot.0, slot.touched(slot.seen(), state).0);
    }
    0
}

/// Remembers that the datagram whose first fragment is in the scratch is of the flow there. Verified by
/// itself, as [`crate::stage`] explains.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn remember_fragments() -> u64 {
    let (Ok(settings), Ok(scratch)) = (maps::settings(), scratch::get()) else {
        return 0;
    };
    let now = maps::now(settings);
    let packet = &scratch.packet;
    let hash = packet.fragment_key().hash(&settings.hash_keys) ^ FRAGMENT_SALT;
    let is_it = |slot: FlowSlot, _| slot.state() as u8 == FlowState::Fragment as u8;
    let place = match table::find(hash, settings, is_it) {
        Ok(Some(place)) => place,
        Ok(None) => match table::free_place(hash, settings, now) {
            Ok(place) => place,
            Err(_) => return 0,
        },
        Err(_) => return 0,
    };
    let Some(entry) = maps::FLOWS.get_ptr_mut(place.index()) else {
        return 0;
    };
    let Ok(held) = table::hold(place) else {
        return 0;
    };
    // SAFETY: as in `remember`.
    unsafe { *entry = scratch.flow };
    let backend = scratch.flow.backend.into();
    let tag = FlowSlot::tag_of(hash);
    held.publish(FlowSlot::new(tag, backend, now, FlowState::Fragment));
    1
}

/// The first fragment of an answer, of the flow in the scratch.
#[inline(always)]
pub fn remember_answer_fragments(scratch: &mut Scratch) {
    scratch.flow.reply = 1;
    remember_fragments();
}

/// The first fragment of what goes to a backend.
#[inline(always)]
pub fn remember_forwarded_fragments(scratch: &mut Scratch) {
    let (packet, steered) = (&scratch.packet, &scratch.steered);
    let Some(backend) = maps::BACKENDS.get(steered.backend_id) else {
        return;
    };
    scratch.flow = FlowEntry {
        client: packet.key.source,
        ports: packet.key.ports,
        vip: scratch.vip,
        backend: steered.backend_id as u16,
        generation: backend.generation,
        nat_port: steered.nat_port,
        proto: packet.key.proto,
        mode: steered.mode as u8,
        ..FlowEntry::default()
    };
    remember_fragments();
}

/// Copies what [`remember_fragments`] wrote for the datagram that this later fragment is of.
#[inline(always)]
pub fn of_fragment(
    packet: &Packet,
    settings: &Settings,
    now: u32,
    copy: &mut FlowEntry,
) -> Option<()> {
    if packet.fragment != Fragment::LATER {
        return None;
    }
    let hash = packet.fragment_key().hash(&settings.hash_keys) ^ FRAGMENT_SALT;
    let is_it = |slot: FlowSlot, _| slot.state() as u8 == FlowState::Fragment as u8;
    let place = table::find(hash, settings, is_it).ok()??;
    if place.slot.age(now) > table::timeout(settings, FlowState::Fragment) {
        return None;
    }
    let entry = maps::FLOWS.get(place.index())?;
    *copy = *entry;
    let backend = maps::BACKENDS.get(copy.backend.into())?;
    table::serves(backend, copy.generation).then_some(())
}
