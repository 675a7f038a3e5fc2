//! The byte stream to a client; what passes is counted and is progress.
//!
//! Interim responses of backends are written here, between two messages of hyper's: hyper flushes
//! whenever it has written all it had.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::l7::client::Client;
use crate::l7::frames::Frames;
use crate::l7::progress::Progress;
use crate::l7::stream::Stream;

/// Head and body of a response up to this size are copied together to be written.
const SMALL_WRITE_BYTES: usize = 4096;

pub(super) struct ClientIo {
    stream: Stream,
    /// What has been read before, and is to be read again.
    read_ahead: Bytes,
    client: Rc<Client>,
    /// Of HTTP/1, where bytes are of one request at a time.
    progress: Option<Rc<Progress>>,
    /// Of HTTP/2.
    frames: Option<Box<Frames>>,
    /// All that hyper had has been written, so that the next byte begins a message or part of a body.
    is_flushed: bool,
    /// Interim responses, to be written before anything else.
    interim: Vec<u8>,
}

impl ClientIo {
    pub(super) fn new(stream: Stream, client: &Rc<Client>, progress: &Rc<Progress>) -> ClientIo {
        ClientIo {
            stream,
            read_ahead: Bytes::new(),
            client: Rc::clone(client),
            progress: Some(Rc::clone(progress)),
            frames: None,
            is_flushed: true,
            interim: Vec::new(),
        }
    }

    /// From here on bytes are of another protocol.
    pub(super) fn begin_tunnel(&mut self) {
        if let Some(progress) = self.progress.take() {
            progress.forget_heads();
        }
    }

    /// From here on bytes are of many requests at once.
    pub(super) fn begin_http2(&mut self) {
        self.begin_tunnel();
        let mut frames = Frames::new(self.client.worker.now());
        // What of a flood is here has passed.
        let _ = frames.on_read(&self.read_ahead, 0, self.client.worker.now());
        self.frames = Some(Box::new(frames));
    }

    /// The stream as it was before `bytes` were read.
    pub(super) fn rewound(mut self, bytes: &[u8]) -> ClientIo {
        // A copy, so that hyper's buffer is not kept for them, or for none.
        self.read_ahead = Bytes::copy_from_slice(bytes);
        self
    }

    /// Waits until there is something to read, or an error to be had.
    pub(super) async fn readable(&self) {
        if self.read_ahead.is_empty() {
            let _ = self.stream.tcp().readable().await;
        }
    }

    pub(super) fn socket(&self) -> SockRef<'_> {
        self.stream.socket()
    }

    /// Whether hyper holds something that the client does not take: a write that waits.
    fn noting_stalls<T>(&self, polled: Poll<T>) -> Poll<T> {
        if let Some(progress) = &self.progress {
            progress.set_stalled(polled.is_pending());
        }
        polled
    }

    /// Writes the interim responses that may go before what hyper writes next. Those that come too late,
    /// for the response has begun behind bytes that wait, are dropped.
    fn poll_interim(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(progress) = &self.progress
            && progress.interim.is_waiting()
        {
            if self.is_flushed {
                self.interim.append(&mut progress.interim.take());
            } else if !progress.awaits_response() {
                progress.interim.forget();
            }
        }
        while !self.interim.is_empty() {
            let written = Pin::new(&mut self.stream).poll_write(cx, &self.interim);
            let len = ready!(self.noting_stalls(written))?;
            if len == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.client.on_write(len);
            self.interim.drain(..len);
        }
        Poll::Ready(Ok(()))
    }

    /// # Errors
    /// The client floods its connection.
    fn on_read(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.client.on_read(bytes.len());
        if !bytes.is_empty()
            && let Some(progress) = &self.progress
        {
            progress.on_read(bytes);
        }
        let Some(frames) = &mut self.frames else {
            return Ok(());
        };
        let worker = &self.client.worker;
        let limit = worker.settings(|settings| settings.limits.control_frames);
        frames.on_read(bytes, limit, worker.now()).map_err(|flood| {
            worker.metrics.count_cutoff(flood.into());
            tracing::debug!(peer = %self.client.peer, ?flood, "beyond http.limits.control_frames");
            io::Error::other("too many control frames")
        })
    }

    fn on_write(&mut self, len: usize) {
        self.client.on_write(len);
        if let Some(frames) = &mut self.frames {
            frames.on_write(len);
        }
        if let Some(progress) = &self.progress {
            progress.on_write();
        }
    }
}

impl AsyncRead for ClientIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.read_ahead.is_empty() {
            let len = this.read_ahead.len().min(buffer.remaining());
            buffer.put_slice(&this.read_ahead.split_to(len));
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buffer))?;
        Poll::Ready(this.on_read(&buffer.filled()[before..]))
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_interim(cx))?;
        this.is_flushed = false;
        let written = Pin::new(&mut this.stream).poll_write(cx, bytes);
        let len = ready!(this.noting_stalls(written))?;
        this.on_write(len);
        Poll::Ready(Ok(len))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_interim(cx))?;
        this.is_flushed = false;
        let stream = Pin::new(&mut this.stream);
        // send(2) with a copy is cheaper than writev(2) while the copy is small.
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        let written = if total <= SMALL_WRITE_BYTES {
            this.client.worker.with_scratch(|scratch| {
                for slice in slices {
                    scratch.extend_from_slice(slice);
                }
                stream.poll_write(cx, scratch)
            })
        } else {
            stream.poll_write_vectored(cx, slices)
        };
        let len = ready!(this.noting_stalls(written))?;
        this.on_write(len);
        Poll::Ready(Ok(len))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.is_flushed = true;
        if let Some(progress) = &this.progress
            && !progress.awaits_response()
        {
            progress.interim.forget();
        }
        ready!(this.poll_interim(cx))?;
        let flushed = Pin::new(&mut this.stream).poll_flush(cx);
        this.noting_stalls(flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
