//! TLS towards backends that registered a `tls_port`.
//!
//! Certificates are verified against `http.backend_tls.ca_file` alone; the system's roots vouch
//! for the public web, not for a platform's instances. Without the file there is nothing to verify
//! with, and requests for such backends are answered with 503.

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::l7::error::BackendFailure;

#[derive(Clone)]
pub(super) struct BackendTlsClient {
    connector: TlsConnector,
}

impl BackendTlsClient {
    /// # Errors
    /// Names the file if it cannot be read or holds no certificate.
    pub(super) fn load(ca_file: &Path) -> anyhow::Result<BackendTlsClient> {
        let what = || format!("http.backend_tls.ca_file {}", ca_file.display());
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(ca_file).with_context(what)? {
            roots
                .add(certificate.with_context(what)?)
                .with_context(what)?;
        }
        ensure!(!roots.is_empty(), "{}: no certificate in it", what());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("choose TLS versions")?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(BackendTlsClient {
            connector: TlsConnector::from(Arc::new(config)),
        })
    }

    /// `name` is what the certificate must be for; without one, the address.
    pub(super) async fn handshake(
        &self,
        stream: TcpStream,
        name: Option<&str>,
        address: IpAddr,
    ) -> Result<TlsStream<TcpStream>, BackendFailure> {
        let name = match name {
            Some(name) => {
                ServerName::try_from(name.to_owned()).map_err(|_| BackendFailure::TlsCertificate)?
            }
            None => ServerName::IpAddress(address.into()),
        };
        self.connector
            .connect(name, stream)
            .await
            .map_err(|error| class_of(&error))
    }
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
