//! TLS towards backends that registered a `tls_port`, and towards route services.
//!
//! Certificates are verified against `http.backend_tls.ca_file`, and the system's roots only if they
//! are asked for: those vouch for the public web, not for a platform's instances. Route services have
//! roots of their own, of `http.route_services`.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, ensure};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::files;
use super::server::{ALPN_H2, ALPN_HTTP11};
use crate::config::BackendTlsConfig;
use crate::l7::error::BackendFailure;

pub(in crate::l7) struct BackendTlsClient {
    http1: TlsConnector,
    /// The same, and HTTP/2 is offered.
    http2: TlsConnector,
}

impl BackendTlsClient {
    /// `section` is that of the configuration.
    ///
    /// # Errors
    /// Names the key and the file that cannot be used.
    pub(super) fn load(
        config: &BackendTlsConfig,
        section: &str,
    ) -> anyhow::Result<BackendTlsClient> {
        let mut roots = RootCertStore::empty();
        if let Some(path) = &config.ca_file {
            files::add_roots(&mut roots, path).with_context(|| format!("{section}.ca_file"))?;
        }
        if config.system_roots {
            let found = rustls_native_certs::load_native_certs();
            let (added, _) = roots.add_parsable_certificates(found.certs);
            ensure!(
                added > 0,
                "{section}.system_roots: none found on this system"
            );
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("choose TLS versions")?
            .with_root_certificates(roots);
        let http1 = match (&config.certificate_file, &config.key_file) {
            (Some(certificate), Some(key)) => {
                let chain = files::certificates(certificate)
                    .with_context(|| format!("{section}.certificate_file"))?;
                let key = files::private_key(key).with_context(|| format!("{section}.key_file"))?;
                builder.with_client_auth_cert(chain, key).with_context(|| {
                    format!("{section}.certificate_file {}", certificate.display())
                })?
            }
            _ => builder.with_no_client_auth(),
        };
        let mut http2 = http1.clone();
        http2.alpn_protocols = vec![ALPN_H2.to_vec(), ALPN_HTTP11.to_vec()];
        Ok(BackendTlsClient {
            http1: TlsConnector::from(Arc::new(http1)),
            http2: TlsConnector::from(Arc::new(http2)),
        })
    }

    /// A session, and whether it is to be HTTP/2, which is offered if `http2`. `name` is what the
    /// certificate must be for; without one, the address.
    ///
    /// # Errors
    /// [`BackendFailure::TlsCertificate`] if it was the certificate, else `TlsHandshake`.
    pub(in crate::l7) async fn handshake(
        &self,
        stream: TcpStream,
        name: Option<&str>,
        address: IpAddr,
        http2: bool,
    ) -> Result<(TlsStream<TcpStream>, bool), BackendFailure> {
        let name = match name {
            Some(name) => {
                ServerName::try_from(name.to_owned()).map_err(|_| BackendFailure::TlsCertificate)?
            }
            None => ServerName::IpAddress(address.into()),
        };
        let connector = if http2 { &self.http2 } else { &self.http1 };
        let stream = connector
            .connect(name, stream)
            .await
            .map_err(|error| class_of(&error))?;
        let is_http2 = stream.get_ref().1.alpn_protocol() == Some(ALPN_H2);
        Ok((stream, is_http2))
    }
}

/// The files that a change of has to be noticed.
pub(super) fn files_of(config: &BackendTlsConfig) -> Vec<PathBuf> {
    [&config.ca_file, &config.certificate_file, &config.key_file]
        .into_iter()
        .flatten()
        .cloned()
        .collect()
}

fn class_of(error: &io::Error) -> BackendFailure {
    let tls = error
        .get_ref()
        .and_then(|error| error.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(_)) => BackendFailure::TlsCertificate,
        _ => BackendFailure::TlsHandshake,
    }
}
