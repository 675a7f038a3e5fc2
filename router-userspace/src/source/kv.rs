//! Declared routes and policies of VIPs from a JetStream key-value bucket: docs/control.md.
//!
//! One task with a connection of its own, as [`nats`](super::nats) has one. After every connect it
//! reads the whole bucket, forgets the keys that are gone, and follows each change in the bucket's
//! order. While it cannot, everything stays as it was read last. A bucket that is not there is made,
//! but for one that was there before: then what it declared stays, as in any other loss.
//!
//! A server without JetStream, or one that does not permit it, is asked again at times, and is
//! otherwise as if no bucket were configured.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use async_nats::connection::State as Connection;
use async_nats::jetstream::consumer::push::{Ordered, OrderedConfig};
use async_nats::jetstream::consumer::{DeliverPolicy, ReplayPolicy};
use async_nats::jetstream::context::{GetStreamErrorKind, RequestErrorKind};
use async_nats::jetstream::stream::{self, Stream};
use async_nats::jetstream::{self, ErrorCode, Message};
use async_nats::{Client, HeaderMap};
use futures_util::StreamExt;
use tokio::sync::mpsc;

use crate::config::NatsConfig;
use crate::event::Event;
use crate::route::Origin;
use crate::source::kv::content::Content;
use crate::source::kv::status::State;
use crate::source::{Context, nats};
use crate::warning::WarningLimit;

pub mod content;
pub mod entry;
pub mod status;
pub mod store;

/// How often the connection is looked at, beside the client's events.
const RECONCILE: Duration = Duration::from_secs(1);
/// Between two attempts to read the bucket, at first and at most.
const RETRY: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];
/// Between two looks for JetStream at a server that has none.
const RETRY_ABSENT: Duration = Duration::from_secs(60);
/// How often a bucket whose values have an age limit is read anew: a server before 2.11 does not tell
/// of those that are over.
const REREAD: Duration = Duration::from_secs(10);
/// Values that a bucket made here keeps of a key.
const HISTORY: i64 = 8;
const NO_JETSTREAM: &str = "the server has no JetStream";
/// In what the server says to a client that may not publish or subscribe to a subject.
const NOT_PERMITTED: &str = "Permissions Violation";
/// The answer to a request of JetStream.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Events of the client that wait for this task; they only wake it.
const CLIENT_EVENTS: usize = 16;

/// Connects in the background, and starts the task.
///
/// # Errors
/// A server name, secret or file of the configuration that cannot be used.
pub async fn start(config: &NatsConfig, context: Context) -> anyhow::Result<()> {
    let (events_in, events) = mpsc::channel(CLIENT_EVENTS);
    let client = nats::options(config, events_in)
        .await?
        .name("viaduct-kv")
        .retry_on_initial_connect()
        .max_reconnects(None)
        .connect(&config.servers[..])
        .await
        .with_context(|| format!("nats.servers {:?}", config.servers))?;
    context.metrics.kv.set(State::Unread);
    let source = Source {
        jetstream: context_of(&client),
        client,
        bucket: config.bucket.clone(),
        context,
        content: Content::default(),
        absent: false,
        told: false,
        complaint: None,
        rejects: WarningLimit::default(),
    };
    tokio::spawn(source.run(events));
    Ok(())
}

/// JetStream over a connection.
fn context_of(client: &Client) -> jetstream::Context {
    let mut jetstream = jetstream::new(client.clone());
    jetstream.set_timeout(ANSWER_TIMEOUT);
    jetstream
}

/// Makes the bucket, as the gateway and `viaduct apply` do. Of those who make it at the same moment, the
/// server lets one, and tells others that its subjects are taken.
async fn create(jetstream: &jetstream::Context, bucket: &str) -> anyhow::Result<Stream> {
    let refused = match jetstream.create_stream(stream_config(bucket)).await {
        Ok(made) => return Ok(made),
        Err(refused) => refused,
    };
    match find(jetstream, bucket).await {
        Ok(Some(stream)) => Ok(stream),
        _ => Err(refused).with_context(|| format!("create the bucket {bucket}")),
    }
}

/// A bucket as its clients expect it to be made (ADR-8). The client's own call for it does not
/// understand servers before 2.10.
fn stream_config(bucket: &str) -> stream::Config {
    stream::Config {
        name: format!("KV_{bucket}"),
        description: Some("Routes and policies of VIPs that gateways serve".to_owned()),
        subjects: vec![format!("$KV.{bucket}.>")],
        max_messages_per_subject: HISTORY,
        max_message_size: i32::try_from(entry::MAX_VALUE_BYTES).expect("a MiB"),
        discard: stream::DiscardPolicy::New,
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        num_replicas: 1,
        ..stream::Config::default()
    }
}

/// The stream of a bucket; `None`: there is no such bucket.
async fn find(jetstream: &jetstream::Context, bucket: &str) -> Result<Option<Stream>, Missing> {
    let error = match jetstream.get_stream(format!("KV_{bucket}")).await {
        Ok(stream) => return Ok(Some(stream)),
        Err(error) => error,
    };
    let code = match error.kind() {
        GetStreamErrorKind::JetStream(error) => Some(error.error_code()),
        _ => None,
    };
    let source = std::error::Error::source(&error);
    let request =
        source.and_then(|source| source.downcast_ref::<jetstream::context::RequestError>());
    let unanswered = request.is_some_and(|error| error.kind() == RequestErrorKind::NoResponders);
    match code {
        Some(ErrorCode::STREAM_NOT_FOUND) => Ok(None),
        Some(ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT) => {
            Err(Missing::JetStream)
        }
        _ if unanswered => Err(Missing::JetStream),
        _ => Err(Missing::Answer(
            anyhow!(error).context(format!("look for the bucket {bucket}")),
        )),
    }
}

enum Missing {
    /// The server, or the account, has none.
    JetStream,
    Answer(anyhow::Error),
}

struct Source {
    client: Client,
    jetstream: jetstream::Context,
    bucket: String,
    context: Context,
    content: Content,
    /// Whether the server was found to have no JetStream.
    absent: bool,
    /// Whether the agent knows that there is nothing to wait for.
    told: bool,
    /// What was said last of why the bucket is not followed.
    complaint: Option<String>,
    rejects: WarningLimit,
}

/// The whole bucket, then its changes.
struct Watch {
    messages: Ordered,
    /// Of the connection that it began on.
    connects: u64,
    /// The keys that were met; `None` once the bucket is read whole.
    met: Option<HashSet<Arc<str>>>,
    /// Whether values end by themselves.
    ages: bool,
}

impl Source {
    async fn run(mut self, mut events: mpsc::Receiver<async_nats::Event>) {
        let mut retry = RETRY[0];
        let mut look = tokio::time::interval(RECONCILE);
        loop {
            while self.client.connection_state() != Connection::Connected {
                self.lose("NATS is away");
                self.tell_agent().await;
                tokio::select! {
                    _ = look.tick() => {}
                    _ = events.recv() => {}
                }
            }
            let connects = self.connects();
            let ended = match self.open(connects).await {
                Ok(watch) => {
                    retry = RETRY[0];
                    self.tell_agent().await;
                    self.follow(watch, &mut events).await
                }
                Err(error) => Err(error),
            };
            let wait = match ended {
                Ok(Next::Anew) => continue,
                Ok(Next::End) => return,
                Err(error) => {
                    let why = format!("{error:#}{}", server_errors(&mut events));
                    let state = self.context.metrics.kv.state();
                    let never = matches!(state, State::Unread | State::Off);
                    if never && (why.contains(NO_JETSTREAM) || why.contains(NOT_PERMITTED)) {
                        self.note_absent(&why);
                        RETRY_ABSENT
                    } else {
                        self.lose(&why);
                        retry = (retry * 2).min(RETRY[1]);
                        retry
                    }
                }
            };
            self.tell_agent().await;
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.reconnected(connects) => {}
            }
        }
    }

    /// Tells the agent whether the bucket is read, or there is none, if that is news.
    async fn tell_agent(&mut self) {
        let connected = matches!(
            self.context.metrics.kv.state(),
            State::Followed | State::Off
        );
        if self.told != connected {
            self.told = connected;
            let origin = Origin::Kv;
            let event = Event::SourceConnected { origin, connected };
            // An agent that is gone needs no telling.
            let _ = self.context.inbox.send(event).await;
        }
    }

    /// Begins to read the bucket.
    async fn open(&mut self, connects: u64) -> anyhow::Result<Watch> {
        let known = self.context.metrics.kv.state() == State::Lost;
        let stream = match find(&self.jetstream, &self.bucket).await {
            Ok(Some(stream)) => stream,
            Ok(None) if known => bail!("the bucket {} is gone", self.bucket),
            Ok(None) => {
                let stream = create(&self.jetstream, &self.bucket).await?;
                tracing::info!(bucket = self.bucket, "bucket of declared state made");
                stream
            }
            Err(Missing::Answer(error)) => return Err(error),
            Err(Missing::JetStream) => {
                bail!(NO_JETSTREAM);
            }
        };
        self.absent = false;
        let consumer = stream.create_consumer(OrderedConfig {
            deliver_subject: self.client.new_inbox(),
            description: Some("viaduct".to_owned()),
            filter_subject: self.prefix() + ">",
            deliver_policy: DeliverPolicy::LastPerSubject,
            replay_policy: ReplayPolicy::Instant,
            ..OrderedConfig::default()
        });
        let consumer = consumer.await.context("follow the bucket")?;
        let is_empty = consumer.cached_info().num_pending == 0;
        let messages = consumer.messages().await.context("follow the bucket")?;
        let mut watch = Watch {
            messages,
            connects,
            met: Some(HashSet::new()),
            ages: !stream.cached_info().config.max_age.is_zero(),
        };
        if is_empty {
            self.read_whole(&mut watch).await;
        }
        Ok(watch)
    }

    /// Says once that there is no bucket for this gateway, which is then as one without.
    fn note_absent(&mut self, why: &str) {
        if !self.absent {
            let bucket = &self.bucket;
            match why.contains(NO_JETSTREAM) {
                true => tracing::info!(bucket, why, "nothing is declared there"),
                false => tracing::warn!(bucket, why, "what is declared there is not read"),
            }
        }
        self.absent = true;
        self.context.metrics.kv.set(State::Off);
    }

    /// Takes in what comes, until the bucket has to be read anew.
    async fn follow(
        &mut self,
        mut watch: Watch,
        events: &mut mpsc::Receiver<async_nats::Event>,
    ) -> anyhow::Result<Next> {
        let mut look = tokio::time::interval(RECONCILE);
        let begun = tokio::time::Instant::now();
        let mut config = self.context.config.clone();
        config.mark_unchanged();
        loop {
            tokio::select! {
                message = watch.messages.next() => {
                    let message = message.context("the bucket's changes ended")?;
                    let message = message.context("follow the bucket")?;
                    if !self.take(&message, &mut watch).await? {
                        return Ok(Next::End);
                    }
                }
                _ = events.recv() => {}
                _ = look.tick() => {
                    if watch.ages && watch.met.is_none() && begun.elapsed() >= REREAD {
                        return Ok(Next::Anew);
                    }
                }
                changed = config.changed() => {
                    if changed.is_err() {
                        return Ok(Next::End);
                    }
                    let config = Arc::clone(&config.borrow());
                    let revisions = &self.context.metrics.kv.revisions;
                    let events = self.content.retain_allowed(&config, revisions);
                    return Ok(if self.send(events).await { Next::Anew } else { Next::End });
                }
            }
            self.tell_agent().await;
            // Asked of the client: its events may be lost.
            let is_up = self.client.connection_state() == Connection::Connected;
            if !is_up || self.connects() != watch.connects {
                self.lose("NATS is away");
                return Ok(Next::Anew);
            }
        }
    }

    /// Takes in one entry. `false`: the agent is gone.
    async fn take(&mut self, message: &Message, watch: &mut Watch) -> anyhow::Result<bool> {
        let info = message.info().map_err(|error| anyhow!("{error}"))?;
        let (revision, is_last) = (info.stream_sequence, info.pending == 0);
        let prefix = self.prefix();
        let Some(key) = message.subject.strip_prefix(&prefix) else {
            bail!(
                "the bucket has a message of the subject {}",
                message.subject
            );
        };
        let key: Arc<str> = key.into();
        let events = match is_value(message) {
            false => {
                if let Some(met) = &mut watch.met {
                    met.remove(&key);
                }
                self.remove(&key)
            }
            true => {
                if let Some(met) = &mut watch.met {
                    met.insert(Arc::clone(&key));
                }
                self.put(&key, &message.payload, revision)
            }
        };
        let sent = self.send(events).await;
        if is_last && watch.met.is_some() {
            return Ok(self.read_whole(watch).await);
        }
        self.context.metrics.kv_keys.set(self.content.key_count());
        Ok(sent)
    }

    fn put(&mut self, key: &str, value: &[u8], revision: u64) -> Vec<Event> {
        let metrics = &self.context.metrics;
        let config = Arc::clone(&self.context.config.borrow());
        let taken = self
            .content
            .put(key, value, revision, &config, &metrics.kv.revisions);
        match taken {
            Ok(events) => {
                metrics.kv_values.inc();
                self.context.rejects.clear(Origin::Kv, key);
                tracing::debug!(key, revision, "declared");
                events
            }
            Err(error) => {
                metrics.kv_rejects.inc();
                metrics.guard_refused(&error);
                let error = format!("{error:#}");
                self.context.rejects.clear(Origin::Kv, key);
                self.context.rejects.note(Origin::Kv, key, &error);
                if let Some(suppressed) = self.rejects.allow(Instant::now()) {
                    tracing::warn!(
                        key,
                        revision,
                        error,
                        suppressed,
                        "refused a declaration: what the key declared before stays"
                    );
                }
                Vec::new()
            }
        }
    }

    fn remove(&mut self, key: &str) -> Vec<Event> {
        self.context.metrics.kv_deletes.inc();
        self.context.rejects.clear(Origin::Kv, key);
        tracing::debug!(key, "declared no more");
        self.content.remove(key, &self.context.metrics.kv.revisions)
    }

    /// Forgets what the bucket does not hold any more. `false`: the agent is gone.
    async fn read_whole(&mut self, watch: &mut Watch) -> bool {
        let met = watch.met.take().unwrap_or_default();
        let mut events = Vec::new();
        for key in self.content.others(&met) {
            events.append(&mut self.remove(&key));
        }
        let sent = self.send(events).await;
        let metrics = &self.context.metrics;
        metrics.kv_keys.set(self.content.key_count());
        if metrics.kv.state() != State::Followed {
            let keys = self.content.key_count();
            tracing::info!(bucket = self.bucket, keys, "declared state read");
        }
        metrics.kv.set(State::Followed);
        self.complaint = None;
        sent
    }

    /// Says once why the bucket is not followed.
    fn lose(&mut self, why: &str) {
        let status = &self.context.metrics.kv;
        if status.state() == State::Followed {
            status.set(State::Lost);
        }
        if self.absent || self.complaint.as_deref() == Some(why) {
            return;
        }
        self.complaint = Some(why.to_owned());
        let bucket = &self.bucket;
        match status.state() {
            State::Lost => tracing::warn!(bucket, why, "declared state stays as it was read last"),
            // The source of registrations says so already.
            _ if self.client.connection_state() != Connection::Connected => {}
            _ => tracing::warn!(
                bucket,
                why,
                "declared state cannot be read; it is tried again"
            ),
        }
    }

    /// Hands on to the agent, in order. `false`: it is gone.
    async fn send(&self, events: Vec<Event>) -> bool {
        for event in events {
            if self.context.inbox.send(event).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Returns once there is another connection.
    async fn reconnected(&self, connects: u64) {
        let mut look = tokio::time::interval(RECONCILE);
        while self.connects() == connects {
            look.tick().await;
        }
    }

    fn connects(&self) -> u64 {
        self.client.statistics().connects.load(Ordering::Relaxed)
    }

    fn prefix(&self) -> String {
        format!("$KV.{}.", self.bucket)
    }
}

/// What the server said lately against a request, which it leaves unanswered then.
fn server_errors(events: &mut mpsc::Receiver<async_nats::Event>) -> String {
    let mut said = String::new();
    while let Ok(event) = events.try_recv() {
        if let async_nats::Event::ServerError(error) = event {
            said = format!(": {error}");
        }
    }
    said
}

/// What comes after the end of a watch.
enum Next {
    Anew,
    /// The agent is gone.
    End,
}

/// Whether a message gives its key a value.
fn is_value(message: &Message) -> bool {
    message.headers.as_ref().is_none_or(marks_value)
}

/// Deletes, purges and the server's own marks of values whose time is over take a value away (ADR-8,
/// ADR-43).
fn marks_value(headers: &HeaderMap) -> bool {
    let operation = headers.get("KV-Operation");
    let operation = operation.map(|operation| operation.as_str());
    headers.get("Nats-Marker-Reason").is_none() && matches!(operation, None | Some("PUT"))
}

#[cfg(test)]
mod tests;
