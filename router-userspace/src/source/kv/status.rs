//! What others may see of the bucket: whether it is followed, and which key declares what at which
//! revision.
//!
//! The source writes, the admin API reads. Beside the routes, so that those of other sources cost
//! nothing for it.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use serde::Serialize;

use crate::route::RouteKey;

/// How the gateway stands to the bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Not configured, or the server has no JetStream.
    #[default]
    Off,
    /// Not read since the start.
    Unread,
    /// Read, and followed.
    Followed,
    /// Was read, and cannot be followed at this time: what it declared stays.
    Lost,
}

#[derive(Debug, Default)]
pub struct Status {
    state: AtomicU8,
    pub revisions: Revisions,
}

/// The entries that were taken.
#[derive(Debug, Default)]
pub struct Revisions(RwLock<Entries>);

#[derive(Debug, Default)]
struct Entries {
    by_key: HashMap<Arc<str>, Vec<RouteKey>>,
    by_route: HashMap<RouteKey, BTreeMap<Arc<str>, u64>>,
}

/// A key that declares something of a route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Declarer {
    pub key: Arc<str>,
    pub revision: u64,
}

impl Status {
    pub fn set(&self, state: State) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    pub fn state(&self) -> State {
        let state = self.state.load(Ordering::Relaxed);
        [State::Off, State::Unread, State::Followed, State::Lost][usize::from(state)]
    }
}

impl Revisions {
    pub(super) fn set(&self, key: &str, revision: u64, routes: Vec<RouteKey>) {
        let mut entries = self.write();
        entries.remove(key);
        let key: Arc<str> = key.into();
        for route in &routes {
            let keys = entries.by_route.entry(route.clone()).or_default();
            keys.insert(Arc::clone(&key), revision);
        }
        entries.by_key.insert(key, routes);
    }

    pub(super) fn remove(&self, key: &str) {
        self.write().remove(key);
    }

    /// The keys that say something of a route, in their order.
    pub fn of(&self, route: &RouteKey) -> Vec<Declarer> {
        let entries = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let keys = entries.by_route.get(route).into_iter().flatten();
        let declarer = |(key, &revision): (&Arc<str>, &u64)| Declarer {
            key: Arc::clone(key),
            revision,
        };
        keys.map(declarer).collect()
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Entries> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    fn remove(&mut self, key: &str) {
        for route in self.by_key.remove(key).unwrap_or_default() {
            let Some(keys) = self.by_route.get_mut(&route) else {
                continue;
            };
            keys.remove(key);
            if keys.is_empty() {
                self.by_route.remove(&route);
            }
        }
    }
}
