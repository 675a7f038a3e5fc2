//! Start, limits, reload and drain.

use super::*;

#[tokio::test]
async fn a_busy_port_is_an_error_that_names_it() {
    let gateway = Gateway::start(Snapshot::default());
    let busy = gateway.proxy.local_addresses()[0];
    let config = HttpConfig {
        listen: vec![busy],
        ..config()
    };
    let error = start(&config, Arc::clone(&gateway.published), Arc::default())
        .err()
        .unwrap();
    assert!(
        format!("{error:#}").starts_with(&format!("listen on {busy}: ")),
        "{error:#}"
    );
}

#[tokio::test]
async fn every_worker_answers() {
    let a = TestBackend::named("a").await;
    let config = HttpConfig {
        workers: 3,
        ..config()
    };
    let gateway = Gateway::with_config(snapshot([("a.com", pool([backend(a.address)]))]), config);
    for _ in 0..30 {
        assert_status(&gateway.get("a.com").await, 200);
    }
    let totals = gateway.totals(|totals| totals.connections_open == 0).await;
    assert_eq!((totals.connections_accepted, totals.responses[1]), (30, 30));
}

#[tokio::test]
async fn draining_ends_idle_connections_and_lets_requests_finish() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let address = gateway.proxy.local_addresses()[0];
    let mut idle = gateway.connect().await;
    let mut busy = gateway.connect().await;
    busy.write_all(b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n")
        .await
        .unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;

    let drained = tokio::spawn(gateway.proxy.drain(PATIENCE));
    assert_eq!(read_to_end(&mut idle).await, "");
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        .await
        .unwrap();
    let response = read_to_end(&mut busy).await;
    assert!(response.contains("connection: close\r\n"), "{response}");
    assert!(response.ends_with("ok"));
    drop((idle, busy));
    tokio::time::timeout(PATIENCE, drained)
        .await
        .unwrap()
        .unwrap();
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn draining_cuts_what_is_left_at_the_deadline() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut busy = gateway.connect().await;
    busy.write_all(b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n")
        .await
        .unwrap();
    let (_held, _) = listener.accept().await.unwrap();
    gateway.proxy.drain(Duration::from_millis(20)).await;
    assert_eq!(read_to_end(&mut busy).await, "");
}

#[tokio::test]
async fn connections_over_the_limit_wait_and_are_counted() {
    let a = TestBackend::named("a").await;
    let mut config = config();
    config.limits.connections = 1;
    let gateway = Gateway::with_config(snapshot([("a.com", pool([backend(a.address)]))]), config);
    let first = gateway.connect().await;
    gateway.totals(|totals| totals.connections_full == 1).await;
    let second = async {
        let response = gateway.get("a.com").await;
        assert_status(&response, 200);
    };
    let makes_room = async { drop(first) };
    tokio::join!(second, makes_room);
}

#[tokio::test]
async fn draining_serves_connections_that_waited_to_be_accepted() {
    let a = TestBackend::named("a").await;
    let mut config = config();
    config.limits.connections = 1;
    let gateway = Gateway::with_config(snapshot([("a.com", pool([backend(a.address)]))]), config);
    let mut first = gateway.connect().await;
    gateway.totals(|totals| totals.connections_full == 1).await;
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let mut client = gateway.connect().await;
        let request = b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n";
        client.write_all(request).await.unwrap();
        waiting.push(client);
    }
    let drained = tokio::spawn(gateway.proxy.drain(PATIENCE));
    assert_eq!(read_to_end(&mut first).await, "");
    drop(first);
    for mut client in waiting {
        let response = read_to_end(&mut client).await;
        assert_status(&response, 200);
        assert!(response.contains("connection: close\r\n"), "{response}");
    }
    tokio::time::timeout(PATIENCE, drained)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn a_reload_changes_settings_or_nothing() {
    let a = TestBackend::named("a").await;
    let gateway = Gateway::to([a.address]);
    let mut changed = config();
    changed.limits.uri_bytes = 4;
    gateway.proxy.reload(&changed).unwrap();
    let request = "GET /long HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n";
    assert_status(&gateway.exchange(request).await, 414);

    let refused = HttpConfig {
        workers: 2,
        ..config()
    };
    let error = gateway.proxy.reload(&refused).unwrap_err();
    assert_eq!(error.to_string(), "http.workers needs a restart to change");
    assert_status(&gateway.exchange(request).await, 414);
}

#[tokio::test]
async fn a_trusted_proxy_is_believed_after_a_reload() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let trusting = HttpConfig {
        trusted_proxies: vec!["127.0.0.0/8".parse().unwrap()],
        ..config()
    };
    gateway.proxy.reload(&trusting).unwrap();
    let mut client = gateway.connect().await;
    let request = b"GET / HTTP/1.1\r\nHost: a.com\r\nX-Forwarded-For: 192.0.2.7\r\n\r\n";
    client.write_all(request).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    let head = read_until(&mut stream, "\r\n\r\n").await;
    assert!(
        head.contains("x-forwarded-for: 192.0.2.7, 127.0.0.1\r\n"),
        "{head}"
    );
}

#[tokio::test]
async fn a_quiet_connection_gives_its_buffers_back_and_serves_on() {
    let backend = TestBackend::named("hello").await;
    let gateway = Gateway::to([backend.address]);
    let mut client = gateway.connect().await;
    for _ in 0..2 {
        gateway.totals(|totals| totals.connections_quiet == 1).await;
        client.write_all(b"GET / HT").await.unwrap();
        gateway.totals(|totals| totals.connections_quiet == 0).await;
        client
            .write_all(b"TP/1.1\r\nHost: a.com\r\n\r\n")
            .await
            .unwrap();
        read_until(&mut client, "hello").await;
    }
    gateway.totals(|totals| totals.connections_quiet == 1).await;
    drop(client);
    gateway
        .totals(|totals| totals.connections_open == 0 && totals.connections_quiet == 0)
        .await;
}

#[tokio::test]
async fn a_quiet_connection_is_closed_by_a_drain_and_by_its_timeout() {
    let mut config = config();
    config.timeouts.idle = Duration::from_secs(2);
    let gateway = Gateway::with_config(Snapshot::default(), config);
    let mut idle = gateway.connect().await;
    gateway.totals(|totals| totals.connections_quiet == 1).await;
    assert_eq!(read_to_end(&mut idle).await, "");
    gateway
        .totals(|totals| totals.connections_timed_out == 1)
        .await;

    let mut drained = gateway.connect().await;
    gateway.totals(|totals| totals.connections_quiet == 1).await;
    gateway.proxy.drain(PATIENCE).await;
    assert_eq!(read_to_end(&mut drained).await, "");
}

/// A response that the client does not read is not forgotten with the buffers of its connection.
#[tokio::test]
async fn a_connection_that_is_owed_bytes_is_not_quiet() {
    let body = "x".repeat(8 * 1024 * 1024);
    let backend = TestBackend::answering({
        let body = body.clone();
        move |_| Response::new(full(body.clone()))
    })
    .await;
    let gateway = Gateway::to([backend.address]);
    let mut slow = gateway.connect().await;
    let request = b"GET / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n";
    slow.write_all(request).await.unwrap();
    // Longer than connections need to become quiet, which one that came later shows.
    let _other = gateway.connect().await;
    gateway.totals(|totals| totals.connections_quiet == 1).await;
    let response = read_to_end(&mut slow).await;
    assert!(response.ends_with(&body));
}

#[tokio::test]
async fn a_reload_listens_elsewhere_and_serves_what_had_connected() {
    let a = TestBackend::named("a").await;
    let gateway = Gateway::to([a.address]);
    let before = gateway.proxy.local_addresses()[0];
    let mut kept = gateway.connect().await;
    let mut wanted = config();
    wanted.listen.push(SocketAddr::from(([127, 0, 0, 2], 0)));
    assert!(gateway.proxy.reload(&wanted).unwrap());
    assert!(!gateway.proxy.reload(&wanted).unwrap());
    let addresses = local_addresses(&gateway.proxy);
    assert_eq!(addresses[0], before);
    for address in &addresses {
        assert_status(&get(*address).await, 200);
    }

    wanted.listen.remove(0);
    assert!(gateway.proxy.reload(&wanted).unwrap());
    assert_eq!(local_addresses(&gateway.proxy), addresses[1..]);
    // The worker gives up the address on its own thread.
    while TcpStream::connect(before).await.is_ok() {
        tokio::task::yield_now().await;
    }
    kept.write_all(GET).await.unwrap();
    assert_status(&read_to_end(&mut kept).await, 200);
    assert_status(&get(addresses[1]).await, 200);
}

#[tokio::test]
async fn a_reload_to_an_address_that_is_taken_changes_nothing() {
    let a = TestBackend::named("a").await;
    let gateway = Gateway::to([a.address]);
    let mut wanted = config();
    wanted.listen = vec![a.address];
    wanted.limits.uri_bytes = 0;
    let error = gateway.proxy.reload(&wanted).unwrap_err();
    let name = format!("listen on {}: ", a.address);
    assert!(format!("{error:#}").starts_with(&name), "{error:#}");
    assert_status(&gateway.get("a.com").await, 200);
}

#[tokio::test]
async fn a_retiring_proxy_answers_one_more_request_of_idle_connections() {
    let a = TestBackend::named("a").await;
    let gateway = Gateway::to([a.address]);
    let request = b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n";
    let mut idle = gateway.connect().await;
    idle.write_all(request).await.unwrap();
    assert_status(&read_until(&mut idle, "\r\n\r\na").await, 200);
    let address = gateway.proxy.local_addresses()[0];
    let retired = tokio::spawn(gateway.proxy.retire(PATIENCE));
    while TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    idle.write_all(request).await.unwrap();
    let response = read_to_end(&mut idle).await;
    assert_status(&response, 200);
    assert!(response.contains("connection: close\r\n"), "{response}");
    drop(idle);
    tokio::time::timeout(PATIENCE, retired)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn no_connection_is_lost_between_proxies_with_other_numbers_of_workers() {
    let a = TestBackend::named("a").await;
    let routes = snapshot([("a.com", pool([backend(a.address)]))]);
    let mut gateway = Gateway::start(routes.clone());
    let address = gateway.proxy.local_addresses()[0];
    let (stop, stopped) = tokio::sync::watch::channel(());
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let stopped = stopped.clone();
            tokio::spawn(async move {
                let mut served = 0;
                while stopped.has_changed().is_ok() {
                    assert_status(&get(address).await, 200);
                    served += 1;
                }
                served
            })
        })
        .collect();
    for workers in [4, 2, 1, 3] {
        let wanted = HttpConfig {
            listen: vec![address],
            workers,
            ..config()
        };
        let published: Published = Arc::new(ArcSwap::from_pointee(routes.clone()));
        let metrics = Arc::new(L7Metrics::default());
        let sockets = gateway.proxy.sockets().unwrap();
        let proxy = stand_by(&wanted, published.clone(), metrics.clone(), sockets).unwrap();
        proxy.serve().unwrap();
        let successor = Gateway {
            proxy,
            published,
            metrics,
        };
        let before = std::mem::replace(&mut gateway, successor);
        before.proxy.retire(PATIENCE).await;
        gateway.totals(|totals| totals.responses[1] > 50).await;
    }
    drop(stop);
    for client in clients {
        assert!(client.await.unwrap() > 0);
    }
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n";

async fn get(address: SocketAddr) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(GET).await.unwrap();
    read_to_end(&mut stream).await
}

fn local_addresses(proxy: &Proxy) -> Vec<SocketAddr> {
    let listeners = proxy.listeners().unwrap();
    let addresses = listeners.iter().map(|it| it.local_addr().unwrap());
    addresses.collect()
}
