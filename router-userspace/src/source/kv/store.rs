//! The bucket for the commands that write it: one entry at a time, each held against its revision.

use anyhow::{Context as _, anyhow, bail};
use async_nats::HeaderMap;
use async_nats::jetstream;
use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::consumer::push::OrderedConfig;
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::stream::{LastRawMessageErrorKind, Stream};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::mpsc;

use crate::config::NatsConfig;
use crate::source::kv::{Missing, context_of, create, find, is_value, marks_value};
use crate::source::nats;

pub struct Store {
    client: async_nats::Client,
    jetstream: jetstream::Context,
    bucket: String,
    /// `None`: there is no such bucket yet.
    stream: Option<Stream>,
}

/// What the bucket has of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Of the value, or of what took it away; 0: there never was one.
    pub revision: u64,
    pub value: Option<Bytes>,
}

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// With this revision.
    At(u64),
    /// Not made: the entry is at another revision.
    Conflict,
}

impl Store {
    /// Connects, and looks for the bucket.
    ///
    /// # Errors
    /// No server answers, it refuses, or it has no JetStream.
    pub async fn open(config: &NatsConfig) -> anyhow::Result<Store> {
        let servers = config.servers.join(", ");
        let (events, _) = mpsc::channel(1);
        let client = nats::connect(config, "viaduct-cli", events).await?;
        let jetstream = context_of(&client);
        let stream = match find(&jetstream, &config.bucket).await {
            Ok(stream) => stream,
            Err(Missing::JetStream) => bail!("{servers} has no JetStream, and so no bucket"),
            Err(Missing::Answer(error)) => return Err(error.context(servers)),
        };
        Ok(Store {
            client,
            jetstream,
            bucket: config.bucket.clone(),
            stream,
        })
    }

    pub async fn entry(&self, key: &str) -> anyhow::Result<Entry> {
        let Some(stream) = &self.stream else {
            return Ok(Entry::default());
        };
        let found = stream
            .get_last_raw_message_by_subject(&self.subject(key))
            .await;
        match found {
            Ok(message) => Ok(Entry {
                revision: message.sequence,
                value: marks_value(&message.headers).then_some(message.payload),
            }),
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => {
                Ok(Entry::default())
            }
            Err(error) => Err(anyhow!(error).context(format!("read {key}"))),
        }
    }

    /// Every key that has a value, in no order.
    pub async fn entries(&self) -> anyhow::Result<Vec<(String, Entry)>> {
        let Some(stream) = &self.stream else {
            return Ok(Vec::new());
        };
        let prefix = self.subject("");
        let consumer = stream
            .create_consumer(OrderedConfig {
                deliver_subject: self.client.new_inbox(),
                filter_subject: format!("{prefix}>"),
                deliver_policy: DeliverPolicy::LastPerSubject,
                ..OrderedConfig::default()
            })
            .await
            .context("read the bucket")?;
        let mut entries = Vec::new();
        if consumer.cached_info().num_pending == 0 {
            return Ok(entries);
        }
        let mut messages = consumer.messages().await.context("read the bucket")?;
        while let Some(message) = messages.next().await {
            let message = message.context("read the bucket")?;
            let info = message.info().map_err(|error| anyhow!("{error}"))?;
            let (revision, pending) = (info.stream_sequence, info.pending);
            if let Some(key) = message.subject.strip_prefix(&prefix)
                && is_value(&message)
            {
                let value = Some(message.payload.clone());
                entries.push((key.to_owned(), Entry { revision, value }));
            }
            if pending == 0 {
                break;
            }
        }
        Ok(entries)
    }

    /// Writes a value over the entry that is at `revision`; makes the bucket if there is none.
    pub async fn put(&mut self, key: &str, value: Bytes, revision: u64) -> anyhow::Result<Written> {
        if self.stream.is_none() {
            self.stream = Some(create(&self.jetstream, &self.bucket).await?);
        }
        self.write(key, HeaderMap::new(), value, revision).await
    }

    pub async fn delete(&self, key: &str, revision: u64) -> anyhow::Result<Written> {
        let mut headers = HeaderMap::new();
        headers.insert("KV-Operation", "DEL");
        self.write(key, headers, Bytes::new(), revision).await
    }

    async fn write(
        &self,
        key: &str,
        mut headers: HeaderMap,
        value: Bytes,
        revision: u64,
    ) -> anyhow::Result<Written> {
        headers.insert("Nats-Expected-Last-Subject-Sequence", revision.to_string());
        let subject = self.subject(key);
        let written = async {
            let published = self.jetstream.publish_with_headers(subject, headers, value);
            published.await?.await
        };
        match written.await {
            Ok(taken) => Ok(Written::At(taken.sequence)),
            Err(error) if error.kind() == PublishErrorKind::WrongLastSequence => {
                Ok(Written::Conflict)
            }
            Err(error) => Err(anyhow!(error).context(format!("write {key}"))),
        }
    }

    fn subject(&self, key: &str) -> String {
        format!("$KV.{}.{key}", self.bucket)
    }
}
