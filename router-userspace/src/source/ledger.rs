//! What a source of declared state says, key by key, and so what of it the agent has been told.
//!
//! A key is a routes file, a key of a store, an instance in a registry: whatever comes and goes as one.
//! Several keys may name the same backend of a route, or declare the same route; the last of them in
//! the order of their names holds. A change costs what its key says, whatever the others hold. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::Arc;

use crate::route::declared::Announcement;
use crate::route::policy::HttpPolicy;
use crate::route::{
    Declaration, HttpMatch, Origin, Registration, RouteEvent, RouteKey, Unregistration, Withdrawal,
};

pub struct Ledger {
    origin: Origin,
    contents: BTreeMap<Arc<str>, Content>,
    backends: HashMap<BackendId, Holders<Registration>>,
    policies: HashMap<HttpMatch, Holders<Arc<HttpPolicy>>>,
}

/// A backend of a route.
type BackendId = (RouteKey, SocketAddr);

/// What each key says of the same thing; the last holds.
type Holders<T> = BTreeMap<Arc<str>, T>;

/// What a key says, by name.
#[derive(Default)]
struct Content {
    backends: BTreeSet<BackendId>,
    policies: BTreeSet<HttpMatch>,
}

impl Ledger {
    pub fn new(origin: Origin) -> Ledger {
        Ledger {
            origin,
            contents: BTreeMap::new(),
            backends: HashMap::new(),
            policies: HashMap::new(),
        }
    }

    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.contents.keys().map(|key| &**key)
    }

    /// Keys that say something.
    pub fn key_count(&self) -> usize {
        self.contents.len()
    }

    /// Keys that come after one, in the order of their names.
    pub fn keys_after(&self, key: &str) -> impl Iterator<Item = &str> {
        let after = (Bound::Excluded(key), Bound::Unbounded);
        self.contents.range::<str, _>(after).map(|(key, _)| &**key)
    }

    /// Whether the key says nothing.
    pub fn is_empty(&self, key: &str) -> bool {
        !self.contents.contains_key(key)
    }

    /// Takes in all that a key says, in place of what it said. Returns what the agent has to be told,
    /// in an order in which no request finds a policy without its backends or a pool emptied on the
    /// way: policies come before backends and go after them, and new backends before old ones go.
    pub fn set(&mut self, key: &str, announcement: Announcement) -> Vec<RouteEvent> {
        let key: Arc<str> = match self.contents.get_key_value(key) {
            Some((known, _)) => Arc::clone(known),
            None => key.into(),
        };
        let before = self.contents.remove(&key).unwrap_or_default();
        let Announcement {
            registrations,
            declarations,
        } = announcement;
        // By name first: one that a key says twice is told once, as it says last.
        let policies: BTreeMap<HttpMatch, Arc<HttpPolicy>> = declarations
            .into_iter()
            .map(|Declaration { route, policy }| (route, policy))
            .collect();
        let backends: BTreeMap<BackendId, Registration> =
            registrations.iter().flat_map(one_by_one).collect();
        let content = Content {
            backends: backends.keys().cloned().collect(),
            policies: policies.keys().cloned().collect(),
        };
        let mut events = Vec::new();
        for (route, policy) in policies {
            let holders = self.policies.entry(route.clone()).or_default();
            if put(holders, &key, Arc::clone(&policy)) {
                events.push(RouteEvent::Declare(Declaration { route, policy }));
            }
        }
        for (id, registration) in backends {
            let holders = self.backends.entry(id).or_default();
            if put(holders, &key, registration.clone()) {
                events.push(RouteEvent::Register(registration));
            }
        }
        let gone = before.backends.difference(&content.backends);
        events.extend(gone.filter_map(|id| self.drop_backend(&key, id)));
        let gone = before.policies.difference(&content.policies);
        events.extend(gone.filter_map(|route| self.drop_policy(&key, route)));
        if !content.backends.is_empty() || !content.policies.is_empty() {
            self.contents.insert(key, content);
        }
        events
    }

    /// Forgets a key.
    pub fn remove(&mut self, key: &str) -> Vec<RouteEvent> {
        self.set(key, Announcement::default())
    }

    /// Forgets the keys that are not to be kept.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) -> Vec<RouteEvent> {
        let gone = self.contents.keys().filter(|key| !keep(key));
        let gone: Vec<Arc<str>> = gone.cloned().collect();
        gone.iter().flat_map(|key| self.remove(key)).collect()
    }

    /// Forgets what is said of routes that are not allowed, which the agent dropped by itself. What
    /// their keys say is taken in anew by the next [`Self::set`].
    pub fn retain_routes(&mut self, allowed: impl Fn(&RouteKey) -> bool) {
        self.backends.retain(|(route, _), _| allowed(route));
        let may_declare = |route: &HttpMatch| allowed(&RouteKey::Http(route.clone()));
        self.policies.retain(|route, _| may_declare(route));
        for content in self.contents.values_mut() {
            content.backends.retain(|(route, _)| allowed(route));
            content.policies.retain(may_declare);
        }
    }

    /// Takes a backend off a key; what the agent has to be told of it.
    fn drop_backend(&mut self, key: &str, id: &BackendId) -> Option<RouteEvent> {
        let holders = self.backends.get_mut(id)?;
        match take(holders, key) {
            Taken::Unheard => None,
            Taken::Next(registration) => Some(RouteEvent::Register(registration)),
            Taken::Last => {
                self.backends.remove(id);
                let (route, address) = id.clone();
                Some(RouteEvent::Unregister(Unregistration {
                    routes: vec![route],
                    address,
                    instance_id: None,
                    origin: self.origin,
                }))
            }
        }
    }

    fn drop_policy(&mut self, key: &str, route: &HttpMatch) -> Option<RouteEvent> {
        let holders = self.policies.get_mut(route)?;
        let route = route.clone();
        match take(holders, key) {
            Taken::Unheard => None,
            Taken::Next(policy) => Some(RouteEvent::Declare(Declaration { route, policy })),
            Taken::Last => {
                self.policies.remove(&route);
                let origin = self.origin;
                Some(RouteEvent::Withdraw(Withdrawal { route, origin }))
            }
        }
    }
}

/// A registration of several routes as one of each.
fn one_by_one(registration: &Registration) -> impl Iterator<Item = (BackendId, Registration)> {
    registration.routes.iter().map(|route| {
        let id = (route.clone(), registration.backend.address);
        let one = Registration {
            routes: vec![route.clone()],
            ..registration.clone()
        };
        (id, one)
    })
}

/// Notes what a key says; whether something else held.
fn put<T: PartialEq>(holders: &mut Holders<T>, key: &Arc<str>, said: T) -> bool {
    let is_news = holders
        .last_key_value()
        .is_none_or(|(last, held)| last <= key && *held != said);
    holders.insert(Arc::clone(key), said);
    is_news
}

enum Taken<T> {
    /// The same holds as before.
    Unheard,
    /// This holds instead.
    Next(T),
    /// Nobody else says anything of it.
    Last,
}

fn take<T: Clone + PartialEq>(holders: &mut Holders<T>, key: &str) -> Taken<T> {
    let held = holders.last_key_value().map(|(_, held)| held.clone());
    holders.remove(key);
    match holders.last_key_value() {
        None => Taken::Last,
        Some((_, next)) if held.as_ref() == Some(next) => Taken::Unheard,
        Some((_, next)) => Taken::Next(next.clone()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::route::Backend;

    fn announcement(backends: &[(u8, u16)], policies: &[(u8, usize)]) -> Announcement {
        let route = |n: u8| crate::route::wire::parse_uri(&format!("{n}.x")).unwrap();
        let registrations = backends.iter().map(|&(n, weight)| Registration {
            routes: vec![RouteKey::Http(route(n)), RouteKey::Http(route(9))],
            backend: Arc::new(Backend {
                weight,
                ..Backend::new(SocketAddr::from(([10, 0, 0, n], 80)), Origin::Redis)
            }),
            stale_after: None,
            balance: None,
            route_service_url: None,
        });
        let declarations = policies.iter().map(|&(n, attempts)| {
            let mut policy = HttpPolicy::new(Origin::Redis);
            policy.retries.attempts = Some(attempts);
            Declaration {
                route: route(n),
                policy: Arc::new(policy),
            }
        });
        Announcement {
            registrations: registrations.collect(),
            declarations: declarations.collect(),
        }
    }

    /// What the agent knows after what it was told.
    #[derive(Debug, Default, PartialEq)]
    struct Told {
        backends: BTreeMap<BackendId, Registration>,
        policies: BTreeMap<HttpMatch, Arc<HttpPolicy>>,
    }

    impl Told {
        /// Each event has to change something.
        fn tell(&mut self, events: Vec<RouteEvent>) {
            for event in events {
                match event {
                    RouteEvent::Register(registration) => {
                        let [route] = &registration.routes[..] else {
                            panic!("one route at a time")
                        };
                        let id = (route.clone(), registration.backend.address);
                        let before = self.backends.insert(id, registration.clone());
                        assert_ne!(before, Some(registration));
                    }
                    RouteEvent::Unregister(gone) => {
                        let id = (gone.routes[0].clone(), gone.address);
                        assert!(self.backends.remove(&id).is_some());
                    }
                    RouteEvent::Declare(Declaration { route, policy }) => {
                        let before = self.policies.insert(route, Arc::clone(&policy));
                        assert_ne!(before, Some(policy));
                    }
                    RouteEvent::Withdraw(gone) => {
                        assert!(self.policies.remove(&gone.route).is_some());
                    }
                }
            }
        }
    }

    #[test]
    fn policies_come_before_backends_and_go_after_them() {
        let mut ledger = Ledger::new(Origin::Redis);
        let kinds = |events: Vec<RouteEvent>| -> String {
            let kind = |event: &RouteEvent| match event {
                RouteEvent::Declare(_) => 'D',
                RouteEvent::Register(_) => 'R',
                RouteEvent::Unregister(_) => 'U',
                RouteEvent::Withdraw(_) => 'W',
            };
            events.iter().map(kind).collect()
        };
        let first = ledger.set("a", announcement(&[(1, 1)], &[(1, 1)]));
        assert_eq!(kinds(first), "DRR");
        let second = ledger.set("a", announcement(&[(2, 1)], &[(2, 1)]));
        assert_eq!(kinds(second), "DRRUUW");
        assert_eq!(kinds(ledger.remove("a")), "UUW");
        assert_eq!(ledger.keys().count(), 0);
        assert!(ledger.backends.is_empty() && ledger.policies.is_empty());
    }

    #[test]
    fn routes_that_the_agent_dropped_are_told_again() {
        let mut ledger = Ledger::new(Origin::Redis);
        ledger.set("a", announcement(&[(1, 1)], &[]));
        let kept: RouteKey = RouteKey::Http(crate::route::wire::parse_uri("9.x").unwrap());
        ledger.retain_routes(|route| *route == kept);
        let events = ledger.set("a", announcement(&[(1, 1)], &[]));
        assert_eq!(events.len(), 1, "{events:?}");
    }

    type Said = (Vec<(u8, u16)>, Vec<(u8, usize)>);

    proptest! {
        #[test]
        fn the_agent_is_told_what_the_last_of_the_keys_says(
            steps in proptest::collection::vec(
                (
                    0usize..4,
                    proptest::collection::vec((0u8..4, 1u16..3), 0..4),
                    proptest::collection::vec((0u8..4, 1usize..3), 0..3),
                ),
                1..30,
            ),
            kept in proptest::collection::vec(any::<bool>(), 4),
        ) {
            let keys = ["a", "b", "c", "d"];
            let mut ledger = Ledger::new(Origin::Redis);
            let mut said: BTreeMap<&str, Said> = BTreeMap::new();
            let mut told = Told::default();
            for (key, backends, policies) in steps {
                told.tell(ledger.set(keys[key], announcement(&backends, &policies)));
                said.insert(keys[key], (backends, policies));
                let mut anew = Told::default();
                for (backends, policies) in said.values() {
                    let all = announcement(backends, policies);
                    for registration in all.registrations {
                        for route in registration.routes.clone() {
                            let id = (route.clone(), registration.backend.address);
                            let one = Registration { routes: vec![route], ..registration.clone() };
                            anew.backends.insert(id, one);
                        }
                    }
                    anew.policies.extend(all.declarations.into_iter().map(|d| (d.route, d.policy)));
                }
                prop_assert_eq!(&told, &anew);
            }
            let keep = |key: &str| kept[keys.iter().position(|k| *k == key).unwrap()];
            told.tell(ledger.retain(keep));
            prop_assert!(ledger.keys().all(keep));
        }
    }
}
