//! HTTP/3 to clients (RFC 9114) on the UDP ports of `http.tls.listen`: handshakes, and who may come in.
//!
//! Each worker has an endpoint of its own on each address, by a socket of its own (SO_REUSEPORT); see
//! [`socket`] for clients that change their address. Requests are served by [`crate::l7::connection`], as those of
//! HTTP/2 are; addresses come and go in [`listen`].

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::header::ALT_SVC;
use http::{HeaderMap, HeaderValue, Version};
use quinn::crypto::rustls::{HandshakeData, QuicServerConfig};
use quinn::{
    Connecting, ConnectionError, Endpoint, EndpointConfig, IdleTimeout, Incoming, ServerConfig,
    TokioRuntime, TransportConfig, ValidationTokenConfig, VarInt,
};
use ring::{hkdf, hmac};
use rustls::pki_types::CertificateDer;

use crate::config::ClientCertFormat;
use crate::l7::client::Client;
use crate::l7::client_cert;
use crate::l7::connection;
use crate::l7::handshake::{HandshakeFailure, MAX_TLS_HANDSHAKES, TlsSession};
use crate::l7::worker::{OpenConnection, Worker};

mod body;
pub(super) mod frames;
mod listen;
mod socket;
mod transport;

pub(super) use body::RequestBody;
pub(super) use listen::{Listener, Listeners, Wanted};
pub(super) use transport::{Accepted, Connection, SendStream};

/// What a client may send on one stream, and on all of them, before a backend has taken it.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;

/// What backends may have sent on all streams of a connection before the client has it.
const SEND_BUFFER_BYTES: u64 = 2 * 1024 * 1024;

/// Streams of a client beside its requests: three that HTTP/3 has, and some of kinds not known here.
const CONTROL_STREAMS: u32 = 8;

/// After how long a client that is not heard of is gone, and how often one without traffic is asked, so
/// that quiet streams stay. How long a connection may be without requests is `http.timeouts.idle`.
const SILENCE: Duration = Duration::from_secs(45);
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Handshakes of one endpoint from which on clients have to prove their address.
const RETRY_FROM: usize = 64;

/// Datagrams of a client whose handshake has not been looked at yet.
const WAITING_BYTES: u64 = 64 * 1024;

/// How long clients are told at the end of a drain that their connections end.
pub(super) const CLOSE: Duration = Duration::from_millis(100);

/// For how long a client may come by HTTP/3 without being told again.
const ALT_SVC_SECONDS: u32 = 24 * 60 * 60;

/// Secrets of one process, which all workers share.
pub(super) struct Keys {
    /// Of tokens that prove a client's address.
    token: Arc<hkdf::Prk>,
    reset: Arc<hmac::Key>,
}

impl Keys {
    fn new() -> Keys {
        let [token, reset] = [(); 2].map(|()| rand::random::<[u8; 64]>());
        Keys {
            token: Arc::new(hkdf::Salt::new(hkdf::HKDF_SHA256, &[]).extract(&token)),
            reset: Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &reset)),
        }
    }
}

/// What a worker knows of its HTTP/3.
#[derive(Default)]
pub(super) struct WorkerState {
    /// What clients are told, by the ports that are served on.
    offers: RefCell<Vec<(u16, HeaderValue)>>,
    /// Cloned for each handshake that is under way.
    handshakes: Rc<()>,
    /// Cloned for each connection.
    connections: Rc<()>,
}

impl WorkerState {
    pub(super) fn has_connections(&self) -> bool {
        Rc::strong_count(&self.connections) > 1
    }

    fn offer(&self, port: u16) {
        let value = format!("h3=\":{port}\"; ma={ALT_SVC_SECONDS}");
        let value = HeaderValue::try_from(value).expect("ASCII");
        self.offers.borrow_mut().push((port, value));
    }

    fn withdraw(&self, port: u16) {
        let mut offers = self.offers.borrow_mut();
        if let Some(at) = offers.iter().position(|(offered, _)| *offered == port) {
            offers.swap_remove(at);
        }
    }
}

/// Tells a client of TLS over TCP that it may come by HTTP/3, if it may. What a backend says of itself is
/// replaced then.
pub(super) fn advertise(client: &Client, version: Version, headers: &mut HeaderMap) {
    if client.tls.is_none() || version == Version::HTTP_3 {
        return;
    }
    let offers = client.worker.http3.offers.borrow();
    let port = client.local.port();
    if let Some((_, value)) = offers.iter().find(|(offered, _)| *offered == port) {
        headers.insert(ALT_SVC, value.clone());
    }
}

/// Accepts connections until the worker drains or the address is given up, and ends when there is none.
/// Who comes after that is refused, and so told to use TCP.
pub(super) async fn accept(worker: Rc<Worker>, listener: Listener) {
    let Listener {
        part,
        keys,
        mut open,
    } = listener;
    let opened = part
        .local_addr()
        .and_then(|local| Ok((local, endpoint(&worker, part, &keys)?)));
    let (local, endpoint) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            tracing::error!(%error, "HTTP/3 cannot be served");
            return;
        }
    };
    worker.http3.offer(local.port());
    while !worker.is_draining() {
        tokio::select! {
            // All may be dropped: what was not accepted stays in the endpoint's queue.
            () = worker.drain_notice() => {}
            // Nothing is ever sent: the other end is gone.
            _ = open.changed() => break,
            incoming = endpoint.accept() => match incoming {
                Some(incoming) => admit(&worker, &keys, incoming, local),
                None => {
                    worker.metrics.accept_errors.add(1);
                    tracing::error!(%local, "HTTP/3 has ended: its socket failed");
                    break;
                }
            }
        }
    }
    worker.http3.withdraw(local.port());
    let refuse = async {
        while let Some(incoming) = endpoint.accept().await {
            incoming.refuse();
        }
        std::future::pending().await
    };
    tokio::select! {
        () = refuse => {}
        () = endpoint.wait_idle() => {}
        () = worker.cut_notice() => {
            endpoint.close(VarInt::from_u32(0), b"");
            endpoint.wait_idle().await;
        }
    }
}

fn endpoint(worker: &Worker, part: socket::Part, keys: &Keys) -> std::io::Result<Endpoint> {
    let ids = part.connection_ids();
    let mut config = EndpointConfig::new(Arc::clone(&keys.reset) as _);
    config.cid_generator(move || Box::new(ids.clone()));
    let server = worker.tls.server().and_then(|tls| tls.http3.clone());
    let server = server.map(|crypto| server_config(worker, crypto, keys));
    let socket = part.open(Arc::clone(&worker.metrics))?;
    Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime))
}

/// What connections are accepted with from here on.
fn server_config(worker: &Worker, crypto: Arc<QuicServerConfig>, keys: &Keys) -> ServerConfig {
    let streams = worker.settings(|settings| settings.limits.concurrent_streams);
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(streams))
        .max_concurrent_uni_streams(VarInt::from_u32(CONTROL_STREAMS))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(SEND_BUFFER_BYTES)
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(Some(
            IdleTimeout::try_from(SILENCE).expect("less than 2^62 milliseconds"),
        ))
        .keep_alive_interval(Some(KEEP_ALIVE));
    let mut validation = ValidationTokenConfig::default();
    // Tokens for later connections could be used twice, for nobody remembers them.
    validation.sent(0);
    let mut config = ServerConfig::new(crypto, Arc::clone(&keys.token) as _);
    config
        .transport_config(Arc::new(transport))
        .validation_token_config(validation)
        .max_incoming(MAX_TLS_HANDSHAKES)
        .incoming_buffer_size(WAITING_BYTES)
        .incoming_buffer_size_total(WAITING_BYTES * MAX_TLS_HANDSHAKES as u64);
    config
}

/// Begins a handshake, or says why not.
fn admit(worker: &Rc<Worker>, keys: &Keys, incoming: Incoming, local: SocketAddr) {
    let handshakes = &worker.http3.handshakes;
    let under_way = Rc::strong_count(handshakes) - 1;
    let is_full = under_way >= MAX_TLS_HANDSHAKES;
    let always = worker.settings(|settings| settings.http3_retry);
    if !incoming.remote_address_validated() && (always || under_way >= RETRY_FROM) {
        worker.metrics.http3_retries.add(1);
        // One whose address is not validated may always be asked.
        let _ = incoming.retry();
        return;
    }
    worker.metrics.connections_accepted.add(1);
    if is_full {
        worker.metrics.tls_handshakes_full.add(1);
        return incoming.refuse();
    }
    if worker.is_full() {
        worker.metrics.connections_full.add(1);
        return incoming.refuse();
    }
    let Some(crypto) = worker.tls.server().and_then(|tls| tls.http3.clone()) else {
        return incoming.refuse();
    };
    let ip = incoming.local_ip().unwrap_or(local.ip());
    let local = SocketAddr::new(ip, local.port());
    let config = Arc::new(server_config(worker, crypto, keys));
    match incoming.accept_with(config) {
        Ok(connecting) => {
            let (worker, handshake) = (Rc::clone(worker), Rc::clone(handshakes));
            tokio::task::spawn_local(serve(worker, connecting, handshake, local));
        }
        Err(error) => count_failure(worker, failure(&error)),
    }
}

async fn serve(worker: Rc<Worker>, connecting: Connecting, handshake: Rc<()>, local: SocketAddr) {
    let open = OpenConnection::new(&worker);
    let counted = Rc::clone(&worker.http3.connections);
    let peer = connecting.remote_address();
    let (timeout, format) = worker.settings(|settings| {
        let timeout = settings.timeouts.tls_handshake;
        (timeout, settings.client_cert_format)
    });
    let connected = tokio::time::timeout(timeout, connecting).await;
    drop(handshake);
    let quic = match connected {
        Ok(Ok(quic)) => quic,
        Ok(Err(error)) => {
            tracing::debug!(%peer, %error, "QUIC connection not established");
            return count_failure(&worker, failure(&error));
        }
        Err(_) => return count_failure(&worker, HandshakeFailure::TlsTimeout),
    };
    worker.metrics.tls_handshakes.add(1);
    // Not before: until it has shook hands, anybody may send in a client's name.
    match worker.enter(peer.ip()) {
        Ok(place) => {
            let session = session(&quic, format);
            connection::serve_http3(&worker, quic, session, local).await;
            drop(place);
        }
        Err(_) => {
            let code = h3::error::Code::H3_EXCESSIVE_LOAD.value();
            quic.close(VarInt::from_u64(code).expect("codes are small"), b"");
        }
    }
    drop((open, counted));
}

fn session(quic: &quinn::Connection, format: ClientCertFormat) -> TlsSession {
    let data = quic.handshake_data();
    let data = data.and_then(|data| data.downcast::<HandshakeData>().ok());
    let shown = quic.peer_identity();
    let shown = shown.and_then(|it| it.downcast::<Vec<CertificateDer<'static>>>().ok());
    let leaf = shown.as_ref().and_then(|chain| chain.first());
    TlsSession {
        sni: data.and_then(|data| data.server_name).map(Into::into),
        alpn_h2: false,
        client_certificate: leaf.map(|certificate| client_cert::value(format, certificate)),
        // QUIC has no other (RFC 9001 §4.2); quinn does not tell the cipher suite.
        version: "TLSv1_3",
        cipher: "",
    }
}

fn count_failure(worker: &Worker, failure: HandshakeFailure) {
    worker.metrics.handshake_failures[failure.reason()].add(1);
}

/// TLS alerts are errors of QUIC from 0x100 on (RFC 9001 §4.8); their numbers are of RFC 8446 §6.
fn failure(error: &ConnectionError) -> HandshakeFailure {
    const ALERTS: u64 = 0x100;
    match error {
        ConnectionError::TransportError(error) => {
            match u64::from(error.code).wrapping_sub(ALERTS) {
                116 => HandshakeFailure::TlsClientCertificateMissing,
                42..=46 | 48 => HandshakeFailure::TlsClientCertificateInvalid,
                // rustls' alert where there is no certificate for the host.
                49 | 112 => HandshakeFailure::TlsUnknownName,
                40 | 70 | 120 => HandshakeFailure::TlsIncompatible,
                _ => HandshakeFailure::TlsMalformed,
            }
        }
        ConnectionError::ConnectionClosed(close) if u64::from(close.error_code) >= ALERTS => {
            HandshakeFailure::TlsRefusedByClient
        }
        ConnectionError::VersionMismatch => HandshakeFailure::TlsIncompatible,
        ConnectionError::TimedOut => HandshakeFailure::TlsTimeout,
        _ => HandshakeFailure::Closed,
    }
}
