//! `/gorouter/routes`: the HTTP routes in the form of gorouter's `/routes`, for the tools that read that.
//!
//! An object with a list of endpoints for each host and path, sent in pieces while it is made, so that
//! a table of any size costs a piece of memory. One answer at a time. Routes with conditions, which
//! gorouter has not, are left out.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc};

use crate::admin::{Admin, refuse};
use crate::route::policy::HashOf;
use crate::route::{Backend, Balance, HttpProtocol, Pool};
use crate::snapshot::Snapshot;

/// Bytes of a piece, or of a route that is larger.
const PIECE_BYTES: usize = 64 << 10;
/// How long a reader may take for a piece.
const PATIENCE: Duration = Duration::from_secs(30);

static ANSWERS: Semaphore = Semaphore::const_new(1);

/// An endpoint as gorouter says it; absent texts of the first line are empty.
#[derive(Serialize)]
struct Endpoint<'a> {
    address: SocketAddr,
    availability_zone: &'a str,
    protocol: &'static str,
    tls: bool,
    /// Seconds, of the gateway's threshold; -1: it stays until it is withdrawn.
    ttl: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    route_service_url: Option<&'a str>,
    tags: &'a BTreeMap<Arc<str>, Arc<str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    isolation_segment: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    private_instance_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    server_cert_domain_san: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    load_balancing_algorithm: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hash_header: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hash_balance: Option<f64>,
}

pub(super) async fn routes(State(admin): State<Arc<Admin>>) -> Response {
    let Ok(permit) = ANSWERS.try_acquire() else {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "another is being answered");
    };
    let snapshot = admin.scrape.published.load_full();
    let ttl = admin.config.borrow().nats.stale_threshold;
    let (pieces, taken) = mpsc::channel::<Bytes>(1);
    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        write(&snapshot, ttl, |piece| {
            let sent = async { tokio::time::timeout(PATIENCE, pieces.send(piece)).await };
            matches!(runtime.block_on(sent), Ok(Ok(())))
        });
    });
    let body = stream::unfold(taken, async |mut taken| {
        let piece = taken.recv().await?;
        Some((Ok::<_, Infallible>(piece), taken))
    });
    let kind = [(header::CONTENT_TYPE, "application/json")];
    (kind, Body::from_stream(body)).into_response()
}

/// Hands on pieces until `send` refuses one.
fn write(snapshot: &Snapshot, ttl: Duration, mut send: impl FnMut(Bytes) -> bool) {
    let mut piece = vec![b'{'];
    let mut first = true;
    for (host, routes) in snapshot.hosts.iter() {
        for (path, pool) in routes.paths() {
            if !std::mem::take(&mut first) {
                piece.push(b',');
            }
            let name = format!("{host}{path}");
            let of_pool = |backend| endpoint(pool, backend, ttl);
            let endpoints: Vec<Endpoint> = pool
                .backends
                .iter()
                .map(|backend| of_pool(backend))
                .collect();
            serde_json::to_writer(&mut piece, &name).expect("text is JSON");
            piece.push(b':');
            serde_json::to_writer(&mut piece, &endpoints).expect("plain fields are JSON");
            if piece.len() >= PIECE_BYTES && !send(std::mem::take(&mut piece).into()) {
                return;
            }
        }
    }
    piece.extend(b"}\n");
    send(piece.into());
}

fn endpoint<'a>(pool: &'a Pool, backend: &'a Backend, ttl: Duration) -> Endpoint<'a> {
    let key = match pool.balance() {
        Some(Balance::Hash(key)) => Some(key),
        Some(Balance::RoundRobin | Balance::LeastConnections) | None => None,
    };
    let header = |of: &'a HashOf| match of {
        HashOf::Header(name) => Some(&**name),
        HashOf::Cookie(_) | HashOf::Source => None,
    };
    Endpoint {
        address: backend.address,
        availability_zone: backend
            .instance()
            .availability_zone
            .as_deref()
            .unwrap_or_default(),
        protocol: match backend.protocol {
            HttpProtocol::Http1 => "http1",
            HttpProtocol::Http2 => "http2",
        },
        tls: backend.tls().is_some(),
        ttl: match backend.origin.expires() {
            true => i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
            false => -1,
        },
        route_service_url: pool.route_service_url().map(|url| &**url),
        tags: &backend.instance().tags,
        isolation_segment: backend.instance().isolation_segment.as_deref(),
        private_instance_id: backend.instance().id.as_deref(),
        server_cert_domain_san: backend.tls().and_then(|tls| tls.server_name.as_deref()),
        load_balancing_algorithm: pool.balance().map(|balance| match balance {
            Balance::LeastConnections => "least-connection",
            Balance::RoundRobin | Balance::Hash(_) => balance.as_str(),
        }),
        hash_header: key.and_then(|key| header(&key.of)),
        hash_balance: key
            .and_then(|key| key.balance_percent)
            .map(|percent| f64::from(percent) / 100.0),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::{Value, json};

    use super::*;
    use crate::route::RouteEvent;
    use crate::route::table::RouteTable;
    use crate::route::wire;

    fn table(messages: &[&str]) -> Arc<Snapshot> {
        let now = Instant::now();
        let mut table = RouteTable::new(Duration::from_secs(120), now);
        for message in messages {
            let registration = wire::register(message.as_bytes(), &[]).unwrap();
            table.apply(RouteEvent::Register(registration), now);
        }
        Arc::new(table.snapshot())
    }

    fn written(snapshot: &Snapshot) -> (usize, Value) {
        let (mut pieces, mut text) = (0, Vec::new());
        write(snapshot, Duration::from_secs(120), |piece| {
            pieces += 1;
            text.extend(piece);
            true
        });
        (pieces, serde_json::from_slice(&text).unwrap())
    }

    #[test]
    fn an_endpoint_has_what_gorouter_says_of_it() {
        let snapshot = table(&[
            r#"{"host":"10.0.0.1","tls_port":443,"uris":["a.x/p"],"server_cert_domain_san":"san",
                "private_instance_id":"i","isolation_segment":"s","availability_zone":"z",
                "tags":{"component":"c"},"protocol":"http2","route_service_url":"https://r.x",
                "options":{"loadbalancing":"hash","hash_header":"X-H","hash_balance":1.5}}"#,
            r#"{"host":"10.0.0.2","port":80,"uris":["b.x"]}"#,
        ]);
        let wanted = json!({
            "a.x/p": [{
                "address": "10.0.0.1:443", "availability_zone": "z", "protocol": "http2", "tls": true,
                "ttl": 120, "route_service_url": "https://r.x", "tags": {"component": "c"},
                "isolation_segment": "s", "private_instance_id": "i", "server_cert_domain_san": "san",
                "load_balancing_algorithm": "hash", "hash_header": "x-h", "hash_balance": 1.5,
            }],
            "b.x": [{
                "address": "10.0.0.2:80", "availability_zone": "", "protocol": "http1", "tls": false,
                "ttl": 120, "tags": {},
            }],
        });
        assert_eq!(written(&snapshot), (1, wanted));
        assert_eq!(written(&Snapshot::default()), (1, json!({})));
    }

    #[test]
    fn a_large_table_comes_in_pieces_and_ends_with_its_reader() {
        let messages: Vec<String> = (0..2000)
            .map(|n| format!(r#"{{"host":"10.0.0.1","port":80,"uris":["h{n}.x"]}}"#))
            .collect();
        let snapshot = table(&messages.iter().map(|m| &**m).collect::<Vec<_>>());
        let (pieces, value) = written(&snapshot);
        assert_eq!(value.as_object().unwrap().len(), 2000);
        assert!(pieces > 2);
        let mut offered = 0;
        write(&snapshot, Duration::from_secs(120), |_| {
            offered += 1;
            false
        });
        assert_eq!(offered, 1);
    }
}
