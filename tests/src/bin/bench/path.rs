//! What applications see of layer 4 on devices of software: one TCP path through a gateway.
//!
//! Each contender has namespaces and veths of its own, made alike and left as the kernel makes them, with
//! checksum and segmentation offload:
//!
//! ```text
//!  client ───────────── front gateway back ───────────── backend
//!  198.51.100.7                                          10.0.0.11
//! ```
//!
//! The gateway is viaduct in `nat` mode, which puts its classifier on both devices, nftables with DNAT
//! and masquerade, or a plain router whose client dials the backend itself (`routed`).

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, ensure};
use router_tests::client;
use router_tests::netns::Netns;
use router_tests::process::{Process, wait_for};
use router_tests::site;
use tempfile::TempDir;
use viaduct::config::Config;

use crate::l7::{nginx_config, wrk};
use crate::report::Report;

const ROUNDS: usize = 7;
const BACKEND: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 11);
const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
const HTTP_PORT: u16 = 8080;
const IPERF_PORT: u16 = 5201;
/// Of one transfer; the first tenth is not counted.
const SECONDS: &str = "2";

pub(crate) fn measure() -> anyhow::Result<Report> {
    let routed = Site::new("routed", BACKEND)?;
    let nftables = Site::new("nftables", VIP)?;
    nftables.load_rules()?;
    let mut viaduct = Site::new("viaduct", VIP)?;
    viaduct.start_agent()?;
    let contenders = [&viaduct, &nftables, &routed];
    for site in contenders {
        site.wait_until_served()?;
    }

    let mut report = Report::new("path");
    for round in 0..ROUNDS {
        eprintln!("path: round {} of {ROUNDS}", round + 1);
        for turn in 0..contenders.len() {
            // Nobody is always the one that follows another.
            let site = contenders[(round + turn) % contenders.len()];
            let who = site.who;
            report.add("throughput", who, "gbit_per_s", site.throughput()?);
            for (row, metric, header) in [
                ("new-connections", "connections_per_s", "Connection: close"),
                ("keep-alive", "requests_per_s", "Connection: keep-alive"),
            ] {
                let load = wrk(&site.client, site.http(), "/", header)?;
                report.add(row, who, metric, load.requests_per_s);
                report.add(row, who, "p99_us", load.p99.as_secs_f64() * 1e6);
            }
        }
    }
    Ok(report)
}

/// A client, a gateway and a backend. Processes go before the namespaces they are in.
struct Site {
    who: &'static str,
    /// What the client dials.
    dialed: Ipv4Addr,
    agent: Option<Agent>,
    _servers: Vec<Process>,
    client: Netns,
    gateway: Netns,
    backend: Netns,
    folder: TempDir,
}

impl Site {
    fn new(who: &'static str, dialed: Ipv4Addr) -> anyhow::Result<Site> {
        let name = format!("viaduct-{}-{who}", std::process::id());
        let create = |role: &str| Netns::create(&format!("{name}-{role}"));
        let mut site = Site {
            who,
            dialed,
            agent: None,
            _servers: Vec::new(),
            client: create("client")?,
            gateway: create("gateway")?,
            backend: create("backend")?,
            folder: TempDir::new()?,
        };
        site.connect()?;
        site._servers = site.start_servers()?;
        Ok(site)
    }

    fn connect(&self) -> anyhow::Result<()> {
        let gateway = self.gateway.name();
        for (end, near, address, router) in [
            (&self.client, "front", "198.51.100.7", "198.51.100.1"),
            (&self.backend, "back", "10.0.0.11", "10.0.0.1"),
        ] {
            end.ip(&[
                "link set lo up",
                &format!("link add eth0 type veth peer name {near} netns {gateway}"),
                "link set eth0 up",
                &format!("address add {address}/24 dev eth0"),
            ])?;
            self.gateway.ip(&[
                "link set lo up",
                &format!("link set {near} up"),
                &format!("address add {router}/24 dev {near}"),
            ])?;
            end.ip(&[&format!("route add default via {router}")])?;
        }
        self.gateway.sysctl("ipv4/ip_forward", "1")
    }

    fn start_servers(&self) -> anyhow::Result<Vec<Process>> {
        let folder = self.folder.path();
        let server = format!("listen {HTTP_PORT} backlog=4096; return 200 'hello\\n';");
        let config = folder.join("nginx.conf");
        fs::write(&config, nginx_config(folder, "backend", "", &server))?;
        let mut nginx = self.backend.command("nginx");
        nginx.arg("-c").arg(config);
        let mut iperf = self.backend.command("iperf3");
        iperf.args(["--server", "--port", &IPERF_PORT.to_string()]);
        Ok(vec![
            Process::start("nginx", nginx, folder)?,
            Process::start("iperf3", iperf, folder)?,
        ])
    }

    fn load_rules(&self) -> anyhow::Result<()> {
        let rules = format!(
            "table ip balance {{
                 chain prerouting {{
                     type nat hook prerouting priority dstnat;
                     ip daddr {VIP} tcp dport {{ {HTTP_PORT}, {IPERF_PORT} }} dnat to {BACKEND}
                 }}
                 chain postrouting {{
                     type nat hook postrouting priority srcnat;
                     ip daddr {BACKEND} masquerade
                 }}
             }}\n"
        );
        let path = self.folder.path().join("rules.nft");
        fs::write(&path, rules)?;
        let status = self.gateway.command("nft").arg("-f").arg(path).status();
        ensure!(status.context("start nft")?.success(), "nft failed");
        Ok(())
    }

    fn start_agent(&mut self) -> anyhow::Result<()> {
        let routes = self.folder.path().join("routes.toml");
        let route = |port| {
            format!(
                "[[route]]\nvips = [\"tcp/{VIP}:{port}\"]\n\
                 [[route.backend]]\naddress = \"{BACKEND}:{port}\"\n"
            )
        };
        fs::write(&routes, route(HTTP_PORT) + &route(IPERF_PORT))?;
        let mut config = Config::default();
        config.file.paths = vec![routes];
        config.nats.servers.clear();
        config.http.listen.clear();
        config.l4.interfaces = ["front", "back"].map(str::to_owned).into();
        config.l4.vip_ranges = vec![format!("{VIP}/32").parse()?];
        config.l4.pin_path = format!("/sys/fs/bpf/viaduct-bench-{}", std::process::id()).into();
        let path = self.folder.path().join("viaduct.toml");
        fs::write(&path, toml::to_string(&config)?)?;
        let mut command = self.gateway.command(site::agent()?);
        command.args(["run", "--config"]).arg(&path);
        let process = Process::start("viaduct", command, self.folder.path())?;
        self.agent = Some(Agent {
            process,
            config: path,
        });
        Ok(())
    }

    fn http(&self) -> SocketAddr {
        SocketAddr::from((self.dialed, HTTP_PORT))
    }

    fn wait_until_served(&self) -> anyhow::Result<()> {
        let get = || client::get(self.http(), "bench.example.com", "/");
        wait_for(self.who, || {
            let response = self.client.run(get).ok()?;
            (response.status == 200).then_some(())
        })
    }

    /// Gigabits of payload a second from client to backend, as the backend counted.
    fn throughput(&self) -> anyhow::Result<f64> {
        let mut iperf = self.client.command("iperf3");
        iperf.args(["--client", &self.dialed.to_string()]);
        iperf.args(["--port", &IPERF_PORT.to_string()]);
        iperf.args(["--time", SECONDS, "--omit", "0.2", "--json"]);
        let output = iperf.output().context("start iperf3")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "iperf3, {}: {text}", self.who);
        let json: serde_json::Value = serde_json::from_str(&text).context("read iperf3")?;
        let bits = json["end"]["sum_received"]["bits_per_second"].as_f64();
        Ok(bits.context("iperf3 names no rate")? / 1e9)
    }
}

/// The running gateway. What it pinned goes with it.
struct Agent {
    process: Process,
    config: PathBuf,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.process.kill();
        let detach = site::agent().and_then(|agent| {
            let mut command = std::process::Command::new(agent);
            command.args(["detach", "--config"]).arg(&self.config);
            Ok(command.output()?.status)
        });
        if !detach.is_ok_and(|status| status.success()) {
            eprintln!("path: the pinned programs could not be removed");
        }
    }
}
