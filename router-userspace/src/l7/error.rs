//! The one mapping from what went wrong to what the client is told.
//!
//! Status, `X-Cf-RouterError`, message and caching are gorouter's where it has the case. No answer
//! carries an internal address: a backend's failure is told by a fixed word for its class.

use std::fmt;
use std::time::Duration;

use http::header::{
    ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderName, HeaderValue, Response, StatusCode};

use crate::l7::body::ResponseBody;
use crate::l7::route_service::InvalidSignature;

/// Methods a 405 offers (RFC 9110 §15.5.6 requires the list).
pub(super) const ALLOWED_METHODS: HeaderValue =
    HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");

const ROUTER_ERROR: HeaderName = HeaderName::from_static("x-cf-routererror");

/// Why the gateway answers a request itself, or cannot answer at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No `Host`, or an empty one.
    EmptyHost,
    Bad(BadRequest),
    MethodNotAllowed,
    /// It came on a connection that was begun for hosts of another certificate.
    Misdirected,
    /// A transfer coding other than `chunked`.
    TransferCoding,
    /// An `Expect` other than `100-continue`.
    Expectation,
    UriTooLong,
    /// More than `http.limits.request_headers`.
    TooManyHeaders,
    /// The request's body is longer than the route, or `http.limits.request_body_bytes`, allows.
    BodyTooLarge,
    /// The route, or the client, has begun too many requests lately.
    RateLimited {
        by: RateLimit,
        wait: Duration,
    },
    /// The client stopped sending its body.
    ClientTimeout,
    UnknownRoute {
        host: String,
    },
    /// No route has been learned since the gateway started, so nothing can be said of this one.
    NoRoutes,
    /// The route has no backend that is the instance the request asks for.
    UnknownInstance {
        host: String,
    },
    NoEndpoints {
        host: String,
    },
    /// Its session cannot move, and the instance it is with is gone.
    SessionGone,
    /// The route or all its backends have as many requests as they may, and as many wait as may or the
    /// request has waited too long.
    LimitReached {
        host: String,
    },
    /// The route asks for a route service, which must not be passed by.
    RouteService(RouteServiceFailure),
    Backend(BackendFailure),
    BackendTimeout(BackendTimeout),
    Gateway(GatewayFailure),
}

/// Whose token bucket is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RateLimit {
    Route,
    Client,
}

/// What is wrong with a request that is refused with 400 and a closed connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadRequest {
    Host,
    ManyHosts,
    Target,
    AuthorityMismatch,
    TransferEncoding,
    /// `Transfer-Encoding` and `Content-Length` in one head (RFC 9112 §6.1).
    LengthAndCoding,
    PathAboveRoot,
    /// The body's framing is broken, or it ends before its end.
    Body,
    /// `X-CF-App-Instance` is not `UUID:INDEX`.
    AppInstance,
    /// `X-CF-Process-Instance` is neither `UUID` nor `UUID:INDEX`.
    ProcessInstance,
}

/// How the last backend that was tried failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendFailure {
    Refused,
    Unreachable,
    /// Closed or reset before a whole response head.
    Closed,
    /// What it sent is not HTTP/1, or its head is too large.
    Malformed,
    /// Switched protocols without being asked to.
    UnexpectedUpgrade,
    /// The TLS handshake failed.
    TlsHandshake,
    /// Its certificate does not verify.
    TlsCertificate,
}

/// What the gateway lacks to reach any backend of the kind. Says nothing about the backend, and
/// another one would fare no better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GatewayFailure {
    /// No file descriptor, port or memory for one more connection.
    Resources,
    /// `http.backend_tls` has no roots, so no certificate can be verified.
    TlsRoots,
}

/// What keeps a request from going through its route's service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteServiceFailure {
    /// There is no `http.route_services.secret`.
    Disabled,
    /// A WebSocket, or another upgrade.
    Upgrade,
    /// The service's URL is none that can be called.
    Request,
    /// The service's name has no address.
    Unresolved,
    /// It comes back with a signature that does not hold.
    Signature(InvalidSignature),
    /// The same on a route that has no service, where signatures are looked at.
    StraySignature(InvalidSignature),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendTimeout {
    Connect,
    /// The timeout of the route, for the whole request.
    Total,
    RequestBody,
    ResponseHeaders,
}

/// A label of the metric that counts answers of the gateway itself.
pub const REASONS: [&str; 30] = [
    "empty_host",
    "bad_request",
    "method_not_allowed",
    "transfer_coding",
    "expectation",
    "uri_too_long",
    "client_timeout",
    "unknown_route",
    "no_endpoints",
    "route_service_unsupported",
    "endpoint_refused",
    "endpoint_unreachable",
    "endpoint_closed",
    "endpoint_malformed",
    "endpoint_tls",
    "endpoint_timeout",
    "gateway_resources",
    "gateway_tls_roots",
    "unknown_instance",
    "no_routes",
    "too_many_headers",
    "session_gone",
    "limit_reached",
    "route_service_signature",
    "route_service_failed",
    "body_too_large",
    "route_rate",
    "client_rate",
    "misdirected",
    "unparsable",
];

/// Indexes in [`REASONS`] of failures of the gateway itself.
pub(super) const GATEWAY_FAILURES: [usize; 2] = [16, 17];

/// Index in [`REASONS`] of requests that hyper could not parse and answered itself.
pub(super) const UNPARSABLE: usize = REASONS.len() - 1;

impl Failure {
    pub fn status(&self) -> StatusCode {
        match self {
            Failure::EmptyHost | Failure::Bad(_) | Failure::UnknownInstance { .. } => {
                StatusCode::BAD_REQUEST
            }
            Failure::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Failure::Misdirected => StatusCode::MISDIRECTED_REQUEST,
            Failure::TransferCoding => StatusCode::NOT_IMPLEMENTED,
            Failure::Expectation => StatusCode::EXPECTATION_FAILED,
            Failure::UriTooLong => StatusCode::URI_TOO_LONG,
            Failure::TooManyHeaders => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Failure::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Failure::RateLimited { .. } => StatusCode::TOO_MANY_REQUESTS,
            Failure::ClientTimeout => StatusCode::REQUEST_TIMEOUT,
            Failure::UnknownRoute { .. } => StatusCode::NOT_FOUND,
            Failure::NoRoutes
            | Failure::NoEndpoints { .. }
            | Failure::LimitReached { .. }
            | Failure::Gateway(_) => StatusCode::SERVICE_UNAVAILABLE,
            // gorouter's own codes, outside the registry.
            Failure::Backend(BackendFailure::TlsHandshake) => gorouter_code(525),
            Failure::Backend(BackendFailure::TlsCertificate) => gorouter_code(526),
            Failure::RouteService(failure) => failure.status(),
            Failure::SessionGone | Failure::Backend(_) => StatusCode::BAD_GATEWAY,
            Failure::BackendTimeout(_) => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// Index in [`REASONS`].
    pub(super) fn reason(&self) -> usize {
        match self {
            Failure::EmptyHost => 0,
            Failure::Bad(_) => 1,
            Failure::MethodNotAllowed => 2,
            Failure::TransferCoding => 3,
            Failure::Expectation => 4,
            Failure::UriTooLong => 5,
            Failure::ClientTimeout => 6,
            Failure::UnknownRoute { .. } => 7,
            Failure::NoEndpoints { .. } => 8,
            Failure::RouteService(RouteServiceFailure::Disabled | RouteServiceFailure::Upgrade) => {
                9
            }
            Failure::Backend(BackendFailure::Refused) => 10,
            Failure::Backend(BackendFailure::Unreachable) => 11,
            Failure::Backend(BackendFailure::Closed) => 12,
            Failure::Backend(BackendFailure::Malformed | BackendFailure::UnexpectedUpgrade) => 13,
            Failure::Backend(BackendFailure::TlsHandshake | BackendFailure::TlsCertificate) => 14,
            Failure::BackendTimeout(_) => 15,
            Failure::Gateway(GatewayFailure::Resources) => GATEWAY_FAILURES[0],
            Failure::Gateway(GatewayFailure::TlsRoots) => GATEWAY_FAILURES[1],
            Failure::UnknownInstance { .. } => 18,
            Failure::NoRoutes => 19,
            Failure::TooManyHeaders => 20,
            Failure::SessionGone => 21,
            Failure::LimitReached { .. } => 22,
            Failure::RouteService(
                RouteServiceFailure::Signature(_) | RouteServiceFailure::StraySignature(_),
            ) => 23,
            Failure::RouteService(
                RouteServiceFailure::Request | RouteServiceFailure::Unresolved,
            ) => 24,
            Failure::BodyTooLarge => 25,
            Failure::RateLimited { by, .. } => match by {
                RateLimit::Route => 26,
                RateLimit::Client => 27,
            },
            Failure::Misdirected => 28,
        }
    }

    /// The value of `X-Cf-RouterError`.
    pub(super) fn router_error(&self) -> &'static str {
        match self {
            Failure::EmptyHost => "empty_host",
            Failure::Bad(BadRequest::TransferEncoding | BadRequest::LengthAndCoding) => {
                "invalid_transfer_encoding"
            }
            Failure::Bad(BadRequest::Host | BadRequest::ManyHosts) => "invalid_host",
            Failure::Bad(BadRequest::AuthorityMismatch) => "host_mismatch",
            Failure::Bad(BadRequest::Body) => "invalid_body",
            Failure::Bad(BadRequest::AppInstance) => "invalid_cf_app_instance_header",
            Failure::Bad(BadRequest::ProcessInstance) => "invalid_cf_process_instance_header",
            Failure::Bad(BadRequest::Target | BadRequest::PathAboveRoot) => "invalid_target",
            Failure::MethodNotAllowed => "method_not_allowed",
            Failure::Misdirected => "misdirected_request",
            Failure::TransferCoding => "unsupported_transfer_coding",
            Failure::Expectation => "unsupported_expectation",
            Failure::UriTooLong => "uri_too_long",
            Failure::TooManyHeaders => "max-request-size-exceeded",
            Failure::BodyTooLarge => "max-body-size-exceeded",
            Failure::RateLimited { .. } => "rate_limit_exceeded",
            Failure::ClientTimeout => "client_timeout",
            Failure::UnknownRoute { .. } | Failure::UnknownInstance { .. } => "unknown_route",
            Failure::NoRoutes => "no_routes",
            Failure::NoEndpoints { .. } => "no_endpoints",
            Failure::SessionGone => "endpoint_failure (No endpoints available)",
            Failure::LimitReached { .. } => "Connection Limit Reached",
            Failure::RouteService(failure) => failure.router_error(),
            Failure::Backend(failure) => match failure {
                BackendFailure::Refused => "endpoint_failure (connection refused)",
                BackendFailure::Unreachable => "endpoint_failure (unreachable)",
                BackendFailure::Closed => "endpoint_failure (connection closed)",
                BackendFailure::Malformed => "endpoint_failure (malformed response)",
                BackendFailure::UnexpectedUpgrade => "endpoint_failure (unexpected upgrade)",
                BackendFailure::TlsHandshake => "endpoint_failure (tls handshake)",
                BackendFailure::TlsCertificate => "endpoint_failure (invalid certificate)",
            },
            Failure::BackendTimeout(timeout) => match timeout {
                BackendTimeout::Connect => "endpoint_timeout (connect)",
                BackendTimeout::Total => "endpoint_timeout (total)",
                BackendTimeout::RequestBody => "endpoint_timeout (request body)",
                BackendTimeout::ResponseHeaders => "endpoint_timeout (response headers)",
            },
            Failure::Gateway(GatewayFailure::Resources) => "gateway_failure (out of resources)",
            Failure::Gateway(GatewayFailure::TlsRoots) => "gateway_failure (no certificate roots)",
        }
    }

    fn cache_control(&self) -> Option<&'static str> {
        match self {
            Failure::EmptyHost | Failure::NoEndpoints { .. } => Some("public,max-age=2"),
            Failure::NoRoutes
            | Failure::UnknownRoute { .. }
            | Failure::UnknownInstance { .. }
            | Failure::Bad(BadRequest::AppInstance | BadRequest::ProcessInstance) => {
                Some("no-cache, no-store")
            }
            _ => None,
        }
    }

    /// Whether the framing of what follows on the connection is in doubt, or the client is at
    /// fault in a way that more of its requests are not wanted.
    fn closes(&self) -> bool {
        matches!(
            self,
            Failure::EmptyHost
                | Failure::Bad(_)
                | Failure::MethodNotAllowed
                | Failure::TransferCoding
                | Failure::Expectation
                | Failure::UriTooLong
                | Failure::TooManyHeaders
                | Failure::BodyTooLarge
                | Failure::ClientTimeout
        )
    }

    /// The answer to the client.
    pub(super) fn response(&self) -> Response<ResponseBody> {
        let status = self.status();
        let reason = match status.as_u16() {
            525 => "SSL Handshake Failed",
            526 => "Invalid SSL Certificate",
            _ => status.canonical_reason().unwrap_or(""),
        };
        let body = format!("{} {reason}: {self}\n", status.as_u16());
        let mut response = Response::new(ResponseBody::text(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(ROUTER_ERROR, HeaderValue::from_static(self.router_error()));
        if let Some(value) = self.cache_control() {
            headers.insert(CACHE_CONTROL, HeaderValue::from_static(value));
        }
        if matches!(self, Failure::NoRoutes | Failure::LimitReached { .. }) {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if let Failure::RateLimited { wait, .. } = self {
            let seconds = wait.as_secs_f64().ceil().max(1.0);
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds as u64));
        }
        if *self == Failure::MethodNotAllowed {
            headers.insert(ALLOW, ALLOWED_METHODS);
        }
        if self.closes() {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// The message to the client.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Failure::EmptyHost => "Request had empty Host header",
            Failure::Bad(bad) => match bad {
                BadRequest::Host => "Host header is not a host name or address",
                BadRequest::ManyHosts => "Request had more than one Host header",
                BadRequest::Target => "Invalid request target",
                BadRequest::AuthorityMismatch => "Request target and Host header disagree",
                BadRequest::TransferEncoding => "Invalid Transfer-Encoding header",
                BadRequest::LengthAndCoding => "Request had two lengths",
                BadRequest::PathAboveRoot => "Path leaves the root",
                BadRequest::Body => "Invalid request body",
                BadRequest::AppInstance => "Invalid X-CF-App-Instance Header",
                BadRequest::ProcessInstance => "Invalid X-CF-Process-Instance Header",
            },
            Failure::MethodNotAllowed => "Method is not supported.",
            Failure::Misdirected => {
                "This connection is for other hosts; another one serves this one."
            }
            Failure::TransferCoding => "Transfer coding is not supported.",
            Failure::Expectation => "Expectation is not supported.",
            Failure::UriTooLong => "Request target is too long.",
            Failure::TooManyHeaders => "Request has too many header fields.",
            Failure::BodyTooLarge => "Request body is too large.",
            Failure::RateLimited { .. } => "Too many requests.",
            Failure::ClientTimeout => "Request body did not arrive in time.",
            Failure::UnknownRoute { host } => {
                return write!(f, "Requested route ('{host}') does not exist.");
            }
            Failure::NoRoutes => "The gateway has no routes yet.",
            Failure::UnknownInstance { host } => {
                return write!(f, "Requested instance of route ('{host}') does not exist.");
            }
            Failure::NoEndpoints { host } => {
                return write!(f, "Requested route ('{host}') has no available endpoints.");
            }
            Failure::SessionGone => "Registered endpoint failed to handle the request.",
            Failure::LimitReached { host } => {
                return write!(
                    f,
                    "Requested route ('{host}') has reached the connection limit."
                );
            }
            Failure::RouteService(failure) => return failure.fmt(f),
            Failure::Backend(_) => "Registered endpoint failed to handle the request.",
            Failure::BackendTimeout(_) => "Registered endpoint did not answer in time.",
            Failure::Gateway(_) => "The gateway cannot reach any endpoint.",
        };
        f.write_str(text)
    }
}

impl RouteServiceFailure {
    fn status(self) -> StatusCode {
        match self {
            RouteServiceFailure::Disabled
            | RouteServiceFailure::Unresolved
            | RouteServiceFailure::Signature(
                InvalidSignature::NoMetadata
                | InvalidSignature::Malformed
                | InvalidSignature::Forged
                | InvalidSignature::OtherRoute,
            ) => StatusCode::BAD_GATEWAY,
            RouteServiceFailure::Upgrade => StatusCode::SERVICE_UNAVAILABLE,
            RouteServiceFailure::Request => StatusCode::INTERNAL_SERVER_ERROR,
            RouteServiceFailure::Signature(InvalidSignature::Expired)
            | RouteServiceFailure::StraySignature(InvalidSignature::Expired) => {
                StatusCode::GATEWAY_TIMEOUT
            }
            RouteServiceFailure::StraySignature(_) => StatusCode::BAD_REQUEST,
        }
    }

    fn router_error(self) -> &'static str {
        match self {
            RouteServiceFailure::Disabled | RouteServiceFailure::Upgrade => {
                "route_service_unsupported"
            }
            RouteServiceFailure::Request => "route_service_failure",
            RouteServiceFailure::Unresolved => "endpoint_failure (name not resolved)",
            RouteServiceFailure::Signature(InvalidSignature::Expired)
            | RouteServiceFailure::StraySignature(InvalidSignature::Expired) => {
                "expired_route_service_signature"
            }
            RouteServiceFailure::Signature(_) | RouteServiceFailure::StraySignature(_) => {
                "invalid_route_service_signature"
            }
        }
    }
}

/// The message to the client.
impl fmt::Display for RouteServiceFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RouteServiceFailure::Disabled => "Support for route services is disabled.",
            RouteServiceFailure::Upgrade => {
                "Websocket requests are not supported for routes bound to Route Services."
            }
            RouteServiceFailure::Request => "Route service request failed.",
            RouteServiceFailure::Unresolved => "Registered endpoint failed to handle the request.",
            RouteServiceFailure::Signature(error)
            | RouteServiceFailure::StraySignature(error @ InvalidSignature::Expired) => {
                return write!(f, "Failed to validate Route Service Signature: {error}");
            }
            RouteServiceFailure::StraySignature(_) => "invalid route service signature detected",
        })
    }
}

fn gorouter_code(code: u16) -> StatusCode {
    StatusCode::from_u16(code).expect("525 and 526 are three digits")
}
