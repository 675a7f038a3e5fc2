//! A client connection of HTTP/3 (RFC 9114): many requests at once, each with a task of its own.
//!
//! The h3 library reads heads and frames; what it is given and what becomes of a stream that is dropped is
//! in [`crate::l7::http3`]. A request's task ends when the client has all of its response, or has taken the
//! request back.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::SystemTime;

use bytes::Bytes;
use h3::error::{Code, ConnectionError, StreamError};
use h3::server::{RequestResolver, RequestStream};
use http::header::{CONTENT_LENGTH, DATE, EXPECT, TE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body::Body;
use tokio::sync::Notify;

use crate::l7::body::{ClientBody, ResponseBody};
use crate::l7::client::Client;
use crate::l7::connection::streams::{StreamTask, look_at_streams};
use crate::l7::connection::{LINGER, drive};
use crate::l7::error::UNPARSABLE;
use crate::l7::forward;
use crate::l7::handshake::TlsSession;
use crate::l7::http3::{Accepted, Connection, RequestBody, SendStream};
use crate::l7::progress::Progress;
use crate::l7::record;
use crate::l7::worker::Worker;

/// Serves one connection until it ends.
pub(in crate::l7) async fn serve(
    worker: &Rc<Worker>,
    quic: quinn::Connection,
    session: TlsSession,
    local: SocketAddr,
) {
    worker.metrics.http3_connections.add(1);
    let peer = quic.remote_address();
    let client = Rc::new(Client::new(worker, peer, local, Some(Rc::new(session))));
    let transport = Connection::new(quic, &client);
    let common = transport.common();
    let goes_away = Notify::new();
    let drains = worker.is_draining();
    if drains {
        goes_away.notify_one();
    }
    client.wake_this_task().await;
    let mut is_idle = false;
    let ended = drive(
        &client,
        pin!(run(&client, transport, &goes_away)),
        drains,
        |_| goes_away.notify_one(),
        |connection, now| {
            let graceful = |_: Pin<&mut _>| goes_away.notify_one();
            look_at_streams(&client, &mut is_idle, connection, now, graceful)
        },
    )
    .await;
    match ended {
        Err(_) => worker.metrics.connections_timed_out.add(1),
        Ok(Err(error)) if common.is_broken() => {
            worker.metrics.http3_errors.add(1);
            tracing::debug!(%peer, %error, "client connection of HTTP/3 ended");
        }
        Ok(_) => {}
    }
    common.close(Code::H3_NO_ERROR);
}

/// The streams of one connection.
#[derive(Default)]
struct Streams {
    open: Cell<usize>,
    ended: Notify,
}

/// Accepts requests; once it `goes_away`, only until those that are open have ended.
async fn run(
    client: &Rc<Client>,
    transport: Connection,
    goes_away: &Notify,
) -> Result<(), ConnectionError> {
    let common = transport.common();
    let head_bytes = client
        .worker
        .settings(|settings| settings.limits.request_header_bytes as u64);
    let mut builder = h3::server::builder();
    builder
        .max_field_section_size(head_bytes)
        .send_grease(false);
    let mut h3 = builder.build(transport).await?;
    let streams = Rc::new(Streams::default());
    let mut is_going = false;
    loop {
        let is_over = is_going && streams.open.get() == 0;
        tokio::select! {
            // All may be dropped: a stream that was not handed out stays with h3.
            accepted = h3.accept() => {
                let Some(request) = accepted? else {
                    return Ok(());
                };
                let Some(accepted) = common.take_accepted() else {
                    continue;
                };
                match is_going {
                    // It has been told that nobody looks at this one.
                    true => accepted.stream.is_rejected.set(true),
                    false => begin_stream(client, &streams, request, accepted),
                }
            }
            () = goes_away.notified(), if !is_going => {
                is_going = true;
                // Names the request behind the last one; this one may not be sent again.
                h3.shutdown(1).await?;
            }
            () = streams.ended.notified(), if is_going => {}
            // Requests that are on their way learn meanwhile that they are not served.
            () = tokio::time::sleep(LINGER), if is_over => return Ok(()),
        }
    }
}

fn begin_stream(
    client: &Rc<Client>,
    streams: &Rc<Streams>,
    request: RequestResolver<Connection, Bytes>,
    accepted: Accepted,
) {
    let progress = client.begin_stream();
    progress.head_begins();
    let open = OpenStream::new(streams);
    let (client, known) = (Rc::clone(client), Rc::clone(&progress));
    let served = {
        let client = Rc::clone(&client);
        async move {
            let _open = open;
            serve_stream(client, known, request, accepted).await;
        }
    };
    tokio::task::spawn_local(StreamTask::new(served, client, Some(progress)));
}

/// Counts a stream, however it ends.
struct OpenStream(Rc<Streams>);

impl OpenStream {
    fn new(streams: &Rc<Streams>) -> OpenStream {
        streams.open.set(streams.open.get() + 1);
        OpenStream(Rc::clone(streams))
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        self.0.ended.notify_one();
    }
}

/// One request. Returning early resets its stream.
async fn serve_stream(
    client: Rc<Client>,
    progress: Rc<Progress>,
    request: RequestResolver<Connection, Bytes>,
    accepted: Accepted,
) {
    let Accepted {
        stream,
        mut stopped,
    } = accepted;
    let (request, mut h3) = match request.resolve_request().await {
        Ok(resolved) => resolved,
        Err(error) => return not_resolved(&client, &error),
    };
    client.count_request();
    let Ok(len) = body_len(request.headers()) else {
        h3.stop_sending(Code::H3_MESSAGE_ERROR);
        h3.stop_stream(Code::H3_MESSAGE_ERROR);
        return refused(&client, StatusCode::BAD_REQUEST);
    };
    let (mut h3, received) = h3.split();
    let mut body = RequestBody::new(received, Rc::clone(&stream), len);
    begin_body(&request, len, &mut body).await;
    if body.is_broken() {
        h3.stop_stream(Code::H3_MESSAGE_ERROR);
        return refused(&client, StatusCode::BAD_REQUEST);
    }
    // Others than `100-continue` are refused.
    let mut waits = request.headers().contains_key(EXPECT) && !body.has_begun();
    let is_head = request.method() == Method::HEAD;
    let request = request.map(|()| ClientBody::Http3(Box::new(body)));
    stream.is_responding.set(true);
    let responded = async {
        let mut answer = pin!(forward::answer(Rc::clone(&client), progress, request));
        let response = loop {
            let step = poll_fn(|cx| {
                let answer = answer.as_mut().poll(cx);
                match answer {
                    Poll::Ready(Ok(response)) => Poll::Ready(Some(response)),
                    Poll::Pending if waits && stream.is_asked_for(cx.waker()) => Poll::Ready(None),
                    Poll::Pending => Poll::Pending,
                }
            });
            if let Some(response) = step.await {
                break response;
            }
            waits = false;
            let mut go_on = Response::new(());
            *go_on.status_mut() = StatusCode::CONTINUE;
            h3.send_response(go_on).await?;
        };
        respond(response, is_head, &mut h3).await
    };
    tokio::select! {
        // Dropping the other one drops the request.
        () = &mut stopped => return,
        responded = responded => {
            if responded.is_err() {
                return;
            }
        }
    }
    stream.is_responding.set(false);
    stopped.await;
}

/// Waits for the first of a body, or its end, where there should be none: a backend of HTTP/1 is told of a
/// body before it comes, and most clients send the end with the head.
async fn begin_body(request: &Request<()>, len: Option<u64>, body: &mut RequestBody) {
    let expects_none = match len {
        None => matches!(
            *request.method(),
            Method::GET | Method::HEAD | Method::OPTIONS | Method::CONNECT | Method::TRACE
        ),
        Some(len) => len == 0,
    };
    poll_fn(|cx| match body.poll_begin(cx) {
        Poll::Pending if expects_none => Poll::Pending,
        _ => Poll::Ready(()),
    })
    .await;
}

async fn respond(
    response: Response<ResponseBody>,
    is_head: bool,
    h3: &mut RequestStream<SendStream, Bytes>,
) -> Result<(), Aborted> {
    let (mut parts, mut body) = response.into_parts();
    complete_head(&mut parts, &body, is_head);
    h3.send_response(Response::from_parts(parts, ())).await?;
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let frame = frame.map_err(|_| Aborted)?;
        match frame.into_data() {
            Ok(data) if is_head || data.is_empty() => {}
            Ok(data) => h3.send_data(data).await?,
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    h3.send_trailers(trailers).await?;
                }
            }
        }
    }
    Ok(h3.finish().await?)
}

/// The backend broke off, or the client did.
struct Aborted;

impl From<StreamError> for Aborted {
    fn from(_: StreamError) -> Aborted {
        Aborted
    }
}

/// What hyper adds to responses of the other versions.
fn complete_head(parts: &mut http::response::Parts, body: &ResponseBody, is_head: bool) {
    let headers = &mut parts.headers;
    let has_none = matches!(
        parts.status,
        StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
    );
    if let Some(len) = body.size_hint().exact()
        && !has_none
        && !(is_head && len == 0)
        && !headers.contains_key(CONTENT_LENGTH)
    {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(len));
    }
    if !headers.contains_key(DATE) {
        let now = httpdate::fmt_http_date(SystemTime::now());
        headers.insert(DATE, HeaderValue::try_from(now).expect("a date is ASCII"));
    }
}

/// What the head says of the body's length.
///
/// # Errors
/// It says so in more than one way, or has fields of a connection (RFC 9114 §4.2).
fn body_len(headers: &HeaderMap) -> Result<Option<u64>, Malformed> {
    const OF_CONNECTIONS: [&str; 5] = [
        "connection",
        "keep-alive",
        "proxy-connection",
        "transfer-encoding",
        "upgrade",
    ];
    let te = headers.get_all(TE).iter();
    if OF_CONNECTIONS
        .iter()
        .any(|&name| headers.contains_key(name))
        || te
            .into_iter()
            .any(|te| !te.as_bytes().eq_ignore_ascii_case(b"trailers"))
    {
        return Err(Malformed);
    }
    let mut len = None;
    for value in headers.get_all(CONTENT_LENGTH) {
        let digits = value.as_bytes();
        if len.is_some() || digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
            return Err(Malformed);
        }
        let digits = value.to_str().map_err(|_| Malformed)?;
        len = Some(digits.parse().map_err(|_| Malformed)?);
    }
    Ok(len)
}

/// A request's head is none of HTTP/3.
struct Malformed;

/// h3 has answered 431, or reset the stream.
fn not_resolved(client: &Client, error: &StreamError) {
    tracing::debug!(peer = %client.peer, %error, "not a request of HTTP/3");
    match error {
        StreamError::HeaderTooBig { .. } => {
            refused(client, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
        }
        StreamError::StreamError { code, .. } if *code == Code::H3_MESSAGE_ERROR => {
            refused(client, StatusCode::BAD_REQUEST);
        }
        _ => {}
    }
}

fn refused(client: &Client, status: StatusCode) {
    client.worker.metrics.errors[UNPARSABLE].add(1);
    record::log_unparsable(client, status);
}
