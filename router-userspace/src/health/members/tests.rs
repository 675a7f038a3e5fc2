use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::route::table::RouteTable;
use crate::route::{Origin, RouteEvent, wire};

/// What [`Members`] should hold, by a walk over everything.
fn walk(snapshot: &Snapshot) -> BTreeMap<SocketAddr, Takes> {
    let mut found = BTreeMap::new();
    for (vip, pool) in &snapshot.vips {
        if vip.proto == Proto::Tcp {
            found.extend(pool.backends.iter().map(|b| (b.address, Takes::Tcp)));
        }
    }
    let pools = || snapshot.hosts.iter().flat_map(|(_, routes)| routes.paths());
    for wanted in [Takes::Tcp, Takes::Http] {
        for backend in pools().flat_map(|(_, pool)| &pool.backends) {
            if of_route(backend) == wanted {
                found.insert(backend.address, wanted);
            }
        }
    }
    found
}

const ROUTES: [&str; 7] = [
    r#""uris":["a.x"]"#,
    r#""uris":["a.x/p","b.x"]"#,
    r#""uris":["b.x/q"],"protocol":"http2""#,
    r#""uris":["c.x"],"tls_port":"#,
    r#""vips":["udp/192.0.2.1:53"]"#,
    r#""vips":["tcp/192.0.2.1:53"],"uris":["a.x/p"]"#,
    r#""vips":["tcp/192.0.2.2:80"]"#,
];

fn message(address: u8, route: usize) -> String {
    let routes = ROUTES[route];
    let tls = if routes.ends_with(':') { "80" } else { "" };
    format!(r#"{{"host":"10.0.0.{address}","port":80,{routes}{tls}}}"#)
}

fn apply(table: &mut RouteTable, add: bool, address: u8, route: usize) {
    let now = Instant::now();
    let ranges = ["192.0.2.0/24".parse().unwrap()];
    let registration = wire::register(message(address, route).as_bytes(), &ranges).unwrap();
    let event = match add {
        true => RouteEvent::Register(registration),
        false => RouteEvent::Unregister(crate::route::Unregistration {
            routes: registration.routes,
            address: registration.backend.address,
            instance_id: None,
            origin: Origin::Nats,
        }),
    };
    table.apply(event, now);
}

proptest! {
    #[test]
    fn what_changed_adds_up_to_what_a_walk_finds(
        steps in prop::collection::vec((any::<bool>(), 1u8..6, 0..ROUTES.len(), any::<bool>()), 0..80),
    ) {
        let mut table = RouteTable::new(Duration::from_secs(120), Instant::now());
        let mut members = Members::default();
        let mut summed = BTreeMap::new();
        for (add, address, route, follow) in steps {
            apply(&mut table, add, address, route);
            if !follow {
                continue;
            }
            let snapshot = table.snapshot();
            let wanted = walk(&snapshot);
            for (address, takes) in members.follow(Arc::new(snapshot)) {
                let before = match takes {
                    Some(takes) => summed.insert(address, takes),
                    None => summed.remove(&address),
                };
                prop_assert_ne!(before, takes, "told of what did not change");
            }
            prop_assert_eq!(&summed, &wanted);
            prop_assert_eq!(members.uses.len(), wanted.len());
        }
        members.follow(Arc::default());
        prop_assert!(members.uses.is_empty());
    }
}

#[test]
fn a_registration_among_many_touches_its_own_backend_only() {
    let mut table = RouteTable::new(Duration::from_secs(120), Instant::now());
    let now = Instant::now();
    for number in 0..20_000u32 {
        let (high, low) = (number / 250, number % 250);
        let json = format!(r#"{{"host":"10.0.{high}.{low}","port":80,"uris":["h{number}.x"]}}"#);
        let registration = wire::register(json.as_bytes(), &[]).unwrap();
        table.apply(RouteEvent::Register(registration), now);
    }
    let mut members = Members::default();
    assert_eq!(members.follow(Arc::new(table.snapshot())).len(), 20_000);
    apply(&mut table, true, 251, 0);
    let before = Arc::clone(&members.followed);
    let after = Arc::new(table.snapshot());
    let mut count = Count {
        uses: &mut members.uses,
        before: HashMap::new(),
    };
    let mut hosts = 0;
    before.hosts.diff(&after.hosts, &mut |old, new| {
        hosts += 1;
        count.host(old, new);
    });
    assert_eq!(hosts, 1);
    assert!(count.before.len() <= 2);
}
