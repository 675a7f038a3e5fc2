//! Which connections to backends may pass TCP by, and how they are read.
//!
//! `backend` marks them before it connects; programs on the host's cgroup (`l4/datapath/sockmap`) do
//! the rest, and leave a connection to TCP whose other end is not on this host. Such a connection
//! carries requests without a body and without an upgrade only: then each end sends in its turn, which
//! bounds what is unread, and a backend needs nothing but recv(2) and the like to read a request.

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::task::{Context, Poll, ready};

use router_common::SOCKMAP_MARK;
use socket2::SockRef;
use tokio::io::ReadBuf;
use tokio::net::{TcpSocket, TcpStream};

/// The mark of this process's connections. Two agents that overlap, while one replaces the other, must
/// not share maps that go with the first.
pub fn mark() -> u32 {
    SOCKMAP_MARK | std::process::id() & 0xffff
}

/// To be called before connect(2). False: it goes by TCP.
pub(super) fn prepare(socket: &TcpSocket) -> bool {
    SockRef::from(socket).set_mark(mark()).is_ok()
}

/// Whether an address is one of this host's, as far as its own namespace knows.
pub(super) fn is_local(address: IpAddr) -> bool {
    address.is_loopback() || UdpSocket::bind((address, 0)).is_ok()
}

/// Reads without tokio's assumption that a short read has emptied the socket: what was redirected is
/// read by itself, and what came by TCP behind it has no event of its own.
pub(super) fn poll_read(
    stream: &TcpStream,
    cx: &mut Context<'_>,
    buffer: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>> {
    loop {
        ready!(stream.poll_read_ready(cx))?;
        match stream.try_read_buf(buffer) {
            Ok(_) => return Poll::Ready(Ok(())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Poll::Ready(Err(error)),
        }
    }
}
