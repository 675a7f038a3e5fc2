//! Runs cargo with what the eBPF build looks for, and knows where its results are.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

/// The workspace's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask is a folder of the workspace")
}

/// Where tools are installed that cargo builds for this workspace only.
pub(crate) fn tools() -> PathBuf {
    target().join("tools")
}

/// A binary of the release profile.
pub(crate) fn release(name: &str) -> PathBuf {
    target().join("release").join(name)
}

pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// `PATH` with the workspace's own tools in front.
pub(crate) fn path() -> OsString {
    let inherited = env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(tools().join("bin")).chain(env::split_paths(&inherited));
    env::join_paths(paths).expect("no folder of PATH contains a colon")
}

/// Runs `cargo` in the workspace; its output is the user's.
///
/// # Errors
/// cargo is missing, or exited with anything but 0.
pub(crate) fn run<I, S>(arguments: I) -> anyhow::Result<()>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    status(&mut building(arguments))
}

/// The same, and returns the executables it built or found up to date.
///
/// # Errors
/// cargo is missing, or exited with anything but 0.
pub(crate) fn executables<I, S>(arguments: I) -> anyhow::Result<Vec<PathBuf>>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = building(arguments);
    command.arg("--message-format=json-render-diagnostics");
    let line = display(&command);
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("start {line}"))?;
    ensure!(output.status.success(), "{line}: {}", output.status);
    // One field of known form; a JSON parser would double the time that xtask takes to compile.
    let messages = String::from_utf8_lossy(&output.stdout);
    let executable = |message: &str| {
        let (_, rest) = message.split_once("\"executable\":\"")?;
        Some(PathBuf::from(rest.split_once('"')?.0))
    };
    Ok(messages.lines().filter_map(executable).collect())
}

fn building<I, S>(arguments: I) -> Command
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = cargo();
    command
        .args(arguments)
        .env("PATH", path())
        .env("VIADUCT_REQUIRE_EBPF", "1");
    command
}

/// A bare `cargo`, without the variables that would make it believe it is part of this run.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    for (name, _) in env::vars_os() {
        let inherited = name.to_string_lossy();
        if inherited.starts_with("CARGO_PKG_") || inherited == "CARGO_MANIFEST_DIR" {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs a command to its end, and turns anything but success into an error that shows the command.
pub(crate) fn status(command: &mut Command) -> anyhow::Result<()> {
    let line = display(command);
    let status = command.status().with_context(|| format!("start {line}"))?;
    ensure!(status.success(), "{line}: {status}");
    Ok(())
}

/// A command as one would type it.
pub(crate) fn display(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
