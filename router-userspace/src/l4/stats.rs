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
use router_common::{BackendCounters, Mode};
use serde::Serialize;

use crate::l4::datapath::{Counters, Flows};
use crate::l4::plan::PlannedMember;
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
            watch_lost: shared.tap.lost(),
            failed_writes: shared.failed_writes.load(Ordering::Relaxed),
            refused: shared.refused.load(Ordering::Relaxed),
            vips: Vec::new(),
        };
        for (vip, view) in shared.vips.load().iter() {
            stats.vips.push(self.vip_stats(vip, view)?);
        }
        Ok(stats)
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
            active_flows += flows;
            backends.push(BackendStats {
                address: member.address,
                weight: member.weight,
                draining: member.draining,
                reachable: member.id.is_some(),
                active_flows: flows,
                moved: Moved::from(counters),
            });
        }
        Ok(VipStats {
            vip: vip.to_string(),
            mode: view.mode.name(),
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
    /// Octets of the kernel's memory that each map takes, of those that are there from the start.
    pub map_bytes: Vec<(String, u64)>,
    /// Sampled packets that some watcher was too slow for.
    pub watch_lost: u64,
    /// Writes to a map that the kernel refused and that were or will be repeated.
    pub failed_writes: u64,
    /// Backends that a plan left out for want of room or for their address family.
    pub refused: u64,
    pub vips: Vec<VipStats>,
}

#[derive(Clone, Debug, Serialize)]
pub struct VipStats {
    pub vip: String,
    pub mode: &'static str,
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
    /// Gets no new flows: it left its pool, or is unhealthy.
    pub draining: bool,
    /// False while no next hop is known; such a backend gets no flows.
    pub reachable: bool,
    pub active_flows: u64,
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

/// What [`L4Reader`]s see of an [`L4`](super::L4).
pub(super) struct Shared {
    pub(super) counters: Counters,
    pub(super) flows: Flows,
    pub(super) tap: Arc<Tap>,
    pub(super) vips: ArcSwap<Vips>,
    pub(super) map_bytes: Vec<(String, u64)>,
    /// All flows as of the last sweep.
    pub(super) active_flows: AtomicU64,
    pub(super) failed_writes: AtomicU64,
    pub(super) refused: AtomicU64,
}

pub(super) type Vips = imbl::OrdMap<Vip, Arc<VipView>>;

#[derive(Clone, Default)]
pub(super) struct VipView {
    pub(super) mode: Mode,
    /// Whether flows may be nowhere but where the ring says.
    pub(super) untracked: bool,
    pub(super) members: Vec<MemberView>,
    /// What backends that are gone moved while they were here.
    pub(super) retired: BackendCounters,
}

impl VipView {
    /// Of a VIP with no backend yet.
    pub(super) fn new(vip: Vip, policy: &VipPolicy) -> VipView {
        let one_way = !policy.mode.translates() && policy.mode != Mode::L7;
        VipView {
            mode: policy.mode,
            untracked: one_way
                && vip.proto == Proto::Tcp
                && policy.scheduler.is_hash()
                && !policy.tracks(),
            ..VipView::default()
        }
    }
}

#[derive(Clone)]
pub(super) struct MemberView {
    pub(super) address: SocketAddr,
    /// `None` while the backend has no next hop or no room.
    pub(super) id: Option<u32>,
    /// Of the id; other flows that have it are over.
    pub(super) generation: u16,
    pub(super) draining: bool,
    pub(super) weight: u16,
}

impl MemberView {
    pub(super) fn new(address: SocketAddr, member: &PlannedMember) -> MemberView {
        MemberView {
            address,
            id: Some(member.id),
            generation: member.entry.generation,
            draining: !member.is_active(),
            weight: member.entry.weight,
        }
    }

    /// Of a backend that the kernel does not have.
    pub(super) fn unreachable(address: SocketAddr, weight: u16) -> MemberView {
        MemberView {
            address,
            id: None,
            generation: 0,
            draining: false,
            weight,
        }
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
    pub(super) fn of(vips: &Vips) -> Backends {
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
