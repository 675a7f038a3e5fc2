//! The body of a request of HTTP/3: frames as h3 hands them out, held against the length they were
//! announced with.
//!
//! A body that is longer or shorter than its `Content-Length` is an error (RFC 9114 §4.1.2), so that no
//! backend waits for the rest of one, or takes the end of one for another request.

use std::error::Error;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use h3::server::RequestStream;
use http_body::{Body, Frame, SizeHint};

use super::transport::{RecvStream, Stream};

type Polled = Option<Result<Frame<Bytes>, Box<dyn Error + Send + Sync>>>;

/// What follows a request's head.
pub(in crate::l7) struct RequestBody {
    h3: RequestStream<RecvStream, Bytes>,
    stream: Rc<Stream>,
    /// Of what was announced, if a length was.
    left: Option<u64>,
    /// Read, and not yet handed out.
    first: Option<Polled>,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Data,
    Trailers,
    Over,
}

impl RequestBody {
    pub(in crate::l7) fn new(
        h3: RequestStream<RecvStream, Bytes>,
        stream: Rc<Stream>,
        len: Option<u64>,
    ) -> RequestBody {
        RequestBody {
            h3,
            stream,
            left: len,
            first: None,
            phase: Phase::Data,
        }
    }

    /// Finds out whether there is anything, as far as that has come.
    pub(in crate::l7) fn poll_begin(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.first.is_none() {
            let first = ready!(self.poll_next(cx));
            self.first = Some(first);
        }
        Poll::Ready(())
    }

    /// Whether something of it, or its end, has come.
    pub(in crate::l7) fn has_begun(&self) -> bool {
        self.first.is_some()
    }

    /// Whether it has begun with what it must not have.
    pub(in crate::l7) fn is_broken(&self) -> bool {
        matches!(self.first, Some(Some(Err(_))))
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Polled> {
        let next = ready!(self.poll_checked(cx));
        if !matches!(next, Some(Ok(_))) {
            self.phase = Phase::Over;
        }
        Poll::Ready(next)
    }

    fn poll_checked(&mut self, cx: &mut Context<'_>) -> Poll<Polled> {
        while self.phase == Phase::Data {
            match ready!(self.h3.poll_recv_data(cx)) {
                Ok(Some(mut data)) => {
                    let data = data.copy_to_bytes(data.remaining());
                    return Poll::Ready(Some(self.take(data)));
                }
                Ok(None) => match self.stream.empty_data.get() {
                    0 => self.phase = Phase::Trailers,
                    // It is one of these that h3 takes for the end.
                    count => self.stream.empty_data.set(count - 1),
                },
                Err(error) => return Poll::Ready(Some(Err(error.into()))),
            }
        }
        if self.phase == Phase::Over {
            return Poll::Ready(None);
        }
        let trailers = ready!(self.h3.poll_recv_trailers(cx));
        self.phase = Phase::Over;
        Poll::Ready(match trailers {
            Err(error) => Some(Err(error.into())),
            Ok(_) if self.left.is_some_and(|left| left > 0) => {
                Some(Err("the body is shorter than announced".into()))
            }
            Ok(trailers) => trailers.map(|trailers| Ok(Frame::trailers(trailers))),
        })
    }

    fn take(&mut self, data: Bytes) -> Result<Frame<Bytes>, Box<dyn Error + Send + Sync>> {
        let untaken = self.stream.untaken.get();
        self.stream.untaken.set(untaken.saturating_sub(data.len()));
        if let Some(left) = &mut self.left {
            let rest = left.checked_sub(data.len() as u64);
            *left = rest.ok_or("the body is longer than announced")?;
        }
        Ok(Frame::data(data))
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = Box<dyn Error + Send + Sync>;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Polled> {
        self.stream.ask_for_body();
        match self.first.take() {
            Some(first) => Poll::Ready(first),
            None => self.poll_next(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.first {
            None => self.phase == Phase::Over,
            Some(first) => first.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        let read = match &self.first {
            Some(Some(Ok(frame))) => frame.data_ref().map_or(0, Bytes::len) as u64,
            _ => 0,
        };
        match self.left {
            Some(left) => SizeHint::with_exact(left + read),
            None if self.is_end_stream() => SizeHint::with_exact(0),
            None => SizeHint::default(),
        }
    }
}
