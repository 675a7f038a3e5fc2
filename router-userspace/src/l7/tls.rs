//! TLS on both sides: the certificates of the listeners, and what backends are verified with.
//!
//! [`Tls`] publishes one immutable [`TlsServer`] and one [`BackendTlsClient`]. Workers load them for
//! each handshake; established connections keep what they began with. One thread, `tls-files`, looks
//! at the files once a second and ends with the last `Tls`; a reload reads them at once. A file that
//! cannot be used is told and counted once, and what it was before stays in use. Handshakes with
//! clients are in [`crate::l7::handshake`].

use std::convert::Infallible;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwapOption;

use crate::config::HttpConfig;
use crate::l7::metrics::L7Metrics;
use sources::{Changed, Sources};

mod backend;
mod certificates;
mod files;
mod server;
mod sources;

pub(super) use backend::BackendTlsClient;
pub(super) use server::{ALPN_H2, TlsServer};

/// How often files are looked at. A change is taken up when two looks found the same.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What handshakes are done with, as of the latest look at the files.
pub(super) struct Tls {
    server: ArcSwapOption<TlsServer>,
    backend: ArcSwapOption<BackendTlsClient>,
    route_services: ArcSwapOption<BackendTlsClient>,
    sources: Mutex<Sources>,
    metrics: Arc<L7Metrics>,
    /// Dropped to end the thread.
    _watch: mpsc::Sender<Infallible>,
}

impl Tls {
    /// Reads every file and starts to watch them.
    ///
    /// # Errors
    /// Names the key and the file that cannot be used. A bad pair of `certificate_directory` is left
    /// out and told, as long as any certificate is good.
    pub(super) fn start(config: &HttpConfig, metrics: Arc<L7Metrics>) -> anyhow::Result<Arc<Tls>> {
        let (mut sources, refused) = Sources::load(config)?;
        tell(&refused, &metrics);
        let (watch, ends) = mpsc::channel();
        let tls = Arc::new(Tls {
            server: ArcSwapOption::new(sources.server()?),
            backend: ArcSwapOption::new(sources.backend()),
            route_services: ArcSwapOption::new(sources.route_services()),
            sources: Mutex::new(sources),
            metrics,
            _watch: watch,
        });
        tls.publish_expiry(&tls.sources());
        let weak = Arc::downgrade(&tls);
        let look = move || {
            while ends.recv_timeout(LOOK_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                match weak.upgrade() {
                    Some(tls) => tls.look(false),
                    None => return,
                }
            }
        };
        std::thread::Builder::new()
            .name("tls-files".to_owned())
            .spawn(look)
            .context("start the thread that watches certificates")?;
        Ok(tls)
    }

    /// None where no listener speaks TLS.
    pub(super) fn server(&self) -> Option<Arc<TlsServer>> {
        self.server.load_full()
    }

    /// None where there is nothing to verify backends with.
    pub(super) fn backend(&self) -> Option<Arc<BackendTlsClient>> {
        self.backend.load_full()
    }

    /// None where no route service is ever called.
    pub(super) fn route_services(&self) -> Option<Arc<BackendTlsClient>> {
        self.route_services.load_full()
    }

    /// Whether [`Tls::reload`] would take this configuration.
    ///
    /// # Errors
    /// As [`Tls::reload`].
    pub(super) fn check_reload(&self, config: &HttpConfig) -> anyhow::Result<()> {
        if self.sources().is_of(config) {
            return Ok(());
        }
        check(config)
    }

    /// Reads all files anew. Where the configuration is as before, a bad one keeps what it was.
    ///
    /// # Errors
    /// As [`Tls::start`], for another configuration than before. Nothing is changed then.
    pub(super) fn reload(&self, config: &HttpConfig) -> anyhow::Result<()> {
        let mut sources = self.sources();
        if sources.is_of(config) {
            drop(sources);
            self.look(true);
            return Ok(());
        }
        let (mut wanted, refused) = Sources::load(config)?;
        tell(&refused, &self.metrics);
        self.server.store(wanted.server()?);
        self.backend.store(wanted.backend());
        self.route_services.store(wanted.route_services());
        *sources = wanted;
        self.publish_expiry(&sources);
        Ok(())
    }

    /// Takes up what changed in the files; `anyway`, reads them whether or not they did.
    fn look(&self, anyway: bool) {
        let mut sources = self.sources();
        let Changed {
            server,
            backend,
            route_services,
            refused,
        } = sources.look(anyway);
        tell(&refused, &self.metrics);
        if server {
            match sources.server() {
                Ok(server) => {
                    self.server.store(server);
                    self.publish_expiry(&sources);
                    self.metrics.tls.count_load();
                    tracing::info!("certificates of the listeners read");
                }
                Err(error) => tell(&[error], &self.metrics),
            }
        }
        if backend {
            self.backend.store(sources.backend());
            self.metrics.tls.count_load();
            tracing::info!("certificates for backends read");
        }
        if route_services {
            self.route_services.store(sources.route_services());
            self.metrics.tls.count_load();
            tracing::info!("certificates for route services read");
        }
    }

    fn publish_expiry(&self, sources: &Sources) {
        self.metrics.tls.publish_certificates(sources.expiry());
    }

    fn sources(&self) -> MutexGuard<'_, Sources> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether [`Tls::start`] would take this configuration.
///
/// # Errors
/// As [`Tls::start`].
pub(super) fn check(config: &HttpConfig) -> anyhow::Result<()> {
    let (mut sources, _) = Sources::load(config)?;
    sources.server().map(drop)
}

fn tell(refused: &[anyhow::Error], metrics: &L7Metrics) {
    for error in refused {
        metrics.tls.count_refusal();
        let error = format!("{error:#}");
        tracing::warn!(
            error,
            "certificates refused: what was read before stays in use"
        );
    }
}

#[cfg(test)]
mod tests;
