//! Hostile and broken requests as bytes: what the client gets, and that no backend sees more than
//! the one request it should.

use super::*;

/// Sends `bytes`, which end with a request for `/smuggled` wherever a confused reader would see
/// one, and checks the first status and that the backend saw only `seen`.
async fn check(bytes: &str, status: u16, seen: &[&str]) {
    let a = TestBackend::named("a").await;
    let gateway = Gateway::to([a.address]);
    let mut stream = gateway.connect().await;
    stream.write_all(bytes.as_bytes()).await.unwrap();
    let response = read_to_end(&mut stream).await;
    assert!(
        response.starts_with(&format!("HTTP/1.1 {status} "))
            || (response.starts_with(&format!("HTTP/1.0 {status} ")) && bytes.contains("HTTP/1.0")),
        "{status} expected for {bytes:?}: {response:?}"
    );
    assert_eq!(a.seen(), seen, "{bytes:?}");
    let totals = gateway.metrics.totals();
    assert_eq!(totals.responses[1], u64::from(status == 200), "{bytes:?}");
}

/// A POST with these header lines, a chunked body and a second request behind it.
fn post(lines: &str) -> String {
    format!(
        "POST / HTTP/1.1\r\nHost: a.com\r\n{lines}\r\n0\r\n\r\n\
         GET /smuggled HTTP/1.1\r\nHost: a.com\r\n\r\n"
    )
}

#[tokio::test]
async fn ambiguous_framing_is_refused_and_the_connection_closed() {
    for lines in [
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: ,chunked\r\n",
        "Transfer-Encoding: chunked,\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding: chunked, gzip\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Transfer-Encoding:\u{b}chunked\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 1, 1\r\n",
        "Content-Length: 99999999999999999999\r\n",
    ] {
        check(&post(lines), 400, &[]).await;
    }
    check(&post("Transfer-Encoding: gzip, chunked\r\n"), 501, &[]).await;
}

#[tokio::test]
async fn a_length_beside_a_coding_is_refused_and_the_connection_closed() {
    for lines in [
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "content-length:5\r\nX: y\r\ntransfer-encoding: CHUNKED\r\n",
    ] {
        check(&post(lines), 400, &[]).await;
    }
}

#[tokio::test]
async fn a_length_beside_a_coding_is_refused_behind_other_requests() {
    let both = post("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n");
    let get = "GET / HTTP/1.1\r\nHost: a.com\r\n\r\n";
    let upload = "POST / HTTP/1.1\r\nHost: a.com\r\nContent-Length: 5\r\n\r\nhello";
    for before in [get.to_owned(), get.repeat(3), upload.to_owned()] {
        let a = TestBackend::named("a").await;
        let gateway = Gateway::to([a.address]);
        let mut stream = gateway.connect().await;
        stream.write_all(before.as_bytes()).await.unwrap();
        for _ in 0..before.matches("HTTP/1.1").count() {
            assert_status(&read_until(&mut stream, "\r\n\r\na").await, 200);
        }
        stream.write_all(both.as_bytes()).await.unwrap();
        assert_status(&read_to_end(&mut stream).await, 400);
    }
    let a = TestBackend::named("a").await;
    let gateway = Gateway::to([a.address]);
    let answers = gateway.exchange(format!("{get}{both}")).await;
    let statuses: Vec<&str> = answers
        .split("HTTP/1.1 ")
        .skip(1)
        .map(|it| &it[..3])
        .collect();
    assert_eq!(statuses, ["200", "400"]);
}

#[tokio::test]
async fn a_body_that_looks_like_a_length_is_not_one() {
    let a = TestBackend::named("a").await;
    let gateway = Gateway::to([a.address]);
    let mut stream = gateway.connect().await;
    let bytes = "POST / HTTP/1.1\r\nHost: a.com\r\nTransfer-Encoding: chunked\r\n\r\n\
                 13\r\nContent-Length: 5\r\n\r\n0\r\n\r\n";
    for _ in 0..3 {
        stream.write_all(bytes.as_bytes()).await.unwrap();
        assert_status(&read_until(&mut stream, "\r\n\r\na").await, 200);
    }
}

#[tokio::test]
async fn a_host_that_is_missing_double_or_malformed_is_refused() {
    let get = |lines: &str| format!("GET / HTTP/1.1\r\n{lines}\r\n");
    for lines in [
        "",
        "Host:\r\n",
        "Host: a.com\r\nHost: a.com\r\n",
        "Host: a.com\r\nHost: b.com\r\n",
        "Host: user@a.com\r\n",
        "Host: a.com/b\r\n",
        "Host: a b\r\n",
        "Host: a.com, b.com\r\n",
    ] {
        check(&get(lines), 400, &[]).await;
    }
    check("GET / HTTP/1.0\r\n\r\n", 400, &[]).await;
}

#[tokio::test]
async fn a_target_that_is_not_a_path_of_the_host_is_refused() {
    let get = |target: &str| format!("GET {target} HTTP/1.1\r\nHost: a.com\r\n\r\n");
    for target in [
        "x",
        "*",
        "http://b.com/",
        "http://u@a.com/",
        "https://a.com/",
        "ftp://a.com/",
        "/a%00",
        "/..",
        "/a/../../b",
    ] {
        check(&get(target), 400, &[]).await;
    }
    let long = get(&format!("/{}", "x".repeat(16 * 1024)));
    check(&long, 414, &[]).await;
}

#[tokio::test]
async fn an_oversized_head_is_refused() {
    let huge = format!(
        "GET / HTTP/1.1\r\nHost: a.com\r\nX: {}\r\n\r\n",
        "x".repeat(40_000)
    );
    check(&huge, 431, &[]).await;
    let many = format!(
        "GET / HTTP/1.1\r\nHost: a.com\r\n{}\r\n",
        "X: 1\r\n".repeat(200)
    );
    check(&many, 431, &[]).await;
}

#[tokio::test]
async fn methods_that_reach_past_a_route_are_refused() {
    check("CONNECT a.com:80 HTTP/1.1\r\nHost: a.com\r\n\r\n", 405, &[]).await;
    check("TRACE / HTTP/1.1\r\nHost: a.com\r\n\r\n", 405, &[]).await;
}

#[tokio::test]
async fn options_asterisk_is_answered_by_the_gateway() {
    check(
        "OPTIONS * HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n",
        200,
        &[],
    )
    .await;
}

#[tokio::test]
async fn an_expectation_nobody_knows_is_refused() {
    check(
        "GET / HTTP/1.1\r\nHost: a.com\r\nExpect: 200-ok\r\n\r\n",
        417,
        &[],
    )
    .await;
}

#[tokio::test]
async fn broken_syntax_is_refused() {
    for bytes in [
        "GET / HTTP/1.1\r\nHost: a.com\r\nX: a\r\n folded\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.com\r\nX: a\0b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.com\r\nno colon\r\n\r\n",
        "GET / HTTP/2.0\r\nHost: a.com\r\n\r\n",
        "GET / HTTP/1.2\r\nHost: a.com\r\n\r\n",
        "G@T / HTTP/1.1\r\nHost: a.com\r\n\r\n",
        "\u{16}\u{3}\u{1}\u{2}\0",
    ] {
        check(bytes, 400, &[]).await;
    }
}

#[tokio::test]
async fn h2c_is_not_tunnelled() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    client
        .write_all(
            b"GET / HTTP/1.1\r\nHost: a.com\r\nConnection: Upgrade, HTTP2-Settings\r\n\
              Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n",
        )
        .await
        .unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    let head = read_until(&mut stream, "\r\n\r\n").await;
    for name in ["upgrade", "http2-settings", "connection"] {
        assert!(!head.contains(&format!("\r\n{name}:")), "{head}");
    }
    stream
        .write_all(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        )
        .await
        .unwrap();
    let response = read_until(&mut client, "request.\n").await;
    assert_status(&response, 502);
    assert!(response.contains("endpoint_failure (unexpected upgrade)"));
}

#[tokio::test]
async fn a_refused_client_that_still_sends_reads_its_answer() {
    let a = TestBackend::named("a").await;
    let gateway = Gateway::to([a.address]);
    let mut stream = gateway.connect().await;
    let head = "POST / HTTP/1.1\r\nHost: a,b\r\nContent-Length: 50000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&[b'x'; 50_000]).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_status(&read_to_end(&mut stream).await, 400);
}

/// What a backend sees of a request, up to `end`.
async fn seen_of(request: &str, end: &str) -> String {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    client.write_all(request.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, end).await
}

#[tokio::test]
async fn a_backend_sees_what_was_taken_in_one_plain_form() {
    let seen = seen_of("\r\nGET / HTTP/1.1\nHost: a.com\nX: y\n\n", "\r\n\r\n").await;
    assert!(seen.starts_with("GET / HTTP/1.1\r\n"), "{seen}");
    assert!(seen.contains("x: y\r\n"), "{seen}");
    assert_eq!(seen.matches('\n').count(), seen.matches("\r\n").count());

    let request = "POST / HTTP/1.1\r\nHost: a.com\r\nTransfer-Encoding: Chunked\r\n\r\n\
                   5;a=b\r\nhello\r\n0\r\nContent-Length: 9\r\nHost: b.com\r\nTransfer-Encoding: x\r\n\r\n";
    let seen = seen_of(request, "0\r\n\r\n").await;
    let (head, body) = seen.split_once("\r\n\r\n").unwrap();
    assert_eq!(body, "5\r\nhello\r\n0\r\n\r\n");
    assert!(head.contains("\r\ntransfer-encoding: chunked"), "{head}");
    assert!(!head.contains("content-length"), "{head}");
}

#[tokio::test]
async fn a_client_cannot_give_or_take_what_others_rely_on() {
    let request = "GET / HTTP/1.1\r\nHost: a.com\r\nContent_Length: 5\r\nX_Forwarded_For: 1.2.3.4\r\n\
                   X-Forwarded-For: 1.2.3.4\r\nKeep-Alive: 1\r\nProxy-Connection: close\r\nTE: gzip\r\n\
                   Connection: close, Authorization, X-Forwarded-For, X-Own\r\n\
                   Authorization: secret\r\nX-Own: y\r\n\r\n";
    let seen = seen_of(request, "\r\n\r\n").await;
    for kept in [
        "authorization: secret\r\n",
        "x-forwarded-for: 127.0.0.1\r\n",
    ] {
        assert!(seen.contains(kept), "{seen}");
    }
    for gone in [
        "_",
        "1.2.3.4",
        "keep-alive",
        "proxy-",
        "\r\nte:",
        "x-own",
        "close",
    ] {
        assert!(!seen.contains(gone), "{gone}: {seen}");
    }
}
