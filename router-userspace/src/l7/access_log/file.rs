//! A file, or the standard output, that lines are appended to.
//!
//! The file is opened again after a reload, and when its name leads to another one: it is looked at
//! before a write, once a second at most. A name that cannot be opened leaves the file that is open
//! in use.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;

/// How often the file's name is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The name of the standard output.
const STDOUT: &str = "stdout";

pub(super) struct LogFile {
    file: File,
    path: PathBuf,
    looked: Instant,
    /// The last write ended within a line.
    is_torn: bool,
}

impl LogFile {
    /// # Errors
    /// Names the file that cannot be opened.
    pub(super) fn open(path: &Path) -> anyhow::Result<LogFile> {
        Ok(LogFile {
            file: open(path)?,
            path: path.to_owned(),
            looked: Instant::now(),
            is_torn: false,
        })
    }

    /// # Errors
    /// Some or all of the bytes were not written.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let end_of_line = if self.is_torn { "\n" } else { "" };
        let written = self
            .file
            .write_all(end_of_line.as_bytes())
            .and_then(|()| self.file.write_all(bytes));
        self.is_torn = written.is_err();
        written
    }

    /// Opens the file again if that is asked for, or its name leads elsewhere.
    pub(super) fn follow(&mut self, is_stale: bool) {
        if !is_stale && self.looked.elapsed() < LOOK_INTERVAL {
            return;
        }
        self.looked = Instant::now();
        if self.path.as_os_str() == STDOUT || !(is_stale || self.has_moved()) {
            return;
        }
        match open(&self.path) {
            Ok(file) => {
                self.file = file;
                self.is_torn = false;
            }
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "the access log goes on in the file that is open"
                );
            }
        }
    }

    fn has_moved(&self) -> bool {
        let identity = |it: Metadata| (it.dev(), it.ino());
        match (std::fs::metadata(&self.path), self.file.metadata()) {
            (Ok(named), Ok(open)) => identity(named) != identity(open),
            _ => true,
        }
    }
}

fn open(path: &Path) -> anyhow::Result<File> {
    let what = || format!("http.access_log.path {}", path.display());
    if path.as_os_str() == STDOUT {
        let owned = std::io::stdout().as_fd().try_clone_to_owned();
        return Ok(File::from(owned.with_context(what)?));
    }
    // A FIFO opened for reading too neither waits for a reader nor fails without one.
    let is_fifo = std::fs::metadata(path).is_ok_and(|it| it.file_type().is_fifo());
    OpenOptions::new()
        .append(true)
        .create(true)
        .read(is_fifo)
        .mode(0o640)
        .open(path)
        .with_context(what)
}
