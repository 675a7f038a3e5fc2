use std::net::SocketAddr;

use tokio::sync::watch;

use super::*;
use crate::agent::Agent;
use crate::event::INBOX_DEPTH;
use crate::rejects::Rejects;
use crate::route::ownership::Ground;
use crate::snapshot::{Published, Snapshot};
use crate::source::nats_server::{Server, until};

mod access;
mod accounts;

struct Gateway {
    published: Published,
    metrics: Arc<Metrics>,
    rejects: Arc<Rejects>,
    inbox: mpsc::Sender<Event>,
    reload: watch::Sender<Arc<Config>>,
}

impl Gateway {
    async fn start(server: SocketAddr) -> Gateway {
        Gateway::start_with(server, Duration::from_secs(2)).await
    }

    async fn start_with(server: SocketAddr, stale_threshold: Duration) -> Gateway {
        Gateway::configured(NatsConfig {
            servers: vec![format!("nats://{server}")],
            stale_threshold,
            ..NatsConfig::default()
        })
        .await
    }

    async fn configured(nats: NatsConfig) -> Gateway {
        let mut config = Config {
            nats,
            ..Config::default()
        };
        config.l4.vip_ranges = vec!["192.0.2.0/24".parse().unwrap()];
        Gateway::of(config).await
    }

    async fn of(mut config: Config) -> Gateway {
        config.nats.prune_interval = Duration::from_millis(50);
        let (nats, fixed) = (config.nats.clone(), config.clone());
        let (reload, config) = watch::channel(Arc::new(config));
        let (inbox, events) = mpsc::channel(INBOX_DEPTH);
        let (published, metrics) = (Published::default(), Arc::<Metrics>::default());
        let (reports, _) = mpsc::channel(1);
        let agent = Agent::new(
            &fixed,
            Arc::clone(&published),
            None,
            reports,
            Arc::clone(&metrics),
        );
        tokio::spawn(agent.run(events));
        let rejects = Arc::<Rejects>::default();
        start(
            &nats,
            Context {
                inbox: inbox.clone(),
                metrics: Arc::clone(&metrics),
                rejects: Arc::clone(&rejects),
                config,
            },
        )
        .await
        .unwrap();
        Gateway {
            published,
            metrics,
            rejects,
            inbox,
            reload,
        }
    }

    /// As the program does on SIGHUP.
    async fn reload(&self, config: Config) {
        self.reload.send_replace(Arc::new(config.clone()));
        let event = Event::Reload(Box::new(config));
        self.inbox.send(event).await.unwrap();
    }

    async fn until(&self, what: &str, holds: impl Fn(&Snapshot, &Metrics) -> bool) {
        until(what, || {
            holds(&self.published.load(), &self.metrics).then_some(())
        })
        .await;
    }
}

/// A client of a server that the gateway is known to listen on.
async fn client(server: SocketAddr) -> Client {
    let client = async_nats::connect(server.to_string()).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while client.request("router.greet", "".into()).await.is_err() {
        assert!(
            Instant::now() < deadline,
            "the gateway does not answer a greeting"
        );
    }
    client
}

async fn publish(client: &Client, subject: &'static str, payload: impl Into<String>) {
    client
        .publish(subject, payload.into().into())
        .await
        .unwrap();
    client.flush().await.unwrap();
}

async fn next(subscriber: &mut Subscriber) -> serde_json::Value {
    let message = tokio::time::timeout(Duration::from_secs(20), subscriber.next()).await;
    serde_json::from_slice(&message.expect("a message in time").unwrap().payload).unwrap()
}

const ONE: &str =
    r#"{"host":"10.0.0.1","port":80,"uris":["a.x"],"vips":["tcp/192.0.2.1:80"],"app":"one"}"#;

#[tokio::test]
async fn registrations_are_taken_in_withdrawn_and_pruned() {
    let server = Server::start(None).await;
    let client = async_nats::connect(server.address.to_string())
        .await
        .unwrap();
    let mut starts = client.subscribe("router.start").await.unwrap();
    client.flush().await.unwrap();
    let gateway = Gateway::start(server.address).await;

    let start = next(&mut starts).await;
    assert_eq!(start["minimumRegisterIntervalInSeconds"], 20);
    assert_eq!(start["pruneThresholdInSeconds"], 2);
    assert_eq!(start["hosts"][0], "127.0.0.1");
    let greeted = client.request("router.greet", "".into()).await.unwrap();
    let greeted: serde_json::Value = serde_json::from_slice(&greeted.payload).unwrap();
    assert_eq!(
        greeted, start,
        "the answer to a greeting is the start message"
    );

    publish(&client, "router.register", ONE).await;
    let served = |snapshot: &Snapshot, _: &Metrics| {
        snapshot.hosts.contains("a.x") && snapshot.vips.len() == 1
    };
    gateway.until("it is served", served).await;
    publish(&client, "router.unregister", ONE).await;
    gateway
        .until("it is gone", |snapshot, _| snapshot.hosts.is_empty())
        .await;

    publish(&client, "router.register", ONE).await;
    gateway.until("it is served again", served).await;
    gateway
        .until("it is pruned", |snapshot, _| snapshot.hosts.is_empty())
        .await;
}

#[tokio::test]
async fn a_burst_is_taken_in_whole() {
    let server = Server::start(None).await;
    let gateway = Gateway::start_with(server.address, Duration::from_secs(3600)).await;
    let client = client(server.address).await;
    for i in 0..5000 {
        let payload = format!(r#"{{"host":"10.0.0.1","port":80,"uris":["h{i}.x"]}}"#);
        client
            .publish("router.register", payload.into())
            .await
            .unwrap();
    }
    client.flush().await.unwrap();
    gateway
        .until("all are served", |snapshot, _| snapshot.hosts.len() == 5000)
        .await;
    assert_eq!(gateway.metrics.nats_slow_consumer.get(), 0);
}

#[tokio::test]
async fn a_burst_beyond_the_budget_waits_at_the_server() {
    const MESSAGES: usize = 250_000;
    let server = Server::start(None).await;
    let gateway = Gateway::start_with(server.address, Duration::from_secs(3600)).await;
    let client = client(server.address).await;
    let payload = r#"{"host":"10.0.0.1","port":80,"uris":["a.x"]}"#;
    assert!(MESSAGES * (payload.len() + MESSAGE_OVERHEAD) > BUDGET_BYTES);
    for _ in 0..MESSAGES {
        client
            .publish("router.register", payload.into())
            .await
            .unwrap();
    }
    client.flush().await.unwrap();
    gateway
        .until("all are taken in", |_, metrics| {
            metrics.registers.get() + metrics.nats_slow_consumer.get() == MESSAGES as u64
        })
        .await;
    assert_eq!(gateway.metrics.nats_slow_consumer.get(), 0);
}

/// A source whose agent is the test, and does not read yet.
async fn stalled(server: SocketAddr) -> (mpsc::Receiver<Event>, Arc<Metrics>) {
    let mut config = Config::default();
    config.nats.servers = vec![format!("nats://{server}")];
    let nats = config.nats.clone();
    let (_, config) = watch::channel(Arc::new(config));
    let (inbox, events) = mpsc::channel(4);
    let metrics = Arc::<Metrics>::default();
    let context = Context {
        inbox,
        metrics: Arc::clone(&metrics),
        rejects: Arc::default(),
        config,
    };
    start(&nats, context).await.unwrap();
    (events, metrics)
}

#[tokio::test]
async fn what_exceeds_the_budget_is_dropped_and_counted_and_the_rest_arrives() {
    const MESSAGES: u64 = 100;
    let server = Server::start(None).await;
    let (mut events, metrics) = stalled(server.address).await;
    let client = client(server.address).await;
    // Just below the server's limit of 1 MiB, by a field that is passed over.
    let payload = format!(
        r#"{{"host":"10.0.0.1","port":80,"uris":["a.x"],"other":"{}"}}"#,
        "x".repeat(1_000_000)
    );
    for _ in 0..MESSAGES {
        client
            .publish("router.register", payload.clone().into())
            .await
            .unwrap();
    }
    client.flush().await.unwrap();
    until("the budget is used up", || {
        let fit = (BUDGET_BYTES / (payload.len() + MESSAGE_OVERHEAD)) as u64;
        (metrics.registers.get() > 0 && metrics.nats_slow_consumer.get() >= MESSAGES - fit)
            .then_some(())
    })
    .await;
    assert!(metrics.inbox_full.get() >= 1);

    // As the agent would.
    let mut route = async || loop {
        match events.recv().await.unwrap() {
            Event::Route(_) => return,
            Event::Release { budget, bytes } => budget.add_permits(bytes),
            _ => {}
        }
    };
    let dropped = metrics.nats_slow_consumer.get();
    for _ in dropped..MESSAGES {
        route().await;
    }
    // What was given back is there for more.
    for _ in 0..MESSAGES {
        client
            .publish("router.register", payload.clone().into())
            .await
            .unwrap();
        client.flush().await.unwrap();
        route().await;
    }
    assert_eq!(metrics.nats_slow_consumer.get(), dropped);
}

#[tokio::test]
async fn a_reconnect_is_told_as_a_loss_and_a_return_with_one_start_each() {
    let server = Server::start(None).await;
    let observer = async_nats::connect(server.address.to_string())
        .await
        .unwrap();
    let mut starts = observer.subscribe("router.start").await.unwrap();
    observer.flush().await.unwrap();
    let (inbox, mut events) = mpsc::channel(INBOX_DEPTH);
    let mut config = Config::default();
    config.nats.servers = vec![format!("nats://{}", server.address)];
    let (events_in, client_events) = mpsc::channel(1);
    let client = options(&config.nats, events_in)
        .await
        .unwrap()
        .connect(&config.nats.servers[..])
        .await
        .unwrap();
    let (_reload, config) = watch::channel(Arc::new(config));
    let mut source = Source::new(
        &NatsConfig::default(),
        client.clone(),
        Context {
            inbox,
            metrics: Arc::default(),
            rejects: Arc::default(),
            config,
        },
    );
    // No event arrives: all the same every connection is noticed, however often it is looked.
    drop(client_events);
    for connects in 1..=3 {
        until("the client is connected", || {
            let connected = client.connection_state() == State::Connected;
            (connected && client.statistics().connects.load(Ordering::Relaxed) == connects)
                .then_some(())
        })
        .await;
        source.follow().await;
        source.follow().await;
        next(&mut starts).await;
        client.force_reconnect().await.unwrap();
    }
    let mut told = Vec::new();
    while let Ok(Event::SourceConnected { connected, .. }) = events.try_recv() {
        told.push(connected);
    }
    assert_eq!(told, [true, false, true, false, true]);
    let more = observer.request("router.greet", "".into()).await;
    assert!(more.is_err(), "nobody answers: only starts were published");
    assert!(futures_util::FutureExt::now_or_never(starts.next()).is_none());
}

#[tokio::test]
async fn a_message_by_hand_is_published_when_the_server_has_taken_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nats.conf");
    std::fs::write(
        &path,
        r#"authorization { users = [
            { user: "all", password: "p" }
            { user: "some", password: "p", permissions: { publish: { deny: "router.>" } } }
        ] }"#,
    )
    .unwrap();
    let server = Server::start_with(None, &["--config", path.to_str().unwrap()]).await;
    let config = |user: &str| {
        let text = format!(
            "[nats]\nservers = [\"nats://{}\"]\nuser = {user:?}\npassword = \"p\"\n",
            server.address
        );
        crate::config::parse(&text).unwrap().nats
    };
    super::publish(&config("all"), "register", ONE.into())
        .await
        .unwrap();
    let error = super::publish(&config("some"), "register", ONE.into()).await;
    let error = format!("{:#}", error.unwrap_err());
    assert!(
        error.contains("router.register") && error.to_lowercase().contains("permissions"),
        "{error}"
    );
}

#[tokio::test]
async fn garbage_is_counted_by_reason_and_changes_nothing() {
    let server = Server::start(None).await;
    let gateway = Gateway::start(server.address).await;
    let client = client(server.address).await;
    for payload in [
        "\u{0}garbage",
        r#"{"host":"10.0.0.1","port":"80","uris":["a.x"]}"#,
        r#"{"host":"10.0.0.1","port":80,"uris":["a.x",""]}"#,
        r#"{"host":"10.0.0.1","port":80,"uris":["a.x"],"vips":["tcp/10.0.0.9:80"]}"#,
    ] {
        publish(&client, "router.register", payload).await;
    }
    publish(&client, "router.unregister", "[]").await;
    publish(&client, "router.other", ONE).await;
    publish(
        &client,
        "router.register",
        r#"{"host":"10.0.0.1","port":80,"uris":["good.x"]}"#,
    )
    .await;
    gateway
        .until("the good one is served", |snapshot, _| {
            snapshot.hosts.len() == 1
        })
        .await;
    let rejects: Vec<(&str, u64)> = gateway
        .metrics
        .rejects()
        .filter(|(_, count)| *count > 0)
        .collect();
    assert_eq!(
        rejects,
        [("syntax", 1), ("type", 2), ("uri", 1), ("vip_range", 1)]
    );
    assert_eq!(
        (
            gateway.metrics.registers.get(),
            gateway.metrics.unregisters.get()
        ),
        (5, 1)
    );
}

#[tokio::test]
async fn routes_outlast_a_server_and_are_pruned_after_its_return() {
    let server = Server::start(None).await;
    let address = server.address;
    let gateway = Gateway::start(address).await;
    gateway
        .until("it is connected", |_, metrics| {
            metrics.nats_connected.get() == 1
        })
        .await;
    publish(&client(address).await, "router.register", ONE).await;
    gateway
        .until("it is served", |snapshot, _| snapshot.hosts.len() == 1)
        .await;
    drop(server);
    gateway
        .until("the loss is noticed", |_, metrics| {
            metrics.nats_connected.get() == 0
        })
        .await;
    let away = Instant::now();
    let _ = until("its lease would be over", || {
        (away.elapsed() > Duration::from_secs(3)).then_some(())
    })
    .await;
    assert_eq!(
        gateway.published.load().hosts.len(),
        1,
        "nothing is pruned while NATS is away"
    );

    let _server = Server::start(Some(address.port())).await;
    let back = Instant::now();
    let observer = async_nats::connect(address.to_string()).await.unwrap();
    let mut starts = observer.subscribe("router.start").await.unwrap();
    observer.flush().await.unwrap();
    gateway
        .until("it is connected again", |_, metrics| {
            metrics.nats_connects.get() == 2
        })
        .await;
    let client = client(address).await;
    // The gateway may have been back before the observer; then its greeting tells the same.
    let start = tokio::select! {
        start = next(&mut starts) => start,
        answer = client.request("router.greet", "".into()) => {
            serde_json::from_slice(&answer.unwrap().payload).unwrap()
        }
    };
    assert_eq!(start["pruneThresholdInSeconds"], 2);
    gateway
        .until("it is pruned", |snapshot, _| snapshot.hosts.is_empty())
        .await;
    assert!(
        back.elapsed() >= Duration::from_secs(2),
        "after one full lifetime"
    );
    publish(&client, "router.register", ONE).await;
    gateway
        .until("it is served again", |snapshot, _| {
            snapshot.hosts.len() == 1
        })
        .await;
}

#[tokio::test]
async fn a_server_that_is_not_there_yet_is_waited_for() {
    let server = Server::start(None).await;
    let address = server.address;
    drop(server);
    let gateway = Gateway::start(address).await;
    let _server = Server::start(Some(address.port())).await;
    gateway
        .until("it is connected", |_, metrics| {
            metrics.nats_connected.get() == 1
        })
        .await;
    publish(&client(address).await, "router.register", ONE).await;
    gateway
        .until("it is served", |snapshot, _| snapshot.hosts.len() == 1)
        .await;
}

#[tokio::test]
async fn a_gateway_of_some_segments_takes_in_no_others() {
    let server = Server::start(None).await;
    let gateway = Gateway::configured(NatsConfig {
        servers: vec![format!("nats://{}", server.address)],
        routing_table_sharding_mode: crate::config::ShardingMode::SharedAndSegments,
        isolation_segments: vec!["ours".to_owned()],
        ..NatsConfig::default()
    })
    .await;
    let client = client(server.address).await;
    let message = |host: &str, segment: &str| {
        format!(
            r#"{{"host":"10.0.0.1","port":80,"uris":["{host}"],"isolation_segment":"{segment}"}}"#
        )
    };
    for (host, segment) in [("a.x", "theirs"), ("b.x", "ours"), ("c.x", "")] {
        publish(&client, "router.register", message(host, segment)).await;
    }
    // Of another segment, it cannot mean this instance.
    publish(&client, "router.unregister", message("b.x", "theirs")).await;
    publish(&client, "router.register", message("d.x", "ours")).await;
    gateway
        .until("the last is served", |snapshot, _| {
            snapshot.hosts.contains("d.x")
        })
        .await;
    let snapshot = gateway.published.load();
    assert!(snapshot.hosts.contains("b.x") && snapshot.hosts.contains("c.x"));
    assert!(!snapshot.hosts.contains("a.x"));
    assert_eq!(gateway.metrics.nats_other_segments.get(), 2);
}
