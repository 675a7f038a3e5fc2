//! Interim responses of backends, as clients see them.

use super::*;

const GET: &str = "GET / HTTP/1.1\r\nHost: a.com\r\n\r\n";
const HINT: &str = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n";
const HINT_SEEN: &str = "HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// Takes one request off the backend's side of a connection.
async fn request_at(stream: &mut TcpStream) -> String {
    read_until(stream, "\r\n\r\n").await
}

#[tokio::test]
async fn hints_pass_before_the_backend_answers_and_the_connection_goes_on() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    client.write_all(GET.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    for _ in 0..2 {
        request_at(&mut stream).await;
        let hint = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\nConnection: X-Hop, close\r\n\
                    X-Hop: 1\r\nKeep-Alive: timeout=5\r\nContent-Length: 7\r\n\r\n";
        stream.write_all(hint.as_bytes()).await.unwrap();
        assert_eq!(read_until(&mut client, "\r\n\r\n").await, HINT_SEEN);
        stream
            .write_all(b"HTTP/1.1 102 Processing\r\n\r\n")
            .await
            .unwrap();
        assert_eq!(
            read_until(&mut client, "\r\n\r\n").await,
            "HTTP/1.1 102 Processing\r\n\r\n"
        );
        stream.write_all(OK.as_bytes()).await.unwrap();
        let response = read_until(&mut client, "ok").await;
        assert_status(&response, 200);
        client.write_all(GET.as_bytes()).await.unwrap();
    }
    let totals = gateway.metrics.totals();
    assert_eq!((totals.interim_responses, totals.interim_dropped), (4, 0));
}

#[tokio::test]
async fn hints_in_pieces_and_with_the_response_keep_their_order() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    client.write_all(GET.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    stream.set_nodelay(true).unwrap();
    request_at(&mut stream).await;
    let (first, rest) = HINT.split_at(5);
    stream.write_all(first.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    tokio::task::yield_now().await;
    // One segment, with a response to a request that nobody has made behind it.
    let rest = format!("{rest}{HINT}{OK}{HINT}");
    stream.write_all(rest.as_bytes()).await.unwrap();
    let seen = read_until(&mut client, "ok").await;
    let response = seen
        .strip_prefix(&HINT_SEEN.repeat(2))
        .unwrap_or_else(|| panic!("{seen:?}"));
    assert_status(response, 200);
    drop(stream);
    // The hint behind it is no response of the next request.
    client.write_all(GET.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    request_at(&mut stream).await;
    stream.write_all(OK.as_bytes()).await.unwrap();
    assert_status(&read_until(&mut client, "ok").await, 200);
}

#[tokio::test]
async fn a_client_of_http_1_0_gets_none() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    let request = "GET / HTTP/1.0\r\nHost: a.com\r\n\r\n";
    client.write_all(request.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    request_at(&mut stream).await;
    stream
        .write_all(format!("{HINT}{OK}").as_bytes())
        .await
        .unwrap();
    let response = read_to_end(&mut client).await;
    assert!(response.starts_with("HTTP/1.0 200 "), "{response}");
}

#[tokio::test]
async fn a_client_of_http2_gets_the_response_alone() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let io = TokioIo::new(gateway.connect().await);
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await;
    let (mut client, connection) = handshake.unwrap();
    tokio::spawn(connection);
    let request = Request::get("http://a.com/").body(full("")).unwrap();
    let response = tokio::spawn(client.send_request(request));
    let (mut stream, _) = listener.accept().await.unwrap();
    request_at(&mut stream).await;
    let bytes = format!("{HINT}{OK}");
    stream.write_all(bytes.as_bytes()).await.unwrap();
    let response = response.await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(gateway.metrics.totals().interim_responses, 0);
}

#[tokio::test]
async fn no_more_than_sixteen_pass() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    client.write_all(GET.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    request_at(&mut stream).await;
    let bytes = HINT.repeat(1000) + OK;
    stream.write_all(bytes.as_bytes()).await.unwrap();
    let seen = read_until(&mut client, "ok").await;
    assert_eq!(seen.matches(" 103 ").count(), 16);
    assert_eq!(gateway.metrics.totals().interim_dropped, 1);
}

#[tokio::test]
async fn one_that_is_too_long_does_not_pass() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    client.write_all(GET.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    request_at(&mut stream).await;
    let long = "x".repeat(40_000);
    let bytes = format!("HTTP/1.1 103 Early Hints\r\nLink: {long}\r\n\r\n{OK}");
    stream.write_all(bytes.as_bytes()).await.unwrap();
    assert_status(&read_until(&mut client, "ok").await, 200);
}

#[tokio::test]
async fn the_gateway_answers_100_itself_and_hints_pass_during_an_upload() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    let head = "POST / HTTP/1.1\r\nHost: a.com\r\nContent-Length: 5\r\n\
                Expect: 100-continue\r\n\r\n";
    client.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(
        read_until(&mut client, "\r\n\r\n").await,
        "HTTP/1.1 100 Continue\r\n\r\n"
    );
    let (mut stream, _) = listener.accept().await.unwrap();
    client.write_all(b"he").await.unwrap();
    read_until(&mut stream, "he").await;
    let bytes = format!("HTTP/1.1 100 Continue\r\n\r\n{HINT}");
    stream.write_all(bytes.as_bytes()).await.unwrap();
    assert_eq!(read_until(&mut client, "\r\n\r\n").await, HINT_SEEN);
    client.write_all(b"llo").await.unwrap();
    read_until(&mut stream, "llo").await;
    stream.write_all(OK.as_bytes()).await.unwrap();
    assert_status(&read_until(&mut client, "ok").await, 200);
}

#[tokio::test]
async fn pipelined_requests_get_their_own() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    client.write_all(GET.repeat(3).as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    for hint in ["1", "", "3"] {
        request_at(&mut stream).await;
        if !hint.is_empty() {
            let hint = format!("HTTP/1.1 103 Early Hints\r\nLink: {hint}\r\n\r\n");
            stream.write_all(hint.as_bytes()).await.unwrap();
        }
        stream.write_all(OK.as_bytes()).await.unwrap();
    }
    for hint in ["1", "", "3"] {
        if !hint.is_empty() {
            assert_eq!(
                read_until(&mut client, "\r\n\r\n").await,
                format!("HTTP/1.1 103 Early Hints\r\nlink: {hint}\r\n\r\n")
            );
        }
        assert_status(&read_until(&mut client, "ok").await, 200);
    }
}

#[tokio::test]
async fn a_hint_never_comes_in_the_middle_of_a_response_that_waits() {
    const LEN: usize = 8 << 20;
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    client.write_all(GET.repeat(2).as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    request_at(&mut stream).await;
    let backend = tokio::spawn(async move {
        let mut first = format!("HTTP/1.1 200 OK\r\nContent-Length: {LEN}\r\n\r\n").into_bytes();
        first.resize(first.len() + LEN, b'x');
        stream.write_all(&first).await.unwrap();
        request_at(&mut stream).await;
        let bytes = format!("{HINT}{OK}");
        stream.write_all(bytes.as_bytes()).await.unwrap();
        stream
    });
    let head = read_until(&mut client, "\r\n\r\n").await;
    assert_status(&head, 200);
    let mut body = vec![0; LEN];
    client.read_exact(&mut body).await.unwrap();
    assert!(body.iter().all(|&byte| byte == b'x'));
    let seen = read_until(&mut client, "ok").await;
    let response = seen.strip_prefix(HINT_SEEN).unwrap_or(&seen);
    assert_status(response, 200);
    drop(backend);
}

#[tokio::test]
async fn a_hint_behind_the_gateways_own_answer_does_not_pass() {
    let (listener, address) = scripted().await;
    let config = HttpConfig {
        timeouts: HttpTimeouts {
            response_headers: Duration::from_millis(50),
            ..HttpTimeouts::default()
        },
        ..config()
    };
    let other = TestBackend::named("other").await;
    let routes = snapshot([
        ("a.com", pool([backend(address)])),
        ("b.com", pool([backend(other.address)])),
    ]);
    let gateway = Gateway::with_config(routes, config);
    let mut client = gateway.connect().await;
    client.write_all(GET.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    request_at(&mut stream).await;
    let head = read_until(&mut client, "\r\n\r\n").await;
    assert_status(&head, 504);
    let len = head.split("content-length: ").nth(1).unwrap();
    let len = len.split("\r\n").next().unwrap().parse().unwrap();
    client.read_exact(&mut vec![0; len]).await.unwrap();
    // The gateway may have closed it.
    let _ = stream.write_all(HINT.as_bytes()).await;
    let request = "GET / HTTP/1.1\r\nHost: b.com\r\nConnection: close\r\n\r\n";
    client.write_all(request.as_bytes()).await.unwrap();
    assert_status(&read_to_end(&mut client).await, 200);
}
