use std::time::Duration;

use http::StatusCode;

use super::*;
use crate::route::Balance;
use crate::route::policy::{HashKey, HashOf, PathRewrite, Rate};

fn read(text: &str) -> anyhow::Result<Announcement> {
    let route: DeclaredRoute = toml::from_str(text)?;
    route.read(Origin::File, &["192.0.2.0/24".parse()?])
}

/// The policy of a route that says no more than this.
fn policy(text: &str) -> HttpPolicy {
    let announcement = read(&format!("uris = [\"a.x\"]\n{text}")).unwrap();
    HttpPolicy::clone(&announcement.declarations[0].policy)
}

#[test]
fn a_route_of_backends_alone_declares_nothing() {
    let announcement =
        read("uris = [\"a.x\"]\nvips = [\"tcp/192.0.2.1:80\"]\nbackend = [{ address = \"10.0.0.1:80\" }]")
            .unwrap();
    assert!(announcement.declarations.is_empty());
    assert_eq!(announcement.registrations.len(), 1);
    assert_eq!(announcement.registrations[0].routes.len(), 2);
}

#[test]
fn conditions_are_part_of_the_match() {
    let text = r#"
        uris = ["a.x/p", "b.x"]
        methods = ["POST", "GET"]
        headers = { X-Canary = "yes", user-agent = { prefix = "curl/" }, x-debug = { present = true } }
        query = { preview = "1" }
        backend = [{ address = "10.0.0.1:80", zone = "z1", app = "a", instance_id = "i", instance_index = "0" }]
    "#;
    let announcement = read(text).unwrap();
    assert!(announcement.declarations.is_empty());
    let registration = &announcement.registrations[0];
    let routes: Vec<String> = registration
        .routes
        .iter()
        .map(ToString::to_string)
        .collect();
    let conditions = "GET|POST user-agent=curl/* x-canary=yes x-debug ?preview=1";
    assert_eq!(
        routes,
        [format!("a.x/p {conditions}"), format!("b.x {conditions}")]
    );
    let backend = &registration.backend;
    assert_eq!(
        (
            backend.instance().availability_zone.as_deref(),
            backend.instance().app.as_deref(),
            backend.instance().id.as_deref(),
            backend.instance().index.as_deref(),
        ),
        (Some("z1"), Some("a"), Some("i"), Some("0"))
    );
}

#[test]
fn every_table_of_a_policy_is_read() {
    let redirect = policy("redirect = { status = 308, scheme = \"https\", prefix = \"/\" }");
    let redirect = redirect.redirect.unwrap();
    assert_eq!(redirect.status, StatusCode::PERMANENT_REDIRECT);
    assert_eq!(redirect.scheme.as_deref(), Some("https"));
    assert_eq!(redirect.path, Some(PathRewrite::Prefix("".into())));
    let redirect = policy("redirect = { authority = \"b.x:8443\", path = \"/p\" }").redirect;
    let redirect = redirect.unwrap();
    assert_eq!(redirect.status, StatusCode::TEMPORARY_REDIRECT);
    assert_eq!(redirect.authority.as_deref(), Some("b.x:8443"));
    assert_eq!(redirect.path, Some(PathRewrite::Full("/p".into())));

    let rewrite = policy("rewrite = { host = \"b.x\", prefix = \"/v2/\" }").rewrite;
    assert_eq!(rewrite.host.unwrap(), "b.x");
    assert_eq!(rewrite.path, Some(PathRewrite::Prefix("/v2".into())));

    let edits = "{ remove = [\"Server\"], set = { x-a = \"1\" }, add = { set-cookie = \"a=b\" } }";
    let asked = policy(&format!(
        "request_headers = {edits}\nresponse_headers = {edits}"
    ));
    for edits in [asked.request_headers, asked.response_headers] {
        assert_eq!(edits.remove, ["server"]);
        assert_eq!(
            (edits.set[0].0.as_str(), edits.set[0].1.as_bytes()),
            ("x-a", &b"1"[..])
        );
        assert_eq!(edits.add[0].0.as_str(), "set-cookie");
    }

    let timeouts =
        policy("timeouts = { response_headers = \"5s\", body_idle = \"100ms\", total = \"1m\" }")
            .timeouts;
    assert_eq!(timeouts.response_headers, Some(Duration::from_secs(5)));
    assert_eq!(timeouts.body_idle, Some(Duration::from_millis(100)));
    assert_eq!(timeouts.total, Some(Duration::from_secs(60)));

    let retries = policy("retries = { attempts = 3, methods = [\"PUT\"] }").retries;
    assert_eq!(
        (retries.attempts, retries.methods),
        (Some(3), vec![Method::PUT])
    );

    let limits = policy(
        "[limits]\nrequest_body_bytes = 0\nrequests_per_backend = 2\nrequests = 3\n\
         rate = { per_second = 4 }\nclient_rate = { per_second = 5, burst = 6 }",
    )
    .limits;
    assert_eq!(limits.request_body_bytes, Some(0));
    assert_eq!(
        (limits.requests_per_backend, limits.requests),
        (Some(2), Some(3))
    );
    let rate = |per_second, burst| Some(Rate { per_second, burst });
    assert_eq!((limits.rate, limits.client_rate), (rate(4, 4), rate(5, 6)));

    assert!(policy("compression = true").compression);
    assert_eq!(
        policy("balance = \"least-connections\"").balance,
        Some(Balance::LeastConnections)
    );
    for (hash, of, balance_percent) in [
        ("header = \"X-User\"", HashOf::Header("x-user".into()), None),
        (
            "cookie = \"Session\", balance_percent = 125",
            HashOf::Cookie("Session".into()),
            Some(125),
        ),
        ("source = true", HashOf::Source, None),
    ] {
        let asked = policy(&format!("balance = \"hash\"\nhash = {{ {hash} }}"));
        let key = HashKey {
            of,
            balance_percent,
        };
        assert_eq!(asked.balance, Some(Balance::Hash(Arc::new(key))));
    }
}

#[test]
fn a_mistake_is_named_by_its_key() {
    let uris = "uris = [\"a.x\"]\n";
    let backend = "backend = [{ address = \"10.0.0.1:80\" }]\n";
    let many = |item: &str, count: usize| [item].repeat(count).join(",");
    for (text, part) in [
        (String::new(), "uris: neither"),
        (backend.to_owned(), "uris: neither"),
        (uris.to_owned(), "backend: missing"),
        (format!("{uris}methods = [\"GET\"]"), "backend: "),
        (
            format!("{uris}vips = [\"tcp/192.0.2.1:80\"]\ncompression = true"),
            "backend: vips",
        ),
        (
            format!("{uris}{backend}vips = [\"tcp/192.0.2.1:80\"]\nmethods = [\"GET\"]"),
            "vips: ",
        ),
        (
            format!("{backend}vips = [\"tcp/192.0.2.1:80\"]\ncompression = true"),
            "uris: missing",
        ),
        (
            format!("{backend}vips = [\"tcp/10.0.0.1:80\"]"),
            "vips[0]: ",
        ),
        (format!("uris = [{}]", many("\"a.x\"", 1025)), "uris: 1025"),
        (
            format!("{uris}methods = [{}]", many("\"GET\"", MAX_METHODS + 1)),
            "methods: 17",
        ),
        (format!("{uris}methods = [\"G T\"]"), "methods: \"G T\""),
        (
            format!("{uris}headers = {{ \"a b\" = \"1\" }}"),
            "headers.a b: ",
        ),
        (
            format!("{uris}headers = {{ X-A = \"1\", x-a = \"1\" }}"),
            "headers.x-a: named twice",
        ),
        (format!("{uris}headers = {{ x-a = 1 }}"), "headers"),
        (
            format!("{uris}headers = {{ x-a = \"\\n\" }}"),
            "headers.x-a: ",
        ),
        (
            format!("{uris}headers = {{ x-a = {{ prefix = \"\" }} }}"),
            "headers.x-a: ",
        ),
        (
            format!("{uris}headers = {{ x-a = {{ present = false }} }}"),
            "headers.x-a: ",
        ),
        (
            format!("{uris}query = {{ \"a&b\" = \"1\" }}"),
            "query.a&b: ",
        ),
        (format!("{uris}query = {{ a = \"b&c\" }}"), "query.a: "),
        (format!("{uris}redirect = {{}}"), "redirect: leads"),
        (
            format!("{uris}redirect = {{ status = 200, path = \"/\" }}"),
            "redirect.status: 200",
        ),
        (format!("{uris}redirect = {{ scheme = \"ftp\" }}"), "scheme"),
        (
            format!("{uris}redirect = {{ authority = \"u@a\" }}"),
            "redirect.authority: ",
        ),
        (
            format!("{uris}redirect = {{ authority = \"a:0\" }}"),
            "redirect.authority: ",
        ),
        (
            format!("{uris}redirect = {{ authority = \"a/b\" }}"),
            "redirect.authority: ",
        ),
        (
            format!("{uris}redirect = {{ path = \"/a\", prefix = \"/b\" }}"),
            "redirect: either",
        ),
        (
            format!("{uris}redirect = {{ path = \"//a\" }}"),
            "redirect.path: ",
        ),
        (
            format!("{uris}redirect = {{ path = \"/\\\\a\" }}"),
            "redirect.path: ",
        ),
        (
            format!("{uris}rewrite = {{ host = \"\" }}"),
            "rewrite.host: ",
        ),
        (
            format!("{uris}rewrite = {{ path = \"a\" }}"),
            "rewrite.path: ",
        ),
        (
            format!("{uris}rewrite = {{ path = \"/a?b\" }}"),
            "rewrite.path: ",
        ),
        (
            format!("{uris}rewrite = {{ prefix = \"/a/%2E./b\" }}"),
            "rewrite.prefix: ",
        ),
        (
            format!("{uris}request_headers = {{ set = {{ Host = \"b\" }} }}"),
            "request_headers.set.Host: changed by rewrite.host",
        ),
        (
            format!("{uris}response_headers = {{ remove = [\"Content-Length\"] }}"),
            "response_headers.remove: Content-Length: belongs",
        ),
        (
            format!("{uris}request_headers = {{ add = {{ X-Forwarded-For = \"1\" }} }}"),
            "request_headers.add.X-Forwarded-For: set by the gateway",
        ),
        (
            format!("{uris}request_headers = {{ set = {{ a = \"\\r\\n\" }} }}"),
            "request_headers.set.a: ",
        ),
        (
            format!(
                "{uris}request_headers = {{ remove = [{}] }}",
                many("\"a\"", 33)
            ),
            "request_headers.remove: 33",
        ),
        (
            format!("{uris}timeouts = {{ total = \"0s\" }}"),
            "timeouts.total: ",
        ),
        (format!("{uris}timeouts = {{ total = 5 }}"), "total"),
        (
            format!("{uris}retries = {{ attempts = 0 }}"),
            "retries.attempts: 0",
        ),
        (
            format!("{uris}retries = {{ methods = [\"\"] }}"),
            "retries.methods: ",
        ),
        (
            format!("{uris}limits = {{ requests = 0 }}"),
            "limits.requests: ",
        ),
        (
            format!("{uris}limits = {{ rate = {{ per_second = 0 }} }}"),
            "limits.rate.per_second",
        ),
        (
            format!("{uris}limits = {{ client_rate = {{ per_second = 1, burst = 0 }} }}"),
            "limits.client_rate.burst",
        ),
        (format!("{uris}balance = \"hash\""), "hash: missing"),
        (format!("{uris}hash = {{ source = true }}"), "hash: only"),
        (
            format!("{uris}balance = \"hash\"\nhash = {{}}"),
            "hash: by one",
        ),
        (
            format!("{uris}balance = \"hash\"\nhash = {{ source = true, balance_percent = 100 }}"),
            "hash.balance_percent: 100",
        ),
        (
            format!("{uris}balance = \"hash\"\nhash = {{ cookie = \"a=b\" }}"),
            "hash.cookie: ",
        ),
        (
            format!("{uris}route_service_url = \"http://r\""),
            "route_service_url: ",
        ),
        (
            format!(
                "{uris}backend = [{{ address = \"10.0.0.1:80\", zone = \"{}\" }}]",
                "z".repeat(2049)
            ),
            "backend[0].zone: ",
        ),
        (format!("{uris}{backend}tiemouts = {{}}"), "tiemouts"),
    ] {
        let error = match read(&text) {
            Err(error) => format!("{error:#}"),
            Ok(announcement) => panic!("{text}: {announcement:?}"),
        };
        assert!(error.contains(part), "{text:?}: {error:?} lacks {part:?}");
    }
}
