//! Routes from Consul: healthy instances of services, and declared routes in its key-value store.
//!
//! A session asks blocking queries: one for the list of services, one for each service that has
//! routes, and one for the store. Each is answered when something changed, or after `consul.wait`, and
//! asked again from the index it was answered with; an index that went back begins anew. At most
//! [`MAX_ASKED`] are asked at once, below what an agent allows a client; more services take turns.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use http::{HeaderName, Method, StatusCode};
use serde::Deserialize;

use crate::config::{Config, ConsulConfig, Server};
use crate::route::Origin;
use crate::route::declared::Announcement;
use crate::source::Context;
use crate::source::api::{self, Api, Refusal, TlsFiles, escape};
use crate::source::mapping::{self, Instance, Layout};
use crate::source::store::{self, MAX_KEYS, Store};

/// Queries at once; `limits.http_max_conns_per_client` of an agent is 200.
const MAX_ASKED: usize = 128;
/// How long a query waits where others wait for their turn.
const TURN: Duration = Duration::from_secs(1);
/// Between an answer and the next query of the same.
const SETTLE: Duration = Duration::from_millis(20);

/// Follows the agent of the configuration until the process ends.
pub async fn run(context: Context) {
    store::follow(context, Origin::Consul, section, session).await;
}

fn section(config: &Config) -> Option<ConsulConfig> {
    config
        .consul
        .address
        .is_some()
        .then(|| config.consul.clone())
}

fn session<'a>(config: &'a ConsulConfig, store: &'a mut Store) -> BoxFuture<'a, anyhow::Error> {
    let session = async move {
        let address = config.address.clone().unwrap_or_default();
        match hold(config, &address, store).await {
            Ok(never) => match never {},
            Err(error) => error.context(address),
        }
    };
    session.boxed()
}

async fn hold(
    config: &ConsulConfig,
    address: &str,
    store: &mut Store,
) -> anyhow::Result<Infallible> {
    let server = Server::parse(address, ["http", "https"], 8500)?;
    let files = TlsFiles {
        ca: config.ca_file.as_deref(),
        client: config
            .client_certificate_file
            .as_deref()
            .zip(config.client_key_file.as_deref()),
    };
    let mut api = Api::new(server, &files, config.timeout)?;
    if let Some(token) = &config.token {
        let token = token.reveal().context("consul.token")?;
        api.set_secret_header(HeaderName::from_static("x-consul-token"), &token)?;
    }
    let mut catalog = Catalog {
        config,
        services: BTreeSet::new(),
        followed: BTreeSet::new(),
        turns: VecDeque::from([(Question::Services, 0)]),
        unanswered: BTreeSet::from([Question::Services]),
    };
    if !config.routes_prefix.is_empty() {
        catalog.ask(Question::Routes);
    }
    let mut asked = FuturesUnordered::new();
    loop {
        while asked.len() < MAX_ASKED
            && let Some((question, index)) = catalog.turns.pop_front()
        {
            let wait = match catalog.turns.is_empty() {
                true => config.wait,
                false => TURN.min(config.wait),
            };
            asked.push(ask(&api, config, question, index, wait));
        }
        let answer = asked.next().await.context("nothing is asked")??;
        if answer.question == Question::Services {
            store.connected_once(address);
        }
        catalog.take_in(answer, store).await?;
        if catalog.unanswered.is_empty() {
            store.whole(true).await;
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Question {
    Services,
    Service(String),
    /// The key-value store.
    Routes,
}

struct Answer {
    question: Question,
    /// As it was asked with.
    since: u64,
    index: u64,
    body: Bytes,
}

/// Waits until what is asked for is not as it was at `since`.
async fn ask(
    api: &Api,
    config: &ConsulConfig,
    question: Question,
    since: u64,
    wait: Duration,
) -> anyhow::Result<Answer> {
    if since > 0 {
        tokio::time::sleep(SETTLE).await;
    }
    let path = match &question {
        Question::Services => "catalog/services?".to_owned(),
        Question::Service(name) => format!("health/service/{}?passing=true&", escape(name)),
        Question::Routes => {
            let parts = config.routes_prefix.split('/').map(escape);
            format!("kv/{}?recurse=true&", parts.collect::<Vec<_>>().join("/"))
        }
    };
    let datacenter = config.datacenter.iter();
    let datacenter: String = datacenter
        .map(|name| format!("&dc={}", escape(name)))
        .collect();
    let path = format!(
        "/v1/{path}index={since}&wait={}ms{datacenter}",
        wait.as_millis()
    );
    // A server waits up to a sixteenth longer, so that not all come back at once.
    let answer = api.ask(Method::GET, &path, Bytes::new(), wait + wait / 16);
    let (index, body) = match answer.await {
        Ok(answer) => {
            let index = answer.headers().get("x-consul-index");
            let index = index.and_then(|index| index.to_str().ok()?.parse().ok());
            if index.is_none() {
                tokio::time::sleep(TURN).await;
            }
            (index.unwrap_or(0), answer.into_body())
        }
        // No key is there; an answer without an index is asked for again in a while.
        Err(error) if question == Question::Routes && is_missing(&error) => {
            tokio::time::sleep(TURN).await;
            (0, Bytes::from_static(b"[]"))
        }
        Err(error) => return Err(error.context(path)),
    };
    Ok(Answer {
        question,
        since,
        // An index that goes back is of another state, and has to begin anew.
        index: if index < since { 0 } else { index },
        body,
    })
}

fn is_missing(error: &anyhow::Error) -> bool {
    let refusal = error.downcast_ref::<Refusal>();
    refusal.is_some_and(|refusal| refusal.status == StatusCode::NOT_FOUND)
}

struct Catalog<'a> {
    config: &'a ConsulConfig,
    /// That have routes.
    services: BTreeSet<String>,
    /// That are asked for, or will be.
    followed: BTreeSet<String>,
    /// To be asked next, from which index on.
    turns: VecDeque<(Question, u64)>,
    /// Never answered yet.
    unanswered: BTreeSet<Question>,
}

impl Catalog<'_> {
    fn ask(&mut self, question: Question) {
        self.unanswered.insert(question.clone());
        self.turns.push_back((question, 0));
    }

    async fn take_in(&mut self, answer: Answer, store: &mut Store) -> anyhow::Result<()> {
        let Answer {
            question,
            since,
            index,
            body,
        } = answer;
        let changed = since == 0 || index != since;
        match &question {
            Question::Services if changed => self.take_services(body, store).await?,
            Question::Service(name) if !self.services.contains(name) => {
                // It went while it was asked for.
                self.followed.remove(name);
                return Ok(());
            }
            Question::Service(name) if changed => {
                let instances = api::decode(body).await;
                let instances = instances.with_context(|| format!("service {name}"))?;
                self.take_instances(name, instances, store).await;
            }
            Question::Routes if changed => self.take_routes(body, store).await?,
            _ => {}
        }
        self.unanswered.remove(&question);
        self.turns.push_back((question, index));
        Ok(())
    }

    async fn take_services(&mut self, body: Bytes, store: &mut Store) -> anyhow::Result<()> {
        let all: BTreeMap<String, Vec<String>> = api::decode(body).await.context("services")?;
        ensure!(all.len() <= MAX_KEYS, "more than {MAX_KEYS} services");
        let maps = &self.config.map;
        let tagged = |tags: &[String]| tags.iter().any(|tag| self.route_tag(tag).is_some());
        let mapped = |name: &String| {
            let mut maps = maps.iter();
            maps.any(|map| map.service.as_ref().is_none_or(|only| only == name))
        };
        let with_routes = all
            .into_iter()
            .filter(|(name, tags)| tagged(tags) || mapped(name))
            .map(|(name, _)| name);
        let services: BTreeSet<String> = with_routes.collect();
        let new: Vec<String> = services.difference(&self.followed).cloned().collect();
        self.services = services;
        for name in new {
            self.followed.insert(name.clone());
            self.ask(Question::Service(name));
        }
        let services = &self.services;
        self.unanswered.retain(|question| match question {
            Question::Service(name) => services.contains(name),
            Question::Services | Question::Routes => true,
        });
        store
            .retain(|key| match key.strip_prefix("service/") {
                Some(key) => key
                    .split_once('/')
                    .is_some_and(|(name, _)| services.contains(name)),
                None => true,
            })
            .await;
        Ok(())
    }

    async fn take_instances(&self, name: &str, instances: Vec<Entry>, store: &mut Store) {
        let mut keys = BTreeSet::new();
        for entry in instances {
            let key = format!("service/{name}/{}/{}", entry.node.node, entry.service.id);
            let content = self.announce(name, &entry, store);
            store.set(&key, content).await;
            keys.insert(key);
        }
        let prefix = format!("service/{name}/");
        store
            .retain(|key| !key.starts_with(&prefix) || keys.contains(key))
            .await;
    }

    /// What an instance says by its tags and by the configuration.
    fn announce(&self, name: &str, entry: &Entry, store: &Store) -> anyhow::Result<Announcement> {
        let Entry { node, service } = entry;
        let host = match service.address.as_str() {
            "" => &node.address,
            address => address,
        };
        let ip = host.parse();
        let ip = ip.map_err(|_| anyhow!("Address: {host:?} is not an address"))?;
        let port = u16::try_from(service.port);
        let port = port.map_err(|_| anyhow!("Port: {} is no port", service.port))?;
        let (mut uris, mut vips, mut weight) = (Vec::new(), Vec::new(), None);
        let tags = service.tags.iter().flatten();
        for (key, value) in tags.filter_map(|tag| self.route_tag(tag)) {
            let list = value.split(',').map(|entry| entry.trim().to_owned());
            match key {
                "uris" => uris.extend(list),
                "vips" => vips.extend(list),
                "weight" => weight = Some(value.parse().context("tag weight: not a number")?),
                _ => bail!("tag {key:?}: not uris, vips or weight"),
            }
        }
        let has = |tag: &String| service.tags.iter().flatten().any(|one| one == tag);
        for map in &self.config.map {
            if map.service.as_ref().is_none_or(|only| only == name)
                && map.tag.as_ref().is_none_or(has)
            {
                uris.extend(map.uris.iter().cloned());
                vips.extend(map.vips.iter().cloned());
            }
        }
        if uris.is_empty() && vips.is_empty() {
            return Ok(Announcement::default());
        }
        let instance = Instance {
            service: name,
            id: &service.id,
            address: SocketAddr::new(ip, port),
            weight,
        };
        let ranges = store.vip_ranges();
        mapping::announce(&uris, &vips, &instance, Origin::Consul, &ranges)
    }

    /// Key and value of a tag that is for the gateway.
    fn route_tag<'t>(&self, tag: &'t str) -> Option<(&'t str, &'t str)> {
        tag.strip_prefix(&*self.config.tag_prefix)?.split_once('=')
    }

    async fn take_routes(&self, body: Bytes, store: &mut Store) -> anyhow::Result<()> {
        let entries: Vec<KeyValue> = api::decode(body).await.context("routes")?;
        let layout = Layout {
            routes_prefix: &self.config.routes_prefix,
            maps: &[],
        };
        let mut keys = BTreeSet::new();
        ensure!(entries.len() <= MAX_KEYS, "more than {MAX_KEYS} keys");
        for KeyValue { key, value } in entries {
            let content = match value {
                // A folder.
                None => Ok(Announcement::default()),
                Some(value) => BASE64_STANDARD
                    .decode(value)
                    .context("value: not base64")
                    .and_then(|value| {
                        layout.read(&key, &value, Origin::Consul, &store.vip_ranges())
                    }),
            };
            let name = format!("kv/{key}");
            store.set(&name, content).await;
            keys.insert(name);
        }
        store
            .retain(|key| !key.starts_with("kv/") || keys.contains(key))
            .await;
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    node: Node,
    service: Service,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node {
    node: String,
    address: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Service {
    #[serde(rename = "ID")]
    id: String,
    #[serde(default)]
    address: String,
    port: u64,
    tags: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct KeyValue {
    key: String,
    value: Option<String>,
}

#[cfg(test)]
mod tests;
