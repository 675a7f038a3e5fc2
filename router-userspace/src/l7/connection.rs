//! One client connection: hyper's HTTP/1 server, a watch over its time, and its end.
//!
//! The task of a connection is its only one. It holds at most one timer, which is set again only
//! when it fires, so a request costs no timer operation: progress is a time stamp in
//! [`ClientState`], and the timer looks at it. After the last response the connection lingers, so
//! that a client still sending is not reset before it has read its answer (RFC 9112 §9.6).

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{HeaderValue, Request};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::Instant;

use crate::config::{HttpLimits, HttpTimeouts};
use crate::l7::error::UNPARSABLE;
use crate::l7::forward;
use crate::l7::handshake::{ClientStream, Established};
use crate::l7::tunnel::{self, Switch};
use crate::l7::worker::Worker;

/// How long, and for how many bytes, a closed connection is read for the client's sake.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 64 * 1024;

/// Head and body of a response up to this size are copied together to be written.
const SMALL_WRITE_BYTES: usize = 4096;

/// hyper's default; asking for it by name would take its slower path.
const DEFAULT_HEADER_COUNT: usize = 100;

/// Serves one connection until it ends.
pub(super) async fn serve(worker: Rc<Worker>, established: Established) {
    let Established { stream, peer, .. } = established;
    let client = Rc::new(ClientState::new(&worker, peer));
    let io = TokioIo::new(ClientIo {
        stream,
        client: Rc::clone(&client),
    });
    let service = service_fn({
        let (worker, client) = (Rc::clone(&worker), Rc::clone(&client));
        move |request: Request<Incoming>| {
            forward::answer(Rc::clone(&worker), Rc::clone(&client), request)
        }
    });
    let mut builder = worker.settings(|settings| server_builder(&settings.limits));
    // Accepted while the worker drains: good for one request.
    let drains = worker.is_draining();
    if drains {
        builder.keep_alive(false);
    }
    let mut connection = builder.serve_connection(io, service);

    let draining = pin!(worker.drain_notice());
    let ended = {
        let mut watch = pin!(Watch::new(&worker, &client, draining, drains));
        std::future::poll_fn(|cx| {
            worker.forget_clock();
            loop {
                if watch.as_mut().begins_drain(cx) {
                    Pin::new(&mut connection).graceful_shutdown();
                }
                if let Poll::Ready(result) = Pin::new(&mut connection).poll(cx) {
                    return Poll::Ready(Some(result));
                }
                match ready!(watch.as_mut().poll_expiry(cx)) {
                    Expiry::Answer => {}
                    Expiry::Close => return Poll::Ready(None),
                }
            }
        })
        .await
    };
    match ended {
        None => {
            worker.metrics.connections_timed_out.add(1);
            client.switch.take();
            return;
        }
        Some(Ok(())) => {}
        Some(Err(error)) if error.is_parse() => worker.metrics.errors[UNPARSABLE].add(1),
        Some(Err(error)) => tracing::debug!(%peer, %error, "client connection ended"),
    }
    let parts = connection.into_parts();
    let io = parts.io.into_inner();
    match client.switch.take() {
        Some(switch) => Box::pin(tunnel::run(&worker, io, parts.read_buf, switch)).await,
        None if client.read_closed.get() => {}
        None => Box::pin(linger(io)).await,
    }
}

fn server_builder(limits: &HttpLimits) -> hyper::server::conn::http1::Builder {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .header_read_timeout(None)
        .max_buf_size(limits.request_header_bytes)
        .max_header_size(limits.request_header_bytes);
    if limits.request_headers != DEFAULT_HEADER_COUNT {
        builder.max_headers(limits.request_headers);
    }
    builder
}

async fn linger(mut io: ClientIo) {
    // hyper has done so, except where it was prepared for another protocol.
    let _ = io.shutdown().await;
    let mut buffer = vec![0; 4096];
    let mut left = LINGER_BYTES;
    let discard = async {
        while let Ok(len) = io.read(&mut buffer).await
            && len > 0
            && left > len
        {
            left -= len;
        }
    };
    let _ = tokio::time::timeout(LINGER, discard).await;
}

/// What the parts of one client connection tell each other. They all run on its worker's thread.
pub(super) struct ClientState {
    worker: Rc<Worker>,
    pub peer: SocketAddr,
    /// The peer's address as it goes into `X-Forwarded-For`.
    pub forwarded_for: HeaderValue,
    /// Set by the service with a 101; taken when hyper has let go of the connection.
    pub switch: Cell<Option<Switch>>,
    phase: Cell<Phase>,
    /// When the phase began or last made progress.
    since: Cell<Instant>,
    waits_for_client: Cell<bool>,
    /// The request's body has not all been read, whatever the phase.
    body_is_open: Cell<bool>,
    expired: Cell<bool>,
    read_closed: Cell<bool>,
}

/// Which timeout is running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Between requests.
    Idle,
    /// The first read of a request's head has happened, and with `FurtherHead` another.
    Head,
    FurtherHead,
    /// A backend is being connected to, which has a timeout of its own.
    Connecting,
    /// The request is on its way to the backend.
    Sending,
    AwaitingResponse,
    Responding,
}

enum Expiry {
    /// The request in flight is told and answers.
    Answer,
    /// Nothing can be said anymore.
    Close,
}

impl ClientState {
    fn new(worker: &Rc<Worker>, peer: SocketAddr) -> ClientState {
        let address = peer.ip().to_canonical().to_string();
        ClientState {
            worker: Rc::clone(worker),
            peer,
            forwarded_for: address.parse().expect("an IP address is a header value"),
            switch: Cell::new(None),
            phase: Cell::new(Phase::Idle),
            since: Cell::new(worker.read_clock()),
            waits_for_client: Cell::new(false),
            body_is_open: Cell::new(false),
            expired: Cell::new(false),
            read_closed: Cell::new(false),
        }
    }

    /// A request's head is complete; when it began to arrive, or now if that took several reads.
    pub(super) fn request_begins(&self) -> Instant {
        let started = match self.phase.get() {
            Phase::Head => self.since.get(),
            _ => self.worker.now(),
        };
        self.body_is_open.set(false);
        self.enter(Phase::Connecting, started);
        started
    }

    /// The request is on a backend's connection, with its body or without one.
    pub(super) fn request_is_handed_over(&self, whole: bool) {
        let phase = if whole {
            Phase::AwaitingResponse
        } else {
            Phase::Sending
        };
        self.body_is_open.set(!whole);
        self.enter(phase, self.worker.now());
    }

    /// The request's body has ended. Called from the task of the backend's connection.
    pub(super) fn request_body_ended(&self) {
        self.body_is_open.set(false);
        if self.phase.get() == Phase::Sending {
            self.enter(Phase::AwaitingResponse, self.worker.read_clock());
        }
    }

    /// Whether the backend's connection would send more of the request if the client had.
    pub(super) fn set_waits_for_client(&self, waits: bool) {
        self.waits_for_client.set(waits);
    }

    pub(super) fn response_begins(&self) {
        self.enter(Phase::Responding, self.worker.now());
    }

    pub(super) fn response_ended(&self) {
        self.enter(Phase::Idle, self.worker.now());
    }

    /// Whether the request in flight has used up its time.
    pub(super) fn is_expired(&self) -> bool {
        self.expired.get()
    }

    pub(super) fn is_sending(&self) -> bool {
        self.phase.get() == Phase::Sending
    }

    /// The request's body is not all sent, and it is the client that holds it back.
    pub(super) fn waits_for_client(&self) -> bool {
        self.is_sending() && self.waits_for_client.get()
    }

    fn enter(&self, phase: Phase, since: Instant) {
        self.phase.set(phase);
        self.since.set(since);
        self.expired.set(false);
    }

    fn on_read(&self, len: usize) {
        if len == 0 {
            self.read_closed.set(true);
            return;
        }
        self.worker.metrics.bytes_in.add(len as u64);
        match self.phase.get() {
            Phase::Idle => self.enter(Phase::Head, self.worker.now()),
            Phase::Head => self.phase.set(Phase::FurtherHead),
            Phase::Sending => self.since.set(self.worker.now()),
            // The response began before the request had ended, and may wait for the rest of it.
            Phase::Responding if self.body_is_open.get() => self.since.set(self.worker.now()),
            _ => {}
        }
    }

    fn on_write(&self, len: usize) {
        self.worker.metrics.bytes_out.add(len as u64);
        if self.phase.get() == Phase::Responding {
            self.since.set(self.worker.now());
        }
    }

    fn timeout(&self, timeouts: &HttpTimeouts) -> Option<Duration> {
        match self.phase.get() {
            Phase::Idle | Phase::Head | Phase::FurtherHead => Some(timeouts.request_headers),
            Phase::Connecting => None,
            Phase::Sending | Phase::Responding => Some(timeouts.body_idle),
            Phase::AwaitingResponse => Some(timeouts.response_headers),
        }
    }

    fn expire(&self) -> Expiry {
        match self.phase.get() {
            Phase::Sending | Phase::AwaitingResponse if !self.expired.replace(true) => {
                Expiry::Answer
            }
            _ => Expiry::Close,
        }
    }
}

/// The connection's one timer, and its ear for the worker's drain notice.
struct Watch<'a, D> {
    worker: &'a Worker,
    client: &'a ClientState,
    timer: Pin<Box<tokio::time::Sleep>>,
    timer_is_polled: bool,
    drain_notice: Pin<&'a mut D>,
    listens: bool,
    drains: bool,
}

impl<'a, D: Future<Output = ()>> Watch<'a, D> {
    fn new(
        worker: &'a Worker,
        client: &'a ClientState,
        drain_notice: Pin<&'a mut D>,
        drains: bool,
    ) -> Self {
        let first = worker.settings(|settings| settings.shortest_timeout());
        let timer = Box::pin(tokio::time::sleep(first));
        Watch {
            worker,
            client,
            timer,
            timer_is_polled: false,
            drain_notice,
            listens: false,
            drains,
        }
    }

    /// True once, when the worker begins to drain.
    ///
    /// The notice is polled only to register for it: the task has one waker, so what matters
    /// afterwards is that it is woken.
    fn begins_drain(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> bool {
        if !self.listens {
            self.listens = true;
            let _ = self.drain_notice.as_mut().poll(cx);
        }
        if self.drains || !self.worker.is_draining() {
            return false;
        }
        self.drains = true;
        true
    }

    /// Ready when the current phase has lasted too long.
    fn poll_expiry(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Expiry> {
        loop {
            // Polling a timer registers the waker, which does not change; once is enough.
            if self.timer_is_polled && !self.timer.is_elapsed() {
                return Poll::Pending;
            }
            self.timer_is_polled = true;
            ready!(self.timer.as_mut().poll(cx));
            let now = self.worker.read_clock();
            let (timeout, shortest) = self.worker.settings(|settings| {
                (
                    self.client.timeout(&settings.timeouts),
                    settings.shortest_timeout(),
                )
            });
            let deadline = timeout.map(|timeout| self.client.since.get() + timeout);
            if deadline.is_some_and(|deadline| deadline <= now) {
                let next = now + shortest;
                self.rearm(next);
                return Poll::Ready(self.client.expire());
            }
            // No phase that may begin meanwhile can end before the shortest timeout has passed.
            let next = deadline.map_or(now + shortest, |deadline| deadline.min(now + shortest));
            self.rearm(next);
        }
    }

    fn rearm(&mut self, at: Instant) {
        self.timer.as_mut().reset(at);
        self.timer_is_polled = false;
    }
}

/// The byte stream to the client; what passes is counted and is progress.
pub(super) struct ClientIo {
    stream: ClientStream,
    client: Rc<ClientState>,
}

impl ClientIo {
    pub(super) fn socket(&self) -> SockRef<'_> {
        self.stream.socket()
    }
}

impl AsyncRead for ClientIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buffer))?;
        this.client.on_read(buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let len = ready!(Pin::new(&mut this.stream).poll_write(cx, bytes))?;
        this.client.on_write(len);
        Poll::Ready(Ok(len))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let stream = Pin::new(&mut this.stream);
        // send(2) with a copy is cheaper than writev(2) while the copy is small.
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        let written = if total <= SMALL_WRITE_BYTES {
            this.client.worker.with_scratch(|scratch| {
                for slice in slices {
                    scratch.extend_from_slice(slice);
                }
                stream.poll_write(cx, scratch)
            })
        } else {
            stream.poll_write_vectored(cx, slices)
        };
        let len = ready!(written)?;
        this.client.on_write(len);
        Poll::Ready(Ok(len))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
