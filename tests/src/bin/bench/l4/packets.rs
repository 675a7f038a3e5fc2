//! Nanoseconds of one core a packet, without drivers and wires.
//!
//! The harness lays each packet's headers and tail-calls the program under test. What that costs is
//! measured right before with a program that passes at once (`empty`) and, where packets leave longer
//! than they came, with one that only makes room in front (`grow`): the harness takes the room off
//! again by the same helper, so half of what `grow` costs more is the harness's.
//!
//! net = gross - empty - (grow - empty) / 2
//!
//! Every mode begins with an empty flow table, in every round.

use anyhow::{Context, bail, ensure};
use router_common::Verdict;
use viaduct::config::Forwarding;

use super::gateway::{self, Gateway};
use super::may_match;
use crate::harness::{Harness, KNOWN_FLOWS};
use crate::report::Report;
use crate::stream::{self, Headers, Kind, PORT, Stream};

const ROUNDS: usize = 7;
/// Packets of one sample.
const RUNS: u32 = 100_000;
/// More SYNs than the flow table has places.
pub(super) const FLOOD: u32 = 1_200_000;
/// Share of a row's packets that must meet the verdict it is about: some of half a million flows find
/// their bucket full.
const EXPECTED_SHARE: f64 = 0.97;

const MODES: [Forwarding; 6] = [
    Forwarding::Nat,
    Forwarding::Dnat,
    Forwarding::Dsr,
    Forwarding::Ipip,
    Forwarding::Gue,
    Forwarding::L7,
];
const COUNTS: [(u32, &str); 4] = [
    (1, "1"),
    (1024, "1k"),
    (65_536, "64k"),
    (KNOWN_FLOWS, "512k"),
];

pub(super) fn measure(report: &mut Report, prefix: &str) -> anyhow::Result<()> {
    let modes = MODES.map(|mode| (mode, name(mode)));
    let wanted = |group: &str| may_match(group, prefix);
    if !modes.iter().any(|(_, name)| wanted(name)) && !wanted(ELSEWHERE) {
        return Ok(());
    }
    let mut harness = Harness::load()?;
    harness.set_known()?;
    let mut gateway = Gateway::open(gateway::loopback())?;
    for round in 1..=ROUNDS {
        for (mode, name) in modes {
            if !(wanted(name) || mode == Forwarding::Dsr && wanted(ELSEWHERE)) {
                continue;
            }
            eprintln!("l4: round {round} of {ROUNDS}, {name}");
            let mut bench = Bench {
                report: &mut *report,
                harness: &mut harness,
                gateway: &mut gateway,
                prefix,
                mode,
                name,
            };
            bench.rows()?;
        }
    }
    Ok(())
}

/// Row of packets that are for nobody here.
const ELSEWHERE: &str = "not-for-a-vip";

/// The rows of one mode in one round.
struct Bench<'a> {
    report: &'a mut Report,
    harness: &'a mut Harness,
    gateway: &'a mut Gateway,
    prefix: &'a str,
    mode: Forwarding,
    name: &'static str,
}

impl Bench<'_> {
    fn rows(&mut self) -> anyhow::Result<()> {
        if self.mode == Forwarding::L7 {
            return self.group(&["tcp4", "tcp6"], Self::handed_up);
        }
        if self.mode == Forwarding::Dsr {
            self.group_named(ELSEWHERE, Self::elsewhere)?;
        }
        self.group(
            &["tcp4-1", "tcp4-64k", "tcp4-512k", "reply"],
            Self::known_v4,
        )?;
        self.group(&["tcp6-1", "tcp6-64k", "tcp6-512k"], Self::known_v6)?;
        self.group(
            &[
                "udp4",
                "tcp4-new",
                "tcp6-new",
                "tcp4-unknown",
                "tcp4-flood",
                "echo",
            ],
            Self::newcomers,
        )
    }

    /// Runs rows that share tables, if one of them may be wanted.
    fn group(
        &mut self,
        names: &[&str],
        rows: fn(&mut Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let names = names.iter().map(|row| format!("{}-{row}", self.name));
        if names.into_iter().any(|name| may_match(&name, self.prefix)) {
            self.gateway.serve(self.mode)?;
            rows(self)?;
        }
        Ok(())
    }

    fn group_named(
        &mut self,
        name: &str,
        rows: fn(&mut Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        if may_match(name, self.prefix) {
            self.gateway.serve(self.mode)?;
            rows(self)?;
        }
        Ok(())
    }

    fn known_v4(&mut self) -> anyhow::Result<()> {
        self.open(false)?;
        for (count, number) in COUNTS {
            let stream = Stream::known(Kind::Ack, false, count)?;
            self.row(&format!("tcp4-{number}"), &stream, Verdict::Forwarded)?;
        }
        if self.translates() && may_match(&format!("{}-reply", self.name), self.prefix) {
            self.harness.set_others(&answers(self.gateway)?)?;
            for (count, number) in [COUNTS[0], COUNTS[2]] {
                let stream = Stream {
                    first: KNOWN_FLOWS,
                    ..Stream::known(Kind::Ack, false, count)?
                };
                self.row(&format!("reply-{number}"), &stream, Verdict::Replied)?;
            }
        }
        Ok(())
    }

    fn known_v6(&mut self) -> anyhow::Result<()> {
        self.open(true)?;
        for (count, number) in [COUNTS[0], COUNTS[2], COUNTS[3]] {
            let stream = Stream::known(Kind::Ack, true, count)?;
            self.row(&format!("tcp6-{number}"), &stream, Verdict::Forwarded)?;
        }
        Ok(())
    }

    fn newcomers(&mut self) -> anyhow::Result<()> {
        for (count, number) in [COUNTS[0], COUNTS[2]] {
            let stream = Stream::known(Kind::Udp, false, count)?;
            self.harness.run(&self.gateway.program, &stream, count, 0)?;
            self.row(&format!("udp4-{number}"), &stream, Verdict::Forwarded)?;
        }
        let syn = Stream::fresh(Kind::Syn, false)?;
        self.row("tcp4-new", &syn, Verdict::NewFlow)?;
        let syn_v6 = Stream::fresh(Kind::Syn, true)?;
        self.row("tcp6-new", &syn_v6, Verdict::NewFlow)?;
        let unknown = if self.translates() {
            Verdict::UnknownFlow
        } else {
            Verdict::Forwarded
        };
        let ack = Stream::fresh(Kind::Ack, false)?;
        self.row("tcp4-unknown", &ack, unknown)?;
        let echo = self.other(Kind::Echo, stream::VIP_V4)?;
        self.row("echo", &echo, Verdict::EchoAnswered)?;
        if self.wanted("tcp4-flood") {
            self.harness.run(&self.gateway.program, &syn, FLOOD, 0)?;
            self.row("tcp4-flood", &syn, Verdict::NewFlow)?;
        }
        Ok(())
    }

    fn handed_up(&mut self) -> anyhow::Result<()> {
        for (count, number) in COUNTS {
            let stream = Stream::known(Kind::Ack, false, count)?;
            self.row(&format!("tcp4-{number}"), &stream, Verdict::HandedUp)?;
        }
        let stream = Stream::known(Kind::Ack, true, COUNTS[2].0)?;
        self.row("tcp6-64k", &stream, Verdict::HandedUp)?;
        let syn = Stream::fresh(Kind::Syn, false)?;
        self.row("tcp4-new", &syn, Verdict::HandedUp)
    }

    fn elsewhere(&mut self) -> anyhow::Result<()> {
        let stream = self.other(Kind::Ack, [203, 0, 113, 9].into())?;
        self.sample(ELSEWHERE, &stream, Verdict::NotForUs)
    }

    /// One packet that is none of a known flow.
    fn other(&mut self, kind: Kind, to: std::net::Ipv4Addr) -> anyhow::Result<Stream> {
        let frame = stream::frame(kind, stream::client(0, false), to.into(), 40_000, PORT)?;
        self.harness.set_others(&[stream::headers_of(&frame)])?;
        Ok(Stream {
            frame,
            first: KNOWN_FLOWS,
            ..Stream::known(kind, false, 1)?
        })
    }

    /// Opens all known flows, few at a time: half-open ones make room for others in a full bucket.
    fn open(&mut self, v6: bool) -> anyhow::Result<()> {
        const SHARE: u32 = 65_536;
        for first in (0..KNOWN_FLOWS).step_by(SHARE as usize) {
            for kind in [Kind::Syn, Kind::Ack] {
                let stream = Stream {
                    first,
                    ..Stream::known(kind, v6, SHARE)?
                };
                self.harness.run(&self.gateway.program, &stream, SHARE, 0)?;
            }
        }
        Ok(())
    }

    fn translates(&self) -> bool {
        matches!(self.mode, Forwarding::Nat | Forwarding::Dnat)
    }

    fn wanted(&self, row: &str) -> bool {
        format!("{}-{row}", self.name).starts_with(self.prefix)
    }

    fn row(&mut self, row: &str, stream: &Stream, verdict: Verdict) -> anyhow::Result<()> {
        if !self.wanted(row) {
            return Ok(());
        }
        self.sample(&format!("{}-{row}", self.name), stream, verdict)
    }

    /// One round's samples of a row.
    fn sample(&mut self, row: &str, stream: &Stream, verdict: Verdict) -> anyhow::Result<()> {
        const METRIC: &str = "ns_per_packet";
        let [pass, grow] = [&self.harness.pass, &self.harness.grow].map(|fd| fd.try_clone());
        let empty = self.harness.run(&pass?, stream, RUNS, 0)?;
        self.report.add(row, "empty", METRIC, empty);
        let mut harness = empty;
        let growth = self.growth(stream.v6);
        if growth > 0 && !matches!(verdict, Verdict::EchoAnswered) {
            let grow = self.harness.run(&grow?, stream, RUNS, growth)?;
            self.report.add(row, "grow", METRIC, grow);
            harness += (grow - empty) / 2.0;
        }
        let before = self.gateway.counters.verdicts()?;
        let gross = self.harness.run(&self.gateway.program, stream, RUNS, 0)?;
        let after = self.gateway.counters.verdicts()?;
        expect(verdict, &before, &after).with_context(|| format!("row {row}"))?;
        self.report.add(row, "viaduct", METRIC, gross);
        self.report
            .add(row, "viaduct", "net_ns_per_packet", gross - harness);
        Ok(())
    }

    /// Octets of the outer headers.
    fn growth(&self, v6: bool) -> u32 {
        let ip = if v6 { 40 } else { 20 };
        match self.mode {
            Forwarding::Ipip => ip,
            Forwarding::Gue => ip + 8,
            Forwarding::Nat | Forwarding::Dnat | Forwarding::Dsr | Forwarding::L7 => 0,
        }
    }
}

/// The answers of the backends to the first 65,536 flows.
fn answers(gateway: &mut Gateway) -> anyhow::Result<Vec<Headers>> {
    let mut answers = Vec::with_capacity(COUNTS[2].0 as usize);
    for number in 0..COUNTS[2].0 {
        let run = gateway
            .datapath
            .run(&Stream::known_frame(Kind::Ack, number)?)?;
        answers.push(stream::answer_to(&run.frame));
    }
    Ok(answers)
}

fn expect(
    verdict: Verdict,
    before: &[(Verdict, u64)],
    after: &[(Verdict, u64)],
) -> anyhow::Result<()> {
    let counts = before.iter().zip(after);
    let counts: Vec<(Verdict, u64)> = counts
        .map(|((verdict, before), (_, after))| (*verdict, after - before))
        .filter(|(_, count)| *count > 0)
        .collect();
    let Some((_, count)) = counts.iter().find(|(counted, _)| *counted == verdict) else {
        bail!("no packet was {}: {counts:?}", verdict.name());
    };
    ensure!(
        *count as f64 >= f64::from(RUNS) * EXPECTED_SHARE,
        "few packets were {}: {counts:?}",
        verdict.name()
    );
    Ok(())
}

fn name(mode: Forwarding) -> &'static str {
    match mode {
        Forwarding::Nat => "nat",
        Forwarding::Dnat => "dnat",
        Forwarding::Dsr => "dsr",
        Forwarding::Ipip => "ipip",
        Forwarding::Gue => "gue",
        Forwarding::L7 => "l7",
    }
}
