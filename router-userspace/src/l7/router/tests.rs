//! The router beside a model that tries every route and keeps the most specific.

use proptest::prelude::*;

use super::*;
use crate::route::conditions::{Condition, ValueMatch};

/// A snapshot of routes `host/path`, each with a pool of its own and, behind a space, the header or
/// headers it is for.
fn snapshot(routes: &[&str]) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for route in routes {
        let (route, wanted) = route.split_once(' ').unwrap_or((route, ""));
        let (host, path) = route.split_at(route.find('/').unwrap_or(route.len()));
        let conditions = (!wanted.is_empty()).then(|| Arc::new(conditions(wanted)));
        snapshot.hosts.add(host);
        let host_routes = snapshot.hosts.get_mut(host).unwrap();
        host_routes.insert(path.into(), conditions, Arc::default());
    }
    snapshot
}

fn conditions(headers: &str) -> Conditions {
    let condition = |name: &str| Condition {
        name: name.into(),
        value: ValueMatch::Present,
    };
    Conditions::new(
        Vec::new(),
        headers.split(' ').map(condition).collect(),
        Vec::new(),
    )
}

/// The route of a GET, as `snapshot` takes it.
fn found(
    snapshot: &Snapshot,
    host: &str,
    path: &str,
    headers: &HeaderMap,
) -> Result<String, NoMatch> {
    let lookup = Lookup {
        host,
        path,
        query: None,
        method: &Method::GET,
        headers,
    };
    find(snapshot, &lookup).map(|found| {
        let wanted = found.conditions.map(|wanted| format!(" {wanted}"));
        format!("{}{}{}", found.host, found.path, wanted.unwrap_or_default())
    })
}

#[track_caller]
fn check(routes: &[&str], host: &str, path: &str, expected: Option<&str>) {
    let found = found(&snapshot(routes), host, path, &HeaderMap::new());
    assert_eq!(
        found.ok().as_deref(),
        expected,
        "{host} {path} in {routes:?}"
    );
}

#[test]
fn a_route_whose_conditions_hold_goes_before_the_one_without() {
    let routes = ["a.x/p", "a.x/p b", "a.x/p b c", "a.x/p d", "a.x e", "*.x"];
    for (path, headers, expected) in [
        ("/p", "", "a.x/p"),
        ("/p", "b", "a.x/p b"),
        ("/P/more", "b c", "a.x/p b c"),
        ("/p", "d b", "a.x/p b"),
        ("/p", "e", "a.x/p"),
        ("/q", "e", "a.x e"),
        ("/q", "b", "*.x"),
    ] {
        let headers = header_map(headers);
        let found = found(&snapshot(&routes), "a.x", path, &headers).unwrap();
        assert_eq!(found, expected, "{path} {headers:?}");
    }
}

fn header_map(names: &str) -> HeaderMap {
    let names = names.split_whitespace();
    let pairs = names.map(|name| (name.parse().unwrap(), http::HeaderValue::from_static("")));
    pairs.collect()
}

#[test]
fn a_host_matches_without_case_port_and_trailing_dot() {
    let routes = ["app.example.com"];
    for host in [
        "app.example.com",
        "APP.example.com",
        "app.example.com:8080",
        "app.example.com.",
    ] {
        check(&routes, host, "/", Some("app.example.com"));
    }
    check(&routes, "app.example.com..", "/", None);
    check(&routes, "other.example.com", "/", None);
    check(&routes, "", "/", None);
    check(&routes, ":80", "/", None);
}

#[test]
fn an_ipv6_literal_keeps_its_colons() {
    check(
        &["[2001:db8::1]"],
        "[2001:DB8::1]:80",
        "/",
        Some("[2001:db8::1]"),
    );
    check(&["[2001:db8::1]"], "[2001:db8::2]", "/", None);
    check(&["[2001"], "[2001", "/", Some("[2001"));
}

#[test]
fn the_longest_path_prefix_by_whole_segments_wins() {
    let routes = ["a.com", "a.com/x", "a.com/x/y"];
    check(&routes, "a.com", "/x/y/z", Some("a.com/x/y"));
    check(&routes, "a.com", "/x/yy", Some("a.com/x"));
    check(&routes, "a.com", "/X/Y/", Some("a.com/x/y"));
    check(&routes, "a.com", "/xy", Some("a.com"));
    check(&["a.com/x"], "a.com", "/", None);
}

#[test]
fn wildcards_cover_several_labels_and_the_most_specific_wins() {
    let routes = ["*.example.com", "*.b.example.com", "*.com"];
    check(&routes, "a.b.example.com", "/", Some("*.b.example.com"));
    check(&routes, "a.c.example.com", "/", Some("*.example.com"));
    check(&routes, "b.example.com", "/", Some("*.example.com"));
    check(&routes, "example.com", "/", Some("*.com"));
    check(&["*.example.com"], "example.com", "/", None);
    check(&["*.example.com"], ".example.com", "/", None);
}

#[test]
fn a_host_without_a_matching_path_falls_through_to_wildcards() {
    let routes = ["foo.ex.com/a", "*.ex.com"];
    check(&routes, "foo.ex.com", "/a/b", Some("foo.ex.com/a"));
    check(&routes, "foo.ex.com", "/other", Some("*.ex.com"));
}

#[test]
fn dots_of_the_path_are_not_labels_of_the_host() {
    check(
        &["*.wild.example.com"],
        "foo.example.org",
        "/x.wild.example.com",
        None,
    );
}

#[test]
fn dot_segments_are_resolved_before_the_path_is_matched() {
    let routes = ["a.com/public", "a.com/private"];
    check(
        &routes,
        "a.com",
        "/public/../private/x",
        Some("a.com/private"),
    );
    check(
        &routes,
        "a.com",
        "/public/%2e%2E/private",
        Some("a.com/private"),
    );
    check(&routes, "a.com", "/./public/.", Some("a.com/public"));
    check(&routes, "a.com", "/../public", None);
    check(&routes, "a.com", "/public/..a", Some("a.com/public"));
}

#[test]
fn a_path_above_the_root_is_told_from_an_unknown_one() {
    let snapshot = snapshot(&["a.com/x"]);
    let why = |path| found(&snapshot, "a.com", path, &HeaderMap::new()).err();
    assert_eq!(why("/x/../.."), Some(NoMatch::PathAboveRoot));
    assert_eq!(why("/%2e%2e/"), Some(NoMatch::PathAboveRoot));
    assert_eq!(why("/x/.."), Some(NoMatch::UnknownRoute));
}

#[test]
fn a_host_of_a_million_characters_has_no_route() {
    check(&["*.example.com"], &"a".repeat(1_000_000), "/", None);
}

/// All routes that match, the one with the best rank: exact before wildcards by length of host,
/// then by length of path, then by the order of conditions.
fn model(routes: &[String], host: &str, path: &str, headers: &str) -> Option<String> {
    let covers_host = |pattern: &str| match pattern.strip_prefix('*') {
        Some(suffix) => host.len() > suffix.len() && host.ends_with(suffix),
        None => host == pattern,
    };
    let covers_path = |prefix: &str| path == prefix || path.starts_with(&format!("{prefix}/"));
    let holds = |wanted: &str| wanted.split_whitespace().all(|name| headers.contains(name));
    let matching = routes.iter().filter_map(|route| {
        let (route, wanted) = route.split_once(' ').unwrap_or((route, ""));
        let (host, path) = route.split_at(route.find('/').unwrap_or(route.len()));
        let mut wanted: Vec<&str> = wanted.split_whitespace().collect();
        wanted.sort_unstable();
        wanted.dedup();
        let rank = (!host.starts_with('*'), host.len(), path.len(), wanted.len());
        let shown = [&[route], &wanted[..]].concat().join(" ");
        let is_it = covers_host(host) && covers_path(path) && holds(&wanted.join(" "));
        // Of as many conditions the first by name.
        is_it.then_some((rank, std::cmp::Reverse(wanted.join(" ")), shown))
    });
    matching.max().map(|(_, _, shown)| shown)
}

proptest! {
    #[test]
    fn agrees_with_trying_every_route(
        routes in proptest::collection::vec(
            "(\\*\\.)?([ab]\\.){0,2}(com|org)(/[xy]){0,3}( [pqr]){0,3}", 0..16),
        host in "([ab]\\.){0,3}(com|org)",
        path in "(/[xy]{1,2}){0,4}/?",
        headers in "p?q?r?",
    ) {
        let names: Vec<&str> = routes.iter().map(String::as_str).collect();
        let snapshot = snapshot(&names);
        let one_by_one = headers.chars().map(|name| format!("{name} ")).collect::<String>();
        let found = found(&snapshot, &host, &path, &header_map(&one_by_one));
        prop_assert_eq!(found.ok(), model(&routes, &host, &path, &headers));
    }

    #[test]
    fn any_host_and_path_is_survived(host in ".{0,300}", path in ".{0,64}") {
        let snapshot = snapshot(&["*.example.com", "a.com/x", "a.com/x a"]);
        let _ = found(&snapshot, &host, &path, &HeaderMap::new());
    }
}
