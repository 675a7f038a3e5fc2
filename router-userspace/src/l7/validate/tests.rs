use proptest::prelude::*;

use super::*;

fn inspect_request(
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
) -> Result<Findings, Failure> {
    let mut request = Request::builder().method(method).uri(target);
    for (name, value) in headers {
        request = request.header(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
    }
    let limits = HttpLimits {
        uri_bytes: 64,
        ..HttpLimits::default()
    };
    inspect(&request.body(()).unwrap(), &limits)
}

#[track_caller]
fn check_host(host: &str, expected: Result<(), Failure>) {
    let found = inspect_request("GET", "/", &[("host", host)]).map(|_| ());
    assert_eq!(found, expected, "{host:?}");
}

#[test]
fn a_host_is_a_name_or_an_address_with_an_optional_port() {
    for host in [
        "a.com",
        "a.com:80",
        "a.com:",
        "A-b_c~1",
        "%41.com",
        "192.0.2.1:65535",
        "[::1]",
        "[::1]:80",
    ] {
        check_host(host, Ok(()));
    }
    for host in [
        "a@b",
        "a/b",
        "a b",
        "a, b",
        "a,b",
        "a.com:80:80",
        "a.com:x",
        "a.com:65536",
        "a.com:000080",
        "[::1",
        "[zz]",
        "[::1]x",
        "%zz",
        "a\\b",
        "a?b",
        "a#b",
        "\u{e4}.com",
    ] {
        check_host(host, Err(Failure::Bad(BadRequest::Host)));
    }
    check_host("", Err(Failure::EmptyHost));
    check_host(":80", Err(Failure::EmptyHost));
    check_host(&"a".repeat(255), Err(Failure::Bad(BadRequest::Host)));
}

#[test]
fn there_is_exactly_one_host() {
    let none = inspect_request("GET", "/", &[]);
    assert_eq!(none.unwrap_err(), Failure::EmptyHost);
    let two = inspect_request("GET", "/", &[("host", "a.com"), ("host", "a.com")]);
    assert_eq!(two.unwrap_err(), Failure::Bad(BadRequest::ManyHosts));
}

#[test]
fn chunked_is_the_only_transfer_coding() {
    let check = |values: &[&str], expected: Option<Failure>| {
        let mut headers = vec![("host", "a.com")];
        headers.extend(values.iter().map(|value| ("transfer-encoding", *value)));
        assert_eq!(
            inspect_request("POST", "/", &headers).err(),
            expected,
            "{values:?}"
        );
    };
    let bad = || Some(Failure::Bad(BadRequest::TransferEncoding));
    check(&["chunked"], None);
    check(&["Chunked"], None);
    check(&["gzip, chunked"], Some(Failure::TransferCoding));
    check(&["chunked", "chunked"], bad());
    check(&["chunked, chunked"], bad());
    check(&[",chunked"], bad());
    check(&["chunked,"], bad());
    check(&["gzip"], bad());
    check(&[""], bad());
}

#[test]
fn the_target_is_a_path_or_the_hosts_own_absolute_form() {
    let check = |method: &str, target: &str, expected: Option<Failure>| {
        let found = inspect_request(method, target, &[("host", "a.com")]);
        assert_eq!(found.err(), expected, "{method} {target}");
    };
    let bad = || Some(Failure::Bad(BadRequest::Target));
    check("GET", "/", None);
    check("GET", "/a/../b?c=/../..", None);
    check("GET", "http://a.com/x", None);
    check("GET", "http://A.com", None);
    check("OPTIONS", "*", None);
    check("GET", "*", bad());
    check("GET", "x", bad());
    check("GET", "https://a.com/", bad());
    check("GET", "ftp://a.com/", bad());
    check("GET", "http://user@a.com/", bad());
    check("GET", "/a%00b", bad());
    check(
        "GET",
        "http://b.com/",
        Some(Failure::Bad(BadRequest::AuthorityMismatch)),
    );
    check(
        "GET",
        &format!("/{}", "x".repeat(64)),
        Some(Failure::UriTooLong),
    );
    check("CONNECT", "a.com:80", Some(Failure::MethodNotAllowed));
    check("TRACE", "/", Some(Failure::MethodNotAllowed));
}

#[test]
fn only_100_continue_is_expected() {
    let expect = |value| inspect_request("POST", "/", &[("host", "a.com"), ("expect", value)]);
    assert!(expect("100-Continue").unwrap().expect);
    assert_eq!(expect("200-ok").unwrap_err(), Failure::Expectation);
}

#[test]
fn only_a_plain_get_may_upgrade() {
    let upgrades = |method: &str, headers: &[(&str, &str)]| {
        let mut all = vec![("host", "a.com")];
        all.extend(headers);
        inspect_request(method, "/", &all).unwrap().upgrade
    };
    let asks = ("connection", "keep-alive, Upgrade");
    let websocket = ("upgrade", "websocket");
    assert!(upgrades("GET", &[asks, websocket]));
    assert!(upgrades("GET", &[asks, websocket, ("content-length", "0")]));
    assert!(upgrades("GET", &[asks, ("upgrade", "tcp")]));
    assert!(!upgrades("POST", &[asks, websocket]));
    assert!(!upgrades("GET", &[websocket]));
    assert!(!upgrades("GET", &[asks]));
    assert!(!upgrades(
        "GET",
        &[asks, websocket, ("content-length", "5")]
    ));
    assert!(!upgrades(
        "GET",
        &[asks, websocket, ("transfer-encoding", "chunked")]
    ));
    for h2 in ["h2c", "H2C", "HTTP/2.0", "websocket, h2c", "h2"] {
        assert!(!upgrades("GET", &[asks, ("upgrade", h2)]), "{h2}");
    }
}

proptest! {
    #[test]
    fn any_host_bytes_are_judged(bytes in proptest::collection::vec(0x20_u8..=0xff, 0..64)) {
        if let Ok(value) = HeaderValue::from_bytes(&bytes) {
            let _ = inspect_host(&value);
        }
    }
}
