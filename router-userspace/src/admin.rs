//! The admin API: health, metrics and listings, over HTTP on a TCP address or a unix socket.
//!
//! | path | answer |
//! |---|---|
//! | `/livez` | 200 while the process runs |
//! | `/readyz` | 200 or 503 with the reasons: see [`ready`] |
//! | `/metrics` | Prometheus text |
//! | `/v1/routes`, `/v1/vips`, `/v1/backends` | listings in pages, see [`listing`] |
//! | `/v1/stats` | counters in one object |
//!
//! Reads the published snapshot and the counters, never the table, so that no answer delays a
//! registration. There is nothing here that changes the gateway, and no authentication: it listens
//! on loopback unless configured otherwise.

use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use axum::Router;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use prometheus_client::registry::Registry;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::admin::listing::PageRequest;
use crate::admin::ready::Sources;
use crate::config::{AdminListen, Config};
use crate::metrics::Scrape;

pub mod listing;
pub mod ready;

/// What the answers are made of.
pub struct Admin {
    pub scrape: Scrape,
    pub config: watch::Receiver<Arc<Config>>,
    /// True from the moment the gateway is told to stop.
    pub draining: watch::Receiver<bool>,
    pub started: Instant,
}

/// An address that is taken, not yet answered on.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Takes the admin address, so that a busy one ends the start and not the service.
///
/// # Errors
/// Names the key and the address.
pub fn bind(address: &AdminListen) -> anyhow::Result<Listener> {
    let what = || format!("admin.listen {address}");
    match address {
        AdminListen::Tcp(address) => {
            let listener = TcpListener::bind(address).with_context(what)?;
            listener.set_nonblocking(true).with_context(what)?;
            Ok(Listener::Tcp(listener))
        }
        AdminListen::Unix(path) => {
            // A socket that nobody answers on is left over from an earlier run.
            let left_over = path.exists() && UnixStream::connect(path).is_err();
            if left_over {
                std::fs::remove_file(path).with_context(what)?;
            }
            let listener = UnixListener::bind(path).with_context(what)?;
            listener.set_nonblocking(true).with_context(what)?;
            Ok(Listener::Unix(listener))
        }
    }
}

/// Answers until dropped. Must be called inside a tokio runtime.
pub async fn serve(listener: Listener, admin: Admin) -> anyhow::Result<()> {
    let router = router(admin);
    match listener {
        Listener::Tcp(listener) => {
            axum::serve(tokio::net::TcpListener::from_std(listener)?, router).await?;
        }
        Listener::Unix(listener) => {
            axum::serve(tokio::net::UnixListener::from_std(listener)?, router).await?;
        }
    }
    Ok(())
}

fn router(admin: Admin) -> Router {
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/v1/routes", get(routes))
        .route("/v1/vips", get(vips))
        .route("/v1/backends", get(backends))
        .route("/v1/stats", get(stats))
        .with_state(Arc::new(admin))
}

async fn readyz(State(admin): State<Arc<Admin>>) -> Response {
    let metrics = &admin.scrape.metrics;
    let snapshot = admin.scrape.published.load();
    let config = admin.config.borrow().clone();
    let (files_unread, files_refused) = metrics.files.judge(&config.file.paths);
    let readiness = ready::judge(&Sources {
        draining: *admin.draining.borrow(),
        nats_configured: !config.nats.servers.is_empty(),
        nats_connected: metrics.nats_connected.get() == 1,
        nats_known_for: metrics.nats_first_connect.get().map(Instant::elapsed),
        files_unread,
        files_refused,
        has_routes: !(snapshot.hosts.is_empty() && snapshot.vips.is_empty()),
        uptime: admin.started.elapsed(),
        grace: config.nats.startup_grace,
    });
    let status = if readiness.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(readiness)).into_response()
}

async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(admin.scrape.clone()));
    let mut text = String::new();
    // Encoding into a string fails only if a collector does, and ours do not.
    match prometheus_client::encoding::text::encode(&mut text, &registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn routes(State(admin): State<Arc<Admin>>, Query(request): Query<PageRequest>) -> Response {
    list(&admin, move |scrape| {
        listing::routes(&scrape.published.load(), &request)
    })
    .await
}

async fn vips(State(admin): State<Arc<Admin>>, Query(request): Query<PageRequest>) -> Response {
    list(&admin, move |scrape| {
        listing::vips(&scrape.published.load(), &request)
    })
    .await
}

async fn backends(State(admin): State<Arc<Admin>>, Query(request): Query<PageRequest>) -> Response {
    list(&admin, move |scrape| {
        listing::backends(&scrape.published.load(), &request)
    })
    .await
}

/// Makes a page off the runtime: one page of a million routes is a walk over all of them.
async fn list<P: Serialize + Send + 'static>(
    admin: &Admin,
    page: impl FnOnce(&Scrape) -> Result<P, String> + Send + 'static,
) -> Response {
    let scrape = admin.scrape.clone();
    match tokio::task::spawn_blocking(move || page(&scrape)).await {
        Ok(Ok(page)) => Json(page).into_response(),
        Ok(Err(error)) => {
            (StatusCode::BAD_REQUEST, Json(json!({ "error": error }))).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn stats(State(admin): State<Arc<Admin>>) -> Response {
    let scrape = admin.scrape.clone();
    let (metrics, snapshot) = (&scrape.metrics, scrape.published.load());
    let size = metrics.size();
    let l4 = match &scrape.l4 {
        None => Value::Null,
        Some(reader) => match reader.stats() {
            Ok(stats) => json!(stats),
            Err(error) => json!({ "error": format!("{error:#}") }),
        },
    };
    let object = |rows: &mut dyn Iterator<Item = (&'static str, u64)>| {
        Value::Object(
            rows.map(|(name, count)| (name.to_owned(), json!(count)))
                .collect(),
        )
    };
    Json(json!({
        "uptime_seconds": admin.started.elapsed().as_secs(),
        "revision": snapshot.revision,
        "http_routes": size.http_routes,
        "vips": size.vips,
        "route_backends": { "nats": size.entries[0], "file": size.entries[1], "adopted": size.entries[2] },
        "unhealthy_backends": snapshot.unhealthy.len(),
        "nats": {
            "connected": metrics.nats_connected.get() == 1,
            "connects": metrics.nats_connects.get(),
            "registers": metrics.registers.get(),
            "unregisters": metrics.unregisters.get(),
            "greets": metrics.greets.get(),
            "slow_consumer": metrics.nats_slow_consumer.get(),
            "rejects": object(&mut metrics.rejects()),
        },
        "changes": object(&mut metrics.changes().into_iter()),
        "l4": l4,
        "l7": scrape.l7.totals(),
    }))
    .into_response()
}

#[cfg(test)]
mod tests;
