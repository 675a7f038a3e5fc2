//! Trace contexts and `Via` through the gateway.

use super::*;
use crate::config::{HttpAccessLog, HttpTracing, TraceMode};

#[tokio::test]
async fn a_trace_goes_on_at_the_backend_and_in_the_log() {
    let (listener, address) = scripted().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("access.log");
    let config = HttpConfig {
        access_log: HttpAccessLog {
            path: Some(path.clone()),
            ..HttpAccessLog::default()
        },
        tracing: HttpTracing {
            mode: TraceMode::Begin,
            b3: true,
            ..HttpTracing::default()
        },
        via: Some("gate".to_owned()),
        ..config()
    };
    let gateway = Gateway::with_config(snapshot([("a.com", pool([backend(address)]))]), config);
    let mut client = gateway.connect().await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let request = format!(
        "GET / HTTP/1.0\r\nHost: a.com\r\nConnection: traceparent\r\n\
         Traceparent: 00-{trace}-b7ad6b7169203331-01\r\n\r\n"
    );
    client.write_all(request.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    let head = read_until(&mut stream, "\r\n\r\n").await;
    assert!(
        head.contains(&format!("\r\ntraceparent: 00-{trace}-")),
        "{head}"
    );
    assert!(!head.contains("traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"));
    assert!(
        head.contains(&format!("\r\nx-b3-traceid: {trace}\r\n")),
        "{head}"
    );
    assert!(head.contains("\r\nvia: 1.0 gate\r\n"), "{head}");
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        .await
        .unwrap();
    let response = read_to_end(&mut client).await;
    assert!(response.contains("\r\nvia: 1.1 gate\r\n"), "{response}");
    let line = poll_until(|| {
        let text = std::fs::read_to_string(&path).ok()?;
        text.ends_with('\n').then_some(text)
    })
    .await;
    assert!(
        line.contains(&format!(",\"trace_id\":\"{trace}\"")),
        "{line}"
    );
}
