//! The admin API: health, metrics and listings, over HTTP on a TCP address or a unix socket.
//!
//! | path | answer |
//! |---|---|
//! | `/livez` | 200 while the process runs |
//! | `/readyz` | 200 or 503 with the reasons: see [`ready`] |
//! | `/metrics` | Prometheus text |
//! | `/v1/routes`, `/v1/vips`, `/v1/backends` | listings in pages, see [`listing`] |
//! | `/v1/stats` | counters in one object |
//! | `/v1/stats/routes`, `/v1/stats/backends` | what layer 7 counted of each, in pages |
//! | `/v1/flows`, `/v1/watch` | the flow table in pages; sampled packets, live |
//! | `/gorouter/routes` | HTTP routes in gorouter's JSON |
//! | `/v1/rejects` | what sources refused lately |
//! | `/v1/explain` | what would become of a packet or a request |
//! | `/v1/drain` | backends that an operator drains; by POST, drains one |
//! | `/v1/drain/gateway` | by POST, drains the gateway itself |
//!
//! Reads the published snapshot and the counters, never the table, so that no answer delays a
//! registration; a drain and a packet to explain are events to the agent. There is no authentication:
//! it listens on loopback unless configured otherwise.

use std::io::ErrorKind::ConnectionRefused;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use axum::Router;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use prometheus_client::registry::Registry;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::admin::listing::PageRequest;
use crate::admin::listing::backends::SharedIndex;
use crate::admin::ready::{Readiness, Sources};
use crate::config::{AdminListen, Config};
use crate::event::Event;
use crate::l4::L4Reader;
use crate::metrics::{Metrics, Scrape};
use crate::rejects::Rejects;
use crate::route::Origin;
use crate::source::status::Status;

mod drain;
mod explain;
mod flows;
mod gorouter;
pub mod listing;
mod policy;
pub mod ready;
mod rejects;
pub mod traffic;

/// Connections at once. Scrapers and operators are few.
const MAX_CONNECTIONS: usize = 64;

/// Answers in the making at once of those that walk over routes or read the kernel's counters.
static WALKS: Semaphore = Semaphore::const_new(2);

/// How long the index of backends is kept that nobody asks, and up to twice that.
const INDEX_IDLE: Duration = Duration::from_secs(60);

/// From a connection, or the answer before, to the end of a request's head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// What the answers are made of.
pub struct Admin {
    pub scrape: Scrape,
    pub rejects: Arc<Rejects>,
    pub config: watch::Receiver<Arc<Config>>,
    /// The agent's.
    pub inbox: mpsc::Sender<Event>,
    /// True from the moment the gateway is told to stop.
    pub draining: watch::Receiver<bool>,
    pub started: Instant,
    pub backends: SharedIndex,
}

/// An address that is taken, not yet answered on.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Another descriptor of the same socket.
    pub fn try_clone(&self) -> std::io::Result<OwnedFd> {
        match self {
            Listener::Tcp(listener) => Ok(listener.try_clone()?.into()),
            Listener::Unix(listener) => Ok(listener.try_clone()?.into()),
        }
    }

    /// As [`serve`] wants it.
    pub fn into_nonblocking(self) -> std::io::Result<Listener> {
        match &self {
            Listener::Tcp(listener) => listener.set_nonblocking(true)?,
            Listener::Unix(listener) => listener.set_nonblocking(true)?,
        }
        Ok(self)
    }
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
        AdminListen::Unix(path) => Ok(Listener::Unix(bind_unix(path).with_context(what)?)),
    }
}

/// Binds a unix socket, in place of one that nobody answers on.
pub fn bind_unix(path: &Path) -> std::io::Result<UnixListener> {
    if is_left_over(path) {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Whether a path is a socket of an earlier run, that nobody answers on.
fn is_left_over(path: &Path) -> bool {
    let is_socket =
        std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused =
        || UnixStream::connect(path).is_err_and(|error| error.kind() == ConnectionRefused);
    is_socket && refused()
}

/// Answers until dropped. Must be called inside a tokio runtime.
pub async fn serve(listener: Listener, admin: Arc<Admin>) -> anyhow::Result<()> {
    let router = router(Arc::clone(&admin));
    let accept = async {
        match listener {
            Listener::Tcp(listener) => {
                accept(tokio::net::TcpListener::from_std(listener)?, router).await;
            }
            Listener::Unix(listener) => {
                accept(tokio::net::UnixListener::from_std(listener)?, router).await;
            }
        }
        anyhow::Ok(())
    };
    let forget = async {
        loop {
            tokio::time::sleep(INDEX_IDLE).await;
            admin.backends.forget_unasked();
        }
    };
    tokio::select! {
        ended = accept => ended,
        () = forget => Ok(()),
    }
}

/// Serves at most [`MAX_CONNECTIONS`]; further ones wait in the listen queue.
async fn accept(mut listener: impl axum::serve::Listener, router: Router) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let permit = Arc::clone(&connections).acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        // Tries again by itself after an error.
        let (stream, _) = listener.accept().await;
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .serve_connection(
                TokioIo::new(stream),
                TowerToHyperService::new(router.clone()),
            );
        tokio::spawn(async move {
            // How a client leaves is its own affair.
            let _ = connection.await;
            drop(permit);
        });
    }
}

fn router(admin: Arc<Admin>) -> Router {
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/v1/routes", get(routes))
        .route("/v1/vips", get(vips))
        .route("/v1/backends", get(backends))
        .route("/v1/stats", get(stats))
        .route("/v1/stats/routes", get(route_stats))
        .route("/v1/stats/backends", get(backend_stats))
        .route("/v1/flows", get(flows::flows))
        .route("/v1/watch", get(flows::watch))
        .route("/gorouter/routes", get(gorouter::routes))
        .route("/v1/rejects", get(rejects::list))
        .route("/v1/explain", get(explain::explain))
        .route("/v1/drain", get(drain::list).post(drain::drain))
        .route("/v1/drain/gateway", post(drain::drain_gateway))
        .with_state(admin)
}

impl Admin {
    /// What `/readyz` says.
    pub fn readiness(&self) -> Readiness {
        let metrics = &self.scrape.metrics;
        let snapshot = self.scrape.published.load();
        let config = self.config.borrow().clone();
        let (files_unread, files_refused) = metrics
            .files
            .judge(config.file.paths.iter().chain(&config.file.directories));
        ready::judge(&Sources {
            draining: *self.draining.borrow(),
            nats_configured: !config.nats.servers.is_empty(),
            nats_connected: metrics.nats_connected.get() == 1,
            nats_known_for: metrics.nats_first_connect.get().map(Instant::elapsed),
            files_unread,
            files_refused,
            kv: metrics.kv.state(),
            has_routes: !(snapshot.hosts.is_empty() && snapshot.vips.is_empty()),
            uptime: self.started.elapsed(),
            grace: config.nats.startup_grace,
            followed: metrics.sources.list(),
        })
    }
}

async fn readyz(State(admin): State<Arc<Admin>>) -> Response {
    let readiness = admin.readiness();
    let status = if readiness.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(readiness)).into_response()
}

async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    let text = off_runtime(&admin, |admin| {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(admin.scrape.clone()));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).map(|()| text)
    });
    match text.await {
        Some(Ok(text)) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        // Encoding into a string fails only if a collector does, and ours do not.
        Some(Err(_)) | None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn routes(State(admin): State<Arc<Admin>>, Query(request): Query<PageRequest>) -> Response {
    list(&admin, move |scrape| {
        let revisions = &scrape.metrics.kv.revisions;
        listing::routes(&scrape.published.load(), revisions, &request)
    })
    .await
}

async fn vips(State(admin): State<Arc<Admin>>, Query(request): Query<PageRequest>) -> Response {
    list(&admin, move |scrape| {
        let served = scrape.l4.as_ref().map(L4Reader::vips).unwrap_or_default();
        let revisions = &scrape.metrics.kv.revisions;
        listing::vips(&scrape.published.load(), revisions, &served, &request)
    })
    .await
}

async fn backends(State(admin): State<Arc<Admin>>, Query(request): Query<PageRequest>) -> Response {
    let answer = off_runtime(&admin, move |admin| {
        let snapshot = admin.scrape.published.load();
        admin.backends.page(&snapshot, &request)
    });
    respond(answer.await)
}

async fn route_stats(
    State(admin): State<Arc<Admin>>,
    Query(request): Query<PageRequest>,
) -> Response {
    list(&admin, move |scrape| {
        traffic::routes(&scrape.published.load(), &scrape.l7, &request)
    })
    .await
}

async fn backend_stats(
    State(admin): State<Arc<Admin>>,
    Query(request): Query<PageRequest>,
) -> Response {
    list(&admin, move |scrape| {
        traffic::backends(&scrape.published.load(), &scrape.l7, &request)
    })
    .await
}

async fn list<P: Serialize + Send + 'static>(
    admin: &Arc<Admin>,
    page: impl FnOnce(&Scrape) -> Result<P, String> + Send + 'static,
) -> Response {
    respond(off_runtime(admin, |admin| page(&admin.scrape)).await)
}

fn respond<P: Serialize>(page: Option<Result<P, String>>) -> Response {
    match page {
        Some(Ok(page)) => Json(page).into_response(),
        Some(Err(error)) => refuse(StatusCode::BAD_REQUEST, error),
        None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

const LAYER_4_IS_OFF: &str = "layer 4 is off: l4.interfaces is empty";

/// Asks the kernel's tables.
async fn with_layer_4<P: Serialize + Send + 'static>(
    admin: &Arc<Admin>,
    ask: impl FnOnce(&L4Reader) -> anyhow::Result<P> + Send + 'static,
) -> Response {
    if admin.scrape.l4.is_none() {
        return refuse(StatusCode::NOT_FOUND, LAYER_4_IS_OFF);
    }
    match off_runtime(admin, |admin| admin.scrape.l4.as_ref().map(ask)).await {
        Some(Some(Ok(answer))) => Json(answer).into_response(),
        Some(Some(Err(error))) => refuse(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")),
        Some(None) | None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

fn refuse(status: StatusCode, error: impl Into<String>) -> Response {
    (status, Json(json!({ "error": error.into() }))).into_response()
}

/// Works on a thread of its own, so that health checks and probes of `/livez` do not wait. `None`
/// after a panic.
async fn off_runtime<T: Send + 'static>(
    admin: &Arc<Admin>,
    work: impl FnOnce(&Admin) -> T + Send + 'static,
) -> Option<T> {
    let _permit = WALKS.acquire().await.expect("never closed");
    let admin = Arc::clone(admin);
    tokio::task::spawn_blocking(move || work(&admin)).await.ok()
}

async fn stats(State(admin): State<Arc<Admin>>) -> Response {
    match off_runtime(&admin, counters).await {
        Some(counters) => Json(counters).into_response(),
        None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

fn counters(admin: &Admin) -> Value {
    let scrape = &admin.scrape;
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
    let by_origin = |origin: Origin| {
        let backends = size.entries[origin as usize] as u64;
        (origin.as_str(), backends)
    };
    let by_origin = object(&mut Origin::ALL.into_iter().map(by_origin));
    json!({
        "uptime_seconds": admin.started.elapsed().as_secs(),
        "revision": snapshot.revision,
        "http_routes": size.http_routes,
        "vips": size.vips,
        "route_backends": by_origin,
        "unhealthy_backends": snapshot.unhealthy.len(),
        "drained_backends": snapshot.draining.len() + snapshot.draining_at.len(),
        "state": state(admin),
        "nats": {
            "connected": metrics.nats_connected.get() == 1,
            "connects": metrics.nats_connects.get(),
            "registers": metrics.registers.get(),
            "unregisters": metrics.unregisters.get(),
            "greets": metrics.greets.get(),
            "slow_consumer": metrics.nats_slow_consumer.get(),
            "rejects": object(&mut metrics.rejects()),
        },
        "sources": sources(metrics),
        "changes": object(&mut metrics.changes().into_iter()),
        "l4": l4,
        "l7": scrape.l7.totals(),
        "access_log": {
            "written": scrape.l7.access_log.written(),
            "dropped": scrape.l7.access_log.dropped(),
        },
    })
}

/// Those that follow a server, by origin.
fn sources(metrics: &Metrics) -> Value {
    let source = |(origin, status): (Origin, Status)| {
        let row = json!({
            "state": status.state,
            "since_seconds": status.since.elapsed().as_secs(),
            "age_seconds": status.age().map(|age| age.as_secs()),
            "error": status.error,
            "keys": metrics.source_keys[origin as usize].get(),
            "rejects": metrics.source_rejects[origin as usize].get(),
        });
        (origin.as_str().to_owned(), row)
    };
    Value::Object(metrics.sources.list().into_iter().map(source).collect())
}

/// Of the routes on disk, times in seconds; null where there is nothing to tell.
fn state(admin: &Admin) -> Value {
    let state = &admin.scrape.metrics.state;
    let told = state.told();
    let age = |at: Option<SystemTime>| at.map(|at| at.elapsed().unwrap_or_default().as_secs());
    json!({
        // Those that no source has spoken of since the start are `route_backends.adopted`.
        "restored_age_seconds": age(told.restored_as_of),
        "written_age_seconds": age(told.written),
        "bytes": told.bytes,
        "writes": state.writes.get(),
        "failures": state.failures.get(),
    })
}

#[cfg(test)]
mod tests;
