//! One worker's backends: their kept-alive connections, what is in flight, and who is ejected.
//!
//! Connections are HTTP/1.1, plain or TLS, last in first out, so that a burst's surplus ages at
//! the bottom and is closed after `http.timeouts.backend_idle`. Each is driven by a task of its own
//! that ends with it. The number of connections is bounded by the requests in flight and
//! `http.limits.idle_per_backend`.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use nix::errno::Errno;
use rand::Rng;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_rustls::client::TlsStream;

use crate::l7::balance::{PoolState, Target};
use crate::l7::body::RequestBody;
use crate::l7::error::{BackendFailure, BackendTimeout, Failure, GatewayFailure};
use crate::l7::liveness;
use crate::l7::metrics::BackendCounters;
use crate::l7::sockmap;
use crate::l7::tls::BackendTlsClient;
use crate::l7::worker::Worker;
use crate::route::{Backend, BackendTls, Pool};

const RESPONSE_HEADER_BYTES: usize = 64 * 1024;

/// Most bytes read from a backend at once, and buffered towards it. A connection gets there only
/// when its reads fill what it has; a body of 64 KiB then comes in one read with its head.
const BUFFER_BYTES: usize = 128 * 1024;

/// All backends that this worker has met and that a published pool still names.
#[derive(Default)]
pub(super) struct Backends {
    /// By the address of the pool, which is not given to another while a `Weak` of it is here.
    pools: HashMap<*const Pool, Rc<PoolState>>,
    states: HashMap<BackendKey, Rc<BackendState>>,
    changed: bool,
}

/// Connections are shared between pools that reach the same socket with the same proof of identity.
type BackendKey = (SocketAddr, Option<Option<Arc<str>>>);

impl Backends {
    pub(super) fn pool(&mut self, pool: &Arc<Pool>, rng: &mut impl Rng) -> Rc<PoolState> {
        if let Some(state) = self.pools.get(&Arc::as_ptr(pool)) {
            return Rc::clone(state);
        }
        let state_of = |backend: &Backend| {
            let server_name = backend.tls.as_ref().map(|tls| tls.server_name.clone());
            let new = || {
                self.changed = true;
                Rc::new(BackendState::new(backend))
            };
            Rc::clone(
                self.states
                    .entry((backend.address, server_name))
                    .or_insert_with(new),
            )
        };
        let state = Rc::new(PoolState::new(pool, state_of, rng));
        self.pools.insert(Arc::as_ptr(pool), Rc::clone(&state));
        state
    }

    /// Forgets pools that are no longer published and the backends only they named, closes idle
    /// connections and ends ejections. Called about once a second.
    pub(super) fn sweep(&mut self, now: Instant, backend_idle: Duration) {
        self.pools.retain(|_, state| state.pool.strong_count() > 0);
        let before = self.states.len();
        self.states.retain(|_, state| Rc::strong_count(state) > 1);
        self.changed |= self.states.len() != before;
        for state in self.states.values() {
            state.close_idle(now, backend_idle);
            state.is_ejected(now);
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
    idle: RefCell<Vec<IdleConnection>>,
    in_flight: Cell<u32>,
    ejected_until: Cell<Option<Instant>>,
    counters: Arc<BackendCounters>,
}

struct IdleConnection {
    connection: Connection,
    since: Instant,
}

/// A connection that can take a request.
pub(super) struct Connection {
    pub sender: SendRequest<RequestBody>,
    /// Where its task delivers the raw connection when it has switched protocols.
    pub upgrade: Rc<Cell<Option<oneshot::Sender<RawBackend>>>>,
    /// It has carried a request before, so the backend may be closing it at this moment.
    pub reused: bool,
    /// It may pass TCP by, and takes only requests that may.
    sockmap: bool,
}

/// A backend connection after its 101: no longer HTTP.
pub(super) struct RawBackend {
    pub io: BackendIo,
    /// What the backend sent behind the 101.
    pub read_ahead: Bytes,
}

impl BackendState {
    fn new(backend: &Backend) -> BackendState {
        BackendState {
            address: backend.address,
            tls: backend.tls.clone(),
            idle: RefCell::default(),
            in_flight: Cell::new(0),
            ejected_until: Cell::new(None),
            counters: Arc::default(),
        }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Requests and upgraded connections of this worker that have not ended.
    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight.get()
    }

    pub(super) fn is_ejected(&self, now: Instant) -> bool {
        match self.ejected_until.get() {
            None => false,
            Some(until) if now < until => true,
            Some(_) => {
                self.ejected_until.set(None);
                self.counters.ejected.set(0);
                false
            }
        }
    }

    pub(super) fn eject(&self, until: Instant) {
        self.ejected_until.set(Some(until));
        self.counters.ejected.set(1);
    }

    pub(super) fn record_failure(&self) {
        self.counters.failures.add(1);
    }

    fn take_idle(
        &self,
        now: Instant,
        backend_idle: Duration,
        past_tcp: bool,
    ) -> Option<Connection> {
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

    fn keep(&self, connection: Connection, now: Instant, limit: usize) {
        let mut idle = self.idle.borrow_mut();
        if idle.len() < limit {
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
    }
}

/// A backend in use by one request: counted from the choice of the backend until the end of the
/// response's body or of the upgraded connection.
pub(super) struct Lease {
    worker: Rc<Worker>,
    pool: Rc<PoolState>,
    index: usize,
    connection: Option<Connection>,
}

impl Lease {
    pub(super) fn new(worker: &Rc<Worker>, pool: &Rc<PoolState>, index: usize) -> Lease {
        let lease = Lease {
            worker: Rc::clone(worker),
            pool: Rc::clone(pool),
            index,
            connection: None,
        };
        let backend = lease.backend();
        backend.in_flight.set(backend.in_flight.get() + 1);
        backend.counters.in_flight.add(1);
        backend.counters.requests.add(1);
        lease
    }

    pub(super) fn target(&self) -> &Target {
        &self.pool.targets[self.index]
    }

    pub(super) fn backend(&self) -> &BackendState {
        &self.target().backend
    }

    /// A kept-alive connection unless `fresh`, else a new one. `past_tcp`: the request has neither a
    /// body nor an upgrade, as [`sockmap`] wants it.
    ///
    /// # Errors
    /// The backend cannot be connected to, which ejects it unless the gateway is at fault.
    pub(super) async fn connect(&mut self, fresh: bool, past_tcp: bool) -> Result<(), Failure> {
        let kept = if fresh {
            None
        } else {
            let backend_idle = self
                .worker
                .settings(|settings| settings.timeouts.backend_idle);
            self.backend()
                .take_idle(self.worker.now(), backend_idle, past_tcp)
        };
        let connection = match kept {
            Some(connection) => {
                self.worker.metrics.backend_connections_reused.add(1);
                connection
            }
            None => self.open(past_tcp).await?,
        };
        self.connection = Some(connection);
        Ok(())
    }

    /// The backend and the connection to it.
    ///
    /// # Panics
    /// [`Lease::connect`] has not succeeded.
    pub(super) fn connected(&mut self) -> (&Target, &mut Connection) {
        let connection = self.connection.as_mut().expect("the lease is connected");
        (&self.pool.targets[self.index], connection)
    }

    async fn open(&self, past_tcp: bool) -> Result<Connection, Failure> {
        let (connect, ejection) = self
            .worker
            .settings(|settings| (settings.timeouts.connect, settings.timeouts.ejection));
        let past_tcp = past_tcp && self.worker.settings(|settings| settings.sockmap);
        let opening = open(self.backend(), self.worker.tls.as_ref(), past_tcp);
        let opened = match tokio::time::timeout(connect, opening).await {
            Ok(opened) => opened,
            Err(_) => Err(Failure::BackendTimeout(BackendTimeout::Connect)),
        };
        match &opened {
            Ok(_) => self.worker.metrics.backend_connections_opened.add(1),
            Err(Failure::Gateway(_)) => {}
            Err(failure) => {
                self.worker.metrics.ejections.add(1);
                self.backend().eject(Instant::now() + ejection);
                tracing::info!(
                    backend = %self.backend().address,
                    %failure,
                    reason = ?failure,
                    "backend ejected"
                );
            }
        }
        opened
    }

    /// The response has ended cleanly: the connection may carry another request.
    pub(super) fn finish(mut self) {
        let Some(mut connection) = self.connection.take() else {
            return;
        };
        // Not ready means that the request's body has not all been sent, or the backend closed.
        if connection.sender.is_ready() {
            connection.reused = true;
            connection.upgrade.take();
            let limit = self
                .worker
                .settings(|settings| settings.limits.idle_per_backend);
            self.backend().keep(connection, self.worker.now(), limit);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let backend = self.backend();
        backend.in_flight.set(backend.in_flight.get() - 1);
        backend.counters.in_flight.subtract(1);
    }
}

async fn open(
    backend: &BackendState,
    tls: Option<&BackendTlsClient>,
    past_tcp: bool,
) -> Result<Connection, Failure> {
    let past_tcp = past_tcp && backend.tls.is_none() && sockmap::is_local(backend.address.ip());
    let (stream, sockmap) = connect(backend, past_tcp).await?;
    let io = match &backend.tls {
        None if sockmap => BackendIo::Sockmap(stream),
        None => BackendIo::Tcp(stream),
        Some(wanted) => {
            let tls = tls.ok_or(Failure::Gateway(GatewayFailure::TlsRoots))?;
            let name = wanted.server_name.as_deref();
            let handshake = tls.handshake(stream, name, backend.address.ip());
            BackendIo::Tls(Box::new(handshake.await.map_err(Failure::Backend)?))
        }
    };
    let (sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(BUFFER_BYTES)
        .max_header_size(RESPONSE_HEADER_BYTES)
        .handshake::<_, RequestBody>(TokioIo::new(io))
        .await
        .map_err(|_| Failure::Backend(BackendFailure::Closed))?;
    let upgrade = Rc::new(Cell::new(None));
    tokio::task::spawn_local(drive(connection, Rc::clone(&upgrade)));
    Ok(Connection {
        sender,
        upgrade,
        reused: false,
        sockmap,
    })
}

/// The connection, and whether it may pass TCP by.
async fn connect(backend: &BackendState, past_tcp: bool) -> Result<(TcpStream, bool), Failure> {
    let socket = match backend.address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let socket = socket.map_err(|error| class_of(&error))?;
    let sockmap = past_tcp && sockmap::prepare(&socket);
    let connecting = socket.connect(backend.address);
    let stream = connecting.await.map_err(|error| class_of(&error))?;
    // A connection without these options still serves.
    let _ = stream.set_nodelay(true);
    let _ = liveness::keep_alive(SockRef::from(&stream));
    Ok((stream, sockmap))
}

/// Carries requests and responses until the connection ends, and delivers it if it was upgraded.
async fn drive(
    connection: hyper::client::conn::http1::Connection<TokioIo<BackendIo>, RequestBody>,
    upgrade: Rc<Cell<Option<oneshot::Sender<RawBackend>>>>,
) {
    let mut connection = connection;
    // The error, if any, also reached the request that was waiting.
    let ended = pin!(&mut connection).await;
    if ended.is_ok()
        && let Some(deliver) = upgrade.take()
    {
        let parts = connection.into_parts();
        let raw = RawBackend {
            io: parts.io.into_inner(),
            read_ahead: parts.read_buf,
        };
        // A request that is gone needs no tunnel.
        let _ = deliver.send(raw);
    }
}

/// What a failed connect(2), or the socket(2) before it, says and of whom.
fn class_of(error: &io::Error) -> Failure {
    let errno = error.raw_os_error().map(Errno::from_raw);
    match errno {
        Some(
            Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM | Errno::EADDRNOTAVAIL,
        ) => Failure::Gateway(GatewayFailure::Resources),
        Some(Errno::ECONNREFUSED | Errno::ECONNRESET) => Failure::Backend(BackendFailure::Refused),
        _ => Failure::Backend(BackendFailure::Unreachable),
    }
}

/// The byte stream to a backend.
pub(super) enum BackendIo {
    Tcp(TcpStream),
    Sockmap(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl BackendIo {
    pub(super) fn socket(&self) -> SockRef<'_> {
        match self {
            BackendIo::Tcp(stream) | BackendIo::Sockmap(stream) => SockRef::from(stream),
            BackendIo::Tls(stream) => SockRef::from(stream.get_ref().0),
        }
    }
}

impl AsyncRead for BackendIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            BackendIo::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            BackendIo::Sockmap(stream) => sockmap::poll_read(stream, cx, buffer),
            BackendIo::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for BackendIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            BackendIo::Tcp(stream) | BackendIo::Sockmap(stream) => {
                Pin::new(stream).poll_write(cx, bytes)
            }
            BackendIo::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // A request without a body is one slice, and send(2) is cheaper than writev(2).
        if let [slice] = slices {
            return self.poll_write(cx, slice);
        }
        match self.get_mut() {
            BackendIo::Tcp(stream) | BackendIo::Sockmap(stream) => {
                Pin::new(stream).poll_write_vectored(cx, slices)
            }
            BackendIo::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            BackendIo::Tcp(stream) | BackendIo::Sockmap(stream) => stream.is_write_vectored(),
            BackendIo::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            BackendIo::Tcp(stream) | BackendIo::Sockmap(stream) => Pin::new(stream).poll_flush(cx),
            BackendIo::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            BackendIo::Tcp(stream) | BackendIo::Sockmap(stream) => {
                Pin::new(stream).poll_shutdown(cx)
            }
            BackendIo::Tls(stream) => {
                ready!(Pin::new(stream).poll_shutdown(cx))?;
                Poll::Ready(Ok(()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::l7::tests::backend;

    #[tokio::test]
    async fn a_backend_that_vanishes_is_noticed() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let state = BackendState::new(&backend(listener.local_addr().unwrap()));
        let (stream, _) = connect(&state, false).await.unwrap();
        assert!(SockRef::from(&stream).keepalive().unwrap());
    }

    #[test]
    fn want_of_descriptors_and_ports_is_the_gateways_failure() {
        let class = |errno: Errno| class_of(&io::Error::from(errno));
        for errno in [Errno::EMFILE, Errno::ENOBUFS, Errno::EADDRNOTAVAIL] {
            let gateway = Failure::Gateway(GatewayFailure::Resources);
            assert_eq!(class(errno), gateway, "{errno}");
        }
        for (errno, failure) in [
            (Errno::ECONNREFUSED, BackendFailure::Refused),
            (Errno::EHOSTUNREACH, BackendFailure::Unreachable),
            (Errno::ENETUNREACH, BackendFailure::Unreachable),
        ] {
            assert_eq!(class(errno), Failure::Backend(failure), "{errno}");
        }
    }
}
