//! The thread that writes blocks of lines to a file or to the standard output.
//!
//! The file is opened again after a reload, and when its name leads to another one: it is looked at
//! before a write, once a second at most. A name that cannot be opened leaves the file that is open
//! in use. A block that cannot be written is dropped and its lines are counted.

use std::fs::{File, Metadata, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::l7::metrics::L7Metrics;

/// Blocks that wait to be written, of all workers: with [`BLOCK_BYTES`](super::BLOCK_BYTES) 4 MiB.
pub(super) const BLOCKS: usize = 64;

/// How often the file's name is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The name of the standard output.
const STDOUT: &str = "stdout";

/// Whole lines.
pub(super) struct Block {
    pub bytes: Vec<u8>,
    pub lines: u64,
}

/// The way to the thread, which ends when this is dropped and all is written.
pub(super) struct Writer {
    blocks: SyncSender<Option<Block>>,
    is_stale: Arc<AtomicBool>,
    /// The last block found no room.
    is_behind: AtomicBool,
    metrics: Arc<L7Metrics>,
    end: Mutex<Option<Receiver<()>>>,
}

impl Writer {
    /// # Errors
    /// Names the file that cannot be opened.
    pub(super) fn start(path: &Path, metrics: Arc<L7Metrics>) -> anyhow::Result<Writer> {
        let (blocks, received) = mpsc::sync_channel(BLOCKS);
        let (ends, end) = mpsc::channel();
        let is_stale = Arc::<AtomicBool>::default();
        let mut output = Output {
            file: open(path)?,
            path: path.to_owned(),
            is_stale: Arc::clone(&is_stale),
            looked: Instant::now(),
            is_torn: false,
            fails: false,
            metrics: Arc::clone(&metrics),
        };
        std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || {
                output.write_all(&received);
                drop(ends);
            })
            .context("start the access log's thread")?;
        Ok(Writer {
            blocks,
            is_stale,
            is_behind: AtomicBool::new(false),
            metrics,
            end: Mutex::new(Some(end)),
        })
    }

    /// Drops the block if too many wait.
    pub(super) fn write(&self, block: Block) {
        let lines = block.lines;
        match self.blocks.try_send(Some(block)) {
            Ok(()) => self.is_behind.store(false, Ordering::Relaxed),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.metrics.access_log.count_dropped(lines);
                if !self.is_behind.swap(true, Ordering::Relaxed) {
                    tracing::warn!("the access log is not written fast enough, lines are dropped");
                }
            }
        }
    }

    /// Opens the file again before the next write, and soon.
    pub(super) fn reopen(&self) {
        self.is_stale.store(true, Ordering::Relaxed);
        // A full queue wakes the thread as well.
        let _ = self.blocks.try_send(None);
    }

    pub(super) fn take_end(&self) -> Option<Receiver<()>> {
        self.end
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

/// # Errors
/// Names the file that cannot be opened.
pub(super) fn check(path: &Path) -> anyhow::Result<()> {
    open(path).map(drop)
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

struct Output {
    file: File,
    path: PathBuf,
    is_stale: Arc<AtomicBool>,
    looked: Instant,
    /// The last write ended within a line.
    is_torn: bool,
    /// The last write failed.
    fails: bool,
    metrics: Arc<L7Metrics>,
}

impl Output {
    fn write_all(&mut self, blocks: &Receiver<Option<Block>>) {
        for block in blocks {
            self.follow();
            if let Some(block) = block {
                self.write(&block);
            }
        }
    }

    fn write(&mut self, block: &Block) {
        let end_of_line = if self.is_torn { "\n" } else { "" };
        let written = self
            .file
            .write_all(end_of_line.as_bytes())
            .and_then(|()| self.file.write_all(&block.bytes));
        match written {
            Ok(()) => {
                self.is_torn = false;
                self.metrics.access_log.count_written(block.lines);
            }
            Err(error) => {
                self.is_torn = true;
                self.metrics.access_log.count_dropped(block.lines);
                if !self.fails {
                    tracing::warn!(%error, path = %self.path.display(), "the access log cannot be written");
                }
            }
        }
        self.fails = self.is_torn;
    }

    /// Opens the file again if it was asked for, or its name leads elsewhere.
    fn follow(&mut self) {
        let is_stale = self.is_stale.swap(false, Ordering::Relaxed);
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
