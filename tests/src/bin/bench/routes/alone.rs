//! Rows `lookup-N` and `table-N` of the routes: the router and the route table by themselves, on one
//! thread, without sockets around them.
//!
//! The hosts that are looked up are spread over the table at random, so that a core's caches hold no
//! more of them than of any table of that size.

use std::fmt::Write;
use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use http::{HeaderMap, Method};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use viaduct::l7::router::{self, Lookup};
use viaduct::route::table::RouteTable;
use viaduct::route::{
    Backend, HttpMatch, Origin, Registration, RouteEvent, RouteKey, Unregistration,
};
use viaduct::snapshot::Snapshot;

use crate::report::Report;

const LOOKUPS: usize = 200_000;
/// Pairs of an instance that joins a route and leaves it.
const CHANGES: usize = 50_000;
/// Pairs between two snapshots.
const BATCH: usize = 64;
const STALE: Duration = Duration::from_secs(120);

/// Those rows of a table that are `chosen`.
pub(super) fn measure(
    size: usize,
    chosen: &[&str],
    rounds: usize,
    report: &mut Report,
) -> anyhow::Result<()> {
    let start = Instant::now();
    let mut table = RouteTable::new(STALE, start);
    let mut published = table.snapshot();
    for n in 0..size {
        table.apply(register(n, 80), start);
        if n % BATCH == 0 {
            published = table.snapshot();
        }
    }
    let mut random = Random(1);
    for round in 0..rounds {
        eprintln!("routes: {size} alone, round {} of {rounds}", round + 1);
        let spread: Vec<usize> = (0..LOOKUPS).map(|_| random.below(size)).collect();
        if chosen.contains(&"table") {
            change(&mut table, &mut published, &spread[..CHANGES], report)?;
        }
        if chosen.contains(&"lookup") {
            look_up(&table.snapshot(), &spread, report)?;
        }
    }
    Ok(())
}

fn look_up(snapshot: &Snapshot, spread: &[usize], report: &mut Report) -> anyhow::Result<()> {
    let row = format!("lookup-{}", snapshot.hosts.len());
    let hot = vec![spread[0]; spread.len()];
    for (metric, wanted) in [("spread_ns", spread), ("hot_ns", &hot[..])] {
        // As they come from sockets, the names themselves are in the cache: in a row, and read in order.
        let mut names = String::new();
        let mut ends = Vec::with_capacity(wanted.len());
        for n in wanted {
            write!(names, "{}", host(*n))?;
            ends.push(names.len());
        }
        let headers = HeaderMap::new();
        let (mut begin, mut found) = (0, 0);
        let start = cpu_time()?;
        for end in ends {
            let request = Lookup {
                host: &names[begin..end],
                path: "/",
                query: None,
                method: &Method::GET,
                headers: &headers,
            };
            found += usize::from(black_box(router::find(snapshot, &request)).is_ok());
            begin = end;
        }
        let spent = cpu_time()? - start;
        ensure!(found == wanted.len(), "a route was not found");
        let each = spent.as_secs_f64() * 1e9 / wanted.len() as f64;
        report.add(&row, "viaduct", metric, each);
    }
    Ok(())
}

/// Instances that join a route and leave it, and registrations that are repeated.
fn change(
    table: &mut RouteTable,
    published: &mut Snapshot,
    spread: &[usize],
    report: &mut Report,
) -> anyhow::Result<()> {
    let row = format!("table-{}", table.size().http_routes);
    let now = Instant::now();
    let known: Vec<RouteEvent> = spread.iter().map(|n| register(*n, 80)).collect();
    let pairs = |n: &usize| [register(*n, 81), unregister(*n, 81)];
    let pairs: Vec<[RouteEvent; 2]> = spread.iter().map(pairs).collect();
    let start = cpu_time()?;
    for event in known {
        table.apply(event, now);
    }
    let refreshed = cpu_time()?;
    for (n, pair) in pairs.into_iter().enumerate() {
        for event in pair {
            table.apply(event, now);
        }
        if n % BATCH == 0 {
            *published = table.snapshot();
        }
    }
    let changed = cpu_time()?;
    let each = |spent: Duration, count: usize| spent.as_secs_f64() * 1e9 / count as f64;
    let refresh = each(refreshed - start, spread.len());
    report.add(&row, "viaduct", "refresh_ns", refresh);
    let change = each(changed - refreshed, 2 * spread.len());
    report.add(&row, "viaduct", "change_ns", change);
    Ok(())
}

/// Of this thread.
fn cpu_time() -> anyhow::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
    let micros = |time: TimeVal| time.tv_sec() * 1_000_000 + time.tv_usec();
    let spent = micros(usage.user_time()) + micros(usage.system_time());
    Ok(Duration::from_micros(u64::try_from(spent)?))
}

fn host(n: usize) -> String {
    format!("app-{n}.example.com")
}

fn route(n: usize) -> RouteKey {
    RouteKey::Http(HttpMatch {
        host: host(n).into(),
        path: "".into(),
        conditions: None,
    })
}

fn address(n: usize, port: u16) -> SocketAddr {
    let [_, a, b, c] = u32::try_from(n).expect("few routes").to_be_bytes();
    SocketAddr::from(([10, a, b, c], port))
}

fn register(n: usize, port: u16) -> RouteEvent {
    RouteEvent::Register(Registration {
        routes: vec![route(n)],
        backend: Arc::new(Backend::new(address(n, port), Origin::Nats)),
        stale_after: None,
        balance: None,
        route_service_url: None,
    })
}

fn unregister(n: usize, port: u16) -> RouteEvent {
    RouteEvent::Unregister(Unregistration {
        routes: vec![route(n)],
        address: address(n, port),
        instance_id: None,
        origin: Origin::Nats,
    })
}

/// Marsaglia's xorshift: the same hosts in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}
