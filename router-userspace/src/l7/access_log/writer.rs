//! The thread that writes blocks of lines, to a file or to syslog.
//!
//! What cannot be written is dropped and its lines are counted.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;

use crate::config::{HttpAccessLog, SyslogAddress};
use crate::l7::access_log::file::LogFile;
use crate::l7::access_log::syslog::Syslog;
use crate::l7::metrics::L7Metrics;

/// Blocks that wait to be written, of all workers: with [`BLOCK_BYTES`](super::BLOCK_BYTES) 4 MiB.
pub(super) const BLOCKS: usize = 64;

/// Whole lines.
pub(super) struct Block {
    pub bytes: Vec<u8>,
    pub lines: u64,
}

/// Where lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sink {
    File(PathBuf),
    Syslog(SyslogAddress),
}

impl Sink {
    /// `None` without an access log.
    pub(super) fn new(config: &HttpAccessLog) -> Option<Sink> {
        let file = config.path.clone().map(Sink::File);
        file.or_else(|| config.syslog.clone().map(Sink::Syslog))
    }

    /// Whether [`Writer::start`] would succeed.
    ///
    /// # Errors
    /// As there.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        Output::open(self).map(drop)
    }
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
    /// Names the file or the socket that cannot be opened.
    pub(super) fn start(sink: &Sink, metrics: Arc<L7Metrics>) -> anyhow::Result<Writer> {
        let (blocks, received) = mpsc::sync_channel(BLOCKS);
        let (ends, end) = mpsc::channel();
        let is_stale = Arc::<AtomicBool>::default();
        let mut writing = Writing {
            output: Output::open(sink)?,
            is_stale: Arc::clone(&is_stale),
            fails: false,
            metrics: Arc::clone(&metrics),
        };
        std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || {
                writing.write_all(&received);
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

enum Output {
    File(LogFile),
    Syslog(Syslog),
}

impl Output {
    fn open(sink: &Sink) -> anyhow::Result<Output> {
        match sink {
            Sink::File(path) => LogFile::open(path).map(Output::File),
            Sink::Syslog(address) => Syslog::open(address).map(Output::Syslog),
        }
    }

    /// # Errors
    /// How many lines were not written, and why.
    fn write(&mut self, block: &Block) -> Result<(), (u64, io::Error)> {
        match self {
            Output::File(file) => file
                .write(&block.bytes)
                .map_err(|error| (block.lines, error)),
            Output::Syslog(syslog) => syslog.write(&block.bytes),
        }
    }
}

/// The thread's part.
struct Writing {
    output: Output,
    is_stale: Arc<AtomicBool>,
    /// The last write failed.
    fails: bool,
    metrics: Arc<L7Metrics>,
}

impl Writing {
    fn write_all(&mut self, blocks: &Receiver<Option<Block>>) {
        for block in blocks {
            let is_stale = self.is_stale.swap(false, Ordering::Relaxed);
            if let Output::File(file) = &mut self.output {
                file.follow(is_stale);
            }
            if let Some(block) = block {
                self.write(&block);
            }
        }
    }

    fn write(&mut self, block: &Block) {
        let (dropped, error) = match self.output.write(block) {
            Ok(()) => (0, None),
            Err((dropped, error)) => (dropped, Some(error)),
        };
        let counters = &self.metrics.access_log;
        counters.count_written(block.lines.saturating_sub(dropped));
        counters.count_dropped(dropped);
        let did_fail = std::mem::replace(&mut self.fails, error.is_some());
        if let Some(error) = error
            && !did_fail
        {
            tracing::warn!(%error, "the access log cannot be written");
        }
    }
}
