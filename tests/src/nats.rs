//! The lab's NATS server, and a client for single messages that need not be well-formed.
//!
//! Applications announce themselves through a full client ([`crate::app`]); this one writes the
//! protocol's text by hand, so that a test decides each byte and knows when the server has it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use anyhow::{Context, ensure};

use crate::client;
use crate::lab::Lab;
use crate::process::{Process, wait_for};

/// The server's port, free in every lab because each has a namespace of its own.
pub const PORT: u16 = 4222;

/// Starts a server with JetStream in the gateway's namespace and waits until it answers.
pub fn start_server(lab: &Lab) -> anyhow::Result<Process> {
    let mut command = lab.gateway.command("nats-server");
    command.args(["--addr", "0.0.0.0", "--port", &PORT.to_string()]);
    command.args(["--jetstream", "--store_dir"]);
    command.arg(lab.folder().join("jetstream"));
    let mut process = Process::start("nats-server", command, lab.folder())?;
    wait_for("nats-server", || match process.ensure_alive() {
        Ok(()) => Publisher::connect(lab).ok().map(|_| Ok(())),
        Err(error) => Some(Err(error)),
    })??;
    Ok(process)
}

/// A connection that publishes, and listens to at most one subject.
pub struct Publisher {
    reader: BufReader<TcpStream>,
}

impl Publisher {
    /// Connects inside the gateway's namespace.
    pub fn connect(lab: &Lab) -> anyhow::Result<Publisher> {
        lab.gateway.run(|| {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
            let stream = TcpStream::connect_timeout(&address, client::TIMEOUT);
            let stream = stream.with_context(|| format!("connect to nats://{address}"))?;
            stream.set_read_timeout(Some(client::TIMEOUT))?;
            stream.set_nodelay(true)?;
            let mut publisher = Publisher {
                reader: BufReader::new(stream),
            };
            let info = client::read_line(&mut publisher.reader)?;
            ensure!(
                info.starts_with("INFO "),
                "a NATS server starts with INFO, not {info:?}"
            );
            publisher.write(b"CONNECT {\"verbose\":false,\"pedantic\":false}\r\n")?;
            publisher.flush()?;
            Ok(publisher)
        })
    }

    /// Publishes one message and waits until the server has taken it.
    pub fn publish(&mut self, subject: &str, payload: impl AsRef<[u8]>) -> anyhow::Result<()> {
        let mut batch = Vec::new();
        encode(&mut batch, subject, payload.as_ref());
        self.publish_encoded(&batch)
    }

    /// Publishes messages made by [`encode`], and waits until the server has taken all.
    pub fn publish_encoded(&mut self, batch: &[u8]) -> anyhow::Result<()> {
        self.send_encoded(batch)?;
        self.flush()
    }

    /// The same without waiting.
    pub fn send_encoded(&mut self, batch: &[u8]) -> anyhow::Result<()> {
        self.write(batch)
    }

    /// Listens to a subject from here on; [`Publisher::next_message`] returns what comes.
    ///
    /// Publishing has to wait until what was asked for has come.
    pub fn subscribe(&mut self, subject: &str) -> anyhow::Result<()> {
        self.write(format!("SUB {subject} 1\r\n").as_bytes())?;
        self.flush()
    }

    /// Asks a question, and leaves the answer to [`Publisher::next_message`] of a subscription to `inbox`.
    pub fn request(&mut self, subject: &str, inbox: &str) -> anyhow::Result<()> {
        self.write(format!("PUB {subject} {inbox} 0\r\n\r\n").as_bytes())
    }

    /// The next message of the subscription, as JSON.
    pub fn next_message(&mut self) -> anyhow::Result<serde_json::Value> {
        loop {
            let line = client::read_line(&mut self.reader)?;
            if line == "PING" {
                self.write(b"PONG\r\n")?;
            }
            let Some(header) = line.strip_prefix("MSG ") else {
                continue;
            };
            let length = header
                .rsplit(' ')
                .next()
                .context("MSG ends with a length")?;
            let mut payload = vec![0; length.parse().context("MSG ends with a length")?];
            self.reader
                .read_exact(&mut payload)
                .context("read a message")?;
            return serde_json::from_slice(&payload).context("a message is JSON");
        }
    }

    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.reader
            .get_mut()
            .write_all(bytes)
            .context("write to nats-server")
    }

    /// A server answers PING when it has handled everything before it.
    fn flush(&mut self) -> anyhow::Result<()> {
        self.write(b"PING\r\n")?;
        let mut line = String::new();
        loop {
            line.clear();
            let length = self
                .reader
                .read_line(&mut line)
                .context("read from nats-server")?;
            ensure!(length > 0, "nats-server closed the connection");
            match line.trim_end() {
                "PONG" => return Ok(()),
                "PING" => self.write(b"PONG\r\n")?,
                other => ensure!(other.starts_with("INFO "), "nats-server said {other:?}"),
            }
        }
    }
}

/// Appends one `PUB` to `batch`.
pub fn encode(batch: &mut Vec<u8>, subject: &str, payload: &[u8]) {
    batch.extend_from_slice(format!("PUB {subject} {}\r\n", payload.len()).as_bytes());
    batch.extend_from_slice(payload);
    batch.extend_from_slice(b"\r\n");
}
