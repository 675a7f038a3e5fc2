//! What the workers know together: of each backend its requests in flight and its ejection, of each
//! route with limits its requests in flight and its rate, of each client its connections and its rates.
//!
//! A worker asks for a backend's part once, when it first meets the backend, and keeps it; the lock
//! around the list is held for one lookup. Nothing else here is locked.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::time::Instant;

use crate::l7::admission::InFlight;
use crate::l7::clients::Clients;
use crate::l7::outlier::Outlier;
use crate::l7::rate::{Bucket, ClientBuckets};
use crate::route::policy::HttpPolicy;
use crate::route::{BackendTls, HttpProtocol};

/// Connections are shared between pools that reach the same socket with the same proof of identity
/// and protocol.
pub(super) type BackendKey = (SocketAddr, Option<BackendTls>, HttpProtocol);

/// One for all workers.
#[derive(Debug)]
pub(super) struct Shared {
    /// How many connections each client has.
    pub clients: Arc<Clients>,
    /// What clients have begun lately.
    pub client_buckets: ClientBuckets,
    workers: usize,
    backends: Mutex<Known<BackendKey, SharedBackend>>,
    /// By the address of the policy, which is not given to another while a `Weak` of it is here.
    routes: Mutex<Known<usize, SharedRoute>>,
}

/// What is in use, and some that was.
#[derive(Debug)]
struct Known<K, V> {
    parts: HashMap<K, Weak<V>>,
    /// At how many of them those not in use are let go.
    full: usize,
}

#[derive(Debug)]
pub(super) struct SharedBackend {
    pub in_flight: InFlight,
    pub outlier: Outlier,
    /// When the first worker met it.
    pub since: Instant,
}

/// A route with a policy, which is the same over all that changes its pool.
#[derive(Debug)]
pub(super) struct SharedRoute {
    pub in_flight: InFlight,
    /// What has been begun lately.
    pub bucket: Bucket,
    _policy: Weak<HttpPolicy>,
}

impl Shared {
    pub(super) fn new(workers: usize) -> Shared {
        Shared {
            clients: Arc::new(Clients::new()),
            client_buckets: ClientBuckets::new(Instant::now()),
            workers,
            backends: Mutex::default(),
            routes: Mutex::default(),
        }
    }

    pub(super) fn backend(&self, key: &BackendKey, now: Instant) -> Arc<SharedBackend> {
        let mut backends = self.backends.lock().unwrap_or_else(PoisonError::into_inner);
        backends.get_or_insert(key, || SharedBackend {
            in_flight: InFlight::new(self.workers),
            outlier: Outlier::new(now),
            since: now,
        })
    }

    pub(super) fn route(&self, policy: &Arc<HttpPolicy>) -> Arc<SharedRoute> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        routes.get_or_insert(&Arc::as_ptr(policy).addr(), || SharedRoute {
            in_flight: InFlight::new(self.workers),
            bucket: Bucket::default(),
            _policy: Arc::downgrade(policy),
        })
    }
}

impl<K: Clone + Eq + Hash, V> Known<K, V> {
    fn get_or_insert(&mut self, key: &K, new: impl FnOnce() -> V) -> Arc<V> {
        if let Some(known) = self.parts.get(key).and_then(Weak::upgrade) {
            return known;
        }
        if self.parts.len() >= self.full {
            self.parts.retain(|_, part| part.strong_count() > 0);
            self.full = 2 * self.parts.len() + 64;
        }
        let part = Arc::new(new());
        self.parts.insert(key.clone(), Arc::downgrade(&part));
        part
    }
}

impl<K, V> Default for Known<K, V> {
    fn default() -> Known<K, V> {
        Known {
            parts: HashMap::new(),
            full: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(port: u16) -> BackendKey {
        (
            SocketAddr::from(([10, 0, 0, 1], port)),
            None,
            HttpProtocol::Http1,
        )
    }

    #[test]
    fn workers_that_meet_a_backend_share_its_part() {
        let shared = Shared::new(2);
        let [one, other] = [(); 2].map(|()| shared.backend(&key(1), Instant::now()));
        assert!(one.in_flight.try_enter(0, 1));
        assert!(!other.in_flight.try_enter(1, 1));
        assert!(!Arc::ptr_eq(&one, &shared.backend(&key(2), Instant::now())));
    }

    #[test]
    fn routes_of_one_policy_share_its_part() {
        let shared = Shared::new(1);
        let [one, other] = [(); 2].map(|()| Arc::new(HttpPolicy::new(crate::route::Origin::File)));
        let part = shared.route(&one);
        assert!(Arc::ptr_eq(&part, &shared.route(&one)));
        assert!(!Arc::ptr_eq(&part, &shared.route(&other)));
    }

    #[test]
    fn what_no_worker_uses_is_forgotten() {
        let shared = Shared::new(1);
        for port in 0..1000 {
            shared.backend(&key(port), Instant::now());
        }
        assert!(shared.backends.lock().unwrap().parts.len() <= 64);
    }
}
