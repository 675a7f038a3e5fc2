//! Finds or installs what the build, the lab and the benchmarks need.
//!
//! Packages come from the distribution (Debian's names), tools written in Rust from the crate
//! registry into `target/tools`. A second run finds everything and changes nothing. No system
//! service is left running or enabled: the lab starts its own.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use crate::cargo;

/// The LLVM that the eBPF compilers below are built with; the linker must be built with the same.
const LLVM: &str = "22";

/// What every command needs.
pub(crate) const BASE: &[Item] = &[
    Item {
        name: "eBPF compiler",
        purpose: "compiles the XDP program",
        find: ebpf_compiler,
        packages: &["rustc-web", "libstd-rust-web-dev-bpf"],
        install: None,
    },
    Item {
        name: "bpf-linker",
        purpose: "links the XDP program",
        find: bpf_linker,
        packages: &["llvm-22-dev", "g++"],
        install: Some(Install::Crate {
            package: "bpf-linker",
            version: "0.13.0",
            options: &["--no-default-features", "--features", "llvm-22"],
        }),
    },
    Item {
        name: "cargo-nextest",
        purpose: "runs each test in a process, and so in network namespaces, of its own",
        find: || version("cargo-nextest"),
        packages: &[],
        install: Some(Install::Crate {
            package: "cargo-nextest",
            version: "0.9.143",
            // A test runner waits for tests: optimising it takes longer than it ever saves.
            options: &[
                "--debug",
                "--no-default-features",
                "--features",
                "default-no-update",
            ],
        }),
    },
    Item {
        name: "nats-server",
        purpose: "carries the registrations of lab and tests",
        find: || on_path("nats-server"),
        packages: &["nats-server"],
        install: None,
    },
    Item {
        name: "ip",
        purpose: "makes the lab's network namespaces",
        find: || on_path("ip"),
        packages: &["iproute2"],
        install: None,
    },
    Item {
        name: "ethtool",
        purpose: "switches checksum offload off in the lab",
        find: || on_path("ethtool"),
        packages: &["ethtool"],
        install: None,
    },
    Item {
        name: "curl",
        purpose: "tries the gateway, in tests and by hand",
        find: || on_path("curl"),
        packages: &["curl"],
        install: None,
    },
];

/// What the tests need besides.
pub(crate) const TEST: &[Item] = &[
    Item {
        name: "h2load",
        purpose: "tries HTTP/2, as does nghttp",
        find: || on_path("nghttp").and(on_path("h2load")),
        packages: &["nghttp2-client"],
        install: None,
    },
    Item {
        name: "redis-server",
        purpose: "is a source of routes",
        find: || on_path("redis-server"),
        packages: &["redis-server"],
        install: None,
    },
    Item {
        name: "etcd",
        purpose: "is a source of routes",
        find: || on_path("etcd"),
        packages: &["etcd-server"],
        install: None,
    },
    Item {
        name: "ZooKeeper",
        purpose: "is a source of routes",
        find: zookeeper,
        packages: &["zookeeperd"],
        install: None,
    },
    Item {
        name: "Python clients",
        purpose: "tries gRPC, HTTP/2, HTTP/3 and WebSockets",
        find: python_clients,
        packages: &["python3-venv"],
        install: Some(Install::By(install_python_clients)),
    },
];

/// Names and versions of the packages that [`install_python_clients`] installs.
const REQUIREMENTS: &str = "tests/e2e/clients/requirements.txt";

/// What `ci` needs besides.
pub(crate) const CI: &[Item] = &[
    Item {
        name: "rustfmt",
        purpose: "checks the format of the code",
        find: || component("rustfmt"),
        packages: &[],
        install: Some(Install::Component("rustfmt")),
    },
    Item {
        name: "clippy",
        purpose: "checks the code",
        find: || component("cargo-clippy"),
        packages: &[],
        install: Some(Install::Component("clippy")),
    },
];

/// What the benchmarks need besides.
pub(crate) const BENCH: &[Item] = &[
    Item {
        name: "nginx",
        purpose: "is measured beside the gateway, and serves as its backend",
        find: || on_path("nginx"),
        packages: &["nginx-light"],
        install: None,
    },
    Item {
        name: "haproxy",
        purpose: "is measured beside the gateway",
        find: || on_path("haproxy"),
        packages: &["haproxy"],
        install: None,
    },
    Item {
        name: "wrk",
        purpose: "makes the requests",
        find: || on_path("wrk"),
        packages: &["wrk"],
        install: None,
    },
    Item {
        name: "h2load",
        purpose: "makes requests of HTTP/2 and over TLS",
        find: || on_path("h2load"),
        packages: &["nghttp2-client"],
        install: None,
    },
    Item {
        name: "strace",
        purpose: "counts system calls",
        find: || on_path("strace"),
        packages: &["strace"],
        install: None,
    },
    Item {
        name: "iperf3",
        purpose: "fills the path through the gateway",
        find: || on_path("iperf3"),
        packages: &["iperf3"],
        install: None,
    },
    Item {
        name: "nft",
        purpose: "is measured beside the gateway",
        find: || on_path("nft"),
        packages: &["nftables"],
        install: None,
    },
];

/// What tests on another kernel need besides.
pub(crate) const KERNEL: &[Item] = &[Item {
    name: "qemu",
    purpose: "emulates a machine for the other kernel",
    find: || on_path("qemu-system-x86_64"),
    packages: &["qemu-system-x86"],
    install: None,
}];

/// Packages that bring a system service of this name, started and enabled by default.
const SERVICES: &[(&str, &str)] = &[
    ("nats-server", "nats-server"),
    ("nginx-light", "nginx"),
    ("haproxy", "haproxy"),
    ("redis-server", "redis-server"),
    ("etcd-server", "etcd"),
    ("zookeeperd", "zookeeper"),
];

/// One thing to find or install.
#[derive(Clone, Copy)]
pub(crate) struct Item {
    pub(crate) name: &'static str,
    pub(crate) purpose: &'static str,
    /// Says what was found.
    pub(crate) find: fn() -> Option<String>,
    pub(crate) packages: &'static [&'static str],
    pub(crate) install: Option<Install>,
}

/// Where what no package brings comes from.
#[derive(Clone, Copy)]
pub(crate) enum Install {
    Crate {
        package: &'static str,
        version: &'static str,
        options: &'static [&'static str],
    },
    /// Of the toolchain, by rustup.
    Component(&'static str),
    /// In a way of its own.
    By(fn() -> anyhow::Result<()>),
}

/// Installs what is missing of `items`, and says nothing when nothing is.
///
/// # Errors
/// An installation failed, or needs root; then the message is the commands to type.
pub(crate) fn ensure(items: &[Item]) -> anyhow::Result<()> {
    let missing: Vec<Item> = items
        .iter()
        .filter(|item| (item.find)().is_none())
        .copied()
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    for item in &missing {
        eprintln!("setup: {} is missing: it {}", item.name, item.purpose);
    }
    let mut packages: Vec<&str> = missing
        .iter()
        .flat_map(|item| item.packages)
        .copied()
        .collect();
    packages.retain(|package| !is_installed(package));
    packages.dedup();
    if !packages.is_empty() {
        install_packages(&packages)?;
    }
    for install in missing.iter().filter_map(|item| item.install) {
        let mut command = match install {
            Install::Crate {
                package,
                version,
                options,
            } => cargo_install(package, version, options),
            Install::Component(name) => {
                let mut rustup = Command::new("rustup");
                rustup.args(["component", "add", name]);
                rustup
            }
            Install::By(install) => {
                install()?;
                continue;
            }
        };
        eprintln!("setup: {}", cargo::display(&command));
        cargo::status(&mut command)?;
    }
    for item in &missing {
        if (item.find)().is_none() {
            bail!("{} was installed and still cannot be used", item.name);
        }
    }
    Ok(())
}

/// [`ensure`], then a line for each item with where it was found.
pub(crate) fn report(items: &[Item]) -> anyhow::Result<()> {
    ensure(items)?;
    for item in items {
        let found = (item.find)().unwrap_or_default();
        println!("{:<14} {found} ({})", item.name, item.purpose);
    }
    Ok(())
}

pub(crate) fn is_root() -> bool {
    // The owner of /proc/self is the effective user.
    fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

/// A compiler that has `core` for the eBPF target, prebuilt or as source; in the order in which the
/// build looks for them.
fn ebpf_compiler() -> Option<String> {
    packaged_compiler().or_else(nightly_with_source)
}

fn packaged_compiler() -> Option<String> {
    let rustc = "/usr/bin/rustc";
    let target = ["--print", "target-libdir", "--target", "bpfel-unknown-none"];
    let libraries = output(Command::new(rustc).args(target))?;
    Path::new(&libraries)
        .is_dir()
        .then(|| format!("{rustc} with core for bpfel-unknown-none"))
}

/// rustup's nightly, of the LLVM of our linker and with the component rust-src.
fn nightly_with_source() -> Option<String> {
    let rustc = ["run", "nightly", "rustc"];
    let sysroot = output(
        Command::new("rustup")
            .args(rustc)
            .args(["--print", "sysroot"]),
    )?;
    let core = Path::new(&sysroot).join("lib/rustlib/src/rust/library/core");
    let about = output(Command::new("rustup").args(rustc).arg("-vV"))?;
    let same_llvm = about.contains(&format!("LLVM version: {LLVM}."));
    (core.is_dir() && same_llvm).then(|| format!("{sysroot} with rust-src"))
}

/// A linker of [`LLVM`]: ours, which was built with it, or one that is linked to it. Others do not
/// say what they were built with.
fn bpf_linker() -> Option<String> {
    let path = on_path("bpf-linker")?;
    let ours = Path::new(&path).starts_with(cargo::tools());
    let linked = || output(Command::new("ldd").arg(&path)).unwrap_or_default();
    let same_llvm = |text: String| {
        text.contains(&format!("libLLVM.so.{LLVM}")) || text.contains(&format!("libLLVM-{LLVM}"))
    };
    (ours || same_llvm(linked()))
        .then(|| version("bpf-linker"))
        .flatten()
}

/// A program of the toolchain that cargo would start.
fn component(program: &str) -> Option<String> {
    let found = on_path(program)?;
    // rustup's stand-in is there without the component, and fails.
    let text = output(Command::new(&found).arg("--version"))?;
    Some(format!("{found}, {text}"))
}

/// The package brings a library, which java runs as the server.
fn zookeeper() -> Option<String> {
    let library = "/usr/share/java/zookeeper.jar";
    let found = on_path("java")?;
    Path::new(library)
        .is_file()
        .then(|| format!("{library}, {found}"))
}

/// A virtual environment with what is required today.
fn python_clients() -> Option<String> {
    let venv = cargo::tools().join("clients");
    let required = fs::read(cargo::root().join(REQUIREMENTS)).ok()?;
    let installed = fs::read(venv.join("requirements.txt")).ok()?;
    let imports = [
        "-c",
        "import aioquic.h3.connection, grpc, h2.connection, websockets",
    ];
    output(Command::new(venv.join("bin/python")).args(imports))?;
    (installed == required).then(|| venv.display().to_string())
}

fn install_python_clients() -> anyhow::Result<()> {
    let venv = cargo::tools().join("clients");
    cargo::status(
        Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(&venv),
    )?;
    let requirements = cargo::root().join(REQUIREMENTS);
    let mut pip = Command::new(venv.join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check", "-r"]);
    cargo::status(pip.arg(&requirements))?;
    // Says what is installed, so it comes last.
    fs::copy(&requirements, venv.join("requirements.txt")).context("copy the requirements")?;
    Ok(())
}

fn install_packages(packages: &[&str]) -> anyhow::Result<()> {
    if on_path("apt-get").is_none() {
        bail!(
            "this system has no apt-get; install what Debian calls: {}",
            packages.join(" ")
        );
    }
    let mut install = Command::new("apt-get");
    install
        .args(["install", "--yes", "--no-install-recommends"])
        .args(packages);
    if !is_root() {
        bail!(
            "root is needed to install {}; type:\n  sudo apt-get update && sudo {}",
            packages.join(", "),
            cargo::display(&install)
        );
    }
    eprintln!("setup: {}", cargo::display(&install));
    cargo::status(Command::new("apt-get").args(["--quiet", "update"]))?;
    let _guard = ServiceGuard::set()?;
    cargo::status(
        install
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null()),
    )?;
    for (_, service) in SERVICES
        .iter()
        .filter(|(package, _)| packages.contains(package))
    {
        if on_path("systemctl").is_some() {
            cargo::status(Command::new("systemctl").args(["--quiet", "disable", service]))?;
        }
    }
    Ok(())
}

/// Keeps package scripts from starting services while it lives.
///
/// Debian asks `policy-rc.d` before any service action; exit code 101 forbids it. A policy that the
/// administrator wrote is left as it is; one with our mark, left by a setup that was interrupted, is
/// used and removed.
struct ServiceGuard {
    ours: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";
const POLICY_TEXT: &str = "#!/bin/sh\n# Viaduct's setup: removed when it ends.\nexit 101\n";

impl ServiceGuard {
    fn set() -> anyhow::Result<ServiceGuard> {
        if Path::new(POLICY).exists() {
            let ours = fs::read_to_string(POLICY).is_ok_and(|text| text == POLICY_TEXT);
            return Ok(ServiceGuard { ours });
        }
        fs::write(POLICY, POLICY_TEXT).with_context(|| format!("write {POLICY}"))?;
        fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("make {POLICY} executable"))?;
        Ok(ServiceGuard { ours: true })
    }
}

impl Drop for ServiceGuard {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(POLICY)
        {
            eprintln!("setup: remove {POLICY}: {error}");
        }
    }
}

fn cargo_install(package: &str, version: &str, options: &[&str]) -> Command {
    let llvm = format!("/usr/lib/llvm-{LLVM}");
    let mut command = cargo::cargo();
    command.args(["install", package, "--version", version, "--locked"]);
    command.args(options).arg("--root").arg(cargo::tools());
    // llvm-sys looks for llvm-config here before anywhere else.
    command.env("LLVM_PREFIX", &llvm);
    let mut path = std::ffi::OsString::from(format!("{llvm}/bin:"));
    path.push(cargo::path());
    command.env("PATH", path);
    command
}

fn is_installed(package: &str) -> bool {
    let mut query = Command::new("dpkg-query");
    output(query.args(["--show", "--showformat=${db:Status-Status}", package]))
        .is_some_and(|status| status == "installed")
}

/// The first line of `program --version`; `None` where it is missing or does not start.
fn version(program: &str) -> Option<String> {
    let found = on_path(program)?;
    let text = output(Command::new(&found).arg("--version"))?;
    Some(format!(
        "{found}, {}",
        text.lines().next().unwrap_or_default()
    ))
}

/// Where a program is, in the search path or where the system keeps root's.
pub(crate) fn on_path(program: &str) -> Option<String> {
    let folders = cargo::path();
    // Tools of the system are often missing from the PATH of other users than root.
    let system = ["/usr/sbin", "/sbin"].map(Into::into);
    std::env::split_paths(&folders)
        .chain(system)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
        .map(|file| file.display().to_string())
}

fn output(command: &mut Command) -> Option<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
