//! What became of packets, for those who watch: every so many to a ring buffer, and the one that the
//! agent asks about to `EXPLAINED`.

use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns};
use router_common::{Addr, FlowKey, PacketEvent, Ports, Verdict};

use crate::frame::Frame;
use crate::packet::Packet;
use crate::{maps, scratch};

/// Forgets the packet that was explained before, and the one that went by before this one.
#[inline(always)]
pub fn begin<F: Frame>(frame: &F, packet: &mut Packet) {
    note(|event| {
        *event = PacketEvent {
            len: frame.len(),
            ..PacketEvent::default()
        };
    });
    packet.key = FlowKey {
        source: Addr::default(),
        destination: Addr::default(),
        ports: Ports::default(),
        proto: 0,
    };
}

/// Adds to what `explain` found.
#[inline(always)]
pub fn note(change: impl FnOnce(&mut PacketEvent)) {
    if let Some(event) = maps::EXPLAINED.get_ptr_mut(0) {
        // SAFETY: the pointer is to the map's value; the agent explains one packet at a time.
        change(unsafe { &mut *event });
    }
}

/// Reports the packet in the scratch, with its verdict's number, if it is its turn or the one asked
/// about.
#[inline(always)]
pub fn report<F: Frame>(frame: &F, verdict: u32) {
    if F::DRY {
        note(|event| fill(event, frame, verdict));
    } else if maps::settings().is_ok_and(|settings| settings.sample != 0)
        && verdict != Verdict::NotForUs as u32
    {
        sample(frame, verdict);
    }
}

#[inline(never)]
fn sample<F: Frame>(frame: &F, verdict: u32) -> u64 {
    let Ok(settings) = maps::settings() else {
        return 0;
    };
    // SAFETY: the helpers read a generator and a clock.
    if settings.sample == 0 || unsafe { bpf_get_prandom_u32() } % settings.sample != 0 {
        return 0;
    }
    // Where nobody reads fast enough, what does not fit is left out.
    let Some(mut record) = maps::EVENTS.reserve::<PacketEvent>(0) else {
        maps::count_lost_event();
        return 0;
    };
    let mut event = PacketEvent {
        // SAFETY: as above.
        monotonic_ns: unsafe { bpf_ktime_get_ns() },
        ..PacketEvent::default()
    };
    fill(&mut event, frame, verdict);
    note_way(&mut event, verdict);
    record.write(event);
    record.submit(0);
    0
}

/// Where a packet went that was sent on: what the scratch says of others is of earlier ones.
#[inline(always)]
fn note_way(event: &mut PacketEvent, verdict: u32) {
    const TO_BACKEND: u32 = 1 << Verdict::Forwarded as u32
        | 1 << Verdict::NewFlow as u32
        | 1 << Verdict::Untracked as u32;
    let Ok(scratch) = scratch::get() else {
        return;
    };
    if TO_BACKEND >> (verdict & 31) & 1 == 1 {
        event.backend = scratch.steered.backend_id;
        event.mode = scratch.steered.mode as u8;
    } else if verdict == Verdict::Replied as u32 {
        event.backend = scratch.flow.backend.into();
        event.mode = scratch.flow.mode;
        event.destination = scratch.flow.client;
        event.destination_port = scratch.flow.ports.source();
    }
}

#[inline(always)]
fn fill<F: Frame>(event: &mut PacketEvent, frame: &F, verdict: u32) {
    event.verdict = verdict;
    event.ifindex = frame.ifindex();
    let Ok(scratch) = scratch::get() else {
        return;
    };
    let packet = &scratch.packet;
    // The frame itself may be longer by now.
    if !F::DRY {
        event.len = packet.len() as u32;
    }
    event.source = packet.key.source;
    event.destination = packet.key.destination;
    event.source_port = packet.key.ports.source();
    event.destination_port = packet.key.ports.destination();
    event.proto = packet.key.proto;
}
