use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use http::{HeaderName, HeaderValue, Method, StatusCode};
use proptest::prelude::*;

use super::file::{self, Unread};
use super::*;
use crate::admin::listing::{self, PageRequest};
use crate::metrics::Metrics;
use crate::route::Instance;
use crate::route::conditions::{Condition, Conditions, ValueMatch};
use crate::route::policy::{HashKey, HashOf, HeaderEdits, HttpPolicy, PathRewrite, Rate, Redirect};
use crate::route::table::RouteTable;
use crate::route::{
    Backend, BackendTls, Balance, Declaration, HttpMatch, HttpProtocol, Origin, Registration,
    RouteEvent, RouteKey, TlsRoots, Unregistration, Withdrawal,
};
use crate::snapshot::{Published, Snapshot};

const THRESHOLD: Duration = Duration::from_secs(120);

fn http(host: &str, path: &str) -> HttpMatch {
    HttpMatch {
        host: host.into(),
        path: path.into(),
        conditions: None,
    }
}

fn register(routes: Vec<RouteKey>, backend: Backend) -> RouteEvent {
    RouteEvent::Register(Registration {
        routes,
        backend: Arc::new(backend),
        stale_after: None,
        balance: None,
        route_service_url: None,
    })
}

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 8080))
}

fn snapshot(events: impl IntoIterator<Item = RouteEvent>) -> Snapshot {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    for event in events {
        table.apply(event, now);
    }
    table.snapshot()
}

fn encode(snapshot: &Snapshot) -> Vec<u8> {
    let mut content = Vec::new();
    let bytes = file::encode(&mut content, snapshot, None).unwrap();
    assert_eq!(bytes, content.len() as u64);
    content
}

/// All that is kept of a snapshot, whoever said it.
fn kept(snapshot: &Snapshot) -> BTreeMap<String, String> {
    let text = |value: &dyn std::fmt::Debug| {
        let mut text = format!("{value:?}");
        for origin in Origin::ALL {
            text = text.replace(&format!("origin: {origin:?}"), "origin");
        }
        text
    };
    let mut all = BTreeMap::new();
    for (host, routes) in snapshot.hosts.iter() {
        for route in routes.iter() {
            let key = format!("{host}{} {:?}", route.path, route.conditions);
            all.insert(key, text(route.pool));
        }
    }
    for (vip, pool) in &snapshot.vips {
        all.insert(vip.to_string(), text(pool));
    }
    for (route, said) in &snapshot.declared {
        all.insert(format!("declared {route:?}"), text(&said[0]));
    }
    all
}

fn full_backend() -> Backend {
    Backend {
        weight: 7,
        protocol: HttpProtocol::Http2,
        instance: Instance {
            app: Some("app".into()),
            id: Some("id".into()),
            index: Some("3".into()),
            availability_zone: Some("z1".into()),
            isolation_segment: Some("seg".into()),
            tags: BTreeMap::from([("a".into(), "b".into()), ("c".into(), "ä".into())]),
            tls: Some(BackendTls {
                server_name: Some("b.internal".into()),
                roots: TlsRoots::RouteServices,
            }),
        }
        .shared(),
        ..Backend::new("[2001:db8::7]:443".parse().unwrap(), Origin::Kv)
    }
}

fn full_policy() -> HttpPolicy {
    let header = |name, value| {
        (
            HeaderName::from_static(name),
            HeaderValue::from_bytes(value).unwrap(),
        )
    };
    let mut policy = HttpPolicy::new(Origin::Kv);
    policy.balance = Some(Balance::Hash(Arc::new(HashKey {
        of: HashOf::Cookie("sid".into()),
        balance_percent: Some(125),
    })));
    policy.route_service_url = Some("https://rs".into());
    policy.redirect = Some(Redirect {
        status: StatusCode::PERMANENT_REDIRECT,
        scheme: Some("https".into()),
        authority: None,
        path: Some(PathRewrite::Prefix("/x".into())),
    });
    policy.rewrite.host = Some(HeaderValue::from_static("in.ternal"));
    policy.rewrite.path = Some(PathRewrite::Full("/y".into()));
    policy.request_headers = HeaderEdits {
        remove: vec![HeaderName::from_static("x-gone")],
        set: vec![header("x-set", b"\xff1")],
        add: vec![header("x-add", b"2"), header("x-add", b"3")],
    };
    policy.response_headers.remove = vec![HeaderName::from_static("server")];
    policy.timeouts.total = Some(Duration::from_millis(1500));
    policy.retries.attempts = Some(4);
    policy.retries.methods = vec![Method::POST, Method::from_bytes(b"PURGE").unwrap()];
    policy.limits.request_body_bytes = Some(u64::MAX);
    policy.limits.client_rate = Some(Rate {
        per_second: 5,
        burst: 9,
    });
    policy.compression = true;
    policy
}

fn everything() -> Snapshot {
    let conditional = HttpMatch {
        conditions: Some(Arc::new(Conditions::new(
            vec!["GET".into()],
            vec![Condition {
                name: "x".into(),
                value: ValueMatch::Prefix("p".into()),
            }],
            vec![Condition {
                name: "q".into(),
                value: ValueMatch::Present,
            }],
        ))),
        ..http("*.example.com", "/a")
    };
    let vips = ["tcp/192.0.2.10:80", "udp/[2001:db8::1]:8000-8999"];
    let mut routes: Vec<RouteKey> = vips.map(|vip| RouteKey::Vip(vip.parse().unwrap())).into();
    routes.extend([conditional.clone(), http("a.b", "")].map(RouteKey::Http));
    let mut events: Vec<_> = [conditional, http("waits.for", "/backends")]
        .into_iter()
        .map(|route| {
            let policy = Arc::new(full_policy());
            RouteEvent::Declare(Declaration { route, policy })
        })
        .collect();
    events.push(RouteEvent::Register(Registration {
        routes,
        backend: Arc::new(full_backend()),
        stale_after: None,
        balance: Some(Balance::LeastConnections),
        route_service_url: Some("https://rs2".into()),
    }));
    snapshot(events)
}

#[test]
fn all_that_is_known_of_a_route_comes_back() {
    let before = everything();
    let kept_of = file::decode(encode(&before)).unwrap();
    let after = snapshot(kept_of.events);
    assert_eq!(kept(&after), kept(&before));
    let pools = after.vips.values().flat_map(|pool| &pool.backends);
    let backends: Vec<_> = pools.collect();
    assert!(
        backends
            .iter()
            .all(|backend| backend.origin == Origin::Adopted)
    );
    assert!(
        backends
            .iter()
            .all(|backend| Arc::ptr_eq(backend, backends[0]))
    );
}

#[test]
fn a_file_that_is_cut_or_changed_anywhere_is_refused() {
    let content = encode(&everything());
    for length in 0..content.len() {
        assert!(
            file::decode(content[..length].to_vec()).is_err(),
            "{length} bytes"
        );
    }
    for bit in 0..content.len() * 8 {
        let mut changed = content.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(file::decode(changed).is_err(), "bit {bit}");
    }
    let mut other = content.clone();
    other[7] = 9;
    assert_eq!(file::decode(other).unwrap_err(), "version 9, not 1");
    let longer = [&content[..], &[0]].concat();
    assert!(file::decode(longer).is_err());
}

fn config(directory: &std::path::Path) -> StateConfig {
    StateConfig {
        directory: Some(directory.to_owned()),
        interval: Duration::from_millis(1),
    }
}

fn files(directory: &std::path::Path) -> Vec<String> {
    let names = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_damaged_file_is_set_aside_and_the_start_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path();
    assert!(read(&StateConfig::default()).is_none());
    assert!(read(&config(directory)).is_none());
    for count in 1..=2 {
        fs::write(directory.join(FILE), b"VIADUCT\x01").unwrap();
        assert!(read(&config(directory)).is_none());
        let files = files(directory);
        assert_eq!(files.len(), count);
        assert!(
            files
                .iter()
                .all(|name| name.starts_with("routes.state.corrupt-"))
        );
    }
    file::write(directory, &everything(), None).unwrap();
    assert!(read(&config(directory)).is_some());
}

/// A crash while the new file is written leaves any part of it under its other name.
#[test]
fn a_crash_at_any_byte_of_a_writing_leaves_the_old_routes() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path();
    let old = everything();
    file::write(directory, &old, None).unwrap();
    let new = snapshot([register(
        vec![RouteKey::Http(http("new", ""))],
        Backend::new(address(1), Origin::Nats),
    )]);
    let content = encode(&new);
    for length in 0..=content.len() {
        fs::write(directory.join(NEW_FILE), &content[..length]).unwrap();
        let found = read(&config(directory)).unwrap();
        assert_eq!(kept(&snapshot(found.events)), kept(&old), "{length} bytes");
    }
    file::write(directory, &new, None).unwrap();
    let found = read(&config(directory)).unwrap();
    assert_eq!(kept(&snapshot(found.events)), kept(&new));
    assert_eq!(files(directory), [FILE]);
}

const CRASH_IN: &str = "VIADUCT_TEST_CRASH_IN";

/// Two states that no part of one and the other make together.
fn state(n: u8) -> Snapshot {
    snapshot((1..=200).map(|i| {
        let route = RouteKey::Http(http(&format!("h{i}"), ""));
        register(vec![route], Backend::new(address(n), Origin::Nats))
    }))
}

#[test]
fn a_writer_that_is_killed_leaves_one_state_or_the_other() {
    if let Some(directory) = std::env::var_os(CRASH_IN) {
        let states = [state(1), state(2)];
        for state in states.iter().cycle() {
            file::write(std::path::Path::new(&directory), state, None).unwrap();
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path();
    let states = [kept(&state(1)), kept(&state(2))];
    file::write(directory, &state(1), None).unwrap();
    for n in 0..20 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("last_known_good::tests::a_writer_that_is_killed_leaves_one_state_or_the_other")
            .env(CRASH_IN, directory)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Until it has written something, and then at whatever step it is.
        let seen = || fs::metadata(directory.join(FILE)).and_then(|found| found.modified());
        let before = seen().unwrap();
        while seen().unwrap() == before {
            assert!(child.try_wait().unwrap().is_none(), "the writer ended");
            std::thread::yield_now();
        }
        for _ in 0..n * 500 {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let found = read(&config(directory)).unwrap();
        assert!(states.contains(&kept(&snapshot(found.events))));
    }
}

#[test]
fn the_age_is_that_of_what_was_adopted_until_nothing_of_it_is_left() {
    let adopted = everything();
    let adopted = file::decode(encode(&adopted)).unwrap();
    let then = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let as_of = |snapshot: &Snapshot| {
        let mut content = Vec::new();
        file::encode(&mut content, snapshot, Some(then)).unwrap();
        file::decode(content).unwrap().as_of
    };
    assert_eq!(as_of(&snapshot(adopted.events)), then);
    assert!(as_of(&everything()) > then);
}

#[test]
fn what_cannot_be_read_is_not_called_damaged() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join(FILE)).unwrap();
    let unread = file::read(&folder.path().join(FILE));
    assert!(matches!(unread, Err(Unread::Unreadable(_))));
}

#[test]
fn one_process_writes_and_the_last_state_is_written_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let start = |snapshot: Snapshot| {
        let published = Published::default();
        published.store(Arc::new(snapshot));
        let metrics = Arc::<Metrics>::default();
        let mut config = config(folder.path());
        config.interval = Duration::from_secs(3600);
        let writer = super::start(&config, published, Arc::clone(&metrics));
        (writer.unwrap().unwrap(), metrics)
    };
    let other = fs::File::create(folder.path().join(LOCK)).unwrap();
    other.try_lock().unwrap();
    let (waits, metrics) = start(everything());
    waits.stop();
    assert_eq!(metrics.state.writes.get(), 0);
    drop(other);
    let (writes, metrics) = start(everything());
    writes.stop();
    assert_eq!(metrics.state.writes.get(), 1);
    assert!(read(&config(folder.path())).is_some());
}

fn event() -> impl Strategy<Value = RouteEvent> {
    let origins = [Origin::File, Origin::Kv, Origin::Nats, Origin::Redis];
    let parts = (0..5u8, 0..4u8, 1..4u8, 0..4u16, 0..origins.len());
    parts.prop_map(move |(kind, host, n, weight, origin)| {
        let origin = origins[origin];
        let (host, address) = (http(&format!("h{host}"), ""), address(n));
        let vip = RouteKey::Vip(format!("tcp/192.0.2.1:{n}").parse().unwrap());
        let routes = vec![RouteKey::Http(host.clone()), vip];
        match kind {
            0 | 1 => register(
                routes,
                Backend {
                    weight,
                    ..Backend::new(address, origin)
                },
            ),
            2 => RouteEvent::Unregister(Unregistration {
                routes,
                address,
                instance_id: None,
                origin,
            }),
            3 => {
                let mut policy = HttpPolicy::new(origin);
                policy.retries.attempts = Some(weight.into());
                RouteEvent::Declare(Declaration {
                    route: host,
                    policy: Arc::new(policy),
                })
            }
            _ => RouteEvent::Withdraw(Withdrawal {
                route: host,
                origin,
            }),
        }
    })
}

proptest! {
    #[test]
    fn any_table_comes_back_as_it_was(events in proptest::collection::vec(event(), 0..40)) {
        let before = snapshot(events);
        let found = file::decode(encode(&before)).unwrap();
        prop_assert_eq!(kept(&snapshot(found.events)), kept(&before));
    }

    #[test]
    fn two_gateways_that_are_told_the_same_agree(
        events in proptest::collection::vec(event(), 0..40),
        cut in 0..40usize,
    ) {
        // One is told all at once, the other publishes on the way.
        let now = Instant::now();
        let mut other = RouteTable::new(THRESHOLD, now);
        for (i, event) in events.iter().enumerate() {
            other.apply(event.clone(), now);
            if i == cut {
                other.snapshot();
            }
        }
        let (one, other) = (snapshot(events), other.snapshot());
        prop_assert_eq!(kept(&one), kept(&other));
        let list = |snapshot: &Snapshot| {
            let page = listing::routes(snapshot, &Default::default(), &PageRequest::default()).unwrap();
            let mut page = serde_json::to_value(page).unwrap();
            page.as_object_mut().unwrap().remove("revision");
            page
        };
        prop_assert_eq!(list(&one), list(&other));
    }

    #[test]
    fn whatever_the_bytes_are_they_are_refused(content in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(file::decode(content).is_err());
    }
}
