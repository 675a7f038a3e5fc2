//! Millions of packets a second through a veth, with one core for all of it.
//!
//! ```text
//!  harness ──XDP_TX──▶ near ═══ veth ═══ far: program under test
//!                      drop ◀═══════════ XDP_TX
//! ```
//!
//! The gateway has one pair, the floors another. The kernel sends what the harness lays (BPF_F_TEST_XDP_LIVE_FRAMES, 64 frames at a time). Floors are
//! two: `drop` ends every frame at the far end, `tx` sends it back at once. Only what
//! came back counts, over the CPU time of the sending thread and of the core's softirq thread: other
//! work on the machine does not.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use router_tests::netns::Netns;
use viaduct::config::{Attach, Forwarding};
use viaduct::l4::next_hop::NextHop;

use super::gateway::{self, Gateway};
use super::may_match;
use super::packets::FLOOD;
use crate::harness::Harness;
use crate::report::Report;
use crate::stream::{Kind, Stream};

const ROUNDS: usize = 7;
/// Frames of one sample.
const FRAMES: u32 = 1 << 17;
/// The ends of the gateway's pair, and of that of the floors.
const NEAR: &str = "near";
const FAR: &str = "far";
const FLOOR_NEAR: &str = "floor-near";
const FLOOR_FAR: &str = "floor-far";
/// Does everything.
const CORE: usize = 0;
const MANY: u32 = 65_536;

/// Row, mode, kind of packet, IPv6, flows; none: each packet has a source of its own.
type Row = (&'static str, Forwarding, Kind, bool, Option<u32>);

const ROWS: [Row; 8] = [
    ("veth-ipip-1", Forwarding::Ipip, Kind::Ack, false, Some(1)),
    (
        "veth-ipip-64k",
        Forwarding::Ipip,
        Kind::Ack,
        false,
        Some(MANY),
    ),
    (
        "veth-ipip-udp-64k",
        Forwarding::Ipip,
        Kind::Udp,
        false,
        Some(MANY),
    ),
    (
        "veth-ipip-v6-64k",
        Forwarding::Ipip,
        Kind::Ack,
        true,
        Some(MANY),
    ),
    ("veth-ipip-flood", Forwarding::Ipip, Kind::Syn, false, None),
    ("veth-nat-1", Forwarding::Nat, Kind::Ack, false, Some(1)),
    (
        "veth-nat-64k",
        Forwarding::Nat,
        Kind::Ack,
        false,
        Some(MANY),
    ),
    ("veth-nat-flood", Forwarding::Nat, Kind::Syn, false, None),
];

pub(super) fn measure(report: &mut Report, prefix: &str) -> anyhow::Result<()> {
    if !may_match("veth", prefix) {
        return Ok(());
    }
    let netns = Netns::create(&format!("viaduct-{}-veth", std::process::id()))?;
    for (near, far) in [(NEAR, FAR), (FLOOR_NEAR, FLOOR_FAR)] {
        netns.ip(&[
            &format!("link add {near} type veth peer name {far}"),
            &format!("link set {near} up"),
            &format!("link set {far} up"),
        ])?;
    }
    netns.run(|| rows(report, prefix))
}

fn rows(report: &mut Report, prefix: &str) -> anyhow::Result<()> {
    let mut one = CpuSet::new();
    one.set(CORE)?;
    sched_setaffinity(Pid::from_raw(0), &one).context("stay on one core")?;
    let mut harness = Harness::load()?;
    harness.set_known()?;
    harness.drop_at(NEAR)?;
    harness.drop_at(FLOOR_NEAR)?;
    let hop = NextHop {
        ifindex: ifindex(FAR)?,
        ..gateway::loopback()
    };
    let mut gateway = Gateway::open(hop)?;
    gateway.datapath.attach(FAR, Attach::Native)?;
    for round in 1..=ROUNDS {
        eprintln!("l4: round {round} of {ROUNDS}, veth");
        for row in ROWS {
            if row.0.starts_with(prefix) {
                measure_row(report, &mut harness, &mut gateway, row)
                    .with_context(|| format!("row {}", row.0))?;
            }
        }
    }
    Ok(())
}

fn measure_row(
    report: &mut Report,
    harness: &mut Harness,
    gateway: &mut Gateway,
    (row, mode, kind, v6, flows): Row,
) -> anyhow::Result<()> {
    let stream = match flows {
        Some(count) => Stream::known(kind, v6, count)?,
        None => Stream::fresh(kind, v6)?,
    };
    gateway.serve(mode)?;
    let near = ifindex(FLOOR_NEAR)?;
    for who in ["drop", "tx"] {
        let sample = harness.floor_at(FLOOR_FAR, who, |harness| sample(harness, &stream, near))?;
        add(report, row, who, sample);
    }
    if flows.is_some() {
        for kind in [Kind::Syn, kind] {
            let opening = Stream::known(kind, v6, MANY)?;
            harness.run(&gateway.program, &opening, MANY, 0)?;
        }
    } else {
        harness.run(&gateway.program, &stream, FLOOD, 0)?;
    }
    let sample = sample(harness, &stream, ifindex(NEAR)?)?;
    add(report, row, "viaduct", sample);
    Ok(())
}

struct Sample {
    returned: u64,
    busy: Duration,
}

fn sample(harness: &mut Harness, stream: &Stream, near: u32) -> anyhow::Result<Sample> {
    let before = busy()?;
    let tx = harness.tx.try_clone()?;
    harness.send(Some(&tx), stream, FRAMES, near)?;
    Ok(Sample {
        busy: busy()? - before,
        returned: harness.received()?,
    })
}

fn add(report: &mut Report, row: &str, who: &'static str, sample: Sample) {
    let returned = sample.returned as f64;
    report.add(row, who, "mpps", returned / sample.busy.as_secs_f64() / 1e6);
    let percent = returned * 100.0 / f64::from(FRAMES);
    report.add(row, who, "returned_percent", percent);
}

/// CPU time of this thread and of the core's softirq thread, which goes on where this one stops.
fn busy() -> anyhow::Result<Duration> {
    let softirq = softirq_thread().context("find the softirq thread")?;
    let mut sum = Duration::ZERO;
    for path in [Path::new("/proc/thread-self"), &softirq] {
        let path = path.join("schedstat");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let nanoseconds = text.split(' ').next().and_then(|first| first.parse().ok());
        sum += Duration::from_nanos(nanoseconds.context("read CPU time")?);
    }
    Ok(sum)
}

fn softirq_thread() -> Option<PathBuf> {
    let name = format!("ksoftirqd/{CORE}\n");
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut paths = processes.map(|process| process.path());
    paths.find(|path| fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm == name))
}

fn ifindex(name: &str) -> anyhow::Result<u32> {
    nix::net::if_::if_nametoindex(name).with_context(|| format!("find {name}"))
}
