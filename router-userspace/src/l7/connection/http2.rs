//! A client connection of HTTP/2 (RFC 9113): many requests at once, each with a task of its own.
//!
//! hyper runs each stream as a future, which [`StreamTasks`] spawns on the worker's thread as a [`StreamTask`].

use std::cell::Cell;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;

use http::Request;
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;

use crate::config::HttpLimits;
use crate::l7::body::ClientBody;
use crate::l7::client::Client;
use crate::l7::client_io::ClientIo;
use crate::l7::connection::drive;
use crate::l7::connection::streams::{StreamTask, look_at_streams};
use crate::l7::forward;
use crate::l7::progress::Progress;

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
            let request = request.map(ClientBody::Hyper);
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
    client.wake_this_task().await;
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
        let client = Rc::clone(&self.client);
        tokio::task::spawn_local(StreamTask::new(future, client, progress));
    }
}
