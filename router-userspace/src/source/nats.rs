//! Routes from NATS, in gorouter's messages. The only module that names the NATS client.
//!
//! One task reads one subscription, `<prefix>.*`, so that registrations and withdrawals keep their
//! order. It announces the gateway by `<prefix>.start` after every connect, once the subscription is
//! in place, and answers `<prefix>.greet`. The client reconnects for ever by itself.
//!
//! Back-pressure: this task empties the subscription whenever it runs and waits while the agent's
//! inbox is full; the client's own buffer of [`SUBSCRIPTION_CAPACITY`] messages takes up bursts in
//! between. The client drops what exceeds it, which is counted and logged, and repaired by the next
//! heartbeats.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use async_nats::connection::State;
use async_nats::{Client, ConnectOptions, Message, Subscriber};
use futures_util::StreamExt;
use rand::Rng;
use serde::Serialize;
use tokio::sync::mpsc;

use crate::config::{Config, NatsConfig};
use crate::event::Event;
use crate::route::{Origin, RouteEvent, wire};
use crate::source::Context;
use crate::warning::WarningLimit;

/// Messages the client holds for this task; a message of 400 bytes makes that 100 MiB at worst.
const SUBSCRIPTION_CAPACITY: usize = 1 << 18;

/// Events of the client that wait for this task. More are dropped: [`Source::reconcile`] makes up
/// for a lost one within [`RECONCILE`].
const CLIENT_EVENTS: usize = 64;

const RECONCILE: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Also how soon a server that went away without a word is noticed: after two missed answers.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// Connects in the background, subscribes, and starts the task.
///
/// # Errors
/// A server name, secret or file of the configuration that cannot be used.
pub async fn start(config: &NatsConfig, context: Context) -> anyhow::Result<()> {
    let (events_in, events) = mpsc::channel(CLIENT_EVENTS);
    let client = connect(config, Some(events_in)).await?;
    let wildcard = format!("{}.*", config.subject_prefix);
    let subscriber = client
        .subscribe(wildcard)
        .await
        .context("subscribe to NATS")?;
    let source = Source {
        subjects: Subjects::new(&config.subject_prefix),
        id: format!("0-{}", uuid::Uuid::new_v4()),
        client,
        context,
        connected: false,
        warnings: WarningLimit::default(),
    };
    tokio::spawn(tokio::task::coop::unconstrained(
        source.run(subscriber, events),
    ));
    Ok(())
}

/// Publishes one message by hand and waits until the server has it.
///
/// # Errors
/// Also when no server answers within the timeout of a connect.
pub async fn publish(config: &NatsConfig, kind: &str, payload: Vec<u8>) -> anyhow::Result<()> {
    let servers = config.servers.join(", ");
    let client = connect(config, None)
        .await
        .with_context(|| format!("connect to {servers}"))?;
    let subject = format!("{}.{kind}", config.subject_prefix);
    client
        .publish(subject, payload.into())
        .await
        .context("publish")?;
    client.flush().await.context("publish")?;
    Ok(())
}

/// With `events` the client retries for ever, without it tries each server once.
async fn connect(
    config: &NatsConfig,
    events: Option<mpsc::Sender<async_nats::Event>>,
) -> anyhow::Result<Client> {
    let mut options = ConnectOptions::new()
        .name("viaduct")
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .connection_timeout(CONNECT_TIMEOUT)
        .ping_interval(PING_INTERVAL)
        .reconnect_delay_callback(backoff);
    if let Some(events) = events {
        options = options
            .retry_on_initial_connect()
            .max_reconnects(None)
            .event_callback(move |event| {
                // A full channel loses an event, not the order of those that fit.
                let _ = events.try_send(event);
                std::future::ready(())
            });
    }
    let secret = |key: &str, secret: &crate::config::Secret| {
        secret.reveal().with_context(|| format!("nats.{key}"))
    };
    match (&config.user, &config.password) {
        (Some(user), Some(password)) => {
            options = options.user_and_password(user.clone(), secret("password", password)?);
        }
        (None, None) => {}
        (Some(_), None) => bail!("nats.user without nats.password"),
        (None, Some(_)) => bail!("nats.password without nats.user"),
    }
    if let Some(token) = &config.token {
        options = options.token(secret("token", token)?);
    }
    if let Some(seed) = &config.nkey_seed {
        options = options.nkey(secret("nkey_seed", seed)?);
    }
    if let Some(path) = &config.credentials_file {
        options = options
            .credentials_file(path)
            .await
            .with_context(|| format!("nats.credentials_file {}", path.display()))?;
    }
    if let Some(path) = &config.ca_file {
        options = options.add_root_certificates(path.clone());
    }
    if let (Some(certificate), Some(key)) =
        (&config.client_certificate_file, &config.client_key_file)
    {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    options
        .connect(&config.servers[..])
        .await
        .context("nats.servers")
}

/// The wait before an attempt: doubling from 10 ms, half of it by chance, so that the gateways of a
/// site do not come back to a restarted server all at once.
fn backoff(attempt: usize) -> Duration {
    let exponent = u32::try_from(attempt.saturating_sub(1))
        .unwrap_or(u32::MAX)
        .min(16);
    if attempt <= 1 {
        return Duration::ZERO;
    }
    let most = Duration::from_millis(10 << exponent).min(MAX_BACKOFF);
    rand::rng().random_range(most / 2..=most)
}

struct Source {
    subjects: Subjects,
    /// Which gateway this is, in `<prefix>.start`.
    id: String,
    client: Client,
    context: Context,
    connected: bool,
    warnings: WarningLimit,
}

struct Subjects {
    register: String,
    unregister: String,
    greet: String,
    start: String,
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
    async fn run(
        mut self,
        mut subscriber: Subscriber,
        mut events: mpsc::Receiver<async_nats::Event>,
    ) {
        let mut reconcile = tokio::time::interval(RECONCILE);
        loop {
            // All three are cancel safe; what is done with them is not part of the select.
            tokio::select! {
                message = subscriber.next() => {
                    let message = message.expect("the client reconnects for ever");
                    self.take(message).await;
                }
                event = events.recv() => {
                    let event = event.expect("the client reports as long as it lives");
                    self.react(event).await;
                }
                _ = reconcile.tick() => self.reconcile().await,
            }
        }
    }

    async fn take(&mut self, message: Message) {
        let metrics = &self.context.metrics;
        let subject = message.subject.as_str();
        let event = if subject == self.subjects.register {
            metrics.registers.inc();
            let config = self.context.config.borrow();
            wire::register(&message.payload, &config.l4.vip_ranges).map(RouteEvent::Register)
        } else if subject == self.subjects.unregister {
            metrics.unregisters.inc();
            wire::unregister(&message.payload).map(RouteEvent::Unregister)
        } else {
            if subject == self.subjects.greet {
                metrics.greets.inc();
                self.greet(message).await;
            }
            return;
        };
        match event {
            Ok(event) => self.send(Event::Route(event)).await,
            Err(reject) => {
                metrics.reject(reject.reason);
                let payload = &message.payload[..message.payload.len().min(256)];
                if let Some(suppressed) = self.warnings.allow(Instant::now()) {
                    tracing::warn!(
                        subject,
                        reason = reject.reason.as_str(),
                        error = %reject,
                        payload = %String::from_utf8_lossy(payload).escape_debug(),
                        suppressed,
                        "refused a message"
                    );
                }
            }
        }
    }

    async fn react(&mut self, event: async_nats::Event) {
        match event {
            async_nats::Event::Connected => self.connected(true).await,
            async_nats::Event::Disconnected => self.connected(false).await,
            async_nats::Event::SlowConsumer(_) => {
                self.context.metrics.nats_slow_consumer.inc();
                if let Some(suppressed) = self.warnings.allow(Instant::now()) {
                    tracing::warn!(
                        suppressed,
                        "NATS messages dropped: more than can be taken in"
                    );
                }
            }
            async_nats::Event::ServerError(error) => tracing::warn!(%error, "NATS server"),
            async_nats::Event::ClientError(error) => {
                if let Some(suppressed) = self.warnings.allow(Instant::now()) {
                    tracing::warn!(%error, suppressed, "NATS");
                }
            }
            async_nats::Event::LameDuckMode
            | async_nats::Event::Draining
            | async_nats::Event::Closed => tracing::info!(%event, "NATS"),
        }
    }

    /// Makes up for events that found the channel full.
    async fn reconcile(&mut self) {
        let connected = self.client.connection_state() == State::Connected;
        if connected != self.connected {
            self.connected(connected).await;
        }
    }

    async fn connected(&mut self, connected: bool) {
        let metrics = &self.context.metrics;
        metrics.nats_connected.set(usize::from(connected));
        if connected {
            metrics.nats_connects.inc();
            let server = self.client.server_info();
            tracing::info!(
                server = server.server_name,
                version = server.version,
                "NATS connected"
            );
        } else if self.connected {
            tracing::warn!("NATS lost: routes stay as they are until it is back");
        }
        self.connected = connected;
        self.send(Event::SourceConnected {
            origin: Origin::Nats,
            connected,
        })
        .await;
        if connected {
            // The client has put its subscriptions before anything published from here on.
            let subject = self.subjects.start.clone();
            let start = self.start_message();
            if let Err(error) = self.client.publish(subject, start.into()).await {
                tracing::warn!(%error, "publish the start message");
            }
        }
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

    async fn send(&self, event: Event) {
        // The agent outlives its sources but for the moment of shutdown.
        let _ = self.context.inbox.send(event).await;
    }
}

impl Subjects {
    fn new(prefix: &str) -> Subjects {
        let subject = |name: &str| format!("{prefix}.{name}");
        Subjects {
            register: subject("register"),
            unregister: subject("unregister"),
            greet: subject("greet"),
            start: subject("start"),
        }
    }
}

#[cfg(test)]
mod tests;
