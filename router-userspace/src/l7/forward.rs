//! One request: check, match, choose a backend, rewrite, send, answer.
//!
//! Called for each request of a client connection, and for each stream of HTTP/2 and HTTP/3. The attempts
//! at backends are in [`crate::l7::exchange`].

use std::rc::Rc;

use http::header::{ALLOW, CONNECTION, LOCATION, SET_COOKIE, VIA};
use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Response, StatusCode, Uri, Version};
use http_body::Body;
use hyper::upgrade::OnUpgrade;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::l7::backend::RawBackend;
use crate::l7::balance::{PoolState, Wanted, WantedInstance};
use crate::l7::body::{Answer, ClientBody, RequestBody, ResponseBody};
use crate::l7::client::Client;
use crate::l7::client_cert;
use crate::l7::compress::{self, Coding, Compressed};
use crate::l7::edits::{self, RequestUrl};
use crate::l7::error::{ALLOWED_METHODS, BackendFailure, BadRequest, Failure};
use crate::l7::exchange::{Exchange, Exchanged};
use crate::l7::headers;
#[cfg(feature = "http3")]
use crate::l7::http3;
use crate::l7::lease::Lease;
use crate::l7::progress::Progress;
use crate::l7::record::RequestRecord;
use crate::l7::route_service::{self, Leg};
use crate::l7::router::{self, Lookup, NoMatch};
use crate::l7::sticky;
use crate::l7::throttle;
use crate::l7::trace;
use crate::l7::tunnel::{self, Switch};
use crate::l7::validate::{self, Findings};
use crate::l7::worker::Worker;

/// Answers a request; what fails is answered for.
pub(super) async fn answer(
    client: Rc<Client>,
    progress: Rc<Progress>,
    mut request: Request<ClientBody>,
) -> Answer {
    let trace = trace::settle(&client, request.headers_mut());
    let mut record = RequestRecord::begin(&client, &progress, &request, trace);
    let version = request.version();
    let stream =
        (request.method() == http::Method::CONNECT).then(|| hyper::upgrade::on(&mut request));
    let mut response = match forward(&client, &progress, request, record.started).await {
        Ok(Forwarded::Response(response)) => response,
        Ok(Forwarded::Switched {
            response,
            backend,
            lease,
        }) => {
            record.response_begins(response.status());
            let switch = Switch {
                backend,
                lease,
                record,
            };
            return Ok(switched(&client, response, switch, stream));
        }
        Err(failure) => {
            tracing::debug!(peer = %client.peer, status = failure.status().as_u16(), reason = ?failure, "answered by the gateway");
            client.worker.metrics.errors[failure.reason()].add(1);
            record.failed(&failure);
            failure.response()
        }
    };
    if validate::is_multiplexed(version) {
        // Of one hop, and there are no such fields (RFC 9113 §8.2.2, RFC 9114 §4.2).
        response.headers_mut().remove(CONNECTION);
    } else if client.worker.is_retiring() {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(CONNECTION, close);
    }
    #[cfg(feature = "http3")]
    http3::advertise(&client, version, response.headers_mut());
    record.response_begins(response.status());
    response.body_mut().set_record(record);
    Ok(response)
}

/// The answer to a change of protocol, which the tunnel follows.
fn switched(
    client: &Rc<Client>,
    mut response: Response<ResponseBody>,
    switch: Switch,
    stream: Option<OnUpgrade>,
) -> Response<ResponseBody> {
    let Some(stream) = stream else {
        client.switch.set(Some(switch));
        return response;
    };
    headers::to_extended_connect(response.headers_mut());
    *response.status_mut() = StatusCode::OK;
    let worker = Rc::clone(&client.worker);
    tokio::task::spawn_local(async move { tunnel::run_stream(&worker, stream, switch).await });
    response
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
    client: &Rc<Client>,
    progress: &Rc<Progress>,
    request: Request<ClientBody>,
    started: Instant,
) -> Result<Forwarded, Failure> {
    let worker = &client.worker;
    let mut findings = worker.settings(|settings| validate::inspect(&request, &settings.limits))?;
    if findings.options_asterisk {
        return Ok(Forwarded::Response(answer_options()));
    }
    throttle::by_gateway(worker, client.peer.ip(), request.headers())?;
    if is_misdirected(client, request.version(), &findings) {
        return Err(Failure::Misdirected);
    }
    let mut pool = find_pool(worker, &findings, &request)?;
    progress.observed.set_route(&pool);
    throttle::by_route(worker, &pool, client.peer.ip(), request.headers())?;
    limit_body(progress, &pool, &findings, &request)?;
    if let Some(response) = redirected(client, &pool, &findings, request.uri()) {
        return Ok(Forwarded::Response(response));
    }
    let leg = route_service::leg(worker, &pool, &findings, &request)?;
    if let Some(policy) = &pool.policy {
        progress.set_timeouts(client, &policy.timeouts, started);
    }
    let mut only = find_instance(&pool, &findings)?;
    let version = request.version();
    let origin = origin_of(client, version, matches!(leg, Leg::Returned));
    let compression = Compression::wanted(&pool, &request);
    let target = request.uri().path_and_query().cloned();
    let mut request = outgoing(progress, &findings, request);
    let is_detour = matches!(leg, Leg::ToService(_));
    match leg {
        Leg::Direct => {}
        Leg::Returned => route_service::strip(request.headers_mut()),
        Leg::ToService(detour) => {
            progress.observed.detour(detour.service());
            // Boxed, or every request's future would have its size.
            pool = Box::pin(detour.begin(worker, &mut request)).await?;
            // Which instance it is for, the service hands back.
            only = None;
            findings.app_instance = None;
        }
    }
    let mut wanted = worker
        .settings(|settings| Wanted::new(&pool, request.headers(), client.peer.ip(), settings));
    if is_detour {
        wanted.session = None;
    }
    let exchange = Exchange::new(client, progress, pool, &findings, &origin, &wanted, only);
    let mut exchanged = exchange.run(request).await?;
    if is_detour {
        route_service::strip(exchanged.response.headers_mut());
    } else if let Some(cookie) = session_cookie(worker, &exchanged, &wanted, target.as_ref()) {
        let headers = exchanged.response.headers_mut();
        headers.append(SET_COOKIE, cookie);
    }
    let came_by = exchanged.response.version();
    let via = worker.settings(|settings| Some(settings.via.as_ref()?.by(came_by)));
    if let Some(via) = via {
        exchanged.response.headers_mut().append(VIA, via);
    }
    let forwarded = returned(exchanged, version, &findings, origin.request_id)?;
    Ok(compression.apply(worker, forwarded))
}

/// RFC 9110 §15.5.20, of connections that clients share between hosts (RFC 9113 §9.1.1): the host has a
/// certificate of its own, and this connection's handshake was done with another.
fn is_misdirected(client: &Client, version: Version, findings: &Findings) -> bool {
    let Some(sni) = client.tls.as_ref().and_then(|tls| tls.sni.as_deref()) else {
        return false;
    };
    let host = router::strip_port(findings.host_str());
    validate::is_multiplexed(version)
        && !host.eq_ignore_ascii_case(sni)
        && (client.worker.tls.server()).is_some_and(|server| server.separates(sni, host))
}

/// Where a request comes from; `returned`, by way of its route's service.
fn origin_of(client: &Client, version: Version, returned: bool) -> headers::Origin<'_> {
    let worker = &client.worker;
    worker.settings(|settings| {
        // A service passes on what the gateway has told it.
        let trusted = returned || settings.trusts(client.peer.ip());
        let shown = client
            .tls
            .as_ref()
            .and_then(|tls| tls.client_certificate.as_ref());
        let mode = settings.forwarded_client_cert;
        headers::Origin {
            address: &client.forwarded_for,
            client_cert: client_cert::forwarded(mode, trusted, shown),
            secure: client.tls.is_some(),
            trusted,
            request_start: worker.request_start(),
            request_id: worker.new_request_id(),
            forwarded: settings.forwarded,
            port: settings.forwarded_port.then(|| client.local.port()),
            via: settings.via.as_ref().map(|via| via.by(version)),
        }
    })
}

/// What a request and its route say of compression.
#[derive(Clone, Copy, Debug)]
struct Compression {
    is_on: bool,
    accepted: Option<Coding>,
}

impl Compression {
    fn wanted(pool: &PoolState, request: &Request<ClientBody>) -> Compression {
        let is_on = pool.policy.as_ref().is_some_and(|it| it.compression);
        Compression {
            is_on,
            accepted: is_on
                .then(|| compress::accepted(request.headers()))
                .flatten(),
        }
    }

    fn apply(self, worker: &Worker, forwarded: Forwarded) -> Forwarded {
        let Forwarded::Response(mut response) = forwarded else {
            return forwarded;
        };
        let len = response.body().size_hint().exact();
        if self.is_on && compress::is_compressible(response.status(), response.headers(), len) {
            compress::vary(response.headers_mut());
            // A HEAD has nothing to compress, but says what a GET would.
            if let Some(coding) = self.accepted
                && !response.body().is_end_stream()
                && let Some(compressed) = Compressed::new(coding, &worker.compressing)
            {
                compress::rewrite_head(response.headers_mut(), coding);
                response.body_mut().compress(compressed);
            }
        }
        Forwarded::Response(response)
    }
}

/// What the route, or the gateway, allows a request's body to be.
///
/// # Errors
/// It says itself that it is longer.
fn limit_body(
    progress: &Progress,
    pool: &PoolState,
    findings: &Findings,
    request: &Request<ClientBody>,
) -> Result<(), Failure> {
    if request.body().is_end_stream() {
        return Ok(());
    }
    let own = pool
        .policy
        .as_ref()
        .and_then(|it| it.limits.request_body_bytes);
    let limit = own.or_else(|| {
        (progress.worker).settings(|settings| match settings.limits.request_body_bytes {
            0 => None,
            limit => Some(limit),
        })
    });
    if limit.is_some_and(|limit| request.body().size_hint().lower() > limit) {
        return Err(Failure::BodyTooLarge);
    }
    progress.set_body_limit(limit, findings.grpc);
    Ok(())
}

/// The cookie that tells the client which instance its session is with, if it has to be told.
fn session_cookie(
    worker: &Worker,
    exchanged: &Exchanged,
    wanted: &Wanted,
    target: Option<&PathAndQuery>,
) -> Option<HeaderValue> {
    let instance = exchanged.lease.target().instance_id.as_deref();
    let session = wanted.session.as_ref();
    if let Some(session) = session {
        let found = instance == Some(&*session.instance);
        let metrics = &worker.metrics;
        let counter = if found {
            &metrics.sticky_hits
        } else {
            &metrics.sticky_misses
        };
        counter.add(1);
    }
    let request = target.map_or("/", PathAndQuery::path);
    let matched = &exchanged.lease.pool().matched.path;
    let path = || sticky::cookie_path(request, matched).to_owned();
    let headers = exchanged.response.headers();
    worker
        .settings(|settings| sticky::set_cookie(headers, session, instance, path, &settings.sticky))
}

/// The answer that leads elsewhere, if the route has one and the request is not there already.
fn redirected(
    client: &Client,
    pool: &PoolState,
    findings: &Findings,
    uri: &Uri,
) -> Option<Response<ResponseBody>> {
    let redirect = pool.policy.as_ref()?.redirect.as_ref()?;
    let url = RequestUrl {
        scheme: match client.tls {
            Some(_) => "https",
            None => "http",
        },
        authority: findings.host_str(),
        path: uri.path(),
        query: uri.query(),
    };
    let location = edits::location(redirect, &pool.matched.path, &url)?;
    let mut response = Response::new(ResponseBody::empty());
    *response.status_mut() = redirect.status;
    response.headers_mut().insert(LOCATION, location);
    Some(response)
}

fn answer_options() -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::empty());
    response.headers_mut().insert(ALLOW, ALLOWED_METHODS);
    response
}

/// This worker's state of the pool that a request is for.
fn find_pool(
    worker: &Worker,
    findings: &Findings,
    request: &Request<ClientBody>,
) -> Result<Rc<PoolState>, Failure> {
    let host = findings.host_str();
    let lookup = Lookup {
        host,
        path: request.uri().path(),
        query: request.uri().query(),
        method: request.method(),
        headers: request.headers(),
    };
    worker.snapshot(|snapshot| match router::find(snapshot, &lookup) {
        Ok(found) => Ok(worker.pool(&found)),
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

/// The request as the backend gets it, but for its headers and what depends on the protocol.
fn outgoing(
    progress: &Rc<Progress>,
    findings: &Findings,
    request: Request<ClientBody>,
) -> Request<RequestBody> {
    let (mut parts, body) = request.into_parts();
    if parts.uri.authority().is_some() {
        // The request target in origin form; `path_and_query` was checked to be there.
        parts.uri = parts
            .uri
            .into_parts()
            .path_and_query
            .map_or_else(Uri::default, Uri::from);
    }
    if findings.extended_connect {
        parts.method = http::Method::GET;
        headers::from_extended_connect(&mut parts.headers);
    }
    // hyper leaves the handle of an upgrade here, which this proxy does without.
    parts.extensions.clear();
    Request::from_parts(parts, RequestBody::new(body, progress))
}

/// The response as a client gets it who speaks `version`.
fn returned(
    exchanged: Exchanged,
    version: Version,
    findings: &Findings,
    request_id: HeaderValue,
) -> Result<Forwarded, Failure> {
    let Exchanged {
        response,
        lease,
        upgraded,
    } = exchanged;
    let (mut parts, body) = response.into_parts();
    let switching = parts.status == StatusCode::SWITCHING_PROTOCOLS;
    // hyper answers an HTTP/1.0 request as such by itself.
    parts.version = match version {
        Version::HTTP_2 | Version::HTTP_3 => version,
        _ => Version::HTTP_11,
    };
    let trailers = findings.te_trailers || validate::is_multiplexed(version);
    headers::rewrite_response(&mut parts.headers, request_id, switching, trailers);
    if let Some(policy) = &lease.pool().policy {
        edits::apply(&policy.response_headers, &mut parts.headers);
    }
    if !switching {
        let body = ResponseBody::backend(body, lease);
        return Ok(Forwarded::Response(Response::from_parts(parts, body)));
    }
    let backend = upgraded.ok_or(Failure::Backend(BackendFailure::UnexpectedUpgrade))?;
    parts.extensions.clear();
    let response = Response::from_parts(parts, ResponseBody::empty());
    Ok(Forwarded::Switched {
        response,
        backend,
        lease,
    })
}
