//! One active check of one backend.
//!
//! The checker starts it with a timeout of the configuration and is told the outcome. A connection is
//! ended by RST, so that checks of tens of thousands of backends leave no port in TIME_WAIT: what they
//! hold is bounded by the probes in flight.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;

use bytes::Bytes;
use http::{Request, header};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use nix::errno::Errno;
use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream};

use crate::config::HealthConfig;
use crate::health::tunnel::ProbeVia;

/// Bytes of the head of an answer; more is a bad one. What follows the head is not read.
const MAX_HEAD: usize = 16 * 1024;

/// What is asked of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// To accept a connection.
    Connect,
    /// To answer a GET.
    Get,
}

#[derive(Debug)]
pub enum Outcome {
    Good,
    Bad,
    /// It says nothing of the backend: this host had no descriptor, port or memory for it, or does
    /// not let it out.
    Unmade(io::Error),
}

/// Checks a backend once, within `config.timeout`.
pub async fn probe(
    address: SocketAddr,
    check: Check,
    via: ProbeVia,
    config: &HealthConfig,
) -> Outcome {
    let probe = async {
        let stream = match connect(address, via).await {
            Ok(stream) => stream,
            Err(error) if is_ours(&error, via) => return Outcome::Unmade(error),
            Err(_) => return Outcome::Bad,
        };
        let good = match check {
            Check::Connect => true,
            Check::Get => answers(stream, address, config).await,
        };
        if good { Outcome::Good } else { Outcome::Bad }
    };
    let probed = tokio::time::timeout(config.timeout, probe).await;
    probed.unwrap_or(Outcome::Bad)
}

async fn connect(address: SocketAddr, via: ProbeVia) -> io::Result<TcpStream> {
    let (address, mark) = match via {
        ProbeVia::Direct => (address, None),
        ProbeVia::Tunnel { vip, mark } => (vip, Some(mark)),
    };
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_zero_linger()?;
    if let Some(mark) = mark {
        // Without CAP_NET_ADMIN, EPERM.
        SockRef::from(&socket).set_mark(mark)?;
    }
    socket.connect(address).await
}

/// connect(2), socket(2): what fails for want of something of this host's, or by a rule of its firewall.
/// A way to the VIP is for this host to have.
fn is_ours(error: &io::Error, via: ProbeVia) -> bool {
    let unroutable = error.raw_os_error() == Some(Errno::ENETUNREACH as i32);
    if unroutable && via != ProbeVia::Direct {
        return true;
    }
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(
            Errno::EMFILE
                | Errno::ENFILE
                | Errno::ENOBUFS
                | Errno::ENOMEM
                | Errno::EADDRNOTAVAIL
                | Errno::EACCES
                | Errno::EPERM
        )
    )
}

/// Whether a GET is answered with a status that is wanted.
async fn answers(stream: TcpStream, address: SocketAddr, config: &HealthConfig) -> bool {
    let handshake = http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .handshake(TokioIo::new(stream));
    let Ok((mut sender, connection)) = handshake.await else {
        return false;
    };
    let request = Request::get(&config.path).header(header::USER_AGENT, "viaduct-health");
    let request = match &config.host {
        Some(host) => request.header(header::HOST, host),
        None => request.header(header::HOST, address.to_string()),
    };
    let request = request
        .body(Empty::<Bytes>::new())
        .expect("path and host are valid in a configuration");
    let mut response = pin!(sender.send_request(request));
    // A backend that closes after its answer may end the connection first.
    let response = tokio::select! {
        response = &mut response => response,
        _ = connection => response.await,
    };
    response.is_ok_and(|response| config.status.contains(response.status().as_u16()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_host_lacks_is_held_against_no_backend() {
        for errno in [Errno::EMFILE, Errno::EADDRNOTAVAIL, Errno::EPERM] {
            assert!(is_ours(&errno.into(), ProbeVia::Direct), "{errno}");
        }
        for errno in [Errno::ECONNREFUSED, Errno::EHOSTUNREACH, Errno::ENETUNREACH] {
            assert!(!is_ours(&errno.into(), ProbeVia::Direct), "{errno}");
        }
        let vip = SocketAddr::from(([192, 0, 2, 10], 80));
        let tunnel = ProbeVia::Tunnel { vip, mark: 1 };
        assert!(is_ours(&Errno::ENETUNREACH.into(), tunnel));
        assert!(!is_ours(&Errno::ECONNREFUSED.into(), tunnel));
    }
}
