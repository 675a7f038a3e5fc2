//! What reads the bytes of others, as functions that a fuzzer calls: each fails by a panic.
//!
//! There only for tests and with the feature `fuzzing`; no part of the gateway. The package `fuzz`
//! calls the functions with what it invents, and [`tests`] with its corpora, so that whatever was
//! found once is tried for ever.

use http::{HeaderMap, Uri};
use ipnet::IpNet;

use crate::l7::edits::{self, RequestUrl};
#[cfg(feature = "http3")]
pub use crate::l7::fuzzing::http3_frames;
pub use crate::l7::fuzzing::{certificate, cookies, interim, proxy_protocol, request};
use crate::route::wire;
use crate::route::{Declaration, Registration, RouteKey};
use crate::{config, source};

/// The name of a corpus, and what its files are given to.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: &[Target] = &[
    ("certificate", certificate),
    ("config", configuration),
    ("cookies", cookies),
    #[cfg(feature = "http3")]
    ("http3_frames", http3_frames),
    ("interim", interim),
    ("proxy_protocol", proxy_protocol),
    ("registration", registration),
    ("request", request),
    ("routes_file", routes_file),
    ("uri", uri),
];

/// The configuration file.
pub fn configuration(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(config) = config::parse(text) {
        let written = toml::to_string(&config).expect("a configuration is written as TOML");
        let again = config::parse(&written).expect("what is written is read");
        assert_eq!(again, config, "{written}");
    }
}

/// The payload of a message on NATS.
pub fn registration(bytes: &[u8]) {
    if let Ok(taken) = wire::register(bytes, &vip_ranges()) {
        check_registration(&taken);
        let (left, _) = wire::unregister(bytes).expect("what may come may leave");
        assert_eq!(left.address, taken.backend.address);
        assert_eq!(left.routes, taken.routes);
    }
    // By itself: it takes VIPs of any range.
    let _ = wire::unregister(bytes);
}

/// A file of declared routes, and what becomes of requests for them.
pub fn routes_file(bytes: &[u8]) {
    let mut config = config::Config::default();
    config.l4.vip_ranges.extend(vip_ranges());
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let Ok(announced) = source::file::parse(text, &config) else {
        return;
    };
    announced.registrations.iter().for_each(check_registration);
    announced.declarations.iter().for_each(check_declaration);
}

/// An entry of `uris`, and one of `vips`.
pub fn uri(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(found) = wire::parse_uri(text) {
        let written = found.to_string();
        let again = wire::parse_uri(&written).expect("what is written is read");
        assert_eq!(again, found, "{written}");
    }
    if let Ok(vip) = wire::parse_vip(text, None) {
        assert_eq!(wire::parse_vip(&vip.to_string(), None).ok(), Some(vip));
    }
}

fn vip_ranges() -> [IpNet; 2] {
    ["192.0.2.0/24", "2001:db8::/64"].map(|range| range.parse().expect("a range"))
}

fn check_registration(registration: &Registration) {
    assert!(registration.backend.weight <= wire::MAX_WEIGHT);
    assert!(registration.backend.address.port() > 0);
    for route in &registration.routes {
        if let RouteKey::Http(route) = route {
            assert!(route.host.len() <= wire::MAX_HOST_BYTES + "*.".len());
            assert!(route.path.is_empty() || route.path.starts_with('/'));
            assert!(!route.path.ends_with('/'));
        }
    }
}

/// Redirects and rewrites of requests that its route is found by.
fn check_declaration(declaration: &Declaration) {
    let (route, policy) = (&declaration.route, &declaration.policy);
    for rest in [
        "", "/", "//", "/a/b", "//a.com", "/\\a.com", "/x/../y", "/./%2e",
    ] {
        let path = match format!("{}{rest}", route.path) {
            path if path.is_empty() => "/".to_owned(),
            path => path,
        };
        let Ok(mut uri) = Uri::try_from(format!("{path}?q=1")) else {
            continue;
        };
        if uri.path() != path {
            continue;
        }
        let request = RequestUrl {
            scheme: "http",
            authority: &route.host,
            path: &path,
            query: Some("q=1"),
        };
        if let Some(redirect) = &policy.redirect
            && let Some(location) = edits::location(redirect, &route.path, &request)
        {
            let location = location.to_str().expect("a location is visible ASCII");
            let leads_elsewhere = location.starts_with("//") || location.starts_with("/\\");
            assert!(!leads_elsewhere, "{path} is sent to {location}");
        }
        let mut headers = HeaderMap::new();
        if edits::rewrite_request(&mut uri, &mut headers, &route.path, &policy.rewrite).is_ok() {
            assert!(uri.path().starts_with('/'), "{path} becomes {uri}");
            assert!(uri.authority().is_none(), "{path} becomes {uri}");
            assert_eq!(uri.query(), Some("q=1"));
        }
        edits::apply(&policy.request_headers, &mut headers);
        edits::apply(&policy.response_headers, &mut headers);
    }
}

#[cfg(test)]
mod tests;
