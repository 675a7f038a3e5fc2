//! What the parts of one client connection tell each other of the client.
//!
//! All of it lives on the worker's thread. A connection of HTTP/1 has one [`Progress`] for all its
//! requests, one of HTTP/2 one for each stream, which are kept here.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::{Poll, Waker};

use http::HeaderValue;
use slab::Slab;
use tokio::time::Instant;

use crate::l7::clients::Cutoff;
use crate::l7::handshake::TlsSession;
use crate::l7::progress::Progress;
use crate::l7::tunnel::Switch;
use crate::l7::worker::Worker;

/// One client connection.
pub(super) struct Client {
    pub worker: Rc<Worker>,
    pub peer: SocketAddr,
    /// The peer's address as it goes into `X-Forwarded-For`.
    pub forwarded_for: HeaderValue,
    /// What the client dialed.
    pub local: SocketAddr,
    /// `None` if requests come in clear.
    pub tls: Option<Rc<TlsSession>>,
    /// Set with a 101 on HTTP/1; taken when hyper has let go of the connection.
    pub switch: Cell<Option<Switch>>,
    /// The client has ended its side.
    read_closed: Cell<bool>,
    /// Open streams of HTTP/2.
    streams: RefCell<Slab<Rc<Progress>>>,
    quiet_since: Cell<Instant>,
    /// Requests that have begun.
    requests: Cell<u32>,
    /// The connection is to end with the requests that have begun.
    ends: Cell<bool>,
    /// When the connection's timer has to look, if that is before it would.
    look_at: Cell<Option<Instant>>,
    /// Which has the timer; woken to look.
    task: RefCell<Option<Waker>>,
}

impl Client {
    pub(super) fn new(
        worker: &Rc<Worker>,
        peer: SocketAddr,
        local: SocketAddr,
        tls: Option<Rc<TlsSession>>,
    ) -> Client {
        let address = peer.ip().to_canonical().to_string();
        Client {
            worker: Rc::clone(worker),
            peer,
            forwarded_for: address.parse().expect("an IP address is a header value"),
            local,
            tls,
            switch: Cell::new(None),
            read_closed: Cell::new(false),
            streams: RefCell::default(),
            quiet_since: Cell::new(worker.now()),
            requests: Cell::new(0),
            ends: Cell::new(false),
            look_at: Cell::new(None),
            task: RefCell::default(),
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.read_closed.get()
    }

    /// A request begins. The connection ends with the one that is the last it may have.
    pub(super) fn count_request(&self) {
        let count = self.requests.get().saturating_add(1);
        self.requests.set(count);
        let limit = (self.worker).settings(|settings| settings.limits.requests_per_connection);
        if count == limit {
            self.worker.metrics.count_cutoff(Cutoff::Requests);
            self.ends.set(true);
        }
    }

    /// True once, when the connection is to end with the requests that have begun.
    pub(super) fn take_end(&self) -> bool {
        self.ends.take()
    }

    /// The progress of a new stream.
    pub(super) fn begin_stream(&self) -> Rc<Progress> {
        let mut streams = self.streams.borrow_mut();
        let place = streams.vacant_entry();
        let progress = Rc::new(Progress::new(&self.worker, Some(place.key())));
        place.insert(Rc::clone(&progress));
        progress
    }

    /// The request's response has been handed over, or its stream is closed. A stream of HTTP/2 is open until
    /// both are.
    pub(super) fn end(&self, progress: &Progress) {
        let Some(key) = progress.stream() else {
            return;
        };
        if progress.let_go() {
            self.streams.borrow_mut().try_remove(key);
            self.quiet_since.set(self.worker.now());
        }
    }

    /// Since when there has been no stream, if there is none.
    pub(super) fn quiet_since(&self) -> Instant {
        self.quiet_since.get()
    }

    pub(super) fn open_streams(&self) -> usize {
        self.streams.borrow().len()
    }

    pub(super) fn each_stream(&self, mut look: impl FnMut(&Progress)) {
        for (_, progress) in &*self.streams.borrow() {
            look(progress);
        }
    }

    /// Has the connection's timer look at `at` or before.
    pub(super) fn look_by(&self, at: Instant) {
        if self.look_at.get().is_none_or(|earlier| at < earlier) {
            self.look_at.set(Some(at));
            if let Some(task) = &*self.task.borrow() {
                task.wake_by_ref();
            }
        }
    }

    /// Has the calling task woken to look: that of a connection whose requests have tasks of their own.
    /// One of HTTP/1 runs when its request does.
    pub(super) async fn wake_this_task(&self) {
        let task = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
        self.task.replace(Some(task));
    }

    pub(super) fn take_look_at(&self) -> Option<Instant> {
        self.look_at.take()
    }

    pub(super) fn on_read(&self, len: usize) {
        if len == 0 {
            self.read_closed.set(true);
        }
        self.worker.metrics.bytes_in.add(len as u64);
    }

    pub(super) fn on_write(&self, len: usize) {
        self.worker.metrics.bytes_out.add(len as u64);
    }
}
