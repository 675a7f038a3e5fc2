//! Files that are read again when they change, and what their latest good reading came to.
//!
//! [`Watched`] belongs to whoever looks about once a second; it starts nothing itself. A file that is
//! being written is left until two looks find it the same, and a bad one keeps what was read before.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, ensure};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Bytes of one file. A bundle of the public web's roots has a quarter of it.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Some files, and the value they made together.
pub(super) struct Watched<T> {
    paths: Vec<PathBuf>,
    /// Found at the latest look.
    seen: Vec<Option<Version>>,
    /// What was last read, good or bad.
    read: Option<Vec<Option<Version>>>,
    value: Option<T>,
    refused: bool,
}

/// Differs whenever a file was written, replaced, or made readable: the kernel sets the time.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    len: u64,
    changed: (i64, i64),
}

/// What a look found.
pub(super) enum Look {
    Same,
    Changed,
    /// The files changed and cannot be used. The value stays.
    Refused(anyhow::Error),
}

impl<T> Watched<T> {
    /// Of files not read yet.
    pub(super) fn new(paths: Vec<PathBuf>) -> Watched<T> {
        Watched {
            seen: vec![None; paths.len()],
            paths,
            read: None,
            value: None,
            refused: false,
        }
    }

    /// The latest good reading.
    pub(super) fn value(&self) -> Option<&T> {
        self.value.as_ref()
    }

    /// Whether the latest reading was bad.
    pub(super) fn is_refused(&self) -> bool {
        self.refused
    }

    /// Reads the files if they changed and have settled; `anyway`, whether or not.
    pub(super) fn look(&mut self, anyway: bool, load: impl FnOnce() -> anyhow::Result<T>) -> Look {
        let found: Vec<_> = self.paths.iter().map(|path| version(path)).collect();
        let settled = self.seen == found;
        self.seen.clone_from(&found);
        let is_news = settled && self.read.as_ref() != Some(&found);
        if !anyway && !is_news {
            return Look::Same;
        }
        // Of the time before the reading: what is written meanwhile is another version.
        self.read = Some(found);
        match load() {
            Ok(value) => {
                self.value = Some(value);
                self.refused = false;
                Look::Changed
            }
            Err(error) => {
                self.refused = true;
                Look::Refused(error)
            }
        }
    }
}

fn version(path: &Path) -> Option<Version> {
    let metadata = std::fs::metadata(path).ok()?;
    Some(Version {
        device: metadata.dev(),
        inode: metadata.ino(),
        len: metadata.len(),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    })
}

/// Certificates of a PEM file, at least one.
///
/// # Errors
/// Names the file.
pub(super) fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let name = || path.display().to_string();
    let certificates = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<Vec<_>, _>>()
        .with_context(name)?;
    ensure!(!certificates.is_empty(), "{}: no certificate in it", name());
    Ok(certificates)
}

/// The first private key of a PEM file.
///
/// # Errors
/// Names the file.
pub(super) fn private_key(path: &Path) -> anyhow::Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(&read(path)?).with_context(|| path.display().to_string())
}

/// Adds the certificates of a PEM file to `roots`.
///
/// # Errors
/// Names the file.
pub(super) fn add_roots(roots: &mut RootCertStore, path: &Path) -> anyhow::Result<()> {
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// The roots of a PEM file.
///
/// # Errors
/// Names the file.
pub(super) fn roots(path: &Path) -> anyhow::Result<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    add_roots(&mut roots, path)?;
    Ok(Arc::new(roots))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let name = || path.display().to_string();
    let file = std::fs::File::open(path).with_context(name)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .with_context(name)?;
    ensure!(
        bytes.len() as u64 <= MAX_FILE_BYTES,
        "{}: longer than {MAX_FILE_BYTES} bytes",
        name()
    );
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(path: &Path) -> Watched<u32> {
        let mut file = Watched::new(vec![path.to_owned()]);
        assert!(matches!(
            file.look(true, || read_number(path)),
            Look::Changed
        ));
        file
    }

    fn read_number(path: &Path) -> anyhow::Result<u32> {
        Ok(std::fs::read_to_string(path)?.parse()?)
    }

    #[test]
    fn a_file_is_read_when_it_has_changed_and_settled() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("number");
        std::fs::write(&path, "1").unwrap();
        let mut file = number(&path);
        let mut look = |anyway| {
            let look = file.look(anyway, || read_number(&path));
            (look, file.value().copied(), file.is_refused())
        };
        assert!(matches!(look(false), (Look::Same, Some(1), false)));

        std::fs::write(&path, "23").unwrap();
        assert!(matches!(look(false), (Look::Same, Some(1), false)));
        assert!(matches!(look(false), (Look::Changed, Some(23), false)));
        assert!(matches!(look(false), (Look::Same, Some(23), false)));
        assert!(matches!(look(true), (Look::Changed, Some(23), false)));
    }

    #[test]
    fn a_bad_file_is_told_once_and_keeps_what_was_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("number");
        std::fs::write(&path, "1").unwrap();
        let mut file = number(&path);
        let mut look = || {
            let look = file.look(false, || read_number(&path));
            (look, file.value().copied(), file.is_refused())
        };
        for bad in [Some("junk"), None] {
            match bad {
                Some(text) => std::fs::write(&path, text).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            assert!(matches!(look().0, Look::Same));
            assert!(matches!(look(), (Look::Refused(_), Some(1), true)));
            assert!(matches!(look(), (Look::Same, Some(1), true)));
        }
        std::fs::write(&path, "2").unwrap();
        look();
        assert!(matches!(look(), (Look::Changed, Some(2), false)));
    }
}
