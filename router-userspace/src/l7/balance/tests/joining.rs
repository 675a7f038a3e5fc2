//! Slow start: backends that join a pool.

use super::*;

const SLOW_START: Duration = Duration::from_secs(100);

/// A pool of two, to which a third was added now; and when that was.
fn joined() -> (Rc<PoolState>, Instant, SmallRng) {
    let mut rng = SmallRng::seed_from_u64(7);
    let mut worker = Backends::new(
        0,
        Arc::new(Shared::new(1)),
        RouteCounters::new(Arc::default()),
    );
    let before = Instant::now();
    let two = published([0, 1].map(|i| backend(address(i))));
    let _kept = worker.pool(&found(&two), before, &mut rng);
    let now = before + Duration::from_secs(1000);
    let three = published([0, 1, 2].map(|i| backend(address(i))));
    (worker.pool(&found(&three), now, &mut rng), now, rng)
}

/// How many of 3000 requests the third gets at this time.
fn picked(pool: &PoolState, balance: &Balance, now: Instant, rng: &mut SmallRng) -> usize {
    let calm = Calm::new();
    let at = Circumstances {
        now,
        slow_start: SLOW_START,
        ..calm.at(balance, &[])
    };
    let third = |key: u64| {
        let at = Circumstances {
            key: Some(hash::score(key, 1)),
            ..at
        };
        pool.pick(&at, rng) == Choice::Target(2)
    };
    (0..3000).map(third).filter(|&is_third| is_third).count()
}

#[test]
fn a_backend_that_joins_gets_its_share_bit_by_bit() {
    let hash = Balance::Hash(Arc::new(crate::route::policy::HashKey {
        of: crate::route::policy::HashOf::Source,
        balance_percent: None,
    }));
    for balance in [Balance::RoundRobin, hash] {
        let (pool, joined, mut rng) = joined();
        let mut at = |percent| {
            let now = joined + SLOW_START * percent / 100;
            picked(&pool, &balance, now, &mut rng)
        };
        // Of shares of 1, 1 and a tenth; then a half; then 1.
        assert!((90..200).contains(&at(0)), "{}", at(0));
        assert!((500..700).contains(&at(50)), "{}", at(50));
        assert!((900..1100).contains(&at(100)), "{}", at(100));
    }
}

#[test]
fn least_connections_does_not_flood_a_backend_that_joins() {
    let (pool, now, mut rng) = joined();
    for index in [0, 1] {
        for _ in 0..5 {
            pool.targets[index].backend.in_flight().try_enter(0, 0);
        }
    }
    let mut at = |now| picked(&pool, &Balance::LeastConnections, now, &mut rng);
    assert_eq!(
        at(now),
        0,
        "with a tenth of a share, idle is as much as 9 in flight"
    );
    assert!(at(now + SLOW_START) > 1000);
}

#[test]
fn backends_that_are_all_new_share_evenly() {
    let (pool, mut rng) = pool(&[100; 3]);
    let count = picked(&pool, &Balance::RoundRobin, Instant::now(), &mut rng);
    assert_eq!(count, 1000);
}
