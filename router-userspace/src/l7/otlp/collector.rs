//! The collector's end of OTLP/HTTP: one kept-alive connection, opened when it is needed.

use std::time::Duration;

use anyhow::{Context, anyhow};
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, USER_AGENT};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use prost::Message;
use tokio::net::TcpStream;

use crate::config::CollectorUrl;

/// From connecting to the end of the answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Of an answer that is read.
const ANSWER_BYTES: usize = 64 * 1024;

pub(super) struct Collector {
    pub url: CollectorUrl,
    connection: Option<SendRequest<Full<Bytes>>>,
}

/// Why a batch was not taken.
#[derive(Debug)]
pub(super) enum Undelivered {
    /// It may be tried again.
    Later(anyhow::Error),
    /// It is not to be.
    Never(anyhow::Error),
}

impl Collector {
    pub(super) fn new(url: CollectorUrl) -> Collector {
        Collector {
            url,
            connection: None,
        }
    }

    /// Delivers one batch; how many of its spans the collector has refused.
    ///
    /// # Errors
    /// It was not taken.
    pub(super) async fn post(&mut self, body: &Bytes) -> Result<u64, Undelivered> {
        let was_open = self.connection.as_ref().is_some_and(|it| !it.is_closed());
        match self.post_once(body).await {
            // It was closed for having been idle.
            Err(Undelivered::Later(_)) if was_open => self.post_once(body).await,
            posted => posted,
        }
    }

    async fn post_once(&mut self, body: &Bytes) -> Result<u64, Undelivered> {
        let posted = tokio::time::timeout(TIMEOUT, self.exchange(body)).await;
        let (status, answer) = posted
            .unwrap_or_else(|_| Err(anyhow!("no answer within {TIMEOUT:?}")))
            .inspect_err(|_| self.connection = None)
            .map_err(Undelivered::Later)?;
        match status.as_u16() {
            200..=299 => Ok(rejected(&answer)),
            429 | 502 | 503 | 504 => Err(Undelivered::Later(anyhow!("answered {status}"))),
            _ => Err(Undelivered::Never(anyhow!("answered {status}"))),
        }
    }

    async fn exchange(&mut self, body: &Bytes) -> anyhow::Result<(StatusCode, Bytes)> {
        let request = Request::post(self.url.path())
            .header(HOST, self.url.authority())
            .header(CONTENT_TYPE, "application/x-protobuf")
            .header(USER_AGENT, concat!("viaduct/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(body.clone()))
            .context("make the request")?;
        let response: Response<Incoming> = self
            .connected()
            .await?
            .send_request(request)
            .await
            .context("send spans")?;
        let status = response.status();
        let answer = Limited::new(response.into_body(), ANSWER_BYTES);
        let answer = answer.collect().await.map_err(|error| anyhow!(error))?;
        Ok((status, answer.to_bytes()))
    }

    async fn connected(&mut self) -> anyhow::Result<&mut SendRequest<Full<Bytes>>> {
        let is_ready = match &mut self.connection {
            Some(connection) => connection.ready().await.is_ok(),
            None => false,
        };
        if !is_ready {
            self.connection = None;
        }
        if self.connection.is_none() {
            let stream = TcpStream::connect(self.url.host_and_port()).await;
            let stream = stream.context("connect to the collector")?;
            let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            tokio::spawn(async move {
                // The error, if any, also reached the request.
                let _ = connection.await;
            });
            self.connection = Some(sender);
        }
        Ok(self.connection.as_mut().expect("just set"))
    }
}

/// What the answer says of spans that were not taken; one that cannot be read says nothing.
fn rejected(answer: &Bytes) -> u64 {
    let answer = ExportTraceServiceResponse::decode(answer.clone()).unwrap_or_default();
    let rejected = answer.partial_success.map_or(0, |it| it.rejected_spans);
    u64::try_from(rejected).unwrap_or(0)
}
