//! A request's attempts at getting a response from the backends of its pool.
//!
//! A request is tried on another backend if the connection failed, and sent once more if a kept-alive
//! connection turned out to be closed and the request is unsent or safe to repeat; a request that a
//! backend may have begun to act on is not repeated.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use http::header::HOST;
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderMap, Method, Request, Response, Uri, Version};
use hyper::body::{Body, Incoming};
use hyper::client::conn::TrySendError;
use tokio::sync::oneshot;

use crate::l7::backend::{Connection, RawBackend};
use crate::l7::balance::PoolState;
use crate::l7::body::RequestBody;
use crate::l7::client::{Client, Progress};
use crate::l7::error::{BackendFailure, BackendTimeout, BadRequest, Failure};
use crate::l7::headers;
use crate::l7::lease::Lease;
use crate::l7::validate::Findings;
use crate::l7::worker::Worker;

pub(super) struct Exchange<'a> {
    worker: &'a Rc<Worker>,
    client: &'a Client,
    progress: &'a Progress,
    pool: &'a Rc<PoolState>,
    findings: &'a Findings,
    origin: &'a headers::Origin<'a>,
    /// The request's headers are those for the backend.
    rewritten: bool,
    /// The request as it went out on a kept-alive connection, which may turn out to be closed.
    repeatable: Option<Head>,
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
        progress: &'a Progress,
        pool: &'a Rc<PoolState>,
        findings: &'a Findings,
        origin: &'a headers::Origin<'a>,
        only: Option<usize>,
        attempts: usize,
    ) -> Exchange<'a> {
        Exchange {
            worker: &client.worker,
            client,
            progress,
            pool,
            findings,
            origin,
            rewritten: false,
            repeatable: None,
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
        loop {
            let index = self
                .only
                .or_else(|| self.worker.pick(self.pool, &self.tried));
            let Some(index) = index else {
                return Err(Failure::NoEndpoints {
                    host: self.findings.host_str().to_owned(),
                });
            };
            let mut lease = Lease::new(self.worker, self.pool, index);
            let connecting = lease.connect(self.client, self.fresh, self.findings.upgrade);
            match self.until_expired(connecting).await {
                Some(Ok(())) => {}
                Some(Err(failure @ Failure::Gateway(_))) => return Err(failure),
                Some(Err(failure)) => {
                    self.failed(index, &lease, failure)?;
                    continue;
                }
                None => return Err(Failure::BackendTimeout(BackendTimeout::Total)),
            }
            let (target, connection) = lease.connected();
            let reused = connection.reused();
            self.repeatable = reused
                .then(|| Head::of_repeatable(&request, self.rewritten))
                .flatten();
            if !self.rewritten {
                headers::rewrite_request(request.headers_mut(), self.findings, self.origin);
                self.rewritten = true;
            }
            headers::set_instance(request.headers_mut(), &target.instance);
            let (sent, upgraded) = self.send(connection, request).await;
            match sent {
                Ok(response) => {
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

    /// The response, and where the raw connection comes if it is upgraded.
    async fn send(
        &self,
        connection: &mut Connection,
        mut request: Request<RequestBody>,
    ) -> (
        Result<Response<Incoming>, SendError>,
        Option<oneshot::Receiver<RawBackend>>,
    ) {
        self.progress
            .request_is_handed_over(request.body().is_end_stream());
        match connection {
            Connection::Http1(connection) => {
                to_http1(&mut request, self.findings);
                let upgraded = self.findings.upgrade.then(|| {
                    let (deliver, upgraded) = oneshot::channel();
                    connection.upgrade.set(Some(deliver));
                    upgraded
                });
                let response = connection.sender.try_send_request(request);
                (self.response(response).await, upgraded)
            }
            Connection::Http2(stream) => {
                to_http2(&mut request, self.findings, self.origin.secure);
                let response = stream.sender.try_send_request(request);
                (self.response(response).await, None)
            }
        }
    }

    async fn response(
        &self,
        response: impl Future<Output = Result<Response<Incoming>, TrySendError<Request<RequestBody>>>>,
    ) -> Result<Response<Incoming>, SendError> {
        match self.until_expired(response).await {
            Some(response) => response.map_err(|error| SendError::Http(Box::new(error))),
            None => Err(SendError::Expired),
        }
    }

    /// `None` if the request's time was up before.
    async fn until_expired<F: Future>(&self, future: F) -> Option<F::Output> {
        let mut future = pin!(future);
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
                    lease.backend().record_failure();
                }
                return Err(failure);
            }
        };
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
            return Ok(again);
        }
        let Some(unsent) = unsent else {
            lease.backend().record_failure();
            return Err(Failure::Backend(failure));
        };
        self.failed(index, lease, Failure::Backend(failure))?;
        Ok(unsent)
    }

    /// The request once more, if it may be repeated.
    fn repeat(&mut self) -> Option<Request<RequestBody>> {
        let head = self.repeatable.take()?;
        self.rewritten = head.rewritten;
        Some(head.into_request())
    }

    /// Notes a failed backend.
    ///
    /// # Errors
    /// That failure, if no other backend is to be tried.
    fn failed(&mut self, index: usize, lease: &Lease, failure: Failure) -> Result<(), Failure> {
        lease.backend().record_failure();
        self.tried.push(index);
        self.attempts -= 1;
        if self.attempts == 0 || self.tried.len() == self.pool.targets.len() {
            return Err(failure);
        }
        self.worker.metrics.retries.add(1);
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

enum SendError {
    Http(Box<TrySendError<Request<RequestBody>>>),
    /// The client's connection found the time to be up.
    Expired,
}

/// A request without a body, kept to be sent again: hyper consumes the one it sends.
struct Head {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    rewritten: bool,
}

impl Head {
    /// `None` if a backend that has seen the request might act on it twice (RFC 9110 §9.2.1).
    fn of_repeatable(request: &Request<RequestBody>, rewritten: bool) -> Option<Head> {
        let safe = matches!(
            *request.method(),
            Method::GET | Method::HEAD | Method::OPTIONS
        );
        (safe && request.body().is_end_stream()).then(|| Head {
            method: request.method().clone(),
            uri: request.uri().clone(),
            headers: request.headers().clone(),
            rewritten,
        })
    }

    fn into_request(self) -> Request<RequestBody> {
        let mut request = Request::new(RequestBody::empty());
        *request.method_mut() = self.method;
        *request.uri_mut() = self.uri;
        *request.headers_mut() = self.headers;
        request
    }
}

/// The target in origin form and the host in its header (RFC 9112 §3.2.1).
fn to_http1(request: &mut Request<RequestBody>, findings: &Findings) {
    *request.version_mut() = Version::HTTP_11;
    if !request.headers().contains_key(HOST)
        && let Some(host) = &findings.host
    {
        request.headers_mut().insert(HOST, host.clone());
    }
    if request.uri().scheme().is_some() {
        let target = request.uri().path_and_query().cloned();
        *request.uri_mut() = target.map_or_else(Uri::default, Uri::from);
    }
}

/// The host as the target's authority (RFC 9113 §8.3.1).
fn to_http2(request: &mut Request<RequestBody>, findings: &Findings, secure: bool) {
    *request.version_mut() = Version::HTTP_2;
    request.headers_mut().remove(HOST);
    let scheme = if secure { Scheme::HTTPS } else { Scheme::HTTP };
    let target = request
        .uri()
        .path_and_query()
        .cloned()
        .unwrap_or(PathAndQuery::from_static("/"));
    let uri = Uri::builder()
        .scheme(scheme)
        .authority(findings.host_str())
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
