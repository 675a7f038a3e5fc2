//! A whole site: the lab's network with a NATS server, the agent and applications in it.
//!
//! A site starts empty; whoever builds one starts the parts in the order it is about.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use viaduct::config::{Attach, Config, LocalClients};

use crate::app::{App, HOST, Presence, VIP, VIP_ECHO_PORT};
use crate::client::{self, Response};
use crate::lab::{FRONT, INTERFACES, Lab, VIP_RANGE, VIP_RANGE_V6};
use crate::nats;
use crate::process::{Process, wait_for};

/// Where the gateway serves HTTP to clients.
pub const PROXY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(FRONT), 80);
/// The virtual address of the echo service, TCP and UDP.
pub const ECHO_VIP: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(VIP), VIP_ECHO_PORT);
/// The gateway's admin API, inside its namespace.
pub const ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9901);

/// Something a client does once, and the name of the instance that answered.
pub type Exchange = fn() -> anyhow::Result<String>;

/// How many exchanges each backend got, by its name.
pub type Tally = BTreeMap<String, usize>;

/// Fields drop in this order: who talks before who is talked to, the network last.
pub struct Site {
    apps: Vec<Option<App>>,
    pub gateway: Option<Process>,
    pub nats: Option<Process>,
    pub lab: Lab,
}

impl Site {
    /// The network alone.
    pub fn new(backends: usize) -> anyhow::Result<Site> {
        let lab = Lab::new(backends)?;
        Ok(Site {
            apps: (0..backends).map(|_| None).collect(),
            gateway: None,
            nats: None,
            lab,
        })
    }

    /// Everything running, every instance registered and served by both layers.
    pub fn running(backends: usize) -> anyhow::Result<Site> {
        Site::running_with(backends, |_| ())
    }

    /// The same with a changed configuration.
    pub fn running_with(backends: usize, change: impl FnOnce(&mut Config)) -> anyhow::Result<Site> {
        let mut site = Site::new(backends)?;
        site.start_nats()?;
        site.start_gateway(change)?;
        for index in 0..backends {
            site.start_app(index)?.set_presence(Presence::Registered);
        }
        site.wait_until_served(backends)?;
        Ok(site)
    }

    pub fn start_nats(&mut self) -> anyhow::Result<()> {
        self.nats = Some(nats::start_server(&self.lab)?);
        Ok(())
    }

    /// Starts the agent with the lab's configuration, changed by `change`, and waits until it is
    /// ready.
    pub fn start_gateway(&mut self, change: impl FnOnce(&mut Config)) -> anyhow::Result<()> {
        self.spawn_gateway(change)?;
        self.wait_until("/readyz")
    }

    /// The same without waiting.
    pub fn spawn_gateway(&mut self, change: impl FnOnce(&mut Config)) -> anyhow::Result<()> {
        self.write_config(change)?;
        let mut command = self.viaduct()?;
        command.args(["run", "--config"]).arg(self.config_path());
        self.gateway = Some(Process::start("viaduct", command, self.lab.folder())?);
        Ok(())
    }

    /// Writes the lab's configuration, changed by `change`, for a gateway that starts or reloads.
    pub fn write_config(&self, change: impl FnOnce(&mut Config)) -> anyhow::Result<()> {
        let mut config = self.config();
        change(&mut config);
        let path = self.config_path();
        let text = toml::to_string(&config).context("write a configuration")?;
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Where [`Site::write_config`] puts the configuration.
    pub fn config_path(&self) -> PathBuf {
        self.lab.folder().join("viaduct.toml")
    }

    /// The agent's binary as a command inside the gateway's namespace, without arguments.
    pub fn viaduct(&self) -> anyhow::Result<Command> {
        Ok(self.lab.gateway.command(agent()?))
    }

    /// The running agent.
    ///
    /// # Panics
    /// It was not started.
    pub fn gateway(&mut self) -> &mut Process {
        self.gateway.as_mut().expect("the gateway was started")
    }

    /// What the agent is configured with unless a test says otherwise.
    pub fn config(&self) -> Config {
        let mut config = Config::default();
        // Whoever starts a site waits for what it serves.
        config.nats.startup_grace = Duration::ZERO;
        config.l4.interfaces = INTERFACES.map(str::to_owned).into();
        config.l4.attach = Attach::Native;
        // Cgroups are of the machine, and so not a lab's.
        config.l4.local_clients = LocalClients::Off;
        config.l4.vip_ranges = [VIP_RANGE, VIP_RANGE_V6]
            .map(|range| range.parse().expect("the lab's ranges are valid"))
            .into();
        config.l4.limits.flows = 65_536;
        config.l4.pin_path = self.lab.bpffs().join("viaduct");
        config
    }

    /// Waits until the admin API answers 200 at `path`; fails at once if the agent ends.
    pub fn wait_until(&mut self, path: &str) -> anyhow::Result<()> {
        let Site { gateway, lab, .. } = self;
        let gateway = gateway.as_mut().context("the gateway was not started")?;
        let answer = || lab.gateway.run(|| client::get(ADMIN, "admin", path)).ok();
        wait_for(&format!("the gateway's {path}"), || {
            match gateway.ensure_alive() {
                Ok(()) => answer()
                    .filter(|response| response.status == 200)
                    .map(|_| Ok(())),
                Err(error) => Some(Err(error)),
            }
        })?
    }

    /// Starts the instance of a backend, silent; in place of an earlier one if there was.
    pub fn start_app(&mut self, index: usize) -> anyhow::Result<&App> {
        self.apps[index] = None;
        let name = format!("b{}", index + 1);
        let address = self.lab.backend_address(index);
        Ok(self.apps[index].insert(App::start(&self.lab.backends[index], &name, address)?))
    }

    /// # Panics
    /// The backend has no running instance.
    pub fn app(&self, index: usize) -> &App {
        self.apps[index].as_ref().expect("the instance runs")
    }

    pub fn apps(&self) -> &[Option<App>] {
        &self.apps
    }

    pub fn kill_app(&mut self, index: usize) {
        self.apps[index] = None;
    }

    /// Asks the admin API.
    pub fn admin(&self, path: &str) -> anyhow::Result<Response> {
        self.lab.gateway.run(|| client::get(ADMIN, "admin", path))
    }

    /// One request through the proxy.
    pub fn get(&self, host: &str, path: &str) -> anyhow::Result<Response> {
        self.lab.client.run(|| client::get(PROXY, host, path))
    }

    /// Waits until `backends` different instances answer by TCP, by UDP and by HTTP.
    pub fn wait_until_served(&mut self, backends: usize) -> anyhow::Result<()> {
        let exchanges: [(&str, Exchange); 3] =
            [("TCP", echo_tcp), ("UDP", echo_udp), ("HTTP", hello)];
        for (what, exchange) in exchanges {
            let mut seen = Tally::new();
            wait_for(&format!("{backends} instances by {what}"), || {
                if let Ok(name) = self.lab.client.run(exchange) {
                    *seen.entry(name).or_default() += 1;
                }
                (seen.len() >= backends).then_some(())
            })
            .with_context(|| format!("answers so far: {}", display(&seen)))?;
        }
        Ok(())
    }

    /// Makes `count` exchanges from the client, and counts who answered.
    ///
    /// # Errors
    /// One of them failed.
    pub fn tally(
        &self,
        count: usize,
        exchange: impl Fn() -> anyhow::Result<String> + Send + Sync,
    ) -> anyhow::Result<Tally> {
        self.lab.client.run(|| {
            let mut tally = Tally::new();
            for _ in 0..count {
                *tally.entry(exchange()?).or_default() += 1;
            }
            Ok(tally)
        })
    }

    /// Waits until an instance gets no more of what `exchange` makes.
    pub fn wait_until_spared(
        &self,
        name: &str,
        exchange: impl Fn() -> anyhow::Result<String> + Send + Sync,
    ) -> anyhow::Result<()> {
        wait_for(&format!("{name} to get nothing new"), || {
            let tally = self.tally(30, &exchange).ok()?;
            (!tally.contains_key(name)).then_some(())
        })
    }
}

/// One connection to the echo VIP: who took it. For [`Site::tally`].
pub fn echo_tcp() -> anyhow::Result<String> {
    let mut connection = client::tcp(ECHO_VIP)?;
    ensure!(connection.echo(b"ping")? == b"ping", "the echo differs");
    Ok(connection.backend)
}

/// One datagram to the echo VIP from a port of its own: who answered.
pub fn echo_udp() -> anyhow::Result<String> {
    client::udp(ECHO_VIP)
}

/// One request for the host that every instance serves: who answered.
pub fn hello() -> anyhow::Result<String> {
    let response = client::get(PROXY, HOST, "/")?;
    ensure!(
        response.status == 200,
        "{} {}",
        response.status,
        response.body.trim()
    );
    Ok(response.body.trim().to_owned())
}

/// `b1=34 b2=33 b3=33`
pub fn display(tally: &Tally) -> String {
    let parts: Vec<String> = tally
        .iter()
        .map(|(name, count)| format!("{name}={count}"))
        .collect();
    parts.join(" ")
}

/// The agent's binary: the one that was built beside this one.
pub fn agent() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("find the own binary")?;
    let folders = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("viaduct"));
    let found = folders.into_iter().find(|file| file.is_file());
    found.with_context(|| format!("no viaduct beside {}; build it first", own.display()))
}
