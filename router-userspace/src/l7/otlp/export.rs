//! The thread that makes batches of what waits and sees them to the collector.
//!
//! A batch goes when it is full or a second old. One that the collector does not take is tried again,
//! with longer and longer pauses; meanwhile others wait, and beyond the queue they are dropped. One that
//! it refuses is dropped.

use std::sync::Arc;
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use prost::Message;
use tokio::sync::Notify;
use tokio::sync::mpsc::Receiver;

use crate::l7::metrics::L7Metrics;
use crate::l7::otlp::collector::{Collector, Undelivered};
use crate::l7::otlp::span::RequestSpan;

/// Requests that are sent at once.
pub(super) const BATCH: usize = 512;

/// How long a request waits for others.
const INTERVAL: Duration = Duration::from_secs(1);

/// The pauses between attempts at delivering one batch, which double.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);

pub(super) struct Export {
    pub spans: Receiver<Box<RequestSpan>>,
    pub is_due: Arc<Notify>,
    pub collector: Collector,
    pub resource: Resource,
    pub metrics: Arc<L7Metrics>,
}

impl Export {
    /// Runs until nobody can hand over anything more.
    pub(super) fn run(self) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        match runtime {
            Ok(runtime) => runtime.block_on(self.serve()),
            Err(error) => tracing::error!(%error, "spans are not exported"),
        }
    }

    async fn serve(mut self) {
        while let Some(first) = self.spans.recv().await {
            let _ = tokio::time::timeout(INTERVAL, self.is_due.notified()).await;
            let mut batch = vec![first];
            while batch.len() < BATCH
                && let Ok(span) = self.spans.try_recv()
            {
                batch.push(span);
            }
            let spans: Vec<Span> = batch.iter().flat_map(|it| it.to_spans()).collect();
            self.deliver(spans).await;
        }
    }

    async fn deliver(&mut self, spans: Vec<Span>) {
        let count = spans.len() as u64;
        let body = self.request(spans).encode_to_vec().into();
        let mut pause = FIRST_PAUSE;
        loop {
            match self.collector.post(&body).await {
                Ok(rejected) => {
                    if pause > FIRST_PAUSE {
                        tracing::info!(collector = %self.collector.url, "spans are exported again");
                    }
                    let rejected = rejected.min(count);
                    self.metrics.spans.count_dropped(rejected);
                    self.metrics.spans.count_exported(count - rejected);
                    return;
                }
                Err(Undelivered::Later(error)) if !self.spans.is_closed() => {
                    if pause == FIRST_PAUSE {
                        tracing::warn!(collector = %self.collector.url, error = format!("{error:#}"), "spans wait for the collector");
                    }
                    tokio::time::sleep(pause).await;
                    pause = (2 * pause).min(LONGEST_PAUSE);
                }
                Err(Undelivered::Later(error) | Undelivered::Never(error)) => {
                    tracing::warn!(collector = %self.collector.url, spans = count, error = format!("{error:#}"), "spans are dropped");
                    self.metrics.spans.count_dropped(count);
                    return;
                }
            }
        }
    }

    fn request(&self, spans: Vec<Span>) -> ExportTraceServiceRequest {
        ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(self.resource.clone()),
                scope_spans: vec![ScopeSpans {
                    scope: Some(InstrumentationScope {
                        name: "viaduct".to_owned(),
                        version: env!("CARGO_PKG_VERSION").to_owned(),
                        ..InstrumentationScope::default()
                    }),
                    spans,
                    schema_url: String::new(),
                }],
                schema_url: String::new(),
            }],
        }
    }
}
