//! The names of what layer 7 counts.

use std::fmt;

use prometheus_client::encoding::NoLabelSet;
use prometheus_client::metrics::MetricType;

use crate::l7::metrics::{L7Metrics, LATENCY_BOUNDS_US};
use crate::metrics::Page;

const STATUS_CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

pub(super) fn encode(page: &mut Page<'_>, metrics: &L7Metrics) -> fmt::Result {
    let totals = metrics.totals();
    page.counters(
        "viaduct_http_responses",
        "Responses by the class of their status, the gateway's own among them",
        STATUS_CLASSES
            .iter()
            .zip(totals.responses)
            .map(|(class, n)| ([("status", *class)], n)),
    )?;
    page.counters(
        "viaduct_http_errors",
        "Answers of the gateway itself, by reason",
        totals
            .errors
            .iter()
            .map(|(reason, count)| ([("reason", *reason)], *count)),
    )?;
    page.counters(
        "viaduct_http_handshake_failures",
        "Connections that ended before their first request, in the TLS handshake or its PROXY header, by reason",
        totals
            .handshake_failures
            .iter()
            .map(|(reason, count)| ([("reason", *reason)], *count)),
    )?;
    page.counters(
        "viaduct_http_tls_handshakes",
        "TLS handshakes with clients, by whether an earlier session was resumed",
        [
            ([("kind", "full")], totals.tls_handshakes),
            ([("kind", "resumed")], totals.tls_resumptions),
        ],
    )?;
    let (loads, refusals) = metrics.tls.loads_and_refusals();
    page.counters(
        "viaduct_http_certificate_loads",
        "Changes of certificate files, by whether they were taken up",
        [
            ([("result", "taken")], loads),
            ([("result", "refused")], refusals),
        ],
    )?;
    let certificates = metrics.tls.certificates();
    page.gauges(
        "viaduct_http_certificate_expiry_seconds",
        "When a listener's certificate ends, in seconds since the Unix epoch",
        certificates.iter().map(|(file, not_after)| {
            let file = [("file", file.display().to_string())];
            (file, usize::try_from(*not_after).unwrap_or(0))
        }),
    )?;
    for (name, help, count) in [
        (
            "viaduct_http_tls_handshakes_full",
            "TLS handshakes that waited for others to end",
            totals.tls_handshakes_full,
        ),
        (
            "viaduct_http_aborted",
            "Responses whose client left before their end",
            totals.aborted,
        ),
        (
            "viaduct_http_retries",
            "Attempts beyond the first of a request, at the same backend or another",
            totals.retries,
        ),
        (
            "viaduct_http_retries_refused",
            "Attempts that were not made, for the budget of the route was spent",
            totals.retries_refused,
        ),
        (
            "viaduct_http_ejections_refused",
            "Failures after which a backend was not ejected, for too many of its pool are",
            totals.ejections_refused,
        ),
        (
            "viaduct_http_queued",
            "Requests that waited for a route or backend below its limit",
            totals.queued,
        ),
        (
            "viaduct_http_queue_full",
            "Requests that found no room to wait",
            totals.queue_full,
        ),
        (
            "viaduct_http_queue_timeouts",
            "Requests that waited in vain",
            totals.queue_timeouts,
        ),
        (
            "viaduct_http_panic_picks",
            "Attempts whose backend was chosen whatever its health, for too few of its pool are healthy",
            totals.panic_picks,
        ),
        (
            "viaduct_http_http2_connections",
            "Client connections that speak HTTP/2",
            totals.http2_connections,
        ),
        (
            "viaduct_http_http2_errors",
            "Client connections of HTTP/2 that were ended for an error of the protocol",
            totals.http2_errors,
        ),
        (
            "viaduct_http_client_buckets_full",
            "Rates of clients that were forgotten for those of others, though the clients were not idle",
            totals.client_buckets_full,
        ),
        (
            "viaduct_http_upgrades",
            "Connections handed over to another protocol",
            totals.upgrades,
        ),
        (
            "viaduct_http_received_bytes",
            "From clients, heads included",
            totals.bytes_in,
        ),
        (
            "viaduct_http_sent_bytes",
            "To clients, heads included",
            totals.bytes_out,
        ),
        (
            "viaduct_http_connections",
            "Client connections accepted",
            totals.connections_accepted,
        ),
        (
            "viaduct_http_connections_full",
            "Times accepting paused",
            totals.connections_full,
        ),
        (
            "viaduct_http_accept_errors",
            "Connections not handed over",
            totals.accept_errors,
        ),
        (
            "viaduct_http_connections_timed_out",
            "Slow or idle",
            totals.connections_timed_out,
        ),
    ] {
        page.counter(name, help, count)?;
    }
    page.counters(
        "viaduct_http_cutoffs",
        "Client connections refused or ended and streams reset for what the client did, by reason",
        totals
            .cutoffs
            .iter()
            .map(|(reason, count)| ([("reason", *reason)], *count)),
    )?;
    page.counters(
        "viaduct_http_ejections",
        "Backends avoided for a while, by what they did",
        [
            ([("reason", "connection")], totals.ejections),
            ([("reason", "responses")], totals.failure_ejections),
        ],
    )?;
    page.counters(
        "viaduct_http_sessions",
        "Requests of sticky sessions by whether their instance served them",
        [
            ([("result", "kept")], totals.sticky_hits),
            ([("result", "moved")], totals.sticky_misses),
        ],
    )?;
    let (opened, reused) = (
        totals.backend_connections_opened,
        totals.backend_connections_reused,
    );
    page.counters(
        "viaduct_http_backend_connections",
        "Connections to backends by how each was had",
        [([("how", "opened")], opened), ([("how", "reused")], reused)],
    )?;
    for (name, help, value) in [
        (
            "viaduct_http_requests_in_flight",
            "Requests begun",
            totals.requests_in_flight,
        ),
        (
            "viaduct_http_connections_open",
            "Client connections",
            totals.connections_open,
        ),
        (
            "viaduct_http_upgrades_open",
            "Upgraded connections",
            totals.upgrades_open,
        ),
    ] {
        page.gauge(name, help, value)?;
    }
    let bounds = LATENCY_BOUNDS_US
        .iter()
        .map(|bound| *bound as f64 / 1e6)
        .chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds.zip(totals.latency_buckets).collect();
    let count = totals.latency_buckets.iter().sum();
    let mut histogram = page.0.encode_descriptor(
        "viaduct_http_request_seconds",
        "From a request's head to the end of its response",
        None,
        MetricType::Histogram,
    )?;
    let sum = totals.latency_sum.as_secs_f64();
    histogram.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;

    let backends = metrics.backends();
    let rows = |value: fn(&crate::l7::metrics::L7BackendTotals) -> u64| {
        backends
            .iter()
            .map(move |(address, totals)| ([("backend", address.to_string())], value(totals)))
    };
    page.counters(
        "viaduct_http_backend_requests",
        "Requests of a backend",
        rows(|b| b.requests),
    )?;
    page.counters(
        "viaduct_http_backend_failures",
        "Attempts that did not yield the head of a response",
        rows(|backend| backend.failures),
    )
}
