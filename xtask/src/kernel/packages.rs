//! Files of packages that are needed but not installed: downloaded by apt and unpacked under
//! `target/kernel`, where the next run finds them.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, ensure};

use crate::{cargo, setup};

/// The packages that `package` depends on.
pub(super) fn depends(package: &str) -> anyhow::Result<Vec<String>> {
    with_lists(|| {
        let text = output(Command::new("apt-cache").args(["depends", package]))?;
        let depends = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "));
        Ok(depends.map(str::to_owned).collect())
    })
}

/// The folder with the files of `package`.
pub(super) fn unpack(package: &str) -> anyhow::Result<PathBuf> {
    with_lists(|| unpack_listed(package))
}

fn unpack_listed(package: &str) -> anyhow::Result<PathBuf> {
    // 'ADDRESS' NAME_VERSION_ARCH.deb SIZE HASH
    let listed = output(Command::new("apt-get").args(["download", "--print-uris", package]))?;
    let archive = listed
        .split_whitespace()
        .nth(1)
        .with_context(|| format!("apt has no archive of {package}"))?;
    let archive = super::folder().join(archive);
    let folder = archive.with_extension("");
    if folder.is_dir() {
        return Ok(folder);
    }
    eprintln!("kernel: downloads {package} and unpacks it, but does not install it");
    let mut download = Command::new("apt-get");
    // Else apt would complain that its own user cannot write here.
    download.args(["--quiet", "--option", "APT::Sandbox::User=root", "download"]);
    cargo::status(download.arg(package).current_dir(super::folder()))?;
    // Renamed when complete: an interrupted run leaves nothing that looks whole.
    let partial = archive.with_extension("partial");
    cargo::status(Command::new("dpkg").arg("-x").arg(&archive).arg(&partial))?;
    fs::rename(&partial, &folder).with_context(|| format!("create {}", folder.display()))?;
    fs::remove_file(&archive).with_context(|| format!("remove {}", archive.display()))?;
    Ok(folder)
}

/// Does `act` once more with fresh lists of packages if it fails with those that are there.
fn with_lists<T>(act: impl Fn() -> anyhow::Result<T>) -> anyhow::Result<T> {
    match act() {
        Err(error) if setup::is_root() => {
            eprintln!("kernel: {error:#}; updates the lists of packages and tries again");
            cargo::status(Command::new("apt-get").args(["--quiet", "update"]))?;
            act()
        }
        Err(error) => Err(error).context("ask apt; `sudo apt-get update` may help"),
        done => done,
    }
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let line = cargo::display(command);
    let output = command.output().with_context(|| format!("start {line}"))?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{line}: {}", message.trim());
    String::from_utf8(output.stdout).with_context(|| format!("read the output of {line}"))
}
