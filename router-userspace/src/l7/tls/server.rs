//! TLS of the listeners: what a handshake is done with, put together from configuration and files.
//!
//! Provider and cipher suites are rustls' own choice of ring; 0-RTT is off, since what it carries can be
//! replayed. Sessions are resumed by tickets that clients keep (RFC 8446 §4.6.1, RFC 5077), under keys
//! of this process that change every six hours: any worker resumes what any other began, and none keeps a table.

use std::sync::Arc;

use anyhow::Context;
#[cfg(feature = "http3")]
use quinn::crypto::rustls::QuicServerConfig;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ProducesTickets, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};
use rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion};

use super::certificates::Certificates;
use crate::config::{ClientAuth, HttpTlsConfig, TlsVersion};

pub(in crate::l7) const ALPN_H2: &[u8] = b"h2";
pub(super) const ALPN_HTTP11: &[u8] = b"http/1.1";
#[cfg(feature = "http3")]
const ALPN_H3: &[u8] = b"h3";

/// What the listeners serve with until a file or the configuration changes.
pub(in crate::l7) struct TlsServer {
    pub config: Arc<ServerConfig>,
    /// The same for QUIC, if that is on.
    #[cfg(feature = "http3")]
    pub http3: Option<Arc<QuicServerConfig>>,
    certificates: Arc<Certificates>,
}

impl TlsServer {
    /// `client_roots` are those of `client_ca_file`. Whoever gave tickets to clients under other roots
    /// brings other `tickets`, for a ticket stands for the certificate that was shown for it.
    ///
    /// # Errors
    /// The roots cannot be verified with.
    pub(super) fn new(
        config: &HttpTlsConfig,
        certificates: Certificates,
        client_roots: Option<&Arc<RootCertStore>>,
        tickets: Arc<dyn ProducesTickets>,
    ) -> anyhow::Result<TlsServer> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = client_verifier(config.client_auth, client_roots)?;
        let certificates = Arc::new(certificates);
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions(config.min_version))
            .context("choose TLS versions")?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::clone(&certificates) as _);
        server.alpn_protocols = match config.http2 {
            true => vec![ALPN_H2.to_vec(), ALPN_HTTP11.to_vec()],
            false => vec![ALPN_HTTP11.to_vec()],
        };
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.ticketer = tickets;
        server.max_early_data_size = 0;
        Ok(TlsServer {
            #[cfg(feature = "http3")]
            http3: match config.http3 {
                true => Some(Arc::new(quic(&server)?)),
                false => None,
            },
            config: Arc::new(server),
            certificates,
        })
    }

    /// Whether there is a certificate for a client that names this host.
    pub(in crate::l7) fn serves(&self, host: Option<&str>) -> bool {
        self.certificates.serves(host)
    }

    /// Whether a client that named `sni` would have been shown another certificate for `host`.
    pub(in crate::l7) fn separates(&self, sni: &str, host: &str) -> bool {
        self.certificates.separates(sni, host)
    }
}

#[cfg(feature = "http3")]
fn quic(server: &ServerConfig) -> anyhow::Result<QuicServerConfig> {
    let mut server = server.clone();
    server.alpn_protocols = vec![ALPN_H3.to_vec()];
    QuicServerConfig::try_from(server).context("choose cipher suites for QUIC")
}

/// Keys of session tickets.
///
/// # Errors
/// The system has no random numbers.
pub(super) fn tickets() -> anyhow::Result<Arc<dyn ProducesTickets>> {
    rustls::crypto::ring::Ticketer::new().context("make keys of session tickets")
}

fn versions(min: TlsVersion) -> &'static [&'static SupportedProtocolVersion] {
    static FROM_TLS12: [&SupportedProtocolVersion; 2] = [&TLS12, &TLS13];
    match min {
        TlsVersion::Tls12 => &FROM_TLS12,
        TlsVersion::Tls13 => &FROM_TLS12[1..],
    }
}

fn client_verifier(
    auth: ClientAuth,
    roots: Option<&Arc<RootCertStore>>,
) -> anyhow::Result<Arc<dyn ClientCertVerifier>> {
    let (Some(roots), ClientAuth::Request | ClientAuth::Require) = (roots, auth) else {
        return Ok(WebPkiClientVerifier::no_client_auth());
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), provider);
    match auth {
        ClientAuth::Require => builder.build(),
        ClientAuth::Request | ClientAuth::None => builder.allow_unauthenticated().build(),
    }
    .context("http.tls.client_ca_file")
}
