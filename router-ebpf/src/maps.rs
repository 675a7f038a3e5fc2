//! Every map: key to value, capacity, who writes and who reads.
//!
//! Capacities here are the smallest that load; the agent sets the configured ones before it creates
//! the maps. All but the agent's own questions (`SWEEP`, `CLOCK`, `EXPLAINED`), `EVENTS`, `EVENTS_LOST` and
//! the log are pinned and outlive the agent.

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::bpf_jiffies64;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use router_common::{
    Addr, BackendCounters, BackendEntry, BackendLoad, ClockSample, FlowBucket, FlowEntry,
    LocalPeer, LocalPeerKey, LocalSocket, PREFILTER_WORDS, PacketEvent, QuicKey, RateCell,
    ReturnBucket, Ring, SOURCE_RATE_CELLS, Settings, SourceKey, SweepRequest, Verdict, VipEntry,
};

/// Makes an array begin on a page, so that values of 64 octets are cache lines and not halves of two:
/// it follows the map's own header otherwise (kernel: kernel/bpf/arraymap.c, `array_map_alloc`).
const CACHE_LINES: u32 = BPF_F_MMAPABLE;

/// The one [`Settings`]. Written by the agent when it starts or reloads.
#[map]
pub static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

/// Whether any VIP or any answer has a destination of this hash; see `prefilter_bit`.
/// Written by the agent, read for every IP packet.
#[map]
pub static PREFILTER: Array<u64> = Array::with_max_entries(PREFILTER_WORDS, 0);

/// `vip_head` to the first VIP of a chain: its index plus 1, or 0. Written by the agent, read for
/// every packet to an address of a VIP.
#[map]
pub static VIP_HEADS: Array<u32> = Array::with_max_entries(1, 0);

/// VIP index to VIP. Written by the agent, read for every packet to one.
#[map]
pub static VIPS: Array<VipEntry> = Array::with_max_entries(1, CACHE_LINES);

/// The addresses of all VIPs, to how many VIPs have it. Written by the agent, read for packets that
/// have no port: those to other hosts are passed untouched.
#[map]
pub static VIP_ADDRESSES: HashMap<Addr, u32> = HashMap::with_max_entries(1, 0);

/// VIP index to ring, 64 KiB each. Written by the agent, read for the packets that the ring decides.
#[map]
pub static RINGS: Array<Ring> = Array::with_max_entries(1, 0);

/// VIP index to the place in the cycle of `Scheduler::RoundRobin`. Written here.
#[map]
pub static CURSORS: Array<u64> = Array::with_max_entries(1, 0);

/// Backend id to backend; id 0 is none. Written by the agent, read for every packet of a flow.
#[map]
pub static BACKENDS: Array<BackendEntry> = Array::with_max_entries(2, CACHE_LINES);

/// Backend id to counters. Written here, read and reset by the agent.
#[map]
pub static BACKEND_COUNTERS: PerCpuArray<BackendCounters> = PerCpuArray::with_max_entries(2, 0);

/// Backend id to what it is doing. Written here, set right by the agent after each sweep.
#[map]
pub static BACKEND_LOAD: Array<BackendLoad> = Array::with_max_entries(2, 0);

/// Backend id to its flows as of the last sweep. Written by `sweep`, read and reset by the agent.
#[map]
pub static BACKEND_FLOWS: Array<u32> = Array::with_max_entries(2, 0);

/// VIP index to flows, as of the last sweep, that are not on the backend their ring's slot names.
/// Written by `sweep`, read and reset by the agent.
#[map]
pub static MOVED_FLOWS: Array<u32> = Array::with_max_entries(1, 0);

/// Hash of a client's packets to slots; 8 slots a bucket. Written here.
#[map]
pub static FLOW_SLOTS: Array<FlowBucket> = Array::with_max_entries(1, CACHE_LINES);

/// Slot (bucket * 8 + way) to flow. Written here.
#[map]
pub static FLOWS: Array<FlowEntry> = Array::with_max_entries(8, CACHE_LINES);

/// Hash of a backend's packets to flows; 8 slots a bucket, twice as many as flows. Written here.
#[map]
pub static RETURNS: Array<ReturnBucket> = Array::with_max_entries(2, CACHE_LINES);

/// VIP and prefix of sources to `SOURCE_ALLOW` or `SOURCE_DENY`. Written by the agent, read for VIPs
/// that have such a list.
#[map]
pub static SOURCES: LpmTrie<SourceKey, u32> = LpmTrie::with_max_entries(1, BPF_F_NO_PREALLOC);

/// New flows of this second by hash of VIP and source. Written here.
#[map]
pub static SOURCE_RATES: Array<RateCell> = Array::with_max_entries(SOURCE_RATE_CELLS, 0);

/// New flows of this second by VIP index. Written here.
#[map]
pub static VIP_RATES: Array<RateCell> = Array::with_max_entries(1, 0);

/// QUIC server ID to backend id. Written by the agent, read for VIPs with QUIC.
#[map]
pub static QUIC_SERVERS: HashMap<QuicKey, u32> = HashMap::with_max_entries(1, 0);

/// [`Verdict`] to packets. Written here, read by the agent.
#[map]
pub static VERDICTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Verdict::COUNT, 0);

/// A sample of packets and what became of them, for `viaduct watch`. 256 KiB.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// Sampled packets that `EVENTS` had no room for. Written here, read by the agent.
#[map]
pub static EVENTS_LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// A socket of this host that dialed a VIP, to what it dialed. Written here; the kernel keeps it with
/// the socket and drops it with the socket.
#[btf_map]
pub static LOCAL_SOCKETS: SkStorage<LocalSocket> = SkStorage::new();

/// Where datagrams of sockets without a connection go, and whom their answers are shown to be from:
/// two entries for each VIP that such a socket sends to. Written here; the least recently used make
/// room.
#[map]
pub static LOCAL_PEERS: LruHashMap<LocalPeerKey, LocalPeer> = LruHashMap::with_max_entries(2, 0);

/// Backend id to connected sockets of this host. Written here, reset by the agent.
#[map]
pub static LOCAL_FLOWS: Array<u64> = Array::with_max_entries(2, 0);

/// The sweep's order and answer.
#[map]
pub static SWEEP: Array<SweepRequest> = Array::with_max_entries(1, 0);

/// Where `clock` leaves its sample.
#[map]
pub static CLOCK: Array<ClockSample> = Array::with_max_entries(1, 0);

/// Where `explain` leaves what it found.
#[map]
pub static EXPLAINED: Array<PacketEvent> = Array::with_max_entries(1, 0);

#[inline(always)]
pub fn settings() -> Result<&'static Settings, Verdict> {
    SETTINGS.get(0).ok_or(Verdict::Internal)
}

/// Ticks since boot.
#[inline(always)]
pub fn now(settings: &Settings) -> u32 {
    // SAFETY: reads a clock; the JIT inlines it to one load.
    let jiffies = unsafe { bpf_jiffies64() };
    (jiffies >> (settings.tick_shift & 31)) as u32 & 0xffff
}

/// By a [`Verdict`]'s number.
#[inline(always)]
pub fn count_verdict(verdict: u32) {
    if let Some(count) = VERDICTS.get_ptr_mut(verdict) {
        // SAFETY: this CPU's own value, and XDP programs do not interrupt each other.
        unsafe { *count += 1 };
    }
}

pub fn count_lost_event() {
    if let Some(count) = EVENTS_LOST.get_ptr_mut(0) {
        // SAFETY: as in `count_verdict`.
        unsafe { *count += 1 };
    }
}

/// Counts a client's packet for its backend.
#[inline(always)]
pub fn count_packet(backend: u32, len: u64, new: bool) {
    if let Some(counters) = BACKEND_COUNTERS.get_ptr_mut(backend) {
        // SAFETY: as in `count_verdict`.
        unsafe {
            (*counters).packets += 1;
            (*counters).bytes += len;
            if new {
                (*counters).new_flows += 1;
            }
        }
    }
}

/// Counts a backend's answer.
#[inline(always)]
pub fn count_reply(backend: u32, len: u64) {
    if let Some(counters) = BACKEND_COUNTERS.get_ptr_mut(backend) {
        // SAFETY: as in `count_verdict`.
        unsafe {
            (*counters).reply_packets += 1;
            (*counters).reply_bytes += len;
        }
    }
}
