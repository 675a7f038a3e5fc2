//! From an accepted connection to one that carries requests: its PROXY header, then TLS.
//!
//! A worker calls [`Handshakes::establish`] in the connection's own task. Both steps have a timeout,
//! and every failure a name, by which it is counted here; the caller only drops the connection. The PROXY
//! header is peeked at before it is read, so that not a byte behind it is consumed.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use nix::sys::socket::{MsgFlags, recv};
use rustls::HandshakeKind;
use rustls::server::Acceptor;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use crate::config::{ClientCertFormat, ProxyProtocol};
use crate::l7::client_cert;
use crate::l7::metrics::WorkerMetrics;
use crate::l7::proxy_protocol::{self, Addresses, PEEK_BYTES, Parsed};
use crate::l7::stream::Stream;
use crate::l7::tls::{ALPN_H2, Tls};

/// TLS handshakes of one worker at once, counted from the client's whole hello, which is what costs
/// a signature. Later ones wait, as long as `http.timeouts.tls_handshake` lets them.
pub(super) const MAX_TLS_HANDSHAKES: usize = 1024;

/// A TLS record with the fatal alert `unrecognized_name` (RFC 8446 §5.1, §6; RFC 6066 §3).
const UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

/// What a listener's connections begin with, after a PROXY header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ListenerKind {
    Http,
    Https,
}

/// What the settings say of a connection before its first request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub proxy_protocol: ProxyProtocol,
    /// The peer is in `http.trusted_proxies`, so its PROXY header is believed.
    pub trusted: bool,
    pub proxy_header: Duration,
    pub tls_handshake: Duration,
    pub client_cert_format: ClientCertFormat,
}

/// A connection that is good for requests.
#[derive(Debug)]
pub(super) struct Established {
    pub stream: Stream,
    /// The client, and what it dialed: by the PROXY header if there is one, else by the socket.
    pub peer: SocketAddr,
    pub local: SocketAddr,
    pub tls: Option<Rc<TlsSession>>,
}

/// What a TLS handshake came to.
#[derive(Debug)]
pub(super) struct TlsSession {
    /// The host that the client named, in lower case.
    pub sni: Option<Box<str>>,
    /// The client speaks HTTP/2 from its first byte.
    pub alpn_h2: bool,
    /// The certificate that the client has shown, verified, as [`client_cert::value`] has it.
    pub client_certificate: Option<HeaderValue>,
    /// `TLSv1_3` and the like, for logs.
    pub version: &'static str,
    pub cipher: &'static str,
}

/// Why a connection ended before its first request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HandshakeFailure {
    /// The client left, or its connection broke.
    Closed,
    ProxyHeaderTimeout,
    /// `http.proxy_protocol` requires one.
    ProxyHeaderMissing,
    ProxyHeaderInvalid(&'static str),
    /// The peer is not in `http.trusted_proxies`.
    ProxyHeaderUntrusted,
    TlsTimeout,
    /// What the client sent is not TLS, or breaks its rules.
    TlsMalformed,
    /// No version, cipher suite or application protocol in common.
    TlsIncompatible,
    /// There is no certificate for the host that the client names, under `strict_sni`.
    TlsUnknownName,
    TlsClientCertificateMissing,
    TlsClientCertificateInvalid,
    /// The client does not take the gateway's certificate, or ended the handshake with another alert.
    TlsRefusedByClient,
}

/// Labels of the metric that counts failures.
pub(super) const REASONS: [&str; 12] = [
    "closed",
    "proxy_header_timeout",
    "proxy_header_missing",
    "proxy_header_invalid",
    "proxy_header_untrusted",
    "tls_timeout",
    "tls_malformed",
    "tls_incompatible",
    "tls_unknown_name",
    "tls_client_certificate_missing",
    "tls_client_certificate_invalid",
    "tls_refused_by_client",
];

impl HandshakeFailure {
    /// Index in [`REASONS`].
    pub(super) fn reason(self) -> usize {
        match self {
            HandshakeFailure::Closed => 0,
            HandshakeFailure::ProxyHeaderTimeout => 1,
            HandshakeFailure::ProxyHeaderMissing => 2,
            HandshakeFailure::ProxyHeaderInvalid(_) => 3,
            HandshakeFailure::ProxyHeaderUntrusted => 4,
            HandshakeFailure::TlsTimeout => 5,
            HandshakeFailure::TlsMalformed => 6,
            HandshakeFailure::TlsIncompatible => 7,
            HandshakeFailure::TlsUnknownName => 8,
            HandshakeFailure::TlsClientCertificateMissing => 9,
            HandshakeFailure::TlsClientCertificateInvalid => 10,
            HandshakeFailure::TlsRefusedByClient => 11,
        }
    }
}

/// One worker's handshakes.
pub(super) struct Handshakes {
    tls: Arc<Tls>,
    metrics: Arc<WorkerMetrics>,
    slots: Semaphore,
}

impl Handshakes {
    pub(super) fn new(tls: Arc<Tls>, metrics: Arc<WorkerMetrics>) -> Handshakes {
        Handshakes {
            tls,
            metrics,
            slots: Semaphore::new(MAX_TLS_HANDSHAKES),
        }
    }

    /// Takes a connection of `peer` to where its requests begin.
    ///
    /// # Errors
    /// Already counted and logged; where TLS has an alert for it, the client was told.
    pub(super) async fn establish(
        &self,
        kind: ListenerKind,
        rules: &Rules,
        stream: TcpStream,
        peer: SocketAddr,
    ) -> Result<Established, HandshakeFailure> {
        let established = self.try_establish(kind, rules, stream, peer).await;
        if let Err(failure) = &established {
            self.metrics.handshake_failures[failure.reason()].add(1);
            tracing::debug!(%peer, reason = ?failure, "connection not established");
        }
        established
    }

    async fn try_establish(
        &self,
        kind: ListenerKind,
        rules: &Rules,
        mut stream: TcpStream,
        peer: SocketAddr,
    ) -> Result<Established, HandshakeFailure> {
        // What only some connections pass through is boxed: the task keeps room for the largest step.
        let proxied = match rules.proxy_protocol {
            ProxyProtocol::Off => Addresses::Own,
            _ => Box::pin(proxy_header(rules, &mut stream)).await?,
        };
        let (peer, local) = match proxied {
            Addresses::Of {
                source,
                destination,
            } => (source, destination),
            Addresses::Own => (peer, stream.local_addr().map_err(closed)?),
        };
        let (stream, tls) = match kind {
            ListenerKind::Http => (Stream::Tcp(stream), None),
            ListenerKind::Https => {
                let deadline = Instant::now() + rules.tls_handshake;
                let handshake = Box::pin(self.accept_tls(stream, rules.client_cert_format));
                let (stream, session) = tokio::time::timeout_at(deadline, handshake)
                    .await
                    .map_err(|_| HandshakeFailure::TlsTimeout)??;
                (Stream::Tls(Box::new(stream.into())), Some(Rc::new(session)))
            }
        };
        Ok(Established {
            stream,
            peer,
            local,
            tls,
        })
    }

    async fn accept_tls(
        &self,
        stream: TcpStream,
        format: ClientCertFormat,
    ) -> Result<(TlsStream<TcpStream>, TlsSession), HandshakeFailure> {
        let server = self.tls.server().expect("a TLS listener has certificates");
        let hello = LazyConfigAcceptor::new(Acceptor::default(), stream);
        let mut hello = hello.await.map_err(|error| class_of(&error))?;
        if !server.serves(hello.client_hello().server_name()) {
            // A client that does not wait for its alert misses nothing else.
            let _ = hello.io.write_all(&UNRECOGNIZED_NAME).await;
            return Err(HandshakeFailure::TlsUnknownName);
        }
        if self.slots.available_permits() == 0 {
            self.metrics.tls_handshakes_full.add(1);
        }
        let _slot = self.slots.acquire().await.expect("slots are never closed");
        let stream = hello
            .into_stream(Arc::clone(&server.config))
            .await
            .map_err(|error| class_of(&error))?;
        let session = session(stream.get_ref().1, format);
        match stream.get_ref().1.handshake_kind() {
            Some(HandshakeKind::Resumed) => self.metrics.tls_resumptions.add(1),
            _ => self.metrics.tls_handshakes.add(1),
        }
        Ok((stream, session))
    }
}

fn session(connection: &rustls::ServerConnection, format: ClientCertFormat) -> TlsSession {
    let leaf = connection.peer_certificates().and_then(<[_]>::first);
    let version = connection.protocol_version();
    let cipher = connection.negotiated_cipher_suite();
    TlsSession {
        sni: connection.server_name().map(Into::into),
        alpn_h2: connection.alpn_protocol() == Some(ALPN_H2),
        client_certificate: leaf.map(|certificate| client_cert::value(format, certificate)),
        version: version.and_then(|it| it.as_str()).unwrap_or(""),
        cipher: cipher.and_then(|it| it.suite().as_str()).unwrap_or(""),
    }
}

fn class_of(error: &io::Error) -> HandshakeFailure {
    let tls = error
        .get_ref()
        .and_then(|error| error.downcast_ref::<rustls::Error>());
    match tls {
        None => HandshakeFailure::Closed,
        Some(rustls::Error::PeerIncompatible(_) | rustls::Error::NoApplicationProtocol) => {
            HandshakeFailure::TlsIncompatible
        }
        Some(rustls::Error::NoCertificatesPresented) => {
            HandshakeFailure::TlsClientCertificateMissing
        }
        Some(rustls::Error::InvalidCertificate(_)) => HandshakeFailure::TlsClientCertificateInvalid,
        Some(rustls::Error::AlertReceived(_)) => HandshakeFailure::TlsRefusedByClient,
        Some(_) => HandshakeFailure::TlsMalformed,
    }
}

fn closed(_: io::Error) -> HandshakeFailure {
    HandshakeFailure::Closed
}

/// Whose connection it is, once its PROXY header, if it has one, is read.
///
/// Where none is required and nothing comes in time, the client is one that waits before it asks.
async fn proxy_header(
    rules: &Rules,
    stream: &mut TcpStream,
) -> Result<Addresses, HandshakeFailure> {
    let required = rules.proxy_protocol == ProxyProtocol::Require;
    if required && !rules.trusted {
        return Err(HandshakeFailure::ProxyHeaderUntrusted);
    }
    let mut peeked = 0;
    let header = read_proxy_header(stream, rules.trusted, &mut peeked);
    match tokio::time::timeout(rules.proxy_header, header).await {
        Ok(Ok(None)) if required => Err(HandshakeFailure::ProxyHeaderMissing),
        Ok(header) => header.map(|addresses| addresses.unwrap_or(Addresses::Own)),
        Err(_) if !required && peeked == 0 => Ok(Addresses::Own),
        Err(_) => Err(HandshakeFailure::ProxyHeaderTimeout),
    }
}

/// None if the connection begins with something else. `peeked` is how many bytes were seen.
async fn read_proxy_header(
    stream: &mut TcpStream,
    trusted: bool,
    peeked: &mut usize,
) -> Result<Option<Addresses>, HandshakeFailure> {
    let mut buffer = [0; PEEK_BYTES];
    let (mut left, addresses) = loop {
        *peeked = peek_more(stream, &mut buffer, *peeked).await?;
        match proxy_protocol::parse(&buffer[..*peeked]) {
            Parsed::Incomplete => {}
            Parsed::Absent => return Ok(None),
            Parsed::Header { .. } | Parsed::Invalid(_) if !trusted => {
                return Err(HandshakeFailure::ProxyHeaderUntrusted);
            }
            Parsed::Header { len, addresses } => break (len, addresses),
            Parsed::Invalid(reason) => return Err(HandshakeFailure::ProxyHeaderInvalid(reason)),
        }
    };
    while left > 0 {
        let len = left.min(buffer.len());
        let read = stream.read(&mut buffer[..len]).await.map_err(closed)?;
        if read == 0 {
            return Err(HandshakeFailure::Closed);
        }
        left -= read;
    }
    Ok(Some(addresses))
}

/// Waits until there are more than `known` bytes to read, and copies them without reading them.
async fn peek_more(
    stream: &TcpStream,
    buffer: &mut [u8],
    known: usize,
) -> Result<usize, HandshakeFailure> {
    let peek = || {
        let peeked = recv(stream.as_raw_fd(), buffer, MsgFlags::MSG_PEEK)?;
        // Readiness stands while bytes wait; this makes tokio wait for the next ones.
        match peeked == known && peeked > 0 {
            true => Err(io::ErrorKind::WouldBlock.into()),
            false => Ok(peeked),
        }
    };
    match stream.async_io(Interest::READABLE, peek).await {
        Ok(0) | Err(_) => Err(HandshakeFailure::Closed),
        Ok(peeked) => Ok(peeked),
    }
}

#[cfg(test)]
mod tests;
