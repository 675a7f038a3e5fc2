//! A client of one server's HTTP API, for the sources that speak JSON: etcd and Consul.
//!
//! Connections are kept for the next request. An answer has a bound in bytes and, until it begins, in
//! time; one that goes on is read [line by line](Lines). A server that vanished without a word is
//! noticed by TCP's keepalive.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use bytes::{Bytes, BytesMut};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde::de::DeserializeOwned;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::config::Server;

/// Bytes of one answer, or of one line of an answer that goes on.
pub(crate) const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Bytes of an answer that are decoded at once: a millisecond's work.
const MAX_DECODED_BYTES: usize = 128 << 10;
/// Bytes of what a server says against a request.
const MAX_ERROR_BYTES: usize = 4096;
/// Connections that are kept while nothing is asked.
const MAX_IDLE: usize = 16;
/// Until a silent connection is probed, and between probes.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Until bytes or probes without an answer end a connection.
const USER_TIMEOUT: Duration = Duration::from_secs(20);

pub(crate) struct Api {
    server: Server,
    tls: Option<TlsConnector>,
    timeout: Duration,
    /// Of every request.
    headers: Vec<(HeaderName, HeaderValue)>,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

/// Files of the configuration.
pub(crate) struct TlsFiles<'a> {
    /// In place of the system's certificates.
    pub(crate) ca: Option<&'a Path>,
    pub(crate) client: Option<(&'a Path, &'a Path)>,
}

impl Api {
    /// # Errors
    /// A file that cannot be used.
    pub(crate) fn new(
        server: Server,
        files: &TlsFiles<'_>,
        timeout: Duration,
    ) -> anyhow::Result<Api> {
        let tls = match server.tls {
            true => Some(TlsConnector::from(Arc::new(tls(files)?))),
            false => None,
        };
        Ok(Api {
            server,
            tls,
            timeout,
            headers: Vec::new(),
            idle: Mutex::default(),
        })
    }

    /// Sends this with every request, and lets no log have it.
    pub(crate) fn set_secret_header(
        &mut self,
        name: HeaderName,
        value: &str,
    ) -> anyhow::Result<()> {
        let mut value = HeaderValue::from_str(value).context("not the value of a header")?;
        value.set_sensitive(true);
        self.headers.retain(|(known, _)| *known != name);
        self.headers.push((name, value));
        Ok(())
    }

    /// Asks, and reads the answer whole. It may take `wait` longer than another to begin.
    ///
    /// # Errors
    /// Also any status but success, with what the server says.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        wait: Duration,
    ) -> anyhow::Result<Response<Bytes>> {
        let patience = self.timeout + wait;
        let answer = async {
            let (response, sender) = self.send(method, path, body).await?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
            let body = body.map_err(|error| anyhow!("read the answer: {error}"))?;
            self.keep(sender);
            anyhow::Ok(Response::from_parts(head, body.to_bytes()))
        };
        let answer = tokio::time::timeout(patience, answer).await;
        answer.with_context(|| format!("no answer within {patience:?}"))?
    }

    /// Asks, and reads an answer that goes on.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub(crate) async fn lines(&self, path: &str, body: Bytes) -> anyhow::Result<Lines> {
        let answer = self.send(Method::POST, path, body);
        let answer = tokio::time::timeout(self.timeout, answer).await;
        let (response, sender) =
            answer.with_context(|| format!("no answer within {:?}", self.timeout))??;
        Ok(Lines {
            body: response.into_body(),
            rest: BytesMut::new(),
            _sender: sender,
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> anyhow::Result<(Response<Incoming>, SendRequest<Full<Bytes>>)> {
        let request = || {
            let Server { host, port, .. } = &self.server;
            let host = match host.contains(':') {
                true => format!("[{host}]:{port}"),
                false => format!("{host}:{port}"),
            };
            let mut request = Request::builder()
                .method(method.clone())
                .uri(path)
                .header(header::HOST, host);
            for (name, value) in &self.headers {
                request = request.header(name, value);
            }
            request.body(Full::new(body.clone()))
        };
        let mut answered = None;
        if let Some(mut sender) = self.take() {
            // The server may have closed it; nothing is asked here that cannot be asked twice.
            let response = sender.send_request(request()?).await;
            answered = response.ok().map(|response| (response, sender));
        }
        let (response, sender) = match answered {
            Some(answered) => answered,
            None => {
                let mut sender = self.connect().await?;
                (sender.send_request(request()?).await?, sender)
            }
        };
        let status = response.status();
        if status.is_success() {
            return Ok((response, sender));
        }
        let body = Limited::new(response.into_body(), MAX_ERROR_BYTES);
        let body = body.collect().await.map(|body| body.to_bytes());
        bail!(Refusal {
            status,
            text: String::from_utf8_lossy(&body.unwrap_or_default())
                .trim()
                .to_owned(),
        })
    }

    async fn connect(&self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        let Server { host, port, .. } = &self.server;
        let stream = TcpStream::connect((host.as_str(), *port)).await;
        let stream = stream.context("connect")?;
        let socket = SockRef::from(&stream);
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE)
            .with_interval(KEEPALIVE);
        socket.set_tcp_keepalive(&keepalive)?;
        socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
        stream.set_nodelay(true)?;
        match &self.tls {
            None => handshake(stream).await,
            Some(tls) => {
                let name = ServerName::try_from(host.clone()).context("name of the server")?;
                handshake(tls.connect(name, stream).await.context("TLS")?).await
            }
        }
    }

    fn take(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|sender| !sender.is_closed());
        idle.pop()
    }

    fn keep(&self, sender: SendRequest<Full<Bytes>>) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE {
            idle.push(sender);
        }
    }
}

/// Decodes an answer, a long one off the thread that sources share with the agent.
///
/// # Errors
/// It is not what it should be.
pub(crate) async fn decode<T: DeserializeOwned + Send + 'static>(body: Bytes) -> anyhow::Result<T> {
    let is_long = body.len() > MAX_DECODED_BYTES;
    let decode = move || serde_json::from_slice(&body);
    let decoded = match is_long {
        true => tokio::task::spawn_blocking(decode)
            .await
            .expect("an answer is decoded without a panic"),
        false => decode(),
    };
    decoded.context("read the answer")
}

/// What a server answered in place of what it was asked for.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) text: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.status, self.text)
    }
}

impl std::error::Error for Refusal {}

/// An answer that goes on; dropped, it ends.
pub(crate) struct Lines {
    body: Incoming,
    rest: BytesMut,
    /// The connection lives as long.
    _sender: SendRequest<Full<Bytes>>,
}

impl Lines {
    /// Cancel safe.
    ///
    /// # Errors
    /// The answer ended, or a line is longer than [`MAX_ANSWER_BYTES`].
    pub(crate) async fn next(&mut self) -> anyhow::Result<Bytes> {
        let mut searched = 0;
        loop {
            let unread = &self.rest[searched..];
            if let Some(end) = unread.iter().position(|&byte| byte == b'\n') {
                return Ok(self.rest.split_to(searched + end + 1).freeze());
            }
            searched = self.rest.len();
            ensure!(searched <= MAX_ANSWER_BYTES, "a line without an end");
            let frame = self.body.frame().await.context("the answer ended")?;
            if let Ok(data) = frame.context("read the answer")?.into_data() {
                self.rest.extend_from_slice(&data);
            }
        }
    }
}

async fn handshake(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> anyhow::Result<SendRequest<Full<Bytes>>> {
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with its sender; what fails is told there.
    tokio::spawn(connection);
    Ok(sender)
}

fn tls(files: &TlsFiles<'_>) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    match files.ca {
        Some(path) => {
            for certificate in certificates(path).context("ca_file")? {
                roots.add(certificate).context("ca_file")?;
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("choose TLS versions")?
        .with_root_certificates(roots);
    let Some((certificate, key)) = files.client else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = certificates(certificate).context("client_certificate_file")?;
    let key = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("client_key_file {}", key.display()))?;
    builder
        .with_client_auth_cert(chain, key)
        .context("client_certificate_file")
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let name = || path.display().to_string();
    let certificates = CertificateDer::pem_file_iter(path).with_context(name)?;
    let certificates = certificates.collect::<Result<Vec<_>, _>>();
    let certificates = certificates.with_context(name)?;
    ensure!(!certificates.is_empty(), "{}: no certificate", name());
    Ok(certificates)
}

/// Percent-encodes a segment of a path or a value of a query (RFC 3986 §2.1).
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                escaped.push(char::from(byte));
            }
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}
