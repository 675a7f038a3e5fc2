//! Routes from NATS, in gorouter's messages. Beside [`kv`](super::kv), the only module that names the
//! NATS client.
//!
//! One task reads one subscription, `<prefix>.*`, so that registrations and withdrawals keep their
//! order. It announces the gateway by `<prefix>.start` after every connect, once the subscription is
//! in place, and answers `<prefix>.greet`. The client reconnects for ever by itself.
//!
//! While rules of `[guard]` name subjects, one more subscription, `<prefix>.*.*`, has registrations and
//! withdrawals of those who have a subject of their own; their last token says who published.
//!
//! Whether there is a connection is asked of the client, never taken from its events: those may be
//! lost, and only wake the task.
//!
//! The client reads no more at a time than the agent takes in before its next turn (`READ_BYTES` of [`connection`](self::connection)), so a
//! burst of any length waits at the server. Beyond that nothing here waits for the agent with messages
//! unread: the task empties the subscription whenever it runs and holds what the agent's inbox has no
//! room for, [`BUDGET_BYTES`] with the inbox's part. What exceeds that is dropped, counted and logged, and
//! repaired by the next heartbeats; so is what the client drops when more than `SUBSCRIPTION_CAPACITY`
//! messages arrive before the task runs.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use async_nats::connection::State;
use async_nats::{Client, Message, Subscriber};
use futures_util::StreamExt;
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc};

use crate::config::{Config, NatsConfig};
use crate::event::Event;
use crate::metrics::Metrics;
use crate::route::ownership::Claimant;
use crate::route::wire::{Reason, Reject};
use crate::route::{Origin, RouteEvent, RouteKey, wire};
use crate::source::Context;
use crate::warning::WarningLimit;

mod connection;
mod subjects;

use self::connection::{CLIENT_EVENTS, explain};
pub use self::connection::{check, connect, options, publish, reach};
use self::subjects::{Kind, Subjects};

/// Bytes of messages that are read and not taken in by the agent yet, each counted with
/// [`MESSAGE_OVERHEAD`]: about 100,000 registrations.
const BUDGET_BYTES: usize = 64 << 20;
const MESSAGE_OVERHEAD: usize = 256;

/// Bytes that the agent is asked to give back at a time.
const RELEASE_BYTES: usize = 1 << 20;

/// Between two looks at the connection, at most.
const RECONCILE: Duration = Duration::from_secs(1);

/// Connects in the background, subscribes, and starts the task.
///
/// # Errors
/// A server name, secret or file of the configuration that cannot be used.
pub async fn start(config: &NatsConfig, context: Context) -> anyhow::Result<()> {
    let (events_in, events) = mpsc::channel(CLIENT_EVENTS);
    let options = options(config, events_in).await?;
    let client = options
        .retry_on_initial_connect()
        .max_reconnects(None)
        .connect(&config.servers[..])
        .await
        .with_context(|| format!("nats.servers {:?}", config.servers))?;
    let wildcard = format!("{}.*", config.subject_prefix);
    let subscriber = client
        .subscribe(wildcard)
        .await
        .context("subscribe to NATS")?;
    let mut source = Source::new(config, client, context);
    source.follow_rules().await?;
    tokio::spawn(tokio::task::coop::unconstrained(
        source.run(subscriber, events),
    ));
    Ok(())
}

struct Source {
    subjects: Subjects,
    /// Of the subjects that rules of `[guard]` may name, while some does.
    owned: Option<Subscriber>,
    /// Which gateway this is, in `<prefix>.start`.
    id: String,
    client: Client,
    context: Context,
    /// As the agent was told.
    connected: bool,
    /// Connections of the client that the agent was told of.
    connects: u64,
    /// Read, and not in the agent's inbox yet.
    queue: VecDeque<Message>,
    /// Bytes that may still be read; the agent gives back those it has taken in.
    budget: Arc<Semaphore>,
    /// Bytes of the budget that are through here and not asked back of the agent yet; never much
    /// above [`RELEASE_BYTES`].
    taken_in: usize,
    /// Messages that came out of the subscription.
    received: u64,
    /// Messages that the client is known to have dropped.
    dropped: u64,
    /// Why there is no connection, as it was told last.
    complaint: Option<String>,
    warnings: Warnings,
}

#[derive(Default)]
struct Warnings {
    rejects: [WarningLimit; Reason::ALL.len()],
    dropped: WarningLimit,
    server: WarningLimit,
}

/// `<prefix>.start` and the answer to `<prefix>.greet`, in gorouter's words.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Start<'a> {
    id: &'a str,
    hosts: [String; 1],
    minimum_register_interval_in_seconds: u64,
    prune_threshold_in_seconds: u64,
}

impl Source {
    fn new(config: &NatsConfig, client: Client, context: Context) -> Source {
        Source {
            subjects: Subjects::new(&config.subject_prefix),
            owned: None,
            id: format!("0-{}", uuid::Uuid::new_v4()),
            client,
            context,
            connected: false,
            connects: 0,
            queue: VecDeque::new(),
            budget: Arc::new(Semaphore::new(BUDGET_BYTES)),
            taken_in: 0,
            received: 0,
            dropped: 0,
            complaint: None,
            warnings: Warnings::default(),
        }
    }

    async fn run(
        mut self,
        mut subscriber: Subscriber,
        mut events: mpsc::Receiver<async_nats::Event>,
    ) {
        let mut reconcile = tokio::time::interval(RECONCILE);
        let inbox = self.context.inbox.clone();
        let mut reloads = self.context.config.clone();
        let mut waiting = false;
        loop {
            let full = !self.queue.is_empty() && inbox.capacity() == 0;
            if full && !waiting {
                self.context.metrics.inbox_full.inc();
            }
            waiting = full;
            // All are cancel safe; what is done with them is not part of the select. In this order:
            // the subscriptions are empty wherever another branch is taken.
            tokio::select! {
                biased;
                message = subscriber.next() => {
                    self.enqueue(message.expect("the client reconnects for ever"));
                }
                message = next_of(&mut self.owned) => {
                    self.enqueue(message.expect("the client reconnects for ever"));
                }
                Ok(()) = reloads.changed() => {
                    if let Err(error) = self.follow_rules().await {
                        tracing::error!("{error:#}: the subjects of guard.owner are not heard");
                    }
                }
                event = events.recv() => {
                    self.react(event.expect("the client reports as long as it lives"));
                    self.follow().await;
                }
                _ = reconcile.tick() => {
                    self.count_dropped();
                    self.follow().await;
                }
                permit = inbox.reserve(), if !self.queue.is_empty() => {
                    // The agent outlives its sources but for the moment of shutdown.
                    let Ok(permit) = permit else { return };
                    if let Some(event) = self.next_event().await {
                        permit.send(event);
                    }
                }
            }
        }
    }

    /// Listens to subjects of their own owners while a rule names some.
    async fn follow_rules(&mut self) -> anyhow::Result<()> {
        let config = Arc::clone(&self.context.config.borrow());
        let wanted = config.guard.ownership.names_subjects();
        if wanted && self.owned.is_none() {
            let subject = self.subjects.owned.clone();
            let subscriber = self.client.subscribe(subject).await;
            self.owned = Some(subscriber.context("subscribe to NATS")?);
        } else if !wanted && let Some(mut subscriber) = self.owned.take() {
            // What it still has is dropped and counted; without a connection there is nobody to tell.
            let _ = subscriber.unsubscribe().await;
        }
        Ok(())
    }

    /// Holds a message for the agent, or drops it.
    fn enqueue(&mut self, message: Message) {
        self.received += 1;
        let Ok(permit) = self.budget.try_acquire_many(cost(&message)) else {
            self.warn_dropped(1);
            return;
        };
        permit.forget();
        self.queue.push_back(message);
    }

    /// Works on what is queued until there is something for the agent.
    async fn next_event(&mut self) -> Option<Event> {
        // Asked for in the inbox's order, so that it is given back when what it stands for is taken in.
        if self.taken_in >= RELEASE_BYTES {
            return Some(self.release());
        }
        while let Some(message) = self.queue.pop_front() {
            self.taken_in += cost(&message) as usize;
            if let Some(event) = self.take(message).await {
                return Some(Event::Route(event));
            }
        }
        (self.taken_in > 0).then(|| self.release())
    }

    fn release(&mut self) -> Event {
        Event::Release {
            budget: Arc::clone(&self.budget),
            bytes: std::mem::take(&mut self.taken_in),
        }
    }

    /// Asks the client for what it dropped: all that it received and did not hand over. Right while
    /// the subscription is empty.
    fn count_dropped(&mut self) {
        let received = self.client.statistics().in_messages.load(Ordering::Relaxed);
        let dropped = received.saturating_sub(self.received);
        if dropped > self.dropped {
            self.warn_dropped(dropped - self.dropped);
            self.dropped = dropped;
        }
    }

    fn warn_dropped(&mut self, count: u64) {
        self.context.metrics.nats_slow_consumer.add(count);
        if let Some(suppressed) = self.warnings.dropped.allow(Instant::now()) {
            tracing::warn!(
                count,
                suppressed,
                "NATS messages dropped: more than can be taken in"
            );
        }
    }

    /// Decodes a message, or answers it.
    async fn take(&mut self, message: Message) -> Option<RouteEvent> {
        let metrics = &self.context.metrics;
        let subject = message.subject.as_str();
        let config = Arc::clone(&self.context.config.borrow());
        // The segment beside: those of others are not this gateway's.
        let mut owner = String::new();
        let (kind, claimant) = self.subjects.read(subject, &mut owner);
        let event = if kind == Kind::Register {
            metrics.registers.inc();
            let read = wire::register(&message.payload, &config.l4.vip_ranges);
            let read = read.and_then(|registration| {
                admit(metrics, &config, claimant, &registration.routes)?;
                Ok(registration)
            });
            read.map(|registration| {
                let segment = registration.backend.instance().isolation_segment.clone();
                (RouteEvent::Register(registration), segment)
            })
        } else if kind == Kind::Unregister {
            metrics.unregisters.inc();
            let read = wire::unregister(&message.payload);
            let read = read.and_then(|(gone, segment)| {
                admit(metrics, &config, claimant, &gone.routes)?;
                Ok((gone, segment))
            });
            read.map(|(gone, segment)| (RouteEvent::Unregister(gone), segment))
        } else {
            if kind == Kind::Greet {
                metrics.greets.inc();
                self.greet(message).await;
            }
            return None;
        };
        match event {
            Ok((event, segment)) if config.nats.serves_segment(segment.as_deref()) => Some(event),
            Ok(_) => {
                metrics.nats_other_segments.inc();
                None
            }
            Err(reject) => {
                metrics.reject(reject.reason);
                let payload = &message.payload[..message.payload.len().min(256)];
                let payload = String::from_utf8_lossy(payload).escape_debug().to_string();
                let what = format!("{subject} {payload}");
                self.context
                    .rejects
                    .note(Origin::Nats, &what, &reject.to_string());
                let limit = &mut self.warnings.rejects[reject.reason as usize];
                if let Some(suppressed) = limit.allow(Instant::now()) {
                    tracing::warn!(
                        subject,
                        reason = reject.reason.as_str(),
                        error = %reject,
                        payload,
                        suppressed,
                        "refused a message"
                    );
                }
                None
            }
        }
    }

    fn react(&mut self, event: async_nats::Event) {
        let now = Instant::now();
        match event {
            async_nats::Event::ServerError(error) => {
                if let Some(suppressed) = self.warnings.server.allow(now) {
                    tracing::warn!(%error, suppressed, "NATS server");
                }
            }
            // Each attempt tells it anew.
            async_nats::Event::ClientError(error) => {
                let error = explain(&self.context.config.borrow().nats, &error.to_string());
                if self.complaint.as_ref() != Some(&error) {
                    tracing::warn!(error, "NATS is not reached; it is tried again");
                    self.complaint = Some(error);
                }
            }
            async_nats::Event::LameDuckMode
            | async_nats::Event::Draining
            | async_nats::Event::Closed => tracing::info!(%event, "NATS"),
            async_nats::Event::Connected
            | async_nats::Event::Disconnected
            | async_nats::Event::SlowConsumer(_) => {}
        }
    }

    /// Tells the agent of every connection that came or went since it was told last, and the server
    /// of a new one that there is a gateway.
    async fn follow(&mut self) {
        let connects = self.client.statistics().connects.load(Ordering::Relaxed);
        let up = self.client.connection_state() == State::Connected;
        // A connection that came after one that was never seen to go.
        let replaced = connects > self.connects;
        if self.connected && (!up || replaced) {
            tracing::warn!("NATS lost: routes stay as they are until it is back");
            self.set_connected(false).await;
        }
        if !(up && replaced) {
            return;
        }
        self.context
            .metrics
            .nats_connects
            .add(connects - self.connects);
        self.connects = connects;
        self.complaint = None;
        self.context
            .metrics
            .nats_first_connect
            .get_or_init(Instant::now);
        let server = self.client.server_info();
        tracing::info!(
            server = server.server_name,
            version = server.version,
            "NATS connected"
        );
        self.set_connected(true).await;
        // The client has put its subscriptions before anything published from here on.
        let subject = self.subjects.start.clone();
        let start = self.start_message();
        if let Err(error) = self.client.publish(subject, start.into()).await {
            tracing::warn!(%error, "publish the start message");
        }
    }

    async fn set_connected(&mut self, connected: bool) {
        let metrics = &self.context.metrics;
        metrics.nats_connected.set(usize::from(connected));
        self.connected = connected;
        let event = Event::SourceConnected {
            origin: Origin::Nats,
            connected,
        };
        let _ = self.context.inbox.send(event).await;
    }

    async fn greet(&self, message: Message) {
        let Some(reply) = message.reply else { return };
        let answer = self.start_message();
        if let Err(error) = self.client.publish(reply, answer.into()).await {
            tracing::warn!(%error, "answer a greeting");
        }
    }

    fn start_message(&self) -> Vec<u8> {
        let config: Arc<Config> = Arc::clone(&self.context.config.borrow());
        let start = Start {
            id: &self.id,
            // Our address as the server sees it.
            hosts: [self.client.server_info().client_ip],
            minimum_register_interval_in_seconds: config.nats.minimum_register_interval.as_secs(),
            prune_threshold_in_seconds: config.nats.stale_threshold.as_secs(),
        };
        serde_json::to_vec(&start).expect("strings and numbers are JSON")
    }
}

/// The next message of a subscription; of none, never.
async fn next_of(subscriber: &mut Option<Subscriber>) -> Option<Message> {
    match subscriber {
        Some(subscriber) => subscriber.next().await,
        None => std::future::pending().await,
    }
}

/// Holds what a message names against the rules of `[guard]`.
fn admit(
    metrics: &Metrics,
    config: &Config,
    claimant: Claimant<'_>,
    routes: &[RouteKey],
) -> Result<(), Reject> {
    let admitted = config.guard.ownership.check(claimant, routes);
    admitted.map_err(|refusal| {
        metrics.guard_refusals(refusal.ground).inc();
        refusal.into()
    })
}

/// What a message takes of the budget.
fn cost(message: &Message) -> u32 {
    u32::try_from(message.payload.len() + MESSAGE_OVERHEAD).expect("a message fits u32")
}

#[cfg(test)]
mod tests;
