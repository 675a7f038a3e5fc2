//! Where layer 4 pins its maps and links: the folder, its names, and its end.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::l4::datapath::{Hook, release};

/// Where links are pinned, below the pin path.
const LINKS: &str = "links";

/// Removes all pins: links and filters first, which takes the programs off their interfaces, then the
/// maps. Says how many there were.
///
/// # Errors
/// Names what could not be removed; the rest is left as it is.
pub(super) fn detach(pin_path: &Path) -> anyhow::Result<usize> {
    if !pin_path.exists() {
        return Ok(0);
    }
    let mut removed = 0;
    for pin in links(pin_path)? {
        release(&pin)?;
        removed += 1;
    }
    for dir in [pin_path.join(LINKS).as_path(), pin_path] {
        let Ok(entries) = fs::read_dir(dir) else {
            continue;
        };
        for entry in entries {
            let path = entry
                .with_context(|| format!("list {}", dir.display()))?
                .path();
            if path.is_dir() {
                continue;
            }
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
            removed += 1;
        }
        fs::remove_dir(dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    Ok(removed)
}

/// Makes the folder, on a bpffs that is mounted where it belongs if it is not.
pub(super) fn prepare_pin_path(path: &Path) -> anyhow::Result<()> {
    let bpffs = Path::new("/sys/fs/bpf");
    if path.starts_with(bpffs) && !is_bpffs(bpffs) {
        nix::mount::mount(
            Some("bpf"),
            bpffs,
            Some("bpf"),
            nix::mount::MsFlags::empty(),
            None::<&str>,
        )
        .context("mount a bpffs on /sys/fs/bpf")?;
    }
    fs::create_dir_all(path.join(LINKS))
        .with_context(|| format!("create l4.pin_path {}", path.display()))?;
    if !is_bpffs(path) {
        bail!("l4.pin_path {} is not on a bpffs", path.display());
    }
    Ok(())
}

/// Makes this process the one that writes the pinned maps, until the file is closed.
///
/// # Errors
/// Another process is.
pub(super) fn lock(path: &Path) -> anyhow::Result<File> {
    let what = || format!("lock l4.pin_path {}", path.display());
    let folder = File::open(path).with_context(what)?;
    match folder.try_lock() {
        Ok(()) => Ok(folder),
        Err(TryLockError::WouldBlock) => {
            bail!(
                "l4.pin_path {}: another viaduct runs with it",
                path.display()
            )
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(what),
    }
}

pub fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}

/// Where the link of a program for clients on this host is pinned.
pub(super) fn local_link(pin_path: &Path, program: &str) -> PathBuf {
    pin_path.join(LINKS).join(program)
}

/// A pinned link, or, of a hook whose link cannot be pinned, the pinned program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkPin {
    pub path: PathBuf,
    pub ifindex: u32,
    pub hook: Hook,
}

impl LinkPin {
    pub(super) fn new(pin_path: &Path, interface: &str, ifindex: u32, hook: Hook) -> LinkPin {
        // bpffs refuses dots in names (kernel: kernel/bpf/inode.c, `bpf_lookup`), VLAN devices have
        // them, and no interface has a colon. A name may pass to another device, an index does not.
        let name = format!("{}:{ifindex}:{hook}", interface.replace('.', ":"));
        LinkPin {
            path: pin_path.join(LINKS).join(name),
            ifindex,
            hook,
        }
    }

    fn read(path: PathBuf) -> Option<LinkPin> {
        let name = path.file_name()?.to_str()?;
        let mut parts = name.rsplitn(3, ':');
        let hook = parts.next()?.parse().ok()?;
        let ifindex = parts.next()?.parse().ok()?;
        parts.next()?;
        Some(LinkPin {
            path,
            ifindex,
            hook,
        })
    }
}

/// The pinned links. What has another name there is not ours.
pub(super) fn links(pin_path: &Path) -> anyhow::Result<Vec<LinkPin>> {
    let dir = pin_path.join(LINKS);
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut links = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
        let entry = entry.with_context(|| format!("list {}", dir.display()))?;
        links.extend(LinkPin::read(entry.path()));
    }
    Ok(links)
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hook::Native => "native",
            Hook::Generic => "generic",
            Hook::Tcx => "tcx",
            Hook::Clsact => "clsact",
            Hook::TcxEgress => "tcx-egress",
            Hook::ClsactEgress => "clsact-egress",
        })
    }
}

impl FromStr for Hook {
    type Err = ();

    fn from_str(text: &str) -> Result<Hook, ()> {
        [
            Hook::Native,
            Hook::Generic,
            Hook::Tcx,
            Hook::Clsact,
            Hook::TcxEgress,
            Hook::ClsactEgress,
        ]
        .into_iter()
        .find(|hook| hook.to_string() == text)
        .ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_pin_says_what_is_pinned() {
        for (interface, hook, name) in [
            ("eth0", Hook::Tcx, "eth0:7:tcx"),
            ("eth0", Hook::TcxEgress, "eth0:7:tcx-egress"),
            ("eth0.100", Hook::Tcx, "eth0:100:7:tcx"),
        ] {
            let pin = LinkPin::new(Path::new("/pins"), interface, 7, hook);
            assert_eq!(pin.path, Path::new("/pins/links").join(name));
            assert_eq!(LinkPin::read(pin.path.clone()), Some(pin));
        }
        for name in [
            "eth0",
            "local_connect4:new",
            "eth0:7",
            "eth0:7:other",
            "eth0:x:native",
        ] {
            assert_eq!(LinkPin::read(Path::new("/pins/links").join(name)), None);
        }
    }
}
