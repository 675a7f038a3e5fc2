//! Routes from ZooKeeper. The only module that names its client.
//!
//! A session watches each root with all that is below it, then reads it, and reads again what it is
//! told of. A server before 3.6 knows no such watches: there every node that is read is watched for one
//! change, and a change reads everything again. With the connection the session ends, whatever the
//! client would make of it: events of the time in between may be lost (ZOOKEEPER-4698), so the next
//! session reads everything and changes what differs.

use std::collections::{BTreeSet, VecDeque};
use std::convert::Infallible;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt, stream};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use zookeeper_client::{
    AddWatchMode, Client, Error, EventType, PersistentWatcher, SessionState, WatchedEvent,
};

use crate::config::{Config, ZookeeperConfig};
use crate::route::Origin;
use crate::route::declared::Announcement;
use crate::source::Context;
use crate::source::mapping::Layout;
use crate::source::store::{self, MAX_KEYS, Store};

/// Nodes that are asked for at once.
const IN_FLIGHT: usize = 64;
/// Levels below a root.
const MAX_DEPTH: usize = 8;
/// Between two readings of everything where any change asks for one.
const SETTLE: Duration = Duration::from_millis(200);

/// Follows the ensemble of the configuration until the process ends.
pub async fn run(context: Context) {
    store::follow(context, Origin::Zookeeper, section, session).await;
}

fn section(config: &Config) -> Option<ZookeeperConfig> {
    (!config.zookeeper.servers.is_empty()).then(|| config.zookeeper.clone())
}

fn session<'a>(config: &'a ZookeeperConfig, store: &'a mut Store) -> BoxFuture<'a, anyhow::Error> {
    let session = async move {
        let server = store.choose(&config.servers);
        match hold(config, server, store).await {
            Ok(never) => match never {},
            Err(error) => error.context(server.clone()),
        }
    };
    session.boxed()
}

async fn hold(
    config: &ZookeeperConfig,
    server: &str,
    store: &mut Store,
) -> anyhow::Result<Infallible> {
    let layout = Layout {
        routes_prefix: &config.routes_prefix,
        maps: &config.map,
    };
    let roots = layout.prefixes();
    let roots: Vec<&str> = roots
        .into_iter()
        .map(|root| root.trim_end_matches('/'))
        .collect();
    let client = connect(config, server).await?;
    store.connected(server);
    let tree = Tree {
        client,
        layout,
        roots,
        timeout: config.timeout,
    };
    // Before the first reading, so that nothing changes unheard in between.
    let mut watches = tree.watch(config.recursive_watches).await?;
    loop {
        let once = tree.read_all(watches.is_none(), store).await?;
        store.whole(true).await;
        let end = Instant::now() + config.rescan_interval;
        match &mut watches {
            Some(watches) => {
                while let Ok(event) = timeout_at(end, next(watches)).await {
                    tree.take_in(event?, store).await?;
                }
            }
            None => {
                let mut once: FuturesUnordered<_> = once.into_iter().collect();
                if let Ok(event) = timeout_at(end, once.next()).await {
                    check_session(&event.context("nothing is watched")?)?;
                    sleep(SETTLE).await;
                }
            }
        }
    }
}

async fn connect(config: &ZookeeperConfig, server: &str) -> anyhow::Result<Client> {
    let mut connector = Client::connector().with_session_timeout(config.session_timeout);
    if let (Some(user), Some(password)) = (&config.user, &config.password) {
        let password = password.reveal().context("zookeeper.password")?;
        connector = connector.with_auth("digest", format!("{user}:{password}").as_bytes());
    }
    let client = timeout(config.timeout, connector.connect(server)).await;
    let client = client.with_context(|| format!("no answer within {:?}", config.timeout))?;
    client.context("connect")
}

/// The next event of any of the watches.
async fn next(watches: &mut [PersistentWatcher]) -> anyhow::Result<WatchedEvent> {
    let events = watches.iter_mut().map(|watch| watch.changed().boxed());
    let (event, ..) = futures_util::future::select_all(events).await;
    check_session(&event)?;
    Ok(event)
}

fn check_session(event: &WatchedEvent) -> anyhow::Result<()> {
    let is_up = matches!(
        event.session_state,
        SessionState::SyncConnected | SessionState::ConnectedReadOnly
    );
    ensure!(
        event.event_type != EventType::Session || is_up,
        "session {}",
        event.session_state
    );
    Ok(())
}

struct Tree<'a> {
    client: Client,
    layout: Layout<'a>,
    /// Paths below which everything is read; none is below another.
    roots: Vec<&'a str>,
    timeout: Duration,
}

/// What was read of a node.
struct Node {
    path: String,
    /// `None`: it is gone.
    data: Option<Result<Vec<u8>, Error>>,
    children: Result<Vec<String>, Error>,
    watches: Vec<Once>,
}

/// The next change of a node.
type Once = BoxFuture<'static, WatchedEvent>;

impl Tree<'_> {
    /// Watches the roots with all below them; `None`: the server cannot.
    async fn watch(&self, recursive: bool) -> anyhow::Result<Option<Vec<PersistentWatcher>>> {
        let mut watches = Vec::new();
        for root in &self.roots {
            if !recursive {
                return Ok(None);
            }
            let watch = self.client.watch(root, AddWatchMode::PersistentRecursive);
            match self.within(watch).await? {
                Ok(watch) => watches.push(watch),
                Err(Error::Unimplemented) => return Ok(None),
                Err(error) => return Err(error).with_context(|| format!("watch {root}")),
            }
        }
        Ok(Some(watches))
    }

    /// Takes in every node, and takes back what is gone; `watch`: what tells of the next change of each.
    async fn read_all(&self, watch: bool, store: &mut Store) -> anyhow::Result<Vec<Once>> {
        let mut watches = Vec::new();
        let mut names = BTreeSet::new();
        // Below these it cannot be known what is gone.
        let mut denied: Vec<String> = Vec::new();
        let roots = self.roots.iter().map(|root| root.to_string());
        let mut level: VecDeque<String> = roots.collect();
        for depth in 0..=MAX_DEPTH {
            let mut below = VecDeque::new();
            let (client, patience) = (self.client.clone(), self.timeout);
            let mut nodes = stream::iter(std::mem::take(&mut level))
                .map(|path| timeout(patience, read(client.clone(), path, watch)))
                .buffered(IN_FLIGHT);
            while let Some(node) = nodes.next().await {
                let node = node.with_context(|| format!("no answer within {patience:?}"))??;
                watches.extend(node.watches);
                let Some(data) = node.data else { continue };
                if depth > 0 {
                    names.insert(node.path.clone());
                    ensure!(names.len() <= MAX_KEYS, "more than {MAX_KEYS} nodes");
                    set(&node.path, data, &self.layout, store).await;
                }
                match node.children {
                    Ok(children) => {
                        let paths = children.iter().map(|name| format!("{}/{name}", node.path));
                        below.extend(paths);
                    }
                    Err(error) if depth == 0 => {
                        return Err(error).with_context(|| format!("read {}", node.path));
                    }
                    Err(error) => {
                        let error = anyhow::Error::from(error).context("children");
                        store.set(&node.path, Err(error)).await;
                        denied.push(node.path + "/");
                    }
                }
            }
            level = below;
        }
        for deeper in level {
            let error = anyhow::anyhow!("deeper than {MAX_DEPTH} levels");
            store.set(&deeper, Err(error)).await;
            names.insert(deeper);
        }
        store
            .retain(|key| names.contains(key) || denied.iter().any(|path| key.starts_with(&**path)))
            .await;
        Ok(watches)
    }

    /// Takes in what an event is of.
    async fn take_in(&self, event: WatchedEvent, store: &mut Store) -> anyhow::Result<()> {
        match event.event_type {
            EventType::NodeCreated | EventType::NodeDataChanged => {
                if self.roots.contains(&&*event.path) {
                    return Ok(());
                }
                match self.within(self.client.get_data(&event.path)).await? {
                    Ok((data, _)) => set(&event.path, Ok(data), &self.layout, store).await,
                    Err(Error::NoNode) => store.remove(&event.path).await,
                    Err(error @ Error::NoAuth) => {
                        set(&event.path, Err(error), &self.layout, store).await;
                    }
                    Err(error) => {
                        return Err(error).with_context(|| format!("read {}", event.path));
                    }
                }
            }
            EventType::NodeDeleted => store.remove(&event.path).await,
            EventType::NodeChildrenChanged | EventType::Session => {}
        }
        Ok(())
    }

    async fn within<T>(&self, answer: impl Future<Output = T>) -> anyhow::Result<T> {
        let answer = timeout(self.timeout, answer).await;
        answer.with_context(|| format!("no answer within {:?}", self.timeout))
    }
}

/// Reads a node and the names of its children; `watch`: for the next change of either.
async fn read(client: Client, path: String, watch: bool) -> anyhow::Result<Node> {
    let mut watches: Vec<Once> = Vec::new();
    let mut children = Ok(Vec::new());
    let data = match watch {
        false => client.get_data(&path).await.map(|(data, _)| data),
        true => match client.get_and_watch_data(&path).await {
            Ok((data, _, watcher)) => {
                watches.push(watcher.changed().boxed());
                Ok(data)
            }
            Err(error) => Err(error),
        },
    };
    let data = match data {
        Err(Error::NoNode) => None,
        Ok(_) | Err(Error::NoAuth) => Some(data),
        Err(error) => return Err(error).with_context(|| format!("read {path}")),
    };
    if data.is_some() {
        children = match watch {
            false => client.list_children(&path).await,
            true => match client.list_and_watch_children(&path).await {
                Ok((children, watcher)) => {
                    watches.push(watcher.changed().boxed());
                    Ok(children)
                }
                Err(error) => Err(error),
            },
        };
    } else if watch {
        // It may come.
        match client.check_and_watch_stat(&path).await {
            Ok((_, watcher)) => watches.push(watcher.changed().boxed()),
            Err(error) => return Err(error).with_context(|| format!("watch {path}")),
        }
    }
    let children = match children {
        Err(Error::NoNode) => Ok(Vec::new()),
        Ok(_) | Err(Error::NoAuth) => children,
        Err(error) => bail!("read the children of {path}: {error}"),
    };
    Ok(Node {
        path,
        data,
        children,
        watches,
    })
}

/// Takes in a node. Nodes without data are there for what is below them.
async fn set(path: &str, data: Result<Vec<u8>, Error>, layout: &Layout<'_>, store: &mut Store) {
    let content = match data {
        Ok(data) if data.is_empty() => Ok(Announcement::default()),
        Ok(data) => layout.read(path, &data, Origin::Zookeeper, &store.vip_ranges()),
        Err(error) => Err(error.into()),
    };
    store.set(path, content).await;
}

#[cfg(test)]
mod tests;
