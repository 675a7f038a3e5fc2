//! Hashing, limits and ejection between real sockets.

use super::*;
use crate::route::policy::{HashKey, HashOf, HttpPolicy, RouteLimits};
use crate::route::{Balance, Registered};

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n";
const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

fn limited(change: impl FnOnce(&mut HttpConfig)) -> HttpConfig {
    let mut config = config();
    config.limits.requests_per_backend = 1;
    change(&mut config);
    config
}

fn one_route(addresses: impl IntoIterator<Item = SocketAddr>) -> Snapshot {
    snapshot([("a.com", pool(addresses.into_iter().map(backend)))])
}

#[tokio::test]
async fn a_header_leads_to_the_same_backend_each_time() {
    let backends = [
        TestBackend::named("one").await,
        TestBackend::named("two").await,
    ];
    let mut pool = pool(backends.iter().map(|it| backend(it.address)));
    let balance = Balance::Hash(Arc::new(HashKey {
        of: HashOf::Header("x-user".into()),
        balance_percent: Some(125),
    }));
    pool.registered = Registered {
        balance: Some(balance),
        ..Registered::default()
    }
    .shared();
    let gateway = Gateway::start(snapshot([("a.com", pool)]));
    let get = async |user: usize| {
        let request =
            format!("GET / HTTP/1.1\r\nHost: a.com\r\nX-User: {user}\r\nConnection: close\r\n\r\n");
        gateway.exchange(request).await[..].ends_with("one")
    };
    let mut of_one = 0;
    for user in 0..16 {
        let first = get(user).await;
        assert_eq!(get(user).await, first);
        of_one += usize::from(first);
    }
    assert!((1..16).contains(&of_one), "{of_one} of 16 users");
}

#[tokio::test]
async fn a_request_beyond_the_limit_waits_for_one_that_ends() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::with_config(one_route([address]), limited(|_| ()));
    let mut first = gateway.connect().await;
    first.write_all(GET).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;

    let mut second = gateway.connect().await;
    second.write_all(GET).await.unwrap();
    gateway.totals(|totals| totals.queued == 1).await;
    stream.write_all(OK).await.unwrap();
    assert_status(&read_until(&mut first, "ok").await, 200);

    // On the connection that the first has left.
    read_until(&mut stream, "\r\n\r\n").await;
    stream.write_all(OK).await.unwrap();
    assert_status(&read_until(&mut second, "ok").await, 200);
}

#[tokio::test]
async fn a_full_queue_is_503_with_a_time_to_come_again() {
    let (listener, address) = scripted().await;
    let config = limited(|config| config.limits.queue = 1);
    let gateway = Gateway::with_config(one_route([address]), config);
    let mut first = gateway.connect().await;
    first.write_all(GET).await.unwrap();
    let (_stream, _) = listener.accept().await.unwrap();
    let mut second = gateway.connect().await;
    second.write_all(GET).await.unwrap();
    gateway.totals(|totals| totals.queued == 1).await;

    let response = gateway.get("a.com").await;
    assert_status(&response, 503);
    assert!(response.contains("x-cf-routererror: Connection Limit Reached\r\n"));
    assert!(response.contains("retry-after: 1\r\n"));
    let totals = gateway.metrics.totals();
    assert_eq!(totals.queue_full, 1);
    assert!(totals.errors.contains(&("limit_reached", 1)));
}

#[tokio::test]
async fn who_waits_too_long_is_503() {
    let (listener, address) = scripted().await;
    let config = limited(|config| config.timeouts.queue = Duration::from_millis(20));
    let gateway = Gateway::with_config(one_route([address]), config);
    let mut first = gateway.connect().await;
    first.write_all(GET).await.unwrap();
    let (_stream, _) = listener.accept().await.unwrap();
    assert_status(&gateway.get("a.com").await, 503);
    assert_eq!(gateway.metrics.totals().queue_timeouts, 1);
}

#[tokio::test]
async fn a_client_that_leaves_the_queue_leaves_its_place() {
    let (listener, address) = scripted().await;
    let config = limited(|config| config.limits.queue = 1);
    let gateway = Gateway::with_config(one_route([address]), config);
    let mut first = gateway.connect().await;
    first.write_all(GET).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;
    let mut leaves = gateway.connect().await;
    leaves.write_all(GET).await.unwrap();
    gateway.totals(|totals| totals.queued == 1).await;
    drop(leaves);
    gateway.totals(|totals| totals.connections_open == 1).await;

    let mut second = gateway.connect().await;
    second.write_all(GET).await.unwrap();
    gateway.totals(|totals| totals.queued == 2).await;
    stream.write_all(OK).await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;
    stream.write_all(OK).await.unwrap();
    assert_status(&read_until(&mut second, "ok").await, 200);
}

#[tokio::test]
async fn a_backend_that_joins_takes_those_who_wait() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::with_config(one_route([address]), limited(|_| ()));
    let mut first = gateway.connect().await;
    first.write_all(GET).await.unwrap();
    let (_stream, _) = listener.accept().await.unwrap();
    let mut second = gateway.connect().await;
    second.write_all(GET).await.unwrap();
    gateway.totals(|totals| totals.queued == 1).await;
    let other = TestBackend::named("other").await;
    let published = one_route([address, other.address]);
    gateway.published.store(Arc::new(published));
    assert_status(&read_until(&mut second, "other").await, 200);
}

#[tokio::test]
async fn an_upgraded_connection_counts_until_it_ends() {
    let (listener, address) = scripted().await;
    let config = limited(|config| config.limits.queue = 0);
    let gateway = Gateway::with_config(one_route([address]), config);
    let mut client = gateway.connect().await;
    let upgrade =
        b"GET / HTTP/1.1\r\nHost: a.com\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    client.write_all(upgrade).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;
    let switching =
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhi";
    stream.write_all(switching).await.unwrap();
    read_until(&mut client, "\r\n\r\nhi").await;
    assert_status(&gateway.get("a.com").await, 503);

    drop((client, stream));
    gateway.totals(|totals| totals.upgrades_open == 0).await;
    let answers = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        read_until(&mut stream, "\r\n\r\n").await;
        stream.write_all(OK).await.unwrap();
        stream
    };
    let (response, _stream) = tokio::join!(gateway.get("a.com"), answers);
    assert_status(&response, 200);
}

#[tokio::test]
async fn a_route_has_a_limit_of_its_own_over_all_its_backends() {
    let [(listener, address), (other_listener, other)] = [scripted().await, scripted().await];
    let mut pool = pool([address, other].map(backend));
    pool.policy = Some(Arc::new(HttpPolicy {
        limits: RouteLimits {
            requests: Some(1),
            ..RouteLimits::default()
        },
        ..HttpPolicy::new(Origin::File)
    }));
    let mut config = config();
    config.limits.queue = 0;
    let gateway = Gateway::with_config(snapshot([("a.com", pool)]), config);
    let mut first = gateway.connect().await;
    first.write_all(GET).await.unwrap();
    let (mut stream, _) = tokio::select! {
        accepted = listener.accept() => accepted.unwrap(),
        accepted = other_listener.accept() => accepted.unwrap(),
    };
    read_until(&mut stream, "\r\n\r\n").await;
    assert_status(&gateway.get("a.com").await, 503);
}

#[tokio::test]
async fn a_backend_of_bad_responses_is_ejected_and_only_half_of_the_pool() {
    let bad = || {
        TestBackend::answering(|_| {
            let mut response = Response::new(full("bad"));
            *response.status_mut() = http::StatusCode::BAD_GATEWAY;
            response
        })
    };
    let (one, other) = (bad().await, bad().await);
    let mut config = config();
    config.ejection.consecutive_failures = 2;
    let gateway = Gateway::with_config(one_route([one.address, other.address]), config);
    for _ in 0..8 {
        assert_status(&gateway.get("a.com").await, 502);
    }
    let totals = gateway.metrics.totals();
    assert_eq!(totals.failure_ejections, 1);
    assert!(totals.ejections_refused > 0);
    let backends = poll_until(|| Some(gateway.metrics.backends()).filter(|it| it.len() == 2)).await;
    let ejected = backends.values().filter(|backend| backend.is_ejected);
    assert_eq!(ejected.count(), 1);
    let (one, other) = (one.seen().len(), other.seen().len());
    assert_eq!(one.min(other), 2, "{one} and {other}");
}

#[tokio::test]
async fn a_limit_holds_over_all_workers() {
    const REQUESTS: usize = 24;
    let (now, most) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(0)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let counts = (Arc::clone(&now), Arc::clone(&most));
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (now, most) = counts.clone();
            tokio::spawn(async move {
                let mut byte = [0];
                // Each byte that follows a response begins a request.
                while let Ok(1) = stream.read(&mut byte).await {
                    let inside = {
                        let mut now = now.lock().unwrap();
                        *now += 1;
                        *now
                    };
                    let so_far = *most.lock().unwrap();
                    *most.lock().unwrap() = so_far.max(inside);
                    read_until(&mut stream, "\r\n\r\n").await;
                    tokio::task::yield_now().await;
                    *now.lock().unwrap() -= 1;
                    stream.write_all(OK).await.unwrap();
                }
            });
        }
    });
    let config = limited(|config| {
        config.workers = 3;
        config.limits.requests_per_backend = 2;
    });
    let gateway = Gateway::with_config(one_route([address]), config);
    let requests = (0..REQUESTS).map(|_| gateway.get("a.com"));
    for response in futures_util::future::join_all(requests).await {
        assert_status(&response, 200);
    }
    let most = *most.lock().unwrap();
    assert!((1..=2).contains(&most), "{most} at once");
    assert_eq!(*now.lock().unwrap(), 0);
}
