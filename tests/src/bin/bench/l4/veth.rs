//! Millions of packets a second through a veth, with one core for all of it.
//!
//! ```text
//!  harness ──XDP_TX──▶ near ═══ veth ═══ far: program under test
//!                      drop ◀═══════════ XDP_TX
//! ```
//!
//! The kernel sends what the harness lays (BPF_F_TEST_XDP_LIVE_FRAMES, 64 frames at a time). Beside the
//! gateway two floors: `drop` ends every frame at the far end, `tx` sends it back at once. Only what
//! came back is counted.

use anyhow::{Context, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use router_tests::netns::Netns;
use viaduct::config::{Attach, Forwarding};
use viaduct::l4::next_hop::NextHop;

use super::harness::{Harness, KNOWN_FLOWS, Live};
use super::stream::{Kind, Stream};
use super::{gateway, may_match};
use crate::report::Report;

const ROUNDS: usize = 7;
/// Frames of one sample.
const FRAMES: u32 = 1 << 20;
const NEAR: &str = "near";
const FAR: &str = "far";
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
    netns.ip(&[
        "link set lo up",
        &format!("link add {NEAR} type veth peer name {FAR}"),
        &format!("link set {NEAR} up"),
        &format!("link set {FAR} up"),
    ])?;
    netns.run(|| rows(report, prefix))
}

fn rows(report: &mut Report, prefix: &str) -> anyhow::Result<()> {
    let mut one = CpuSet::new();
    one.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &one).context("stay on one core")?;
    let mut harness = Harness::load()?;
    harness.drop_at(NEAR)?;
    let near = ifindex(NEAR)?;
    for round in 1..=ROUNDS {
        eprintln!("l4: round {round} of {ROUNDS}, veth");
        for row in ROWS {
            if row.0.starts_with(prefix) {
                measure_row(report, &mut harness, near, row)
                    .with_context(|| format!("row {}", row.0))?;
            }
        }
    }
    Ok(())
}

fn measure_row(
    report: &mut Report,
    harness: &mut Harness,
    near: u32,
    (row, mode, kind, v6, flows): Row,
) -> anyhow::Result<()> {
    let stream = match flows {
        Some(count) => Stream::known(kind, v6, count)?,
        None => Stream::fresh(kind, v6)?,
    };
    for who in ["drop", "tx"] {
        let live = harness.floor_at(FAR, who, |harness| harness.send(&stream, FRAMES, near))?;
        add(report, row, who, live)?;
    }
    let hop = NextHop {
        ifindex: ifindex(FAR)?,
        ..gateway::loopback()
    };
    let mut gateway = gateway::serving(mode, hop)?;
    if flows.is_some() {
        let program = gateway.packet_program()?;
        for kind in [Kind::Syn, kind] {
            let opening = Stream::known(kind, v6, KNOWN_FLOWS.min(MANY))?;
            harness.run(&program, &opening, MANY, 0)?;
        }
    }
    gateway.attach(FAR, Attach::Native)?;
    let live = harness.send(&stream, FRAMES, near)?;
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
