//! The same backend for the same key: rendezvous hashing, with bounded load. Pure.
//!
//! Every backend has a score for a key, and the best one serves it: Thaler and Ravishankar, "Using
//! name-based mappings to increase hit rates", ToN 1998, with the logarithmic weights of Schindelhauer
//! and Schomaker, "Weighted distributed hash tables", SPAA 2005. A backend that comes or goes moves
//! its own keys and no other, its share follows its weight exactly, and where it is full a key's
//! second choice is as scattered as its first. Nothing is built when a pool changes; a choice costs
//! a few nanoseconds for each backend. Scores depend on names alone, so all workers and gateways agree.

use std::net::IpAddr;

use http::HeaderMap;

use crate::l4::maglev::stable_hash;
use crate::l7::sticky::cookie;
use crate::route::Backend;
use crate::route::policy::HashOf;

/// The hash of what a request is balanced by; `None` if it has no such thing.
pub(in crate::l7) fn key(of: &HashOf, headers: &HeaderMap, client: IpAddr) -> Option<u64> {
    let bytes = match of {
        HashOf::Header(name) => headers.get(&**name)?.as_bytes(),
        HashOf::Cookie(name) => cookie(headers, name)?,
        HashOf::Source => {
            return Some(match client.to_canonical() {
                IpAddr::V4(v4) => stable_hash(v4.octets()),
                IpAddr::V6(v6) => stable_hash(v6.octets()),
            });
        }
    };
    (!bytes.is_empty()).then(|| stable_hash(bytes.iter().copied()))
}

/// What stands for a backend in its scores: its instance id, since an instance that is started again
/// elsewhere is the same, or its address.
pub(super) fn seed(backend: &Backend) -> u64 {
    match backend.instance().id.as_deref().filter(|id| !id.is_empty()) {
        Some(id) => stable_hash(id.bytes()),
        None => stable_hash(backend.address.to_string().bytes()),
    }
}

/// A backend's score for a key among backends of the same weight.
pub(super) fn score(key: u64, seed: u64) -> u64 {
    // The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
    let mut z = key ^ seed.rotate_left(32);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A score that is best as often as the weight says; in the order of [`score`] for equal weights.
pub(super) fn weighted(score: u64, weight: f64) -> f64 {
    // Between 0 and 1, neither of them, so that the logarithm is finite and not 0.
    let uniform = ((score >> 12) as f64 + 0.5) / (1_u64 << 52) as f64;
    weight / -uniform.ln()
}

/// How many requests a backend may carry, this one included, where `total` are in flight and its
/// weight is `weight` of `weights`: `percent` of its share (Mirrokni, Thorup and Zadimoghaddam,
/// "Consistent hashing with bounded loads", SODA 2018, §2).
pub(super) fn capacity(total: u64, weight: u64, weights: u64, percent: u32) -> u64 {
    let share = u128::from(total + 1) * u128::from(weight) * u128::from(percent);
    let capacity = share.div_ceil(u128::from(weights.max(1)) * 100);
    u64::try_from(capacity).unwrap_or(u64::MAX)
}
