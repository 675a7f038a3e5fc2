use std::net::SocketAddr;

use proptest::prelude::*;

use super::*;
use crate::route::policy::HttpPolicy;
use crate::route::table::RouteTable;
use crate::route::{Backend, Declaration, HttpMatch, Registration, RouteKey, wire};

#[test]
fn backoff_grows_to_its_bound_and_varies() {
    for failures in 1..100 {
        let most = Duration::from_millis(100 << (failures - 1).min(16)).min(MAX_BACKOFF);
        assert!((most / 2..=most).contains(&backoff(failures)));
    }
    assert!(backoff(u32::MAX) >= MAX_BACKOFF / 2);
}

#[tokio::test(start_paused = true)]
async fn what_a_cancelled_session_did_not_send_is_sent_by_the_next_one() {
    let (inbox, mut events) = tokio::sync::mpsc::channel(1);
    let (_reload, config) = watch::channel(Arc::<Config>::default());
    let context = Context {
        inbox,
        metrics: Arc::default(),
        rejects: Arc::default(),
        config,
    };
    let mut store = Store::new(context, Origin::Redis);
    let said = || said(Origin::Redis, &(vec![(1, 1), (2, 1), (3, 1)], vec![]));
    let full = tokio::time::timeout(Duration::from_secs(1), store.set("a", Ok(said())));
    full.await.expect_err("the inbox has room for one");
    let mut received = Vec::new();
    let again = store.set("a", Ok(said()));
    tokio::join!(again, async {
        while received.len() < 6 {
            let Some(Event::Route(RouteEvent::Register(registration))) = events.recv().await else {
                panic!("{received:?}, and something else")
            };
            let id = (registration.routes.clone(), registration.backend.address);
            assert!(!received.contains(&id), "each is sent once");
            received.push(id);
        }
    });
    assert!(events.try_recv().is_err());
}

/// Backends with their weights, and routes with the attempts that are declared of them.
type Said = (Vec<(u8, u16)>, Vec<(u8, usize)>);

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 80))
}

fn route(n: u8) -> HttpMatch {
    wire::parse_uri(&format!("{n}.x")).unwrap()
}

fn said(origin: Origin, (backends, policies): &Said) -> Announcement {
    let registrations = backends.iter().map(|&(n, weight)| Registration {
        routes: vec![RouteKey::Http(route(n % 2)), RouteKey::Http(route(2))],
        backend: Arc::new(Backend {
            weight,
            ..Backend::new(address(n), origin)
        }),
        stale_after: None,
        balance: None,
        route_service_url: None,
    });
    let declarations = policies.iter().map(|&(n, attempts)| {
        let mut policy = HttpPolicy::new(origin);
        policy.retries.attempts = Some(attempts);
        Declaration {
            route: route(n),
            policy: Arc::new(policy),
        }
    });
    Announcement {
        registrations: registrations.collect(),
        declarations: declarations.collect(),
    }
}

/// What is served: origin and weight of each backend of a route, origin and attempts of its policy.
#[derive(Debug, Default, PartialEq)]
struct Served {
    backends: BTreeMap<(HttpMatch, SocketAddr), (Origin, u16)>,
    policies: BTreeMap<HttpMatch, (Origin, Option<usize>)>,
}

/// In the order of precedence the first source that says something, and of its keys the last.
fn model(keys: &BTreeMap<(Origin, usize), Said>) -> Served {
    let mut served = Served::default();
    for (&(origin, _), said_by_key) in keys.iter().rev() {
        let all = said(origin, said_by_key);
        let mut of_key = Served::default();
        for registration in all.registrations {
            for key in &registration.routes {
                let RouteKey::Http(route) = key else {
                    unreachable!()
                };
                let id = (route.clone(), registration.backend.address);
                of_key
                    .backends
                    .insert(id, (origin, registration.backend.weight));
            }
        }
        for Declaration { route, policy } in all.declarations {
            of_key
                .policies
                .insert(route, (origin, policy.retries.attempts));
        }
        // A later key of the same source came before this one, and a source of less precedence too.
        for (id, backend) in of_key.backends {
            let held = served.backends.get(&id);
            if held.is_none_or(|held| held.0 != origin) {
                served.backends.insert(id, backend);
            }
        }
        for (route, policy) in of_key.policies {
            let held = served.policies.get(&route);
            if held.is_none_or(|held| held.0 != origin) {
                served.policies.insert(route, policy);
            }
        }
    }
    let with_backends = |route: &HttpMatch| served.backends.keys().any(|(one, _)| one == route);
    let policies = std::mem::take(&mut served.policies);
    let policies = policies
        .into_iter()
        .filter(|(route, _)| with_backends(route));
    served.policies = policies.collect();
    served
}

fn served(table: &mut RouteTable) -> Served {
    let snapshot = table.snapshot();
    let mut served = Served::default();
    for (host, routes) in snapshot.hosts.iter() {
        for one in routes.iter() {
            let route = wire::parse_uri(host).unwrap();
            for backend in &one.pool.backends {
                let id = (route.clone(), backend.address);
                served.backends.insert(id, (backend.origin, backend.weight));
            }
            if let Some(policy) = &one.pool.policy {
                let attempts = policy.retries.attempts;
                served.policies.insert(route, (policy.origin, attempts));
            }
        }
    }
    served
}

proptest! {
    #[test]
    fn any_interleaving_of_keys_of_several_sources_ends_in_the_table_of_the_model(
        steps in proptest::collection::vec(
            (
                0usize..4,
                0usize..3,
                proptest::collection::vec((0u8..4, 1u16..4), 0..4),
                proptest::collection::vec((0u8..3, 1usize..4), 0..3),
            ),
            1..40,
        ),
    ) {
        let origins = [Origin::File, Origin::Etcd, Origin::Consul, Origin::Redis];
        let now = Instant::now();
        let mut table = RouteTable::new(Duration::from_secs(120), now);
        let mut ledgers = origins.map(Ledger::new);
        let mut keys = BTreeMap::new();
        for (source, key, backends, policies) in steps {
            let content = (backends, policies);
            let announcement = said(origins[source], &content);
            for event in ledgers[source].set(&key.to_string(), announcement) {
                table.apply(event, now);
            }
            keys.insert((origins[source], key), content);
            prop_assert_eq!(served(&mut table), model(&keys));
        }
    }
}
