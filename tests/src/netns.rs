//! A network namespace with a name, and ways to act inside it.
//!
//! Made and removed with iproute2, so that `ip netns` shows it. A namespace is a property of a
//! thread: [`Netns::run`] enters it on a fresh one, and threads started there stay inside.

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

use anyhow::{Context, ensure};
use nix::sched::{CloneFlags, setns};

/// A network namespace, removed when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// # Errors
    /// Not root, or the name is taken.
    pub fn create(name: &str) -> anyhow::Result<Netns> {
        ip(&["netns", "add", name])?;
        Ok(Netns {
            name: name.to_owned(),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `f` on a fresh thread inside, and waits for it. A panic goes on in the caller.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                enter(&self.name);
                f()
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a thread inside.
    pub fn spawn<T: Send + 'static>(
        &self,
        thread_name: &str,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let name = self.name.clone();
        let inside = move || {
            enter(&name);
            f()
        };
        thread::Builder::new()
            .name(thread_name.to_owned())
            .spawn(inside)
            .expect("the system has threads left")
    }

    /// A command that will run inside. The mounts stay those of the caller, unlike with `ip netns
    /// exec`, which remounts /sys and so hides every pinned BPF object.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.name))
            .arg("--")
            .arg(program);
        command
    }

    /// Applies lines of `ip`'s batch language, as in `link set lo up`.
    pub fn ip(&self, lines: &[&str]) -> anyhow::Result<()> {
        let mut child = Command::new("ip")
            .args(["-netns", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start ip")?;
        let mut stdin = child.stdin.take().expect("stdin is piped");
        stdin
            .write_all(lines.join("\n").as_bytes())
            .context("write to ip")?;
        drop(stdin);
        let output = child.wait_with_output().context("wait for ip")?;
        let message = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "ip in {}: {}",
            self.name,
            message.trim()
        );
        Ok(())
    }

    /// Writes a setting below /proc/sys/net of this namespace.
    pub fn sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let path = format!("/proc/sys/net/{key}");
        self.run(|| std::fs::write(&path, value))
            .with_context(|| format!("write {path}"))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "del", &self.name]) {
            eprintln!("lab: {error:#}");
        }
    }
}

/// Runs one `ip` command in the namespace of the caller.
pub(crate) fn ip(arguments: &[&str]) -> anyhow::Result<String> {
    output(Command::new("ip").args(arguments))
}

/// Runs a command to its end and returns what it printed.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<String> {
    let line = format!("{command:?}");
    let output = command.output().with_context(|| format!("start {line}"))?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{line}: {}", message.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Moves the calling thread into a namespace, for good.
fn enter(name: &str) {
    let path = format!("/run/netns/{name}");
    let file = File::open(&path).unwrap_or_else(|error| panic!("open {path}: {error}"));
    setns(file, CloneFlags::CLONE_NEWNET).unwrap_or_else(|error| panic!("enter {name}: {error}"));
}
