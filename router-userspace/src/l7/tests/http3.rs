//! HTTP/3, with h3's client over quinn at the far end.

use std::path::Path;

use bytes::Buf;
use futures_util::StreamExt;
use h3::client::{RequestStream, SendRequest};
use h3_quinn::quinn::crypto::rustls::QuicClientConfig;
use h3_quinn::quinn::{ClientConfig, Connection, Endpoint};
use h3_quinn::{BidiStream, OpenStreams};
use http::{HeaderMap, Method, Version};
use http_body_util::StreamBody;
use hyper::body::Frame;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;

use super::*;
use crate::config::{CertificateFiles, HttpTlsConfig};
use crate::route::HttpProtocol;
use crate::route::policy::{HttpPolicy, RouteTimeouts};

mod hostile;
mod life;

/// A gateway that serves `a.com` by HTTP/3 and what is needed to be its client.
struct Site {
    gateway: Gateway,
    config: HttpConfig,
    files: tempfile::TempDir,
    certificate: CertificateDer<'static>,
}

/// A certificate for `a.com`, written over what is there.
fn write_certificate(directory: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(["a.com".to_owned()]).unwrap();
    std::fs::write(directory.join("a.crt"), made.cert.pem()).unwrap();
    std::fs::write(directory.join("a.key"), made.signing_key.serialize_pem()).unwrap();
    made.cert.der().clone()
}

impl Site {
    fn to(address: SocketAddr) -> Site {
        Site::with(snapshot([("a.com", pool([backend(address)]))]), |_| ())
    }

    fn with(snapshot: Snapshot, change: impl FnOnce(&mut HttpConfig)) -> Site {
        let files = tempfile::tempdir().unwrap();
        let certificate = write_certificate(files.path());
        let mut config = HttpConfig {
            listen: Vec::new(),
            tls: HttpTlsConfig {
                listen: config().listen,
                certificates: vec![CertificateFiles {
                    certificate_file: files.path().join("a.crt"),
                    key_file: files.path().join("a.key"),
                }],
                http3: true,
                ..HttpTlsConfig::default()
            },
            ..config()
        };
        change(&mut config);
        Site {
            gateway: started(snapshot, &config),
            config,
            files,
            certificate,
        }
    }

    fn address(&self) -> SocketAddr {
        self.gateway.proxy.local_addresses()[0]
    }

    async fn client(&self) -> Client {
        Client::connect(self.address(), &self.certificate)
            .await
            .unwrap()
    }
}

/// The UDP port beside the free TCP port that is taken for port 0 may be somebody's.
fn started(snapshot: Snapshot, config: &HttpConfig) -> Gateway {
    let published: Published = Arc::new(ArcSwap::from_pointee(snapshot));
    let metrics = Arc::new(L7Metrics::default());
    let mut tries = 0;
    let proxy = loop {
        match start(config, Arc::clone(&published), Arc::clone(&metrics)) {
            Ok(proxy) => break proxy,
            Err(error) if tries < 20 => {
                assert!(format!("{error:#}").contains(", UDP: "), "{error:#}");
                tries += 1;
            }
            Err(error) => panic!("{error:#}"),
        }
    };
    Gateway {
        proxy,
        published,
        metrics,
    }
}

/// A connection of HTTP/3.
struct Client {
    endpoint: Endpoint,
    quic: Connection,
    h3: SendRequest<OpenStreams, Bytes>,
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

type Stream = RequestStream<BidiStream<Bytes>, Bytes>;
type TestError = Box<dyn std::error::Error + Send + Sync>;

async fn quic(
    address: SocketAddr,
    certificate: &CertificateDer<'static>,
) -> Result<(Endpoint, Connection), TestError> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h3".to_vec()];
    let config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    let endpoint = Endpoint::client("127.0.0.1:0".parse()?)?;
    let connecting = endpoint.connect_with(config, address, "a.com")?;
    let connection = tokio::time::timeout(PATIENCE, connecting).await??;
    Ok((endpoint, connection))
}

impl Client {
    async fn connect(
        address: SocketAddr,
        certificate: &CertificateDer<'static>,
    ) -> Result<Client, TestError> {
        let (endpoint, quic) = quic(address, certificate).await?;
        let (mut driver, h3) = h3::client::new(h3_quinn::Connection::new(quic.clone())).await?;
        tokio::spawn(async move { driver.wait_idle().await });
        Ok(Client { endpoint, quic, h3 })
    }

    async fn send(&mut self, request: Request<()>) -> Stream {
        self.h3.send_request(request).await.unwrap()
    }

    /// A whole request without a body.
    async fn exchange(&mut self, request: Request<()>) -> Result<Answer, TestError> {
        let mut stream = self.h3.send_request(request).await?;
        stream.finish().await?;
        answer(&mut stream).await
    }

    async fn get(&mut self, path: &str) -> Answer {
        self.exchange(get(path)).await.unwrap()
    }
}

fn get(path: &str) -> Request<()> {
    request(Method::GET, path)
}

fn request(method: Method, path: &str) -> Request<()> {
    Request::builder()
        .method(method)
        .uri(format!("https://a.com{path}"))
        .version(Version::HTTP_3)
        .body(())
        .unwrap()
}

async fn answer(stream: &mut Stream) -> Result<Answer, TestError> {
    let reading = async {
        let response = stream.recv_response().await?;
        let mut body = Vec::new();
        while let Some(data) = stream.recv_data().await? {
            body.extend_from_slice(data.chunk());
        }
        Ok(Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            body,
        })
    };
    tokio::time::timeout(PATIENCE, reading).await?
}

/// Answers with what it got: the protocol, the headers and the body's length, and its trailers as its own.
async fn echo(http2: bool) -> TestBackend {
    TestBackend::speaking(http2, |request| {
        let mut head = format!("{:?}\n", request.version());
        for (name, value) in request.headers() {
            head.push_str(&format!("{name}: {}\n", value.to_str().unwrap()));
        }
        let head = futures_util::stream::once(async { Ok(Frame::data(Bytes::from(head))) });
        let body = http_body_util::BodyStream::new(request.into_body());
        Response::new(BodyExt::boxed(StreamBody::new(head.chain(body))))
    })
    .await
}

#[tokio::test]
async fn a_request_for_a_host_of_another_certificate_is_421() {
    let backend = TestBackend::named("hello").await;
    let others = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["b.com".to_owned()]).unwrap();
    let [certificate_file, key_file] = ["b.crt", "b.key"].map(|name| others.path().join(name));
    std::fs::write(&certificate_file, made.cert.pem()).unwrap();
    std::fs::write(&key_file, made.signing_key.serialize_pem()).unwrap();
    let pool = || pool([crate::l7::tests::backend(backend.address)]);
    let routes = ["a.com", "b.com", "c.com"].map(|host| (host, pool()));
    let site = Site::with(snapshot(routes), |config| {
        config.tls.certificates.push(CertificateFiles {
            certificate_file,
            key_file,
        });
    });
    let mut client = site.client().await;
    // Nobody has a certificate for the last: the first stands for it.
    for (host, status) in [
        ("a.com", 200),
        ("b.com", 421),
        ("b.com:8443", 421),
        ("c.com", 200),
    ] {
        let mut request = get("/");
        *request.uri_mut() = format!("https://{host}/").parse().unwrap();
        assert_eq!(
            client.exchange(request).await.unwrap().status,
            status,
            "{host}"
        );
    }
    let errors = site.gateway.metrics.totals().errors;
    assert!(errors.contains(&("misdirected", 2)), "{errors:?}");
}

#[tokio::test]
async fn requests_are_served_by_backends_of_either_version() {
    for http2 in [false, true] {
        let app = echo(http2).await;
        let target = Backend {
            protocol: match http2 {
                true => HttpProtocol::Http2,
                false => HttpProtocol::Http1,
            },
            ..backend(app.address)
        };
        let site = Site::with(snapshot([("a.com", pool([target]))]), |config| {
            config.via = Some("gate".to_owned());
            config.forwarded_port = true;
        });
        let mut client = site.client().await;
        let mut wanted = get("/x?y=1");
        let headers = wanted.headers_mut();
        headers.append("cookie", "a=1".parse().unwrap());
        headers.append("cookie", "b=2".parse().unwrap());
        headers.insert("x-forwarded-for", "192.0.2.1".parse().unwrap());
        headers.insert("te", "trailers".parse().unwrap());
        let answer = client.exchange(wanted).await.unwrap();
        assert_eq!(answer.status, 200);
        let seen = answer.text();
        let port = site.address().port();
        for line in [
            "x-forwarded-for: 127.0.0.1\n",
            "x-forwarded-proto: https\n",
            &format!("x-forwarded-port: {port}\n"),
            "via: 3.0 gate\n",
        ] {
            assert!(seen.contains(line), "{line} in {seen}");
        }
        assert!(!seen.contains("content-length") && !seen.contains("transfer-encoding"));
        if !http2 {
            assert!(seen.contains("host: a.com\n"), "{seen}");
            assert!(seen.contains("cookie: a=1; b=2\n"), "{seen}");
        }
        assert!(answer.headers.contains_key("x-vcap-request-id"));
        assert!(answer.headers.contains_key("date"));
        assert!(!answer.headers.contains_key("alt-svc"));
        let totals = site.gateway.totals(|totals| totals.responses[1] == 1).await;
        assert_eq!((totals.http3_connections, totals.aborted), (1, 0));
    }
}

#[tokio::test]
async fn bodies_and_trailers_pass_both_ways() {
    const CHUNKS: usize = 100;
    for http2 in [false, true] {
        let app = echo(http2).await;
        let target = Backend {
            protocol: match http2 {
                true => HttpProtocol::Http2,
                false => HttpProtocol::Http1,
            },
            ..backend(app.address)
        };
        let site = Site::with(snapshot([("a.com", pool([target]))]), |_| ());
        let mut client = site.client().await;
        let mut wanted = request(Method::POST, "/");
        wanted
            .headers_mut()
            .insert("te", "trailers".parse().unwrap());
        let headers = wanted.headers_mut();
        headers.insert("trailer", "x-sum".parse().unwrap());
        let (mut send, mut receive) = client.send(wanted).await.split();
        let chunk = Bytes::from(vec![b'x'; 64 * 1024]);
        let sent = chunk.clone();
        let sending = tokio::spawn(async move {
            for _ in 0..CHUNKS {
                send.send_data(sent.clone()).await.unwrap();
            }
            // h3 takes one for the end of a body.
            send.send_data(Bytes::new()).await.unwrap();
            send.send_data(Bytes::from("end")).await.unwrap();
            let trailers = [("x-sum".parse().unwrap(), "7".parse().unwrap())];
            send.send_trailers(HeaderMap::from_iter(trailers))
                .await
                .unwrap();
            send.finish().await.unwrap();
        });
        let response = receive.recv_response().await.unwrap();
        assert_eq!(response.status(), 200);
        let mut body = Vec::new();
        while let Some(data) = receive.recv_data().await.unwrap() {
            body.extend_from_slice(data.chunk());
        }
        sending.await.unwrap();
        assert!(body.ends_with(b"xend"));
        let xs = body.iter().rev().skip(3).take_while(|&&byte| byte == b'x');
        assert_eq!(xs.count(), CHUNKS * chunk.len());
        if http2 {
            let trailers = receive.recv_trailers().await.unwrap().unwrap();
            assert_eq!(trailers["x-sum"], "7");
        }
    }
}

#[tokio::test]
async fn a_100_continue_comes_when_a_backend_has_been_found() {
    let site = Site::to(echo(false).await.address);
    let mut client = site.client().await;
    for (host, statuses) in [("a.com", &[100, 200][..]), ("b.com", &[404][..])] {
        let wanted = Request::builder()
            .method(Method::POST)
            .uri(format!("https://{host}/"))
            .header("expect", "100-continue")
            .body(())
            .unwrap();
        let mut stream = client.send(wanted).await;
        for &status in statuses {
            let head = tokio::time::timeout(PATIENCE, stream.recv_response());
            assert_eq!(head.await.unwrap().unwrap().status(), status);
            if status == 100 {
                stream.send_data(Bytes::from("hi")).await.unwrap();
                stream.finish().await.unwrap();
            }
        }
    }
}

/// In which somebody who does not read must have stopped a sender.
const STILL: Duration = Duration::from_millis(250);

#[tokio::test]
async fn a_backend_that_does_not_read_stops_its_client() {
    let (listener, address) = scripted().await;
    let site = Site::to(address);
    let mut client = site.client().await;
    let mut stream = client.send(request(Method::POST, "/")).await;
    let (_held, _) = listener.accept().await.unwrap();
    let chunk = Bytes::from(vec![b'x'; 0x10000]);
    let mut chunks = 0;
    while let Ok(sent) = tokio::time::timeout(STILL, stream.send_data(chunk.clone())).await {
        sent.unwrap();
        chunks += 1;
        assert!(chunks < 4096, "256 MiB went somewhere");
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_backend() {
    let (listener, address) = scripted().await;
    let site = Site::to(address);
    let mut client = site.client().await;
    let mut stream = client.send(get("/")).await;
    stream.finish().await.unwrap();
    let (mut connection, _) = listener.accept().await.unwrap();
    read_until(&mut connection, "\r\n\r\n").await;
    let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    connection.write_all(head).await.unwrap();
    assert_eq!(stream.recv_response().await.unwrap().status(), 200);
    let chunk = [b"10000\r\n".as_slice(), &vec![b'x'; 0x10000], b"\r\n"].concat();
    let mut chunks = 0;
    while let Ok(written) = tokio::time::timeout(STILL, connection.write_all(&chunk)).await {
        written.unwrap();
        chunks += 1;
        assert!(chunks < 4096, "256 MiB went somewhere");
    }
}

#[tokio::test]
async fn the_gateways_own_answers_are_those_of_the_other_versions() {
    let (silent, silent_address) = scripted().await;
    let mut timed = pool([backend(silent_address)]);
    let mut policy = HttpPolicy::new(Origin::File);
    policy.timeouts = RouteTimeouts {
        response_headers: Some(Duration::from_millis(50)),
        ..RouteTimeouts::default()
    };
    timed.policy = Some(Arc::new(policy));
    let site = Site::with(
        snapshot([
            ("a.com", pool([backend(refusing().await)])),
            ("slow.com", timed),
        ]),
        |_| (),
    );
    let mut client = site.client().await;
    let asked = |host: &str, method: Method| {
        Request::builder()
            .method(method)
            .uri(format!("https://{host}/"))
            .body(())
            .unwrap()
    };
    for (host, method, status, cause) in [
        ("none.com", Method::GET, 404, "unknown_route"),
        ("a.com", Method::GET, 502, "endpoint_failure"),
        ("slow.com", Method::GET, 504, "endpoint_timeout"),
        ("a.com", Method::TRACE, 405, ""),
        ("a.com", Method::CONNECT, 405, ""),
    ] {
        let asked = asked(host, method.clone());
        let answer = client.exchange(asked).await;
        let answer = answer.unwrap_or_else(|error| panic!("{method} {host}: {error}"));
        assert_eq!(answer.status, status, "{host}");
        let said = answer.headers.get("x-cf-routererror");
        let said = said.map_or("", |it| it.to_str().unwrap());
        assert!(said.starts_with(cause), "{said}");
        let len = answer.body.len().to_string();
        assert_eq!(answer.headers["content-length"], len.as_str());
    }
    let head = asked("none.com", Method::HEAD);
    let answer = client.exchange(head).await.unwrap();
    assert_eq!((answer.status, answer.body.len()), (404, 0));
    drop(silent);
}

#[tokio::test]
async fn a_response_that_breaks_off_is_reset_and_not_ended() {
    let (listener, address) = scripted().await;
    let site = Site::to(address);
    let mut client = site.client().await;
    let mut stream = client.send(get("/")).await;
    stream.finish().await.unwrap();
    let (mut connection, _) = listener.accept().await.unwrap();
    read_until(&mut connection, "\r\n\r\n").await;
    let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n";
    connection.write_all(head).await.unwrap();
    assert_eq!(stream.recv_response().await.unwrap().status(), 200);
    drop(connection);
    assert!(answer_rest(&mut stream).await.is_err());
    site.gateway.totals(|totals| totals.aborted == 1).await;
}

async fn answer_rest(stream: &mut Stream) -> Result<(), TestError> {
    while stream.recv_data().await?.is_some() {}
    Ok(())
}

#[tokio::test]
async fn a_client_that_takes_its_request_back_ends_it_at_the_backend() {
    let (listener, address) = scripted().await;
    let site = Site::to(address);
    let mut client = site.client().await;
    let mut stream = client.send(get("/")).await;
    stream.finish().await.unwrap();
    let (mut connection, _) = listener.accept().await.unwrap();
    read_until(&mut connection, "\r\n\r\n").await;
    stream.stop_sending(h3::error::Code::H3_REQUEST_CANCELLED);
    assert_eq!(read_to_end(&mut connection).await, "");
    let totals = site.gateway.totals(|totals| totals.aborted == 1).await;
    assert_eq!(totals.requests_in_flight, 0);
}

#[tokio::test]
async fn clients_of_the_other_versions_are_told_where_it_is() {
    let app = TestBackend::answering(|_| {
        let mut response = Response::new(full("ok"));
        let own = "h3=\":9\"".parse().unwrap();
        response.headers_mut().insert("alt-svc", own);
        response
    })
    .await;
    let site = Site::with(
        snapshot([("a.com", pool([backend(app.address)]))]),
        |config| config.listen.clone_from(&config.tls.listen),
    );
    let addresses = site.gateway.proxy.local_addresses().to_vec();
    let [clear, tls] = addresses[..] else {
        panic!("{addresses:?}")
    };
    let mut roots = RootCertStore::empty();
    roots.add(site.certificate.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let offered = format!("alt-svc: h3=\":{}\"; ma=86400\r\n", tls.port());
    poll_until_offered(&connector, tls, &offered).await;
    let response = site.gateway.get("a.com").await;
    assert_eq!(site.address(), clear);
    assert!(response.contains("alt-svc: h3=\":9\"\r\n"), "{response}");
}

/// The worker may not have come to serve UDP yet when it first answers on TCP.
async fn poll_until_offered(
    connector: &tokio_rustls::TlsConnector,
    address: SocketAddr,
    offered: &str,
) {
    let asking = async {
        loop {
            let stream = TcpStream::connect(address).await.unwrap();
            let host = "a.com".try_into().unwrap();
            let mut stream = connector.connect(host, stream).await.unwrap();
            let get = b"GET / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n";
            stream.write_all(get).await.unwrap();
            let mut response = Vec::new();
            stream.read_to_end(&mut response).await.unwrap();
            let response = String::from_utf8(response).unwrap();
            assert_status(&response, 200);
            if response.contains(offered) {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.expect(offered);
}

#[tokio::test]
async fn the_access_log_says_that_it_was_http3() {
    let app = TestBackend::named("hello").await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    let site = Site::with(
        snapshot([("a.com", pool([backend(app.address)]))]),
        |config| config.access_log.path = Some(path.clone()),
    );
    let mut client = site.client().await;
    assert_eq!(client.get("/x").await.text(), "hello");
    let line = poll_until(|| {
        std::fs::read_to_string(&path)
            .ok()
            .filter(|it| it.contains('\n'))
    })
    .await;
    for part in [
        "\"protocol\":\"HTTP/3.0\"",
        "\"target\":\"/x\"",
        "\"bytes_sent\":5",
        "\"tls_version\":\"TLSv1_3\"",
        "\"tls_sni\":\"a.com\"",
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
    assert!(
        !line.contains("aborted") && !line.contains("tls_cipher"),
        "{line}"
    );
}
