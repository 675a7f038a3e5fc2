//! One worker: a thread with its own runtime, listeners, backend connections and counters.
//!
//! It shares with other workers the published snapshot and settings, both read through a cached
//! pointer, and [what they know together](crate::l7::shared) of backends. Tasks of a worker: one acceptor for each listener, one for each client
//! connection, one for each backend connection, and a sweep about once a second. It is handed its
//! listeners while it runs, and gives each up when its address is; when told to drain it accepts what
//! has already connected and no more, lets each connection end after its request, and leaves what is
//! left at the deadline.

use std::cell::{Cell, RefCell};
use std::net::IpAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use arc_swap::cache::Cache;
use bytes::Bytes;
use http::HeaderValue;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::l7::Settings;
use crate::l7::access_log::{self, WorkerLog};
use crate::l7::backend::Backends;
use crate::l7::balance::{Choice, Circumstances, PoolState, Wanted};
use crate::l7::clients::{ClientPlace, Cutoff};
use crate::l7::handshake::{Handshakes, ListenerKind};
#[cfg(feature = "http3")]
use crate::l7::http3;
use crate::l7::metrics::{RouteCounters, WorkerMetrics};
use crate::l7::route_service::Services;
use crate::l7::router::RouteMatch;
use crate::l7::shared::Shared;
use crate::l7::tls::Tls;
use crate::route::HttpMatch;
use crate::snapshot::{Published, Snapshot};

use self::stamps::{RequestStart, request_ids};

mod accept;
mod stamps;

/// How many tasks run between two looks at the sockets. Beyond tokio's default of 61, more requests
/// are answered for each system call; see docs/performance.md.
const EVENT_INTERVAL: u32 = 256;

/// How often idle connections and forgotten pools are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// What a worker's thread is started with.
pub(super) struct WorkerParts {
    /// From 0 on.
    pub index: usize,
    /// As many at once as addresses are configured.
    pub listeners: mpsc::UnboundedReceiver<Assignment>,
    pub published: Published,
    pub settings: Arc<ArcSwap<Settings>>,
    pub shared: Arc<Shared>,
    pub metrics: Arc<WorkerMetrics>,
    pub tls: Arc<Tls>,
    pub stop: watch::Receiver<Option<Stop>>,
    /// Dropped when the worker has ended.
    pub alive: mpsc::Sender<()>,
}

/// What ends a worker.
#[derive(Clone, Copy)]
pub(super) struct Stop {
    pub deadline: Instant,
    /// Another process serves: idle connections of HTTP/1 are not closed before they made one more
    /// request, so that none is lost that is on its way.
    pub retiring: bool,
}

/// What a worker is to accept from.
pub(super) enum Assignment {
    Tcp(Listener),
    #[cfg(feature = "http3")]
    Http3(http3::Listener),
}

/// A socket to accept from.
pub(super) struct Listener {
    pub socket: std::net::TcpListener,
    pub kind: ListenerKind,
    /// Closed when no more is to be accepted than is in the queue.
    pub open: watch::Receiver<()>,
}

pub(super) struct Worker {
    /// From 0 on.
    pub index: usize,
    pub metrics: Arc<WorkerMetrics>,
    pub tls: Arc<Tls>,
    pub route_services: Services,
    pub shared: Arc<Shared>,
    #[cfg(feature = "http3")]
    pub http3: http3::WorkerState,
    /// Cloned for each response that is being compressed.
    pub compressing: Rc<()>,
    handshakes: Handshakes,
    snapshot: RefCell<Cache<Published, Arc<Snapshot>>>,
    settings: RefCell<Cache<Arc<ArcSwap<Settings>>, Arc<Settings>>>,
    backends: RefCell<Backends>,
    rng: RefCell<SmallRng>,
    request_ids: RefCell<Bytes>,
    clock: Cell<Option<Instant>>,
    request_start: RefCell<RequestStart>,
    scratch: RefCell<Vec<u8>>,
    access_log: RefCell<Option<Rc<WorkerLog>>>,
    draining: Cell<bool>,
    /// What is left is ended, for the time of the drain is up.
    cutting: Cell<bool>,
    retiring: Cell<bool>,
    drain_notice: Notify,
    #[cfg(feature = "http3")]
    cut_notice: Notify,
    open_connections: Cell<usize>,
    connection_ended: Notify,
}

/// Starts a worker's thread.
///
/// # Errors
/// The runtime cannot be built, or the thread not be started.
pub(super) fn spawn(parts: WorkerParts) -> anyhow::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new()
        .name(format!("l7-worker-{}", parts.index))
        .spawn(move || match runtime() {
            Ok(runtime) => runtime.block_on(run(parts)),
            Err(error) => tracing::error!(error = format!("{error:#}"), "l7 worker did not start"),
        })
        .context("start an l7 worker thread")
}

fn runtime() -> anyhow::Result<LocalRuntime> {
    Builder::new_current_thread()
        .enable_all()
        .event_interval(EVENT_INTERVAL)
        .build_local(LocalOptions::default())
        .context("build the l7 runtime")
}

async fn run(parts: WorkerParts) {
    let WorkerParts {
        index,
        mut listeners,
        published,
        settings,
        shared,
        metrics,
        tls,
        mut stop,
        alive,
    } = parts;
    let routes = RouteCounters::new(Arc::clone(&metrics));
    let backends = Backends::new(index, shared, routes);
    let worker = Rc::new(Worker::new(published, settings, backends, metrics, tls));
    let sweeper = tokio::task::spawn_local(sweep(Rc::clone(&worker)));
    let mut acceptors = Vec::new();

    // An error means that the proxy was dropped: end now.
    let Stop { deadline, retiring } = loop {
        tokio::select! {
            // Both may be dropped: a listener that was not taken out stays in the channel.
            stopped = stop.wait_for(Option::is_some) => break match stopped {
                Ok(stop) => stop.expect("waited for"),
                Err(_) => Stop { deadline: Instant::now(), retiring: false },
            },
            Some(listener) = listeners.recv() => {
                acceptors.retain(|acceptor: &JoinHandle<()>| !acceptor.is_finished());
                let worker = Rc::clone(&worker);
                acceptors.push(match listener {
                    Assignment::Tcp(listener) => {
                        tokio::task::spawn_local(accept::accept(worker, listener))
                    }
                    #[cfg(feature = "http3")]
                    Assignment::Http3(listener) => {
                        tokio::task::spawn_local(http3::accept(worker, listener))
                    }
                });
            }
        }
    };
    worker.retiring.set(retiring);
    worker.draining.set(true);
    worker.drain_notice.notify_waiters();
    let mut ended = pin!(async {
        for acceptor in acceptors {
            let _ = acceptor.await;
        }
        worker.connections_ended().await;
    });
    let in_time = tokio::time::timeout_at(deadline, ended.as_mut()).await;
    worker.cutting.set(in_time.is_err());
    #[cfg(feature = "http3")]
    if in_time.is_err() && worker.http3.has_connections() {
        // TCP tells clients by itself that a connection is gone.
        worker.cut_notice.notify_waiters();
        let _ = tokio::time::timeout(http3::CLOSE, ended).await;
    }
    sweeper.abort();
    drop(alive);
}

async fn sweep(worker: Rc<Worker>) {
    let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
    let mut failures_before = 0;
    loop {
        ticks.tick().await;
        let failures = worker.metrics.gateway_failures();
        if failures > failures_before {
            let requests = failures - failures_before;
            tracing::warn!(
                requests,
                "answered 503 because the gateway itself could not reach out"
            );
            failures_before = failures;
        }
        // Also lets go of a snapshot and an access log that no request has replaced.
        worker.snapshot(|_| ());
        worker.access_log();
        worker.forget_clock();
        worker.route_services.sweep(worker.now());
        let mut backends = worker.backends.borrow_mut();
        let backend_idle = worker.settings(|settings| {
            backends.set_zone(settings.zone.as_deref());
            settings.timeouts.backend_idle
        });
        backends.sweep(worker.now(), backend_idle);
        worker.snapshot(|snapshot| {
            let is_published = |route: &HttpMatch| {
                let host = snapshot.hosts.get(&route.host);
                let conditions = route.conditions.as_deref();
                host.is_some_and(|(_, routes)| routes.get(&route.path, conditions).is_some())
            };
            backends.routes.sweep(snapshot.revision, is_published);
        });
        if let Some(counters) = backends.changed_counters() {
            worker.metrics.publish_backends(counters);
        }
        worker
            .request_start
            .replace(RequestStart::new(worker.now()));
    }
}

impl Worker {
    pub(super) fn new(
        published: Published,
        settings: Arc<ArcSwap<Settings>>,
        backends: Backends,
        metrics: Arc<WorkerMetrics>,
        tls: Arc<Tls>,
    ) -> Worker {
        Worker {
            handshakes: Handshakes::new(Arc::clone(&tls), Arc::clone(&metrics)),
            index: backends.worker,
            route_services: Services::default(),
            shared: Arc::clone(&backends.common),
            #[cfg(feature = "http3")]
            http3: http3::WorkerState::default(),
            compressing: Rc::new(()),
            metrics,
            tls,
            snapshot: RefCell::new(Cache::new(published)),
            settings: RefCell::new(Cache::new(settings)),
            backends: RefCell::new(backends),
            rng: RefCell::new(SmallRng::from_os_rng()),
            request_ids: RefCell::default(),
            clock: Cell::new(None),
            request_start: RefCell::new(RequestStart::new(Instant::now())),
            scratch: RefCell::default(),
            access_log: RefCell::default(),
            draining: Cell::new(false),
            cutting: Cell::new(false),
            retiring: Cell::new(false),
            drain_notice: Notify::new(),
            #[cfg(feature = "http3")]
            cut_notice: Notify::new(),
            open_connections: Cell::new(0),
            connection_ended: Notify::new(),
        }
    }

    pub(super) fn snapshot<R>(&self, read: impl FnOnce(&Snapshot) -> R) -> R {
        read(self.snapshot.borrow_mut().load())
    }

    pub(super) fn settings<R>(&self, read: impl FnOnce(&Settings) -> R) -> R {
        read(self.settings.borrow_mut().load())
    }

    /// This worker's state of the pool of a route of the current snapshot.
    pub(super) fn pool(&self, found: &RouteMatch<'_>) -> Rc<PoolState> {
        self.backends
            .borrow_mut()
            .pool(found, self.now(), &mut *self.rng.borrow_mut())
    }

    /// The same for what a pool's requests match, `None` if that is no longer published.
    pub(super) fn newer_pool(&self, matched: &HttpMatch) -> Option<Rc<PoolState>> {
        self.snapshot(|snapshot| {
            let (host, routes) = snapshot.hosts.get(&matched.host)?;
            let route = routes.get(&matched.path, matched.conditions.as_deref())?;
            Some(self.pool(&RouteMatch {
                host,
                path: route.path,
                conditions: route.conditions.map(|conditions| &**conditions),
                pool: route.pool,
            }))
        })
    }

    /// The target for the next attempt.
    pub(super) fn pick(&self, pool: &PoolState, wanted: &Wanted, tried: &[usize]) -> Choice {
        self.settings(|settings| {
            self.snapshot(|snapshot| {
                let panic = pool.in_panic(snapshot);
                let at = Circumstances {
                    balance: wanted.balance(pool, settings),
                    key: wanted.key,
                    now: self.now(),
                    unhealthy: &snapshot.unhealthy,
                    panic,
                    draining: &snapshot.draining,
                    tried,
                    prefer_local: settings.prefer_zone && tried.is_empty(),
                    slow_start: settings.slow_start,
                    limit: pool.limit(settings),
                };
                if let Some(session) = &wanted.session
                    && (session.required || tried.is_empty())
                {
                    match pool.pick_instance(&session.instance, &at) {
                        Some(index) => return Choice::Target(index),
                        None if session.required => return Choice::Nobody,
                        None => {}
                    }
                }
                if panic {
                    self.metrics.panic_picks.add(1);
                }
                pool.pick(&at, &mut *self.rng.borrow_mut())
            })
        })
    }

    /// The time, read once in each run of a task.
    pub(super) fn now(&self) -> Instant {
        self.clock.get().unwrap_or_else(|| self.read_clock())
    }

    pub(super) fn read_clock(&self) -> Instant {
        let now = Instant::now();
        self.clock.set(Some(now));
        now
    }

    /// To be called when a task begins to run.
    pub(super) fn forget_clock(&self) {
        self.clock.set(None);
    }

    /// A random UUID. Unique, not secret: the generator is seeded from the system and fast.
    pub(super) fn new_request_id(&self) -> HeaderValue {
        let mut unused = self.request_ids.borrow_mut();
        if unused.is_empty() {
            *unused = request_ids(&mut *self.rng.borrow_mut());
        }
        let id = unused.split_to(uuid::fmt::Hyphenated::LENGTH);
        HeaderValue::from_maybe_shared(id).expect("hexadecimal digits and hyphens")
    }

    /// Milliseconds since the Unix epoch.
    pub(super) fn request_start(&self) -> HeaderValue {
        self.request_start.borrow_mut().value(self.now())
    }

    /// A point in time since the Unix epoch.
    pub(super) fn since_epoch(&self, at: Instant) -> Duration {
        self.request_start.borrow().since_epoch(at)
    }

    /// This worker's part of the access log, if there is one.
    pub(super) fn access_log(&self) -> Option<Rc<WorkerLog>> {
        self.settings(|settings| {
            access_log::of_worker(&self.access_log, settings.access_log.as_ref())
        })
    }

    /// Lends the generator of what need not be secret.
    pub(super) fn with_rng<R>(&self, use_it: impl FnOnce(&mut SmallRng) -> R) -> R {
        use_it(&mut self.rng.borrow_mut())
    }

    /// Lends an empty buffer.
    pub(super) fn with_scratch<R>(&self, use_it: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        let mut scratch = self.scratch.borrow_mut();
        scratch.clear();
        use_it(&mut scratch)
    }

    /// Counts a connection of a client until the place is dropped; none is needed where clients are not
    /// limited.
    ///
    /// # Errors
    /// The client has as many as it may.
    pub(super) fn enter(&self, client: IpAddr) -> Result<Option<ClientPlace>, TooManyConnections> {
        let limit = self.settings(|settings| match settings.limits.connections_per_client {
            0 => None,
            _ if settings.trusts(client) => None,
            limit => Some(limit),
        });
        let Some(limit) = limit else {
            return Ok(None);
        };
        match self.shared.clients.enter(client, limit) {
            Some(place) => Ok(Some(place)),
            None => {
                self.metrics.count_cutoff(Cutoff::Connections);
                tracing::debug!(%client, "has http.limits.connections_per_client");
                Err(TooManyConnections)
            }
        }
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.get()
    }

    pub(super) fn is_cutting(&self) -> bool {
        self.cutting.get()
    }

    /// Whether it drains because another process serves.
    pub(super) fn is_retiring(&self) -> bool {
        self.retiring.get()
    }

    /// Ends when the worker begins to drain.
    pub(super) async fn drain_notice(&self) {
        self.drain_notice.notified().await;
    }

    /// Ends when what is left is ended.
    #[cfg(feature = "http3")]
    pub(super) async fn cut_notice(&self) {
        self.cut_notice.notified().await;
    }

    /// Whether there are `http.limits.connections`.
    pub(super) fn is_full(&self) -> bool {
        self.open_connections.get() >= self.settings(|settings| settings.limits.connections)
    }

    async fn wait_for_room(&self) {
        if self.is_full() {
            self.metrics.connections_full.add(1);
            tracing::warn!("http.limits.connections reached, new connections wait");
        }
        while self.is_full() {
            self.connection_ended.notified().await;
        }
    }

    async fn connections_ended(&self) {
        while self.open_connections.get() > 0 {
            self.connection_ended.notified().await;
        }
    }
}

/// A client has `http.limits.connections_per_client`.
pub(super) struct TooManyConnections;

/// Counts an open client connection, however it ends.
pub(super) struct OpenConnection(Rc<Worker>);

impl OpenConnection {
    pub(super) fn new(worker: &Rc<Worker>) -> OpenConnection {
        worker
            .open_connections
            .set(worker.open_connections.get() + 1);
        worker.metrics.connections_open.add(1);
        OpenConnection(Rc::clone(worker))
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0
            .open_connections
            .set(self.0.open_connections.get() - 1);
        self.0.metrics.connections_open.subtract(1);
        self.0.connection_ended.notify_waiters();
    }
}
