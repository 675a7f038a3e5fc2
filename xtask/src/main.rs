//! `cargo xtask`: one place for everything done around the code.
//!
//! Each command first sets up what it needs, so the two that matter, `cargo xtask run` and
//! `cargo xtask test`, are all a fresh machine takes. The lab, the tests and the benchmarks live in
//! the package `router-tests`; this crate only installs, builds and starts, and so stays quick to
//! compile.

mod cargo;
mod dist;
mod kernel;
mod peers;
mod setup;

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Set up, build, run, test and measure Viaduct"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing: the eBPF toolchain, the test runner, the lab's tools
    Setup {
        /// Also what the gateway is measured beside and by: nginx, HAProxy, Envoy, Sozu, Pingora,
        /// nftables, wrk, h2load, iperf3
        #[arg(long)]
        bench: bool,
    },
    /// Build the release binary with the eBPF program inside
    Build,
    /// Run the gateway in a lab of network namespaces, or run the built agent itself
    Run {
        /// Prove by real traffic that the lab works, then exit
        #[arg(long)]
        check: bool,
        /// Arguments of the viaduct binary; no lab is made
        #[arg(last = true, conflicts_with = "check")]
        agent_args: Vec<OsString>,
    },
    /// Run every test; arguments go to `cargo nextest run`
    Test {
        /// On Debian's stock kernel of this version, emulated by qemu: packet tests and what attaches
        /// programs; arguments go to each test binary instead
        #[arg(long, value_name = "VERSION")]
        kernel: Option<String>,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        filter: Vec<OsString>,
    },
    /// Measure l4, path, l7, local or routes, without a name all of them; or soak, for an hour; or ipvs, in a machine that has it
    Bench {
        which: Option<String>,
        /// Of l4, only the rows whose names begin so
        prefix: Option<String>,
        /// One JSON object a line instead of a table
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        l7: L7Options,
    },
    /// What has to pass before a change lands
    Ci,
    /// Pack the stripped binary, the systemd unit and an example configuration under target/dist
    Dist,
}

/// Passed on to the benchmarks of layer 7 and of routes.
#[derive(clap::Args)]
struct L7Options {
    /// Of l7 and routes: rounds of each row
    #[arg(long, value_name = "N")]
    rounds: Option<String>,
    /// Of l7 and routes: only these rows
    #[arg(long, value_name = "A,B")]
    rows: Option<String>,
    /// Of l7: only these contenders
    #[arg(long, value_name = "A,B")]
    peers: Option<String>,
    /// Of l7: count system calls as well
    #[arg(long)]
    syscalls: bool,
    /// Of soak: how long, an hour unless given
    #[arg(long, value_name = "N")]
    minutes: Option<String>,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Setup { bench: false } => {
            setup::report(&[setup::BASE, setup::TEST, setup::CI].concat())
        }
        Command::Setup { bench: true } => {
            setup::report(&[setup::BASE, setup::TEST, setup::CI, setup::BENCH].concat())?;
            peers::offer(None);
            Ok(())
        }
        Command::Build => build(),
        Command::Run { check, agent_args } if agent_args.is_empty() => lab(check),
        Command::Run { agent_args, .. } => {
            build()?;
            let error = std::process::Command::new(cargo::release("viaduct"))
                .args(agent_args)
                .exec();
            Err(error).context("start viaduct")
        }
        Command::Test {
            kernel: None,
            filter,
        } => test(&filter),
        Command::Test {
            kernel: Some(version),
            filter,
        } => kernel::test(&version, &filter),
        Command::Bench {
            which,
            prefix,
            json,
            l7,
        } => bench(which, prefix, json, &l7),
        Command::Ci => ci(),
        Command::Dist => {
            build()?;
            dist::pack()
        }
    }
}

fn build() -> anyhow::Result<()> {
    setup::ensure(setup::BASE)?;
    cargo::run(["build", "--release", "--package", "router-userspace"])
}

fn build_lab() -> anyhow::Result<()> {
    cargo::run([
        "build",
        "--release",
        "-p",
        "router-userspace",
        "-p",
        "router-tests",
        "--bins",
    ])
}

fn lab(check: bool) -> anyhow::Result<()> {
    require_root("the lab makes network namespaces and attaches XDP programs")?;
    setup::ensure(setup::BASE)?;
    build_lab()?;
    let mut lab = std::process::Command::new(cargo::release("lab"));
    if check {
        lab.arg("--check");
    }
    Err(lab.exec()).context("start the lab")
}

fn test(filter: &[OsString]) -> anyhow::Result<()> {
    require_root("packet and end-to-end tests load XDP programs and make network namespaces")?;
    setup::ensure(&[setup::BASE, setup::TEST].concat())?;
    // The end-to-end tests start the binary of the same profile; nextest alone would not build it.
    cargo::run([
        "build",
        "-p",
        "router-userspace",
        "-p",
        "router-tests",
        "--bins",
    ])?;
    let mut arguments: Vec<OsString> = ["nextest", "run", "--workspace"].map(OsString::from).into();
    arguments.extend_from_slice(filter);
    cargo::run(arguments)
}

fn bench(
    which: Option<String>,
    prefix: Option<String>,
    json: bool,
    l7: &L7Options,
) -> anyhow::Result<()> {
    if which.as_deref() == Some("ipvs") {
        return kernel::bench_ipvs(json);
    }
    require_root("the benchmarks load XDP programs and make network namespaces")?;
    setup::ensure(&[setup::BASE, setup::BENCH].concat())?;
    if which.as_deref().is_none_or(|which| which == "l7") {
        peers::offer(l7.peers.as_deref());
    }
    build_lab()?;
    let mut bench = std::process::Command::new(cargo::release("bench"));
    // Peers are among the workspace's own tools.
    bench.env("PATH", cargo::path()).args(which).args(prefix);
    let options = [
        ("--rounds", &l7.rounds),
        ("--rows", &l7.rows),
        ("--peers", &l7.peers),
        ("--minutes", &l7.minutes),
    ];
    for (option, value) in options {
        if let Some(value) = value {
            bench.args([option, value]);
        }
    }
    let flags = [("--json", json), ("--syscalls", l7.syscalls)];
    bench.args(flags.iter().filter(|(_, set)| *set).map(|(flag, _)| flag));
    Err(bench.exec()).context("start the benchmarks")
}

fn ci() -> anyhow::Result<()> {
    setup::ensure(&[setup::BASE, setup::TEST, setup::CI].concat())?;
    cargo::run(["fmt", "--all", "--check"])?;
    cargo::run([
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ])?;
    test(&[])?;
    lab(true)
}

fn require_root(why: &str) -> anyhow::Result<()> {
    if !setup::is_root() {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        bail!(
            "root is needed: {why}; type:\n  sudo -E env \"PATH=$PATH\" cargo xtask {}",
            arguments.join(" ")
        );
    }
    Ok(())
}
