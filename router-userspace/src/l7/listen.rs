//! Listening sockets: one for each worker on each address, so that the kernel spreads connections
//! and no worker waits for another.
//!
//! Those that another process listens on already, its predecessor or the service manager, are taken
//! over and never closed before they are empty: a connection waits in one socket's queue and nowhere
//! else. Where they are more than the workers, a worker accepts from several.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use anyhow::Context;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::sync::watch;

use crate::config::HttpConfig;
use crate::l7::handshake::ListenerKind;
use crate::l7::liveness;

/// Connections that wait to be accepted, for each worker; the kernel caps it at `somaxconn`.
const BACKLOG: i32 = 4096;

/// An address that is listened on.
#[derive(Clone)]
pub(super) struct Listening {
    configured: SocketAddr,
    /// With the port that was taken for port 0.
    pub local: SocketAddr,
    pub kind: ListenerKind,
    /// At least one for each worker.
    pub sockets: Arc<Vec<TcpListener>>,
    /// Dropped, with its clones, to accept no more.
    pub open: watch::Sender<()>,
}

impl Listening {
    /// Whether whoever accepts on one accepts on the other.
    pub(super) fn is_same(&self, other: &Listening) -> bool {
        (self.local, self.kind) == (other.local, other.kind)
    }
}

pub(super) fn is_other(before: &[Listening], after: &[Listening]) -> bool {
    before.len() != after.len()
        || before
            .iter()
            .zip(after)
            .any(|(before, after)| !before.is_same(after))
}

/// Every address of `http.listen` and then `http.tls.listen`, with the sockets that `before` or
/// `inherited` has for it, and others bound for `workers`. What is left of `inherited` is closed.
///
/// # Errors
/// As [`listen`].
pub(super) fn bind(
    before: &[Listening],
    config: &HttpConfig,
    mut inherited: Vec<TcpListener>,
    workers: usize,
) -> anyhow::Result<Vec<Listening>> {
    let in_clear = config.listen.iter().map(|it| (*it, ListenerKind::Http));
    let in_tls = config
        .tls
        .listen
        .iter()
        .map(|it| (*it, ListenerKind::Https));
    let mut listening = Vec::new();
    for (configured, kind) in in_clear.chain(in_tls) {
        if let Some(bound) = before.iter().find(|it| it.configured == configured) {
            let mut bound = bound.clone();
            if bound.kind != kind {
                bound.kind = kind;
                bound.open = watch::Sender::new(());
            }
            listening.push(bound);
            continue;
        }
        let of_address =
            inherited.extract_if(.., |it| it.local_addr().is_ok_and(|it| it == configured));
        let sockets = listen(configured, of_address.collect(), workers)?;
        listening.push(Listening {
            configured,
            local: sockets[0].local_addr()?,
            kind,
            sockets: Arc::new(sockets),
            open: watch::Sender::new(()),
        });
    }
    Ok(listening)
}

/// At least `count` sockets bound to one address: those `inherited`, and as many more as are missing.
/// Port 0 takes a free port, the same for all.
///
/// Beside inherited ones new ones are bound only; [`begin`] makes connections come to them.
///
/// # Errors
/// Names the address, also when another process listens on it.
fn listen(
    address: SocketAddr,
    inherited: Vec<TcpListener>,
    count: usize,
) -> anyhow::Result<Vec<TcpListener>> {
    let sockets = match inherited.is_empty() {
        true => bind_all(address, count),
        false => extend(inherited, count),
    };
    sockets.with_context(|| format!("listen on {address}"))
}

/// Has connections come to a socket, if they do not yet.
pub(super) fn begin(socket: &TcpListener) -> std::io::Result<()> {
    SockRef::from(socket).listen(BACKLOG)
}

fn extend(mut sockets: Vec<TcpListener>, count: usize) -> anyhow::Result<Vec<TcpListener>> {
    let inherited = sockets.len();
    let mut may_bind = true;
    for listener in &sockets {
        let socket = SockRef::from(listener);
        socket.set_nonblocking(true)?;
        options(&socket)?;
        // Set later, it would not count: the kernel groups sockets when they begin to listen.
        may_bind &= socket.reuse_port()?;
    }
    let bound = sockets[0].local_addr()?;
    while sockets.len() < count {
        let further = match may_bind {
            true => {
                let socket = socket(bound)?;
                socket.set_reuse_port(true)?;
                socket.bind(&bound.into())?;
                socket.into()
            }
            // Several workers accept from one queue.
            false => sockets[sockets.len() % inherited].try_clone()?,
        };
        sockets.push(further);
    }
    Ok(sockets)
}

fn bind_all(address: SocketAddr, count: usize) -> anyhow::Result<Vec<TcpListener>> {
    // The first socket is bound without SO_REUSEPORT, so that it fails where another process of the
    // same user listens with it; the kernel looks at the option again for each further socket.
    let first = socket(address)?;
    first.bind(&address.into())?;
    first.set_reuse_port(true)?;
    let bound = first.local_addr()?.as_socket().context("local address")?;
    let mut sockets = vec![first];
    for _ in 1..count {
        let socket = socket(bound)?;
        socket.set_reuse_port(true)?;
        socket.bind(&bound.into())?;
        sockets.push(socket);
    }
    for socket in &sockets {
        socket.listen(BACKLOG)?;
    }
    Ok(sockets.into_iter().map(TcpListener::from).collect())
}

/// Accepted connections inherit the options set here.
fn socket(address: SocketAddr) -> anyhow::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    // Connections of an earlier process in TIME_WAIT must not be in the way.
    socket.set_reuse_address(true)?;
    options(&socket)?;
    Ok(socket)
}

fn options(socket: &Socket) -> anyhow::Result<()> {
    socket.set_tcp_nodelay(true)?;
    liveness::keep_alive(SockRef::from(socket))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::net::TcpStream;

    use super::*;

    fn any_port() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    #[test]
    fn all_workers_share_one_free_port() {
        let listeners = listen(any_port(), Vec::new(), 3).unwrap();
        let addresses: Vec<_> = listeners
            .iter()
            .map(|it| it.local_addr().unwrap())
            .collect();
        assert_eq!(addresses.len(), 3);
        assert!(addresses.iter().all(|&address| address == addresses[0]));
    }

    #[test]
    fn a_busy_port_is_an_error_that_names_it() {
        let taken = listen(any_port(), Vec::new(), 2).unwrap();
        let address = taken[0].local_addr().unwrap();
        let error = listen(address, Vec::new(), 2).unwrap_err();
        assert!(
            format!("{error:#}").starts_with(&format!("listen on {address}: ")),
            "{error:#}"
        );
    }

    #[test]
    fn sockets_beside_inherited_ones_get_no_connection_before_they_begin() {
        let inherited = listen(any_port(), Vec::new(), 1).unwrap();
        let address = inherited[0].local_addr().unwrap();
        let sockets = listen(address, inherited, 3).unwrap();
        assert_eq!(sockets.len(), 3);
        let _clients: Vec<_> = (0..20)
            .map(|_| TcpStream::connect(address).unwrap())
            .collect();
        assert!((0..20).all(|_| sockets[0].accept().is_ok()));

        sockets.iter().for_each(|socket| begin(socket).unwrap());
        let _clients: Vec<_> = (0..200)
            .map(|_| TcpStream::connect(address).unwrap())
            .collect();
        // Each of three is left out by 200 connections once in 10^35 times.
        assert!(sockets.iter().all(|socket| socket.accept().is_ok()));
    }

    #[test]
    fn more_inherited_sockets_than_workers_are_all_kept() {
        let inherited = listen(any_port(), Vec::new(), 4).unwrap();
        let address = inherited[0].local_addr().unwrap();
        assert_eq!(listen(address, inherited, 2).unwrap().len(), 4);
    }

    #[test]
    fn a_socket_that_may_not_be_bound_beside_is_shared() {
        let inherited = TcpListener::bind(any_port()).unwrap();
        let address = inherited.local_addr().unwrap();
        let sockets = listen(address, vec![inherited], 3).unwrap();
        sockets.iter().for_each(|socket| begin(socket).unwrap());
        let _client = TcpStream::connect(address).unwrap();
        sockets[2].accept().unwrap();
        let error = sockets[0].accept().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }
}
