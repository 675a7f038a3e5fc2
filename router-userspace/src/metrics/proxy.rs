//! The names of what layer 7 counts.

use std::fmt;

use prometheus_client::encoding::NoLabelSet;
use prometheus_client::metrics::MetricType;
use router_common::SockmapCounter;

use crate::l4::datapath::Sockmap;
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
    for (name, help, count) in [
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
            "viaduct_http_ejections",
            "Backends avoided for a while",
            totals.ejections,
        ),
        (
            "viaduct_http_panic_picks",
            "Attempts whose backend was chosen whatever its health, for too few of its pool are healthy",
            totals.panic_picks,
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

pub(super) fn encode_sockmap(page: &mut Page<'_>, sockmap: &Sockmap) -> fmt::Result {
    page.counter(
        "viaduct_http_sockmap_connections",
        "Connections to backends on this host that pass TCP by",
        sockmap.count(SockmapCounter::Connections),
    )?;
    page.counter(
        "viaduct_http_sockmap_fallbacks",
        "Directions of such connections that went back to TCP, as for a large response",
        sockmap.count(SockmapCounter::Fallbacks),
    )
}
