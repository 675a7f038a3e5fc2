//! Connections that are kept open without a request.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use router_tests::client::HttpClient;

use crate::l7::rows::IDLE_CONNECTIONS;
use crate::l7::site::HOST;
use crate::l7::usage;

/// Threads that open connections, each one after another.
const THREADS: usize = 16;

/// Proxies close connections that were idle for a minute.
const LONGEST: Duration = Duration::from_secs(40);

/// What a proxy does about quiet connections, it has begun by then.
const SETTLE: Duration = Duration::from_secs(3);

/// KiB of resident memory that each of [`IDLE_CONNECTIONS`] adds to a process, after one request on
/// each, and KiB without them.
pub(crate) fn measure(address: SocketAddr, pid: u32) -> anyhow::Result<(f64, f64)> {
    let start = Instant::now();
    let before = usage::resident_kib(pid)?;
    let connections = thread::scope(|scope| {
        let each = IDLE_CONNECTIONS / THREADS;
        let threads: Vec<_> = (0..THREADS)
            .map(|_| scope.spawn(move || open(address, each)))
            .collect();
        let opened = threads
            .into_iter()
            .map(|thread| thread.join().expect("no thread panics"));
        opened.collect::<anyhow::Result<Vec<_>>>()
    })?;
    let count: usize = connections.iter().map(Vec::len).sum();
    ensure!(
        start.elapsed() < LONGEST,
        "opening {count} connections took too long"
    );
    thread::sleep(SETTLE);
    let after = usage::resident_kib(pid)?;
    Ok(((after - before) / count as f64, before))
}

fn open(address: SocketAddr, count: usize) -> anyhow::Result<Vec<HttpClient>> {
    let mut connections = Vec::with_capacity(count);
    for number in 0..count {
        let mut connection = HttpClient::connect(address)?;
        let response = connection.get(HOST, "/small");
        let status = response
            .with_context(|| format!("connection {number}"))?
            .status;
        ensure!(status == 200, "connection {number} was answered {status}");
        connections.push(connection);
    }
    Ok(connections)
}
