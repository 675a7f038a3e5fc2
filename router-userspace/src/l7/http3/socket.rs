//! One worker's UDP socket of several that share a port, and the way of datagrams between them.
//!
//! The kernel spreads datagrams by addresses and ports, so those of a connection come to one socket, and
//! its worker. A client that gets another address (RFC 9000 §9) comes to any: connection IDs name their
//! worker, and a datagram of another worker's connection is passed on to it through a bounded queue.
//! Packets with long headers are never passed on: no client changes its address during the handshake.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AsyncUdpSocket, ConnectionId, ConnectionIdGenerator, Runtime, TokioRuntime, UdpPoller,
};
use rand::Rng;
use tokio::sync::mpsc;

use crate::l7::metrics::WorkerMetrics;

/// Datagrams on their way to one worker, from all others; further ones are lost, as by a network.
const QUEUE: usize = 256;

/// The worker's index, and random bytes.
const CONNECTION_ID_LEN: usize = 10;

/// The bit of a packet's first byte that says that the header is a long one (RFC 9000 §17.2).
const LONG_HEADER: u8 = 0x80;

/// What one worker needs to serve by a socket.
pub(in crate::l7) struct Part {
    socket: UdpSocket,
    index: usize,
    workers: Arc<[mpsc::Sender<Datagrams>]>,
    inbox: mpsc::Receiver<Datagrams>,
}

/// Of one sender, as the kernel puts them together (GRO).
struct Datagrams {
    bytes: Vec<u8>,
    meta: RecvMeta,
}

/// Makes the sockets of one address, one for each worker, know each other.
pub(in crate::l7) fn parts(sockets: Vec<UdpSocket>) -> Vec<Part> {
    let (workers, inboxes): (Vec<_>, Vec<_>) = sockets.iter().map(|_| mpsc::channel(QUEUE)).unzip();
    let workers: Arc<[_]> = workers.into();
    let parts = sockets.into_iter().zip(inboxes).enumerate();
    parts
        .map(|(index, (socket, inbox))| Part {
            socket,
            index,
            workers: Arc::clone(&workers),
            inbox,
        })
        .collect()
}

impl Part {
    pub(in crate::l7) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    pub(super) fn connection_ids(&self) -> ConnectionIds {
        ConnectionIds { worker: self.index }
    }

    /// To be called on the worker's runtime.
    ///
    /// # Errors
    /// The socket cannot be polled.
    pub(super) fn open(self, metrics: Arc<WorkerMetrics>) -> io::Result<Arc<WorkerSocket>> {
        Ok(Arc::new(WorkerSocket {
            io: TokioRuntime.wrap_udp_socket(self.socket)?,
            index: self.index,
            workers: self.workers,
            inbox: Mutex::new(self.inbox),
            metrics,
        }))
    }
}

/// Makes connection IDs that name a worker.
#[derive(Clone)]
pub(super) struct ConnectionIds {
    worker: usize,
}

impl ConnectionIdGenerator for ConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id: [u8; CONNECTION_ID_LEN] = rand::rng().random();
        let worker = u16::try_from(self.worker).unwrap_or(u16::MAX);
        id[..2].copy_from_slice(&worker.to_be_bytes());
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_LEN
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}

/// Whose connection a datagram is of, as far as it says so.
fn owner(datagram: &[u8]) -> Option<usize> {
    match *datagram {
        [first, high, low, ..] if first & LONG_HEADER == 0 => {
            Some(usize::from(u16::from_be_bytes([high, low])))
        }
        _ => None,
    }
}

/// quinn's socket, but for what is another worker's.
pub(super) struct WorkerSocket {
    io: Arc<dyn AsyncUdpSocket>,
    index: usize,
    workers: Arc<[mpsc::Sender<Datagrams>]>,
    /// Locked by one thread only.
    inbox: Mutex<mpsc::Receiver<Datagrams>>,
    metrics: Arc<WorkerMetrics>,
}

impl WorkerSocket {
    /// What other workers have passed on.
    fn poll_inbox(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> usize {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = 0;
        for (buffer, meta) in buffers.iter_mut().zip(metas) {
            let Poll::Ready(Some(datagrams)) = inbox.poll_recv(cx) else {
                break;
            };
            // All workers' buffers are of one size.
            let len = datagrams.bytes.len().min(buffer.len());
            buffer[..len].copy_from_slice(&datagrams.bytes[..len]);
            *meta = RecvMeta {
                len,
                ..datagrams.meta
            };
            count += 1;
        }
        count
    }

    /// Passes datagrams on if they are another worker's.
    fn pass_on(&self, bytes: &[u8], meta: &mut RecvMeta) {
        let other = owner(bytes).filter(|&owner| owner != self.index);
        let Some(worker) = other.and_then(|owner| self.workers.get(owner)) else {
            return;
        };
        let datagrams = Datagrams {
            bytes: bytes.to_vec(),
            meta: *meta,
        };
        if worker.try_send(datagrams).is_err() {
            self.metrics.http3_datagrams_dropped.add(1);
        }
        // quinn looks at nothing then.
        meta.len = 0;
    }
}

impl fmt::Debug for WorkerSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerSocket")
            .field("io", &self.io)
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for WorkerSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.io).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.io.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let passed_on = self.poll_inbox(cx, buffers, metas);
        if passed_on > 0 {
            return Poll::Ready(Ok(passed_on));
        }
        let count = ready!(self.io.poll_recv(cx, buffers, metas))?;
        for (buffer, meta) in buffers.iter().zip(metas.iter_mut()).take(count) {
            self.pass_on(&buffer[..meta.len], meta);
        }
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.io.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.io.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.io.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_header_names_the_worker_that_made_its_connection_id() {
        let mut ids = ConnectionIds { worker: 0x0123 };
        let id = ids.generate_cid();
        assert_eq!(id.len(), ids.cid_len());
        assert_ne!(id, ids.generate_cid());
        let short = [&[0x40][..], &id].concat();
        let long = [&[0xc0, 0, 0, 0, 1, 10][..], &id].concat();
        assert_eq!(owner(&short), Some(0x0123));
        assert_eq!(owner(&long), None);
        assert_eq!(owner(&[0x40, 1]), None);
    }
}
