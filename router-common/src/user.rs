//! Lets aya copy the shared types between maps and the agent.

use crate::{
    Addr, BackendCounters, BackendEntry, BackendLoad, ClockSample, FlowBucket, FlowEntry,
    LocalPeer, LocalPeerKey, PacketEvent, QuicKey, RateCell, ReturnBucket, Ring, Settings,
    SourceKey, SweepRequest, VipEntry,
};

macro_rules! pod {
    ($($ty:ty),* $(,)?) => {$(
        // SAFETY: `#[repr(C)]` integers and arrays of them, without padding (the sizes are asserted
        // beside the types), and every bit pattern is a value.
        unsafe impl aya::Pod for $ty {}
    )*};
}

pod!(
    Addr,
    BackendCounters,
    BackendEntry,
    BackendLoad,
    ClockSample,
    FlowBucket,
    FlowEntry,
    LocalPeer,
    LocalPeerKey,
    PacketEvent,
    QuicKey,
    RateCell,
    ReturnBucket,
    Ring,
    Settings,
    SourceKey,
    SweepRequest,
    VipEntry,
);
