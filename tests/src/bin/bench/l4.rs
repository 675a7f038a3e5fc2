//! The XDP program by BPF_PROG_TEST_RUN: nanoseconds of one core a packet, without drivers and wires.
//!
//! Each figure is the kernel's own mean over [`RUNS`] packets and contains the harness that lays every
//! packet's headers; `empty` is the same with a program that passes at once, so the difference is
//! what the gateway costs.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use aya::Ebpf;
use aya::maps::{Array, MapData, ProgramArray};
use aya::programs::{ProgramFd, TestRun, TestRunAttrs, TestRunOptions, Xdp};
use etherparse::PacketBuilder;
use viaduct::config::{FlowTimeouts, L4Config, L4Limits, PortRange};
use viaduct::l4::datapath::{Datapath, Options};
use viaduct::l4::next_hop::NextHop;
use viaduct::l4::plan::{Planner, World};
use viaduct::l4::policy::Policies;
use viaduct::l4::{BENCH_PROGRAM, PASS_PROGRAM};
use viaduct::route::{Backend, Origin, Pool, Proto, Vip};

use crate::report::Report;

const ROUNDS: usize = 7;
const RUNS: u32 = 200_000;
/// Addresses and ports end here in a frame without options.
const HEADERS_LEN: usize = 54;
/// Frames at once of those that really go somewhere, as a driver hands over in one poll.
const BATCH: u32 = 64;
const BACKENDS: u8 = 8;
const VIP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 10), 9090);
/// Kernel: include/uapi/linux/bpf.h, `enum xdp_action`.
const PASS: u32 = 2;
const TX: u32 = 3;
const REDIRECT: u32 = 4;

pub(crate) fn measure() -> anyhow::Result<Report> {
    let mut report = Report::new("l4");
    let mut harness = Harness::load()?;
    for _ in 0..ROUNDS {
        let mut gateway = gateway()?;
        let target = gateway.packet_program()?;
        let mut row = |row: &str, flows: &[Flow], fresh: bool, action: u32| -> anyhow::Result<()> {
            harness.lay(flows, fresh)?;
            report.add(row, "empty", "ns_per_packet", harness.run_empty()?);
            harness.lay(flows, fresh)?;
            let sample = harness
                .run(&target, action)
                .with_context(|| format!("row {row}"))?;
            report.add(row, "viaduct", "ns_per_packet", sample);
            Ok(())
        };
        for (count, name) in [(1, "1"), (1024, "1k"), (65_536, "64k")] {
            let requests: Vec<Flow> = (0..count).map(Flow::request).collect();
            let answers = open(&mut gateway, &requests)?;
            row(&format!("tcp-{name}"), &requests, false, REDIRECT)?;
            row(&format!("tcp-{name}-reply"), &answers, false, TX)?;
        }
        row(
            "tcp-new-flow",
            &[Flow {
                flags: SYN,
                ..Flow::request(0)
            }],
            true,
            REDIRECT,
        )?;
        let elsewhere = Flow {
            destination: Ipv4Addr::new(203, 0, 113, 9),
            ..Flow::request(0)
        };
        row("not-for-a-vip", &[elsewhere], false, PASS)?;
    }
    Ok(report)
}

pub(crate) const SYN: u8 = 0x02;
pub(crate) const ACK: u8 = 0x10;

/// The addresses of one flow's packets, in one direction.
#[derive(Clone, Copy)]
pub(crate) struct Flow {
    pub(crate) source: Ipv4Addr,
    pub(crate) destination: Ipv4Addr,
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
    pub(crate) flags: u8,
}

impl Flow {
    fn request(number: u32) -> Flow {
        let [_, a, b, c] = number.to_be_bytes();
        Flow {
            source: Ipv4Addr::new(198, 18 | a, b, c),
            destination: *VIP.ip(),
            source_port: 40_000 + (number % 7919) as u16,
            destination_port: VIP.port(),
            flags: ACK,
        }
    }

    fn frame(&self) -> anyhow::Result<Vec<u8>> {
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
            .ipv4(self.source.octets(), self.destination.octets(), 64)
            .tcp(self.source_port, self.destination_port, 1, 64_240);
        let builder = if self.flags == SYN {
            builder.syn()
        } else {
            builder.ack(1)
        };
        let mut frame = Vec::new();
        builder.write(&mut frame, &[0; 10])?;
        Ok(frame)
    }

    fn words(&self) -> [u32; 3] {
        let [a, b] = self.source_port.to_be_bytes();
        let [c, d] = self.destination_port.to_be_bytes();
        [
            u32::from_ne_bytes(self.source.octets()),
            u32::from_ne_bytes(self.destination.octets()),
            u32::from_ne_bytes([a, b, c, d]),
        ]
    }
}

/// A VIP with some backends, and room for the flows of all rows.
fn gateway() -> anyhow::Result<Datapath> {
    let limits = L4Limits {
        vips: 4,
        backends: 64,
        flows: 1 << 20,
    };
    let (vips, backends) = (limits.vips, limits.backends);
    let mut gateway = Datapath::open(&Options {
        limits,
        timeouts: FlowTimeouts::default(),
        nat_ports: PortRange {
            first: 1024,
            last: 65535,
        },
        gue_port: 6080,
        pin_path: None,
    })?;
    let mut planner = Planner::new(vips, backends, *gateway.hash_keys(), gateway.vip_mask());
    let address = |host: u8| IpAddr::from([10, 0, 0, host]);
    let hop = NextHop {
        ifindex: u32::from(u16::MAX),
        source_mac: [2, 0, 0, 0, 0, 3],
        destination_mac: [2, 0, 0, 0, 0, 4],
        source: address(254),
        mtu: 1500,
        vlan: 0,
        on_link: true,
    };
    let backend = |host: u8| Arc::new(Backend::new((address(host), 8080).into(), Origin::Nats));
    let pool = Pool {
        backends: (1..=BACKENDS).map(backend).collect(),
        balance: None,
        route_service_url: None,
    };
    let next_hops: HashMap<IpAddr, NextHop> =
        (1..=BACKENDS).map(|host| (address(host), hop)).collect();
    let world = World {
        now: Instant::now(),
        policies: &Policies::new(&L4Config::default()),
        timeouts: &FlowTimeouts::default(),
        ticks_per_second: gateway.ticks_per_second(),
        next_hops: &next_hops,
        unhealthy: &Default::default(),
        panic_threshold: 0,
        draining: &Default::default(),
    };
    let vip = Vip {
        proto: Proto::Tcp,
        address: IpAddr::V4(*VIP.ip()),
        ports: PortRange {
            first: VIP.port(),
            last: VIP.port(),
        },
    };
    for op in planner.plan(vip, Some(&pool), &world).ops {
        gateway.apply(&op)?;
    }
    Ok(gateway)
}

/// Opens the flows by a SYN and an ACK each, and returns their answers.
fn open(gateway: &mut Datapath, requests: &[Flow]) -> anyhow::Result<Vec<Flow>> {
    let mut answers = Vec::with_capacity(requests.len());
    for request in requests {
        gateway.run(
            &Flow {
                flags: SYN,
                ..*request
            }
            .frame()?,
        )?;
        let run = gateway.run(&request.frame()?)?;
        if run.action != REDIRECT {
            let verdicts = gateway.counters().verdicts()?;
            let counted = verdicts.iter().filter(|(_, count)| *count > 0);
            bail!(
                "a flow could not be opened: {:?}",
                counted.collect::<Vec<_>>()
            );
        }
        let address = |at: usize| {
            Ipv4Addr::new(
                run.frame[at],
                run.frame[at + 1],
                run.frame[at + 2],
                run.frame[at + 3],
            )
        };
        let port = |at: usize| u16::from_be_bytes([run.frame[at], run.frame[at + 1]]);
        answers.push(Flow {
            source: address(30),
            destination: address(26),
            source_port: port(36),
            destination_port: port(34),
            flags: ACK,
        });
    }
    Ok(answers)
}

/// The harness program and its maps.
pub(crate) struct Harness {
    ebpf: Ebpf,
    frame: Array<MapData, [u16; HEADERS_LEN / 2]>,
    flows: Array<MapData, [u32; 3]>,
    runs: Array<MapData, [u32; 3]>,
    target: ProgramArray<MapData>,
    /// Passes every packet.
    pub(crate) empty: ProgramFd,
    /// Keeps `empty` loaded.
    _pass: Ebpf,
}

impl Harness {
    pub(crate) fn load() -> anyhow::Result<Harness> {
        ensure!(
            !BENCH_PROGRAM.is_empty(),
            "built without the BPF programs: run `cargo xtask setup`"
        );
        let mut ebpf = Ebpf::load(BENCH_PROGRAM).context("load the harness")?;
        program(&mut ebpf, "bench")?.load()?;
        let mut pass = Ebpf::load(PASS_PROGRAM).context("load the pass program")?;
        let empty = program(&mut pass, "pass")?;
        empty.load()?;
        let empty = empty.fd()?.try_clone()?;
        let mut take = |name: &str| {
            ebpf.take_map(name)
                .with_context(|| format!("no map {name}"))
        };
        Ok(Harness {
            frame: Array::try_from(take("FRAME")?)?,
            flows: Array::try_from(take("FLOW_HEADERS")?)?,
            runs: Array::try_from(take("RUNS")?)?,
            target: ProgramArray::try_from(take("TARGET")?)?,
            empty,
            ebpf,
            _pass: pass,
        })
    }

    /// Prepares runs over `flows`, a power of two of them; `fresh` gives every run a source of its own.
    pub(crate) fn lay(&mut self, flows: &[Flow], fresh: bool) -> anyhow::Result<()> {
        let frame = flows[0].frame()?;
        let mut halfwords = [0; HEADERS_LEN / 2];
        for (halfword, octets) in halfwords.iter_mut().zip(frame.chunks_exact(2)) {
            *halfword = u16::from_ne_bytes([octets[0], octets[1]]);
        }
        self.frame.set(0, halfwords, 0)?;
        for (index, flow) in flows.iter().enumerate() {
            self.flows.set(index as u32, flow.words(), 0)?;
        }
        self.runs
            .set(0, [0, flows.len() as u32 - 1, u32::from(fresh)], 0)?;
        Ok(())
    }

    /// Sends `packets` through `target` as if they had come in by the interface `ifindex` of the
    /// caller's namespace; without a target they are dropped. What becomes of them happens: the
    /// kernel's stack gets what is passed, an interface what is redirected to it.
    pub(crate) fn send(
        &mut self,
        target: Option<&ProgramFd>,
        ifindex: u32,
        packets: u32,
    ) -> anyhow::Result<()> {
        match target {
            Some(target) => self.target.set(0, target, 0)?,
            None => self.target.clear_index(&0)?,
        }
        let frame = [0; HEADERS_LEN + 10];
        // Kernel: include/uapi/linux/bpf.h, `struct xdp_md`.
        let context = [0, frame.len() as u32, 0, ifindex, 0, 0].map(u32::to_ne_bytes);
        program(&mut self.ebpf, "bench")?.test_run(TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(context.as_flattened()),
            repeat: packets,
            attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
            ..TestRunOptions::default()
        })?;
        Ok(())
    }

    fn run_empty(&mut self) -> anyhow::Result<f64> {
        let empty = self.empty.try_clone()?;
        self.run(&empty, PASS)
    }

    fn run(&mut self, target: &ProgramFd, action: u32) -> anyhow::Result<f64> {
        self.target.set(0, target, 0)?;
        let frame = [0; HEADERS_LEN + 10];
        let result = program(&mut self.ebpf, "bench")?.test_run(TestRunOptions {
            data_in: Some(&frame),
            repeat: RUNS,
            ..TestRunOptions::default()
        })?;
        ensure!(
            result.return_value == action,
            "the last packet met XDP action {}",
            result.return_value
        );
        Ok(result.duration.as_nanos() as f64)
    }
}

pub(crate) fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut Xdp> {
    Ok(ebpf
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?
        .try_into()?)
}
