//! What the XDP program and the agent share: the layout of every map, the flow hash, the verdicts.
//!
//! Three rules hold for every type that goes into a map:
//! 1. `#[repr(C)]`, a size asserted here, and no padding: a byte nobody wrote makes lookups miss.
//! 2. Addresses and the ports of a key are in network byte order, in private fields; constructors and
//!    getters take and give host types. Words ([`Addr`]) hold four octets as they lie in the packet.
//!    A field in host byte order says so.
//! 3. All-zero is a valid value that means "nothing here", since that is what a new array holds.

#![cfg_attr(not(test), no_std)]

mod addr;
pub mod checksum;
mod flow;
mod local;
mod sockmap;
mod tables;
mod verdict;

pub use addr::{Addr, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP, Ports};
pub use flow::{
    FLOW_WAYS, FlowBucket, FlowEntry, FlowKey, FlowSlot, FlowState, HASH_WORDS, MAX_TICKS,
    RETURN_WAYS, RING_KEYS, ReturnBucket, ReturnSlot, TcpFlags, mix, mix64, ticks_since,
};
pub use local::{LocalFlow, LocalPeer, LocalPeerKey, LocalSocket, Peer, Side};
pub use sockmap::{
    SOCKMAP_BYTES, SOCKMAP_MARK, SOCKMAP_MESSAGE_BYTES, SOCKMAP_SOCKETS, SockmapCounter,
};
pub use tables::{
    BackendCounters, BackendEntry, BackendLoad, BackendState, ClockSample, LAYOUT, LISTENER_V4,
    LISTENER_V6, LISTENERS, MAX_BACKENDS, Mode, NO_BACKEND, PREFILTER_WORDS, PROBE_MARK,
    PacketEvent, QuicKey, RING_SIZE, RateCell, Ring, RingSlot, SOURCE_ALLOW, SOURCE_DENY,
    SOURCE_RATE_CELLS, SWEEP_BUCKETS, Scheduler, Settings, SourceKey, SweepRequest, SweepResult,
    VIP_CHAIN, VipEntry, is_probe, prefilter_bit, ring_slot, vip_flags, vip_head,
};
pub use verdict::Verdict;

#[cfg(feature = "user")]
mod user;
