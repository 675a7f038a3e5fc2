use std::net::SocketAddr;

use tokio::sync::watch;

use super::*;
use crate::agent::Agent;
use crate::config::Config;
use crate::event::INBOX_DEPTH;
use crate::metrics::Metrics;
use crate::rejects::Rejects;
use crate::route::{RouteKey, Vip};
use crate::snapshot::{Published, Snapshot};
use crate::source::nats_server::{Server, until};

/// A server with JetStream, which keeps what it has in a folder.
async fn server(port: Option<u16>, store: &tempfile::TempDir) -> Server {
    let store = store.path().to_str().unwrap();
    Server::start_with(port, &["-js", "-sd", store]).await
}

struct Gateway {
    published: Published,
    metrics: Arc<Metrics>,
    rejects: Arc<Rejects>,
    reload: watch::Sender<Arc<Config>>,
}

fn config(server: SocketAddr) -> Config {
    let mut config = Config::default();
    config.nats.servers = vec![format!("nats://{server}")];
    config.l4.vip_ranges = vec!["192.0.2.0/24".parse().unwrap()];
    config
}

impl Gateway {
    async fn start(server: SocketAddr) -> Gateway {
        let (events, gateway) = Gateway::without_agent(server).await;
        let config = Arc::clone(&gateway.reload.borrow());
        let (reports, _) = mpsc::channel(1);
        let agent = Agent::new(
            &config,
            Arc::clone(&gateway.published),
            None,
            reports,
            Arc::clone(&gateway.metrics),
        );
        tokio::spawn(agent.run(events));
        gateway
    }

    /// One whose agent is the test.
    async fn without_agent(server: SocketAddr) -> (mpsc::Receiver<Event>, Gateway) {
        Gateway::of(config(server)).await
    }

    async fn of(fixed: Config) -> (mpsc::Receiver<Event>, Gateway) {
        let (reload, config) = watch::channel(Arc::new(fixed.clone()));
        let (inbox, events) = mpsc::channel(INBOX_DEPTH);
        let gateway = Gateway {
            published: Published::default(),
            metrics: Arc::default(),
            rejects: Arc::default(),
            reload,
        };
        let context = Context {
            inbox,
            metrics: Arc::clone(&gateway.metrics),
            rejects: Arc::clone(&gateway.rejects),
            config,
        };
        start(&fixed.nats, context).await.unwrap();
        (events, gateway)
    }

    async fn until(&self, what: &str, holds: impl Fn(&Snapshot, &Metrics) -> bool) {
        until(what, || {
            holds(&self.published.load(), &self.metrics).then_some(())
        })
        .await;
    }

    async fn is(&self, state: State) {
        let is = |_: &Snapshot, metrics: &Metrics| metrics.kv.state() == state;
        self.until(&format!("the bucket is {state:?}"), is).await;
    }

    async fn serves(&self, host: &str) {
        let served = |snapshot: &Snapshot, _: &Metrics| snapshot.hosts.contains(host);
        self.until(&format!("{host} is served"), served).await;
    }

    async fn serves_not(&self, host: &str) {
        let gone = |snapshot: &Snapshot, _: &Metrics| !snapshot.hosts.contains(host);
        self.until(&format!("{host} is gone"), gone).await;
    }
}

/// The bucket as another program has it.
async fn bucket(server: SocketAddr) -> jetstream::kv::Store {
    let client = async_nats::connect(server.to_string()).await.unwrap();
    let jetstream = jetstream::new(client);
    create(&jetstream, "viaduct").await.unwrap();
    jetstream.get_key_value("viaduct").await.unwrap()
}

fn route(host: &str) -> bytes::Bytes {
    format!(r#"{{"uris": ["{host}"], "backend": [{{"address": "10.0.0.1:80"}}]}}"#).into()
}

#[tokio::test]
async fn all_who_make_the_bucket_at_the_same_moment_have_it() {
    let store = tempfile::tempdir().unwrap();
    let server = server(None, &store).await;
    let made = futures_util::future::join_all((0..16).map(|_| bucket(server.address))).await;
    for bucket in made {
        bucket.put("route.a", route("a.x")).await.unwrap();
    }
}

#[tokio::test]
async fn the_bucket_is_made_read_whole_and_followed() {
    let store = tempfile::tempdir().unwrap();
    let server = server(None, &store).await;
    let gateway = Gateway::start(server.address).await;
    gateway.is(State::Followed).await;
    let bucket = bucket(server.address).await;

    bucket.put("route.a", route("a.x")).await.unwrap();
    gateway.serves("a.x").await;
    let revision = bucket.put("route.a", route("b.x")).await.unwrap();
    gateway.serves("b.x").await;
    gateway.serves_not("a.x").await;
    let key = RouteKey::Http(crate::route::wire::parse_uri("b.x").unwrap());
    let declarers = gateway.metrics.kv.revisions.of(&key);
    assert_eq!(declarers.len(), 1);
    assert_eq!(
        (&*declarers[0].key, declarers[0].revision),
        ("route.a", revision)
    );

    bucket.put("route.c", route("c.x")).await.unwrap();
    bucket.put("route.d", route("d.x")).await.unwrap();
    gateway.serves("d.x").await;
    bucket.delete("route.a").await.unwrap();
    bucket.purge("route.c").await.unwrap();
    gateway.serves_not("b.x").await;
    gateway.serves_not("c.x").await;
    gateway.serves("d.x").await;

    // One that comes later knows the same.
    let other = Gateway::start(server.address).await;
    other.is(State::Followed).await;
    other.serves("d.x").await;
    assert_eq!(other.published.load().hosts.len(), 1);
    assert_eq!(other.metrics.kv_keys.get(), 1);
}

#[tokio::test]
async fn what_changed_while_nats_was_away_is_caught_up_with_and_nothing_is_lost_before() {
    let store = tempfile::tempdir().unwrap();
    let first = server(None, &store).await;
    let port = Some(first.address.port());
    let gateway = Gateway::start(first.address).await;
    let declared = bucket(first.address).await;
    for host in ["stays", "goes", "changes"] {
        let key = format!("route.{host}");
        declared
            .put(key, route(&format!("{host}.x")))
            .await
            .unwrap();
        gateway.serves(&format!("{host}.x")).await;
    }
    drop(first);
    gateway.is(State::Lost).await;
    assert_eq!(gateway.published.load().hosts.len(), 3);

    // Somebody else's port in between: the gateway does not see these changes happen.
    let aside = server(None, &store).await;
    let declared = bucket(aside.address).await;
    declared.delete("route.goes").await.unwrap();
    declared
        .put("route.changes", route("changed.x"))
        .await
        .unwrap();
    declared.put("route.new", route("new.x")).await.unwrap();
    drop(aside);
    assert_eq!(gateway.published.load().hosts.len(), 3);
    let _again = server(port, &store).await;
    gateway.serves("new.x").await;
    gateway.serves("changed.x").await;
    gateway.serves_not("goes.x").await;
    gateway.serves_not("changes.x").await;
    gateway.serves("stays.x").await;
    gateway.is(State::Followed).await;
}

#[tokio::test]
async fn a_bucket_that_is_lost_takes_no_route_with_it() {
    let store = tempfile::tempdir().unwrap();
    let first = server(None, &store).await;
    let port = Some(first.address.port());
    let gateway = Gateway::start(first.address).await;
    let declared = bucket(first.address).await;
    declared.put("route.a", route("a.x")).await.unwrap();
    gateway.serves("a.x").await;
    drop(first);
    gateway.is(State::Lost).await;

    // Its disk is another.
    let store = tempfile::tempdir().unwrap();
    let second = server(port, &store).await;
    gateway
        .until("it is connected again", |_, metrics| {
            metrics.kv.state() == State::Lost
        })
        .await;
    let declared = bucket(second.address).await;
    declared.put("route.b", route("b.x")).await.unwrap();
    gateway.serves("b.x").await;
    gateway.serves_not("a.x").await;
}

#[tokio::test]
async fn a_refused_value_leaves_what_its_key_declared_and_is_listed() {
    let store = tempfile::tempdir().unwrap();
    let server = server(None, &store).await;
    let gateway = Gateway::start(server.address).await;
    let bucket = bucket(server.address).await;
    bucket.put("route.a", route("a.x")).await.unwrap();
    gateway.serves("a.x").await;
    let garbage: [(&str, bytes::Bytes); 6] = [
        (
            "route.a",
            r#"{"uris": ["b.x"], "backend": [{"address": "no"}]}"#.into(),
        ),
        ("route.b", vec![0xff, 0xfe, 0x00].into()),
        ("route.c", "".into()),
        ("vip.tcp.203.0.113.1.80", "{}".into()),
        ("vip.sctp.192.0.2.1.80", "{}".into()),
        ("something/else", "{}".into()),
    ];
    for (key, value) in &garbage {
        bucket.put(key, value.clone()).await.unwrap();
    }
    let all = |_: &Snapshot, metrics: &Metrics| metrics.kv_rejects.get() == garbage.len() as u64;
    gateway.until("all are refused", all).await;
    let list = gateway.rejects.list();
    let mut listed: Vec<&str> = list.iter().map(|reject| &*reject.what).collect();
    listed.sort_unstable();
    let mut wanted = garbage.each_ref().map(|(key, _)| *key);
    wanted.sort_unstable();
    assert_eq!(listed, wanted);
    let of_a = list.iter().find(|reject| reject.what == "route.a").unwrap();
    assert!(of_a.why.starts_with("backend[0].address: "), "{}", of_a.why);
    assert!(gateway.published.load().hosts.contains("a.x"));

    bucket.put("route.b", route("b.x")).await.unwrap();
    gateway.serves("b.x").await;
    bucket.delete("route.c").await.unwrap();
    bucket.delete("route.a").await.unwrap();
    gateway.serves_not("a.x").await;
    assert_eq!(gateway.rejects.list().len(), garbage.len() - 3);
}

#[tokio::test]
async fn policies_of_vips_are_told_changed_and_withdrawn_and_the_configuration_wins() {
    let store = tempfile::tempdir().unwrap();
    let server = server(None, &store).await;
    let declared = bucket(server.address).await;
    declared
        .put("vip.tcp.192.0.2.1.80", r#"{"forwarding": "ipip"}"#.into())
        .await
        .unwrap();
    let (mut events, gateway) = Gateway::without_agent(server.address).await;
    let vip: Vip = "tcp/192.0.2.1:80".parse().unwrap();
    let mut told = async || loop {
        match events.recv().await.unwrap() {
            Event::VipPolicy { vip: of, policy } if of == vip => return policy,
            _ => {}
        }
    };
    use crate::config::{Forwarding, VipConfig};
    assert_eq!(told().await.unwrap().forwarding, Some(Forwarding::Ipip));
    declared
        .put("vip.tcp.192.0.2.1.80", r#"{"forwarding": "gue"}"#.into())
        .await
        .unwrap();
    assert_eq!(told().await.unwrap().forwarding, Some(Forwarding::Gue));
    declared.delete("vip.tcp.192.0.2.1.80").await.unwrap();
    assert_eq!(told().await, None);

    // The configuration takes it over, and gives it back.
    let mut changed = config(server.address);
    changed.l4.vip = vec![VipConfig::new(vip)];
    gateway.reload.send(Arc::new(changed)).unwrap();
    declared
        .put("vip.tcp.192.0.2.1.80", r#"{"forwarding": "dsr"}"#.into())
        .await
        .unwrap();
    until("it is refused", || {
        let list = gateway.rejects.list();
        list.iter().any(|r| r.why.contains("wins")).then_some(())
    })
    .await;
    gateway
        .reload
        .send(Arc::new(config(server.address)))
        .unwrap();
    assert_eq!(told().await.unwrap().forwarding, Some(Forwarding::Dsr));
    assert!(gateway.rejects.list().is_empty());
    // What is outside leaves.
    let mut changed = config(server.address);
    changed.l4.vip_ranges.clear();
    gateway.reload.send(Arc::new(changed)).unwrap();
    assert_eq!(told().await, None);
}

#[tokio::test]
async fn values_whose_time_is_over_are_forgotten() {
    let store = tempfile::tempdir().unwrap();
    let server = server(None, &store).await;
    let client = async_nats::connect(server.address.to_string())
        .await
        .unwrap();
    let jetstream = jetstream::new(client);
    let aged = stream::Config {
        max_age: Duration::from_secs(2),
        ..stream_config("viaduct")
    };
    jetstream.create_stream(aged).await.unwrap();
    let declared = jetstream.get_key_value("viaduct").await.unwrap();
    let gateway = Gateway::start(server.address).await;
    declared.put("route.a", route("a.x")).await.unwrap();
    gateway.serves("a.x").await;
    gateway.serves_not("a.x").await;
}

#[tokio::test]
async fn a_server_mark_takes_a_value_away() {
    let store = tempfile::tempdir().unwrap();
    let server = server(None, &store).await;
    let gateway = Gateway::start(server.address).await;
    let declared = bucket(server.address).await;
    declared.put("route.a", route("a.x")).await.unwrap();
    gateway.serves("a.x").await;
    // As a server from 2.11 puts it.
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Nats-Marker-Reason", "MaxAge");
    let client = async_nats::connect(server.address.to_string())
        .await
        .unwrap();
    client
        .publish_with_headers("$KV.viaduct.route.a", headers, "".into())
        .await
        .unwrap();
    client.flush().await.unwrap();
    gateway.serves_not("a.x").await;
}

#[tokio::test]
async fn a_server_without_jetstream_is_no_fault() {
    let server = Server::start(None).await;
    let gateway = Gateway::start(server.address).await;
    gateway.is(State::Off).await;
}

#[tokio::test]
async fn a_server_that_does_not_permit_it_is_as_one_without() {
    let store = tempfile::tempdir().unwrap();
    let configuration = format!(
        "jetstream {{ store_dir: {:?} }}
         authorization {{ users: [ {{ user: u, password: p, permissions: {{ publish: {{ deny: \"$JS.API.>\" }} }} }} ] }}",
        store.path()
    );
    let server = Server::start_configured(None, &configuration).await;
    let mut config = config(server.address);
    config.nats.user = Some("u".to_owned());
    config.nats.password = Some(toml::Value::String("p".to_owned()).try_into().unwrap());
    let (_events, gateway) = Gateway::of(config).await;
    gateway.is(State::Off).await;
}

#[tokio::test]
async fn a_thousand_keys_come_in_one_reading_and_in_order() {
    let store = tempfile::tempdir().unwrap();
    let server = server(None, &store).await;
    let declared = bucket(server.address).await;
    for n in 0..1000 {
        let value = route(&format!("h{n}.x"));
        declared.put(format!("route.{n}"), value).await.unwrap();
    }
    let gateway = Gateway::start(server.address).await;
    gateway
        .until("all are served", |snapshot, _| snapshot.hosts.len() == 1000)
        .await;
    // The last word holds.
    for n in 0..50 {
        let value = route(&format!("last{n}.x"));
        declared.put("route.0", value).await.unwrap();
    }
    gateway.serves("last49.x").await;
    let exact = |snapshot: &Snapshot, _: &Metrics| snapshot.hosts.len() == 1000;
    gateway.until("each key has one route", exact).await;
}

#[tokio::test]
async fn entries_are_written_over_the_revision_that_was_read_and_over_no_other() {
    use crate::source::kv::store::{Entry, Store, Written};
    let store = tempfile::tempdir().unwrap();
    let server = server(None, &store).await;
    let nats = config(server.address).nats;
    let mut store = Store::open(&nats).await.unwrap();
    assert_eq!(store.entry("route.a").await.unwrap(), Entry::default());
    assert_eq!(store.entries().await.unwrap(), []);

    for (at, wanted) in [
        (0, Written::At(1)),
        (0, Written::Conflict),
        (1, Written::At(2)),
    ] {
        let value = route(&format!("at{at}.x"));
        assert_eq!(store.put("route.a", value, at).await.unwrap(), wanted);
    }
    assert_eq!(store.delete("route.a", 1).await.unwrap(), Written::Conflict);
    let entry = store.entry("route.a").await.unwrap();
    assert_eq!((entry.revision, entry.value), (2, Some(route("at1.x"))));
    assert_eq!(store.entries().await.unwrap().len(), 1);
    assert_eq!(store.delete("route.a", 2).await.unwrap(), Written::At(3));
    let gone = Entry {
        revision: 3,
        value: None,
    };
    assert_eq!(store.entry("route.a").await.unwrap(), gone);
    assert_eq!(store.entries().await.unwrap(), []);
    let again = store.put("route.a", route("a.x"), 3).await.unwrap();
    assert_eq!(again, Written::At(4));
    let without = Server::start(None).await;
    let error = Store::open(&config(without.address).nats)
        .await
        .err()
        .unwrap();
    assert!(
        format!("{error:#}").contains("has no JetStream"),
        "{error:#}"
    );
}

#[tokio::test]
async fn routes_and_policies_that_rules_give_to_others_are_refused() {
    let store = tempfile::tempdir().unwrap();
    let server = server(None, &store).await;
    let gateway = Gateway::start(server.address).await;
    gateway.is(State::Followed).await;
    let bucket = bucket(server.address).await;
    let mut guarded = crate::config::parse(
        "[[guard.owner]]\nhosts = ['*.x']\nvips = ['192.0.2.0/24']\nsources = ['file']",
    )
    .unwrap();
    guarded.nats = config(server.address).nats;
    guarded.l4 = config(server.address).l4;
    gateway.reload.send_replace(Arc::new(guarded));
    bucket.put("route.a", route("a.x")).await.unwrap();
    bucket
        .put("vip.tcp.192.0.2.1.80", "{}".into())
        .await
        .unwrap();
    bucket.put("route.c", route("c.y")).await.unwrap();
    gateway.serves("c.y").await;
    assert!(!gateway.published.load().hosts.contains("a.x"));
    let list = gateway.rejects.list();
    for (key, field) in [
        ("route.a", "uris: a.x"),
        ("vip.tcp.192.0.2.1.80", "vips: tcp/"),
    ] {
        let told = list.iter().find(|reject| reject.what == key);
        let why = &told.unwrap_or_else(|| panic!("{key}: {list:?}")).why;
        assert!(
            why.contains(field) && why.contains("guard.owner[0]"),
            "{why}"
        );
    }
}
