use std::net::Ipv4Addr;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::config::HealthConfig;
use crate::health::state::{FIRST_BACKOFF, MIN_UNANSWERED};
use crate::route::table::RouteTable;
use crate::route::{Backend, Origin, Pool, Proto, RouteEvent, Vip, wire};

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(60);

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
        path: "/health?deep".to_owned(),
        host: Some("checks.example.com".to_owned()),
        status: "200-299,302".parse().unwrap(),
        concurrency: 2,
        ..HealthConfig::default()
    };
    Config {
        health,
        ..Config::default()
    }
}

struct Running {
    published: Published,
    events: mpsc::Receiver<Event>,
    metrics: Arc<Metrics>,
    reload: watch::Sender<Arc<Config>>,
    reports: mpsc::Sender<Unanswered>,
}

/// Starts the checker on one backend.
fn start(config: Config, address: SocketAddr) -> Running {
    let published = Published::default();
    publish(&published, address);
    let (inbox, events) = mpsc::channel(8);
    let metrics = Arc::<Metrics>::default();
    let (reload, configured) = watch::channel(Arc::new(config));
    let (reports, reported) = mpsc::channel(8);
    tokio::spawn(run(
        Arc::clone(&published),
        inbox,
        Arc::clone(&metrics),
        configured,
        reported,
        Tunnels::default(),
    ));
    Running {
        published,
        events,
        metrics,
        reload,
        reports,
    }
}

impl Running {
    /// The next change of health.
    async fn told(&mut self) -> (SocketAddr, bool) {
        let event = tokio::time::timeout(PATIENCE, self.events.recv()).await;
        match event.expect("in time").expect("the checker runs") {
            Event::Health { backend, healthy } => (backend, healthy),
            other => panic!("{other:?}"),
        }
    }
}

async fn closed_port() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

fn unanswered(backend: SocketAddr) -> Unanswered {
    Unanswered {
        backend,
        syns: MIN_UNANSWERED,
        answered: 0,
    }
}

#[tokio::test]
async fn a_backend_that_refuses_is_down_until_it_is_gone() {
    let address = closed_port().await;
    let mut running = start(config(HealthCheck::Tcp), address);
    assert_eq!(running.told().await, (address, false));
    assert!(running.metrics.probes_bad.get() >= 2);
    running.published.store(Arc::new(Snapshot {
        revision: 9,
        ..Snapshot::default()
    }));
    assert_eq!(running.told().await, (address, true));
    assert_eq!(running.metrics.health_targets.get(), 0);
}

#[tokio::test]
async fn a_reload_to_no_checks_holds_nobody_down() {
    let address = closed_port().await;
    let mut running = start(config(HealthCheck::Tcp), address);
    assert_eq!(running.told().await, (address, false));
    let none = Arc::new(config(HealthCheck::None));
    running.reload.send(none).unwrap();
    assert_eq!(running.told().await, (address, true));
}

#[tokio::test]
async fn an_http_check_goes_by_the_status() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut running = start(config(HealthCheck::Http), address);
    let answer = async |answer: &str| {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = [0; 512];
        let length = stream.read(&mut request).await.unwrap();
        let request = std::str::from_utf8(&request[..length]).unwrap();
        assert!(
            request.starts_with("GET /health?deep HTTP/1.1\r\n"),
            "{request}"
        );
        assert!(
            request.contains("host: checks.example.com\r\n"),
            "{request}"
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
    };
    let status = |status: u16| format!("HTTP/1.1 {status} x\r\ncontent-length: 0\r\n\r\n");
    for good_or_not in [200, 503, 302, 301] {
        answer(&status(good_or_not)).await;
    }
    let endless = format!("HTTP/1.1 200 x\r\nx: {}", "x".repeat(20_000));
    answer(&endless).await;
    assert_eq!(running.told().await, (address, false));
    answer(&status(204)).await;
    assert_eq!(running.told().await, (address, true));
}

#[tokio::test]
async fn unanswered_syns_take_a_backend_out_where_nothing_is_checked() {
    let address = closed_port().await;
    let mut running = start(config(HealthCheck::None), address);
    running.reports.send(unanswered(address)).await.unwrap();
    assert_eq!(running.told().await, (address, false));
    let answered = Unanswered {
        answered: 1,
        ..unanswered(address)
    };
    running.reports.send(answered).await.unwrap();
    assert_eq!(running.told().await, (address, true));
    running.reports.send(unanswered(address)).await.unwrap();
    assert_eq!(running.told().await, (address, false));
    let mut off = config(HealthCheck::None);
    off.health.passive = false;
    running.reload.send(Arc::new(off)).unwrap();
    assert_eq!(running.told().await, (address, true));
    assert_eq!(running.metrics.passive_ejections.get(), 2);
}

/// A checker whose task is the test, and what the agent hears of it.
fn checker(health: HealthConfig) -> (Checker, mpsc::Receiver<Event>) {
    let (inbox, events) = mpsc::channel(1024);
    let config = Config {
        health,
        ..Config::default()
    };
    let checker = Checker::new(Arc::new(config), inbox, Arc::default(), Tunnels::default());
    (checker, events)
}

#[tokio::test]
async fn a_target_that_returns_during_its_probe_is_probed_once_at_a_time() {
    let (mut checker, _events) = checker(config(HealthCheck::Tcp).health);
    let address = "127.0.0.1:1".parse().unwrap();
    let published = Published::default();
    let mut table = publish(&published, address);
    let there = published.load_full();
    let gone = Arc::new(Snapshot {
        revision: there.revision + 1,
        ..Snapshot::default()
    });
    let now = Instant::now();
    checker.follow(there, now).await;
    checker.probe_due(now + checker.config.health.interval);
    assert_eq!((checker.probes.len(), checker.due.len()), (1, 0));
    checker.follow(gone, now).await;
    table.snapshot();
    checker.follow(Arc::new(table.snapshot()), now).await;
    assert_eq!(checker.due.len(), 1, "the new target has its own time");
    let probed = checker.probes.join_next().await.unwrap().unwrap();
    checker.probed(probed, now).await;
    assert_eq!(
        checker.due.len(),
        1,
        "the old target's probe schedules nothing"
    );
    assert_eq!(checker.targets[&address].state, State::default());
}

/// `count` backends of one VIP, each at a loopback address of its own.
fn loopback_pool(count: u32, port: u16) -> Arc<Snapshot> {
    let backends = (0..count).map(|number| {
        let ip = Ipv4Addr::from(0x7f01_0000 + number);
        Arc::new(Backend::new((ip, port).into(), Origin::Nats))
    });
    let pool = Pool {
        backends: backends.collect(),
        ..Pool::default()
    };
    let vip = Vip::new(Proto::Tcp, SocketAddr::from(([192, 0, 2, 1], 80)));
    Arc::new(Snapshot {
        revision: 1,
        vips: imbl::OrdMap::unit(vip, Arc::new(pool)),
        ..Snapshot::default()
    })
}

/// Connections of this host in TIME_WAIT that have the port on either side (proc_pid_net(5)).
fn in_time_wait(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let port = format!(":{port:04X}");
    let is_it = |line: &&str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        columns[3] == "06" && (columns[1].ends_with(&port) || columns[2].ends_with(&port))
    };
    table.lines().filter(is_it).count()
}

#[tokio::test]
async fn twenty_thousand_backends_are_each_checked_on_bounded_sockets() {
    const BACKENDS: u32 = 20_000;
    const AT_ONCE: usize = 64;
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let accept = tokio::spawn(async move {
        let mut seen = HashSet::new();
        while seen.len() < BACKENDS as usize {
            let (stream, _) = listener.accept().await.unwrap();
            seen.insert(stream.local_addr().unwrap().ip());
        }
    });
    let (mut checker, _events) = checker(HealthConfig {
        check: HealthCheck::Tcp,
        interval: Duration::from_secs(3600),
        timeout: PATIENCE,
        concurrency: AT_ONCE,
        ..HealthConfig::default()
    });
    let start = Instant::now();
    let snapshot = loopback_pool(BACKENDS, port);
    checker.follow(Arc::clone(&snapshot), start).await;
    let interval = checker.config.health.interval;
    let now = start + interval;
    loop {
        checker.probe_due(now);
        assert!(checker.probes.len() <= AT_ONCE);
        let Some(probed) = checker.probes.join_next().await else {
            break;
        };
        checker.probed(probed.unwrap(), now).await;
    }
    tokio::time::timeout(PATIENCE, accept)
        .await
        .expect("every backend was connected to")
        .unwrap();
    let metrics = &checker.metrics;
    assert_eq!(metrics.probes_good.get(), u64::from(BACKENDS));
    assert_eq!(metrics.probes_delayed.get(), u64::from(BACKENDS) - 64);
    assert_eq!(in_time_wait(port), 0);
    assert_eq!(checker.due.len(), BACKENDS as usize);
    let (first, last) = (checker.due.first().unwrap(), checker.due.last().unwrap());
    assert!(first.0 >= now + interval.mul_f64(0.9) && last.0 <= now + interval.mul_f64(1.1));
}

#[tokio::test]
async fn first_checks_are_spread_over_the_interval() {
    let (mut checker, _events) = checker(config(HealthCheck::Tcp).health);
    let start = Instant::now();
    let spread = |checker: &Checker, since: Instant| {
        let mut tenths = [0; 10];
        for (at, _) in &checker.due {
            let part = (*at - since).div_duration_f64(checker.config.health.interval);
            tenths[(part * 10.0) as usize] += 1;
        }
        // 1000 expected, of a standard deviation of 30.
        assert!(
            tenths.iter().all(|count| (800..1200).contains(count)),
            "{tenths:?}"
        );
    };
    checker.follow(loopback_pool(10_000, 1), start).await;
    spread(&checker, start);
    let mut slower = config(HealthCheck::Tcp);
    slower.health.interval = Duration::from_secs(3600);
    let later = start + Duration::from_secs(1);
    checker.reload(Arc::new(slower), later).await;
    spread(&checker, later);
}

#[tokio::test]
async fn beyond_the_bound_backends_wait_for_room() {
    let (mut checker, _events) = checker(config(HealthCheck::Tcp).health);
    let now = Instant::now();
    checker
        .follow(loopback_pool(MAX_TARGETS as u32 + 3, 1), now)
        .await;
    let sizes = |checker: &Checker| {
        (
            checker.targets.len(),
            checker.metrics.health_unchecked.get(),
        )
    };
    assert_eq!(sizes(&checker), (MAX_TARGETS, 3));
    let some: Vec<Changed> = checker.targets.keys().take(2).map(|a| (*a, None)).collect();
    checker.take_in(some, now).await;
    assert_eq!(sizes(&checker), (MAX_TARGETS, 1));
    assert_eq!(checker.due.len(), MAX_TARGETS);
}

#[tokio::test]
async fn a_good_check_overrules_reports_and_is_repeated_at_once() {
    let (mut checker, mut events) = checker(config(HealthCheck::Tcp).health);
    let now = Instant::now();
    checker.follow(loopback_pool(1, 1), now).await;
    let (address, target) = checker.take_due().unwrap();
    let generation = target.generation;
    let probed = |good| Probed {
        address,
        generation,
        outcome: if good { Outcome::Good } else { Outcome::Bad },
    };
    checker.probed(probed(true), now).await;
    assert!(checker.next_probe().unwrap() > now);
    checker.reported(unanswered(address), now).await;
    assert_eq!(checker.next_probe(), Some(now));
    assert_eq!(checker.metrics.passive_overruled.get(), 1);
    assert!(events.try_recv().is_err());
    // One bad check does not take it out, but vouches for nothing either.
    checker.take_due();
    checker.probed(probed(false), now).await;
    checker.reported(unanswered(address), now).await;
    assert!(matches!(
        events.try_recv(),
        Ok(Event::Health { healthy: false, .. })
    ));
    checker.take_due();
    checker.probed(probed(true), now).await;
    assert!(matches!(
        events.try_recv(),
        Ok(Event::Health { healthy: true, .. })
    ));
}

/// What may happen to a checker of a few backends.
#[derive(Clone, Debug)]
enum Step {
    Join(u8),
    Leave(u8),
    /// The check that is due first ends: well, badly, or not at all.
    Checked(Option<bool>),
    Reported {
        backend: u8,
        syns: u64,
        answered: u64,
    },
    Seconds(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let backend = 0u8..5;
    prop_oneof![
        2 => backend.clone().prop_map(Step::Join),
        1 => backend.clone().prop_map(Step::Leave),
        8 => prop::option::weighted(0.9, any::<bool>()).prop_map(Step::Checked),
        4 => (backend, 0u64..6, prop_oneof![3 => Just(0u64), 1 => Just(1)])
            .prop_map(|(backend, syns, answered)| Step::Reported { backend, syns, answered }),
        2 => (0u64..12).prop_map(Step::Seconds),
    ]
}

/// Everything that was seen of one backend, and what follows from it by looking at all of it again.
#[derive(Default)]
struct History {
    /// Checks since it joined; `None`: it is not a member.
    checks: Option<Vec<bool>>,
    passive: Passive,
}

impl History {
    fn checked_healthy(&self) -> bool {
        let mut healthy = true;
        let checks = self.checks.as_deref().unwrap_or_default();
        for end in 1..=checks.len() {
            let run = checks[..end]
                .iter()
                .rev()
                .take_while(|c| **c == checks[end - 1]);
            match (checks[end - 1], run.count()) {
                (true, 2..) => healthy = true,
                (false, 3..) => healthy = false,
                _ => {}
            }
        }
        healthy
    }

    fn vouched(&self) -> bool {
        let last = self.checks.as_ref().and_then(|checks| checks.last());
        self.checked_healthy() && last == Some(&true)
    }
}

fn address(backend: u8) -> SocketAddr {
    ([10, 0, 0, backend], 80).into()
}

async fn hold_against_histories(steps: Vec<Step>) {
    let (mut checker, mut events) = checker(HealthConfig {
        check: HealthCheck::Tcp,
        rise: 2,
        fall: 3,
        ..HealthConfig::default()
    });
    let mut now = Instant::now();
    let mut histories: HashMap<SocketAddr, History> = HashMap::new();
    let mut agent = HashSet::new();
    for step in steps {
        match step {
            Step::Join(backend) => {
                let address = address(backend);
                checker
                    .take_in(vec![(address, Some(Takes::Tcp))], now)
                    .await;
                histories
                    .entry(address)
                    .or_default()
                    .checks
                    .get_or_insert_default();
            }
            Step::Leave(backend) => {
                let address = address(backend);
                if let Some(history) = histories.get_mut(&address)
                    && history.checks.take().is_some()
                {
                    checker.take_in(vec![(address, None)], now).await;
                }
            }
            Step::Checked(good) => {
                let Some((address, target)) = checker.take_due() else {
                    continue;
                };
                let outcome = match good {
                    Some(true) => Outcome::Good,
                    Some(false) => Outcome::Bad,
                    None => Outcome::Unmade(std::io::ErrorKind::Other.into()),
                };
                let generation = target.generation;
                let probed = Probed {
                    address,
                    generation,
                    outcome,
                };
                checker.probed(probed, now).await;
                let history = histories.get_mut(&address).unwrap();
                history.checks.as_mut().unwrap().extend(good);
                if history.vouched() {
                    history.passive = Passive::Trusted;
                }
            }
            Step::Reported {
                backend,
                syns,
                answered,
            } => {
                let backend = address(backend);
                let report = Unanswered {
                    backend,
                    syns,
                    answered,
                };
                checker.reported(report, now).await;
                let history = histories.entry(backend).or_default();
                let vouched = history.vouched();
                history.passive = history.passive.observe(report, vouched, now.into_std());
            }
            Step::Seconds(seconds) => {
                now += Duration::from_secs(seconds);
                checker.end_backoffs(now).await;
                for history in histories.values_mut() {
                    history.passive = history.passive.at(now.into_std());
                }
            }
        }
        while let Ok(event) = events.try_recv() {
            let Event::Health { backend, healthy } = event else {
                panic!("{event:?}");
            };
            let news = if healthy {
                agent.remove(&backend)
            } else {
                agent.insert(backend)
            };
            assert!(news, "{backend} was told twice");
        }
        let down = histories.iter().filter(|(_, history)| {
            history.passive.is_out() || history.checks.is_some() && !history.checked_healthy()
        });
        let down: HashSet<SocketAddr> = down.map(|(address, _)| *address).collect();
        assert_eq!(agent, down);
        let due = checker
            .targets
            .iter()
            .filter_map(|(address, t)| Some((t.due?, *address)));
        assert_eq!(due.collect::<BTreeSet<_>>(), checker.due);
        let members = histories
            .values()
            .filter(|history| history.checks.is_some());
        assert_eq!(checker.due.len(), members.count(), "each is due, once");
        assert!(
            checker
                .suspects
                .values()
                .all(|passive| *passive != Passive::Trusted)
        );
    }
}

proptest! {
    #[test]
    fn the_agent_knows_what_all_that_was_seen_amounts_to(
        steps in prop::collection::vec(step(), 0..120),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(hold_against_histories(steps));
    }
}

#[tokio::test]
async fn what_was_taken_out_returns_by_time() {
    let (mut checker, mut events) = checker(config(HealthCheck::None).health);
    let now = Instant::now();
    checker.reported(unanswered(address(1)), now).await;
    assert!(matches!(
        events.try_recv(),
        Ok(Event::Health { healthy: false, .. })
    ));
    checker.end_backoffs(now + FIRST_BACKOFF / 2).await;
    assert!(events.try_recv().is_err());
    checker.end_backoffs(now + FIRST_BACKOFF).await;
    assert!(matches!(
        events.try_recv(),
        Ok(Event::Health { healthy: true, .. })
    ));
    let long_after = now + FIRST_BACKOFF + state::MAX_BACKOFF;
    checker.end_backoffs(long_after).await;
    assert!(checker.suspects.is_empty());
}
