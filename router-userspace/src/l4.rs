//! Layer 4: VIPs balanced in the kernel.
//!
//! [`L4`] is the projection of the snapshot into the XDP program's maps. The agent owns it and calls
//! it after each batch of events; [`L4Reader`] is what everyone else may look at.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use serde::Serialize;
use tokio::sync::mpsc;

use crate::config::L4Config;
use crate::event::Event;
use crate::l4::next_hop::NextHop;
use crate::route::{Registration, Vip};
use crate::snapshot::Snapshot;

pub mod next_hop;

/// The layer 4 projection and the kernel objects it writes.
pub struct L4 {}

impl L4 {
    /// Loads or adopts the pinned programs and maps, attaches to every interface and starts
    /// watching next hops, which arrive as [`Event::NextHop`]. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// Names the interface, map or kernel feature that is missing.
    pub fn start(config: &L4Config, inbox: mpsc::Sender<Event>) -> anyhow::Result<L4> {
        let _ = (config, inbox);
        anyhow::bail!("layer 4 is not here yet")
    }

    /// What the adopted maps already serve, as registrations of [`crate::route::Origin::Adopted`].
    pub fn adopted(&self) -> Vec<Registration> {
        Vec::new()
    }

    /// Brings the kernel in line with `snapshot` for the VIPs in `changed`.
    pub fn apply(&mut self, snapshot: &Snapshot, changed: &BTreeSet<Vip>, now: Instant) {
        let _ = (snapshot, changed, now);
    }

    /// Takes in the way to a backend; VIPs that wait for it come to life.
    pub fn next_hop(
        &mut self,
        backend: IpAddr,
        next_hop: Option<NextHop>,
        snapshot: &Snapshot,
        now: Instant,
    ) {
        let _ = (backend, next_hop, snapshot, now);
    }

    /// Ends drains that are over and sweeps expired flows. Called about once a second.
    pub fn tick(&mut self, now: Instant) {
        let _ = now;
    }

    pub fn reader(&self) -> L4Reader {
        L4Reader {}
    }
}

/// Reads the program's counters from any thread.
#[derive(Clone)]
pub struct L4Reader {}

impl L4Reader {
    pub fn stats(&self) -> anyhow::Result<L4Stats> {
        Ok(L4Stats::default())
    }
}

/// What layer 4 counted since its maps were created.
#[derive(Clone, Debug, Default, Serialize)]
pub struct L4Stats {
    /// Packets by verdict name.
    pub verdicts: Vec<(&'static str, u64)>,
    pub active_flows: u64,
    pub vips: Vec<VipStats>,
}

#[derive(Clone, Debug, Serialize)]
pub struct VipStats {
    pub vip: String,
    /// From clients to the VIP.
    pub packets: u64,
    pub bytes: u64,
    /// From backends to clients.
    pub reply_packets: u64,
    pub reply_bytes: u64,
    pub new_flows: u64,
    pub backends: Vec<BackendStats>,
}

#[derive(Clone, Debug, Serialize)]
pub struct BackendStats {
    pub address: SocketAddr,
    pub draining: bool,
    /// False while no next hop is known; such a backend gets no flows.
    pub reachable: bool,
    pub packets: u64,
    pub bytes: u64,
    pub reply_packets: u64,
    pub reply_bytes: u64,
    pub new_flows: u64,
}

/// Removes the pinned programs, links and maps: XDP lets every packet pass from here on.
///
/// # Errors
/// Names the pin that could not be removed. Nothing pinned is not an error.
pub fn detach(pin_path: &std::path::Path) -> anyhow::Result<()> {
    let _ = pin_path;
    anyhow::bail!("layer 4 is not here yet")
}
