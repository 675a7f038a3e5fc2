//! The loaded programs, the tables a planner would give them, and what becomes of a frame.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use router_common::{BackendCounters, RingSlot, SweepResult, Verdict};
use viaduct::config::{FlowTimeouts, Forwarding, L4Config, L4Limits, PortRange, VipConfig};
use viaduct::l4::datapath::{Datapath, Options, Run};
use viaduct::l4::next_hop::NextHop;
use viaduct::l4::plan::{MapOp, Planner, World};
use viaduct::l4::policy::Policies;
use viaduct::route::{Backend, Origin, Pool, Vip};

/// BPF_PROG_TEST_RUN makes frames come in by the loopback interface.
pub const INGRESS: u32 = 1;
pub const EGRESS: u32 = 7;
pub const MTU: u16 = 1500;

pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub const GATEWAY_INNER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];
pub const BACKEND_MAC: [u8; 6] = [2, 0, 0, 0, 0, 4];

pub const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 254));
pub const GATEWAY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0xfe));
pub const GUE_PORT: u16 = 6080;
pub const NAT_PORTS: PortRange = PortRange {
    first: 1024,
    last: 32767,
};

/// More than a VIP's drain time, and than any flow lives without packets.
pub const DRAIN: Duration = Duration::from_secs(3 * 3600);

pub const HOOKS: [Hook; 2] = [Hook::Xdp, Hook::Tcx];
pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// Which program a frame goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Xdp,
    Tcx,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// What a program asks of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Pass,
    Drop,
    /// Out where it came in, which the classifier has no word for.
    Back,
    Redirect,
}

impl Hook {
    /// Kernel: include/uapi/linux/bpf.h, `enum xdp_action` and `enum tcx_action_base`.
    fn action(self, number: u32) -> Action {
        match (self, number as i32) {
            (Hook::Xdp, 1) | (Hook::Tcx, 2) => Action::Drop,
            (Hook::Xdp, 2) | (Hook::Tcx, -1) => Action::Pass,
            (Hook::Xdp, 3) => Action::Back,
            (Hook::Xdp, 4) | (Hook::Tcx, 7) => Action::Redirect,
            other => panic!("action {other:?}"),
        }
    }

    /// The shortest frame like this one that BPF_PROG_TEST_RUN takes: Ethernet, and for a socket buffer
    /// the IP header that it is said to have.
    pub fn shortest(self, frame: &[u8]) -> usize {
        match (self, frame.get(12..14)) {
            (Hook::Tcx, Some([0x08, 0x00])) => 34,
            (Hook::Tcx, Some([0x86, 0xdd])) => 54,
            (Hook::Tcx, _) => 15,
            (Hook::Xdp, _) => 14,
        }
    }

    /// What sends a frame back out where it came in.
    pub fn back(self) -> Action {
        match self {
            Hook::Xdp => Action::Back,
            Hook::Tcx => Action::Redirect,
        }
    }
}

impl Family {
    /// One of as many clients as there are numbers.
    pub fn client(self, number: u16) -> SocketAddr {
        let [a, b] = number.to_be_bytes();
        let ip = match self {
            Family::V4 => IpAddr::V4(Ipv4Addr::new(198, 51, a, b)),
            Family::V6 => IpAddr::V6(Ipv6Addr::new(
                0x2001,
                0xdb8,
                0xc,
                0,
                0,
                0,
                a.into(),
                b.into(),
            )),
        };
        SocketAddr::new(ip, 10_000 + number % 1000)
    }

    /// `host` on the backends' network.
    pub fn backend(self, host: u8, port: u16) -> SocketAddr {
        let ip = match self {
            Family::V4 => IpAddr::V4(Ipv4Addr::new(10, 0, 0, host)),
            Family::V6 => IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host.into())),
        };
        SocketAddr::new(ip, port)
    }

    /// One of the VIPs' addresses.
    pub fn vip(self, host: u8, port: u16) -> SocketAddr {
        let ip = match self {
            Family::V4 => IpAddr::V4(Ipv4Addr::new(192, 0, 2, host)),
            Family::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host.into())),
        };
        SocketAddr::new(ip, port)
    }

    /// What a backend sees of the gateway.
    pub fn gateway(self) -> IpAddr {
        match self {
            Family::V4 => GATEWAY,
            Family::V6 => GATEWAY_V6,
        }
    }

    pub fn of(address: SocketAddr) -> Family {
        if address.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        }
    }
}

/// `proto` is `tcp` or `udp`.
pub fn vip(proto: &str, address: impl fmt::Display) -> Vip {
    format!("{proto}/{address}").parse().expect("a VIP")
}

pub fn options() -> Options {
    Options {
        limits: L4Limits {
            vips: 250,
            backends: 1024,
            flows: 65_536,
        },
        timeouts: FlowTimeouts::default(),
        nat_ports: NAT_PORTS,
        gue_port: GUE_PORT,
        pin_path: None,
    }
}

/// The programs under test with their tables.
pub struct Gateway {
    pub datapath: Datapath,
    /// Which program [`Self::send`] runs.
    pub hook: Hook,
    pub now: Instant,
    /// To backends that are not reached by [`EGRESS`].
    pub next_hops: HashMap<IpAddr, NextHop>,
    pub planner: Planner,
    config: BTreeMap<Vip, VipConfig>,
    policies: Policies,
    /// By VIP index, as last written.
    pub rings: HashMap<u32, Box<[RingSlot]>>,
    clients: u16,
    vips: u8,
}

/// What became of a packet.
#[derive(Debug)]
pub struct Outcome {
    pub action: Action,
    pub verdict: Verdict,
    pub frame: Vec<u8>,
    /// What it added to the counters of backends, by id.
    pub moved: BTreeMap<u32, BackendCounters>,
}

impl Gateway {
    pub fn new() -> Gateway {
        Gateway::with(&options())
    }

    pub fn with(options: &Options) -> Gateway {
        let datapath =
            Datapath::open(options).expect("load the programs: needs root and a BPF toolchain");
        for loaded in datapath.loaded() {
            assert!(loaded.outcome.is_ok(), "{} is not loaded", loaded.name);
        }
        let planner = Planner::new(
            options.limits.vips,
            options.limits.backends,
            *datapath.hash_keys(),
            datapath.vip_mask(),
        );
        Gateway {
            datapath,
            hook: Hook::Xdp,
            now: Instant::now(),
            next_hops: HashMap::new(),
            planner,
            config: BTreeMap::new(),
            policies: Policies::new(&L4Config::default()),
            rings: HashMap::new(),
            clients: 0,
            vips: 0,
        }
    }

    /// An address of a VIP that no row had before.
    pub fn address(&mut self, family: Family, port: u16) -> SocketAddr {
        self.vips += 1;
        family.vip(self.vips, port)
    }

    /// A client that no row had before.
    pub fn client(&mut self, family: Family) -> SocketAddr {
        self.clients += 1;
        family.client(30_000 + self.clients)
    }

    /// The policy of a VIP, from when it is planned next.
    pub fn configure(&mut self, vip: Vip, change: impl FnOnce(&mut VipConfig)) {
        let config = self.config.entry(vip).or_insert(VipConfig::new(vip));
        change(config);
        self.policies = Policies::new(&L4Config {
            vip: self.config.values().cloned().collect(),
            ..L4Config::default()
        });
    }

    /// Plans and writes a VIP with backends of the usual weight.
    pub fn serve(&mut self, vip: Vip, forwarding: Forwarding, backends: &[SocketAddr]) {
        self.configure(vip, |config| config.forwarding = Some(forwarding));
        self.set_pool(vip, backends);
    }

    pub fn set_pool(&mut self, vip: Vip, backends: &[SocketAddr]) {
        let weighted: Vec<_> = backends.iter().map(|address| (*address, 100)).collect();
        self.set_weights(vip, &weighted);
    }

    pub fn set_weights(&mut self, vip: Vip, backends: &[(SocketAddr, u16)]) {
        let backend = |&(address, weight)| Backend {
            weight,
            ..Backend::new(address, Origin::Nats)
        };
        self.set_backends(vip, backends.iter().map(backend).collect());
    }

    pub fn set_backends(&mut self, vip: Vip, backends: Vec<Backend>) {
        for backend in &backends {
            self.next_hops
                .entry(backend.address.ip())
                .or_insert_with(|| next_hop(Family::of(backend.address)));
        }
        let pool = Pool {
            backends: backends.into_iter().map(Arc::new).collect(),
            ..Pool::default()
        };
        let world = World {
            now: self.now,
            policies: &self.policies,
            timeouts: &FlowTimeouts::default(),
            ticks_per_second: self.datapath.ticks_per_second(),
            next_hops: &self.next_hops,
            unhealthy: &imbl::HashSet::new(),
            panic_threshold: 0,
            draining: &imbl::HashSet::new(),
            draining_at: &imbl::HashSet::new(),
        };
        let plan = self
            .planner
            .plan(vip, (!pool.backends.is_empty()).then_some(&pool), &world);
        assert_eq!(plan.refused, []);
        for op in plan.ops {
            self.datapath.apply(&op).expect("write to the kernel");
            if let MapOp::SetRing { vip, slots } = op {
                self.rings.insert(vip, slots);
            }
        }
    }

    /// Forgets a VIP and all of its backends.
    pub fn remove(&mut self, vip: Vip) {
        self.set_pool(vip, &[]);
        self.now += DRAIN;
        self.set_pool(vip, &[]);
    }

    /// Runs the program on one frame; exactly one verdict must be counted.
    pub fn send(&mut self, frame: &[u8]) -> Outcome {
        let hook = self.hook;
        let (run, counted, moved) = self.counting(|datapath| match hook {
            Hook::Xdp => datapath.run(frame),
            Hook::Tcx => datapath.run_tcx(frame),
        });
        let [verdict] = counted[..] else {
            panic!("verdicts counted for one packet: {counted:?}")
        };
        Outcome {
            action: hook.action(run.action),
            verdict,
            frame: run.frame,
            moved,
        }
    }

    /// Runs a program; the verdicts it counted, and what it added to the counters of backends.
    pub fn counting(
        &mut self,
        run: impl FnOnce(&mut Datapath) -> anyhow::Result<Run>,
    ) -> (Run, Vec<Verdict>, BTreeMap<u32, BackendCounters>) {
        let before = self.counters();
        let run = run(&mut self.datapath).expect("run");
        let after = self.counters();
        let verdicts = before.verdicts.iter().zip(&after.verdicts);
        let counted = verdicts
            .flat_map(|(before, after)| vec![after.0; (after.1 - before.1) as usize])
            .collect();
        let moved = after.since(&before);
        (run, counted, moved)
    }

    /// Sends a frame that must meet this verdict.
    #[track_caller]
    pub fn expect(&mut self, row: &str, frame: &[u8], verdict: Verdict) -> Outcome {
        let out = self.send(frame);
        assert_eq!(out.verdict, verdict, "{row}, {:?}: {out:02x?}", self.hook);
        out
    }

    /// Sends a frame that must come out bit for bit.
    #[track_caller]
    pub fn expect_untouched(&mut self, row: &str, frame: &[u8], verdict: Verdict) {
        let out = self.expect(row, frame, verdict);
        let passed = [
            Verdict::NotForUs,
            Verdict::NoSuchVip,
            Verdict::NotAReply,
            Verdict::HandedUp,
        ];
        let action = match passed.contains(&verdict) {
            true => Action::Pass,
            false => Action::Drop,
        };
        assert_eq!(out.action, action, "{row}");
        assert_eq!(out.moved, BTreeMap::new(), "{row}");
        assert_eq!(out.frame, frame, "{row}");
    }

    /// The member of a VIP that an outcome was counted for.
    #[track_caller]
    pub fn backend_of(&self, vip: Vip, out: &Outcome) -> SocketAddr {
        let ids: Vec<&u32> = out.moved.keys().collect();
        let [id] = ids[..] else {
            panic!("counted for one backend: {out:02x?}")
        };
        let members = &self.planner.vips()[&vip].members;
        let member = members.iter().find(|(_, member)| member.id == *id);
        *member.expect("of this VIP").0
    }

    pub fn id_of(&self, vip: Vip, backend: SocketAddr) -> u32 {
        self.planner.vips()[&vip].members[&backend].id
    }

    /// Sweeps the whole flow table once.
    pub fn sweep(&mut self) -> SweepResult {
        let mut total = SweepResult::default();
        for share in 0..self.datapath.sweep_shares() {
            let result = self.datapath.sweep(share).expect("sweep");
            total.live += result.live;
            total.freed += result.freed;
        }
        total
    }

    pub fn counters(&self) -> Counted {
        let counters = self.datapath.counters();
        let members = self
            .planner
            .vips()
            .values()
            .flat_map(|vip| vip.members.values());
        Counted {
            verdicts: counters.verdicts().expect("counters"),
            backends: members
                .map(|member| (member.id, counters.backend(member.id).expect("counters")))
                .collect(),
        }
    }
}

/// All counters at one moment.
#[derive(Debug, PartialEq)]
pub struct Counted {
    pub verdicts: Vec<(Verdict, u64)>,
    backends: BTreeMap<u32, BackendCounters>,
}

impl Counted {
    fn since(&self, before: &Counted) -> BTreeMap<u32, BackendCounters> {
        let mut moved = BTreeMap::new();
        for (id, after) in &self.backends {
            let before = before.backends.get(id).copied().unwrap_or_default();
            if *after != before {
                let delta = BackendCounters {
                    packets: after.packets - before.packets,
                    bytes: after.bytes - before.bytes,
                    reply_packets: after.reply_packets - before.reply_packets,
                    reply_bytes: after.reply_bytes - before.reply_bytes,
                    new_flows: after.new_flows - before.new_flows,
                };
                moved.insert(*id, delta);
            }
        }
        moved
    }
}

/// The way to backends that a test says nothing of.
pub fn next_hop(family: Family) -> NextHop {
    NextHop {
        ifindex: EGRESS,
        source_mac: GATEWAY_INNER_MAC,
        destination_mac: BACKEND_MAC,
        source: family.gateway(),
        mtu: MTU,
        vlan: 0,
        on_link: true,
    }
}
