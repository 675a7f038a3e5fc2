//! Packs what an administrator installs on a host, into one archive that depends on nothing else.

use std::fs;
use std::process::Command;

use anyhow::Context;

use crate::cargo;

/// Writes `target/dist/viaduct-VERSION-ARCH.tar.gz` from the release binary.
pub(crate) fn pack() -> anyhow::Result<()> {
    let name = format!(
        "viaduct-{}-{}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH
    );
    let dist = cargo::target().join("dist");
    let folder = dist.join(&name);
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;

    let mut strip = Command::new("strip");
    strip
        .arg("-o")
        .arg(folder.join("viaduct"))
        .arg(cargo::release("viaduct"));
    cargo::status(&mut strip)?;
    for file in [
        "packaging/viaduct.service",
        "packaging/viaduct.socket",
        "packaging/viaduct.toml",
        "LICENSE-MIT",
        "LICENSE-APACHE",
    ] {
        let from = cargo::root().join(file);
        let to = folder.join(from.file_name().expect("the list above names files"));
        fs::copy(&from, &to).with_context(|| format!("copy {file}"))?;
    }

    let archive = dist.join(format!("{name}.tar.gz"));
    let mut tar = Command::new("tar");
    // The same input makes the same archive, whoever packs it.
    tar.args([
        "--sort=name",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        "--mtime=@0",
    ]);
    tar.arg("--directory")
        .arg(&dist)
        .arg("-czf")
        .arg(&archive)
        .arg(&name);
    cargo::status(&mut tar)?;
    println!("{}", archive.display());
    Ok(())
}
