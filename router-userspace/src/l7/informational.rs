//! Interim responses of a backend (1xx, RFC 9110 §15.2) on their way to a client of HTTP/1.1.
//!
//! hyper drops them on the client side and has no call for them on the server side. [`TappedIo`] reads
//! along with hyper on a backend's connection until the final response begins, and [`Interim`], part
//! of the request's [`Progress`], keeps what the client is to get. [`ClientIo`] writes it between two
//! messages of hyper's. What goes out is made from parsed fields. 100 is answered by the gateway itself,
//! and 101 is a final response.
//!
//! [`ClientIo`]: crate::l7::client_io::ClientIo

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Version};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::l7::headers;
use crate::l7::progress::Progress;

/// Interim responses to one request that are passed on.
const MAX_RESPONSES: u8 = 16;

/// Their bytes in all, and those of one that has not come whole.
const MAX_BYTES: usize = 32 * 1024;

/// Fields of one.
const MAX_FIELDS: usize = 64;

/// Interim responses that wait to be written to a client, and what they are counted by.
#[derive(Default)]
pub(super) struct Interim {
    /// The number of the request under way on its connection.
    request: Cell<u64>,
    /// Its client knows of interim responses (RFC 9110 §15.2).
    is_wanted: Cell<bool>,
    passed: Cell<u8>,
    passed_bytes: Cell<usize>,
    is_waiting: Cell<bool>,
    waiting: RefCell<Vec<u8>>,
    /// The client connection's one task.
    task: RefCell<Option<Waker>>,
}

impl Interim {
    /// Another request; what was for the one before is forgotten.
    pub(super) fn request_begins(&self, version: Version) {
        self.request.set(self.request.get() + 1);
        self.is_wanted.set(version == Version::HTTP_11);
        self.passed.set(0);
        self.passed_bytes.set(0);
        self.forget();
    }

    /// To be told before anything is passed on; without a task, nothing is.
    pub(super) fn set_task(&self, task: &Waker) {
        self.task.replace(Some(task.clone()));
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.is_waiting.get()
    }

    pub(super) fn take(&self) -> Vec<u8> {
        self.is_waiting.set(false);
        self.waiting.take()
    }

    pub(super) fn forget(&self) {
        if self.is_waiting.get() {
            self.take();
        }
    }

    /// False if the request has had as many as it may.
    fn push(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        let mut waiting = self.waiting.borrow_mut();
        let before = waiting.len();
        render(&mut waiting, status, headers);
        let bytes = self.passed_bytes.get() + waiting.len() - before;
        if self.passed.get() == MAX_RESPONSES || bytes > MAX_BYTES {
            waiting.truncate(before);
            return false;
        }
        self.passed.set(self.passed.get() + 1);
        self.passed_bytes.set(bytes);
        self.is_waiting.set(true);
        if let Some(task) = &*self.task.borrow() {
            task.wake_by_ref();
        }
        true
    }
}

fn render(to: &mut Vec<u8>, status: StatusCode, headers: &HeaderMap) {
    let reason = status.canonical_reason().unwrap_or_default();
    to.extend_from_slice(format!("HTTP/1.1 {} {reason}\r\n", status.as_u16()).as_bytes());
    for (name, value) in headers {
        to.extend_from_slice(name.as_str().as_bytes());
        to.extend_from_slice(b": ");
        to.extend_from_slice(value.as_bytes());
        to.extend_from_slice(b"\r\n");
    }
    to.extend_from_slice(b"\r\n");
}

/// Who gets the interim responses on a backend's connection, if anybody does.
#[derive(Default)]
pub(super) struct Tap(Cell<Option<Recipient>>);

struct Recipient {
    progress: Rc<Progress>,
    /// Of [`Interim::request`]. The client may have gone on to another.
    request: u64,
    /// The beginning of an interim response.
    held: Vec<u8>,
}

impl Tap {
    /// The request of `progress` goes out on the connection.
    pub(super) fn follow(&self, progress: &Rc<Progress>) {
        let is_wanted = progress.interim.is_wanted.get();
        self.0.set(is_wanted.then(|| Recipient {
            progress: Rc::clone(progress),
            request: progress.interim.request.get(),
            held: Vec::new(),
        }));
    }

    fn on_read(&self, bytes: &[u8]) {
        let Some(mut recipient) = self.0.take() else {
            return;
        };
        if recipient.held.is_empty() && !may_be_interim(bytes) {
            return;
        }
        recipient.held.extend_from_slice(bytes);
        if recipient.pass_whole_ones() {
            self.0.set(Some(recipient));
        }
    }
}

impl Recipient {
    /// False once the final response has begun, or nothing more is to be passed on.
    fn pass_whole_ones(&mut self) -> bool {
        loop {
            match next_of(&self.held) {
                Next::Interim {
                    status,
                    mut headers,
                    len,
                } => {
                    self.held.drain(..len);
                    headers::clean_interim(&mut headers);
                    if !self.pass_on(status, &headers) {
                        return false;
                    }
                }
                Next::Partial => return self.held.len() <= MAX_BYTES,
                Next::Final => return false,
            }
        }
    }

    /// False if the client is to get no more of them.
    fn pass_on(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        let interim = &self.progress.interim;
        if interim.request.get() != self.request || !self.progress.awaits_response() {
            return false;
        }
        if status == StatusCode::CONTINUE {
            return true;
        }
        let metrics = &self.progress.worker.metrics;
        let passed = interim.push(status, headers);
        let counter = match passed {
            true => &metrics.interim_responses,
            false => &metrics.interim_dropped,
        };
        counter.add(1);
        passed
    }
}

/// What a backend's bytes begin with, where a response is to begin.
enum Next {
    Interim {
        status: StatusCode,
        headers: HeaderMap,
        len: usize,
    },
    Partial,
    /// Or what is no response: hyper judges that.
    Final,
}

/// Whether the bytes are the beginning of `HTTP/1.x 1`, or begin so.
fn may_be_interim(bytes: &[u8]) -> bool {
    let shown = bytes.len().min(10);
    let either = |start: &[u8; 10]| bytes[..shown] == start[..shown];
    either(b"HTTP/1.1 1") || either(b"HTTP/1.0 1")
}

fn next_of(bytes: &[u8]) -> Next {
    if !may_be_interim(bytes) {
        return Next::Final;
    }
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut response = httparse::Response::new(&mut fields);
    let len = match response.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Next::Partial,
        Err(_) => return Next::Final,
    };
    let status = response.code.and_then(|it| StatusCode::from_u16(it).ok());
    let interim = status.filter(|it| it.is_informational());
    match (interim, fields_of(response.headers)) {
        (Some(status), Some(headers)) if status != StatusCode::SWITCHING_PROTOCOLS => {
            Next::Interim {
                status,
                headers,
                len,
            }
        }
        _ => Next::Final,
    }
}

fn fields_of(parsed: &[httparse::Header<'_>]) -> Option<HeaderMap> {
    let mut headers = HeaderMap::with_capacity(parsed.len());
    for field in parsed {
        let name = HeaderName::from_bytes(field.name.as_bytes()).ok()?;
        headers.append(name, HeaderValue::from_bytes(field.value).ok()?);
    }
    Some(headers)
}

/// A backend's connection of HTTP/1 that is read along with hyper.
pub(super) struct TappedIo<S> {
    pub io: S,
    tap: Rc<Tap>,
}

impl<S> TappedIo<S> {
    pub(super) fn new(io: S, tap: &Rc<Tap>) -> TappedIo<S> {
        TappedIo {
            io,
            tap: Rc::clone(tap),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TappedIo<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buffer))?;
        this.tap.on_read(&buffer.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TappedIo<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// What a client gets of a backend's bytes, for tests and a fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn passed(mut bytes: &[u8]) -> Vec<u8> {
    let mut rendered = Vec::new();
    while let Next::Interim {
        status,
        mut headers,
        len,
    } = next_of(bytes)
    {
        headers::clean_interim(&mut headers);
        render(&mut rendered, status, &headers);
        bytes = &bytes[len..];
    }
    rendered
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_of_one_hop_stays_there() {
        let bytes = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\nConnection: X-Hop, close\r\n\
                      X-Hop: 1\r\nKeep-Alive: timeout=5\r\nTransfer-Encoding: chunked\r\n\
                      Content-Length: 5\r\nX-Cf-Proxy-Signature: s\r\nLink: </b.js>\r\n\r\n";
        assert_eq!(
            String::from_utf8(passed(bytes)).unwrap(),
            "HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\nlink: </b.js>\r\n\r\n"
        );
    }

    #[test]
    fn nothing_passes_behind_a_final_response() {
        for bytes in [
            &b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n"[..],
            b"HTTP/1.1 101 Switching Protocols\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n",
            b"HTTP/1.1 1",
            b"HTTP/1.1 103 \x00\r\n\r\n",
            b"HTTP/1.1 103 Early Hints\r\nA b: c\r\n\r\n",
        ] {
            assert!(passed(bytes).is_empty());
        }
    }

    proptest! {
        /// Whatever a backend sends, a client reads whole interim responses and nothing else.
        #[test]
        fn nothing_but_interim_responses_comes_out(
            lines in proptest::collection::vec("(HTTP/1\\.[01] 1[0-9]{2} [a-z]{0,3}|[A-Za-z-]{0,12}: ?[ -~\\t]{0,20}|[ -~\r\n]{0,20})\r?\n", 0..12)
        ) {
            let bytes = lines.concat();
            crate::l7::fuzzing::interim(bytes.as_bytes());
        }
    }
}
