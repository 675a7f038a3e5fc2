//! Writes an initramfs: a cpio archive of the format "newc", which the kernel unpacks as its root.
//!
//! Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel. Not compressed,
//! because unpacking would be emulated. Everything belongs to root and was last changed in 1970, so
//! the same files make the same archive.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::Context;

/// inode(7): the type of a file, beside its permissions.
const FOLDER: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;

/// An archive in the making. Folders above what is added come by themselves.
pub(super) struct Archive<W> {
    out: W,
    /// Of the next entry; two entries of the same would be one file.
    inode: u32,
    folders: BTreeSet<String>,
    libraries: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(out: W) -> Archive<W> {
        Archive {
            out,
            inode: 1,
            folders: BTreeSet::new(),
            libraries: BTreeSet::new(),
        }
    }

    pub(super) fn folder(&mut self, path: &str) -> anyhow::Result<()> {
        self.parents(path)?;
        if self.folders.insert(path.to_owned()) {
            self.entry(path, FOLDER | 0o755, &[])?;
        }
        Ok(())
    }

    pub(super) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> anyhow::Result<()> {
        self.parents(path)?;
        self.entry(path, REGULAR | mode, content)
    }

    /// Adds a file of the host.
    pub(super) fn copy(&mut self, from: &Path, path: &str) -> anyhow::Result<()> {
        let read = || format!("read {}", from.display());
        let mode = fs::metadata(from).with_context(read)?.permissions().mode() & 0o777;
        self.file(path, mode, &fs::read(from).with_context(read)?)
    }

    /// Adds a folder of the host with all that is in it; links are followed. The empty path is the
    /// root.
    pub(super) fn copy_all(&mut self, from: &Path, path: &str) -> anyhow::Result<()> {
        if !path.is_empty() {
            self.folder(path)?;
        }
        let entries = fs::read_dir(from).with_context(|| format!("read {}", from.display()))?;
        let mut files = entries
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<Vec<_>>>()?;
        files.sort();
        for file in files {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let path = format!("{path}/{name}");
            if file.is_dir() {
                self.copy_all(&file, &path)?;
            } else {
                self.copy(&file, &path)?;
            }
        }
        Ok(())
    }

    /// Adds a program of the host, and the libraries that the host's loader finds for it.
    pub(super) fn program(&mut self, from: &Path, path: &str) -> anyhow::Result<()> {
        self.copy(from, path)?;
        let output = Command::new("ldd")
            .arg(from)
            .output()
            .context("start ldd")?;
        // It fails for programs that need none.
        for library in String::from_utf8_lossy(&output.stdout)
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
        {
            if self.libraries.insert(library.to_owned()) {
                self.copy(Path::new(library), library)?;
            }
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        self.entry("/TRAILER!!!", 0, &[])?;
        self.out.flush().context("write the archive")
    }

    fn parents(&mut self, path: &str) -> anyhow::Result<()> {
        let parent = path.rsplit_once('/').map(|(parent, _)| parent);
        match parent {
            Some(parent) if !parent.is_empty() => self.folder(parent),
            _ => Ok(()),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> anyhow::Result<()> {
        let name = path.trim_start_matches('/');
        let length = u32::try_from(content.len()).ok();
        let length = length.with_context(|| format!("{path} is larger than cpio can tell"))?;
        let name_length = u32::try_from(name.len() + 1).expect("paths are short");
        let (owner, group, links, changed, device) = (0, 0, 1, 0, 0);
        let fields = [
            self.inode,
            mode,
            owner,
            group,
            links,
            changed,
            length,
            device,
            device,
            device,
            device,
            name_length,
            0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header += &format!("{field:08x}");
        }
        header += name;
        header.push('\0');
        self.inode += 1;
        self.write_padded(header.as_bytes())?;
        self.write_padded(content)
    }

    /// Header and content both end at a multiple of four bytes.
    fn write_padded(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let padding = &[0; 3][..bytes.len().next_multiple_of(4) - bytes.len()];
        for part in [bytes, padding] {
            self.out.write_all(part).context("write the archive")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_before_what_is_in_them_and_every_part_is_padded() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.file("/a/b", 0o755, b"hello").unwrap();
        archive.file("/a/c", 0o644, b"").unwrap();
        archive.finish().unwrap();
        // Magic, inode, mode, six fields, ... : the name starts after 6 + 13 * 8 octets.
        let text = String::from_utf8(bytes).unwrap();
        let entries: Vec<&str> = text.split("070701").skip(1).collect();
        let names = entries
            .iter()
            .map(|entry| entry[104..].trim_end_matches('\0'));
        assert_eq!(
            names.collect::<Vec<_>>(),
            ["a", "a/b\0\0\0hello", "a/c", "TRAILER!!!"]
        );
        let modes: Vec<&str> = entries.iter().map(|entry| &entry[8..16]).collect();
        assert_eq!(modes, ["000041ed", "000081ed", "000081a4", "00000000"]);
        assert!(entries.iter().all(|entry| (entry.len() + 6) % 4 == 0));
    }
}
