//! One request as the counters will tell of it.

use std::rc::Rc;

use http::StatusCode;
use tokio::time::Instant;

use crate::l7::client::{Client, Progress};

/// Counts a request when it ends: as answered if it is [`complete`](RequestRecord::complete), else
/// as aborted.
pub(super) struct RequestRecord {
    client: Rc<Client>,
    pub progress: Rc<Progress>,
    pub started: Instant,
    pub status: StatusCode,
    complete: bool,
}

impl RequestRecord {
    pub(super) fn begin(client: &Rc<Client>, progress: &Rc<Progress>) -> RequestRecord {
        client.worker.metrics.requests_in_flight.add(1);
        RequestRecord {
            client: Rc::clone(client),
            progress: Rc::clone(progress),
            started: progress.request_begins(),
            status: StatusCode::OK,
            complete: false,
        }
    }

    /// The last byte of the response has been handed to the client's connection.
    pub(super) fn complete(&mut self) {
        self.complete = true;
        self.progress.response_ended();
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        self.client.end(&self.progress);
        let worker = &self.client.worker;
        let metrics = &worker.metrics;
        metrics.requests_in_flight.subtract(1);
        if !self.complete {
            metrics.aborted.add(1);
            return;
        }
        let class = usize::from(self.status.as_u16() / 100).clamp(1, 5);
        metrics.responses[class - 1].add(1);
        // An upgraded connection's life is no latency.
        if self.status != StatusCode::SWITCHING_PROTOCOLS {
            metrics.record_latency(worker.now().duration_since(self.started));
        }
    }
}
