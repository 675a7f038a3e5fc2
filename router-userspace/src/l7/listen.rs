//! Listening sockets: one for each worker on each address, so that the kernel spreads connections
//! and no worker waits for another.

use std::net::{SocketAddr, TcpListener};

use anyhow::Context;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::l7::liveness;

/// Connections that wait to be accepted, for each worker; the kernel caps it at `somaxconn`.
const BACKLOG: i32 = 4096;

/// Binds `count` sockets to one address. Port 0 takes a free port, the same for all.
///
/// # Errors
/// Names the address, also when another process listens on it.
pub(super) fn listen(address: SocketAddr, count: usize) -> anyhow::Result<Vec<TcpListener>> {
    bind_all(address, count).with_context(|| format!("listen on {address}"))
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
    socket.set_tcp_nodelay(true)?;
    liveness::keep_alive(SockRef::from(&socket))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_workers_share_one_free_port() {
        let listeners = listen("127.0.0.1:0".parse().unwrap(), 3).unwrap();
        let addresses: Vec<_> = listeners
            .iter()
            .map(|it| it.local_addr().unwrap())
            .collect();
        assert_eq!(addresses.len(), 3);
        assert!(addresses.iter().all(|&address| address == addresses[0]));
    }

    #[test]
    fn a_busy_port_is_an_error_that_names_it() {
        let taken = listen("127.0.0.1:0".parse().unwrap(), 2).unwrap();
        let address = taken[0].local_addr().unwrap();
        let error = listen(address, 2).unwrap_err();
        assert!(
            format!("{error:#}").starts_with(&format!("listen on {address}: ")),
            "{error:#}"
        );
    }
}
