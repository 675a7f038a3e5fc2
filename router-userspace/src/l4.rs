//! Layer 4: VIPs balanced in the kernel.
//!
//! [`L4`] is the projection of the snapshot into the XDP program's maps: [`plan`] says what to write,
//! [`datapath`] writes it, [`next_hop`] knows the way. The agent owns it and calls it after each batch
//! of events; [`L4Reader`] is what everyone else may look at.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fs::File;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use arc_swap::ArcSwap;
use router_common::{BackendCounters, Mode};
use tokio::sync::mpsc;

use crate::config::{L4Config, LocalClients, PortRange, VipConfig};
use crate::event::Event;
use crate::health::Tunnels;
use crate::l4::datapath::Datapath;
use crate::l4::local_routes::LocalRoutes;
use crate::l4::marks::CheckMarks;
use crate::l4::next_hop::{NextHop, Watcher};
use crate::l4::plan::{MapOp, Planner, Refusal, World};
use crate::l4::policy::Policies;
use crate::l4::stats::{MemberView, Shared};
use crate::l4::watch::Tap;
use crate::route::{Backend, Origin, Pool, Registration, RouteKey, Vip};
use crate::snapshot::Snapshot;

mod clsact;
pub mod datapath;
mod detach;
pub mod explain;
pub mod flow_list;
pub(crate) mod interface;
mod local_routes;
pub mod maglev;
mod marks;
mod netlink;
pub mod next_hop;
pub(crate) mod pins;
pub mod plan;
pub mod policy;
pub mod probe;
mod round_robin;
mod stats;
mod unanswered;
pub mod watch;
pub(crate) mod xdp_features;

pub use datapath::{BENCH_PROGRAM, DECAP_PROGRAM, PASS_PROGRAM};
pub use detach::detach;
pub use stats::{
    BackendStats, L4Reader, L4Stats, MemberState, Moved, Views, VipStats, VipView, mode_name,
    scheduler_name,
};

/// How often expired flows are cleared away and the others counted.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
/// Shares of the flow table swept in one tick, a million places, while which the agent does nothing
/// else.
const SHARES_PER_TICK: u32 = 32;
/// Operations that may wait behind one that fails. Beyond, the agent ends; the next one adopts what
/// the kernel holds and hears the rest from the sources.
const MAX_BACKLOG: usize = 65_536;

/// The layer 4 projection and the kernel objects it writes.
pub struct L4 {
    config: L4Config,
    /// What sources say of VIPs.
    announced: HashMap<Vip, VipConfig>,
    policies: Policies,
    datapath: Datapath,
    planner: Planner,
    watcher: Watcher,
    local_routes: LocalRoutes,
    /// The latest, for what time alone changes.
    snapshot: Snapshot,
    next_hops: HashMap<IpAddr, NextHop>,
    /// The VIPs that a backend address serves or drains.
    users: HashMap<IpAddr, BTreeSet<Vip>>,
    /// Operations from the first one that failed on. All later ones wait behind it, so that their
    /// order, which keeps the kernel's tables sound, is kept as well.
    backlog: VecDeque<(Vip, MapOp)>,
    /// What the last plan of a VIP left out.
    refused: HashMap<Vip, Vec<(SocketAddr, Refusal)>>,
    sweep: Sweep,
    unanswered: unanswered::Watch,
    marks: CheckMarks,
    shared: Arc<Shared>,
    /// `None` while another agent writes to the maps.
    lock: Option<File>,
}

/// Where the sweep stands in the flow table.
#[derive(Default)]
struct Sweep {
    begun: Option<Instant>,
    next_share: u32,
    live: u64,
}

impl L4 {
    /// Loads or adopts the pinned programs and maps, attaches to every interface and starts
    /// watching next hops, which arrive as [`Event::NextHop`]. `tunnels` is where health checks find
    /// the ways to VIPs. With `policies_to_come`, adopted VIPs keep their policies until
    /// [`L4::know_policies`], but for those that the configuration has. Must be called inside a tokio
    /// runtime.
    ///
    /// # Errors
    /// Names the interface, map or kernel feature that is missing.
    pub fn start(
        config: &L4Config,
        policies_to_come: bool,
        inbox: mpsc::Sender<Event>,
        tunnels: Tunnels,
    ) -> anyhow::Result<L4> {
        check_port_ranges(config.nat_ports)?;
        datapath::check_capabilities()?;
        pins::prepare_pin_path(&config.pin_path)?;
        let lock = pins::lock(&config.pin_path)?;
        let mut datapath = Datapath::open(&datapath::Options {
            limits: config.limits.clone(),
            timeouts: config.timeouts.clone(),
            nat_ports: config.nat_ports,
            gue_port: config.gue_port,
            pin_path: Some(config.pin_path.clone()),
        })?;
        let mut policies = Policies::new(config);
        let planner = adopt(&mut datapath, config, &policies)?;
        if policies_to_come {
            policies.adopt(|default| planner.policies(default, datapath.ticks_per_second()));
        }
        let shared = Arc::new(Shared {
            counters: datapath.counters(),
            flows: datapath.flows(),
            tap: Tap::start(datapath.take_events()?, datapath.monotonic_clock())?,
            vips: ArcSwap::default(),
            map_bytes: datapath.map_bytes().to_vec(),
            active_flows: AtomicU64::new(0),
            failed_writes: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        let mut l4 = L4 {
            config: config.clone(),
            announced: HashMap::new(),
            policies,
            watcher: Watcher::start(inbox)?,
            local_routes: LocalRoutes::adopt()?,
            datapath,
            planner,
            snapshot: Snapshot::default(),
            next_hops: HashMap::new(),
            users: HashMap::new(),
            backlog: VecDeque::new(),
            refused: HashMap::new(),
            sweep: Sweep::default(),
            unanswered: unanswered::Watch::default(),
            marks: CheckMarks::new(tunnels),
            shared,
            lock: Some(lock),
        };
        l4.adopt_next_hops();
        let declared: Vec<Vip> = l4.policies.declared().collect();
        for vip in declared {
            l4.apply_vip(vip, Instant::now());
        }
        l4.take_hold()?;
        Ok(l4)
    }

    /// Puts everything beside the maps in order: local routes, links, and clients on this host.
    fn take_hold(&mut self) -> anyhow::Result<()> {
        let planned: Vec<Vip> = self.planner.vips().keys().copied().collect();
        for vip in planned {
            self.route_locally(vip);
        }
        self.local_routes.remove_unused();
        if !self.marks.is_empty() {
            // What an earlier agent attached for them stays.
            self.datapath.probe();
        }
        let config = self.config.clone();
        self.datapath
            .attach_all(&config.interfaces, config.attach)?;
        self.publish_marks();
        self.attach_local(&config)
    }

    /// Lets another agent write to the maps. Until [`L4::resume`], only what is said there to be
    /// allowed may be called; connections to VIPs of `l7` mode are handed up all the while.
    pub fn hold(&mut self) {
        // Another agent gives marks other meanings.
        self.marks.publish(false);
        self.lock = None;
    }

    /// Takes the maps back as that agent left them, and brings them in line with `snapshot`.
    ///
    /// # Errors
    /// The other agent still runs, or the kernel refused; may be called again then.
    pub fn resume(&mut self, snapshot: &Snapshot, now: Instant) -> anyhow::Result<()> {
        if self.lock.is_none() {
            self.lock = Some(pins::lock(&self.config.pin_path)?);
        }
        self.datapath.rewrite_settings()?;
        self.policies = self.all_policies();
        self.planner = adopt(&mut self.datapath, &self.config, &self.policies)?;
        self.backlog.clear();
        self.refused.clear();
        self.sweep = Sweep::default();
        self.unanswered = unanswered::Watch::default();
        self.local_routes = LocalRoutes::adopt()?;
        self.snapshot = snapshot.clone();
        let mut vips: BTreeSet<Vip> = self.planner.vips().keys().copied().collect();
        vips.extend(snapshot.vips.keys().copied());
        vips.extend(self.policies.declared());
        vips.extend(self.shared.vips.load().keys().copied());
        for vip in vips {
            self.apply_vip(vip, now);
        }
        self.take_hold()
    }

    /// Remembers the way to a backend. Allowed while another agent writes to the maps.
    pub fn note_next_hop(&mut self, backend: IpAddr, next_hop: Option<NextHop>) {
        match next_hop {
            Some(next_hop) => self.next_hops.insert(backend, next_hop),
            None => self.next_hops.remove(&backend),
        };
    }

    /// Remembers a configuration. Allowed while another agent writes to the maps.
    pub fn note_config(&mut self, config: &L4Config) {
        self.config = config.clone();
    }

    /// Clients on this host are served where that can be; where it was asked for, it must.
    fn attach_local(&mut self, config: &L4Config) -> anyhow::Result<()> {
        match self.datapath.attach_local(&config.local_clients) {
            Ok(Some(cgroup)) => {
                tracing::info!(cgroup = %cgroup.display(), "clients on this host may dial VIPs");
            }
            Ok(None) if config.local_clients == LocalClients::Auto => {
                tracing::info!("no cgroup2 is mounted: clients on this host cannot dial VIPs");
            }
            Ok(None) => {}
            Err(error) if config.local_clients == LocalClients::Auto => {
                tracing::warn!("clients on this host cannot dial VIPs: {error:#}");
            }
            Err(error) => return Err(error.context("l4.local_clients")),
        }
        Ok(())
    }

    /// Has connections to VIPs of `l7` mode handed to these listeners of the proxy. Allowed while
    /// another agent writes to the maps.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn hand_up_to(&mut self, listeners: &[TcpListener]) -> anyhow::Result<()> {
        self.datapath.hand_up_to(listeners)
    }

    /// What the adopted maps already serve, as registrations of [`Origin::Adopted`].
    pub fn adopted(&self) -> Vec<Registration> {
        let mut registrations = Vec::new();
        for (vip, planned) in self.planner.vips() {
            for (address, member) in &planned.members {
                if member.drain_until.is_none() {
                    registrations.push(adopted(*vip, *address, member.entry.weight));
                }
            }
        }
        registrations
    }

    /// Brings the kernel in line with `snapshot` for the VIPs in `changed`.
    pub fn apply(&mut self, snapshot: &Snapshot, changed: &BTreeSet<Vip>, now: Instant) {
        self.snapshot = snapshot.clone();
        for vip in changed {
            self.apply_vip(*vip, now);
        }
        self.publish_marks();
    }

    /// Brings the kernel in line with other policies. Of `config`, the rest must be as it was.
    pub fn reload(&mut self, config: &L4Config, now: Instant) {
        self.config = config.clone();
        let policies = self.all_policies();
        let before = std::mem::replace(&mut self.policies, policies);
        let mut vips: BTreeSet<Vip> = self.planner.vips().keys().copied().collect();
        vips.extend(self.snapshot.vips.keys().copied());
        vips.extend(before.declared().chain(self.policies.declared()));
        vips.retain(|vip| before.policy_of(vip) != self.policies.policy_of(vip));
        for vip in vips {
            self.apply_vip(vip, now);
        }
        self.publish_marks();
    }

    /// Takes in what a source says of a VIP, and brings the kernel in line.
    pub fn set_policy(&mut self, vip: Vip, policy: Option<Box<VipConfig>>, now: Instant) {
        let before = self.policies.policy_of(&vip).clone();
        let was_declared = self.policies.is_declared(&vip);
        self.policies.announce(vip, policy.as_deref());
        self.note_policy(vip, policy);
        if *self.policies.policy_of(&vip) != before
            || self.policies.is_declared(&vip) != was_declared
        {
            self.apply_vip(vip, now);
            self.publish_marks();
        }
    }

    /// Remembers what a source says of a VIP. Allowed while another agent writes to the maps.
    pub fn note_policy(&mut self, vip: Vip, policy: Option<Box<VipConfig>>) {
        match policy {
            Some(policy) => self.announced.insert(vip, *policy),
            None => self.announced.remove(&vip),
        };
    }

    /// Sources have said all they have to say of VIPs: what was adopted of others counts no more.
    pub fn know_policies(&mut self, now: Instant) {
        for vip in self.note_policies_known() {
            self.apply_vip(vip, now);
        }
        self.publish_marks();
    }

    /// Remembers the same. Allowed while another agent writes to the maps.
    pub fn note_policies_known(&mut self) -> Vec<Vip> {
        self.policies.forget_adopted()
    }

    fn all_policies(&self) -> Policies {
        let mut policies = self.policies.of_config(&self.config);
        for (vip, policy) in &self.announced {
            policies.announce(*vip, Some(policy));
        }
        policies
    }

    /// Takes in the way to a backend; VIPs that wait for it come to life.
    pub fn next_hop(&mut self, backend: IpAddr, next_hop: Option<NextHop>, now: Instant) {
        match next_hop {
            Some(next_hop) => {
                tracing::debug!(%backend, ?next_hop, "next hop");
                self.next_hops.insert(backend, next_hop);
            }
            None => {
                tracing::warn!(%backend, "no next hop: it gets no new flows until there is one");
                self.next_hops.remove(&backend);
            }
        }
        for vip in self.users.get(&backend).cloned().unwrap_or_default() {
            self.apply_vip(vip, now);
        }
        self.publish_marks();
    }

    /// Attaches to interfaces that came or were replaced.
    pub fn follow_interfaces(&mut self) {
        self.datapath
            .follow_interfaces(&self.config.interfaces, self.config.attach);
        self.publish_marks();
    }

    /// Ends drains that are over and sweeps expired flows. Called about once a second.
    pub fn tick(&mut self, now: Instant) {
        self.datapath.forward_logs();
        if self.datapath.is_refused() {
            self.follow_interfaces();
        }
        self.write_backlog();
        if let Err(error) = self.sweep(now) {
            tracing::error!("sweep the flow table: {error:#}");
        }
        if let Err(error) = self.datapath.set_sample(self.shared.tap.wanted()) {
            tracing::error!("sample packets for those who watch: {error:#}");
        }
        for vip in self.planner.due(now) {
            self.apply_vip(vip, now);
        }
        if self.planner.has_room() {
            let waits = |refused: &Vec<(SocketAddr, Refusal)>| {
                let room = |(_, refusal): &(_, Refusal)| refusal.is_for_room();
                refused.iter().any(room)
            };
            let waiting = self.refused.iter().filter(|(_, refused)| waits(refused));
            for vip in waiting.map(|(vip, _)| *vip).collect::<Vec<_>>() {
                self.apply_vip(vip, now);
            }
        }
        self.publish_marks();
    }

    pub fn reader(&self) -> L4Reader {
        L4Reader {
            shared: self.shared.clone(),
        }
    }

    fn apply_vip(&mut self, vip: Vip, now: Instant) {
        let pool = self.snapshot.vips.get(&vip).cloned();
        let world = World {
            now,
            policies: &self.policies,
            timeouts: &self.config.timeouts,
            ticks_per_second: self.datapath.ticks_per_second(),
            next_hops: &self.next_hops,
            unhealthy: &self.snapshot.unhealthy,
            panic_threshold: self.snapshot.panic_threshold,
            draining: &self.snapshot.draining,
            draining_at: &self.snapshot.draining_at,
        };
        let plan = self.planner.plan(vip, pool.as_deref(), &world);
        self.note_refused(vip, plan.refused);
        self.backlog
            .extend(plan.ops.into_iter().map(|op| (vip, op)));
        self.write_backlog();
        self.route_locally(vip);
        let members = self.members(vip, pool.as_deref());
        self.watch_next_hops(
            vip,
            members.iter().map(|member| member.address.ip()).collect(),
        );
        self.publish(vip, members);
    }

    /// The backends of a VIP, those that are registered and those that drain.
    fn members(&self, vip: Vip, pool: Option<&Pool>) -> Vec<MemberView> {
        let mut members: Vec<MemberView> = Vec::new();
        let planned = self.planner.vips().get(&vip);
        if let Some(planned) = planned {
            members.extend(planned.members.iter().map(|(address, member)| MemberView {
                address: *address,
                id: Some(member.id),
                generation: member.entry.generation,
                state: match member.is_active() {
                    true => MemberState::Active,
                    false => MemberState::Draining,
                },
                weight: member.entry.weight,
            }));
        }
        for backend in pool.into_iter().flat_map(|pool| &pool.backends) {
            let address = backend.address;
            if planned.is_some_and(|planned| planned.members.contains_key(&address)) {
                continue;
            }
            let mut refused = self.refused.get(&vip).into_iter().flatten();
            let refusal = refused.find(|(refused, _)| *refused == address);
            members.push(MemberView {
                address,
                id: None,
                generation: 0,
                state: match refusal {
                    Some((_, refusal)) => MemberState::Refused(*refusal),
                    None => MemberState::NoNextHop,
                },
                weight: backend.weight,
            });
        }
        members
    }

    /// The kernel takes packets to a VIP of the proxy as its own.
    fn route_locally(&mut self, vip: Vip) {
        let served = self.planner.vips().contains_key(&vip);
        let local = served && self.policies.policy_of(&vip).mode == Mode::L7;
        self.local_routes.set(vip, local);
    }

    /// Writes what waits, up to the first operation that fails.
    fn write_backlog(&mut self) {
        while let Some((vip, op)) = self.backlog.front() {
            // Read before the counters pass to another backend.
            let moved = match op {
                MapOp::ClearBackend { id, .. } => self.shared.counters.backend(*id).ok(),
                _ => None,
            };
            if let Err(error) = self.datapath.apply(op) {
                self.shared.failed_writes.fetch_add(1, Ordering::Relaxed);
                let waiting = self.backlog.len();
                tracing::error!(%vip, waiting, "write {op:?}: {error:#}; it is tried again");
                assert!(
                    waiting <= MAX_BACKLOG,
                    "the kernel refuses to be written to"
                );
                return;
            }
            if let Some(moved) = moved {
                self.retire(*vip, moved);
            }
            self.backlog.pop_front();
        }
    }

    /// Tells of what is newly left out, and remembers it until there is room.
    fn note_refused(&mut self, vip: Vip, refused: Vec<(SocketAddr, Refusal)>) {
        let before = self.refused.remove(&vip).unwrap_or_default();
        for (backend, refusal) in refused.iter().filter(|refused| !before.contains(refused)) {
            self.shared.refused.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%vip, %backend, "not forwarded: {refusal}");
        }
        if !refused.is_empty() {
            self.refused.insert(vip, refused);
        }
    }

    /// Keeps in the VIP's sum what a backend that is gone moved.
    fn retire(&self, vip: Vip, moved: BackendCounters) {
        let vips = self.shared.vips.load();
        let mut view = vips
            .get(&vip)
            .map(|view| VipView::clone(view))
            .unwrap_or_default();
        view.retired += moved;
        self.shared
            .vips
            .store(Arc::new(vips.update(vip, Arc::new(view))));
    }

    fn publish(&mut self, vip: Vip, members: Vec<MemberView>) {
        let mode = self.policies.policy_of(&vip).mode;
        self.marks.set(vip, mode, self.planner.vips().get(&vip));
        let vips = self.shared.vips.load();
        let next = if members.is_empty() && !self.planner.vips().contains_key(&vip) {
            vips.without(&vip)
        } else {
            let retired = vips.get(&vip).map(|view| view.retired).unwrap_or_default();
            let view = VipView {
                members,
                retired,
                ..VipView::new(vip, self.policies.policy_of(&vip))
            };
            vips.update(vip, Arc::new(view))
        };
        self.shared.vips.store(Arc::new(next));
    }

    /// Tells the checker of the ways to VIPs, once the kernel knows them.
    fn publish_marks(&mut self) {
        if self.backlog.is_empty() {
            let acted_on = self.marks.is_empty() || self.datapath.probe();
            self.marks.publish(acted_on);
        }
    }

    /// Watches the addresses that `vip` uses and no others on its account.
    fn watch_next_hops(&mut self, vip: Vip, addresses: BTreeSet<IpAddr>) {
        let before = self
            .shared
            .vips
            .load()
            .get(&vip)
            .cloned()
            .unwrap_or_default();
        for address in &addresses {
            let users = self.users.entry(*address).or_default();
            if users.is_empty() {
                self.watcher.watch(*address);
            }
            users.insert(vip);
        }
        for address in before.members.iter().map(|member| member.address.ip()) {
            if addresses.contains(&address) {
                continue;
            }
            let Some(users) = self.users.get_mut(&address) else {
                continue;
            };
            users.remove(&vip);
            if users.is_empty() {
                self.users.remove(&address);
                self.next_hops.remove(&address);
                self.watcher.unwatch(address);
            }
        }
    }

    /// Until the routing table is read, backends are where the earlier agent found them.
    fn adopt_next_hops(&mut self) {
        let mut adopted: Vec<(Vip, Vec<MemberView>)> = Vec::new();
        for (vip, planned) in self.planner.vips() {
            for member in planned.members.values() {
                let entry = &member.entry;
                let hop = NextHop {
                    ifindex: entry.ifindex,
                    source_mac: entry.source_mac,
                    destination_mac: entry.destination_mac,
                    source: entry.source.ip(),
                    mtu: entry.mtu,
                    vlan: entry.vlan,
                    // In dsr mode it was, or it would not be here.
                    on_link: true,
                };
                self.next_hops.insert(entry.address.ip(), hop);
            }
            adopted.push((*vip, self.members(*vip, None)));
        }
        for (vip, members) in adopted {
            self.watch_next_hops(
                vip,
                members.iter().map(|member| member.address.ip()).collect(),
            );
            self.publish(vip, members);
        }
    }

    /// Has rings forget where flows were that are over.
    fn settle(&mut self, now: Instant) -> anyhow::Result<()> {
        let mut moved = HashMap::new();
        for planned in self.planner.vips().values() {
            let index = planned.index();
            moved.insert(index, self.datapath.moved_flows(index)?);
        }
        // The sweep went by rings that are yet to be written.
        if !self.backlog.is_empty() {
            return Ok(());
        }
        let moved = |index| moved.get(&index).copied().unwrap_or(0);
        self.backlog.extend(self.planner.settle(now, moved));
        self.write_backlog();
        Ok(())
    }

    /// Sweeps the next shares; with the last one, publishes what they counted.
    fn sweep(&mut self, now: Instant) -> anyhow::Result<()> {
        let sweep = &mut self.sweep;
        if sweep.next_share == 0 {
            if sweep
                .begun
                .is_some_and(|begun| now.duration_since(begun) < SWEEP_INTERVAL)
            {
                return Ok(());
            }
            sweep.begun = Some(now);
            sweep.live = 0;
        }
        let shares = self.datapath.sweep_shares();
        let end = (sweep.next_share + SHARES_PER_TICK).min(shares);
        for share in sweep.next_share..end {
            sweep.live += u64::from(self.datapath.sweep(share)?.live);
        }
        sweep.next_share = if end < shares { end } else { 0 };
        if sweep.next_share != 0 {
            return Ok(());
        }
        let mut flows = HashMap::new();
        for planned in self.planner.vips().values() {
            for member in planned.members.values() {
                let counted = self.datapath.flows_of(member.id)?;
                self.datapath.set_load_flows(member.id, counted)?;
                flows.insert(member.id, counted);
            }
        }
        self.shared
            .active_flows
            .store(self.sweep.live, Ordering::Relaxed);
        self.planner
            .end_drains(now, |id| flows.get(&id) == Some(&0));
        self.settle(now)
    }
}

/// Makes the tables whole that an earlier agent left.
fn adopt(
    datapath: &mut Datapath,
    config: &L4Config,
    policies: &Policies,
) -> anyhow::Result<Planner> {
    let mut planner = Planner::new(
        config.limits.vips,
        config.limits.backends,
        *datapath.hash_keys(),
        datapath.vip_mask(),
    );
    let world = World {
        now: Instant::now(),
        policies,
        timeouts: &config.timeouts,
        ticks_per_second: datapath.ticks_per_second(),
        next_hops: &HashMap::new(),
        unhealthy: &imbl::HashSet::new(),
        panic_threshold: 0,
        draining: &imbl::HashSet::new(),
        draining_at: &imbl::HashSet::new(),
    };
    for op in planner.adopt(datapath.installed()?, &world) {
        datapath
            .apply(&op)
            .with_context(|| format!("write {op:?}"))?;
    }
    Ok(planner)
}

fn adopted(vip: Vip, address: SocketAddr, weight: u16) -> Registration {
    let backend = Backend {
        weight,
        ..Backend::new(address, Origin::Adopted)
    };
    Registration {
        routes: vec![RouteKey::Vip(vip)],
        backend: Arc::new(backend),
        stale_after: None,
        balance: None,
        route_service_url: None,
    }
}

/// The kernel picks local ports of its own connections from this range; a backend's answer to one of
/// them must not look like the answer to a flow.
fn check_port_ranges(nat_ports: PortRange) -> anyhow::Result<()> {
    const PATH: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    let text = std::fs::read_to_string(PATH).with_context(|| format!("read {PATH}"))?;
    let ports: Vec<u16> = text
        .split_whitespace()
        .filter_map(|port| port.parse().ok())
        .collect();
    if let [first, last] = ports[..] {
        ensure!(
            nat_ports.last < first || nat_ports.first > last,
            "l4.nat_ports {nat_ports} overlaps net.ipv4.ip_local_port_range {first}-{last}"
        );
    }
    Ok(())
}
