//! Backends that [`Damping`] suppresses: registered, and held out of their pools.
//!
//! No more of a route are held than serve, so that no pool loses its last backend by it, and routes
//! whose backends all come and go keep half of them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Instant;

use crate::route::damping::{Damping, Settings};
use crate::route::table::{Change, RouteTable};
use crate::route::{Pool, RouteKey};

/// A backend of a route.
type Member = (RouteKey, SocketAddr);

#[derive(Default)]
pub(super) struct Held {
    pub(super) damping: Damping<Member>,
    /// Those that are registered, and in no pool.
    pub(super) members: BTreeSet<Member>,
}

impl Held {
    /// Holds a backend that would join the pool, if it is to be held. Whether it is.
    pub(super) fn hold(&mut self, pool: &Pool, route: &RouteKey, address: SocketAddr) -> bool {
        let serves = |known: &SocketAddr| {
            let at = pool.backends.binary_search_by_key(known, |b| b.address);
            at.is_ok()
        };
        if serves(&address) {
            return false;
        }
        let member = (route.clone(), address);
        if self.members.contains(&member) {
            return true;
        }
        let is_held = self.damping.is_suppressed(&member)
            && self.members_of(route).count() < pool.backends.len();
        if is_held {
            self.members.insert(member);
        }
        is_held
    }

    /// Notes that a backend left. Whether it was held.
    pub(super) fn leave(&mut self, route: &RouteKey, address: SocketAddr, now: Instant) -> bool {
        let member = (route.clone(), address);
        self.damping.leave(&member, now);
        self.members.remove(&member)
    }

    /// One that is held no more, now that so many of its route serve.
    fn release_beyond(&mut self, route: &RouteKey, serving: usize) -> Option<SocketAddr> {
        if self.members.is_empty() || self.members_of(route).count() <= serving {
            return None;
        }
        let (_, address) = self.members_of(route).next()?.clone();
        self.members.remove(&(route.clone(), address));
        Some(address)
    }

    fn members_of(&self, route: &RouteKey) -> impl Iterator<Item = &Member> {
        let first = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        let members = self.members.range((route.clone(), first)..);
        let route = route.clone();
        members.take_while(move |(of, _)| *of == route)
    }
}

impl RouteTable {
    /// Sets how backends that come and go are held back; others than before release all.
    pub fn set_damping(&mut self, settings: Option<Settings>) -> Change {
        let mut change = Change::default();
        self.held.damping.set(settings);
        if self.held.damping.suppressed() == 0 {
            for member in std::mem::take(&mut self.held.members) {
                self.release(&member, &mut change);
            }
        }
        change
    }

    /// How many backends of routes are held back.
    pub fn held(&self) -> usize {
        self.held.members.len()
    }

    /// Has those join their pools whose time is over.
    pub(super) fn release_due(&mut self, now: Instant, change: &mut Change) {
        while let Some(member) = self.held.damping.reusable(now) {
            if self.held.members.remove(&member) {
                self.release(&member, change);
            }
        }
    }

    /// Has one join a pool of which too few serve.
    pub(super) fn release_for(&mut self, route: &RouteKey, serving: usize, change: &mut Change) {
        if let Some(address) = self.held.release_beyond(route, serving) {
            self.release(&(route.clone(), address), change);
        }
    }

    fn release(&mut self, (route, address): &Member, change: &mut Change) {
        if let Some(id) = self.serving(route, *address) {
            self.join(id, change);
        }
    }
}
