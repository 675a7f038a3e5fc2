//! An upgraded connection: raw bytes both ways until both sides have ended.
//!
//! It begins after the backend's 101 has been passed on, with whatever either side had sent
//! ahead. It counts as a request in flight of its backend until it ends.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, copy_bidirectional_with_sizes};
use tokio::sync::oneshot;

use crate::l7::backend::RawBackend;
use crate::l7::client_io::ClientIo;
use crate::l7::lease::Lease;
use crate::l7::liveness;
use crate::l7::progress::Progress;
use crate::l7::record::RequestRecord;
use crate::l7::worker::Worker;

/// Bytes buffered in each direction.
const BUFFER_BYTES: usize = 16 * 1024;

/// An agreed change of protocol.
pub(super) struct Switch {
    pub backend: oneshot::Receiver<RawBackend>,
    pub lease: Lease,
    pub record: RequestRecord,
}

/// Relays a connection of HTTP/1 after its 101.
pub(super) async fn run_upgraded(
    worker: &Worker,
    client: ClientIo,
    read_ahead: Bytes,
    switch: Switch,
) {
    let _ = liveness::limit_unacknowledged(client.socket());
    run(worker, client, read_ahead, switch).await;
}

/// Relays a stream of HTTP/2 after the 200 to its extended CONNECT (RFC 8441).
pub(super) async fn run_stream(worker: &Worker, stream: OnUpgrade, switch: Switch) {
    if let Ok(stream) = stream.await {
        run(worker, TokioIo::new(stream), Bytes::new(), switch).await;
    }
}

async fn run<C>(worker: &Worker, client: C, read_ahead: Bytes, switch: Switch)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let Switch {
        backend,
        lease,
        mut record,
    } = switch;
    worker.metrics.upgrades.add(1);
    worker.metrics.upgrades_open.add(1);
    let _open = OpenUpgrade(worker);
    if let Ok(backend) = backend.await {
        // An error is the abrupt end of one side, which the copying passes on by ending.
        let client = Counted {
            io: client,
            progress: Rc::clone(&record.progress),
        };
        client.progress.observed.add_bytes_in(read_ahead.len());
        let _ = relay(client, read_ahead, backend).await;
    }
    record.complete();
    drop(lease);
}

async fn relay<C>(mut client: C, read_ahead: Bytes, mut backend: RawBackend) -> std::io::Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    liveness::limit_unacknowledged(backend.io.socket())?;
    tokio::try_join!(
        client.write_all(&backend.read_ahead),
        backend.io.write_all(&read_ahead),
    )?;
    copy_bidirectional_with_sizes(&mut client, &mut backend.io, BUFFER_BYTES, BUFFER_BYTES).await?;
    Ok(())
}

/// Counts an open upgrade, also when its task is dropped.
struct OpenUpgrade<'a>(&'a Worker);

impl Drop for OpenUpgrade<'_> {
    fn drop(&mut self) {
        self.0.metrics.upgrades_open.subtract(1);
    }
}

/// The client's side, whose bytes are told of with the request.
struct Counted<C> {
    io: C,
    progress: Rc<Progress>,
}

impl<C: AsyncRead + Unpin> AsyncRead for Counted<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buffer))?;
        let count = buffer.filled().len() - before;
        self.progress.observed.add_bytes_in(count);
        Poll::Ready(Ok(()))
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Counted<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.io).poll_write(cx, bytes))?;
        self.progress.observed.add_bytes_out(count);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
