//! What each request of a worker is marked with: its id, and when it began.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::HeaderValue;
use rand::Rng;
use tokio::time::Instant;

/// Request ids made at once: 1152 bytes, freed when the last request that has one of them ends.
const REQUEST_IDS_AT_ONCE: usize = 32;

/// The value of `X-Request-Start`, made once a millisecond.
pub(super) struct RequestStart {
    epoch: SystemTime,
    at: Instant,
    ms: u128,
    value: HeaderValue,
}

/// UUIDs one behind the other. Cut from one buffer, they cost no allocation each, nor when cloned.
pub(super) fn request_ids(rng: &mut impl Rng) -> Bytes {
    let mut text = Vec::with_capacity(REQUEST_IDS_AT_ONCE * uuid::fmt::Hyphenated::LENGTH);
    for _ in 0..REQUEST_IDS_AT_ONCE {
        let id = uuid::Builder::from_random_bytes(rng.random()).into_uuid();
        let mut buffer = [0; uuid::fmt::Hyphenated::LENGTH];
        text.extend_from_slice(id.hyphenated().encode_lower(&mut buffer).as_bytes());
    }
    Bytes::from(text)
}

impl RequestStart {
    pub(super) fn new(at: Instant) -> RequestStart {
        RequestStart {
            epoch: SystemTime::now(),
            at,
            ms: 0,
            value: HeaderValue::from_static("0"),
        }
    }

    pub(super) fn since_epoch(&self, at: Instant) -> Duration {
        let epoch = self.epoch.duration_since(UNIX_EPOCH).unwrap_or_default();
        let before = self.at.saturating_duration_since(at);
        (epoch + at.saturating_duration_since(self.at)).saturating_sub(before)
    }

    pub(super) fn value(&mut self, now: Instant) -> HeaderValue {
        let ms = self.since_epoch(now).as_millis();
        if ms != self.ms {
            self.ms = ms;
            self.value = HeaderValue::from(u64::try_from(ms).unwrap_or(u64::MAX));
        }
        self.value.clone()
    }
}
