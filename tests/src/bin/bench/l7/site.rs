//! Where everything runs: one namespace with nothing but its loopback, a folder, and cores.
//!
//! The proxy has a core of its own, and so the same budget as every other. The client has another,
//! and shares it with the backend where the machine has but two.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use router_tests::netns::Netns;
use router_tests::process::Process;
use tempfile::TempDir;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// What every request is for, and whom the certificate is of.
pub(crate) const HOST: &str = "bench.example.com";

/// Descriptors that each process may have: 10,000 idle connections and what else it needs.
const OPEN_FILES: u32 = 20_000;

pub(crate) struct Site {
    pub(crate) netns: Netns,
    folder: TempDir,
    certificate: CertificateDer<'static>,
}

/// Who runs on a core.
#[derive(Clone, Copy)]
pub(crate) enum Role {
    Proxy,
    Client,
    Backend,
}

impl Site {
    pub(crate) fn new() -> anyhow::Result<Site> {
        let netns = Netns::create(&format!("viaduct-{}-l7", std::process::id()))?;
        netns.ip(&["link set lo up"])?;
        // The servers' ports are below.
        netns.sysctl("ipv4/ip_local_port_range", "10000 65535")?;
        let folder = TempDir::new()?;
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed([HOST.to_owned()]).context("make a certificate")?;
        let site = Site {
            netns,
            folder,
            certificate: cert.der().clone(),
        };
        let (certificate, key) = (cert.pem(), signing_key.serialize_pem());
        fs::write(site.certificate_path(), &certificate)?;
        fs::write(site.key_path(), &key)?;
        // HAProxy wants both in one file.
        fs::write(site.path("both.pem"), certificate + &key)?;
        allow_open_files()?;
        Ok(site)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn certificate_path(&self) -> PathBuf {
        self.path("certificate.pem")
    }

    pub(crate) fn key_path(&self) -> PathBuf {
        self.path("key.pem")
    }

    /// Full handshakes of TLS 1.3.
    pub(crate) fn tls(&self) -> anyhow::Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone())?;
        let mut config = ClientConfig::builder_with_protocol_versions(&[&TLS13])
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    /// A program inside, on its core, to which arguments can be added.
    pub(crate) fn command(&self, role: Role, program: impl AsRef<Path>) -> Command {
        let mut command = self.netns.command("taskset");
        command
            .args(["--cpu-list", &core(role).to_string()])
            .arg(program.as_ref());
        command
    }

    /// Starts a server in the foreground with its configuration in a file named last.
    pub(crate) fn start(
        &self,
        mut command: Command,
        name: &str,
        config: &str,
        options: &[&str],
    ) -> anyhow::Result<Process> {
        let path = self.path(&format!("{name}.conf"));
        fs::write(&path, config).with_context(|| format!("write {}", path.display()))?;
        command.args(options).arg(path);
        Process::start(name, command, self.folder())
    }

    /// Runs `f` on a thread inside and on its core.
    pub(crate) fn run<T: Send>(&self, role: Role, f: impl FnOnce() -> T + Send) -> T {
        self.netns.run(|| {
            pin(role);
            f()
        })
    }
}

/// Lets this process and what it starts open [`OPEN_FILES`], where they may open fewer.
fn allow_open_files() -> anyhow::Result<()> {
    let limits = fs::read_to_string("/proc/self/limits").context("read the own limits")?;
    let open_files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let soft = open_files.and_then(|line| line.split_whitespace().nth(3)?.parse::<u32>().ok());
    if soft.is_some_and(|soft| soft >= OPEN_FILES) {
        return Ok(());
    }
    let status = Command::new("prlimit")
        .arg(format!("--pid={}", std::process::id()))
        .arg(format!("--nofile={OPEN_FILES}:"))
        .status();
    ensure!(status.context("start prlimit")?.success(), "prlimit failed");
    Ok(())
}

/// Keeps the calling thread on its core.
pub(crate) fn pin(role: Role) {
    let mut set = CpuSet::new();
    let pinned = set
        .set(core(role))
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    if let Err(error) = pinned {
        eprintln!("l7: a thread is on any core: {error}");
    }
}

pub(crate) fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

fn core(role: Role) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let wanted = match role {
        Role::Proxy => 0,
        Role::Client => 1,
        Role::Backend => 2,
    };
    wanted.min(cores - 1)
}
