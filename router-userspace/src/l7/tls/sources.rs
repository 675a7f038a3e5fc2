//! Which files the configuration names, and what they amount to.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, ensure};
use rustls::RootCertStore;
use rustls::server::ProducesTickets;

use super::backend::{self, BackendTlsClient};
use super::certificates::{self, Certificate, Certificates};
use super::files::{self, Look, Watched};
use super::server::{self, TlsServer};
use crate::config::{BackendTlsConfig, CertificateFiles, HttpConfig, HttpTlsConfig};

pub(super) struct Sources {
    tls: HttpTlsConfig,
    backend_tls: BackendTlsConfig,
    route_services_tls: Option<BackendTlsConfig>,
    directory: Option<Watched<Vec<CertificateFiles>>>,
    /// In the order of the configuration, and of the directory behind it.
    pairs: Vec<(CertificateFiles, Watched<Certificate>)>,
    client_roots: Option<Watched<Arc<RootCertStore>>>,
    /// Made with the first server, and others when the clients' roots change.
    tickets: Option<Arc<dyn ProducesTickets>>,
    backend: Option<Watched<Arc<BackendTlsClient>>>,
    route_services: Option<Watched<Arc<BackendTlsClient>>>,
}

/// What a look found to be otherwise.
#[derive(Default)]
pub(super) struct Changed {
    pub server: bool,
    pub backend: bool,
    pub route_services: bool,
    /// Files that changed for the worse, by name.
    pub refused: Vec<anyhow::Error>,
}

impl Sources {
    /// Reads every file; with the reasons why pairs of the directory were left out.
    ///
    /// # Errors
    /// Names the key and the file that cannot be used.
    pub(super) fn load(config: &HttpConfig) -> anyhow::Result<(Sources, Vec<anyhow::Error>)> {
        let tls = config.tls.clone();
        let backend_tls = config.backend_tls.clone();
        let route_services_tls = config.route_services.tls();
        let serves = !tls.listen.is_empty();
        let watched = |path: &Option<PathBuf>| path.clone().filter(|_| serves).map(|it| vec![it]);
        let mut sources = Sources {
            directory: watched(&tls.certificate_directory).map(Watched::new),
            pairs: Vec::new(),
            client_roots: watched(&tls.client_ca_file).map(Watched::new),
            tickets: None,
            backend: backend_tls
                .has_roots()
                .then(|| Watched::new(backend::files_of(&backend_tls))),
            route_services: route_services_tls
                .as_ref()
                .map(|tls| Watched::new(backend::files_of(tls))),
            tls,
            backend_tls,
            route_services_tls,
        };
        let mut refused = sources.look(true).refused;
        let is_bad = sources.directory.as_ref().is_some_and(Watched::is_refused)
            || sources
                .client_roots
                .as_ref()
                .is_some_and(Watched::is_refused)
            || sources.backend.as_ref().is_some_and(Watched::is_refused)
            || sources
                .route_services
                .as_ref()
                .is_some_and(Watched::is_refused)
            || sources.configured().any(Watched::is_refused);
        // The directory's pairs come last, so an error of another file stands first.
        match is_bad {
            true => Err(refused.swap_remove(0)),
            false => Ok((sources, refused)),
        }
    }

    pub(super) fn is_of(&self, config: &HttpConfig) -> bool {
        self.tls == config.tls
            && self.backend_tls == config.backend_tls
            && self.route_services_tls == config.route_services.tls()
    }

    /// Reads what changed; `anyway`, all.
    pub(super) fn look(&mut self, anyway: bool) -> Changed {
        let mut changed = Changed::default();
        if let (Some(backend), config) = (&mut self.backend, &self.backend_tls) {
            let read = || BackendTlsClient::load(config, "http.backend_tls").map(Arc::new);
            let look = backend.look(anyway, read);
            changed.backend = changed.take(look);
        }
        if let (Some(services), Some(config)) = (&mut self.route_services, &self.route_services_tls)
        {
            let read = || BackendTlsClient::load(config, "http.route_services").map(Arc::new);
            let look = services.look(anyway, read);
            changed.route_services = changed.take(look);
        }
        if let (Some(roots), Some(path)) = (&mut self.client_roots, &self.tls.client_ca_file) {
            let read = || files::roots(path).context("http.tls.client_ca_file");
            let look = roots.look(anyway, read);
            if changed.take(look) {
                changed.server = true;
                self.tickets = None;
            }
        }
        if let (Some(directory), Some(path)) =
            (&mut self.directory, &self.tls.certificate_directory)
        {
            let read = || certificates::pairs(path).context("http.tls.certificate_directory");
            let look = directory.look(anyway, read);
            changed.server |= changed.take(look);
        }
        if !self.tls.listen.is_empty() {
            self.arrange_pairs();
        }
        let configured_count = self.tls.certificates.len();
        for (at, (files, pair)) in self.pairs.iter_mut().enumerate() {
            let key = match at < configured_count {
                true => "http.tls.certificates",
                false => "http.tls.certificate_directory",
            };
            let look = pair.look(anyway, || Certificate::load(files).context(key));
            changed.server |= changed.take(look);
        }
        changed
    }

    /// None if no listener speaks TLS.
    ///
    /// # Errors
    /// There is no certificate left, or no random numbers.
    pub(super) fn server(&mut self) -> anyhow::Result<Option<Arc<TlsServer>>> {
        if self.tls.listen.is_empty() {
            return Ok(None);
        }
        let tickets = match &self.tickets {
            Some(tickets) => Arc::clone(tickets),
            None => Arc::clone(self.tickets.insert(server::tickets()?)),
        };
        ensure!(
            self.in_use().next().is_some(),
            "http.tls has no certificate to serve with"
        );
        let certificates = Certificates::new(self.in_use(), self.tls.strict_sni);
        let roots = self.client_roots.as_ref().and_then(Watched::value);
        let server = TlsServer::new(&self.tls, certificates, roots, tickets)?;
        Ok(Some(Arc::new(server)))
    }

    pub(super) fn backend(&self) -> Option<Arc<BackendTlsClient>> {
        self.backend.as_ref().and_then(Watched::value).cloned()
    }

    pub(super) fn route_services(&self) -> Option<Arc<BackendTlsClient>> {
        self.route_services
            .as_ref()
            .and_then(Watched::value)
            .cloned()
    }

    /// When each certificate in use ends, in seconds since the Unix epoch.
    pub(super) fn expiry(&self) -> Vec<(PathBuf, i64)> {
        self.in_use()
            .map(|certificate| (certificate.file.clone(), certificate.not_after))
            .collect()
    }

    fn in_use(&self) -> impl Iterator<Item = &Certificate> {
        self.pairs.iter().filter_map(|(_, pair)| pair.value())
    }

    fn configured(&self) -> impl Iterator<Item = &Watched<Certificate>> {
        let count = self.tls.certificates.len();
        self.pairs.iter().take(count).map(|(_, pair)| pair)
    }

    /// Makes the list of pairs that of configuration and directory, with what is known of each.
    fn arrange_pairs(&mut self) {
        let found = self.directory.as_ref().and_then(Watched::value);
        let wanted = self
            .tls
            .certificates
            .iter()
            .chain(found.into_iter().flatten());
        if wanted.clone().eq(self.pairs.iter().map(|(files, _)| files)) {
            return;
        }
        let mut known: BTreeMap<_, _> = std::mem::take(&mut self.pairs).into_iter().collect();
        self.pairs = wanted
            .map(|files| {
                let unread = || {
                    let paths = [&files.certificate_file, &files.key_file];
                    Watched::new(paths.map(Clone::clone).to_vec())
                };
                (files.clone(), known.remove(files).unwrap_or_else(unread))
            })
            .collect();
    }
}

impl Changed {
    /// Whether something was read.
    fn take(&mut self, look: Look) -> bool {
        match look {
            Look::Same => false,
            Look::Changed => true,
            Look::Refused(error) => {
                self.refused.push(error);
                false
            }
        }
    }
}
