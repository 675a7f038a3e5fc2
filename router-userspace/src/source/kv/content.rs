//! What the bucket declares, key by key, and what of it the agent has to be told. Pure.
//!
//! A value that is refused leaves what its key declared before. A VIP that the configuration has a
//! policy of keeps that one: the configuration comes before the bucket, as routes files do.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use anyhow::{anyhow, ensure};

use crate::config::{Config, L4Config, MAX_SOURCE_PREFIXES, VipConfig};
use crate::event::Event;
use crate::route::declared::Announcement;
use crate::route::{Origin, RouteEvent, RouteKey, Vip};
use crate::source::kv::entry::{Declared, Key};
use crate::source::kv::status::Revisions;
use crate::source::ledger::Ledger;

/// Keys of the bucket.
pub const MAX_KEYS: usize = 1 << 20;
/// Policies of VIPs among them.
pub const MAX_VIP_POLICIES: usize = 4096;

pub struct Content {
    ledger: Ledger,
    vips: BTreeMap<Vip, VipConfig>,
    /// With a value, whether it was taken or refused.
    keys: HashSet<Arc<str>>,
    /// Prefixes in `allow` and `deny` of all policies.
    prefixes: usize,
}

impl Default for Content {
    fn default() -> Content {
        Content {
            ledger: Ledger::new(Origin::Kv),
            vips: BTreeMap::new(),
            keys: HashSet::new(),
            prefixes: 0,
        }
    }
}

impl Content {
    /// How many keys have a value.
    pub fn key_count(&self) -> usize {
        self.keys.len()
    }

    /// Takes in the value of a key, in place of what it said before.
    ///
    /// # Errors
    /// Why it is refused; what it declared before holds on.
    pub fn put(
        &mut self,
        key: &str,
        value: &[u8],
        revision: u64,
        config: &Config,
        revisions: &Revisions,
    ) -> anyhow::Result<Vec<Event>> {
        if !self.keys.contains(key) {
            ensure!(
                self.keys.len() < MAX_KEYS,
                "more than {MAX_KEYS} keys in the bucket"
            );
            self.keys.insert(key.into());
        }
        let parsed: Key = key.parse()?;
        let events = match parsed.read(value, config)? {
            Declared::Route(route) => {
                revisions.set(key, revision, routes(&route));
                as_events(self.ledger.set(key, route))
            }
            Declared::Vip(policy) => {
                let vip = policy.address;
                self.check_room(&policy, &config.l4)?;
                self.forget_policy(vip);
                self.prefixes += prefixes(&policy);
                self.vips.insert(vip, VipConfig::clone(&policy));
                revisions.set(key, revision, vec![RouteKey::Vip(vip)]);
                let policy = Some(policy);
                vec![Event::VipPolicy { vip, policy }]
            }
        };
        Ok(events)
    }

    /// Forgets a key.
    pub fn remove(&mut self, key: &str, revisions: &Revisions) -> Vec<Event> {
        self.keys.remove(key);
        revisions.remove(key);
        match key.parse() {
            Ok(Key::Route(_)) => as_events(self.ledger.remove(key)),
            Ok(Key::Vip(vip)) if self.forget_policy(vip) => {
                vec![Event::VipPolicy { vip, policy: None }]
            }
            Ok(Key::Vip(_)) | Err(_) => Vec::new(),
        }
    }

    /// The keys that are known and are not to be kept.
    pub fn others(&self, kept: &HashSet<Arc<str>>) -> Vec<Arc<str>> {
        self.keys.difference(kept).cloned().collect()
    }

    /// Forgets what another configuration does not allow; the agent drops such routes by itself.
    pub fn retain_allowed(&mut self, config: &Config, revisions: &Revisions) -> Vec<Event> {
        let is_allowed = |route: &RouteKey| route.is_allowed(Origin::Kv, config);
        self.ledger.retain_routes(is_allowed);
        let refused = self.vips.values().filter(|policy| {
            let is_valid = config.l4.check_vip(policy).is_ok();
            !is_valid || !is_allowed(&RouteKey::Vip(policy.address))
        });
        let refused: Vec<Vip> = refused.map(|policy| policy.address).collect();
        let gone = |vip: Vip| {
            self.forget_policy(vip);
            revisions.remove(&Key::Vip(vip).to_string());
            Event::VipPolicy { vip, policy: None }
        };
        refused.into_iter().map(gone).collect()
    }

    fn check_room(&self, policy: &VipConfig, l4: &L4Config) -> anyhow::Result<()> {
        let vip = policy.address;
        if l4.vip.iter().any(|configured| configured.address == vip) {
            return Err(anyhow!("l4.vip of the configuration names {vip}, and wins"));
        }
        let before = self.vips.get(&vip);
        ensure!(
            before.is_some() || self.vips.len() < MAX_VIP_POLICIES,
            "more than {MAX_VIP_POLICIES} policies of VIPs"
        );
        let configured: usize = l4.vip.iter().map(prefixes).sum();
        let others = self.prefixes - before.map_or(0, prefixes);
        ensure!(
            configured + others + prefixes(policy) <= MAX_SOURCE_PREFIXES,
            "allow, deny: more than {MAX_SOURCE_PREFIXES} prefixes over all VIPs"
        );
        Ok(())
    }

    /// Whether there was one.
    fn forget_policy(&mut self, vip: Vip) -> bool {
        let before = self.vips.remove(&vip);
        self.prefixes -= before.as_ref().map_or(0, prefixes);
        before.is_some()
    }
}

fn prefixes(policy: &VipConfig) -> usize {
    policy.allow.len() + policy.deny.len()
}

fn as_events(events: Vec<RouteEvent>) -> Vec<Event> {
    events.into_iter().map(Event::Route).collect()
}

fn routes(announcement: &Announcement) -> Vec<RouteKey> {
    let declared = announcement.declarations.iter();
    let mut routes: Vec<RouteKey> = declared
        .map(|declaration| RouteKey::Http(declaration.route.clone()))
        .collect();
    // Those of every backend are the same.
    if let Some(registration) = announcement.registrations.first() {
        routes.extend(registration.routes.iter().cloned());
    }
    routes.sort();
    routes.dedup();
    routes
}
