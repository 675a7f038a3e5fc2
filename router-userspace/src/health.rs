//! Health of the backends of the published snapshot: active checks, and what layer 4 reports.
//!
//! One task keeps a target for each backend address, probes it about every `[health].interval`, and
//! sends [`Event::Health`] when its judgement changes. Probes are tasks of their own, at most
//! `[health].concurrency` at once; when that is too few for the interval, intervals stretch, the
//! longest due goes first, and what waited is counted. It follows the snapshot once a second by what
//! changed. Backends that only serve UDP are not checked; those that speak TLS or HTTP/2, or serve
//! VIPs only, are checked by TCP connect, through the tunnel where layer 4 has one ([`Tunnels`]).
//!
//! [`Unanswered`] reports take a backend out only where no check vouches for it; where one does, the
//! next check is made at once. What was taken out returns by time, by an answer, or by a good check.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::config::{Config, HealthCheck};
use crate::event::Event;
use crate::health::members::{Changed, Members, Takes};
use crate::health::probe::{Check, Outcome};
use crate::health::state::{Passive, State};
use crate::metrics::Metrics;
use crate::snapshot::{Published, Snapshot};
use crate::warning::WarningLimit;

pub use crate::health::state::Unanswered;
pub use crate::health::tunnel::{Marks, ProbeVia, Tunnels};

mod members;
mod probe;
pub mod state;
mod tunnel;

/// Backends under check, about 250 bytes each. Further ones count as healthy, and are counted. Also
/// how many may be under suspicion for unanswered SYNs.
pub const MAX_TARGETS: usize = 65_536;

/// Depth of the channel of [`Unanswered`] reports: layer 4 sends what is suspicious about once a
/// second. What does not fit is dropped, counted, and reported again while it lasts.
pub const REPORTS_DEPTH: usize = 4096;

const FOLLOW: Duration = Duration::from_secs(1);

/// Checks until the agent is gone.
pub async fn run(
    published: Published,
    inbox: mpsc::Sender<Event>,
    metrics: Arc<Metrics>,
    mut config: watch::Receiver<Arc<Config>>,
    mut reports: mpsc::Receiver<Unanswered>,
    tunnels: Tunnels,
) {
    let configured = Arc::clone(&config.borrow_and_update());
    let mut checker = Checker::new(configured, inbox, metrics, tunnels);
    let mut follow = tokio::time::interval(FOLLOW);
    while !checker.inbox.is_closed() {
        let next = checker.next_probe();
        // Every branch is cancel safe: what was not taken stays where it was.
        tokio::select! {
            () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                checker.probe_due(Instant::now());
            }
            Some(probed) = checker.probes.join_next() => {
                checker.probed(probed.expect("a probe does not panic"), Instant::now()).await;
            }
            Some(report) = reports.recv() => checker.reported(report, Instant::now()).await,
            _ = follow.tick() => {
                checker.follow(published.load_full(), Instant::now()).await;
                checker.end_backoffs(Instant::now()).await;
            }
            changed = config.changed() => {
                if changed.is_err() {
                    return;
                }
                let configured = Arc::clone(&config.borrow_and_update());
                checker.reload(configured, Instant::now()).await;
            }
        }
    }
}

struct Checker {
    config: Arc<Config>,
    members: Members,
    /// Of the snapshot that `members` follow; `None`: of none, whatever is published.
    revision: Option<u64>,
    targets: HashMap<SocketAddr, Target>,
    /// Members beyond [`MAX_TARGETS`], until there is room.
    unchecked: BTreeMap<SocketAddr, Takes>,
    /// When each target that has no probe in flight is probed next.
    due: BTreeSet<(Instant, SocketAddr)>,
    probes: JoinSet<Probed>,
    /// When a probe last ended while all that may be were in flight.
    full_until: Option<Instant>,
    /// Of the latest target.
    generation: u64,
    /// What layer 4 reported unanswered lately.
    suspects: HashMap<SocketAddr, Passive>,
    /// What the agent was told to be down.
    down: HashSet<SocketAddr>,
    unmade: WarningLimit,
    tunnels: Tunnels,
    inbox: mpsc::Sender<Event>,
    metrics: Arc<Metrics>,
}

#[derive(Clone, Copy)]
struct Target {
    /// Tells a target from an earlier one of the same address, whose probe may be in flight still.
    generation: u64,
    state: State,
    takes: Takes,
    /// `None` while its probe is in flight.
    due: Option<Instant>,
}

/// The end of a probe.
struct Probed {
    address: SocketAddr,
    generation: u64,
    outcome: Outcome,
}

impl Checker {
    fn new(
        config: Arc<Config>,
        inbox: mpsc::Sender<Event>,
        metrics: Arc<Metrics>,
        tunnels: Tunnels,
    ) -> Checker {
        Checker {
            config,
            members: Members::default(),
            revision: None,
            targets: HashMap::new(),
            unchecked: BTreeMap::new(),
            due: BTreeSet::new(),
            probes: JoinSet::new(),
            full_until: None,
            generation: 0,
            suspects: HashMap::new(),
            down: HashSet::new(),
            unmade: WarningLimit::default(),
            tunnels,
            inbox,
            metrics,
        }
    }

    /// When to call [`Self::probe_due`]; `None` while nothing is due or no probe may begin.
    fn next_probe(&self) -> Option<Instant> {
        let (at, _) = self.due.first()?;
        (self.probes.len() < self.config.health.concurrency).then_some(*at)
    }

    /// Begins the probes that are due and may begin.
    fn probe_due(&mut self, now: Instant) {
        while self.next_probe().is_some_and(|at| at <= now)
            && let Some((address, target)) = self.take_due()
        {
            let check = match (self.config.health.check, target.takes) {
                (HealthCheck::Http, Takes::Http) => Check::Get,
                (HealthCheck::Http, Takes::Tcp) | (HealthCheck::Tcp | HealthCheck::None, _) => {
                    Check::Connect
                }
            };
            let via = ProbeVia::choose(address, target.takes, &self.tunnels.load());
            let config = Arc::clone(&self.config);
            self.probes.spawn(async move {
                Probed {
                    address,
                    generation: target.generation,
                    outcome: probe::probe(address, check, via, &config.health).await,
                }
            });
        }
    }

    /// Takes the target that is due first; until its probe ends it is due no more.
    fn take_due(&mut self) -> Option<(SocketAddr, Target)> {
        let (at, address) = self.due.pop_first()?;
        let target = self.targets.get_mut(&address);
        let target = target.expect("what is due is a target");
        target.due = None;
        if self.full_until.is_some_and(|until| at < until) {
            self.metrics.probes_delayed.inc();
        }
        Some((address, *target))
    }

    /// Takes in the end of a probe.
    async fn probed(&mut self, probed: Probed, now: Instant) {
        if self.probes.len() + 1 >= self.config.health.concurrency {
            self.full_until = Some(now);
        }
        let good = match &probed.outcome {
            Outcome::Good => {
                self.metrics.probes_good.inc();
                Some(true)
            }
            Outcome::Bad => {
                self.metrics.probes_bad.inc();
                Some(false)
            }
            Outcome::Unmade(error) => {
                self.metrics.probes_unmade.inc();
                if let Some(suppressed) = self.unmade.allow(now.into_std()) {
                    let backend = probed.address;
                    tracing::warn!(%backend, %error, suppressed, "this host cannot make a health check");
                }
                None
            }
        };
        let health = &self.config.health;
        let target = self.targets.get_mut(&probed.address);
        let Some(target) = target.filter(|target| target.generation == probed.generation) else {
            return;
        };
        if let Some(good) = good {
            target.state.observe(good, health.rise, health.fall);
        }
        let vouches = target.state.vouches();
        let jitter = f64::from(health.jitter) / 100.0;
        // To either side, so that targets that began together drift apart.
        let stretch = rand::rng().random_range(1.0 - jitter..=1.0 + jitter);
        let next = now + health.interval.mul_f64(stretch);
        self.schedule(probed.address, next);
        if vouches {
            self.suspects.remove(&probed.address);
        }
        self.settle(probed.address).await;
    }

    /// Takes in what layer 4 saw.
    async fn reported(&mut self, report: Unanswered, now: Instant) {
        let address = report.backend;
        if !self.config.health.passive {
            return;
        }
        let before = self.suspects.get(&address).copied().unwrap_or_default();
        let vouches = |target: &Target| target.state.vouches();
        let vouched = self.targets.get(&address).is_some_and(vouches);
        let unvouched = before.observe(report, false, now.into_std());
        if vouched && unvouched.is_out() {
            self.metrics.passive_overruled.inc();
            self.probe_now(address, now);
        }
        let after = before.observe(report, vouched, now.into_std());
        if after == Passive::Trusted {
            self.suspects.remove(&address);
        } else if self.suspects.contains_key(&address) || self.suspects.len() < MAX_TARGETS {
            if after.is_out() && !before.is_out() {
                tracing::debug!(backend = %address, syns = report.syns, "SYNs unanswered");
                self.metrics.passive_ejections.inc();
            }
            self.suspects.insert(address, after);
        } else {
            self.metrics.passive_dropped.inc();
        }
        self.settle(address).await;
    }

    /// Lets those back in whose time is over.
    async fn end_backoffs(&mut self, now: Instant) {
        let mut returned = Vec::new();
        self.suspects.retain(|address, passive| {
            let before = *passive;
            *passive = before.at(now.into_std());
            if before.is_out() && !passive.is_out() {
                returned.push(*address);
            }
            *passive != Passive::Trusted
        });
        for address in returned {
            self.settle(address).await;
        }
    }

    /// Tells the agent if a backend is not what it was told last.
    async fn settle(&mut self, address: SocketAddr) {
        let fails = |target: &Target| !target.state.healthy();
        let is_down = self.targets.get(&address).is_some_and(fails)
            || self.suspects.get(&address).is_some_and(|p| p.is_out());
        let changed = match is_down {
            true => self.down.insert(address),
            false => self.down.remove(&address),
        };
        if changed {
            let event = Event::Health {
                backend: address,
                healthy: !is_down,
            };
            // Without an agent there is nobody to tell, and the loop ends.
            let _ = self.inbox.send(event).await;
        }
    }

    /// Brings the targets in line with a snapshot.
    async fn follow(&mut self, snapshot: Arc<Snapshot>, now: Instant) {
        if self.revision == Some(snapshot.revision) {
            return;
        }
        self.revision = Some(snapshot.revision);
        let snapshot = match self.config.health.check {
            HealthCheck::None => Arc::default(),
            HealthCheck::Tcp | HealthCheck::Http => snapshot,
        };
        let mut members = std::mem::take(&mut self.members);
        // The first time it is a walk over all routes, which may be a million.
        let walk = tokio::task::spawn_blocking(move || {
            let changed = members.follow(snapshot);
            (members, changed)
        });
        let (members, changed) = walk.await.expect("the walk does not panic");
        self.members = members;
        self.take_in(changed, now).await;
    }

    async fn take_in(&mut self, changed: Vec<Changed>, now: Instant) {
        for (address, takes) in changed {
            match takes {
                None if self.unchecked.remove(&address).is_some() => {}
                None => {
                    let target = self.targets.remove(&address);
                    if let Some(due) = target.and_then(|target| target.due) {
                        self.due.remove(&(due, address));
                    }
                    self.settle(address).await;
                }
                Some(takes) => match self.targets.get_mut(&address) {
                    Some(target) => target.takes = takes,
                    None => {
                        self.unchecked.insert(address, takes);
                    }
                },
            }
        }
        while self.targets.len() < MAX_TARGETS
            && let Some((address, takes)) = self.unchecked.pop_first()
        {
            self.generation += 1;
            let target = Target {
                generation: self.generation,
                state: State::default(),
                takes,
                due: None,
            };
            self.targets.insert(address, target);
            self.schedule_anywhere(address, now);
        }
        self.metrics.health_targets.set(self.targets.len());
        self.metrics.health_unchecked.set(self.unchecked.len());
    }

    /// Takes on a configuration. Another interval spreads all checks anew.
    async fn reload(&mut self, config: Arc<Config>, now: Instant) {
        let before = std::mem::replace(&mut self.config, config);
        self.revision = None;
        if before.health.interval != self.config.health.interval {
            for (_, address) in std::mem::take(&mut self.due) {
                self.schedule_anywhere(address, now);
            }
        }
        if !self.config.health.passive {
            for (address, _) in std::mem::take(&mut self.suspects) {
                self.settle(address).await;
            }
        }
    }

    /// Makes the next probe of a target that has none in flight due at once.
    fn probe_now(&mut self, address: SocketAddr, now: Instant) {
        let due = self.targets.get(&address).and_then(|target| target.due);
        if let Some(due) = due.filter(|due| *due > now) {
            self.due.remove(&(due, address));
            self.schedule(address, now);
        }
    }

    /// Puts a probe anywhere in the interval, so that many at once spread over it.
    fn schedule_anywhere(&mut self, address: SocketAddr, now: Instant) {
        let part = rand::rng().random_range(0.0..1.0);
        self.schedule(address, now + self.config.health.interval.mul_f64(part));
    }

    fn schedule(&mut self, address: SocketAddr, at: Instant) {
        let target = self.targets.get_mut(&address);
        target.expect("what is scheduled is a target").due = Some(at);
        self.due.insert((at, address));
    }
}

#[cfg(test)]
mod tests;
