//! Routes from etcd v3, over the JSON gateway that every server has beside gRPC.
//!
//! A session reads every prefix at one revision, in pages, and then watches from the next revision on.
//! A revision that was compacted away, like any other end of a watch, ends the session; the next one
//! reads everything and changes what differs. A key whose lease ends is deleted by the server, and
//! told like any other deletion.

use std::collections::BTreeSet;
use std::convert::Infallible;

use anyhow::{Context as _, anyhow, bail, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};
use http::{Method, header};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, de};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::Instant;

use crate::config::{Config, EtcdConfig, Server};
use crate::route::Origin;
use crate::source::Context;
use crate::source::api::{self, Api, Lines, Refusal, TlsFiles};
use crate::source::mapping::Layout;
use crate::source::store::{self, MAX_KEYS, Store};

/// Keys of a page; of fewer where values are so long that the gateway hands no more on.
const PAGE: usize = 1000;

/// Follows the cluster of the configuration until the process ends.
pub async fn run(context: Context) {
    store::follow(context, Origin::Etcd, section, session).await;
}

fn section(config: &Config) -> Option<EtcdConfig> {
    (!config.etcd.endpoints.is_empty()).then(|| config.etcd.clone())
}

fn session<'a>(config: &'a EtcdConfig, store: &'a mut Store) -> BoxFuture<'a, anyhow::Error> {
    let session = async move {
        let endpoint = store.choose(&config.endpoints);
        match hold(config, endpoint, store).await {
            Ok(never) => match never {},
            Err(error) => error.context(endpoint.clone()),
        }
    };
    session.boxed()
}

async fn hold(
    config: &EtcdConfig,
    endpoint: &str,
    store: &mut Store,
) -> anyhow::Result<Infallible> {
    let layout = Layout {
        routes_prefix: &config.routes_prefix,
        maps: &config.map,
    };
    let prefixes = layout.prefixes();
    loop {
        // Anew each time: tokens of users expire.
        let client = connect(config, endpoint).await?;
        let revision = client.read_all(&prefixes, &layout, store).await?;
        store.connected_once(endpoint);
        let mut watches = Vec::new();
        for prefix in &prefixes {
            watches.push(client.watch(prefix, revision + 1).await?);
        }
        store.whole(true).await;
        let end = Instant::now() + config.rescan_interval;
        let follow = follow(watches, &layout, store);
        match tokio::time::timeout_at(end, follow).await {
            Ok(Ok(never)) => match never {},
            Ok(Err(error)) => return Err(error),
            Err(_) => {}
        }
    }
}

async fn connect(config: &EtcdConfig, endpoint: &str) -> anyhow::Result<Client> {
    let server = Server::parse(endpoint, ["http", "https"], 2379)?;
    let files = TlsFiles {
        ca: config.ca_file.as_deref(),
        client: config
            .client_certificate_file
            .as_deref()
            .zip(config.client_key_file.as_deref()),
    };
    let mut client = Client {
        api: Api::new(server, &files, config.timeout)?,
    };
    if let (Some(user), Some(password)) = (&config.user, &config.password) {
        let password = password.reveal().context("etcd.password")?;
        let body = json!({ "name": user, "password": password });
        let token: Token = client.ask("/v3/auth/authenticate", &body).await?;
        client
            .api
            .set_secret_header(header::AUTHORIZATION, &token.token)?;
    }
    Ok(client)
}

/// Takes in what the watches tell, until one of them ends.
async fn follow(
    watches: Vec<Lines>,
    layout: &Layout<'_>,
    store: &mut Store,
) -> anyhow::Result<Infallible> {
    let lines = |lines: Lines| {
        Box::pin(stream::unfold(lines, async |mut lines| {
            let line = lines.next().await;
            Some((line, lines))
        }))
    };
    let mut told = stream::select_all(watches.into_iter().map(lines));
    while let Some(line) = told.next().await {
        let told: Watched = api::decode(line?).await.context("watch")?;
        if let Some(error) = told.error {
            bail!("watch: {error}");
        }
        let told = told.result.unwrap_or_default();
        ensure!(
            told.compact_revision == 0,
            "watch: compacted up to revision {}",
            told.compact_revision
        );
        ensure!(!told.canceled, "watch: canceled: {}", told.cancel_reason);
        for event in told.events {
            match event.kind {
                Kind::Put => {
                    take_in(&event.kv, layout, store).await;
                }
                Kind::Delete => {
                    let name = name(&event.kv.key);
                    store.remove(&name).await;
                }
            }
        }
    }
    bail!("nothing is watched")
}

/// Takes in a key, and returns its name.
async fn take_in(kv: &KeyValue, layout: &Layout<'_>, store: &mut Store) -> String {
    let (name, content) = match store::key_name(&kv.key) {
        Err((name, error)) => (name, Err(error)),
        Ok(key) => {
            let content = layout.read(key, &kv.value, Origin::Etcd, &store.vip_ranges());
            (key.to_owned(), content)
        }
    };
    store.set(&name, content).await;
    name
}

fn name(key: &[u8]) -> String {
    match store::key_name(key) {
        Ok(key) => key.to_owned(),
        Err((name, _)) => name,
    }
}

struct Client {
    api: Api,
}

impl Client {
    /// Takes in every key, and takes back what is gone. Returns the revision of it all.
    async fn read_all(
        &self,
        prefixes: &[&str],
        layout: &Layout<'_>,
        store: &mut Store,
    ) -> anyhow::Result<u64> {
        let mut revision = 0;
        let mut names = BTreeSet::new();
        for prefix in prefixes {
            let end = range_end(prefix.as_bytes());
            let mut from = prefix.as_bytes().to_vec();
            loop {
                let page = self.page(&from, &end, revision).await?;
                // Of later pages it is what was reached meanwhile.
                if revision == 0 {
                    revision = page.header.revision;
                }
                for kv in &page.kvs {
                    names.insert(take_in(kv, layout, store).await);
                }
                ensure!(names.len() <= MAX_KEYS, "more than {MAX_KEYS} keys");
                match page.kvs.last() {
                    Some(last) if page.more => {
                        from = last.key.clone();
                        from.push(0);
                    }
                    _ => break,
                }
            }
        }
        store.retain(|key| names.contains(key)).await;
        Ok(revision)
    }

    /// At a revision, or at the latest if it is 0.
    async fn page(&self, from: &[u8], end: &[u8], revision: u64) -> anyhow::Result<Page> {
        let ask = async |limit: usize| {
            let body = json!({
                "key": BASE64_STANDARD.encode(from),
                "range_end": BASE64_STANDARD.encode(end),
                "revision": revision.to_string(),
                "limit": limit.to_string(),
            });
            self.ask("/v3/kv/range", &body).await
        };
        let mut limit = PAGE;
        loop {
            match ask(limit).await {
                Err(error) if limit > 1 && is_too_long(&error) => limit /= 10,
                page => return page,
            }
        }
    }

    /// Once the server has taken it.
    async fn watch(&self, prefix: &str, revision: u64) -> anyhow::Result<Lines> {
        let body = json!({ "create_request": {
            "key": BASE64_STANDARD.encode(prefix),
            "range_end": BASE64_STANDARD.encode(range_end(prefix.as_bytes())),
            "start_revision": revision.to_string(),
        }});
        self.api
            .lines("/v3/watch", Bytes::from(body.to_string()))
            .await
            .context("watch")
    }

    async fn ask<T: DeserializeOwned + Send + 'static>(
        &self,
        path: &str,
        body: &Value,
    ) -> anyhow::Result<T> {
        let body = Bytes::from(body.to_string());
        let answer = self
            .api
            .ask(Method::POST, path, body, Duration::ZERO)
            .await
            .map_err(|error| error.context(path.to_owned()))?;
        let decoded = api::decode(answer.into_body()).await;
        decoded.with_context(|| path.to_owned())
    }
}

/// The gateway's own refusal of what the server answered, or ours.
fn is_too_long(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<Refusal>() {
        Some(refusal) => refusal.text.contains("larger than max"),
        None => format!("{error:#}").contains("length limit exceeded"),
    }
}

/// The first key after those with a prefix.
fn range_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    // Of all keys.
    vec![0]
}

#[derive(Deserialize)]
struct Token {
    token: String,
}

#[derive(Deserialize)]
struct Page {
    header: Header,
    #[serde(default)]
    kvs: Vec<KeyValue>,
    #[serde(default)]
    more: bool,
}

#[derive(Deserialize)]
struct Header {
    #[serde(default, deserialize_with = "number")]
    revision: u64,
}

#[derive(Deserialize)]
struct KeyValue {
    #[serde(deserialize_with = "base64")]
    key: Vec<u8>,
    #[serde(default, deserialize_with = "base64")]
    value: Vec<u8>,
}

#[derive(Deserialize)]
struct Watched {
    result: Option<WatchResult>,
    error: Option<Value>,
}

#[derive(Default, Deserialize)]
struct WatchResult {
    #[serde(default)]
    canceled: bool,
    #[serde(default)]
    cancel_reason: String,
    #[serde(default, deserialize_with = "number")]
    compact_revision: u64,
    #[serde(default)]
    events: Vec<Event>,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default, rename = "type")]
    kind: Kind,
    kv: KeyValue,
}

/// protobuf leaves out what is 0.
#[derive(Default, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Kind {
    #[default]
    Put,
    Delete,
}

/// protobuf writes 64-bit integers as text.
fn number<'de, D: Deserializer<'de>>(value: D) -> Result<u64, D::Error> {
    let text = String::deserialize(value)?;
    text.parse().map_err(de::Error::custom)
}

fn base64<'de, D: Deserializer<'de>>(value: D) -> Result<Vec<u8>, D::Error> {
    let text = std::borrow::Cow::<str>::deserialize(value)?;
    BASE64_STANDARD
        .decode(&*text)
        .map_err(|error| de::Error::custom(anyhow!("base64: {error}")))
}

#[cfg(test)]
mod tests;
