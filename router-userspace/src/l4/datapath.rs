//! The kernel's side of layer 4: loads the programs, owns the maps, attaches.
//!
//! Maps and links are pinned, so the programs go on forwarding without the agent, and the next agent
//! finds flows, rings and counters where this one left them. [`Datapath`] belongs to the agent alone;
//! [`Counters`], [`Flows`] and [`Events`] are for readers on other threads. This file and those below it
//! are the only ones that name aya. What to write is the planner's to say, not theirs.

use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use aya::maps::{Array, Map, MapData, SockMap};
use aya::programs::links::FdLink;
use aya::{Ebpf, EbpfLoader, Pod};
use aya_log::EbpfLogger;
use router_common::{HASH_WORDS, Settings};

use crate::config::{FlowTimeouts, L4Limits, PortRange};
use crate::l4::pins::prepare_pin_path;
use crate::l4::plan::{Installed, MapOp};

mod attach;
mod counters;
mod events;
mod flows;
mod hand_up;
mod links;
mod local;
mod maps;
mod programs;
mod run;
mod settings;
mod sockmap;

pub use attach::{Attached, Choice, Hook, choose, device_of};
pub use counters::Counters;
pub use events::Events;
pub use flows::{Flow, Flows};
pub(super) use links::release;
pub use local::cgroup2_mount;
pub use programs::Loaded;
pub use run::Run;
pub use settings::MonotonicClock;
pub use sockmap::Sockmap;

/// The compiled programs; empty when built without a BPF toolchain.
static PROGRAM: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/viaduct-xdp"));
/// A program that passes every packet, for the other end of a veth.
pub static PASS_PROGRAM: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/viaduct-pass"));
/// Takes outer headers off, for backends of `ipip` and `gue` in a lab.
pub static DECAP_PROGRAM: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/viaduct-decap"));
/// The harness of the packet benchmark: see router-ebpf/src/bench.rs.
pub static BENCH_PROGRAM: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/viaduct-bench"));

/// What the maps are made for.
#[derive(Clone, Debug)]
pub struct Options {
    pub limits: L4Limits,
    pub timeouts: FlowTimeouts,
    pub nat_ports: PortRange,
    /// Destination of the outer header in `gue` mode.
    pub gue_port: u16,
    /// Where to pin; `None` lets everything go with the process.
    pub pin_path: Option<PathBuf>,
}

/// The loaded programs and the maps they share with the agent.
pub struct Datapath {
    ebpf: Ebpf,
    loaded: Vec<Loaded>,
    pin_path: Option<PathBuf>,
    maps: maps::Maps,
    map_bytes: Vec<(String, u64)>,
    settings: Settings,
    clock: settings::Clock,
    counters: Counters,
    flows: Flows,
    logger: EbpfLogger<&'static dyn log::Log>,
    attachments: attach::Attachments,
    /// Held while nothing is pinned: dropping a link detaches it.
    local: Vec<FdLink>,
    /// Held for the sockets in it.
    listeners: Option<SockMap<MapData>>,
}

impl Datapath {
    /// Loads the programs and creates the maps, or opens those that are pinned.
    ///
    /// # Errors
    /// Names what the kernel refused; a pinned map of another shape is named with the remedy.
    pub fn open(options: &Options) -> anyhow::Result<Datapath> {
        ensure!(
            !PROGRAM.is_empty(),
            "this viaduct was built without its BPF programs: run `cargo xtask setup` and build again"
        );
        check_capabilities()?;
        let shapes = maps::shapes(&options.limits);
        let mut loader = EbpfLoader::new();
        for shape in &shapes {
            if let Some(entries) = shape.entries {
                loader.map_max_entries(shape.name, entries);
            }
        }
        if let Some(path) = &options.pin_path {
            prepare_pin_path(path)?;
            maps::check_pinned(path, &shapes)?;
            for shape in &shapes {
                loader.map_pin_path(shape.name, path.join(shape.name));
            }
        }
        let mut ebpf = loader.load(PROGRAM).context("load the BPF programs")?;
        let loaded = programs::load(&mut ebpf)?;
        let (settings, clock) = settings::write(&mut ebpf, options)?;
        Ok(Datapath {
            loaded,
            pin_path: options.pin_path.clone(),
            settings,
            clock,
            counters: Counters::open(&ebpf)?,
            map_bytes: maps::memory(&ebpf),
            flows: Flows::open(&ebpf, clock, settings.bucket_mask + 1)?,
            logger: EbpfLogger::init(&mut ebpf).context("open the programs' log")?,
            maps: maps::Maps::take(&mut ebpf)?,
            attachments: attach::Attachments::default(),
            local: Vec::new(),
            listeners: None,
            ebpf,
        })
    }

    /// Writes one change to the kernel.
    pub fn apply(&mut self, op: &MapOp) -> anyhow::Result<()> {
        match op {
            MapOp::SetDnat { in_use } => self.change_settings(|settings| {
                settings.dnat = u32::from(*in_use);
            }),
            op => self.maps.apply(op),
        }
    }

    /// Writes the settings again, after another agent wrote its own.
    pub fn rewrite_settings(&mut self) -> anyhow::Result<()> {
        // What is installed is as that agent left it.
        self.settings.dnat = self.maps.settings()?.dnat;
        self.maps.set_settings(self.settings)
    }

    /// What the maps hold: all that an earlier agent left.
    pub fn installed(&self) -> anyhow::Result<Installed> {
        self.maps.installed(self.settings.dnat != 0)
    }

    /// Has one packet in `packets` reported to [`Self::take_events`]; 0: none.
    pub fn set_sample(&mut self, packets: u32) -> anyhow::Result<()> {
        self.change_settings(|settings| settings.sample = packets)
    }

    /// The keys of places in the flow table and in `VIP_HEADS`.
    pub fn hash_keys(&self) -> &[u64; HASH_WORDS] {
        &self.settings.hash_keys
    }

    /// Length of `VIP_HEADS`, a power of two, less one.
    pub fn vip_mask(&self) -> u32 {
        self.settings.vip_mask
    }

    /// One to two.
    pub fn ticks_per_second(&self) -> f64 {
        self.clock.ticks_per_second()
    }

    /// The clock of [`Self::take_events`].
    pub fn monotonic_clock(&self) -> MonotonicClock {
        self.clock.monotonic()
    }

    /// A reader of the counters, for other threads.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    /// A reader of the flow table, for other threads.
    pub fn flows(&self) -> Flows {
        self.flows.clone()
    }

    /// Octets of the kernel's memory that each map took when it was opened.
    pub fn map_bytes(&self) -> &[(String, u64)] {
        &self.map_bytes
    }

    /// The reader of sampled packets. There is one of them: a second call is an error.
    pub fn take_events(&mut self) -> anyhow::Result<Events> {
        Events::take(&mut self.ebpf)
    }

    /// Which programs the kernel took, and why it refused one that layer 4 can do without.
    pub fn loaded(&self) -> &[Loaded] {
        &self.loaded
    }

    /// Hands what the programs logged since the last call to this process's log.
    pub fn forward_logs(&mut self) {
        self.logger.flush();
    }

    fn change_settings(&mut self, change: impl FnOnce(&mut Settings)) -> anyhow::Result<()> {
        let mut settings = self.settings;
        change(&mut settings);
        if settings != self.settings {
            self.maps.set_settings(settings)?;
            self.settings = settings;
        }
        Ok(())
    }
}

/// The kernel says only "operation not permitted"; this says what is missing.
pub(super) fn check_capabilities() -> anyhow::Result<()> {
    let missing = missing_capabilities()?;
    ensure!(
        missing.is_empty(),
        "missing {}: run as root, or grant them (AmbientCapabilities= in a systemd unit)",
        missing.join(", ")
    );
    Ok(())
}

/// The capabilities that layer 4 needs and this process does not have.
pub fn missing_capabilities() -> anyhow::Result<Vec<&'static str>> {
    // Kernel: include/uapi/linux/capability.h. CAP_SYS_ADMIN stands in for the first two.
    const BPF: u32 = 39;
    const PERFMON: u32 = 38;
    const SYS_ADMIN: u32 = 21;
    const NET_ADMIN: u32 = 12;
    let status = fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .context("no CapEff in /proc/self/status")?;
    let has = |capability: u32| effective >> capability & 1 == 1;
    let needed = [
        ("CAP_BPF", has(BPF) || has(SYS_ADMIN)),
        ("CAP_PERFMON", has(PERFMON) || has(SYS_ADMIN)),
        ("CAP_NET_ADMIN", has(NET_ADMIN)),
    ];
    let missing = needed.into_iter().filter(|(_, has)| !has);
    Ok(missing.map(|(name, _)| name).collect())
}

fn take(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<Map> {
    ebpf.take_map(name)
        .with_context(|| format!("no map {name}"))
}

fn array<V: Pod>(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<Array<MapData, V>> {
    Array::try_from(take(ebpf, name)?).with_context(|| format!("map {name}"))
}

/// A second descriptor of an array, for another thread.
fn reopen(ebpf: &Ebpf, name: &str) -> anyhow::Result<Map> {
    let (data, wrap): (&MapData, fn(MapData) -> Map) = match ebpf.map(name) {
        Some(Map::Array(map)) => (map, Map::Array),
        Some(Map::PerCpuArray(map)) => (map, Map::PerCpuArray),
        _ => bail!("no array {name}"),
    };
    let fd = data.fd().as_fd().try_clone_to_owned()?;
    let data = MapData::from_fd(fd).with_context(|| format!("open {name} again"))?;
    Ok(wrap(data))
}
