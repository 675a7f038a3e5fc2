//! The proxy of tests/peers/pingora.

use router_tests::process::Process;

use crate::l7::backend;
use crate::l7::peers::Peer;
use crate::l7::rows::{Back, Front, Row};
use crate::l7::site::{Role, Site};

pub(crate) fn start(site: &Site, row: &Row) -> anyhow::Result<Process> {
    let mut command = site.command(Role::Proxy, "pingora-proxy");
    command.arg(Peer::Pingora.address(row.front).to_string());
    command.arg(backend::address(row.back).to_string());
    command.arg(match row.back {
        Back::Grpc => "h2c",
        Back::Http1 | Back::WebSocket => "http1",
    });
    match row.access_log {
        true => command.arg(site.path("pingora-access.log")),
        false => command.arg("-"),
    };
    if row.front == Front::Tls {
        command.arg(site.certificate_path()).arg(site.key_path());
    }
    Process::start(Peer::Pingora.name(), command, site.folder())
}
