//! Layer 7: HTTP requests routed by host and path to the backends of the snapshot.
//!
//! ```text
//!  client ── connection ── forward ──▶ validate ─▶ router ─▶ balance ─▶ headers ─▶ backend ── backend
//!            (hyper server)                      (snapshot)                      (hyper client)
//! ```
//!
//! [`start`] runs one [`worker`] a core, each a thread that shares nothing with the others while a
//! request is on its way: own listeners (SO_REUSEPORT), own backend connections, own counters.
//! HTTP/1.0 and 1.1 on both sides. The agent starts, reloads and drains it; routes reach it only
//! through the published snapshot.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::ensure;
use arc_swap::ArcSwap;
use ipnet::IpNet;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::config::{HttpBalance, HttpConfig, HttpLimits, HttpTimeouts};
use crate::l7::metrics::L7Metrics;
use crate::l7::tls::BackendTlsClient;
use crate::l7::worker::WorkerParts;
use crate::route::Balance;
use crate::snapshot::Published;

mod backend;
mod balance;
mod body;
mod connection;
pub mod error;
mod forward;
mod headers;
mod listen;
mod liveness;
pub mod metrics;
pub mod router;
pub mod sockmap;
mod tls;
mod tunnel;
mod validate;
mod worker;

/// Binds every address of `http.listen` and starts the workers.
///
/// # Errors
/// Names the address that cannot be bound or the certificate file that cannot be read. Nothing is
/// left running then.
pub fn start(
    config: &HttpConfig,
    published: Published,
    metrics: Arc<L7Metrics>,
) -> anyhow::Result<Proxy> {
    let worker_count = worker_count(config);
    let tls = match &config.backend_tls.ca_file {
        Some(ca_file) => Some(BackendTlsClient::load(ca_file)?),
        None => None,
    };
    let mut local_addresses = Vec::new();
    let mut hand_up = Vec::new();
    let mut listeners: Vec<Vec<TcpListener>> = Vec::new();
    listeners.resize_with(worker_count, Vec::new);
    for &address in &config.listen {
        let sockets = listen::listen(address, worker_count)?;
        local_addresses.push(sockets[0].local_addr()?);
        hand_up.push(sockets[0].try_clone()?);
        for (worker, socket) in listeners.iter_mut().zip(sockets) {
            worker.push(socket);
        }
    }

    let settings = Arc::new(ArcSwap::from_pointee(Settings::new(config)));
    let (stop, stopped) = watch::channel(None);
    let (alive, ended) = mpsc::channel(1);
    let mut proxy = Proxy {
        local_addresses,
        hand_up,
        fixed: Fixed::new(config),
        settings,
        stop,
        ended,
        workers: Vec::new(),
    };
    for (index, listeners) in listeners.into_iter().enumerate() {
        let parts = WorkerParts {
            listeners,
            published: Arc::clone(&published),
            settings: Arc::clone(&proxy.settings),
            metrics: metrics.add_worker(),
            tls: tls.clone(),
            stop: stopped.clone(),
            alive: alive.clone(),
        };
        proxy.workers.push(worker::spawn(index, parts)?);
    }
    tracing::info!(listen = ?proxy.local_addresses, workers = worker_count, "layer 7 serves");
    Ok(proxy)
}

/// The running layer 7. Dropping it ends the workers at once; [`Proxy::drain`] lets requests end.
pub struct Proxy {
    local_addresses: Vec<SocketAddr>,
    hand_up: Vec<TcpListener>,
    fixed: Fixed,
    settings: Arc<ArcSwap<Settings>>,
    stop: watch::Sender<Option<Instant>>,
    /// Closed when the last worker has ended.
    ended: mpsc::Receiver<()>,
    workers: Vec<JoinHandle<()>>,
}

impl Proxy {
    /// In the order of `http.listen`, with the ports that were taken for port 0.
    pub fn local_addresses(&self) -> &[SocketAddr] {
        &self.local_addresses
    }

    /// A descriptor of one listener for each of `http.listen`, once, for layer 4 to hand connections
    /// to. To be dropped soon: a listener is open while there is one, and nobody accepts by this.
    pub fn take_listeners(&mut self) -> Vec<TcpListener> {
        std::mem::take(&mut self.hand_up)
    }

    /// Whether [`Proxy::reload`] would take this configuration.
    ///
    /// # Errors
    /// Names the first key whose change needs a restart.
    pub fn check_reload(&self, config: &HttpConfig) -> anyhow::Result<()> {
        let wanted = Fixed::new(config);
        let key = "needs a restart to change";
        ensure!(self.fixed.listen == wanted.listen, "http.listen {key}");
        ensure!(self.fixed.workers == wanted.workers, "http.workers {key}");
        ensure!(
            self.fixed.ca_file == wanted.ca_file,
            "http.backend_tls.ca_file {key}"
        );
        ensure!(self.fixed.sockmap == wanted.sockmap, "http.sockmap {key}");
        Ok(())
    }

    /// Makes timeouts, limits, trusted proxies and the default balance those of `config`: for
    /// requests from here on, and for the size of a request's head from the next connection on.
    ///
    /// # Errors
    /// As [`Proxy::check_reload`]; nothing is changed then.
    pub fn reload(&self, config: &HttpConfig) -> anyhow::Result<()> {
        self.check_reload(config)?;
        self.settings.store(Arc::new(Settings::new(config)));
        Ok(())
    }

    /// Stops accepting, lets open requests end with `Connection: close`, and cuts what is left,
    /// upgraded connections among it, after `timeout`.
    pub async fn drain(mut self, timeout: Duration) {
        self.stop.send_replace(Some(Instant::now() + timeout));
        while self.ended.recv().await.is_some() {}
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                tracing::error!("an l7 worker panicked");
            }
        }
    }
}

/// What cannot change while the workers run.
struct Fixed {
    listen: Vec<SocketAddr>,
    workers: usize,
    ca_file: Option<PathBuf>,
    sockmap: bool,
}

impl Fixed {
    fn new(config: &HttpConfig) -> Fixed {
        Fixed {
            listen: config.listen.clone(),
            workers: config.workers,
            ca_file: config.backend_tls.ca_file.clone(),
            sockmap: config.sockmap,
        }
    }
}

/// What workers look up for each request and a reload replaces.
struct Settings {
    timeouts: HttpTimeouts,
    limits: HttpLimits,
    trusted_proxies: Vec<IpNet>,
    balance: Balance,
    sockmap: bool,
}

impl Settings {
    fn new(config: &HttpConfig) -> Settings {
        Settings {
            timeouts: config.timeouts.clone(),
            limits: config.limits.clone(),
            trusted_proxies: config.trusted_proxies.clone(),
            sockmap: config.sockmap,
            balance: match config.balance {
                HttpBalance::RoundRobin => Balance::RoundRobin,
                HttpBalance::LeastConnections => Balance::LeastConnections,
            },
        }
    }

    /// Of those a client connection watches; as often it has to look.
    fn shortest_timeout(&self) -> Duration {
        let timeouts = &self.timeouts;
        timeouts
            .request_headers
            .min(timeouts.response_headers)
            .min(timeouts.body_idle)
    }

    fn trusts(&self, peer: IpAddr) -> bool {
        let peer = peer.to_canonical();
        self.trusted_proxies
            .iter()
            .any(|network| network.contains(&peer))
    }
}

fn worker_count(config: &HttpConfig) -> usize {
    match config.workers {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        count => count,
    }
}

#[cfg(test)]
mod tests;
