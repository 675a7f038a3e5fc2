//! HAProxy, whose plain listeners know the preface of HTTP/2.

use router_tests::process::Process;

use crate::l7::backend;
use crate::l7::peers::{CLIENT_CONNECTIONS, Peer};
use crate::l7::rows::{Back, Front, Row};
use crate::l7::site::{Role, Site};

pub(crate) fn start(site: &Site, row: &Row) -> anyhow::Result<Process> {
    let address = Peer::Haproxy.address(row.front);
    let (bind, scheme) = match row.front {
        Front::Http | Front::H2c => (String::new(), "http"),
        Front::Tls => {
            let both = site.path("both.pem");
            let options = format!("ssl crt {} alpn h2,http/1.1", both.display());
            (options, "https")
        }
    };
    let protocol = match row.back {
        Back::Grpc => "proto h2",
        Back::Http1 | Back::WebSocket => "",
    };
    let (target, access_log) = match row.access_log {
        // Standard output is a file.
        true => (
            "log stdout format raw daemon",
            "log global\n option httplog",
        ),
        false => ("", ""),
    };
    let config = format!(
        "global
             nbthread 1
             maxconn {CLIENT_CONNECTIONS}
             no strict-limits
             tune.h2.max-concurrent-streams 256
             {target}
         defaults
             mode http
             {access_log}
             timeout connect 5s
             timeout client 600s
             timeout server 600s
             timeout tunnel 600s
             option http-keep-alive
             http-reuse always
         frontend front
             bind {address} {bind}
             option forwardfor
             http-request set-header X-Forwarded-Proto {scheme}
             http-request set-header X-Forwarded-Host %[req.hdr(host)]
             http-request set-header X-Request-Id %[uuid()]
             default_backend backends
         backend backends
             server b1 {} {protocol}\n",
        backend::address(row.back)
    );
    let command = site.command(Role::Proxy, "haproxy");
    site.start(command, Peer::Haproxy.name(), &config, &["-db", "-f"])
}
