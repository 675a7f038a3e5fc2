//! The command line: one file a command, and what they share.
//!
//! Results go to stdout, errors to stderr in one line with their causes. Exit codes: 0 good, 1 it
//! failed, 2 bad usage or configuration.

use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::config::{self, Config};

pub mod announce;
pub mod apply;
pub mod check;
pub mod client;
pub mod completions;
pub mod declared;
pub mod delete;
pub mod detach;
pub mod doctor;
pub mod drain;
pub mod explain;
pub mod flows;
pub mod get;
pub mod list;
pub mod rejects;
pub mod resolve;
pub mod run;
pub mod stats;
pub mod table;
pub mod watch;

/// Read when no `--config` is given, if it is there.
pub const DEFAULT_CONFIG: &str = "/etc/viaduct/viaduct.toml";

/// A gateway that routes packets and requests from announcements on NATS.
#[derive(Debug, Parser)]
#[command(name = "viaduct", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the gateway
    Run(run::Options),
    /// Validate a configuration and print what it amounts to
    Check(check::Options),
    /// List the HTTP routes of the running gateway
    Routes(list::Options),
    /// List the virtual IPs of the running gateway
    Vips(list::Options),
    /// List the backends of the running gateway
    Backends(list::Options),
    /// List the flows in the flow table of the running gateway
    Flows(flows::Options),
    /// Print the counters of the running gateway, or what they are a second
    Stats(stats::Options),
    /// Show packets as they are forwarded, answered and dropped
    Watch(watch::Options),
    /// Say what the running gateway would do with a packet or a request, and why
    Explain(explain::Options),
    /// Give a backend nothing new at both layers, whatever it announces; or drain the gateway
    Drain(drain::Options),
    /// Announce a backend over NATS, once
    Register(announce::Options),
    /// Withdraw a backend over NATS
    Unregister(announce::Options),
    /// Declare routes and policies of virtual IPs: write the entries of a file to the bucket
    Apply(apply::Options),
    /// Print what the bucket declares, as apply takes it
    Get(get::Options),
    /// Take an entry out of the bucket
    Delete(delete::Options),
    /// Say what apply would change
    Diff(apply::DiffOptions),
    /// List what the running gateway refused lately, and why
    Rejects(rejects::Options),
    /// Check whether this host can run the gateway as configured, and what to do if not
    Doctor(doctor::Options),
    /// Remove the pinned programs and maps: packets pass by the gateway from here on
    Detach(detach::Options),
    /// Print a script that completes these commands in a shell
    Completions(completions::Options),
}

/// What ends a command early.
#[derive(Debug)]
pub enum Failure {
    /// Exit code 2.
    Usage(anyhow::Error),
    /// Exit code 1.
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::Failed(error)
    }
}

/// The configuration to work by.
#[derive(Clone, Debug, clap::Args)]
pub struct ConfigOption {
    /// Configuration file [default: /etc/viaduct/viaduct.toml if it is there]
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl ConfigOption {
    /// The file that is read, if any.
    pub fn path(&self) -> Option<PathBuf> {
        let default = Path::new(DEFAULT_CONFIG);
        self.config
            .clone()
            .or_else(|| default.exists().then(|| default.to_owned()))
    }

    /// # Errors
    /// [`Failure::Usage`] naming file, line and key.
    pub fn load(&self) -> Result<Config, Failure> {
        match self.path() {
            Some(path) => config::load(&path).map_err(Failure::Usage),
            None => Ok(Config::default()),
        }
    }
}

pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments.command {
        Command::Run(options) => run::run(options),
        Command::Check(options) => check::run(options),
        Command::Routes(options) => list::routes(options),
        Command::Vips(options) => list::vips(options),
        Command::Backends(options) => list::backends(options),
        Command::Flows(options) => flows::run(options),
        Command::Stats(options) => stats::run(options),
        Command::Watch(options) => watch::run(options),
        Command::Explain(options) => explain::run(options),
        Command::Drain(options) => drain::run(options),
        Command::Register(options) => announce::register(options),
        Command::Unregister(options) => announce::unregister(options),
        Command::Apply(options) => apply::apply(options),
        Command::Get(options) => get::run(options),
        Command::Delete(options) => delete::run(options),
        Command::Diff(options) => apply::diff(options),
        Command::Rejects(options) => rejects::run(options),
        Command::Doctor(options) => doctor::run(options),
        Command::Detach(options) => detach::run(options),
        Command::Completions(options) => completions::run(options, Arguments::command()),
    };
    let (error, code) = match done {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Usage(error)) => (error, 2),
        Err(Failure::Failed(error)) => (error, 1),
    };
    // Parsers draw their errors over several lines.
    let line = format!("{error:#}")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    // Without stderr there is nobody left to tell.
    let _ = writeln!(io::stderr(), "viaduct: {line}");
    ExitCode::from(code)
}

/// Writes a result to stdout; a reader that has seen enough is not an error.
pub fn print(text: &str) -> anyhow::Result<()> {
    print_on(text).map(|_| ())
}

/// The same; false once nobody reads any more.
pub fn print_on(text: &str) -> anyhow::Result<bool> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A runtime for commands that talk to a server and end.
pub fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_sound() {
        Arguments::command().debug_assert();
    }
}
