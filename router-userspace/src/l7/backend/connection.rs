//! Opening connections to a backend, and what drives them.
//!
//! HTTP/1.1 unless the backend was registered with `protocol: http2`: then HTTP/2, by ALPN over TLS
//! and by prior knowledge in clear (RFC 9113 §3.3). Each connection is driven by a task of its own
//! that ends with it.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use hyper::client::conn::{http1, http2};
use hyper::rt::Executor;
use hyper_util::rt::TokioIo;
use nix::errno::Errno;
use socket2::SockRef;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::oneshot;

use crate::l7::backend::BackendState;
use crate::l7::backend::io::BackendIo;
use crate::l7::body::RequestBody;
use crate::l7::error::{BackendFailure, Failure, GatewayFailure};
use crate::l7::informational::{Tap, TappedIo};
use crate::l7::liveness;
use crate::l7::sockmap;
use crate::l7::stream::Stream;
use crate::l7::tls::BackendTlsClient;
use crate::route::HttpProtocol;

const RESPONSE_HEADER_BYTES: usize = 64 * 1024;

/// Most bytes read from a backend at once, and buffered towards it. A connection gets there only
/// when its reads fill what it has; a body of 64 KiB then comes in one read with its head.
const BUFFER_BYTES: usize = 128 * 1024;

/// What a backend may send on one stream, and on all of a connection, before clients have taken it.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;

/// A connection that can take a request.
pub(in crate::l7) enum Connection {
    Http1(Http1),
    Http2(Http2),
}

/// A connection of HTTP/1.1, of one request at a time.
pub(in crate::l7) struct Http1 {
    pub sender: http1::SendRequest<RequestBody>,
    /// Where its task delivers the raw connection when it has switched protocols.
    pub upgrade: Rc<Cell<Option<oneshot::Sender<RawBackend>>>>,
    /// It has carried a request before, so the backend may be closing it at this moment.
    pub reused: bool,
    /// Who wants to know of interim responses.
    pub tap: Rc<Tap>,
    /// It may pass TCP by, and takes only requests that may.
    pub sockmap: bool,
}

/// What a request is going to do with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::l7) struct Purpose {
    /// It may switch protocols, which takes HTTP/1.1.
    pub upgrades: bool,
    /// It has neither a body nor an upgrade, as [`sockmap`] wants it, and `http.sockmap` is on.
    pub past_tcp: bool,
}

/// One stream of a connection of HTTP/2.
pub(in crate::l7) struct Http2 {
    pub sender: http2::SendRequest<RequestBody>,
    /// As of [`Http1::reused`].
    pub reused: bool,
    /// Counts the stream until it is dropped.
    streams: Rc<Cell<usize>>,
}

/// A backend connection after its 101: no longer HTTP.
pub(in crate::l7) struct RawBackend {
    pub io: BackendIo,
    /// What the backend sent behind the 101.
    pub read_ahead: Bytes,
}

/// A new connection. HTTP/2 is shared between requests.
pub(super) enum Opened {
    Http1(Http1),
    Http2(http2::SendRequest<RequestBody>),
}

impl Connection {
    pub(in crate::l7) fn reused(&self) -> bool {
        match self {
            Connection::Http1(connection) => connection.reused,
            Connection::Http2(stream) => stream.reused,
        }
    }
}

impl Http2 {
    pub(super) fn new(
        sender: http2::SendRequest<RequestBody>,
        streams: &Rc<Cell<usize>>,
        reused: bool,
    ) -> Http2 {
        streams.set(streams.get() + 1);
        Http2 {
            sender,
            reused,
            streams: Rc::clone(streams),
        }
    }
}

impl Drop for Http2 {
    fn drop(&mut self) {
        self.streams.set(self.streams.get() - 1);
    }
}

/// Opens a connection in the backend's protocol, unless its purpose asks for HTTP/1.1. A
/// `proxy_header` goes before everything else.
///
/// # Errors
/// Whose failure it is, and of what kind.
pub(super) async fn open(
    backend: &BackendState,
    purpose: Purpose,
    tls: Option<Arc<BackendTlsClient>>,
    proxy_header: Option<Vec<u8>>,
) -> Result<Opened, Failure> {
    let wants_http2 = backend.protocol() == HttpProtocol::Http2 && !purpose.upgrades;
    let past_tcp = purpose.past_tcp
        && !wants_http2
        && backend.tls().is_none()
        && sockmap::is_local(backend.address().ip());
    let (mut stream, sockmap) = connect(backend, past_tcp).await?;
    if let Some(header) = proxy_header {
        let written = stream.write_all(&header).await;
        written.map_err(|_| Failure::Backend(BackendFailure::Closed))?;
    }
    let (stream, http2) = match backend.tls() {
        None => (Stream::Tcp(stream), wants_http2),
        Some(wanted) => {
            let tls = tls.ok_or(Failure::Gateway(GatewayFailure::TlsRoots))?;
            let name = wanted.server_name.as_deref();
            let handshake = tls.handshake(stream, name, backend.address().ip(), wants_http2);
            let (stream, http2) = handshake.await.map_err(Failure::Backend)?;
            (Stream::Tls(Box::new(stream.into())), http2)
        }
    };
    let io = BackendIo::new(stream, sockmap);
    let opened = if http2 {
        open_http2(io).await.map(Opened::Http2)
    } else {
        open_http1(io, sockmap).await.map(Opened::Http1)
    };
    opened.map_err(|_| Failure::Backend(BackendFailure::Closed))
}

async fn open_http1(io: BackendIo, sockmap: bool) -> hyper::Result<Http1> {
    let tap = Rc::<Tap>::default();
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(BUFFER_BYTES)
        .max_header_size(RESPONSE_HEADER_BYTES)
        .handshake::<_, RequestBody>(TokioIo::new(TappedIo::new(io, &tap)))
        .await?;
    let upgrade = Rc::new(Cell::new(None));
    tokio::task::spawn_local(drive(connection, Rc::clone(&upgrade)));
    Ok(Http1 {
        sender,
        upgrade,
        reused: false,
        tap,
        sockmap,
    })
}

async fn open_http2(io: BackendIo) -> hyper::Result<http2::SendRequest<RequestBody>> {
    let (sender, connection) = http2::Builder::new(LocalTasks)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(RESPONSE_HEADER_BYTES as u32)
        .handshake(TokioIo::new(io))
        .await?;
    tokio::task::spawn_local(async move {
        // The error, if any, also reached the requests that were waiting.
        let _ = connection.await;
    });
    Ok(sender)
}

/// Carries requests and responses until the connection ends, and delivers it if it was upgraded.
async fn drive(
    mut connection: http1::Connection<TokioIo<TappedIo<BackendIo>>, RequestBody>,
    upgrade: Rc<Cell<Option<oneshot::Sender<RawBackend>>>>,
) {
    // The error, if any, also reached the request that was waiting.
    let ended = (&mut connection).await;
    if ended.is_ok()
        && let Some(deliver) = upgrade.take()
    {
        let parts = connection.into_parts();
        let raw = RawBackend {
            io: parts.io.into_inner().io,
            read_ahead: parts.read_buf,
        };
        // A request that is gone needs no tunnel.
        let _ = deliver.send(raw);
    }
}

/// The connection, and whether it may pass TCP by.
async fn connect(backend: &BackendState, past_tcp: bool) -> Result<(TcpStream, bool), Failure> {
    let socket = match backend.address() {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let socket = socket.map_err(|error| class_of(&error))?;
    let sockmap = past_tcp && sockmap::prepare(&socket);
    let connecting = socket.connect(backend.address());
    let stream = connecting.await.map_err(|error| class_of(&error))?;
    // A connection without these options still serves.
    let _ = stream.set_nodelay(true);
    let _ = liveness::keep_alive(SockRef::from(&stream));
    Ok((stream, sockmap))
}

/// What a failed connect(2), or the socket(2) before it, says and of whom.
fn class_of(error: &io::Error) -> Failure {
    let errno = error.raw_os_error().map(Errno::from_raw);
    match errno {
        Some(
            Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM | Errno::EADDRNOTAVAIL,
        ) => Failure::Gateway(GatewayFailure::Resources),
        Some(Errno::ECONNREFUSED | Errno::ECONNRESET) => Failure::Backend(BackendFailure::Refused),
        _ => Failure::Backend(BackendFailure::Unreachable),
    }
}

/// Spawns what hyper has to be done beside a connection of HTTP/2 on the worker's thread.
#[derive(Clone, Copy)]
struct LocalTasks;

impl<F: Future + 'static> Executor<F> for LocalTasks {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async move {
            future.await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::l7::shared::Shared;
    use crate::l7::tests::backend;

    #[tokio::test]
    async fn a_backend_that_vanishes_is_noticed() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let backend = backend(listener.local_addr().unwrap());
        let key = (backend.address, None, backend.protocol);
        let shared = Shared::new(1).backend(&key, tokio::time::Instant::now());
        let state = BackendState::new(&backend, 0, shared);
        let (stream, _) = connect(&state, false).await.unwrap();
        assert!(SockRef::from(&stream).keepalive().unwrap());
    }

    #[test]
    fn want_of_descriptors_and_ports_is_the_gateways_failure() {
        let class = |errno: Errno| class_of(&io::Error::from(errno));
        for errno in [Errno::EMFILE, Errno::ENOBUFS, Errno::EADDRNOTAVAIL] {
            let gateway = Failure::Gateway(GatewayFailure::Resources);
            assert_eq!(class(errno), gateway, "{errno}");
        }
        for (errno, failure) in [
            (Errno::ECONNREFUSED, BackendFailure::Refused),
            (Errno::EHOSTUNREACH, BackendFailure::Unreachable),
            (Errno::ENETUNREACH, BackendFailure::Unreachable),
        ] {
            assert_eq!(class(errno), Failure::Backend(failure), "{errno}");
        }
    }
}
