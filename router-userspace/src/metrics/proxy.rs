//! The names of what layer 7 counts.

use std::fmt;

use prometheus_client::encoding::{MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use router_common::SockmapCounter;

use crate::l4::datapath::Sockmap;
use crate::l7::metrics::{L7Metrics, LATENCY_BOUNDS_US, LatencyTotals, TrafficTotals};
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
            "viaduct_http_access_log_lines",
            "Lines of the access log that were written",
            metrics.access_log.written(),
        ),
        (
            "viaduct_http_access_log_dropped",
            "Lines of the access log that were not written, for the disk is behind or refuses them",
            metrics.access_log.dropped(),
        ),
        (
            "viaduct_http_spans",
            "Spans of requests that the collector has taken",
            metrics.spans.exported(),
        ),
        (
            "viaduct_http_spans_dropped",
            "Spans that it has not, being behind, gone or of another mind",
            metrics.spans.dropped(),
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
            "viaduct_http_interim_responses",
            "Interim responses (1xx) of backends that were passed on",
            totals.interim_responses,
        ),
        (
            "viaduct_http_interim_dropped",
            "Interim responses of backends that were not passed on, being too many for one request",
            totals.interim_dropped,
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
            "viaduct_http_http3_connections",
            "Client connections that speak HTTP/3",
            totals.http3_connections,
        ),
        (
            "viaduct_http_http3_errors",
            "Client connections of HTTP/3 that were ended for an error of the protocol",
            totals.http3_errors,
        ),
        (
            "viaduct_http_http3_retries",
            "Clients of HTTP/3 that were asked to prove their address",
            totals.http3_retries,
        ),
        (
            "viaduct_http_http3_datagrams_dropped",
            "Datagrams of HTTP/3 on their way from one worker to another, lost for its queue was full",
            totals.http3_datagrams_dropped,
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
            "viaduct_http_connections_quiet",
            "Client connections between two requests that hold no buffers",
            totals.connections_quiet,
        ),
        (
            "viaduct_http_upgrades_open",
            "Upgraded connections",
            totals.upgrades_open,
        ),
    ] {
        page.gauge(name, help, value)?;
    }
    let mut histogram = page.0.encode_descriptor(
        "viaduct_http_request_seconds",
        "From a request's head to the end of its response",
        None,
        MetricType::Histogram,
    )?;
    encode_latency(&mut histogram, &totals.latency)?;

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
    )?;
    if metrics.shows_backends() {
        let backends = backends.iter().map(|(address, totals)| {
            let in_flight = totals.in_flight;
            (address.to_string(), in_flight, totals.traffic)
        });
        encode_traffic(page, "backend", &backends.collect::<Vec<_>>())?;
    }
    if metrics.shows_routes() {
        let routes = metrics.routes().into_iter();
        let routes = routes.map(|(name, totals)| (name, totals.in_flight(), totals));
        encode_traffic(page, "route", &routes.collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Of each route or backend, the `kind`: its name, what is in flight, and the rest.
fn encode_traffic(
    page: &mut Page<'_>,
    kind: &'static str,
    rows: &[(String, u64, TrafficTotals)],
) -> fmt::Result {
    let name = |what: &str| format!("viaduct_http_{kind}_{what}");
    let counts = |count: fn(&TrafficTotals) -> u64| {
        rows.iter()
            .map(move |(name, _, totals)| ([(kind, name.clone())], count(totals)))
    };
    let responses = rows.iter().flat_map(|(name, _, totals)| {
        let classes = STATUS_CLASSES.iter().zip(totals.responses);
        classes.map(move |(class, count)| {
            let status = (*class).to_owned();
            ([(kind, name.clone()), ("status", status)], count)
        })
    });
    page.counters(
        &name("responses"),
        "Responses by the class of their status, the gateway's own among them",
        responses,
    )?;
    page.gauges(
        &name("requests_in_flight"),
        "Requests being answered",
        rows.iter().map(|(name, in_flight, _)| {
            let in_flight = usize::try_from(*in_flight).unwrap_or(usize::MAX);
            ([(kind, name.clone())], in_flight)
        }),
    )?;
    page.counters(
        &name("aborted"),
        "Responses that did not end",
        counts(|it| it.aborted),
    )?;
    page.counters(
        &name("retries"),
        "Attempts beyond the first of a request",
        counts(|it| it.retries),
    )?;
    page.counters(
        &name("ejections"),
        "Ejections of a backend",
        counts(|it| it.ejections),
    )?;
    page.counters(
        &name("received_bytes"),
        "Bodies of requests",
        counts(|it| it.bytes_in),
    )?;
    page.counters(
        &name("sent_bytes"),
        "Bodies of responses",
        counts(|it| it.bytes_out),
    )?;
    let seconds = name("request_seconds");
    let mut histograms = page.0.encode_descriptor(
        &seconds,
        "From a request's head to the end of its response",
        None,
        MetricType::Histogram,
    )?;
    for (name, _, totals) in rows {
        let labels = [(kind, name.clone())];
        let mut histogram = histograms.encode_family(&labels)?;
        encode_latency(&mut histogram, &totals.latency)?;
    }
    Ok(())
}

fn encode_latency(histogram: &mut MetricEncoder<'_>, latency: &LatencyTotals) -> fmt::Result {
    let bounds = LATENCY_BOUNDS_US
        .iter()
        .map(|bound| *bound as f64 / 1e6)
        .chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds.zip(latency.buckets).collect();
    let sum = latency.sum.as_secs_f64();
    histogram.encode_histogram::<NoLabelSet>(sum, latency.count(), &buckets, None)
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
