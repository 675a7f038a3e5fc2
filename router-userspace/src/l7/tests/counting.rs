//! What is counted of routes and backends.

use std::collections::BTreeMap;

use super::*;
use crate::admin::listing::PageRequest;
use crate::admin::traffic;
use crate::l7::metrics::{OTHER, TrafficTotals, UNKNOWN};

/// Routes once they add up to as many requests as the totals have.
async fn routes(gateway: &Gateway) -> BTreeMap<String, TrafficTotals> {
    poll_until(|| {
        let totals = gateway.metrics.totals();
        let routes = gateway.metrics.routes();
        let sum = |count: fn(&TrafficTotals) -> u64| routes.values().map(count).sum::<u64>();
        let classes: [u64; 5] =
            std::array::from_fn(|class| routes.values().map(|route| route.responses[class]).sum());
        let is_whole = classes == totals.responses
            && sum(|route| route.aborted) == totals.aborted
            && sum(|route| route.retries) == totals.retries
            && sum(TrafficTotals::in_flight) == totals.requests_in_flight
            && totals.requests_in_flight == 0;
        is_whole.then_some(routes)
    })
    .await
}

#[tokio::test]
async fn counters_of_routes_and_backends_add_up_to_the_totals() {
    let a = TestBackend::answering(|request| {
        let mut response = Response::new(full("hello"));
        if request.uri().path() == "/bad" {
            *response.status_mut() = http::StatusCode::INTERNAL_SERVER_ERROR;
        }
        response
    })
    .await;
    let gone = refusing().await;
    let gateway = Gateway::start(snapshot([
        ("a.com", pool([backend(a.address)])),
        ("b.com", pool([backend(gone)])),
    ]));
    let post =
        "POST /bad HTTP/1.1\r\nHost: a.com\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc";
    assert_status(&gateway.exchange(post).await, 500);
    assert_status(&gateway.get("a.com").await, 200);
    assert_status(&gateway.get("b.com").await, 502);
    assert_status(&gateway.get("c.com").await, 404);
    assert_status(&gateway.exchange("GET / HTTP/1.1\r\n\r\n").await, 400);

    let routes = routes(&gateway).await;
    let of = |name: &str| routes[name];
    assert_eq!(of("a.com").responses, [0, 1, 0, 0, 1]);
    assert_eq!((of("a.com").bytes_in, of("a.com").bytes_out), (3, 10));
    assert_eq!(of("a.com").latency.count(), 2);
    assert!(of("a.com").latency.quantile(0.5).unwrap() > Duration::ZERO);
    assert_eq!(
        (of("b.com").responses, of("b.com").ejections),
        ([0, 0, 0, 0, 1], 1)
    );
    assert_eq!(of(UNKNOWN).responses, [0, 0, 0, 2, 0]);
    assert_eq!(of(OTHER).begun, 0);

    let backends = gateway.metrics.backends();
    let answered = &backends[&a.address];
    assert_eq!(
        (answered.requests, answered.traffic.responses),
        (2, [0, 1, 0, 0, 1])
    );
    assert_eq!(
        (answered.traffic.bytes_in, answered.traffic.bytes_out),
        (3, 10)
    );
    let refused = &backends[&gone];
    assert_eq!((refused.requests, refused.failures), (1, 1));
    assert_eq!(
        (refused.traffic.responses, refused.traffic.ejections),
        ([0; 5], 1)
    );
}

#[tokio::test]
async fn a_request_under_way_is_in_flight_on_its_route_and_aborted_if_its_client_leaves() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    let request = b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n";
    client.write_all(request).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;
    poll_until(|| {
        let routes = gateway.metrics.routes();
        (routes.get("a.com")?.in_flight() == 1).then_some(())
    })
    .await;
    drop(client);
    gateway.totals(|totals| totals.aborted == 1).await;
    let routes = routes(&gateway).await;
    assert_eq!((routes["a.com"].aborted, routes["a.com"].begun), (1, 1));
}

#[tokio::test]
async fn a_route_that_is_withdrawn_leaves_the_sums_as_they_were() {
    let a = TestBackend::named("a").await;
    let gateway = Gateway::to([a.address]);
    gateway.get("a.com").await;
    routes(&gateway).await;
    gateway.published.store(Arc::new(Snapshot {
        revision: 2,
        ..Snapshot::default()
    }));
    let routes = poll_until(|| {
        let routes = gateway.metrics.routes();
        (!routes.contains_key("a.com")).then_some(routes)
    })
    .await;
    assert_eq!(routes[OTHER].responses, [0, 1, 0, 0, 0]);
}

/// What `/metrics` says.
fn exposition(gateway: &Gateway) -> String {
    let scrape = crate::metrics::Scrape {
        metrics: Arc::default(),
        published: Arc::clone(&gateway.published),
        l4: None,
        l7: Arc::clone(&gateway.metrics),
        sockmap: None,
    };
    let mut registry = prometheus_client::registry::Registry::default();
    registry.register_collector(Box::new(scrape));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    text
}

#[tokio::test]
async fn metrics_have_each_route_and_backend_if_asked_for() {
    let a = TestBackend::named("a").await;
    let gateway = Gateway::to([a.address]);
    gateway.get("a.com").await;
    routes(&gateway).await;
    assert!(!exposition(&gateway).contains("viaduct_http_route_"));

    let mut asking = config();
    asking.metrics.per_route = true;
    asking.metrics.per_backend = true;
    gateway.proxy.reload(&asking).unwrap();
    let text = exposition(&gateway);
    for line in [
        "viaduct_http_route_responses_total{route=\"a.com\",status=\"2xx\"} 1".to_owned(),
        "viaduct_http_route_request_seconds_count{route=\"a.com\"} 1".to_owned(),
        "viaduct_http_route_request_seconds_bucket{le=\"+Inf\",route=\"a.com\"} 1".to_owned(),
        "viaduct_http_route_sent_bytes_total{route=\"a.com\"} 1".to_owned(),
        format!(
            "viaduct_http_backend_responses_total{{backend=\"{}\",status=\"2xx\"}} 1",
            a.address
        ),
    ] {
        assert!(
            text.lines().any(|it| it == line),
            "{line} is missing in {text}"
        );
    }
}

#[tokio::test]
async fn the_admin_api_has_pages_of_routes_and_backends() {
    let a = TestBackend::named("a").await;
    let gateway = Gateway::to([a.address]);
    gateway.get("a.com").await;
    routes(&gateway).await;
    let snapshot = gateway.published.load();
    let mut request = PageRequest {
        limit: Some(2),
        after: None,
    };
    let first = traffic::routes(&snapshot, &gateway.metrics, &request).unwrap();
    let first = serde_json::to_value(first).unwrap();
    assert_eq!(first["rows"][0]["route"], OTHER);
    assert_eq!(
        (&first["rows"][1]["route"], &first["next"]),
        (&UNKNOWN.into(), &UNKNOWN.into())
    );
    request.after = Some(UNKNOWN.to_owned());
    let second = traffic::routes(&snapshot, &gateway.metrics, &request).unwrap();
    let second = serde_json::to_value(second).unwrap();
    assert_eq!(second["rows"][0]["route"], "a.com");
    assert_eq!(
        second["rows"][0]["responses"],
        serde_json::json!([0, 1, 0, 0, 0])
    );
    assert!(second["rows"][0]["latency"]["p99"].as_f64().unwrap() > 0.0);
    assert!(second["next"].is_null());
    let backends = traffic::backends(&snapshot, &gateway.metrics, &PageRequest::default());
    let backends = serde_json::to_value(backends.unwrap()).unwrap();
    assert_eq!(backends["rows"][0]["backend"], a.address.to_string());
    assert_eq!(backends["rows"][0]["requests"], 1);
}
