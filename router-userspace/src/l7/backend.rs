//! One worker's backends: their kept-alive connections, what is in flight, and who is ejected.
//!
//! Connections of HTTP/1.1 are kept last in first out, so that a burst's surplus ages at the bottom and
//! is closed after `http.timeouts.backend_idle`; their number is bounded by the requests in flight and
//! `http.limits.idle_per_backend`. Connections of HTTP/2 are shared, and opened one after the other.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hyper::client::conn::http2;
use rand::Rng;
use tokio::sync::Notify;
use tokio::time::Instant;

pub(super) use crate::l7::backend::connection::{Connection, Http1, Purpose, RawBackend};

use crate::l7::admission::InFlight;
use crate::l7::backend::connection::{Http2, Opened};
use crate::l7::balance::PoolState;
use crate::l7::body::RequestBody;
use crate::l7::error::Failure;
use crate::l7::metrics::{BackendCounters, RouteCounters, Traffic};
use crate::l7::outlier::Outlier;
use crate::l7::retry_budget::RetryBudget;
use crate::l7::router::RouteMatch;
use crate::l7::shared::{BackendKey, Shared, SharedBackend};
use crate::l7::tls::BackendTlsClient;
use crate::route::{Backend, BackendTls, HttpProtocol, Pool, TlsRoots};

mod connection;
mod io;

/// Requests at once on one connection of HTTP/2; beyond, another is opened.
const STREAMS_PER_CONNECTION: usize = 100;

/// All backends that this worker has met and that a published pool still names.
pub(super) struct Backends {
    /// Which of the workers this is, from 0 on.
    pub worker: usize,
    /// What it knows together with the others.
    pub common: Arc<Shared>,
    /// The gateway's, of the states of pools that are here.
    zone: Option<String>,
    /// By the address of the pool, which is not given to another while a `Weak` of it is here.
    pools: HashMap<*const Pool, Rc<PoolState>>,
    states: HashMap<BackendKey, Rc<BackendState>>,
    /// Of each route with a state, by host and path: a route has another pool with every change.
    budgets: HashMap<(Box<str>, Box<str>), Rc<RetryBudget>>,
    pub routes: RouteCounters,
    changed: bool,
}

impl Backends {
    pub(super) fn new(worker: usize, common: Arc<Shared>, routes: RouteCounters) -> Backends {
        Backends {
            worker,
            common,
            zone: None,
            pools: HashMap::new(),
            states: HashMap::new(),
            budgets: HashMap::new(),
            routes,
            changed: false,
        }
    }

    pub(super) fn pool(
        &mut self,
        found: &RouteMatch<'_>,
        now: Instant,
        rng: &mut impl Rng,
    ) -> Rc<PoolState> {
        let pool = found.pool;
        if let Some(state) = self.pools.get(&Arc::as_ptr(pool)) {
            return Rc::clone(state);
        }
        let state_of = |backend: &Backend| {
            let key = (backend.address, backend.tls().cloned(), backend.protocol);
            if let Some(known) = self.states.get(&key) {
                return Rc::clone(known);
            }
            let common = self.common.backend(&key, now);
            let state = Rc::new(BackendState::new(backend, self.worker, common));
            self.states.insert(key, Rc::clone(&state));
            self.changed = true;
            state
        };
        let route = pool.policy.as_ref().map(|policy| self.common.route(policy));
        let name = (found.host.into(), found.path.into());
        let budget = self
            .budgets
            .entry(name)
            .or_insert_with(|| Rc::new(RetryBudget::new(now)));
        let (zone, budget) = (self.zone.as_deref(), Rc::clone(budget));
        let state = PoolState::new(found, zone, route, budget, state_of, now, rng);
        let state = state.counted_by(&mut self.routes);
        let state = Rc::new(state);
        self.pools.insert(Arc::as_ptr(pool), Rc::clone(&state));
        state
    }

    /// The gateway's zone is another: who is local is found out again.
    pub(super) fn set_zone(&mut self, zone: Option<&str>) {
        if self.zone.as_deref() != zone {
            self.zone = zone.map(str::to_owned);
            self.pools.clear();
        }
    }

    /// Forgets pools that are no longer published and the backends only they named, closes idle
    /// connections, and has those look again who wait for room. Called about once a second.
    pub(super) fn sweep(&mut self, now: Instant, backend_idle: Duration) {
        self.pools.retain(|_, state| {
            state.queue.wake_all();
            state.pool.strong_count() > 0
        });
        self.budgets
            .retain(|_, budget| Rc::strong_count(budget) > 1);
        let before = self.states.len();
        self.states.retain(|_, state| Rc::strong_count(state) > 1);
        self.changed |= self.states.len() != before;
        for state in self.states.values() {
            state.close_idle(now, backend_idle);
        }
    }

    /// The counters of every backend, if there are others than at the last call.
    pub(super) fn changed_counters(&mut self) -> Option<Vec<(SocketAddr, Arc<BackendCounters>)>> {
        let list = || {
            let counters = |state: &Rc<BackendState>| (state.address, Arc::clone(&state.counters));
            self.states.values().map(counters).collect()
        };
        std::mem::take(&mut self.changed).then(list)
    }
}

/// A backend as one worker knows it.
pub(super) struct BackendState {
    address: SocketAddr,
    tls: Option<BackendTls>,
    protocol: HttpProtocol,
    idle: RefCell<Vec<IdleConnection>>,
    shared: RefCell<Vec<SharedConnection>>,
    /// A connection to share is being opened; `opened` tells when it was, or could not be.
    opening: Cell<bool>,
    opened: Notify,
    worker: usize,
    counters: Arc<BackendCounters>,
}

struct IdleConnection {
    connection: Http1,
    since: Instant,
}

/// A connection of HTTP/2.
struct SharedConnection {
    sender: http2::SendRequest<RequestBody>,
    streams: Rc<Cell<usize>>,
    /// When it last began to carry a request.
    used: Cell<Instant>,
}

impl BackendState {
    fn new(backend: &Backend, worker: usize, common: Arc<SharedBackend>) -> BackendState {
        BackendState {
            address: backend.address,
            tls: backend.tls().cloned(),
            protocol: backend.protocol,
            idle: RefCell::default(),
            shared: RefCell::default(),
            opening: Cell::new(false),
            opened: Notify::new(),
            worker,
            counters: Arc::new(BackendCounters::new(worker, common)),
        }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn protocol(&self) -> HttpProtocol {
        self.protocol
    }

    fn tls(&self) -> Option<&BackendTls> {
        self.tls.as_ref()
    }

    /// It is an address of a route service.
    pub(super) fn is_route_service(&self) -> bool {
        let tls = self.tls.as_ref();
        tls.is_some_and(|tls| tls.roots == TlsRoots::RouteServices)
    }

    /// Counts a request unless there are `limit` in flight (0: no limit).
    pub(super) fn begin_request(&self, limit: u32) -> bool {
        let begins = self.in_flight().try_enter(self.worker, limit);
        if begins {
            self.counters.requests.add(1);
        }
        begins
    }

    pub(super) fn end_request(&self) {
        self.in_flight().leave(self.worker);
    }

    /// Requests and upgraded connections that have not ended, of all workers.
    pub(super) fn in_flight(&self) -> &InFlight {
        &self.counters.shared.in_flight
    }

    pub(super) fn has_room(&self, limit: u32) -> bool {
        self.in_flight().has_room(limit)
    }

    pub(super) fn outlier(&self) -> &Outlier {
        &self.counters.shared.outlier
    }

    pub(super) fn is_ejected(&self, now: Instant) -> bool {
        self.outlier().is_ejected(now)
    }

    /// When the first worker met it.
    pub(super) fn since(&self) -> Instant {
        self.counters.shared.since
    }

    pub(super) fn traffic(&self) -> &Traffic {
        &self.counters.traffic
    }

    pub(super) fn record_failure(&self) {
        self.counters.failures.add(1);
    }

    /// A connection that is open. Waits for one to share that is being opened; `None` if one has to be
    /// opened by whoever asks.
    pub(super) async fn take(
        &self,
        now: Instant,
        backend_idle: Duration,
        purpose: Purpose,
    ) -> Option<Connection> {
        if self.protocol == HttpProtocol::Http1 || purpose.upgrades {
            let kept = self.take_idle(now, backend_idle, purpose.past_tcp);
            return kept.map(Connection::Http1);
        }
        loop {
            if let Some(stream) = self.share(now) {
                return Some(Connection::Http2(stream));
            }
            // A backend that TLS found to speak HTTP/1.1 only.
            if let Some(connection) = self.take_idle(now, backend_idle, purpose.past_tcp) {
                return Some(Connection::Http1(connection));
            }
            if !self.opening.get() {
                return None;
            }
            self.opened.notified().await;
        }
    }

    /// Opens a connection. One that begins with a `proxy_header` is of one client, so it is not shared.
    ///
    /// # Errors
    /// Whose failure it is, and of what kind.
    pub(super) async fn open(
        &self,
        purpose: Purpose,
        tls: Option<Arc<BackendTlsClient>>,
        proxy_header: Option<Vec<u8>>,
    ) -> Result<Connection, Failure> {
        let is_shared = proxy_header.is_none();
        let _opening = (self.protocol == HttpProtocol::Http2 && !purpose.upgrades)
            .then(|| Opening::begin(self));
        match connection::open(self, purpose, tls, proxy_header).await? {
            Opened::Http1(connection) => Ok(Connection::Http1(connection)),
            Opened::Http2(sender) => {
                let streams = Rc::default();
                let stream = Http2::new(sender.clone(), &streams, false);
                if is_shared {
                    self.shared.borrow_mut().push(SharedConnection {
                        sender,
                        streams,
                        used: Cell::new(Instant::now()),
                    });
                }
                Ok(Connection::Http2(stream))
            }
        }
    }

    /// A stream on the least used of the shared connections.
    fn share(&self, now: Instant) -> Option<Http2> {
        let mut shared = self.shared.borrow_mut();
        shared.retain(|connection| !connection.sender.is_closed());
        let connection = shared
            .iter()
            .filter(|connection| connection.streams.get() < STREAMS_PER_CONNECTION)
            .min_by_key(|connection| connection.streams.get())?;
        connection.used.set(now);
        Some(Http2::new(
            connection.sender.clone(),
            &connection.streams,
            true,
        ))
    }

    fn take_idle(&self, now: Instant, backend_idle: Duration, past_tcp: bool) -> Option<Http1> {
        let mut idle = self.idle.borrow_mut();
        let mut found = None;
        let suits = |idle: &IdleConnection| past_tcp || !idle.connection.sockmap;
        while let Some(at) = idle.iter().rposition(suits) {
            let IdleConnection { connection, since } = idle.remove(at);
            if connection.sender.is_ready() && now.duration_since(since) < backend_idle {
                found = Some(connection);
                break;
            }
        }
        self.counters.idle_connections.set(idle.len() as u64);
        found
    }

    /// Keeps a connection whose response has ended cleanly.
    pub(super) fn keep(&self, connection: Connection, now: Instant, limit: usize) {
        let Connection::Http1(mut connection) = connection else {
            return;
        };
        let mut idle = self.idle.borrow_mut();
        // Not ready means that the request's body has not all been sent, or the backend closed.
        if connection.sender.is_ready() && idle.len() < limit {
            connection.reused = true;
            connection.upgrade.take();
            idle.push(IdleConnection {
                connection,
                since: now,
            });
            self.counters.idle_connections.set(idle.len() as u64);
        }
    }

    fn close_idle(&self, now: Instant, backend_idle: Duration) {
        let mut idle = self.idle.borrow_mut();
        idle.retain(|idle| {
            !idle.connection.sender.is_closed() && now.duration_since(idle.since) < backend_idle
        });
        self.counters.idle_connections.set(idle.len() as u64);
        // The connection ends when nobody can begin a stream on it.
        self.shared.borrow_mut().retain(|connection| {
            let idle = connection.streams.get() == 0
                && now.duration_since(connection.used.get()) >= backend_idle;
            !idle && !connection.sender.is_closed()
        });
    }
}

/// That a connection to share is being opened, until it is or cannot be.
struct Opening<'a>(&'a BackendState);

impl<'a> Opening<'a> {
    fn begin(backend: &'a BackendState) -> Opening<'a> {
        backend.opening.set(true);
        Opening(backend)
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        self.0.opening.set(false);
        self.0.opened.notify_waiters();
    }
}
