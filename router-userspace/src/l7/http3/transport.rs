//! quinn's streams as the h3 library takes them, with the bounds it does without.
//!
//! A stream hands h3 one piece at a time: not before what bodies were in the last one has been taken, so that what h3
//! holds is bounded by a piece and one frame. Frames are looked at by [`super::frames`], and counted against
//! `http.limits.control_frames`. A stream of a response that is dropped before its end is reset: quinn
//! would end it as if it were whole.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes};
use h3::error::Code;
use h3::quic::{self, ConnectionErrorIncoming, StreamErrorIncoming, StreamId, WriteBuf};
use quinn::{ConnectionError, ReadError, VarInt, WriteError};

use super::frames::{Frames, Piece};
use crate::l7::client::Client;
use crate::l7::clients::Cutoff;
use crate::l7::frames::{Budget, Control};

/// Bytes of a frame on a control stream: SETTINGS, and what it may have that is not known here.
const CONTROL_FRAME_BYTES: u64 = 4096;

/// How much longer than `http.limits.request_header_bytes` a head may be to be answered 431; one that is longer
/// ends the connection.
const OVERSIZE: u64 = 4;

/// A QUIC connection for h3's server.
pub(in crate::l7) struct Connection {
    quic: quinn::Connection,
    common: Rc<Common>,
    requests: Option<Pending<(quinn::SendStream, quinn::RecvStream)>>,
    controls: Option<Pending<quinn::RecvStream>>,
}

type Pending<T> = Pin<Box<dyn Future<Output = Result<T, ConnectionError>>>>;

/// What the streams of one connection share.
pub(in crate::l7) struct Common {
    quic: quinn::Connection,
    client: Rc<Client>,
    budget: RefCell<Budget>,
    /// Of the stream that h3 is about to hand out.
    accepted: Cell<Option<Accepted>>,
}

/// What h3 does not tell of a request's stream.
pub(in crate::l7) struct Accepted {
    pub stream: Rc<Stream>,
    /// Ends when the client wants no response, or has all of it.
    pub stopped: Pin<Box<dyn Future<Output = ()>>>,
}

/// What is known of a request's stream beside h3.
#[derive(Default)]
pub(in crate::l7) struct Stream {
    /// Bytes of the body that h3 has and has not handed out.
    pub untaken: Cell<usize>,
    /// Empty DATA frames that h3 has been given and has not taken for the body's end.
    pub empty_data: Cell<usize>,
    /// The body has been asked for, or who is to be woken when it is.
    asked_for: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    /// A response is under way, and not whole.
    pub is_responding: Cell<bool>,
    /// It came after the client was told that no more are served.
    pub is_rejected: Cell<bool>,
}

impl Stream {
    /// A backend would take the body.
    pub(super) fn ask_for_body(&self) {
        if !self.asked_for.replace(true)
            && let Some(waker) = self.waker.take()
        {
            waker.wake();
        }
    }

    /// Whether a backend would; if not, who is to be woken when one does.
    pub(in crate::l7) fn is_asked_for(&self, waker: &Waker) -> bool {
        if !self.asked_for.get() {
            self.waker.replace(Some(waker.clone()));
        }
        self.asked_for.get()
    }
}

impl Connection {
    pub(in crate::l7) fn new(quic: quinn::Connection, client: &Rc<Client>) -> Connection {
        let common = Rc::new(Common {
            quic: quic.clone(),
            client: Rc::clone(client),
            budget: RefCell::new(Budget::new(client.worker.now())),
            accepted: Cell::default(),
        });
        Connection::sharing(quic, common)
    }

    fn sharing(quic: quinn::Connection, common: Rc<Common>) -> Connection {
        Connection {
            quic,
            common,
            requests: None,
            controls: None,
        }
    }

    pub(in crate::l7) fn common(&self) -> Rc<Common> {
        Rc::clone(&self.common)
    }
}

impl Common {
    /// What belongs to the request that h3 has just handed out.
    pub(in crate::l7) fn take_accepted(&self) -> Option<Accepted> {
        self.accepted.take()
    }

    /// Whether the connection was ended because the client broke the protocol.
    pub(in crate::l7) fn is_broken(&self) -> bool {
        // Before the gateway closes it as it should be, it is h3 that does.
        matches!(
            self.quic.close_reason(),
            Some(ConnectionError::LocallyClosed | ConnectionError::TransportError(_))
        )
    }

    fn on_read(&self, piece: Piece, len: usize) {
        self.client.on_read(len);
        let mut budget = self.budget.borrow_mut();
        budget.earn(piece.useful);
        for _ in 0..piece.other {
            budget.spend(Control::Unknown);
        }
        if piece.other > 0 {
            self.close_if_over(&mut budget);
        }
    }

    fn on_write(&self, len: usize) {
        self.client.on_write(len);
        self.budget.borrow_mut().on_write(len);
    }

    /// The client has taken a request back.
    fn on_reset(&self) {
        let mut budget = self.budget.borrow_mut();
        budget.spend(Control::Reset);
        self.close_if_over(&mut budget);
    }

    fn close_if_over(&self, budget: &mut Budget) {
        let worker = &self.client.worker;
        let limit = worker.settings(|settings| settings.limits.control_frames);
        if budget.is_over(limit) && self.quic.close_reason().is_none() {
            let flood = budget.largest();
            worker.metrics.count_cutoff(Cutoff::from(flood));
            tracing::debug!(peer = %self.client.peer, ?flood, "beyond http.limits.control_frames");
            self.close(Code::H3_EXCESSIVE_LOAD);
        }
        budget.begin_window(worker.now());
    }

    pub(in crate::l7) fn close(&self, code: Code) {
        self.quic.close(varint(code.value()), b"");
    }
}

impl quic::Connection<Bytes> for Connection {
    type RecvStream = RecvStream;
    type OpenStreams = Connection;

    fn poll_accept_recv(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<RecvStream, ConnectionErrorIncoming>> {
        let accepting = self.controls.get_or_insert_with(|| {
            let quic = self.quic.clone();
            Box::pin(async move { quic.accept_uni().await })
        });
        let accepted = ready!(accepting.as_mut().poll(cx));
        self.controls = None;
        let frames = Frames::of_control(CONTROL_FRAME_BYTES);
        Poll::Ready(match accepted {
            Ok(stream) => Ok(RecvStream::new(stream, frames, &self.common, Rc::default())),
            Err(error) => Err(lost(error)),
        })
    }

    fn poll_accept_bidi(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<BidiStream, ConnectionErrorIncoming>> {
        let accepting = self.requests.get_or_insert_with(|| {
            let quic = self.quic.clone();
            Box::pin(async move { quic.accept_bi().await })
        });
        let accepted = ready!(accepting.as_mut().poll(cx));
        self.requests = None;
        let (send, recv) = match accepted {
            Ok(streams) => streams,
            Err(error) => return Poll::Ready(Err(lost(error))),
        };
        let worker = &self.common.client.worker;
        let head = worker.settings(|settings| settings.limits.request_header_bytes as u64);
        let stream: Rc<Stream> = Rc::default();
        let stopped = send.stopped();
        self.common.accepted.set(Some(Accepted {
            stream: Rc::clone(&stream),
            stopped: Box::pin(async move { drop(stopped.await) }),
        }));
        let frames = Frames::of_request(head.saturating_mul(OVERSIZE));
        Poll::Ready(Ok(BidiStream {
            send: SendStream::new(send, &self.common, &stream),
            recv: RecvStream::new(recv, frames, &self.common, stream),
        }))
    }

    fn opener(&self) -> Connection {
        Connection::sharing(self.quic.clone(), Rc::clone(&self.common))
    }
}

impl quic::OpenStreams<Bytes> for Connection {
    type BidiStream = BidiStream;
    type SendStream = SendStream;

    /// A server begins none (RFC 9114 §6.1).
    fn poll_open_bidi(
        &mut self,
        _cx: &mut Context<'_>,
    ) -> Poll<Result<BidiStream, StreamErrorIncoming>> {
        let error = "a server begins no requests";
        Poll::Ready(Err(StreamErrorIncoming::Unknown(error.into())))
    }

    /// h3 opens three when the connection begins, which every client lets it do at once (RFC 9114 §6.2).
    fn poll_open_send(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<SendStream, StreamErrorIncoming>> {
        let opened = match pin!(self.quic.open_uni()).poll(cx) {
            Poll::Ready(opened) => opened,
            Poll::Pending => {
                let error = "the client takes no control streams";
                return Poll::Ready(Err(StreamErrorIncoming::Unknown(error.into())));
            }
        };
        let stream = opened.map_err(|error| StreamErrorIncoming::ConnectionErrorIncoming {
            connection_error: lost(error),
        })?;
        Poll::Ready(Ok(SendStream::new(stream, &self.common, &Rc::default())))
    }

    fn close(&mut self, code: Code, reason: &[u8]) {
        self.quic.close(varint(code.value()), reason);
    }
}

/// A request's stream.
pub(in crate::l7) struct BidiStream {
    send: SendStream,
    recv: RecvStream,
}

/// Towards the client.
pub(in crate::l7) struct SendStream {
    quic: quinn::SendStream,
    common: Rc<Common>,
    stream: Rc<Stream>,
    writing: Option<WriteBuf<Bytes>>,
    has_written: bool,
    /// Finished or reset.
    is_over: bool,
}

impl SendStream {
    fn new(quic: quinn::SendStream, common: &Rc<Common>, stream: &Rc<Stream>) -> SendStream {
        SendStream {
            quic,
            common: Rc::clone(common),
            stream: Rc::clone(stream),
            writing: None,
            has_written: false,
            is_over: false,
        }
    }
}

impl quic::SendStream<Bytes> for SendStream {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        if let Some(data) = &mut self.writing {
            while data.has_remaining() {
                let written = Pin::new(&mut self.quic).poll_write(cx, data.chunk());
                let written = ready!(written).map_err(not_written)?;
                data.advance(written);
                self.common.on_write(written);
                self.has_written = true;
            }
        }
        self.writing = None;
        Poll::Ready(Ok(()))
    }

    fn send_data<T: Into<WriteBuf<Bytes>>>(&mut self, data: T) -> Result<(), StreamErrorIncoming> {
        if self.writing.is_some() {
            let error = "a frame is being written";
            return Err(StreamErrorIncoming::Unknown(error.into()));
        }
        self.writing = Some(data.into());
        Ok(())
    }

    fn poll_finish(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.is_over = true;
        let finished = self.quic.finish();
        Poll::Ready(finished.map_err(|error| StreamErrorIncoming::Unknown(error.into())))
    }

    fn reset(&mut self, code: u64) {
        self.is_over = true;
        // An error means that it is over in another way.
        let _ = self.quic.reset(varint(code));
    }

    fn send_id(&self) -> StreamId {
        id(self.quic.id())
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        // What h3 itself answered with is whole.
        let is_whole = self.has_written && !self.stream.is_responding.get();
        if !self.is_over && !is_whole {
            let code = match (self.stream.is_rejected.get(), self.has_written) {
                (true, _) => Code::H3_REQUEST_REJECTED,
                (false, true) => Code::H3_INTERNAL_ERROR,
                (false, false) => Code::H3_REQUEST_CANCELLED,
            };
            let _ = self.quic.reset(varint(code.value()));
        }
    }
}

/// From the client.
pub(in crate::l7) struct RecvStream {
    quic: quinn::RecvStream,
    frames: Frames,
    common: Rc<Common>,
    stream: Rc<Stream>,
    is_over: bool,
}

impl RecvStream {
    fn new(
        quic: quinn::RecvStream,
        frames: Frames,
        common: &Rc<Common>,
        stream: Rc<Stream>,
    ) -> RecvStream {
        RecvStream {
            quic,
            frames,
            common: Rc::clone(common),
            stream,
            is_over: false,
        }
    }

    fn on_bytes(&mut self, bytes: &[u8]) -> Result<(), StreamErrorIncoming> {
        let Ok(piece) = self.frames.read(bytes) else {
            self.common.close(Code::H3_EXCESSIVE_LOAD);
            return Err(StreamErrorIncoming::Unknown("a frame is too long".into()));
        };
        let stream = &self.stream;
        stream.untaken.set(stream.untaken.get() + piece.data_len);
        let empty_data = stream.empty_data.get() + piece.empty_data;
        stream.empty_data.set(empty_data);
        self.common.on_read(piece, bytes.len());
        Ok(())
    }
}

impl quic::RecvStream for RecvStream {
    type Buf = Bytes;

    fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        if self.stream.untaken.get() > 0 {
            // Nobody has to be woken: h3 has something for whoever polls.
            return Poll::Pending;
        }
        let chunk = ready!(pin!(self.quic.read_chunk(usize::MAX, true)).poll(cx));
        Poll::Ready(match chunk {
            Ok(Some(chunk)) => self.on_bytes(&chunk.bytes).map(|()| Some(chunk.bytes)),
            Ok(None) => {
                self.is_over = true;
                match self.frames.is_whole() {
                    true => Ok(None),
                    false => Err(StreamErrorIncoming::Unknown(
                        "the stream ends in a frame".into(),
                    )),
                }
            }
            Err(error) => {
                self.is_over = true;
                if matches!(error, ReadError::Reset(_)) {
                    self.common.on_reset();
                }
                Err(not_read(error))
            }
        })
    }

    fn stop_sending(&mut self, code: u64) {
        self.is_over = true;
        // An error means that it is over in another way.
        let _ = self.quic.stop(varint(code));
    }

    fn recv_id(&self) -> StreamId {
        id(self.quic.id())
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        if !self.is_over {
            let code = match self.stream.is_rejected.get() {
                true => Code::H3_REQUEST_REJECTED,
                // The response does not depend on the rest of the request (RFC 9114 §4.1).
                false => Code::H3_NO_ERROR,
            };
            let _ = self.quic.stop(varint(code.value()));
        }
    }
}

impl quic::BidiStream<Bytes> for BidiStream {
    type SendStream = SendStream;
    type RecvStream = RecvStream;

    fn split(self) -> (SendStream, RecvStream) {
        (self.send, self.recv)
    }
}

impl quic::SendStream<Bytes> for BidiStream {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.send.poll_ready(cx)
    }

    fn send_data<T: Into<WriteBuf<Bytes>>>(&mut self, data: T) -> Result<(), StreamErrorIncoming> {
        self.send.send_data(data)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.send.poll_finish(cx)
    }

    fn reset(&mut self, code: u64) {
        self.send.reset(code);
    }

    fn send_id(&self) -> StreamId {
        self.send.send_id()
    }
}

impl quic::RecvStream for BidiStream {
    type Buf = Bytes;

    fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        self.recv.poll_data(cx)
    }

    fn stop_sending(&mut self, code: u64) {
        self.recv.stop_sending(code);
    }

    fn recv_id(&self) -> StreamId {
        self.recv.recv_id()
    }
}

fn varint(value: u64) -> VarInt {
    VarInt::from_u64(value).expect("codes of HTTP/3 are small")
}

fn id(id: quinn::StreamId) -> StreamId {
    let id = u64::from(VarInt::from(id));
    id.try_into().expect("both are of 62 bits")
}

fn lost(error: ConnectionError) -> ConnectionErrorIncoming {
    match error {
        ConnectionError::ApplicationClosed(close) => ConnectionErrorIncoming::ApplicationClose {
            error_code: close.error_code.into_inner(),
        },
        ConnectionError::TimedOut => ConnectionErrorIncoming::Timeout,
        error => ConnectionErrorIncoming::Undefined(Arc::new(error)),
    }
}

fn not_read(error: ReadError) -> StreamErrorIncoming {
    match error {
        ReadError::Reset(code) => StreamErrorIncoming::StreamTerminated {
            error_code: code.into_inner(),
        },
        ReadError::ConnectionLost(error) => StreamErrorIncoming::ConnectionErrorIncoming {
            connection_error: lost(error),
        },
        error => StreamErrorIncoming::Unknown(error.into()),
    }
}

fn not_written(error: WriteError) -> StreamErrorIncoming {
    match error {
        WriteError::Stopped(code) => StreamErrorIncoming::StreamTerminated {
            error_code: code.into_inner(),
        },
        WriteError::ConnectionLost(error) => StreamErrorIncoming::ConnectionErrorIncoming {
            connection_error: lost(error),
        },
        error => StreamErrorIncoming::Unknown(error.into()),
    }
}
