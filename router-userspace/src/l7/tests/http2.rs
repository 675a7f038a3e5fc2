//! HTTP/2 on either side, with hyper's client and server at the far ends.

use http::{HeaderMap, Method, Version, header};
use http_body_util::StreamBody;
use hyper::body::Frame;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper::ext::Protocol;

use super::*;
use crate::route::HttpProtocol;
use crate::route::policy::{HttpPolicy, RouteTimeouts};

/// A client of HTTP/2 by prior knowledge.
async fn client_of(gateway: &Gateway) -> SendRequest<TestBody> {
    let io = TokioIo::new(gateway.connect().await);
    let (sender, connection) = handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn get(path: &str) -> Request<TestBody> {
    request(Method::GET, path, full(""))
}

fn request(method: Method, path: &str, body: TestBody) -> Request<TestBody> {
    Request::builder()
        .method(method)
        .uri(format!("http://a.com{path}"))
        .version(Version::HTTP_2)
        .body(body)
        .unwrap()
}

fn speaking_http2(address: SocketAddr) -> Backend {
    Backend {
        protocol: HttpProtocol::Http2,
        ..backend(address)
    }
}

fn trailers(name: &'static str, value: &'static str) -> HeaderMap {
    HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())])
}

/// A body with what RFC 9110 §6.5.1 forbids beside what an application says.
fn with_trailers(text: &'static str) -> TestBody {
    let mut trailers = trailers("grpc-status", "0");
    trailers.insert("content-length", "7".parse().unwrap());
    let frames = [Frame::data(Bytes::from(text)), Frame::trailers(trailers)];
    StreamBody::new(futures_util::stream::iter(frames.map(Ok))).boxed()
}

async fn text(response: Response<Incoming>) -> String {
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[tokio::test]
async fn streams_of_one_client_reach_backends_of_http1() {
    let backend = TestBackend::named("hello").await;
    let gateway = Gateway::to([backend.address]);
    let mut client = client_of(&gateway).await;
    let answers = (0..20).map(|number| client.send_request(get(&format!("/{number}"))));
    let answers: Vec<_> = answers.collect();
    for answer in answers {
        let answer = answer.await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.version(), Version::HTTP_2);
        assert_eq!(text(answer).await, "hello");
    }
    assert_eq!(backend.seen().len(), 20);
    let totals = gateway.totals(|totals| totals.responses[1] == 20).await;
    assert_eq!((totals.http2_connections, totals.connections_open), (1, 1));
    assert_eq!((totals.requests_in_flight, totals.aborted), (0, 0));
}

#[tokio::test]
async fn a_backend_of_http1_gets_a_host_and_one_cookie() {
    let backend = TestBackend::answering(|request| {
        let headers = request.headers();
        let seen = format!(
            "{:?} {:?} {:?} {:?}",
            headers[header::HOST],
            headers[header::COOKIE],
            request.version(),
            headers["x-forwarded-proto"]
        );
        Response::new(full(seen))
    })
    .await;
    let gateway = Gateway::to([backend.address]);
    let mut request = get("/");
    request
        .headers_mut()
        .append("cookie", "a=1".parse().unwrap());
    request
        .headers_mut()
        .append("cookie", "b=2".parse().unwrap());
    let answer = client_of(&gateway)
        .await
        .send_request(request)
        .await
        .unwrap();
    assert_eq!(text(answer).await, r#""a.com" "a=1; b=2" HTTP/1.1 "http""#);
}

#[tokio::test]
async fn a_host_beside_another_authority_is_refused() {
    let gateway = Gateway::to([refusing().await]);
    let mut request = get("/");
    request
        .headers_mut()
        .insert("host", "b.com".parse().unwrap());
    let answer = client_of(&gateway)
        .await
        .send_request(request)
        .await
        .unwrap();
    assert_eq!(answer.status(), 400);
    assert_eq!(answer.headers()["x-cf-routererror"], "host_mismatch");
    assert!(!answer.headers().contains_key("connection"));
}

#[tokio::test]
async fn a_call_with_trailers_goes_through_to_a_backend_of_http2() {
    let backend = TestBackend::speaking(true, |request| {
        assert_eq!(request.version(), Version::HTTP_2);
        assert_eq!(request.headers()["te"], "trailers");
        Response::new(with_trailers("reply"))
    })
    .await;
    let gateway = Gateway::start(snapshot([(
        "a.com",
        pool([speaking_http2(backend.address)]),
    )]));
    let mut client = client_of(&gateway).await;
    for _ in 0..3 {
        let mut call = request(Method::POST, "/pkg.Service/Call", with_trailers("call"));
        call.headers_mut().insert("te", "trailers".parse().unwrap());
        let answer = client.send_request(call).await.unwrap();
        assert_eq!(answer.status(), 200);
        let answer = answer.into_body().collect().await.unwrap();
        assert_eq!(answer.trailers(), Some(&trailers("grpc-status", "0")));
        assert_eq!(answer.to_bytes(), "reply");
    }
    assert_eq!(backend.seen()[0], "POST http://a.com/pkg.Service/Call");
    assert_eq!(backend.connections(), 1);
}

#[tokio::test]
async fn requests_that_come_at_once_share_one_connection_to_a_backend_of_http2() {
    let backend = TestBackend::speaking(true, |_| Response::new(full("ok"))).await;
    let gateway = Gateway::start(snapshot([(
        "a.com",
        pool([speaking_http2(backend.address)]),
    )]));
    let mut client = client_of(&gateway).await;
    let answers: Vec<_> = (0..50).map(|_| client.send_request(get("/"))).collect();
    for answer in answers {
        assert_eq!(text(answer.await.unwrap()).await, "ok");
    }
    assert_eq!(backend.connections(), 1);
    // Clients of HTTP/1.1 are served by it as well.
    assert!(gateway.get("a.com").await.ends_with("\r\n\r\nok"));
    assert_eq!(backend.connections(), 1);
}

#[tokio::test]
async fn trailers_of_a_backend_of_http1_reach_a_client_that_takes_them() {
    let backend = TestBackend::answering(|_| {
        Response::builder()
            .header("trailer", "grpc-status")
            .body(with_trailers("reply"))
            .unwrap()
    })
    .await;
    let gateway = Gateway::to([backend.address]);
    let takes = "GET / HTTP/1.1\r\nHost: a.com\r\nTE: trailers\r\nConnection: close\r\n\r\n";
    let response = gateway.exchange(takes).await;
    assert!(
        response.contains("\r\ntrailer: grpc-status\r\n"),
        "{response}"
    );
    assert!(
        response.ends_with("reply\r\n0\r\ngrpc-status: 0\r\n\r\n"),
        "{response}"
    );
    let response = gateway.get("a.com").await;
    assert!(response.ends_with("reply\r\n0\r\n\r\n"), "{response}");

    let mut call = get("/");
    call.headers_mut().insert("te", "trailers".parse().unwrap());
    let answer = client_of(&gateway).await.send_request(call).await.unwrap();
    let answer = answer.into_body().collect().await.unwrap();
    assert_eq!(answer.trailers(), Some(&trailers("grpc-status", "0")));
}

#[tokio::test]
async fn a_websocket_over_http2_reaches_a_backend_of_http1() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = client_of(&gateway).await;
    let mut connect = request(Method::CONNECT, "/chat", full(""));
    connect
        .extensions_mut()
        .insert(Protocol::from_static("websocket"));
    connect
        .headers_mut()
        .insert("sec-websocket-version", "13".parse().unwrap());
    // The settings that allow it come with the connection's first bytes.
    let answer = client.send_request(get("/unknown"));
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;
    let ok = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
    stream.write_all(ok).await.unwrap();
    answer.await.unwrap();

    let answer = tokio::spawn(client.send_request(connect));
    let head = read_until(&mut stream, "\r\n\r\n").await;
    assert!(head.starts_with("GET /chat HTTP/1.1\r\n"), "{head}");
    for line in [
        "upgrade: websocket",
        "connection: upgrade",
        "host: a.com",
        "sec-websocket-key: ",
    ] {
        assert!(head.contains(&format!("\r\n{line}")), "{head}");
    }
    let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
                  Upgrade: websocket\r\nSec-WebSocket-Accept: x\r\nSec-WebSocket-Protocol: p\r\n\r\n";
    stream.write_all(switch.as_bytes()).await.unwrap();
    let mut answer = answer.await.unwrap().unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["sec-websocket-protocol"], "p");
    for name in ["upgrade", "connection", "sec-websocket-accept"] {
        assert!(!answer.headers().contains_key(name), "{name}");
    }
    let mut tunnel = TokioIo::new(hyper::upgrade::on(&mut answer).await.unwrap());
    tunnel.write_all(b"ping").await.unwrap();
    read_until(&mut stream, "ping").await;
    stream.write_all(b"pong").await.unwrap();
    let mut pong = [0; 4];
    tunnel.read_exact(&mut pong).await.unwrap();
    assert_eq!(&pong, b"pong");
    gateway.totals(|totals| totals.upgrades_open == 1).await;
    tunnel.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut stream).await, "");
}

#[tokio::test]
async fn a_connect_without_a_websocket_is_refused() {
    let gateway = Gateway::to([refusing().await]);
    let connect = Request::connect("a.com:80").body(full("")).unwrap();
    let answer = client_of(&gateway)
        .await
        .send_request(connect)
        .await
        .unwrap();
    assert_eq!(answer.status(), 405);
}

#[tokio::test]
async fn a_stream_whose_time_is_up_ends_alone() {
    let (listener, address) = scripted().await;
    let quick = TestBackend::named("quick").await;
    let policy = HttpPolicy {
        timeouts: RouteTimeouts {
            total: Some(Duration::from_millis(50)),
            ..RouteTimeouts::default()
        },
        ..HttpPolicy::new(Origin::File)
    };
    let slow = Pool {
        policy: Some(Arc::new(policy)),
        ..pool([backend(address)])
    };
    let gateway = Gateway::start(snapshot([
        ("slow.com", slow),
        ("a.com", pool([backend(quick.address)])),
    ]));
    let mut client = client_of(&gateway).await;
    let late = |path: &str| {
        let mut request = get(path);
        *request.uri_mut() = format!("http://slow.com{path}").parse().unwrap();
        request
    };
    // No head in time.
    let answer = client.send_request(late("/head"));
    let (mut first, _) = listener.accept().await.unwrap();
    read_until(&mut first, "\r\n\r\n").await;
    let answer = answer.await.unwrap();
    assert_eq!(answer.status(), 504);
    assert_eq!(
        answer.headers()["x-cf-routererror"],
        "endpoint_timeout (total)"
    );
    // No end of the body in time.
    let answer = tokio::spawn(client.send_request(late("/body")));
    let (mut second, _) = listener.accept().await.unwrap();
    read_until(&mut second, "\r\n\r\n").await;
    let head = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart";
    second.write_all(head).await.unwrap();
    let answer = answer.await.unwrap().unwrap();
    assert_eq!(answer.status(), 200);
    assert!(
        answer.into_body().collect().await.is_err(),
        "the stream is reset"
    );

    let answer = client.send_request(get("/")).await.unwrap();
    assert_eq!(text(answer).await, "quick");
    let totals = gateway.totals(|totals| totals.aborted == 1).await;
    assert_eq!(totals.http2_connections, 1);
}

#[tokio::test]
async fn an_idle_connection_is_told_and_closed() {
    let mut config = config();
    config.timeouts.idle = Duration::from_millis(20);
    let gateway = Gateway::with_config(Snapshot::default(), config);
    let io = TokioIo::new(gateway.connect().await);
    let (sender, connection) = handshake::<_, _, TestBody>(TokioExecutor::new(), io)
        .await
        .unwrap();
    let ended = tokio::time::timeout(PATIENCE, connection).await;
    ended.expect("the gateway closes").expect("after a GOAWAY");
    drop(sender);
}

#[tokio::test]
async fn draining_lets_open_streams_end() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = client_of(&gateway).await;
    let answer = client.send_request(get("/"));
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;
    let address = gateway.proxy.local_addresses()[0];
    let draining = tokio::spawn(gateway.proxy.drain(PATIENCE));
    poll_until(|| std::net::TcpStream::connect(address).err()).await;
    let ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    stream.write_all(ok).await.unwrap();
    assert_eq!(text(answer.await.unwrap()).await, "ok");
    tokio::time::timeout(PATIENCE, draining)
        .await
        .unwrap()
        .unwrap();
}
