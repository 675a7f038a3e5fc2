//! Token buckets: how many requests a route, or one client, may begin.
//!
//! The generic cell rate algorithm (ITU-T I.371): a bucket is the one point in time at which it would be
//! full again, so it fits a word that all workers change by compare-and-swap. Nothing is locked, and the
//! rate is that of all workers together. Time is an argument.

use std::hash::{BuildHasher, Hash, RandomState};
use std::net::IpAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::l7::clients::network_of;
use crate::route::policy::Rate;

/// Buckets of clients, over all routes: 2 MiB, which are there once a route or the gateway limits its clients.
const CLIENT_BUCKETS: usize = 1 << 18;

/// Places a client's bucket may have.
const WAYS: usize = 4;

/// A word of a client's bucket: which client it is, and microseconds since the start.
const TAG_BITS: u32 = 16;
const TIME_MASK: u64 = u64::MAX >> TAG_BITS;

/// What a bucket says of one more request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Admitted,
    /// Room will be after this long, if nobody else takes it.
    Refused(Duration),
}

/// The bucket of a route.
#[derive(Debug, Default)]
pub(super) struct Bucket(AtomicU64);

impl Bucket {
    /// Takes a token. `elapsed` is since a time that is the same for all calls.
    pub(super) fn admit(&self, rate: Rate, elapsed: Duration) -> Verdict {
        let now = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        let cell = Cell::new(rate, 1_000_000_000);
        let mut known = self.0.load(Ordering::Relaxed);
        loop {
            let full_at = match cell.admit(known, now) {
                Ok(full_at) => full_at,
                Err(wait) => return Verdict::Refused(Duration::from_nanos(wait)),
            };
            match (self.0).compare_exchange_weak(
                known,
                full_at,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Verdict::Admitted,
                Err(other) => known = other,
            }
        }
    }
}

/// The buckets of clients: a table of fixed size, in which an idle client's place goes to another one.
///
/// A client is told from others by 16 bits of a keyed hash beside its place, so two in 60,000 or so may
/// share a bucket; nobody outside can tell which.
#[derive(Debug)]
pub(super) struct ClientBuckets {
    start: Instant,
    hasher: RandomState,
    words: OnceLock<Box<[AtomicU64]>>,
}

/// What [`ClientBuckets::admit`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClientVerdict {
    pub verdict: Verdict,
    /// The bucket of a client that is not idle was given up for this one.
    pub displaced: bool,
}

impl ClientBuckets {
    pub(super) fn new(start: Instant) -> ClientBuckets {
        ClientBuckets {
            start,
            hasher: RandomState::new(),
            words: OnceLock::new(),
        }
    }

    /// Since the start.
    pub(super) fn elapsed(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.start)
    }

    /// Takes a token of the client's bucket for `scope`, which tells buckets of one client apart.
    pub(super) fn admit(
        &self,
        scope: impl Hash,
        client: IpAddr,
        rate: Rate,
        now: Instant,
    ) -> ClientVerdict {
        let words = self.words.get_or_init(|| {
            let words = (0..CLIENT_BUCKETS).map(|_| AtomicU64::new(0));
            words.collect()
        });
        let hash = self.hasher.hash_one((scope, network_of(client)));
        let first = (hash as usize) % (CLIENT_BUCKETS / WAYS) * WAYS;
        let tag = hash & !TIME_MASK;
        let now = u64::try_from(self.elapsed(now).as_micros()).unwrap_or(TIME_MASK);
        admit_in(&words[first..first + WAYS], tag, rate, now)
    }
}

fn admit_in(ways: &[AtomicU64], tag: u64, rate: Rate, now: u64) -> ClientVerdict {
    let cell = Cell::new(rate, 1_000_000);
    loop {
        let known: [u64; WAYS] = std::array::from_fn(|way| ways[way].load(Ordering::Relaxed));
        let own = known.iter().position(|word| word & !TIME_MASK == tag);
        let (way, full_at, displaced) = match own {
            Some(way) => (way, known[way] & TIME_MASK, false),
            None => {
                let time_of = |way: &usize| known[*way] & TIME_MASK;
                let way = (0..WAYS).min_by_key(time_of).expect("there are ways");
                (way, 0, time_of(&way) > now)
            }
        };
        let full_at = match cell.admit(full_at, now) {
            Ok(full_at) => full_at & TIME_MASK,
            Err(wait) => {
                return ClientVerdict {
                    verdict: Verdict::Refused(Duration::from_micros(wait)),
                    displaced: false,
                };
            }
        };
        let changed = ways[way].compare_exchange(
            known[way],
            tag | full_at,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
        if changed.is_ok() {
            return ClientVerdict {
                verdict: Verdict::Admitted,
                displaced,
            };
        }
    }
}

/// A rate in units of time.
#[derive(Clone, Copy, Debug)]
struct Cell {
    /// Between two requests.
    interval: u64,
    /// How far ahead the bucket may be full again for one more request to be admitted.
    tolerance: u64,
}

impl Cell {
    fn new(rate: Rate, units_per_second: u64) -> Cell {
        let interval = units_per_second / u64::from(rate.per_second.max(1));
        Cell {
            interval,
            tolerance: interval.saturating_mul(u64::from(rate.burst.max(1)) - 1),
        }
    }

    /// When the bucket is full again after one more request, or how long that has to wait.
    fn admit(self, full_at: u64, now: u64) -> Result<u64, u64> {
        let full_at = full_at.max(now);
        match (full_at - now).checked_sub(self.tolerance) {
            None | Some(0) => Ok(full_at.saturating_add(self.interval)),
            Some(wait) => Err(wait),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RATE: Rate = Rate {
        per_second: 10,
        burst: 3,
    };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_burst_is_admitted_and_then_the_rate() {
        let bucket = Bucket::default();
        for _ in 0..3 {
            assert_eq!(bucket.admit(RATE, ms(1000)), Verdict::Admitted);
        }
        let refused = bucket.admit(RATE, ms(1000));
        assert_eq!(refused, Verdict::Refused(ms(100)));
        assert_eq!(bucket.admit(RATE, ms(1050)), Verdict::Refused(ms(50)));
        assert_eq!(bucket.admit(RATE, ms(1100)), Verdict::Admitted);
        assert_eq!(bucket.admit(RATE, ms(1100)), Verdict::Refused(ms(100)));
    }

    #[test]
    fn clients_have_buckets_of_their_own_and_networks_of_ipv6_one() {
        let now = Instant::now();
        let buckets = ClientBuckets::new(now);
        let once = Rate { burst: 1, ..RATE };
        let admit = |scope: u8, client: &str| {
            let client = client.parse().unwrap();
            buckets.admit(scope, client, once, now).verdict == Verdict::Admitted
        };
        assert!(admit(0, "192.0.2.1"));
        assert!(!admit(0, "192.0.2.1"));
        assert!(admit(0, "192.0.2.2"));
        assert!(admit(1, "192.0.2.1"));
        assert!(admit(0, "2001:db8::1"));
        assert!(!admit(0, "2001:db8::2"));
        assert!(admit(0, "2001:db8:0:1::1"));
    }

    #[test]
    fn the_place_of_an_idle_client_is_taken_first() {
        let ways: [AtomicU64; WAYS] = Default::default();
        let client = |number: u64| number << (64 - TAG_BITS);
        for number in 1..=4 {
            assert!(!admit_in(&ways, client(number), RATE, number * 1000).displaced);
        }
        // All four are busy, and the first has waited longest.
        assert!(admit_in(&ways, client(5), RATE, 5000).displaced);
        assert_eq!(ways[0].load(Ordering::Relaxed) & !TIME_MASK, client(5));
        let later = 10_000_000;
        assert!(!admit_in(&ways, client(6), RATE, later).displaced);
    }

    proptest! {
        #[test]
        fn never_more_than_burst_and_rate_allow(
            per_second in 1_u32..2000,
            burst in 1_u32..50,
            steps in proptest::collection::vec(0_u64..20_000, 1..300),
        ) {
            let rate = Rate { per_second, burst };
            let bucket = Bucket::default();
            let mut now = 0;
            let mut admitted = 0_u64;
            for step in steps {
                now += step;
                if bucket.admit(rate, Duration::from_micros(now)) == Verdict::Admitted {
                    admitted += 1;
                }
            }
            let allowed = u64::from(burst) + now * u64::from(per_second) / 1_000_000 + 1;
            prop_assert!(admitted <= allowed, "{admitted} > {allowed}");
        }

        #[test]
        fn who_waits_as_told_is_admitted(per_second in 1_u32..2000, burst in 1_u32..50) {
            let rate = Rate { per_second, burst };
            let bucket = Bucket::default();
            let mut now = Duration::ZERO;
            for _ in 0..200 {
                if let Verdict::Refused(wait) = bucket.admit(rate, now) {
                    now += wait;
                    prop_assert_eq!(bucket.admit(rate, now), Verdict::Admitted);
                }
            }
        }
    }
}
