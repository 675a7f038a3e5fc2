//! Attacks as bytes: on connections of HTTP/2, each with the connection's end and a gateway that serves on;
//! and backends that answer what no client should see.

use super::*;
use crate::config::{HttpLimits, HttpTimeouts};
use crate::l7::clients::Cutoff;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// RFC 9113 §4.1.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = len[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// `GET http://a.com/` or `POST`, by the static table (RFC 7541 appendix A).
fn head(method: u8) -> Vec<u8> {
    let mut head = vec![0x80 | method, 0x86, 0x84, 0x41, 5];
    head.extend(b"a.com");
    head
}

const GET: u8 = 2;
const POST: u8 = 3;

fn get(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &head(GET))
}

fn begin(settings: &[u8]) -> Vec<u8> {
    [PREFACE, &frame(SETTINGS, 0, 0, settings)].concat()
}

/// What the gateway sends until the connection ends: kinds of frames, with their streams and payloads.
async fn attack(gateway: &Gateway, bytes: Vec<u8>) -> Vec<(u8, u32, Vec<u8>)> {
    let (mut read, mut write) = gateway.connect().await.into_split();
    let writing = tokio::spawn(async move {
        // The gateway may close before it has read all of it.
        let _ = write.write_all(&bytes).await;
        write
    });
    let mut received = Vec::new();
    let mut buffer = vec![0; 16 * 1024];
    let reading = async {
        while let Ok(len) = read.read(&mut buffer).await
            && len > 0
        {
            received.extend_from_slice(&buffer[..len]);
        }
    };
    tokio::time::timeout(PATIENCE, reading)
        .await
        .expect("the connection ends");
    writing.abort();
    frames(&received)
}

fn frames(mut bytes: &[u8]) -> Vec<(u8, u32, Vec<u8>)> {
    let mut frames = Vec::new();
    while let [a, b, c, kind, _, s, t, u, v, rest @ ..] = bytes {
        let len = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        let Some(payload) = rest.get(..len) else {
            break;
        };
        let stream = u32::from_be_bytes([*s, *t, *u, *v]);
        frames.push((*kind, stream, payload.to_vec()));
        bytes = &rest[len..];
    }
    frames
}

/// The connection of an attack ends, nothing of it is left, and others are served.
async fn is_ended(name: &str, attack_frames: impl IntoIterator<Item = Vec<u8>>) -> L7Totals {
    let a = TestBackend::named("a").await;
    let gateway = Gateway::to([a.address]);
    let mut bytes = begin(&[]);
    bytes.extend(attack_frames.into_iter().flatten());
    attack(&gateway, bytes).await;
    let totals = gateway
        .totals(|totals| totals.connections_open == 0 && totals.requests_in_flight == 0)
        .await;
    assert_eq!(totals.http2_errors, 1, "{name}");
    assert_status(&gateway.get("a.com").await, 200);
    totals
}

fn streams(count: u32) -> impl Iterator<Item = u32> {
    (0..count).map(|number| 2 * number + 1)
}

#[tokio::test]
async fn attacks_that_h2_knows_end_their_connection() {
    let cancel = 8_u32.to_be_bytes();
    let rapid_reset = streams(2000).flat_map(|it| [get(it), frame(RST_STREAM, 0, it, &cancel)]);
    is_ended("rapid reset (CVE-2023-44487)", rapid_reset).await;

    let mut first = vec![frame(HEADERS, END_STREAM, 1, &head(GET))];
    first.extend(vec![frame(CONTINUATION, 0, 1, &[0; 0]); 5000]);
    is_ended("empty CONTINUATION (CVE-2024-27316)", first).await;

    let field = [b"\x00\x01a\x7f\x81\x07".to_vec(), vec![b'x'; 262]].concat();
    let mut first = vec![frame(HEADERS, END_STREAM, 1, &head(GET))];
    first.extend(vec![frame(CONTINUATION, 0, 1, &field.repeat(20)); 500]);
    is_ended("long CONTINUATION", first).await;

    // One long field into the table, and then a byte for each time it is repeated.
    let insert = [b"\x40\x01a\x7f\x81\x17".to_vec(), vec![b'x'; 3072 + 128]].concat();
    let bomb = [head(GET), insert, vec![0xbe; 10_000]].concat();
    let bombs = streams(50).map(|it| frame(HEADERS, END_HEADERS | END_STREAM, it, &bomb));
    is_ended("HPACK bomb", bombs).await;

    let made_you_reset = streams(1000).flat_map(|it| {
        let open = frame(HEADERS, END_HEADERS, it, &head(POST));
        [open, frame(WINDOW_UPDATE, 0, it, &[0; 4])]
    });
    is_ended("MadeYouReset (CVE-2025-8671)", made_you_reset).await;

    let mut empty_data = vec![frame(HEADERS, END_HEADERS, 1, &head(POST))];
    empty_data.extend(vec![frame(DATA, 0, 1, &[]); 20_000]);
    is_ended("empty DATA", empty_data).await;
}

#[tokio::test]
async fn floods_of_control_frames_end_their_connection_and_are_counted() {
    for (cutoff, flood) in [
        (Cutoff::Pings, frame(PING, 0, 0, &[7; 8])),
        (Cutoff::Settings, frame(SETTINGS, 0, 0, &[])),
        (Cutoff::Priorities, frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 9])),
        (
            Cutoff::WindowUpdates,
            frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]),
        ),
        (Cutoff::UnknownFrames, frame(0xbe, 0, 0, b"grease")),
    ] {
        let name = format!("{cutoff:?}");
        let totals = is_ended(&name, vec![flood; 20_000]).await;
        assert_eq!(totals.cutoffs[cutoff as usize].1, 1, "{name}");
    }
}

#[tokio::test]
async fn a_client_that_cancels_all_its_requests_slowly_is_ended() {
    let (_listener, address) = scripted().await;
    let config = HttpConfig {
        limits: HttpLimits {
            control_frames: 20,
            ..HttpLimits::default()
        },
        ..config()
    };
    let gateway = Gateway::with_config(snapshot([("a.com", pool([backend(address)]))]), config);
    let mut stream = gateway.connect().await;
    stream.write_all(&begin(&[])).await.unwrap();
    gateway.totals(|totals| totals.http2_connections == 1).await;
    for number in streams(50) {
        let reset = frame(RST_STREAM, 0, number, &8_u32.to_be_bytes());
        if stream.write_all(&get(number)).await.is_err() {
            break;
        }
        let in_flight = gateway
            .totals(|totals| totals.requests_in_flight == 1 || totals.connections_open == 0)
            .await;
        if in_flight.connections_open == 0 || stream.write_all(&reset).await.is_err() {
            break;
        }
        gateway
            .totals(|totals| totals.requests_in_flight == 0)
            .await;
    }
    let totals = gateway.totals(|totals| totals.connections_open == 0).await;
    assert_eq!(totals.cutoffs[Cutoff::Resets as usize].1, 1);
}

#[tokio::test]
async fn a_stream_whose_response_is_not_taken_is_reset() {
    let a = TestBackend::named("a").await;
    let config = HttpConfig {
        timeouts: HttpTimeouts {
            body_idle: Duration::from_millis(50),
            idle: Duration::from_millis(200),
            ..HttpTimeouts::default()
        },
        ..config()
    };
    let gateway = Gateway::with_config(snapshot([("a.com", pool([backend(a.address)]))]), config);
    // SETTINGS_INITIAL_WINDOW_SIZE 0 (RFC 9113 §6.5.2).
    let mut bytes = begin(&[0, 4, 0, 0, 0, 0]);
    bytes.extend(streams(100).flat_map(get));
    let frames = attack(&gateway, bytes).await;
    let count = |kind: u8| frames.iter().filter(|frame| frame.0 == kind).count();
    assert_eq!((count(HEADERS), count(DATA)), (100, 0));
    assert_eq!(count(RST_STREAM), 100);
    assert_eq!(count(GOAWAY).min(1), 1);
}

/// What a client gets of a backend that answers with these bytes and then closes, and how many
/// connections the backend has seen after another request.
async fn answered_with(bytes: impl AsRef<[u8]>) -> (String, String) {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let bytes = bytes.as_ref().to_vec();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            read_until(&mut stream, "\r\n\r\n").await;
            let _ = stream.write_all(&bytes).await;
            // Whatever else comes on this connection is not answered.
            tokio::spawn(async move {
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
            });
        }
    });
    (gateway.get("a.com").await, gateway.get("a.com").await)
}

#[tokio::test]
async fn a_response_that_is_framed_twice_or_strangely_is_no_response() {
    for lines in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: gzip\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: +5\r\n",
    ] {
        let bytes = format!("HTTP/1.1 200 OK\r\n{lines}\r\n0\r\n\r\n");
        let (first, second) = answered_with(&bytes).await;
        assert_status(&first, 502);
        assert_status(&second, 502);
    }
}

#[tokio::test]
async fn a_response_cannot_be_split_or_be_endless() {
    for head in [
        "HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b=c\r\n\r\n".to_owned(),
        "HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n".to_owned(),
        "HTTP/1.1 200 OK\r\nno colon\r\n\r\n".to_owned(),
        format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(100_000)),
        format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: 1\r\n".repeat(10_000)),
        "SSH-2.0-OpenSSH\r\n".to_owned(),
    ] {
        let (first, _) = answered_with(&head).await;
        assert_status(&first, 502);
        assert!(!first.contains("set-cookie"), "{first}");
    }
}

#[tokio::test]
async fn what_a_backend_sends_behind_its_response_reaches_nobody() {
    let bytes = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi\
                 HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison";
    let (first, second) = answered_with(bytes).await;
    for response in [first, second] {
        assert_status(&response, 200);
        assert!(response.ends_with("\r\n\r\nhi"), "{response}");
    }
}
