use std::time::Duration;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::*;
use crate::config::HttpEjection;
use crate::l7::backend::Backends;
use crate::l7::metrics::RouteCounters;
use crate::l7::router::RouteMatch;
use crate::l7::shared::Shared;
use crate::l7::tests::backend;
use crate::route::Instance;

mod hashing;
mod joining;

fn published(backends: impl IntoIterator<Item = Backend>) -> Arc<Pool> {
    Arc::new(Pool {
        backends: backends.into_iter().map(Arc::new).collect(),
        ..Pool::default()
    })
}

fn found(pool: &Arc<Pool>) -> RouteMatch<'_> {
    RouteMatch {
        conditions: None,
        host: "a.com",
        path: "",
        pool,
    }
}

/// The state of a pool with these weights; backend `i` is 10.0.0.1:(i + 1).
fn pool(weights: &[u16]) -> (Rc<PoolState>, SmallRng) {
    let weighted = |(i, &weight): (usize, &u16)| Backend {
        weight,
        ..backend(address(i))
    };
    state(weights.iter().enumerate().map(weighted))
}

fn state(backends: impl IntoIterator<Item = Backend>) -> (Rc<PoolState>, SmallRng) {
    let mut rng = SmallRng::seed_from_u64(7);
    let mut worker = Backends::new(
        0,
        Arc::new(Shared::new(1)),
        RouteCounters::new(Arc::default()),
    );
    let pool = published(backends);
    (worker.pool(&found(&pool), Instant::now(), &mut rng), rng)
}

fn eject(pool: &PoolState, index: usize, now: Instant) {
    let config = HttpEjection::default();
    let ejected = pool.targets[index].backend.outlier().eject(now, &config);
    assert_eq!(ejected, Some(Duration::from_secs(30)));
}

#[test]
fn a_pool_that_is_not_published_is_forgotten_by_every_worker() {
    let mut rng = SmallRng::seed_from_u64(7);
    let pool = published([backend(address(0))]);
    let shared = Arc::new(Shared::new(2));
    let mut workers = [0, 1].map(|index| {
        Backends::new(
            index,
            Arc::clone(&shared),
            RouteCounters::new(Arc::default()),
        )
    });
    for worker in &mut workers {
        worker.pool(&found(&pool), Instant::now(), &mut rng);
        assert_eq!(worker.changed_counters().map(|list| list.len()), Some(1));
    }
    drop(pool);
    for worker in &mut workers {
        worker.sweep(Instant::now(), Duration::from_secs(50));
        assert_eq!(worker.changed_counters().map(|list| list.len()), Some(0));
    }
}

fn address(i: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], u16::try_from(i).unwrap() + 1))
}

/// Nothing known of health, and nothing configured.
struct Calm {
    unhealthy: imbl::HashSet<SocketAddr>,
    draining: imbl::HashSet<SocketAddr>,
}

impl Calm {
    fn new() -> Calm {
        Calm {
            unhealthy: imbl::HashSet::new(),
            draining: imbl::HashSet::new(),
        }
    }

    fn at<'a>(&'a self, balance: &'a Balance, tried: &'a [usize]) -> Circumstances<'a> {
        Circumstances {
            balance,
            key: None,
            now: Instant::now(),
            unhealthy: &self.unhealthy,
            panic: false,
            draining: &self.draining,
            tried,
            prefer_local: false,
            slow_start: Duration::ZERO,
            limit: 0,
        }
    }
}

fn pick(pool: &PoolState, rng: &mut SmallRng, balance: &Balance, tried: &[usize]) -> Option<usize> {
    target(pool.pick(&Calm::new().at(balance, tried), rng))
}

fn target(choice: Choice) -> Option<usize> {
    match choice {
        Choice::Target(index) => Some(index),
        Choice::Full | Choice::Nobody => None,
    }
}

#[test]
fn a_backend_of_weight_0_gets_nothing() {
    for balance in &[Balance::RoundRobin, Balance::LeastConnections] {
        let (pool, mut rng) = pool(&[0, 100, 0]);
        for _ in 0..20 {
            assert_eq!(pick(&pool, &mut rng, balance, &[]), Some(1));
        }
        assert_eq!(pick(&pool, &mut rng, balance, &[1]), None);
    }
    let (pool, mut rng) = self::pool(&[0, 0]);
    assert_eq!(pick(&pool, &mut rng, &Balance::RoundRobin, &[]), None);
    assert_eq!(pick(&pool, &mut rng, &Balance::LeastConnections, &[]), None);
}

#[test]
fn a_backend_that_an_operator_drains_gets_nothing() {
    let (pool, mut rng) = pool(&[100, 100]);
    let mut calm = Calm::new();
    calm.draining.insert(pool.targets[0].backend.address());
    for balance in &[Balance::RoundRobin, Balance::LeastConnections] {
        let mut at = calm.at(balance, &[]);
        at.panic = true;
        for _ in 0..20 {
            assert_eq!(pool.pick(&at, &mut rng), Choice::Target(1));
        }
        at.tried = &[1];
        assert_eq!(pool.pick(&at, &mut rng), Choice::Nobody);
    }
}

#[test]
fn equal_weights_take_turns() {
    let (pool, mut rng) = pool(&[100, 100, 100]);
    let mut next = || pick(&pool, &mut rng, &Balance::RoundRobin, &[]).unwrap();
    let first: Vec<_> = (0..3).map(|_| next()).collect();
    let second: Vec<_> = (0..3).map(|_| next()).collect();
    assert_eq!(first, second);
    let mut sorted = first;
    sorted.sort_unstable();
    assert_eq!(sorted, [0, 1, 2]);
}

#[test]
fn an_empty_pool_has_no_backend() {
    let (pool, mut rng) = pool(&[]);
    for balance in &[Balance::RoundRobin, Balance::LeastConnections] {
        assert_eq!(pick(&pool, &mut rng, balance, &[]), None);
    }
}

#[test]
fn tried_backends_are_not_picked_again() {
    let (pool, mut rng) = pool(&[100, 100]);
    for balance in &[Balance::RoundRobin, Balance::LeastConnections] {
        for _ in 0..8 {
            assert_eq!(pick(&pool, &mut rng, balance, &[0]), Some(1));
        }
        assert_eq!(pick(&pool, &mut rng, balance, &[0, 1]), None);
    }
}

#[test]
fn unhealthy_and_ejected_backends_are_avoided_until_all_are_out() {
    let (pool, mut rng) = pool(&[100, 100, 100]);
    let now = Instant::now();
    let mut calm = Calm::new();
    calm.unhealthy.insert(address(0));
    eject(&pool, 1, now);
    for balance in &[Balance::RoundRobin, Balance::LeastConnections] {
        let mut at = calm.at(balance, &[]);
        for _ in 0..8 {
            assert_eq!(pool.pick(&at, &mut rng), Choice::Target(2));
        }
        at.tried = &[2];
        assert!(target(pool.pick(&at, &mut rng)).is_some());
    }
}

#[test]
fn in_panic_the_unhealthy_are_used_and_the_ejected_still_avoided() {
    let (pool, mut rng) = pool(&[100, 100, 100]);
    eject(&pool, 1, Instant::now());
    let calm = Calm::new();
    let mut snapshot = Snapshot {
        unhealthy: [0, 2].into_iter().map(address).collect(),
        panic_threshold: 33,
        ..Snapshot::default()
    };
    assert!(!pool.in_panic(&snapshot), "a third is healthy");
    snapshot.panic_threshold = 34;
    assert!(!pool.in_panic(&snapshot), "kept for the revision of health");
    snapshot.health_revision = 1;
    assert!(pool.in_panic(&snapshot));
    for balance in &[Balance::RoundRobin, Balance::LeastConnections] {
        let at = Circumstances {
            unhealthy: &snapshot.unhealthy,
            panic: true,
            ..calm.at(balance, &[])
        };
        let mut picked = [0; 3];
        for _ in 0..64 {
            picked[target(pool.pick(&at, &mut rng)).unwrap()] += 1;
        }
        assert!(
            picked[0] > 0 && picked[1] == 0 && picked[2] > 0,
            "{picked:?}"
        );
    }
}

#[test]
fn least_connections_sees_what_other_workers_have_in_flight() {
    let (pool, mut rng) = pool(&[100, 100]);
    let busy = pool.targets[0].backend.in_flight();
    busy.try_enter(0, 0);
    for _ in 0..20 {
        assert_eq!(
            pick(&pool, &mut rng, &Balance::LeastConnections, &[]),
            Some(1)
        );
    }
}

#[test]
fn least_connections_counts_by_weight() {
    let (pool, mut rng) = pool(&[100, 1000]);
    let heavy = pool.targets[1].backend.in_flight();
    for _ in 0..8 {
        heavy.try_enter(0, 0);
    }
    for _ in 0..20 {
        assert_eq!(
            pick(&pool, &mut rng, &Balance::LeastConnections, &[]),
            Some(1)
        );
    }
}

#[test]
fn a_backend_at_its_limit_gets_nothing_and_a_pool_of_them_is_full() {
    let calm = Calm::new();
    for balance in &[Balance::RoundRobin, Balance::LeastConnections] {
        let (pool, mut rng) = pool(&[100, 100, 0]);
        let at = Circumstances {
            limit: 2,
            ..calm.at(balance, &[])
        };
        for _ in 0..2 {
            pool.targets[0].backend.in_flight().try_enter(0, 2);
        }
        for _ in 0..20 {
            assert_eq!(pool.pick(&at, &mut rng), Choice::Target(1));
        }
        for _ in 0..2 {
            pool.targets[1].backend.in_flight().try_enter(0, 2);
        }
        assert_eq!(pool.pick(&at, &mut rng), Choice::Full);
        let at = Circumstances {
            tried: &[0, 1],
            ..at
        };
        assert_eq!(pool.pick(&at, &mut rng), Choice::Nobody);
    }
}

#[test]
fn the_gateways_zone_comes_first_while_it_has_a_healthy_backend() {
    let zoned = |(i, zone): (usize, &str)| Backend {
        instance: Instance {
            availability_zone: Some(zone.into()),
            ..Instance::default()
        }
        .shared(),
        ..backend(address(i))
    };
    let mut rng = SmallRng::seed_from_u64(7);
    let mut worker = Backends::new(
        0,
        Arc::new(Shared::new(1)),
        RouteCounters::new(Arc::default()),
    );
    worker.set_zone(Some("z1"));
    let published = published(["z1", "z2", "z1", "z2"].into_iter().enumerate().map(zoned));
    let pool = worker.pool(&found(&published), Instant::now(), &mut rng);
    let mut calm = Calm::new();
    for balance in &[Balance::RoundRobin, Balance::LeastConnections] {
        let mut picked = [0; 4];
        for _ in 0..100 {
            let mut at = calm.at(balance, &[]);
            at.prefer_local = true;
            picked[target(pool.pick(&at, &mut rng)).unwrap()] += 1;
        }
        assert_eq!((picked[1], picked[3]), (0, 0), "{picked:?}");
        assert!(picked[0] > 20 && picked[2] > 20, "{picked:?}");
    }
    calm.unhealthy.extend([address(0), address(2)]);
    let mut at = calm.at(&Balance::RoundRobin, &[]);
    at.prefer_local = true;
    let index = target(pool.pick(&at, &mut rng)).unwrap();
    assert!(index == 1 || index == 3);

    worker.set_zone(Some("z2"));
    let pool = worker.pool(&found(&published), Instant::now(), &mut rng);
    at.unhealthy = at.draining;
    let index = target(pool.pick(&at, &mut rng)).unwrap();
    assert!(index == 1 || index == 3, "of another zone after a reload");
}

#[test]
fn a_session_finds_its_instance_unless_that_is_not_to_be_used() {
    let instance = |i: usize| Backend {
        instance: Instance {
            id: Some(format!("instance-{i}").into()),
            ..Instance::default()
        }
        .shared(),
        ..backend(address(i))
    };
    let (pool, _) = state([0, 1, 2].map(instance));
    let mut calm = Calm::new();
    calm.draining.insert(address(2));
    let at = Circumstances {
        limit: 1,
        ..calm.at(&Balance::RoundRobin, &[])
    };
    assert_eq!(pool.pick_instance("instance-1", &at), Some(1));
    assert_eq!(pool.pick_instance("instance-2", &at), None, "drained");
    assert_eq!(pool.pick_instance("instance-3", &at), None);
    assert_eq!(pool.pick_instance("", &at), None);
    pool.targets[1].backend.in_flight().try_enter(0, 1);
    assert_eq!(pool.pick_instance("instance-1", &at), None, "full");
    eject(&pool, 0, at.now);
    assert_eq!(pool.pick_instance("instance-0", &at), None, "ejected");
}

proptest! {
    #[test]
    fn turns_follow_the_weights(weights in proptest::collection::vec(1_u16..=1000, 1..8)) {
        const TURNS: u32 = 4096;
        let (pool, mut rng) = pool(&weights);
        let mut turns = vec![0_u32; weights.len()];
        for _ in 0..TURNS {
            turns[pick(&pool, &mut rng, &Balance::RoundRobin, &[]).unwrap()] += 1;
        }
        let total: u32 = weights.iter().map(|&weight| u32::from(weight)).sum();
        for (turns, weight) in turns.iter().zip(&weights) {
            let share = f64::from(TURNS) * f64::from(*weight) / f64::from(total);
            prop_assert!((f64::from(*turns) - share).abs() < 16.0, "{turns} turns, {share} due");
        }
    }
}
