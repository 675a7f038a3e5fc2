//! What a declared route may ask for beyond its match and pool.
//!
//! A routes file declares it, a registration over NATS carries none but its balance; layer 7 acts on
//! it. Everything is valid by construction, as in [`crate::route`]: made by
//! [`declared`](crate::route::declared), which has the bounds.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, StatusCode};

use crate::route::{Balance, Origin};

/// How requests of one route are served where it differs from the gateway's defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpPolicy {
    /// Who declared it.
    pub origin: Origin,
    /// Whatever registrations say, as [`Self::route_service_url`].
    pub balance: Option<Balance>,
    /// Starts with `https`; requests go there first.
    pub route_service_url: Option<Arc<str>>,
    /// The gateway answers itself; the pool may then be empty.
    pub redirect: Option<Redirect>,
    pub rewrite: Rewrite,
    pub request_headers: HeaderEdits,
    pub response_headers: HeaderEdits,
    pub timeouts: RouteTimeouts,
    pub retries: RouteRetries,
    pub limits: RouteLimits,
    /// Responses may be compressed with what the client accepts.
    pub compression: bool,
}

impl HttpPolicy {
    /// One that asks for nothing.
    pub fn new(origin: Origin) -> HttpPolicy {
        HttpPolicy {
            origin,
            balance: None,
            route_service_url: None,
            redirect: None,
            rewrite: Rewrite::default(),
            request_headers: HeaderEdits::default(),
            response_headers: HeaderEdits::default(),
            timeouts: RouteTimeouts::default(),
            retries: RouteRetries::default(),
            limits: RouteLimits::default(),
            compression: false,
        }
    }

    /// Whether requests get an answer though the pool is empty.
    pub fn answers_alone(&self) -> bool {
        self.redirect.is_some()
    }
}

/// An answer that leads elsewhere. What is not given stays as the client asked for it; a request that
/// is there already is served by the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: StatusCode,
    /// `http` or `https`.
    pub scheme: Option<Arc<str>>,
    /// `HOST` or `HOST:PORT`.
    pub authority: Option<Arc<str>>,
    pub path: Option<PathRewrite>,
}

/// What the backend sees in place of what the client asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// The `Host`.
    pub host: Option<HeaderValue>,
    pub path: Option<PathRewrite>,
}

/// The query stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathRewrite {
    /// The whole path; starts with `/`.
    Full(Arc<str>),
    /// The prefix that the route matched; what follows it stays. Empty, or starts with `/` and does
    /// not end in one.
    Prefix(Arc<str>),
}

/// Removed first, then set (replacing all of the name), then added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    pub remove: Vec<HeaderName>,
    pub set: Vec<(HeaderName, HeaderValue)>,
    pub add: Vec<(HeaderName, HeaderValue)>,
}

/// `None` is the gateway's own, of `http.timeouts`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteTimeouts {
    pub response_headers: Option<Duration>,
    pub body_idle: Option<Duration>,
    /// From the request's first byte to the response's last. `None`: without end.
    pub total: Option<Duration>,
}

/// `None` is the gateway's own, of `http.retries`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteRetries {
    /// The first included.
    pub attempts: Option<usize>,
    /// Methods that may be sent again though a backend may have acted on them.
    pub methods: Vec<Method>,
}

/// `None` is no limit but those of `http.limits`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteLimits {
    /// More is answered 413.
    pub request_body_bytes: Option<u64>,
    /// Requests in flight to one backend, over all workers. More wait, then are answered 503.
    pub requests_per_backend: Option<u32>,
    /// Requests in flight on the route, over all workers.
    pub requests: Option<u32>,
    /// New requests of the whole route, and of one client address.
    pub rate: Option<Rate>,
    pub client_rate: Option<Rate>,
}

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub per_second: u32,
    pub burst: u32,
}

/// Of [`HashKey::balance_percent`].
pub const BALANCE_PERCENT: RangeInclusive<u32> = 110..=1000;

/// What a request is hashed by, for [`Balance::Hash`](crate::route::Balance::Hash).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HashKey {
    pub of: HashOf,
    /// How much of the average load a backend may carry, in percent; the next in the ring takes the
    /// rest. `None`: no bound. (Mirrokni et al., "Consistent hashing with bounded
    /// loads", 2016.)
    pub balance_percent: Option<u32>,
}

/// A request without it is balanced by the gateway's default.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HashOf {
    /// Lower case.
    Header(Arc<str>),
    Cookie(Arc<str>),
    /// The client's address.
    Source,
}
