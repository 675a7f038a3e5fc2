//! What layer 7 counts, one shard a worker.
//!
//! Each counter has one writer, its worker, so counting is a plain load and store and no cache line
//! travels between cores. The admin API sums the shards with [`L7Metrics::totals`] and
//! [`L7Metrics::backends`]; the only locks are taken by it and, about once a second, by a worker
//! that gained or lost backends. No request waits for either.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use http::StatusCode;
use serde::Serialize;
use tokio::time::Instant;

use crate::config::HttpMetrics;
use crate::l7::clients::{CUTOFFS, Cutoff};
use crate::l7::error::{GATEWAY_FAILURES, REASONS};
use crate::l7::handshake;
use crate::l7::shared::SharedBackend;
use crate::route::HttpMatch;

pub use crate::l7::metrics::routes::{OTHER, UNKNOWN};
pub use crate::l7::metrics::traffic::{LATENCY_BOUNDS_US, LatencyTotals, TrafficTotals};

pub(super) use crate::l7::metrics::routes::RouteCounters;
pub(super) use crate::l7::metrics::traffic::{Outcome, Traffic, class};

use crate::l7::metrics::traffic::Latency;

mod routes;
mod traffic;

/// All that layer 7 counted since the process started.
#[derive(Debug, Default)]
pub struct L7Metrics {
    workers: Mutex<Vec<Arc<WorkerMetrics>>>,
    pub tls: TlsMetrics,
    pub access_log: AccessLogMetrics,
    pub spans: SpanMetrics,
    shows_routes: AtomicBool,
    shows_backends: AtomicBool,
}

/// Lines of the access log.
#[derive(Debug, Default)]
pub struct AccessLogMetrics {
    written: AtomicU64,
    dropped: AtomicU64,
}

impl AccessLogMetrics {
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Those that found too many waiting to be written, or that could not be.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    pub(super) fn count_written(&self, lines: u64) {
        self.written.fetch_add(lines, Ordering::Relaxed);
    }

    pub(super) fn count_dropped(&self, lines: u64) {
        self.dropped.fetch_add(lines, Ordering::Relaxed);
    }
}

/// Spans for the collector of traces.
#[derive(Debug, Default)]
pub struct SpanMetrics {
    exported: AtomicU64,
    dropped: AtomicU64,
}

impl SpanMetrics {
    pub fn exported(&self) -> u64 {
        self.exported.load(Ordering::Relaxed)
    }

    /// Those that found too many waiting, or that the collector refused.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    pub(super) fn count_exported(&self, spans: u64) {
        self.exported.fetch_add(spans, Ordering::Relaxed);
    }

    pub(super) fn count_dropped(&self, spans: u64) {
        self.dropped.fetch_add(spans, Ordering::Relaxed);
    }
}

/// What the files of both sides' certificates came to.
#[derive(Debug, Default)]
pub struct TlsMetrics {
    loads: AtomicU64,
    refusals: AtomicU64,
    certificates: Mutex<Vec<(PathBuf, i64)>>,
}

impl TlsMetrics {
    /// Times that changed files were taken up, and files that could not be used.
    pub fn loads_and_refusals(&self) -> (u64, u64) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (read(&self.loads), read(&self.refusals))
    }

    /// The listeners' certificates in use, and when they end, in seconds since the Unix epoch.
    pub fn certificates(&self) -> Vec<(PathBuf, i64)> {
        let certificates = self.certificates.lock();
        certificates.unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn count_load(&self) {
        self.loads.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_refusal(&self) {
        self.refusals.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn publish_certificates(&self, certificates: Vec<(PathBuf, i64)>) {
        *self
            .certificates
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = certificates;
    }
}

/// Sums over all workers.
#[derive(Clone, Debug, Default, Serialize)]
pub struct L7Totals {
    /// Requests whose response ended whole, by first digit of their status: 1 to 5.
    pub responses: [u64; 5],
    /// Requests whose response did not: the client left, the backend broke off, or a timeout cut it.
    pub aborted: u64,
    /// Answers of the gateway itself by reason, in the order of [`REASONS`].
    pub errors: Vec<(&'static str, u64)>,
    pub requests_in_flight: u64,
    pub connections_open: u64,
    /// Those of them that are between two requests and hold no buffers.
    pub connections_quiet: u64,
    pub connections_accepted: u64,
    /// How often a worker stopped accepting because of `http.limits.connections`.
    pub connections_full: u64,
    /// Connections the kernel could not hand over, for want of file descriptors for example.
    pub accept_errors: u64,
    /// TLS handshakes that were done in full, and those that took up an earlier session.
    pub tls_handshakes: u64,
    pub tls_resumptions: u64,
    /// TLS handshakes that waited for others to end.
    pub tls_handshakes_full: u64,
    /// Connections that ended before their first request, by reason.
    pub handshake_failures: Vec<(&'static str, u64)>,
    /// Client connections closed for sending a request's head too slowly or being idle.
    pub connections_timed_out: u64,
    /// Client connections refused or ended, and streams reset, for what the client did, by reason.
    pub cutoffs: Vec<(&'static str, u64)>,
    /// Rates of clients that were forgotten for others', though the clients were not idle.
    pub client_buckets_full: u64,
    pub retries: u64,
    /// Attempts that were not made, for the route's budget was spent.
    pub retries_refused: u64,
    /// Backends ejected: for a connection that failed, and for responses that were bad.
    pub ejections: u64,
    pub failure_ejections: u64,
    /// Backends not ejected for bad responses, for too many of their pool are.
    pub ejections_refused: u64,
    /// Requests of sessions that found their instance, and that did not.
    pub sticky_hits: u64,
    pub sticky_misses: u64,
    /// Requests that waited for room below a limit; that found the queue full; that waited in vain.
    pub queued: u64,
    pub queue_full: u64,
    pub queue_timeouts: u64,
    /// Attempts whose backend was chosen whatever its health, for too few of its pool are healthy.
    pub panic_picks: u64,
    /// Interim responses (1xx) of backends that were passed on, and those that were too many or too long.
    pub interim_responses: u64,
    pub interim_dropped: u64,
    /// Client connections that speak HTTP/2, and those that were ended for an error of the protocol.
    pub http2_connections: u64,
    pub http2_errors: u64,
    /// The same of HTTP/3.
    pub http3_connections: u64,
    pub http3_errors: u64,
    /// Clients of HTTP/3 that were asked to prove their address.
    pub http3_retries: u64,
    /// Datagrams that came to another worker's socket, and were lost for its queue was full.
    pub http3_datagrams_dropped: u64,
    pub upgrades: u64,
    pub upgrades_open: u64,
    pub backend_connections_opened: u64,
    pub backend_connections_reused: u64,
    /// From and to clients, heads included.
    pub bytes_in: u64,
    pub bytes_out: u64,
    #[serde(flatten)]
    pub latency: LatencyTotals,
}

/// Sums of one backend over all workers, since it was last without requests for a while.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L7BackendTotals {
    pub requests: u64,
    /// Attempts that did not yield a response head.
    pub failures: u64,
    pub in_flight: u64,
    pub idle_connections: u64,
    /// Avoided for what it did to requests.
    pub is_ejected: bool,
    /// Requests that it answered.
    pub traffic: TrafficTotals,
}

impl L7Metrics {
    /// From here on, scrapes show what `config` asks for.
    pub(super) fn configure(&self, config: &HttpMetrics) {
        self.shows_routes.store(config.per_route, Ordering::Relaxed);
        self.shows_backends
            .store(config.per_backend, Ordering::Relaxed);
    }

    /// Whether scrapes show each route.
    pub fn shows_routes(&self) -> bool {
        self.shows_routes.load(Ordering::Relaxed)
    }

    /// Whether scrapes show all of each backend.
    pub fn shows_backends(&self) -> bool {
        self.shows_backends.load(Ordering::Relaxed)
    }

    pub fn totals(&self) -> L7Totals {
        let mut totals = L7Totals {
            errors: REASONS.iter().map(|&reason| (reason, 0)).collect(),
            handshake_failures: handshake::REASONS.map(|reason| (reason, 0)).to_vec(),
            cutoffs: CUTOFFS.map(|reason| (reason, 0)).to_vec(),
            ..L7Totals::default()
        };
        for worker in self.workers().iter() {
            worker.add_to(&mut totals);
        }
        totals
    }

    /// Backends that had a request lately, at most a second behind in which they are.
    pub fn backends(&self) -> BTreeMap<SocketAddr, L7BackendTotals> {
        let now = Instant::now();
        let mut totals: BTreeMap<SocketAddr, L7BackendTotals> = BTreeMap::new();
        for worker in self.workers().iter() {
            for (address, counters) in worker.backends().iter() {
                let total = totals.entry(*address).or_default();
                total.requests += counters.requests.read();
                total.failures += counters.failures.read();
                total.in_flight += counters.in_flight();
                total.idle_connections += counters.idle_connections.read();
                total.is_ejected |= counters.shared.outlier.is_ejected(now);
                counters.traffic.add_to(&mut total.traffic);
            }
        }
        totals
    }

    /// Routes that had a request by their name, at most a second behind in which they are, with
    /// [`OTHER`] and [`UNKNOWN`].
    pub fn routes(&self) -> BTreeMap<String, TrafficTotals> {
        let mut totals: BTreeMap<String, TrafficTotals> = BTreeMap::new();
        for worker in self.workers().iter() {
            let routes = worker.routes();
            for (route, traffic) in routes.iter() {
                traffic.add_to(totals.entry(route.to_string()).or_default());
            }
            // Under the lock, for a route that leaves passes from the list to the others.
            worker
                .other_routes
                .add_to(totals.entry(OTHER.to_owned()).or_default());
            worker
                .unknown_routes
                .add_to(totals.entry(UNKNOWN.to_owned()).or_default());
        }
        totals
    }

    pub(super) fn add_worker(&self) -> Arc<WorkerMetrics> {
        let worker = Arc::new(WorkerMetrics::default());
        self.workers().push(Arc::clone(&worker));
        worker
    }

    fn workers(&self) -> std::sync::MutexGuard<'_, Vec<Arc<WorkerMetrics>>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One worker's shard; alignment keeps two shards off one cache line and its prefetched neighbour.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct WorkerMetrics {
    pub responses: [Counter; 5],
    pub aborted: Counter,
    pub errors: [Counter; REASONS.len()],
    pub requests_in_flight: Counter,
    pub connections_open: Counter,
    pub connections_quiet: Counter,
    pub connections_accepted: Counter,
    pub connections_full: Counter,
    pub accept_errors: Counter,
    pub tls_handshakes: Counter,
    pub tls_resumptions: Counter,
    pub tls_handshakes_full: Counter,
    /// In the order of [`handshake::REASONS`].
    pub handshake_failures: [Counter; handshake::REASONS.len()],
    pub connections_timed_out: Counter,
    /// In the order of [`CUTOFFS`].
    pub cutoffs: [Counter; CUTOFFS.len()],
    pub client_buckets_full: Counter,
    pub retries: Counter,
    pub retries_refused: Counter,
    pub ejections: Counter,
    pub failure_ejections: Counter,
    pub ejections_refused: Counter,
    pub sticky_hits: Counter,
    pub sticky_misses: Counter,
    pub queued: Counter,
    pub queue_full: Counter,
    pub queue_timeouts: Counter,
    pub panic_picks: Counter,
    pub interim_responses: Counter,
    pub interim_dropped: Counter,
    pub http2_connections: Counter,
    pub http2_errors: Counter,
    pub http3_connections: Counter,
    pub http3_errors: Counter,
    pub http3_retries: Counter,
    pub http3_datagrams_dropped: Counter,
    pub upgrades: Counter,
    pub upgrades_open: Counter,
    pub backend_connections_opened: Counter,
    pub backend_connections_reused: Counter,
    pub bytes_in: Counter,
    pub bytes_out: Counter,
    latency: Latency,
    /// Of requests that have no route.
    pub unknown_routes: Traffic,
    /// Of routes that have no counters of their own.
    pub other_routes: Arc<Traffic>,
    routes: Mutex<Vec<(HttpMatch, Arc<Traffic>)>>,
    backends: Mutex<Vec<(SocketAddr, Arc<BackendCounters>)>>,
}

/// What one worker counts of one backend, beside what it shares with the others.
#[derive(Debug)]
pub(super) struct BackendCounters {
    pub requests: Counter,
    pub failures: Counter,
    pub idle_connections: Counter,
    pub traffic: Traffic,
    pub shared: Arc<SharedBackend>,
    worker: usize,
}

impl BackendCounters {
    pub(super) fn new(worker: usize, shared: Arc<SharedBackend>) -> BackendCounters {
        BackendCounters {
            requests: Counter::default(),
            failures: Counter::default(),
            idle_connections: Counter::default(),
            traffic: Traffic::default(),
            shared,
            worker,
        }
    }

    fn in_flight(&self) -> u64 {
        self.shared.in_flight.of_worker(self.worker)
    }
}

impl WorkerMetrics {
    /// Counts the end of a request.
    pub(super) fn end(&self, outcome: &Outcome) {
        self.requests_in_flight.subtract(1);
        let Some(status) = outcome.status else {
            self.aborted.add(1);
            return;
        };
        self.responses[class(status)].add(1);
        // An upgraded connection's life is no latency.
        if status != StatusCode::SWITCHING_PROTOCOLS {
            self.latency.record(outcome.latency);
        }
    }

    pub(super) fn count_cutoff(&self, cutoff: Cutoff) {
        self.cutoffs[cutoff as usize].add(1);
    }

    /// Requests answered for by [`Failure::Gateway`](crate::l7::error::Failure::Gateway).
    pub(super) fn gateway_failures(&self) -> u64 {
        GATEWAY_FAILURES
            .map(|reason| self.errors[reason].read())
            .iter()
            .sum()
    }

    /// Replaces the list of backends that readers see.
    pub(super) fn publish_backends(&self, backends: Vec<(SocketAddr, Arc<BackendCounters>)>) {
        *self.backends() = backends;
    }

    /// Replaces the list of routes that readers see, and adds up those that are `gone`.
    fn publish_routes(&self, routes: Vec<(HttpMatch, Arc<Traffic>)>, gone: &[Arc<Traffic>]) {
        let mut known = self.routes();
        for traffic in gone {
            self.other_routes.absorb(traffic);
        }
        *known = routes;
    }

    fn routes(&self) -> std::sync::MutexGuard<'_, Vec<(HttpMatch, Arc<Traffic>)>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn backends(&self) -> std::sync::MutexGuard<'_, Vec<(SocketAddr, Arc<BackendCounters>)>> {
        self.backends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_to(&self, totals: &mut L7Totals) {
        for (total, counter) in totals.responses.iter_mut().zip(&self.responses) {
            *total += counter.read();
        }
        for ((_, total), counter) in totals.errors.iter_mut().zip(&self.errors) {
            *total += counter.read();
        }
        let failures = totals.handshake_failures.iter_mut();
        for ((_, total), counter) in failures.zip(&self.handshake_failures) {
            *total += counter.read();
        }
        for ((_, total), counter) in totals.cutoffs.iter_mut().zip(&self.cutoffs) {
            *total += counter.read();
        }
        totals.aborted += self.aborted.read();
        totals.requests_in_flight += self.requests_in_flight.read();
        totals.connections_open += self.connections_open.read();
        totals.connections_quiet += self.connections_quiet.read();
        totals.connections_accepted += self.connections_accepted.read();
        totals.connections_full += self.connections_full.read();
        totals.accept_errors += self.accept_errors.read();
        totals.tls_handshakes += self.tls_handshakes.read();
        totals.tls_resumptions += self.tls_resumptions.read();
        totals.tls_handshakes_full += self.tls_handshakes_full.read();
        totals.connections_timed_out += self.connections_timed_out.read();
        totals.client_buckets_full += self.client_buckets_full.read();
        totals.retries += self.retries.read();
        totals.retries_refused += self.retries_refused.read();
        totals.ejections += self.ejections.read();
        totals.failure_ejections += self.failure_ejections.read();
        totals.ejections_refused += self.ejections_refused.read();
        totals.sticky_hits += self.sticky_hits.read();
        totals.sticky_misses += self.sticky_misses.read();
        totals.queued += self.queued.read();
        totals.queue_full += self.queue_full.read();
        totals.queue_timeouts += self.queue_timeouts.read();
        totals.panic_picks += self.panic_picks.read();
        totals.interim_responses += self.interim_responses.read();
        totals.interim_dropped += self.interim_dropped.read();
        totals.http2_connections += self.http2_connections.read();
        totals.http2_errors += self.http2_errors.read();
        totals.http3_connections += self.http3_connections.read();
        totals.http3_errors += self.http3_errors.read();
        totals.http3_retries += self.http3_retries.read();
        totals.http3_datagrams_dropped += self.http3_datagrams_dropped.read();
        totals.upgrades += self.upgrades.read();
        totals.upgrades_open += self.upgrades_open.read();
        totals.backend_connections_opened += self.backend_connections_opened.read();
        totals.backend_connections_reused += self.backend_connections_reused.read();
        totals.bytes_in += self.bytes_in.read();
        totals.bytes_out += self.bytes_out.read();
        self.latency.add_to(&mut totals.latency);
    }
}

/// A number with one writing thread and any readers.
///
/// With one writer, load and store lose nothing and cost no locked instruction.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(count),
            Ordering::Relaxed,
        );
    }

    pub(super) fn subtract(&self, count: u64) {
        self.add(count.wrapping_neg());
    }

    pub(super) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
