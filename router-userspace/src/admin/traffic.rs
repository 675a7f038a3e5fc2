//! What layer 7 has counted of each route and of each backend, in pages in the order of their names.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::SocketAddr;

use serde::Serialize;

use crate::admin::listing::{Page, PageRequest, fill};
use crate::l7::metrics::{L7Metrics, LatencyTotals, TrafficTotals};
use crate::snapshot::Snapshot;

#[derive(Debug, Serialize)]
pub struct RouteTrafficRow {
    /// `(unknown)` of requests without a route, `(other)` of routes that are gone or too many.
    route: String,
    #[serde(flatten)]
    traffic: TrafficRow,
}

#[derive(Debug, Serialize)]
pub struct BackendTrafficRow {
    backend: SocketAddr,
    /// Attempts, and those that did not yield a response head.
    requests: u64,
    failures: u64,
    ejected: bool,
    #[serde(flatten)]
    traffic: TrafficRow,
}

#[derive(Debug, Serialize)]
struct TrafficRow {
    in_flight: u64,
    /// By first digit of their status: 1 to 5.
    responses: [u64; 5],
    aborted: u64,
    ejections: u64,
    /// Of bodies.
    bytes_received: u64,
    bytes_sent: u64,
    latency: LatencyRow,
    /// Of routes only: attempts beyond the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    retries: Option<u64>,
}

/// Seconds; absent without requests.
#[derive(Debug, Serialize)]
struct LatencyRow {
    p50: Option<f64>,
    p90: Option<f64>,
    p99: Option<f64>,
    mean: Option<f64>,
}

pub fn routes(
    snapshot: &Snapshot,
    metrics: &L7Metrics,
    request: &PageRequest,
) -> Result<Page<RouteTrafficRow>, String> {
    let after = request.after.clone();
    page(
        snapshot,
        request,
        after,
        metrics.routes(),
        |route, totals| {
            let mut traffic = TrafficRow::new(totals.in_flight(), &totals);
            traffic.retries = Some(totals.retries);
            RouteTrafficRow { route, traffic }
        },
    )
}

pub fn backends(
    snapshot: &Snapshot,
    metrics: &L7Metrics,
    request: &PageRequest,
) -> Result<Page<BackendTrafficRow>, String> {
    let after = request.after.as_deref().map(str::parse::<SocketAddr>);
    let after = after
        .transpose()
        .map_err(|error| format!("after: {error}"))?;
    let rows = metrics.backends();
    page(snapshot, request, after, rows, |backend, totals| {
        BackendTrafficRow {
            backend,
            requests: totals.requests,
            failures: totals.failures,
            ejected: totals.is_ejected,
            traffic: TrafficRow::new(totals.in_flight, &totals.traffic),
        }
    })
}

fn page<K: Ord + Display, V, R>(
    snapshot: &Snapshot,
    request: &PageRequest,
    after: Option<K>,
    rows: BTreeMap<K, V>,
    row: impl Fn(K, V) -> R,
) -> Result<Page<R>, String> {
    let rows = rows.into_iter();
    let rows = rows.skip_while(|(key, _)| after.as_ref().is_some_and(|after| key <= after));
    let (rows, more) = fill(request, rows, |_| 1)?;
    Ok(Page {
        revision: snapshot.revision,
        next: rows.last().filter(|_| more).map(|(key, _)| key.to_string()),
        rows: rows
            .into_iter()
            .map(|(key, value)| row(key, value))
            .collect(),
    })
}

impl TrafficRow {
    fn new(in_flight: u64, totals: &TrafficTotals) -> TrafficRow {
        TrafficRow {
            in_flight,
            responses: totals.responses,
            aborted: totals.aborted,
            ejections: totals.ejections,
            bytes_received: totals.bytes_in,
            bytes_sent: totals.bytes_out,
            latency: LatencyRow::new(&totals.latency),
            retries: None,
        }
    }
}

impl LatencyRow {
    fn new(latency: &LatencyTotals) -> LatencyRow {
        let at = |quantile| latency.quantile(quantile).map(|it| it.as_secs_f64());
        let count = latency.count();
        LatencyRow {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            mean: (count > 0).then(|| latency.sum.as_secs_f64() / count as f64),
        }
    }
}
