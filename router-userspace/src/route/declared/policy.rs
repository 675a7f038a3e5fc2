//! The policy of a declared route: tables as they are written, read into an [`HttpPolicy`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use http::uri::Authority;
use http::{HeaderName, HeaderValue, StatusCode};
use serde::Deserialize;

use crate::route::declared::{
    MAX_ATTEMPTS, MAX_HEADER_EDITS, check_count, check_text, read_methods, read_name, read_value,
};
use crate::route::policy::{
    BALANCE_PERCENT, HashKey, HashOf, HeaderEdits, HttpPolicy, PathRewrite, Rate, Redirect,
    Rewrite, RouteLimits, RouteRetries, RouteTimeouts,
};
use crate::route::{Balance, Origin, wire};

pub struct Policy {
    pub balance: Option<BalanceName>,
    pub hash: Option<HashTable>,
    pub route_service_url: Option<String>,
    pub redirect: Option<RedirectTable>,
    pub rewrite: Option<RewriteTable>,
    pub request_headers: Option<EditsTable>,
    pub response_headers: Option<EditsTable>,
    pub timeouts: Option<TimeoutsTable>,
    pub retries: Option<RetriesTable>,
    pub limits: Option<LimitsTable>,
    pub compression: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BalanceName {
    RoundRobin,
    LeastConnections,
    Hash,
}

/// One of `header`, `cookie` and `source`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HashTable {
    header: Option<String>,
    cookie: Option<Arc<str>>,
    #[serde(default)]
    source: bool,
    balance_percent: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RedirectTable {
    status: Option<u16>,
    scheme: Option<Scheme>,
    authority: Option<Arc<str>>,
    path: Option<Arc<str>>,
    prefix: Option<Arc<str>>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Scheme {
    Http,
    Https,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewriteTable {
    host: Option<Arc<str>>,
    path: Option<Arc<str>>,
    prefix: Option<Arc<str>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EditsTable {
    #[serde(default)]
    remove: Vec<String>,
    #[serde(default)]
    set: BTreeMap<String, String>,
    #[serde(default)]
    add: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimeoutsTable {
    #[serde(default, with = "humantime_serde")]
    response_headers: Option<Duration>,
    #[serde(default, with = "humantime_serde")]
    body_idle: Option<Duration>,
    #[serde(default, with = "humantime_serde")]
    total: Option<Duration>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetriesTable {
    attempts: Option<usize>,
    #[serde(default)]
    methods: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsTable {
    request_body_bytes: Option<u64>,
    requests_per_backend: Option<u32>,
    requests: Option<u32>,
    rate: Option<RateTable>,
    client_rate: Option<RateTable>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateTable {
    per_second: u32,
    /// As `per_second` if absent.
    burst: Option<u32>,
}

impl Policy {
    /// # Errors
    /// One message that begins with the key.
    pub fn read(self, origin: Origin) -> anyhow::Result<HttpPolicy> {
        if let Some(url) = &self.route_service_url {
            ensure!(
                url.starts_with("https"),
                "route_service_url: a route service starts with https"
            );
            check_text("route_service_url", url)?;
        }
        let edits = |key: &str, table: Option<EditsTable>| match table {
            Some(table) => table.read(key),
            None => Ok(HeaderEdits::default()),
        };
        Ok(HttpPolicy {
            origin,
            balance: read_balance(self.balance, self.hash)?,
            route_service_url: self.route_service_url.map(Arc::from),
            redirect: self.redirect.map(RedirectTable::read).transpose()?,
            rewrite: match self.rewrite {
                Some(table) => table.read()?,
                None => Rewrite::default(),
            },
            request_headers: edits("request_headers", self.request_headers)?,
            response_headers: edits("response_headers", self.response_headers)?,
            timeouts: match self.timeouts {
                Some(table) => table.read()?,
                None => RouteTimeouts::default(),
            },
            retries: match self.retries {
                Some(table) => table.read()?,
                None => RouteRetries::default(),
            },
            limits: match self.limits {
                Some(table) => table.read()?,
                None => RouteLimits::default(),
            },
            compression: self.compression,
        })
    }
}

fn read_balance(
    balance: Option<BalanceName>,
    hash: Option<HashTable>,
) -> anyhow::Result<Option<Balance>> {
    Ok(match (balance, hash) {
        (Some(BalanceName::Hash), Some(hash)) => Some(Balance::Hash(Arc::new(hash.read()?))),
        (Some(BalanceName::Hash), None) => bail!("hash: missing with balance = \"hash\""),
        (_, Some(_)) => bail!("hash: only with balance = \"hash\""),
        (Some(BalanceName::RoundRobin), None) => Some(Balance::RoundRobin),
        (Some(BalanceName::LeastConnections), None) => Some(Balance::LeastConnections),
        (None, None) => None,
    })
}

impl HashTable {
    fn read(self) -> anyhow::Result<HashKey> {
        let of = match (self.header, self.cookie, self.source) {
            (Some(header), None, false) => {
                let name = read_name(&header).context("hash.header")?;
                HashOf::Header(name.as_str().into())
            }
            (None, Some(cookie), false) => {
                // RFC 6265 §4.1.1: a cookie's name is a token, as a header's is.
                let read = read_name(&cookie);
                read.map_err(|_| anyhow!("hash.cookie: {cookie:?} is not the name of a cookie"))?;
                HashOf::Cookie(cookie)
            }
            (None, None, true) => HashOf::Source,
            _ => bail!("hash: by one of header, cookie and source = true"),
        };
        if let Some(percent) = self.balance_percent {
            ensure!(
                BALANCE_PERCENT.contains(&percent),
                "hash.balance_percent: {percent} is not in 110..=1000"
            );
        }
        Ok(HashKey {
            of,
            balance_percent: self.balance_percent,
        })
    }
}

impl RedirectTable {
    fn read(self) -> anyhow::Result<Redirect> {
        let status = self.status.unwrap_or(307);
        ensure!(
            matches!(status, 301 | 302 | 303 | 307 | 308),
            "redirect.status: {status} is not 301, 302, 303, 307 or 308"
        );
        let redirect = Redirect {
            status: StatusCode::from_u16(status)?,
            scheme: self.scheme.map(|scheme| match scheme {
                Scheme::Http => "http".into(),
                Scheme::Https => "https".into(),
            }),
            authority: match self.authority {
                Some(authority) => Some(read_authority("redirect.authority", authority)?),
                None => None,
            },
            path: read_path("redirect", self.path, self.prefix)?,
        };
        ensure!(
            redirect.scheme.is_some() || redirect.authority.is_some() || redirect.path.is_some(),
            "redirect: leads to where the request is: give scheme, authority, path or prefix"
        );
        Ok(redirect)
    }
}

impl RewriteTable {
    fn read(self) -> anyhow::Result<Rewrite> {
        let host = match self.host {
            Some(host) => Some(read_authority("rewrite.host", host)?),
            None => None,
        };
        Ok(Rewrite {
            host: host.map(|host| HeaderValue::from_str(&host)).transpose()?,
            path: read_path("rewrite", self.path, self.prefix)?,
        })
    }
}

impl EditsTable {
    fn read(self, key: &str) -> anyhow::Result<HeaderEdits> {
        let counts = [
            ("remove", self.remove.len()),
            ("set", self.set.len()),
            ("add", self.add.len()),
        ];
        for (list, count) in counts {
            check_count(&format!("{key}.{list}"), count, MAX_HEADER_EDITS)?;
        }
        let name = |name: &str| {
            let name = read_name(name)?;
            match why_not_edited(&name) {
                Some(why) => bail!("{why}"),
                None => Ok(name),
            }
        };
        let pairs = |list: &str, pairs: BTreeMap<String, String>| {
            let mut names = BTreeSet::new();
            let mut read = Vec::with_capacity(pairs.len());
            for (header, value) in pairs {
                let at = || format!("{key}.{list}.{header}");
                let name = name(&header).with_context(at)?;
                ensure!(
                    names.insert(name.as_str().to_owned()),
                    "{}: named twice",
                    at()
                );
                read.push((name, read_value(&value).with_context(at)?));
            }
            anyhow::Ok(read)
        };
        let remove = self.remove.iter();
        let remove =
            remove.map(|header| name(header).with_context(|| format!("{key}.remove: {header}")));
        Ok(HeaderEdits {
            remove: remove.collect::<Result<_, _>>()?,
            set: pairs("set", self.set)?,
            add: pairs("add", self.add)?,
        })
    }
}

/// Why a header is not for a route to edit: what frames a message or holds for one connection (RFC 9110
/// §7.6.1), and what the gateway says of the client and the instance.
fn why_not_edited(name: &HeaderName) -> Option<&'static str> {
    match name.as_str() {
        "host" => Some("changed by rewrite.host"),
        "connection"
        | "content-length"
        | "expect"
        | "http2-settings"
        | "keep-alive"
        | "proxy-authenticate"
        | "proxy-authorization"
        | "proxy-connection"
        | "te"
        | "trailer"
        | "transfer-encoding"
        | "upgrade" => Some("belongs to the connection, not to a route"),
        "forwarded" | "x-real-ip" | "x-request-id" | "x-request-start" | "x-vcap-request-id" => {
            Some("set by the gateway")
        }
        name if name.starts_with("x-forwarded-") || name.starts_with("x-cf-") => {
            Some("set by the gateway")
        }
        _ => None,
    }
}

impl TimeoutsTable {
    fn read(self) -> anyhow::Result<RouteTimeouts> {
        for (key, timeout) in [
            ("response_headers", self.response_headers),
            ("body_idle", self.body_idle),
            ("total", self.total),
        ] {
            ensure!(
                timeout != Some(Duration::ZERO),
                "timeouts.{key}: must be longer than 0"
            );
        }
        Ok(RouteTimeouts {
            response_headers: self.response_headers,
            body_idle: self.body_idle,
            total: self.total,
        })
    }
}

impl RetriesTable {
    fn read(self) -> anyhow::Result<RouteRetries> {
        if let Some(attempts) = self.attempts {
            ensure!(
                (1..=MAX_ATTEMPTS).contains(&attempts),
                "retries.attempts: {attempts} is not in 1..={MAX_ATTEMPTS}"
            );
        }
        Ok(RouteRetries {
            attempts: self.attempts,
            methods: read_methods("retries.methods", &self.methods)?,
        })
    }
}

impl LimitsTable {
    fn read(self) -> anyhow::Result<RouteLimits> {
        for (key, limit) in [
            ("requests_per_backend", self.requests_per_backend),
            ("requests", self.requests),
        ] {
            ensure!(limit != Some(0), "limits.{key}: 0 would serve nobody");
        }
        let rate = |key: &str, table: Option<RateTable>| match table {
            Some(table) => table.read(key).map(Some),
            None => Ok(None),
        };
        Ok(RouteLimits {
            request_body_bytes: self.request_body_bytes,
            requests_per_backend: self.requests_per_backend,
            requests: self.requests,
            rate: rate("limits.rate", self.rate)?,
            client_rate: rate("limits.client_rate", self.client_rate)?,
        })
    }
}

impl RateTable {
    fn read(self, key: &str) -> anyhow::Result<Rate> {
        let rate = Rate {
            per_second: self.per_second,
            burst: self.burst.unwrap_or(self.per_second),
        };
        ensure!(
            rate.per_second > 0,
            "{key}.per_second: 0 would serve nobody"
        );
        ensure!(rate.burst > 0, "{key}.burst: 0 would serve nobody");
        Ok(rate)
    }
}

/// `HOST` or `HOST:PORT`.
fn read_authority(key: &str, text: Arc<str>) -> anyhow::Result<Arc<str>> {
    let authority = text.parse::<Authority>();
    let is_host = authority.is_ok_and(|authority| {
        !authority.host().is_empty()
            && !text.contains('@')
            && (authority.port().is_none() || authority.port_u16().is_some_and(|port| port > 0))
            && !text.ends_with(':')
    });
    ensure!(
        is_host && text.len() <= wire::MAX_HOST_BYTES + ":65535".len(),
        "{key}: {text:?} is not HOST or HOST:PORT"
    );
    Ok(text)
}

fn read_path(
    table: &str,
    path: Option<Arc<str>>,
    prefix: Option<Arc<str>>,
) -> anyhow::Result<Option<PathRewrite>> {
    let (key, text) = match (&path, &prefix) {
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => bail!("{table}: either path or prefix"),
        (Some(path), None) => ("path", path),
        (None, Some(prefix)) => ("prefix", prefix),
    };
    let key = format!("{table}.{key}");
    ensure!(
        text.starts_with('/') && !text.starts_with("//"),
        "{key}: starts with one /"
    );
    ensure!(
        text.len() <= wire::MAX_PATH_BYTES,
        "{key}: longer than {} bytes",
        wire::MAX_PATH_BYTES
    );
    let stands_in_path = |byte: u8| {
        byte.is_ascii_graphic() && !matches!(byte, b'?' | b'#' | b'\\' | b'"' | b'<' | b'>')
    };
    ensure!(
        text.bytes().all(stands_in_path),
        "{key}: has a character that a path cannot have"
    );
    let segments = text.split('/');
    ensure!(
        segments
            .map(str::to_ascii_lowercase)
            .all(|segment| !matches!(
                segment.as_str(),
                "." | ".." | "%2e" | "%2e%2e" | ".%2e" | "%2e."
            )),
        "{key}: has a dot segment"
    );
    Ok(Some(match path {
        Some(path) => PathRewrite::Full(path),
        None => PathRewrite::Prefix(text.trim_end_matches('/').into()),
    }))
}
