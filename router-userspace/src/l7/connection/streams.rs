//! What HTTP/2 and HTTP/3 have in common: requests at once, each with a task and a time of its own.
//!
//! A stream whose time is up is dropped by its task, and so reset.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::time::Instant;

use crate::l7::client::Client;
use crate::l7::connection::{LINGER, Look, look_at};
use crate::l7::progress::Progress;

/// Ends streams whose time is up, and the connection when it has had none for too long: it says so
/// first, in case the client is about to begin one (RFC 9113 §6.8, RFC 9114 §5.2).
pub(super) fn look_at_streams<C>(
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

/// A stream until it ends or is cut.
pub(super) struct StreamTask<F> {
    future: Option<Pin<Box<F>>>,
    client: Rc<Client>,
    /// `None` for what carries an upgraded stream.
    progress: Option<Rc<Progress>>,
}

impl<F> StreamTask<F> {
    /// Of the future that serves it.
    pub(super) fn new(
        future: F,
        client: Rc<Client>,
        progress: Option<Rc<Progress>>,
    ) -> StreamTask<F> {
        StreamTask {
            future: Some(Box::pin(future)),
            client,
            progress,
        }
    }
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
