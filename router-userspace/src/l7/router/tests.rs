//! The router beside a model that tries every route and keeps the most specific.

use proptest::prelude::*;

use super::*;

/// A snapshot of routes `host/path`, each with a pool of its own.
fn snapshot(routes: &[&str]) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for route in routes {
        let (host, path) = route.split_at(route.find('/').unwrap_or(route.len()));
        let pool = Arc::new(Pool {
            backends: Vec::new(),
            balance: None,
            route_service_url: None,
            policy: None,
        });
        snapshot.hosts.add(host.into());
        let host_routes = snapshot.hosts.get_mut(host).unwrap();
        if host_routes.paths.iter().all(|(known, _)| **known != *path) {
            host_routes.paths.push((path.into(), pool));
        }
        host_routes
            .paths
            .sort_by_key(|(path, _)| (std::cmp::Reverse(path.len()), Arc::clone(path)));
    }
    snapshot
}

#[track_caller]
fn check(routes: &[&str], host: &str, path: &str, expected: Option<&str>) {
    let snapshot = snapshot(routes);
    let found = find(&snapshot, host, path).map(|found| format!("{}{}", found.host, found.path));
    assert_eq!(
        found.ok().as_deref(),
        expected,
        "{host} {path} in {routes:?}"
    );
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
    let why = |path| find(&snapshot, "a.com", path).err();
    assert_eq!(why("/x/../.."), Some(NoMatch::PathAboveRoot));
    assert_eq!(why("/%2e%2e/"), Some(NoMatch::PathAboveRoot));
    assert_eq!(why("/x/.."), Some(NoMatch::UnknownRoute));
}

#[test]
fn a_host_of_a_million_characters_has_no_route() {
    check(&["*.example.com"], &"a".repeat(1_000_000), "/", None);
}

/// All routes that match, the one with the best rank: exact before wildcards by length of host,
/// then by length of path.
fn model(routes: &[String], host: &str, path: &str) -> Option<String> {
    let covers_host = |pattern: &str| match pattern.strip_prefix('*') {
        Some(suffix) => host.len() > suffix.len() && host.ends_with(suffix),
        None => host == pattern,
    };
    let covers_path = |prefix: &str| path == prefix || path.starts_with(&format!("{prefix}/"));
    routes
        .iter()
        .filter_map(|route| {
            let (host, path) = route.split_at(route.find('/').unwrap_or(route.len()));
            let rank = (!host.starts_with('*'), host.len(), path.len());
            (covers_host(host) && covers_path(path)).then_some((rank, route))
        })
        .max()
        .map(|(_, route)| route.clone())
}

proptest! {
    #[test]
    fn agrees_with_trying_every_route(
        routes in proptest::collection::vec("(\\*\\.)?([ab]\\.){0,2}(com|org)(/[xy]){0,3}", 0..12),
        host in "([ab]\\.){0,3}(com|org)",
        path in "(/[xy]{1,2}){0,4}/?",
    ) {
        let names: Vec<&str> = routes.iter().map(String::as_str).collect();
        let snapshot = snapshot(&names);
        let found = find(&snapshot, &host, &path).map(|found| format!("{}{}", found.host, found.path));
        prop_assert_eq!(found.ok(), model(&routes, &host, &path));
    }

    #[test]
    fn any_host_and_path_is_survived(host in ".{0,300}", path in ".{0,64}") {
        let snapshot = snapshot(&["*.example.com", "a.com/x"]);
        let _ = find(&snapshot, &host, &path);
    }
}
