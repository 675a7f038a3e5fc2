//! A minimal reverse proxy of Pingora, for `cargo xtask bench l7`: one backend, one thread, and the
//! headers that the others in the benchmark add.
//!
//! `pingora-proxy LISTEN BACKEND http1|h2c ACCESS_LOG [CERTIFICATE KEY]`; an access log of `-` is
//! none, and with a certificate the listener is TLS with HTTP/2 by ALPN.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use pingora::apps::HttpServerOptions;
use pingora::http::RequestHeader;
use pingora::listeners::tls::TlsSettings;
use pingora::protocols::ALPN;
use pingora::proxy::{ProxyHttp, Session, http_proxy_service};
use pingora::server::Server;
use pingora::server::configuration::ServerConf;
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, Result};

/// Kept-alive connections to the backend, as many as the others may keep.
const IDLE_CONNECTIONS: usize = 512;

struct Proxy {
    backend: String,
    h2c: bool,
    scheme: &'static str,
    access_log: Option<Mutex<BufWriter<File>>>,
    requests: AtomicU64,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [listen, backend, protocol, access_log, certificate @ ..] = arguments.as_slice() else {
        panic!("usage: pingora-proxy LISTEN BACKEND http1|h2c ACCESS_LOG [CERTIFICATE KEY]");
    };
    let access_log = (access_log != "-").then(|| {
        let file = File::create(access_log).expect("the access log can be written");
        Mutex::new(BufWriter::with_capacity(64 * 1024, file))
    });
    let configuration = ServerConf {
        threads: 1,
        work_stealing: false,
        upstream_keepalive_pool_size: IDLE_CONNECTIONS,
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, configuration);
    server.bootstrap();
    let proxy = Proxy {
        backend: backend.clone(),
        h2c: protocol == "h2c",
        scheme: if certificate.is_empty() {
            "http"
        } else {
            "https"
        },
        access_log,
        requests: AtomicU64::new(0),
    };
    let mut service = http_proxy_service(&server.configuration, proxy);
    match certificate {
        [file, key] => {
            let mut tls = TlsSettings::intermediate(file, key).expect("the certificate is valid");
            tls.enable_h2();
            service.add_tls_with_settings(listen, None, tls);
        }
        _ => {
            // h2c by prior knowledge, beside HTTP/1.1.
            let mut options = HttpServerOptions::default();
            options.h2c = true;
            service
                .app_logic_mut()
                .expect("the service is new")
                .server_options = Some(options);
            service.add_tcp(listen);
        }
    }
    server.add_service(service);
    server.run_forever();
}

#[async_trait]
impl ProxyHttp for Proxy {
    type CTX = ();

    fn new_ctx(&self) -> Self::CTX {}

    async fn upstream_peer(&self, _: &mut Session, _: &mut ()) -> Result<Box<HttpPeer>> {
        let mut peer = HttpPeer::new(self.backend.as_str(), false, String::new());
        if self.h2c {
            peer.options.alpn = ALPN::H2;
            peer.options.max_h2_streams = 100;
        }
        Ok(Box::new(peer))
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        request: &mut RequestHeader,
        _: &mut (),
    ) -> Result<()> {
        if let Some(client) = session.client_addr().and_then(|address| address.as_inet()) {
            request.insert_header("X-Forwarded-For", client.ip().to_string())?;
        }
        request.insert_header("X-Forwarded-Proto", self.scheme)?;
        if let Some(host) = session.req_header().headers.get("Host") {
            request.insert_header("X-Forwarded-Host", host)?;
        }
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        request.insert_header("X-Request-Id", format!("{number:032x}"))
    }

    async fn logging(&self, session: &mut Session, _: Option<&Error>, _: &mut ()) {
        let Some(log) = &self.access_log else { return };
        let status = session
            .response_written()
            .map_or(0, |response| response.status.as_u16());
        let request = session.req_header();
        let header = |name| {
            request
                .headers
                .get(name)
                .and_then(|value| value.to_str().ok())
        };
        let client = session
            .client_addr()
            .map(ToString::to_string)
            .unwrap_or_default();
        let mut log = log.lock().expect("no writer panics");
        let _ = writeln!(
            log,
            "{client} {:?} \"{} {}\" {status} {} {:?} {:?}",
            std::time::SystemTime::now(),
            request.method,
            request.uri,
            session.body_bytes_sent(),
            header("referer"),
            header("user-agent"),
        );
    }
}
