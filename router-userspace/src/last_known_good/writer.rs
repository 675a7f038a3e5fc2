//! The thread that writes.

use std::fs::{self, File, TryLockError};
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Instant, SystemTime};

use anyhow::Context as _;

use super::{LOCK, file};
use crate::config::StateConfig;
use crate::metrics::{Counter, Metrics};
use crate::snapshot::{Published, Snapshot};

/// Of the time that writing takes, this many times as much passes until the next.
const REST: u32 = 10;

/// What there is to tell of the state on disk.
#[derive(Debug, Default)]
pub struct State {
    pub writes: Counter,
    pub failures: Counter,
    told: Mutex<Told>,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Told {
    /// The age of what was read at the start, if anything was.
    pub restored_as_of: Option<SystemTime>,
    /// Of the latest writing.
    pub written: Option<SystemTime>,
    pub bytes: u64,
}

impl State {
    pub fn told(&self) -> Told {
        *self.lock()
    }

    pub fn restored(&self, as_of: SystemTime) {
        self.lock().restored_as_of = Some(as_of);
    }

    fn wrote(&self, bytes: u64) {
        self.writes.inc();
        let mut told = self.lock();
        told.written = Some(SystemTime::now());
        told.bytes = bytes;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread while it runs.
pub struct Writer {
    stop: mpsc::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl Writer {
    /// Writes what is published, if it is another than the last, and ends.
    pub fn stop(self) {
        drop(self.stop);
        // It tells of its failures by itself.
        let _ = self.thread.join();
    }
}

/// Starts to write, if it is configured. While another process writes to the directory, as the one that
/// this takes over from, this one waits its turn.
///
/// # Errors
/// Names the directory, which is made if it is not there.
pub fn start(
    config: &StateConfig,
    published: Published,
    metrics: Arc<Metrics>,
) -> anyhow::Result<Option<Writer>> {
    let Some(directory) = config.directory.clone() else {
        return Ok(None);
    };
    let what = || format!("state.directory {}", directory.display());
    fs::create_dir_all(&directory).with_context(what)?;
    let lock = File::create(directory.join(LOCK)).with_context(what)?;
    let (stop, stopped) = mpsc::channel();
    let mut writing = Writing {
        lock,
        holds_lock: false,
        directory: directory.clone(),
        published,
        metrics,
        last: Snapshot::default(),
        failing: false,
    };
    let interval = config.interval;
    let thread = thread::Builder::new()
        .name("state".to_owned())
        .spawn(move || {
            let mut pause = interval;
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                let begin = Instant::now();
                writing.write();
                pause = interval.max(begin.elapsed() * REST);
            }
            writing.write();
        })
        .context("start the thread that keeps the routes")?;
    Ok(Some(Writer { stop, thread }))
}

struct Writing {
    /// Held as long as the process lives.
    lock: File,
    holds_lock: bool,
    directory: PathBuf,
    published: Published,
    metrics: Arc<Metrics>,
    /// What was written last.
    last: Snapshot,
    failing: bool,
}

impl Writing {
    fn write(&mut self) {
        let snapshot = self.published.load_full();
        if !differs(&self.last, &snapshot) || !self.may_write() {
            return;
        }
        let state = &self.metrics.state;
        let begin = Instant::now();
        let adopted_as_of = state.told().restored_as_of;
        match file::write(&self.directory, &snapshot, adopted_as_of) {
            Ok(bytes) => {
                let elapsed = begin.elapsed();
                tracing::debug!(bytes, ?elapsed, "routes written to disk");
                state.wrote(bytes);
                self.last = Snapshot::clone(&snapshot);
                if std::mem::take(&mut self.failing) {
                    tracing::info!("routes are written to disk again");
                }
            }
            Err(error) => {
                state.failures.inc();
                if !std::mem::replace(&mut self.failing, true) {
                    let directory = self.directory.display();
                    tracing::warn!(
                        %directory, %error,
                        "routes not written to disk: what is there stays, and it is tried again"
                    );
                }
            }
        }
    }

    fn may_write(&mut self) -> bool {
        if !self.holds_lock {
            self.holds_lock = match self.lock.try_lock() {
                Ok(()) => true,
                Err(TryLockError::WouldBlock) => {
                    tracing::debug!("another process writes its routes to state.directory");
                    false
                }
                Err(TryLockError::Error(error)) => {
                    tracing::warn!(%error, "lock state.directory");
                    false
                }
            };
        }
        self.holds_lock
    }
}

/// Whether the routes are others, whatever became of their backends' health.
fn differs(last: &Snapshot, next: &Snapshot) -> bool {
    if last.revision == next.revision {
        return false;
    }
    let mut hosts = false;
    last.hosts.diff(&next.hosts, &mut |_, _| hosts = true);
    hosts || !last.vips.ptr_eq(&next.vips) || !last.declared.ptr_eq(&next.declared)
}
