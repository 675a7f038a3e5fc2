//! The agent: the one writer of the route table, and of what both layers are told.
//!
//! [`Agent::run`] is the single task that owns the table and layer 4. It drains its inbox in batches,
//! publishes one snapshot for each batch that changed something, and then brings layer 4 in line for
//! the VIPs that changed; layer 7 and every reader follow the published pointer. A tick ends leases
//! and drains; of leases as many as there are in a batch, and the rest in turns with the inbox. Nothing
//! here waits but for the inbox and the tick, and both are cancel safe.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use ipnet::IpNet;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use crate::config::{Config, NatsConfig};
use crate::event::Event;
use crate::health::Unanswered;
use crate::l4::L4;
use crate::l4::explain::Question;
use crate::last_known_good::Kept;
use crate::metrics::Metrics;
use crate::rejects::Rejects;
use crate::route::ownership::Ownership;
use crate::route::table::{Change, KeptOut, RouteTable};
use crate::route::{Origin, Registration, RouteEvent, RouteKey, Vip};
use crate::snapshot::{Published, Snapshot};
use crate::source;
use crate::warning::WarningLimit;

/// Events of one batch: about a millisecond of work, so that a burst is published as it arrives.
const MAX_BATCH: usize = 1024;

/// The longest time between two looks at expired leases; layer 4 wants to be called this often.
const MAX_TICK: Duration = Duration::from_secs(1);

pub struct Agent {
    table: RouteTable,
    published: Published,
    /// While this agent writes to it.
    l4: Option<L4>,
    held: Option<Held>,
    /// To the health checker.
    reports: mpsc::Sender<Unanswered>,
    /// VIPs with so few healthy backends that all are used.
    in_panic: BTreeSet<Vip>,
    metrics: Arc<Metrics>,
    rejects: Arc<Rejects>,
    /// That what is in the table was held against.
    rules: Rules,
    tick: Duration,
    /// More leases are due than were looked at.
    is_behind: bool,
    /// Since it was told last.
    pruned: u64,
    full: WarningLimit,
}

/// What decides whether a route may be registered.
#[derive(PartialEq)]
struct Rules {
    vip_ranges: Vec<IpNet>,
    ownership: Arc<Ownership>,
}

impl Rules {
    fn of(config: &Config) -> Rules {
        Rules {
            vip_ranges: config.l4.vip_ranges.clone(),
            ownership: Arc::clone(&config.guard.ownership),
        }
    }
}

/// Layer 4 while another agent writes to it.
struct Held {
    l4: L4,
    /// The other agent is gone.
    resume: bool,
}

impl Agent {
    /// Publishes what layer 4 adopted, so that it is served before any source speaks.
    pub fn new(
        config: &Config,
        published: Published,
        l4: Option<L4>,
        reports: mpsc::Sender<Unanswered>,
        metrics: Arc<Metrics>,
    ) -> Agent {
        let now = now();
        let mut table = RouteTable::new(config.nats.stale_threshold, now);
        table.set_limits(config.guard.limits);
        table.set_damping(config.guard.damping());
        table.set_panic_threshold(config.health.panic_threshold);
        for origin in source::configured(config) {
            table.set_connected(origin, false, now);
        }
        let tick = tick(&config.nats);
        let mut agent = Agent {
            table,
            published,
            l4,
            held: None,
            reports,
            in_panic: BTreeSet::new(),
            metrics,
            rejects: Arc::default(),
            rules: Rules::of(config),
            tick,
            is_behind: false,
            pruned: 0,
            full: WarningLimit::default(),
        };
        let adopted = agent.l4.as_ref().map(L4::adopted).unwrap_or_default();
        let mut change = Change::default();
        // The ranges may be others than those of the agent that left the VIPs.
        let (allowed, foreign): (Vec<_>, Vec<_>) = adopted.into_iter().partition(|adopted| {
            let mut routes = adopted.routes.iter();
            routes.all(|route| route.is_allowed(Origin::Adopted, config))
        });
        change.vips.extend(foreign.iter().flat_map(vips));
        change.changed = !foreign.is_empty();
        for registration in allowed {
            change.merge(agent.table.apply(RouteEvent::Register(registration), now));
        }
        agent.publish(change, now);
        agent
    }

    /// Where what limits keep out is listed.
    pub fn list_rejects(&mut self, rejects: Arc<Rejects>) {
        self.rejects = rejects;
    }

    /// Takes in what was on disk, before any source speaks. Of a VIP that layer 4 adopted, the maps
    /// know better.
    pub fn adopt(&mut self, kept: Kept, config: &Config) {
        let now = now();
        let before = self.table.snapshot();
        let (age, as_of) = (kept.age(), kept.as_of);
        let mut change = Change::default();
        for mut event in kept.events {
            if let RouteEvent::Register(registration) = &mut event {
                registration.routes.retain(|route| {
                    let known =
                        matches!(route, RouteKey::Vip(vip) if before.vips.contains_key(vip));
                    route.is_allowed(Origin::Adopted, config) && !known
                });
            }
            if let RouteEvent::Declare(declaration) = &event
                && !RouteKey::Http(declaration.route.clone()).is_allowed(Origin::Adopted, config)
            {
                continue;
            }
            change.merge(self.table.apply(event, now));
        }
        let backends = change.added;
        self.publish(change, now);
        self.metrics.state.restored(as_of);
        let size = self.table.size();
        tracing::info!(
            http_routes = size.http_routes,
            vips = size.vips,
            backends,
            age = ?Duration::from_secs(age.as_secs()),
            "serving routes from disk until sources speak of them"
        );
    }

    /// Runs until every sender of `inbox` is gone.
    pub async fn run(mut self, mut inbox: mpsc::Receiver<Event>) {
        let mut batch = Vec::with_capacity(MAX_BATCH);
        let mut interval = self.interval();
        loop {
            tokio::select! {
                count = inbox.recv_many(&mut batch, MAX_BATCH) => {
                    if count == 0 {
                        return;
                    }
                    let before = self.tick;
                    self.take_in(&mut batch);
                    if self.tick != before {
                        interval = self.interval();
                    }
                }
                _ = interval.tick() => self.tick(),
                // Registrations and sources have their turn in between.
                () = tokio::task::yield_now(), if self.is_behind => self.expire(now()),
            }
        }
    }

    fn interval(&self) -> tokio::time::Interval {
        let mut interval = tokio::time::interval(self.tick);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        interval
    }

    fn take_in(&mut self, batch: &mut Vec<Event>) {
        let begin = Instant::now();
        self.metrics.batches.inc();
        self.metrics.events.add(batch.len() as u64);
        let now = now();
        let mut change = Change::default();
        let mut policies = Vec::new();
        let mut policies_known = false;
        let mut next_hops = Vec::new();
        let mut interfaces = false;
        for event in batch.drain(..) {
            match event {
                Event::Route(event) => change.merge(self.table.apply(event, now)),
                Event::Health { backend, healthy } => {
                    tracing::info!(%backend, healthy, "backend health changed");
                    change.merge(self.table.set_health(backend, healthy));
                }
                Event::Explain(question) => self.explain(question),
                Event::Drain {
                    backend,
                    vip,
                    drain,
                } => {
                    let at = vip.map(tracing::field::display);
                    tracing::info!(%backend, vip = at, drain, "an operator's drain");
                    change.merge(self.table.set_draining(backend, vip, drain));
                }
                Event::SourceConnected { origin, connected } => {
                    self.table.set_connected(origin, connected, now);
                    policies_known |= connected && origin == Origin::Kv;
                }
                Event::VipPolicy { vip, policy } => policies.push((vip, policy)),
                Event::NextHop { backend, next_hop } => next_hops.push((backend, next_hop)),
                Event::Interfaces => interfaces = true,
                Event::Release { budget, bytes } => budget.add_permits(bytes),
                Event::Reload(config) => change.merge(self.reload(&config)),
                Event::Listeners(listeners) => self.hand_up_to(&listeners),
                Event::HoldLayer4(held) => {
                    self.hold();
                    // Whoever asked may have gone, and says so.
                    let _ = held.send(());
                }
                Event::ResumeLayer4 => {
                    if let Some(held) = &mut self.held {
                        held.resume = true;
                    }
                }
            }
        }
        // Before the VIPs that are new: none is served by another policy first.
        for (vip, policy) in policies {
            match (&mut self.l4, &mut self.held) {
                (Some(l4), _) => l4.set_policy(vip, policy, now),
                (None, Some(held)) => held.l4.note_policy(vip, policy),
                (None, None) => {}
            }
        }
        if policies_known {
            self.know_policies(now);
        }
        if self.publish(change, now) {
            self.metrics.published(begin.elapsed());
        }
        if let Some(l4) = &mut self.l4 {
            if interfaces {
                l4.follow_interfaces();
            }
            for (backend, next_hop) in next_hops {
                l4.next_hop(backend, next_hop, now);
            }
        } else if let Some(held) = &mut self.held {
            for (backend, next_hop) in next_hops {
                held.l4.note_next_hop(backend, next_hop);
            }
        }
        self.resume(now);
    }

    /// Of VIPs, sources have said all that they have to say.
    fn know_policies(&mut self, now: Instant) {
        match (&mut self.l4, &mut self.held) {
            (Some(l4), _) => l4.know_policies(now),
            (None, Some(held)) => drop(held.l4.note_policies_known()),
            (None, None) => {}
        }
    }

    fn tick(&mut self) {
        let now = now();
        self.expire(now);
        self.resume(now);
        let mut reports = Vec::new();
        if let Some(l4) = &mut self.l4 {
            l4.tick(now);
            reports = l4.unanswered();
        }
        for report in reports {
            self.report(report);
        }
    }

    /// Ends leases, as many as do not delay registrations.
    fn expire(&mut self, now: Instant) {
        let change = self.table.expire(now);
        self.is_behind = self.table.has_due(now);
        self.pruned += change.expired;
        if self.pruned > 0 && !self.is_behind {
            let backends = std::mem::take(&mut self.pruned);
            tracing::info!(backends, "pruned what was not repeated in time");
        }
        self.publish(change, now);
    }

    fn hand_up_to(&mut self, listeners: &[TcpListener]) {
        let l4 = self.l4.as_mut();
        if let Some(l4) = l4.or(self.held.as_mut().map(|held| &mut held.l4))
            && let Err(error) = l4.hand_up_to(listeners)
        {
            let error = format!("{error:#}");
            tracing::error!(
                error,
                "connections to VIPs of l7 mode do not reach the proxy"
            );
        }
    }

    fn hold(&mut self) {
        if let Some(mut l4) = self.l4.take() {
            l4.hold();
            tracing::info!("another agent takes layer 4 over");
            self.held = Some(Held { l4, resume: false });
        }
    }

    /// Takes layer 4 back once the other agent is gone; tried with every tick until it is.
    fn resume(&mut self, now: Instant) {
        let Some(mut held) = self.held.take_if(|held| held.resume) else {
            return;
        };
        match held.l4.resume(&self.published.load(), now) {
            Ok(()) => {
                tracing::info!("the other agent is gone: layer 4 is taken back");
                self.l4 = Some(held.l4);
            }
            Err(error) => {
                tracing::warn!("take layer 4 back: {error:#}; it is tried again");
                self.held = Some(held);
            }
        }
    }

    /// Hands what layer 4 saw to the health checker, without waiting for it.
    fn report(&self, report: Unanswered) {
        if self.reports.try_send(report).is_err() {
            self.metrics.passive_dropped.inc();
        }
    }

    fn explain(&mut self, question: Question) {
        let explained = match &mut self.l4 {
            Some(l4) => l4.explain(&question.probe),
            None => Err(anyhow!("layer 4 is off: l4.interfaces is empty")),
        };
        // Whoever asked may have gone.
        let _ = question.answer.send(explained);
    }

    /// Publishes the table if `change` says that it is another, then tells layer 4.
    fn publish(&mut self, change: Change, now: Instant) -> bool {
        self.metrics.table(&change, self.table.size());
        self.metrics.held_backends.set(self.table.held());
        if let Some(bound) = change.bound
            && let Some(suppressed) = self.full.allow(now)
        {
            tracing::warn!(%bound, suppressed, "no room for a registration: refused whole");
        }
        for KeptOut {
            origin,
            address,
            route,
            bound,
        } in &change.told
        {
            let (what, why) = (format!("{address} {route}"), bound.to_string());
            self.rejects.note(*origin, &what, &why);
        }
        if !change.changed {
            return false;
        }
        let snapshot = Arc::new(self.table.snapshot());
        self.published.store(Arc::clone(&snapshot));
        self.note_panic(&snapshot, &change.vips);
        if let (Some(l4), false) = (&mut self.l4, change.vips.is_empty()) {
            l4.apply(&snapshot, &change.vips, now);
        }
        true
    }

    /// Tells of VIPs that begin or cease to use all of their backends whatever their health.
    fn note_panic(&mut self, snapshot: &Snapshot, changed: &BTreeSet<Vip>) {
        for vip in changed {
            let pool = snapshot.vips.get(vip);
            if pool.is_some_and(|pool| snapshot.in_panic(pool)) {
                if self.in_panic.insert(*vip) {
                    tracing::warn!(%vip, "too few healthy backends: all are used");
                }
            } else if self.in_panic.remove(vip) {
                tracing::info!(%vip, "enough healthy backends: unhealthy ones are avoided");
            }
        }
        self.metrics.vips_in_panic.set(self.in_panic.len());
    }

    fn reload(&mut self, config: &Config) -> Change {
        self.table.set_stale_threshold(config.nats.stale_threshold);
        self.table.set_limits(config.guard.limits);
        self.tick = tick(&config.nats);
        match (&mut self.l4, &mut self.held) {
            (Some(l4), _) => l4.reload(&config.l4, now()),
            (None, Some(held)) => held.l4.note_config(&config.l4),
            (None, None) => {}
        }
        for origin in Origin::ALL {
            if origin != Origin::Adopted && !source::configured(config).contains(&origin) {
                self.table.set_connected(origin, true, now());
            }
        }
        if !source::tells_policies(config) {
            self.know_policies(now());
        }
        let rules = Rules::of(config);
        let mut change = Change::default();
        if rules != self.rules {
            change = self
                .table
                .retain(|origin, route| route.is_allowed(origin, config));
            self.rules = rules;
        }
        change.merge(self.table.set_damping(config.guard.damping()));
        if change.removed > 0 {
            let (backends, vips) = (change.removed, change.vips.len());
            tracing::warn!(
                backends,
                vips,
                "dropped what l4.vip_ranges and guard do not allow"
            );
        }
        let threshold = config.health.panic_threshold;
        change.merge(self.table.set_panic_threshold(threshold));
        change
    }
}

fn vips(registration: &Registration) -> impl Iterator<Item = Vip> {
    registration.routes.iter().filter_map(|route| match route {
        RouteKey::Vip(vip) => Some(*vip),
        RouteKey::Http(_) => None,
    })
}

fn tick(config: &NatsConfig) -> Duration {
    config.prune_interval.min(MAX_TICK)
}

/// tokio's clock, which tests can stop.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests;
