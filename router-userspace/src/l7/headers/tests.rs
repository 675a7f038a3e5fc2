use http::Request;

use super::*;
use crate::config::HttpLimits;
use crate::l7::validate;

/// Rewrites the headers of a request and returns them as sorted `name: value` lines, without those
/// that every request gets.
fn rewritten(headers: &[(&str, &str)], trusted: bool) -> Vec<String> {
    let mut request = Request::get("/").header("host", "a.com");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut request = request.body(()).unwrap();
    let findings = validate::inspect(&request, &HttpLimits::default()).unwrap();
    let origin = Origin {
        address: &HeaderValue::from_static("192.0.2.1"),
        client_cert: match trusted {
            true => ClientCertHeader::Keep,
            false => ClientCertHeader::Remove,
        },
        secure: false,
        trusted,
        request_start: HeaderValue::from_static("1000"),
        request_id: HeaderValue::from_static("id"),
        forwarded: ForwardedHeader::Off,
        port: None,
        via: None,
    };
    rewrite_request(request.headers_mut(), &findings, &origin);
    let mut lines: Vec<String> = request
        .headers()
        .iter()
        .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
        .collect();
    lines.sort();
    lines
}

const ALWAYS: [&str; 7] = [
    "host: a.com",
    "x-forwarded-for: 192.0.2.1",
    "x-forwarded-host: a.com",
    "x-forwarded-proto: http",
    "x-request-id: id",
    "x-request-start: 1000",
    "x-vcap-request-id: id",
];

#[track_caller]
fn check(headers: &[(&str, &str)], trusted: bool, changed: &[&str]) {
    let mut expected: Vec<String> = ALWAYS
        .iter()
        .filter(|line| {
            let name = line.split(": ").next().unwrap();
            !changed.iter().any(|other| other.starts_with(name))
        })
        .chain(changed)
        .map(|line| (*line).to_owned())
        .collect();
    expected.sort();
    assert_eq!(rewritten(headers, trusted), expected, "{headers:?}");
}

#[test]
fn every_request_is_told_where_it_comes_from() {
    check(&[], false, &[]);
}

#[test]
fn what_an_untrusted_client_says_of_its_way_is_replaced() {
    let spoofed = [
        ("x-forwarded-for", "203.0.113.9"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "b.com"),
        ("x-forwarded-port", "443"),
        ("x-forwarded-client-cert", "cert"),
        ("x-real-ip", "203.0.113.9"),
        ("forwarded", "for=203.0.113.9"),
        ("x-vcap-request-id", "mine"),
    ];
    check(&spoofed, false, &[]);
}

#[test]
fn what_a_trusted_proxy_says_is_kept_and_extended() {
    check(
        &[
            ("x-forwarded-for", "203.0.113.9"),
            ("x-forwarded-for", "203.0.113.10"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "b.com"),
            ("x-request-id", "{anything}"),
        ],
        true,
        &[
            "x-forwarded-for: 203.0.113.9, 203.0.113.10, 192.0.2.1",
            "x-forwarded-proto: https",
            "x-forwarded-host: b.com",
            "x-request-id: {anything}",
        ],
    );
}

#[test]
fn a_request_id_is_kept_if_it_is_sane() {
    check(
        &[("x-request-id", "abc-123")],
        false,
        &["x-request-id: abc-123"],
    );
    check(&[("x-request-id", "a b\"c")], false, &[]);
    check(&[("x-request-id", &"a".repeat(129))], false, &[]);
}

#[test]
fn a_request_start_is_kept() {
    check(&[("x-request-start", "5")], false, &["x-request-start: 5"]);
}

#[test]
fn hop_by_hop_headers_end_here() {
    check(
        &[
            ("connection", "keep-alive, x-mine"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("proxy-authorization", "secret"),
            ("te", "gzip, trailers"),
            ("upgrade", "h2c"),
            ("http2-settings", "AAMAAABkAARAAAAAAAIAAAAA"),
        ],
        false,
        &["te: trailers"],
    );
}

#[test]
fn connection_cannot_remove_what_is_end_to_end() {
    let kept = [
        ("authorization", "secret"),
        ("cookie", "a=b"),
        ("x-cf-thing", "1"),
    ];
    let mut headers = vec![(
        "connection",
        "close, Authorization, Cookie, X-Forwarded-For, X-Cf-Thing",
    )];
    headers.extend(kept);
    check(
        &headers,
        false,
        &["authorization: secret", "cookie: a=b", "x-cf-thing: 1"],
    );
}

#[test]
fn names_with_underscores_are_dropped() {
    check(
        &[("x_forwarded_for", "203.0.113.9"), ("content_length", "5")],
        false,
        &[],
    );
}

#[test]
fn an_upgrade_is_passed_on_alone() {
    check(
        &[
            ("connection", "Upgrade, x-mine"),
            ("upgrade", "websocket"),
            ("x-mine", "1"),
        ],
        false,
        &["connection: upgrade", "upgrade: websocket"],
    );
}

#[test]
fn an_instance_is_named_by_the_gateway_alone() {
    let mut headers = HeaderMap::new();
    headers.insert(APPLICATION_ID, HeaderValue::from_static("spoofed"));
    headers.insert(INSTANCE_INDEX, HeaderValue::from_static("spoofed"));
    let instance = InstanceHeaders {
        app: Some(HeaderValue::from_static("app")),
        id: Some(HeaderValue::from_static("instance")),
        index: None,
    };
    set_instance(&mut headers, &instance);
    assert_eq!(headers[APPLICATION_ID], "app");
    assert_eq!(headers[INSTANCE_ID], "instance");
    assert!(!headers.contains_key(INSTANCE_INDEX));
}

#[test]
fn a_response_loses_its_hop_by_hop_headers_and_keeps_its_own_request_id() {
    let mut headers = HeaderMap::new();
    headers.insert("connection", HeaderValue::from_static("close, x-mine"));
    headers.insert("x-mine", HeaderValue::from_static("1"));
    headers.insert("transfer-encoding", HeaderValue::from_static("chunked"));
    headers.insert("upgrade", HeaderValue::from_static("h2c"));
    headers.insert(VCAP_REQUEST_ID, HeaderValue::from_static("app's"));
    rewrite_response(&mut headers, HeaderValue::from_static("id"), false, false);
    assert_eq!(headers.len(), 1);
    assert_eq!(headers[VCAP_REQUEST_ID], "app's");
}

/// `Forwarded`, `X-Forwarded-Port` and `Via` of a request that had these.
fn told(
    headers: &[(&str, &str)],
    trusted: bool,
    forwarded: ForwardedHeader,
    address: &str,
) -> Vec<String> {
    let mut request = Request::get("/").header("host", "a.com:81");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut request = request.body(()).unwrap();
    let findings = validate::inspect(&request, &HttpLimits::default()).unwrap();
    let origin = Origin {
        address: &address.parse().unwrap(),
        client_cert: ClientCertHeader::Keep,
        secure: true,
        trusted,
        request_start: HeaderValue::from_static("1000"),
        request_id: HeaderValue::from_static("id"),
        forwarded,
        port: Some(443),
        via: Some(Via::new("gate").by(Version::HTTP_2)),
    };
    rewrite_request(request.headers_mut(), &findings, &origin);
    let headers = request.headers();
    [FORWARDED, FORWARDED_PORT, VIA]
        .iter()
        .flat_map(|name| headers.get_all(name))
        .map(|value| value.to_str().unwrap().to_owned())
        .collect()
}

#[test]
fn the_way_is_told_in_the_words_of_rfc_7239_if_asked_for() {
    let came = [
        ("forwarded", "for=203.0.113.9"),
        ("x-forwarded-port", "8443"),
        ("via", "1.1 other"),
    ];
    let ours = "for=192.0.2.1;host=\"a.com:81\";proto=https";
    let told = |trusted, forwarded| told(&came, trusted, forwarded, "192.0.2.1");
    let via = ["1.1 other", "2.0 gate"];
    let with_via = |rest: &[&'static str]| [rest, &via].concat();
    assert_eq!(told(false, ForwardedHeader::Off), with_via(&["443"]));
    assert_eq!(
        told(false, ForwardedHeader::Append),
        with_via(&[ours, "443"])
    );
    assert_eq!(
        told(true, ForwardedHeader::Off),
        with_via(&["for=203.0.113.9", "8443"])
    );
    assert_eq!(
        told(true, ForwardedHeader::Append),
        with_via(&["for=203.0.113.9", ours, "8443"])
    );
    assert_eq!(
        told(true, ForwardedHeader::Replace),
        with_via(&[ours, "8443"])
    );
}

#[test]
fn an_ipv6_client_is_quoted_in_forwarded() {
    let lines = told(&[], false, ForwardedHeader::Replace, "2001:db8::1");
    assert_eq!(
        lines[0],
        "for=\"[2001:db8::1]\";host=\"a.com:81\";proto=https"
    );
}
