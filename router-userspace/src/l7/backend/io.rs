//! The byte stream to a backend, plain or TLS.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::l7::sockmap;

pub(in crate::l7) enum BackendIo {
    Tcp(TcpStream),
    Sockmap(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl BackendIo {
    pub(in crate::l7) fn socket(&self) -> SockRef<'_> {
        match self {
            BackendIo::Tcp(stream) | BackendIo::Sockmap(stream) => SockRef::from(stream),
            BackendIo::Tls(stream) => SockRef::from(stream.get_ref().0),
        }
    }
}

impl AsyncRead for BackendIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            BackendIo::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            BackendIo::Sockmap(stream) => sockmap::poll_read(stream, cx, buffer),
            BackendIo::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for BackendIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            BackendIo::Tcp(stream) | BackendIo::Sockmap(stream) => {
                Pin::new(stream).poll_write(cx, bytes)
            }
            BackendIo::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // A request without a body is one slice, and send(2) is cheaper than writev(2).
        if let [slice] = slices {
            return self.poll_write(cx, slice);
        }
        match self.get_mut() {
            BackendIo::Tcp(stream) | BackendIo::Sockmap(stream) => {
                Pin::new(stream).poll_write_vectored(cx, slices)
            }
            BackendIo::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            BackendIo::Tcp(stream) | BackendIo::Sockmap(stream) => stream.is_write_vectored(),
            BackendIo::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            BackendIo::Tcp(stream) | BackendIo::Sockmap(stream) => Pin::new(stream).poll_flush(cx),
            BackendIo::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            BackendIo::Tcp(stream) | BackendIo::Sockmap(stream) => {
                Pin::new(stream).poll_shutdown(cx)
            }
            BackendIo::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
