//! One connection of the client: TCP or TLS, never blocking, at most one request at a time.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use anyhow::{Context, bail};
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConnection, StreamOwned};

use crate::l7::client::Target;
use crate::l7::site::HOST;

/// The longest head of an answer.
const HEAD_BYTES: usize = 16 * 1024;

pub(crate) struct Connection {
    stream: Option<Stream>,
    /// When the request was due.
    pub(crate) begun: Instant,
    /// Octets of the request that were sent.
    sent: usize,
    answer: Answer,
    buffer: Vec<u8>,
}

pub(crate) enum Progress {
    Pending,
    Answered,
}

enum Stream {
    Tcp(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

enum Answer {
    /// What came of it.
    Head(Vec<u8>),
    /// Octets of the body that are still to come.
    Body(usize),
}

impl Connection {
    pub(crate) fn open(target: &Target) -> anyhow::Result<Connection> {
        Ok(Connection {
            stream: Some(Stream::connect(target)?),
            begun: Instant::now(),
            sent: 0,
            answer: Answer::Head(Vec::new()),
            buffer: vec![0; 64 * 1024],
        })
    }

    pub(crate) fn begin(&mut self, target: &Target, due: Instant) -> anyhow::Result<()> {
        if self.stream.is_none() {
            self.stream = Some(Stream::connect(target)?);
        }
        self.begun = due;
        self.sent = 0;
        self.answer = Answer::Head(Vec::new());
        Ok(())
    }

    pub(crate) fn close(&mut self) {
        self.stream = None;
    }

    pub(crate) fn socket(&self) -> Option<&TcpStream> {
        match self.stream.as_ref()? {
            Stream::Tcp(socket) => Some(socket),
            Stream::Tls(stream) => Some(&stream.sock),
        }
    }

    /// Whether the socket was full when something was written to it.
    pub(crate) fn has_to_write(&self) -> bool {
        match &self.stream {
            Some(Stream::Tcp(_)) => self.sent != usize::MAX,
            Some(Stream::Tls(stream)) => stream.conn.wants_write(),
            None => false,
        }
    }

    /// Writes and reads until neither can go on.
    pub(crate) fn advance(&mut self, request: &[u8]) -> anyhow::Result<Progress> {
        let stream = self.stream.as_mut().context("the connection is closed")?;
        while self.sent < request.len() {
            match stream.write(&request[self.sent..]) {
                Ok(length) => self.sent += length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Ok(Progress::Pending);
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.sent = usize::MAX;
        stream.flush().or_else(|error| match error.kind() {
            ErrorKind::WouldBlock => Ok(()),
            _ => Err(error),
        })?;
        loop {
            match stream.read(&mut self.buffer) {
                Ok(0) => bail!("the connection ended before the answer"),
                Ok(length) => {
                    if self.answer.take(&self.buffer[..length])? {
                        return Ok(Progress::Answered);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Ok(Progress::Pending);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Stream {
    fn connect(target: &Target) -> anyhow::Result<Stream> {
        // By loopback a connection is made at once or not at all.
        let socket = TcpStream::connect(target.address).context("connect")?;
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        Ok(match &target.tls {
            None => Stream::Tcp(socket),
            Some(config) => {
                let name = ServerName::try_from(HOST).context("the host's name")?;
                let session = ClientConnection::new(config.clone(), name)?;
                Stream::Tls(Box::new(StreamOwned::new(session, socket)))
            }
        })
    }

    fn write(&mut self, octets: &[u8]) -> std::io::Result<usize> {
        match self {
            Stream::Tcp(socket) => socket.write(octets),
            Stream::Tls(stream) => stream.write(octets),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Stream::Tcp(_) => Ok(()),
            Stream::Tls(stream) => stream.flush(),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Stream::Tcp(socket) => socket.read(buffer),
            Stream::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Answer {
    /// Whether it is whole with these octets.
    fn take(&mut self, octets: &[u8]) -> anyhow::Result<bool> {
        match self {
            Answer::Body(left) => {
                *left = left
                    .checked_sub(octets.len())
                    .context("more came than Content-Length said")?;
                Ok(*left == 0)
            }
            Answer::Head(head) => {
                head.extend_from_slice(octets);
                let Some(end) = head.windows(4).position(|window| window == b"\r\n\r\n") else {
                    if head.len() > HEAD_BYTES {
                        bail!("the head of an answer is too long");
                    }
                    return Ok(false);
                };
                let body = head[end + 4..].to_vec();
                let length = content_length(&head[..end])?;
                *self = Answer::Body(length);
                self.take(&body)
            }
        }
    }
}

/// Of an answer with status 200.
fn content_length(head: &[u8]) -> anyhow::Result<usize> {
    let head = std::str::from_utf8(head).context("read the head of an answer")?;
    let (status, headers) = head.split_once("\r\n").context("no header")?;
    if status.split(' ').nth(1) != Some("200") {
        bail!("answered {status}");
    }
    let length = headers.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse())
    });
    length
        .context("no Content-Length")?
        .context("Content-Length is a number")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_with_the_last_octet_of_its_body() {
        let whole = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
        for cut in 0..whole.len() {
            let mut answer = Answer::Head(Vec::new());
            assert!(!answer.take(&whole[..cut]).unwrap());
            assert!(answer.take(&whole[cut..]).unwrap());
        }
        let mut answer = Answer::Head(Vec::new());
        assert!(
            answer
                .take(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                .unwrap()
        );
    }

    #[test]
    fn anything_but_200_is_an_error() {
        let mut answer = Answer::Head(Vec::new());
        let refused = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n";
        assert!(answer.take(refused).is_err());
    }
}
