//! The targets of [`crate::fuzzing`] that only layer 7 can reach.

use std::sync::{Arc, LazyLock};

use http::header::{CONNECTION, HOST, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Uri, Version};

use crate::config::{BackendProxyProtocol, ClientCertFormat, HttpLimits, HttpSticky};
use crate::l7::client_cert::{self, ClientCertHeader};
use crate::l7::headers::{self, Origin};
#[cfg(feature = "http3")]
use crate::l7::http3::frames::{Frames, Piece, TooLong};
use crate::l7::informational;
use crate::l7::proxy_protocol::{self, Addresses, Parsed};
use crate::l7::router::{self, Lookup};
use crate::l7::{sticky, validate};
use crate::snapshot::Snapshot;

/// A client's certificate in DER, as `X-Forwarded-Client-Cert` tells of it.
pub fn certificate(bytes: &[u8]) {
    for format in [ClientCertFormat::Base64, ClientCertFormat::HashSubject] {
        let value = client_cert::value(format, bytes);
        assert!(value.to_str().is_ok(), "{value:?}");
        let quotes = value
            .as_bytes()
            .iter()
            .filter(|&&byte| byte == b'"')
            .count();
        assert!(format == ClientCertFormat::Base64 || quotes >= 2);
    }
}

/// The first bytes of a connection.
pub fn proxy_protocol(bytes: &[u8]) {
    let Parsed::Header { len, addresses } = proxy_protocol::parse(bytes) else {
        return;
    };
    assert!(len > 0);
    // Whoever reads a byte at a time comes to the same.
    let header = &bytes[..len.min(bytes.len())];
    for end in 0..header.len() {
        match proxy_protocol::parse(&header[..end]) {
            Parsed::Incomplete => {}
            parsed => assert_eq!(parsed, Parsed::Header { len, addresses }, "after {end}"),
        }
    }
    let Addresses::Of {
        source,
        destination,
    } = addresses
    else {
        return;
    };
    for version in [BackendProxyProtocol::V1, BackendProxyProtocol::V2] {
        let written = proxy_protocol::header(version, source, destination);
        let written = written.expect("a version is given");
        let Parsed::Header { len, addresses } = proxy_protocol::parse(&written) else {
            panic!("{written:?} is no header");
        };
        assert_eq!(len, written.len());
        let Addresses::Of {
            source: from,
            destination: to,
        } = addresses
        else {
            panic!("{written:?} has no addresses");
        };
        let same = from.ip().to_canonical() == source.ip().to_canonical()
            && to.ip().to_canonical() == destination.ip().to_canonical();
        assert!(same && (from.port(), to.port()) == (source.port(), destination.port()));
    }
}

/// A stream of HTTP/3: the first byte says of what kind, and how long its frames may be.
#[cfg(feature = "http3")]
pub fn http3_frames(bytes: &[u8]) {
    let Some((first, stream)) = bytes.split_first() else {
        return;
    };
    let max_len = u64::from(first >> 1);
    let frames = || match first & 1 {
        0 => Frames::of_request(max_len),
        _ => Frames::of_control(max_len),
    };
    let (mut at_once, mut by_byte) = (frames(), frames());
    let whole = at_once.read(stream);
    let mut sum = Piece::default();
    for byte in stream.chunks(1) {
        let Ok(piece) = by_byte.read(byte) else {
            assert_eq!(whole, Err(TooLong));
            return;
        };
        sum.data_len += piece.data_len;
        sum.empty_data += piece.empty_data;
        sum.useful += piece.useful;
        sum.other += piece.other;
    }
    assert_eq!(whole, Ok(sum));
    assert_eq!(at_once.is_whole(), by_byte.is_whole());
    assert!(sum.data_len <= stream.len());
}

/// What a backend sends before its response.
pub fn interim(bytes: &[u8]) {
    let passed = informational::passed(bytes);
    // It is read as what it is, whole, and passes once more as it is.
    assert_eq!(informational::passed(&passed), passed);
    let mut rest = &passed[..];
    while !rest.is_empty() {
        assert!(rest.starts_with(b"HTTP/1.1 1") && !rest.starts_with(b"HTTP/1.1 101"));
        let end = rest.windows(4).position(|it| it == b"\r\n\r\n");
        let (head, behind) = rest.split_at(end.expect("a head ends") + 4);
        let head = head.to_ascii_lowercase();
        for name in ["content-length:", "transfer-encoding:", "connection:"] {
            let line = format!("\r\n{name}").into_bytes();
            assert!(!head.windows(line.len()).any(|it| it == line), "{name}");
        }
        rest = behind;
    }
}

/// Headers, one a line, of a request and its response alike: sessions by cookies.
pub fn cookies(bytes: &[u8]) {
    let headers = header_lines(bytes);
    let config = HttpSticky {
        auth_negotiate: true,
        ..HttpSticky::default()
    };
    let session = sticky::session(&headers, &config);
    if let Some(session) = &session {
        let text = session.instance.as_bytes();
        assert!(text.is_ascii() && !text.contains(&b';') && !text.contains(&b' '));
    }
    for instance in [
        None,
        Some("instance-1"),
        session.as_ref().map(|s| &*s.instance),
    ] {
        let path = || "/path".to_owned();
        let set = sticky::set_cookie(&headers, session.as_ref(), instance, path, &config);
        if let Some(set) = set {
            // Nothing but the attributes we write gets in.
            let text = set.to_str().expect("a cookie is visible ASCII");
            assert!(text.starts_with("__VCAP_ID__="), "{text}");
            assert!(text.contains("; Path=/path"), "{text}");
        }
    }
}

/// `METHOD TARGET`, with ` 2` behind it HTTP/2, and headers, one a line: what a backend gets of it.
pub fn request(bytes: &[u8]) {
    let Some(request) = read_request(bytes) else {
        return;
    };
    let limits = HttpLimits::default();
    let Ok(findings) = validate::inspect(&request, &limits) else {
        return;
    };
    let lookup = Lookup {
        host: findings.host_str(),
        path: request.uri().path(),
        query: request.uri().query(),
        method: request.method(),
        headers: request.headers(),
    };
    if let Ok(found) = router::find(&ROUTES, &lookup) {
        let host = findings.host_str().to_ascii_lowercase();
        let name = found.host.strip_prefix("*").unwrap_or(found.host);
        assert!(host.contains(name), "{host} is served by {}", found.host);
        assert!(found.path.is_empty() || request.uri().path().contains('/'));
    }
    let address = HeaderValue::from_static("192.0.2.9");
    for trusted in [false, true] {
        let origin = Origin {
            address: &address,
            client_cert: ClientCertHeader::Remove,
            secure: false,
            trusted,
            request_start: HeaderValue::from_static("1"),
            request_id: HeaderValue::from_static("id"),
            forwarded: crate::config::ForwardedHeader::Off,
            port: None,
            via: None,
        };
        let mut headers = request.headers().clone();
        headers::rewrite_request(&mut headers, &findings, &origin);
        check_rewritten(&headers, findings.upgrade, trusted);
        // Where HTTP/2 brings none, it is added for the backend.
        assert!(headers.get(HOST).is_none() || headers.get(HOST) == findings.host.as_ref());
        assert_eq!(
            headers.contains_key(HOST),
            request.headers().contains_key(HOST)
        );
    }
}

/// What holds of any request on its way to a backend.
fn check_rewritten(headers: &HeaderMap, upgrade: bool, trusted: bool) {
    for name in [TRANSFER_ENCODING, PROXY_AUTHORIZATION] {
        assert!(!headers.contains_key(&name), "{name} is of one hop");
    }
    assert_eq!(headers.contains_key(CONNECTION), upgrade);
    assert_eq!(headers.contains_key(UPGRADE), upgrade);
    assert!(headers.get(TE).is_none_or(|te| te == "trailers"));
    assert!(!headers.contains_key("x-forwarded-client-cert"));
    assert!(headers.keys().all(|name| !name.as_str().contains('_')));
    let clients: Vec<_> = headers.get_all("x-forwarded-for").iter().collect();
    assert_eq!(clients.len(), 1);
    match trusted {
        false => assert_eq!(clients[0], "192.0.2.9"),
        true => assert!(clients[0].as_bytes().ends_with(b"192.0.2.9")),
    }
    assert!(trusted || !headers.contains_key("forwarded"));
    assert!(headers.contains_key("x-request-id"));
}

static ROUTES: LazyLock<Snapshot> = LazyLock::new(|| {
    let mut snapshot = Snapshot::default();
    for (host, path) in [
        ("a.com", ""),
        ("a.com", "/a/b"),
        ("a.com", "/%61"),
        ("*.a.com", ""),
        ("*.b.a.com", "/a"),
        ("192.0.2.1", ""),
    ] {
        snapshot.hosts.add(host);
        let routes = snapshot.hosts.get_mut(host).expect("it was added");
        routes.insert(path.into(), None, Arc::default());
    }
    snapshot
});

fn read_request(bytes: &[u8]) -> Option<Request<()>> {
    let end = bytes.iter().position(|&byte| byte == b'\n');
    let (line, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
    let mut words = line.split(|&byte| byte == b' ');
    let method = http::Method::from_bytes(words.next()?).ok()?;
    let uri = Uri::try_from(words.next()?).ok()?;
    let version = match words.next() {
        Some(b"2") => Version::HTTP_2,
        _ => Version::HTTP_11,
    };
    let mut request = Request::new(());
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    *request.version_mut() = version;
    *request.headers_mut() = header_lines(rest);
    Some(request)
}

/// Lines of `name: value`; those that a parser of HTTP refuses are left out.
fn header_lines(bytes: &[u8]) -> HeaderMap {
    let lines = bytes.split(|&byte| byte == b'\n');
    let parsed = lines.filter_map(|line| {
        let colon = line.iter().position(|&byte| byte == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?;
        Some((name, value))
    });
    // Far more than a request may have.
    let mut headers = HeaderMap::new();
    for (name, value) in parsed.take(1000) {
        headers.append(name, value);
    }
    headers
}
