//! The gateway on its embedded default: `cargo xtask run`.
//!
//! Builds a site of three instances, keeps clients busy while instances come and go, and shows who
//! gets what until Ctrl-C. With `--check` it proves the same site by real traffic and exits.

#![forbid(unsafe_code)]

mod check;
mod live;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use router_tests::app::HEARTBEAT;
use router_tests::site::Site;

/// Enough that the choice among them shows.
const BACKENDS: usize = 3;

/// An instance that missed this many seconds of heartbeats is gone.
const STALE: Duration = Duration::from_secs(4);

#[derive(Parser)]
#[command(name = "lab", about = "A gateway in a lab of network namespaces")]
struct Cli {
    /// Prove by real traffic that the lab works, then exit
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<bool> {
    eprintln!("lab: client, gateway and {BACKENDS} backends, each in a network namespace");
    let interrupted = live::interrupts()?;
    let mut site = Site::running_with(BACKENDS, |config| {
        // A killed instance shows as killed, and not two minutes later.
        config.nats.stale_threshold = STALE;
        config.nats.prune_interval = HEARTBEAT;
    })?;
    if cli.check {
        return check::all(&mut site, &interrupted);
    }
    live::show(&mut site, &interrupted)?;
    Ok(true)
}
