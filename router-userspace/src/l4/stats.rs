//! What layer 4 lets others see: the counters of the program, by VIP and backend.
//!
//! [`super::L4`] publishes who has which backend id; an [`L4Reader`] puts the kernel's counters beside
//! that, on the thread that asks.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use router_common::BackendCounters;
use serde::Serialize;

use crate::l4::datapath::Counters;
use crate::route::Vip;

/// Reads the program's counters from any thread.
#[derive(Clone)]
pub struct L4Reader {
    pub(super) shared: Arc<Shared>,
}

impl L4Reader {
    /// # Errors
    /// A counter map cannot be read.
    pub fn stats(&self) -> anyhow::Result<L4Stats> {
        let shared = &self.shared;
        let flows = shared.flows.load();
        let verdicts = shared.counters.verdicts()?;
        let mut stats = L4Stats {
            verdicts: verdicts
                .into_iter()
                .map(|(verdict, count)| (verdict.name(), count))
                .collect(),
            active_flows: shared.active_flows.load(Ordering::Relaxed),
            failed_writes: shared.failed_writes.load(Ordering::Relaxed),
            refused: shared.refused.load(Ordering::Relaxed),
            vips: Vec::new(),
        };
        for (vip, view) in shared.vips.load().iter() {
            stats.vips.push(self.vip_stats(vip, view, &flows)?);
        }
        Ok(stats)
    }

    fn vip_stats(
        &self,
        vip: &Vip,
        view: &VipView,
        flows: &HashMap<u32, u32>,
    ) -> anyhow::Result<VipStats> {
        let mut total = view.retired;
        let mut backends = Vec::with_capacity(view.members.len());
        let mut active_flows = 0;
        for member in &view.members {
            let counters = match member.id {
                Some(id) => self.shared.counters.backend(id)?,
                None => BackendCounters::default(),
            };
            total += counters;
            let member_flows = member
                .id
                .and_then(|id| flows.get(&id).copied())
                .unwrap_or(0);
            let local_flows = match member.id {
                Some(id) => self.shared.counters.local_flows(id)?,
                None => 0,
            };
            active_flows += u64::from(member_flows) + local_flows;
            backends.push(BackendStats {
                address: member.address,
                weight: member.weight,
                draining: member.draining,
                reachable: member.id.is_some(),
                active_flows: u64::from(member_flows) + local_flows,
                local_flows,
                moved: Moved::from(counters),
            });
        }
        Ok(VipStats {
            vip: vip.to_string(),
            active_flows,
            moved: Moved::from(total),
            backends,
        })
    }
}

/// What layer 4 counted since its maps were created.
#[derive(Clone, Debug, Default, Serialize)]
pub struct L4Stats {
    /// Packets by verdict name.
    pub verdicts: Vec<(&'static str, u64)>,
    /// As of the last sweep, at most five seconds ago.
    pub active_flows: u64,
    /// Writes to a map that the kernel refused and that were or will be repeated.
    pub failed_writes: u64,
    /// Backends that a plan left out for want of room or for their address family.
    pub refused: u64,
    pub vips: Vec<VipStats>,
}

#[derive(Clone, Debug, Serialize)]
pub struct VipStats {
    pub vip: String,
    pub active_flows: u64,
    #[serde(flatten)]
    pub moved: Moved,
    pub backends: Vec<BackendStats>,
}

#[derive(Clone, Debug, Serialize)]
pub struct BackendStats {
    pub address: SocketAddr,
    pub weight: u16,
    /// Gets no new flows: it left its pool, or is unhealthy.
    pub draining: bool,
    /// False while no next hop is known; such a backend gets no flows.
    pub reachable: bool,
    pub active_flows: u64,
    /// Those of clients on this host, whose packets nobody counts.
    pub local_flows: u64,
    #[serde(flatten)]
    pub moved: Moved,
}

/// Packets and octets of Ethernet frames, from clients and back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Moved {
    pub packets: u64,
    pub bytes: u64,
    pub reply_packets: u64,
    pub reply_bytes: u64,
    pub new_flows: u64,
}

impl From<BackendCounters> for Moved {
    fn from(counters: BackendCounters) -> Moved {
        Moved {
            packets: counters.packets,
            bytes: counters.bytes,
            reply_packets: counters.reply_packets,
            reply_bytes: counters.reply_bytes,
            new_flows: counters.new_flows,
        }
    }
}

/// What [`L4Reader`]s see of an [`L4`].
pub(super) struct Shared {
    pub(super) counters: Counters,
    pub(super) vips: ArcSwap<imbl::OrdMap<Vip, Arc<VipView>>>,
    /// Flows by backend id, and all of them, as of the last sweep.
    pub(super) flows: ArcSwap<HashMap<u32, u32>>,
    pub(super) active_flows: AtomicU64,
    pub(super) failed_writes: AtomicU64,
    pub(super) refused: AtomicU64,
}

#[derive(Clone, Default)]
pub(super) struct VipView {
    pub(super) members: Vec<MemberView>,
    /// What backends that are gone moved while they were here.
    pub(super) retired: BackendCounters,
}

#[derive(Clone)]
pub(super) struct MemberView {
    pub(super) address: SocketAddr,
    /// `None` while the backend has no next hop or no room.
    pub(super) id: Option<u32>,
    pub(super) draining: bool,
    pub(super) weight: u16,
}
