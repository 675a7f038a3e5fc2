//! Layer 7: HTTP requests routed by host and path to the backends of the snapshot.
//!
//! ```text
//!  client ── connection ── forward ──▶ validate ─▶ router ─▶ balance ─▶ headers ─▶ backend ── backend
//!            (hyper server)                      (snapshot)                      (hyper client)
//! ```
//!
//! [`start`] runs one [`worker`] a core, each a thread that shares nothing with the others while a
//! request is on its way: own listeners (SO_REUSEPORT), own backend connections, own counters.
//! HTTP/1.0 and 1.1 on both sides, in clear or in TLS. The agent starts, reloads and drains it; routes reach it only
//! through the published snapshot.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::ensure;
use arc_swap::ArcSwap;
use ipnet::IpNet;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::config::{
    BackendProxyProtocol, ClientCertFormat, ForwardedClientCert, HttpBalance, HttpConfig,
    HttpEjection, HttpLimits, HttpRetries, HttpSticky, HttpTimeouts, HttpZoneBalance,
    ProxyProtocol,
};
use crate::l7::handshake::{ListenerKind, Rules};
use crate::l7::metrics::L7Metrics;
use crate::l7::shared::Shared;
use crate::l7::tls::Tls;
use crate::l7::worker::WorkerParts;
use crate::route::Balance;
use crate::snapshot::Published;

mod admission;
mod backend;
mod balance;
mod body;
mod client;
mod client_cert;
mod client_io;
pub mod clients;
mod compress;
mod connection;
pub mod edits;
pub mod error;
mod exchange;
mod forward;
mod frames;
mod handshake;
mod headers;
mod lease;
mod listen;
mod liveness;
pub mod metrics;
mod outlier;
mod pace;
mod proxy_protocol;
mod rate;
mod raw_heads;
mod record;
mod replay;
mod retry_budget;
pub mod router;
mod shared;
mod sticky;
mod throttle;
mod tls;
mod tunnel;
mod validate;
mod worker;

/// Binds every address of `http.listen` and `http.tls.listen` and starts the workers.
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
    let tls = Tls::start(config, Arc::clone(&metrics))?;
    let mut local_addresses = Vec::new();
    let mut hand_up = Vec::new();
    let mut listeners: Vec<Vec<(TcpListener, ListenerKind)>> = Vec::new();
    listeners.resize_with(worker_count, Vec::new);
    let in_clear = config.listen.iter().map(|it| (it, ListenerKind::Http));
    let in_tls = config.tls.listen.iter().map(|it| (it, ListenerKind::Https));
    for (&address, kind) in in_clear.chain(in_tls) {
        let sockets = listen::listen(address, worker_count)?;
        local_addresses.push(sockets[0].local_addr()?);
        hand_up.push(sockets[0].try_clone()?);
        for (worker, socket) in listeners.iter_mut().zip(sockets) {
            worker.push((socket, kind));
        }
    }

    let settings = Arc::new(ArcSwap::from_pointee(Settings::new(config)));
    let shared = Arc::new(Shared::new(worker_count));
    let (stop, stopped) = watch::channel(None);
    let (alive, ended) = mpsc::channel(1);
    let mut proxy = Proxy {
        local_addresses,
        hand_up,
        fixed: Fixed::new(config),
        tls: Arc::clone(&tls),
        settings,
        stop,
        ended,
        workers: Vec::new(),
    };
    for (index, listeners) in listeners.into_iter().enumerate() {
        let parts = WorkerParts {
            index,
            listeners,
            published: Arc::clone(&published),
            settings: Arc::clone(&proxy.settings),
            shared: Arc::clone(&shared),
            metrics: metrics.add_worker(),
            tls: Arc::clone(&tls),
            stop: stopped.clone(),
            alive: alive.clone(),
        };
        proxy.workers.push(worker::spawn(parts)?);
    }
    tracing::info!(listen = ?proxy.local_addresses, workers = worker_count, "layer 7 serves");
    Ok(proxy)
}

/// Whether [`start`] would take the files that `config` names.
///
/// # Errors
/// Names the key and the file that cannot be used.
pub fn check_files(config: &HttpConfig) -> anyhow::Result<()> {
    tls::check(config)
}

/// The running layer 7. Dropping it ends the workers at once; [`Proxy::drain`] lets requests end.
pub struct Proxy {
    local_addresses: Vec<SocketAddr>,
    hand_up: Vec<TcpListener>,
    fixed: Fixed,
    tls: Arc<Tls>,
    settings: Arc<ArcSwap<Settings>>,
    stop: watch::Sender<Option<Instant>>,
    /// Closed when the last worker has ended.
    ended: mpsc::Receiver<()>,
    workers: Vec<JoinHandle<()>>,
}

impl Proxy {
    /// In the order of `http.listen` and then `http.tls.listen`, with the ports that were taken for port 0.
    pub fn local_addresses(&self) -> &[SocketAddr] {
        &self.local_addresses
    }

    /// A descriptor of one listener for each address, once, for layer 4 to hand connections
    /// to. To be dropped soon: a listener is open while there is one, and nobody accepts by this.
    pub fn take_listeners(&mut self) -> Vec<TcpListener> {
        std::mem::take(&mut self.hand_up)
    }

    /// Whether [`Proxy::reload`] would take this configuration.
    ///
    /// # Errors
    /// Names the first key whose change needs a restart, or the file that cannot be used.
    pub fn check_reload(&self, config: &HttpConfig) -> anyhow::Result<()> {
        let wanted = Fixed::new(config);
        let key = "needs a restart to change";
        ensure!(self.fixed.listen == wanted.listen, "http.listen {key}");
        ensure!(self.fixed.workers == wanted.workers, "http.workers {key}");
        ensure!(
            self.fixed.tls_listen == wanted.tls_listen,
            "http.tls.listen {key}"
        );
        self.tls.check_reload(config)
    }

    /// Makes timeouts, limits, trusted proxies, the default balance and all of TLS those of `config`:
    /// for requests from here on, for certificates and the size of a request's head from the next
    /// connection on. Reads certificates again in any case.
    ///
    /// # Errors
    /// As [`Proxy::check_reload`]; nothing is changed then.
    pub fn reload(&self, config: &HttpConfig) -> anyhow::Result<()> {
        self.check_reload(config)?;
        self.tls.reload(config)?;
        self.settings.store(Arc::new(Settings::new(config)));
        Ok(())
    }

    /// Stops accepting, lets open requests end with `Connection: close`, and cuts what is left,
    /// upgraded connections among it, after `timeout`.
    pub async fn drain(mut self, timeout: Duration) {
        // A listener that nobody took would go on taking connections in.
        self.hand_up.clear();
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
    tls_listen: Vec<SocketAddr>,
    workers: usize,
}

impl Fixed {
    fn new(config: &HttpConfig) -> Fixed {
        Fixed {
            listen: config.listen.clone(),
            tls_listen: config.tls.listen.clone(),
            workers: config.workers,
        }
    }
}

/// What workers look up for each request and a reload replaces.
struct Settings {
    timeouts: HttpTimeouts,
    limits: HttpLimits,
    retries: HttpRetries,
    ejection: HttpEjection,
    sticky: HttpSticky,
    trusted_proxies: Vec<IpNet>,
    proxy_protocol: ProxyProtocol,
    backend_proxy_protocol: BackendProxyProtocol,
    forwarded_client_cert: ForwardedClientCert,
    client_cert_format: ClientCertFormat,
    balance: Balance,
    zone: Option<String>,
    prefer_zone: bool,
    slow_start: Duration,
}

impl Settings {
    fn new(config: &HttpConfig) -> Settings {
        Settings {
            timeouts: config.timeouts.clone(),
            limits: config.limits.clone(),
            retries: config.retries.clone(),
            ejection: config.ejection.clone(),
            sticky: config.sticky.clone(),
            trusted_proxies: config.trusted_proxies.clone(),
            proxy_protocol: config.proxy_protocol,
            backend_proxy_protocol: config.backend_proxy_protocol,
            forwarded_client_cert: config.forwarded_client_cert,
            client_cert_format: config.forwarded_client_cert_format,
            balance: match config.balance {
                HttpBalance::RoundRobin => Balance::RoundRobin,
                HttpBalance::LeastConnections => Balance::LeastConnections,
            },
            zone: config.zone.clone(),
            prefer_zone: config.balance_zone == HttpZoneBalance::Prefer,
            slow_start: config.slow_start,
        }
    }

    /// Of those a client connection watches; as often it has to look.
    fn shortest_timeout(&self) -> Duration {
        let timeouts = &self.timeouts;
        let shortest = timeouts
            .idle
            .min(timeouts.request_headers)
            .min(timeouts.response_headers)
            .min(timeouts.body_idle);
        match self.limits.min_bytes_per_second {
            0 => shortest,
            _ => shortest.min(timeouts.slow_grace),
        }
    }

    /// For a connection that `peer` has opened.
    fn handshake_rules(&self, peer: SocketAddr) -> Rules {
        Rules {
            proxy_protocol: self.proxy_protocol,
            trusted: self.trusts(peer.ip()),
            proxy_header: self.timeouts.proxy_header,
            tls_handshake: self.timeouts.tls_handshake,
            client_cert_format: self.client_cert_format,
        }
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
