//! What is declared of a route, in words for people: listings and explanations show it.

use std::fmt::Display;

use serde::Serialize;

use crate::route::policy::{
    HashOf, HeaderEdits, HttpPolicy, PathRewrite, Rate, Redirect, Rewrite, RouteLimits,
    RouteRetries, RouteTimeouts,
};
use crate::route::{Balance, Pool};

#[derive(Debug, PartialEq, Serialize)]
pub struct PolicyRow {
    /// Who declared it.
    pub origin: &'static str,
    /// What it asks for, one thing each.
    pub asks: Vec<String>,
}

pub fn policy(pool: &Pool) -> Option<PolicyRow> {
    let policy = pool.policy.as_deref()?;
    Some(PolicyRow {
        origin: policy.origin.as_str(),
        asks: asks(policy),
    })
}

/// `307: scheme https, authority www.example.com`
pub fn redirect(redirect: &Redirect) -> String {
    let mut to = Vec::new();
    say(&mut to, "scheme", redirect.scheme.as_deref());
    say(&mut to, "authority", redirect.authority.as_deref());
    to.extend(redirect.path.as_ref().map(path));
    format!("{}: {}", redirect.status.as_u16(), to.join(", "))
}

fn asks(policy: &HttpPolicy) -> Vec<String> {
    let mut asks = Vec::new();
    say(&mut asks, "balance", policy.balance.as_ref().map(balance));
    say(
        &mut asks,
        "route service",
        policy.route_service_url.as_deref(),
    );
    say(
        &mut asks,
        "redirect",
        policy.redirect.as_ref().map(redirect),
    );
    let named = [
        ("rewrite", rewrite(&policy.rewrite)),
        ("request headers", edits(&policy.request_headers)),
        ("response headers", edits(&policy.response_headers)),
        ("timeouts", timeouts(&policy.timeouts)),
        ("retries", retries(&policy.retries)),
        ("limits", limits(&policy.limits)),
    ];
    for (name, parts) in named {
        say(
            &mut asks,
            name,
            (!parts.is_empty()).then(|| parts.join(", ")),
        );
    }
    if policy.compression {
        asks.push("compression".to_owned());
    }
    asks
}

fn say(list: &mut Vec<String>, name: &str, value: Option<impl Display>) {
    list.extend(value.map(|value| format!("{name} {value}")));
}

fn balance(balance: &Balance) -> String {
    let mut text = balance.as_str().to_owned();
    if let Balance::Hash(key) = balance {
        text.push_str(&match &key.of {
            HashOf::Header(name) => format!(" of header {name}"),
            HashOf::Cookie(name) => format!(" of cookie {name}"),
            HashOf::Source => " of the client's address".to_owned(),
        });
        if let Some(percent) = key.balance_percent {
            text.push_str(&format!(" up to {percent} % of the average"));
        }
    }
    text
}

fn path(rewrite: &PathRewrite) -> String {
    match rewrite {
        PathRewrite::Full(path) => format!("path {path}"),
        PathRewrite::Prefix(prefix) => {
            format!("prefix {}", if prefix.is_empty() { "/" } else { prefix })
        }
    }
}

fn rewrite(rewrite: &Rewrite) -> Vec<String> {
    let mut parts = Vec::new();
    let host = rewrite.host.as_ref().and_then(|host| host.to_str().ok());
    say(&mut parts, "host", host);
    parts.extend(rewrite.path.as_ref().map(path));
    parts
}

fn edits(edits: &HeaderEdits) -> Vec<String> {
    let mut parts = Vec::new();
    parts.extend(edits.remove.iter().map(|name| format!("remove {name}")));
    parts.extend(edits.set.iter().map(|(name, _)| format!("set {name}")));
    parts.extend(edits.add.iter().map(|(name, _)| format!("add {name}")));
    parts
}

fn timeouts(timeouts: &RouteTimeouts) -> Vec<String> {
    let mut parts = Vec::new();
    for (name, timeout) in [
        ("response_headers", timeouts.response_headers),
        ("body_idle", timeouts.body_idle),
        ("total", timeouts.total),
    ] {
        say(
            &mut parts,
            name,
            timeout.map(humantime_serde::re::humantime::format_duration),
        );
    }
    parts
}

fn retries(retries: &RouteRetries) -> Vec<String> {
    let mut parts = Vec::new();
    say(&mut parts, "attempts", retries.attempts);
    parts.extend(
        retries
            .methods
            .iter()
            .map(|method| format!("repeat {method}")),
    );
    parts
}

fn limits(limits: &RouteLimits) -> Vec<String> {
    let rate = |rate: Rate| format!("{}/s burst {}", rate.per_second, rate.burst);
    let mut parts = Vec::new();
    say(&mut parts, "request_body_bytes", limits.request_body_bytes);
    say(
        &mut parts,
        "requests_per_backend",
        limits.requests_per_backend,
    );
    say(&mut parts, "requests", limits.requests);
    say(&mut parts, "rate", limits.rate.map(rate));
    say(&mut parts, "client_rate", limits.client_rate.map(rate));
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::Origin;
    use crate::route::declared::DeclaredRoute;

    #[test]
    fn everything_a_route_asks_for_is_told() {
        let route: DeclaredRoute = toml::from_str(
            r#"
            uris = ["a.x"]
            balance = "hash"
            hash = { cookie = "session", balance_percent = 125 }
            route_service_url = "https://r"
            redirect = { status = 301, scheme = "https", authority = "b.x", prefix = "/" }
            rewrite = { host = "c.x", path = "/p" }
            request_headers = { remove = ["x-a"], set = { x-b = "1" }, add = { x-c = "1" } }
            response_headers = { remove = ["server"] }
            timeouts = { response_headers = "5s", body_idle = "1m", total = "100ms" }
            retries = { attempts = 3, methods = ["PUT"] }
            compression = true
            [limits]
            request_body_bytes = 1
            requests_per_backend = 2
            requests = 3
            rate = { per_second = 4, burst = 5 }
            client_rate = { per_second = 6 }
            "#,
        )
        .unwrap();
        let declared = route.read(Origin::File, &[]).unwrap().declarations;
        assert_eq!(
            asks(&declared[0].policy),
            [
                "balance hash of cookie session up to 125 % of the average",
                "route service https://r",
                "redirect 301: scheme https, authority b.x, prefix /",
                "rewrite host c.x, path /p",
                "request headers remove x-a, set x-b, add x-c",
                "response headers remove server",
                "timeouts response_headers 5s, body_idle 1m, total 100ms",
                "retries attempts 3, repeat PUT",
                "limits request_body_bytes 1, requests_per_backend 2, requests 3, \
                 rate 4/s burst 5, client_rate 6/s burst 6",
                "compression",
            ]
        );
    }
}
