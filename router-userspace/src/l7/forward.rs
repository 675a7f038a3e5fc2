//! One request: check, match, choose a backend, rewrite, send, answer.
//!
//! Called by hyper for each request of a client connection. A request is tried on another backend
//! if the connection failed, and sent once more if a kept-alive connection turned out to be closed
//! and the request is unsent or safe to repeat; a request that a backend may have begun to act on is
//! not repeated.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use http::header::ALLOW;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use hyper::body::{Body, Incoming};
use hyper::client::conn::TrySendError;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::l7::backend::{Connection, Lease, RawBackend};
use crate::l7::balance::{PoolState, WantedInstance};
use crate::l7::body::{Answer, RequestBody, ResponseBody};
use crate::l7::connection::ClientState;
use crate::l7::error::{ALLOWED_METHODS, BackendFailure, BackendTimeout, BadRequest, Failure};
use crate::l7::headers;
use crate::l7::router::{self, NoMatch};
use crate::l7::tunnel::Switch;
use crate::l7::validate::{self, Findings};
use crate::l7::worker::Worker;

/// Answers a request; what fails is answered for.
pub(super) async fn answer(
    worker: Rc<Worker>,
    client: Rc<ClientState>,
    request: Request<Incoming>,
) -> Answer {
    let mut record = RequestRecord::begin(&worker, &client);
    let mut response = match forward(&worker, &client, request).await {
        Ok(Forwarded::Response(response)) => response,
        Ok(Forwarded::Switched {
            response,
            backend,
            lease,
        }) => {
            record.status = response.status();
            client.response_begins();
            client.switch.set(Some(Switch {
                backend,
                lease,
                record,
            }));
            return Ok(response);
        }
        Err(failure) => {
            tracing::debug!(peer = %client.peer, status = failure.status().as_u16(), reason = ?failure, "answered by the gateway");
            worker.metrics.errors[failure.reason()].add(1);
            failure.response()
        }
    };
    record.status = response.status();
    client.response_begins();
    response.body_mut().set_record(record);
    Ok(response)
}

enum Forwarded {
    Response(Response<ResponseBody>),
    /// A 101 to pass on, and what follows it.
    Switched {
        response: Response<ResponseBody>,
        backend: oneshot::Receiver<RawBackend>,
        lease: Lease,
    },
}

async fn forward(
    worker: &Rc<Worker>,
    client: &Rc<ClientState>,
    request: Request<Incoming>,
) -> Result<Forwarded, Failure> {
    let (uri_bytes, attempts) =
        worker.settings(|settings| (settings.limits.uri_bytes, settings.limits.attempts));
    let findings = validate::inspect(&request, uri_bytes)?;
    if findings.options_asterisk {
        return Ok(Forwarded::Response(answer_options()));
    }
    let pool = find_pool(worker, &findings, request.uri())?;
    if pool.has_route_service {
        return Err(Failure::RouteService);
    }
    let only = find_instance(&pool, &findings)?;
    let origin = headers::Origin {
        address: &client.forwarded_for,
        trusted: worker.settings(|settings| settings.trusts(client.peer.ip())),
        request_start: worker.request_start(),
        request_id: worker.new_request_id(),
    };
    let request = outgoing(client, request);
    let mut exchange = Exchange {
        worker,
        client,
        pool: &pool,
        findings: &findings,
        origin: &origin,
        rewritten: false,
        repeatable: None,
        only,
        tried: Vec::new(),
        attempts: if only.is_some() { 1 } else { attempts },
        fresh: false,
    };
    let (response, lease, backend) = exchange.run(request).await?;
    returned(response, lease, backend, origin.request_id)
}

fn answer_options() -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::empty());
    response.headers_mut().insert(ALLOW, ALLOWED_METHODS);
    response
}

fn find_pool(worker: &Worker, findings: &Findings, uri: &Uri) -> Result<Rc<PoolState>, Failure> {
    let host = findings.host_str();
    worker.snapshot(|snapshot| match router::find(snapshot, host, uri.path()) {
        Ok(found) => Ok(worker.pool(found.pool)),
        Err(NoMatch::PathAboveRoot) => Err(Failure::Bad(BadRequest::PathAboveRoot)),
        Err(NoMatch::UnknownRoute) if snapshot.revision == 0 => Err(Failure::NoRoutes),
        Err(NoMatch::UnknownRoute) => Err(Failure::UnknownRoute {
            host: host.to_owned(),
        }),
    })
}

/// The index of the one target that may serve the request, if it asks for an instance.
fn find_instance(pool: &PoolState, findings: &Findings) -> Result<Option<usize>, Failure> {
    let (header, is_process) = match (&findings.app_instance, &findings.process_instance) {
        (Some(app), _) => (app, false),
        (None, Some(process)) => (process, true),
        (None, None) => return Ok(None),
    };
    let (id, index) = validate::split_instance(header);
    let wanted = WantedInstance {
        id,
        is_process,
        index,
    };
    match pool.find(&wanted) {
        Some(index) => Ok(Some(index)),
        None => Err(Failure::UnknownInstance {
            host: findings.host_str().to_owned(),
        }),
    }
}

/// The request as the backend gets it, but for its headers.
fn outgoing(client: &Rc<ClientState>, request: Request<Incoming>) -> Request<RequestBody> {
    let (mut parts, body) = request.into_parts();
    if parts.uri.authority().is_some() {
        // The request target in origin form; `path_and_query` was checked to be there.
        parts.uri = parts
            .uri
            .into_parts()
            .path_and_query
            .map_or_else(Uri::default, Uri::from);
    }
    parts.version = Version::HTTP_11;
    // hyper leaves the handle of an upgrade here, which this proxy does without.
    parts.extensions.clear();
    Request::from_parts(parts, RequestBody::new(body, client))
}

/// The response as the client gets it.
fn returned(
    response: Response<Incoming>,
    lease: Lease,
    backend: Option<oneshot::Receiver<RawBackend>>,
    request_id: HeaderValue,
) -> Result<Forwarded, Failure> {
    let (mut parts, body) = response.into_parts();
    let switching = parts.status == StatusCode::SWITCHING_PROTOCOLS;
    parts.version = Version::HTTP_11;
    headers::rewrite_response(&mut parts.headers, request_id, switching);
    if !switching {
        let body = ResponseBody::backend(body, lease);
        return Ok(Forwarded::Response(Response::from_parts(parts, body)));
    }
    let backend = backend.ok_or(Failure::Backend(BackendFailure::UnexpectedUpgrade))?;
    parts.extensions.clear();
    let response = Response::from_parts(parts, ResponseBody::empty());
    Ok(Forwarded::Switched {
        response,
        backend,
        lease,
    })
}

/// A request's attempts at getting a response.
struct Exchange<'a> {
    worker: &'a Rc<Worker>,
    client: &'a Rc<ClientState>,
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

/// A response head, the backend it came from, and where that one's raw connection would come.
type Exchanged = (
    Response<Incoming>,
    Lease,
    Option<oneshot::Receiver<RawBackend>>,
);

impl Exchange<'_> {
    async fn run(&mut self, mut request: Request<RequestBody>) -> Result<Exchanged, Failure> {
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
            let past_tcp = request.body().is_end_stream() && !self.findings.upgrade;
            match lease.connect(self.fresh, past_tcp).await {
                Ok(()) => {}
                Err(failure @ Failure::Gateway(_)) => return Err(failure),
                Err(failure) => {
                    self.failed(index, &lease, failure)?;
                    continue;
                }
            }
            let (target, connection) = lease.connected();
            let reused = connection.reused;
            self.repeatable = reused
                .then(|| Head::of_repeatable(&request, self.rewritten))
                .flatten();
            if !self.rewritten {
                headers::rewrite_request(request.headers_mut(), self.findings, self.origin);
                self.rewritten = true;
            }
            headers::set_instance(request.headers_mut(), &target.instance);
            let backend = self.findings.upgrade.then(|| {
                let (deliver, backend) = oneshot::channel();
                connection.upgrade.set(Some(deliver));
                backend
            });
            match self.send(connection, request).await {
                Ok(response) => return Ok((response, lease, backend)),
                Err(error) => request = self.after(error, index, &lease, reused)?,
            }
        }
    }

    async fn send(
        &self,
        connection: &mut Connection,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, SendError> {
        self.client
            .request_is_handed_over(request.body().is_end_stream());
        let mut response = pin!(connection.sender.try_send_request(request));
        poll_fn(|cx| {
            if self.client.is_expired() {
                return Poll::Ready(Err(SendError::Expired));
            }
            response
                .as_mut()
                .poll(cx)
                .map_err(|error| SendError::Http(Box::new(error)))
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
        if self.client.waits_for_client() {
            Failure::ClientTimeout
        } else if self.client.is_sending() {
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

fn class_of(error: &hyper::Error) -> BackendFailure {
    if error.is_parse() {
        BackendFailure::Malformed
    } else {
        BackendFailure::Closed
    }
}

/// Counts a request when it ends: as answered if it is [`complete`](RequestRecord::complete), else
/// as aborted.
pub(super) struct RequestRecord {
    worker: Rc<Worker>,
    client: Rc<ClientState>,
    started: Instant,
    status: StatusCode,
    complete: bool,
}

impl RequestRecord {
    fn begin(worker: &Rc<Worker>, client: &Rc<ClientState>) -> RequestRecord {
        worker.metrics.requests_in_flight.add(1);
        RequestRecord {
            worker: Rc::clone(worker),
            client: Rc::clone(client),
            started: client.request_begins(),
            status: StatusCode::OK,
            complete: false,
        }
    }

    /// The last byte of the response has been handed to the client's connection.
    pub(super) fn complete(&mut self) {
        self.complete = true;
        self.client.response_ended();
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let metrics = &self.worker.metrics;
        metrics.requests_in_flight.subtract(1);
        if !self.complete {
            metrics.aborted.add(1);
            return;
        }
        let class = usize::from(self.status.as_u16() / 100).clamp(1, 5);
        metrics.responses[class - 1].add(1);
        // An upgraded connection's life is no latency.
        if self.status != StatusCode::SWITCHING_PROTOCOLS {
            metrics.record_latency(self.worker.now().duration_since(self.started));
        }
    }
}
