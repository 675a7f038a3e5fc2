//! Certificates, addresses, reload, drain and a process that takes over.

use super::*;

#[tokio::test]
async fn a_changed_certificate_is_for_new_connections_and_open_ones_go_on() {
    let app = TestBackend::named("hello").await;
    let mut site = Site::to(app.address);
    let mut before = site.client().await;
    assert_eq!(before.get("/").await.text(), "hello");
    let former = std::mem::replace(&mut site.certificate, write_certificate(site.files.path()));
    site.gateway.proxy.reload(&site.config).unwrap();
    assert_eq!(site.client().await.get("/").await.text(), "hello");
    assert!(Client::connect(site.address(), &former).await.is_err());
    assert_eq!(before.get("/").await.text(), "hello");
}

#[tokio::test]
async fn a_client_may_change_its_address_whichever_worker_gets_its_packets() {
    let app = TestBackend::named("hello").await;
    let site = Site::with(
        snapshot([("a.com", pool([backend(app.address)]))]),
        |config| config.workers = 4,
    );
    let mut client = site.client().await;
    // Four workers leave all sixteen to one of them once in 10^9 times.
    for _ in 0..16 {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        client.endpoint.rebind(socket).unwrap();
        assert_eq!(client.get("/").await.text(), "hello");
    }
    let totals = site.gateway.metrics.totals();
    assert_eq!((totals.http3_connections, totals.http3_errors), (1, 0));
}

#[tokio::test]
async fn every_client_may_be_asked_to_prove_its_address() {
    let app = TestBackend::named("hello").await;
    let site = Site::with(
        snapshot([("a.com", pool([backend(app.address)]))]),
        |config| {
            config.tls.http3_retry = true;
            config.workers = 2;
        },
    );
    for _ in 0..4 {
        assert_eq!(site.client().await.get("/").await.text(), "hello");
    }
    let totals = site.gateway.metrics.totals();
    assert_eq!((totals.http3_retries, totals.connections_accepted), (4, 4));
}

#[tokio::test]
async fn draining_lets_requests_end_and_tells_idle_clients() {
    let (listener, address) = scripted().await;
    let site = Site::to(address);
    let (target, certificate) = (site.address(), site.certificate.clone());
    let idle = site.client().await;
    let mut busy = site.client().await;
    let mut stream = busy.send(get("/")).await;
    stream.finish().await.unwrap();
    let (mut connection, _) = listener.accept().await.unwrap();
    read_until(&mut connection, "\r\n\r\n").await;
    let drained = tokio::spawn(site.gateway.proxy.drain(PATIENCE));
    let ended = tokio::time::timeout(PATIENCE, idle.quic.closed())
        .await
        .unwrap();
    assert_no_error(&ended);
    let refused = Client::connect(target, &certificate).await;
    assert!(refused.is_err_and(|error| error.to_string().contains("refused")));
    let rest = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    connection.write_all(rest).await.unwrap();
    assert_eq!(answer(&mut stream).await.unwrap().text(), "ok");
    let ended = tokio::time::timeout(PATIENCE, busy.quic.closed())
        .await
        .unwrap();
    assert_no_error(&ended);
    tokio::time::timeout(PATIENCE, drained)
        .await
        .unwrap()
        .unwrap();
}

fn assert_no_error(ended: &h3_quinn::quinn::ConnectionError) {
    use h3_quinn::quinn::ConnectionError::ApplicationClosed;
    let code = h3::error::Code::H3_NO_ERROR.value();
    assert!(
        matches!(ended, ApplicationClosed(close) if close.error_code.into_inner() == code),
        "{ended}"
    );
}

#[tokio::test]
async fn draining_tells_clients_at_the_deadline_that_they_are_cut() {
    let (listener, address) = scripted().await;
    let site = Site::to(address);
    let mut client = site.client().await;
    let mut stream = client.send(get("/")).await;
    stream.finish().await.unwrap();
    let (_held, _) = listener.accept().await.unwrap();
    site.gateway.proxy.drain(Duration::from_millis(20)).await;
    let closed = tokio::time::timeout(PATIENCE, client.quic.closed());
    assert!(closed.await.is_ok());
}

#[tokio::test]
async fn a_reload_begins_and_ends_it() {
    let app = TestBackend::named("hello").await;
    let mut site = Site::to(app.address);
    let mut before = site.client().await;
    site.config.tls.http3 = false;
    site.gateway.proxy.reload(&site.config).unwrap();
    let refused = async {
        while let Ok(client) = Client::connect(site.address(), &site.certificate).await {
            drop(client);
        }
    };
    tokio::time::timeout(PATIENCE, refused).await.unwrap();
    // Whoever is there is served on.
    assert_eq!(before.get("/").await.text(), "hello");
    drop(before);
    site.config.tls.http3 = true;
    site.gateway.proxy.reload(&site.config).unwrap();
    let connected = async {
        loop {
            if let Ok(client) = Client::connect(site.address(), &site.certificate).await {
                return client;
            }
        }
    };
    let mut client = tokio::time::timeout(PATIENCE, connected).await.unwrap();
    assert_eq!(client.get("/").await.text(), "hello");
}

#[tokio::test]
async fn a_process_that_takes_over_begins_when_the_old_one_has_ended() {
    let app = TestBackend::named("hello").await;
    let site = Site::to(app.address);
    let mut wanted = site.config.clone();
    wanted.tls.listen = vec![site.address()];
    let before = site.client().await;
    let sockets = site.gateway.proxy.sockets().unwrap();
    let published = Arc::clone(&site.gateway.published);
    let successor = stand_by(&wanted, published, Arc::default(), sockets).unwrap();
    successor.serve().unwrap();
    let retired = tokio::spawn(site.gateway.proxy.retire(PATIENCE));
    let ended = tokio::time::timeout(PATIENCE, before.quic.closed())
        .await
        .unwrap();
    assert_no_error(&ended);
    tokio::time::timeout(PATIENCE, retired)
        .await
        .unwrap()
        .unwrap();
    let address = successor.local_addresses()[0];
    let connected = async {
        loop {
            if let Ok(client) = Client::connect(address, &site.certificate).await {
                return client;
            }
        }
    };
    let mut client = tokio::time::timeout(PATIENCE, connected).await.unwrap();
    assert_eq!(client.get("/").await.text(), "hello");
}

#[tokio::test]
async fn a_busy_port_is_an_error_that_names_it() {
    let site = Site::to(refusing().await);
    let other = HttpConfig {
        tls: HttpTlsConfig {
            listen: vec![site.address()],
            ..site.config.tls.clone()
        },
        ..site.config.clone()
    };
    // TCP is free, UDP is not.
    site.gateway.proxy.listening().clear();
    let error = poll_until(|| {
        start(&other, Published::default(), Arc::default())
            .err()
            .filter(|error| {
                !format!("{error:#}").starts_with(&format!("listen on {}: ", site.address()))
            })
    })
    .await;
    let wanted = format!("listen on {}, UDP: ", site.address());
    assert!(format!("{error:#}").starts_with(&wanted), "{error:#}");
}
