//! Keys and values of the maps, and the numbers that size them.

use crate::{Addr, FlowState, HASH_WORDS, mix64};

/// Slots of a ring: a prime, one percent of imbalance at 160 backends (Eisenbud et al., "Maglev",
/// NSDI 2016, §5.3: 100 slots a backend).
pub const RING_SIZE: usize = 16_381;

/// Words of the destination prefilter: 2 bits for each of 65,536 hash values, 16 KiB.
pub const PREFILTER_WORDS: u32 = 2048;

/// VIPs that may share one head of [`vip_head`]'s table; the agent refuses one more.
pub const VIP_CHAIN: u32 = 8;

/// Buckets of the flow table that one run of `sweep` covers. Its core takes in no packets meanwhile:
/// 50 microseconds over an empty share.
pub const SWEEP_BUCKETS: u32 = 4096;

/// Cells of the counters of new flows by source.
pub const SOURCE_RATE_CELLS: u32 = 65_536;

/// Indices in `LISTENERS`: the proxy's listeners that take connections by IPv4 and by IPv6; and how many
/// there are.
pub const LISTENER_V4: u32 = 0;
pub const LISTENER_V6: u32 = 1;
pub const LISTENERS: u32 = 2;

/// Changes whenever a map's layout or meaning does: pinned maps of another layout are not adopted.
pub const LAYOUT: u32 = 3;

/// The backend id that means "none".
pub const NO_BACKEND: u32 = 0;

/// The highest backend id: 16 bits in a ring's slot, of which [`RingSlot::NOBODY`] is none.
pub const MAX_BACKENDS: u32 = 0xfffe;

/// The mark (SO_MARK, socket(7)) of a health check of the VIP itself: the low half is the id of the
/// backend it is for, and 0 for whoever only dials VIPs untranslated.
pub const PROBE_MARK: u32 = 0x5641_0000;

/// Whether a socket or a packet with this mark is a health check's.
#[inline(always)]
pub const fn is_probe(mark: u32) -> bool {
    mark >> 16 == PROBE_MARK >> 16
}

/// How a packet gets to a backend.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// Source and destination are rewritten; answers come back through the gateway.
    #[default]
    Nat = 0,
    /// The destination is rewritten; answers come back through the gateway.
    Dnat = 1,
    /// The packet goes on as it is, to the backend's hardware address.
    Dsr = 2,
    /// Inside another IP header (RFC 2003, RFC 2473).
    Ipip = 3,
    /// Inside UDP: GUE variant 1, no header of its own (draft-ietf-intarea-gue-09, §4).
    Gue = 4,
    /// Up to the proxy on this host.
    L7 = 5,
}

impl Mode {
    #[inline(always)]
    pub const fn from_bits(bits: u8) -> Mode {
        match bits {
            0 => Mode::Nat,
            1 => Mode::Dnat,
            2 => Mode::Dsr,
            3 => Mode::Ipip,
            4 => Mode::Gue,
            _ => Mode::L7,
        }
    }

    /// Whether answers pass through the gateway, which must know their flow.
    #[inline(always)]
    pub const fn translates(self) -> bool {
        matches!(self, Mode::Nat | Mode::Dnat)
    }

    /// Whether backends serve under the VIP's address and answer clients themselves.
    #[inline(always)]
    pub const fn is_one_way(self) -> bool {
        matches!(self, Mode::Dsr | Mode::Ipip | Mode::Gue)
    }
}

/// How a backend is chosen for a new flow.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheduler {
    /// By the 5-tuple on a Maglev ring.
    #[default]
    Maglev = 0,
    /// By the client's address on a Maglev ring.
    SourceHash = 1,
    /// The next of a weighted cycle, which the ring holds instead.
    RoundRobin = 2,
    /// Of two random slots of a Maglev ring, the one whose backend has fewer flows for its weight
    /// (Mitzenmacher, "The power of two choices", IEEE TPDS 12(10), 2001).
    LeastConnections = 3,
}

impl Scheduler {
    #[inline(always)]
    pub const fn from_bits(bits: u8) -> Scheduler {
        match bits {
            0 => Scheduler::Maglev,
            1 => Scheduler::SourceHash,
            2 => Scheduler::RoundRobin,
            _ => Scheduler::LeastConnections,
        }
    }

    /// Whether the ring says which backend a flow is on, while its slot is quiet.
    #[inline(always)]
    pub const fn is_hash(self) -> bool {
        matches!(self, Scheduler::Maglev | Scheduler::SourceHash)
    }
}

/// What a VIP does beyond its mode and scheduler: bits of [`VipEntry::flags`].
pub mod vip_flags {
    /// Every flow is looked up in the flow table, whatever the ring says of its slot.
    pub const TRACK: u8 = 1;
    /// A packet that no backend can take is dropped, not answered.
    pub const SILENT: u8 = 2;
    /// Sources are looked up in `SOURCES`; those that are not there are refused,
    pub const ALLOW_LISTED: u8 = 4;
    /// or, with this bit alone, allowed.
    pub const DENY_LISTED: u8 = 8;
    /// UDP carries QUIC whose connection IDs name the server.
    pub const QUIC: u8 = 16;
    /// TCP clients prove that they exist before they get a flow, once new flows exceed `vip_rate`.
    pub const CHALLENGE: u8 = 32;
}

/// What clients dial, and its policy; value of `VIPS`, by VIP index. All zero is a free entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VipEntry {
    pub addr: Addr,
    /// Host byte order, both included: 0 to 65,535 is any port. Backends of a VIP of several ports get
    /// packets on the port that the client dialed.
    pub port_first: u16,
    pub port_last: u16,
    /// IANA protocol number; 0 in a free entry.
    pub proto: u8,
    /// A [`Mode`].
    pub mode: u8,
    /// A [`Scheduler`].
    pub scheduler: u8,
    /// Of [`vip_flags`].
    pub flags: u8,
    /// Index of the next VIP behind the same head, plus 1; 0 is the end.
    pub next: u32,
    /// Backends in the ring; at 0 its content means nothing.
    pub backends: u32,
    /// Slots of the ring in use: [`RING_SIZE`], or the length of the cycle for [`Scheduler::RoundRobin`].
    pub ring_len: u32,
    /// Ticks for which a client stays on its backend after its last new flow; 0: no affinity.
    pub affinity: u32,
    /// New flows a tick from one source; 0: no bound.
    pub source_rate: u32,
    /// New flows a tick for the VIP; 0: no bound.
    pub vip_rate: u32,
    /// Octets of the server ID in a QUIC connection ID, and the three bits of its first octet that
    /// say so (draft-ietf-quic-load-balancers-21, §3).
    pub quic_len: u8,
    pub quic_config: u8,
    pub reserved: [u8; 14],
}

impl VipEntry {
    /// Whether it is the VIP of a packet.
    #[inline(always)]
    pub fn covers(&self, addr: Addr, port: u16, proto: u8) -> bool {
        self.addr == addr
            && self.proto == proto
            && self.port_first <= port
            && port <= self.port_last
    }

    #[inline(always)]
    pub const fn is_range(&self) -> bool {
        self.port_first != self.port_last
    }
}

/// Place of a VIP in `VIP_HEADS`, before the mask: the head of a chain through `VIPS`.
///
/// A VIP of one port has a place of its own; those of several share that of port 0 of their address
/// and protocol.
#[inline(always)]
pub fn vip_head(addr: Addr, port: u16, proto: u8, keys: &[u64; HASH_WORDS]) -> u32 {
    let words = addr.words();
    let mut sum = keys[0]
        .wrapping_add(keys[1].wrapping_mul(words[3] as u64))
        .wrapping_add(keys[2].wrapping_mul((port as u64) << 8 | proto as u64));
    if !addr.is_v4() {
        sum = sum
            .wrapping_add(keys[3].wrapping_mul(words[0] as u64))
            .wrapping_add(keys[4].wrapping_mul(words[1] as u64))
            .wrapping_add(keys[5].wrapping_mul(words[2] as u64));
    }
    mix64(sum) as u32
}

/// One slot of a ring: `previous:16 | current:16`, so that it changes by one store.
///
/// `previous` is 0 while the slot is quiet: whoever hashes here is on `current`, and the flow table is
/// not asked. When `current` changes, `previous` keeps the backend that the slot was quiet with: every
/// flow since is in the flow table, so a flow that is not there is older, and on `previous`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingSlot(pub u32);

impl RingSlot {
    /// `previous` of a slot whose older flows are over, but not all that the flow table has of it.
    pub const NOBODY: u32 = 0xffff;

    #[inline(always)]
    pub const fn new(current: u32, previous: u32) -> RingSlot {
        RingSlot(previous << 16 | current & 0xffff)
    }

    #[inline(always)]
    pub const fn current(self) -> u32 {
        self.0 & 0xffff
    }

    #[inline(always)]
    pub const fn previous(self) -> u32 {
        self.0 >> 16
    }

    #[inline(always)]
    pub const fn is_quiet(self) -> bool {
        self.0 >> 16 == 0
    }
}

/// The ring of one VIP, by VIP index. 64 KiB.
///
/// Written by the agent, whole; every slot is sound before and after, so a packet may see either.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ring {
    pub slots: [RingSlot; RING_SIZE],
    /// Rounds up to a power of two: the verifier's bound on an index is no tighter.
    pub reserved: [u32; 16_384 - RING_SIZE],
}

/// The slot of a flow in a ring of `len` slots, from its hash under [`crate::RING_KEYS`].
///
/// The high half of a product instead of a remainder: Lemire, "Fast random integer generation in an
/// interval", ACM TOMACS 29(1), 2019.
#[inline(always)]
pub const fn ring_slot(hash: u32, len: u32) -> usize {
    ((hash as u64 * len as u64) >> 32) as usize
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

/// A backend as a member of one VIP's pool; value of `BACKENDS`, by backend id. One cache line.
///
/// The VIP is part of it, so that finding a flow's backend also proves that it still serves that VIP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendEntry {
    pub address: Addr,
    /// The gateway's address the backend sees: in front of the packet for [`Mode::Nat`], of the outer
    /// header for [`Mode::Ipip`] and [`Mode::Gue`].
    pub source: Addr,
    /// Index of the VIP in `VIPS`.
    pub vip: u32,
    pub ifindex: u32,
    pub destination_mac: [u8; 6],
    pub source_mac: [u8; 6],
    /// As registered. Host byte order, as all below.
    pub port: u16,
    /// Changes whenever the id passes to another backend, and stays in the free entry in between;
    /// never 0 while in use.
    pub generation: u16,
    /// Octets that fit behind the Ethernet header on the way to it.
    pub mtu: u16,
    /// Tag control information to send with (IEEE 802.1Q-2022, §9.6); 0: untagged.
    pub vlan: u16,
    /// As registered; the ring already has it.
    pub weight: u16,
    /// A [`BackendState`].
    pub state: u8,
    /// 1: of a VIP of several ports; packets go to the one that the client dialed, not to `port`.
    pub dialed_port: u8,
}

impl BackendEntry {
    /// The port that packets to it are sent to.
    #[inline(always)]
    pub const fn port_for(&self, dialed: u16) -> u16 {
        if self.dialed_port != 0 {
            dialed
        } else {
            self.port
        }
    }
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

/// What a backend is doing, shared by all CPUs and changed by atomic addition; value of `BACKEND_LOAD`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendLoad {
    /// Flows in the flow table. May be off for moments, and is set right by every sweep.
    pub flows: i64,
    /// Connections opened by SYN,
    pub opened: u64,
    /// and flows whose first answer came, in the modes where answers pass here.
    pub answered: u64,
}

/// New flows of one tick; value of `SOURCE_RATES` and `VIP_RATES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateCell {
    /// The tick it is about, and flows in it: `tick:32 | flows:32`.
    pub word: u64,
}

/// The program's settings; the one value of `SETTINGS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Random, made when the maps are; places in the flow table and of VIPs depend on it.
    pub hash_keys: [u64; HASH_WORDS],
    /// Buckets of `FLOW_SLOTS`, a power of two, less one; `RETURNS` has twice as many.
    pub bucket_mask: u32,
    /// Length of `VIP_HEADS`, a power of two, less one.
    pub vip_mask: u32,
    /// A tick is 2^`tick_shift` jiffies, half a second to a second.
    pub tick_shift: u32,
    /// Ticks without a packet after which a flow is forgotten, by [`FlowState`].
    pub timeouts: [u32; FlowState::COUNT],
    /// First of the gateway's ports, and how many.
    pub nat_port_first: u16,
    pub nat_port_count: u16,
    /// One packet in this many is reported to `EVENTS`; 0: none.
    pub sample: u32,
    /// 1 while a VIP is in [`Mode::Dnat`]: answers have the backend's source and any destination.
    pub dnat: u32,
    /// UDP port of [`Mode::Gue`], host byte order.
    pub gue_port: u16,
    pub reserved: u16,
    /// [`LAYOUT`] of the agent that made the maps; 0 in maps that were just created.
    pub layout: u32,
}

/// Key of `SOURCES`, a longest-prefix map, behind its prefix length: 32 bits of VIP, then the source.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceKey {
    /// Index of the VIP in `VIPS`, in network byte order as the trie compares.
    pub vip: [u8; 4],
    pub source: Addr,
}

/// Values of `SOURCES`.
pub const SOURCE_DENY: u32 = 0;
pub const SOURCE_ALLOW: u32 = 1;

/// Key of `QUIC_SERVERS`: which backend has a server ID.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QuicKey {
    /// Index of the VIP in `VIPS`.
    pub vip: u32,
    pub reserved: u32,
    /// The octets as they lie in the connection ID, then zeros.
    pub server: [u8; 8],
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

/// What a packet met on its way; records of `EVENTS`, and the one value of `EXPLAINED`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketEvent {
    /// CLOCK_MONOTONIC; 0 in `EXPLAINED`.
    pub monotonic_ns: u64,
    pub source: Addr,
    /// Of an answer in `EVENTS`: the client that it went to.
    pub destination: Addr,
    /// Host byte order; ICMP has none.
    pub source_port: u16,
    pub destination_port: u16,
    /// Octets of the frame as it came, without padding.
    pub len: u32,
    pub ifindex: u32,
    /// Index of the VIP in `VIPS`, plus 1; 0: none was found, and always in `EVENTS`.
    pub vip: u32,
    /// 0: none was chosen.
    pub backend: u32,
    /// Of the ring, with the content of that slot; meaningless unless `asked_ring`.
    pub slot: u32,
    pub slot_content: RingSlot,
    /// A [`crate::Verdict`].
    pub verdict: u32,
    /// IANA protocol number.
    pub proto: u8,
    /// A [`Mode`].
    pub mode: u8,
    /// The [`FlowState`] found; 0: not found, or not asked.
    pub flow_state: u8,
    pub asked_table: u8,
    pub asked_ring: u8,
    pub reserved: [u8; 3],
}

/// Word and lowest bit of an address in the prefilter. Bit 0: a VIP has this address; bit 1: backends
/// answer to it, or (with [`Settings::dnat`]) a backend has it.
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

const _: () = assert!(size_of::<VipEntry>() == 64);
const _: () = assert!(size_of::<BackendEntry>() == 64);
const _: () = assert!(size_of::<Settings>() == 160);
const _: () = assert!(size_of::<BackendCounters>() == 40);
const _: () = assert!(size_of::<BackendLoad>() == 24);
const _: () = assert!(size_of::<SourceKey>() == 20);
const _: () = assert!(size_of::<QuicKey>() == 16);
const _: () = assert!(size_of::<PacketEvent>() == 80);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hash_has_a_slot_in_the_ring() {
        for len in [1, 7, RING_SIZE as u32] {
            assert_eq!(ring_slot(0, len), 0);
            assert_eq!(ring_slot(u32::MAX, len), len as usize - 1);
        }
    }

    #[test]
    fn the_low_half_of_a_mark_is_the_backend() {
        assert!(is_probe(PROBE_MARK) && is_probe(PROBE_MARK | MAX_BACKENDS));
        assert!(!is_probe(0) && !is_probe(MAX_BACKENDS));
    }

    #[test]
    fn a_ring_slot_reads_back_what_went_in() {
        let slot = RingSlot::new(MAX_BACKENDS, 7);
        assert_eq!((slot.current(), slot.previous()), (MAX_BACKENDS, 7));
        assert!(!slot.is_quiet() && RingSlot::new(3, 0).is_quiet());
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
