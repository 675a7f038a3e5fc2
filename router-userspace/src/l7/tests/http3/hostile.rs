//! Requests that are none, limits, and bytes that the h3 library would take.

use h3_quinn::quinn::{ConnectionError, SendStream, VarInt};

use super::*;
use crate::config::ClientAuth;

/// A stream of a client that writes frames itself, on a connection without h3.
async fn raw(site: &Site) -> (Endpoint, Connection) {
    let (endpoint, quic) = quic(site.address(), &site.certificate).await.unwrap();
    // A control stream with empty SETTINGS.
    let mut control = quic.open_uni().await.unwrap();
    control.write_all(&[0, 4, 0]).await.unwrap();
    std::mem::forget(control);
    (endpoint, quic)
}

/// HEADERS of `POST https://a.com/`, by QPACK's static table (RFC 9204, appendix A).
fn post_head() -> Vec<u8> {
    let mut block = vec![0, 0, 0xc0 | 20, 0xc0 | 23, 0xc0 | 1, 0x50, 5];
    block.extend(b"a.com");
    let mut frame = vec![1, u8::try_from(block.len()).unwrap()];
    frame.extend(block);
    frame
}

async fn closed_with(quic: &Connection) -> u64 {
    match tokio::time::timeout(PATIENCE, quic.closed()).await.unwrap() {
        ConnectionError::ApplicationClosed(close) => close.error_code.into_inner(),
        other => panic!("{other}"),
    }
}

/// Answers 200 once it has had all of a body.
async fn counting() -> TestBackend {
    TestBackend::answering(|request| {
        let body = http_body_util::BodyStream::new(request.into_body());
        Response::new(BodyExt::boxed(StreamBody::new(body)))
    })
    .await
}

#[tokio::test]
async fn heads_that_are_no_requests_are_reset_and_counted() {
    let app = counting().await;
    let site = Site::to(app.address);
    let mut client = site.client().await;
    for (name, value) in [
        ("connection", "close"),
        ("transfer-encoding", "chunked"),
        ("te", "gzip"),
        ("content-length", "+1"),
        ("content-length", "1, 1"),
        ("upgrade", "websocket"),
    ] {
        let mut wanted = request(Method::POST, "/");
        wanted.headers_mut().insert(name, value.parse().unwrap());
        let error = client.exchange(wanted).await.err().unwrap();
        assert!(error.to_string().contains("H3_MESSAGE_ERROR"), "{error}");
    }
    let totals = site.gateway.metrics.totals();
    assert!(totals.errors.contains(&("unparsable", 6)), "{totals:?}");
    assert_eq!(app.seen(), [""; 0]);
}

#[tokio::test]
async fn heads_beyond_the_limits_are_431_414_or_the_end() {
    let site = Site::to(refusing().await);
    let (endpoint, quic) = quic(site.address(), &site.certificate).await.unwrap();
    let transport = h3_quinn::Connection::new(quic.clone());
    // Without its driver it never learns what the gateway takes.
    let (_driver, h3) = h3::client::new(transport).await.unwrap();
    let mut client = Client { endpoint, quic, h3 };
    let mut large = get("/");
    let value = "x".repeat(40_000);
    large.headers_mut().insert("x", value.parse().unwrap());
    assert_eq!(client.exchange(large).await.unwrap().status, 431);
    let mut many = get("/");
    for at in 0..101 {
        let name: http::HeaderName = format!("x-{at}").parse().unwrap();
        many.headers_mut().insert(name, "1".parse().unwrap());
    }
    assert_eq!(client.exchange(many).await.unwrap().status, 431);
    let long = format!("/{}", "x".repeat(20_000));
    assert_eq!(client.get(&long).await.status, 414);

    let mut endless = get("/");
    let value = "x".repeat(400_000);
    endless.headers_mut().insert("x", value.parse().unwrap());
    assert!(client.exchange(endless).await.is_err());
    let excessive = h3::error::Code::H3_EXCESSIVE_LOAD.value();
    assert_eq!(closed_with(&client.quic).await, excessive);
    site.gateway.totals(|totals| totals.http3_errors == 1).await;
}

#[tokio::test]
async fn bodies_must_be_as_long_as_announced_and_no_longer_than_allowed() {
    let app = counting().await;
    let site = Site::with(
        snapshot([("a.com", pool([backend(app.address)]))]),
        |config| config.limits.request_body_bytes = 100,
    );
    let mut client = site.client().await;
    for (announced, sent) in [("5", 4), ("5", 6), ("0", 1)] {
        let mut wanted = request(Method::POST, "/");
        let headers = wanted.headers_mut();
        headers.insert("content-length", announced.parse().unwrap());
        let mut stream = client.send(wanted).await;
        let _ = stream.send_data(Bytes::from(vec![b'x'; sent])).await;
        let _ = stream.finish().await;
        let got = answer(&mut stream).await;
        assert!(
            got.is_err() || got.is_ok_and(|got| got.status >= 400),
            "{announced} {sent}"
        );
    }
    let mut stream = client.send(request(Method::POST, "/")).await;
    let _ = stream.send_data(Bytes::from(vec![b'x'; 101])).await;
    let _ = stream.finish().await;
    let got = answer(&mut stream).await;
    assert!(got.is_err() || got.is_ok_and(|got| got.status == 413));
    let mut wanted = request(Method::POST, "/");
    let headers = wanted.headers_mut();
    headers.insert("content-length", "101".parse().unwrap());
    let mut stream = client.send(wanted).await;
    assert_eq!(answer(&mut stream).await.unwrap().status, 413);
    // Its stream alone was refused.
    assert_eq!(client.get("/").await.status, 200);
}

#[tokio::test]
async fn a_body_that_ends_within_a_frame_is_broken_off() {
    let app = counting().await;
    let site = Site::to(app.address);
    let (_endpoint, quic) = raw(&site).await;
    let (mut send, mut receive) = quic.open_bi().await.unwrap();
    send.write_all(&post_head()).await.unwrap();
    send.write_all(&[0, 10, b'x']).await.unwrap();
    poll_until(|| (site.gateway.metrics.totals().requests_in_flight == 1).then_some(())).await;
    send.finish().unwrap();
    let response = tokio::time::timeout(PATIENCE, receive.read_to_end(1 << 20)).await;
    // The gateway may have answered for it, or the backend begun to give the body back.
    assert!(!response.unwrap().is_ok_and(|it| it.ends_with(b"x")));
    // Nothing panicked, and the connection goes on.
    let (mut send, mut receive) = quic.open_bi().await.unwrap();
    send.write_all(&post_head()).await.unwrap();
    send.finish().unwrap();
    let response = receive.read_to_end(1 << 20).await.unwrap();
    assert_eq!(response[0], 1);
}

#[tokio::test]
async fn no_bytes_stop_the_gateway() {
    use rand::{Rng, SeedableRng};

    let app = counting().await;
    let site = Site::to(app.address);
    let mut rng = rand::rngs::SmallRng::seed_from_u64(7);
    for _ in 0..40 {
        let (_endpoint, quic) = raw(&site).await;
        for _ in 0..20 {
            let Ok((mut send, _receive)) = quic.open_bi().await else {
                break;
            };
            let mut bytes = match rng.random() {
                true => post_head(),
                false => Vec::new(),
            };
            bytes.extend((0..rng.random_range(0..64)).map(|_| rng.random::<u8>() & 0x4f));
            if send.write_all(&bytes).await.is_err() {
                break;
            }
            let _ = send.finish();
        }
        quic.close(VarInt::from_u32(0x100), b"");
    }
    assert_eq!(site.client().await.get("/").await.status, 200);
    let totals = site
        .gateway
        .totals(|totals| totals.connections_open == 1)
        .await;
    assert_eq!(totals.requests_in_flight, 0);
}

#[tokio::test]
async fn frames_that_bring_no_work_end_the_connection() {
    let app = counting().await;
    let site = Site::to(app.address);
    let (_endpoint, quic) = raw(&site).await;
    let (mut send, _receive) = quic.open_bi().await.unwrap();
    send.write_all(&post_head()).await.unwrap();
    let flood = async { while send.write_all(&[0, 0, 0x21, 0]).await.is_ok() {} };
    tokio::time::timeout(PATIENCE, flood).await.unwrap();
    let excessive = h3::error::Code::H3_EXCESSIVE_LOAD.value();
    assert_eq!(closed_with(&quic).await, excessive);
    let totals = site.gateway.metrics.totals();
    assert!(totals.cutoffs.contains(&("unknown_frame_flood", 1)));
}

#[tokio::test]
async fn requests_taken_back_at_once_end_the_connection() {
    let (_listener, address) = scripted().await;
    let site = Site::to(address);
    let (_endpoint, quic) = raw(&site).await;
    let flood = async {
        while let Ok((mut send, _receive)) = quic.open_bi().await {
            if send.write_all(&post_head()).await.is_err() {
                return;
            }
            reset_when_seen(&site, send).await;
        }
    };
    tokio::time::timeout(PATIENCE, flood).await.unwrap();
    let totals = site.gateway.metrics.totals();
    assert!(totals.cutoffs.contains(&("reset_flood", 1)), "{totals:?}");
}

async fn reset_when_seen(site: &Site, mut send: SendStream) {
    let metrics = &site.gateway.metrics;
    let seen = async {
        while metrics.totals().requests_in_flight == 0 && metrics.totals().connections_open > 0 {
            tokio::task::yield_now().await;
        }
    };
    seen.await;
    let _ = send.reset(VarInt::from_u32(0x10c));
}

#[tokio::test]
async fn a_connection_has_as_many_requests_at_once_and_in_all_as_it_may() {
    let app = counting().await;
    let site = Site::with(
        snapshot([("a.com", pool([backend(app.address)]))]),
        |config| {
            config.limits.concurrent_streams = 2;
            config.limits.requests_per_connection = 3;
        },
    );
    let mut client = site.client().await;
    let one = client.send(request(Method::POST, "/")).await;
    let two = client.send(request(Method::POST, "/")).await;
    let mut sender = client.h3.clone();
    let mut third = Box::pin(sender.send_request(get("/")));
    assert!(futures_util::poll!(third.as_mut()).is_pending());
    for mut stream in [one, two] {
        stream.finish().await.unwrap();
        assert_eq!(answer(&mut stream).await.unwrap().status, 200);
    }
    let mut third = third.await.unwrap();
    third.finish().await.unwrap();
    assert_eq!(answer(&mut third).await.unwrap().status, 200);
    let no_error = h3::error::Code::H3_NO_ERROR.value();
    assert_eq!(closed_with(&client.quic).await, no_error);
    let totals = site.gateway.metrics.totals();
    assert!(totals.cutoffs.contains(&("requests_per_connection", 1)));
}

#[tokio::test]
async fn a_client_has_as_many_connections_as_it_may() {
    let app = counting().await;
    let site = Site::with(
        snapshot([("a.com", pool([backend(app.address)]))]),
        |config| config.limits.connections_per_client = 1,
    );
    let mut one = site.client().await;
    assert_eq!(one.get("/").await.status, 200);
    let (_endpoint, other) = quic(site.address(), &site.certificate).await.unwrap();
    let excessive = h3::error::Code::H3_EXCESSIVE_LOAD.value();
    assert_eq!(closed_with(&other).await, excessive);
    assert_eq!(one.get("/").await.status, 200);
}

#[tokio::test]
async fn clients_without_the_certificate_or_the_name_they_need_are_counted() {
    let strict = Site::with(Snapshot::default(), |config| {
        config.tls.strict_sni = true;
        let files = &mut config.tls.certificates[0];
        let made = rcgen::generate_simple_self_signed(["b.com".to_owned()]).unwrap();
        std::fs::write(&files.certificate_file, made.cert.pem()).unwrap();
        std::fs::write(&files.key_file, made.signing_key.serialize_pem()).unwrap();
    });
    let closed = Site::with(Snapshot::default(), |config| {
        config.tls.client_auth = ClientAuth::Require;
        let ca = &config.tls.certificates[0].certificate_file;
        config.tls.client_ca_file = Some(ca.clone());
    });
    for (site, reason) in [
        (strict, "tls_unknown_name"),
        (closed, "tls_client_certificate_missing"),
    ] {
        // With TLS 1.3 a client may learn of it after its own end of the handshake.
        let _ = quic(site.address(), &site.certificate).await;
        let counted = |totals: &L7Totals| totals.handshake_failures.contains(&(reason, 1));
        let totals = site.gateway.totals(counted).await;
        assert_eq!(totals.http3_connections, 0);
    }
}

#[tokio::test]
async fn time_outs_are_those_of_the_other_versions() {
    let app = counting().await;
    let site = Site::with(
        snapshot([("a.com", pool([backend(app.address)]))]),
        |config| {
            config.timeouts.request_headers = Duration::from_millis(50);
            config.timeouts.body_idle = Duration::from_millis(50);
            config.timeouts.idle = Duration::from_millis(200);
        },
    );
    let (_endpoint, quic) = raw(&site).await;
    // A head that does not end.
    let (mut send, mut receive) = quic.open_bi().await.unwrap();
    send.write_all(&post_head()[..5]).await.unwrap();
    let reset = tokio::time::timeout(PATIENCE, receive.read_to_end(1)).await;
    assert!(reset.unwrap().is_err());
    // A body that does not.
    let mut client = site.client().await;
    let mut wanted = request(Method::POST, "/");
    wanted
        .headers_mut()
        .insert("content-length", "5".parse().unwrap());
    let mut stream = client.send(wanted).await;
    let slow = answer(&mut stream).await;
    assert!(slow.is_err() || slow.is_ok_and(|slow| slow.status == 408));
    // No requests.
    let no_error = h3::error::Code::H3_NO_ERROR.value();
    assert_eq!(closed_with(&client.quic).await, no_error);
}
