//! Processes of a lab: started in a namespace, their output kept, gone when dropped.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long anything in a lab may take that ought to take no time at all. Generous, because a busy
/// machine is not a failed test.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// How often a condition is looked at until it holds.
const POLL: Duration = Duration::from_millis(5);

/// Lines of a log shown when a test fails.
const LOG_LINES: usize = 60;

/// Set by whoever takes signals: every wait ends.
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The environment's factor for [`DEADLINE`]: an emulated machine is tens of times slower.
const PATIENCE: &str = "VIADUCT_TEST_PATIENCE";

/// Waits until `condition` returns something, and returns that.
///
/// # Errors
/// It did not within [`DEADLINE`] times [`PATIENCE`], or [`INTERRUPTED`] was set; the message says
/// what was waited for.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    let patience = std::env::var(PATIENCE).ok();
    let patience = patience.and_then(|factor| factor.parse().ok()).unwrap_or(1);
    let longest = DEADLINE * patience;
    let deadline = Instant::now() + longest;
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if INTERRUPTED.load(Ordering::Relaxed) {
            bail!("interrupted while waiting for {what}");
        }
        if Instant::now() > deadline {
            bail!("waited {longest:?} for {what}");
        }
        thread::sleep(POLL);
    }
}

/// A child with its output in a file. Killed when dropped; a failing test then shows its log.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`; what it prints goes to the end of `NAME.log` in `folder`.
    pub fn start(name: &str, mut command: Command, folder: &Path) -> anyhow::Result<Process> {
        let log = folder.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log);
        let file = file.with_context(|| format!("open {}", log.display()))?;
        // A group of its own: Ctrl-C is the lab's to handle, which ends its children in order.
        command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Process {
            name: name.to_owned(),
            child,
            log,
        })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// All it and its namesakes before it printed.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// SIGKILL, as by the kernel's out-of-memory killer, and waits.
    pub fn kill(&mut self) {
        // Both fail only for a child that has ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("process ids fit i32");
        // Fails only for a child that has ended.
        let _ = kill(Pid::from_raw(pid), signal);
    }

    /// Waits for its end, within [`DEADLINE`].
    pub fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        let what = format!("{} to exit", self.name);
        wait_for(&what, || self.child.try_wait().transpose())?.context("wait for a child")
    }

    /// Fails once the process has ended, with the end of its log.
    pub fn ensure_alive(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait().context("look at a child")? {
            None => Ok(()),
            Some(status) => bail!("{} ended ({status}):\n{}", self.name, tail(&self.log())),
        }
    }

    /// CPU time of all its threads so far, user and system.
    ///
    /// In whole ticks of 10 ms (proc_pid_stat(5), fields 14 and 15, in `sysconf(_SC_CLK_TCK)`).
    pub fn cpu_time(&self) -> anyhow::Result<Duration> {
        let path = format!("/proc/{}/stat", self.id());
        let stat = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        // The second field is the name in brackets, and may contain anything.
        let (_, fields) = stat
            .rsplit_once(") ")
            .context("no name in /proc/PID/stat")?;
        let ticks = fields.split(' ').skip(11).take(2).map(str::parse::<u64>);
        let ticks = ticks
            .sum::<Result<u64, _>>()
            .context("read ticks of /proc/PID/stat")?;
        Ok(Duration::from_millis(ticks * 10))
    }

    /// Bytes of memory that it has in RAM (proc_pid_status(5), `VmRSS`).
    pub fn memory(&self) -> anyhow::Result<u64> {
        let path = format!("/proc/{}/status", self.id());
        let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        let kib: u64 = kib.context("no VmRSS")?.parse().context("read VmRSS")?;
        Ok(kib << 10)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("--- {} printed:\n{}", self.name, tail(&self.log()));
        }
    }
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}
