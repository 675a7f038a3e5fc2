//! Sozu, one worker. It adds `Forwarded`, `X-Forwarded-For`, `-Proto` and `-Port`, and an id.

use router_tests::process::Process;

use crate::l7::backend;
use crate::l7::peers::{CLIENT_CONNECTIONS, Peer};
use crate::l7::rows::{Back, Front, Row};
use crate::l7::site::{HOST, Role, Site};

pub(crate) fn start(site: &Site, row: &Row) -> anyhow::Result<Process> {
    let address = Peer::Sozu.address(row.front);
    let (protocol, certificate) = match row.front {
        Front::Http | Front::H2c => ("http", String::new()),
        Front::Tls => (
            "https",
            format!(
                ", certificate = {:?}, key = {:?}",
                site.certificate_path(),
                site.key_path()
            ),
        ),
    };
    let access_log = match row.access_log {
        true => format!(
            "access_logs_target = \"file://{}\"",
            site.path("sozu-access.log").display()
        ),
        // No level of its own: they are of level info.
        false => String::new(),
    };
    let log_level = if row.access_log { "info" } else { "error" };
    let config = format!(
        "command_socket = {:?}
         worker_count = 1
         worker_automatic_restart = false
         max_connections = {CLIENT_CONNECTIONS}
         max_buffers = {CLIENT_CONNECTIONS}
         log_level = \"{log_level}\"
         log_target = \"stdout\"
         {access_log}
         activate_listeners = true
         [[listeners]]
         protocol = \"{protocol}\"
         address = \"{address}\"
         front_timeout = 600
         [clusters.bench]
         protocol = \"http\"
         http2 = {}
         frontends = [{{ address = \"{address}\", hostname = \"{HOST}\"{certificate} }}]
         backends = [{{ address = \"{}\" }}]\n",
        site.path("sozu.sock"),
        row.back == Back::Grpc,
        backend::address(row.back)
    );
    let mut command = site.command(Role::Proxy, "sozu");
    command.arg("start");
    site.start(command, Peer::Sozu.name(), &config, &["-c"])
}
