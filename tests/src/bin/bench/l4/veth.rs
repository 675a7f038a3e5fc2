//! Millions of packets a second through a veth, with one core for all of it.
//!
//! ```text
//!  harness ──XDP_TX──▶ near ═══ veth ═══ far: program under test
//!                      drop ◀═══════════ XDP_TX
//! ```
//!
//! The gateway has one pair, the floors another. The kernel sends what the harness lays (BPF_F_TEST_XDP_LIVE_FRAMES, 64 frames at a time). Floors are
//! two: `drop` ends every frame at the far end, `tx` sends it back at once. Only what
//! came back is counted.

use anyhow::{Context, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use router_tests::netns::Netns;
use viaduct::config::{Attach, Forwarding};
use viaduct::l4::next_hop::NextHop;

use super::gateway::{self, Gateway};
use super::harness::{Harness, Live};
use super::may_match;
use super::stream::{Kind, Stream};
use crate::report::Report;

const ROUNDS: usize = 7;
/// Frames of one sample.
const FRAMES: u32 = 1 << 20;
/// The ends of the gateway's pair, and of that of the floors.
const NEAR: &str = "near";
const FAR: &str = "far";
const FLOOR_NEAR: &str = "floor-near";
const FLOOR_FAR: &str = "floor-far";
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
    one.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &one).context("stay on one core")?;
    let mut harness = Harness::load()?;
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
        let send = |harness: &mut Harness| harness.send(&stream, FRAMES, near);
        let live = harness.floor_at(FLOOR_FAR, who, send)?;
        add(report, row, who, live)?;
    }
    if flows.is_some() {
        for kind in [Kind::Syn, kind] {
            let opening = Stream::known(kind, v6, MANY)?;
            harness.run(&gateway.program, &opening, MANY, 0)?;
        }
    }
    let live = harness.send(&stream, FRAMES, ifindex(NEAR)?)?;
    add(report, row, "viaduct", live)
}

fn add(report: &mut Report, row: &str, who: &'static str, live: Live) -> anyhow::Result<()> {
    ensure!(
        live.frames > u64::from(FRAMES) / 2,
        "{who}: {} of {FRAMES} frames came back",
        live.frames
    );
    report.add(row, who, "mpps", live.mpps);
    let lost = u64::from(FRAMES).saturating_sub(live.frames);
    report.add(
        row,
        who,
        "lost_percent",
        lost as f64 * 100.0 / f64::from(FRAMES),
    );
    Ok(())
}

fn ifindex(name: &str) -> anyhow::Result<u32> {
    nix::net::if_::if_nametoindex(name).with_context(|| format!("find {name}"))
}
