use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::config::SourceLimits;
use crate::route::conditions::Conditions;
use crate::route::damping::Settings;
use crate::route::expiry::TICK;
use crate::route::policy::{HttpPolicy, Redirect};
use crate::route::{Balance, Declaration, Instance, Pool, Withdrawal};

const THRESHOLD: Duration = Duration::from_secs(120);

fn backend(address: &str, weight: u16, origin: Origin) -> Arc<Backend> {
    Arc::new(Backend {
        weight,
        ..Backend::new(address.parse().unwrap(), origin)
    })
}

fn http(host: &str, path: &str) -> RouteKey {
    RouteKey::Http(HttpMatch {
        host: host.into(),
        path: path.into(),
        conditions: None,
    })
}

fn vip(text: &str) -> RouteKey {
    RouteKey::Vip(text.parse().unwrap())
}

fn registration(routes: &[RouteKey], backend: &Arc<Backend>) -> Registration {
    Registration {
        routes: routes.to_vec(),
        backend: Arc::clone(backend),
        stale_after: None,
        balance: None,
        route_service_url: None,
    }
}

fn withdrawal(routes: &[RouteKey], backend: &Arc<Backend>) -> RouteEvent {
    RouteEvent::Unregister(Unregistration {
        routes: routes.to_vec(),
        address: backend.address,
        instance_id: None,
        origin: backend.origin,
    })
}

fn register(routes: &[RouteKey], backend: &Arc<Backend>) -> RouteEvent {
    RouteEvent::Register(registration(routes, backend))
}

/// What is served, in words.
fn served(table: &RouteTable) -> Vec<String> {
    let pool = |pool: &Pool| {
        let backends = pool.backends.iter();
        let backends =
            backends.map(|b| format!("{}*{}@{}", b.address, b.weight, b.origin.as_str()));
        backends.collect::<Vec<_>>().join(" ")
    };
    let mut lines = Vec::new();
    for (host, routes) in table.next.hosts.iter() {
        for known in routes.iter() {
            let route = HttpMatch {
                host: host.into(),
                path: Arc::clone(known.path),
                conditions: known.conditions.cloned(),
            };
            let policy = known.pool.policy.as_deref().map(named).unwrap_or_default();
            lines.push(format!("{route} {}{policy}", pool(known.pool)));
        }
    }
    for (vip, members) in &table.next.vips {
        lines.push(format!("{vip} {}", pool(members)));
    }
    lines.sort();
    lines
}

/// A policy that can be told from others; one that `redirects` answers alone.
fn policy(origin: Origin, attempts: usize, redirects: bool) -> Arc<HttpPolicy> {
    let mut policy = HttpPolicy::new(origin);
    policy.retries.attempts = Some(attempts);
    policy.redirect = redirects.then(|| Redirect {
        status: http::StatusCode::FOUND,
        scheme: Some("https".into()),
        authority: None,
        path: None,
    });
    Arc::new(policy)
}

fn named(policy: &HttpPolicy) -> String {
    let attempts = policy.retries.attempts.unwrap();
    format!(
        "#{}{attempts}{}",
        policy.origin.as_str(),
        policy.answers_alone()
    )
}

fn declare(route: &RouteKey, policy: &Arc<HttpPolicy>) -> RouteEvent {
    RouteEvent::Declare(Declaration {
        route: of_requests(route),
        policy: Arc::clone(policy),
    })
}

fn withdraw(route: &RouteKey, origin: Origin) -> RouteEvent {
    RouteEvent::Withdraw(Withdrawal {
        route: of_requests(route),
        origin,
    })
}

fn of_requests(route: &RouteKey) -> HttpMatch {
    match route {
        RouteKey::Http(http) => http.clone(),
        RouteKey::Vip(vip) => panic!("{vip}"),
    }
}

/// The route with a condition on its method.
fn only(method: &str, route: &RouteKey) -> RouteKey {
    let conditions = Conditions::new(vec![method.into()], Vec::new(), Vec::new());
    RouteKey::Http(HttpMatch {
        conditions: Some(Arc::new(conditions)),
        ..of_requests(route)
    })
}

#[test]
fn leases_that_are_due_together_end_a_bounded_number_at_a_time() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    for number in 0..2 * MAX_VISITS + 10 {
        let json = format!(r#"{{"host":"10.0.0.1","port":80,"uris":["h{number}.x"]}}"#);
        let registration = crate::route::wire::register(json.as_bytes(), &[]).unwrap();
        table.apply(RouteEvent::Register(registration), now);
    }
    let later = now + THRESHOLD * 2;
    for (expired, more) in [(MAX_VISITS, true), (MAX_VISITS, true), (10, false)] {
        assert_eq!(table.expire(later).expired, expired as u64);
        assert_eq!(table.has_due(later), more);
    }
    assert_eq!(table.size(), Size::default());
}

#[test]
fn one_registration_serves_hosts_and_vips() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let one = backend("10.0.0.1:80", 100, Origin::Nats);
    let routes = [http("a.x", "/p"), http("a.x", ""), vip("tcp/192.0.2.1:80")];
    let change = table.apply(register(&routes, &one), now);
    assert_eq!(
        (change.changed, change.added, change.vips.len()),
        (true, 3, 1)
    );
    let wanted = [
        "a.x 10.0.0.1:80*100@nats",
        "a.x/p 10.0.0.1:80*100@nats",
        "tcp/192.0.2.1:80 10.0.0.1:80*100@nats",
    ];
    assert_eq!(served(&table), wanted);
    let snapshot = table.snapshot();
    let paths = &snapshot.hosts.get("a.x").unwrap().1.paths();
    assert_eq!(
        paths.iter().map(|(path, _)| &**path).collect::<Vec<_>>(),
        ["/p", ""]
    );
    assert_eq!(
        table.size(),
        Size {
            http_routes: 2,
            vips: 1,
            entries: Origin::ALL.map(|origin| 3 * usize::from(origin == Origin::Nats))
        }
    );

    let change = table.apply(withdrawal(&routes, &one), now);
    assert_eq!((change.removed, change.vips.len()), (3, 1));
    assert_eq!(served(&table), [""; 0]);
    assert_eq!(
        snapshot.vips.len(),
        1,
        "a published snapshot does not change"
    );
}

#[test]
fn a_repeated_registration_renews_the_lease_and_publishes_nothing() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let routes = [http("a.x", ""), vip("udp/192.0.2.1:53")];
    table.apply(
        register(&routes, &backend("10.0.0.1:80", 100, Origin::Nats)),
        now,
    );
    let later = now + THRESHOLD / 2;
    let change = table.apply(
        register(&routes, &backend("10.0.0.1:80", 100, Origin::Nats)),
        later,
    );
    assert_eq!(
        change,
        Change {
            refreshed: 2,
            ..Change::default()
        }
    );
    assert_eq!(table.expire(now + THRESHOLD + TICK), Change::default());
    let change = table.expire(later + THRESHOLD + TICK);
    assert_eq!(
        (change.expired, change.vips.len(), change.changed),
        (2, 1, true)
    );
    check_invariants(&table);
}

#[test]
fn the_last_registration_of_an_address_wins() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let route = [http("a.x", "")];
    table.apply(
        register(&route, &backend("10.0.0.1:80", 100, Origin::Nats)),
        now,
    );
    let change = table.apply(
        register(&route, &backend("10.0.0.1:80", 5, Origin::Nats)),
        now,
    );
    assert_eq!((change.updated, change.changed), (1, true));
    assert_eq!(served(&table), ["a.x 10.0.0.1:80*5@nats"]);
}

#[test]
fn the_policy_of_a_pool_is_that_of_the_latest_registration() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let route = [http("a.x", "")];
    let policy = |table: &RouteTable| {
        let pool = Arc::clone(&table.next.hosts.get("a.x").unwrap().1.paths()[0].1);
        (
            pool.balance().cloned(),
            pool.route_service_url().map(ToString::to_string),
        )
    };
    let mut first = registration(&route, &backend("10.0.0.1:80", 100, Origin::Nats));
    first.balance = Some(Balance::LeastConnections);
    first.route_service_url = Some("https://r".into());
    table.apply(RouteEvent::Register(first.clone()), now);
    assert_eq!(
        policy(&table),
        (
            Some(Balance::LeastConnections),
            Some("https://r".to_owned())
        )
    );
    table.apply(
        register(&route, &backend("10.0.0.2:80", 100, Origin::Nats)),
        now,
    );
    assert_eq!(policy(&table), (Some(Balance::LeastConnections), None));
    let change = table.apply(RouteEvent::Register(first), now);
    assert_eq!((change.refreshed, change.changed), (1, false));
}

#[test]
fn a_policy_is_that_of_its_declaration_whoever_registers_the_backends() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let route = http("a.x", "");
    let nats = backend("10.0.0.1:80", 1, Origin::Nats);
    let change = table.apply(declare(&route, &policy(Origin::File, 3, false)), now);
    assert_eq!(
        (change.added, change.changed),
        (1, true),
        "nobody serves it, and it is to be kept"
    );
    table.apply(register(&[route.clone(), http("b.x", "")], &nats), now);
    assert_eq!(
        served(&table),
        [
            "a.x 10.0.0.1:80*1@nats#file3false",
            "b.x 10.0.0.1:80*1@nats"
        ]
    );
    let repeated = table.apply(declare(&route, &policy(Origin::File, 3, false)), now);
    assert_eq!((repeated.refreshed, repeated.changed), (1, false));
    let change = table.apply(declare(&route, &policy(Origin::Nats, 4, false)), now);
    assert_eq!(
        (change.added, change.changed),
        (1, true),
        "a file has precedence"
    );
    let change = table.apply(withdraw(&route, Origin::File), now);
    assert_eq!((change.removed, change.changed), (1, true));
    assert_eq!(served(&table)[0], "a.x 10.0.0.1:80*1@nats#nats4false");
    assert!(table.apply(withdraw(&route, Origin::Nats), now).changed);
    assert_eq!(served(&table)[0], "a.x 10.0.0.1:80*1@nats");
    assert_eq!(
        table.apply(withdraw(&route, Origin::Nats), now),
        Change::default()
    );
    assert!(table.next.declared.is_empty());
    check_invariants(&table);
}

#[test]
fn what_is_declared_holds_over_what_is_registered() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let route = http("a.x", "");
    let mut declared = HttpPolicy::new(Origin::File);
    declared.balance = Some(Balance::RoundRobin);
    declared.route_service_url = Some("https://declared".into());
    table.apply(declare(&route, &Arc::new(declared)), now);
    let mut registered = registration(
        std::slice::from_ref(&route),
        &backend("10.0.0.1:80", 1, Origin::Nats),
    );
    registered.balance = Some(Balance::LeastConnections);
    table.apply(RouteEvent::Register(registered), now);
    let holds = |table: &RouteTable| {
        let pool = find_pool(&table.next, &of_requests(&route)).unwrap();
        (pool.balance().cloned(), pool.route_service_url().cloned())
    };
    let declared = (Some(Balance::RoundRobin), Some("https://declared".into()));
    assert_eq!(holds(&table), declared);
    table.apply(withdraw(&route, Origin::File), now);
    assert_eq!(holds(&table), (Some(Balance::LeastConnections), None));
}

#[test]
fn a_route_that_answers_alone_needs_no_backends() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let route = http("a.x", "/old");
    let redirects = policy(Origin::File, 1, true);
    assert!(table.apply(declare(&route, &redirects), now).changed);
    assert_eq!(served(&table), ["a.x/old #file1true"]);
    let nats = backend("10.0.0.1:80", 1, Origin::Nats);
    table.apply(register(std::slice::from_ref(&route), &nats), now);
    table.apply(withdrawal(std::slice::from_ref(&route), &nats), now);
    assert_eq!(served(&table), ["a.x/old #file1true"]);
    table.apply(declare(&route, &policy(Origin::File, 1, false)), now);
    assert_eq!(
        served(&table),
        [""; 0],
        "it has to be served by somebody again"
    );
    assert!(table.apply(declare(&route, &redirects), now).changed);
    assert!(table.apply(withdraw(&route, Origin::File), now).changed);
    assert_eq!(served(&table), [""; 0]);
    check_invariants(&table);
}

#[test]
fn routes_of_one_path_under_different_conditions_have_pools_of_their_own() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let route = http("a.x", "");
    let file = backend("10.0.0.1:80", 1, Origin::File);
    table.apply(
        register(&[only("GET", &route), only("PUT", &route)], &file),
        now,
    );
    let nats = backend("10.0.0.1:80", 2, Origin::Nats);
    table.apply(register(std::slice::from_ref(&route), &nats), now);
    assert_eq!(
        served(&table),
        [
            "a.x 10.0.0.1:80*2@nats",
            "a.x GET 10.0.0.1:80*1@file",
            "a.x PUT 10.0.0.1:80*1@file",
        ]
    );
    assert_eq!(table.size().http_routes, 3);
    check_invariants(&table);
}

#[test]
fn declarations_and_conditions_are_bounded() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let route = http("a.x", "");
    let file = backend("10.0.0.1:80", 1, Origin::File);
    for number in 0..MAX_PATH_CONDITIONS {
        let route = only(&format!("M{number}"), &route);
        let event = match number % 2 {
            0 => register(&[route], &file),
            _ => declare(&route, &policy(Origin::File, 1, true)),
        };
        assert!(table.apply(event, now).changed);
    }
    for event in [
        register(&[only("MORE", &route)], &file),
        declare(&only("MORE", &route), &policy(Origin::File, 1, true)),
    ] {
        let change = table.apply(event, now);
        assert_eq!(
            (change.changed, change.full, change.bound),
            (false, 1, Some(Bound::PathConditions))
        );
    }
    let beside: Vec<RouteKey> = (0..=MAX_PATH_CONDITIONS)
        .map(|number| only(&format!("M{number}"), &http("b.x", "")))
        .collect();
    let change = table.apply(register(&beside, &file), now);
    assert_eq!(change.bound, Some(Bound::PathConditions));
    assert!(table.apply(register(&[route], &file), now).changed);

    let asks = policy(Origin::File, 1, false);
    while table.next.declared.len() < MAX_DECLARED {
        let route = http(&format!("{}.x", table.next.declared.len()), "");
        table.apply(declare(&route, &asks), now);
    }
    let change = table.apply(declare(&http("c.x", ""), &asks), now);
    assert_eq!((change.full, change.bound), (1, Some(Bound::Declared)));
    check_invariants(&table);
}

#[test]
fn an_address_is_served_as_the_source_of_precedence_has_it() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let route = [http("a.x", "")];
    let nats = backend("10.0.0.1:80", 1, Origin::Nats);
    let file = backend("10.0.0.1:80", 2, Origin::File);
    let adopted = backend("10.0.0.1:80", 3, Origin::Adopted);
    table.apply(register(&route, &adopted), now);
    table.apply(register(&route, &nats), now);
    assert_eq!(
        served(&table),
        ["a.x 10.0.0.1:80*1@nats"],
        "adopted goes to who speaks first"
    );
    table.apply(register(&route, &file), now);
    assert_eq!(
        served(&table),
        ["a.x 10.0.0.1:80*2@file"],
        "a file takes over from NATS"
    );
    let lighter = backend("10.0.0.1:80", 9, Origin::Nats);
    for event in [
        register(&route, &lighter),
        withdrawal(&route, &lighter),
        register(&route, &nats),
        register(&route, &adopted),
    ] {
        let change = table.apply(event, now);
        assert_eq!((change.shadowed, change.changed), (1, false));
    }
    let later = now + THRESHOLD / 2;
    assert!(!table.apply(register(&route, &nats), later).changed);
    assert!(table.apply(withdrawal(&route, &file), later).changed);
    assert_eq!(
        served(&table),
        ["a.x 10.0.0.1:80*1@nats"],
        "what NATS says holds once the file does not name it"
    );
    table.apply(register(&route, &file), later);
    let change = table.expire(now + THRESHOLD * 9);
    assert_eq!((change.expired, change.changed), (1, false), "that of NATS");
    assert_eq!(
        served(&table),
        ["a.x 10.0.0.1:80*2@file"],
        "a file's routes do not expire"
    );
    let change = table.apply(withdrawal(&route, &file), now + THRESHOLD * 9);
    assert_eq!(change.removed, 1);
    assert_eq!(served(&table), [""; 0]);
    check_invariants(&table);
}

#[test]
fn an_adopted_backend_may_be_withdrawn_by_anyone() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let route = [vip("tcp/192.0.2.1:80")];
    table.apply(
        register(&route, &backend("10.0.0.1:80", 3, Origin::Adopted)),
        now,
    );
    let nats = backend("10.0.0.1:80", 1, Origin::Nats);
    assert_eq!(table.apply(withdrawal(&route, &nats), now).removed, 1);
}

#[test]
fn vips_that_are_not_allowed_any_more_go_and_the_rest_stays() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let routes = [
        http("a.x", ""),
        vip("tcp/192.0.2.1:80"),
        vip("udp/198.51.100.1:80"),
    ];
    for port in 1..=3 {
        let one = backend(&format!("10.0.0.1:{port}"), 1, Origin::Nats);
        table.apply(register(&routes, &one), now);
    }
    let change =
        table.retain(|_, route| !matches!(route, RouteKey::Vip(vip) if vip.proto != Proto::Tcp));
    assert_eq!((change.removed, change.vips.len()), (3, 1));
    assert_eq!((table.size().http_routes, table.size().vips), (1, 1));
    check_invariants(&table);
}

#[test]
fn leases_last_while_nats_is_away_and_a_full_lifetime_after() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    table.apply(
        register(&[http("a.x", "")], &backend("10.0.0.1:80", 1, Origin::Nats)),
        now,
    );
    table.apply(
        register(
            &[http("b.x", "")],
            &backend("10.0.0.1:80", 1, Origin::Adopted),
        ),
        now,
    );
    table.set_connected(Origin::Nats, false, now + THRESHOLD / 2);
    assert!(!table.expire(now + THRESHOLD * 10).changed);
    let back = now + THRESHOLD * 10 + TICK;
    table.set_connected(Origin::Nats, true, back);
    assert!(!table.expire(back + THRESHOLD - TICK).changed);
    assert_eq!(table.expire(back + THRESHOLD).expired, 2);
}

#[test]
fn a_shorter_lifetime_counts_from_its_registration() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let one = backend("10.0.0.1:80", 1, Origin::Nats);
    table.apply(register(&[http("a.x", "")], &one), now);
    let mut short = registration(&[http("a.x", "")], &one);
    short.stale_after = Some(Duration::from_secs(4));
    assert_eq!(
        table
            .apply(RouteEvent::Register(short.clone()), now)
            .refreshed,
        1
    );
    assert_eq!(table.expire(now + Duration::from_secs(4)).expired, 1);
    short.stale_after = Some(THRESHOLD * 100);
    table.apply(RouteEvent::Register(short), now);
    assert_eq!(
        table.expire(now + THRESHOLD).expired,
        1,
        "held to the gateway's threshold"
    );
    assert_eq!(table.expire(now + THRESHOLD * 200), Change::default());
}

#[test]
fn instances_that_come_and_go_leave_no_deadlines_behind() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let (routes, one) = (
        [http("a.x", ""), vip("tcp/192.0.2.1:80")],
        backend("10.0.0.1:80", 1, Origin::Nats),
    );
    for seconds in [120, 1, 60, 120].repeat(100) {
        let mut lease = registration(&routes, &one);
        lease.stale_after = Some(Duration::from_secs(seconds));
        table.apply(RouteEvent::Register(lease), now);
        assert_eq!(table.expiry.count(), routes.len());
        if seconds == 60 {
            table.apply(withdrawal(&routes, &one), now);
            assert_eq!(table.expiry.count(), 0);
        }
    }
}

#[test]
fn a_drain_names_the_vips_it_touches_and_is_bounded() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let one = backend("10.0.0.1:80", 1, Origin::Nats);
    let routes = [http("a.x", ""), vip("tcp/192.0.2.1:80")];
    table.apply(register(&routes, &one), now);
    let change = table.set_draining(one.address, None, true);
    assert_eq!((change.changed, change.vips.len()), (true, 1));
    assert_eq!(
        table.set_draining(one.address, None, true),
        Change::default()
    );
    assert!(table.snapshot().draining.contains(&one.address));
    for port in 1..=MAX_DRAINING as u16 {
        table.set_draining(SocketAddr::from(([10, 0, 0, 2], port)), None, true);
    }
    assert_eq!(table.snapshot().draining.len(), MAX_DRAINING);
    assert!(table.set_draining(one.address, None, false).changed);
    assert!(table.snapshot().draining.len() < MAX_DRAINING);
}

#[test]
fn a_drain_for_one_vip_leaves_the_others_alone() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let one = backend("10.0.0.1:80", 1, Origin::Nats);
    let routes = [vip("tcp/192.0.2.1:80"), vip("tcp/192.0.2.2:80")];
    table.apply(register(&routes, &one), now);
    let first: Vip = "tcp/192.0.2.1:80".parse().unwrap();
    let change = table.set_draining(one.address, Some(first), true);
    assert_eq!((change.changed, change.vips), (true, [first].into()));
    let snapshot = table.snapshot();
    assert!(snapshot.draining_at.contains(&(first, one.address)));
    assert!(snapshot.draining.is_empty());
    // One order does not undo the other.
    assert!(!table.set_draining(one.address, None, false).changed);
    assert!(table.set_draining(one.address, Some(first), false).changed);
    assert!(table.snapshot().draining_at.is_empty());
}

#[test]
fn a_health_flip_names_the_vips_it_touches() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let one = backend("10.0.0.1:80", 1, Origin::Nats);
    let routes = [
        http("a.x", ""),
        vip("tcp/192.0.2.1:80"),
        vip("udp/192.0.2.1:80"),
    ];
    table.apply(register(&routes, &one), now);
    table.apply(
        register(
            &[vip("tcp/192.0.2.9:80")],
            &backend("10.0.0.2:80", 1, Origin::Nats),
        ),
        now,
    );
    let change = table.set_health(one.address, false);
    assert_eq!((change.changed, change.vips.len()), (true, 2));
    assert!(table.snapshot().unhealthy.contains(&one.address));
    assert_eq!(table.set_health(one.address, false), Change::default());
    assert_eq!(table.set_health(one.address, true).vips.len(), 2);
}

#[test]
fn a_full_pool_takes_no_more_and_serves_on() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let route = [http("a.x", "")];
    for port in 1..=MAX_POOL_BACKENDS + 1 {
        let change = table.apply(
            register(
                &route,
                &backend(&format!("10.0.0.1:{port}"), 1, Origin::Nats),
            ),
            now,
        );
        assert_eq!(change.full, u64::from(port > MAX_POOL_BACKENDS), "{port}");
    }
    for path in 0..MAX_HOST_PATHS {
        let path = http("a.x", &format!("/{path}"));
        let change = table.apply(
            register(&[path], &backend("10.0.0.1:1", 1, Origin::Nats)),
            now,
        );
        assert_eq!(
            change.full,
            u64::from(table.size().http_routes == MAX_HOST_PATHS && change.added == 0)
        );
    }
    assert_eq!(table.size().http_routes, MAX_HOST_PATHS);
    check_invariants(&table);
}

#[test]
fn a_registration_that_does_not_fit_is_refused_whole() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let one = backend("10.0.0.1:1", 1, Origin::Nats);
    let paths: Vec<RouteKey> = (1..MAX_HOST_PATHS)
        .map(|path| http("a.x", &format!("/{path}")))
        .collect();
    table.apply(register(&paths, &one), now);
    let before = served(&table);
    let change = table.apply(
        register(
            &[http("b.x", ""), http("a.x", "/new"), http("a.x", "/newer")],
            &one,
        ),
        now,
    );
    assert_eq!(
        (change.changed, change.full, change.bound),
        (false, 3, Some(Bound::HostPaths))
    );
    assert_eq!(served(&table), before);
    let twice = [http("b.x", ""), http("a.x", "/new"), http("a.x", "/new")];
    let change = table.apply(register(&twice, &one), now);
    assert_eq!((change.added, change.refreshed, change.bound), (2, 1, None));

    for port in 1..=MAX_POOL_BACKENDS {
        let other = backend(&format!("10.0.0.2:{port}"), 1, Origin::Nats);
        table.apply(register(&[http("full.x", "")], &other), now);
    }
    let change = table.apply(register(&[http("c.x", ""), http("full.x", "")], &one), now);
    assert_eq!((change.full, change.bound), (2, Some(Bound::PoolBackends)));
    assert!(!table.next.hosts.contains("c.x"));
    check_invariants(&table);
}

fn check_invariants(table: &RouteTable) {
    let live = table.entries.iter().flatten().count();
    assert_eq!(table.index.len(), live);
    assert_eq!(table.free.len() + live, table.entries.len());
    let mut by_origin = [0; Origin::ALL.len()];
    let mut routes_of = BTreeSet::new();
    let mut held = 0;
    let mut served = 0;
    let mut vips_of = BTreeSet::new();
    for (id, entry) in table.entries.iter().enumerate() {
        let Some(entry) = entry else { continue };
        let id = u32::try_from(id).unwrap();
        let address = entry.backend.address;
        let origin = entry.backend.origin;
        assert_eq!(table.find(&entry.route, address, origin), Some(id));
        by_origin[entry.backend.origin as usize] += 1;
        let is_held = table.held.members.contains(&(entry.route.clone(), address));
        held += usize::from(is_held);
        let pool = match &entry.route {
            RouteKey::Vip(vip) => {
                if !is_held {
                    vips_of.insert((address, *vip));
                }
                Arc::clone(&table.next.vips[vip])
            }
            RouteKey::Http(http) => Arc::clone(find_pool(&table.next, http).unwrap()),
        };
        let mut members = pool.backends.iter();
        let is_member = members.any(|backend| Arc::ptr_eq(backend, &entry.backend));
        let serves = table.is_serving(id) && !is_held;
        served += usize::from(serves);
        // Sources may announce an equal backend, and even the same one.
        assert!(is_member || !serves);
        if serves {
            routes_of.insert((origin, entry.route.clone()));
        }
        if origin.expires() {
            assert!(
                table.expiry.scheduled(id, entry.scheduled),
                "every lease is looked at"
            );
            let source = table.sources[entry.backend.origin as usize];
            let deadline = entry
                .renewed
                .max(source.since)
                .saturating_add(entry.lifetime);
            assert!(
                !source.connected || entry.scheduled <= deadline,
                "and not too late"
            );
        }
    }
    assert_eq!(table.size().entries, by_origin);
    let of = |origin| routes_of.iter().filter(|(by, _)| *by == origin).count();
    assert_eq!(table.routes_of, Origin::ALL.map(of));
    assert_eq!(table.held(), held);
    assert!(table.expiry.count() <= live, "a lease is looked at once");
    assert_eq!(vips_of, table.vips_of);
    let hosts = table.next.hosts.iter();
    let http: Vec<&Arc<Pool>> = hosts.flat_map(|(_, routes)| routes.pools()).collect();
    assert_eq!(http.len(), table.http_routes);
    let mut members = 0;
    for pool in http.into_iter().chain(table.next.vips.values()) {
        members += pool.backends.len();
        let alone = pool.policy.as_ref().is_some_and(|p| p.answers_alone());
        assert!(!pool.backends.is_empty() || alone);
        assert!(pool.backends.is_sorted_by(|a, b| a.address < b.address));
    }
    assert_eq!(members, served);
    for (_, routes) in table.next.hosts.iter() {
        assert!(routes.count() > 0);
        assert!(
            routes
                .paths()
                .is_sorted_by(|(a, _), (b, _)| (b.len(), a) < (a.len(), b))
        );
        assert!(routes.conditional().is_sorted_by(|a, b| {
            let paths = (b.path.len(), &a.path).cmp(&(a.path.len(), &b.path));
            paths
                .then_with(|| a.conditions.order(&b.conditions))
                .is_lt()
        }));
    }
    for declared in table.next.declared.values() {
        assert!(!declared.is_empty());
        assert!(declared.is_sorted_by(|a, b| a.origin < b.origin));
    }
}

/// The table as its documentation has it, without a thought for speed.
#[derive(Default)]
struct Model {
    entries: BTreeMap<(RouteKey, SocketAddr, Origin), ModelEntry>,
    declared: BTreeMap<(RouteKey, Origin), Arc<HttpPolicy>>,
    away: bool,
}

struct ModelEntry {
    weight: u16,
    renewed: Instant,
    lifetime: Duration,
}

impl Model {
    fn register(
        &mut self,
        (route, address): (RouteKey, SocketAddr),
        weight: u16,
        origin: Origin,
        lifetime: Duration,
        now: Instant,
    ) {
        if origin == Origin::Adopted && self.named_by_others(&route, address) {
            return;
        }
        self.entries
            .remove(&(route.clone(), address, Origin::Adopted));
        self.entries.insert(
            (route, address, origin),
            ModelEntry {
                weight,
                renewed: now,
                lifetime,
            },
        );
    }

    fn named_by_others(&self, route: &RouteKey, address: SocketAddr) -> bool {
        Origin::ALL.into_iter().any(|origin| {
            origin != Origin::Adopted
                && self.entries.contains_key(&(route.clone(), address, origin))
        })
    }

    fn expire(&mut self, now: Instant) {
        let away = self.away;
        self.entries.retain(|(.., origin), entry| {
            !origin.expires() || away || now < entry.renewed + entry.lifetime
        });
    }

    fn set_connected(&mut self, connected: bool, now: Instant) {
        if connected && self.away {
            for entry in self.entries.values_mut() {
                entry.renewed = now;
            }
        }
        self.away = !connected;
    }

    fn served(&self) -> Vec<String> {
        let mut pools: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut last = None;
        // Of one address, the origin of precedence comes first.
        for ((route, address, origin), entry) in &self.entries {
            if last.replace((route, address)) == Some((route, address)) {
                continue;
            }
            let backend = format!("{address}*{}@{}", entry.weight, origin.as_str());
            pools.entry(route.to_string()).or_default().push(backend);
        }
        let mut policies: BTreeMap<String, String> = BTreeMap::new();
        for origin in Origin::ALL.into_iter().rev() {
            for ((route, by), policy) in &self.declared {
                if *by == origin {
                    policies.insert(route.to_string(), named(policy));
                }
            }
        }
        for (route, policy) in &policies {
            if policy.ends_with("true") {
                pools.entry(route.clone()).or_default();
            }
        }
        let policy = |route| policies.get(route).map_or("", String::as_str);
        let mut lines: Vec<String> = pools
            .iter()
            .map(|(route, backends)| format!("{route} {}{}", backends.join(" "), policy(route)))
            .collect();
        lines.sort();
        lines
    }
}

#[derive(Clone, Debug)]
enum Step {
    Register {
        routes: Vec<usize>,
        address: u8,
        weight: u16,
        origin: Origin,
        lifetime: u32,
    },
    Unregister {
        routes: Vec<usize>,
        address: u8,
        origin: Origin,
    },
    Wait {
        ticks: u32,
    },
    Connected {
        connected: bool,
    },
    Health {
        address: u8,
        healthy: bool,
    },
    Declare {
        route: usize,
        origin: Origin,
        attempts: usize,
        redirects: bool,
    },
    Withdraw {
        route: usize,
        origin: Origin,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let origin = prop_oneof![
        4 => Just(Origin::Nats),
        2 => Just(Origin::File),
        1 => Just(Origin::Redis),
        1 => Just(Origin::Adopted)
    ];
    let routes = proptest::collection::vec(0..ROUTES.len(), 1..4);
    prop_oneof![
        6 => (routes.clone(), 1u8..5, 1u16..3, origin.clone(), 1u32..60).prop_map(
            |(routes, address, weight, origin, lifetime)| Step::Register { routes, address, weight, origin, lifetime }),
        2 => (routes, 1u8..5, origin)
            .prop_map(|(routes, address, origin)| Step::Unregister { routes, address, origin }),
        3 => (0u32..40).prop_map(|ticks| Step::Wait { ticks }),
        1 => any::<bool>().prop_map(|connected| Step::Connected { connected }),
        1 => (1u8..5, any::<bool>()).prop_map(|(address, healthy)| Step::Health { address, healthy }),
        3 => (0..HTTP_ROUTES, declarer(), 1usize..3, any::<bool>()).prop_map(
            |(route, origin, attempts, redirects)| Step::Declare { route, origin, attempts, redirects }),
        2 => (0..HTTP_ROUTES, declarer())
            .prop_map(|(route, origin)| Step::Withdraw { route, origin }),
    ]
}

fn declarer() -> impl Strategy<Value = Origin> {
    prop_oneof![Just(Origin::Kv), Just(Origin::Redis), Just(Origin::File)]
}

/// Those that requests can have come first.
const ROUTES: [&str; 8] = [
    "a.x",
    "GET a.x",
    "a.x/p",
    "PUT a.x/p",
    "a.x/p/q",
    "*.x",
    "tcp/192.0.2.1:80",
    "udp/192.0.2.1:80",
];
const HTTP_ROUTES: usize = 6;

fn route(index: usize) -> RouteKey {
    let uri = |uri| RouteKey::Http(crate::route::wire::parse_uri(uri).unwrap());
    match (ROUTES[index].parse(), ROUTES[index].split_once(' ')) {
        (Ok(vip), _) => RouteKey::Vip(vip),
        (Err(_), Some((method, text))) => only(method, &uri(text)),
        (Err(_), None) => uri(ROUTES[index]),
    }
}

proptest! {
    #[test]
    fn it_holds_what_a_naive_table_holds(steps in proptest::collection::vec(step(), 1..80)) {
        let mut now = Instant::now();
        let mut table = RouteTable::new(TICK * 50, now);
        let mut model = Model::default();
        let mut published = served(&table);
        for step in steps {
            let change = match step {
                Step::Register { routes, address, weight, origin, lifetime } => {
                    let routes: Vec<RouteKey> = routes.into_iter().map(route).collect();
                    let backend = backend(&format!("10.0.0.{address}:80"), weight, origin);
                    let lifetime = TICK * lifetime;
                    for route in &routes {
                        let key = (route.clone(), backend.address);
                        model.register(key, weight, origin, lifetime.min(TICK * 50), now);
                    }
                    let mut registration = registration(&routes, &backend);
                    registration.stale_after = Some(lifetime);
                    table.apply(RouteEvent::Register(registration), now)
                }
                Step::Unregister { routes, address, origin } => {
                    let routes: Vec<RouteKey> = routes.into_iter().map(route).collect();
                    let backend = backend(&format!("10.0.0.{address}:80"), 1, origin);
                    for route in &routes {
                        for by in [origin, Origin::Adopted] {
                            model.entries.remove(&(route.clone(), backend.address, by));
                        }
                    }
                    table.apply(withdrawal(&routes, &backend), now)
                }
                Step::Wait { ticks } => {
                    now += TICK * ticks;
                    model.expire(now);
                    table.expire(now)
                }
                Step::Connected { connected } => {
                    // The agent expires at least once a second; what was due before stays gone.
                    model.expire(now);
                    let change = table.expire(now);
                    model.set_connected(connected, now);
                    table.set_connected(Origin::Nats, connected, now);
                    change
                }
                Step::Declare { route: index, origin, attempts, redirects } => {
                    let (route, policy) = (route(index), policy(origin, attempts, redirects));
                    model.declared.insert((route.clone(), origin), Arc::clone(&policy));
                    table.apply(declare(&route, &policy), now)
                }
                Step::Withdraw { route: index, origin } => {
                    let route = route(index);
                    model.declared.remove(&(route.clone(), origin));
                    table.apply(withdraw(&route, origin), now)
                }
                Step::Health { address, healthy } => {
                    table.set_health(format!("10.0.0.{address}:80").parse().unwrap(), healthy);
                    Change::default()
                }
            };
            check_invariants(&table);
            let after = served(&table);
            prop_assert_eq!(&after, &model.served());
            prop_assert!(change.changed || after == published, "a change is always told");
            for line in after.iter().chain(&published) {
                let name = line.split(' ').next().unwrap();
                let differs = after.contains(line) != published.contains(line);
                if let (true, Ok(vip)) = (differs, name.parse::<Vip>()) {
                    prop_assert!(change.vips.contains(&vip), "{vip} changed untold");
                }
            }
            published = after;
        }
    }
}

#[test]
fn an_instance_that_leaves_does_not_take_the_next_at_its_address_with_it() {
    let routes = [RouteKey::Http(
        crate::route::wire::parse_uri("a.x").unwrap(),
    )];
    let of = |instance: Option<&str>| {
        let address = "10.0.0.1:80".parse().unwrap();
        Arc::new(Backend {
            instance: Instance {
                id: instance.map(Arc::from),
                ..Instance::default()
            }
            .shared(),
            ..Backend::new(address, Origin::Nats)
        })
    };
    for (there, gone, stays) in [
        (Some("new"), Some("old"), true),
        (Some("new"), Some("new"), false),
        (Some("new"), None, false),
        (None, Some("old"), false),
    ] {
        let now = Instant::now();
        let mut table = RouteTable::new(Duration::from_secs(120), now);
        table.apply(register(&routes, &of(there)), now);
        let change = table.apply(
            RouteEvent::Unregister(Unregistration {
                routes: routes.to_vec(),
                address: of(gone).address,
                instance_id: gone.map(Arc::from),
                origin: Origin::Nats,
            }),
            now,
        );
        assert_eq!(change.removed, u64::from(!stays), "{there:?} {gone:?}");
        assert_eq!(table.snapshot().hosts.contains("a.x"), stays);
    }
}

#[test]
fn what_was_adopted_is_kept_until_every_source_had_its_time_to_speak() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    for origin in [Origin::Nats, Origin::Etcd] {
        table.set_connected(origin, false, now);
    }
    let route = http("a", "");
    table.apply(declare(&route, &policy(Origin::Adopted, 1, false)), now);
    let adopted = backend("10.0.0.1:80", 1, Origin::Adopted);
    table.apply(register(&[route], &adopted), now);
    let count = |table: &RouteTable| (table.size().http_routes, table.next.declared.len());
    let late = now + 10 * THRESHOLD;
    table.set_connected(Origin::Nats, true, late);
    assert_eq!(table.expire(late + 2 * THRESHOLD).expired, 0);
    let whole = late + 3 * THRESHOLD;
    table.set_connected(Origin::Etcd, true, whole);
    table.expire(whole + THRESHOLD - TICK);
    assert_eq!(count(&table), (1, 1));
    assert_eq!(table.expire(whole + THRESHOLD + TICK).expired, 2);
    assert_eq!(count(&table), (0, 0));
}

#[test]
fn an_adopted_policy_is_that_of_whoever_declares_the_route_first() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let route = http("a", "");
    table.apply(declare(&route, &policy(Origin::Adopted, 1, false)), now);
    table.apply(declare(&route, &policy(Origin::Kv, 2, false)), now);
    // One that comes too late.
    table.apply(declare(&route, &policy(Origin::Adopted, 1, false)), now);
    let said = |table: &RouteTable| -> Vec<_> {
        let said = table.next.declared.values().flatten();
        said.map(|said| said.origin).collect()
    };
    assert_eq!(said(&table), [Origin::Kv]);
    table.apply(withdraw(&route, Origin::Kv), now);
    assert!(said(&table).is_empty());
}

#[test]
fn a_source_at_its_limit_renews_what_it_has_and_gets_nothing_new() {
    let now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    let mut limits = [SourceLimits::default(); Origin::ALL.len()];
    limits[Origin::Nats as usize] = SourceLimits {
        routes: Some(2),
        backends: Some(3),
    };
    table.set_limits(limits);
    let mut apply = |hosts: &[&str], address: &str, origin| {
        let routes: Vec<RouteKey> = hosts.iter().map(|host| http(host, "")).collect();
        let change = table.apply(register(&routes, &backend(address, 1, origin)), now);
        check_invariants(&table);
        change
    };
    let first = apply(&["a.x", "b.x"], "10.0.0.1:80", Origin::Nats);
    assert_eq!((first.added, first.over_limit), (2, 0));
    let third = apply(&["a.x", "c.x"], "10.0.0.1:80", Origin::Nats);
    let bound = Bound::SourceRoutes(Origin::Nats, 2);
    assert_eq!((third.bound, third.over_limit), (Some(bound), 1));
    assert_eq!(
        third.told[0].bound.to_string(),
        "no more than guard.limits.nats.routes, 2"
    );
    assert_eq!(apply(&["b.x"], "10.0.0.2:80", Origin::Nats).added, 1);
    let fourth = apply(&["b.x"], "10.0.0.3:80", Origin::Nats);
    assert_eq!(fourth.bound, Some(Bound::SourceBackends(Origin::Nats, 3)));
    assert_eq!(
        apply(&["a.x", "b.x"], "10.0.0.1:80", Origin::Nats).refreshed,
        2
    );
    assert_eq!(apply(&["c.x"], "10.0.0.3:80", Origin::File).added, 1);
}

/// Where registrations, withdrawals and time go on, of three backends of two routes.
fn flap(table: &mut RouteTable, steps: &[(u8, u8, bool)], now: &mut Instant) {
    for (host, port, registers) in steps {
        let routes = [match host {
            0 => http("a.x", ""),
            _ => vip("tcp/192.0.2.1:80"),
        }];
        let one = backend(&format!("10.0.0.1:{}", port + 1), 1, Origin::Nats);
        let event = match registers {
            true => register(&routes, &one),
            false => RouteEvent::Unregister(Unregistration {
                routes: routes.to_vec(),
                address: one.address,
                instance_id: None,
                origin: Origin::Nats,
            }),
        };
        table.apply(event, *now);
        *now += Duration::from_secs(1);
        table.expire(*now);
        check_invariants(table);
    }
}

const FLAPPING: Settings = Settings {
    suppress: 2.0,
    reuse: 1.0,
    half_life: Duration::from_secs(20),
    longest: Duration::from_secs(60),
};

#[test]
fn a_backend_that_comes_and_goes_is_held_back_and_never_the_last() {
    let mut now = Instant::now();
    let mut table = RouteTable::new(THRESHOLD, now);
    table.set_damping(Some(FLAPPING));
    let pool = |table: &RouteTable| {
        let vip: Vip = "tcp/192.0.2.1:80".parse().unwrap();
        let pool = &table.next.vips[&vip];
        let ports = pool.backends.iter().map(|backend| backend.address.port());
        ports.collect::<Vec<u16>>()
    };
    flap(&mut table, &[(1, 0, true)], &mut now);
    for _ in 0..3 {
        flap(&mut table, &[(1, 1, true), (1, 1, false)], &mut now);
    }
    flap(&mut table, &[(1, 1, true)], &mut now);
    assert_eq!(
        (pool(&table), table.held()),
        (vec![1], 1),
        "it is held back"
    );
    flap(&mut table, &[(1, 0, false)], &mut now);
    assert_eq!(
        (pool(&table), table.held()),
        (vec![2], 0),
        "the last one serves"
    );
    flap(
        &mut table,
        &[(1, 0, true), (1, 1, false), (1, 1, true)],
        &mut now,
    );
    assert_eq!((pool(&table), table.held()), (vec![1], 1));
    now += FLAPPING.longest;
    flap(&mut table, &[(1, 0, true)], &mut now);
    assert_eq!(
        (pool(&table), table.held()),
        (vec![1, 2], 0),
        "its time is over"
    );
    for _ in 0..4 {
        flap(&mut table, &[(1, 1, false), (1, 1, true)], &mut now);
    }
    assert_eq!(table.held(), 1);
    assert!(table.set_damping(None).changed);
    assert_eq!((pool(&table), table.held()), (vec![1, 2], 0));
    check_invariants(&table);
}

proptest! {
    #[test]
    fn no_pool_is_without_its_backends_however_they_flap(
        steps in prop::collection::vec((0_u8..2, 0_u8..3, any::<bool>()), 1..120),
    ) {
        let mut now = Instant::now();
        let mut table = RouteTable::new(THRESHOLD, now);
        table.set_damping(Some(FLAPPING));
        flap(&mut table, &steps, &mut now);
        for pool in table.next.vips.values() {
            prop_assert!(!pool.backends.is_empty());
        }
        // Once all is quiet, everything that is registered serves.
        now += Duration::from_secs(100);
        table.expire(now);
        prop_assert_eq!(table.held(), 0);
        check_invariants(&table);
    }
}
