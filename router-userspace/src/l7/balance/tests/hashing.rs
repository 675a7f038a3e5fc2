//! The same backend for the same key.

use std::sync::Arc;

use http::HeaderValue;

use super::*;
use crate::route::policy::{HashKey, HashOf};

fn by_header(balance_percent: Option<u32>) -> Balance {
    Balance::Hash(Arc::new(HashKey {
        of: HashOf::Header("x-user".into()),
        balance_percent,
    }))
}

fn pick_key(pool: &PoolState, key: u64, balance: &Balance, tried: &[usize]) -> Option<usize> {
    let calm = Calm::new();
    let at = Circumstances {
        key: Some(key),
        ..calm.at(balance, tried)
    };
    target(pool.pick(&at, &mut SmallRng::seed_from_u64(key)))
}

/// A key as requests have it.
fn key(i: u64) -> u64 {
    let headers = [("x-user".parse().unwrap(), HeaderValue::from(i))];
    let of = HashOf::Header("x-user".into());
    hash::key(&of, &headers.into_iter().collect(), [192, 0, 2, 1].into()).unwrap()
}

#[test]
fn a_key_is_a_header_a_cookie_or_the_client() {
    let headers: HeaderMap = [
        ("x-user", "alice"),
        ("x-empty", ""),
        ("cookie", "a=1; user=alice; none="),
    ]
    .into_iter()
    .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
    .collect();
    let key_of = |of| hash::key(&of, &headers, [192, 0, 2, 1].into());
    let alice = key_of(HashOf::Header("x-user".into()));
    assert!(alice.is_some());
    assert_eq!(key_of(HashOf::Cookie("user".into())), alice);
    for none in [
        HashOf::Header("x-other".into()),
        HashOf::Header("x-empty".into()),
        HashOf::Cookie("other".into()),
        HashOf::Cookie("none".into()),
    ] {
        assert_eq!(key_of(none), None);
    }
    let mapped = "::ffff:192.0.2.1".parse().unwrap();
    assert_eq!(
        key_of(HashOf::Source),
        hash::key(&HashOf::Source, &headers, mapped)
    );
}

#[test]
fn gateways_agree_whatever_order_they_learn_backends_in() {
    // Fixed, for another version of the gateway has to agree as well.
    let (pool, _) = pool(&[100, 100, 100, 100]);
    let picks: Vec<_> = (0..8)
        .map(|i| pick_key(&pool, key(i), &by_header(None), &[]).unwrap())
        .collect();
    assert_eq!(picks, [2, 1, 0, 2, 2, 1, 0, 0]);
}

#[test]
fn an_instance_keeps_its_keys_when_it_moves() {
    let instance = |i: usize, moved: usize| Backend {
        instance: Instance {
            id: Some(format!("instance-{i}").into()),
            ..Instance::default()
        }
        .shared(),
        ..backend(address(i + moved))
    };
    let (before, _) = state([0, 1, 2].map(|i| instance(i, 0)));
    let (after, _) = state([0, 1, 2].map(|i| instance(i, 10)));
    for i in 0..100 {
        let pick = |pool| pick_key(pool, key(i), &by_header(None), &[]);
        assert_eq!(pick(&before), pick(&after));
    }
}

#[test]
fn a_request_without_the_key_takes_its_turn() {
    let (pool, mut rng) = pool(&[100, 100, 100]);
    let mut picked = [0; 3];
    for _ in 0..30 {
        picked[pick(&pool, &mut rng, &by_header(None), &[]).unwrap()] += 1;
    }
    assert_eq!(picked, [10; 3]);
}

#[test]
fn a_backend_beyond_its_bound_sheds_keys_and_takes_them_back() {
    let (pool, _) = pool(&[100; 4]);
    let bounded = by_header(Some(125));
    let first = pick_key(&pool, 7, &bounded, &[]).unwrap();
    // 9 in flight, this one is the tenth: 10 / 4 * 1.25, rounded up, is 4.
    for index in 0..4 {
        let count = if index == first { 3 } else { 2 };
        for _ in 0..count {
            pool.targets[index].backend.in_flight().try_enter(0, 0);
        }
    }
    assert_eq!(pick_key(&pool, 7, &bounded, &[]), Some(first));
    pool.targets[first].backend.in_flight().try_enter(0, 0);
    let second = pick_key(&pool, 7, &bounded, &[]).unwrap();
    assert_ne!(second, first);
    assert_eq!(pick_key(&pool, 7, &by_header(None), &[]), Some(first));
    assert_eq!(
        pick_key(&pool, 7, &by_header(None), &[first]),
        Some(second),
        "the next is the same for a retry"
    );
    pool.targets[first].backend.in_flight().leave(0);
    assert_eq!(pick_key(&pool, 7, &bounded, &[]), Some(first));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn only_keys_of_the_backend_that_goes_move(
        weights in prop::collection::vec(1_u16..=1000, 2..12),
        equal: bool,
        gone in 0_usize..12,
    ) {
        let weights = if equal { vec![100; weights.len()] } else { weights };
        let gone = gone % weights.len();
        let (all, _) = pool(&weights);
        let rest = weights.iter().enumerate().filter(|&(i, _)| i != gone).map(|(i, &weight)| Backend {
            weight,
            ..backend(address(i))
        });
        let (rest, _) = state(rest);
        for i in 0..200 {
            let before = pick_key(&all, key(i), &by_header(None), &[]).unwrap();
            let after = pick_key(&rest, key(i), &by_header(None), &[]).unwrap();
            if before != gone {
                let address = |pool: &PoolState, index: usize| pool.targets[index].backend.address();
                prop_assert_eq!(address(&all, before), address(&rest, after));
            }
        }
    }

    #[test]
    fn keys_follow_the_weights(weights in prop::collection::vec(1_u16..=1000, 1..8)) {
        const KEYS: u64 = 4096;
        let (pool, _) = pool(&weights);
        let mut picked = vec![0_u64; weights.len()];
        for i in 0..KEYS {
            picked[pick_key(&pool, key(i), &by_header(None), &[]).unwrap()] += 1;
        }
        let total: u32 = weights.iter().map(|&weight| u32::from(weight)).sum();
        for (picked, weight) in picked.iter().zip(&weights) {
            let share = KEYS as f64 * f64::from(*weight) / f64::from(total);
            // Five standard deviations.
            let slack = 5.0 * share.sqrt() + 5.0;
            prop_assert!((*picked as f64 - share).abs() < slack, "{picked} keys, {share} due");
        }
    }

    #[test]
    fn no_backend_is_filled_beyond_its_bound(
        weights in prop::collection::vec(1_u16..=10, 1..10),
        keys in prop::collection::vec(0_u64..4, 1..100),
        percent in 100_u32..300,
    ) {
        let (pool, _) = pool(&weights);
        let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
        for (placed, &i) in keys.iter().enumerate() {
            let index = pick_key(&pool, key(i), &by_header(Some(percent)), &[]).unwrap();
            let in_flight = pool.targets[index].backend.in_flight();
            in_flight.try_enter(0, 0);
            let weight = u64::from(weights[index]);
            let bound = (placed as u64 + 1) * weight * u64::from(percent);
            prop_assert!(in_flight.total() <= bound.div_ceil(total * 100));
        }
    }
}
