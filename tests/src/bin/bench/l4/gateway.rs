//! A gateway without network: the loaded programs and the tables a planner makes for one mode.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use aya::programs::ProgramFd;
use viaduct::config::{FlowTimeouts, Forwarding, L4Config, L4Limits, PortRange};
use viaduct::l4::datapath::{Counters, Datapath, Options};
use viaduct::l4::next_hop::NextHop;
use viaduct::l4::plan::{Planner, World};
use viaduct::l4::policy::Policies;
use viaduct::route::{Backend, Origin, Pool, Proto, Vip};

use crate::stream::{PORT, VIP_V4, VIP_V6};

/// So many that the gateway's ports suffice for half a million flows in `nat` mode.
const BACKENDS: u8 = 32;
/// Places in the flow table.
const FLOWS: u32 = 1 << 20;

/// More than any drain or timeout takes.
const LONG: Duration = Duration::from_secs(24 * 3600);

/// Loaded once, as that takes seconds; serves one mode after another.
pub(super) struct Gateway {
    pub(super) datapath: Datapath,
    pub(super) program: ProgramFd,
    pub(super) counters: Counters,
    planner: Planner,
    now: Instant,
    config: L4Config,
    egress: NextHop,
}

impl Gateway {
    /// Backends are behind `egress`.
    pub(super) fn open(egress: NextHop) -> anyhow::Result<Gateway> {
        let limits = L4Limits {
            vips: 8,
            backends: 256,
            flows: FLOWS,
        };
        let mut datapath = Datapath::open(&options(limits.clone()))?;
        Ok(Gateway {
            program: datapath.packet_program()?,
            counters: datapath.counters(),
            planner: Planner::new(
                limits.vips,
                limits.backends,
                *datapath.hash_keys(),
                datapath.vip_mask(),
            ),
            now: Instant::now(),
            config: L4Config::default(),
            egress,
            datapath,
        })
    }

    /// Has no flows, and TCP and UDP VIPs of both families in `mode`.
    pub(super) fn serve(&mut self, mode: Forwarding) -> anyhow::Result<()> {
        let served: Vec<Vip> = self.planner.vips().keys().copied().collect();
        for _ in 0..2 {
            for vip in &served {
                self.plan(*vip, &[])?;
            }
            // The backends are given up once their drain is over, and their flows with them.
            self.now += LONG;
        }
        for share in 0..self.datapath.sweep_shares() {
            let left = self.datapath.sweep(share)?.live;
            ensure!(left == 0, "{left} flows outlived their backends");
        }
        self.config.forwarding = mode;
        for vip in vips_of(mode) {
            let hosts = (1..=BACKENDS).map(|host| address(host, vip.address.is_ipv6()));
            self.plan(vip, &hosts.collect::<Vec<_>>())?;
        }
        Ok(())
    }

    fn plan(&mut self, vip: Vip, hosts: &[IpAddr]) -> anyhow::Result<()> {
        let next_hops: HashMap<IpAddr, NextHop> = hosts
            .iter()
            .map(|host| {
                let source = address(254, host.is_ipv6());
                let hop = NextHop {
                    source,
                    ..self.egress
                };
                (*host, hop)
            })
            .collect();
        let world = World {
            now: self.now,
            policies: &Policies::new(&self.config),
            timeouts: &self.config.timeouts,
            ticks_per_second: self.datapath.ticks_per_second(),
            next_hops: &next_hops,
            unhealthy: &Default::default(),
            panic_threshold: 0,
            draining: &Default::default(),
            draining_at: &Default::default(),
        };
        let pool = (!hosts.is_empty()).then(|| pool(hosts));
        let plan = self.planner.plan(vip, pool.as_ref(), &world);
        ensure!(plan.refused.is_empty(), "refused: {:?}", plan.refused);
        for op in plan.ops {
            self.datapath.apply(&op)?;
        }
        Ok(())
    }
}

pub(super) fn options(limits: L4Limits) -> Options {
    Options {
        limits,
        timeouts: FlowTimeouts::default(),
        nat_ports: PortRange {
            first: 1024,
            last: 65535,
        },
        gue_port: 6080,
        pin_path: None,
    }
}

pub(super) fn pool(hosts: &[IpAddr]) -> Pool {
    let backend = |host: &IpAddr| Arc::new(Backend::new((*host, PORT).into(), Origin::Nats));
    Pool {
        backends: hosts.iter().map(backend).collect(),
        ..Pool::default()
    }
}

/// BPF_PROG_TEST_RUN makes frames come in by the loopback interface; backends are behind the same, so
/// that packets leave by XDP_TX.
pub(super) fn loopback() -> NextHop {
    NextHop {
        ifindex: 1,
        source_mac: [2, 0, 0, 0, 0, 3],
        destination_mac: [2, 0, 0, 0, 0, 4],
        source: address(254, false),
        mtu: 1500,
        vlan: 0,
        on_link: true,
    }
}

fn vips_of(mode: Forwarding) -> impl Iterator<Item = Vip> {
    let ports = PortRange {
        first: PORT,
        last: PORT,
    };
    let protos: &[Proto] = match mode {
        Forwarding::L7 => &[Proto::Tcp],
        _ => &[Proto::Tcp, Proto::Udp],
    };
    let addresses = [IpAddr::V4(VIP_V4), IpAddr::V6(VIP_V6)];
    addresses.into_iter().flat_map(move |address| {
        protos.iter().map(move |&proto| Vip {
            proto,
            address,
            ports,
        })
    })
}

fn address(host: u8, v6: bool) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host.into()).into()
    } else {
        Ipv4Addr::new(10, 0, 0, host).into()
    }
}
