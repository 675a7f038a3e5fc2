//! Bodies pass through whole, in both directions at once, and bounded.

use std::hash::Hasher;

use super::*;

/// `len` bytes that differ from place to place.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// Sends back the body it gets, as it comes.
async fn echo() -> TestBackend {
    TestBackend::answering(|request| Response::new(request.into_body().boxed())).await
}

#[tokio::test]
async fn megabytes_with_a_length_come_back_whole() {
    let gateway = Gateway::to([echo().await.address]);
    let body = pattern(8 << 20);
    let (mut read, mut write) = gateway.connect().await.into_split();
    let sent = async {
        let head = format!(
            "POST / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        write.write_all(head.as_bytes()).await.unwrap();
        write.write_all(&body).await.unwrap();
    };
    let received = async {
        let mut received = Vec::new();
        read.read_to_end(&mut received).await.unwrap();
        received
    };
    let both = async { tokio::join!(sent, received).1 };
    let received = tokio::time::timeout(PATIENCE, both).await.unwrap();
    let head_end = received
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .unwrap()
        + 4;
    assert_eq!(received.len() - head_end, body.len());
    assert_eq!(checksum(&received[head_end..]), checksum(&body));
}

#[tokio::test]
async fn chunks_come_back_whole_and_the_connections_are_reused() {
    let backend = echo().await;
    let gateway = Gateway::to([backend.address]);
    let mut client = gateway.connect().await;
    for _ in 0..3 {
        let request = "POST / HTTP/1.1\r\nHost: a.com\r\nTransfer-Encoding: chunked\r\n\r\n\
                       5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n";
        client.write_all(request.as_bytes()).await.unwrap();
        let response = read_until(&mut client, "0\r\n\r\n").await;
        assert!(
            response.contains("transfer-encoding: chunked\r\n"),
            "{response}"
        );
        let text: String = response
            .split("\r\n")
            .filter(|it| it.starts_with(['h', ' ']))
            .collect();
        assert!(text.ends_with("hello world"), "{response}");
    }
    assert_eq!(backend.connections(), 1);
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_backend() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n")
        .await
        .unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await
        .unwrap();
    let chunk = [b"10000\r\n".as_slice(), &vec![b'x'; 0x10000], b"\r\n"].concat();
    // The sockets' buffers take some of it, the gateway little; then writing must block.
    let still = Duration::from_millis(250);
    let mut chunks = 0;
    while let Ok(written) = tokio::time::timeout(still, stream.write_all(&chunk)).await {
        written.unwrap();
        chunks += 1;
        assert!(chunks < 4096, "256 MiB went somewhere");
    }
}

#[tokio::test]
async fn a_100_continue_comes_when_a_backend_has_been_found() {
    let gateway = Gateway::to([echo().await.address]);
    let mut client = gateway.connect().await;
    let head =
        "POST / HTTP/1.1\r\nHost: a.com\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n";
    client.write_all(head.as_bytes()).await.unwrap();
    assert_status(&read_until(&mut client, "\r\n\r\n").await, 100);
    client.write_all(b"hi").await.unwrap();
    assert_status(&read_until(&mut client, "hi").await, 200);

    let unknown = head.replace("a.com", "b.com");
    client.write_all(unknown.as_bytes()).await.unwrap();
    assert_status(&read_until(&mut client, "\r\n\r\n").await, 404);
}

#[tokio::test]
async fn a_head_response_has_the_length_and_no_body() {
    let a = TestBackend::named("twelve bytes").await;
    let gateway = Gateway::to([a.address]);
    let response = gateway
        .exchange("HEAD / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n")
        .await;
    assert!(response.contains("content-length: 12\r\n"), "{response}");
    assert!(response.ends_with("\r\n\r\n"), "{response}");
}

#[tokio::test]
async fn an_http_1_0_client_is_served_until_close() {
    let gateway = Gateway::to([TestBackend::named("a").await.address]);
    let response = gateway
        .exchange("GET / HTTP/1.0\r\nHost: a.com\r\n\r\n")
        .await;
    assert!(response.starts_with("HTTP/1.0 200 OK\r\n"), "{response}");
    assert!(response.ends_with("\r\n\r\na"));
}
