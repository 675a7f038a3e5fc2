//! `/v1/explain`: what the gateway would do with a packet, or with a request, and why.
//!
//! A packet is put to the loaded program, by way of the agent that owns it. A request is looked up in
//! the published snapshot as layer 7 does; what one worker knows alone (which connections it has,
//! which backend just refused one) is not in it.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri};
use axum::response::{IntoResponse, Json, Response};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::admin::policy::{PolicyRow, policy};
use crate::admin::{Admin, LAYER_4_IS_OFF, refuse};
use crate::config::HttpBalance;
use crate::event::Event;
use crate::l4::explain::Question;
use crate::l4::probe::Probe;
use crate::l7::router::{self, Lookup, NoMatch};
use crate::route::{Pool, Vip};
use crate::snapshot::Snapshot;

#[derive(Debug, Deserialize)]
pub(super) struct ExplainRequest {
    /// `tcp/ADDRESS:PORT`, `udp/ADDRESS:PORT` or `http://HOST/PATH`.
    what: String,
    /// The client of a packet.
    from: Option<SocketAddr>,
    /// Whether a TCP segment is in the middle of a connection.
    #[serde(default)]
    established: bool,
    /// Of a request; `GET` if absent.
    method: Option<String>,
    /// Of a request, `NAME: VALUE` on a line each.
    headers: Option<String>,
}

pub(super) async fn explain(
    State(admin): State<Arc<Admin>>,
    Query(request): Query<ExplainRequest>,
) -> Response {
    if request.what.contains("://") {
        let snapshot = admin.scrape.published.load_full();
        let balance = admin.config.borrow().http.balance;
        return match explain_request(&snapshot, &request, balance) {
            Ok(explanation) => Json(explanation).into_response(),
            Err(error) => refuse(StatusCode::BAD_REQUEST, error),
        };
    }
    match probe(&request) {
        Ok(probe) => explain_packet(&admin, probe).await,
        Err(error) => refuse(StatusCode::BAD_REQUEST, error),
    }
}

async fn explain_packet(admin: &Admin, probe: Probe) -> Response {
    if admin.scrape.l4.is_none() {
        return refuse(StatusCode::NOT_FOUND, LAYER_4_IS_OFF);
    }
    let (answer, answered) = oneshot::channel();
    let question = Event::Explain(Question { probe, answer });
    if admin.inbox.send(question).await.is_err() {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "the agent has ended");
    }
    match answered.await {
        Ok(Ok(explanation)) => Json(explanation).into_response(),
        Ok(Err(error)) => refuse(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")),
        Err(_) => refuse(StatusCode::SERVICE_UNAVAILABLE, "the agent has ended"),
    }
}

fn probe(request: &ExplainRequest) -> Result<Probe, String> {
    let vip: Vip = request
        .what
        .parse()
        .map_err(|error| format!("what: {error}"))?;
    if vip.is_range() {
        return Err("what: a packet has one port".to_owned());
    }
    let from = request.from;
    let source = from.ok_or("from: the client's ADDRESS:PORT is missing")?;
    let source = SocketAddr::new(source.ip().to_canonical(), source.port());
    if source.is_ipv4() != vip.address.is_ipv4() {
        return Err("from: of another address family than the VIP".to_owned());
    }
    Ok(Probe {
        proto: vip.proto,
        source,
        destination: SocketAddr::new(vip.address, vip.ports.first),
        established: request.established,
    })
}

/// What becomes of a request.
#[derive(Debug, PartialEq, Serialize)]
struct RequestExplanation {
    /// In sentences.
    steps: Vec<String>,
    /// Host and path of the route; null if there is none.
    route: Option<String>,
    /// What the request is beside, as the route wants it.
    conditions: Option<String>,
    /// What is declared of the route.
    policy: Option<PolicyRow>,
    balance: Option<&'static str>,
    /// Whether so few backends are healthy that all are used.
    panic: bool,
    /// Those that get requests first, then those that get them when the others fail, then the rest.
    backends: Vec<Candidate>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Candidate {
    address: SocketAddr,
    weight: u16,
    standing: Standing,
    /// Of new requests, in round robin.
    share_percent: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Standing {
    Used,
    /// Used when no other is left to try.
    Unhealthy,
    /// Of weight 0, or drained by an operator.
    Draining,
}

fn explain_request(
    snapshot: &Snapshot,
    request: &ExplainRequest,
    balance: HttpBalance,
) -> Result<RequestExplanation, String> {
    let uri: Uri = request
        .what
        .parse()
        .map_err(|error| format!("what: {error}"))?;
    let host = uri.host().ok_or("what: a URL with a host")?;
    let path = uri.path();
    let method = request.method.as_deref().unwrap_or("GET");
    let lookup = Lookup {
        host,
        path,
        query: uri.query(),
        method: &method.parse().map_err(|error| format!("method: {error}"))?,
        headers: &headers(request.headers.as_deref().unwrap_or_default())?,
    };
    let found = match router::find(snapshot, &lookup) {
        Ok(found) => found,
        Err(reason) => {
            let step = match reason {
                NoMatch::UnknownRoute => format!("no route matches {host}{path}: 404"),
                NoMatch::PathAboveRoot => format!("{path} leads out of the root: 400"),
            };
            return Ok(RequestExplanation {
                steps: vec![step],
                route: None,
                conditions: None,
                policy: None,
                balance: None,
                panic: false,
                backends: Vec::new(),
            });
        }
    };
    let pool = found.pool;
    let panic = snapshot.in_panic(pool);
    let balance = match (pool.balance(), balance) {
        (Some(balance), _) => balance.as_str(),
        (None, HttpBalance::RoundRobin) => "round-robin",
        (None, HttpBalance::LeastConnections) => "least-connections",
    };
    let route = format!("{}{}", found.host, found.path);
    let conditions = found.conditions.map(ToString::to_string);
    let policy = policy(pool);
    let backends = candidates(snapshot, pool, panic);
    let mut steps = vec![format!("{host}{path} is of route {route}")];
    if let Some(conditions) = &conditions {
        steps.push(format!("which is for requests with {conditions}"));
    }
    if let Some(PolicyRow { origin, asks }) = &policy {
        steps.extend(asks.iter().map(|ask| format!("{origin} declares: {ask}")));
    }
    if let Some(url) = pool.route_service_url() {
        steps.push(format!(
            "its route service is {url}, which is not supported: 502"
        ));
    }
    let used = backends.iter().filter(|b| b.standing == Standing::Used);
    steps.push(format!(
        "{} of {} backends get requests, by {balance}",
        used.count(),
        backends.len()
    ));
    if panic {
        steps.push("so few are healthy that health is not looked at".to_owned());
    }
    steps.extend(backends.iter().map(Candidate::sentence));
    Ok(RequestExplanation {
        steps,
        route: Some(route),
        conditions,
        policy,
        balance: Some(balance),
        panic,
        backends,
    })
}

fn headers(lines: &str) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for line in lines.lines() {
        let (name, value) = line
            .split_once(':')
            .ok_or_else(|| format!("headers: {line:?} is not NAME: VALUE"))?;
        let name = HeaderName::try_from(name.trim());
        let value = HeaderValue::try_from(value.trim());
        let (Ok(name), Ok(value)) = (name, value) else {
            return Err(format!("headers: {line:?} is not a header"));
        };
        if headers.try_append(name, value).is_err() {
            return Err("headers: too many".to_owned());
        }
    }
    Ok(headers)
}

fn candidates(snapshot: &Snapshot, pool: &Pool, panic: bool) -> Vec<Candidate> {
    let standing = |address: &SocketAddr, weight: u16| {
        if weight == 0 || snapshot.draining.contains(address) {
            Standing::Draining
        } else if !panic && snapshot.unhealthy.contains(address) {
            Standing::Unhealthy
        } else {
            Standing::Used
        }
    };
    let mut candidates: Vec<Candidate> = pool
        .backends
        .iter()
        .map(|backend| Candidate {
            address: backend.address,
            weight: backend.weight,
            standing: standing(&backend.address, backend.weight),
            share_percent: 0.0,
        })
        .collect();
    let used = candidates.iter().filter(|c| c.standing == Standing::Used);
    let total: u32 = used.map(|candidate| u32::from(candidate.weight)).sum();
    for candidate in &mut candidates {
        if candidate.standing == Standing::Used {
            candidate.share_percent = 100.0 * f64::from(candidate.weight) / f64::from(total);
        }
    }
    candidates.sort_by_key(|candidate| (candidate.standing, candidate.address));
    candidates
}

impl Candidate {
    fn sentence(&self) -> String {
        let Candidate {
            address,
            weight,
            standing,
            share_percent,
        } = self;
        match standing {
            Standing::Used => format!("{address}: weight {weight}, {share_percent:.1} %"),
            Standing::Unhealthy => format!("{address}: unhealthy, when no other is left"),
            Standing::Draining => format!("{address}: drains, nothing new"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::route::declared::DeclaredRoute;
    use crate::route::table::RouteTable;
    use crate::route::wire;
    use crate::route::{Origin, RouteEvent};

    fn snapshot() -> Snapshot {
        let now = Instant::now();
        let mut table = RouteTable::new(Duration::from_secs(120), now);
        for (host, weight) in [(1, 100), (2, 300), (3, 100), (4, 0), (5, 100)] {
            let json = format!(
                r#"{{"host":"10.0.0.{host}","port":80,"uris":["a.x/shop"],"weight":{weight}}}"#
            );
            let registration = wire::register(json.as_bytes(), &[]).unwrap();
            table.apply(RouteEvent::Register(registration), now);
        }
        table.set_health("10.0.0.3:80".parse().unwrap(), false);
        table.set_draining("10.0.0.5:80".parse().unwrap(), None, true);
        table.snapshot()
    }

    fn request(what: &str, from: Option<&str>) -> ExplainRequest {
        ExplainRequest {
            what: what.to_owned(),
            from: from.map(|from| from.parse().unwrap()),
            established: false,
            method: None,
            headers: None,
        }
    }

    fn explain(url: &str) -> RequestExplanation {
        explain_request(&snapshot(), &request(url, None), HttpBalance::RoundRobin).unwrap()
    }

    #[test]
    fn a_request_is_told_its_route_and_its_backends_in_order() {
        let found = explain("http://A.x:8080/shop/cart?q=1");
        assert_eq!(found.route.as_deref(), Some("a.x/shop"));
        assert_eq!(
            found.steps,
            [
                "A.x/shop/cart is of route a.x/shop",
                "2 of 5 backends get requests, by round-robin",
                "10.0.0.1:80: weight 100, 25.0 %",
                "10.0.0.2:80: weight 300, 75.0 %",
                "10.0.0.3:80: unhealthy, when no other is left",
                "10.0.0.4:80: drains, nothing new",
                "10.0.0.5:80: drains, nothing new",
            ]
        );
    }

    #[test]
    fn a_request_without_a_route_is_told_so() {
        assert_eq!(explain("http://b.x/").steps, ["no route matches b.x/: 404"]);
        assert!(explain("http://a.x/other").route.is_none());
        let url = request("http://", None);
        assert!(explain_request(&snapshot(), &url, HttpBalance::RoundRobin).is_err());
    }

    #[test]
    fn a_declared_route_is_told_with_its_conditions_and_what_it_asks_for() {
        let now = Instant::now();
        let mut table = RouteTable::new(Duration::from_secs(120), now);
        let route: DeclaredRoute = toml::from_str(
            "uris = [\"a.x\"]\nmethods = [\"POST\"]\nheaders = { x-a = \"1\" }\n\
             redirect = { scheme = \"https\" }",
        )
        .unwrap();
        for declaration in route.read(Origin::File, &[]).unwrap().declarations {
            table.apply(RouteEvent::Declare(declaration), now);
        }
        let snapshot = table.snapshot();
        let explain = |method: &str, headers: &str| {
            let request = ExplainRequest {
                method: Some(method.to_owned()),
                headers: Some(headers.to_owned()),
                ..request("http://a.x/p", None)
            };
            explain_request(&snapshot, &request, HttpBalance::RoundRobin)
        };
        let found = explain("POST", "Host: a.x\nX-A: 1").unwrap();
        assert_eq!(
            found.steps,
            [
                "a.x/p is of route a.x",
                "which is for requests with POST x-a=1",
                "file declares: redirect 307: scheme https",
                "0 of 0 backends get requests, by round-robin",
            ]
        );
        assert_eq!(explain("GET", "X-A: 1").unwrap().route, None);
        for (method, headers, parameter) in [("P T", "", "method"), ("POST", "x", "headers")] {
            let error = explain(method, headers).unwrap_err();
            assert!(error.starts_with(parameter), "{error}");
        }
    }

    #[test]
    fn a_packet_needs_a_client_of_the_vips_family() {
        let client = Some("198.51.100.7:40000");
        let good = probe(&request("tcp/192.0.2.10:443", client)).unwrap();
        assert_eq!(good.destination, "192.0.2.10:443".parse().unwrap());
        for (what, from, field) in [
            ("tcp/192.0.2.10:443", None, "from"),
            ("tcp/[2001:db8::10]:443", client, "from"),
            ("tcp/192.0.2.10:*", client, "what"),
            ("192.0.2.10:443", client, "what"),
        ] {
            let error = probe(&request(what, from)).unwrap_err();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
