//! The proxy between real sockets: clients that write bytes, backends of tokio or hyper.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::l7::metrics::L7Totals;
use crate::route::{Backend, Origin, Pool};
use crate::snapshot::Snapshot;

mod access_log;
mod balancing;
mod bodies;
mod counting;
mod failures;
mod hostile;
mod http2;
#[cfg(feature = "http3")]
mod http3;
mod informational;
mod lifecycle;
mod limits;
mod otlp;
mod refusals;
mod retries;
mod route_services;
mod routing;
mod sessions;
mod tls;
mod tracing;
mod upgrades;

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// A backend as a minimal registration makes it.
pub(super) fn backend(address: SocketAddr) -> Backend {
    Backend::new(address, Origin::Nats)
}

fn pool(backends: impl IntoIterator<Item = Backend>) -> Pool {
    let backends = backends.into_iter().map(Arc::new).collect();
    Pool {
        backends,
        ..Pool::default()
    }
}

fn snapshot(routes: impl IntoIterator<Item = (&'static str, Pool)>) -> Snapshot {
    let mut snapshot = Snapshot {
        revision: 1,
        ..Snapshot::default()
    };
    for (host, pool) in routes {
        snapshot.hosts.add(host);
        let routes = snapshot.hosts.get_mut(host).expect("just added");
        routes.insert("".into(), None, Arc::new(pool));
    }
    snapshot
}

/// A proxy with one worker on a free port.
struct Gateway {
    proxy: Proxy,
    published: Published,
    metrics: Arc<L7Metrics>,
}

impl Gateway {
    fn start(snapshot: Snapshot) -> Gateway {
        Gateway::with_config(snapshot, config())
    }

    fn with_config(snapshot: Snapshot, config: HttpConfig) -> Gateway {
        let published: Published = Arc::new(ArcSwap::from_pointee(snapshot));
        let metrics = Arc::new(L7Metrics::default());
        let proxy = start(&config, Arc::clone(&published), Arc::clone(&metrics)).unwrap();
        Gateway {
            proxy,
            published,
            metrics,
        }
    }

    /// One route, `a.com`, to these addresses.
    fn to(addresses: impl IntoIterator<Item = SocketAddr>) -> Gateway {
        Gateway::start(snapshot([(
            "a.com",
            pool(addresses.into_iter().map(backend)),
        )]))
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.proxy.local_addresses()[0])
            .await
            .unwrap()
    }

    /// All that comes back for these bytes until the connection ends.
    async fn exchange(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut stream = self.connect().await;
        stream.write_all(bytes.as_ref()).await.unwrap();
        read_to_end(&mut stream).await
    }

    /// `GET / HTTP/1.1` with this host on a connection of its own.
    async fn get(&self, host: &str) -> String {
        self.exchange(format!(
            "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        ))
        .await
    }

    /// Waits until the counters satisfy `reached`.
    async fn totals(&self, reached: impl Fn(&L7Totals) -> bool) -> L7Totals {
        poll_until(|| Some(self.metrics.totals()).filter(&reached)).await
    }
}

fn config() -> HttpConfig {
    HttpConfig {
        listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
        workers: 1,
        ..HttpConfig::default()
    }
}

async fn poll_until<T>(mut probe: impl FnMut() -> Option<T>) -> T {
    let polling = async {
        loop {
            if let Some(found) = probe() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, polling)
        .await
        .expect("the condition comes true")
}

async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await;
    read.expect("the connection ends").expect("no reset");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads until `end` has come, and returns all with it.
async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut bytes = Vec::new();
    let reading = async {
        while !bytes.ends_with(end.as_bytes()) {
            let byte = stream.read_u8().await;
            bytes.push(byte.unwrap_or_else(|error| {
                panic!("{error} after {:?}", String::from_utf8_lossy(&bytes))
            }));
        }
    };
    tokio::time::timeout(PATIENCE, reading)
        .await
        .expect("the end comes");
    String::from_utf8(bytes).unwrap()
}

#[track_caller]
fn assert_status(response: &str, status: u16) {
    assert!(
        response.starts_with(&format!("HTTP/1.1 {status} ")),
        "{status} expected: {response:?}"
    );
}

type TestBody = BoxBody<Bytes, hyper::Error>;

fn full(text: impl Into<Bytes>) -> TestBody {
    Full::new(text.into())
        .map_err(|never| match never {})
        .boxed()
}

/// A hyper backend; what it sees is written down.
struct TestBackend {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
    connections: Arc<Mutex<usize>>,
}

impl TestBackend {
    /// Answers 200 with `name`.
    async fn named(name: &'static str) -> TestBackend {
        TestBackend::answering(move |_| Response::new(full(name))).await
    }

    async fn answering(
        answer: impl Fn(Request<Incoming>) -> Response<TestBody> + Clone + Send + 'static,
    ) -> TestBackend {
        TestBackend::speaking(false, answer).await
    }

    async fn speaking(
        http2: bool,
        answer: impl Fn(Request<Incoming>) -> Response<TestBody> + Clone + Send + 'static,
    ) -> TestBackend {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let backend = TestBackend {
            address: listener.local_addr().unwrap(),
            seen: Arc::default(),
            connections: Arc::default(),
        };
        let (seen, connections) = (Arc::clone(&backend.seen), Arc::clone(&backend.connections));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                *connections.lock().unwrap() += 1;
                let (seen, answer) = (Arc::clone(&seen), answer.clone());
                let service = service_fn(move |request: Request<Incoming>| {
                    let line = format!("{} {}", request.method(), request.uri());
                    seen.lock().unwrap().push(line);
                    let answer = answer(request);
                    async move { Ok::<_, Infallible>(answer) }
                });
                let io = TokioIo::new(stream);
                if http2 {
                    let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    tokio::spawn(builder.serve_connection(io, service));
                } else {
                    let builder = hyper::server::conn::http1::Builder::new();
                    tokio::spawn(builder.serve_connection(io, service));
                }
            }
        });
        backend
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }

    fn connections(&self) -> usize {
        *self.connections.lock().unwrap()
    }
}

/// A listener that the test itself accepts from, to play a backend byte by byte.
async fn scripted() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// An address that refuses connections: its listener is gone.
async fn refusing() -> SocketAddr {
    scripted().await.1
}
