//! `[http]`: layer 7's listeners, timeouts, limits and defaults.
//!
//! What one route may have otherwise is in [`crate::route::policy`].

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::ensure;
use http::HeaderName;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::config::{ensure_at_least_one, ensure_positive};

mod balance;
mod limits;
mod observe;
mod route_services;
mod tls;

pub use balance::{HttpEjection, HttpRetries, HttpSticky, HttpZoneBalance};
pub use limits::HttpRate;
pub use observe::{
    AccessLogFormat, CollectorUrl, ForwardedHeader, HttpAccessLog, HttpMetrics, HttpTracing,
    RedactQuery, SyslogAddress, TraceMode,
};
pub use route_services::HttpRouteServices;
pub use tls::{BackendTlsConfig, CertificateFiles, ClientAuth, HttpTlsConfig, TlsVersion};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Addresses that speak HTTP in clear. Layer 7 is off if this and `tls.listen` are empty.
    pub listen: Vec<SocketAddr>,
    /// Runtimes, each on a thread of its own; 0 is one per core.
    pub workers: usize,
    pub balance: HttpBalance,
    /// Whether requests to backends on this host, and their responses, go from socket to socket, past
    /// TCP. For backends that are trusted alone: see docs/sockmap.md.
    pub sockmap: bool,
    /// This gateway's availability zone, as registrations name theirs.
    pub zone: Option<String>,
    pub balance_zone: HttpZoneBalance,
    /// How long a backend that joins others takes to get its whole share; 0 is off.
    #[serde(with = "humantime_serde")]
    pub slow_start: Duration,
    /// Peers whose `X-Forwarded-*` are kept and extended; those of others are replaced.
    pub trusted_proxies: Vec<IpNet>,
    /// Whether connections of `trusted_proxies` begin with a PROXY header, on every listener.
    pub proxy_protocol: ProxyProtocol,
    /// The PROXY header that connections to backends begin with, which are then of one client each.
    pub backend_proxy_protocol: BackendProxyProtocol,
    /// The header `Forwarded` of requests.
    pub forwarded: ForwardedHeader,
    /// Requests get `X-Forwarded-Port`, the port that the client dialed.
    pub forwarded_port: bool,
    /// The gateway's name in `Via`, of requests and responses; unset: it is in none.
    pub via: Option<String>,
    pub forwarded_client_cert: ForwardedClientCert,
    pub forwarded_client_cert_format: ClientCertFormat,
    pub timeouts: HttpTimeouts,
    pub limits: HttpLimits,
    pub tls: HttpTlsConfig,
    pub retries: HttpRetries,
    pub ejection: HttpEjection,
    pub sticky: HttpSticky,
    pub backend_tls: BackendTlsConfig,
    pub access_log: HttpAccessLog,
    pub metrics: HttpMetrics,
    pub tracing: HttpTracing,
    pub route_services: HttpRouteServices,
}

/// PROXY protocol towards clients, version 1 or 2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProxyProtocol {
    #[default]
    Off,
    /// From `trusted_proxies`, a header or none; others that send one are closed.
    Accept,
    /// From everybody, so that others than `trusted_proxies` are closed.
    Require,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendProxyProtocol {
    #[default]
    Off,
    V1,
    V2,
}

/// What becomes of `X-Forwarded-Client-Cert`. The words are gorouter's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ForwardedClientCert {
    /// Kept from `trusted_proxies`, as `X-Forwarded-*` are.
    #[default]
    AlwaysForward,
    /// Kept from clients that have shown a certificate.
    Forward,
    /// Replaced by the certificate that the client has shown, or removed.
    SanitizeSet,
}

/// How `sanitize_set` writes a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientCertFormat {
    /// DER in base64: PEM without its armour, as gorouter does.
    #[default]
    Base64,
    /// `Hash=SHA256;Subject="DN"`, as Envoy does.
    HashSubject,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HttpBalance {
    #[default]
    RoundRobin,
    LeastConnections,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpTimeouts {
    /// From an accepted connection to the end of its PROXY header. The protocol's authors advise 3 s at
    /// least, so that one lost segment is sent again in time.
    #[serde(with = "humantime_serde")]
    pub proxy_header: Duration,
    /// From there to the end of a client's TLS handshake.
    #[serde(with = "humantime_serde")]
    pub tls_handshake: Duration,
    /// To a backend, for each attempt.
    #[serde(with = "humantime_serde")]
    pub connect: Duration,
    /// A client's connection without a request.
    #[serde(with = "humantime_serde")]
    pub idle: Duration,
    /// From the first byte of a request's head to its last.
    #[serde(with = "humantime_serde")]
    pub request_headers: Duration,
    /// From the request's last byte sent to the backend until the head of its response.
    #[serde(with = "humantime_serde")]
    pub response_headers: Duration,
    /// Without a byte in a body, in either direction; upgraded connections are exempt.
    #[serde(with = "humantime_serde")]
    pub body_idle: Duration,
    /// A kept-alive backend connection without a request. Shorter than what backends use, so that
    /// the gateway closes first.
    #[serde(with = "humantime_serde")]
    pub backend_idle: Duration,
    /// A request waiting for a backend that may take one more.
    #[serde(with = "humantime_serde")]
    pub queue: Duration,
    /// How long the gateway waits for a client, in all of one body, before `limits.min_bytes_per_second`
    /// is asked of it.
    #[serde(with = "humantime_serde")]
    pub slow_grace: Duration,
    /// How long the gateway serves on after SIGUSR1, while `/readyz` says that it drains.
    #[serde(with = "humantime_serde")]
    pub drain_wait: Duration,
    /// From there, or from SIGTERM, how long open requests and upgraded connections may take to end.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpLimits {
    /// Client connections of one worker; further ones wait in the listen queue.
    pub connections: usize,
    /// Bytes of a request's head; more is answered 431.
    pub request_header_bytes: usize,
    pub request_headers: usize,
    /// Requests at once on one connection of HTTP/2 or HTTP/3.
    pub concurrent_streams: u32,
    /// Bytes of a request target; more is answered 414.
    pub uri_bytes: usize,
    /// Kept-alive connections to one backend, of one worker.
    pub idle_per_backend: usize,
    /// Attempts of one request, the first included.
    pub attempts: usize,
    /// Requests in flight to one backend, over all workers, upgraded connections among them; 0: no limit.
    pub requests_per_backend: u32,
    /// Requests of one route that wait for a backend below its limit, of one worker; more are answered 503.
    pub queue: usize,
    /// Connections of one client address, over all workers, those of trusted proxies apart; further ones
    /// are closed. An IPv6 client is a /64. 0: no limit.
    pub connections_per_client: u32,
    /// Requests of one connection, which then ends; 0: no limit.
    pub requests_per_connection: u32,
    /// Bytes of a request's body; more is answered 413. 0: no limit.
    pub request_body_bytes: u64,
    /// Which a client has to send of a request's body, and take of a response, on the average of the time
    /// that the gateway waits for it; 0: no limit. Streams of gRPC and upgraded connections are exempt.
    pub min_bytes_per_second: u32,
    /// PING, SETTINGS, PRIORITY, RST_STREAM and WINDOW_UPDATE frames of a connection of HTTP/2 in ten
    /// seconds, beyond what its requests and their bytes account for; then it is closed. 0: no limit.
    pub control_frames: u32,
    /// New requests of one client address, over all workers and routes; more are answered 429.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_rate: Option<HttpRate>,
}

impl Default for HttpConfig {
    fn default() -> HttpConfig {
        HttpConfig {
            listen: vec![SocketAddr::from(([0, 0, 0, 0], 80))],
            workers: 0,
            balance: HttpBalance::RoundRobin,
            sockmap: false,
            zone: None,
            balance_zone: HttpZoneBalance::None,
            slow_start: Duration::ZERO,
            trusted_proxies: Vec::new(),
            proxy_protocol: ProxyProtocol::Off,
            backend_proxy_protocol: BackendProxyProtocol::Off,
            forwarded: ForwardedHeader::Off,
            forwarded_port: false,
            via: None,
            forwarded_client_cert: ForwardedClientCert::AlwaysForward,
            forwarded_client_cert_format: ClientCertFormat::Base64,
            timeouts: HttpTimeouts::default(),
            limits: HttpLimits::default(),
            tls: HttpTlsConfig::default(),
            retries: HttpRetries::default(),
            ejection: HttpEjection::default(),
            sticky: HttpSticky::default(),
            backend_tls: BackendTlsConfig::default(),
            access_log: HttpAccessLog::default(),
            metrics: HttpMetrics::default(),
            tracing: HttpTracing::default(),
            route_services: HttpRouteServices::default(),
        }
    }
}

impl Default for HttpTimeouts {
    fn default() -> HttpTimeouts {
        HttpTimeouts {
            proxy_header: Duration::from_secs(3),
            tls_handshake: Duration::from_secs(10),
            connect: Duration::from_secs(5),
            idle: Duration::from_secs(60),
            request_headers: Duration::from_secs(60),
            response_headers: Duration::from_secs(900),
            body_idle: Duration::from_secs(900),
            backend_idle: Duration::from_secs(50),
            queue: Duration::from_secs(5),
            drain_wait: Duration::ZERO,
            slow_grace: Duration::from_secs(30),
            drain: Duration::from_secs(20),
        }
    }
}

impl Default for HttpLimits {
    fn default() -> HttpLimits {
        HttpLimits {
            connections: 16_384,
            request_header_bytes: 32 * 1024,
            request_headers: 100,
            concurrent_streams: 100,
            uri_bytes: 16 * 1024,
            idle_per_backend: 128,
            attempts: 2,
            requests_per_backend: 0,
            queue: 128,
            connections_per_client: 0,
            requests_per_connection: 0,
            request_body_bytes: 0,
            min_bytes_per_second: 100,
            control_frames: 1000,
            client_rate: None,
        }
    }
}

impl HttpConfig {
    /// Whether layer 7 listens anywhere.
    pub fn is_on(&self) -> bool {
        !self.listen.is_empty() || !self.tls.listen.is_empty()
    }

    pub(super) fn validate(&self) -> anyhow::Result<()> {
        let HttpTimeouts {
            proxy_header,
            tls_handshake,
            connect,
            idle,
            request_headers,
            response_headers,
            body_idle,
            backend_idle,
            slow_grace,
            queue: _,
            drain_wait: _,
            drain: _,
        } = self.timeouts;
        ensure_positive(&[
            ("http.timeouts.proxy_header", proxy_header),
            ("http.timeouts.tls_handshake", tls_handshake),
            ("http.timeouts.connect", connect),
            ("http.timeouts.idle", idle),
            ("http.timeouts.request_headers", request_headers),
            ("http.timeouts.response_headers", response_headers),
            ("http.timeouts.body_idle", body_idle),
            ("http.timeouts.backend_idle", backend_idle),
            ("http.timeouts.slow_grace", slow_grace),
        ])?;
        ensure_at_least_one(&[
            ("http.limits.connections", self.limits.connections),
            ("http.limits.request_headers", self.limits.request_headers),
            ("http.limits.attempts", self.limits.attempts),
            (
                "http.limits.concurrent_streams",
                self.limits.concurrent_streams as usize,
            ),
        ])?;
        // hyper refuses a read buffer below its minimum of 8 KiB.
        ensure!(
            self.limits.request_header_bytes >= 8192,
            "http.limits.request_header_bytes must be at least 8192"
        );
        if let Some(rate) = self.limits.client_rate {
            rate.validate("http.limits.client_rate")?;
        }
        ensure!(
            self.proxy_protocol == ProxyProtocol::Off || !self.trusted_proxies.is_empty(),
            "http.proxy_protocol needs http.trusted_proxies, whose headers are believed"
        );
        self.tls.validate()?;
        ensure!(
            self.proxy_protocol != ProxyProtocol::Require || !self.tls.http3,
            "http.tls.http3 has no PROXY headers, which http.proxy_protocol requires"
        );
        self.backend_tls.validate()?;
        self.route_services.validate()?;
        ensure!(
            self.balance_zone == HttpZoneBalance::None || self.zone.is_some(),
            "http.balance_zone needs http.zone"
        );
        self.retries.validate()?;
        self.ejection.validate()?;
        self.sticky.validate()?;
        self.access_log.validate()?;
        self.tracing.validate()?;
        if let Some(via) = &self.via {
            // A pseudonym is a token (RFC 9110 §7.6.3), as names of headers are.
            ensure!(
                HeaderName::from_bytes(via.as_bytes()).is_ok(),
                "http.via: {via:?} is no token"
            );
        }
        Ok(())
    }
}
