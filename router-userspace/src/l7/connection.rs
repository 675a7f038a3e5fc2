//! One client connection: hyper's server, a watch over its time, and its end.
//!
//! Every connection begins as HTTP/1, and goes on as HTTP/2 if that is what it begins with (prior
//! knowledge, RFC 9113 §3.3) or what TLS agreed on. It holds at most one timer, which is set again
//! only when it fires. HTTP/3 has connections of its own, and the same timer. After the last response of HTTP/1 the connection lingers, so that a client
//! still sending is not reset before it has read its answer (RFC 9112 §9.6).

use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use crate::l7::client::Client;
use crate::l7::client_io::ClientIo;
use crate::l7::handshake::Established;
use crate::l7::progress::{Expiry, Progress};
use crate::l7::tunnel;
use crate::l7::worker::Worker;

mod http1;
mod http2;
#[cfg(feature = "http3")]
mod http3;
mod streams;

#[cfg(feature = "http3")]
pub(super) use http3::serve as serve_http3;

/// How long, and for how many bytes, a closed connection is read for the client's sake.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 64 * 1024;

/// How long a client may be quiet before its connection gives hyper's buffers back, to get them anew
/// with the next request.
const PARK_AFTER: Duration = Duration::from_secs(1);

/// How a connection of HTTP/1 ended.
enum Ended {
    /// Its time was up.
    Expired,
    /// It is between two requests, and has been for a while.
    Quiet(ClientIo),
    /// The client speaks HTTP/2.
    Http2(ClientIo),
    /// Nothing more is to be answered; `read_ahead` is what came behind.
    Over { io: ClientIo, read_ahead: Bytes },
}

/// Serves one connection until it ends.
pub(super) async fn serve(worker: Rc<Worker>, established: Established) {
    let Established {
        stream,
        peer,
        local,
        tls,
    } = established;
    let http2 = tls.as_ref().is_some_and(|tls| tls.alpn_h2);
    let client = Rc::new(Client::new(&worker, peer, local, tls));
    let progress = Rc::new(Progress::new(&worker, None));
    let mut io = ClientIo::new(stream, &client, &progress);
    if http2 {
        Box::pin(http2::serve(&client, io)).await;
        return;
    }
    loop {
        // Boxed, so that a quiet connection does not keep the room.
        match Box::pin(http1::serve(&client, &progress, io)).await {
            Ended::Quiet(parked) => match next_request(&worker, &progress, parked).await {
                Some(woken) => io = woken,
                None => return,
            },
            Ended::Expired => {
                worker.metrics.connections_timed_out.add(1);
                client.switch.take();
                return;
            }
            Ended::Http2(io) => return Box::pin(http2::serve(&client, io)).await,
            Ended::Over { mut io, read_ahead } => {
                return match client.switch.take() {
                    Some(switch) => {
                        io.begin_tunnel();
                        Box::pin(tunnel::run_upgraded(&worker, io, read_ahead, switch)).await;
                    }
                    None if client.has_ended() => {}
                    None => Box::pin(linger(io)).await,
                };
            }
        }
    }
}

/// Waits until the client says something. `None` if it does not in time, or the worker drains.
async fn next_request(worker: &Worker, progress: &Progress, io: ClientIo) -> Option<ClientIo> {
    let deadline =
        worker.settings(|settings| progress.deadline(&settings.timeouts, &settings.limits))?;
    let ends = async {
        if !worker.is_draining() {
            worker.drain_notice().await;
        }
        // One of a retiring worker is good for one more request.
        if worker.is_retiring() {
            std::future::pending().await
        }
    };
    worker.metrics.connections_quiet.add(1);
    let woken = tokio::select! {
        _ = io.readable() => true,
        () = ends => false,
        () = tokio::time::sleep_until(deadline) => {
            worker.metrics.connections_timed_out.add(1);
            false
        }
    };
    worker.metrics.connections_quiet.subtract(1);
    worker.forget_clock();
    woken.then_some(io)
}

async fn linger(mut io: ClientIo) {
    // hyper has done so, except where it was prepared for another protocol.
    let _ = io.shutdown().await;
    let mut buffer = vec![0; 4096];
    let mut left = LINGER_BYTES;
    let discard = async {
        while let Ok(len) = io.read(&mut buffer).await
            && len > 0
            && left > len
        {
            left -= len;
        }
    };
    let _ = tokio::time::timeout(LINGER, discard).await;
}

/// Polls a connection of hyper until it ends, or it is to be left before.
///
/// `graceful` has it end after what is open; `expired` says what is to be done when the timer fires,
/// and when to look again.
async fn drive<C, R>(
    client: &Client,
    mut connection: Pin<&mut C>,
    drains: bool,
    graceful: impl Fn(Pin<&mut C>),
    mut expired: impl FnMut(Pin<&mut C>, Instant) -> Look,
) -> Result<R, Left>
where
    C: Future<Output = R>,
{
    let worker = &client.worker;
    let mut draining = pin!(worker.drain_notice());
    let first = worker.settings(|settings| settings.shortest_timeout());
    let mut watch = Watch {
        timer: Box::pin(tokio::time::sleep(first)),
        timer_is_polled: false,
        listens: false,
        drains,
    };
    std::future::poll_fn(|cx| {
        worker.forget_clock();
        loop {
            if watch.begins_drain(worker, draining.as_mut(), cx) {
                graceful(connection.as_mut());
            }
            if let Poll::Ready(result) = connection.as_mut().poll(cx) {
                return Poll::Ready(Ok(result));
            }
            if client.take_end() {
                graceful(connection.as_mut());
                continue;
            }
            if let Some(at) = client.take_look_at() {
                watch.look_by(at);
            }
            ready!(watch.poll_timer(cx));
            let look = expired(connection.as_mut(), worker.read_clock());
            match look {
                Look::Close => return Poll::Ready(Err(Left::Expired)),
                Look::Park => return Poll::Ready(Err(Left::Quiet)),
                Look::Again(at) => watch.rearm(at),
            }
        }
    })
    .await
}

/// Why a connection is left before it has ended.
enum Left {
    Expired,
    Quiet,
}

/// What follows from a look at what the timer is for.
enum Look {
    Close,
    Park,
    /// Nothing is over before this.
    Again(Instant),
}

/// The connection's one timer, and its ear for the worker's drain notice.
struct Watch {
    timer: Pin<Box<tokio::time::Sleep>>,
    timer_is_polled: bool,
    listens: bool,
    drains: bool,
}

impl Watch {
    /// True once, when the worker begins to drain.
    ///
    /// The notice is polled only to register for it: the task has one waker, so what matters
    /// afterwards is that it is woken.
    fn begins_drain<D: Future<Output = ()>>(
        &mut self,
        worker: &Worker,
        notice: Pin<&mut D>,
        cx: &mut Context<'_>,
    ) -> bool {
        if !self.listens {
            self.listens = true;
            let _ = notice.poll(cx);
        }
        if self.drains || !worker.is_draining() {
            return false;
        }
        self.drains = true;
        true
    }

    /// Polling a timer registers the waker, which does not change; once is enough.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.timer_is_polled && !self.timer.is_elapsed() {
            return Poll::Pending;
        }
        self.timer_is_polled = true;
        self.timer.as_mut().poll(cx)
    }

    fn look_by(&mut self, at: Instant) {
        if at < self.timer.deadline() {
            self.rearm(at);
        }
    }

    fn rearm(&mut self, at: Instant) {
        self.timer.as_mut().reset(at);
        self.timer_is_polled = false;
    }
}

/// Looks at one request: closes, or lets it answer, or says when to look again.
fn look_at(worker: &Worker, progress: &Progress, now: Instant) -> Look {
    let (deadline, shortest) = worker.settings(|settings| {
        (
            progress.deadline(&settings.timeouts, &settings.limits),
            settings.shortest_timeout(),
        )
    });
    // No phase that may begin meanwhile can end before the shortest timeout has passed.
    let again = now + shortest;
    match deadline {
        Some(deadline) if deadline <= now => match progress.expire() {
            Expiry::Close => Look::Close,
            Expiry::Answer => Look::Again(again),
        },
        Some(deadline) => Look::Again(deadline.min(again)),
        None => Look::Again(again),
    }
}
