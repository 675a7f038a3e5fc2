//! Requests that go through a route service: signed there, checked on the way back.

use std::io::Write;
use std::sync::OnceLock;

use http::{HeaderMap, HeaderValue};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::config::{HttpAccessLog, HttpRouteServices, Secret};
use crate::route::{Instance, Registered};

const PROXY_HEADERS: [&str; 3] = [
    "x-cf-forwarded-url",
    "x-cf-proxy-signature",
    "x-cf-proxy-metadata",
];

/// A service that calls back where it is told to, and the file with its certificate.
struct Service {
    port: u16,
    /// With its address.
    url: String,
    /// Set when the gateway is there.
    gateway: Arc<OnceLock<SocketAddr>>,
    /// Request lines and headers.
    seen: Arc<Mutex<Vec<(String, HeaderMap)>>>,
    ca_file: tempfile::NamedTempFile,
}

/// Has `back` called with the headers that go back to the gateway.
async fn service(back: fn(&mut HeaderMap)) -> Service {
    let made =
        rcgen::generate_simple_self_signed(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
    let made = made.unwrap();
    let mut ca_file = tempfile::NamedTempFile::new().unwrap();
    ca_file.write_all(made.cert.pem().as_bytes()).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    // At the address that the resolver puts first.
    let listener = TcpListener::bind("localhost:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = Service {
        port: address.port(),
        url: format!("https://{address}/waf?k=v"),
        gateway: Arc::default(),
        seen: Arc::default(),
        ca_file,
    };
    let (gateway, seen) = (Arc::clone(&service.gateway), Arc::clone(&service.seen));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            // A client that does not trust the certificate leaves during the handshake.
            let Ok(stream) = acceptor.accept(stream).await else {
                continue;
            };
            let (gateway, seen) = (Arc::clone(&gateway), Arc::clone(&seen));
            let service = service_fn(move |request: Request<Incoming>| {
                let gateway = *gateway.get().expect("the gateway is known");
                let line = format!("{} {}", request.method(), request.uri());
                seen.lock().unwrap().push((line, request.headers().clone()));
                async move { Ok::<_, Infallible>(call_back(gateway, request, back).await) }
            });
            let builder = hyper::server::conn::http1::Builder::new();
            tokio::spawn(builder.serve_connection(TokioIo::new(stream), service));
        }
    });
    service
}

/// Sends a request to the gateway as the URL in it says, and passes the answer on, with the headers
/// that are no business of clients.
async fn call_back(
    gateway: SocketAddr,
    request: Request<Incoming>,
    back: fn(&mut HeaderMap),
) -> Response<TestBody> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let url: http::Uri = parts.headers["x-cf-forwarded-url"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    let mut headers = parts.headers.clone();
    headers.insert("host", url.host().unwrap().parse().unwrap());
    headers.insert("connection", HeaderValue::from_static("close"));
    back(&mut headers);
    let mut head = format!(
        "{} {} HTTP/1.1\r\n",
        parts.method,
        url.path_and_query().unwrap()
    );
    for (name, value) in &headers {
        head.push_str(&format!("{name}: {}\r\n", value.to_str().unwrap()));
    }
    let mut stream = TcpStream::connect(gateway).await.unwrap();
    stream
        .write_all(format!("{head}\r\n").as_bytes())
        .await
        .unwrap();
    stream.write_all(&body).await.unwrap();
    let answer = read_to_end(&mut stream).await;
    let (answer, text) = answer.split_once("\r\n\r\n").unwrap();
    let mut response = Response::new(full(text.to_owned()));
    *response.status_mut() = answer[9..12].parse().unwrap();
    response
        .headers_mut()
        .insert("x-service", HeaderValue::from_static("was-here"));
    for name in PROXY_HEADERS {
        response
            .headers_mut()
            .insert(name, parts.headers[name].clone());
    }
    response
}

/// Answers with the request's line and headers as it sees them, one a line.
async fn app() -> TestBackend {
    TestBackend::answering(|request| {
        let mut text = format!("app: {} {}\n", request.method(), request.uri());
        for (name, value) in request.headers() {
            text.push_str(&format!("{name}: {}\n", value.to_str().unwrap()));
        }
        Response::new(full(text))
    })
    .await
}

fn secret(text: &str) -> Option<Secret> {
    Some(toml::Value::from(text).try_into().unwrap())
}

fn with_services(ca_file: &tempfile::NamedTempFile) -> HttpConfig {
    HttpConfig {
        route_services: HttpRouteServices {
            secret: secret("first"),
            ca_file: Some(ca_file.path().to_owned()),
            system_roots: false,
            ..HttpRouteServices::default()
        },
        ..config()
    }
}

fn bound_to(url: &str) -> Option<Arc<Registered>> {
    Registered {
        route_service_url: Some(url.into()),
        ..Registered::default()
    }
    .shared()
}

fn bound(app: &TestBackend, url: &str) -> Pool {
    Pool {
        registered: bound_to(url),
        ..pool([backend(app.address)])
    }
}

/// `a.com` and `b.com` are bound to the service, `free.com` is not; all are the app's.
fn gateway(app: &TestBackend, service: &Service, config: HttpConfig) -> Gateway {
    let snapshot = snapshot([
        ("a.com", bound(app, &service.url)),
        ("b.com", bound(app, &service.url)),
        ("free.com", pool([backend(app.address)])),
    ]);
    let gateway = Gateway::with_config(snapshot, config);
    let address = gateway.proxy.local_addresses()[0];
    service.gateway.set(address).unwrap();
    gateway
}

impl Service {
    /// A request of a client, as it came to the service, of the latest call.
    fn latest(&self) -> HeaderMap {
        self.seen.lock().unwrap().last().unwrap().1.clone()
    }

    /// `GET /` with the proof of the latest call.
    fn returning(&self, host: &str) -> String {
        let headers = self.latest();
        let mut request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
        for name in PROXY_HEADERS {
            request.push_str(&format!("{name}: {}\r\n", headers[name].to_str().unwrap()));
        }
        request + "\r\n"
    }
}

#[tokio::test]
async fn a_request_goes_through_the_service_and_comes_back() {
    let (app, service) = (app().await, service(|_| ()).await);
    let gateway = gateway(&app, &service, with_services(&service.ca_file));
    let response = gateway
        .exchange(
            "GET /cart?x=1&y=2 HTTP/1.1\r\nHost: a.com:80\r\nConnection: close\r\n\
             X-CF-Forwarded-Url: https://evil.com/\r\nX-CF-Proxy-Metadata: evil\r\n\r\n",
        )
        .await;
    assert_status(&response, 200);
    assert!(response.contains("x-service: was-here\r\n"), "{response}");
    assert!(response.contains("app: GET /cart?x=1&y=2\n"), "{response}");
    for name in PROXY_HEADERS {
        assert!(!response.contains(name), "{name} in {response}");
    }
    // What the gateway had told the service of the client is kept.
    let told = "x-forwarded-for: 127.0.0.1, 127.0.0.1\n";
    assert!(response.contains(told), "{response}");

    let (line, headers) = service.seen.lock().unwrap()[0].clone();
    assert_eq!(line, "GET /waf?k=v");
    let host = service.url.split('/').nth(2).unwrap();
    assert_eq!(headers["host"], host);
    assert_eq!(headers["x-cf-forwarded-url"], "https://a.com/cart?x=1&y=2");
    for name in PROXY_HEADERS {
        assert_eq!(headers.get_all(name).iter().count(), 1, "{name}");
    }
    assert_eq!(headers["x-forwarded-for"], "127.0.0.1");
    assert!(!headers.contains_key("x-cf-instanceid"));
}

#[tokio::test]
async fn the_access_log_tells_of_the_service() {
    let (app, service) = (app().await, service(|_| ()).await);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("access.log");
    let config = HttpConfig {
        access_log: HttpAccessLog {
            path: Some(path.clone()),
            ..HttpAccessLog::default()
        },
        ..with_services(&service.ca_file)
    };
    let gateway = gateway(&app, &service, config);
    assert_status(&gateway.get("a.com").await, 200);
    let lines = poll_until(|| {
        let text = std::fs::read_to_string(&path).ok()?;
        (text.lines().count() == 2).then_some(text)
    })
    .await;
    // The request that came back ended first.
    let services: Vec<_> = lines
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|line| line["route_service"].clone())
        .collect();
    let host = service.url.split('/').nth(2).unwrap();
    assert_eq!(services, [serde_json::Value::Null, host.into()]);
}

#[tokio::test]
async fn a_body_and_an_instance_wish_make_the_round() {
    let echo = TestBackend::answering(|request| Response::new(request.into_body().boxed())).await;
    let service = service(|_| ()).await;
    const APP: &str = "5cdc7595-2e9b-4f62-8d5a-a86b92f2df0e";
    let instance = Backend {
        instance: Instance {
            app: Some(APP.into()),
            index: Some("1".into()),
            ..Instance::default()
        }
        .shared(),
        ..backend(echo.address)
    };
    let refusing = Backend {
        instance: Instance {
            index: Some("0".into()),
            ..Instance::default()
        }
        .shared(),
        address: refusing().await,
        ..instance.clone()
    };
    let route = Pool {
        registered: bound_to(&service.url),
        ..pool([refusing, instance])
    };
    let gateway = Gateway::with_config(
        snapshot([("a.com", route)]),
        with_services(&service.ca_file),
    );
    let address = gateway.proxy.local_addresses()[0];
    service.gateway.set(address).unwrap();
    for _ in 0..4 {
        let response = gateway
            .exchange(format!(
                "POST / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\nContent-Length: 5\r\n\
                 X-CF-App-Instance: {APP}:1\r\n\r\nhello"
            ))
            .await;
        assert!(response.ends_with("\r\n\r\nhello"), "{response}");
    }
    assert_eq!(gateway.metrics.totals().retries, 0);
}

#[tokio::test]
async fn a_service_that_alters_the_signature_gets_502() {
    let service = service(|headers| {
        let mut signature = headers["x-cf-proxy-signature"].to_str().unwrap().to_owned();
        let first = if signature.starts_with('A') { "B" } else { "A" };
        signature.replace_range(..1, first);
        headers.insert("x-cf-proxy-signature", signature.parse().unwrap());
    })
    .await;
    let app = app().await;
    let gateway = gateway(&app, &service, with_services(&service.ca_file));
    let response = gateway.get("a.com").await;
    assert_status(&response, 502);
    let told = "Failed to validate Route Service Signature: message authentication failed\n";
    assert!(response.ends_with(told), "{response}");
    assert!(app.seen().is_empty());
    let errors = gateway.metrics.totals().errors;
    assert!(
        errors.contains(&("route_service_signature", 1)),
        "{errors:?}"
    );
}

#[tokio::test]
async fn a_signature_is_good_for_its_route_alone() {
    let (app, service) = (app().await, service(|_| ()).await);
    let gateway = gateway(&app, &service, with_services(&service.ca_file));
    assert_status(&gateway.get("a.com").await, 200);
    assert_status(&gateway.exchange(service.returning("a.com")).await, 200);
    let response = gateway.exchange(service.returning("b.com")).await;
    assert_status(&response, 502);
    assert!(response.contains("x-cf-routererror: invalid_route_service_signature\r\n"));
    let without_metadata = service
        .returning("a.com")
        .replace("x-cf-proxy-metadata", "x-other");
    let response = gateway.exchange(without_metadata).await;
    assert_status(&response, 502);
    assert!(response.ends_with("No metadata found\n"), "{response}");
    assert_eq!(app.seen().len(), 2);
}

#[tokio::test]
async fn a_request_that_comes_back_too_late_is_504() {
    let (app, service) = (app().await, service(|_| ()).await);
    let mut config = with_services(&service.ca_file);
    config.route_services.timeout = Duration::from_nanos(1);
    let gateway = gateway(&app, &service, config);
    let response = gateway.get("a.com").await;
    assert_status(&response, 504);
    assert!(
        response.ends_with("route service request expired\n"),
        "{response}"
    );
    assert!(app.seen().is_empty());
}

#[tokio::test]
async fn a_secret_is_replaced_without_losing_requests_on_their_way() {
    let (app, service) = (app().await, service(|_| ()).await);
    let mut config = with_services(&service.ca_file);
    let gateway = gateway(&app, &service, config.clone());
    assert_status(&gateway.get("a.com").await, 200);
    let on_its_way = service.returning("a.com");

    config.route_services.secret = secret("second");
    config.route_services.previous_secret = secret("first");
    gateway.proxy.reload(&config).unwrap();
    assert_status(&gateway.exchange(&on_its_way).await, 200);
    assert_status(&gateway.get("a.com").await, 200);

    config.route_services.previous_secret = None;
    gateway.proxy.reload(&config).unwrap();
    assert_status(&gateway.exchange(&on_its_way).await, 502);
    assert_status(&gateway.exchange(service.returning("a.com")).await, 200);
}

#[tokio::test]
async fn a_websocket_of_a_bound_route_is_503() {
    let (app, service) = (app().await, service(|_| ()).await);
    let gateway = gateway(&app, &service, with_services(&service.ca_file));
    let response = gateway
        .exchange(
            "GET / HTTP/1.1\r\nHost: a.com\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n\
             GET / HTTP/1.1\r\nHost: free.com\r\nConnection: close\r\n\r\n",
        )
        .await;
    assert_status(&response, 503);
    assert!(response.contains("x-cf-routererror: route_service_unsupported\r\n"));
    assert!(service.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_service_that_cannot_be_called_is_told_by_class() {
    let (app, trusted) = (app().await, service(|_| ()).await);
    let untrusted = service(|_| ()).await;
    let down = format!("https://{}", refusing().await);
    let long_label = format!("https://{}.example.com/", "a".repeat(64));
    for (url, status, error) in [
        (&*down, 502, "endpoint_failure (connection refused)"),
        (
            &untrusted.url,
            526,
            "endpoint_failure (invalid certificate)",
        ),
        // No resolver takes a label of more than 63 bytes.
        (&long_label, 502, "endpoint_failure (name not resolved)"),
        ("https://", 500, "route_service_failure"),
        ("https://user@example.com/", 500, "route_service_failure"),
    ] {
        let snapshot = snapshot([("a.com", bound(&app, url))]);
        let gateway = Gateway::with_config(snapshot, with_services(&trusted.ca_file));
        let response = gateway.get("a.com").await;
        assert_status(&response, status);
        let header = format!("x-cf-routererror: {error}\r\n");
        assert!(response.contains(&header), "{url}: {response}");
    }
    assert!(app.seen().is_empty());
}

#[tokio::test]
async fn a_service_by_name_is_resolved() {
    let (app, service) = (app().await, service(|_| ()).await);
    let gateway = gateway(&app, &service, with_services(&service.ca_file));
    let by_name = format!("https://localhost:{}/", service.port);
    gateway
        .published
        .store(Arc::new(snapshot([("a.com", bound(&app, &by_name))])));
    for _ in 0..2 {
        let response = gateway.get("a.com").await;
        assert_status(&response, 200);
    }
    let host = format!("localhost:{}", service.port);
    assert_eq!(service.latest()["host"], host.as_str());
    // Four requests, of which the gateway made two to the service, on one connection, and two to the app.
    assert_eq!(gateway.metrics.totals().backend_connections_opened, 2);
}

#[tokio::test]
async fn signatures_on_routes_without_a_service_are_looked_at_only_strictly() {
    let (app, service) = (app().await, service(|_| ()).await);
    let mut config = with_services(&service.ca_file);
    let gateway = gateway(&app, &service, config.clone());
    assert_status(&gateway.get("a.com").await, 200);
    let valid = service.returning("free.com");
    let forged = valid.replace("x-cf-proxy-signature: ", "x-cf-proxy-signature: AAAA");
    assert_status(&gateway.exchange(&forged).await, 200);

    config.route_services.strict_signature_validation = true;
    gateway.proxy.reload(&config).unwrap();
    let response = gateway.exchange(&forged).await;
    assert_status(&response, 400);
    assert!(response.contains("x-cf-routererror: invalid_route_service_signature\r\n"));
    // The route may be the service's own, which needs them.
    let response = gateway.exchange(&valid).await;
    for name in PROXY_HEADERS {
        assert!(response.contains(name), "{name} not in {response}");
    }

    config.route_services.timeout = Duration::from_nanos(1);
    gateway.proxy.reload(&config).unwrap();
    let response = gateway.exchange(&valid).await;
    assert_status(&response, 504);
    assert!(response.contains("x-cf-routererror: expired_route_service_signature\r\n"));
}

#[tokio::test]
async fn a_service_that_is_a_route_is_reached_without_leaving_the_gateway() {
    let (app, service) = (app().await, service(|_| ()).await);
    let waf = self::app().await;
    let mut config = with_services(&service.ca_file);
    config.route_services.hairpinning = true;
    config.route_services.hairpinning_allowlist = vec!["*.example.com".to_owned()];
    let snapshot = snapshot([
        ("a.com", bound(&app, "https://waf.example.com/check?all")),
        ("waf.example.com", pool([backend(waf.address)])),
    ]);
    let gateway = Gateway::with_config(snapshot, config);
    let response = gateway.get("a.com").await;
    assert_status(&response, 200);
    for text in [
        "app: GET /check?all\n",
        "host: waf.example.com\n",
        "x-cf-forwarded-url: https://a.com/\n",
        "x-cf-proxy-signature: ",
        "x-cf-proxy-metadata: ",
    ] {
        assert!(response.contains(text), "{text:?} not in {response}");
    }
    assert!(app.seen().is_empty());
}
