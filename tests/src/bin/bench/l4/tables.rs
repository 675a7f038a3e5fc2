//! What a change of a VIP takes until the kernel has it, and the memory of the tables.

use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use viaduct::config::{L4Config, L4Limits, PortRange};
use viaduct::l4::datapath::Datapath;
use viaduct::l4::next_hop::NextHop;
use viaduct::l4::plan::{Plan, Planner, World};
use viaduct::l4::policy::Policies;
use viaduct::route::{Proto, Vip};

use super::gateway::{loopback, options, pool};
use crate::report::Report;
use crate::stream::{PORT, VIP_V4};

const ROUNDS: usize = 7;
const POOLS: [(u32, &str); 3] = [(10, "10"), (1000, "1k"), (10_000, "10k")];

/// Rows `apply-N`: one of N backends leaves and comes back.
pub(super) fn measure_changes(report: &mut Report, prefix: &str) -> anyhow::Result<()> {
    let wanted = |row: &str| row.starts_with(prefix);
    let rows = POOLS.map(|(backends, name)| (backends, format!("apply-{name}")));
    if !rows.iter().any(|(_, row)| wanted(row)) {
        return Ok(());
    }
    let limits = L4Limits {
        vips: 16,
        backends: 16_384,
        flows: 1024,
    };
    let mut datapath = Datapath::open(&options(limits.clone()))?;
    for _ in 0..ROUNDS {
        for (backends, row) in &rows {
            if !wanted(row) {
                continue;
            }
            let mut tables = Tables::new(&limits, &mut datapath, *backends);
            tables.change(*backends)?;
            for count in [backends - 1, *backends] {
                let (build, apply) = tables.change(count)?;
                report.add(row, "viaduct", "build_ms", build.as_secs_f64() * 1e3);
                report.add(row, "viaduct", "apply_ms", apply.as_secs_f64() * 1e3);
                let sum = (build + apply).as_secs_f64() * 1e3;
                report.add(row, "viaduct", "total_ms", sum);
            }
        }
    }
    Ok(())
}

/// One VIP and its planner. The next one begins anew and overwrites the same tables.
struct Tables<'a> {
    datapath: &'a mut Datapath,
    planner: Planner,
    policies: Policies,
    config: L4Config,
    next_hops: HashMap<IpAddr, NextHop>,
}

impl Tables<'_> {
    fn new<'a>(limits: &L4Limits, datapath: &'a mut Datapath, backends: u32) -> Tables<'a> {
        let config = L4Config::default();
        let (vips, max_backends) = (limits.vips, limits.backends);
        let (keys, mask) = (*datapath.hash_keys(), datapath.vip_mask());
        Tables {
            planner: Planner::new(vips, max_backends, keys, mask),
            policies: Policies::new(&config),
            config,
            next_hops: addresses(backends).map(|host| (host, loopback())).collect(),
            datapath,
        }
    }

    /// The VIP has this many backends from here on; how long planning took, with the ring, and how long
    /// the writes.
    fn change(&mut self, backends: u32) -> anyhow::Result<(Duration, Duration)> {
        let ports = PortRange {
            first: PORT,
            last: PORT,
        };
        let vip = Vip {
            proto: Proto::Tcp,
            address: VIP_V4.into(),
            ports,
        };
        let world = World {
            now: Instant::now(),
            policies: &self.policies,
            timeouts: &self.config.timeouts,
            ticks_per_second: self.datapath.ticks_per_second(),
            next_hops: &self.next_hops,
            unhealthy: &Default::default(),
            panic_threshold: 0,
            draining: &Default::default(),
            draining_at: &Default::default(),
        };
        let pool = pool(&addresses(backends).collect::<Vec<_>>());
        let start = Instant::now();
        let Plan { ops, refused } = self.planner.plan(vip, Some(&pool), &world);
        let planned = start.elapsed();
        ensure!(refused.is_empty(), "refused: {refused:?}");
        let start = Instant::now();
        for op in &ops {
            self.datapath.apply(op)?;
        }
        Ok((planned, start.elapsed()))
    }
}

fn addresses(count: u32) -> impl Iterator<Item = IpAddr> {
    let first = u32::from(Ipv4Addr::new(10, 0, 0, 1));
    (first..first + count).map(|address| Ipv4Addr::from_bits(address).into())
}

/// Rows `static-maps` and `static-maps-full`: what the kernel locks for the tables of 512 VIPs and 4096
/// memberships of backends in them, and of as many as there can be.
pub(super) fn measure_memory(report: &mut Report, prefix: &str) -> anyhow::Result<()> {
    for (row, backends) in [
        ("static-maps", 4096),
        ("static-maps-full", router_common::MAX_BACKENDS),
    ] {
        if row.starts_with(prefix) {
            let before = locked_by_maps()?.len();
            ensure!(before == 0, "{before} maps were open already");
            // The flow table is as small as it can be.
            let limits = L4Limits {
                vips: 512,
                backends,
                flows: 1024,
            };
            let _datapath = Datapath::open(&options(limits))?;
            let octets: u64 = locked_by_maps()?.values().sum();
            report.add(row, "viaduct", "mib", octets as f64 / f64::from(1 << 20));
        }
    }
    Ok(())
}

/// Octets that the kernel says it locks for each map that this process has open, by the map's id.
fn locked_by_maps() -> anyhow::Result<HashMap<u64, u64>> {
    let mut locked = HashMap::new();
    for entry in fs::read_dir("/proc/self/fdinfo")? {
        // The descriptor of this very listing is gone when its turn comes.
        let Ok(text) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.trim().parse::<u64>().ok())
        };
        if let Some(id) = field("map_id:") {
            locked.insert(id, field("memlock:").context("no memlock in fdinfo")?);
        }
    }
    Ok(locked)
}
