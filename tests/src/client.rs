//! What dials the gateway: TCP, UDP and HTTP clients, blocking and without a pool.
//!
//! Call them on a thread inside a namespace ([`crate::netns::Netns::run`]). Every wait is bounded by
//! [`TIMEOUT`], so that a lost packet is an error and not a test that hangs.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use socket2::{Domain, Socket, Type};

/// The longest a client waits for one answer.
pub const TIMEOUT: Duration = Duration::from_secs(3);

/// Opens a connection; the application greets with its name.
pub fn tcp(address: SocketAddr) -> anyhow::Result<TcpClient> {
    let stream = TcpStream::connect_timeout(&address, TIMEOUT)
        .with_context(|| format!("connect to tcp/{address}"))?;
    greeted(stream, address)
}

/// The same from a port of the client's own choice.
pub fn tcp_from(port: u16, address: SocketAddr) -> anyhow::Result<TcpClient> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    let local = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
    let bound = socket.bind(&local.into());
    bound.with_context(|| format!("bind to port {port}"))?;
    let connected = socket.connect_timeout(&address.into(), TIMEOUT);
    connected.with_context(|| format!("connect to tcp/{address} from port {port}"))?;
    greeted(socket.into(), address)
}

fn greeted(stream: TcpStream, address: SocketAddr) -> anyhow::Result<TcpClient> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    let greeting = read_line(&mut reader).with_context(|| format!("greeting of tcp/{address}"))?;
    Ok(TcpClient {
        backend: greeting,
        reader,
    })
}

/// An open connection to the echo service.
pub struct TcpClient {
    /// The name of the instance that took the connection.
    pub backend: String,
    reader: BufReader<TcpStream>,
}

impl TcpClient {
    /// Sends `data` and reads as much back.
    pub fn echo(&mut self, data: &[u8]) -> anyhow::Result<Vec<u8>> {
        self.reader.get_mut().write_all(data).context("write")?;
        let mut answer = vec![0; data.len()];
        self.reader.read_exact(&mut answer).context("read")?;
        Ok(answer)
    }

    /// The address that the connection comes from.
    pub fn local_address(&self) -> anyhow::Result<SocketAddr> {
        Ok(self.reader.get_ref().local_addr()?)
    }

    /// The connection itself, for what needs both directions at once.
    pub fn into_stream(self) -> TcpStream {
        self.reader.into_inner()
    }
}

/// Sends one datagram as a new flow and returns the name of the instance that answered.
pub fn udp(address: SocketAddr) -> anyhow::Result<String> {
    let socket = udp_socket_of_a_new_flow()?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    udp_on(&socket).with_context(|| format!("exchange with udp/{address}"))
}

/// Bound to the port that waited longest since such a socket had it: the kernel would pick one at
/// random, and so at times that of a flow which the gateway still remembers.
fn udp_socket_of_a_new_flow() -> anyhow::Result<UdpSocket> {
    // Below the ports that kernels give to other sockets by themselves.
    const PORTS: Range<u16> = 10_000..32_768;
    static TURN: AtomicUsize = AtomicUsize::new(0);
    loop {
        let turn = TURN.fetch_add(1, Ordering::Relaxed) % PORTS.len();
        let port = PORTS.start + u16::try_from(turn).expect("less than the ports");
        match UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            bound => return bound.with_context(|| format!("bind to port {port}")),
        }
    }
}

/// The same from a port that is kept: one flow.
pub fn udp_on(socket: &UdpSocket) -> anyhow::Result<String> {
    socket.send(b"who").context("send")?;
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer).context("receive")?;
    let answer = String::from_utf8_lossy(&answer[..length]);
    let (name, payload) = answer
        .split_once(' ')
        .context("an answer is a name and the payload")?;
    if payload != "who" {
        bail!("the payload came back as {payload:?}");
    }
    Ok(name.to_owned())
}

/// A response, read whole.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }
}

/// One GET on a connection of its own.
pub fn get(gateway: SocketAddr, host: &str, path: &str) -> anyhow::Result<Response> {
    HttpClient::connect(gateway)?.get(host, path)
}

/// A kept-alive HTTP/1.1 connection.
pub struct HttpClient {
    reader: BufReader<TcpStream>,
}

impl HttpClient {
    pub fn connect(gateway: SocketAddr) -> anyhow::Result<HttpClient> {
        let stream = TcpStream::connect_timeout(&gateway, TIMEOUT)
            .with_context(|| format!("connect to http://{gateway}"))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        stream.set_nodelay(true)?;
        Ok(HttpClient {
            reader: BufReader::new(stream),
        })
    }

    pub fn get(&mut self, host: &str, path: &str) -> anyhow::Result<Response> {
        let response = self.exchange(&format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        response.with_context(|| format!("GET http://{host}{path}"))
    }

    /// Asks to speak something else, and returns the bare connection once that is granted.
    pub fn upgrade(mut self, host: &str, path: &str) -> anyhow::Result<BufReader<TcpStream>> {
        let response = self.exchange(&format!(
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        ))?;
        if response.status != 101 {
            bail!(
                "an upgrade was answered {}: {}",
                response.status,
                response.body
            );
        }
        Ok(self.reader)
    }

    fn exchange(&mut self, request: &str) -> anyhow::Result<Response> {
        self.reader
            .get_mut()
            .write_all(request.as_bytes())
            .context("send a request")?;
        self.read_response()
    }

    fn read_response(&mut self) -> anyhow::Result<Response> {
        let status_line = read_line(&mut self.reader).context("read a status line")?;
        let status = status_line
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok());
        let status = status.with_context(|| format!("not a status line: {status_line:?}"))?;
        let mut headers = Vec::new();
        loop {
            let line = read_line(&mut self.reader).context("read a header")?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').context("a header without a colon")?;
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let mut response = Response {
            status,
            headers,
            body: String::new(),
        };
        if status != 101 {
            let length = response
                .header("content-length")
                .context("no Content-Length")?;
            let mut body = vec![0; length.parse().context("Content-Length is a number")?];
            self.reader.read_exact(&mut body).context("read a body")?;
            response.body = String::from_utf8_lossy(&body).into_owned();
        }
        Ok(response)
    }
}

/// One line without its end; an error where the connection ends instead.
pub fn read_line(reader: &mut impl BufRead) -> anyhow::Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        bail!("the connection was closed");
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}
