//! Proof that TCP clients exist, asked for while a VIP gets more new flows than it should.
//!
//! A SYN is answered by an acknowledgment of something never sent. Whoever really sent it resets that,
//! with the number acknowledged as its sequence number (RFC 9293 §3.10.7.3), and sends its SYN again a
//! second later, which then passes. Nothing is kept for those who do not answer, no sequence numbers
//! have to be translated, and so it works in every mode.

use router_common::{FlowKey, FlowSlot, FlowState, Ports, Settings, Verdict};

use crate::answer::{self, Reply};
use crate::frame::{Frame, at};
use crate::packet::Packet;
use crate::stage::Outcome;
use crate::verifier::forget;
use crate::vip::Vip;
use crate::{flows, maps, schedule, scratch, table};

/// Keeps places of clients that proved themselves apart from those of flows.
const SALT: u64 = 0x1656_67b1_9e37_79f9;
/// A number is good in the 2^4 ticks it was made in, and in the next.
const AGE_SHIFT: u32 = 4;

/// Asks the client of the packet in the scratch for its proof.
#[inline(always)]
pub fn ask<F: Frame>(frame: &F) -> Result<Outcome, Verdict> {
    let settings = maps::settings()?;
    let packet = &scratch::get()?.packet;
    let number = number(&packet.key, settings, maps::now(settings) >> AGE_SHIFT);
    let action = answer::reset(frame, packet, Reply::Challenge(number))?;
    Ok(Outcome::sent(Verdict::Challenged, action))
}

/// Remembers the client of the RST in the scratch, if it is the proof; `UnknownFlow` if it is a segment
/// like any other.
#[inline(always)]
pub fn take<F: Frame>(frame: &F) -> Result<Outcome, Verdict> {
    let settings = maps::settings()?;
    let scratch = scratch::get()?;
    let packet = &scratch.packet;
    let vip = Vip::at(scratch.vip).ok_or(Verdict::Internal)?;
    let sequence = at::<u32>(frame, packet.l4 + 4).ok_or(Verdict::Malformed)?;
    // SAFETY: `at` checked that it lies in the frame.
    let sequence = u32::from_be(unsafe { *sequence });
    let now = maps::now(settings);
    let age = now >> AGE_SHIFT;
    if sequence != number(&packet.key, settings, age)
        && sequence != number(&packet.key, settings, age.wrapping_sub(1))
    {
        let chosen = flows::by_ring_alone::<F>(packet, vip, settings)?;
        scratch.steered = chosen;
        return Ok(Outcome::NEXT);
    }
    if F::DRY {
        return Err(Verdict::Proven);
    }
    let key = client_key(packet);
    let hash = key.hash(&settings.hash_keys) ^ SALT;
    // Any backend of the VIP: the place is empty once it is gone.
    let backend = schedule::slot_of::<F>(vip, &packet.key)?.current();
    let place = match table::find(hash, settings, is_proof)? {
        Some(place) => place,
        None => table::free_place(hash, settings, now)?,
    };
    let slot = FlowSlot::new(FlowSlot::tag_of(hash), backend, now, FlowState::Fragment);
    flows::remember(place, slot, &key, vip);
    Err(Verdict::Proven)
}

/// Whether the client of the packet in the scratch has proved itself of late; 0 if not. Verified by
/// itself, as [`crate::stage`] explains.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn is_proven(vip: u32, now: u32) -> u64 {
    let (Ok(settings), Ok(scratch), Some(_)) = (maps::settings(), scratch::get(), Vip::at(vip))
    else {
        return 0;
    };
    let hash = client_key(&scratch.packet).hash(&settings.hash_keys) ^ SALT;
    match table::find(hash, settings, is_proof) {
        Ok(Some(place)) => {
            let fresh = place.slot.age(now) <= table::timeout(settings, FlowState::Fragment);
            u64::from(forget(fresh.into(), hash))
        }
        _ => 0,
    }
}

fn is_proof(slot: FlowSlot, _index: u32) -> bool {
    slot.state() as u8 == FlowState::Fragment as u8
}

/// What all flows of a client to a VIP have in common.
#[inline(always)]
fn client_key(packet: &Packet) -> FlowKey {
    FlowKey {
        ports: Ports::new(0, packet.key.ports.destination()),
        ..packet.key
    }
}

/// A number that only whoever gets the packets to `key`'s source can know.
#[inline(always)]
fn number(key: &FlowKey, settings: &Settings, age: u32) -> u32 {
    let age = (age as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    router_common::mix64(key.hash(&settings.hash_keys) ^ age ^ settings.hash_keys[0]) as u32
}
