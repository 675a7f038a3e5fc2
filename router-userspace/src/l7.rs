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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::ensure;
use arc_swap::ArcSwap;
use ipnet::IpNet;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::config::{
    BackendProxyProtocol, ClientCertFormat, ForwardedClientCert, ForwardedHeader, HttpBalance,
    HttpConfig, HttpEjection, HttpLimits, HttpRetries, HttpSticky, HttpTimeouts, HttpTracing,
    HttpZoneBalance, ProxyProtocol,
};
use crate::l7::access_log::AccessLog;
#[cfg(feature = "http3")]
use crate::l7::handshake::ListenerKind;
use crate::l7::handshake::Rules;
use crate::l7::headers::Via;
use crate::l7::listen::Listening;
use crate::l7::metrics::L7Metrics;
use crate::l7::otlp::Exporter;
use crate::l7::route_service::RouteServices;
use crate::l7::shared::Shared;
use crate::l7::tls::Tls;
use crate::l7::worker::{Stop, WorkerParts};
use crate::route::Balance;
use crate::snapshot::Published;

mod access_log;
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
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod handshake;
mod headers;
#[cfg(feature = "http3")]
mod http3;
mod informational;
mod lease;
mod listen;
mod liveness;
pub mod metrics;
mod otlp;
mod outlier;
mod pace;
mod progress;
mod proxy_protocol;
mod rate;
mod raw_heads;
mod record;
mod replay;
mod retry_budget;
mod route_service;
pub mod router;
mod shared;
pub mod sockmap;
mod sticky;
mod stream;
mod throttle;
mod tls;
mod trace;
mod tunnel;
mod validate;
mod worker;

/// [`stand_by`] with no sockets but its own, and [`Proxy::serve`].
///
/// # Errors
/// As [`stand_by`].
pub fn start(
    config: &HttpConfig,
    published: Published,
    metrics: Arc<L7Metrics>,
) -> anyhow::Result<Proxy> {
    let proxy = stand_by(config, published, metrics, Vec::new())?;
    proxy.serve()?;
    Ok(proxy)
}

/// Binds every address of `http.listen` and `http.tls.listen`, but for the sockets `inherited`, and
/// starts the workers, which accept nothing before [`Proxy::serve`].
///
/// # Errors
/// Names the address that cannot be bound or the certificate file that cannot be read. Nothing is
/// left running then.
pub fn stand_by(
    config: &HttpConfig,
    published: Published,
    metrics: Arc<L7Metrics>,
    inherited: Vec<TcpListener>,
) -> anyhow::Result<Proxy> {
    let worker_count = worker_count(config);
    let tls = Tls::start(config, Arc::clone(&metrics))?;
    let access_log = AccessLog::open(config, None, &metrics)?;
    let exporter = Exporter::start(&config.tracing, None, &metrics)?;
    metrics.configure(&config.metrics);
    #[cfg(feature = "http3")]
    let takes_over = !inherited.is_empty();
    let listening = listen::bind(&[], config, inherited, worker_count)?;
    let settings = Settings {
        access_log,
        exporter,
        ..Settings::new(config)?
    };
    let settings = Arc::new(ArcSwap::from_pointee(settings));
    let shared = Arc::new(Shared::new(worker_count));
    let (stop, stopped) = watch::channel(None);
    let (alive, ended) = mpsc::channel(1);
    let (assignments, assigned): (Vec<_>, Vec<_>) =
        (0..worker_count).map(|_| mpsc::unbounded_channel()).unzip();
    #[cfg(feature = "http3")]
    let http3 = Http3::bind(config, &listening, assignments.clone(), takes_over)?;
    let mut proxy = Proxy {
        local_addresses: listening.iter().map(|it| it.local).collect(),
        listening: Mutex::new(listening),
        fixed: Fixed::new(config),
        tls: Arc::clone(&tls),
        metrics: Arc::clone(&metrics),
        settings,
        stop,
        ended,
        workers: Vec::new(),
        #[cfg(feature = "http3")]
        http3,
    };
    for (index, (listeners, assigned)) in assignments.into_iter().zip(assigned).enumerate() {
        let parts = WorkerParts {
            index,
            listeners: assigned,
            published: Arc::clone(&published),
            settings: Arc::clone(&proxy.settings),
            shared: Arc::clone(&shared),
            metrics: metrics.add_worker(),
            tls: Arc::clone(&tls),
            stop: stopped.clone(),
            alive: alive.clone(),
        };
        proxy.workers.push(RunningWorker {
            thread: worker::spawn(parts)?,
            listeners,
        });
    }
    Ok(proxy)
}

/// Whether [`start`] would take the files and secrets that `config` names.
///
/// # Errors
/// Names the key, and the file that cannot be used.
pub fn check_files(config: &HttpConfig) -> anyhow::Result<()> {
    RouteServices::load(&config.route_services)?;
    tls::check(config)?;
    AccessLog::check(&config.access_log)
}

/// The running layer 7. Dropping it ends the workers at once; [`Proxy::drain`] lets requests end.
pub struct Proxy {
    local_addresses: Vec<SocketAddr>,
    /// Locked for a reload and for whoever asks for sockets.
    listening: Mutex<Vec<Listening>>,
    fixed: Fixed,
    tls: Arc<Tls>,
    metrics: Arc<L7Metrics>,
    settings: Arc<ArcSwap<Settings>>,
    stop: watch::Sender<Option<Stop>>,
    /// Closed when the last worker has ended.
    ended: mpsc::Receiver<()>,
    workers: Vec<RunningWorker>,
    #[cfg(feature = "http3")]
    http3: Http3,
}

struct RunningWorker {
    thread: JoinHandle<()>,
    listeners: mpsc::UnboundedSender<worker::Assignment>,
}

impl Proxy {
    /// In the order of `http.listen` and then `http.tls.listen` at the start, with the ports that were
    /// taken for port 0.
    pub fn local_addresses(&self) -> &[SocketAddr] {
        &self.local_addresses
    }

    /// Begins to accept.
    ///
    /// # Errors
    /// The system is out of descriptors.
    pub fn serve(&self) -> anyhow::Result<()> {
        let listening = self.listening();
        for listening in listening.iter() {
            self.assign(listening)?;
        }
        #[cfg(feature = "http3")]
        self.http3.serve()?;
        let addresses: Vec<_> = listening.iter().map(|it| it.local).collect();
        tracing::info!(listen = ?addresses, workers = self.workers.len(), "layer 7 serves");
        Ok(())
    }

    /// A descriptor of one listener for each address, for layer 4 to hand connections to. To be
    /// dropped soon: a listener is open while there is one, and nobody accepts by this.
    ///
    /// # Errors
    /// The system is out of descriptors.
    pub fn listeners(&self) -> anyhow::Result<Vec<TcpListener>> {
        let listening = self.listening();
        let first = listening.iter().map(|it| it.sockets[0].try_clone());
        Ok(first.collect::<Result<_, _>>()?)
    }

    /// Descriptors of all listeners, for a process that takes over. To be dropped soon.
    ///
    /// # Errors
    /// The system is out of descriptors.
    pub fn sockets(&self) -> anyhow::Result<Vec<TcpListener>> {
        let listening = self.listening();
        let sockets = listening.iter().flat_map(|it| it.sockets.iter());
        let sockets = sockets.map(TcpListener::try_clone);
        Ok(sockets.collect::<Result<_, _>>()?)
    }

    /// Whether [`Proxy::reload`] would take this configuration, if its addresses are free.
    ///
    /// # Errors
    /// Names the first key whose change needs a restart, or the file that cannot be used.
    pub fn check_reload(&self, config: &HttpConfig) -> anyhow::Result<()> {
        let wanted = Fixed::new(config);
        let key = "needs a restart to change";
        ensure!(self.fixed.workers == wanted.workers, "http.workers {key}");
        ensure!(self.fixed.sockmap == wanted.sockmap, "http.sockmap {key}");
        AccessLog::check(&config.access_log)?;
        RouteServices::load(&config.route_services)?;
        self.tls.check_reload(config)
    }

    /// Listens where `config` says, and makes timeouts, limits, trusted proxies, the default balance
    /// and all of TLS those of `config`: for requests from here on, for certificates and the size of
    /// a request's head from the next connection on. Reads certificates again in any case. True if
    /// it listens elsewhere than before.
    ///
    /// # Errors
    /// As [`Proxy::check_reload`], or an address cannot be bound; nothing is changed then.
    pub fn reload(&self, config: &HttpConfig) -> anyhow::Result<bool> {
        self.check_reload(config)?;
        let settings = Settings::new(config)?;
        let former = self.settings.load();
        let access_log = AccessLog::open(config, former.access_log.as_deref(), &self.metrics)?;
        let exporter = Exporter::start(&config.tracing, former.exporter.as_ref(), &self.metrics)?;
        let mut listening = self.listening();
        let wanted = listen::bind(&listening, config, Vec::new(), self.workers.len())?;
        #[cfg(feature = "http3")]
        let http3 = self.http3.bind_again(config, &wanted)?;
        self.tls.reload(config)?;
        self.metrics.configure(&config.metrics);
        self.settings.store(Arc::new(Settings {
            access_log,
            exporter,
            ..settings
        }));
        let changed = listen::is_other(&listening, &wanted);
        if changed {
            let before = std::mem::replace(&mut *listening, wanted);
            for wanted in listening.iter() {
                if !before.iter().any(|it| it.is_same(wanted)) {
                    self.assign(wanted)?;
                }
            }
        }
        #[cfg(feature = "http3")]
        self.http3.listeners.serve(http3)?;
        Ok(changed)
    }

    /// Stops accepting, lets open requests end with `Connection: close`, and cuts what is left,
    /// upgraded connections among it, after `timeout`.
    pub async fn drain(self, timeout: Duration) {
        self.end(timeout, false).await;
    }

    /// The same where another process serves by the same sockets: an idle connection may make one more
    /// request, which is answered with `Connection: close`.
    pub async fn retire(self, timeout: Duration) {
        self.end(timeout, true).await;
    }

    async fn end(mut self, timeout: Duration, retiring: bool) {
        let deadline = Instant::now() + timeout;
        self.stop.send_replace(Some(Stop { deadline, retiring }));
        // Descriptors that nobody accepts by would go on taking connections in.
        self.listening().clear();
        #[cfg(feature = "http3")]
        self.http3.listeners.clear();
        while self.ended.recv().await.is_some() {}
        for worker in self.workers.drain(..) {
            if worker.thread.join().is_err() {
                tracing::error!("an l7 worker panicked");
            }
        }
        let settings = self.settings.load();
        let log_end = settings.access_log.as_ref().and_then(|log| log.take_end());
        let export_end = settings.exporter.as_ref().and_then(|it| it.take_end());
        drop((settings, self));
        let deadline = std::time::Instant::now() + LOG_DRAIN;
        for end in [log_end, export_end].into_iter().flatten() {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            // An error is the end: nothing is ever sent.
            let _ = end.recv_timeout(left);
        }
    }

    fn listening(&self) -> MutexGuard<'_, Vec<Listening>> {
        self.listening
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the workers accept on an address.
    fn assign(&self, listening: &Listening) -> anyhow::Result<()> {
        for (index, socket) in listening.sockets.iter().enumerate() {
            let listener = worker::Listener {
                socket: socket.try_clone()?,
                kind: listening.kind,
                open: listening.open.subscribe(),
            };
            let worker = &self.workers[index % self.workers.len()];
            // Fails only for a worker that panicked, which is told when it is waited for.
            let _ = worker.listeners.send(worker::Assignment::Tcp(listener));
        }
        Ok(())
    }
}

/// HTTP/3 on the addresses of `http.tls.listen`.
#[cfg(feature = "http3")]
struct Http3 {
    listeners: Arc<http3::Listeners>,
    /// Bound, and not served on yet.
    bound: Mutex<Option<http3::Wanted>>,
}

#[cfg(feature = "http3")]
impl Http3 {
    fn bind(
        config: &HttpConfig,
        listening: &[Listening],
        workers: Vec<mpsc::UnboundedSender<worker::Assignment>>,
        takes_over: bool,
    ) -> anyhow::Result<Http3> {
        let listeners = http3::Listeners::new(workers);
        let bound = listeners.bind(&http3_addresses(config, listening), takes_over)?;
        Ok(Http3 {
            listeners,
            bound: Mutex::new(Some(bound)),
        })
    }

    fn serve(&self) -> anyhow::Result<()> {
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        match bound.take() {
            Some(bound) => self.listeners.serve(bound),
            None => Ok(()),
        }
    }

    /// What a reload asks for. An address may be busy with connections of before a former reload.
    fn bind_again(
        &self,
        config: &HttpConfig,
        listening: &[Listening],
    ) -> anyhow::Result<http3::Wanted> {
        self.listeners
            .bind(&http3_addresses(config, listening), true)
    }
}

#[cfg(feature = "http3")]
fn http3_addresses(config: &HttpConfig, listening: &[Listening]) -> Vec<SocketAddr> {
    let in_tls = listening.iter().filter(|it| it.kind == ListenerKind::Https);
    match config.tls.http3 {
        true => in_tls.map(|it| it.local).collect(),
        false => Vec::new(),
    }
}

/// How long the last lines of the access log, and the last spans, may take to be written.
const LOG_DRAIN: Duration = Duration::from_secs(1);

/// What cannot change while the workers run.
struct Fixed {
    workers: usize,
    sockmap: bool,
}

impl Fixed {
    fn new(config: &HttpConfig) -> Fixed {
        Fixed {
            workers: config.workers,
            sockmap: config.sockmap,
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
    #[cfg(feature = "http3")]
    http3_retry: bool,
    sockmap: bool,
    balance: Balance,
    zone: Option<String>,
    prefer_zone: bool,
    slow_start: Duration,
    forwarded: ForwardedHeader,
    forwarded_port: bool,
    via: Option<Via>,
    tracing: HttpTracing,
    /// Open, so not made from the configuration alone.
    access_log: Option<Arc<AccessLog>>,
    /// Running, likewise.
    exporter: Option<Arc<Exporter>>,
    /// `None` without `http.route_services.secret`.
    route_services: Option<Arc<RouteServices>>,
}

impl Settings {
    /// # Errors
    /// Names the secret that cannot be read.
    fn new(config: &HttpConfig) -> anyhow::Result<Settings> {
        Ok(Settings {
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
            #[cfg(feature = "http3")]
            http3_retry: config.tls.http3_retry,
            sockmap: config.sockmap,
            balance: match config.balance {
                HttpBalance::RoundRobin => Balance::RoundRobin,
                HttpBalance::LeastConnections => Balance::LeastConnections,
            },
            zone: config.zone.clone(),
            prefer_zone: config.balance_zone == HttpZoneBalance::Prefer,
            slow_start: config.slow_start,
            forwarded: config.forwarded,
            forwarded_port: config.forwarded_port,
            via: config.via.as_deref().map(Via::new),
            tracing: config.tracing.clone(),
            access_log: None,
            exporter: None,
            route_services: RouteServices::load(&config.route_services)?,
        })
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
