//! Which requests are sent to another backend after one has failed.

use super::*;
use crate::route::policy::{HttpPolicy, RouteRetries};

/// Two backends, of which one reads a request to its end and closes; requests go there first.
struct Closing {
    gateway: Gateway,
    listener: TcpListener,
    other: TestBackend,
}

impl Closing {
    async fn start(config: HttpConfig, policy: Option<HttpPolicy>) -> Closing {
        let (listener, address) = scripted().await;
        let other = TestBackend::answering(|request| {
            let (sender, body) = tokio::sync::oneshot::channel();
            tokio::spawn(async move {
                let bytes = request.into_body().collect().await.unwrap().to_bytes();
                let _ = sender.send(Ok(hyper::body::Frame::data(bytes)));
            });
            let body = futures_util::stream::once(async { body.await.unwrap() });
            Response::new(http_body_util::StreamBody::new(body).boxed())
        })
        .await;
        let mut pool = pool([backend(address), backend(other.address)]);
        pool.policy = policy.map(Arc::new);
        let mut snapshot = snapshot([("a.com", pool)]);
        snapshot.unhealthy.insert(other.address);
        Closing {
            gateway: Gateway::with_config(snapshot, config),
            listener,
            other,
        }
    }

    /// What the client gets for a request that ends with `end`, which the first backend closes on.
    async fn exchange(&self, request: &str, end: &str) -> String {
        let closes = async {
            let (mut stream, _) = self.listener.accept().await.unwrap();
            read_until(&mut stream, end).await;
        };
        tokio::join!(self.gateway.exchange(request), closes).0
    }
}

#[tokio::test]
async fn idempotent_requests_are_sent_again_with_their_bodies() {
    for (method, headers) in [
        ("GET", ""),
        ("PUT", "Content-Length: 5\r\n"),
        ("DELETE", "Content-Length: 5\r\n"),
        ("POST", "Content-Length: 5\r\nIdempotency-Key: 7\r\n"),
        ("POST", "Content-Length: 5\r\nX-Idempotency-Key: 7\r\n"),
    ] {
        let closing = Closing::start(config(), None).await;
        let body = if method == "GET" { "" } else { "hello" };
        let request = format!(
            "{method} / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n{headers}\r\n{body}"
        );
        let response = closing.exchange(&request, &format!("\r\n\r\n{body}")).await;
        assert_status(&response, 200);
        assert!(response.contains(body), "{response}");
        assert_eq!(closing.other.seen(), [format!("{method} /")]);
        assert_eq!(closing.gateway.metrics.totals().retries, 1);
    }
}

#[tokio::test]
async fn a_chunked_body_is_sent_again_from_its_start() {
    let closing = Closing::start(config(), None).await;
    let mut client = closing.gateway.connect().await;
    let head =
        "PUT / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
    client.write_all(head.as_bytes()).await.unwrap();
    client.write_all(b"2\r\nhe\r\n").await.unwrap();
    let (mut stream, _) = closing.listener.accept().await.unwrap();
    read_until(&mut stream, "2\r\nhe\r\n").await;
    drop(stream);
    poll_until(|| (closing.other.seen().len() == 1).then_some(())).await;
    client.write_all(b"3\r\nllo\r\n0\r\n\r\n").await.unwrap();
    let response = read_to_end(&mut client).await;
    assert_status(&response, 200);
    assert!(response.contains("hello"), "{response}");
}

#[tokio::test]
async fn a_post_and_a_body_too_long_to_keep_are_sent_once() {
    let mut short = config();
    short.retries.buffer_bytes = 4;
    for (method, config) in [("POST", config()), ("PUT", short)] {
        let closing = Closing::start(config, None).await;
        let request = format!(
            "{method} / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"
        );
        let response = closing.exchange(&request, "hello").await;
        assert_status(&response, 502);
        assert!(closing.other.seen().is_empty(), "{method}");
    }
}

#[tokio::test]
async fn a_route_may_have_other_methods_repeated_and_attempts_of_its_own() {
    let policy = |attempts| {
        Some(HttpPolicy {
            retries: RouteRetries {
                attempts,
                methods: vec![http::Method::POST],
            },
            ..HttpPolicy::new(Origin::File)
        })
    };
    let request =
        "POST / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello";
    let closing = Closing::start(config(), policy(None)).await;
    assert_status(&closing.exchange(request, "hello").await, 200);
    let closing = Closing::start(config(), policy(Some(1))).await;
    assert_status(&closing.exchange(request, "hello").await, 502);
}

#[tokio::test]
async fn when_the_budget_is_spent_failures_are_answered() {
    let mut config = config();
    config.retries.budget_percent = 0;
    config.retries.min_per_second = 0;
    let closing = Closing::start(config, None).await;
    let request = "GET / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n";
    assert_status(&closing.exchange(request, "\r\n\r\n").await, 502);
    let totals = closing.gateway.metrics.totals();
    assert_eq!((totals.retries, totals.retries_refused), (0, 1));
    assert!(closing.other.seen().is_empty());
}
