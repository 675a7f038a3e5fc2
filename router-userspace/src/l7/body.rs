//! Bodies on their way through: chunks are handed on as they come, so a request holds no more than
//! hyper's buffers of both connections.
//!
//! A body also tells its connection of progress, and the end of a response body is where the
//! backend connection goes back to the pool and the request is counted.

use std::convert::Infallible;
use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::l7::compress::Compressed;
use crate::l7::headers;
#[cfg(feature = "http3")]
use crate::l7::http3;
use crate::l7::lease::Lease;
use crate::l7::progress::Progress;
use crate::l7::record::RequestRecord;
use crate::l7::replay::{Attempt, Replay};

/// What a client sends behind the head of its request.
pub(super) enum ClientBody {
    Hyper(Incoming),
    #[cfg(feature = "http3")]
    Http3(Box<http3::RequestBody>),
}

/// A client's request body on its way to a backend.
pub(super) struct RequestBody {
    source: Option<(Sent, Rc<Progress>)>,
    /// Bytes that have gone to the backend.
    len: u64,
}

/// Why a request's body ends before its end.
#[derive(Debug)]
pub(super) enum RequestBodyError {
    /// The client's framing is broken, or it left.
    Client(Box<dyn Error + Send + Sync>),
    /// Longer than it may be.
    TooLarge,
}

enum Sent {
    Once(ClientBody),
    /// One of several attempts to send it.
    Again(Attempt<ClientBody>),
}

impl Body for ClientBody {
    type Data = Bytes;
    type Error = Box<dyn Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match &mut *self {
            ClientBody::Hyper(body) => {
                let frame = ready!(Pin::new(body).poll_frame(cx));
                Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
            }
            #[cfg(feature = "http3")]
            ClientBody::Http3(body) => Pin::new(&mut **body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            ClientBody::Hyper(body) => body.is_end_stream(),
            #[cfg(feature = "http3")]
            ClientBody::Http3(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            ClientBody::Hyper(body) => body.size_hint(),
            #[cfg(feature = "http3")]
            ClientBody::Http3(body) => body.size_hint(),
        }
    }
}

impl RequestBody {
    pub(super) fn new(body: ClientBody, progress: &Rc<Progress>) -> RequestBody {
        let has_ended = body.is_end_stream();
        RequestBody::of((!has_ended).then(|| (Sent::Once(body), Rc::clone(progress))))
    }

    pub(super) fn empty() -> RequestBody {
        RequestBody::of(None)
    }

    fn of(source: Option<(Sent, Rc<Progress>)>) -> RequestBody {
        RequestBody { source, len: 0 }
    }

    /// Counts a frame, and refuses what is too much.
    fn count(&mut self, frame: &Frame<Bytes>) -> Result<(), RequestBodyError> {
        let (Some((_, progress)), Some(data)) = (&self.source, frame.data_ref()) else {
            return Ok(());
        };
        progress.count_request_bytes(data.len());
        self.len += data.len() as u64;
        if self.len > progress.body_limit() {
            progress.set_body_is_too_large();
            return Err(RequestBodyError::TooLarge);
        }
        Ok(())
    }

    /// Makes it possible to send a body of up to `capacity` bytes again, if there is one.
    pub(super) fn keep(&mut self, capacity: usize) -> Option<KeptBody> {
        let (incoming, progress) = match self.source.take()? {
            (Sent::Once(incoming), progress) => (incoming, progress),
            again => {
                self.source = Some(again);
                return None;
            }
        };
        if incoming.size_hint().lower() > capacity as u64 {
            self.source = Some((Sent::Once(incoming), progress));
            return None;
        }
        let kept = KeptBody {
            replay: Replay::new(incoming, capacity),
            progress,
        };
        self.source = kept.again()?.source;
        Some(kept)
    }
}

/// What is needed to send a request's body again.
pub(super) struct KeptBody {
    replay: Rc<Replay<ClientBody>>,
    progress: Rc<Progress>,
}

impl KeptBody {
    /// The body from its start; `None` if it was too long to be kept.
    pub(super) fn again(&self) -> Option<RequestBody> {
        let attempt = self.replay.attempt()?;
        let source = (Sent::Again(attempt), Rc::clone(&self.progress));
        Some(RequestBody::of(Some(source)))
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = RequestBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        let Some((client, progress)) = &mut self.source else {
            return Poll::Ready(None);
        };
        let polled = match client {
            Sent::Once(incoming) => Pin::new(incoming).poll_frame(cx),
            // What it tells of progress is not this request's anymore.
            Sent::Again(attempt) if !attempt.is_current() => return Poll::Pending,
            Sent::Again(attempt) => Pin::new(attempt).poll_frame(cx),
        };
        progress.set_waits_for_client(polled.is_pending());
        let frame = ready!(polled);
        progress.on_frame();
        progress.observed.add_bytes_in(data_len(&frame));
        if frame.is_none() || client.is_end_stream() {
            progress.request_body_ended();
        }
        let Some(frame) = frame else {
            return Poll::Ready(None);
        };
        let frame = frame.map_err(RequestBodyError::Client);
        let counted = frame.and_then(|frame| self.count(&frame).map(|()| passed_on(frame)));
        Poll::Ready(Some(counted))
    }

    fn is_end_stream(&self) -> bool {
        let client = self.source.as_ref();
        client.is_none_or(|(client, _)| client.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            None => SizeHint::with_exact(0),
            Some((Sent::Once(incoming), _)) => incoming.size_hint(),
            Some((Sent::Again(attempt), _)) => attempt.size_hint(),
        }
    }
}

impl fmt::Display for RequestBodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RequestBodyError::Client(error) => error.fmt(f),
            RequestBodyError::TooLarge => f.write_str("the request body is too large"),
        }
    }
}

impl Error for RequestBodyError {}

impl Sent {
    fn is_end_stream(&self) -> bool {
        match self {
            Sent::Once(incoming) => incoming.is_end_stream(),
            Sent::Again(attempt) => attempt.is_end_stream(),
        }
    }
}

/// What the client is answered with.
pub(super) struct ResponseBody {
    source: Source,
    /// Counts the request when the body has been handed over or dropped.
    record: Option<RequestRecord>,
}

enum Source {
    /// The gateway's own words; none left when taken.
    Text(Option<Bytes>),
    Backend {
        incoming: Incoming,
        lease: Option<Lease>,
        compressed: Option<Box<Compressed>>,
    },
}

impl ResponseBody {
    pub(super) fn empty() -> ResponseBody {
        ResponseBody {
            source: Source::Text(None),
            record: None,
        }
    }

    pub(super) fn text(text: String) -> ResponseBody {
        ResponseBody {
            source: Source::Text(Some(Bytes::from(text))),
            record: None,
        }
    }

    pub(super) fn backend(incoming: Incoming, lease: Lease) -> ResponseBody {
        let lease = if incoming.is_end_stream() {
            lease.finish();
            None
        } else {
            Some(lease)
        };
        ResponseBody {
            source: Source::Backend {
                incoming,
                lease,
                compressed: None,
            },
            record: None,
        }
    }

    /// Sends what comes of a backend's response through an encoder.
    pub(super) fn compress(&mut self, encoder: Compressed) {
        if let Source::Backend { compressed, .. } = &mut self.source {
            *compressed = Some(Box::new(encoder));
        }
    }

    pub(super) fn set_record(&mut self, mut record: RequestRecord) {
        if self.is_end_stream() {
            record.complete();
        } else {
            self.record = Some(record);
        }
    }

    fn complete(&mut self) {
        if let Some(mut record) = self.record.take() {
            record.complete();
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        if let Some(record) = &this.record {
            // Who asks for more has taken what there was.
            record.progress.set_untaken(0);
        }
        let (frame, ended) = match &mut this.source {
            Source::Text(text) => (text.take().map(|text| Ok(Frame::data(text))), true),
            Source::Backend {
                incoming,
                lease,
                compressed,
            } => {
                let frame = ready!(match compressed {
                    None => Pin::new(&mut *incoming).poll_frame(cx),
                    Some(compressed) => compressed.poll_frame(incoming, cx),
                });
                let failed = matches!(frame, Some(Err(_)));
                if failed && let Some(record) = &mut this.record {
                    record.backend_broke_off();
                }
                let is_over = match compressed {
                    None => incoming.is_end_stream(),
                    Some(compressed) => compressed.is_over(),
                };
                let ended = !failed && (frame.is_none() || is_over);
                if let Some(record) = &this.record {
                    record.progress.on_frame();
                    let data = frame
                        .as_ref()
                        .and_then(|frame| frame.as_ref().ok()?.data_ref());
                    record.progress.set_untaken(data.map_or(0, Bytes::len));
                }
                if ended && let Some(lease) = lease.take() {
                    lease.finish();
                }
                (frame.map(|frame| frame.map(passed_on)), ended)
            }
        };
        if let Some(record) = &this.record {
            record.progress.observed.add_bytes_out(data_len(&frame));
        }
        if ended {
            self.complete();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Text(text) => text.is_none(),
            Source::Backend {
                compressed: Some(compressed),
                ..
            } => compressed.is_over(),
            Source::Backend { incoming, .. } => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, Bytes::len) as u64),
            Source::Backend {
                compressed: Some(_),
                ..
            } => SizeHint::default(),
            Source::Backend { incoming, .. } => incoming.size_hint(),
        }
    }
}

fn data_len<E>(frame: &Option<Result<Frame<Bytes>, E>>) -> usize {
    let data = match frame {
        Some(Ok(frame)) => frame.data_ref(),
        _ => None,
    };
    data.map_or(0, Bytes::len)
}

/// A frame without trailer fields that mean something to who forwards a message.
fn passed_on(mut frame: Frame<Bytes>) -> Frame<Bytes> {
    if let Some(trailers) = frame.trailers_mut() {
        headers::clean_trailers(trailers);
    }
    frame
}

/// The service never fails: every failure is a response.
pub(super) type Answer = Result<http::Response<ResponseBody>, Infallible>;
