//! The host's syslog, or one over UDP: a datagram for each line (RFC 5424, RFC 5426).
//!
//! A line that cannot be sent has the socket opened again, once; what is left of the block is dropped if
//! that does not help. Over UDP nobody says whether a line has come.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;

use crate::config::SyslogAddress;
use crate::l7::access_log::timestamp;

/// Facility local7 and severity informational (RFC 5424 §6.2.1), as nginx has them.
const PRIORITY: u8 = 23 * 8 + 6;

/// Bytes of a line that are sent; the rest is cut off. Common daemons take so many.
const MAX_LINE_BYTES: usize = 8000;

/// Longest name of a host (RFC 5424 §6.2.4).
const MAX_HOSTNAME_BYTES: usize = 255;

pub(super) struct Syslog {
    address: SyslogAddress,
    socket: Socket,
    /// What is between time and line.
    sender: String,
    message: Vec<u8>,
}

enum Socket {
    Udp(UdpSocket),
    Unix(UnixDatagram),
}

impl Syslog {
    /// # Errors
    /// Names the socket that cannot be opened.
    pub(super) fn open(address: &SyslogAddress) -> anyhow::Result<Syslog> {
        let socket = Socket::connect(address);
        let hostname = nix::unistd::gethostname().ok();
        let hostname = hostname.as_ref().and_then(|it| it.to_str());
        let hostname = hostname.filter(|it| {
            it.bytes().all(|it| it.is_ascii_graphic())
                && (1..=MAX_HOSTNAME_BYTES).contains(&it.len())
        });
        Ok(Syslog {
            address: address.clone(),
            socket: socket.with_context(|| format!("http.access_log.syslog {address}"))?,
            sender: format!(
                " {} viaduct {} access - ",
                hostname.unwrap_or("-"),
                std::process::id()
            ),
            message: Vec::new(),
        })
    }

    /// # Errors
    /// How many lines were not sent, and why.
    pub(super) fn write(&mut self, block: &[u8]) -> Result<(), (u64, io::Error)> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default();
        let mut lines = block.split(|&byte| byte == b'\n');
        // What is behind the last end of a line.
        lines.next_back();
        while let Some(line) = lines.next() {
            self.message.clear();
            self.message
                .extend_from_slice(format!("<{PRIORITY}>1 ").as_bytes());
            timestamp::write_micros(&mut self.message, now);
            self.message.extend_from_slice(self.sender.as_bytes());
            self.message.extend_from_slice(shown(line));
            if let Err(error) = self.send() {
                return Err((1 + lines.count() as u64, error));
            }
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        if self.socket.send(&self.message).is_ok() {
            return Ok(());
        }
        // The daemon may have been started anew; over UDP the error may be an earlier line's.
        self.socket = Socket::connect(&self.address)?;
        self.socket.send(&self.message)
    }
}

impl Socket {
    fn connect(address: &SyslogAddress) -> io::Result<Socket> {
        match address {
            SyslogAddress::Udp(address) => {
                let any: SocketAddr = match address {
                    SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
                    SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
                };
                let socket = UdpSocket::bind(any)?;
                socket.connect(address)?;
                Ok(Socket::Udp(socket))
            }
            SyslogAddress::Unix(path) => {
                let socket = UnixDatagram::unbound()?;
                socket.connect(path)?;
                Ok(Socket::Unix(socket))
            }
        }
    }

    fn send(&self, message: &[u8]) -> io::Result<()> {
        match self {
            Socket::Udp(socket) => socket.send(message),
            Socket::Unix(socket) => socket.send(message),
        }
        .map(drop)
    }
}

/// What is sent of a line, whole characters.
fn shown(line: &[u8]) -> &[u8] {
    let mut len = line.len().min(MAX_LINE_BYTES);
    while len < line.len() && line[len] & 0xc0 == 0x80 {
        len -= 1;
    }
    &line[..len]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let mut line = vec![b'a'; MAX_LINE_BYTES - 1];
        assert_eq!(shown(&line), line);
        line.extend_from_slice("é".as_bytes());
        assert_eq!(shown(&line).len(), MAX_LINE_BYTES - 1);
    }
}
