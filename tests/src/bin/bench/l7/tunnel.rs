//! A WebSocket client: one message there and back, then the next.

use std::io::{BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use anyhow::{Context, ensure};
use router_tests::client::HttpClient;

use crate::l7::rows::BURST;
use crate::l7::site::HOST;
use crate::report::percentile;

/// RFC 6455 §5.2: a final binary frame with a mask, of 64 octets.
const HEADER: [u8; 6] = [0x82, 0x80 | 64, 1, 2, 3, 4];
const PAYLOAD: usize = 64;

pub(crate) struct Measured {
    pub(crate) messages: f64,
    pub(crate) messages_per_s: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

/// Messages through one tunnel for as long as [`BURST`].
///
/// # Errors
/// One came back changed, or not within [`router_tests::client::TIMEOUT`].
pub(crate) fn measure(address: SocketAddr) -> anyhow::Result<Measured> {
    let mut tunnel = open(address)?;
    let frame = [&HEADER[..], &[b'x'; PAYLOAD]].concat();
    let mut answer = vec![0; frame.len()];
    let mut times = Vec::new();
    let start = Instant::now();
    while start.elapsed() < BURST {
        let sent = Instant::now();
        tunnel
            .get_mut()
            .write_all(&frame)
            .context("send a message")?;
        tunnel.read_exact(&mut answer).context("read a message")?;
        ensure!(answer == frame, "the echo differs");
        times.push(sent.elapsed().as_secs_f64() * 1e6);
    }
    let messages = times.len() as f64;
    Ok(Measured {
        messages,
        messages_per_s: messages / start.elapsed().as_secs_f64(),
        p50_us: percentile(&mut times, 0.50),
        p99_us: percentile(&mut times, 0.99),
    })
}

/// Opens a tunnel.
pub(crate) fn try_once(address: SocketAddr) -> anyhow::Result<()> {
    open(address).map(drop)
}

fn open(address: SocketAddr) -> anyhow::Result<BufReader<TcpStream>> {
    HttpClient::connect(address)?.upgrade(HOST, "/tunnel")
}
