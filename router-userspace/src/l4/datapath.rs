//! The kernel's side of layer 4: loads the programs, owns the maps, attaches. The only file that names aya.
//!
//! Maps and links are pinned, so the programs go on forwarding without the agent, and the next agent
//! finds flows, rings and counters where this one left them.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, MapData, MapError, MapInfo, PerCpuArray, PerCpuValues};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::{XdpLink, XdpMode};
use aya::programs::{ProgramFd, TestRun, TestRunOptions, TestRunResult, Xdp};
use aya::{Ebpf, EbpfLoader, Pod};
use aya_log::EbpfLogger;
use router_common::{
    Addr, BackendCounters, BackendEntry, ClockSample, FLOW_WAYS, FlowState, HASH_WORDS, LAYOUT,
    MAX_TICKS, QuicKey, RING_SIZE, Ring, RingSlot, SWEEP_BUCKETS, Settings, SourceKey,
    SweepRequest, SweepResult, Verdict, VipEntry,
};

use crate::config::{Attach, FlowTimeouts, L4Limits, PortRange};
use crate::l4::pins::{LINKS, link_name, prepare_pin_path};
use crate::l4::plan::{Installed, MapOp};

/// The compiled programs; empty when built without a BPF toolchain.
static PROGRAM: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/viaduct-xdp"));
/// A program that passes every packet, for the other end of a veth.
pub static PASS_PROGRAM: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/viaduct-pass"));
/// The harness of the packet benchmark: see router-ebpf/src/bench.rs.
pub static BENCH_PROGRAM: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/viaduct-bench"));

/// Maps that outlive the agent, each under its name in the pin directory.
const PINNED_MAPS: [&str; 11] = [
    "SETTINGS",
    "PREFILTER",
    "VIPS",
    "VIP_ADDRESSES",
    "RINGS",
    "BACKENDS",
    "BACKEND_COUNTERS",
    "FLOW_SLOTS",
    "FLOWS",
    "RETURNS",
    "VERDICTS",
];
/// Jiffies over which their length is measured: 40 ms at the usual 250 a second.
const JIFFIES_COUNTED: u64 = 10;
/// The smallest frame that BPF_PROG_TEST_RUN takes is an Ethernet header.
const EMPTY_FRAME: [u8; 64] = [0; 64];
/// What the maps are made for.
#[derive(Clone, Debug)]
pub struct Options {
    pub limits: L4Limits,
    pub timeouts: FlowTimeouts,
    pub nat_ports: PortRange,
    pub gue_port: u16,
    /// Where to pin; `None` lets everything go with the process.
    pub pin_path: Option<PathBuf>,
}

/// The loaded programs and the maps they share with the agent.
pub struct Datapath {
    ebpf: Ebpf,
    pin_path: Option<PathBuf>,
    cpus: usize,
    buckets: u32,
    settings: Array<MapData, Settings>,
    written: Settings,
    ticks_per_second: f64,
    prefilter: Array<MapData, u64>,
    vips: Array<MapData, VipEntry>,
    vip_heads: Array<MapData, u32>,
    sources: LpmTrie<MapData, SourceKey, u32>,
    quic_servers: HashMap<MapData, QuicKey, u32>,
    moved_flows: Array<MapData, u32>,
    vip_addresses: HashMap<MapData, Addr, u32>,
    rings: Array<MapData, Ring>,
    backends: Array<MapData, BackendEntry>,
    backend_counters: PerCpuArray<MapData, BackendCounters>,
    backend_flows: Array<MapData, u32>,
    sweep: Array<MapData, SweepRequest>,
    counters: Counters,
    logger: EbpfLogger<&'static dyn log::Log>,
    /// Held while nothing is pinned: dropping a link detaches it.
    links: Vec<XdpLink>,
}

/// How a program came to sit on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    Native,
    Generic,
    /// A pinned link of an earlier agent, with this agent's program in it.
    Adopted,
}

/// What one run of the packet program on a given frame did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// An XDP action: kernel, include/uapi/linux/bpf.h, `enum xdp_action`.
    pub action: u32,
    pub frame: Vec<u8>,
    /// Mean time of one of the repeats.
    pub nanoseconds: u64,
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
        let buckets = (options.limits.flows.next_power_of_two() / FLOW_WAYS as u32).max(1);
        let backends = options.limits.backends + 1;
        let sizes = [
            ("VIPS", options.limits.vips),
            ("VIP_HEADS", vip_heads(&options.limits)),
            ("MOVED_FLOWS", options.limits.vips),
            ("SOURCES", 1 << 17),
            ("QUIC_SERVERS", backends),
            ("VIP_ADDRESSES", options.limits.vips),
            ("RINGS", options.limits.vips),
            ("BACKENDS", backends),
            ("BACKEND_COUNTERS", backends),
            ("BACKEND_FLOWS", backends),
            ("FLOW_SLOTS", buckets),
            ("FLOWS", buckets * FLOW_WAYS as u32),
            ("RETURNS", buckets * 2),
        ];
        let mut loader = EbpfLoader::new();
        for (name, size) in sizes {
            loader.map_max_entries(name, size);
        }
        if let Some(path) = &options.pin_path {
            prepare_pin_path(path)?;
            for name in PINNED_MAPS {
                let pin = path.join(name);
                let size = sizes
                    .iter()
                    .find(|(sized, _)| *sized == name)
                    .map(|(_, size)| *size);
                check_pinned(&pin, name, size)?;
                loader.map_pin_path(name, pin);
            }
        }
        let mut ebpf = loader.load(PROGRAM).context("load the XDP program")?;
        for name in ["viaduct", "sweep", "clock"] {
            program(&mut ebpf, name)?
                .load()
                .with_context(|| format!("load program {name}"))?;
        }
        let counters = Counters(Arc::new(CounterMaps {
            verdicts: PerCpuArray::try_from(reopen(&ebpf, "VERDICTS")?)?,
            backends: PerCpuArray::try_from(reopen(&ebpf, "BACKEND_COUNTERS")?)?,
        }));
        let logger = EbpfLogger::init(&mut ebpf).context("open the programs' log")?;
        let mut datapath = Datapath {
            counters,
            logger,
            pin_path: options.pin_path.clone(),
            cpus: aya::util::nr_cpus()
                .map_err(|(_, error)| error)
                .context("count CPUs")?,
            buckets,
            written: array::<Settings>(&mut ebpf, "SETTINGS")?.get(&0, 0)?,
            ticks_per_second: 1.0,
            settings: array(&mut ebpf, "SETTINGS")?,
            prefilter: array(&mut ebpf, "PREFILTER")?,
            vips: array(&mut ebpf, "VIPS")?,
            vip_heads: array(&mut ebpf, "VIP_HEADS")?,
            sources: LpmTrie::try_from(take(&mut ebpf, "SOURCES")?)?,
            quic_servers: HashMap::try_from(take(&mut ebpf, "QUIC_SERVERS")?)?,
            moved_flows: array(&mut ebpf, "MOVED_FLOWS")?,
            vip_addresses: HashMap::try_from(take(&mut ebpf, "VIP_ADDRESSES")?)?,
            rings: array(&mut ebpf, "RINGS")?,
            backends: array(&mut ebpf, "BACKENDS")?,
            backend_counters: PerCpuArray::try_from(take(&mut ebpf, "BACKEND_COUNTERS")?)?,
            backend_flows: array(&mut ebpf, "BACKEND_FLOWS")?,
            sweep: array(&mut ebpf, "SWEEP")?,
            links: Vec::new(),
            ebpf,
        };
        datapath.write_settings(options)?;
        Ok(datapath)
    }

    /// Attaches to an interface, or takes over the link an earlier agent pinned.
    pub fn attach(&mut self, interface: &str, mode: Attach) -> anyhow::Result<Attached> {
        // By the network namespace, which /sys need not be mounted from.
        let ifindex = nix::net::if_::if_nametoindex(interface)
            .map_err(|_| anyhow::anyhow!("l4.interfaces: there is no interface {interface:?}"))?;
        let pin = self
            .pin_path
            .as_ref()
            .map(|path| path.join(LINKS).join(link_name(interface, ifindex)));
        if let Some(pin) = &pin
            && pin.exists()
        {
            match self.adopt_link(pin) {
                Ok(()) => return Ok(Attached::Adopted),
                // Its interface is gone and another has its index, or it is of another kind.
                Err(error) => {
                    tracing::info!(interface, "the pinned link is of no use: {error:#}");
                    fs::remove_file(pin).with_context(|| format!("remove {}", pin.display()))?;
                }
            }
        }
        let (link, attached) = self.attach_new(interface, mode)?;
        match pin {
            Some(pin) => {
                let link: FdLink = link
                    .try_into()
                    .context("an XDP link without a descriptor")?;
                link.pin(&pin)
                    .with_context(|| format!("pin {}", pin.display()))?;
            }
            None => self.links.push(link),
        }
        Ok(attached)
    }

    /// Detaches from every interface but these, on which an earlier agent may have left its program.
    pub fn detach_others(&mut self, interfaces: &[String]) -> anyhow::Result<()> {
        let Some(path) = &self.pin_path else {
            return Ok(());
        };
        let kept: Vec<String> = interfaces
            .iter()
            .filter_map(|name| {
                Some(link_name(
                    name,
                    nix::net::if_::if_nametoindex(name.as_str()).ok()?,
                ))
            })
            .collect();
        for entry in fs::read_dir(path.join(LINKS)).context("list the pinned links")? {
            let entry = entry.context("list the pinned links")?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !kept.contains(&name) {
                let pin = entry.path();
                fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))?;
                tracing::info!(
                    link = name,
                    "detached from what is no longer in l4.interfaces"
                );
            }
        }
        Ok(())
    }

    /// Writes one change to the kernel.
    pub fn apply(&mut self, op: &MapOp) -> anyhow::Result<()> {
        match op {
            MapOp::SetBackend { id, entry } => self.backends.set(*id, entry, 0)?,
            MapOp::ClearBackend { id, generation } => {
                let free = BackendEntry {
                    generation: *generation,
                    ..BackendEntry::default()
                };
                self.backends.set(*id, free, 0)?;
                let zero = vec![BackendCounters::default(); self.cpus];
                self.backend_counters
                    .set(*id, PerCpuValues::try_from(zero)?, 0)?;
            }
            MapOp::SetRing { vip, slots } => {
                let slots: Box<[RingSlot; RING_SIZE]> = slots
                    .clone()
                    .try_into()
                    .map_err(|_| anyhow::anyhow!("a ring of another size"))?;
                self.rings.set(
                    *vip,
                    Ring {
                        slots: *slots,
                        reserved: Default::default(),
                    },
                    0,
                )?;
            }
            MapOp::SetVip { index, entry } => self.vips.set(*index, entry, 0)?,
            MapOp::SetVipHead { place, first } => self.vip_heads.set(*place, first, 0)?,
            MapOp::SetSource {
                key,
                prefix_len,
                verdict,
            } => {
                let key = Key::new(32 + u32::from(*prefix_len), *key);
                self.sources.insert(&key, verdict, 0)?;
            }
            MapOp::RemoveSource { key, prefix_len } => {
                let key = Key::new(32 + u32::from(*prefix_len), *key);
                absent_is_fine(self.sources.remove(&key))?;
            }
            MapOp::SetQuicServer { key, backend } => self.quic_servers.insert(key, backend, 0)?,
            MapOp::RemoveQuicServer { key } => absent_is_fine(self.quic_servers.remove(key))?,
            MapOp::SetDnat { in_use } => {
                let mut settings = self.settings.get(&0, 0)?;
                settings.dnat = u32::from(*in_use);
                self.settings.set(0, settings, 0)?;
            }
            MapOp::SetVipAddress { addr, vips: 0 } => {
                absent_is_fine(self.vip_addresses.remove(addr))?;
            }
            MapOp::SetVipAddress { addr, vips } => self.vip_addresses.insert(addr, vips, 0)?,
            MapOp::SetPrefilter { word, bits } => self.prefilter.set(*word, bits, 0)?,
        }
        Ok(())
    }

    /// What the maps hold: all that an earlier agent left.
    pub fn installed(&self) -> anyhow::Result<Installed> {
        let mut installed = Installed::default();
        for index in 0..self.vips.len() {
            let entry = self.vips.get(&index, 0).context("read VIPS")?;
            if entry != VipEntry::default() {
                installed.vips.push((index, entry));
                let ring = self.rings.get(&index, 0).context("read RINGS")?;
                installed.rings.push((index, ring.slots.into()));
            }
        }
        for place in 0..self.vip_heads.len() {
            let first = self.vip_heads.get(&place, 0).context("read VIP_HEADS")?;
            if first != 0 {
                installed.heads.push((place, first));
            }
        }
        for id in 1..self.backends.len() {
            let entry = self.backends.get(&id, 0).context("read BACKENDS")?;
            if entry.generation != 0 {
                installed.backends.push((id, entry));
            }
        }
        for source in self.sources.iter() {
            let (key, verdict) = source.context("read SOURCES")?;
            let bits = (key.prefix_len() - 32) as u8;
            installed.sources.push((key.data(), bits, verdict));
        }
        for server in self.quic_servers.iter() {
            installed
                .quic_servers
                .push(server.context("read QUIC_SERVERS")?);
        }
        installed.dnat = self.settings.get(&0, 0).context("read SETTINGS")?.dnat != 0;
        Ok(installed)
    }

    /// Flows, as of the sweeps since the last call, that are not where their slot of the ring says.
    pub fn moved_flows(&mut self, vip: u32) -> anyhow::Result<u32> {
        let moved = self.moved_flows.get(&vip, 0).context("read MOVED_FLOWS")?;
        self.moved_flows
            .set(vip, 0, 0)
            .context("reset MOVED_FLOWS")?;
        Ok(moved)
    }

    pub fn hash_keys(&self) -> &[u64; HASH_WORDS] {
        &self.written.hash_keys
    }

    pub fn vip_mask(&self) -> u32 {
        self.written.vip_mask
    }

    pub fn ticks_per_second(&self) -> f64 {
        self.ticks_per_second
    }

    /// How many shares [`Self::sweep`] has the flow table in.
    pub fn sweep_shares(&self) -> u32 {
        self.buckets.div_ceil(SWEEP_BUCKETS)
    }

    /// Forgets what is over in one share of the flow table and counts the rest for [`Self::flows_of`].
    pub fn sweep(&mut self, share: u32) -> anyhow::Result<SweepResult> {
        let request = SweepRequest {
            first_bucket: share * SWEEP_BUCKETS,
            ..SweepRequest::default()
        };
        self.sweep.set(0, request, 0).context("write SWEEP")?;
        self.run_program("sweep", &EMPTY_FRAME, 1, None)?;
        Ok(self.sweep.get(&0, 0).context("read SWEEP")?.result)
    }

    /// The flows of a backend that sweeps have counted since the last call.
    pub fn flows_of(&mut self, id: u32) -> anyhow::Result<u32> {
        let flows = self
            .backend_flows
            .get(&id, 0)
            .context("read BACKEND_FLOWS")?;
        self.backend_flows
            .set(id, 0, 0)
            .context("reset BACKEND_FLOWS")?;
        Ok(flows)
    }

    /// Runs the packet program on a frame as if it had just come in, without sending anything.
    ///
    /// `repeat` times on the same buffer: only the first of them sees `frame` as it is.
    pub fn run(&mut self, frame: &[u8], repeat: u32) -> anyhow::Result<Run> {
        // What a veth's headroom could grow a frame by.
        let mut out = vec![0; frame.len() + 256];
        let run = self.run_program("viaduct", frame, repeat, Some(&mut out))?;
        out.truncate(run.data_size_out as usize);
        Ok(Run {
            action: run.return_value,
            frame: out,
            nanoseconds: run.duration.as_nanos() as u64,
        })
    }

    /// The packet program, for a program array.
    pub fn packet_program(&mut self) -> anyhow::Result<ProgramFd> {
        Ok(program(&mut self.ebpf, "viaduct")?.fd()?.try_clone()?)
    }

    /// A reader of the counters, for other threads.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    /// Hands what the programs logged since the last call to this process's log.
    pub fn forward_logs(&mut self) {
        self.logger.flush();
    }

    fn run_program(
        &mut self,
        name: &str,
        frame: &[u8],
        repeat: u32,
        out: Option<&mut [u8]>,
    ) -> anyhow::Result<TestRunResult> {
        program(&mut self.ebpf, name)?
            .test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: out,
                repeat,
                ..TestRunOptions::default()
            })
            .with_context(|| format!("run program {name}"))
    }

    fn attach_new(&mut self, interface: &str, mode: Attach) -> anyhow::Result<(XdpLink, Attached)> {
        let program = program(&mut self.ebpf, "viaduct")?;
        let native = |program: &mut Xdp| -> anyhow::Result<XdpLink> {
            let id = program.attach(interface, XdpMode::Driver)?;
            Ok(program.take_link(id)?)
        };
        let generic = |program: &mut Xdp| -> anyhow::Result<XdpLink> {
            let id = program.attach(interface, XdpMode::Skb)?;
            Ok(program.take_link(id)?)
        };
        match mode {
            Attach::Native => {
                let link = native(program)
                    .with_context(|| format!("attach XDP to {interface} in native mode"))?;
                Ok((link, Attached::Native))
            }
            Attach::Generic => {
                let link = generic(program)
                    .with_context(|| format!("attach XDP to {interface} in generic mode"))?;
                Ok((link, Attached::Generic))
            }
            Attach::Auto => match native(program) {
                Ok(link) => Ok((link, Attached::Native)),
                Err(error) => {
                    tracing::warn!(
                        interface,
                        "no native XDP, falling back to generic: {error:#}"
                    );
                    let link = generic(program).with_context(|| {
                        format!("attach XDP to {interface} in native or generic mode")
                    })?;
                    Ok((link, Attached::Generic))
                }
            },
        }
    }

    /// Puts this agent's program into a pinned link; the kernel swaps it between two packets.
    fn adopt_link(&mut self, pin: &Path) -> anyhow::Result<()> {
        let link: FdLink = PinnedLink::from_pin(pin).context("open")?.into();
        let link = XdpLink::try_from(link).context("not an XDP link")?;
        let program = program(&mut self.ebpf, "viaduct")?;
        let id = program
            .attach_to_link(link)
            .context("replace its program")?;
        // The pin keeps it; this handle may go.
        drop(program.take_link(id)?);
        Ok(())
    }

    fn write_settings(&mut self, options: &Options) -> anyhow::Result<()> {
        let before = self.settings.get(&0, 0).context("read SETTINGS")?;
        let fresh = before.layout == 0;
        ensure!(
            fresh || before.layout == LAYOUT,
            "the pinned maps are of layout {}, this viaduct's of {LAYOUT}: run `viaduct detach` \
             (which ends their flows) and start again",
            before.layout
        );
        let hz = self.jiffies_per_second()?;
        // About two ticks a second: fine enough for timeouts, coarse enough to write rarely. Times
        // in an adopted flow table stay in the unit they were taken in.
        let tick_shift = if fresh {
            (hz / 2).max(1).ilog2()
        } else {
            before.tick_shift
        };
        let ticks = |timeout: Duration| {
            let jiffies = timeout.as_millis() as u64 * u64::from(hz) / 1000;
            (jiffies >> tick_shift).clamp(1, u64::from(MAX_TICKS)) as u32
        };
        let mut timeouts = [0; FlowState::COUNT];
        for (state, timeout) in [
            (FlowState::Syn, options.timeouts.tcp_syn),
            (FlowState::Established, options.timeouts.tcp_established),
            (FlowState::FinClient, options.timeouts.tcp_established),
            (FlowState::FinBackend, options.timeouts.tcp_established),
            (FlowState::Closing, options.timeouts.tcp_closing),
            (FlowState::Udp, options.timeouts.udp),
        ] {
            timeouts[state as usize] = ticks(timeout);
        }
        let settings = Settings {
            // An adopted flow table stays where its keys put it.
            hash_keys: if fresh {
                rand::random()
            } else {
                before.hash_keys
            },
            bucket_mask: self.buckets - 1,
            vip_mask: self.vip_heads.len() - 1,
            sample: 0,
            dnat: before.dnat,
            gue_port: options.gue_port,
            reserved: 0,
            tick_shift,
            timeouts,
            nat_port_first: options.nat_ports.first,
            nat_port_count: options.nat_ports.last - options.nat_ports.first + 1,
            layout: LAYOUT,
        };
        self.written = settings;
        self.ticks_per_second = f64::from(hz) / f64::from(1u32 << tick_shift);
        self.settings.set(0, settings, 0).context("write SETTINGS")
    }

    /// CONFIG_HZ, which the kernel tells nobody: from its two clocks, some milliseconds apart.
    fn jiffies_per_second(&mut self) -> anyhow::Result<u32> {
        let clock: Array<MapData, ClockSample> = array(&mut self.ebpf, "CLOCK")?;
        let mut sample = || -> anyhow::Result<ClockSample> {
            self.run_program("clock", &EMPTY_FRAME, 1, None)?;
            clock.get(&0, 0).context("read CLOCK")
        };
        // From one edge of a jiffy to another, or the count would be off by one.
        let mut edge = |after: u64| -> anyhow::Result<ClockSample> {
            loop {
                let now = sample()?;
                if now.jiffies > after {
                    return Ok(now);
                }
                std::thread::yield_now();
            }
        };
        let before = edge(0)?;
        let first = edge(before.jiffies)?;
        let last = edge(first.jiffies + JIFFIES_COUNTED - 1)?;
        let per_second = (last.jiffies - first.jiffies) as f64 * 1e9
            / (last.monotonic_ns - first.monotonic_ns) as f64;
        // Kernel: kernel/Kconfig.hz.
        let nearest = [100u32, 250, 300, 1000]
            .into_iter()
            .min_by_key(|hz| (f64::from(*hz) - per_second).abs() as u32);
        nearest.context("no jiffies")
    }
}

/// The kernel's counters, readable from any thread.
#[derive(Clone)]
pub struct Counters(Arc<CounterMaps>);

struct CounterMaps {
    verdicts: PerCpuArray<MapData, u64>,
    backends: PerCpuArray<MapData, BackendCounters>,
}

impl Counters {
    /// Packets by verdict, of all CPUs.
    pub fn verdicts(&self) -> anyhow::Result<Vec<(Verdict, u64)>> {
        let mut verdicts = Vec::with_capacity(Verdict::ALL.len());
        for &verdict in Verdict::ALL {
            let values = self
                .0
                .verdicts
                .get(&(verdict as u32), 0)
                .context("read VERDICTS")?;
            verdicts.push((verdict, values.iter().sum()));
        }
        Ok(verdicts)
    }

    /// What one backend's flows moved, on all CPUs.
    pub fn backend(&self, id: u32) -> anyhow::Result<BackendCounters> {
        let mut total = BackendCounters::default();
        for value in self
            .0
            .backends
            .get(&id, 0)
            .context("read BACKEND_COUNTERS")?
            .iter()
        {
            total += *value;
        }
        Ok(total)
    }
}

fn vip_heads(limits: &L4Limits) -> u32 {
    (limits.vips * 2).next_power_of_two()
}

/// The kernel says only "operation not permitted"; this says what is missing.
fn check_capabilities() -> anyhow::Result<()> {
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
    let missing: Vec<&str> = [
        ("CAP_BPF", has(BPF) || has(SYS_ADMIN)),
        ("CAP_PERFMON", has(PERFMON) || has(SYS_ADMIN)),
        ("CAP_NET_ADMIN", has(NET_ADMIN)),
    ]
    .into_iter()
    .filter_map(|(name, has)| (!has).then_some(name))
    .collect();
    ensure!(
        missing.is_empty(),
        "missing {}: run as root, or grant them (AmbientCapabilities= in a systemd unit)",
        missing.join(", ")
    );
    Ok(())
}

fn absent_is_fine(removed: Result<(), MapError>) -> Result<(), MapError> {
    match removed {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        other => other,
    }
}

/// A pinned map that another version or another configuration made would be misread.
fn check_pinned(pin: &Path, name: &str, size: Option<u32>) -> anyhow::Result<()> {
    if !pin.exists() {
        return Ok(());
    }
    let info = MapInfo::from_pin(pin).with_context(|| format!("open {}", pin.display()))?;
    let value_len = match name {
        "SETTINGS" => size_of::<Settings>(),
        "VIPS" => size_of::<VipEntry>(),
        "RINGS" => size_of::<Ring>(),
        "BACKENDS" => size_of::<BackendEntry>(),
        "BACKEND_COUNTERS" => size_of::<BackendCounters>(),
        "FLOW_SLOTS" | "FLOWS" | "RETURNS" => 64,
        "VIP_ADDRESSES" => size_of::<u32>(),
        _ => size_of::<u64>(),
    };
    let entries = info.max_entries();
    if info.value_size() as usize != value_len || size.is_some_and(|size| size != entries) {
        bail!(
            "the pinned map {} has {entries} entries of {} octets, not {} of {value_len}: \
             undo the change of l4.limits, or run `viaduct detach` (which ends its flows) and start again",
            pin.display(),
            info.value_size(),
            size.unwrap_or(entries),
        );
    }
    Ok(())
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut Xdp> {
    let program = ebpf
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?;
    program
        .try_into()
        .with_context(|| format!("{name} is no XDP program"))
}

fn take(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<aya::maps::Map> {
    ebpf.take_map(name)
        .with_context(|| format!("no map {name}"))
}

/// A second descriptor of a map, for another thread.
fn reopen(ebpf: &Ebpf, name: &str) -> anyhow::Result<aya::maps::Map> {
    let Some(aya::maps::Map::PerCpuArray(map)) = ebpf.map(name) else {
        bail!("no per-CPU array {name}");
    };
    let fd = map.fd().as_fd().try_clone_to_owned()?;
    let map = MapData::from_fd(fd).with_context(|| format!("open {name} again"))?;
    Ok(aya::maps::Map::PerCpuArray(map))
}

fn array<V: Pod>(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<Array<MapData, V>> {
    Array::try_from(take(ebpf, name)?).with_context(|| format!("map {name}"))
}
