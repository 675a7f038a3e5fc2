//! Spans at a collector that reads protobuf.

use std::collections::HashMap;

use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message;

use super::*;
use crate::config::{CollectorUrl, HttpTracing, TraceMode};
use crate::l7::otlp::{Ended, RequestSpan};
use crate::l7::trace::SpanContext;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

/// A collector; what it was sent is kept.
struct FakeCollector {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
}

impl FakeCollector {
    async fn start() -> FakeCollector {
        FakeCollector::answering("127.0.0.1:0".parse().unwrap(), 200, 0).await
    }

    async fn answering(address: SocketAddr, status: u16, rejected_spans: i64) -> FakeCollector {
        let listener = TcpListener::bind(address).await.unwrap();
        let collector = FakeCollector {
            address: listener.local_addr().unwrap(),
            requests: Arc::default(),
        };
        let requests = Arc::clone(&collector.requests);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let requests = Arc::clone(&requests);
                let service = service_fn(move |request: Request<Incoming>| {
                    let requests = Arc::clone(&requests);
                    async move {
                        assert_eq!(request.method(), "POST");
                        assert_eq!(request.uri(), "/v1/traces");
                        assert_eq!(request.headers()["content-type"], "application/x-protobuf");
                        let body = request.into_body().collect().await.unwrap().to_bytes();
                        let decoded = ExportTraceServiceRequest::decode(body).unwrap();
                        requests.lock().unwrap().push(decoded);
                        let answer = ExportTraceServiceResponse {
                            partial_success: Some(ExportTracePartialSuccess {
                                rejected_spans,
                                error_message: String::new(),
                            }),
                        };
                        let mut response = Response::new(full(answer.encode_to_vec()));
                        *response.status_mut() = status.try_into().unwrap();
                        Ok::<_, Infallible>(response)
                    }
                });
                let builder = hyper::server::conn::http1::Builder::new();
                tokio::spawn(builder.serve_connection(TokioIo::new(stream), service));
            }
        });
        collector
    }

    /// All that have come once there are `count`.
    async fn spans(&self, count: usize) -> Vec<Span> {
        let spans = || -> Vec<Span> {
            let requests = self.requests.lock().unwrap();
            let resources = requests.iter().flat_map(|it| &it.resource_spans);
            let scopes = resources.flat_map(|it| &it.scope_spans);
            scopes.flat_map(|it| it.spans.clone()).collect()
        };
        poll_until(|| Some(spans()).filter(|it| it.len() >= count)).await
    }
}

fn tracing(collector: SocketAddr) -> HttpTracing {
    HttpTracing {
        mode: TraceMode::Begin,
        endpoint: Some(CollectorUrl::try_from(format!("http://{collector}")).unwrap()),
        service_name: "gate".to_owned(),
        ..HttpTracing::default()
    }
}

fn traced(routes: Snapshot, tracing: HttpTracing) -> Gateway {
    Gateway::with_config(
        routes,
        HttpConfig {
            tracing,
            ..config()
        },
    )
}

fn attributes(from: &[KeyValue]) -> HashMap<&str, String> {
    let text = |it: &KeyValue| match it.value.as_ref().unwrap().value.as_ref().unwrap() {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        other => panic!("{other:?}"),
    };
    from.iter().map(|it| (it.key.as_str(), text(it))).collect()
}

fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

#[tokio::test]
async fn a_request_is_a_span_of_its_trace_with_the_attempt_below() {
    let collector = FakeCollector::start().await;
    let (listener, address) = scripted().await;
    let routes = snapshot([("a.com", pool([backend(address)]))]);
    let gateway = traced(routes, tracing(collector.address));
    let mut client = gateway.connect().await;
    let request = format!(
        "GET /shop?secret=1 HTTP/1.1\r\nHost: a.com:81\r\nUser-Agent: curl/8\r\n\
         Traceparent: 00-{TRACE}-{PARENT}-01\r\nTracestate: a=b\r\n\r\n"
    );
    client.write_all(request.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    let head = read_until(&mut stream, "\r\n\r\n").await;
    stream
        .write_all(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
        .await
        .unwrap();
    read_until(&mut client, "\r\n\r\n").await;

    let spans = collector.spans(2).await;
    let [server, attempt] = &spans[..] else {
        panic!("{spans:?}");
    };
    assert_eq!(hex(&server.trace_id), TRACE);
    assert_eq!(hex(&server.parent_span_id), PARENT);
    assert_eq!(
        (server.kind, server.name.as_str()),
        (SpanKind::Server as i32, "GET /")
    );
    assert_eq!((server.flags, server.trace_state.as_str()), (0x301, "a=b"));
    assert_eq!(server.status, None);
    assert!(server.start_time_unix_nano > 0);
    assert!(server.end_time_unix_nano >= server.start_time_unix_nano);
    let peer = client.local_addr().unwrap().port().to_string();
    let expected = HashMap::from([
        ("http.request.method", "GET"),
        ("url.scheme", "http"),
        ("url.path", "/shop"),
        ("http.route", "/"),
        ("server.address", "a.com"),
        ("server.port", "81"),
        ("network.peer.address", "127.0.0.1"),
        ("network.peer.port", peer.as_str()),
        ("client.address", "127.0.0.1"),
        ("network.protocol.name", "http"),
        ("network.protocol.version", "1.1"),
        ("user_agent.original", "curl/8"),
        ("http.response.status_code", "201"),
    ]);
    let seen = attributes(&server.attributes);
    let seen: HashMap<_, _> = seen.iter().map(|(key, it)| (*key, it.as_str())).collect();
    assert_eq!(seen, expected);

    assert_eq!(attempt.trace_id, server.trace_id);
    assert_eq!(attempt.parent_span_id, server.span_id);
    assert_eq!(
        (attempt.kind, attempt.name.as_str()),
        (SpanKind::Client as i32, "GET")
    );
    assert!(attempt.start_time_unix_nano >= server.start_time_unix_nano);
    assert_eq!(attempt.end_time_unix_nano, server.end_time_unix_nano);
    let seen = attributes(&attempt.attributes);
    assert_eq!(seen["server.port"], address.port().to_string());
    assert_eq!(seen["http.response.status_code"], "201");
    // The backend's own span is below the attempt.
    let parent = format!(
        "\r\ntraceparent: 00-{TRACE}-{}-01\r\n",
        hex(&attempt.span_id)
    );
    assert!(head.contains(&parent), "{head}");

    let requests = collector.requests.lock().unwrap();
    let resource = requests[0].resource_spans[0].resource.as_ref().unwrap();
    let seen = attributes(&resource.attributes);
    assert_eq!(seen["service.name"], "gate");
    assert!(seen.contains_key("service.version") && seen.contains_key("host.name"));
    assert_eq!(gateway.metrics.spans.exported(), 2);
}

#[tokio::test]
async fn each_attempt_is_a_span_and_says_why_it_failed() {
    let collector = FakeCollector::start().await;
    let (listener, closing) = scripted().await;
    let routes = snapshot([("a.com", pool([backend(refusing().await), backend(closing)]))]);
    let tracing = HttpTracing {
        b3: true,
        w3c: false,
        ..tracing(collector.address)
    };
    let gateway = traced(routes, tracing);
    let backend = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_until(&mut stream, "\r\n\r\n").await
    });
    let request = format!(
        "GET / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\nB3: {TRACE}-{PARENT}-1\r\n\r\n"
    );
    assert_status(&gateway.exchange(request).await, 502);
    let head = backend.await.unwrap();

    let spans = collector.spans(3).await;
    let [server, first, second] = &spans[..] else {
        panic!("{spans:?}");
    };
    assert_eq!(hex(&server.trace_id), TRACE);
    assert_eq!(hex(&server.parent_span_id), PARENT);
    let of_server = attributes(&server.attributes);
    assert_eq!(of_server["http.response.status_code"], "502");
    let mut errors = Vec::new();
    for attempt in [first, second] {
        assert_eq!(attempt.parent_span_id, server.span_id);
        assert_eq!(attempt.status.as_ref().unwrap().code, 2);
        let seen = attributes(&attempt.attributes);
        assert!(!seen.contains_key("http.response.status_code"));
        errors.push(seen["error.type"].clone());
        if errors[errors.len() - 1] == "endpoint_closed" {
            let (own, above) = (hex(&attempt.span_id), hex(&server.span_id));
            let single = format!("\r\nb3: {TRACE}-{own}-1-{above}\r\n");
            assert!(head.contains(&single), "{head}");
        }
    }
    assert!(first.end_time_unix_nano <= second.start_time_unix_nano);
    let seen = attributes(&second.attributes);
    assert_eq!(seen["http.request.resend_count"], "1");
    assert_eq!(of_server["error.type"], errors[1]);
    errors.sort();
    assert_eq!(errors, ["endpoint_closed", "endpoint_refused"]);
}

#[tokio::test]
async fn what_is_not_sampled_is_not_exported() {
    let collector = FakeCollector::start().await;
    let tracing = HttpTracing {
        sample: 0.0,
        ..tracing(collector.address)
    };
    let gateway = traced(snapshot([]), tracing);
    let mut client = gateway.connect().await;
    for parent in [
        String::new(),
        format!("Traceparent: 00-{TRACE}-{PARENT}-00\r\n"),
        format!("Traceparent: 00-{TRACE}-{PARENT}-01\r\nConnection: close\r\n"),
    ] {
        let request = format!("BREW /pot HTTP/1.1\r\nHost: b.com\r\n{parent}\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
    }
    read_to_end(&mut client).await;
    let spans = collector.spans(1).await;
    assert_eq!(
        (spans.len(), hex(&spans[0].parent_span_id).as_str()),
        (1, PARENT)
    );
    // The client's mistake is no error of the gateway.
    assert_eq!((spans[0].name.as_str(), &spans[0].status), ("HTTP", &None));
    let seen = attributes(&spans[0].attributes);
    assert_eq!(seen["http.response.status_code"], "404");
    assert_eq!(seen["http.request.method"], "_OTHER");
    assert_eq!(seen["http.request.method_original"], "BREW");
    assert!(!seen.contains_key("http.route") && !seen.contains_key("error.type"));
}

#[tokio::test]
async fn spans_wait_for_a_collector_that_is_gone() {
    let address = refusing().await;
    let gateway = traced(snapshot([]), tracing(address));
    for _ in 0..3 {
        assert_status(&gateway.get("b.com").await, 404);
    }
    let collector = FakeCollector::answering(address, 200, 0).await;
    assert_eq!(collector.spans(3).await.len(), 3);
    poll_until(|| (gateway.metrics.spans.exported() == 3).then_some(())).await;
    assert_eq!(gateway.metrics.spans.dropped(), 0);
}

#[tokio::test]
async fn what_a_collector_refuses_is_counted() {
    let any = "127.0.0.1:0".parse().unwrap();
    for (status, rejected, counts) in [(400, 0, (0, 1)), (200, 1, (0, 1)), (200, -1, (1, 0))] {
        let collector = FakeCollector::answering(any, status, rejected).await;
        let gateway = traced(snapshot([]), tracing(collector.address));
        assert_status(&gateway.get("b.com").await, 404);
        let spans = &gateway.metrics.spans;
        poll_until(|| (spans.exported() + spans.dropped() == 1).then_some(())).await;
        assert_eq!((spans.exported(), spans.dropped()), counts);
    }
}

#[tokio::test]
async fn a_reload_changes_the_collector() {
    let (first, second) = (FakeCollector::start().await, FakeCollector::start().await);
    let gateway = traced(snapshot([]), tracing(first.address));
    assert_status(&gateway.get("b.com").await, 404);
    for collector in [&first, &second] {
        let config = HttpConfig {
            tracing: tracing(collector.address),
            ..config()
        };
        gateway.proxy.reload(&config).unwrap();
        assert_status(&gateway.get("b.com").await, 404);
    }
    assert_eq!(second.spans(1).await.len(), 1);
    assert_eq!(first.spans(2).await.len(), 2);
}

#[tokio::test]
async fn the_last_spans_are_exported_when_the_gateway_ends() {
    let collector = FakeCollector::start().await;
    let gateway = traced(snapshot([]), tracing(collector.address));
    assert_status(&gateway.get("b.com").await, 404);
    gateway.proxy.drain(PATIENCE).await;
    assert_eq!(collector.spans(1).await.len(), 1);
}

/// Hands over so many requests at once.
fn push(exporter: &Arc<Exporter>, count: u64) {
    let request = Request::get("http://a.com/").body(()).unwrap();
    for number in 1..=count {
        let context = SpanContext {
            trace: 1,
            span: number,
            parent: None,
        };
        let peer = SocketAddr::from(([192, 0, 2, 1], 1));
        let exporter = Arc::clone(exporter);
        let now = Instant::now();
        let span = RequestSpan::new(exporter, context, &request, peer, true, now);
        Box::new(span).end(Ended {
            began: Duration::from_secs(1),
            total: Duration::from_secs(1),
            route: None,
            status: None,
            aborted: None,
        });
    }
}

fn exporter(collector: SocketAddr, metrics: &Arc<L7Metrics>) -> Arc<Exporter> {
    let started = Exporter::start(&tracing(collector), None, metrics);
    started.unwrap().unwrap()
}

#[tokio::test]
async fn many_go_in_batches() {
    let collector = FakeCollector::start().await;
    let exporter = exporter(collector.address, &Arc::default());
    push(&exporter, 2000);
    let mut ids: Vec<_> = collector
        .spans(2000)
        .await
        .into_iter()
        .map(|it| it.span_id)
        .collect();
    ids.dedup();
    assert_eq!(ids.len(), 2000);
    let requests = collector.requests.lock().unwrap();
    let sizes = requests
        .iter()
        .map(|it| it.resource_spans[0].scope_spans[0].spans.len());
    let sizes: Vec<_> = sizes.collect();
    assert!(sizes.iter().all(|size| *size <= 512), "{sizes:?}");
    assert!(sizes.len() <= 6, "{sizes:?}");
}

#[tokio::test]
async fn those_that_find_no_room_are_dropped_and_counted() {
    let metrics = Arc::<L7Metrics>::default();
    let (_silent, address) = scripted().await;
    let exporter = exporter(address, &metrics);
    push(&exporter, 10_000);
    let dropped = metrics.spans.dropped();
    assert!(
        (10_000 - 8192 - 512..=10_000 - 8192).contains(&dropped),
        "{dropped}"
    );
}
