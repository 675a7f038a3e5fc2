//! What layer 4 lets others see: the counters of the program, by VIP and backend.
//!
//! [`super::L4`] publishes who has which backend id; an [`L4Reader`] puts the kernel's counters beside
//! that, on the thread that asks. Counters only grow: what they are a second is for who reads them
//! twice to say.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use router_common::{BackendCounters, Mode, Scheduler};
use serde::Serialize;

use crate::l4::datapath::{Counters, Flows};
use crate::l4::plan::Refusal;
use crate::l4::policy::VipPolicy;
use crate::l4::watch::Tap;
use crate::route::{Proto, Vip};

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
        let verdicts = shared.counters.verdicts()?;
        let mut stats = L4Stats {
            verdicts: verdicts
                .into_iter()
                .map(|(verdict, count)| (verdict.name(), count))
                .collect(),
            active_flows: shared.active_flows.load(Ordering::Relaxed),
            flow_capacity: shared.flows.capacity(),
            map_bytes: shared.map_bytes.clone(),
            sample: shared.tap.wanted(),
            watch_lost: shared.tap.lost(),
            events_lost: shared.counters.events_lost()?,
            failed_writes: shared.failed_writes.load(Ordering::Relaxed),
            refused: shared.refused.load(Ordering::Relaxed),
            vips: Vec::new(),
        };
        for (vip, view) in shared.vips.load().iter() {
            stats.vips.push(self.vip_stats(vip, view)?);
        }
        Ok(stats)
    }

    /// The VIPs as they are served.
    pub fn vips(&self) -> Views {
        Views::clone(&self.shared.vips.load())
    }

    fn vip_stats(&self, vip: &Vip, view: &VipView) -> anyhow::Result<VipStats> {
        let mut total = view.retired;
        let mut backends = Vec::with_capacity(view.members.len());
        let mut active_flows = 0;
        for member in &view.members {
            let (counters, flows) = match member.id {
                Some(id) => {
                    let load = self.shared.counters.load(id)?;
                    // Two cores that count at once may take it below nothing until the next sweep.
                    let flows = u64::try_from(load.flows).unwrap_or(0);
                    (self.shared.counters.backend(id)?, flows)
                }
                None => (BackendCounters::default(), 0),
            };
            total += counters;
            let local_flows = match member.id {
                Some(id) => self.shared.counters.local_flows(id)?,
                None => 0,
            };
            active_flows += flows + local_flows;
            backends.push(BackendStats {
                address: member.address,
                weight: member.weight,
                draining: member.state == MemberState::Draining,
                reachable: member.id.is_some(),
                refused: member.state.refusal(),
                active_flows: flows + local_flows,
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
    /// Places of the flow table in use, as of the last sweep, some five seconds ago.
    pub active_flows: u64,
    /// Places of the flow table.
    pub flow_capacity: u64,
    /// Octets of the kernel's memory that each map took when it was opened.
    pub map_bytes: Vec<(String, u64)>,
    /// One packet in how many is reported to those who watch; 0: nobody does.
    pub sample: u32,
    /// Sampled packets that some watcher was too slow for.
    pub watch_lost: u64,
    /// Sampled packets that no watcher saw, since the programs found the ring buffer full.
    pub events_lost: u64,
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
    /// In the flow table.
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
    pub(super) flows: Flows,
    pub(super) tap: Tap,
    pub(super) vips: ArcSwap<Views>,
    pub(super) map_bytes: Vec<(String, u64)>,
    /// As of the last sweep.
    pub(super) active_flows: AtomicU64,
    pub(super) failed_writes: AtomicU64,
    pub(super) refused: AtomicU64,
}

/// A VIP as layer 4 serves it.
#[derive(Clone, Debug, Default)]
pub struct VipView {
    pub mode: Mode,
    pub scheduler: Scheduler,
    /// Whether flows may be nowhere but where the ring says.
    pub untracked: bool,
    pub members: Vec<MemberView>,
    /// What backends that are gone moved while they were here.
    pub(super) retired: BackendCounters,
}

impl VipView {
    /// Of a VIP with no backend yet.
    pub(super) fn new(vip: Vip, policy: &VipPolicy) -> VipView {
        let one_way = !policy.mode.translates() && policy.mode != Mode::L7;
        VipView {
            mode: policy.mode,
            scheduler: policy.scheduler,
            untracked: one_way
                && vip.proto == Proto::Tcp
                && policy.scheduler.is_hash()
                && !policy.tracks(),
            ..VipView::default()
        }
    }
}

#[derive(Clone, Debug)]
pub struct MemberView {
    pub address: SocketAddr,
    /// `None` while the backend has no next hop, or is refused.
    pub(super) id: Option<u32>,
    /// Of the id; other flows that have it are over.
    pub(super) generation: u16,
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

/// Whom the backend ids in the kernel's tables stand for.
#[derive(Default)]
pub(super) struct Backends(HashMap<u32, Serves>);

/// A backend as a member of a VIP.
#[derive(Clone, Copy)]
pub(super) struct Serves {
    pub(super) vip: Vip,
    pub(super) address: SocketAddr,
    pub(super) generation: u16,
}

impl Backends {
    pub(super) fn of(vips: &Views) -> Backends {
        let members = vips
            .iter()
            .flat_map(|(vip, view)| view.members.iter().map(move |member| (*vip, member)));
        let serves = members.filter_map(|(vip, member)| {
            let serves = Serves {
                vip,
                address: member.address,
                generation: member.generation,
            };
            Some((member.id?, serves))
        });
        Backends(serves.collect())
    }

    pub(super) fn get(&self, id: u32) -> Option<&Serves> {
        self.0.get(&id)
    }
}
