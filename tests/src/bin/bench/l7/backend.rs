//! What the proxies forward to: nginx, and an echo for tunnels.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread::JoinHandle;

use router_tests::netns::Netns;
use router_tests::process::Process;
use socket2::SockRef;

use crate::l7::rows::Back;
use crate::l7::site::{self, Role, Site, local};

const HTTP_PORT: u16 = 8080;
const GRPC_PORT: u16 = 8081;
const ECHO_PORT: u16 = 8082;

/// Octets of a request's head that the echo reads before it hangs up.
const HEAD_BYTES: u64 = 16 * 1024;

/// The answer to the key that [`router_tests::client::HttpClient::upgrade`] sends: RFC 6455 §1.3.
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// Running backends of all kinds.
pub(crate) struct Backends {
    _nginx: Process,
    _echo: Echo,
}

impl Backends {
    pub(crate) fn start(site: &Site) -> anyhow::Result<Backends> {
        let root = site.path("www");
        fs::create_dir_all(&root)?;
        fs::write(root.join("small"), "hello from the backend\n".repeat(4))?;
        fs::write(root.join("16k"), "x".repeat(16 * 1024))?;
        fs::write(root.join("1m"), "x".repeat(1024 * 1024))?;
        // gRPC over HTTP/2, "Length-Prefixed-Message": not compressed, five octets.
        fs::write(root.join("message"), b"\0\0\0\0\x05hello")?;
        let root = root.display();
        let servers = format!(
            "listen {HTTP_PORT} backlog=4096; root {root};
             location = /post {{ return 200 'ok'; }}
             }}
             server {{
             listen {GRPC_PORT} http2 backlog=4096; root {root};
             location = /message {{
                 default_type application/grpc; etag off; add_trailer grpc-status 0;
             }}
             location / {{ error_page 405 =200 /message; return 405; }}"
        );
        let config = nginx_config(site.folder(), "backend", "", &servers);
        let nginx = site.command(Role::Backend, "nginx");
        Ok(Backends {
            _nginx: site.start(nginx, "nginx-backend", &config, &["-c"])?,
            _echo: Echo::start(&site.netns)?,
        })
    }
}

pub(crate) fn address(back: Back) -> SocketAddr {
    local(match back {
        Back::Http1 => HTTP_PORT,
        Back::Grpc => GRPC_PORT,
        Back::WebSocket => ECHO_PORT,
    })
}

/// One process, no access log, keep-alive without an end, and every path inside a folder.
pub(crate) fn nginx_config(folder: &Path, name: &str, upstream: &str, server: &str) -> String {
    let folder = folder.display();
    format!(
        "daemon off; master_process off; error_log stderr; pid {folder}/{name}.pid;
         events {{ worker_connections 32768; }}
         http {{
             access_log off; sendfile on; tcp_nopush on;
             keepalive_requests 1000000000; keepalive_timeout 600s;
             client_body_temp_path {folder}/{name}-body; proxy_temp_path {folder}/{name}-proxy;
             fastcgi_temp_path {folder}/{name}-fastcgi; uwsgi_temp_path {folder}/{name}-uwsgi;
             scgi_temp_path {folder}/{name}-scgi;
             {upstream}
             server {{ {server} }}
         }}\n"
    )
}

/// Grants every upgrade, and returns what comes after. Ends when dropped.
struct Echo {
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn start(netns: &Netns) -> anyhow::Result<Echo> {
        let listener = netns.run(|| TcpListener::bind(local(ECHO_PORT)))?;
        let accepting = listener.try_clone()?;
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                // As many as there are tunnels; each ends with its connection.
                std::thread::spawn(move || {
                    site::pin(Role::Backend);
                    let _ = echo(stream);
                });
            }
        });
        Ok(Echo {
            listener,
            thread: Some(thread),
        })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // Who waits in accept(2) is told that there is nothing more to come.
        let _ = SockRef::from(&self.listener).shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?.take(HEAD_BYTES));
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
    }
    let switch = format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Accept: {ACCEPT}\r\n\r\n"
    );
    stream.write_all(switch.as_bytes())?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}
