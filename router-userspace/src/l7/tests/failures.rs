//! Backends that are dead, slow or broken.

use super::*;

fn timeouts(change: impl FnOnce(&mut HttpTimeouts)) -> HttpConfig {
    let mut config = config();
    change(&mut config.timeouts);
    config
}

const SOON: Duration = Duration::from_millis(50);

#[tokio::test]
async fn a_refused_connection_is_tried_on_another_backend_with_its_body() {
    let alive = TestBackend::named("alive").await;
    let gateway = Gateway::to([refusing().await, alive.address]);
    for _ in 0..4 {
        let response = gateway
            .exchange("POST / HTTP/1.1\r\nHost: a.com\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
            .await;
        assert!(response.ends_with("alive"), "{response}");
    }
    let totals = gateway.metrics.totals();
    assert_eq!(
        (totals.retries, totals.ejections),
        (1, 1),
        "ejected after the first failure"
    );
}

#[tokio::test]
async fn a_pool_that_refuses_all_is_502_without_its_address() {
    let address = refusing().await;
    let gateway = Gateway::to([address]);
    let response = gateway.get("a.com").await;
    assert_status(&response, 502);
    assert!(response.contains("x-cf-routererror: endpoint_failure (connection refused)\r\n"));
    assert!(
        response.ends_with("502 Bad Gateway: Registered endpoint failed to handle the request.\n")
    );
    assert!(
        !response.contains(&address.port().to_string()),
        "{response}"
    );
    let totals = gateway.metrics.totals();
    assert!(totals.errors.contains(&("endpoint_refused", 1)));
}

#[tokio::test]
async fn a_pool_without_backends_is_503() {
    let gateway = Gateway::to([]);
    let response = gateway.get("a.com").await;
    assert_status(&response, 503);
    assert!(response.contains("x-cf-routererror: no_endpoints\r\n"));
    assert!(response.contains("cache-control: public,max-age=2\r\n"));
}

#[tokio::test]
async fn a_response_head_that_does_not_come_is_504() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::with_config(
        snapshot([("a.com", pool([backend(address)]))]),
        timeouts(|timeouts| timeouts.response_headers = SOON),
    );
    let (response, _held) = tokio::join!(gateway.get("a.com"), listener.accept());
    assert_status(&response, 504);
    assert!(response.contains("x-cf-routererror: endpoint_timeout (response headers)\r\n"));
}

#[tokio::test]
async fn a_response_body_that_stalls_ends_the_connection() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::with_config(
        snapshot([("a.com", pool([backend(address)]))]),
        timeouts(|timeouts| timeouts.body_idle = SOON),
    );
    let stalls = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_until(&mut stream, "\r\n\r\n").await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
            .await
            .unwrap();
        stream
    };
    let (response, _held) = tokio::join!(gateway.get("a.com"), stalls);
    assert!(response.ends_with("\r\n\r\nhalf"), "{response}");
    gateway
        .totals(|totals| totals.aborted == 1 && totals.requests_in_flight == 0)
        .await;
}

#[tokio::test]
async fn a_request_body_that_stalls_is_408() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::with_config(
        snapshot([("a.com", pool([backend(address)]))]),
        timeouts(|timeouts| timeouts.body_idle = SOON),
    );
    let stalls =
        gateway.exchange("POST / HTTP/1.1\r\nHost: a.com\r\nContent-Length: 10\r\n\r\nhalf");
    let (response, _held) = tokio::join!(stalls, listener.accept());
    assert_status(&response, 408);
}

#[tokio::test]
async fn a_malformed_request_body_is_400_and_not_the_backends_fault() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    let half = "POST / HTTP/1.1\r\nHost: a.com\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n";
    client.write_all(half.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "2\r\nhi\r\n").await;
    client.write_all(b"zz\r\n").await.unwrap();
    let response = read_to_end(&mut client).await;
    assert_status(&response, 400);
    assert!(response.contains("x-cf-routererror: invalid_body\r\n"));
    assert!(response.contains("connection: close\r\n"), "{response}");
    assert_eq!(read_to_end(&mut stream).await, "", "no end of the body");
    let totals = gateway.metrics.totals();
    assert!(totals.errors.contains(&("bad_request", 1)));
    assert_eq!((totals.retries, totals.ejections), (0, 0));
    let backends =
        poll_until(|| Some(gateway.metrics.backends()).filter(|it| !it.is_empty())).await;
    assert_eq!(backends[&address].failures, 0);
}

#[tokio::test]
async fn a_slow_or_idle_client_is_disconnected() {
    let gateway = Gateway::with_config(
        Snapshot::default(),
        timeouts(|timeouts| {
            timeouts.idle = SOON;
            timeouts.request_headers = SOON;
        }),
    );
    assert_eq!(gateway.exchange("GET / HTTP/1.1\r\nHost: a").await, "");
    assert_eq!(gateway.exchange("").await, "");
    gateway
        .totals(|totals| totals.connections_timed_out == 2)
        .await;
}

#[tokio::test]
async fn a_kept_alive_connection_that_the_backend_closes_costs_no_request() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    let request = b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n";
    let ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

    client.write_all(request).await.unwrap();
    let (mut first, _) = listener.accept().await.unwrap();
    read_until(&mut first, "\r\n\r\n").await;
    first.write_all(ok).await.unwrap();
    read_until(&mut client, "ok").await;

    // The second request is read and dropped, as by a backend whose idle timeout ran out.
    client.write_all(request).await.unwrap();
    read_until(&mut first, "\r\n\r\n").await;
    drop(first);
    let (mut second, _) = listener.accept().await.unwrap();
    read_until(&mut second, "\r\n\r\n").await;
    second.write_all(ok).await.unwrap();
    assert_status(&read_until(&mut client, "ok").await, 200);
}

#[tokio::test]
async fn a_post_that_a_backend_may_have_acted_on_is_not_repeated() {
    let (listener, address) = scripted().await;
    let other = TestBackend::named("other").await;
    let mut snapshot = snapshot([("a.com", pool([backend(address), backend(other.address)]))]);
    snapshot.unhealthy.insert(other.address);
    let gateway = Gateway::start(snapshot);
    let mut client = gateway.connect().await;
    let get = b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n";
    client.write_all(get).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;
    let ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    stream.write_all(ok).await.unwrap();
    read_until(&mut client, "ok").await;

    // On the kept-alive connection, where a GET would be repeated.
    let post =
        b"POST / HTTP/1.1\r\nHost: a.com\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi";
    client.write_all(post).await.unwrap();
    read_until(&mut stream, "\r\n\r\nhi").await;
    drop(stream);
    let response = read_to_end(&mut client).await;
    assert_status(&response, 502);
    assert!(response.contains("endpoint_failure (connection closed)"));
    let totals = gateway.metrics.totals();
    assert_eq!((totals.backend_connections_reused, totals.retries), (1, 0));
    assert!(other.seen().is_empty());
}

#[tokio::test]
async fn a_backend_that_does_not_speak_http_is_502() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let speaks = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"220 mail ready\r\n").await.unwrap();
        stream
    };
    let (response, _held) = tokio::join!(gateway.get("a.com"), speaks);
    assert_status(&response, 502);
}

#[tokio::test]
async fn a_truncated_response_is_not_passed_off_as_whole() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let breaks = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_until(&mut stream, "\r\n\r\n").await;
        let half = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n";
        stream.write_all(half).await.unwrap();
    };
    let (response, ()) = tokio::join!(gateway.get("a.com"), breaks);
    assert!(!response.contains("\r\n0\r\n"), "{response}");
    gateway.totals(|totals| totals.aborted == 1).await;
}
