//! The gateway as the benchmark configures it.

use std::fs;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;

use anyhow::{Context, bail};
use router_tests::process::Process;
use router_tests::site::agent;

use crate::l7::backend;
use crate::l7::peers::Peer;
use crate::l7::rows::{Back, Front, MANY_ROUTES, Row};
use crate::l7::site::{HOST, Role, Site};

const MIXED_ROUTES: &str = "mixed.toml";

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

/// One gateway that listens for all rows, with the routes of all and an access log.
///
/// # Errors
/// It cannot be started; it may not serve yet.
pub(crate) fn start_mixed(
    site: &Site,
    address: impl Fn(Front) -> SocketAddr,
) -> anyhow::Result<Process> {
    let text = format!(
        "nats.servers = []
         file.paths = [{:?}]
         l4.interfaces = []
         admin.listen = \"unix:{}\"
         http.workers = 1
         http.listen = [\"{}\"]
         http.tls.listen = [\"{}\"]
         http.tls.certificates = [{{ certificate_file = {:?}, key_file = {:?} }}]
         http.access_log = {{ path = \"/dev/null\", format = \"json\" }}\n",
        site.path(MIXED_ROUTES),
        site.path("admin").display(),
        address(Front::Http),
        address(Front::Tls),
        site.certificate_path(),
        site.key_path(),
    );
    write_mixed_routes(site, 0..0)?;
    let mut command = site.command(Role::Proxy, agent()?);
    command.args(["run", "--config"]);
    site.start(command, "mixed", &text, &[])
}

/// The routes of all rows, and beside them those with these numbers; the gateway sees to it within a
/// second.
pub(crate) fn write_mixed_routes(site: &Site, beside: Range<usize>) -> anyhow::Result<()> {
    let mut text: String = beside
        .map(|number| route(&format!("app-{number}.example.com"), Back::Http1))
        .collect();
    text += &route(HOST, Back::Http1);
    text += &route(&format!("{HOST}/bench.Echo"), Back::Grpc);
    text += &route(&format!("{HOST}/tunnel"), Back::WebSocket);
    // Never half of it.
    let new = site.path("new");
    fs::write(&new, text)?;
    fs::rename(new, site.path(MIXED_ROUTES)).context("replace the routes")
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
    let beside = if peer == Peer::ViaductManyRoutes {
        MANY_ROUTES
    } else {
        0
    };
    let hosts = (0..beside).map(|number| format!("app-{number}.example.com"));
    let uris = hosts.chain([HOST.to_owned()]);
    uris.map(|uri| route(&uri, row.back)).collect()
}

fn route(uri: &str, back: Back) -> String {
    let address = backend::address(back);
    let protocol = match back {
        Back::Grpc => "http2",
        Back::Http1 | Back::WebSocket => "http1",
    };
    format!(
        "[[route]]\nuris = [\"{uri}\"]\n\
         [[route.backend]]\naddress = \"{address}\"\nprotocol = \"{protocol}\"\n"
    )
}
