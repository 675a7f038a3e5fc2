//! A map from host names to their routes that shares all but what changed with its earlier versions.
//!
//! A trie of hashes whose leaves are buckets of a few hosts, each with its name and its only route in
//! place: what lies above the buckets is small enough to stay in a core's cache, so that a look-up
//! among very many hosts waits for memory once, at its bucket. A change copies one bucket and the way
//! to it, and those only once between two snapshots. Layer 7 looks every request up here, the route
//! table changes it, clones of it are published.

use std::hash::BuildHasher;
use std::sync::Arc;

use hashbrown::DefaultHashBuilder;

use crate::snapshot::HostRoutes;

/// Hash bits that choose among the slots of one node.
const BITS: u32 = 3;
const SLOTS: usize = 1 << BITS;
/// Below the node that these bits lead to, buckets hold any number of hosts of one hash.
const HASH_BITS: u32 = 63;
/// Hosts of a bucket, beyond which it becomes a node.
const MAX_BUCKET: usize = 12;
/// Hosts of a node, at which it becomes a bucket again.
const MERGED_BUCKET: usize = MAX_BUCKET / 2;
/// Bytes of a name that stand in the bucket.
const NAME_IN_PLACE: usize = 46;

/// Host to routes. Names are as in [`crate::route::HttpMatch`].
#[derive(Clone, Debug)]
pub struct Hosts<S = DefaultHashBuilder> {
    root: Slot,
    len: usize,
    hasher: S,
}

/// Nodes choose by the first bits of a hash first, and a bucket is sorted by hash and name, so that all
/// hosts stand in that order.
#[derive(Clone, Debug)]
enum Slot {
    Node(Arc<[Slot; SLOTS]>),
    Bucket(Arc<[Host]>),
}

#[derive(Clone, Debug, Default)]
struct Host {
    name: Name,
    routes: HostRoutes,
}

#[derive(Clone, Debug)]
enum Name {
    InPlace {
        len: u8,
        /// From a `str`, filled up with zeros.
        bytes: [u8; NAME_IN_PLACE],
    },
    Elsewhere(Box<str>),
}

impl<S: Default> Default for Hosts<S> {
    fn default() -> Hosts<S> {
        Hosts {
            root: Slot::Bucket(Arc::default()),
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
    pub fn get(&self, name: &str) -> Option<(&str, &HostRoutes)> {
        let hash = self.place_of(name);
        let mut slot = &self.root;
        let mut shift = 0;
        loop {
            match slot {
                Slot::Node(slots) => slot = &slots[place(hash, shift)],
                Slot::Bucket(hosts) => {
                    let host = &hosts[position(hosts, name)?];
                    return Some((host.name(), &host.routes));
                }
            }
            shift += BITS;
        }
    }

    pub fn get_mut(&mut self, name: &str) -> Option<&mut HostRoutes> {
        // Before anything is copied.
        self.get(name)?;
        let hash = self.place_of(name);
        let mut slot = &mut self.root;
        let mut shift = 0;
        loop {
            match slot {
                Slot::Node(slots) => slot = &mut Arc::make_mut(slots)[place(hash, shift)],
                Slot::Bucket(hosts) => {
                    let at = position(hosts, name)?;
                    return Some(&mut Arc::make_mut(hosts)[at].routes);
                }
            }
            shift += BITS;
        }
    }

    /// Adds a host without routes; one that is there stays as it is.
    pub fn add(&mut self, name: &str) {
        if self.contains(name) {
            return;
        }
        let hash = self.place_of(name);
        let host = Host {
            name: Name::new(name),
            routes: HostRoutes::default(),
        };
        insert(&mut self.root, hash, 0, host, &self.hasher);
        self.len += 1;
    }

    /// Whether the host was there.
    pub fn remove(&mut self, name: &str) -> bool {
        if !self.contains(name) {
            return false;
        }
        let hash = self.place_of(name);
        remove(&mut self.root, hash, 0, name);
        self.len -= 1;
        true
    }

    /// All hosts, in an order that is the same for every version with these hosts in it, and that says
    /// nothing to people.
    pub fn iter(&self) -> Iter<'_> {
        Iter {
            rest: vec![std::slice::from_ref(&self.root).iter()],
            bucket: [].iter(),
        }
    }

    /// The same from a host on, or from where it would be. Looks at the nodes on the way to it only.
    pub fn iter_from(&self, name: &str) -> Iter<'_> {
        let hash = self.place_of(name);
        let mut rest = Vec::new();
        let mut slot = &self.root;
        let mut shift = 0;
        loop {
            match slot {
                Slot::Node(slots) => {
                    let at = place(hash, shift);
                    rest.push(slots[at + 1..].iter());
                    slot = &slots[at];
                }
                Slot::Bucket(hosts) => {
                    let at = rank(hosts, hash, name, &self.hasher);
                    let bucket = hosts[at..].iter();
                    return Iter { rest, bucket };
                }
            }
            shift += BITS;
        }
    }

    /// Where a host stands in the order of [`Hosts::iter`]; two hosts of one place do by name. Another
    /// process has another order.
    pub fn place_of(&self, name: &str) -> u64 {
        self.hasher.hash_one(name.as_bytes())
    }

    /// Tells of the hosts that `newer` does not share with this version: their routes here, and there.
    /// Costs what is not shared.
    pub fn diff(
        &self,
        newer: &Hosts<S>,
        changed: &mut impl FnMut(Option<&HostRoutes>, Option<&HostRoutes>),
    ) {
        diff(&self.root, &newer.root, changed);
    }
}

/// Hosts with their routes.
pub struct Iter<'a> {
    /// What is left of the nodes on the way down.
    rest: Vec<std::slice::Iter<'a, Slot>>,
    bucket: std::slice::Iter<'a, Host>,
}

impl<'a> Iterator for Iter<'a> {
    type Item = (&'a str, &'a HostRoutes);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(host) = self.bucket.next() {
                return Some((host.name(), &host.routes));
            }
            match self.rest.last_mut()?.next() {
                Some(Slot::Bucket(hosts)) => self.bucket = hosts.iter(),
                Some(Slot::Node(slots)) => self.rest.push(slots.iter()),
                None => drop(self.rest.pop()),
            }
        }
    }
}

impl Host {
    fn is_named(&self, name: &str) -> bool {
        self.name.bytes() == name.as_bytes()
    }

    fn name(&self) -> &str {
        std::str::from_utf8(self.name.bytes()).expect("names are made of str")
    }
}

impl Name {
    fn new(name: &str) -> Name {
        let mut bytes = [0; NAME_IN_PLACE];
        match bytes.get_mut(..name.len()) {
            Some(start) => {
                start.copy_from_slice(name.as_bytes());
                let len = name.len() as u8;
                Name::InPlace { len, bytes }
            }
            None => Name::Elsewhere(name.into()),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Name::InPlace { len, bytes } => &bytes[..usize::from(*len)],
            Name::Elsewhere(name) => name.as_bytes(),
        }
    }
}

impl Default for Name {
    fn default() -> Name {
        Name::new("")
    }
}

impl Slot {
    /// Whether both are one place in memory.
    fn is(&self, other: &Slot) -> bool {
        match (self, other) {
            (Slot::Node(one), Slot::Node(other)) => Arc::ptr_eq(one, other),
            (Slot::Bucket(one), Slot::Bucket(other)) => Arc::ptr_eq(one, other),
            (Slot::Node(_), Slot::Bucket(_)) | (Slot::Bucket(_), Slot::Node(_)) => false,
        }
    }
}

fn place(hash: u64, shift: u32) -> usize {
    ((hash << shift) >> (u64::BITS - BITS)) as usize
}

fn position(hosts: &[Host], name: &str) -> Option<usize> {
    hosts.iter().position(|host| host.is_named(name))
}

/// Where a host stands in its bucket, or belongs.
fn rank(hosts: &[Host], hash: u64, name: &str, hasher: &impl BuildHasher) -> usize {
    let key = |host: &Host| hasher.hash_one(host.name.bytes());
    hosts.partition_point(|host| (key(host), host.name.bytes()) < (hash, name.as_bytes()))
}

fn insert(slot: &mut Slot, hash: u64, shift: u32, host: Host, hasher: &impl BuildHasher) {
    match slot {
        Slot::Node(slots) => {
            let below = &mut Arc::make_mut(slots)[place(hash, shift)];
            insert(below, hash, shift + BITS, host, hasher);
        }
        Slot::Bucket(bucket) => {
            let at = rank(bucket, hash, host.name(), hasher);
            let mut hosts = Vec::with_capacity(bucket.len() + 1);
            take_into(bucket, &mut hosts);
            hosts.insert(at, host);
            *slot = if hosts.len() <= MAX_BUCKET || shift >= HASH_BITS {
                Slot::Bucket(hosts.into())
            } else {
                split(hosts, shift, hasher)
            };
        }
    }
}

/// A node of buckets; one that got nearly all of them is split when the next comes.
fn split(hosts: Vec<Host>, shift: u32, hasher: &impl BuildHasher) -> Slot {
    let mut buckets: [Vec<Host>; SLOTS] = Default::default();
    for host in hosts {
        let hash = hasher.hash_one(host.name.bytes());
        buckets[place(hash, shift)].push(host);
    }
    Slot::Node(Arc::new(buckets.map(|hosts| Slot::Bucket(hosts.into()))))
}

/// Removes a host that is there. A node that is left with few hosts becomes a bucket.
fn remove(slot: &mut Slot, hash: u64, shift: u32, name: &str) {
    match slot {
        Slot::Node(slots) => {
            let slots = Arc::make_mut(slots);
            remove(&mut slots[place(hash, shift)], hash, shift + BITS, name);
            if let Some(merged) = merge(slots) {
                *slot = merged;
            }
        }
        Slot::Bucket(bucket) => {
            let mut hosts = Vec::with_capacity(bucket.len());
            take_into(bucket, &mut hosts);
            hosts.retain(|host| !host.is_named(name));
            *bucket = hosts.into();
        }
    }
}

/// The bucket in place of a node, if that has few hosts.
fn merge(slots: &mut [Slot; SLOTS]) -> Option<Slot> {
    let mut count = 0;
    for slot in &*slots {
        match slot {
            Slot::Bucket(hosts) => count += hosts.len(),
            Slot::Node(_) => return None,
        }
    }
    if count > MERGED_BUCKET {
        return None;
    }
    let mut merged = Vec::with_capacity(count);
    for slot in slots {
        if let Slot::Bucket(hosts) = slot {
            take_into(hosts, &mut merged);
        }
    }
    Some(Slot::Bucket(merged.into()))
}

/// Moves the hosts of a bucket, or copies them if another version has them too.
fn take_into(bucket: &mut Arc<[Host]>, hosts: &mut Vec<Host>) {
    match Arc::get_mut(bucket) {
        Some(own) => hosts.extend(own.iter_mut().map(std::mem::take)),
        None => hosts.extend_from_slice(bucket),
    }
}

fn diff(
    before: &Slot,
    after: &Slot,
    changed: &mut impl FnMut(Option<&HostRoutes>, Option<&HostRoutes>),
) {
    if before.is(after) {
        return;
    }
    if let (Slot::Node(before), Slot::Node(after)) = (before, after) {
        for (before, after) in before.iter().zip(&**after) {
            diff(before, after, changed);
        }
        return;
    }
    // One of them is a bucket, and so short.
    let mut gone = Vec::new();
    each_host(before, &mut |host| gone.push(host));
    each_host(after, &mut |host| {
        let was = gone
            .iter()
            .position(|known| known.name.bytes() == host.name.bytes());
        let was = was.map(|at| &gone.swap_remove(at).routes);
        if !was.is_some_and(|was| was.is(&host.routes)) {
            changed(was, Some(&host.routes));
        }
    });
    for host in gone {
        changed(Some(&host.routes), None);
    }
}

fn each_host<'h>(slot: &'h Slot, told: &mut impl FnMut(&'h Host)) {
    match slot {
        Slot::Bucket(hosts) => hosts.iter().for_each(told),
        Slot::Node(slots) => slots.iter().for_each(|slot| each_host(slot, told)),
    }
}

#[cfg(test)]
mod tests;
