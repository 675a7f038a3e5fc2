//! Keys and values of the maps, and the numbers that size them.

use crate::{Addr, FlowState, HASH_WORDS};

/// Slots of a Maglev ring: a prime, one percent of imbalance at 160 backends (Eisenbud et al.,
/// "Maglev", NSDI 2016, §5.3: 100 slots a backend).
pub const RING_SIZE: usize = 16_381;

/// Words of the destination prefilter: 2 bits for each of 65,536 hash values, 16 KiB.
pub const PREFILTER_WORDS: u32 = 2048;

/// Buckets of the flow table that one run of `sweep` covers. Its core takes in no packets meanwhile:
/// 50 microseconds over an empty share.
pub const SWEEP_BUCKETS: u32 = 4096;

/// Changes whenever a map's layout or meaning does: pinned maps of another layout are not adopted.
pub const LAYOUT: u32 = 1;

/// The backend id that means "none".
pub const NO_BACKEND: u32 = 0;

/// What a client dials; key of `VIPS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VipKey {
    addr: Addr,
    port: [u8; 2],
    proto: u8,
    reserved: u8,
}

impl VipKey {
    #[inline(always)]
    pub fn new(addr: Addr, port: u16, proto: u8) -> VipKey {
        VipKey {
            addr,
            port: port.to_be_bytes(),
            proto,
            reserved: 0,
        }
    }

    pub fn addr(&self) -> Addr {
        self.addr
    }

    pub fn port(&self) -> u16 {
        u16::from_be_bytes(self.port)
    }

    /// IANA protocol number.
    pub fn proto(&self) -> u8 {
        self.proto
    }
}

/// Value of `VIPS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VipInfo {
    /// Index of the VIP's ring in `RINGS`.
    pub ring: u32,
    /// Backends in the ring; at 0 the ring's content means nothing.
    pub backends: u32,
}

/// The Maglev ring of one VIP: slot to backend id. 64 KiB.
///
/// Written by the agent, whole; read by XDP for the first packet of a flow.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ring {
    pub slots: [u32; RING_SIZE],
    /// Rounds up to a power of two: the verifier's bound on an index is no tighter.
    pub reserved: [u32; 16_384 - RING_SIZE],
}

/// The slot of a flow, from its hash under [`crate::RING_KEYS`].
///
/// The high half of a product instead of a remainder: Lemire, "Fast random integer generation in an
/// interval", ACM TOMACS 29(1), 2019.
#[inline(always)]
pub const fn ring_slot(hash: u32) -> usize {
    ((hash as u64 * RING_SIZE as u64) >> 32) as usize
}

#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendState {
    #[default]
    Free = 0,
    /// In the ring.
    Active = 1,
    /// Out of the ring; its flows go on.
    Draining = 2,
}

/// A backend as a member of one VIP's pool; value of `BACKENDS`, by backend id. 76 bytes.
///
/// The VIP is part of it, so that finding a flow's backend also proves that it still serves that VIP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendEntry {
    pub vip: Addr,
    pub address: Addr,
    /// The gateway's address the backend sees.
    pub source: Addr,
    pub ifindex: u32,
    /// Host byte order, as the three fields below.
    pub vip_port: u16,
    pub port: u16,
    /// Changes whenever the id passes to another backend, and stays in the free entry in between;
    /// never 0 while in use.
    pub generation: u16,
    pub destination_mac: [u8; 6],
    pub source_mac: [u8; 6],
    /// IANA protocol number.
    pub proto: u8,
    /// A [`BackendState`].
    pub state: u8,
    /// As registered, for an agent that adopts the map; the ring already has it.
    pub weight: u16,
    pub reserved: [u8; 2],
}

/// What a backend's flows moved; value of `BACKEND_COUNTERS`, one per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendCounters {
    pub packets: u64,
    /// Of Ethernet frames without checksum, as all byte counts here.
    pub bytes: u64,
    pub reply_packets: u64,
    pub reply_bytes: u64,
    pub new_flows: u64,
}

impl core::ops::AddAssign for BackendCounters {
    fn add_assign(&mut self, other: BackendCounters) {
        self.packets += other.packets;
        self.bytes += other.bytes;
        self.reply_packets += other.reply_packets;
        self.reply_bytes += other.reply_bytes;
        self.new_flows += other.new_flows;
    }
}

/// The program's settings; the one value of `SETTINGS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Random, made when the maps are; the flow table's places depend on it.
    pub hash_keys: [u64; HASH_WORDS],
    /// Buckets of `FLOW_SLOTS`, a power of two, less one; `RETURNS` has twice as many.
    pub bucket_mask: u32,
    /// A tick is 2^`tick_shift` jiffies, a quarter to half a second.
    pub tick_shift: u32,
    /// Ticks without a packet after which a flow is forgotten, by [`FlowState`].
    pub timeouts: [u32; FlowState::COUNT],
    /// First of the gateway's ports, and how many.
    pub nat_port_first: u16,
    pub nat_port_count: u16,
    /// [`LAYOUT`] of the agent that made the maps; 0 in maps that were just created.
    pub layout: u32,
}

/// Where the agent asks the sweep to work and reads what it found; the one value of `SWEEP`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepRequest {
    pub first_bucket: u32,
    pub reserved: u32,
    pub result: SweepResult,
}

/// What one run of the sweep found in its share of the buckets.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepResult {
    pub live: u32,
    pub freed: u32,
}

/// Both of the kernel's clocks at one moment; the one value of `CLOCK`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockSample {
    pub jiffies: u64,
    /// CLOCK_MONOTONIC.
    pub monotonic_ns: u64,
}

/// Word and lowest bit of a destination in the prefilter. Bit 0: a VIP has this address; bit 1: a
/// backend answers to it.
///
/// Traffic for neither is passed after this one lookup; a false alarm costs a second one.
#[inline(always)]
pub const fn prefilter_bit(destination: Addr) -> (u32, u32) {
    let words = destination.words();
    let folded =
        words[3] ^ words[0].rotate_left(7) ^ words[1].rotate_left(13) ^ words[2].rotate_left(19);
    // Knuth's multiplicative hash, TAOCP vol. 3, §6.4.
    let hash = folded.wrapping_mul(0x9e37_79b1) >> 16;
    (hash >> 5, (hash & 31) * 2)
}

const _: () = assert!(size_of::<VipKey>() == 20);
const _: () = assert!(size_of::<VipInfo>() == 8);
const _: () = assert!(size_of::<BackendEntry>() == 76);
const _: () = assert!(size_of::<Settings>() == 136);
const _: () = assert!(size_of::<BackendCounters>() == 40);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hash_has_a_slot_in_the_ring() {
        assert_eq!(ring_slot(0), 0);
        assert_eq!(ring_slot(u32::MAX), RING_SIZE - 1);
    }

    #[test]
    fn neighbouring_addresses_get_bits_of_their_own() {
        let mut seen = std::collections::HashSet::new();
        for host in 0..=255 {
            let addr = Addr::from(core::net::Ipv4Addr::new(192, 0, 2, host));
            let (word, bit) = prefilter_bit(addr);
            assert!(word < PREFILTER_WORDS && bit < 64 && bit % 2 == 0);
            seen.insert((word, bit));
        }
        assert!(seen.len() > 250);
    }
}
