//! What a request must be before it is routed: the checks of RFC 9112 that a parser leaves to the
//! proxy, and those that keep two readers of one request from disagreeing about it.
//!
//! One pass over the headers also notes which of them need rewriting, so that [`super::headers`]
//! touches only what is there. Nothing is changed here.

use http::header::HeaderMap;
use http::uri::Scheme;
use http::{HeaderValue, Method, Request, Version};

use crate::config::HttpLimits;
use crate::l7::error::{BadRequest, Failure};
use crate::l7::router::MAX_HOST_LEN;

/// What a valid request carries.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// The `Host` header; checked, and equal to the target's authority if it has one.
    pub host: Option<HeaderValue>,
    /// `OPTIONS *`, which the gateway answers itself.
    pub options_asterisk: bool,
    /// A `GET` that may switch protocols: `Connection: upgrade`, no body, never h2c.
    pub upgrade: bool,
    /// The upgrade is the extended CONNECT of HTTP/2 (RFC 8441).
    pub extended_connect: bool,
    /// The `Cookie` comes in several fields.
    pub cookie_crumbs: bool,
    /// Some `Connection` header that says more than `keep-alive` or `close`.
    pub connection_tokens: bool,
    pub connection: bool,
    /// Hop-by-hop headers other than `Connection` are present.
    pub hop_by_hop: bool,
    pub te_trailers: bool,
    /// A stream of messages, which come when there are any.
    pub grpc: bool,
    pub expect: bool,
    /// A name with an underscore, which CGI-like backends confuse with another header.
    pub underscores: bool,
    /// Headers that only a trusted proxy may set are present.
    pub forwarded: bool,
    pub request_id: bool,
    pub request_start: bool,
    /// It says that it comes from a route service.
    pub proxy_signature: bool,
    /// The client wants this instance and no other; well formed.
    pub app_instance: Option<HeaderValue>,
    pub process_instance: Option<HeaderValue>,
}

impl Findings {
    /// The `Host` header, which was found to be ASCII.
    pub(super) fn host_str(&self) -> &str {
        let host = self.host.as_ref().and_then(|host| host.to_str().ok());
        host.unwrap_or("")
    }
}

/// An extension of a request whose head has a `Content-Length` beside its `Transfer-Encoding`.
#[derive(Clone, Copy, Debug)]
pub(super) struct LengthAndCoding;

/// # Errors
/// The refusal to answer with.
pub(super) fn inspect<B>(request: &Request<B>, limits: &HttpLimits) -> Result<Findings, Failure> {
    // hyper counts those of HTTP/1 itself.
    let counted = is_multiplexed(request.version());
    if counted && request.headers().len() > limits.request_headers {
        return Err(Failure::TooManyHeaders);
    }
    let mut findings = inspect_headers(request.headers())?;
    if findings.hop_by_hop && request.extensions().get::<LengthAndCoding>().is_some() {
        return Err(Failure::Bad(BadRequest::LengthAndCoding));
    }
    inspect_target(request, limits.uri_bytes, &mut findings)?;
    if findings.upgrade && !findings.extended_connect {
        findings.upgrade = may_upgrade(request);
    }
    Ok(findings)
}

/// Whether requests of this version are streams of one connection, with pseudo-header fields (RFC 9113
/// §8.3, RFC 9114 §4.3) and without fields of the connection.
pub(super) fn is_multiplexed(version: Version) -> bool {
    matches!(version, Version::HTTP_2 | Version::HTTP_3)
}

/// Whether a response of HTTP/1 says once, and in the one way everybody understands, where it ends
/// (RFC 9112 §6.3).
pub(super) fn is_framed_once(headers: &HeaderMap) -> bool {
    let mut codings = headers.get_all(http::header::TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => true,
        (Some(coding), None) => {
            coding.as_bytes().eq_ignore_ascii_case(b"chunked")
                && !headers.contains_key(http::header::CONTENT_LENGTH)
        }
        (Some(_), Some(_)) => false,
    }
}

fn inspect_headers(headers: &HeaderMap) -> Result<Findings, Failure> {
    let mut findings = Findings::default();
    let mut transfer_encoding = false;
    let mut cookie = false;
    for (name, value) in headers {
        match name.as_str() {
            "host" => {
                if findings.host.is_some() {
                    return Err(Failure::Bad(BadRequest::ManyHosts));
                }
                inspect_host(value)?;
                findings.host = Some(value.clone());
            }
            "transfer-encoding" => {
                if transfer_encoding {
                    return Err(Failure::Bad(BadRequest::TransferEncoding));
                }
                inspect_transfer_encoding(value)?;
                transfer_encoding = true;
                findings.hop_by_hop = true;
            }
            "connection" => {
                findings.connection = true;
                findings.connection_tokens |= !is_plain_connection(value);
            }
            "upgrade" => {
                findings.hop_by_hop = true;
                findings.upgrade = true;
            }
            "te" => {
                findings.hop_by_hop = true;
                findings.te_trailers |= has_token(value, "trailers");
            }
            "content-type" => findings.grpc = value.as_bytes().starts_with(b"application/grpc"),
            "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "http2-settings" => findings.hop_by_hop = true,
            "cookie" => findings.cookie_crumbs |= std::mem::replace(&mut cookie, true),
            "expect" => {
                if !value.as_bytes().eq_ignore_ascii_case(b"100-continue") {
                    return Err(Failure::Expectation);
                }
                findings.expect = true;
            }
            "x-forwarded-for"
            | "x-forwarded-proto"
            | "x-forwarded-host"
            | "x-forwarded-port"
            | "forwarded"
            | "x-real-ip"
            | "x-forwarded-client-cert" => findings.forwarded = true,
            "x-request-id" => findings.request_id = true,
            "x-request-start" => findings.request_start = true,
            "x-cf-proxy-signature" => findings.proxy_signature = true,
            "x-cf-app-instance" if !value.is_empty() => {
                if !is_instance(value, true) {
                    return Err(Failure::Bad(BadRequest::AppInstance));
                }
                findings.app_instance = Some(value.clone());
            }
            "x-cf-process-instance" if !value.is_empty() => {
                if !is_instance(value, false) {
                    return Err(Failure::Bad(BadRequest::ProcessInstance));
                }
                findings.process_instance = Some(value.clone());
            }
            name => findings.underscores |= name.as_bytes().contains(&b'_'),
        }
    }
    Ok(findings)
}

/// `uri-host [ ":" port ]` (RFC 9110 §7.2): a name, an IPv4 address or a bracketed IPv6 address.
/// The comma that RFC 3986 §3.2.2 allows in a name is refused: it is how two hosts get joined.
fn inspect_host(value: &HeaderValue) -> Result<(), Failure> {
    const BAD: Failure = Failure::Bad(BadRequest::Host);
    let bytes = value.as_bytes();
    if bytes.is_empty() {
        return Err(Failure::EmptyHost);
    }
    let (name, port) = if bytes[0] == b'[' {
        let end = bytes.iter().position(|&byte| byte == b']').ok_or(BAD)?;
        let literal = std::str::from_utf8(&bytes[1..end]).map_err(|_| BAD)?;
        literal.parse::<std::net::Ipv6Addr>().map_err(|_| BAD)?;
        bytes.split_at(end + 1)
    } else {
        let end = bytes
            .iter()
            .position(|&byte| byte == b':')
            .unwrap_or(bytes.len());
        let (name, port) = bytes.split_at(end);
        if !is_reg_name(name) {
            return Err(BAD);
        }
        (name, port)
    };
    if name.is_empty() {
        return Err(Failure::EmptyHost);
    }
    if name.len() > MAX_HOST_LEN || !is_port(port) {
        return Err(BAD);
    }
    Ok(())
}

fn is_reg_name(name: &[u8]) -> bool {
    let mut rest = name;
    while let Some((&first, tail)) = rest.split_first() {
        rest = match (first, tail) {
            (b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'-' | b'_' | b'~', tail) => tail,
            (b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b';' | b'=', tail) => tail,
            (b'%', [high, low, tail @ ..])
                if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
            {
                tail
            }
            _ => return false,
        };
    }
    true
}

/// A UUID in lower case, `:` and a number, which may be left out unless `indexed`.
fn is_instance(value: &HeaderValue, indexed: bool) -> bool {
    let (id, index) = split_instance(value);
    let is_uuid = id.len() == 36
        && id.iter().enumerate().all(|(i, byte)| match i {
            8 | 13 | 18 | 23 => *byte == b'-',
            _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
        });
    let is_index = |index: &[u8]| !index.is_empty() && index.iter().all(u8::is_ascii_digit);
    is_uuid && index.map_or(!indexed, is_index)
}

/// `ID:INDEX` or `ID`.
pub(super) fn split_instance(value: &HeaderValue) -> (&[u8], Option<&[u8]>) {
    let bytes = value.as_bytes();
    match bytes.iter().position(|&byte| byte == b':') {
        Some(colon) => (&bytes[..colon], Some(&bytes[colon + 1..])),
        None => (bytes, None),
    }
}

/// Empty, or `:` and at most five digits up to 65535, possibly none (RFC 3986 §3.2.3).
fn is_port(port: &[u8]) -> bool {
    let Some((&colon, digits)) = port.split_first() else {
        return true;
    };
    let value = digits.iter().try_fold(0_u32, |value, digit| {
        let digit = char::from(*digit).to_digit(10)?;
        (value <= 65_535).then_some(value * 10 + digit)
    });
    colon == b':' && digits.len() <= 5 && value.is_some_and(|value| value <= 65_535)
}

/// `chunked`, alone: any other list of codings is read differently by different servers.
fn inspect_transfer_encoding(value: &HeaderValue) -> Result<(), Failure> {
    if value.as_bytes().eq_ignore_ascii_case(b"chunked") {
        return Ok(());
    }
    let token = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
    let codings = value.to_str().unwrap_or("");
    let well_formed = codings.split(',').all(|coding| {
        let coding = coding.trim_matches([' ', '\t']);
        !coding.is_empty() && coding.bytes().all(|byte| token(&byte))
    });
    let only_last_is_chunked = codings
        .rsplit(',')
        .enumerate()
        .all(|(i, coding)| coding.trim().eq_ignore_ascii_case("chunked") == (i == 0));
    Err(if well_formed && only_last_is_chunked {
        Failure::TransferCoding
    } else {
        Failure::Bad(BadRequest::TransferEncoding)
    })
}

fn inspect_target<B>(
    request: &Request<B>,
    uri_bytes: usize,
    findings: &mut Findings,
) -> Result<(), Failure> {
    let method = request.method();
    if *method == Method::TRACE {
        return Err(Failure::MethodNotAllowed);
    }
    if *method == Method::CONNECT {
        let protocol = request.extensions().get::<hyper::ext::Protocol>();
        if protocol.is_none_or(|protocol| protocol.as_str() != "websocket") {
            return Err(Failure::MethodNotAllowed);
        }
        findings.upgrade = true;
        findings.extended_connect = true;
    }
    let uri = request.uri();
    let target = uri.path_and_query().map_or("", |target| target.as_str());
    if target.len() > uri_bytes {
        return Err(Failure::UriTooLong);
    }
    if uri.scheme().is_some() || uri.authority().is_some() {
        inspect_absolute_form(request, findings)?;
    }
    let Some(host) = &findings.host else {
        return Err(Failure::EmptyHost);
    };
    debug_assert!(!host.is_empty(), "an empty Host was refused");
    if target == "*" {
        findings.options_asterisk = *method == Method::OPTIONS;
        return if findings.options_asterisk {
            Ok(())
        } else {
            Err(bad_target())
        };
    }
    let path = uri.path();
    if !path.starts_with('/') || contains_nul(path) {
        return Err(bad_target());
    }
    Ok(())
}

/// `http://authority/path` (RFC 9112 §3.2.2), and what HTTP/2 and HTTP/3 have in their pseudo-header fields
/// (RFC 9113 §8.3.1, RFC 9114 §4.3.1). The authority must be the `Host`, so that no later reader prefers the
/// other one; without a `Host`, which these do not need, it is the host.
fn inspect_absolute_form<B>(request: &Request<B>, findings: &mut Findings) -> Result<(), Failure> {
    let uri = request.uri();
    let multiplexed = is_multiplexed(request.version());
    let scheme = uri.scheme().ok_or_else(bad_target)?;
    if *scheme != Scheme::HTTP && !(multiplexed && *scheme == Scheme::HTTPS) {
        return Err(bad_target());
    }
    let authority = uri.authority().ok_or_else(bad_target)?.as_str();
    if authority.contains('@') {
        return Err(bad_target());
    }
    match &findings.host {
        Some(host) if !host.as_bytes().eq_ignore_ascii_case(authority.as_bytes()) => {
            Err(Failure::Bad(BadRequest::AuthorityMismatch))
        }
        None if multiplexed => {
            let host = HeaderValue::from_str(authority).map_err(|_| bad_target())?;
            inspect_host(&host)?;
            findings.host = Some(host);
            Ok(())
        }
        _ => Ok(()),
    }
}

fn bad_target() -> Failure {
    Failure::Bad(BadRequest::Target)
}

fn contains_nul(path: &str) -> bool {
    path.as_bytes().windows(3).any(|window| window == b"%00")
}

/// RFC 9110 §7.8, narrowed to what can be tunnelled without doubt about where the request ends.
fn may_upgrade<B>(request: &Request<B>) -> bool {
    let headers = request.headers();
    let no_body = !headers.contains_key(http::header::TRANSFER_ENCODING)
        && headers
            .get(http::header::CONTENT_LENGTH)
            .is_none_or(|length| length.as_bytes() == b"0");
    let asked = headers
        .get_all(http::header::CONNECTION)
        .iter()
        .any(|value| has_token(value, "upgrade"));
    let mut protocols = headers.get_all(http::header::UPGRADE).iter();
    let one = protocols.next().is_some_and(|protocol| {
        let protocol = protocol.as_bytes();
        // h2c would open a second HTTP connection inside the first, past every check here.
        let http2 = protocol
            .get(..2)
            .is_some_and(|start| start.eq_ignore_ascii_case(b"h2"))
            || protocol
                .get(..4)
                .is_some_and(|start| start.eq_ignore_ascii_case(b"http"));
        !protocol.is_empty() && !protocol.contains(&b',') && !http2
    });
    request.method() == Method::GET
        && request.version() == Version::HTTP_11
        && no_body
        && asked
        && one
        && protocols.next().is_none()
}

/// Whether a `Connection` value names no header.
pub(super) fn is_plain_connection(value: &HeaderValue) -> bool {
    let value = value.as_bytes();
    value.eq_ignore_ascii_case(b"keep-alive") || value.eq_ignore_ascii_case(b"close")
}

/// Whether a comma-separated header value has the token, in any case.
pub(super) fn has_token(value: &HeaderValue, token: &str) -> bool {
    value
        .as_bytes()
        .split(|&byte| byte == b',')
        .any(|item| item.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

#[cfg(test)]
mod tests;
