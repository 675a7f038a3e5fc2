use std::net::SocketAddr;

use super::*;
use crate::event::INBOX_DEPTH;
use crate::route::wire;

struct Gateway {
    inbox: mpsc::Sender<Event>,
    published: Published,
    metrics: Arc<Metrics>,
}

impl Gateway {
    fn start() -> Gateway {
        let (inbox, events) = mpsc::channel(INBOX_DEPTH);
        let published = Published::default();
        let metrics = Arc::<Metrics>::default();
        let mut config = Config::default();
        config.l4.vip_ranges = vec!["192.0.2.0/24".parse().unwrap()];
        let (reports, _) = mpsc::channel(1);
        let agent = Agent::new(
            &config,
            Arc::clone(&published),
            None,
            reports,
            Arc::clone(&metrics),
        );
        tokio::spawn(agent.run(events));
        Gateway {
            inbox,
            published,
            metrics,
        }
    }

    async fn send(&self, events: impl IntoIterator<Item = Event>) -> Arc<Snapshot> {
        for event in events {
            self.inbox.send(event).await.unwrap();
        }
        while self.inbox.capacity() < INBOX_DEPTH {
            tokio::task::yield_now().await;
        }
        tokio::task::yield_now().await;
        self.published.load_full()
    }

    async fn after(&self, time: Duration) -> Arc<Snapshot> {
        tokio::time::sleep(time).await;
        self.published.load_full()
    }
}

fn register(address: &str, uri: &str) -> Event {
    let address: SocketAddr = address.parse().unwrap();
    let json = format!(
        r#"{{"host":"{}","port":{},"uris":["{uri}"],"vips":["tcp/192.0.2.1:80"]}}"#,
        address.ip(),
        address.port()
    );
    let ranges = ["192.0.2.0/24".parse().unwrap()];
    Event::Route(RouteEvent::Register(
        wire::register(json.as_bytes(), &ranges).unwrap(),
    ))
}

fn connected(connected: bool) -> Event {
    Event::SourceConnected {
        origin: Origin::Nats,
        connected,
    }
}

#[tokio::test(start_paused = true)]
async fn leases_of_any_number_end_without_waiting_for_further_ticks() {
    let gateway = Gateway::start();
    let uri = |number: usize| register("10.0.0.1:80", &format!("h{number}.x"));
    gateway.send([connected(true)]).await;
    let snapshot = gateway.send((0..5000).map(uri)).await;
    assert_eq!(snapshot.hosts.len(), 5000);
    let threshold = Config::default().nats.stale_threshold;
    let before = gateway.after(threshold - MAX_TICK).await;
    assert_eq!(before.hosts.len(), 5000);
    assert_eq!(gateway.after(3 * MAX_TICK).await.hosts.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_batch_is_published_once() {
    let gateway = Gateway::start();
    let events = (1..=100).map(|port| register(&format!("10.0.0.1:{port}"), "a.x"));
    let snapshot = gateway.send(events).await;
    assert_eq!(
        snapshot.hosts.get("a.x").unwrap().1.paths()[0]
            .1
            .backends
            .len(),
        100
    );
    assert_eq!(snapshot.vips.len(), 1);
    assert_eq!(snapshot.revision, gateway.metrics.batches.get());
    let again = gateway.send([register("10.0.0.1:1", "a.x")]).await;
    assert_eq!(
        again.revision, snapshot.revision,
        "a repeated registration publishes nothing"
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_not_repeated_goes_when_its_time_is_over() {
    let gateway = Gateway::start();
    gateway
        .send([connected(true), register("10.0.0.1:1", "a.x")])
        .await;
    assert_eq!(gateway.after(Duration::from_secs(119)).await.hosts.len(), 1);
    assert_eq!(gateway.after(Duration::from_secs(3)).await.hosts.len(), 0);
    assert_eq!(gateway.metrics.size().vips, 0);
}

#[tokio::test(start_paused = true)]
async fn nothing_goes_while_nats_is_away() {
    let gateway = Gateway::start();
    gateway.send([register("10.0.0.1:1", "a.x")]).await;
    assert_eq!(
        gateway.after(Duration::from_secs(1000)).await.hosts.len(),
        1
    );
    gateway.send([connected(true)]).await;
    assert_eq!(gateway.after(Duration::from_secs(119)).await.hosts.len(), 1);
    assert_eq!(gateway.after(Duration::from_secs(3)).await.hosts.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn health_is_part_of_the_snapshot() {
    let gateway = Gateway::start();
    let backend = "10.0.0.1:1".parse().unwrap();
    let snapshot = gateway
        .send([
            register("10.0.0.1:1", "a.x"),
            Event::Health {
                backend,
                healthy: false,
            },
        ])
        .await;
    assert!(snapshot.unhealthy.contains(&backend));
    let snapshot = gateway
        .send([Event::Health {
            backend,
            healthy: true,
        }])
        .await;
    assert!(snapshot.unhealthy.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_reload_changes_the_lifetime_of_what_is_announced_next() {
    let gateway = Gateway::start();
    let mut config = Config::default();
    config.nats.stale_threshold = Duration::from_secs(10);
    gateway
        .send([connected(true), Event::Reload(Box::new(config))])
        .await;
    gateway.send([register("10.0.0.1:1", "a.x")]).await;
    assert_eq!(gateway.after(Duration::from_secs(12)).await.hosts.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_reload_drops_vips_outside_the_new_ranges() {
    let gateway = Gateway::start();
    let snapshot = gateway.send([register("10.0.0.1:1", "a.x")]).await;
    assert_eq!(snapshot.vips.len(), 1);
    let mut config = Config::default();
    config.l4.vip_ranges = vec!["192.0.2.128/25".parse().unwrap()];
    let snapshot = gateway.send([Event::Reload(Box::new(config))]).await;
    assert_eq!((snapshot.vips.len(), snapshot.hosts.len()), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_vip_is_in_panic_while_too_few_are_healthy() {
    let gateway = Gateway::start();
    let address = |port: u16| SocketAddr::from(([10, 0, 0, 1], port));
    let registers = (1..=4).map(|port| register(&address(port).to_string(), "a.x"));
    gateway.send(registers).await;
    let health = |port, healthy| Event::Health {
        backend: address(port),
        healthy,
    };
    let in_panic = |snapshot: &Snapshot| {
        let told = gateway.metrics.vips_in_panic.get() == 1;
        let pool = snapshot.vips.values().next().unwrap();
        assert_eq!(snapshot.in_panic(pool), told);
        told
    };
    let snapshot = gateway.send([health(1, false), health(2, false)]).await;
    assert!(!in_panic(&snapshot), "by default one is enough");
    let mut config = Config::default();
    config.l4.vip_ranges = vec!["192.0.2.0/24".parse().unwrap()];
    config.health.panic_threshold = 60;
    let reloaded = || Event::Reload(Box::new(config.clone()));
    let snapshot = gateway.send([reloaded()]).await;
    assert!(in_panic(&snapshot));
    let again = gateway.send([reloaded()]).await;
    assert_eq!(again.revision, snapshot.revision, "nothing is published");
    let snapshot = gateway.send([health(1, true)]).await;
    assert!(!in_panic(&snapshot), "three of four are healthy");
    let snapshot = gateway
        .send([register("10.0.0.1:5", "a.x"), health(5, false)])
        .await;
    assert!(
        !in_panic(&snapshot),
        "three of five are exactly the threshold"
    );
    let snapshot = gateway.send([health(4, false)]).await;
    assert!(in_panic(&snapshot));
}

#[test]
fn reports_of_layer_4_go_to_the_checker_and_never_wait() {
    let metrics = Arc::<Metrics>::default();
    let (reports, mut reported) = mpsc::channel(1);
    let published = Published::default();
    let config = Config::default();
    let agent = Agent::new(&config, published, None, reports, Arc::clone(&metrics));
    let report = Unanswered {
        backend: "10.0.0.1:80".parse().unwrap(),
        syns: 3,
        answered: 0,
    };
    agent.report(report);
    agent.report(report);
    assert_eq!(reported.try_recv(), Ok(report));
    assert_eq!(metrics.passive_dropped.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn of_a_vip_that_layer_4_adopted_what_is_on_disk_is_not_believed() {
    let mut config = Config::default();
    config.l4.vip_ranges = vec!["192.0.2.0/24".parse().unwrap()];
    let published = Published::default();
    let metrics = Arc::<Metrics>::default();
    let (reports, _) = mpsc::channel(1);
    let mut agent = Agent::new(&config, Arc::clone(&published), None, reports, metrics);
    let adopted = |address: &str, vips: &[&str]| {
        let address = address.parse().unwrap();
        let vips = vips.iter().map(|vip| RouteKey::Vip(vip.parse().unwrap()));
        RouteEvent::Register(Registration {
            routes: vips.collect(),
            backend: Arc::new(crate::route::Backend::new(address, Origin::Adopted)),
            stale_after: None,
            balance: None,
            route_service_url: None,
        })
    };
    // As from the pinned maps.
    agent
        .table
        .apply(adopted("10.0.0.1:80", &["tcp/192.0.2.1:80"]), now());
    let outside = "tcp/198.51.100.1:80";
    let on_disk = ["tcp/192.0.2.1:80", "tcp/192.0.2.2:80", outside];
    let kept = Kept {
        events: vec![adopted("10.0.0.2:80", &on_disk)].into(),
        as_of: std::time::SystemTime::now(),
    };
    agent.adopt(kept, &config);
    let snapshot = published.load();
    let served: Vec<_> = snapshot
        .vips
        .iter()
        .map(|(vip, pool)| format!("{vip} {}", pool.backends[0].address))
        .collect();
    assert_eq!(
        served,
        [
            "tcp/192.0.2.1:80 10.0.0.1:80",
            "tcp/192.0.2.2:80 10.0.0.2:80"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_reload_drops_what_new_rules_do_not_allow_and_keeps_the_rest() {
    let gateway = Gateway::start();
    let snapshot = gateway
        .send([register("10.0.0.1:1", "a.x"), register("10.0.0.1:1", "b.x")])
        .await;
    assert_eq!(snapshot.hosts.len(), 2);
    let text = "[l4]\nvip_ranges = ['192.0.2.0/24']\n[guard]\nreserved_hosts = ['a.x']";
    let config = || Event::Reload(Box::new(crate::config::parse(text).unwrap()));
    let snapshot = gateway.send([config()]).await;
    assert!(!snapshot.hosts.contains("a.x") && snapshot.hosts.contains("b.x"));
    let again = gateway.send([config()]).await;
    assert_eq!(again.revision, snapshot.revision, "nothing is published");
}
