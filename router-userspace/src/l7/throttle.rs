//! Whether a request may begin: asks the token buckets of its client and of its route.
//!
//! Called by `forward` before a backend is looked for. The buckets are in [`crate::l7::rate`].

use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderMap;

use crate::l7::balance::PoolState;
use crate::l7::clients;
use crate::l7::error::{Failure, RateLimit};
use crate::l7::rate::Verdict;
use crate::l7::worker::Worker;
use crate::route::policy::Rate;

/// Stands for the gateway among the scopes of clients' buckets; a route's is the address of its policy.
const GATEWAY: usize = 0;

/// Counts a request against `http.limits.client_rate`.
///
/// # Errors
/// The client has begun too many.
pub(super) fn by_gateway(
    worker: &Worker,
    peer: IpAddr,
    headers: &HeaderMap,
) -> Result<(), Failure> {
    match worker.settings(|settings| settings.limits.client_rate) {
        Some(rate) => by_client(worker, GATEWAY, peer, headers, rate.rate()),
        None => Ok(()),
    }
}

/// Counts a request against the rates of its route: of one client, and of all.
///
/// # Errors
/// Too many have begun.
pub(super) fn by_route(
    worker: &Worker,
    pool: &PoolState,
    peer: IpAddr,
    headers: &HeaderMap,
) -> Result<(), Failure> {
    let (Some(policy), Some(route)) = (&pool.policy, &pool.route) else {
        return Ok(());
    };
    if let Some(rate) = policy.limits.client_rate {
        by_client(worker, Arc::as_ptr(policy).addr(), peer, headers, rate)?;
    }
    let Some(rate) = policy.limits.rate else {
        return Ok(());
    };
    let elapsed = worker.shared.client_buckets.elapsed(worker.now());
    answer(RateLimit::Route, route.bucket.admit(rate, elapsed))
}

fn by_client(
    worker: &Worker,
    scope: usize,
    peer: IpAddr,
    headers: &HeaderMap,
    rate: Rate,
) -> Result<(), Failure> {
    let sender = worker
        .settings(|settings| clients::sender(peer, headers, |address| settings.trusts(address)));
    let found = worker
        .shared
        .client_buckets
        .admit(scope, sender, rate, worker.now());
    if found.displaced {
        worker.metrics.client_buckets_full.add(1);
    }
    answer(RateLimit::Client, found.verdict)
}

fn answer(by: RateLimit, verdict: Verdict) -> Result<(), Failure> {
    match verdict {
        Verdict::Admitted => Ok(()),
        Verdict::Refused(wait) => Err(Failure::RateLimited { by, wait }),
    }
}
