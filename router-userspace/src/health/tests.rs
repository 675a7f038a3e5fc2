use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::route::table::RouteTable;
use crate::route::{RouteEvent, wire};

/// Publishes one backend and returns its table.
fn publish(published: &Published, address: SocketAddr) -> RouteTable {
    let now = std::time::Instant::now();
    let mut table = RouteTable::new(Duration::from_secs(120), now);
    let json = format!(
        r#"{{"host":"{}","port":{},"uris":["a"]}}"#,
        address.ip(),
        address.port()
    );
    let registration = wire::register(json.as_bytes(), &[]).unwrap();
    table.apply(RouteEvent::Register(registration), now);
    published.store(Arc::new(table.snapshot()));
    table
}

fn config(check: HealthCheck) -> Config {
    let health = HealthConfig {
        check,
        interval: Duration::from_millis(10),
        timeout: Duration::from_secs(5),
        rise: 1,
        fall: 2,
        path: "/health".to_owned(),
        concurrency: 2,
    };
    Config {
        health,
        ..Config::default()
    }
}

#[tokio::test]
async fn a_backend_that_refuses_is_down_until_it_is_gone() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let published = Published::default();
    publish(&published, address);
    let (inbox, mut events) = mpsc::channel(8);
    let metrics = Arc::<Metrics>::default();
    let (_reload, config) = watch::channel(Arc::new(config(HealthCheck::Tcp)));
    tokio::spawn(run(
        Arc::clone(&published),
        inbox,
        Arc::clone(&metrics),
        config,
    ));
    let down = events.recv().await.unwrap();
    assert!(matches!(down, Event::Health { backend, healthy: false } if backend == address));
    assert!(metrics.probes_bad.get() >= 2);
    published.store(Arc::new(Snapshot {
        revision: 9,
        ..Snapshot::default()
    }));
    let forgotten = events.recv().await.unwrap();
    assert!(matches!(forgotten, Event::Health { backend, healthy: true } if backend == address));
}

#[tokio::test]
async fn an_http_check_goes_by_the_status() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let published = Published::default();
    publish(&published, listener.local_addr().unwrap());
    let (inbox, mut events) = mpsc::channel(8);
    let (_reload, config) = watch::channel(Arc::new(config(HealthCheck::Http)));
    tokio::spawn(run(published, inbox, Arc::default(), config));
    let answer = async |status: &str| {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = [0; 512];
        let length = stream.read(&mut request).await.unwrap();
        assert!(request[..length].starts_with(b"GET /health HTTP/1.1\r\n"));
        let answer = format!("HTTP/1.1 {status} x\r\ncontent-length: 0\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.unwrap();
    };
    for status in ["200", "503", "302", "500", "503"] {
        answer(status).await;
    }
    assert!(matches!(
        events.recv().await.unwrap(),
        Event::Health { healthy: false, .. }
    ));
    answer("204").await;
    assert!(matches!(
        events.recv().await.unwrap(),
        Event::Health { healthy: true, .. }
    ));
}

#[test]
fn only_backends_that_take_tcp_are_checked() {
    let now = std::time::Instant::now();
    let mut table = RouteTable::new(Duration::from_secs(120), now);
    let ranges = ["192.0.2.0/24".parse().unwrap()];
    for (port, routes) in [
        (1, r#""uris":["a"]"#),
        (2, r#""vips":["udp/192.0.2.1:53"]"#),
        (3, r#""vips":["tcp/192.0.2.1:53"]"#),
    ] {
        let json = format!(r#"{{"host":"10.0.0.1","port":{port},{routes}}}"#);
        let registration = wire::register(json.as_bytes(), &ranges).unwrap();
        table.apply(RouteEvent::Register(registration), now);
    }
    let mut checked: Vec<(u16, bool)> = backends(&table.snapshot())
        .iter()
        .map(|(address, plain_http)| (address.port(), *plain_http))
        .collect();
    checked.sort_unstable();
    assert_eq!(
        checked,
        [(1, true), (3, false)],
        "what serves a VIP need not speak HTTP"
    );
}

#[tokio::test]
async fn a_target_that_returns_during_its_probe_is_probed_once_at_a_time() {
    let (inbox, _events) = mpsc::channel(8);
    let address = "127.0.0.1:1".parse().unwrap();
    let mut checker = Checker {
        health: config(HealthCheck::Tcp).health,
        targets: HashMap::new(),
        due: BTreeSet::new(),
        probes: JoinSet::new(),
        generation: 0,
        revision: None,
        inbox,
        metrics: Arc::default(),
    };
    let published = Published::default();
    let mut table = publish(&published, address);
    let there = published.load_full();
    let gone = Arc::new(Snapshot {
        revision: there.revision + 1,
        ..Snapshot::default()
    });
    checker.follow(there).await;
    checker.probe_due(Instant::now() + checker.health.interval);
    assert_eq!((checker.probes.len(), checker.due.len()), (1, 0));
    checker.follow(gone).await;
    table.snapshot();
    checker.follow(Arc::new(table.snapshot())).await;
    assert_eq!(checker.due.len(), 1, "the new target has its own time");
    let probed = checker.probes.join_next().await.unwrap().unwrap();
    checker.probed(probed).await;
    assert_eq!(
        checker.due.len(),
        1,
        "the old target's probe schedules nothing"
    );
    assert!(checker.targets[&address].state.healthy());
}
