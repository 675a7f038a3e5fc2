//! A map from host names to their routes that shares all but what changed with its earlier versions.
//!
//! A hash array mapped trie (Bagwell, "Ideal Hash Trees", 2001) whose nodes hold just what they have:
//! a change copies a handful of small nodes, and those only once between two snapshots. Layer 7 looks
//! every request up here, the route table changes it, clones of it are published.

use std::hash::BuildHasher;
use std::sync::Arc;

use hashbrown::DefaultHashBuilder;

use crate::snapshot::HostRoutes;

/// Hash bits that choose among the slots of one node.
const BITS: u32 = 5;
/// Below the node that these bits lead to, hosts of one hash stand in a list.
const HASH_BITS: u32 = 60;

/// Host to routes. Names are as in [`crate::route::HttpMatch`].
#[derive(Clone, Debug)]
pub struct Hosts<S = DefaultHashBuilder> {
    root: Arc<Node>,
    len: usize,
    hasher: S,
}

#[derive(Clone, Debug, Default)]
struct Node {
    /// Which of the 32 places are taken; their slots stand in that order.
    taken: u32,
    slots: Vec<Slot>,
}

#[derive(Clone, Debug)]
enum Slot {
    Host(Arc<Host>),
    Node(Arc<Node>),
}

#[derive(Clone, Debug)]
struct Host {
    name: Arc<str>,
    routes: HostRoutes,
}

impl<S: Default> Default for Hosts<S> {
    fn default() -> Hosts<S> {
        Hosts {
            root: Arc::default(),
            len: 0,
            hasher: S::default(),
        }
    }
}

impl<S: BuildHasher> Hosts<S> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn contains(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// The name as it is kept, and the routes.
    pub fn get(&self, name: &str) -> Option<(&Arc<str>, &HostRoutes)> {
        let hash = self.hasher.hash_one(name);
        let mut node = &*self.root;
        let mut shift = 0;
        loop {
            match node.slots.get(node.find(hash, shift, name)?)? {
                Slot::Node(next) => node = next,
                Slot::Host(host) if *host.name == *name => return Some((&host.name, &host.routes)),
                Slot::Host(_) => return None,
            }
            shift += BITS;
        }
    }

    pub fn get_mut(&mut self, name: &str) -> Option<&mut HostRoutes> {
        // Before anything is copied.
        self.get(name)?;
        let hash = self.hasher.hash_one(name);
        let mut node = Arc::make_mut(&mut self.root);
        let mut shift = 0;
        loop {
            let at = node.find(hash, shift, name)?;
            match &mut node.slots[at] {
                Slot::Node(next) => node = Arc::make_mut(next),
                Slot::Host(host) => return Some(&mut Arc::make_mut(host).routes),
            }
            shift += BITS;
        }
    }

    /// Adds a host without routes; one that is there stays as it is.
    pub fn add(&mut self, name: Arc<str>) {
        if self.contains(&name) {
            return;
        }
        let hash = self.hasher.hash_one(&*name);
        let host = Arc::new(Host {
            name,
            routes: HostRoutes::default(),
        });
        insert(Arc::make_mut(&mut self.root), hash, 0, host, &self.hasher);
        self.len += 1;
    }

    /// Whether the host was there.
    pub fn remove(&mut self, name: &str) -> bool {
        if !self.contains(name) {
            return false;
        }
        let hash = self.hasher.hash_one(name);
        remove(Arc::make_mut(&mut self.root), hash, 0, name);
        self.len -= 1;
        true
    }

    /// All hosts, in an order that is the same for every version with these hosts in it, and that says
    /// nothing to people.
    pub fn iter(&self) -> Iter<'_> {
        Iter {
            rest: vec![self.root.slots.iter()],
        }
    }

    /// The same from a host on, or from where it would be. Looks at the nodes on the way to it only.
    pub fn iter_from(&self, name: &str) -> Iter<'_> {
        let hash = self.hasher.hash_one(name);
        let mut rest = Vec::new();
        let mut node = &*self.root;
        let mut shift = 0;
        loop {
            let at = node.seek(hash, shift, name, &self.hasher);
            let (_, from) = node.slots.split_at(at);
            match from.split_first() {
                Some((Slot::Node(next), behind)) if node.find(hash, shift, name) == Some(at) => {
                    rest.push(behind.iter());
                    node = next;
                }
                _ => {
                    rest.push(from.iter());
                    return Iter { rest };
                }
            }
            shift += BITS;
        }
    }

    /// Where a host stands in the order of [`Hosts::iter`]; two hosts of one place do by name. Another
    /// process has another order.
    pub fn place_of(&self, name: &str) -> u64 {
        order(self.hasher.hash_one(name))
    }

    /// Tells of the hosts that `newer` does not share with this version: their routes here, and there.
    ///
    /// Costs what is not shared. A host whose place in the tree is another may be told in two calls,
    /// as gone and as new.
    pub fn diff(
        &self,
        newer: &Hosts<S>,
        changed: &mut impl FnMut(Option<&HostRoutes>, Option<&HostRoutes>),
    ) {
        if !Arc::ptr_eq(&self.root, &newer.root) {
            diff(&self.root, &newer.root, 0, changed);
        }
    }
}

/// Hosts with their routes.
pub struct Iter<'a> {
    /// What is left of the nodes on the way down.
    rest: Vec<std::slice::Iter<'a, Slot>>,
}

impl<'a> Iterator for Iter<'a> {
    type Item = (&'a Arc<str>, &'a HostRoutes);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.rest.last_mut()?.next() {
                Some(Slot::Host(host)) => return Some((&host.name, &host.routes)),
                Some(Slot::Node(node)) => self.rest.push(node.slots.iter()),
                None => {
                    self.rest.pop();
                }
            }
        }
    }
}

impl Node {
    /// The first slot that holds nothing of what stands before a host.
    fn seek(&self, hash: u64, shift: u32, name: &str, hasher: &impl BuildHasher) -> usize {
        let before =
            |host: &Host| (order(hasher.hash_one(&*host.name)), &*host.name) < (order(hash), name);
        if shift >= HASH_BITS {
            let before = |slot: &Slot| matches!(slot, Slot::Host(host) if before(host));
            return self.slots.partition_point(before);
        }
        let at = self.before(place(hash, shift));
        match self.find(hash, shift, name).map(|at| &self.slots[at]) {
            Some(Slot::Host(host)) if before(host) => at + 1,
            Some(Slot::Host(_) | Slot::Node(_)) | None => at,
        }
    }

    /// Where the slot for a hash stands, if it is taken; in a list, where the host of that name does.
    fn find(&self, hash: u64, shift: u32, name: &str) -> Option<usize> {
        if shift >= HASH_BITS {
            let named = |slot: &Slot| matches!(slot, Slot::Host(host) if *host.name == *name);
            return self.slots.iter().position(named);
        }
        let bit = place(hash, shift);
        (self.taken & bit != 0).then(|| self.before(bit))
    }

    /// Slots in front of a place.
    fn before(&self, bit: u32) -> usize {
        (self.taken & (bit - 1)).count_ones() as usize
    }
}

/// A hash as a number that sorts as the trie does: the bits that choose first count most.
fn order(hash: u64) -> u64 {
    let places = (0..HASH_BITS / BITS).map(|level| hash >> (level * BITS) & ((1 << BITS) - 1));
    places.fold(0, |order, place| order << BITS | place)
}

fn place(hash: u64, shift: u32) -> u32 {
    1 << ((hash >> shift) & ((1 << BITS) - 1))
}

fn insert(node: &mut Node, hash: u64, shift: u32, host: Arc<Host>, hasher: &impl BuildHasher) {
    let bit = place(hash, shift);
    if shift >= HASH_BITS || node.taken & bit == 0 {
        let at = if shift >= HASH_BITS {
            node.slots
                .partition_point(|slot| matches!(slot, Slot::Host(other) if other.name < host.name))
        } else {
            node.before(bit)
        };
        node.slots.reserve_exact(1);
        node.slots.insert(at, Slot::Host(host));
        node.taken |= bit;
        return;
    }
    let at = node.before(bit);
    if let Slot::Host(other) = &node.slots[at] {
        let other = Arc::clone(other);
        let mut below = Node::default();
        let other_hash = hasher.hash_one(&*other.name);
        insert(&mut below, other_hash, shift + BITS, other, hasher);
        node.slots[at] = Slot::Node(Arc::new(below));
    }
    if let Slot::Node(below) = &mut node.slots[at] {
        insert(Arc::make_mut(below), hash, shift + BITS, host, hasher);
    }
}

/// Removes a host that is there. A node that is left with one host gives it to its parent.
fn remove(node: &mut Node, hash: u64, shift: u32, name: &str) {
    let Some(at) = node.find(hash, shift, name) else {
        return;
    };
    if let Slot::Node(below) = &mut node.slots[at] {
        let below = Arc::make_mut(below);
        remove(below, hash, shift + BITS, name);
        let last = match &below.slots[..] {
            [Slot::Host(last)] => Some(Arc::clone(last)),
            _ => None,
        };
        if let Some(last) = last {
            node.slots[at] = Slot::Host(last);
        }
        return;
    }
    node.slots.remove(at);
    if shift < HASH_BITS {
        node.taken &= !place(hash, shift);
    }
}

fn diff(
    before: &Node,
    after: &Node,
    shift: u32,
    changed: &mut impl FnMut(Option<&HostRoutes>, Option<&HostRoutes>),
) {
    if shift >= HASH_BITS {
        each_host(&before.slots, &mut |routes| changed(Some(routes), None));
        each_host(&after.slots, &mut |routes| changed(None, Some(routes)));
        return;
    }
    let slots_at = |node: &Node, bit: u32| match node.taken & bit {
        0 => 0..0,
        _ => node.before(bit)..node.before(bit) + 1,
    };
    for bit in (0..1 << BITS).map(|place: u32| 1 << place) {
        let before = &before.slots[slots_at(before, bit)];
        let after = &after.slots[slots_at(after, bit)];
        match (before, after) {
            ([Slot::Node(before)], [Slot::Node(after)]) => {
                if !Arc::ptr_eq(before, after) {
                    diff(before, after, shift + BITS, changed);
                }
            }
            ([Slot::Host(before)], [Slot::Host(after)]) if before.name == after.name => {
                if !Arc::ptr_eq(before, after) {
                    changed(Some(&before.routes), Some(&after.routes));
                }
            }
            (before, after) => {
                each_host(before, &mut |routes| changed(Some(routes), None));
                each_host(after, &mut |routes| changed(None, Some(routes)));
            }
        }
    }
}

fn each_host(slots: &[Slot], told: &mut impl FnMut(&HostRoutes)) {
    for slot in slots {
        match slot {
            Slot::Host(host) => told(&host.routes),
            Slot::Node(node) => each_host(&node.slots, told),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
                    hosts.add(name.as_str().into());
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
                hosts.add(format!("host-{number}").into());
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

    fn empty_pool() -> Arc<crate::route::Pool> {
        Arc::new(crate::route::Pool {
            backends: Vec::new(),
            balance: None,
            route_service_url: None,
            policy: None,
        })
    }

    /// Paths over all hosts, each as often as it stands there.
    fn paths<S: BuildHasher>(hosts: &Hosts<S>) -> BTreeMap<String, i32> {
        let mut paths = BTreeMap::new();
        for (path, _) in hosts.iter().flat_map(|(_, routes)| &routes.paths) {
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
                    hosts.add(name.as_str().into());
                    let routes = hosts.get_mut(&name).unwrap();
                    routes.paths = [(format!("/{number}/{step}").into(), empty_pool())].into();
                }
                versions.push(hosts.clone());
            }
            let (from, to) = (from.get(&versions), to.get(&versions));
            let mut walked = paths(from);
            from.diff(to, &mut |before, after| {
                for (routes, sign) in [(before, -1), (after, 1)] {
                    for (path, _) in routes.into_iter().flat_map(|routes| &routes.paths) {
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
            hosts.add(format!("host-{number}").into());
        }
        let before = hosts.clone();
        hosts
            .get_mut("host-7")
            .unwrap()
            .paths
            .push(("/a".into(), empty_pool()));
        let mut told = Vec::new();
        before.diff(&hosts, &mut |before, after| {
            told.push((before.map(|r| r.paths.len()), after.map(|r| r.paths.len())));
        });
        assert_eq!(told, [(Some(0), Some(1))]);
    }

    #[test]
    fn a_change_of_routes_is_not_seen_by_earlier_versions() {
        let mut hosts: Hosts = Hosts::default();
        for number in 0..1000 {
            hosts.add(format!("host-{number}").into());
        }
        let before = hosts.clone();
        let path: (Arc<str>, _) = ("/a".into(), empty_pool());
        hosts.get_mut("host-7").unwrap().paths.push(path);
        assert!(before.get("host-7").unwrap().1.paths.is_empty());
        assert_eq!(hosts.get("host-7").unwrap().1.paths.len(), 1);
        assert!(hosts.get_mut("host-1000").is_none());
    }
}
