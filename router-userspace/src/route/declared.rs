//! A whole route as a source declares it: match, policy and backends, each key named in docs/routes.md.
//!
//! A source deserializes a [`DeclaredRoute`] from its format and has it [read](DeclaredRoute::read)
//! into words of the route table, or refused whole by the name of the key. Lists and texts have the
//! bounds that are constants here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, anyhow, bail, ensure};
use http::{HeaderName, HeaderValue, Method};
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de};

use crate::route::conditions::{Condition, Conditions, ValueMatch};
use crate::route::declared::policy::Policy;
use crate::route::policy::HttpPolicy;
use crate::route::table::MAX_POOL_BACKENDS;
use crate::route::{
    Backend, BackendTls, Declaration, HttpMatch, HttpProtocol, Instance, Origin, Registration,
    RouteKey, TlsRoots, wire,
};

mod policy;

/// Methods of one list.
pub const MAX_METHODS: usize = 16;
/// Conditions on headers, and on query parameters.
pub const MAX_CONDITIONS: usize = 16;
/// Headers of each list of edits.
pub const MAX_HEADER_EDITS: usize = 32;
pub const MAX_HEADER_VALUE_BYTES: usize = 8192;
/// Attempts of one request.
pub const MAX_ATTEMPTS: usize = 16;

/// One route as it is written down.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeclaredRoute {
    #[serde(default)]
    uris: Vec<Uri>,
    #[serde(default)]
    vips: Vec<String>,
    #[serde(default)]
    methods: Vec<String>,
    #[serde(default)]
    headers: BTreeMap<String, Wanted>,
    #[serde(default)]
    query: BTreeMap<String, Wanted>,
    #[serde(default)]
    backend: Vec<BackendTable>,
    // Not flattened: serde would then accept unknown keys.
    balance: Option<policy::BalanceName>,
    hash: Option<policy::HashTable>,
    route_service_url: Option<String>,
    redirect: Option<policy::RedirectTable>,
    rewrite: Option<policy::RewriteTable>,
    request_headers: Option<policy::EditsTable>,
    response_headers: Option<policy::EditsTable>,
    timeouts: Option<policy::TimeoutsTable>,
    retries: Option<policy::RetriesTable>,
    limits: Option<policy::LimitsTable>,
    #[serde(default)]
    compression: bool,
}

/// What a declared route amounts to.
#[derive(Debug, Default)]
pub struct Announcement {
    /// Of each of its backends.
    pub registrations: Vec<Registration>,
    /// Of each of its hosts and paths, if it asks for anything.
    pub declarations: Vec<Declaration>,
}

impl Announcement {
    pub fn is_empty(&self) -> bool {
        self.registrations.is_empty() && self.declarations.is_empty()
    }
}

/// A condition on a value: `"exact"`, `{ prefix = "..." }` or `{ present = true }`.
#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "a value must be \"TEXT\", { prefix = \"TEXT\" } or { present = true }"
)]
enum Wanted {
    Exact(Arc<str>),
    Prefix(PrefixTable),
    Present(PresentTable),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PrefixTable {
    prefix: Arc<str>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PresentTable {
    present: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BackendTable {
    address: Address,
    #[serde(default)]
    weight: Weight,
    tls: Option<TlsTable>,
    #[serde(default)]
    protocol: Protocol,
    zone: Option<Arc<str>>,
    app: Option<Arc<str>>,
    instance_id: Option<Arc<str>>,
    instance_index: Option<Arc<str>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TlsTable {
    server_name: Option<Arc<str>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Protocol {
    #[default]
    Http1,
    Http2,
}

impl DeclaredRoute {
    /// Checks the route, and says what `origin` announces by it. VIPs are held against `vip_ranges`,
    /// as those of registrations are.
    ///
    /// # Errors
    /// One message that begins with the key.
    pub fn read(self, origin: Origin, vip_ranges: &[IpNet]) -> anyhow::Result<Announcement> {
        for (key, count) in [("uris", self.uris.len()), ("vips", self.vips.len())] {
            check_count(key, count, wire::MAX_ROUTES)?;
        }
        check_count("backend", self.backend.len(), MAX_POOL_BACKENDS)?;
        let conditions = conditions(self.methods, self.headers, self.query)?;
        let policy = Policy {
            balance: self.balance,
            hash: self.hash,
            route_service_url: self.route_service_url,
            redirect: self.redirect,
            rewrite: self.rewrite,
            request_headers: self.request_headers,
            response_headers: self.response_headers,
            timeouts: self.timeouts,
            retries: self.retries,
            limits: self.limits,
            compression: self.compression,
        };
        let policy = policy.read(origin)?;
        let https: Vec<HttpMatch> = self
            .uris
            .into_iter()
            .map(|Uri(uri)| HttpMatch {
                conditions: conditions.clone(),
                ..uri
            })
            .collect();
        let mut routes: Vec<RouteKey> = https.iter().cloned().map(RouteKey::Http).collect();
        for (i, vip) in self.vips.iter().enumerate() {
            let vip = wire::parse_vip(vip, Some(vip_ranges));
            let vip = vip.map_err(|(_, why)| anyhow!("vips[{i}]: {why}"))?;
            routes.push(RouteKey::Vip(vip));
        }
        check_whole(
            &https,
            &self.vips,
            &self.backend,
            conditions.is_some(),
            &policy,
        )?;
        let asks = policy != HttpPolicy::new(origin);
        let policy = Arc::new(policy);
        let declarations = https.into_iter().filter(|_| asks).map(|route| Declaration {
            route,
            policy: Arc::clone(&policy),
        });
        let mut announcement = Announcement {
            declarations: declarations.collect(),
            ..Announcement::default()
        };
        for (i, backend) in self.backend.into_iter().enumerate() {
            let backend = backend.read(origin);
            let backend = backend.map_err(|why| anyhow!("backend[{i}].{why}"))?;
            announcement.registrations.push(Registration {
                routes: routes.clone(),
                backend: Arc::new(backend),
                stale_after: None,
                balance: None,
                route_service_url: None,
            });
        }
        Ok(announcement)
    }
}

/// What no key is wrong in alone.
fn check_whole(
    https: &[HttpMatch],
    vips: &[String],
    backends: &[BackendTable],
    conditional: bool,
    policy: &HttpPolicy,
) -> anyhow::Result<()> {
    ensure!(
        !https.is_empty() || !vips.is_empty(),
        "uris: neither uris nor vips"
    );
    if conditional {
        ensure!(
            vips.is_empty(),
            "vips: a route with methods, headers or query has uris alone"
        );
        ensure!(
            !backends.is_empty() || policy.answers_alone(),
            "backend: a route with methods, headers or query has backends of its own, or a redirect"
        );
    }
    if https.is_empty() {
        let of_any_route = HttpPolicy {
            balance: policy.balance.clone(),
            route_service_url: policy.route_service_url.clone(),
            ..HttpPolicy::new(policy.origin)
        };
        ensure!(
            !conditional && *policy == of_any_route,
            "uris: missing; what this route asks for is of requests"
        );
    }
    if backends.is_empty() {
        ensure!(vips.is_empty(), "backend: vips have backends");
        ensure!(
            *policy != HttpPolicy::new(policy.origin),
            "backend: missing, and nothing is said of those that others register"
        );
    }
    Ok(())
}

fn conditions(
    methods: Vec<String>,
    headers: BTreeMap<String, Wanted>,
    query: BTreeMap<String, Wanted>,
) -> anyhow::Result<Option<Arc<Conditions>>> {
    check_count("headers", headers.len(), MAX_CONDITIONS)?;
    check_count("query", query.len(), MAX_CONDITIONS)?;
    let methods = read_methods("methods", &methods)?;
    let methods = methods.iter().map(|method| method.as_str().into());
    let methods = methods.collect();
    let mut of_headers = Vec::with_capacity(headers.len());
    let mut names = BTreeSet::new();
    for (key, wanted) in headers {
        let name = read_name(&key).with_context(|| format!("headers.{key}"))?;
        ensure!(
            names.insert(name.as_str().to_owned()),
            "headers.{key}: named twice"
        );
        let value = wanted.read(|byte| (b' '..=b'~').contains(&byte));
        of_headers.push(Condition {
            name: name.as_str().into(),
            value: value.with_context(|| format!("headers.{key}"))?,
        });
    }
    let mut of_query = Vec::with_capacity(query.len());
    for (key, wanted) in query {
        let stands_in_query = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'&' | b'#');
        ensure!(
            !key.is_empty()
                && key
                    .bytes()
                    .all(|byte| stands_in_query(byte) && byte != b'='),
            "query.{key}: not a name that a query can have"
        );
        check_text(&format!("query.{key}"), &key)?;
        let value = wanted.read(stands_in_query);
        of_query.push(Condition {
            value: value.with_context(|| format!("query.{key}"))?,
            name: key.into(),
        });
    }
    let conditions = Conditions::new(methods, of_headers, of_query);
    Ok((!conditions.is_empty()).then(|| Arc::new(conditions)))
}

impl Wanted {
    fn read(self, allowed: impl Fn(u8) -> bool) -> anyhow::Result<ValueMatch> {
        let check = |text: &str| {
            ensure!(
                text.len() <= wire::MAX_TEXT_BYTES && text.bytes().all(allowed),
                "not a value that it can have"
            );
            Ok(())
        };
        match self {
            Wanted::Exact(text) => {
                check(&text)?;
                Ok(ValueMatch::Exact(text))
            }
            Wanted::Prefix(PrefixTable { prefix }) => {
                check(&prefix)?;
                ensure!(!prefix.is_empty(), "an empty prefix: say present = true");
                Ok(ValueMatch::Prefix(prefix))
            }
            Wanted::Present(PresentTable { present: true }) => Ok(ValueMatch::Present),
            Wanted::Present(PresentTable { present: false }) => {
                bail!("what must not be there is no condition")
            }
        }
    }
}

impl BackendTable {
    fn read(self, origin: Origin) -> anyhow::Result<Backend> {
        for (key, text) in [
            ("zone", &self.zone),
            ("app", &self.app),
            ("instance_id", &self.instance_id),
            ("instance_index", &self.instance_index),
        ] {
            check_text(key, text.as_deref().unwrap_or_default())?;
        }
        let instance = Instance {
            app: self.app,
            id: self.instance_id,
            index: self.instance_index,
            availability_zone: self.zone,
            tls: self.tls.map(|tls| BackendTls {
                server_name: tls.server_name,
                roots: TlsRoots::Backends,
            }),
            ..Instance::default()
        };
        Ok(Backend {
            weight: self.weight.0,
            protocol: match self.protocol {
                Protocol::Http1 => HttpProtocol::Http1,
                Protocol::Http2 => HttpProtocol::Http2,
            },
            instance: instance.shared(),
            ..Backend::new(self.address.0, origin)
        })
    }
}

fn check_count(key: &str, count: usize, most: usize) -> anyhow::Result<()> {
    ensure!(count <= most, "{key}: {count} entries, at most {most}");
    Ok(())
}

fn check_text(key: &str, text: &str) -> anyhow::Result<()> {
    let most = wire::MAX_TEXT_BYTES;
    ensure!(text.len() <= most, "{key}: longer than {most} bytes");
    Ok(())
}

fn read_methods(key: &str, names: &[String]) -> anyhow::Result<Vec<Method>> {
    check_count(key, names.len(), MAX_METHODS)?;
    let method = |name: &String| {
        let method = Method::from_bytes(name.as_bytes());
        method.map_err(|_| anyhow!("{key}: {name:?} is not a method"))
    };
    names.iter().map(method).collect()
}

fn read_name(name: &str) -> anyhow::Result<HeaderName> {
    HeaderName::from_bytes(name.as_bytes()).map_err(|_| anyhow!("not the name of a header"))
}

fn read_value(value: &str) -> anyhow::Result<HeaderValue> {
    let most = MAX_HEADER_VALUE_BYTES;
    ensure!(value.len() <= most, "longer than {most} bytes");
    HeaderValue::from_str(value).map_err(|_| anyhow!("not the value of a header"))
}

// Checked while the text is read, so that TOML's errors point at the line.
#[derive(Debug)]
struct Uri(HttpMatch);
#[derive(Debug)]
struct Address(SocketAddr);
#[derive(Debug)]
struct Weight(u16);

impl Default for Weight {
    fn default() -> Weight {
        Weight(wire::DEFAULT_WEIGHT)
    }
}

impl<'de> Deserialize<'de> for Uri {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Uri, D::Error> {
        let uri = String::deserialize(value)?;
        wire::parse_uri(&uri).map(Uri).map_err(de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Address, D::Error> {
        let address = SocketAddr::deserialize(value)?;
        wire::check_backend_address(address.ip()).map_err(de::Error::custom)?;
        match address.port() {
            0 => Err(de::Error::custom("port 0 is not a port")),
            1.. => Ok(Address(address)),
        }
    }
}

impl<'de> Deserialize<'de> for Weight {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Weight, D::Error> {
        match u16::deserialize(value)? {
            weight @ 0..=wire::MAX_WEIGHT => Ok(Weight(weight)),
            weight => Err(de::Error::custom(format!(
                "weight {weight} is not in 0..=1000"
            ))),
        }
    }
}

#[cfg(test)]
mod tests;
