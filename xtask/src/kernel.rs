//! Runs tests on another kernel than the host's, `cargo xtask test --kernel 6.1`, and the benchmark
//! that needs one, `cargo xtask bench ipvs`.
//!
//! The host's distribution gives the kernel, qemu emulates the machine, and the machine's whole
//! system is an initramfs: what runs, the agent, the programs they start, busybox and the kernel's
//! modules. Nothing but qemu is installed, and root is not needed. Emulation in software works on
//! every host and is tens of times slower than the host itself, so only tests whose subject is the
//! kernel run here.

mod cpio;
mod packages;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail, ensure};

use crate::{cargo, setup};
use cpio::Archive;

/// What runs unless the caller says otherwise: test binaries and their arguments. Of the end-to-end
/// tests those about what layer 4 asks of a kernel, since each takes tens of seconds here.
const TESTS: &[(&str, &[&str])] = &[
    ("xdp", &[]),
    (
        "e2e",
        &[
            "attach::",
            "hand_up::",
            "l4::",
            "life::",
            "modes::",
            "restart::",
            // About systemd, not about kernels.
            "--skip=life::a_service_manager",
            "--skip=life::a_socket_that_is_not_configured",
            // Linux 6.3 is the first to redirect frames of several buffers.
            "--skip=modes::a_datagram_of_9000",
        ],
    ),
];

/// What the tests start, from the host.
const PROGRAMS: &[&str] = &[
    "ip",
    "tc",
    "ethtool",
    "nats-server",
    "mount",
    "umount",
    "nsenter",
    "unshare",
    "setpriv",
];

/// What `bench ipvs` starts besides, and what that needs; unpacked, not installed.
const IPVS: &[&str] = &["ipvsadm", "libnl-3-200", "libnl-genl-3-200", "libpopt0"];

const MEMORY: &str = "2G";
/// Seconds after which the machine is killed.
const DEADLINE: &str = "3600";

/// Runs the tests on Debian's stock kernel of `version`; `filter` goes to each test binary instead
/// of our own choice.
///
/// # Errors
/// A test failed, the machine did not get to its end, or something of it is not to be had.
pub(crate) fn test(version: &str, filter: &[OsString]) -> anyhow::Result<()> {
    let run = |(name, arguments): &(&'static str, &[&str])| Run {
        name,
        arguments: match filter {
            [] => arguments.iter().map(OsString::from).collect(),
            filter => filter.to_vec(),
        },
    };
    Machine {
        runs: TESTS.iter().map(run).collect(),
        packages: &[],
        // Two cores, so that cores meet in the tables.
        processor: &["-cpu", "max", "-smp", "2"],
    }
    .run(version)
}

/// Measures the gateway beside IPVS, on Debian 12's kernel because it has IPVS.
///
/// The machine's clock counts instructions of its one core, a nanosecond each, and skips what the
/// core is idle: the same figures on every host, however busy it is.
pub(crate) fn bench_ipvs(json: bool) -> anyhow::Result<()> {
    let json = json.then_some("--json");
    let arguments = ["ipvs"].into_iter().chain(json);
    Machine {
        runs: vec![Run {
            name: "bench",
            arguments: arguments.map(OsString::from).collect(),
        }],
        packages: IPVS,
        processor: &[
            "-cpu",
            // Else the kernel copies and clears by an instruction that is counted once an octet.
            "max,erms=off,fsrm=off",
            "-smp",
            "1",
            "-icount",
            "shift=0,sleep=off",
        ],
    }
    .run("6.1")
}

/// What is emulated, and what for.
struct Machine {
    /// One after the other.
    runs: Vec<Run>,
    packages: &'static [&'static str],
    /// Options of qemu.
    processor: &'static [&'static str],
}

/// A test binary or a program of the workspace, to be run once.
struct Run {
    name: &'static str,
    arguments: Vec<OsString>,
}

impl Machine {
    fn run(&self, version: &str) -> anyhow::Result<()> {
        ensure!(
            cfg!(target_arch = "x86_64"),
            "another kernel needs an x86_64 host"
        );
        setup::ensure(&[setup::BASE, setup::KERNEL].concat())?;
        let kernel = Kernel::fetch(version)?;
        let initramfs = folder().join("initramfs");
        self.write_initramfs(&initramfs, &kernel)?;
        let started = Instant::now();
        let codes = self.boot(&kernel, &initramfs)?;
        let ends = self.runs.iter().zip(&codes).map(|(run, code)| match code {
            Some(code) => format!("{} ended with {code}", run.name),
            None => format!("{} did not end", run.name),
        });
        let summary = format!(
            "kernel {}: {}",
            kernel.release,
            ends.collect::<Vec<_>>().join(", ")
        );
        ensure!(codes.iter().all(|code| *code == Some(0)), summary);
        println!("{summary}; {} s", started.elapsed().as_secs());
        Ok(())
    }

    /// Builds what runs, and writes the machine's whole system into `path`.
    fn write_initramfs(&self, path: &Path, kernel: &Kernel) -> anyhow::Result<()> {
        let built = cargo::executables([
            "build",
            "-p",
            "router-userspace",
            "-p",
            "router-tests",
            "--bins",
            "--test",
            "*",
        ])?;
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        let mut archive = Archive::new(BufWriter::new(file));

        archive.file("/init", 0o755, init(&self.runs).as_bytes())?;
        archive.copy(&kernel.busybox, "/bin/busybox")?;
        let modules = format!("/lib/modules/{}", kernel.release);
        archive.copy_all(&kernel.modules, &modules)?;
        for package in self.packages {
            archive.copy_all(&packages::unpack(package)?, "")?;
        }
        for name in PROGRAMS {
            let found = setup::on_path(name).with_context(|| format!("{name} is not installed"))?;
            archive.program(Path::new(&found), &format!("/bin/{name}"))?;
        }
        // What runs looks for the agent beside itself.
        for name in self.runs.iter().map(|run| run.name).chain(["viaduct"]) {
            let binary = stripped(executable(&built, name)?, name)?;
            archive.program(&binary, &format!("/tests/{name}"))?;
        }
        // Tests read files of the workspace by their paths on the host.
        let root = cargo::root();
        archive.folder(&root.join("tests").to_string_lossy())?;
        let packaging = root.join("packaging");
        archive.copy_all(&packaging, &packaging.to_string_lossy())?;
        archive.finish()
    }

    /// Boots the machine, shows its console, and returns the exit code of each run, if it ended.
    fn boot(&self, kernel: &Kernel, initramfs: &Path) -> anyhow::Result<Vec<Option<i32>>> {
        let mut machine = Command::new("timeout");
        // In the foreground Ctrl-C reaches the machine as well.
        machine.args(["--foreground", DEADLINE, "qemu-system-x86_64"]);
        machine.args(["-machine", "q35", "-accel", "tcg"]);
        machine.args(self.processor);
        machine.args(["-m", MEMORY, "-nic", "none"]);
        machine.args(["-display", "none", "-monitor", "none", "-serial", "stdio"]);
        machine.arg("-kernel").arg(&kernel.image);
        machine.arg("-initrd").arg(initramfs);
        // What the kernel itself finds wrong ends the machine, and with it the run.
        machine.args(["-no-reboot", "-append"]);
        machine.arg("console=ttyS0 quiet oops=panic panic=1");
        let line = cargo::display(&machine);
        println!("kernel: {line}");

        machine.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = machine.spawn().with_context(|| format!("start {line}"))?;
        let console = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut codes = vec![None; self.runs.len()];
        for text in console.split(b'\n') {
            let text = text.context("read the machine's console")?;
            let text = String::from_utf8_lossy(&text);
            let text = text.trim_end_matches('\r');
            println!("{text}");
            for (run, code) in self.runs.iter().zip(&mut codes) {
                // As the function `run` of init.sh prints it.
                let end = text.strip_prefix(&format!("=== {} ended with ", run.name));
                *code = end.and_then(|end| end.parse().ok()).or(*code);
            }
        }
        let status = child.wait().context("wait for the machine")?;
        ensure!(
            status.code() != Some(124),
            "the machine was killed after {DEADLINE} s"
        );
        ensure!(status.success(), "{line}: {status}");
        Ok(codes)
    }
}

/// A kernel as its package brings it.
struct Kernel {
    /// As `uname -r` prints it.
    release: String,
    image: PathBuf,
    /// `lib/modules/RELEASE` of the package.
    modules: PathBuf,
    busybox: PathBuf,
}

impl Kernel {
    /// The kernel that the package `linux-image-cloud-amd64` of this host's release stands for: the
    /// stock kernel with the drivers of virtual machines only.
    fn fetch(version: &str) -> anyhow::Result<Kernel> {
        let depends = packages::depends("linux-image-cloud-amd64")?;
        let release = depends
            .iter()
            .find_map(|package| package.strip_prefix("linux-image-"))
            .context("linux-image-cloud-amd64 stands for no kernel")?;
        if !release.starts_with(&format!("{version}.")) {
            bail!("kernel {version} is not to be had: this system's stock kernel is {release}");
        }
        let files = packages::unpack(&format!("linux-image-{release}"))?;
        let kernel = Kernel {
            release: release.to_owned(),
            image: files.join(format!("boot/vmlinuz-{release}")),
            modules: files.join(format!("lib/modules/{release}")),
            busybox: packages::unpack("busybox-static")?.join("bin/busybox"),
        };
        // The package leaves the index of its modules to its installation.
        let mut depmod = Command::new(&kernel.busybox);
        depmod.args(["depmod", "-b"]).arg(files).arg(release);
        cargo::status(&mut depmod)?;
        Ok(kernel)
    }
}

/// A binary by the name that the workspace has for it. Those of tests end in a hash.
fn executable<'a>(built: &'a [PathBuf], name: &str) -> anyhow::Result<&'a Path> {
    let is_it = |path: &&PathBuf| {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        file == name
            || file
                .rsplit_once('-')
                .is_some_and(|(start, _)| start == name)
    };
    let found = built.iter().find(is_it).map(PathBuf::as_path);
    found.with_context(|| format!("cargo built no {name}"))
}

/// Debug information is three quarters of a binary, and would have to fit the machine's memory.
fn stripped(binary: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let result = folder().join(name);
    let mut strip = Command::new("strip");
    strip
        .arg("--strip-debug")
        .arg("-o")
        .arg(&result)
        .arg(binary);
    cargo::status(&mut strip)?;
    Ok(result)
}

/// The script that is process 1: prepares the system, then runs one binary after the other.
fn init(runs: &[Run]) -> String {
    let mut script = include_str!("kernel/init.sh").to_owned();
    let tests = cargo::root().join("tests");
    script += &format!("cd {}\n", quoted(tests.as_os_str()));
    for run in runs {
        let words: Vec<String> = run.arguments.iter().map(|word| quoted(word)).collect();
        script += &format!("run {} {}\n", run.name, words.join(" "));
    }
    script + "poweroff -f\n"
}

/// A word as a shell reads it.
fn quoted(word: &OsStr) -> String {
    format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"))
}

/// Where packages, stripped binaries and the initramfs are kept.
fn folder() -> PathBuf {
    let folder = cargo::target().join("kernel");
    // What goes wrong here goes wrong again where the folder is used, with a better message.
    let _ = fs::create_dir_all(&folder);
    folder
}
