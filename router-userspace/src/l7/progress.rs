//! How far a request has come, and which timeout runs for it.
//!
//! [`crate::l7::forward`] and what it calls say what happens; [`crate::l7::connection`] looks at it when
//! its timer fires. All of it lives on the worker's thread. Progress is a time stamp, so a request
//! costs no timer operation.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::Waker;
use std::time::Duration;

use http::Method;
use tokio::time::Instant;

use crate::config::{HttpLimits, HttpTimeouts};
use crate::l7::client::Client;
use crate::l7::clients::Cutoff;
use crate::l7::informational::Interim;
use crate::l7::pace::Pace;
use crate::l7::raw_heads::RawHeads;
use crate::l7::record::Observed;
use crate::l7::worker::Worker;
use crate::route::policy::RouteTimeouts;

/// How far a request has come, and since when.
pub(super) struct Progress {
    pub worker: Rc<Worker>,
    /// Its place among the client's streams; `None` on HTTP/1.
    stream: Option<usize>,
    /// Of a stream: its task, and what will be told of its request.
    holders: Cell<u8>,
    phase: Cell<Phase>,
    /// When the phase began or last made progress.
    since: Cell<Instant>,
    waits_for_client: Cell<bool>,
    /// What the client keeps waiting for, in the phase.
    pace: Cell<Pace>,
    /// The request's body may be at the client's leisure.
    unhurried: Cell<bool>,
    /// Of a request's body; `u64::MAX` is no limit.
    body_limit: Cell<u64>,
    body_is_too_large: Cell<bool>,
    /// Of HTTP/1.
    raw_heads: RefCell<RawHeads>,
    /// The request's body has not all been read, whatever the phase.
    body_is_open: Cell<bool>,
    expired: Cell<bool>,
    /// Something waits to be written to the client.
    stalled: Cell<bool>,
    /// The stream is to be reset.
    cut: Cell<bool>,
    /// Wakes the task of the stream; HTTP/1 has one task, which looks by itself.
    waker: RefCell<Option<Waker>>,
    /// What the request's route has instead of the gateway's timeouts.
    own_response_headers: Cell<Option<Duration>>,
    own_body_idle: Cell<Option<Duration>>,
    /// When the route's total timeout ends.
    deadline: Cell<Option<Instant>>,
    /// What the access log and the counters will tell of the request.
    pub observed: Observed,
    /// Of HTTP/1.
    pub interim: Interim,
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

/// What is to happen now that a phase has lasted too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expiry {
    /// The request in flight is told and answers.
    Answer,
    /// Nothing can be said anymore.
    Close,
}

impl Progress {
    pub(super) fn new(worker: &Rc<Worker>, stream: Option<usize>) -> Progress {
        Progress {
            worker: Rc::clone(worker),
            stream,
            holders: Cell::new(1),
            phase: Cell::new(Phase::Idle),
            since: Cell::new(worker.now()),
            waits_for_client: Cell::new(false),
            pace: Cell::default(),
            unhurried: Cell::new(false),
            body_limit: Cell::new(u64::MAX),
            body_is_too_large: Cell::new(false),
            raw_heads: RefCell::default(),
            body_is_open: Cell::new(false),
            expired: Cell::new(false),
            stalled: Cell::new(false),
            cut: Cell::new(false),
            waker: RefCell::default(),
            own_response_headers: Cell::new(None),
            own_body_idle: Cell::new(None),
            deadline: Cell::new(None),
            observed: Observed::default(),
            interim: Interim::default(),
        }
    }

    /// Its place among the client's streams; `None` on HTTP/1.
    pub(super) fn stream(&self) -> Option<usize> {
        self.stream
    }

    /// One of those for whom a stream is open is done with it; true of the last.
    pub(super) fn let_go(&self) -> bool {
        let holders = self.holders.get() - 1;
        self.holders.set(holders);
        holders == 0
    }

    /// A request's stream has begun, before its head.
    #[cfg(feature = "http3")]
    pub(super) fn head_begins(&self) {
        self.enter(Phase::Head, self.worker.now());
    }

    /// A request's head is complete; when it began to arrive, or now if that took several reads.
    pub(super) fn request_begins(&self) -> Instant {
        let started = match self.phase.get() {
            Phase::Head => self.since.get(),
            _ => self.worker.now(),
        };
        self.holders.set(2);
        self.body_is_open.set(false);
        self.unhurried.set(false);
        self.body_limit.set(u64::MAX);
        self.body_is_too_large.set(false);
        self.own_response_headers.set(None);
        self.own_body_idle.set(None);
        self.deadline.set(None);
        self.enter(Phase::Connecting, started);
        started
    }

    /// The route is known, and with it what it has instead of the gateway's timeouts.
    pub(super) fn set_timeouts(&self, client: &Client, timeouts: &RouteTimeouts, started: Instant) {
        self.own_response_headers.set(timeouts.response_headers);
        self.own_body_idle.set(timeouts.body_idle);
        self.deadline
            .set(timeouts.total.map(|total| started + total));
        let now = self.worker.now();
        let looks = [
            self.deadline.get(),
            timeouts.response_headers.map(|timeout| now + timeout),
            timeouts.body_idle.map(|timeout| now + timeout),
        ];
        for at in looks.into_iter().flatten() {
            client.look_by(at);
        }
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

    /// What is asked of the request's body: its length at most (`None`: any), and whether it may come as
    /// slowly as it likes.
    pub(super) fn set_body_limit(&self, limit: Option<u64>, unhurried: bool) {
        self.body_limit.set(limit.unwrap_or(u64::MAX));
        self.unhurried.set(unhurried);
    }

    pub(super) fn body_limit(&self) -> u64 {
        self.body_limit.get()
    }

    pub(super) fn set_body_is_too_large(&self) {
        self.body_is_too_large.set(true);
    }

    pub(super) fn body_is_too_large(&self) -> bool {
        self.body_is_too_large.get()
    }

    /// The head of a request of HTTP/1 has been parsed. True if it has a `Transfer-Encoding` and a
    /// `Content-Length`.
    pub(super) fn head_ends(&self, method: &Method, is_coded: bool, has_body: bool) -> bool {
        let mut heads = self.raw_heads.borrow_mut();
        let both = is_coded && heads.has_content_length(method.as_str());
        heads.head_ends(has_body);
        both
    }

    /// There are no more requests of HTTP/1, or what is read next begins a head.
    pub(super) fn forget_heads(&self) {
        self.raw_heads.take();
    }

    /// The request's body has ended. Called from the task of the backend's connection.
    pub(super) fn request_body_ended(&self) {
        self.body_is_open.set(false);
        if self.stream.is_none() {
            self.raw_heads.borrow_mut().body_ends();
        }
        if self.phase.get() == Phase::Sending {
            self.enter(Phase::AwaitingResponse, self.worker.read_clock());
        }
    }

    /// Whether the backend's connection would send more of the request if the client had.
    pub(super) fn set_waits_for_client(&self, waits: bool) {
        self.waits_for_client.set(waits);
        if self.phase.get() == Phase::Sending {
            // Called from the task of the backend's connection, which does not look at the clock.
            self.change_pace(|pace| pace.set_waits(waits, || self.worker.read_clock()));
        }
    }

    /// So many bytes of the phase's body have come from the client.
    pub(super) fn count_request_bytes(&self, len: usize) {
        if self.phase.get() == Phase::Sending {
            self.change_pace(|pace| pace.came(len));
        }
    }

    /// So many bytes of the response wait for the client to take them; 0: the client has taken all.
    pub(super) fn set_untaken(&self, len: usize) {
        if self.phase.get() == Phase::Responding {
            self.change_pace(|pace| pace.hand_over(len, self.worker.now()));
        }
    }

    fn change_pace(&self, change: impl FnOnce(&mut Pace)) {
        let mut pace = self.pace.get();
        change(&mut pace);
        self.pace.set(pace);
    }

    pub(super) fn response_begins(&self) {
        self.enter(Phase::Responding, self.worker.now());
    }

    /// The response has been handed over. The client may still have to take the last of a stream.
    pub(super) fn response_ended(&self) {
        if self.stream.is_none() {
            self.enter(Phase::Idle, self.worker.now());
        }
    }

    /// Whether the request in flight has used up its time.
    pub(super) fn is_expired(&self) -> bool {
        self.expired.get()
    }

    pub(super) fn is_past_deadline(&self) -> bool {
        self.deadline
            .get()
            .is_some_and(|deadline| deadline <= self.worker.now())
    }

    /// There is a request, and no response to it yet.
    pub(super) fn awaits_response(&self) -> bool {
        matches!(
            self.phase.get(),
            Phase::Connecting | Phase::Sending | Phase::AwaitingResponse
        )
    }

    pub(super) fn is_sending(&self) -> bool {
        self.phase.get() == Phase::Sending
    }

    /// The request's body is not all sent, and it is the client that holds it back.
    pub(super) fn waits_for_client(&self) -> bool {
        self.is_sending() && self.waits_for_client.get()
    }

    /// Whether it was ended for its time was up.
    pub(super) fn has_been_cut(&self) -> bool {
        self.cut.get()
    }

    /// To be called when the stream's task begins to run.
    pub(super) fn begin_poll(&self) {
        self.worker.forget_clock();
    }

    /// Whether the stream is to be reset; if not, who is to be woken when it is, or when the time
    /// is up.
    pub(super) fn is_cut(&self, waker: &Waker) -> bool {
        if self.cut.get() {
            return true;
        }
        let mut known = self.waker.borrow_mut();
        match &mut *known {
            Some(known) => known.clone_from(waker),
            None => *known = Some(waker.clone()),
        }
        false
    }

    /// A frame of a body has passed, on HTTP/2.
    pub(super) fn on_frame(&self) {
        if self.stream.is_some() && matches!(self.phase.get(), Phase::Sending | Phase::Responding) {
            self.since.set(self.worker.now());
        }
    }

    /// Bytes have come from the client, on HTTP/1.
    pub(super) fn on_read(&self, bytes: &[u8]) {
        self.raw_heads.borrow_mut().on_read(bytes);
        match self.phase.get() {
            Phase::Idle => self.enter(Phase::Head, self.worker.now()),
            Phase::Head => self.phase.set(Phase::FurtherHead),
            Phase::Sending => self.since.set(self.worker.now()),
            // The response began before the request had ended, and may wait for the rest of it.
            Phase::Responding if self.body_is_open.get() => self.since.set(self.worker.now()),
            _ => {}
        }
    }

    /// Bytes have gone to the client, on HTTP/1.
    pub(super) fn on_write(&self) {
        if self.phase.get() == Phase::Responding {
            self.since.set(self.worker.now());
        }
    }

    pub(super) fn set_stalled(&self, stalled: bool) {
        self.stalled.set(stalled);
    }

    /// Whether there has been no request for that long, and the last one is done with.
    pub(super) fn is_quiet(&self, now: Instant, since: Duration) -> bool {
        self.phase.get() == Phase::Idle && !self.stalled.get() && now >= self.since.get() + since
    }

    /// When the phase has lasted too long, if it lasts.
    pub(super) fn deadline(&self, timeouts: &HttpTimeouts, limits: &HttpLimits) -> Option<Instant> {
        let timeout = match self.phase.get() {
            Phase::Idle => Some(timeouts.idle),
            Phase::Head | Phase::FurtherHead => Some(timeouts.request_headers),
            Phase::Connecting => None,
            Phase::Sending | Phase::Responding => {
                Some(self.own_body_idle.get().unwrap_or(timeouts.body_idle))
            }
            Phase::AwaitingResponse => Some(
                self.own_response_headers
                    .get()
                    .unwrap_or(timeouts.response_headers),
            ),
        };
        let phase = timeout.map(|timeout| self.since.get() + timeout);
        let whole = self
            .deadline
            .get()
            .filter(|_| !matches!(self.phase.get(), Phase::Idle));
        let paced = self.pace_deadline(timeouts.slow_grace, limits.min_bytes_per_second);
        [phase, whole, paced].into_iter().flatten().min()
    }

    /// When the client will have kept the gateway waiting for longer than its bytes are worth.
    fn pace_deadline(&self, grace: Duration, bytes_per_second: u32) -> Option<Instant> {
        let is_paced = match self.phase.get() {
            Phase::Sending => !self.unhurried.get(),
            Phase::Responding => true,
            _ => false,
        };
        let pace = is_paced.then(|| self.pace.get())?;
        pace.deadline(grace, bytes_per_second)
    }

    /// The time is up: tells the request in flight, or what else is to be done. The name of the
    /// timeout goes into the log.
    pub(super) fn expire(&self) -> Expiry {
        tracing::debug!(timeout = self.timeout_name(), "a client's time is up");
        if self.is_too_slow() {
            let cutoff = match self.phase.get() {
                Phase::Sending => Cutoff::SlowRequest,
                _ => Cutoff::SlowResponse,
            };
            self.worker.metrics.count_cutoff(cutoff);
        }
        let expiry = match self.phase.get() {
            Phase::Connecting | Phase::Sending | Phase::AwaitingResponse
                if !self.expired.replace(true) =>
            {
                Expiry::Answer
            }
            _ => {
                self.cut.set(true);
                Expiry::Close
            }
        };
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
        expiry
    }

    fn is_too_slow(&self) -> bool {
        let deadline = self.worker.settings(|settings| {
            let grace = settings.timeouts.slow_grace;
            self.pace_deadline(grace, settings.limits.min_bytes_per_second)
        });
        deadline.is_some_and(|deadline| deadline <= self.worker.now())
    }

    /// The config key of the timeout that runs.
    fn timeout_name(&self) -> &'static str {
        if self.is_too_slow() {
            return "http.limits.min_bytes_per_second";
        }
        if self.is_past_deadline() {
            return "timeouts.total of the route";
        }
        match self.phase.get() {
            Phase::Idle => "http.timeouts.idle",
            Phase::Head | Phase::FurtherHead => "http.timeouts.request_headers",
            Phase::Connecting => "http.timeouts.connect",
            Phase::Sending | Phase::Responding => "http.timeouts.body_idle",
            Phase::AwaitingResponse => "http.timeouts.response_headers",
        }
    }

    fn enter(&self, phase: Phase, since: Instant) {
        self.phase.set(phase);
        self.pace.set(Pace::default());
        self.since.set(since);
        self.expired.set(false);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::HttpConfig;
    use crate::l7::Settings;
    use crate::l7::backend::Backends;
    use crate::l7::metrics::RouteCounters;
    use crate::l7::shared::Shared;
    use crate::l7::tls::Tls;
    use crate::snapshot::Published;

    fn progress() -> Progress {
        let config = HttpConfig::default();
        let settings = arc_swap::ArcSwap::from_pointee(Settings::new(&config).unwrap());
        let worker = Worker::new(
            Published::default(),
            Arc::new(settings),
            Backends::new(
                0,
                Arc::new(Shared::new(1)),
                RouteCounters::new(Arc::default()),
            ),
            Arc::default(),
            Tls::start(&config, Arc::default()).unwrap(),
        );
        Progress::new(&Rc::new(worker), None)
    }

    /// How long the phase has lasted without progress after a second and a read.
    async fn idle_after_a_read(progress: &Progress) -> Duration {
        tokio::time::advance(Duration::from_secs(1)).await;
        progress.worker.forget_clock();
        progress.on_read(b"x");
        progress.worker.now() - progress.since.get()
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_is_progress_also_after_the_response_has_begun() {
        let progress = progress();
        progress.request_begins();
        progress.request_is_handed_over(false);
        assert_eq!(idle_after_a_read(&progress).await, Duration::ZERO);
        progress.response_begins();
        assert_eq!(idle_after_a_read(&progress).await, Duration::ZERO);
        // What comes behind the body is another request.
        progress.request_body_ended();
        assert_eq!(idle_after_a_read(&progress).await, Duration::from_secs(1));
    }
}
