//! Route services: a request of a route that has one goes to the service first, and to the route's
//! backends when the service sends it back with the proof that it was there.
//!
//! ```text
//!  client ──▶ gateway ─(signed)─▶ service ─(signed)─▶ gateway ──▶ backend
//! ```
//!
//! As gorouter does it, headers included. `forward` asks for the [`Leg`] of each request of such a
//! route and sends it on; the attempts are [`exchange`](crate::l7::exchange)'s, at a pool made of the
//! service's [`addresses`] or, by hairpinning, at the pool of the route that the service is.

use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use http::header::HOST;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Uri};

pub(super) use crate::l7::route_service::addresses::Services;
pub use crate::l7::route_service::signature::InvalidSignature;

use crate::config::HttpRouteServices;
use crate::l7::balance::PoolState;
use crate::l7::error::{Failure, RouteServiceFailure};
use crate::l7::route_service::signature::Keys;
use crate::l7::router::{self, Lookup};
use crate::l7::validate::Findings;
use crate::l7::worker::Worker;

mod addresses;
mod signature;
mod timestamp;

const FORWARDED_URL: HeaderName = HeaderName::from_static("x-cf-forwarded-url");
const METADATA: HeaderName = HeaderName::from_static("x-cf-proxy-metadata");
const SIGNATURE: HeaderName = HeaderName::from_static("x-cf-proxy-signature");

/// What `http.route_services` amounts to where it has a secret.
#[derive(Debug)]
pub(super) struct RouteServices {
    keys: Keys,
    timeout: Duration,
    /// What clients are said to have used.
    scheme: &'static str,
    hairpinning: bool,
    /// In lower case, a wildcard without its `*`; empty: all hosts.
    hairpin_hosts: HashSet<String>,
    attempts: usize,
    strict: bool,
}

/// Which part of its way a request is on.
pub(super) enum Leg {
    /// Its route has no service.
    Direct,
    ToService(Box<Detour>),
    /// It has been to the service.
    Returned,
}

/// A request's way to its route's service.
pub(super) struct Detour {
    rules: Arc<RouteServices>,
    authority: Authority,
    target: PathAndQuery,
    /// Of the route that the service is, if it is to be reached as one.
    hairpin: Option<Rc<PoolState>>,
    headers: [(HeaderName, HeaderValue); 4],
}

impl RouteServices {
    /// `None` without a secret. Takes some ten milliseconds.
    ///
    /// # Errors
    /// Names the secret that cannot be read.
    pub(super) fn load(config: &HttpRouteServices) -> anyhow::Result<Option<Arc<RouteServices>>> {
        let Some(secret) = &config.secret else {
            return Ok(None);
        };
        let secret = secret.reveal().context("http.route_services.secret")?;
        let previous = config.previous_secret.as_ref();
        let previous = previous
            .map(|secret| {
                secret
                    .reveal()
                    .context("http.route_services.previous_secret")
            })
            .transpose()?;
        let hosts = config.hairpinning_allowlist.iter();
        Ok(Some(Arc::new(RouteServices {
            keys: Keys::new(&secret, previous.as_deref()),
            timeout: config.timeout,
            scheme: match config.recommend_https {
                true => "https",
                false => "http",
            },
            hairpinning: config.hairpinning,
            hairpin_hosts: hosts
                .map(|host| host.trim_start_matches('*').to_ascii_lowercase())
                .collect(),
            attempts: config.max_attempts,
            strict: config.strict_signature_validation,
        })))
    }

    fn verify(&self, headers: &HeaderMap) -> Result<String, InvalidSignature> {
        let first = |name| headers.get(name).map_or(&b""[..], HeaderValue::as_bytes);
        let now = SystemTime::now();
        self.keys
            .verify(first(SIGNATURE), first(METADATA), now, self.timeout)
    }

    /// Whether a service of this host may be reached as a route.
    fn may_hairpin(&self, host: &str) -> bool {
        let host = host.to_ascii_lowercase();
        let domain = host.find('.').map_or("", |dot| &host[dot..]);
        self.hairpinning
            && (self.hairpin_hosts.is_empty()
                || self.hairpin_hosts.contains(&host)
                || self.hairpin_hosts.contains(domain))
    }
}

/// Where a request of the pool goes next.
///
/// # Errors
/// It cannot go there, or a signature that it carries does not hold.
pub(super) fn leg<B>(
    worker: &Worker,
    pool: &PoolState,
    findings: &Findings,
    request: &Request<B>,
) -> Result<Leg, Failure> {
    let Some(service) = &pool.route_service_url else {
        if findings.proxy_signature {
            inspect_strictly(worker, request.headers())?;
        }
        return Ok(Leg::Direct);
    };
    let rules = worker
        .settings(|settings| settings.route_services.clone())
        .ok_or(Failure::RouteService(RouteServiceFailure::Disabled))?;
    if findings.upgrade {
        return Err(Failure::RouteService(RouteServiceFailure::Upgrade));
    }
    let signature = request.headers().get(SIGNATURE);
    if signature.is_some_and(|signature| !signature.is_empty()) {
        let returned = rules
            .verify(request.headers())
            .and_then(|url| is_of_route(worker, pool, &url, request));
        return match returned {
            Ok(()) => Ok(Leg::Returned),
            Err(error) => Err(Failure::RouteService(RouteServiceFailure::Signature(error))),
        };
    }
    match detour(worker, rules, service, findings, request) {
        Some(detour) => Ok(Leg::ToService(Box::new(detour))),
        None => Err(Failure::RouteService(RouteServiceFailure::Request)),
    }
}

/// Takes what is between gateway and service alone from a message that goes on.
pub(super) fn strip(headers: &mut HeaderMap) {
    for name in [FORWARDED_URL, METADATA, SIGNATURE] {
        headers.remove(name);
    }
}

impl Detour {
    /// The service's host and port.
    pub(super) fn service(&self) -> &Authority {
        &self.authority
    }

    /// Makes the request the service's, and gives the pool to send it to.
    ///
    /// # Errors
    /// The service's host has no address.
    pub(super) async fn begin<B>(
        self,
        worker: &Rc<Worker>,
        request: &mut Request<B>,
    ) -> Result<Rc<PoolState>, Failure> {
        *request.uri_mut() = Uri::from(self.target);
        for (name, value) in self.headers {
            // In place of all that a client may have said.
            request.headers_mut().insert(name, value);
        }
        match self.hairpin {
            Some(pool) => Ok(pool),
            None => {
                let services = &worker.route_services;
                services
                    .pool(worker, &self.authority, self.rules.attempts)
                    .await
            }
        }
    }
}

/// `None` if the service's URL is none, or there is no signing.
fn detour<B>(
    worker: &Worker,
    rules: Arc<RouteServices>,
    service: &str,
    findings: &Findings,
    request: &Request<B>,
) -> Option<Detour> {
    let service = service.parse::<Uri>().ok()?.into_parts();
    let authority = service.authority?;
    if service.scheme != Some(Scheme::HTTPS) || authority.as_str().contains('@') {
        return None;
    }
    let target = service
        .path_and_query
        .unwrap_or(PathAndQuery::from_static("/"));
    let host = router::strip_port(findings.host_str());
    let asked = request.uri().path_and_query();
    let asked = asked.map_or("/", PathAndQuery::as_str);
    let forwarded_url = format!("{}://{host}{asked}", rules.scheme);
    let signed = rules.keys.sign(&forwarded_url, SystemTime::now())?;
    let headers = [
        (HOST, HeaderValue::from_str(authority.as_str()).ok()?),
        (
            FORWARDED_URL,
            HeaderValue::from_maybe_shared(bytes::Bytes::from(forwarded_url)).ok()?,
        ),
        (SIGNATURE, HeaderValue::try_from(signed.signature).ok()?),
        (METADATA, HeaderValue::try_from(signed.metadata).ok()?),
    ];
    let may_hairpin = rules.may_hairpin(authority.host());
    let lookup = Lookup {
        host: authority.host(),
        path: target.path(),
        query: target.query(),
        method: request.method(),
        headers: request.headers(),
    };
    Some(Detour {
        hairpin: may_hairpin
            .then(|| pool_of_service(worker, &lookup))
            .flatten(),
        rules,
        authority,
        target,
        headers,
    })
}

/// The pool of the route that a service is. A route that would not pass the request to its backends
/// is reached as any client reaches it.
fn pool_of_service(worker: &Worker, lookup: &Lookup<'_>) -> Option<Rc<PoolState>> {
    let pool = worker.snapshot(|snapshot| {
        let found = router::find(snapshot, lookup).ok()?;
        Some(worker.pool(&found))
    })?;
    let redirects = pool.policy.as_ref().is_some_and(|it| it.redirect.is_some());
    (pool.route_service_url.is_none() && !redirects).then_some(pool)
}

/// Whether the URL that was signed leads to the route of the request that carries it.
fn is_of_route<B>(
    worker: &Worker,
    pool: &PoolState,
    url: &str,
    request: &Request<B>,
) -> Result<(), InvalidSignature> {
    let url: Uri = url.parse().map_err(|_| InvalidSignature::OtherRoute)?;
    let lookup = Lookup {
        host: url.host().unwrap_or_default(),
        path: url.path(),
        query: url.query(),
        method: request.method(),
        headers: request.headers(),
    };
    let is_same = worker.snapshot(|snapshot| {
        router::find(snapshot, &lookup).is_ok_and(|found| {
            let matched = &pool.matched;
            (found.host, found.path) == (&*matched.host, &*matched.path)
                && found.conditions == matched.conditions.as_deref()
        })
    });
    is_same.then_some(()).ok_or(InvalidSignature::OtherRoute)
}

/// Of a route without a service: who signs may be such a service, and nobody else.
fn inspect_strictly(worker: &Worker, headers: &HeaderMap) -> Result<(), Failure> {
    let rules = worker.settings(|settings| settings.route_services.clone());
    match rules.filter(|rules| rules.strict) {
        Some(rules) => rules
            .verify(headers)
            .map(drop)
            .map_err(|error| Failure::RouteService(RouteServiceFailure::StraySignature(error))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Secret;

    fn may_hairpin(hairpinning: bool, hosts: &[&str], host: &str) -> bool {
        let config = HttpRouteServices {
            secret: Some(toml::Value::from("s").try_into::<Secret>().unwrap()),
            hairpinning,
            hairpinning_allowlist: hosts.iter().map(|&host| host.to_owned()).collect(),
            ..HttpRouteServices::default()
        };
        let rules = RouteServices::load(&config).unwrap().unwrap();
        rules.may_hairpin(host)
    }

    #[test]
    fn hairpinning_is_for_listed_hosts_or_all() {
        for (hairpinning, hosts, host, wanted) in [
            (false, &[][..], "a.example.com", false),
            (true, &[], "a.example.com", true),
            (true, &["A.example.com"], "a.Example.com", true),
            (true, &["*.example.com"], "a.example.com", true),
            (true, &["*.example.com"], "a.b.example.com", false),
            (true, &["*.example.com"], "example.com", false),
            (true, &["example.com"], "a.example.com", false),
        ] {
            let may = may_hairpin(hairpinning, hosts, host);
            assert_eq!(may, wanted, "{hairpinning} {hosts:?} {host}");
        }
    }

    #[test]
    fn a_secret_that_is_not_there_is_named() {
        let config = HttpRouteServices {
            secret: Some(
                toml::Value::from("file:/nowhere/secret")
                    .try_into::<Secret>()
                    .unwrap(),
            ),
            ..HttpRouteServices::default()
        };
        let error = format!("{:#}", RouteServices::load(&config).unwrap_err());
        assert!(error.contains("http.route_services.secret"), "{error}");
    }
}
