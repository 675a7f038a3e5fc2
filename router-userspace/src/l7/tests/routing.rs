//! Requests reach the backend their host names, with the headers it expects.

use super::*;
use crate::route::{Instance, Registered};

#[tokio::test]
async fn the_host_chooses_the_backend() {
    let (a, b) = (TestBackend::named("a").await, TestBackend::named("b").await);
    let gateway = Gateway::start(snapshot([
        ("a.com", pool([backend(a.address)])),
        ("*.b.com", pool([backend(b.address)])),
    ]));
    assert!(gateway.get("A.com:80").await.ends_with("\r\n\r\na"));
    assert!(gateway.get("x.y.b.com").await.ends_with("\r\n\r\nb"));
    let unknown = gateway.get("b.com").await;
    assert_status(&unknown, 404);
    assert!(unknown.contains("x-cf-routererror: unknown_route\r\n"));
    assert!(unknown.contains("cache-control: no-cache, no-store\r\n"));
    assert!(unknown.contains("x-content-type-options: nosniff\r\n"));
    assert!(unknown.ends_with("404 Not Found: Requested route ('b.com') does not exist.\n"));
}

#[tokio::test]
async fn before_the_first_route_no_host_is_said_not_to_exist() {
    let gateway = Gateway::start(Snapshot::default());
    let response = gateway.get("a.com").await;
    assert_status(&response, 503);
    assert!(response.contains("x-cf-routererror: no_routes\r\n"));
    assert!(response.contains("retry-after: 1\r\n"), "{response}");
    gateway.published.store(Arc::new(snapshot([])));
    assert_status(&gateway.get("a.com").await, 404);
}

#[tokio::test]
async fn a_published_snapshot_is_used_by_the_next_request_of_an_open_connection() {
    let (a, b) = (TestBackend::named("a").await, TestBackend::named("b").await);
    let gateway = Gateway::to([a.address]);
    let mut client = gateway.connect().await;
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n")
        .await
        .unwrap();
    read_until(&mut client, "\r\n\r\na").await;
    gateway
        .published
        .store(Arc::new(snapshot([("a.com", pool([backend(b.address)]))])));
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n")
        .await
        .unwrap();
    read_until(&mut client, "\r\n\r\nb").await;
}

#[tokio::test]
async fn requests_take_turns_over_the_pool() {
    let (a, b) = (TestBackend::named("a").await, TestBackend::named("b").await);
    let gateway = Gateway::to([a.address, b.address]);
    for _ in 0..4 {
        assert_status(&gateway.get("a.com").await, 200);
    }
    assert_eq!((a.seen().len(), b.seen().len()), (2, 2));
}

#[tokio::test]
async fn an_unhealthy_backend_is_avoided() {
    let (a, b) = (TestBackend::named("a").await, TestBackend::named("b").await);
    let mut snapshot = snapshot([("a.com", pool([backend(a.address), backend(b.address)]))]);
    snapshot.unhealthy.insert(a.address);
    let gateway = Gateway::start(snapshot);
    for _ in 0..4 {
        assert!(gateway.get("a.com").await.ends_with("\r\n\r\nb"));
    }
}

#[tokio::test]
async fn with_too_few_healthy_backends_all_are_used_and_it_is_counted() {
    let (a, b) = (TestBackend::named("a").await, TestBackend::named("b").await);
    let mut snapshot = snapshot([("a.com", pool([backend(a.address), backend(b.address)]))]);
    snapshot.unhealthy.insert(a.address);
    snapshot.panic_threshold = 51;
    let gateway = Gateway::start(snapshot);
    for _ in 0..4 {
        assert_status(&gateway.get("a.com").await, 200);
    }
    assert_eq!((a.seen().len(), b.seen().len()), (2, 2));
    gateway.totals(|totals| totals.panic_picks == 4).await;
}

#[tokio::test]
async fn the_backend_is_told_of_the_client_and_of_itself() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::start(snapshot([(
        "a.com",
        pool([Backend {
            instance: Instance {
                app: Some("app".into()),
                id: Some("instance".into()),
                index: Some("3".into()),
                ..Instance::default()
            }
            .shared(),
            ..backend(address)
        }]),
    )]));
    let mut client = gateway.connect().await;
    client
        .write_all(
            b"GET http://a.com/p?q=1 HTTP/1.1\r\nHost: a.com\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n",
        )
        .await
        .unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    let head = read_until(&mut stream, "\r\n\r\n").await;
    assert!(head.starts_with("GET /p?q=1 HTTP/1.1\r\n"), "{head}");
    for line in [
        "host: a.com",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-proto: http",
        "x-forwarded-host: a.com",
        "x-cf-applicationid: app",
        "x-cf-instanceid: instance",
        "x-cf-instanceindex: 3",
    ] {
        assert!(
            head.contains(&format!("\r\n{line}\r\n")),
            "{line} in {head}"
        );
    }
    let id = head
        .split("x-vcap-request-id: ")
        .nth(1)
        .unwrap()
        .split("\r\n")
        .next()
        .unwrap();
    stream
        .write_all(b"HTTP/1.1 204 No Content\r\n\r\n")
        .await
        .unwrap();
    let response = read_until(&mut client, "\r\n\r\n").await;
    assert!(
        response.contains(&format!("x-vcap-request-id: {id}\r\n")),
        "{response}"
    );
}

#[tokio::test]
async fn backend_connections_are_kept_and_reused() {
    let a = TestBackend::named("a").await;
    let gateway = Gateway::to([a.address]);
    for _ in 0..5 {
        assert_status(&gateway.get("a.com").await, 200);
    }
    assert_eq!((a.seen().len(), a.connections()), (5, 1));
    let totals = gateway.totals(|totals| totals.responses[1] == 5).await;
    assert_eq!(totals.backend_connections_opened, 1);
    assert_eq!(totals.backend_connections_reused, 4);
    assert_eq!(totals.latency.count(), 5);
    let backends =
        poll_until(|| Some(gateway.metrics.backends()).filter(|it| !it.is_empty())).await;
    assert_eq!(backends[&a.address].requests, 5);
    assert_eq!(backends[&a.address].in_flight, 0);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let a = TestBackend::answering(|request| Response::new(full(request.uri().path().to_owned())))
        .await;
    let gateway = Gateway::to([a.address]);
    let response = gateway
        .exchange(
            "GET /1 HTTP/1.1\r\nHost: a.com\r\n\r\nGET /2 HTTP/1.1\r\nHost: a.com\r\n\r\n\
             GET /3 HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n",
        )
        .await;
    let places: Vec<_> = ["/1", "/2", "/3"]
        .map(|path| response.find(path).unwrap())
        .into();
    assert!(places.is_sorted(), "{response}");
}

#[tokio::test]
async fn a_route_with_a_route_service_is_not_served_past_it() {
    let a = TestBackend::named("a").await;
    let mut bound = pool([backend(a.address)]);
    bound.registered = Registered {
        route_service_url: Some("https://waf.example.com".into()),
        ..Registered::default()
    }
    .shared();
    let gateway = Gateway::start(snapshot([("a.com", bound)]));
    let response = gateway.get("a.com").await;
    assert_status(&response, 502);
    assert!(response.contains("x-cf-routererror: route_service_unsupported\r\n"));
    assert!(a.seen().is_empty());
}

const APP: &str = "5cdc7595-2e9b-4f62-8d5a-a86b92f2df0e";
const PROCESS: &str = "0fa7de1c-0e3b-4c3c-9d5d-2d8a3b1c9f10";

/// Two instances, `0` and `1`, of one app and process.
async fn two_instances() -> Gateway {
    let mut backends = Vec::new();
    for index in ["0", "1"] {
        backends.push(Backend {
            instance: Instance {
                app: Some(APP.into()),
                index: Some(index.into()),
                tags: [("process_id".into(), PROCESS.into())].into(),
                ..Instance::default()
            }
            .shared(),
            ..backend(TestBackend::named(index).await.address)
        });
    }
    Gateway::start(snapshot([("a.com", pool(backends))]))
}

async fn get_instance(gateway: &Gateway, line: &str) -> String {
    let request = format!("GET / HTTP/1.1\r\nHost: a.com\r\n{line}\r\nConnection: close\r\n\r\n");
    gateway.exchange(request).await
}

#[tokio::test]
async fn a_request_for_an_instance_reaches_that_one() {
    let gateway = two_instances().await;
    for _ in 0..3 {
        let app = get_instance(&gateway, &format!("X-CF-App-Instance: {APP}:1")).await;
        assert!(app.ends_with("\r\n\r\n1"), "{app}");
        let process = get_instance(&gateway, &format!("X-CF-Process-Instance: {PROCESS}:0")).await;
        assert!(process.ends_with("\r\n\r\n0"), "{process}");
    }
    let any = get_instance(&gateway, &format!("X-CF-Process-Instance: {PROCESS}")).await;
    assert_status(&any, 200);
}

#[tokio::test]
async fn an_instance_that_does_not_exist_is_400() {
    let gateway = two_instances().await;
    for line in [
        format!("X-CF-App-Instance: {APP}:2"),
        format!("X-CF-App-Instance: {PROCESS}:0"),
        format!("X-CF-Process-Instance: {APP}:0"),
        format!("X-CF-Process-Instance: {APP}"),
    ] {
        let response = get_instance(&gateway, &line).await;
        assert_status(&response, 400);
        assert!(
            response.contains("x-cf-routererror: unknown_route\r\n"),
            "{line}: {response}"
        );
    }
}

#[tokio::test]
async fn a_malformed_instance_is_400() {
    let gateway = two_instances().await;
    for value in [
        "1",
        ":1",
        &APP[1..],
        &format!("{APP}:"),
        &format!("{APP}:x"),
        &APP.to_uppercase(),
    ] {
        for name in ["app", "process"] {
            let response = get_instance(&gateway, &format!("x-cf-{name}-instance: {value}")).await;
            assert_status(&response, 400);
            let error = format!("x-cf-routererror: invalid_cf_{name}_instance_header\r\n");
            assert!(response.contains(&error), "{value}: {response}");
        }
    }
    let response = get_instance(&gateway, &format!("X-CF-App-Instance: {APP}")).await;
    assert!(
        response.contains("invalid_cf_app_instance_header"),
        "{response}"
    );
}

#[tokio::test]
async fn only_the_app_instance_is_kept_from_the_backend() {
    let (listener, address) = scripted().await;
    let instance = Backend {
        instance: Instance {
            app: Some(APP.into()),
            index: Some("0".into()),
            ..Instance::default()
        }
        .shared(),
        ..backend(address)
    };
    let gateway = Gateway::start(snapshot([("a.com", pool([instance]))]));
    let mut client = gateway.connect().await;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: a.com\r\nX-CF-App-Instance: {APP}:0\r\n\
         X-CF-Process-Instance: {PROCESS}\r\n\r\n"
    );
    client.write_all(request.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    let head = read_until(&mut stream, "\r\n\r\n").await;
    assert!(!head.contains("x-cf-app-instance"), "{head}");
    assert!(
        head.contains(&format!("x-cf-process-instance: {PROCESS}\r\n")),
        "{head}"
    );
}
