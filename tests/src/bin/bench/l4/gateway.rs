//! A gateway without network: the loaded programs and the tables a planner makes for one mode.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use anyhow::ensure;
use viaduct::config::{FlowTimeouts, Forwarding, L4Config, L4Limits, PortRange};
use viaduct::l4::datapath::{Datapath, Options};
use viaduct::l4::next_hop::NextHop;
use viaduct::l4::plan::{Planner, World};
use viaduct::l4::policy::Policies;
use viaduct::route::{Backend, Origin, Pool, Proto, Vip};

use super::stream::{PORT, VIP_V4, VIP_V6};

/// So many that the gateway's ports suffice for half a million flows in `nat` mode.
const BACKENDS: u8 = 32;
/// Places in the flow table.
const FLOWS: u32 = 1 << 20;

/// TCP and UDP VIPs of both families, served in `mode` by backends behind interface `egress`.
pub(super) fn serving(mode: Forwarding, egress: NextHop) -> anyhow::Result<Datapath> {
    let limits = L4Limits {
        vips: 8,
        backends: 256,
        flows: FLOWS,
    };
    let (vips, backends) = (limits.vips, limits.backends);
    let mut datapath = Datapath::open(&Options {
        limits,
        timeouts: FlowTimeouts::default(),
        nat_ports: PortRange {
            first: 1024,
            last: 65535,
        },
        gue_port: 6080,
        pin_path: None,
    })?;
    let mut planner = Planner::new(vips, backends, *datapath.hash_keys(), datapath.vip_mask());
    let config = L4Config {
        forwarding: mode,
        ..L4Config::default()
    };
    let hosts = || (1..=BACKENDS).flat_map(|host| [address(host, false), address(host, true)]);
    let next_hops: HashMap<IpAddr, NextHop> = hosts()
        .map(|host| {
            let source = address(254, host.is_ipv6());
            (host, NextHop { source, ..egress })
        })
        .collect();
    let world = World {
        now: Instant::now(),
        policies: &Policies::new(&config),
        timeouts: &config.timeouts,
        ticks_per_second: datapath.ticks_per_second(),
        next_hops: &next_hops,
        unhealthy: &Default::default(),
    };
    for vip in vips_of(mode) {
        let members = hosts().filter(|host| host.is_ipv6() == vip.address.is_ipv6());
        let pool = Pool {
            backends: members
                .map(|host| Arc::new(Backend::new(SocketAddr::new(host, PORT), Origin::Nats)))
                .collect(),
            balance: None,
            route_service_url: None,
        };
        let plan = planner.plan(vip, Some(&pool), &world);
        ensure!(plan.refused.is_empty(), "refused: {:?}", plan.refused);
        for op in plan.ops {
            datapath.apply(&op)?;
        }
    }
    Ok(datapath)
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
