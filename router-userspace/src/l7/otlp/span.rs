//! A request as spans: one of the gateway as a server, and below it one for each attempt at a backend.
//!
//! Names and attributes are those of the semantic conventions for HTTP, 1.23 and later. Queries are left out: they
//! may have secrets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{HOST, USER_AGENT};
use http::uri::Authority;
use http::{HeaderMap, Method, Request, StatusCode, Version};
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode as SpanStatus;
use opentelemetry_proto::tonic::trace::v1::{Span, Status};
use tokio::time::Instant;

use crate::l7::otlp::Exporter;
use crate::l7::trace::{self, SpanContext, TRACESTATE};

/// Attempts of one request that are told of.
const MAX_ATTEMPTS: usize = 8;

/// Of a path or a header; the rest is cut off. A longer `tracestate` is left out.
const MAX_VALUE_BYTES: usize = 1024;

/// W3C's flag, and that `IS_REMOTE` says something, and `IS_REMOTE` (trace.proto, `SpanFlags`).
const SAMPLED: u32 = 1;
const HAS_IS_REMOTE: u32 = 0x100;
const IS_REMOTE: u32 = 0x200;

/// An attempt that was given up without being told why: its kept-alive connection was closed.
const CLOSED: &str = "connection_closed";

/// A request that is sampled. What it has of the request's head is copied: it may wait for long, and is not to
/// keep a whole buffer of the client's connection for that.
pub(in crate::l7) struct RequestSpan {
    exporter: Option<Arc<Exporter>>,
    context: SpanContext,
    trace_state: Option<Box<str>>,
    method: Method,
    path: Box<str>,
    version: Version,
    host: Option<Box<str>>,
    port: Option<u16>,
    user_agent: Option<Box<str>>,
    is_secure: bool,
    peer: SocketAddr,
    started: Instant,
    attempts: Vec<Attempt>,
    error: Option<&'static str>,
    ended: Option<Ended>,
}

struct Attempt {
    span: u64,
    backend: SocketAddr,
    began: Instant,
    /// `None`: with the request.
    ended: Option<Instant>,
    has_answered: bool,
    error: Option<&'static str>,
}

/// What is known when a request has ended.
pub(in crate::l7) struct Ended {
    /// When its head began to arrive, since the Unix epoch.
    pub began: Duration,
    pub total: Duration,
    /// The path of its route.
    pub route: Option<Arc<str>>,
    /// `None` if it ended before it was answered.
    pub status: Option<StatusCode>,
    /// Why the response did not end.
    pub aborted: Option<&'static str>,
}

impl RequestSpan {
    pub(in crate::l7) fn new<B>(
        exporter: Arc<Exporter>,
        context: SpanContext,
        request: &Request<B>,
        peer: SocketAddr,
        is_secure: bool,
        started: Instant,
    ) -> RequestSpan {
        let headers = request.headers();
        let authority = match headers.get(HOST) {
            Some(host) => Authority::try_from(host.as_bytes()).ok(),
            None => request.uri().authority().cloned(),
        };
        let state = headers.get(TRACESTATE).and_then(|it| it.to_str().ok());
        let agent = headers.get(USER_AGENT);
        RequestSpan {
            exporter: Some(exporter),
            context,
            trace_state: state
                .filter(|it| it.len() <= MAX_VALUE_BYTES)
                .map(Box::from),
            method: request.method().clone(),
            path: cut(request.uri().path()).into(),
            version: request.version(),
            host: authority.as_ref().map(|it| cut(it.host()).into()),
            port: authority.as_ref().and_then(Authority::port_u16),
            user_agent: agent.map(|it| cut(&String::from_utf8_lossy(it.as_bytes())).into()),
            is_secure,
            peer,
            started,
            attempts: Vec::new(),
            error: None,
            ended: None,
        }
    }

    pub(in crate::l7) fn attempt(&mut self, backend: SocketAddr, now: Instant) {
        self.give_up(CLOSED, now);
        if self.attempts.len() < MAX_ATTEMPTS {
            self.attempts.push(Attempt {
                span: rand::random_range(1..=u64::MAX),
                backend,
                began: now,
                ended: None,
                has_answered: false,
                error: None,
            });
        }
    }

    /// The attempt in hand has failed, if that has not been said.
    pub(in crate::l7) fn give_up(&mut self, error: &'static str, now: Instant) {
        if let Some(last) = self.attempts.last_mut()
            && last.ended.is_none()
        {
            last.ended = Some(now);
            last.error = Some(error);
        }
    }

    /// Makes the attempt in hand the parent of what the backend does.
    pub(in crate::l7) fn propagate(&self, headers: &mut HeaderMap) {
        if let Some(last) = self.attempts.last() {
            trace::set_span(headers, &self.context, last.span);
        }
    }

    pub(in crate::l7) fn answered(&mut self) {
        if let Some(last) = self.attempts.last_mut() {
            last.has_answered = true;
        }
    }

    /// The gateway answers by itself.
    pub(in crate::l7) fn failed(&mut self, error: &'static str) {
        self.error = Some(error);
    }

    pub(in crate::l7) fn end(mut self: Box<Self>, ended: Ended) {
        self.ended = Some(ended);
        if let Some(exporter) = self.exporter.take() {
            exporter.push(self);
        }
    }

    /// How many spans it is.
    pub(super) fn count(&self) -> u64 {
        1 + self.attempts.len() as u64
    }

    /// The server's span and those of its attempts.
    pub(super) fn to_spans(&self) -> Vec<Span> {
        let Some(ended) = &self.ended else {
            return Vec::new();
        };
        let mut spans = Vec::with_capacity(1 + self.attempts.len());
        spans.push(self.server(ended));
        for (index, attempt) in self.attempts.iter().enumerate() {
            spans.push(self.client(ended, index, attempt));
        }
        spans
    }

    fn server(&self, ended: &Ended) -> Span {
        let mut attributes = Vec::with_capacity(16);
        self.add_method(&mut attributes);
        let scheme = if self.is_secure { "https" } else { "http" };
        add(&mut attributes, "url.scheme", scheme);
        add(&mut attributes, "url.path", &*self.path);
        let route = ended.route.as_deref().map(|path| match path {
            "" => "/",
            path => path,
        });
        if let Some(route) = route {
            add(&mut attributes, "http.route", route);
        }
        if let Some(host) = &self.host {
            add(&mut attributes, "server.address", &**host);
        }
        if let Some(port) = self.port {
            add_int(&mut attributes, "server.port", port.into());
        }
        add_peer(&mut attributes, self.peer);
        let address = self.peer.ip().to_canonical().to_string();
        add(&mut attributes, "client.address", address);
        add(&mut attributes, "network.protocol.name", "http");
        add(
            &mut attributes,
            "network.protocol.version",
            version(self.version),
        );
        if let Some(agent) = &self.user_agent {
            add(&mut attributes, "user_agent.original", &**agent);
        }
        add_status(&mut attributes, ended.status);
        let error = error_type(self.error.or(ended.aborted), ended.status, 500);
        if let Some(error) = &error {
            add(&mut attributes, "error.type", error);
        }
        let name = match route {
            Some(route) => format!("{} {route}", self.name()),
            None => self.name().to_owned(),
        };
        let remote = self.context.parent.map_or(0, |_| IS_REMOTE);
        Span {
            parent_span_id: id_of(self.context.parent),
            flags: SAMPLED | HAS_IS_REMOTE | remote,
            kind: SpanKind::Server.into(),
            start_time_unix_nano: nanos(ended.began),
            end_time_unix_nano: nanos(ended.began + ended.total),
            status: status(error.is_some()),
            ..self.span(self.context.span, name, attributes)
        }
    }

    fn client(&self, ended: &Ended, index: usize, attempt: &Attempt) -> Span {
        let mut attributes = Vec::with_capacity(8);
        self.add_method(&mut attributes);
        let address = attempt.backend.ip().to_string();
        add(&mut attributes, "server.address", address);
        add_int(
            &mut attributes,
            "server.port",
            attempt.backend.port().into(),
        );
        add_peer(&mut attributes, attempt.backend);
        if index > 0 {
            let count = i64::try_from(index).unwrap_or(i64::MAX);
            add_int(&mut attributes, "http.request.resend_count", count);
        }
        let answered = ended.status.filter(|_| attempt.has_answered);
        add_status(&mut attributes, answered);
        let told = attempt.error.or(match attempt.has_answered {
            true => ended.aborted,
            false => self.error.or(ended.aborted),
        });
        let error = error_type(told, answered, 400);
        if let Some(error) = &error {
            add(&mut attributes, "error.type", error);
        }
        let end = attempt.ended.map(|it| it.duration_since(self.started));
        let begin = attempt.began.duration_since(self.started);
        Span {
            parent_span_id: id_of(Some(self.context.span)),
            flags: SAMPLED | HAS_IS_REMOTE,
            kind: SpanKind::Client.into(),
            start_time_unix_nano: nanos(ended.began + begin),
            end_time_unix_nano: nanos(ended.began + end.unwrap_or(ended.total)),
            status: status(error.is_some()),
            ..self.span(attempt.span, self.name().to_owned(), attributes)
        }
    }

    fn span(&self, id: u64, name: String, attributes: Vec<KeyValue>) -> Span {
        Span {
            trace_id: self.context.trace.to_be_bytes().to_vec(),
            span_id: id_of(Some(id)),
            trace_state: self.trace_state.as_deref().unwrap_or_default().to_owned(),
            name,
            attributes,
            ..Span::default()
        }
    }

    /// The method as a part of names, of which there are to be few.
    fn name(&self) -> &str {
        match is_known(&self.method) {
            true => self.method.as_str(),
            false => "HTTP",
        }
    }

    fn add_method(&self, to: &mut Vec<KeyValue>) {
        let method = self.method.as_str();
        if is_known(&self.method) {
            add(to, "http.request.method", method);
        } else {
            add(to, "http.request.method", "_OTHER");
            add(to, "http.request.method_original", cut(method));
        }
    }
}

/// What all spans of this process are of.
pub(super) fn resource(service_name: &str) -> Resource {
    let mut attributes = Vec::new();
    add(&mut attributes, "service.name", service_name);
    add(
        &mut attributes,
        "service.version",
        env!("CARGO_PKG_VERSION"),
    );
    if let Ok(name) = nix::unistd::gethostname()
        && let Some(name) = name.to_str()
    {
        add(&mut attributes, "host.name", name);
    }
    Resource {
        attributes,
        ..Resource::default()
    }
}

fn is_known(method: &Method) -> bool {
    [
        Method::GET,
        Method::HEAD,
        Method::POST,
        Method::PUT,
        Method::DELETE,
        Method::CONNECT,
        Method::OPTIONS,
        Method::TRACE,
        Method::PATCH,
    ]
    .contains(method)
}

fn version(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        Version::HTTP_3 => "3",
        _ => "1.1",
    }
}

/// What was told, or a status that is an error: of servers from 500, of clients from 400.
fn error_type(told: Option<&'static str>, status: Option<StatusCode>, from: u16) -> Option<String> {
    let failed = status.filter(|it| it.as_u16() >= from);
    match (told, status) {
        (Some(told), None) => Some(told.to_owned()),
        // What the gateway answers may be the client's fault, which is no error of the server.
        (Some(told), Some(status)) if status.as_u16() >= from || status.as_u16() < 400 => {
            Some(told.to_owned())
        }
        _ => failed.map(|it| it.as_str().to_owned()),
    }
}

fn status(is_error: bool) -> Option<Status> {
    is_error.then(|| Status {
        message: String::new(),
        code: SpanStatus::Error.into(),
    })
}

fn id_of(span: Option<u64>) -> Vec<u8> {
    span.map_or_else(Vec::new, |it| it.to_be_bytes().to_vec())
}

fn nanos(since_epoch: Duration) -> u64 {
    u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX)
}

fn add_peer(to: &mut Vec<KeyValue>, peer: SocketAddr) {
    let address = peer.ip().to_canonical().to_string();
    add(to, "network.peer.address", address);
    add_int(to, "network.peer.port", peer.port().into());
}

fn add_status(to: &mut Vec<KeyValue>, status: Option<StatusCode>) {
    if let Some(status) = status {
        add_int(to, "http.response.status_code", status.as_u16().into());
    }
}

fn add(to: &mut Vec<KeyValue>, key: &str, value: impl Into<String>) {
    push(to, key, any_value::Value::StringValue(value.into()));
}

fn add_int(to: &mut Vec<KeyValue>, key: &str, value: i64) {
    push(to, key, any_value::Value::IntValue(value));
}

fn push(to: &mut Vec<KeyValue>, key: &str, value: any_value::Value) {
    to.push(KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    });
}

fn cut(value: &str) -> &str {
    let mut len = value.len().min(MAX_VALUE_BYTES);
    while !value.is_char_boundary(len) {
        len -= 1;
    }
    &value[..len]
}
