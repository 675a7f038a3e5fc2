//! Routes from redis: hipache's keys and those of DINP's router. The only module that names the client.
//!
//! | key | type | says |
//! |---|---|---|
//! | `frontend:<host>` | list | a name, then URLs of backends; `<host>` may be `*.domain` |
//! | `dead:<host>` | set | positions of backends that get nothing while the key lives |
//! | `/rs/<host>` | list | `address:port` of each backend |
//! | `/cname/<host>` | string | the `/rs/` key that says it of this host too |
//!
//! A session subscribes to keyspace notifications, reads all keys by `SCAN`, and reads again what it is
//! told of; everything is read again from time to time, which is all there is where the server does
//! not notify. It never writes.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use anyhow::{Context as _, anyhow, bail, ensure};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};
use redis::aio::{MultiplexedConnection, PubSubSink, PubSubStream};
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionAddr, IntoConnectionInfo,
    RedisConnectionInfo, RedisError, TlsCertificates,
};
use tokio::time::{Instant, sleep_until, timeout};

use crate::config::{Config, RedisConfig, Server};
use crate::route::declared::Announcement;
use crate::route::table::MAX_POOL_BACKENDS;
use crate::route::{Origin, wire};
use crate::source::Context;
use crate::source::store::{self, MAX_KEYS, Store};

mod keys;

/// Keys that are asked for at once.
const IN_FLIGHT: usize = 64;
/// Keys that a `SCAN` looks at in one step.
const SCAN_COUNT: usize = 1000;
/// Changed keys that wait to be read; with more, everything is read again.
const MAX_CHANGED: usize = 1 << 16;
/// Members of a `dead:` set that are read.
const MAX_DEAD: usize = 2 * MAX_POOL_BACKENDS;

/// Follows the server of the configuration until the process ends.
pub async fn run(context: Context) {
    store::follow(context, Origin::Redis, section, session).await;
}

fn section(config: &Config) -> Option<RedisConfig> {
    (!config.redis.servers.is_empty()).then(|| config.redis.clone())
}

fn session<'a>(config: &'a RedisConfig, store: &'a mut Store) -> BoxFuture<'a, anyhow::Error> {
    let session = async move {
        let url = store.choose(&config.servers);
        match hold(config, url, store).await {
            Ok(never) => match never {},
            Err(error) => error.context(url.clone()),
        }
    };
    session.boxed()
}

async fn hold(config: &RedisConfig, url: &str, store: &mut Store) -> anyhow::Result<Infallible> {
    let client = client(config, url)?;
    let settings = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(config.timeout))
        .set_response_timeout(Some(config.timeout));
    let connection = client.get_multiplexed_async_connection_with_config(&settings);
    let connection = connection.await.map_err(said).context("connect")?;
    let mut keyspace = Keyspace {
        connection,
        prefix: config.key_prefix.as_bytes(),
        aliases: Aliases::default(),
    };
    // Before the first reading, so that nothing changes unheard in between.
    let mut changes = Changes::subscribe(&client, config, &keyspace).await?;
    let notifies = keyspace.notifies().await?;
    store.connected(url);
    let interval = match notifies && changes.is_some() {
        true => config.rescan_interval,
        false => config.poll_interval,
    };
    loop {
        keyspace.read_all(store).await?;
        store.whole(notifies && changes.is_some()).await;
        let end = Instant::now() + interval;
        while let Some(changed) = Changes::next(changes.as_mut(), end, keyspace.prefix).await? {
            keyspace.read_changed(changed, store).await?;
        }
        if let Some(changes) = &mut changes {
            let alive = timeout(config.timeout, changes.sink.ping::<()>()).await;
            alive.context("ping the subscription")??;
        }
    }
}

fn client(config: &RedisConfig, url: &str) -> anyhow::Result<Client> {
    let Server { tls, host, port } = Server::parse(url, ["redis", "rediss"], 6379)?;
    let mut settings = RedisConnectionInfo::default().set_db(config.database.into());
    if let Some(user) = &config.user {
        settings = settings.set_username(user);
    }
    if let Some(password) = &config.password {
        settings = settings.set_password(password.reveal().context("redis.password")?);
    }
    let address = match tls {
        false => ConnectionAddr::Tcp(host, port),
        true => ConnectionAddr::TcpTls {
            host,
            port,
            insecure: false,
            tls_params: None,
        },
    };
    let info = address.into_connection_info()?.set_redis_settings(settings);
    if !tls {
        return Ok(Client::open(info)?);
    }
    let read = |key: &str, path: &Option<std::path::PathBuf>| match path {
        None => Ok(None),
        Some(path) => {
            let text = std::fs::read(path);
            text.map(Some)
                .with_context(|| format!("redis.{key} {}", path.display()))
        }
    };
    let certificate = read("client_certificate_file", &config.client_certificate_file)?;
    let key = read("client_key_file", &config.client_key_file)?;
    let client_tls = certificate.zip(key);
    let certificates = TlsCertificates {
        client_tls: client_tls.map(|(client_cert, client_key)| ClientTlsConfig {
            client_cert,
            client_key,
        }),
        root_cert: read("ca_file", &config.ca_file)?,
    };
    Client::build_with_tls(info, certificates).context("TLS")
}

/// What the server tells of changes.
struct Changes {
    sink: PubSubSink,
    stream: PubSubStream,
}

impl Changes {
    /// `None` where the user may not subscribe.
    async fn subscribe(
        client: &Client,
        config: &RedisConfig,
        keyspace: &Keyspace<'_>,
    ) -> anyhow::Result<Option<Changes>> {
        let subscribe = async {
            let (mut sink, stream) = client.get_async_pubsub().await?.split();
            let database = config.database;
            for pattern in ["frontend:*", "dead:*", "/rs/*", "/cname/*"] {
                let pattern = keyspace.pattern(pattern);
                let mut channel = format!("__keyspace@{database}__:").into_bytes();
                channel.extend(pattern);
                sink.psubscribe(channel).await?;
            }
            Ok(Changes { sink, stream })
        };
        match timeout(config.timeout, subscribe).await {
            Ok(Ok(changes)) => Ok(Some(changes)),
            Ok(Err(error)) if is_refusal(&error) => {
                tracing::info!(%error, "redis tells nothing of changes: it is polled");
                Ok(None)
            }
            Ok(Err(error)) => Err(said(error)).context("subscribe"),
            Err(_) => bail!("subscribe: no answer within {:?}", config.timeout),
        }
    }

    /// What changed until a moment; `None`: it is time to read everything.
    async fn next(
        changes: Option<&mut Changes>,
        end: Instant,
        prefix: &[u8],
    ) -> anyhow::Result<Option<BTreeSet<Subject>>> {
        let Some(changes) = changes else {
            sleep_until(end).await;
            return Ok(None);
        };
        let mut changed = BTreeSet::new();
        // Both are cancel safe.
        let first = tokio::select! {
            message = changes.stream.next() => message,
            () = sleep_until(end) => return Ok(None),
        };
        let mut message = Some(first);
        while let Some(next) = message {
            let next = next.context("the subscription ended")?;
            let channel: Vec<u8> = next.get_channel()?;
            let colon = channel.iter().position(|&byte| byte == b':');
            let key = &channel[colon.map_or(0, |colon| colon + 1)..];
            match Subject::of(key, prefix) {
                Some(Ok(subject)) => {
                    changed.insert(subject);
                }
                // What is no text is told of when everything is read.
                Some(Err(_)) => return Ok(None),
                None => {}
            }
            if changed.len() > MAX_CHANGED {
                return Ok(None);
            }
            message = changes.stream.next().now_or_never();
        }
        Ok(Some(changed))
    }
}

struct Keyspace<'a> {
    connection: MultiplexedConnection,
    prefix: &'a [u8],
    aliases: Aliases,
}

/// Which hosts of `/cname/` have the instances of which host of `/rs/`.
#[derive(Default)]
struct Aliases {
    targets: BTreeMap<String, String>,
    by_target: BTreeMap<String, BTreeSet<String>>,
}

impl Aliases {
    fn set(&mut self, host: &str, target: Option<String>) {
        if let Some(before) = self.targets.remove(host)
            && let Some(hosts) = self.by_target.get_mut(&before)
        {
            hosts.remove(host);
            if hosts.is_empty() {
                self.by_target.remove(&before);
            }
        }
        if let Some(target) = target {
            self.targets.insert(host.to_owned(), target.clone());
            let hosts = self.by_target.entry(target).or_default();
            hosts.insert(host.to_owned());
        }
    }

    fn of(&self, target: &str) -> impl Iterator<Item = &String> {
        self.by_target.get(target).into_iter().flatten()
    }
}

/// What is read as one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    /// `frontend:<host>` and `dead:<host>`.
    Frontend(String),
    /// `/rs/<host>`.
    Instances(String),
    /// `/cname/<host>`.
    Alias(String),
}

impl Subject {
    /// Whose key it is; `None`: of nothing here.
    fn of(key: &[u8], prefix: &[u8]) -> Option<Result<Subject, (String, anyhow::Error)>> {
        let name = key.strip_prefix(prefix)?;
        let of = |kind: &str| name.strip_prefix(kind.as_bytes());
        let text = |host: &[u8]| String::from_utf8_lossy(host).into_owned();
        let subject = if let Some(host) = of("frontend:").or(of("dead:")) {
            Subject::Frontend(text(host))
        } else if let Some(host) = of("/rs/") {
            Subject::Instances(text(host))
        } else {
            Subject::Alias(text(of("/cname/")?))
        };
        Some(store::key_name(name).map(|_| subject))
    }

    /// Its name in the store.
    fn key(&self) -> String {
        match self {
            Subject::Frontend(host) => format!("frontend:{host}"),
            Subject::Instances(host) => format!("/rs/{host}"),
            Subject::Alias(host) => format!("/cname/{host}"),
        }
    }
}

/// What was read of a subject.
struct Reading {
    subject: Subject,
    content: anyhow::Result<Announcement>,
    /// The host whose instances an alias has.
    target: Option<String>,
}

impl Keyspace<'_> {
    /// Whether the server tells of every change that matters. One that does not say is not relied on.
    async fn notifies(&mut self) -> anyhow::Result<bool> {
        let mut ask = redis::cmd("CONFIG");
        ask.arg("GET").arg("notify-keyspace-events");
        let answer = ask.query_async(&mut self.connection).await;
        let settings: BTreeMap<String, String> = match answer {
            Ok(settings) => settings,
            Err(error) if is_refusal(&error) => BTreeMap::new(),
            Err(error) => return Err(said(error)).context("read notify-keyspace-events"),
        };
        let events = settings.values().next().map_or("", String::as_str);
        let all = events.contains('A') || "g$lsx".chars().all(|kind| events.contains(kind));
        Ok(events.contains('K') && all)
    }

    /// Takes in every key, and takes back what is gone.
    async fn read_all(&mut self, store: &mut Store) -> anyhow::Result<()> {
        let mut subjects = BTreeSet::new();
        let mut names = BTreeSet::new();
        for pattern in ["frontend:*", "/rs/*", "/cname/*"] {
            let mut cursor = 0u64;
            loop {
                let mut scan = redis::cmd("SCAN");
                scan.arg(cursor).arg("MATCH").arg(self.pattern(pattern));
                scan.arg("COUNT").arg(SCAN_COUNT);
                let (next, keys): (u64, Vec<Vec<u8>>) = scan
                    .query_async(&mut self.connection)
                    .await
                    .map_err(said)
                    .context("SCAN")?;
                for key in keys {
                    match Subject::of(&key, self.prefix) {
                        Some(Ok(subject)) => {
                            subjects.insert(subject);
                        }
                        Some(Err((name, error))) if names.len() < MAX_KEYS => {
                            store.set(&name, Err(error)).await;
                            names.insert(name);
                        }
                        Some(Err(_)) | None => {}
                    }
                }
                ensure!(subjects.len() <= MAX_KEYS, "more than {MAX_KEYS} keys");
                cursor = next;
                if cursor == 0 {
                    break;
                }
            }
        }
        names.append(&mut self.read(subjects, store).await?);
        store.retain(|key| names.contains(key)).await;
        Ok(())
    }

    /// Takes in what changed, with the aliases of instances.
    async fn read_changed(
        &mut self,
        mut changed: BTreeSet<Subject>,
        store: &mut Store,
    ) -> anyhow::Result<()> {
        let mut aliases = BTreeSet::new();
        for subject in &changed {
            if let Subject::Instances(host) = subject {
                aliases.extend(self.aliases.of(host).cloned().map(Subject::Alias));
            }
        }
        changed.append(&mut aliases);
        self.read(changed, store).await?;
        Ok(())
    }

    /// Takes in what subjects say, and returns their names.
    async fn read(
        &mut self,
        subjects: BTreeSet<Subject>,
        store: &mut Store,
    ) -> anyhow::Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        let prefix = self.prefix.to_owned();
        let mut readings = stream::iter(subjects)
            .map(|subject| read(self.connection.clone(), &prefix, subject))
            .buffered(IN_FLIGHT);
        while let Some(reading) = readings.next().await {
            let Reading {
                subject,
                content,
                target,
            } = reading?;
            if let Subject::Alias(host) = &subject {
                self.aliases.set(host, target);
            }
            let name = subject.key();
            store.set(&name, content).await;
            names.insert(name);
        }
        Ok(names)
    }

    /// A pattern of keys, with the prefix as it is.
    fn pattern(&self, pattern: &str) -> Vec<u8> {
        let mut escaped = Vec::new();
        for byte in self.prefix {
            if br"*?[]\".contains(byte) {
                escaped.push(b'\\');
            }
            escaped.push(*byte);
        }
        escaped.extend(pattern.as_bytes());
        escaped
    }
}

/// Reads one subject. What the server refuses of it alone is its content.
async fn read(
    mut connection: MultiplexedConnection,
    prefix: &[u8],
    subject: Subject,
) -> anyhow::Result<Reading> {
    let key = |name: &str| [prefix, name.as_bytes()].concat();
    let list = async |connection: &mut MultiplexedConnection, name: &str| {
        let mut range = redis::cmd("LRANGE");
        // One more than there may be.
        range.arg(key(name)).arg(0).arg(MAX_POOL_BACKENDS + 1);
        range.query_async::<Vec<Vec<u8>>>(connection).await
    };
    let mut target = None;
    let content = async {
        Ok(match &subject {
            Subject::Frontend(host) => {
                let elements = list(&mut connection, &subject.key()).await?;
                // Unlike SMEMBERS, it has a bound.
                let mut dead = redis::cmd("SRANDMEMBER");
                dead.arg(key(&format!("dead:{host}"))).arg(MAX_DEAD);
                let dead: Vec<Vec<u8>> = dead.query_async(&mut connection).await?;
                keys::frontend(host, &elements, &dead)
            }
            Subject::Instances(host) => {
                keys::instances(host, &list(&mut connection, &subject.key()).await?)
            }
            Subject::Alias(host) => {
                let mut get = redis::cmd("GETRANGE");
                get.arg(key(&subject.key()))
                    .arg(0)
                    .arg(wire::MAX_TEXT_BYTES);
                let value: Vec<u8> = get.query_async(&mut connection).await?;
                match keys::alias(&value) {
                    Ok(None) => Ok(Announcement::default()),
                    Ok(Some(of)) => {
                        target = Some(of.to_owned());
                        keys::instances(host, &list(&mut connection, &format!("/rs/{of}")).await?)
                    }
                    Err(error) => Err(error),
                }
            }
        })
    };
    let content = match content.await {
        Ok(content) => content,
        Err(error) if is_refusal(&error) => Err(said(error)),
        Err(error) => return Err(said(error)).with_context(|| format!("read {}", subject.key())),
    };
    Ok(Reading {
        subject,
        content,
        target,
    })
}

/// An error without its source, which says the same again.
fn said(error: RedisError) -> anyhow::Error {
    anyhow!("{error}")
}

/// Whether the server answered, and refuses what was asked for rather than to serve at all.
fn is_refusal(error: &RedisError) -> bool {
    matches!(error.code(), Some("WRONGTYPE" | "NOPERM" | "ERR"))
}

#[cfg(test)]
mod tests;
