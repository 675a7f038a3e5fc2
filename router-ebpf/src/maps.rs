//! Every map: key to value, capacity, who writes and who reads.
//!
//! Capacities here are the smallest that load; the agent sets the configured ones before it creates
//! the maps. All but `CLOCK`, `SWEEP` and the log are pinned and outlive the agent.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::helpers::bpf_jiffies64;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use router_common::{
    Addr, BackendCounters, BackendEntry, ClockSample, FlowBucket, FlowEntry, PREFILTER_WORDS,
    ReturnBucket, Ring, Settings, SweepRequest, Verdict, VipInfo, VipKey,
};

/// Makes an array begin on a page, so that values of 64 octets are cache lines and not halves of two:
/// it follows the map's own header otherwise (kernel: kernel/bpf/arraymap.c, `array_map_alloc`).
const CACHE_LINES: u32 = BPF_F_MMAPABLE;

/// The one [`Settings`]. Written by the agent when it starts or reloads.
#[map]
pub static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

/// Whether any VIP or any answer has a destination of this hash; see `prefilter_bit`.
/// Written by the agent, read for every IPv4 packet.
#[map]
pub static PREFILTER: Array<u64> = Array::with_max_entries(PREFILTER_WORDS, 0);

/// VIP to its ring. Written by the agent, read for the first packet of a flow.
#[map]
pub static VIPS: HashMap<VipKey, VipInfo> = HashMap::with_max_entries(1, 0);

/// The addresses of all VIPs, to how many VIPs have it. Written by the agent, read for packets that
/// cannot be parsed: those to other hosts are passed untouched.
#[map]
pub static VIP_ADDRESSES: HashMap<Addr, u32> = HashMap::with_max_entries(1, 0);

/// Ring index to Maglev ring, 64 KiB each. Written by the agent, read for the first packet of a flow.
#[map]
pub static RINGS: Array<Ring> = Array::with_max_entries(1, 0);

/// Backend id to backend; id 0 is none. Written by the agent, read for every packet of a flow.
#[map]
pub static BACKENDS: Array<BackendEntry> = Array::with_max_entries(2, 0);

/// Backend id to counters. Written here, read and reset by the agent.
#[map]
pub static BACKEND_COUNTERS: PerCpuArray<BackendCounters> = PerCpuArray::with_max_entries(2, 0);

/// Backend id to its flows as of the last sweep. Written by `sweep`, read and reset by the agent.
#[map]
pub static BACKEND_FLOWS: Array<u32> = Array::with_max_entries(2, 0);

/// Hash of a client's packets to slots; 8 slots a bucket. Written here.
#[map]
pub static FLOW_SLOTS: Array<FlowBucket> = Array::with_max_entries(1, CACHE_LINES);

/// Slot (bucket * 8 + way) to flow. Written here.
#[map]
pub static FLOWS: Array<FlowEntry> = Array::with_max_entries(8, CACHE_LINES);

/// Hash of a backend's packets to flows; 8 slots a bucket, twice as many as flows. Written here.
#[map]
pub static RETURNS: Array<ReturnBucket> = Array::with_max_entries(2, CACHE_LINES);

/// [`Verdict`] to packets. Written here, read by the agent.
#[map]
pub static VERDICTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Verdict::COUNT, 0);

/// The sweep's order and answer.
#[map]
pub static SWEEP: Array<SweepRequest> = Array::with_max_entries(1, 0);

/// Where `clock` leaves its sample.
#[map]
pub static CLOCK: Array<ClockSample> = Array::with_max_entries(1, 0);

#[inline(always)]
pub fn settings() -> Result<&'static Settings, Verdict> {
    SETTINGS.get(0).ok_or(Verdict::Internal)
}

/// Ticks since boot.
#[inline(always)]
pub fn now(settings: &Settings) -> u32 {
    // SAFETY: reads a clock; the JIT inlines it to one load.
    let jiffies = unsafe { bpf_jiffies64() };
    (jiffies >> (settings.tick_shift & 31)) as u32 & 0xff_ffff
}

#[inline(always)]
pub fn count_verdict(verdict: Verdict) {
    if let Some(count) = VERDICTS.get_ptr_mut(verdict as u32) {
        // SAFETY: this CPU's own value, and XDP programs do not interrupt each other.
        unsafe { *count += 1 };
    }
}

/// Counts a client's packet for its backend.
#[inline(always)]
pub fn count_packet(backend: u32, len: u64, verdict: Verdict) {
    if let Some(counters) = BACKEND_COUNTERS.get_ptr_mut(backend) {
        // SAFETY: as in `count_verdict`.
        unsafe {
            (*counters).packets += 1;
            (*counters).bytes += len;
            if verdict as u32 == Verdict::NewFlow as u32 {
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
