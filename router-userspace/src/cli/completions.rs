//! `viaduct completions`: what a shell needs to complete the commands.

use clap_complete::Shell;

use crate::cli::{Failure, print};

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    shell: Shell,
}

/// `command` is the whole command line.
pub fn run(options: &Options, mut command: clap::Command) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut command, "viaduct", &mut script);
    Ok(print(&String::from_utf8_lossy(&script))?)
}
