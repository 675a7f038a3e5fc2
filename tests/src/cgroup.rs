//! A cgroup of one's own below the root of cgroup2, for programs that look at the sockets in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use anyhow::Context;

/// Removed when dropped, after its processes have gone where this one was.
pub struct Cgroup {
    path: PathBuf,
    home: PathBuf,
}

impl Cgroup {
    /// An empty one; its name carries the process id.
    ///
    /// # Errors
    /// Not root, or cgroup2 is not mounted.
    pub fn create() -> anyhow::Result<Cgroup> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
        let root =
            viaduct::l4::datapath::cgroup2_mount(&mounts).context("no cgroup2 is mounted")?;
        let own = fs::read_to_string("/proc/self/cgroup").context("read /proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
        let home = root.join(own.context("this process is in no cgroup of cgroup2")?);
        let path = root.join(format!("viaduct-{}", process::id()));
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Cgroup { path, home })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves this process inside, with all its threads. Sockets belong to where they are made.
    pub fn enter(&self) -> anyhow::Result<()> {
        enter(&self.path, process::id())
    }

    /// Moves this process back where it was.
    pub fn leave(&self) -> anyhow::Result<()> {
        enter(&self.home, process::id())
    }

    fn remove(&self) -> anyhow::Result<()> {
        let inside = fs::read_to_string(self.path.join("cgroup.procs"))?;
        for process in inside.lines() {
            enter(&self.home, process.parse().context("a process id")?)?;
        }
        fs::remove_dir(&self.path).with_context(|| format!("remove {}", self.path.display()))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("lab: {error:#}");
        }
    }
}

fn enter(cgroup: &Path, process: u32) -> anyhow::Result<()> {
    let procs = cgroup.join("cgroup.procs");
    fs::write(&procs, process.to_string()).with_context(|| format!("write {}", procs.display()))
}
