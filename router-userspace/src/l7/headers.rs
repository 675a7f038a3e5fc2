//! What changes in the headers on the way through: RFC 9110 §7.6.1 for hop-by-hop fields, and what
//! applications on Cloud Foundry expect to be told.
//!
//! [`rewrite_request`] runs once a request, [`set_instance`] once an attempt. Names and constant
//! values are static; a request costs one allocation here, for its id.

use base64::Engine;
use bytes::Bytes;
use http::Version;
use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HeaderMap, HeaderName, HeaderValue,
    PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE, VIA,
};

use crate::config::ForwardedHeader;
use crate::l7::balance::InstanceHeaders;
use crate::l7::client_cert::ClientCertHeader;
use crate::l7::route_service;
use crate::l7::validate::{Findings, is_plain_connection};

const APP_INSTANCE: HeaderName = HeaderName::from_static("x-cf-app-instance");
const APPLICATION_ID: HeaderName = HeaderName::from_static("x-cf-applicationid");
const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
const FORWARDED_CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const INSTANCE_ID: HeaderName = HeaderName::from_static("x-cf-instanceid");
const INSTANCE_INDEX: HeaderName = HeaderName::from_static("x-cf-instanceindex");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_START: HeaderName = HeaderName::from_static("x-request-start");
const VCAP_REQUEST_ID: HeaderName = HeaderName::from_static("x-vcap-request-id");

/// Most that [`rewrite_request`] and [`set_instance`] add.
const ADDED_COUNT: usize = 12;

/// Longest `X-Request-Id` taken over from a client.
const MAX_REQUEST_ID_LEN: usize = 128;

/// Where a request comes from, and when.
pub(super) struct Origin<'a> {
    /// The peer's address as a header value.
    pub address: &'a HeaderValue,
    /// What becomes of `X-Forwarded-Client-Cert`.
    pub client_cert: ClientCertHeader,
    /// The request came over TLS.
    pub secure: bool,
    /// It is in `http.trusted_proxies`.
    pub trusted: bool,
    /// Milliseconds since the Unix epoch.
    pub request_start: HeaderValue,
    /// The gateway's id for this request.
    pub request_id: HeaderValue,
    /// What becomes of `Forwarded`.
    pub forwarded: ForwardedHeader,
    /// The port that was dialed, if it is to be told.
    pub port: Option<u16>,
    /// The gateway's part of `Via`, if it has one.
    pub via: Option<HeaderValue>,
}

/// What the gateway adds to `Via` of a message that came by each version (RFC 9110 §7.6.3).
pub(super) struct Via {
    http10: HeaderValue,
    http11: HeaderValue,
    http2: HeaderValue,
    http3: HeaderValue,
}

impl Via {
    /// `name`: a token.
    pub(super) fn new(name: &str) -> Via {
        let by = |version: &str| {
            let value = HeaderValue::try_from(format!("{version} {name}"));
            value.expect("a token is a header value")
        };
        Via {
            http10: by("1.0"),
            http11: by("1.1"),
            http2: by("2.0"),
            http3: by("3.0"),
        }
    }

    pub(super) fn by(&self, version: Version) -> HeaderValue {
        match version {
            Version::HTTP_10 => self.http10.clone(),
            Version::HTTP_2 => self.http2.clone(),
            Version::HTTP_3 => self.http3.clone(),
            _ => self.http11.clone(),
        }
    }
}

pub(super) fn rewrite_request(headers: &mut HeaderMap, findings: &Findings, origin: &Origin<'_>) {
    headers.reserve(ADDED_COUNT);
    let upgrade = if findings.upgrade {
        headers.remove(UPGRADE)
    } else {
        None
    };
    remove_hop_by_hop(headers, findings);
    if findings.expect {
        // hyper sends the 100 when the backend's connection first asks for the body.
        headers.remove(EXPECT);
    }
    if findings.app_instance.is_some() {
        headers.remove(APP_INSTANCE);
    }
    if findings.cookie_crumbs {
        join_cookies(headers);
    }
    if findings.underscores {
        remove_where(headers, |name| name.as_str().contains('_'));
    }
    if let Some(upgrade) = upgrade {
        headers.insert(UPGRADE, upgrade);
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
    set_forwarded(headers, findings, origin);
    set_proxies(headers, findings, origin);
    let keep_id = findings.request_id
        && headers
            .get(REQUEST_ID)
            .is_some_and(|id| origin.trusted || is_sane_id(id));
    if !keep_id {
        headers.insert(REQUEST_ID, origin.request_id.clone());
    }
    if !findings.request_start {
        headers.insert(REQUEST_START, origin.request_start.clone());
    }
    headers.insert(VCAP_REQUEST_ID, origin.request_id.clone());
}

/// Tells the backend which instance it is; what a client says of that is overwritten or removed.
pub(super) fn set_instance(headers: &mut HeaderMap, instance: &InstanceHeaders) {
    let mut set = |name: HeaderName, value: &Option<HeaderValue>| match value {
        Some(value) => drop(headers.insert(name, value.clone())),
        None => drop(headers.remove(name)),
    };
    set(APPLICATION_ID, &instance.app);
    set(INSTANCE_ID, &instance.id);
    set(INSTANCE_INDEX, &instance.index);
}

/// `upgraded`: the response is a 101, whose `Upgrade` stays. `trailers`: the client takes them.
pub(super) fn rewrite_response(
    headers: &mut HeaderMap,
    request_id: HeaderValue,
    upgraded: bool,
    trailers: bool,
) {
    let mut connection = false;
    let mut connection_tokens = false;
    let mut hop_by_hop = false;
    for (name, value) in &*headers {
        match name.as_str() {
            "connection" => {
                connection = true;
                connection_tokens |= !is_plain_connection(value);
            }
            "transfer-encoding" | "keep-alive" | "proxy-connection" | "te" | "upgrade" => {
                hop_by_hop = true;
            }
            "trailer" => hop_by_hop |= !trailers,
            _ => {}
        }
    }
    let upgrade = if upgraded {
        headers.remove(UPGRADE)
    } else {
        None
    };
    if connection_tokens {
        remove_named_by_connection(headers);
    } else if connection {
        headers.remove(CONNECTION);
    }
    if hop_by_hop {
        for name in [TRANSFER_ENCODING, KEEP_ALIVE, PROXY_CONNECTION, TE, UPGRADE] {
            headers.remove(name);
        }
        if !trailers {
            headers.remove(TRAILER);
        }
    }
    if let Some(upgrade) = upgrade {
        headers.insert(UPGRADE, upgrade);
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
    headers.entry(VCAP_REQUEST_ID).or_insert(request_id);
}

/// Removes trailer fields that would change what the head of the message says, or whose it is
/// (RFC 9110 §6.5.1).
pub(super) fn clean_trailers(trailers: &mut HeaderMap) {
    remove_where(trailers, |name| {
        let name = name.as_str();
        let of_the_head = matches!(
            name,
            "host"
                | "connection"
                | "keep-alive"
                | "proxy-connection"
                | "transfer-encoding"
                | "te"
                | "trailer"
                | "upgrade"
                | "http2-settings"
                | "authorization"
                | "proxy-authorization"
                | "proxy-authenticate"
                | "www-authenticate"
                | "cookie"
                | "set-cookie"
                | "cache-control"
                | "expect"
                | "range"
                | "location"
                | "vary"
                | "age"
                | "expires"
                | "date"
                | "max-forwards"
                | "forwarded"
                | "x-real-ip"
        );
        of_the_head
            || ["content-", "x-forwarded-", "x-cf-", "if-"]
                .iter()
                .any(|start| name.starts_with(start))
    });
}

/// What is of one hop, and what an interim response must not have (RFC 9110 §8.6).
pub(super) fn clean_interim(headers: &mut HeaderMap) {
    remove_named_by_connection(headers);
    for name in [
        TRANSFER_ENCODING,
        KEEP_ALIVE,
        PROXY_CONNECTION,
        TE,
        UPGRADE,
        TRAILER,
        CONTENT_LENGTH,
    ] {
        headers.remove(name);
    }
    route_service::strip(headers);
}

/// A WebSocket's extended CONNECT (RFC 8441 §5) as the `GET` of HTTP/1.1 that it stands for.
pub(super) fn from_extended_connect(headers: &mut HeaderMap) {
    let key = base64::engine::general_purpose::STANDARD.encode(rand::random::<[u8; 16]>());
    let key = HeaderValue::from_maybe_shared(Bytes::from(key)).expect("base64 is a header value");
    headers.insert(SEC_WEBSOCKET_KEY, key);
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
}

/// The headers of a 101 as those of the 200 that answers an extended CONNECT.
pub(super) fn to_extended_connect(headers: &mut HeaderMap) {
    for name in [SEC_WEBSOCKET_ACCEPT, UPGRADE, CONNECTION] {
        headers.remove(name);
    }
}

/// One `Cookie` of several, as HTTP/2 may split it (RFC 9113 §8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let mut joined = Vec::new();
    for crumb in headers.get_all(COOKIE) {
        if !joined.is_empty() {
            joined.extend_from_slice(b"; ");
        }
        joined.extend_from_slice(crumb.as_bytes());
    }
    if let Ok(joined) = HeaderValue::from_maybe_shared(Bytes::from(joined)) {
        headers.insert(COOKIE, joined);
    }
}

fn remove_hop_by_hop(headers: &mut HeaderMap, findings: &Findings) {
    if findings.connection_tokens {
        remove_named_by_connection(headers);
    } else if findings.connection {
        headers.remove(CONNECTION);
    }
    if findings.hop_by_hop {
        for name in [
            TRANSFER_ENCODING,
            UPGRADE,
            HTTP2_SETTINGS,
            TE,
            KEEP_ALIVE,
            PROXY_CONNECTION,
            PROXY_AUTHENTICATE,
            PROXY_AUTHORIZATION,
        ] {
            headers.remove(name);
        }
    }
    if findings.te_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Removes `Connection` and the headers it names, except those that are never of one hop: naming
/// `X-Forwarded-For` or `Authorization` is how a client gets a proxy to drop them.
fn remove_named_by_connection(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .filter(|name| !is_end_to_end(name.as_str()))
        .collect();
    headers.remove(CONNECTION);
    for name in named {
        headers.remove(name);
    }
}

fn is_end_to_end(name: &str) -> bool {
    const PREFIXES: [&str; 7] = [
        "content-",
        "x-forwarded-",
        "x-cf-",
        "x-b3-",
        "x-request-",
        "x-vcap-",
        "access-control-",
    ];
    matches!(
        name,
        "host"
            | "cookie"
            | "set-cookie"
            | "authorization"
            | "forwarded"
            | "x-real-ip"
            | "b3"
            | "origin"
            | "range"
            | "date"
            | "location"
            | "cache-control"
            | "etag"
            | "vary"
            | "traceparent"
            | "tracestate"
            | "expect"
    ) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

fn set_forwarded(headers: &mut HeaderMap, findings: &Findings, origin: &Origin<'_>) {
    if findings.forwarded && !origin.trusted {
        for name in [FORWARDED, FORWARDED_PORT, REAL_IP] {
            headers.remove(name);
        }
    }
    match &origin.client_cert {
        ClientCertHeader::Keep => {}
        ClientCertHeader::Remove if !findings.forwarded => {}
        ClientCertHeader::Remove => drop(headers.remove(FORWARDED_CLIENT_CERT)),
        ClientCertHeader::Set(value) => {
            headers.insert(FORWARDED_CLIENT_CERT, value.clone());
        }
    }
    let keep = findings.forwarded && origin.trusted;
    let forwarded_for = if keep && headers.contains_key(FORWARDED_FOR) {
        extended(headers, origin.address)
    } else {
        origin.address.clone()
    };
    headers.insert(FORWARDED_FOR, forwarded_for);
    if !(keep && headers.contains_key(FORWARDED_PROTO)) {
        let scheme = if origin.secure { "https" } else { "http" };
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static(scheme));
    }
    if !(keep && headers.contains_key(FORWARDED_HOST))
        && let Some(host) = &findings.host
    {
        headers.insert(FORWARDED_HOST, host.clone());
    }
}

/// What the configuration asks to be told beside.
fn set_proxies(headers: &mut HeaderMap, findings: &Findings, origin: &Origin<'_>) {
    match origin.forwarded {
        ForwardedHeader::Off => {}
        ForwardedHeader::Append => {
            headers.append(FORWARDED, forwarded_element(findings, origin));
        }
        ForwardedHeader::Replace => {
            headers.insert(FORWARDED, forwarded_element(findings, origin));
        }
    }
    if let Some(port) = origin.port {
        // What is here came from a trusted proxy.
        headers.entry(FORWARDED_PORT).or_insert(port.into());
    }
    if let Some(via) = &origin.via {
        headers.append(VIA, via.clone());
    }
}

/// `for=192.0.2.1;host=a.com;proto=https` (RFC 7239 §4).
fn forwarded_element(findings: &Findings, origin: &Origin<'_>) -> HeaderValue {
    let address = origin.address.as_bytes();
    let mut element = b"for=".to_vec();
    if address.contains(&b':') {
        // §6: an IPv6 address is bracketed, and so quoted.
        element.extend_from_slice(b"\"[");
        element.extend_from_slice(address);
        element.extend_from_slice(b"]\"");
    } else {
        element.extend_from_slice(address);
    }
    if let Some(host) = &findings.host {
        element.extend_from_slice(b";host=");
        push_token_or_quoted(&mut element, host.as_bytes());
    }
    let proto: &[u8] = if origin.secure {
        b";proto=https"
    } else {
        b";proto=http"
    };
    element.extend_from_slice(proto);
    // The host was checked to be one, so this does not fail.
    HeaderValue::from_maybe_shared(element).unwrap_or(HeaderValue::from_static("for=unknown"))
}

fn push_token_or_quoted(element: &mut Vec<u8>, value: &[u8]) {
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    if !value.is_empty() && value.iter().all(is_token) {
        element.extend_from_slice(value);
        return;
    }
    element.push(b'"');
    for &byte in value {
        if matches!(byte, b'"' | b'\\') {
            element.push(b'\\');
        }
        element.push(byte);
    }
    element.push(b'"');
}

/// All `X-Forwarded-For` lines in one, and the peer behind them.
fn extended(headers: &HeaderMap, peer: &HeaderValue) -> HeaderValue {
    let mut list = Vec::new();
    for value in headers.get_all(FORWARDED_FOR) {
        list.extend_from_slice(value.as_bytes());
        list.extend_from_slice(b", ");
    }
    list.extend_from_slice(peer.as_bytes());
    HeaderValue::from_maybe_shared(list).unwrap_or_else(|_| peer.clone())
}

fn is_sane_id(id: &HeaderValue) -> bool {
    let sane = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/+=@".contains(&byte);
    (1..=MAX_REQUEST_ID_LEN).contains(&id.len()) && id.as_bytes().iter().all(|&byte| sane(byte))
}

fn remove_where(headers: &mut HeaderMap, unwanted: impl Fn(&HeaderName) -> bool) {
    let names: Vec<HeaderName> = headers
        .keys()
        .filter(|name| unwanted(name))
        .cloned()
        .collect();
    for name in names {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests;
