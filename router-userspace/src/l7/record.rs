//! One request as the counters and the access log will tell of it.
//!
//! [`Observed`] is part of the request's [`Progress`], where the parts that the request passes leave what they
//! know; a [`RequestRecord`] is held as long as the request lasts and tells it all when it is dropped.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use http::uri::Authority;
use http::{HeaderMap, Request, StatusCode};
use tokio::time::Instant;

use crate::l7::access_log::{Aborted, Ended, Entry};
use crate::l7::backend::BackendState;
use crate::l7::balance::PoolState;
use crate::l7::client::Client;
use crate::l7::error::{Failure, REASONS};
use crate::l7::lease::Lease;
use crate::l7::metrics::Outcome;
use crate::l7::otlp::{self, RequestSpan};
use crate::l7::progress::Progress;
use crate::l7::trace::Traced;

/// What is known of the request that is under way.
#[derive(Default)]
pub(super) struct Observed {
    /// Of bodies, or both ways after a change of protocol.
    bytes_in: Cell<u64>,
    bytes_out: Cell<u64>,
    route: RefCell<Option<Rc<PoolState>>>,
    /// Of the last attempt, and whether it has answered.
    backend: RefCell<Option<Rc<BackendState>>>,
    has_answered: Cell<bool>,
    /// `None` without an access log.
    entry: RefCell<Option<Box<Entry>>>,
    /// `None` unless it is exported.
    span: RefCell<Option<Box<RequestSpan>>>,
}

impl Observed {
    pub(super) fn add_bytes_in(&self, count: usize) {
        self.bytes_in.set(self.bytes_in.get() + count as u64);
    }

    pub(super) fn add_bytes_out(&self, count: usize) {
        self.bytes_out.set(self.bytes_out.get() + count as u64);
    }

    pub(super) fn set_route(&self, pool: &Rc<PoolState>) {
        pool.traffic.begin();
        self.route.replace(Some(Rc::clone(pool)));
    }

    /// A backend has been chosen.
    pub(super) fn attempt(&self, lease: &Lease, now: Instant) {
        self.backend.replace(Some(Rc::clone(lease.backend())));
        let address = lease.backend().address();
        self.note(|entry| entry.attempt(address, lease.target(), now));
        self.note_span(|span| span.attempt(address, now));
    }

    /// The attempt in hand has failed, and another may follow.
    pub(super) fn attempt_failed(&self, failure: &Failure, now: Instant) {
        self.note_span(|span| span.give_up(REASONS[failure.reason()], now));
    }

    /// Has the headers say what the backend's part of the trace is below.
    pub(super) fn propagate(&self, headers: &mut HeaderMap) {
        self.note_span(|span| span.propagate(headers));
    }

    /// The request goes out with these headers on a connection that stands.
    pub(super) fn sent(&self, headers: &HeaderMap, now: Instant) {
        self.note(|entry| entry.sent(headers, now));
    }

    /// The request goes to its route's service.
    pub(super) fn detour(&self, service: &Authority) {
        self.note(|entry| entry.route_service = Some(service.clone()));
    }

    /// The head of a response has come.
    pub(super) fn answered(&self, now: Instant) {
        self.has_answered.set(true);
        self.note(|entry| entry.times.answered = Some(now));
        self.note_span(RequestSpan::answered);
    }

    fn note(&self, note: impl FnOnce(&mut Entry)) {
        if let Some(entry) = &mut *self.entry.borrow_mut() {
            note(entry);
        }
    }

    fn note_span(&self, note: impl FnOnce(&mut RequestSpan)) {
        if let Some(span) = &mut *self.span.borrow_mut() {
            note(span);
        }
    }

    fn begin(&self, entry: Option<Box<Entry>>, span: Option<Box<RequestSpan>>) {
        self.bytes_in.set(0);
        self.bytes_out.set(0);
        self.route.take();
        self.backend.take();
        self.has_answered.set(false);
        self.entry.replace(entry);
        self.span.replace(span);
    }
}

/// Counts and logs a request when it ends: as answered if it is [`complete`](RequestRecord::complete),
/// else as aborted.
pub(super) struct RequestRecord {
    client: Rc<Client>,
    pub progress: Rc<Progress>,
    pub started: Instant,
    status: Option<StatusCode>,
    complete: bool,
    backend_broke_off: bool,
}

impl RequestRecord {
    pub(super) fn begin<B>(
        client: &Rc<Client>,
        progress: &Rc<Progress>,
        request: &Request<B>,
        traced: Option<Traced>,
    ) -> RequestRecord {
        let worker = &client.worker;
        worker.metrics.requests_in_flight.add(1);
        let entry = worker.access_log().map(|log| {
            let trusted = worker.settings(|settings| settings.trusts(client.peer.ip()));
            let trace = traced.map(|it| it.trace);
            Box::new(Entry::new(log, request, trusted, trace))
        });
        let started = progress.request_begins();
        let span = traced.and_then(|it| it.span).and_then(|context| {
            let exporter = worker.settings(|settings| settings.exporter.clone())?;
            let secure = client.tls.is_some();
            let span = RequestSpan::new(exporter, context, request, client.peer, secure, started);
            Some(Box::new(span))
        });
        progress.observed.begin(entry, span);
        RequestRecord {
            client: Rc::clone(client),
            progress: Rc::clone(progress),
            started,
            status: None,
            complete: false,
            backend_broke_off: false,
        }
    }

    /// The gateway answers by itself.
    pub(super) fn failed(&self, failure: &Failure) {
        let observed = &self.progress.observed;
        observed.has_answered.set(false);
        observed.note(|entry| entry.error = Some(failure.router_error()));
        observed.note_span(|span| span.failed(REASONS[failure.reason()]));
    }

    /// The head of the response goes to the client.
    pub(super) fn response_begins(&mut self, status: StatusCode) {
        self.status = Some(status);
        self.progress.response_begins();
    }

    /// The response will not end, for the backend has not sent all of it.
    pub(super) fn backend_broke_off(&mut self) {
        self.backend_broke_off = true;
    }

    /// The last byte of the response has been handed to the client's connection.
    pub(super) fn complete(&mut self) {
        self.complete = true;
        self.progress.response_ended();
    }

    fn aborted(&self) -> Option<Aborted> {
        if self.complete {
            None
        } else if self.backend_broke_off {
            Some(Aborted::Backend)
        } else if self.progress.has_been_cut() || self.client.worker.is_cutting() {
            Some(Aborted::Timeout)
        } else {
            Some(Aborted::Client)
        }
    }

    fn log(&self, now: Instant, entry: &Entry, route: Option<&PoolState>) {
        let observed = &self.progress.observed;
        let ended = Ended {
            began: self.client.worker.since_epoch(self.started),
            total: now.duration_since(self.started),
            peer: self.client.peer,
            tls: self.client.tls.as_deref(),
            route: route.map(|route| &route.matched),
            status: self.status,
            aborted: self.aborted(),
            bytes_in: observed.bytes_in.get(),
            bytes_out: observed.bytes_out.get(),
        };
        entry.log.write(entry, &ended);
    }

    fn export(&self, now: Instant, span: Box<RequestSpan>, route: Option<&PoolState>) {
        span.end(otlp::Ended {
            began: self.client.worker.since_epoch(self.started),
            total: now.duration_since(self.started),
            route: route.map(|route| Arc::clone(&route.matched.path)),
            status: self.status,
            aborted: self.aborted().map(Aborted::as_str),
        });
    }

    fn count(&self, now: Instant, route: Option<&PoolState>) {
        let observed = &self.progress.observed;
        let outcome = Outcome {
            status: self.status.filter(|_| self.complete),
            latency: now.duration_since(self.started),
            bytes_in: observed.bytes_in.get(),
            bytes_out: observed.bytes_out.get(),
        };
        let metrics = &self.client.worker.metrics;
        metrics.end(&outcome);
        match route {
            Some(route) => route.traffic.end(&outcome),
            None => {
                metrics.unknown_routes.begin();
                metrics.unknown_routes.end(&outcome);
            }
        }
        if let Some(backend) = observed.backend.take()
            && observed.has_answered.get()
        {
            backend.traffic().end(&outcome);
        }
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        self.client.end(&self.progress);
        let worker = &self.client.worker;
        let switched = self.status == Some(StatusCode::SWITCHING_PROTOCOLS);
        let now = match switched {
            // Nobody looks at the clock for a tunnel.
            true => worker.read_clock(),
            false => worker.now(),
        };
        let observed = &self.progress.observed;
        let route = observed.route.take();
        self.count(now, route.as_deref());
        if let Some(entry) = observed.entry.take() {
            self.log(now, &entry, route.as_deref());
        }
        if let Some(span) = observed.span.take() {
            self.export(now, span, route.as_deref());
        }
    }
}

/// Logs what hyper could not parse and answered with `status` itself.
pub(super) fn log_unparsable(client: &Client, status: StatusCode) {
    let worker = &client.worker;
    let Some(log) = worker.access_log() else {
        return;
    };
    let mut entry = Entry::unparsable(log);
    entry.error = Some("unparsable");
    let ended = Ended {
        began: worker.since_epoch(worker.now()),
        total: std::time::Duration::ZERO,
        peer: client.peer,
        tls: client.tls.as_deref(),
        route: None,
        status: Some(status),
        aborted: None,
        bytes_in: 0,
        bytes_out: 0,
    };
    entry.log.write(&entry, &ended);
}
