//! A client connection of HTTP/1.0 or 1.1.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use http::header::TRANSFER_ENCODING;
use http::{Request, StatusCode};
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;

use crate::config::HttpLimits;
use crate::l7::body::ClientBody;
use crate::l7::client::Client;
use crate::l7::client_io::ClientIo;
use crate::l7::connection::{Ended, Left, Look, PARK_AFTER, drive, look_at};
use crate::l7::error::UNPARSABLE;
use crate::l7::forward;
use crate::l7::progress::Progress;
use crate::l7::record;
use crate::l7::validate::LengthAndCoding;

/// Most bytes read from a client at once. A connection gets there only when its reads fill what it has;
/// a body of 64 KiB then comes in one read with its head.
const BUFFER_BYTES: usize = 128 * 1024;

/// hyper's default; asking for it by name would take its slower path.
const DEFAULT_HEADER_COUNT: usize = 100;

pub(super) async fn serve(client: &Rc<Client>, progress: &Rc<Progress>, io: ClientIo) -> Ended {
    let worker = &client.worker;
    let service = service_fn({
        let (client, progress) = (Rc::clone(client), Rc::clone(progress));
        move |mut request: Request<Incoming>| {
            client.count_request();
            progress.interim.request_begins(request.version());
            note_both_lengths(&progress, &mut request);
            // Boxed: the connection keeps room for the future of a request whether it has one or not,
            // and memory that a request has just given back is in the cache.
            Box::pin(forward::answer(
                Rc::clone(&client),
                Rc::clone(&progress),
                request.map(ClientBody::Hyper),
            ))
        }
    });
    let mut builder = worker.settings(|settings| server_builder(&settings.limits));
    // Accepted while the worker drains: good for one request.
    let drains = worker.is_draining();
    if drains {
        builder.keep_alive(false);
    }
    let mut connection = builder.serve_connection(TokioIo::new(io), service);
    client.look_by(worker.now() + PARK_AFTER);
    poll_fn(|cx| {
        progress.interim.set_task(cx.waker());
        Poll::Ready(())
    })
    .await;
    let ended = drive(
        client,
        pin!(&mut connection).as_mut(),
        drains,
        |mut connection| {
            // hyper would close an idle one, and perhaps a request that is on its way with it.
            if !worker.is_retiring() {
                std::pin::Pin::new(&mut **connection).graceful_shutdown();
            }
        },
        |_, now| match look_at(worker, progress, now) {
            Look::Again(_) if progress.is_quiet(now, PARK_AFTER) => Look::Park,
            Look::Again(at) => Look::Again(at.min(now + PARK_AFTER)),
            look => look,
        },
    )
    .await;
    let parts = match ended {
        Err(Left::Expired) => return Ended::Expired,
        Err(Left::Quiet) => {
            let parts = connection.into_parts();
            if parts.read_buf.is_empty() {
                progress.forget_heads();
            }
            return Ended::Quiet(parts.io.into_inner().rewound(&parts.read_buf));
        }
        Ok(Ok(())) => connection.into_parts(),
        Ok(Err(error)) if error.is_parse_version_h2() => {
            let parts = connection.into_parts();
            return Ended::Http2(parts.io.into_inner().rewound(&parts.read_buf));
        }
        Ok(Err(error)) => {
            if error.is_parse() {
                worker.metrics.errors[UNPARSABLE].add(1);
                record::log_unparsable(client, status_of(&error));
            }
            tracing::debug!(peer = %client.peer, %error, "client connection ended");
            connection.into_parts()
        }
    };
    Ended::Over {
        io: parts.io.into_inner(),
        read_ahead: parts.read_buf,
    }
}

/// What hyper answers to what it cannot parse.
fn status_of(error: &hyper::Error) -> StatusCode {
    if error.is_parse_too_large() {
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
    } else {
        StatusCode::BAD_REQUEST
    }
}

/// Marks a request that has a length beside its transfer coding; hyper has hidden the length.
fn note_both_lengths(progress: &Progress, request: &mut Request<Incoming>) {
    let is_coded = request.headers().contains_key(TRANSFER_ENCODING);
    let has_body = !request.body().is_end_stream();
    if progress.head_ends(request.method(), is_coded, has_body) {
        request.extensions_mut().insert(LengthAndCoding);
    }
}

fn server_builder(limits: &HttpLimits) -> hyper::server::conn::http1::Builder {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .header_read_timeout(None)
        .max_buf_size(limits.request_header_bytes.max(BUFFER_BYTES))
        .max_header_size(limits.request_header_bytes);
    if limits.request_headers != DEFAULT_HEADER_COUNT {
        builder.max_headers(limits.request_headers);
    }
    builder
}
