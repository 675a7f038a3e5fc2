use proptest::prelude::*;

use super::*;

fn ranges() -> Vec<IpNet> {
    vec![
        "192.0.2.0/24".parse().unwrap(),
        "2001:db8::/64".parse().unwrap(),
    ]
}

fn accepted(json: &str) -> Registration {
    match register(json.as_bytes(), &ranges()) {
        Ok(registration) => registration,
        Err(reject) => panic!("{json}: {reject}"),
    }
}

#[track_caller]
fn refused(payload: &[u8], reason: Reason, part: &str) {
    let reject = register(payload, &ranges()).unwrap_err();
    assert_eq!(reject.reason, reason, "{reject}");
    let text = reject.to_string();
    assert!(text.contains(part), "{text:?} lacks {part:?}");
    assert!(text.len() < 1000, "{} bytes", text.len());
}

fn routes(registration: &Registration) -> Vec<String> {
    registration
        .routes
        .iter()
        .map(|route| route.to_string())
        .collect()
}

#[test]
fn every_field_is_read() {
    let registration = accepted(
        r#"{"host":"10.0.0.1","port":1,"tls_port":8443,"uris":["A.example.com/Path/?q"],
        "vips":["tcp/192.0.2.10:9090","udp/[2001:db8::10]:53"],"weight":7,"app":"a",
        "private_instance_id":"i","private_instance_index":"3","stale_threshold_in_seconds":60,
        "isolation_segment":"s","server_cert_domain_san":"san","route_service_url":"https://r",
        "tags":{"component":"c","none":null},"protocol":"http2","availability_zone":"z",
        "endpoint_updated_at_ns":1,"options":{"loadbalancing":"least-connection"}}"#,
    );
    assert_eq!(
        routes(&registration),
        [
            "a.example.com/path",
            "tcp/192.0.2.10:9090",
            "udp/[2001:db8::10]:53"
        ]
    );
    let backend = &registration.backend;
    assert_eq!(backend.address, "10.0.0.1:8443".parse().unwrap());
    assert_eq!(backend.weight, 7);
    assert_eq!(backend.tls().unwrap().server_name.as_deref(), Some("san"));
    assert_eq!(backend.protocol, HttpProtocol::Http2);
    assert_eq!(backend.instance().app.as_deref(), Some("a"));
    assert_eq!(backend.instance().id.as_deref(), Some("i"));
    assert_eq!(backend.instance().index.as_deref(), Some("3"));
    assert_eq!(backend.instance().availability_zone.as_deref(), Some("z"));
    assert_eq!(backend.instance().isolation_segment.as_deref(), Some("s"));
    assert_eq!(
        backend
            .instance()
            .tags
            .get("component")
            .map(|value| &**value),
        Some("c")
    );
    assert_eq!(
        backend.instance().tags.get("none").map(|value| &**value),
        Some("")
    );
    assert_eq!(registration.stale_after, Some(Duration::from_secs(60)));
    assert_eq!(registration.balance, Some(Balance::LeastConnections));
    assert_eq!(registration.route_service_url.as_deref(), Some("https://r"));
}

#[test]
fn hashing_is_by_a_header_and_bounded_by_a_number_or_a_string_of_one() {
    for (balance, percent) in [
        ("null", None),
        ("0", None),
        (r#""""#, None),
        (r#""0""#, None),
        ("1.1", Some(110)),
        (r#""1.25""#, Some(125)),
        ("10", Some(1000)),
    ] {
        let registration = accepted(&format!(
            r#"{{"host":"10.0.0.1","port":80,"uris":["a"],"options":
                {{"loadbalancing":"hash","hash_header":"X-User","Hash_Balance":{balance}}}}}"#
        ));
        let wanted = HashKey {
            of: HashOf::Header("x-user".into()),
            balance_percent: percent,
        };
        assert_eq!(
            registration.balance,
            Some(Balance::Hash(Arc::new(wanted))),
            "{balance}"
        );
    }
}

#[test]
fn the_shortest_message_gets_the_defaults() {
    let registration = accepted(r#"{"host":"10.0.0.1","port":80,"uris":["a"]}"#);
    assert_eq!(registration.backend.weight, DEFAULT_WEIGHT);
    assert_eq!(registration.backend.tls(), None);
    assert_eq!(registration.backend.protocol, HttpProtocol::Http1);
    assert_eq!(
        (registration.stale_after, registration.balance),
        (None, None)
    );
}

#[test]
fn json_is_read_as_leniently_as_go_reads_it() {
    for json in [
        r#"{"HOST":"10.0.0.1","Port":80,"URIS":["a"]}"#,
        r#"{"host":"10.0.0.1","port":80,"uris":["a"],"dea":{"x":[1,{}]},"more":null}"#,
        r#"{"host":"10.0.0.1","port":80,"uris":["a"],"tls_port":null,"tags":null,"options":null,
            "app":null,"vips":null,"weight":null,"stale_threshold_in_seconds":null}"#,
        r#"{"host":"127.0.0.1","port":1,"host":"10.0.0.1","port":80,"port":null,"uris":["a"]}"#,
        r#"{"host":"10.0.0.1","port":80,"uris":["\u0061"],"protocol":"spdy"}"#,
        r#" {"host":"10.0.0.1","tls_port":0,"port":80,"uris":["a"],"options":{"loadbalancing":"x"}} "#,
    ] {
        let registration = accepted(json);
        assert_eq!(
            registration.backend.address,
            "10.0.0.1:80".parse().unwrap(),
            "{json}"
        );
        assert_eq!(routes(&registration), ["a"], "{json}");
        assert_eq!(registration.balance, None);
    }
}

#[test]
fn a_bad_message_is_refused_by_the_name_of_its_field() {
    for (json, reason, part) in [
        ("", Reason::Syntax, "EOF"),
        ("null", Reason::Type, "expected an object"),
        ("[]", Reason::Type, "expected an object"),
        ("{}", Reason::Host, "host: missing"),
        (r#"{"host":"10.0.0.1","#, Reason::Syntax, "EOF"),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":["a"]} x"#,
            Reason::Syntax,
            "trailing",
        ),
        (
            r#"{"host":"10.0.0.1","port":"123","uris":["a"]}"#,
            Reason::Type,
            r#"port: invalid type: string "123", expected u16"#,
        ),
        (
            r#"{"host":"10.0.0.1","port":65536,"uris":["a"]}"#,
            Reason::Type,
            "port: invalid value",
        ),
        (
            r#"{"host":"10.0.0.1","port":-1,"uris":["a"]}"#,
            Reason::Type,
            "port: invalid value",
        ),
        (
            r#"{"host":"10.0.0.1","port":80.0,"uris":["a"]}"#,
            Reason::Type,
            "port: invalid type",
        ),
        (
            r#"{"host":"10.0.0.1","port":0,"uris":["a"]}"#,
            Reason::Port,
            "port: 0",
        ),
        (
            r#"{"host":"10.0.0.1","uris":["a"]}"#,
            Reason::Port,
            "port: missing",
        ),
        (
            r#"{"host":5,"port":80,"uris":["a"]}"#,
            Reason::Type,
            "host: invalid type",
        ),
        (
            r#"{"host":"","port":80,"uris":["a"]}"#,
            Reason::Host,
            "is not an IP address",
        ),
        (
            r#"{"host":"app.internal","port":80,"uris":["a"]}"#,
            Reason::Host,
            "\"app.internal\"",
        ),
        (
            r#"{"host":"0.0.0.0","port":80,"uris":["a"]}"#,
            Reason::Host,
            "0.0.0.0",
        ),
        (r#"{"host":"10.0.0.1","port":80}"#, Reason::NoRoute, "uris"),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":[]}"#,
            Reason::NoRoute,
            "uris",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":"a"}"#,
            Reason::Type,
            "uris: invalid type",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":["a",7]}"#,
            Reason::Type,
            "uris: invalid type",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":["a","","b"]}"#,
            Reason::Uri,
            "uris[1]: \"\"",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":["a","b","/"]}"#,
            Reason::Uri,
            "uris[2]",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"vips":["192.0.2.1:80"]}"#,
            Reason::Vip,
            "vips[0]",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"vips":["tcp/192.0.2.1:0"]}"#,
            Reason::Vip,
            "vips[0]",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":["a"],"vips":["tcp/192.0.2.1:80","tcp/10.9.9.9:80"]}"#,
            Reason::VipRange,
            "vips[1]",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":["a"],"weight":-1}"#,
            Reason::Weight,
            "weight: -1",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":["a"],"weight":1001}"#,
            Reason::Weight,
            "1001",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":["a"],"weight":"1"}"#,
            Reason::Type,
            "weight",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":["a"],"tags":{"a":1}}"#,
            Reason::Type,
            "tags",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":["a"],"options":5}"#,
            Reason::Type,
            "options",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":["a"],"route_service_url":"http://x"}"#,
            Reason::RouteServiceUrl,
            "route_service_url",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":["a"],"options":{"loadbalancing":"hash"}}"#,
            Reason::Options,
            "options.hash_header",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":["a"],
                "options":{"loadbalancing":"hash","hash_header":"x","hash_balance":1.05}}"#,
            Reason::Options,
            "options.hash_balance",
        ),
        (
            r#"{"host":"10.0.0.1","port":80,"uris":["a"],"options":{"hash_balance":"much"}}"#,
            Reason::Type,
            "options",
        ),
    ] {
        refused(json.as_bytes(), reason, part);
    }
}

#[test]
fn every_vip_is_refused_while_there_are_no_ranges() {
    let json = br#"{"host":"10.0.0.1","port":80,"vips":["tcp/192.0.2.1:80"]}"#;
    assert_eq!(register(json, &[]).unwrap_err().reason, Reason::VipRange);
    assert_eq!(unregister(json).unwrap().0.routes.len(), 1);
}

#[test]
fn absurd_sizes_are_refused() {
    let with = |field: &str, value: String| {
        format!(r#"{{"host":"10.0.0.1","port":80,"uris":["a"],"{field}":{value}}}"#)
    };
    let long = "x".repeat(1_000_000);
    let many = |n: usize| format!("[{}]", vec!["\"a\""; n].join(","));
    refused(
        with("host", format!("\"{long}\"")).as_bytes(),
        Reason::Host,
        "host: ",
    );
    refused(
        with("port", format!("\"{long}\"")).as_bytes(),
        Reason::Type,
        "port: ",
    );
    refused(
        with("uris", format!("[\"{long}\"]")).as_bytes(),
        Reason::Uri,
        "253",
    );
    refused(
        with("uris", format!("[\"a/{long}\"]")).as_bytes(),
        Reason::Uri,
        "2048",
    );
    refused(
        with("vips", format!("[\"{long}\"]")).as_bytes(),
        Reason::Vip,
        "vips[0]",
    );
    refused(
        with("app", format!("\"{long}\"")).as_bytes(),
        Reason::TooLong,
        "app",
    );
    refused(
        with("uris", many(MAX_ROUTES + 1)).as_bytes(),
        Reason::TooLong,
        "uris: 1025",
    );
    refused(
        with("vips", many(MAX_ROUTES + 1)).as_bytes(),
        Reason::TooLong,
        "vips: 1025",
    );
    refused(&vec![b' '; MAX_MESSAGE_BYTES + 1], Reason::Size, "1048577");
    accepted(&with("uris", many(MAX_ROUTES)));
    accepted(&with("ignored", format!("\"{long}\"")));
}

#[test]
fn deep_nesting_and_bytes_that_are_not_text_are_refused() {
    let deep = format!(r#"{{"tags":{}"#, "[".repeat(500_000));
    refused(deep.as_bytes(), Reason::Type, "tags");
    let deep = format!(r#"{{"x":{}"#, "[".repeat(500_000));
    refused(deep.as_bytes(), Reason::Syntax, "");
    refused(
        b"{\"host\":\"10.0.0.1\xff\",\"port\":80,\"uris\":[\"a\"]}",
        Reason::Syntax,
        "host",
    );
    refused(b"\xff\xfe\x00", Reason::Syntax, "");
}

#[test]
fn uris_are_normalised() {
    for (uri, wanted) in [
        ("Slash.x/", "slash.x"),
        ("/slash.x", "slash.x"),
        ("q.x/p?z=1", "q.x/p"),
        ("q.x?z=/", "q.x"),
        ("a.x/B/C/", "a.x/b/c"),
        ("a.x//", "a.x"),
        ("a.x.", "a.x"),
        ("*.wild.x/p", "*.wild.x/p"),
        ("a_b-c.x/%2F/..", "a_b-c.x/%2f/.."),
        ("10.0.0.1", "10.0.0.1"),
    ] {
        assert_eq!(parse_uri(uri).unwrap().to_string(), wanted);
    }
}

#[test]
fn a_host_that_cannot_be_one_is_refused() {
    let label = "a".repeat(64);
    let long = ["a".repeat(63).as_str(); 4].join(".") + ".x";
    for uri in [
        "", "/", "//a", "?x", ".", "a..b", ".a", "*", "*.", "a.*.b", "*a.b", "**.b", "a b", "a:80",
        "[::1]", "é.x", "a/\u{7f}", "a/b c", "a/é", "http://a", &label, &long,
    ] {
        assert!(parse_uri(uri).is_err(), "{uri:?}");
    }
}

#[test]
fn ipv6_backends_may_be_bracketed() {
    for host in ["[2001:db8::1]", "2001:db8::1"] {
        let json = format!(r#"{{"host":"{host}","port":80,"uris":["a"]}}"#);
        assert_eq!(
            accepted(&json).backend.address,
            "[2001:db8::1]:80".parse().unwrap()
        );
    }
}

#[test]
fn lifetimes_are_held_to_the_minimum() {
    for (seconds, wanted) in [
        ("0", None),
        ("-5", Some(1)),
        ("1", Some(1)),
        ("9223372036854775807", Some(u64::MAX / 2)),
    ] {
        let json = format!(
            r#"{{"host":"10.0.0.1","port":80,"uris":["a"],"stale_threshold_in_seconds":{seconds}}}"#
        );
        assert_eq!(accepted(&json).stale_after, wanted.map(Duration::from_secs));
    }
}

#[test]
fn unregister_needs_only_address_and_routes() {
    let json = br#"{"host":"10.0.0.1","tls_port":443,"uris":["A.x/"],"weight":0,"app":5}"#;
    assert_eq!(unregister(json).unwrap_err().reason, Reason::Type);
    let json = br#"{"host":"10.0.0.1","tls_port":443,"uris":["A.x/"],"weight":0}"#;
    let (gone, segment) = unregister(json).unwrap();
    assert_eq!((segment, &gone.instance_id), (None, &None));
    assert_eq!(gone.address, "10.0.0.1:443".parse().unwrap());
    assert_eq!(gone.routes.len(), 1);
}

#[test]
fn unregister_says_the_instance_and_its_segment() {
    let json = br#"{"host":"10.0.0.1","port":80,"uris":["a.x"],"private_instance_id":"i",
        "isolation_segment":"s"}"#;
    let (gone, segment) = unregister(json).unwrap();
    assert_eq!(gone.instance_id.as_deref(), Some("i"));
    assert_eq!(segment.as_deref(), Some("s"));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = register(&payload, &ranges());
        let _ = unregister(&payload);
    }

    #[test]
    fn no_broken_message_makes_it_panic(at in 0usize..200, byte: u8) {
        let mut payload = br#"{"host":"10.0.0.1","port":80,"tls_port":81,"uris":["*.a.x/b"],"vips":["tcp/192.0.2.1:80"],"weight":5,"tags":{"a":"b"},"options":{"loadbalancing":"round-robin"},"stale_threshold_in_seconds":9}"#.to_vec();
        let at = at % payload.len();
        payload[at] = byte;
        if let Ok(registration) = register(&payload, &ranges()) {
            prop_assert!(registration.backend.address.port() != 0);
            prop_assert!(!registration.routes.is_empty());
        }
        payload.truncate(at);
        let _ = register(&payload, &ranges());
    }

    #[test]
    fn what_is_normal_stays_as_it_is(uri in "[a-zA-Z0-9*./?_-]{0,40}") {
        if let Ok(http) = parse_uri(&uri) {
            prop_assert_eq!(parse_uri(&http.to_string()).unwrap(), http);
        }
    }
}
