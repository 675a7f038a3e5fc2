//! A request body that can be sent again: what has been sent is kept while it is short.
//!
//! Made by `forward` for requests that may be repeated (RFC 9110 §9.2.2). Each attempt gets a
//! [`Attempt`] to send; it reads what earlier attempts were given and then the client. The client's body
//! stays here, so that it does not matter when hyper lets go of an attempt that failed.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

/// The client's body and what has come of it.
pub(super) struct Replay<B> {
    body: RefCell<B>,
    kept: RefCell<BytesMut>,
    trailers: RefCell<Option<HeaderMap>>,
    /// Bytes of `kept` at most.
    capacity: usize,
    state: Cell<State>,
    /// The attempt that may read, counted from 1.
    attempt: Cell<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// All that came is kept.
    Open,
    /// All there is is kept.
    Whole,
    /// More came than may be kept, or reading failed.
    Lost,
}

impl<B: Body<Data = Bytes> + Unpin> Replay<B> {
    pub(super) fn new(body: B, capacity: usize) -> Rc<Replay<B>> {
        let state = if body.is_end_stream() {
            State::Whole
        } else {
            State::Open
        };
        Rc::new(Replay {
            body: RefCell::new(body),
            kept: RefCell::default(),
            trailers: RefCell::default(),
            capacity,
            state: Cell::new(state),
            attempt: Cell::new(0),
        })
    }

    /// The whole body from its start; `None` if that is lost. An earlier attempt gets nothing more.
    pub(super) fn attempt(self: &Rc<Self>) -> Option<Attempt<B>> {
        if self.state.get() == State::Lost {
            return None;
        }
        self.attempt.set(self.attempt.get() + 1);
        Some(Attempt {
            replay: Rc::clone(self),
            number: self.attempt.get(),
            position: 0,
            ended: false,
        })
    }

    fn keep(&self, frame: &Frame<Bytes>) {
        if let Some(trailers) = frame.trailers_ref() {
            *self.trailers.borrow_mut() = Some(trailers.clone());
            self.state.set(State::Whole);
        } else if let Some(data) = frame.data_ref() {
            let mut kept = self.kept.borrow_mut();
            if kept.len() + data.len() <= self.capacity {
                // Copied, for the chunk would keep hyper's whole read buffer.
                kept.extend_from_slice(data);
            } else {
                *kept = BytesMut::new();
                self.state.set(State::Lost);
            }
        }
    }
}

/// A body on its way to one backend.
pub(super) struct Attempt<B> {
    replay: Rc<Replay<B>>,
    number: u32,
    /// Bytes that were sent.
    position: usize,
    ended: bool,
}

impl<B: Body<Data = Bytes> + Unpin> Attempt<B> {
    /// Whether no later attempt has taken its place.
    pub(super) fn is_current(&self) -> bool {
        self.number == self.replay.attempt.get()
    }

    /// What earlier attempts have read and this one has not sent.
    fn next_kept(&mut self) -> Option<Frame<Bytes>> {
        let kept = self.replay.kept.borrow();
        if self.position < kept.len() {
            let data = Bytes::copy_from_slice(&kept[self.position..]);
            self.position = kept.len();
            return Some(Frame::data(data));
        }
        if self.replay.state.get() == State::Whole && !self.ended {
            self.ended = true;
            let trailers = self.replay.trailers.borrow();
            return trailers.clone().map(Frame::trailers);
        }
        None
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Attempt<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = &mut *self;
        if !this.is_current() {
            // Its backend failed. Saying that the body ends here would be a lie.
            return Poll::Pending;
        }
        if this.replay.state.get() != State::Lost
            && let Some(frame) = this.next_kept()
        {
            return Poll::Ready(Some(Ok(frame)));
        }
        if this.ended {
            return Poll::Ready(None);
        }
        let polled = ready!(Pin::new(&mut *this.replay.body.borrow_mut()).poll_frame(cx));
        match &polled {
            Some(Ok(frame)) => {
                let was_kept = this.replay.state.get() != State::Lost;
                if was_kept {
                    this.replay.keep(frame);
                }
                this.position += frame.data_ref().map_or(0, Bytes::len);
                this.ended = frame.is_trailers();
            }
            Some(Err(_)) => this.replay.state.set(State::Lost),
            None => {
                this.ended = true;
                if this.replay.state.get() == State::Open {
                    this.replay.state.set(State::Whole);
                }
            }
        }
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        if self.ended {
            return true;
        }
        let all_sent = self.replay.state.get() == State::Lost
            || self.position >= self.replay.kept.borrow().len();
        all_sent
            && self.replay.trailers.borrow().is_none()
            && self.replay.body.borrow().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.replay.body.borrow().size_hint();
        let kept = self.replay.kept.borrow().len();
        let unsent = (kept as u64).saturating_sub(self.position as u64);
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + unsent);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + unsent);
        }
        hint
    }
}

#[cfg(test)]
mod tests;
