//! What sources have in common that keep routes under keys of a server.
//!
//! [`follow`] runs one session after another, for ever, with jittered backoff; a session reads all
//! that is there, tells its [`Store`] key by key, and then what changes. The store holds what each key
//! says, tells the agent what differs, and keeps what a key had when its value is refused. A session
//! may be cancelled at any await: what was not sent yet is sent by the next one.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure};
use futures_util::future::BoxFuture;
use ipnet::IpNet;
use rand::Rng;
use tokio::sync::watch;

use crate::config::Config;
use crate::event::Event;
use crate::route::declared::Announcement;
use crate::route::{Origin, RouteEvent, RouteKey};
use crate::source::Context;
use crate::source::ledger::Ledger;
use crate::source::status::State;
use crate::warning::WarningLimit;

/// Keys of one source that may announce something, and that are read at once.
pub(crate) const MAX_KEYS: usize = 1 << 20;
/// Refused keys that are remembered, so that each is told once.
const MAX_REFUSED: usize = 1 << 16;
/// Bytes of the value of a key.
pub(crate) const MAX_VALUE_BYTES: usize = 1 << 20;
/// Keys that are taken in before others of the thread have their turn.
const STEP: usize = 64;
/// Keys of which it is found out at a time whether they are gone.
const LOOK: usize = 1024;
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// A session with a server, which ends with the reason why.
pub(crate) type Session<C> = for<'a> fn(&'a C, &'a mut Store) -> BoxFuture<'a, anyhow::Error>;

/// Holds sessions by what the configuration says, until the process ends. `section` is what they
/// depend on, beside `l4.vip_ranges` and `guard`; `None` switches the source off, and takes its routes back.
pub(crate) async fn follow<C: PartialEq>(
    context: Context,
    origin: Origin,
    section: fn(&Config) -> Option<C>,
    session: Session<C>,
) {
    let mut config = context.config.clone();
    let mut store = Store::new(context, origin);
    loop {
        let current = Arc::clone(&config.borrow_and_update());
        store.adopt(&current);
        let Some(settings) = section(&current) else {
            store.switch_off().await;
            if config.changed().await.is_err() {
                return;
            }
            continue;
        };
        store.statuses().configure(origin, true);
        let session = async {
            let error = session(&settings, &mut store).await;
            let wait = store.lost(&error);
            store.tell(false).await;
            tokio::time::sleep(wait).await;
        };
        let differs = |new: &Config| {
            new.l4.vip_ranges != current.l4.vip_ranges
                || new.guard.ownership != current.guard.ownership
                || section(new).as_ref() != Some(&settings)
        };
        tokio::select! {
            biased;
            gone = change(&mut config, differs) => if gone.is_err() { return },
            () = session => {}
        }
    }
}

/// Waits for a reload that changes something.
async fn change(
    config: &mut watch::Receiver<Arc<Config>>,
    differs: impl Fn(&Config) -> bool,
) -> Result<(), watch::error::RecvError> {
    loop {
        config.changed().await?;
        let new = Arc::clone(&config.borrow_and_update());
        if differs(&new) {
            return Ok(());
        }
    }
}

/// What the keys of a source say, and what the agent has to be told of it.
pub(crate) struct Store {
    context: Context,
    origin: Origin,
    ledger: Ledger,
    /// Keys whose latest value was refused, and why.
    refused: BTreeMap<String, String>,
    /// Not in the agent's inbox yet.
    pending: VecDeque<RouteEvent>,
    /// Sessions that ended since one was whole.
    failures: u32,
    sessions: usize,
    /// Whether the agent knows that the state is whole.
    told: bool,
    taken_in: usize,
    refusals: WarningLimit,
}

impl Store {
    pub(crate) fn new(context: Context, origin: Origin) -> Store {
        Store {
            context,
            origin,
            ledger: Ledger::new(origin),
            refused: BTreeMap::new(),
            pending: VecDeque::new(),
            failures: 0,
            sessions: 0,
            told: false,
            taken_in: 0,
            refusals: WarningLimit::default(),
        }
    }

    /// One of several servers: another one with each session.
    pub(crate) fn choose<'a, T>(&mut self, servers: &'a [T]) -> &'a T {
        self.sessions += 1;
        &servers[(self.sessions - 1) % servers.len()]
    }

    /// What VIPs are held against.
    pub(crate) fn vip_ranges(&self) -> Vec<IpNet> {
        self.context.config.borrow().l4.vip_ranges.clone()
    }

    /// The session has a server.
    pub(crate) fn connected(&self, server: &str) {
        let origin = self.origin.as_str();
        tracing::info!(origin, server, "source connected");
        self.statuses().connected(self.origin);
    }

    /// The same, from a session that goes on.
    pub(crate) fn connected_once(&self, server: &str) {
        let status = self.statuses().get(self.origin);
        if status.is_none_or(|status| status.state != State::Connected) {
            self.connected(server);
        }
    }

    /// All that the server has was taken in; `follows`: and it tells every change.
    pub(crate) async fn whole(&mut self, follows: bool) {
        self.failures = 0;
        self.statuses().whole(self.origin, follows);
        self.tell(true).await;
    }

    /// Tells the agent whether the state of the source is whole, if that is news.
    async fn tell(&mut self, connected: bool) {
        let origin = self.origin;
        if self.told != connected {
            self.told = connected;
            let event = Event::SourceConnected { origin, connected };
            // An agent that is gone needs no telling.
            let _ = self.context.inbox.send(event).await;
        }
    }

    /// Takes in what a key says in place of what it said, or keeps that if it is refused.
    pub(crate) async fn set(&mut self, key: &str, content: anyhow::Result<Announcement>) {
        let known = !self.ledger.is_empty(key);
        let content = content.and_then(|content| {
            ensure!(
                known || content.is_empty() || self.ledger.key_count() < MAX_KEYS,
                "more than {MAX_KEYS} keys"
            );
            let ownership = &self.context.config.borrow().guard.ownership;
            ownership.check_announced(self.origin, &content)?;
            Ok(content)
        });
        match content {
            Ok(content) => {
                self.accept(key);
                self.pending.extend(self.ledger.set(key, content));
            }
            Err(error) => self.refuse(key, &error),
        }
        self.send().await;
    }

    /// Takes back what a key that is gone said.
    pub(crate) async fn remove(&mut self, key: &str) {
        self.set(key, Ok(Announcement::default())).await;
    }

    /// Takes back what all other keys said.
    pub(crate) async fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        let refused = self.refused.keys().filter(|key| !keep(key));
        for key in refused.cloned().collect::<Vec<_>>() {
            self.accept(&key);
        }
        let mut after = String::new();
        loop {
            let mut looked_at = None;
            let mut gone = Vec::new();
            for key in self.ledger.keys_after(&after).take(LOOK) {
                looked_at = Some(key.to_owned());
                if !keep(key) {
                    gone.push(key.to_owned());
                }
            }
            for key in &gone {
                self.pending.extend(self.ledger.remove(key));
            }
            self.send().await;
            match looked_at {
                Some(last) => after = last,
                None => return,
            }
            tokio::task::yield_now().await;
        }
    }

    fn accept(&mut self, key: &str) {
        if self.refused.remove(key).is_some() {
            self.context.rejects.clear(self.origin, key);
        }
    }

    /// Tells once of a key that stays refused.
    fn refuse(&mut self, key: &str, error: &anyhow::Error) {
        let why = format!("{error:#}");
        if self.refused.get(key) == Some(&why) {
            return;
        }
        self.context.metrics.source_rejects[self.origin as usize].inc();
        self.context.metrics.guard_refused(error);
        self.context.rejects.note(self.origin, key, &why);
        if let Some(suppressed) = self.refusals.allow(Instant::now()) {
            let origin = self.origin.as_str();
            tracing::warn!(origin, key, why, suppressed, "refused: it stays as it was");
        }
        if self.refused.len() < MAX_REFUSED || self.refused.contains_key(key) {
            self.refused.insert(key.to_owned(), why);
        }
    }

    /// Follows a reload: the agent dropped by itself what is not allowed.
    fn adopt(&mut self, config: &Config) {
        let origin = self.origin;
        let is_allowed = |route: &RouteKey| route.is_allowed(origin, config);
        self.ledger.retain_routes(is_allowed);
    }

    async fn switch_off(&mut self) {
        self.statuses().configure(self.origin, false);
        self.told = false;
        self.retain(|_| false).await;
    }

    /// The session ended; how long the next one waits.
    fn lost(&mut self, error: &anyhow::Error) -> Duration {
        let (origin, error) = (self.origin.as_str(), format!("{error:#}"));
        if self.failures == 0 {
            tracing::warn!(
                origin,
                error,
                "source lost: routes stay as they are until it is back"
            );
        } else {
            tracing::debug!(origin, error, "source not reached");
        }
        self.statuses().lost(self.origin, &error);
        self.failures = self.failures.saturating_add(1);
        backoff(self.failures)
    }

    /// Sends what there is, and waits while the agent's inbox is full.
    async fn send(&mut self) {
        let keys = &self.context.metrics.source_keys[self.origin as usize];
        keys.set(self.ledger.key_count());
        while !self.pending.is_empty() {
            let Ok(permit) = self.context.inbox.reserve().await else {
                // The process ends.
                return std::future::pending().await;
            };
            let event = self.pending.pop_front().expect("it is not empty");
            let config = self.context.config.borrow();
            // Read before a reload that has the agent drop it.
            let is_allowed = |route: &RouteKey| route.is_allowed(self.origin, &config);
            let stands = match &event {
                RouteEvent::Register(registration) => registration.routes.iter().all(is_allowed),
                RouteEvent::Declare(declared) => {
                    is_allowed(&RouteKey::Http(declared.route.clone()))
                }
                RouteEvent::Unregister(_) | RouteEvent::Withdraw(_) => true,
            };
            if stands {
                permit.send(Event::Route(event));
            }
        }
        self.taken_in += 1;
        if self.taken_in.is_multiple_of(STEP) {
            tokio::task::yield_now().await;
        }
    }

    pub(crate) fn statuses(&self) -> &crate::source::status::Statuses {
        &self.context.metrics.sources
    }
}

/// The name of a key that need not be text, and whether it is.
pub(crate) fn key_name(key: &[u8]) -> Result<&str, (String, anyhow::Error)> {
    std::str::from_utf8(key).map_err(|_| {
        let name = key.escape_ascii().to_string();
        (name, anyhow!("key: not UTF-8"))
    })
}

/// The wait before a session: doubling from 100 ms, half of it by chance, so that the gateways of a
/// site do not come back to a restarted server all at once.
fn backoff(failures: u32) -> Duration {
    let most = Duration::from_millis(100 << failures.saturating_sub(1).min(16)).min(MAX_BACKOFF);
    rand::rng().random_range(most / 2..=most)
}

#[cfg(test)]
mod tests;
