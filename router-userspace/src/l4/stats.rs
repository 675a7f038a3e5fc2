//! What layer 4 lets others see: the counters of the program, by VIP and backend.
//!
//! [`super::L4`] publishes who has which backend id; an [`L4Reader`] puts the kernel's counters beside
//! that, on the thread that asks.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use router_common::{BackendCounters, Mode, Scheduler};
use serde::Serialize;

use crate::l4::datapath::Counters;
use crate::l4::plan::Refusal;
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

    /// The VIPs as they are served.
    pub fn vips(&self) -> Views {
        Views::clone(&self.shared.vips.load())
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
                draining: member.state == MemberState::Draining,
                reachable: member.id.is_some(),
                refused: member.state.refusal(),
                active_flows: u64::from(member_flows) + local_flows,
                local_flows,
                moved: Moved::from(counters),
            });
        }
        Ok(VipStats {
            vip: vip.to_string(),
            forwarding: mode_name(view.mode),
            scheduler: scheduler_name(view.scheduler),
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
    /// Backends that a plan left out: see [`Refusal`].
    pub refused: u64,
    pub vips: Vec<VipStats>,
}

#[derive(Clone, Debug, Serialize)]
pub struct VipStats {
    pub vip: String,
    pub forwarding: &'static str,
    pub scheduler: &'static str,
    pub active_flows: u64,
    #[serde(flatten)]
    pub moved: Moved,
    pub backends: Vec<BackendStats>,
}

#[derive(Clone, Debug, Serialize)]
pub struct BackendStats {
    pub address: SocketAddr,
    pub weight: u16,
    /// Gets no new flows: it left its pool, is unhealthy or of weight 0.
    pub draining: bool,
    /// False while no next hop is known, or it is refused; such a backend gets no flows.
    pub reachable: bool,
    pub refused: Option<String>,
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

pub type Views = imbl::OrdMap<Vip, Arc<VipView>>;

/// What [`L4Reader`]s see.
pub(super) struct Shared {
    pub(super) counters: Counters,
    pub(super) vips: ArcSwap<Views>,
    /// Flows by backend id, and all of them, as of the last sweep.
    pub(super) flows: ArcSwap<HashMap<u32, u32>>,
    pub(super) active_flows: AtomicU64,
    pub(super) failed_writes: AtomicU64,
    pub(super) refused: AtomicU64,
}

/// A VIP as layer 4 serves it.
#[derive(Clone, Debug, Default)]
pub struct VipView {
    pub mode: Mode,
    pub scheduler: Scheduler,
    pub members: Vec<MemberView>,
    /// What backends that are gone moved while they were here.
    pub(super) retired: BackendCounters,
}

#[derive(Clone, Debug)]
pub struct MemberView {
    pub address: SocketAddr,
    /// `None` while the backend has no next hop, or is refused.
    pub(super) id: Option<u32>,
    pub state: MemberState,
    pub weight: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberState {
    Active,
    Draining,
    NoNextHop,
    Refused(Refusal),
}

impl MemberState {
    pub fn as_str(self) -> &'static str {
        match self {
            MemberState::Active => "active",
            MemberState::Draining => "draining",
            MemberState::NoNextHop => "no_next_hop",
            MemberState::Refused(_) => "refused",
        }
    }

    /// Why it is refused.
    pub fn refusal(self) -> Option<String> {
        match self {
            MemberState::Refused(refusal) => Some(refusal.to_string()),
            MemberState::Active | MemberState::Draining | MemberState::NoNextHop => None,
        }
    }
}

/// As in the configuration.
pub fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Nat => "nat",
        Mode::Dnat => "dnat",
        Mode::Dsr => "dsr",
        Mode::Ipip => "ipip",
        Mode::Gue => "gue",
        Mode::L7 => "l7",
    }
}

/// As in the configuration.
pub fn scheduler_name(scheduler: Scheduler) -> &'static str {
    match scheduler {
        Scheduler::Maglev => "maglev",
        Scheduler::SourceHash => "source-hash",
        Scheduler::RoundRobin => "round-robin",
        Scheduler::LeastConnections => "least-connections",
    }
}
