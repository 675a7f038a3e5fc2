//! What a line tells of a request, gathered while the request passes.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use http::header::{HOST, REFERER, USER_AGENT};
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, Version};
use tokio::time::Instant;

use crate::l7::access_log::WorkerLog;
use crate::l7::balance::Target;
use crate::l7::handshake::TlsSession;
use crate::l7::trace::TraceId;
use crate::route::HttpMatch;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const VCAP_REQUEST_ID: HeaderName = HeaderName::from_static("x-vcap-request-id");

/// Why a response did not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::l7) enum Aborted {
    /// The client left, or cannot be reached.
    Client,
    /// The backend broke off within its response.
    Backend,
    /// A timeout of ours, or of the drain.
    Timeout,
}

/// A request that is under way. Values are shared with the request, not copied.
pub(in crate::l7) struct Entry {
    pub log: Rc<WorkerLog>,
    /// `None` of a request that could not be parsed.
    pub request: Option<RequestLine>,
    pub referer: Option<HeaderValue>,
    pub user_agent: Option<HeaderValue>,
    pub forwarded_for: Option<HeaderValue>,
    pub forwarded_proto: Option<HeaderValue>,
    pub request_id: Option<HeaderValue>,
    pub trace: Option<TraceId>,
    /// In the order of the configuration.
    pub headers: Vec<Option<HeaderValue>>,
    /// Where the request's route has it go first.
    pub route_service: Option<Authority>,
    /// The backend of the last attempt.
    pub backend: Option<EntryBackend>,
    pub attempts: u32,
    pub error: Option<&'static str>,
    pub times: Times,
}

pub(in crate::l7) struct RequestLine {
    pub method: Method,
    pub target: Uri,
    pub version: Version,
    pub host: Option<HeaderValue>,
}

pub(in crate::l7) struct EntryBackend {
    pub address: SocketAddr,
    pub app: Option<HeaderValue>,
    pub index: Option<HeaderValue>,
    pub instance_id: Option<HeaderValue>,
}

/// Of the last attempt.
#[derive(Clone, Copy, Default)]
pub(in crate::l7) struct Times {
    pub attempted: Option<Instant>,
    pub connected: Option<Instant>,
    /// The head of its response came.
    pub answered: Option<Instant>,
}

/// What is known when a request has ended.
pub(in crate::l7) struct Ended<'a> {
    /// When its head began to arrive, since the Unix epoch.
    pub began: Duration,
    pub total: Duration,
    pub peer: SocketAddr,
    pub tls: Option<&'a TlsSession>,
    pub route: Option<&'a HttpMatch>,
    /// `None` if it ended before it was answered.
    pub status: Option<StatusCode>,
    pub aborted: Option<Aborted>,
    /// Of bodies, or both ways after a change of protocol.
    pub bytes_in: u64,
    pub bytes_out: u64,
}

impl Entry {
    /// `trusted`: the client is in `http.trusted_proxies`, so what it says of others is logged.
    pub(in crate::l7) fn new<B>(
        log: Rc<WorkerLog>,
        request: &Request<B>,
        trusted: bool,
        trace: Option<TraceId>,
    ) -> Entry {
        let headers = request.headers();
        let mut entry = Entry::unparsable(log);
        entry.request = Some(RequestLine {
            method: request.method().clone(),
            target: request.uri().clone(),
            version: request.version(),
            host: headers.get(HOST).cloned(),
        });
        entry.trace = trace;
        entry.referer = headers.get(REFERER).cloned();
        entry.user_agent = headers.get(USER_AGENT).cloned();
        if trusted {
            entry.forwarded_for = headers.get(FORWARDED_FOR).cloned();
            entry.forwarded_proto = headers.get(FORWARDED_PROTO).cloned();
        }
        entry.take_headers(headers);
        entry
    }

    /// Of bytes that are no request.
    pub(in crate::l7) fn unparsable(log: Rc<WorkerLog>) -> Entry {
        Entry {
            log,
            request: None,
            referer: None,
            user_agent: None,
            forwarded_for: None,
            forwarded_proto: None,
            request_id: None,
            trace: None,
            headers: Vec::new(),
            route_service: None,
            backend: None,
            attempts: 0,
            error: None,
            times: Times::default(),
        }
    }

    pub(in crate::l7) fn attempt(&mut self, address: SocketAddr, target: &Target, now: Instant) {
        self.attempts += 1;
        self.backend = Some(EntryBackend {
            address,
            app: target.instance.app.clone(),
            index: target.instance.index.clone(),
            instance_id: target.instance.id.clone(),
        });
        self.times = Times {
            attempted: Some(now),
            ..Times::default()
        };
    }

    /// The request goes out with these headers.
    pub(in crate::l7) fn sent(&mut self, headers: &HeaderMap, now: Instant) {
        self.times.connected = Some(now);
        self.forwarded_for = headers.get(FORWARDED_FOR).cloned();
        self.forwarded_proto = headers.get(FORWARDED_PROTO).cloned();
        self.request_id = headers.get(VCAP_REQUEST_ID).cloned();
        self.take_headers(headers);
    }

    fn take_headers(&mut self, headers: &HeaderMap) {
        let names = self.log.rules().headers.iter();
        self.headers = names.map(|(name, _)| headers.get(name).cloned()).collect();
    }
}

impl Times {
    pub(in crate::l7) fn connect(&self) -> Option<Duration> {
        Some(self.connected?.duration_since(self.attempted?))
    }

    /// From the request on its connection to the head of its response.
    pub(in crate::l7) fn backend(&self) -> Option<Duration> {
        Some(self.answered?.duration_since(self.connected?))
    }
}

impl Aborted {
    pub(in crate::l7) fn as_str(self) -> &'static str {
        match self {
            Aborted::Client => "client",
            Aborted::Backend => "backend",
            Aborted::Timeout => "timeout",
        }
    }
}
