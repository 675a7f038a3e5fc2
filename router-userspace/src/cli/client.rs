//! A client of the admin API, for the commands that ask the running gateway.

use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::config::AdminListen;

const TIMEOUT: Duration = Duration::from_secs(30);
const MAX_BODY_BYTES: usize = 1 << 30;

/// Fetches a path.
///
/// # Errors
/// Also any status but 200, with the body's text.
pub async fn get(admin: &AdminListen, path: &str) -> anyhow::Result<Bytes> {
    let answer = async {
        match admin {
            AdminListen::Tcp(address) => exchange(TcpStream::connect(address).await?, path).await,
            AdminListen::Unix(socket) => exchange(UnixStream::connect(socket).await?, path).await,
        }
    };
    let what = || format!("ask the gateway at {admin}");
    tokio::time::timeout(TIMEOUT, answer)
        .await
        .with_context(what)?
        .with_context(what)
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
        let body = get(
            admin,
            &format!("{path}?limit=10000{}", query.collect::<String>()),
        )
        .await?;
        let mut answer: Value = serde_json::from_slice(&body).context("read the answer")?;
        if let Value::Array(rows) = answer["rows"].take() {
            page(rows)?;
        }
        match answer["next"].as_str() {
            Some(next) => after = Some(next.to_owned()),
            None => return Ok(()),
        }
    }
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    path: &str,
) -> anyhow::Result<Bytes> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::get(path)
        .header(header::HOST, "viaduct")
        .body(Empty::<Bytes>::new())
        .context("make the request")?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_BODY_BYTES)
        .collect()
        .await;
    connection.abort();
    let body = body
        .map_err(|error| anyhow::anyhow!("read the answer: {error}"))?
        .to_bytes();
    if !status.is_success() {
        bail!("{status}: {}", String::from_utf8_lossy(&body).trim());
    }
    Ok(body)
}

/// Percent-encodes a query value (RFC 3986 §2.1).
fn escape(text: &str) -> String {
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
