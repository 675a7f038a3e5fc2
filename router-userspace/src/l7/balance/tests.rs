use std::time::Duration;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::*;
use crate::l7::backend::Backends;
use crate::l7::tests::backend;

/// The state of a pool with these weights; backend `i` is 10.0.0.1:(i + 1).
fn pool(weights: &[u16]) -> (Rc<PoolState>, SmallRng) {
    let mut rng = SmallRng::seed_from_u64(7);
    let backends = weights
        .iter()
        .enumerate()
        .map(|(i, &weight)| {
            Arc::new(Backend {
                weight,
                ..backend(address(i))
            })
        })
        .collect();
    let pool = Arc::new(Pool {
        backends,
        balance: None,
        route_service_url: None,
        policy: None,
    });
    (Backends::default().pool(&pool, &mut rng), rng)
}

#[test]
fn a_pool_that_is_not_published_is_forgotten_by_every_worker() {
    let mut rng = SmallRng::seed_from_u64(7);
    let pool = Arc::new(Pool {
        backends: vec![Arc::new(backend(address(0)))],
        balance: None,
        route_service_url: None,
        policy: None,
    });
    let mut workers = [Backends::default(), Backends::default()];
    for worker in &mut workers {
        worker.pool(&pool, &mut rng);
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

fn pick(pool: &PoolState, rng: &mut SmallRng, balance: &Balance, tried: &[usize]) -> Option<usize> {
    let unhealthy = imbl::HashSet::new();
    pool.pick(
        &Circumstances {
            balance,
            now: Instant::now(),
            unhealthy: &unhealthy,
            panic: false,
            draining: &imbl::HashSet::new(),
            tried,
        },
        rng,
    )
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
    let unhealthy = imbl::HashSet::new();
    let draining = imbl::HashSet::unit(pool.targets[0].backend.address());
    for balance in &[Balance::RoundRobin, Balance::LeastConnections] {
        let mut at = Circumstances {
            balance,
            now: Instant::now(),
            unhealthy: &unhealthy,
            panic: true,
            draining: &draining,
            tried: &[],
        };
        for _ in 0..20 {
            assert_eq!(pool.pick(&at, &mut rng), Some(1));
        }
        at.tried = &[1];
        assert_eq!(pool.pick(&at, &mut rng), None);
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
    let unhealthy = imbl::HashSet::unit(address(0));
    pool.targets[1].backend.eject(now + Duration::from_secs(30));
    for balance in &[Balance::RoundRobin, Balance::LeastConnections] {
        let mut at = Circumstances {
            balance,
            now,
            unhealthy: &unhealthy,
            panic: false,
            draining: &imbl::HashSet::new(),
            tried: &[],
        };
        for _ in 0..8 {
            assert_eq!(pool.pick(&at, &mut rng), Some(2));
        }
        at.tried = &[2];
        assert!(pool.pick(&at, &mut rng).is_some());
    }
}

#[test]
fn in_panic_the_unhealthy_are_used_and_the_ejected_still_avoided() {
    let (pool, mut rng) = pool(&[100, 100, 100]);
    let now = Instant::now();
    pool.targets[1].backend.eject(now + Duration::from_secs(30));
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
            balance,
            now,
            unhealthy: &snapshot.unhealthy,
            panic: true,
            draining: &imbl::HashSet::new(),
            tried: &[],
        };
        let mut picked = [0; 3];
        for _ in 0..64 {
            picked[pool.pick(&at, &mut rng).unwrap()] += 1;
        }
        assert!(
            picked[0] > 0 && picked[1] == 0 && picked[2] > 0,
            "{picked:?}"
        );
    }
}

#[test]
fn an_ejection_ends() {
    let (pool, _) = pool(&[100]);
    let now = Instant::now();
    pool.targets[0].backend.eject(now + Duration::from_secs(30));
    assert!(
        pool.targets[0]
            .backend
            .is_ejected(now + Duration::from_secs(29))
    );
    assert!(
        !pool.targets[0]
            .backend
            .is_ejected(now + Duration::from_secs(30))
    );
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
