//! A running gateway hands its listening sockets, and layer 4, to the process that takes its place.
//!
//! ```text
//!  successor                                 predecessor
//!  HELLO                                ───▶ checks who it is
//!  binds what it listens on besides     ◀─── how many sockets, the sockets
//!  RELEASE                              ───▶ stops writing to layer 4
//!  adopts layer 4, starts its sources   ◀─── RELEASED
//!  is ready, accepts, SERVING           ───▶ accepts no more, drains, ends
//! ```
//!
//! The sockets are the same ones in both processes, so that a connection that waits in the queue of
//! one is taken by whoever accepts next. A successor that ends before SERVING changes nothing: the
//! predecessor goes on, and takes layer 4 back. Where the predecessor ends before, the successor
//! serves at once.

use std::fs;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::admin;
use crate::event::Event;

/// With the version of what follows.
const HELLO: [u8; 10] = *b"viaduct 1\n";
const RELEASE: u8 = b'r';
const RELEASED: u8 = b'R';
const SERVING: u8 = b's';

/// For each step but the successor's start.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// Sockets handed over at once; there are as many for each address as there are workers.
const MAX_SOCKETS: usize = 4096;
/// The kernel takes 253 in one message (`SCM_MAX_FD`).
const SOCKETS_PER_MESSAGE: usize = 64;

/// Binds `handover.socket`, for this process's user alone.
///
/// # Errors
/// Names the key and the path.
pub(super) fn bind(path: &Path) -> anyhow::Result<net::UnixListener> {
    let what = || format!("handover.socket {}", path.display());
    let listener = admin::bind_unix(path).with_context(what)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).with_context(what)?;
    Ok(listener)
}

/// The process that this one takes the place of.
pub(super) struct Predecessor {
    stream: net::UnixStream,
}

impl Predecessor {
    /// The process that listens at `path`, if one does, and its listening sockets.
    ///
    /// # Errors
    /// It refuses, or hands over to another process already.
    pub(super) fn find(path: &Path) -> anyhow::Result<Option<(Predecessor, Vec<OwnedFd>)>> {
        let stream = match net::UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            Err(error) => {
                return Err(error).with_context(|| format!("handover.socket {}", path.display()));
            }
        };
        stream.set_read_timeout(Some(STEP_TIMEOUT))?;
        stream.set_write_timeout(Some(STEP_TIMEOUT))?;
        let mut predecessor = Predecessor { stream };
        let sockets = predecessor
            .receive()
            .context("receive the sockets of the running gateway")?;
        Ok(Some((predecessor, sockets)))
    }

    fn receive(&mut self) -> anyhow::Result<Vec<OwnedFd>> {
        self.stream.write_all(&HELLO)?;
        let mut count = [0; 4];
        self.stream.read_exact(&mut count)?;
        let count = u32::from_be_bytes(count) as usize;
        ensure!(count <= MAX_SOCKETS, "{count} sockets are too many");
        let mut sockets = Vec::with_capacity(count);
        while sockets.len() < count {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_PER_MESSAGE))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0];
            let received = recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(&mut byte)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )?;
            let whole = !received.flags.contains(ReturnFlags::CTRUNC);
            ensure!(received.bytes == 1 && whole, "the sockets came to an end");
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    sockets.extend(descriptors);
                }
            }
        }
        Ok(sockets)
    }

    /// Returns once it writes to layer 4 no more.
    pub(super) fn release_layer_4(&mut self) -> anyhow::Result<()> {
        let mut ask = || {
            self.stream.write_all(&[RELEASE])?;
            let mut answer = [0];
            self.stream.read_exact(&mut answer)?;
            match answer {
                [RELEASED] => Ok(()),
                _ => Err(io::Error::from(ErrorKind::InvalidData)),
            }
        };
        ask().context("have the running gateway let go of layer 4")
    }

    /// Whether it has ended without being told to.
    pub(super) fn is_gone(&mut self) -> bool {
        // It has nothing more to say.
        let asked = self.stream.set_nonblocking(true);
        let gone = match asked.and_then(|()| self.stream.read(&mut [0])) {
            Ok(_) => true,
            Err(error) => error.kind() != ErrorKind::WouldBlock,
        };
        gone || self.stream.set_nonblocking(false).is_err()
    }

    /// Tells it to end.
    pub(super) fn serving(mut self) -> anyhow::Result<()> {
        let told = self.stream.write_all(&[SERVING]);
        told.context("tell the running gateway to end")
    }
}

/// Plays the predecessor's part; returns the successor's process id once it serves.
///
/// # Errors
/// It is not to be trusted, failed, or ended. Layer 4 is this process's again.
pub(super) async fn hand_over(
    mut stream: UnixStream,
    sockets: Vec<OwnedFd>,
    inbox: &mpsc::Sender<Event>,
) -> anyhow::Result<Option<u32>> {
    let peer = stream.peer_cred().context("ask who it is")?;
    let own = nix::unistd::geteuid().as_raw();
    if peer.uid() != own && peer.uid() != 0 {
        bail!("user {} is not to take over", peer.uid());
    }
    let greet = async {
        let mut hello = HELLO;
        stream.read_exact(&mut hello).await?;
        ensure!(hello == HELLO, "it speaks another version");
        send(&mut stream, &sockets).await
    };
    tokio::time::timeout(STEP_TIMEOUT, greet).await??;
    drop(sockets);
    let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok());
    tracing::info!(pid, "another process prepares to take over");
    let served = attend(&mut stream, inbox).await;
    if served.is_err() {
        // Nothing to the agent that holds it still.
        let _ = inbox.send(Event::ResumeLayer4).await;
    }
    served.map(|()| pid)
}

/// Does what the successor asks for until it serves.
async fn attend(stream: &mut UnixStream, inbox: &mpsc::Sender<Event>) -> anyhow::Result<()> {
    loop {
        match stream.read_u8().await.context("it has ended")? {
            RELEASE => {
                let (held, done) = oneshot::channel();
                inbox.send(Event::HoldLayer4(held)).await?;
                done.await?;
                stream.write_u8(RELEASED).await?;
            }
            SERVING => return Ok(()),
            other => bail!("it asks for {other:#x}"),
        }
    }
}

async fn send(stream: &mut UnixStream, sockets: &[OwnedFd]) -> anyhow::Result<()> {
    ensure!(
        sockets.len() <= MAX_SOCKETS,
        "{} sockets are too many",
        sockets.len()
    );
    let count = u32::try_from(sockets.len()).expect("at most MAX_SOCKETS");
    stream.write_all(&count.to_be_bytes()).await?;
    for sockets in sockets.chunks(SOCKETS_PER_MESSAGE) {
        let sockets: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
        let send = || {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_PER_MESSAGE))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fits = control.push(SendAncillaryMessage::ScmRights(&sockets));
            assert!(fits, "the space is for as many");
            let sent = sendmsg(
                &*stream,
                &[IoSlice::new(&[0])],
                &mut control,
                SendFlags::NOSIGNAL,
            );
            Ok(sent?)
        };
        stream.async_io(Interest::WRITABLE, send).await?;
    }
    Ok(())
}

/// The next process that asks to take over.
pub(super) async fn successor(listener: Option<&UnixListener>) -> UnixStream {
    let Some(listener) = listener else {
        return std::future::pending().await;
    };
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!(%error, "accept on handover.socket");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::path::PathBuf;

    use super::*;
    use crate::event::INBOX_DEPTH;

    /// A gateway that hands `sockets` over to whoever comes first; what becomes of that, and what its
    /// agent is told.
    struct Running {
        _folder: tempfile::TempDir,
        path: PathBuf,
        handed: tokio::task::JoinHandle<anyhow::Result<Option<u32>>>,
        inbox: mpsc::Receiver<Event>,
    }

    fn running(sockets: usize) -> Running {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("handover.sock");
        let listener = bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let listener = UnixListener::from_std(listener).unwrap();
        let sockets = (0..sockets).map(|_| TcpListener::bind("127.0.0.1:0").unwrap().into());
        let sockets: Vec<OwnedFd> = sockets.collect();
        let (events, inbox) = mpsc::channel(INBOX_DEPTH);
        let handed = tokio::spawn(async move {
            let stream = successor(Some(&listener)).await;
            hand_over(stream, sockets, &events).await
        });
        Running {
            _folder: folder,
            path,
            handed,
            inbox,
        }
    }

    #[tokio::test]
    async fn a_successor_gets_all_sockets_and_layer_4_and_tells_when_it_serves() {
        // Two messages, and one more socket.
        const SOCKETS: usize = 2 * SOCKETS_PER_MESSAGE + 1;
        let mut running = running(SOCKETS);
        let path = running.path.clone();
        let successor = std::thread::spawn(move || {
            let (mut predecessor, sockets) = Predecessor::find(&path).unwrap().unwrap();
            let addresses = sockets
                .into_iter()
                .map(|it| TcpListener::from(it).local_addr().unwrap());
            let addresses: std::collections::BTreeSet<_> = addresses.collect();
            assert_eq!(addresses.len(), SOCKETS);
            predecessor.release_layer_4().unwrap();
            assert!(!predecessor.is_gone());
            predecessor.serving().unwrap();
        });
        let Some(Event::HoldLayer4(held)) = running.inbox.recv().await else {
            panic!("layer 4 is to be released first")
        };
        held.send(()).unwrap();
        let pid = running.handed.await.unwrap().unwrap();
        assert_eq!(pid, Some(std::process::id()));
        successor.join().unwrap();
        assert!(running.inbox.recv().await.is_none());
    }

    #[tokio::test]
    async fn a_successor_that_ends_or_talks_nonsense_has_layer_4_taken_back() {
        for said in [
            b"".as_slice(),
            b"GET / HTTP",
            b"viaduct 1\n",
            b"viaduct 1\n?",
        ] {
            let mut running = running(1);
            let mut stream = net::UnixStream::connect(&running.path).unwrap();
            stream.write_all(said).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            assert!(running.handed.await.unwrap().is_err());
            while let Some(event) = running.inbox.recv().await {
                assert!(matches!(event, Event::ResumeLayer4), "{event:?}");
            }
        }
    }

    #[test]
    fn where_nobody_listens_there_is_no_predecessor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("handover.sock");
        assert!(Predecessor::find(&path).unwrap().is_none());
        drop(bind(&path).unwrap());
        assert!(Predecessor::find(&path).unwrap().is_none());
        bind(&path).unwrap();
    }
}
