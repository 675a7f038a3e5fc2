//! What is counted of the requests of one route or one backend, and how long requests took.
//!
//! The counters of a worker are written by it alone; sums over workers are made by whoever reads.

use std::time::Duration;

use http::StatusCode;
use serde::Serialize;

use crate::l7::metrics::Counter;

/// Upper bounds of the latency buckets in microseconds; one more bucket takes the rest.
pub const LATENCY_BOUNDS_US: [u64; 14] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 10_000_000, 60_000_000,
];

pub(super) const BUCKET_COUNT: usize = LATENCY_BOUNDS_US.len() + 1;

/// One worker's counters of a route or a backend.
#[derive(Debug, Default)]
pub(in crate::l7) struct Traffic {
    begun: Counter,
    responses: [Counter; 5],
    aborted: Counter,
    pub retries: Counter,
    pub ejections: Counter,
    bytes_in: Counter,
    bytes_out: Counter,
    latency: Latency,
}

/// How a request ended.
#[derive(Clone, Copy, Debug)]
pub(in crate::l7) struct Outcome {
    /// `None` if its response did not end.
    pub status: Option<StatusCode>,
    /// From its head to its end.
    pub latency: Duration,
    /// Of bodies, or both ways after a change of protocol.
    pub bytes_in: u64,
    pub bytes_out: u64,
}

/// Sums over workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrafficTotals {
    pub begun: u64,
    /// Requests whose response ended whole, by first digit of their status: 1 to 5.
    pub responses: [u64; 5],
    /// Requests whose response did not.
    pub aborted: u64,
    pub retries: u64,
    pub ejections: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub latency: LatencyTotals,
}

/// How long requests took, upgraded connections excepted.
#[derive(Debug, Default)]
pub(super) struct Latency {
    buckets: [Counter; BUCKET_COUNT],
    sum_us: Counter,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LatencyTotals {
    /// Not cumulative; bounds in [`LATENCY_BOUNDS_US`].
    #[serde(rename = "latency_buckets")]
    pub buckets: [u64; BUCKET_COUNT],
    #[serde(rename = "latency_sum")]
    pub sum: Duration,
}

impl Traffic {
    pub(in crate::l7) fn begin(&self) {
        self.begun.add(1);
    }

    pub(in crate::l7) fn end(&self, outcome: &Outcome) {
        self.bytes_in.add(outcome.bytes_in);
        self.bytes_out.add(outcome.bytes_out);
        let Some(status) = outcome.status else {
            self.aborted.add(1);
            return;
        };
        self.responses[class(status)].add(1);
        if status != StatusCode::SWITCHING_PROTOCOLS {
            self.latency.record(outcome.latency);
        }
    }

    pub(super) fn add_to(&self, totals: &mut TrafficTotals) {
        // Ends before begins, so that what is in flight is never negative.
        for (total, counter) in totals.responses.iter_mut().zip(&self.responses) {
            *total += counter.read();
        }
        totals.aborted += self.aborted.read();
        totals.begun += self.begun.read();
        totals.retries += self.retries.read();
        totals.ejections += self.ejections.read();
        totals.bytes_in += self.bytes_in.read();
        totals.bytes_out += self.bytes_out.read();
        self.latency.add_to(&mut totals.latency);
    }

    /// Takes in what another has counted that is not written anymore.
    pub(super) fn absorb(&self, other: &Traffic) {
        for (counter, other) in self.responses.iter().zip(&other.responses) {
            counter.add(other.read());
        }
        let pairs = [
            (&self.begun, &other.begun),
            (&self.aborted, &other.aborted),
            (&self.retries, &other.retries),
            (&self.ejections, &other.ejections),
            (&self.bytes_in, &other.bytes_in),
            (&self.bytes_out, &other.bytes_out),
            (&self.latency.sum_us, &other.latency.sum_us),
        ];
        let buckets = self.latency.buckets.iter().zip(&other.latency.buckets);
        for (counter, other) in pairs.into_iter().chain(buckets) {
            counter.add(other.read());
        }
    }
}

impl TrafficTotals {
    pub fn in_flight(&self) -> u64 {
        let ended = self.responses.iter().sum::<u64>() + self.aborted;
        self.begun.saturating_sub(ended)
    }
}

impl Latency {
    pub(super) fn record(&self, latency: Duration) {
        let us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let bucket = LATENCY_BOUNDS_US.iter().position(|&bound| us <= bound);
        self.buckets[bucket.unwrap_or(BUCKET_COUNT - 1)].add(1);
        self.sum_us.add(us);
    }

    pub(super) fn add_to(&self, totals: &mut LatencyTotals) {
        for (total, counter) in totals.buckets.iter_mut().zip(&self.buckets) {
            *total += counter.read();
        }
        totals.sum += Duration::from_micros(self.sum_us.read());
    }
}

impl LatencyTotals {
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The latency that a share of requests, `quantile` of 1, stayed below: exact to its bucket, within
    /// which requests are taken to lie evenly. Beyond the last bound it is that bound. `None` without
    /// requests.
    pub fn quantile(&self, quantile: f64) -> Option<Duration> {
        let count = self.count();
        let rank = (count as f64 * quantile).max(1.0);
        let mut below = 0;
        for (index, &in_bucket) in self.buckets.iter().enumerate() {
            let within = rank - below as f64;
            below += in_bucket;
            if below as f64 >= rank && in_bucket > 0 {
                let lower = index.checked_sub(1).map_or(0, |it| LATENCY_BOUNDS_US[it]);
                let upper = LATENCY_BOUNDS_US.get(index).copied().unwrap_or(lower);
                let us = lower as f64 + (upper - lower) as f64 * within / in_bucket as f64;
                return Some(Duration::from_micros(us as u64));
            }
        }
        None
    }
}

/// Index of the first digit of a status.
pub(in crate::l7) fn class(status: StatusCode) -> usize {
    usize::from(status.as_u16() / 100).clamp(1, 5) - 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn totals(latencies_us: &[u64]) -> LatencyTotals {
        let latency = Latency::default();
        for &us in latencies_us {
            latency.record(Duration::from_micros(us));
        }
        let mut totals = LatencyTotals::default();
        latency.add_to(&mut totals);
        totals
    }

    #[test]
    fn quantiles_are_exact_to_their_bucket() {
        let totals = totals(&[400, 400, 900, 3_000, u64::MAX / 2]);
        let at = |quantile| totals.quantile(quantile).unwrap().as_micros();
        assert_eq!((at(0.4), at(0.6), at(0.8)), (500, 1_000, 5_000));
        assert_eq!(at(1.0), 60_000_000);
        assert_eq!(LatencyTotals::default().quantile(0.5), None);
    }

    proptest! {
        #[test]
        fn a_quantile_is_in_the_bucket_of_its_request(
            mut latencies in proptest::collection::vec(0_u64..60_000_000, 1..50),
            quantile in 0.0_f64..=1.0,
        ) {
            let found = totals(&latencies).quantile(quantile).unwrap().as_micros() as u64;
            latencies.sort_unstable();
            let rank = (latencies.len() as f64 * quantile).max(1.0).ceil() as usize;
            let of_request = latencies[rank - 1];
            let bucket = |us| LATENCY_BOUNDS_US.iter().position(|&bound| us <= bound).unwrap();
            let index = bucket(of_request);
            let lower = index.checked_sub(1).map_or(0, |it| LATENCY_BOUNDS_US[it]);
            prop_assert!((lower..=LATENCY_BOUNDS_US[index]).contains(&found));
        }

        #[test]
        fn nothing_is_lost_by_absorbing(statuses in proptest::collection::vec(100_u16..600, 0..20)) {
            let [one, other] = [Traffic::default(), Traffic::default()];
            for (index, &status) in statuses.iter().enumerate() {
                one.begin();
                one.end(&Outcome {
                    status: StatusCode::from_u16(status).ok().filter(|_| index % 3 > 0),
                    latency: Duration::from_micros(u64::from(status)),
                    bytes_in: 1,
                    bytes_out: 2,
                });
            }
            let mut expected = TrafficTotals::default();
            one.add_to(&mut expected);
            other.absorb(&one);
            let mut absorbed = TrafficTotals::default();
            other.add_to(&mut absorbed);
            prop_assert_eq!(absorbed, expected);
            prop_assert_eq!(absorbed.in_flight(), 0);
        }
    }
}
