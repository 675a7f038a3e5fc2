//! A request's attempts at getting a response from the backends of its pool.
//!
//! A request is tried on another backend if the connection failed before it was sent, or closed before
//! a response and the request is idempotent (RFC 9110 §9.2.2) and its body short; within the budget of
//! its route. A kept-alive connection that turns out to be closed is no failure: it is replaced.
//! A request that a backend may have begun to act on, and must not act on twice, is not repeated.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;

use futures_util::future::Either;
use http::header::HOST;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, Version};
use hyper::body::{Body, Incoming};
use hyper::client::conn::TrySendError;
use tokio::sync::oneshot;

use crate::l7::backend::{Connection, Purpose, RawBackend};
use crate::l7::balance::{Choice, PoolState, Wanted};
use crate::l7::body::{KeptBody, RequestBody};
use crate::l7::client::Client;
use crate::l7::edits;
use crate::l7::error::{BackendFailure, BackendTimeout, BadRequest, Failure};
use crate::l7::headers;
use crate::l7::lease::Lease;
use crate::l7::progress::Progress;
use crate::l7::validate::{self, Findings};
use crate::l7::worker::Worker;

/// The client answers for a request being made twice (draft-ietf-httpapi-idempotency-key-header §2).
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const X_IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("x-idempotency-key");

pub(super) struct Exchange<'a> {
    worker: &'a Rc<Worker>,
    client: &'a Client,
    progress: &'a Rc<Progress>,
    pool: Rc<PoolState>,
    findings: &'a Findings,
    origin: &'a headers::Origin<'a>,
    wanted: &'a Wanted,
    /// The request's headers are those for the backend.
    rewritten: bool,
    /// The request may be sent again after a backend has seen it.
    is_idempotent: bool,
    /// The request as it went out, if it may have to be sent again.
    repeatable: Option<Head>,
    /// Its body, if there is one and it may be sent again.
    body: Option<KeptBody>,
    /// The index of the target the request asks for.
    only: Option<usize>,
    /// Indexes of targets that failed.
    tried: Vec<usize>,
    /// How many are left.
    attempts: usize,
    /// A kept-alive connection was found closed; the next is a new one.
    fresh: bool,
}

/// A response head and the backend it came from.
pub(super) struct Exchanged {
    pub response: Response<Incoming>,
    pub lease: Lease,
    /// Where the backend's raw connection comes if it switches protocols as it was asked to.
    pub upgraded: Option<oneshot::Receiver<RawBackend>>,
}

impl<'a> Exchange<'a> {
    /// `only`: the index of the one target that may serve the request.
    pub(super) fn new(
        client: &'a Client,
        progress: &'a Rc<Progress>,
        pool: Rc<PoolState>,
        findings: &'a Findings,
        origin: &'a headers::Origin<'a>,
        wanted: &'a Wanted,
        only: Option<usize>,
    ) -> Exchange<'a> {
        let attempts = match only {
            Some(_) => 1,
            None => client
                .worker
                .settings(|settings| pool.attempts(settings.limits.attempts)),
        };
        Exchange {
            worker: &client.worker,
            client,
            progress,
            pool,
            findings,
            origin,
            wanted,
            rewritten: false,
            is_idempotent: false,
            repeatable: None,
            body: None,
            only,
            tried: Vec::new(),
            attempts,
            fresh: false,
        }
    }

    /// # Errors
    /// The failure to answer with.
    pub(super) async fn run(
        mut self,
        mut request: Request<RequestBody>,
    ) -> Result<Exchanged, Failure> {
        self.pool.budget.request(self.worker.now());
        self.is_idempotent = !self.findings.upgrade && self.may_repeat(&request);
        if self.is_idempotent && self.attempts > 1 {
            let capacity = self
                .worker
                .settings(|settings| settings.retries.buffer_bytes);
            self.body = request.body_mut().keep(capacity);
        }
        loop {
            let (index, mut lease) = self.lease().await?;
            let purpose = self.purpose(&request);
            let observed = &self.progress.observed;
            observed.attempt(&lease, self.worker.now());
            let connected = {
                let connecting = pin!(lease.connect(self.client, self.fresh, purpose));
                self.until_expired(connecting).await
            };
            match connected {
                Some(Ok(())) => {}
                Some(Err(failure @ Failure::Gateway(_))) => return Err(failure),
                Some(Err(failure)) => {
                    lease.backend().record_failure();
                    self.go_on(index, failure)?;
                    continue;
                }
                None => return Err(Failure::BackendTimeout(BackendTimeout::Total)),
            }
            let (target, connection) = lease.connected();
            let reused = connection.reused();
            self.repeatable = self
                .may_be_needed_again(&request, reused)
                .then(|| Head::of(&request, self.rewritten));
            if !self.rewritten {
                headers::rewrite_request(request.headers_mut(), self.findings, self.origin);
                self.edit(&mut request)?;
                self.rewritten = true;
            }
            headers::set_instance(request.headers_mut(), &target.instance);
            observed.propagate(request.headers_mut());
            observed.sent(request.headers(), self.worker.now());
            let (response, upgraded) = self.send(connection, request);
            let sent = match self.until_expired(pin!(response)).await {
                Some(sent) => sent.map_err(|error| SendError::Http(Box::new(error))),
                None => Err(SendError::Expired),
            };
            match sent {
                Ok(response) if !validate::is_framed_once(response.headers()) => {
                    let failed = Failure::Backend(BackendFailure::Malformed);
                    lease.failed(&failed);
                    return Err(failed);
                }
                Ok(response) => {
                    observed.answered(self.worker.now());
                    lease.answered(response.status());
                    return Ok(Exchanged {
                        response,
                        lease,
                        upgraded,
                    });
                }
                Err(error) => request = self.after(error, index, &lease, reused)?,
            }
        }
    }

    fn purpose(&self, request: &Request<RequestBody>) -> Purpose {
        let upgrades = self.findings.upgrade;
        let may_pass = !upgrades && request.body().is_end_stream();
        Purpose {
            upgrades,
            past_tcp: may_pass && self.worker.settings(|settings| settings.sockmap),
        }
    }

    /// What the route has its requests changed to.
    fn edit(&self, request: &mut Request<RequestBody>) -> Result<(), Failure> {
        let Some(policy) = &self.pool.policy else {
            return Ok(());
        };
        let matched = &self.pool.matched.path;
        let mut uri = std::mem::take(request.uri_mut());
        let headers = request.headers_mut();
        edits::rewrite_request(&mut uri, headers, matched, &policy.rewrite)
            .map_err(|_| Failure::UriTooLong)?;
        edits::apply(&policy.request_headers, headers);
        *request.uri_mut() = uri;
        Ok(())
    }

    /// A backend for the next attempt, which may have to be waited for.
    async fn lease(&mut self) -> Result<(usize, Lease), Failure> {
        if self.pool.queue.is_empty()
            && let Some(lease) = self.free_lease()?
        {
            return Ok(lease);
        }
        // Boxed, as all that few requests need: their futures are moved whole.
        Box::pin(self.queued_lease()).await
    }

    async fn queued_lease(&mut self) -> Result<(usize, Lease), Failure> {
        let (capacity, timeout) =
            (self.worker).settings(|settings| (settings.limits.queue, settings.timeouts.queue));
        let deadline = self.worker.now() + timeout;
        let metrics = &self.worker.metrics;
        let is_first = self.pool.queue.is_empty();
        let Some(mut place) = self.pool.queue.join(capacity) else {
            metrics.queue_full.add(1);
            return Err(self.limit_reached());
        };
        metrics.queued.add(1);
        self.pool.know_queue();
        // Somebody may have left before the queue was known.
        if is_first && let Some(lease) = self.free_lease()? {
            return Ok(lease);
        }
        loop {
            match self.until_expired(pin!(place.room(deadline))).await {
                None => return Err(Failure::BackendTimeout(BackendTimeout::Total)),
                Some(true) => {}
                Some(false) => {
                    metrics.queue_timeouts.add(1);
                    return Err(self.limit_reached());
                }
            }
            if let Some(pool) = self.newer_pool()? {
                self.pool = pool;
                self.pool.know_queue();
                place = match self.pool.queue.join(capacity) {
                    Some(place) => place,
                    None => return Err(self.limit_reached()),
                };
            }
            if let Some(lease) = self.free_lease()? {
                return Ok(lease);
            }
        }
    }

    /// `None` if all that may serve the request have as many as they may.
    fn free_lease(&self) -> Result<Option<(usize, Lease)>, Failure> {
        let choice = match self.only {
            Some(index) => Choice::Target(index),
            None => self.worker.pick(&self.pool, self.wanted, &self.tried),
        };
        match choice {
            Choice::Target(index) => {
                let lease = Lease::begin(self.worker, &self.pool, index);
                Ok(lease.map(|lease| (index, lease)))
            }
            Choice::Full => Ok(None),
            Choice::Nobody => Err(match &self.wanted.session {
                Some(session) if session.required => Failure::SessionGone,
                _ => Failure::NoEndpoints {
                    host: self.findings.host_str().to_owned(),
                },
            }),
        }
    }

    /// The route's pool if it was replaced while the request waited and had not been sent anywhere.
    fn newer_pool(&self) -> Result<Option<Rc<PoolState>>, Failure> {
        if !self.tried.is_empty() || self.only.is_some() {
            return Ok(None);
        }
        let pool = self.worker.newer_pool(&self.pool.matched);
        let pool = pool.ok_or_else(|| Failure::UnknownRoute {
            host: self.findings.host_str().to_owned(),
        })?;
        Ok((!Rc::ptr_eq(&pool, &self.pool)).then_some(pool))
    }

    fn limit_reached(&self) -> Failure {
        Failure::LimitReached {
            host: self.findings.host_str().to_owned(),
        }
    }

    /// Whether a backend may act on the request twice (RFC 9110 §9.2.2, or the client or the route says
    /// so).
    fn may_repeat(&self, request: &Request<RequestBody>) -> bool {
        let method = request.method();
        let idempotent = [
            Method::GET,
            Method::HEAD,
            Method::OPTIONS,
            Method::PUT,
            Method::DELETE,
        ];
        let policy = self.pool.policy.as_ref();
        idempotent.contains(method)
            || policy.is_some_and(|policy| policy.retries.methods.contains(method))
            || request.headers().contains_key(IDEMPOTENCY_KEY)
            || request.headers().contains_key(X_IDEMPOTENCY_KEY)
    }

    /// Whether a copy of the request has to be made before it is sent.
    fn may_be_needed_again(&self, request: &Request<RequestBody>, reused: bool) -> bool {
        let others = self.pool.targets.len() > self.tried.len() + 1;
        let has_body = !request.body().is_end_stream();
        self.is_idempotent
            && (reused || self.attempts > 1 && others)
            && (!has_body || self.body.is_some())
    }

    /// Hands the request over. The response, and where the raw connection comes if it is upgraded.
    fn send(
        &self,
        connection: &mut Connection,
        mut request: Request<RequestBody>,
    ) -> (
        impl Future<Output = Result<Response<Incoming>, NotSent>> + use<>,
        Option<oneshot::Receiver<RawBackend>>,
    ) {
        self.progress
            .request_is_handed_over(request.body().is_end_stream());
        match connection {
            Connection::Http1(connection) => {
                to_http1(&mut request, self.findings);
                connection.tap.follow(self.progress);
                let upgraded = self.findings.upgrade.then(|| {
                    let (deliver, upgraded) = oneshot::channel();
                    connection.upgrade.set(Some(deliver));
                    upgraded
                });
                let response = connection.sender.try_send_request(request);
                (Either::Left(response), upgraded)
            }
            Connection::Http2(stream) => {
                to_http2(&mut request, self.findings, self.origin.secure);
                let response = stream.sender.try_send_request(request);
                (Either::Right(response), None)
            }
        }
    }

    /// `None` if the request's time was up before.
    async fn until_expired<F: Future>(&self, mut future: Pin<&mut F>) -> Option<F::Output> {
        poll_fn(|cx| {
            if self.progress.is_expired() {
                return Poll::Ready(None);
            }
            future.as_mut().poll(cx).map(Some)
        })
        .await
    }

    /// The request to send again after a failed attempt, or the failure to answer with.
    fn after(
        &mut self,
        error: SendError,
        index: usize,
        lease: &Lease,
        reused: bool,
    ) -> Result<Request<RequestBody>, Failure> {
        let mut error = match error {
            SendError::Http(error) => error,
            SendError::Expired => {
                let failure = self.expired();
                if failure != Failure::ClientTimeout {
                    lease.failed(&failure);
                }
                return Err(failure);
            }
        };
        if self.progress.body_is_too_large() {
            return Err(Failure::BodyTooLarge);
        }
        if error.error().is_user() {
            // The body is the client's: hyper could not read it, and the backend is not at fault.
            return Err(Failure::Bad(BadRequest::Body));
        }
        let failure = class_of(error.error());
        let mut unsent = error.take_message();
        // The backend closed an idle connection, as it may at any time: it has not failed.
        let stale = reused && failure == BackendFailure::Closed;
        if stale && let Some(again) = unsent.take().or_else(|| self.repeat()) {
            self.fresh = true;
            self.worker.metrics.retries.add(1);
            self.pool.traffic.retries.add(1);
            return Ok(again);
        }
        let failed = Failure::Backend(failure);
        lease.failed(&failed);
        let again = match failure {
            BackendFailure::Closed => unsent.or_else(|| self.repeat()),
            _ => unsent,
        };
        let Some(again) = again else {
            return Err(failed);
        };
        self.go_on(index, failed)?;
        Ok(again)
    }

    /// The request once more, if it may be repeated.
    fn repeat(&mut self) -> Option<Request<RequestBody>> {
        let head = self.repeatable.take()?;
        let body = match &self.body {
            Some(body) => body.again()?,
            None => RequestBody::empty(),
        };
        self.rewritten = head.rewritten;
        Some(head.with_body(body))
    }

    /// Leaves a backend that has failed.
    ///
    /// # Errors
    /// That failure, if no other backend is to be tried.
    fn go_on(&mut self, index: usize, failure: Failure) -> Result<(), Failure> {
        let observed = &self.progress.observed;
        observed.attempt_failed(&failure, self.worker.now());
        self.tried.push(index);
        self.attempts -= 1;
        if self.attempts == 0 || self.tried.len() == self.pool.targets.len() {
            return Err(failure);
        }
        let now = self.worker.now();
        let budget = &self.pool.budget;
        let granted = (self.worker).settings(|settings| budget.may_retry(now, &settings.retries));
        if !granted {
            self.worker.metrics.retries_refused.add(1);
            return Err(failure);
        }
        self.worker.metrics.retries.add(1);
        self.pool.traffic.retries.add(1);
        Ok(())
    }

    fn expired(&self) -> Failure {
        if self.progress.is_past_deadline() {
            Failure::BackendTimeout(BackendTimeout::Total)
        } else if self.progress.waits_for_client() {
            Failure::ClientTimeout
        } else if self.progress.is_sending() {
            Failure::BackendTimeout(BackendTimeout::RequestBody)
        } else {
            Failure::BackendTimeout(BackendTimeout::ResponseHeaders)
        }
    }
}

/// With the request, if hyper has kept it.
type NotSent = TrySendError<Request<RequestBody>>;

enum SendError {
    Http(Box<NotSent>),
    /// The client's connection found the time to be up.
    Expired,
}

/// A request without its body, kept to be sent again: hyper consumes the one it sends.
struct Head {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    rewritten: bool,
}

impl Head {
    fn of(request: &Request<RequestBody>, rewritten: bool) -> Head {
        Head {
            method: request.method().clone(),
            uri: request.uri().clone(),
            headers: request.headers().clone(),
            rewritten,
        }
    }

    fn with_body(self, body: RequestBody) -> Request<RequestBody> {
        let mut request = Request::new(body);
        *request.method_mut() = self.method;
        *request.uri_mut() = self.uri;
        *request.headers_mut() = self.headers;
        request
    }
}

/// The target in origin form and the host in its header (RFC 9112 §3.2.1).
fn to_http1(request: &mut Request<RequestBody>, findings: &Findings) {
    *request.version_mut() = Version::HTTP_11;
    if !request.headers().contains_key(HOST) {
        let authority = request.uri().authority().map(Authority::as_str);
        let known = authority.and_then(|host| HeaderValue::from_str(host).ok());
        if let Some(host) = known.or_else(|| findings.host.clone()) {
            request.headers_mut().insert(HOST, host);
        }
    }
    if request.uri().scheme().is_some() {
        let target = request.uri().path_and_query().cloned();
        *request.uri_mut() = target.map_or_else(Uri::default, Uri::from);
    }
}

/// The host as the target's authority (RFC 9113 §8.3.1).
fn to_http2(request: &mut Request<RequestBody>, findings: &Findings, secure: bool) {
    *request.version_mut() = Version::HTTP_2;
    // The route may have its own.
    let host = request.headers_mut().remove(HOST);
    let host = host.as_ref().and_then(|host| host.to_str().ok());
    let known = request.uri().authority().map(Authority::as_str);
    let host = host.or(known).unwrap_or(findings.host_str()).to_owned();
    let scheme = if secure { Scheme::HTTPS } else { Scheme::HTTP };
    let target = request
        .uri()
        .path_and_query()
        .cloned()
        .unwrap_or(PathAndQuery::from_static("/"));
    let uri = Uri::builder()
        .scheme(scheme)
        .authority(host)
        .path_and_query(target)
        .build();
    // The host was checked to be one, so this does not fail; hyper refuses what is left as it was.
    if let Ok(uri) = uri {
        *request.uri_mut() = uri;
    }
}

fn class_of(error: &hyper::Error) -> BackendFailure {
    if error.is_parse() {
        BackendFailure::Malformed
    } else {
        BackendFailure::Closed
    }
}
