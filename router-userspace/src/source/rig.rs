//! What tests of sources stand on: a gateway with one source, servers that end with their test, and
//! a network that can be held up.

use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

use crate::agent::Agent;
use crate::config::Config;
use crate::event::INBOX_DEPTH;
use crate::metrics::Metrics;
use crate::rejects::Rejects;
use crate::route::{HttpMatch, Origin, Vip, wire};
use crate::snapshot::{Published, Snapshot};
use crate::source::Context;
use crate::source::status::State;

/// A rule that gives a host to another source than a test is of; a table of its own, so it comes last.
pub(crate) const OWNED: &str = "\n[[guard.owner]]\nhosts = [\"owned.x\"]\nsources = [\"nats\"]\n";

/// An agent with one source.
pub(crate) struct Gateway {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) rejects: Arc<Rejects>,
    pub(crate) config: watch::Sender<Arc<Config>>,
    published: Published,
    origin: Origin,
    inbox: mpsc::Sender<crate::event::Event>,
}

impl Gateway {
    pub(crate) fn start<F>(origin: Origin, config: &str, run: impl FnOnce(Context) -> F) -> Gateway
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let config = crate::config::parse(config).unwrap();
        let published = Published::default();
        let metrics = Arc::<Metrics>::default();
        let rejects = Arc::<Rejects>::default();
        let (reports, _) = mpsc::channel(1);
        let agent = Agent::new(
            &config,
            published.clone(),
            None,
            reports,
            Arc::clone(&metrics),
        );
        let (inbox, events) = mpsc::channel(INBOX_DEPTH);
        let (config, receiver) = watch::channel(Arc::new(config));
        tokio::spawn(agent.run(events));
        tokio::spawn(run(Context {
            inbox: inbox.clone(),
            metrics: Arc::clone(&metrics),
            rejects: Arc::clone(&rejects),
            config: receiver,
        }));
        Gateway {
            metrics,
            rejects,
            config,
            published,
            origin,
            inbox,
        }
    }

    /// As the program does on SIGHUP.
    pub(crate) async fn reload(&self, config: &str) {
        let config = crate::config::parse(config).unwrap();
        self.config.send_replace(Arc::new(config.clone()));
        let event = crate::event::Event::Reload(Box::new(config));
        self.inbox.send(event).await.unwrap();
    }

    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.published.load_full()
    }

    /// The backends of a host and path, `address*weight` where the weight is not the usual one.
    pub(crate) fn backends(&self, uri: &str) -> Vec<String> {
        let route: HttpMatch = wire::parse_uri(uri).unwrap();
        let snapshot = self.snapshot();
        let host = snapshot.hosts.get(&route.host);
        let route = host.and_then(|(_, routes)| routes.get(&route.path, None));
        let backends = route.iter().flat_map(|route| &route.pool.backends);
        backends
            .map(|backend| match backend.weight {
                wire::DEFAULT_WEIGHT => backend.address.to_string(),
                weight => format!("{}*{weight}", backend.address),
            })
            .collect()
    }

    pub(crate) fn vip_backends(&self, vip: &str) -> Vec<String> {
        let vip: Vip = vip.parse().unwrap();
        let snapshot = self.snapshot();
        let pool = snapshot.vips.get(&vip);
        let backends = pool.map(|pool| pool.backends.iter()).into_iter().flatten();
        backends
            .map(|backend| backend.address.to_string())
            .collect()
    }

    /// Waits until a host has these backends.
    pub(crate) async fn serves(&self, uri: &str, backends: &[&str]) {
        until(
            || format!("{uri} has {backends:?}, not {:?}", self.backends(uri)),
            || self.backends(uri) == backends,
        )
        .await;
    }

    pub(crate) async fn is(&self, state: State) {
        let status = || self.metrics.sources.get(self.origin);
        until(
            || format!("the source is {state:?}, not {:?}", status()),
            || status().is_some_and(|status| status.state == state),
        )
        .await;
    }

    /// Of the latest attempt at the server.
    pub(crate) fn error(&self) -> String {
        let status = self.metrics.sources.get(self.origin);
        status.and_then(|status| status.error).unwrap_or_default()
    }

    /// Waits until everything was read.
    pub(crate) async fn is_whole(&self) {
        let status = || self.metrics.sources.get(self.origin);
        until(
            || format!("all is read: {:?}", status()),
            || {
                status().is_some_and(|status| {
                    status.state == State::Connected && status.age().is_some()
                })
            },
        )
        .await;
    }

    /// Waits until a key is refused for a reason that has these words.
    pub(crate) async fn refuses(&self, key: &str, why: &str) {
        let refused = || {
            let list = self.rejects.list();
            let mut list = list.iter();
            list.any(|reject| reject.what == key && reject.why.contains(why))
        };
        until(
            || format!("{key:?} is refused: {why:?}, not {:?}", self.rejects.list()),
            refused,
        )
        .await;
    }
}

/// Polls until it holds.
pub(crate) async fn until(what: impl Fn() -> String, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain until {}", what());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A process that is killed with its test.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Server {
    /// Starts a program, and waits until it answers at `address`.
    pub(crate) async fn start(mut command: Command, address: SocketAddr) -> Server {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("start {command:?}: {error}"));
        let mut server = Server { child, address };
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(address).await.is_err() {
            assert_eq!(server.child.try_wait().unwrap(), None, "{command:?} ended");
            assert!(Instant::now() < deadline, "{command:?} does not answer");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        server
    }

    /// Ends it at once, and returns where it was.
    pub(crate) fn stop(self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address that nobody listens on, below the ports that the kernel gives to clients: one of those
/// that looks for a server which is away would connect to itself.
pub(crate) fn free_address() -> SocketAddr {
    loop {
        let port = rand::rng().random_range(16_384..32_768);
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

/// A way to a server that can be held up: bytes wait, connections stay.
pub(crate) struct Link {
    pub(crate) address: SocketAddr,
    open: watch::Sender<bool>,
}

impl Link {
    pub(crate) async fn to(server: SocketAddr) -> Link {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (open, gate) = watch::channel(true);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let gate = gate.clone();
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(server).await else {
                        return;
                    };
                    let (client, server) = (client.into_split(), server.into_split());
                    tokio::select! {
                        () = pass(client.0, server.1, gate.clone()) => {}
                        () = pass(server.0, client.1, gate) => {}
                    }
                });
            }
        });
        Link { address, open }
    }

    pub(crate) fn hold_up(&self, held_up: bool) {
        self.open.send_replace(!held_up);
    }
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut gate: watch::Receiver<bool>,
) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut buffer = vec![0; 1 << 16];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if gate.wait_for(|open| *open).await.is_err()
            || to.write_all(&buffer[..read]).await.is_err()
        {
            return;
        }
    }
}
