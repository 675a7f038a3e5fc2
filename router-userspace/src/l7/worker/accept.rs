//! Accepting the connections of one listener for one worker, until it drains or the address is given up.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

use crate::l7::connection;
use crate::l7::handshake::ListenerKind;
use crate::l7::listen;
use crate::l7::worker::{Listener, OpenConnection, Worker};

/// How long accepting pauses after the kernel refused a connection, for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts until the worker drains or the address is given up, and then what the kernel has accepted
/// in its name: closing the listener before would reset those connections.
pub(super) async fn accept(worker: Rc<Worker>, listener: Listener) {
    let Listener {
        socket,
        kind,
        mut open,
    } = listener;
    let listener = match listen::begin(&socket).and_then(|()| TcpListener::from_std(socket)) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "l7 listener cannot be polled");
            return;
        }
    };
    while !worker.is_draining() {
        tokio::select! {
            // All may be dropped: a connection that was not handed over stays in the backlog.
            () = worker.drain_notice() => {}
            // Nothing is ever sent: the other end is gone.
            _ = open.changed() => break,
            accepted = next_connection(&worker, &listener) => match accepted {
                Ok((stream, peer)) => serve(&worker, kind, stream, peer),
                Err(error) => {
                    refused(&worker, &error);
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
    if let Err(error) = accept_backlog(&worker, listener, kind).await {
        refused(&worker, &error);
    }
}

async fn next_connection(
    worker: &Worker,
    listener: &TcpListener,
) -> io::Result<(TcpStream, SocketAddr)> {
    worker.wait_for_room().await;
    listener.accept().await
}

async fn accept_backlog(
    worker: &Rc<Worker>,
    listener: TcpListener,
    kind: ListenerKind,
) -> io::Result<()> {
    let listener = listener.into_std()?;
    loop {
        worker.wait_for_room().await;
        match listener.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(true)?;
                serve(worker, kind, TcpStream::from_std(stream)?, peer);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn serve(worker: &Rc<Worker>, kind: ListenerKind, stream: TcpStream, peer: SocketAddr) {
    worker.metrics.connections_accepted.add(1);
    let Ok(place) = worker.enter(peer.ip()) else {
        return;
    };
    let open = OpenConnection::new(worker);
    let worker = Rc::clone(worker);
    tokio::task::spawn_local(async move {
        let rules = worker.settings(|settings| settings.handshake_rules(peer));
        let established = worker.handshakes.establish(kind, &rules, stream, peer);
        if let Ok(established) = established.await {
            // A PROXY header has told who the client is.
            let behind_proxy = match established.peer.ip() == peer.ip() {
                true => Ok(None),
                false => worker.enter(established.peer.ip()),
            };
            if behind_proxy.is_ok() {
                connection::serve(worker, established).await;
            }
            drop(behind_proxy);
        }
        drop(place);
        drop(open);
    });
}

fn refused(worker: &Worker, error: &io::Error) {
    worker.metrics.accept_errors.add(1);
    tracing::warn!(%error, "accept a client connection");
}
