//! The access log: one line for each request, written beside the requests and never in their way.
//!
//! ```text
//!  record ─▶ Entry ─▶ line ─▶ block of its worker ──(64 blocks)──▶ access-log thread ─▶ write(2), send(2)
//! ```
//!
//! A worker renders its lines into a block of its own and hands it on when it is full or a tenth of a
//! second old. Where the thread that writes is behind by [`writer::BLOCKS`] blocks, further ones are
//! dropped and their lines counted. Without an access log a request pays for one look at the
//! settings.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use http::HeaderName;
use tokio::sync::Notify;

pub(super) use crate::l7::access_log::entry::{Aborted, Ended, Entry};

use crate::config::{AccessLogFormat, HttpAccessLog, HttpConfig, RedactQuery, TraceMode};
use crate::l7::access_log::writer::{Block, Sink, Writer};
use crate::l7::metrics::L7Metrics;
use crate::l7::trace;

mod entry;
mod escape;
mod file;
mod line;
mod syslog;
mod timestamp;
mod writer;

/// A worker hands a block on once it has this many bytes; one line may go beyond.
const BLOCK_BYTES: usize = 64 * 1024;

/// How long a line waits for others.
const FLUSH_INTERVAL: Duration = Duration::from_millis(100);

/// An open access log, one for all workers.
pub(super) struct AccessLog {
    sink: Sink,
    rules: Rules,
    writer: Arc<Writer>,
}

/// What a line has.
struct Rules {
    format: AccessLogFormat,
    /// As they are looked up, and as they are named in a line.
    headers: Vec<(HeaderName, String)>,
    redact_query: RedactQuery,
    client_address: bool,
}

impl AccessLog {
    /// Opens the log that `config` asks for; one with the same sink takes over the writer of `former`,
    /// which opens its file again.
    ///
    /// # Errors
    /// Names the file or the socket that cannot be opened.
    pub(super) fn open(
        config: &HttpConfig,
        former: Option<&AccessLog>,
        metrics: &Arc<L7Metrics>,
    ) -> anyhow::Result<Option<Arc<AccessLog>>> {
        let Some(sink) = Sink::new(&config.access_log) else {
            return Ok(None);
        };
        let writer = match former.filter(|former| former.sink == sink) {
            Some(former) => {
                former.writer.reopen();
                Arc::clone(&former.writer)
            }
            None => Arc::new(Writer::start(&sink, Arc::clone(metrics))?),
        };
        Ok(Some(Arc::new(AccessLog {
            sink,
            rules: Rules::new(config),
            writer,
        })))
    }

    /// Whether [`AccessLog::open`] would succeed.
    ///
    /// # Errors
    /// As there.
    pub(super) fn check(config: &HttpAccessLog) -> anyhow::Result<()> {
        Sink::new(config).map_or(Ok(()), |sink| sink.check())
    }

    /// Closed when all has been written after the last use of this log.
    pub(super) fn take_end(&self) -> Option<mpsc::Receiver<()>> {
        self.writer.take_end()
    }
}

impl Rules {
    fn new(http: &HttpConfig) -> Rules {
        let config = &http.access_log;
        let named = |header: HeaderName| {
            let label = match config.format {
                AccessLogFormat::Json => header.as_str().to_owned(),
                AccessLogFormat::Gorouter => header.as_str().replace('-', "_"),
            };
            (header, label)
        };
        let configured = config.headers.iter();
        let configured = configured.filter_map(|it| HeaderName::from_bytes(it.as_bytes()).ok());
        Rules {
            format: config.format,
            headers: configured.chain(traced(http)).map(named).collect(),
            redact_query: config.redact_query,
            client_address: !config.disable_client_address,
        }
    }
}

/// The trace headers that gorouter logs.
fn traced(http: &HttpConfig) -> Vec<HeaderName> {
    let tracing = &http.tracing;
    let mut names = Vec::new();
    if http.access_log.format != AccessLogFormat::Gorouter || tracing.mode == TraceMode::Off {
        return names;
    }
    if tracing.b3 {
        names.extend([
            trace::B3_TRACE_ID,
            trace::B3_SPAN_ID,
            trace::B3_PARENT_ID,
            trace::B3,
        ]);
    }
    if tracing.w3c {
        names.extend([trace::TRACEPARENT, trace::TRACESTATE]);
    }
    names
}

/// One worker's part: the block it fills.
pub(super) struct WorkerLog {
    log: Arc<AccessLog>,
    block: RefCell<Vec<u8>>,
    lines: Cell<u64>,
    /// The first line of a block wakes the task that hands it on.
    begun: Rc<Notify>,
}

/// This worker's part of the `current` log, which `known` keeps. Called for each request.
pub(super) fn of_worker(
    known: &RefCell<Option<Rc<WorkerLog>>>,
    current: Option<&Arc<AccessLog>>,
) -> Option<Rc<WorkerLog>> {
    let mut known = known.borrow_mut();
    let is_current = match (&*known, current) {
        (None, None) => return None,
        (Some(known), Some(current)) => Arc::ptr_eq(&known.log, current),
        _ => false,
    };
    if !is_current {
        *known = current.map(WorkerLog::start);
    }
    known.clone()
}

impl WorkerLog {
    fn start(log: &Arc<AccessLog>) -> Rc<WorkerLog> {
        let started = Rc::new(WorkerLog {
            log: Arc::clone(log),
            block: RefCell::new(Vec::with_capacity(BLOCK_BYTES)),
            lines: Cell::new(0),
            begun: Rc::default(),
        });
        let begun = Rc::clone(&started.begun);
        tokio::task::spawn_local(hand_on(Rc::downgrade(&started), begun));
        started
    }

    fn rules(&self) -> &Rules {
        &self.log.rules
    }

    /// Takes in one line.
    pub(super) fn write(&self, entry: &Entry, ended: &Ended<'_>) {
        let mut block = self.block.borrow_mut();
        let is_first = block.is_empty();
        line::render(&mut block, self.rules(), entry, ended);
        self.lines.set(self.lines.get() + 1);
        if block.len() >= BLOCK_BYTES {
            drop(block);
            self.flush();
        } else if is_first {
            self.begun.notify_one();
        }
    }

    fn flush(&self) {
        let mut bytes = self.block.borrow_mut();
        if bytes.is_empty() {
            return;
        }
        let lines = self.lines.take();
        let full = std::mem::replace(&mut *bytes, Vec::with_capacity(BLOCK_BYTES));
        self.log.writer.write(Block { bytes: full, lines });
    }
}

impl Drop for WorkerLog {
    fn drop(&mut self) {
        self.flush();
        self.begun.notify_one();
    }
}

/// Hands on blocks that do not fill up, until the log is dropped.
async fn hand_on(log: Weak<WorkerLog>, begun: Rc<Notify>) {
    loop {
        begun.notified().await;
        tokio::time::sleep(FLUSH_INTERVAL).await;
        let Some(log) = log.upgrade() else {
            return;
        };
        log.flush();
    }
}
