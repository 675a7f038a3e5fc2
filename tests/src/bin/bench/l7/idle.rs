//! Connections that are kept open without a request.

use std::net::SocketAddr;

use anyhow::{Context, ensure};
use router_tests::client::HttpClient;

use crate::l7::rows::IDLE_CONNECTIONS;
use crate::l7::site::HOST;
use crate::l7::usage;

/// KiB of resident memory that each of [`IDLE_CONNECTIONS`] adds to a process, after one request on
/// each, and KiB without them.
pub(crate) fn measure(address: SocketAddr, pid: u32) -> anyhow::Result<(f64, f64)> {
    let before = usage::resident_kib(pid)?;
    let mut connections = Vec::with_capacity(IDLE_CONNECTIONS);
    for number in 0..IDLE_CONNECTIONS {
        let open = || -> anyhow::Result<HttpClient> {
            let mut connection = HttpClient::connect(address)?;
            let status = connection.get(HOST, "/small")?.status;
            ensure!(status == 200, "answered {status}");
            Ok(connection)
        };
        connections.push(open().with_context(|| format!("connection {number}"))?);
    }
    let after = usage::resident_kib(pid)?;
    Ok(((after - before) / IDLE_CONNECTIONS as f64, before))
}
