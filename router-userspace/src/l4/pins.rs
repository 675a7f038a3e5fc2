//! Where layer 4 pins its maps and links: the folder, its names, and its end.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

/// Where links are pinned, below the pin path.
pub(super) const LINKS: &str = "links";

/// Removes every pinned link and map below `pin_path`, which detaches the programs. Says how many.
pub fn detach(pin_path: &Path) -> anyhow::Result<usize> {
    if !pin_path.exists() {
        return Ok(0);
    }
    let mut removed = 0;
    let links = pin_path.join(LINKS);
    for dir in [links.as_path(), pin_path] {
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

/// The name of a link's pin: the interface's name and index, since a name may pass to another device.
pub(super) fn link_name(interface: &str, ifindex: u32) -> String {
    // bpffs refuses dots in names (kernel: kernel/bpf/inode.c, `bpf_lookup`), VLAN devices have them,
    // and no interface has a colon.
    format!("{}:{ifindex}", interface.replace('.', ":"))
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}
