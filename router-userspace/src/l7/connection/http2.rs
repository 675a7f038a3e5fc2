//! A client connection of HTTP/2 (RFC 9113): many requests at once, each with a task of its own.
//!
//! hyper runs each stream as a future, which [`StreamTasks`] spawns on the worker's thread and drops
//! when its time is up; a dropped stream is reset.

use std::cell::Cell;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};

use http::Request;
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::time::Instant;

use crate::config::HttpLimits;
use crate::l7::client::{Client, Progress};
use crate::l7::client_io::ClientIo;
use crate::l7::connection::{LINGER, Look, drive, look_at};
use crate::l7::forward;

/// What a client may send on one stream, and on all of them, before a backend has taken it.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;

/// What a backend may have sent on one stream before the client has taken it.
const SEND_BUFFER_BYTES: usize = 128 * 1024;

/// Resets that the client brought about by its own errors, before its connection is ended
/// (CVE-2025-8671).
const CLIENT_ERROR_RESETS: usize = 100;

pub(super) async fn serve(client: &Rc<Client>, mut io: ClientIo) {
    let worker = &client.worker;
    io.begin_http2();
    worker.metrics.http2_connections.add(1);
    let tasks = StreamTasks {
        client: Rc::clone(client),
        next: Rc::default(),
    };
    let service = service_fn({
        let (client, tasks) = (Rc::clone(client), tasks.clone());
        move |request: Request<Incoming>| {
            client.count_request();
            let progress = client.begin_stream();
            tasks.next.set(Some(Rc::clone(&progress)));
            forward::answer(Rc::clone(&client), progress, request)
        }
    });
    let connection = worker
        .settings(|settings| server_builder(&settings.limits, tasks))
        .serve_connection(TokioIo::new(io), service);
    let mut connection = pin!(connection);
    let drains = worker.is_draining();
    if drains {
        connection.as_mut().graceful_shutdown();
    }
    let mut goes_away = false;
    let ended = drive(
        client,
        connection.as_mut(),
        drains,
        |connection| connection.graceful_shutdown(),
        |connection, now| {
            let graceful = |connection: Pin<&mut _>| {
                hyper::server::conn::http2::Connection::graceful_shutdown(connection)
            };
            look_at_streams(client, &mut goes_away, connection, now, graceful)
        },
    )
    .await;
    match ended {
        Err(_) => worker.metrics.connections_timed_out.add(1),
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            worker.metrics.http2_errors.add(1);
            tracing::debug!(peer = %client.peer, %error, "client connection of HTTP/2 ended");
        }
    }
}

fn server_builder(
    limits: &HttpLimits,
    tasks: StreamTasks,
) -> hyper::server::conn::http2::Builder<StreamTasks> {
    let mut builder = hyper::server::conn::http2::Builder::new(tasks);
    builder
        .max_concurrent_streams(limits.concurrent_streams)
        .max_header_list_size(u32::try_from(limits.request_header_bytes).unwrap_or(u32::MAX))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .max_local_error_reset_streams(CLIENT_ERROR_RESETS)
        .enable_connect_protocol();
    builder
}

/// Ends streams whose time is up, and the connection when it has had none for too long: it says so
/// first, in case the client is about to begin one (RFC 9113 §6.8).
fn look_at_streams<C>(
    client: &Client,
    goes_away: &mut bool,
    connection: Pin<&mut C>,
    now: Instant,
    graceful: impl Fn(Pin<&mut C>),
) -> Look {
    let worker = &client.worker;
    if client.open_streams() > 0 {
        let mut again = None;
        client.each_stream(|progress| {
            // A stream that is closed is dropped by its task.
            if let Look::Again(at) = look_at(worker, progress, now) {
                again = again.map_or(Some(at), |again: Instant| Some(again.min(at)));
            }
        });
        return Look::Again(again.unwrap_or(now + LINGER));
    }
    let idle = worker.settings(|settings| settings.timeouts.idle);
    let until = client.quiet_since() + idle;
    if until > now {
        return Look::Again(until);
    }
    if std::mem::replace(goes_away, true) {
        return Look::Close;
    }
    graceful(connection);
    Look::Again(now + LINGER)
}

/// Spawns the futures of a connection's streams.
#[derive(Clone)]
struct StreamTasks {
    client: Rc<Client>,
    /// The progress of the stream that hyper is about to spawn: it calls the service and the executor
    /// one after the other.
    next: Rc<Cell<Option<Rc<Progress>>>>,
}

impl<F: Future<Output = ()> + 'static> Executor<F> for StreamTasks {
    fn execute(&self, future: F) {
        let progress = self.next.take();
        tokio::task::spawn_local(StreamTask {
            future: Some(Box::pin(future)),
            client: Rc::clone(&self.client),
            progress,
        });
    }
}

/// A stream until it ends or is cut.
struct StreamTask<F> {
    future: Option<Pin<Box<F>>>,
    client: Rc<Client>,
    /// `None` for what carries an upgraded stream.
    progress: Option<Rc<Progress>>,
}

impl<F: Future<Output = ()>> Future for StreamTask<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let Some(future) = &mut this.future else {
            return Poll::Ready(());
        };
        if let Some(progress) = &this.progress {
            progress.begin_poll();
            if progress.is_cut(cx.waker()) {
                this.future = None;
                return Poll::Ready(());
            }
        }
        future.as_mut().poll(cx)
    }
}

impl<F> Drop for StreamTask<F> {
    fn drop(&mut self) {
        if let Some(progress) = &self.progress {
            self.client.end(progress);
        }
    }
}
