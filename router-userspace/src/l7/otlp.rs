//! Spans of requests for a collector of OpenTelemetry, over OTLP/HTTP with protobuf
//! (opentelemetry.io/docs/specs/otlp).
//!
//! ```text
//!  record ─▶ RequestSpan ──(8192)──▶ otlp thread ─▶ batches of 512 ─▶ POST /v1/traces
//! ```
//!
//! A sampled request gathers what its span has and hands it over when it ends. Where the collector
//! does not keep up, or is gone, further ones are dropped and counted. A request waits for none of this.

use std::sync::{Arc, Mutex, PoisonError, mpsc};

use anyhow::Context;
use tokio::sync::Notify;
use tokio::sync::mpsc::Sender;

pub(super) use crate::l7::otlp::span::{Ended, RequestSpan};

use crate::config::{CollectorUrl, HttpTracing};
use crate::l7::metrics::L7Metrics;
use crate::l7::otlp::collector::Collector;
use crate::l7::otlp::export::Export;

mod collector;
mod export;
mod span;

/// Requests that wait to be exported, of all workers.
const QUEUE: usize = 8192;

/// The way to the thread, which ends when this is dropped and all is exported, or the collector is gone.
pub(super) struct Exporter {
    endpoint: CollectorUrl,
    service_name: String,
    spans: Sender<Box<RequestSpan>>,
    /// A batch is full, or the last one.
    is_due: Arc<Notify>,
    metrics: Arc<L7Metrics>,
    end: Mutex<Option<mpsc::Receiver<()>>>,
}

impl Exporter {
    /// Starts what `tracing` asks for, if that is not what `former` does.
    ///
    /// # Errors
    /// The system has no thread.
    pub(super) fn start(
        tracing: &HttpTracing,
        former: Option<&Arc<Exporter>>,
        metrics: &Arc<L7Metrics>,
    ) -> anyhow::Result<Option<Arc<Exporter>>> {
        let Some(endpoint) = &tracing.endpoint else {
            return Ok(None);
        };
        let is_same = |it: &&Arc<Exporter>| {
            it.endpoint == *endpoint && it.service_name == tracing.service_name
        };
        if let Some(former) = former.filter(is_same) {
            return Ok(Some(Arc::clone(former)));
        }
        let (spans, received) = tokio::sync::mpsc::channel(QUEUE);
        let (ends, end) = mpsc::channel();
        let is_due = Arc::<Notify>::default();
        let export = Export {
            spans: received,
            is_due: Arc::clone(&is_due),
            collector: Collector::new(endpoint.clone()),
            resource: span::resource(&tracing.service_name),
            metrics: Arc::clone(metrics),
        };
        std::thread::Builder::new()
            .name("otlp".to_owned())
            .spawn(move || {
                export.run();
                drop(ends);
            })
            .context("start the otlp thread")?;
        Ok(Some(Arc::new(Exporter {
            endpoint: endpoint.clone(),
            service_name: tracing.service_name.clone(),
            spans,
            is_due,
            metrics: Arc::clone(metrics),
            end: Mutex::new(Some(end)),
        })))
    }

    /// Drops the request if too many wait.
    pub(super) fn push(&self, span: Box<RequestSpan>) {
        let count = span.count();
        if self.spans.try_send(span).is_err() {
            self.metrics.spans.count_dropped(count);
        }
        if QUEUE - self.spans.capacity() >= export::BATCH {
            self.is_due.notify_one();
        }
    }

    /// Closed when all has been exported after the last use of this exporter.
    pub(super) fn take_end(&self) -> Option<mpsc::Receiver<()>> {
        self.end
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.is_due.notify_one();
    }
}
