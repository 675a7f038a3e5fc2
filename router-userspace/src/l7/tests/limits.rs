//! What one client or route may have, and what becomes of what is beyond.

use super::*;
use crate::config::{HttpLimits, HttpRate, HttpTimeouts};
use crate::l7::clients::Cutoff;
use crate::route::policy::{HttpPolicy, Rate, RouteLimits};

fn limits(limits: HttpLimits) -> HttpConfig {
    HttpConfig { limits, ..config() }
}

/// One route, `a.com`, that has these limits.
fn limited(address: SocketAddr, limits: RouteLimits, config: HttpConfig) -> Gateway {
    let policy = HttpPolicy {
        limits,
        ..HttpPolicy::new(Origin::File)
    };
    let pool = Pool {
        policy: Some(Arc::new(policy)),
        ..pool([backend(address)])
    };
    Gateway::with_config(snapshot([("a.com", pool)]), config)
}

fn cutoffs(totals: &L7Totals, cutoff: Cutoff) -> u64 {
    totals.cutoffs[cutoff as usize].1
}

const GET: &str = "GET / HTTP/1.1\r\nHost: a.com\r\n\r\n";

#[tokio::test]
async fn a_client_has_so_many_connections_over_all_workers() {
    let a = TestBackend::named("a").await;
    let config = HttpConfig {
        workers: 3,
        ..limits(HttpLimits {
            connections_per_client: 2,
            ..HttpLimits::default()
        })
    };
    let gateway = limited(a.address, RouteLimits::default(), config);
    let mut kept = [gateway.connect().await, gateway.connect().await];
    for stream in &mut kept {
        stream.write_all(GET.as_bytes()).await.unwrap();
        assert_status(&read_until(stream, "\r\n\r\na").await, 200);
    }
    assert_eq!(read_to_end(&mut gateway.connect().await).await, "");
    let totals = gateway.metrics.totals();
    assert_eq!(cutoffs(&totals, Cutoff::Connections), 1);
    drop(kept);
    gateway.totals(|totals| totals.connections_open == 0).await;
    assert_status(&gateway.get("a.com").await, 200);
}

#[tokio::test]
async fn a_connection_ends_with_the_last_request_it_may_have() {
    let a = TestBackend::named("a").await;
    let config = limits(HttpLimits {
        requests_per_connection: 2,
        ..HttpLimits::default()
    });
    let gateway = limited(a.address, RouteLimits::default(), config);
    let mut stream = gateway.connect().await;
    stream.write_all(GET.as_bytes()).await.unwrap();
    let first = read_until(&mut stream, "\r\n\r\na").await;
    assert!(!first.contains("connection: close"), "{first}");
    stream.write_all(GET.as_bytes()).await.unwrap();
    let last = read_to_end(&mut stream).await;
    assert_status(&last, 200);
    assert!(last.contains("connection: close"), "{last}");
    let totals = gateway.metrics.totals();
    assert_eq!(cutoffs(&totals, Cutoff::Requests), 1);
}

#[tokio::test]
async fn a_connection_of_http2_goes_away_after_the_last_request_it_may_have() {
    let a = TestBackend::named("a").await;
    let config = limits(HttpLimits {
        requests_per_connection: 2,
        ..HttpLimits::default()
    });
    let gateway = limited(a.address, RouteLimits::default(), config);
    let io = TokioIo::new(gateway.connect().await);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
        .await
        .unwrap();
    let connection = tokio::spawn(connection);
    for _ in 0..2 {
        let request = Request::get("http://a.com/").body(full("")).unwrap();
        assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
    }
    let ended = tokio::time::timeout(PATIENCE, connection).await.unwrap();
    ended.unwrap().unwrap();
}

#[tokio::test]
async fn a_body_that_says_it_is_too_long_is_refused_at_once() {
    let a = TestBackend::named("a").await;
    let config = limits(HttpLimits {
        request_body_bytes: 10,
        ..HttpLimits::default()
    });
    let gateway = limited(a.address, RouteLimits::default(), config);
    let post = "POST / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\nContent-Length: ";
    let response = gateway
        .exchange(format!("{post}10\r\n\r\n0123456789"))
        .await;
    assert_status(&response, 200);
    // No byte of it has to come.
    let response = gateway.exchange(format!("{post}11\r\n\r\n")).await;
    assert_status(&response, 413);
    assert!(response.contains("connection: close"), "{response}");
    assert_eq!(a.seen().len(), 1);
}

#[tokio::test]
async fn a_body_is_refused_where_it_gets_too_long() {
    let (listener, address) = scripted().await;
    let own = RouteLimits {
        request_body_bytes: Some(10),
        ..RouteLimits::default()
    };
    // The route's own limit counts.
    let config = limits(HttpLimits {
        request_body_bytes: 1,
        ..HttpLimits::default()
    });
    let gateway = limited(address, own, config);
    for _ in 0..2 {
        let mut client = gateway.connect().await;
        let head = "POST / HTTP/1.1\r\nHost: a.com\r\nTransfer-Encoding: chunked\r\n\r\n";
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(b"a\r\n0123456789\r\n").await.unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        read_until(&mut stream, "0123456789\r\n").await;
        client.write_all(b"1\r\nx\r\n").await.unwrap();
        let response = read_to_end(&mut client).await;
        assert_status(&response, 413);
        // The backend does not take what came for the whole.
        assert_eq!(read_to_end(&mut stream).await, "");
    }
    let totals = gateway.metrics.totals();
    assert!(totals.errors.contains(&("body_too_large", 2)));
    assert_eq!(totals.ejections, 0);
}

/// Who is too slow after this long is cut.
fn impatient() -> HttpConfig {
    HttpConfig {
        timeouts: HttpTimeouts {
            slow_grace: Duration::from_millis(50),
            ..HttpTimeouts::default()
        },
        ..limits(HttpLimits {
            min_bytes_per_second: 1_000_000,
            ..HttpLimits::default()
        })
    }
}

#[tokio::test]
async fn a_body_that_drips_is_given_up() {
    let (listener, address) = scripted().await;
    let gateway = limited(address, RouteLimits::default(), impatient());
    let mut client = gateway.connect().await;
    let head = "POST / HTTP/1.1\r\nHost: a.com\r\nContent-Length: 1000\r\n\r\n";
    client.write_all(head.as_bytes()).await.unwrap();
    let (mut read, mut write) = client.into_split();
    let drip = tokio::spawn(async move {
        while write.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let _stream = listener.accept().await.unwrap();
    let mut response = Vec::new();
    let reading = tokio::time::timeout(PATIENCE, read.read_to_end(&mut response));
    let _ = reading.await.unwrap();
    assert_status(&String::from_utf8_lossy(&response), 408);
    drip.abort();
    let totals = gateway.metrics.totals();
    assert_eq!(cutoffs(&totals, Cutoff::SlowRequest), 1);
}

#[tokio::test]
async fn a_stream_of_grpc_may_be_quiet() {
    let (listener, address) = scripted().await;
    let gateway = limited(address, RouteLimits::default(), impatient());
    let mut client = gateway.connect().await;
    let head = "POST / HTTP/1.1\r\nHost: a.com\r\nContent-Type: application/grpc\r\nContent-Length: 2\r\n\r\nx";
    client.write_all(head.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "\r\n\r\nx").await;
    // As long as it takes to cut another one.
    a_slow_request(&gateway, &listener).await;
    client.write_all(b"y").await.unwrap();
    assert_eq!(read_until(&mut stream, "y").await, "y");
}

async fn a_slow_request(gateway: &Gateway, listener: &TcpListener) {
    let head = "POST / HTTP/1.1\r\nHost: a.com\r\nContent-Length: 2\r\n\r\nx";
    let mut client = gateway.connect().await;
    client.write_all(head.as_bytes()).await.unwrap();
    let _stream = listener.accept().await.unwrap();
    assert_status(&read_to_end(&mut client).await, 408);
}

#[tokio::test]
async fn a_response_that_is_not_taken_is_cut() {
    let a = TestBackend::answering(|_| Response::new(full(vec![b'x'; 64 << 20]))).await;
    let gateway = limited(a.address, RouteLimits::default(), impatient());
    let mut client = gateway.connect().await;
    client.write_all(GET.as_bytes()).await.unwrap();
    gateway
        .totals(|totals| cutoffs(totals, Cutoff::SlowResponse) == 1 && totals.aborted == 1)
        .await;
    gateway.totals(|totals| totals.connections_open == 0).await;
}

#[tokio::test]
async fn a_route_has_a_rate() {
    let a = TestBackend::named("a").await;
    let own = RouteLimits {
        rate: Some(Rate {
            per_second: 1,
            burst: 2,
        }),
        ..RouteLimits::default()
    };
    let gateway = limited(a.address, own, config());
    for _ in 0..2 {
        assert_status(&gateway.get("a.com").await, 200);
    }
    let mut refused = gateway.get("a.com").await;
    // A token may have come meanwhile.
    while refused.starts_with("HTTP/1.1 200") {
        refused = gateway.get("a.com").await;
    }
    assert_status(&refused, 429);
    assert!(refused.contains("retry-after: 1\r\n"), "{refused}");
    assert!(refused.contains("rate_limit_exceeded"), "{refused}");
    let totals = gateway.metrics.totals();
    assert!(totals.errors.contains(&("route_rate", 1)));
}

#[tokio::test]
async fn each_client_has_a_rate() {
    let a = TestBackend::named("a").await;
    let once = HttpRate {
        per_second: 1,
        burst: None,
    };
    let global = limits(HttpLimits {
        client_rate: Some(once),
        ..HttpLimits::default()
    });
    let own = RouteLimits {
        client_rate: Some(once.rate()),
        ..RouteLimits::default()
    };
    for gateway in [
        limited(a.address, RouteLimits::default(), global),
        limited(a.address, own, config()),
    ] {
        while !gateway.get("a.com").await.starts_with("HTTP/1.1 429") {}
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let address = gateway.proxy.local_addresses()[0];
        let mut other = socket.connect(address).await.unwrap();
        other.write_all(GET.as_bytes()).await.unwrap();
        assert_status(&read_until(&mut other, "\r\n\r\na").await, 200);
    }
}

#[tokio::test]
async fn clients_behind_a_trusted_proxy_are_told_apart() {
    let a = TestBackend::named("a").await;
    let config = HttpConfig {
        trusted_proxies: vec!["127.0.0.0/8".parse().unwrap()],
        ..limits(HttpLimits {
            connections_per_client: 1,
            client_rate: Some(HttpRate {
                per_second: 1,
                burst: None,
            }),
            ..HttpLimits::default()
        })
    };
    let gateway = limited(a.address, RouteLimits::default(), config);
    // The proxy's own connections are not counted.
    let _open = [gateway.connect().await, gateway.connect().await];
    let get = async |client: &str| {
        let head = format!(
            "GET / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\nX-Forwarded-For: {client}\r\n\r\n"
        );
        gateway.exchange(head).await
    };
    while !get("192.0.2.1").await.starts_with("HTTP/1.1 429") {}
    assert_status(&get("192.0.2.1, 192.0.2.2").await, 200);
}

#[tokio::test]
async fn a_route_that_wants_it_is_compressed_for_who_accepts_it() {
    let text = "All work and no play makes a dull response. ".repeat(100);
    let body = text.clone();
    let a = TestBackend::answering(move |request| {
        assert!(request.headers().contains_key("accept-encoding"));
        let response = Response::builder()
            .header("content-type", "text/plain")
            .header("etag", "\"a\"");
        response.body(full(body.clone())).unwrap()
    })
    .await;
    let policy = HttpPolicy {
        compression: true,
        ..HttpPolicy::new(Origin::File)
    };
    let wanted = Pool {
        policy: Some(Arc::new(policy)),
        ..pool([backend(a.address)])
    };
    let plain = pool([backend(a.address)]);
    let gateway = Gateway::start(snapshot([("a.com", wanted), ("b.com", plain)]));
    let get = async |host: &str, accepted: &str| {
        let io = TokioIo::new(gateway.connect().await);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
        tokio::spawn(connection);
        let request = Request::get("/")
            .header("host", host)
            .header("accept-encoding", accepted)
            .body(full(""))
            .unwrap();
        let (parts, body) = sender.send_request(request).await.unwrap().into_parts();
        (parts.headers, body.collect().await.unwrap().to_bytes())
    };
    let (headers, body) = get("a.com", "gzip;q=0.5, deflate").await;
    assert_eq!(headers["content-encoding"], "gzip");
    assert_eq!(headers["etag"], "W/\"a\"");
    assert_eq!(headers["vary"], "Accept-Encoding");
    assert!(!headers.contains_key("content-length"));
    assert!(body.len() < text.len() / 4);
    let mut decoded = String::new();
    let mut decoder = flate2::read::GzDecoder::new(&body[..]);
    std::io::Read::read_to_string(&mut decoder, &mut decoded).unwrap();
    assert_eq!(decoded, text);
    for (host, accepted) in [("a.com", "identity"), ("b.com", "gzip")] {
        let (headers, body) = get(host, accepted).await;
        assert!(!headers.contains_key("content-encoding"), "{host}");
        assert_eq!(headers.contains_key("vary"), host == "a.com");
        assert_eq!(body, text);
    }
    let totals = gateway.totals(|totals| totals.responses[1] == 3).await;
    assert_eq!((totals.aborted, totals.requests_in_flight), (0, 0));
}
