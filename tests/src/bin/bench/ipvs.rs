//! IPVS, the kernel's own balancer, beside the gateway: `cargo xtask bench ipvs`.
//!
//! First IPVS forwards real connections in the lab in each of its modes, so that what is measured is
//! known to work. Then both get the same stream of TCP segments of open flows, as if they came in by
//! the gateway's front interface, and send it out of another, where it is thrown away.
//!
//! Runs in the machine that xtask boots, whose clock counts the instructions of its one core, a
//! nanosecond each. A packet's nanoseconds are therefore instructions of everything from the frame in
//! the driver's hands to its end behind the second interface, without cache misses; what the
//! generator takes is measured alone and taken off.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use aya::Ebpf;
use aya::programs::{ProgramFd, XdpMode, loaded_programs};
use router_tests::app::VIP;
use router_tests::client;
use router_tests::lab::Lab;
use router_tests::netns::Netns;
use router_tests::process::{Process, wait_for};
use router_tests::site::Site;
use viaduct::config::{Forwarding, L4Limits};
use viaduct::l4::BENCH_PROGRAM;

use crate::harness::{self, Harness, KNOWN_FLOWS};
use crate::report::Report;
use crate::stream::{Kind, Stream, frame, headers_of};

const ROUNDS: usize = 3;
/// An agent that uses less than 2 % of this time is idle.
const IDLE: Duration = Duration::from_secs(1);
const PACKETS: u32 = 100_000;
const FLOWS: [(u32, &str); 3] = [(1, "1"), (1024, "1k"), (16_384, "16k")];
const CLIENT: Ipv4Addr = router_tests::lab::CLIENT;
/// Of the VIP and of every backend, since only nat could translate it.
const PORT: u16 = 9090;
const BACKENDS: u8 = 8;
/// The interface towards the backends of the stream, and its other end if it has one.
const OUT: &str = "out";
const SINK: &str = "sink";

/// A way of forwarding by the gateway's name for it, as IPVS and as the gateway call it.
struct Mode {
    name: &'static str,
    /// Option of ipvsadm(8).
    ipvs: &'static str,
    viaduct: Forwarding,
}

const MODES: [Mode; 3] = [
    Mode {
        name: "nat",
        ipvs: "--masquerading",
        viaduct: Forwarding::Nat,
    },
    Mode {
        name: "dsr",
        ipvs: "--gatewaying",
        viaduct: Forwarding::Dsr,
    },
    Mode {
        name: "ipip",
        ipvs: "--ipip",
        viaduct: Forwarding::Ipip,
    },
];

pub(crate) fn measure() -> anyhow::Result<Report> {
    run(Command::new("modprobe").args(["-a", "ip_vs", "ip_vs_rr", "ipip", "dummy"]))?;
    for mode in &MODES {
        forwards(mode).with_context(|| format!("IPVS in mode {}", mode.name))?;
        eprintln!(
            "bench: IPVS forwards real connections in mode {}",
            mode.name
        );
    }
    let mut bench = Bench {
        harness: Harness::load()?,
        report: Report::new("ipvs"),
    };
    let pass = bench.harness.pass.try_clone()?;
    let lab = Lab::new(1)?;
    out_by_dummy(&lab)?;
    bench.measure(&lab.gateway, ("routing", "kernel"), &pass, backend(1))?;
    drop(lab);
    for mode in &MODES {
        let lab = Lab::new(1)?;
        out_by_dummy(&lab)?;
        let backends: Vec<Ipv4Addr> = (1..=BACKENDS).map(backend).collect();
        serve_by_ipvs(&lab.gateway, mode, &backends)?;
        bench.measure(&lab.gateway, (mode.name, "ipvs"), &pass, VIP)?;
    }
    for mode in &MODES {
        let mut site = Site::new(1)?;
        let _sink = out_by_veth(&site.lab)?;
        serve_by_viaduct(&mut site, mode.viaduct)?;
        wait_until_idle(site.gateway())?;
        let gateway = &site.lab.gateway;
        bench.measure(gateway, (mode.name, "viaduct"), &attached(gateway)?, VIP)?;
    }
    Ok(bench.report)
}

/// Four connections from the client to a VIP of two backends, and bytes both ways.
fn forwards(mode: &Mode) -> anyhow::Result<()> {
    let lab = Lab::new(2)?;
    // What a backend sends itself has the VIP as its source and comes by the gateway.
    lab.gateway.sysctl("ipv4/conf/all/accept_local", "1")?;
    let mut servers = Vec::new();
    for (index, backend) in lab.backends.iter().enumerate() {
        if mode.name != "nat" {
            backend.sysctl("ipv4/conf/all/arp_ignore", "1")?;
            backend.sysctl("ipv4/conf/all/arp_announce", "2")?;
            backend.ip(&[&format!("address add {VIP}/32 dev lo"), "link set tunl0 up"])?;
        }
        let listener = backend.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))?;
        servers.push(thread::spawn(move || greet_two(&listener, index)));
    }
    let backends: Vec<Ipv4Addr> = (0..2).map(|index| lab.backend_address(index)).collect();
    serve_by_ipvs(&lab.gateway, mode, &backends)?;
    let mut names = lab.client.run(|| -> anyhow::Result<Vec<String>> {
        let exchange = |_| {
            let mut connection = client::tcp(SocketAddr::from((VIP, PORT)))?;
            let data = vec![7; 1 << 16];
            ensure!(connection.echo(&data)? == data, "the echo differs");
            Ok(connection.backend)
        };
        (0..4).map(exchange).collect()
    })?;
    names.sort();
    ensure!(
        names == ["b0", "b0", "b1", "b1"],
        "answers came from {names:?}"
    );
    for server in servers {
        server.join().expect("a server does not panic")?;
    }
    Ok(())
}

/// Takes two connections, one after the other: says its name, and says again what it hears.
fn greet_two(listener: &TcpListener, index: usize) -> anyhow::Result<()> {
    for _ in 0..2 {
        let (mut stream, _) = listener.accept()?;
        writeln!(stream, "b{index}")?;
        let mut bytes = [0; 4096];
        loop {
            match stream.read(&mut bytes)? {
                0 => break,
                count => stream.write_all(&bytes[..count])?,
            }
        }
    }
    Ok(())
}

fn serve_by_ipvs(gateway: &Netns, mode: &Mode, backends: &[Ipv4Addr]) -> anyhow::Result<()> {
    let service = format!("{VIP}:{PORT}");
    gateway.ip(&[&format!("address add {VIP}/32 dev lo")])?;
    let ipvsadm = || gateway.command("ipvsadm");
    run(ipvsadm().args([
        "--add-service",
        "--tcp-service",
        &service,
        "--scheduler",
        "rr",
    ]))?;
    for backend in backends {
        let server = format!("{backend}:{PORT}");
        run(ipvsadm()
            .args(["--add-server", "--tcp-service", &service])
            .args(["--real-server", &server, mode.ipvs]))?;
    }
    Ok(())
}

/// Starts the agent with the backends of the stream in a routes file.
fn serve_by_viaduct(site: &mut Site, forwarding: Forwarding) -> anyhow::Result<()> {
    let path = site.lab.folder().join("routes.toml");
    let mut routes = format!("[[route]]\nvips = [\"tcp/{VIP}:{PORT}\"]\n");
    for host in 1..=BACKENDS {
        routes += &format!(
            "[[route.backend]]\naddress = \"{}:{PORT}\"\n",
            backend(host)
        );
    }
    std::fs::write(&path, routes).context("write a routes file")?;
    site.start_gateway(|config| {
        config.nats.servers.clear();
        config.http.listen.clear();
        config.file.paths = vec![path];
        config.l4.forwarding = forwarding;
        config.l4.limits = L4Limits::default();
    })
}

/// Waits until the agent is done with what it does when it starts: it shares the core with the packets.
fn wait_until_idle(agent: &Process) -> anyhow::Result<()> {
    let mut before = (Instant::now(), agent.cpu_time()?);
    wait_for("the agent to be idle", || {
        if before.0.elapsed() < IDLE {
            return None;
        }
        let time = agent.cpu_time().ok()?;
        let used = time - before.1;
        before = (Instant::now(), time);
        (used < IDLE / 50).then_some(())
    })
}

/// Lets the stream out by a device whose driver throws everything away at once.
fn out_by_dummy(lab: &Lab) -> anyhow::Result<()> {
    lab.gateway
        .ip(&[&format!("link add {OUT} arp on type dummy")])?;
    connect(&lab.gateway)
}

/// Lets the stream out by a veth, since a dummy takes no redirected frames. Its other end throws
/// frames away by the returned program; what that takes counts as well.
fn out_by_veth(lab: &Lab) -> anyhow::Result<Ebpf> {
    let end = &lab.backends[0];
    let peer = end.name();
    lab.gateway.ip(&[&format!(
        "link add {OUT} type veth peer name {SINK} netns {peer}"
    )])?;
    end.ip(&[&format!("link set {SINK} up")])?;
    let mut sink = Ebpf::load(BENCH_PROGRAM).context("load the sink")?;
    let program = harness::program(&mut sink, "drop")?;
    program.load().context("load the sink")?;
    end.run(|| program.attach(SINK, XdpMode::Driver))?;
    connect(&lab.gateway)?;
    Ok(sink)
}

/// Makes [`OUT`] the way to the backends of the stream, all of whom are known there.
fn connect(gateway: &Netns) -> anyhow::Result<()> {
    gateway.ip(&[
        // As the frames of the harness have it.
        "link set front address 02:00:00:00:00:02",
        &format!("link set {OUT} up"),
        &format!("address add {}/24 dev {OUT}", backend(254)),
    ])?;
    for host in 1..=BACKENDS {
        let address = backend(host);
        gateway.ip(&[&format!(
            "neighbor add {address} lladdr 02:00:00:00:09:{host:02x} dev {OUT} nud permanent"
        )])?;
    }
    Ok(())
}

/// What makes the packets, and what was found out by them.
struct Bench {
    harness: Harness,
    report: Report,
}

impl Bench {
    /// Adds the figures of one contender: `row` and `who` of the report.
    fn measure(
        &mut self,
        gateway: &Netns,
        (row, who): (&str, &'static str),
        target: &ProgramFd,
        destination: Ipv4Addr,
    ) -> anyhow::Result<()> {
        for (count, name) in FLOWS {
            let row = format!("{row}-{name}");
            let opening = self.stream(Kind::Syn, count, destination)?;
            self.send(gateway, Some(target), &opening, count)
                .with_context(|| format!("open the flows of {row}"))?;
            let stream = self.stream(Kind::Ack, count, destination)?;
            for _ in 0..ROUNDS {
                let alone = self.send(gateway, None, &stream, PACKETS)?;
                let total = self
                    .send(gateway, Some(target), &stream, PACKETS)
                    .with_context(|| format!("row {row}"))?;
                let net = total.saturating_sub(alone).as_secs_f64() / f64::from(PACKETS);
                let report = &mut self.report;
                report.add(&row, who, "instructions_per_packet", net * 1e9);
                report.add(&row, who, "packets_per_cpu_s", 1.0 / net);
            }
        }
        Ok(())
    }

    /// Flows differ in the port alone, so that one checksum of the IP header fits all. Nobody on the
    /// way reads the checksum of TCP.
    fn stream(&mut self, kind: Kind, count: u32, destination: Ipv4Addr) -> anyhow::Result<Stream> {
        let frame = |number: u32| {
            let port = 1024 + u16::try_from(number).expect("fewer flows than ports");
            frame(kind, CLIENT.into(), destination.into(), port, PORT)
        };
        let headers = (0..count).map(|number| Ok(headers_of(&frame(number)?)));
        let headers: Vec<_> = headers.collect::<anyhow::Result<_>>()?;
        self.harness.set_others(&headers)?;
        Ok(Stream {
            frame: frame(0)?,
            v6: false,
            first: KNOWN_FLOWS,
            count,
            fresh: false,
        })
    }

    /// Sends `packets`, and returns how long it took until all had gone out; without a target they
    /// end in the generator.
    fn send(
        &mut self,
        gateway: &Netns,
        target: Option<&ProgramFd>,
        stream: &Stream,
        packets: u32,
    ) -> anyhow::Result<Duration> {
        let ifindex = link(gateway, "front")?["ifindex"].as_u64();
        let ifindex = u32::try_from(ifindex.context("front has no index")?)?;
        // One thread does all of it: between two the clock would go on to the next timer.
        gateway.run(|| {
            let before = sent()?;
            let started = Instant::now();
            self.harness.send(target, stream, packets, ifindex)?;
            if target.is_some() {
                wait_for("the stream to go out", || {
                    let count = sent().ok()? - before;
                    (count >= u64::from(packets)).then_some(())
                })
                .with_context(|| {
                    format!(
                        "{:?} of {packets} went out",
                        sent().map(|sent| sent - before)
                    )
                })?;
            }
            Ok(started.elapsed())
        })
    }
}

/// Packets that went out by [`OUT`] of the caller's namespace so far. Of a veth: what its other end
/// has dealt with.
fn sent() -> anyhow::Result<u64> {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let counters = table
        .lines()
        .find_map(|line| line.trim().strip_prefix(OUT)?.strip_prefix(':'));
    // Eight columns of what came in, then octets and packets of what went out.
    let packets = counters.and_then(|line| line.split_whitespace().nth(9)?.parse().ok());
    packets.with_context(|| format!("{OUT} has no counters"))
}

/// Backends of the stream, and the gateway's own address among them: nobody answers there.
fn backend(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 9, 0, host)
}

/// The program that the agent attached to the front interface.
fn attached(gateway: &Netns) -> anyhow::Result<ProgramFd> {
    let id = link(gateway, "front")?["xdp"]["prog"]["id"].as_u64();
    let id = id.context("no program is attached to front")?;
    let found = loaded_programs().find(|program| {
        program
            .as_ref()
            .is_ok_and(|program| u64::from(program.id()) == id)
    });
    Ok(found.context("the program is gone")??.fd()?)
}

/// What `ip` knows of an interface.
fn link(netns: &Netns, name: &str) -> anyhow::Result<serde_json::Value> {
    let text = run(netns
        .command("ip")
        .args(["-json", "-details", "link", "show", "dev", name]))?;
    let mut links: serde_json::Value = serde_json::from_str(&text).context("read ip's JSON")?;
    Ok(links[0].take())
}

fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .output()
        .with_context(|| format!("start {command:?}"))?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}", message.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
