//! nginx.

use router_tests::process::Process;

use crate::l7::backend::{self, nginx_config};
use crate::l7::peers::{KEPT_CONNECTIONS, Peer};
use crate::l7::rows::{Back, Front, Row};
use crate::l7::site::{Role, Site};

pub(crate) fn start(site: &Site, row: &Row) -> anyhow::Result<Process> {
    let backend = backend::address(row.back);
    let upstream =
        format!("upstream backend {{ server {backend}; keepalive {KEPT_CONNECTIONS}; }}");
    let address = Peer::Nginx.address(row.front);
    let listen = match row.front {
        Front::Http => format!("listen {address} backlog=4096;"),
        Front::H2c => format!("listen {address} http2 backlog=4096;"),
        Front::Tls => format!(
            "listen {address} ssl http2 backlog=4096;
             ssl_certificate {}; ssl_certificate_key {}; ssl_protocols TLSv1.2 TLSv1.3;",
            site.certificate_path().display(),
            site.key_path().display()
        ),
    };
    let access_log = match row.access_log {
        true => format!(
            "access_log {} combined buffer=64k flush=1s;",
            site.path("nginx-access.log").display()
        ),
        false => String::new(),
    };
    let (directive, connection) = match row.back {
        Back::Http1 => ("proxy", "proxy_set_header Connection '';"),
        Back::WebSocket => (
            "proxy",
            "proxy_set_header Connection upgrade; proxy_set_header Upgrade $http_upgrade;",
        ),
        Back::Grpc => ("grpc", ""),
    };
    let (scheme, options) = match row.back {
        Back::Grpc => ("grpc", ""),
        // A body is neither cut into more reads than it has to be, nor put on a disk.
        Back::Http1 | Back::WebSocket => (
            "http",
            "proxy_http_version 1.1; proxy_buffers 16 16k; proxy_max_temp_file_size 0;",
        ),
    };
    let server = format!(
        "{listen} {access_log}
         client_body_buffer_size 128k; http2_max_concurrent_streams 256;
         location / {{
             {directive}_pass {scheme}://backend;
             {options}
             {connection}
             {directive}_set_header Host $host;
             {directive}_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
             {directive}_set_header X-Forwarded-Proto $scheme;
             {directive}_set_header X-Forwarded-Host $host;
             {directive}_set_header X-Request-Id $request_id;
         }}"
    );
    let config = nginx_config(site.folder(), "proxy", &upstream, &server);
    let command = site.command(Role::Proxy, "nginx");
    site.start(command, Peer::Nginx.name(), &config, &["-c"])
}
