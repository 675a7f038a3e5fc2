use super::*;
use crate::route::Pool;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hasher;

/// Leaves so few different hashes that every kind of collision happens.
#[derive(Clone, Default)]
struct Poor;

struct PoorHasher(u64);

impl BuildHasher for Poor {
    type Hasher = PoorHasher;

    fn build_hasher(&self) -> PoorHasher {
        PoorHasher(0)
    }
}

impl Hasher for PoorHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.wrapping_mul(3).wrapping_add(u64::from(*byte));
        }
    }

    fn finish(&self) -> u64 {
        // A common beginning, four ends, and two values of the bits in between.
        (self.0 & 3) << 55 | (self.0 >> 2 & 1) << 7 | 5
    }
}

fn names<S: BuildHasher>(hosts: &Hosts<S>) -> BTreeSet<String> {
    hosts.iter().map(|(name, _)| name.to_string()).collect()
}

proptest! {
    #[test]
    fn it_holds_what_a_set_holds_and_earlier_versions_stay(
        steps in prop::collection::vec((0u8..24, any::<bool>()), 0..200),
    ) {
        let mut hosts: Hosts<Poor> = Hosts::default();
        let mut model = BTreeSet::new();
        let mut versions = Vec::new();
        for (number, add) in steps {
            let name = format!("host-{number}");
            if add {
                hosts.add(&name);
                model.insert(name);
            } else {
                prop_assert_eq!(hosts.remove(&name), model.remove(&name));
            }
            prop_assert_eq!(hosts.len(), model.len());
            versions.push((hosts.clone(), model.clone()));
        }
        for (hosts, model) in versions {
            prop_assert_eq!(names(&hosts), model.clone());
            for number in 0..24 {
                let name = format!("host-{number}");
                prop_assert_eq!(hosts.contains(&name), model.contains(&name));
            }
        }
    }
}

proptest! {
    #[test]
    fn it_goes_on_from_any_host_whether_there_or_not(
        numbers in prop::collection::btree_set(0u8..48, 0..40),
        from in 0u8..48,
    ) {
        let mut hosts: Hosts<Poor> = Hosts::default();
        for number in numbers {
            hosts.add(&format!("host-{number}"));
        }
        let place = |name: &str| (hosts.place_of(name), name.to_owned());
        let all: Vec<_> = hosts.iter().map(|(name, _)| place(name)).collect();
        prop_assert!(all.is_sorted());
        let from = format!("host-{from}");
        let rest: Vec<_> = hosts.iter_from(&from).map(|(name, _)| place(name)).collect();
        let wanted = all.iter().filter(|host| **host >= place(&from));
        prop_assert_eq!(rest, wanted.cloned().collect::<Vec<_>>());
    }
}

#[test]
fn a_name_of_any_length_is_found() {
    let mut hosts: Hosts = Hosts::default();
    let names: Vec<String> = (1..=254).map(|length| "a".repeat(length)).collect();
    names.iter().for_each(|name| hosts.add(name));
    for name in &names {
        assert_eq!(hosts.get(name).map(|(kept, _)| kept), Some(&**name));
    }
    assert!(names.iter().all(|name| hosts.remove(name)));
    assert!(hosts.is_empty() && hosts.iter().next().is_none());
}

fn empty_pool() -> Arc<Pool> {
    Arc::default()
}

/// Paths over all hosts, each as often as it stands there.
fn paths<S: BuildHasher>(hosts: &Hosts<S>) -> BTreeMap<String, i32> {
    let mut paths = BTreeMap::new();
    for (path, _) in hosts.iter().flat_map(|(_, routes)| routes.paths()) {
        *paths.entry(path.to_string()).or_default() += 1;
    }
    paths
}

proptest! {
    #[test]
    fn a_diff_leads_from_any_version_to_any_other(
        steps in prop::collection::vec((0u8..24, 0u8..4), 0..60),
        from in any::<prop::sample::Index>(),
        to in any::<prop::sample::Index>(),
    ) {
        let mut hosts: Hosts<Poor> = Hosts::default();
        let mut versions = vec![hosts.clone()];
        for (number, step) in steps {
            let name = format!("host-{number}");
            if step == 0 {
                hosts.remove(&name);
            } else {
                hosts.add(&name);
                let routes = hosts.get_mut(&name).unwrap();
                *routes = HostRoutes::default();
                routes.insert(format!("/{number}/{step}").into(), None, empty_pool());
            }
            versions.push(hosts.clone());
        }
        let (from, to) = (from.get(&versions), to.get(&versions));
        let mut walked = paths(from);
        from.diff(to, &mut |before, after| {
            for (routes, sign) in [(before, -1), (after, 1)] {
                for (path, _) in routes.into_iter().flat_map(HostRoutes::paths) {
                    *walked.entry(path.to_string()).or_default() += sign;
                }
            }
        });
        walked.retain(|_, count| *count != 0);
        prop_assert_eq!(walked, paths(to));
    }
}

#[test]
fn a_diff_tells_of_nothing_but_what_changed() {
    let mut hosts: Hosts = Hosts::default();
    for number in 0..10_000 {
        hosts.add(&format!("host-{number}"));
    }
    let before = hosts.clone();
    hosts
        .get_mut("host-7")
        .unwrap()
        .insert("/a".into(), None, empty_pool());
    let mut told = Vec::new();
    before.diff(&hosts, &mut |before, after| {
        told.push((before.map(HostRoutes::count), after.map(HostRoutes::count)));
    });
    assert_eq!(told, [(Some(0), Some(1))]);
}

#[test]
fn a_change_of_routes_is_not_seen_by_earlier_versions() {
    let mut hosts: Hosts = Hosts::default();
    for number in 0..1000 {
        hosts.add(&format!("host-{number}"));
    }
    let before = hosts.clone();
    let routes = hosts.get_mut("host-7").unwrap();
    routes.insert("/a".into(), None, empty_pool());
    assert_eq!(before.get("host-7").unwrap().1.count(), 0);
    assert_eq!(hosts.get("host-7").unwrap().1.count(), 1);
    assert!(hosts.get_mut("host-1000").is_none());
}
