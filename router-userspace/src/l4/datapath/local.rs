//! Puts the programs for clients on this host on a cgroup, and keeps them there.
//!
//! They are loaded only where they are wanted. Links are pinned; an agent that starts attaches its own
//! programs beside those of the one before, then puts its pins in place of theirs. Both at once do no
//! harm: what the first has translated is no VIP to the second.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use aya::Ebpf;
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, Program};

use super::{Datapath, programs};
use crate::config::LocalClients;
use crate::l4::pins;

/// In the order of attaching: whoever shows a VIP comes before whoever translates it. What follows
/// the first word is the hook's name.
const PROGRAMS: [&str; 9] = [
    "local_release",
    "local_recvmsg4",
    "local_recvmsg6",
    "local_getpeername4",
    "local_getpeername6",
    "local_sendmsg4",
    "local_sendmsg6",
    "local_connect4",
    "local_connect6",
];

impl Datapath {
    /// Has VIPs translated at the sockets of a cgroup and all below it, or of none. Says of which.
    ///
    /// # Errors
    /// A cgroup that was named is not there, or the kernel refuses a program.
    pub fn attach_local(&mut self, clients: &LocalClients) -> anyhow::Result<Option<PathBuf>> {
        let cgroup = match clients {
            LocalClients::Off => None,
            LocalClients::Cgroup(path) => Some(path.clone()),
            LocalClients::Auto => {
                let mounts =
                    fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
                cgroup2_mount(&mounts)
            }
        };
        match &cgroup {
            Some(path) => self
                .attach_to_cgroup(path)
                .with_context(|| format!("translate for clients in {}", path.display()))?,
            None => self.release_local()?,
        }
        Ok(cgroup)
    }

    fn attach_to_cgroup(&mut self, path: &Path) -> anyhow::Result<()> {
        let cgroup = File::open(path).context("open the cgroup")?;
        for name in PROGRAMS {
            // They are when layer 4 is taken back.
            if self.loaded.iter().any(|loaded| loaded.name == name) {
                continue;
            }
            let loaded = programs::load_one(&mut self.ebpf, name)?;
            self.loaded.push(programs::Loaded {
                name,
                outcome: Ok(loaded),
            });
        }
        for name in PROGRAMS {
            let link = attach(&mut self.ebpf, name, &cgroup)
                .with_context(|| format!("attach program {name}"))?;
            match &self.pin_path {
                Some(pin_path) => replace_pin(link, &pins::local_link(pin_path, name))?,
                None => self.local.push(link),
            }
        }
        Ok(())
    }

    /// Takes the programs of an earlier agent away, the translating ones first.
    fn release_local(&mut self) -> anyhow::Result<()> {
        let Some(pin_path) = &self.pin_path else {
            return Ok(());
        };
        let mut were_there = false;
        for name in PROGRAMS.into_iter().rev() {
            let pin = pins::local_link(pin_path, name);
            if pin.exists() {
                fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))?;
                were_there = true;
            }
        }
        if were_there {
            // Nobody hears of the ends of the sockets that are open.
            self.maps.clear_local_flows()?;
        }
        Ok(())
    }
}

fn attach(ebpf: &mut Ebpf, name: &str, cgroup: &File) -> anyhow::Result<FdLink> {
    // Without a flag: a link allows others' programs on the cgroup and on those below it by itself,
    // and takes no such flag (kernel: kernel/bpf/cgroup.c, `cgroup_bpf_link_attach`).
    const MODE: CgroupAttachMode = CgroupAttachMode::Single;
    let program = ebpf
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?;
    let link = match program {
        Program::CgroupSockAddr(program) => {
            let id = program.attach(cgroup, MODE)?;
            program.take_link(id)?.try_into()
        }
        Program::CgroupSock(program) => {
            let id = program.attach(cgroup, MODE)?;
            program.take_link(id)?.try_into()
        }
        _ => bail!("it is of another kind"),
    };
    link.context("no link to pin")
}

/// Pins a link where another may be, which ends with its pin.
fn replace_pin(link: FdLink, pin: &Path) -> anyhow::Result<()> {
    let mut new = pin.as_os_str().to_owned();
    new.push(":new");
    let new = PathBuf::from(new);
    if new.exists() {
        // Of an agent that ended right here.
        fs::remove_file(&new).with_context(|| format!("remove {}", new.display()))?;
    }
    link.pin(&new)
        .with_context(|| format!("pin {}", new.display()))?;
    fs::rename(&new, pin).with_context(|| format!("rename to {}", pin.display()))
}

/// Where cgroup2 is mounted, by the lines of /proc/self/mounts.
pub fn cgroup2_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let path = words.next()?;
        // fstab(5): spaces are written \040.
        (words.next()? == "cgroup2").then(|| path.replace("\\040", " ").into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_wherever_it_is_mounted() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n\
                      cgroup2 /a\\040b cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_mount(mounts), Some(PathBuf::from("/a b")));
        assert_eq!(cgroup2_mount("cgroup /x cgroup rw 0 0\n"), None);
    }
}
