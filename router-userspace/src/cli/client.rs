//! A client of the admin API, for the commands that ask the running gateway.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::cli::{ConfigOption, Failure};
use crate::config::AdminListen;
pub use crate::source::api::escape;

const TIMEOUT: Duration = Duration::from_secs(30);
const MAX_LINE_BYTES: usize = 1 << 20;
const MAX_BODY_BYTES: usize = 1 << 30;

/// Which gateway a command asks.
#[derive(Clone, Debug, clap::Args)]
pub struct AdminOption {
    /// Admin address of the gateway, ADDRESS:PORT or unix:/PATH [default: the configured one]
    #[arg(long, env = "VIADUCT_ADMIN", value_name = "ADDRESS")]
    admin: Option<AdminListen>,
    #[command(flatten)]
    config: ConfigOption,
}

impl AdminOption {
    /// # Errors
    /// None was given, and the configuration cannot be read.
    pub fn address(&self) -> Result<AdminListen, Failure> {
        match &self.admin {
            Some(admin) => Ok(admin.clone()),
            None => Ok(self.config.load()?.admin.listen),
        }
    }
}

/// Fetches a path.
///
/// # Errors
/// Also any status but success, with the body's text.
pub async fn get(admin: &AdminListen, path: &str) -> anyhow::Result<Bytes> {
    let request = Request::get(path).body(Full::default())?;
    whole(admin, request).await
}

/// Fetches a path as JSON.
pub async fn get_json(admin: &AdminListen, path: &str) -> anyhow::Result<Value> {
    let body = get(admin, path).await?;
    serde_json::from_slice(&body).context("read the answer")
}

/// Posts JSON to a path.
///
/// # Errors
/// As [`get`].
pub async fn post(admin: &AdminListen, path: &str, body: &Value) -> anyhow::Result<()> {
    let request = Request::post(path)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::from(body.to_string()))?;
    whole(admin, request).await?;
    Ok(())
}

/// Hands on each line of an answer that goes on, until it ends or `line` returns false.
pub async fn lines(
    admin: &AdminListen,
    path: &str,
    mut line: impl FnMut(&str) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let request = Request::get(path).body(Full::default())?;
    let what = || format!("ask the gateway at {admin}");
    let mut body = tokio::time::timeout(TIMEOUT, ask(admin, request))
        .await
        .with_context(what)?
        .with_context(what)?;
    let mut rest: Vec<u8> = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.context("read the answer")?.into_data() else {
            continue;
        };
        rest.extend(data);
        while let Some(end) = rest.iter().position(|&octet| octet == b'\n') {
            let whole: Vec<u8> = rest.drain(..=end).collect();
            if !line(String::from_utf8_lossy(&whole).trim_end())? {
                return Ok(());
            }
        }
        ensure!(
            rest.len() <= MAX_LINE_BYTES,
            "a line of the answer is too long"
        );
    }
    Ok(())
}

/// Fetches every page of a listing, and hands each on as it comes.
pub async fn pages(
    admin: &AdminListen,
    path: &str,
    mut page: impl FnMut(Vec<Value>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut after: Option<String> = None;
    loop {
        let query = after
            .iter()
            .map(|after| format!("&after={}", escape(after)));
        let query: String = query.collect();
        let mut answer = get_json(admin, &format!("{path}?limit=10000{query}")).await?;
        if let Value::Array(rows) = answer["rows"].take() {
            page(rows)?;
        }
        match answer["next"].as_str() {
            Some(next) => after = Some(next.to_owned()),
            None => return Ok(()),
        }
    }
}

/// The body of an answer, read whole.
async fn whole(admin: &AdminListen, request: Request<Full<Bytes>>) -> anyhow::Result<Bytes> {
    let answer = async {
        let body = ask(admin, request).await?;
        let body = Limited::new(body, MAX_BODY_BYTES).collect().await;
        let body = body.map_err(|error| anyhow!("read the answer: {error}"))?;
        anyhow::Ok(body.to_bytes())
    };
    let what = || format!("ask the gateway at {admin}");
    tokio::time::timeout(TIMEOUT, answer)
        .await
        .with_context(what)?
        .with_context(what)
}

/// The body of an answer, if its status is a success.
async fn ask(admin: &AdminListen, request: Request<Full<Bytes>>) -> anyhow::Result<Incoming> {
    let response = match admin {
        AdminListen::Tcp(address) => send(TcpStream::connect(address).await?, request).await?,
        AdminListen::Unix(socket) => send(UnixStream::connect(socket).await?, request).await?,
    };
    let status = response.status();
    let body = response.into_body();
    if !status.is_success() {
        let body = Limited::new(body, MAX_BODY_BYTES).collect().await;
        let text = body.map(|body| body.to_bytes()).unwrap_or_default();
        bail!("{status}: {}", String::from_utf8_lossy(&text).trim());
    }
    Ok(body)
}

async fn send(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    mut request: Request<Full<Bytes>>,
) -> anyhow::Result<Response<Incoming>> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the answer, since there is nobody left to ask more.
    tokio::spawn(connection);
    let host = HeaderValue::from_static("viaduct");
    request.headers_mut().insert(header::HOST, host);
    Ok(sender.send_request(request).await?)
}
