//! The gateway as the benchmark configures it.

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, bail};
use router_tests::process::Process;
use router_tests::site::agent;

use crate::l7::backend;
use crate::l7::peers::Peer;
use crate::l7::rows::{Back, Front, MANY_ROUTES, Row};
use crate::l7::site::{HOST, Role, Site};

/// # Errors
/// `viaduct check` refuses the configuration; the message is its own.
pub(crate) fn start(site: &Site, row: &Row, peer: Peer) -> anyhow::Result<Process> {
    let path = write_config(site, row, peer)?;
    let check = site
        .command(Role::Proxy, agent()?)
        .args(["check", "--config"])
        .arg(&path)
        .output()
        .context("start viaduct check")?;
    if !check.status.success() {
        let message = String::from_utf8_lossy(&check.stderr);
        bail!("the configuration is refused: {}", message.trim());
    }
    let mut command = site.command(Role::Proxy, agent()?);
    command.args(["run", "--config"]).arg(&path);
    Process::start(peer.name(), command, site.folder())
}

fn write_config(site: &Site, row: &Row, peer: Peer) -> anyhow::Result<PathBuf> {
    let name = peer.name();
    let path = |what: &str| site.path(&format!("{name}-{what}"));
    let address = peer.address(row.front);
    let listen = match row.front {
        Front::Http | Front::H2c => format!("http.listen = [\"{address}\"]"),
        Front::Tls => format!(
            "http.listen = []
             http.tls.listen = [\"{address}\"]
             http.tls.certificates = [{{ certificate_file = {:?}, key_file = {:?} }}]",
            site.certificate_path(),
            site.key_path()
        ),
    };
    let access_log = match row.access_log {
        true => format!(
            "http.access_log = {{ path = {:?}, format = \"json\" }}",
            path("access.log")
        ),
        false => String::new(),
    };
    let text = format!(
        "nats.servers = []
         file.paths = [{:?}]
         l4.interfaces = []
         admin.listen = \"unix:{}\"
         http.workers = 1
         {listen}
         {access_log}\n",
        path("routes.toml"),
        path("admin").display(),
    );
    fs::write(path("routes.toml"), routes(row, peer))?;
    fs::write(path("viaduct.toml"), text)?;
    Ok(path("viaduct.toml"))
}

fn routes(row: &Row, peer: Peer) -> String {
    let address = backend::address(row.back);
    let protocol = match row.back {
        Back::Grpc => "http2",
        Back::Http1 | Back::WebSocket => "http1",
    };
    let beside = if peer == Peer::ViaductManyRoutes {
        MANY_ROUTES
    } else {
        0
    };
    let mut text = String::new();
    let hosts = (0..beside).map(|number| format!("app-{number}.example.com"));
    for host in hosts.chain([HOST.to_owned()]) {
        let _ = write!(
            text,
            "[[route]]\nuris = [\"{host}\"]\n\
             [[route.backend]]\naddress = \"{address}\"\nprotocol = \"{protocol}\"\n"
        );
    }
    text
}
