//! The UDP addresses of HTTP/3: bound at the start and by a reload, and handed to the workers.
//!
//! Sockets are not handed over to a process that takes over: it begins when the old one's connections have
//! ended and the address is free, and clients use TCP meanwhile. A thread, `http3-bind`, waits for that.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use anyhow::Context;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::{mpsc, watch};

use super::Keys;
use super::socket::{self, Part};
use crate::l7::worker::Assignment;

/// What the kernel may hold for one worker; capped by `net.core.rmem_max` and `wmem_max`.
const SOCKET_BUFFER_BYTES: usize = 2 * 1024 * 1024;

/// How often an address is tried that another process has.
const BIND_AGAIN: Duration = Duration::from_millis(100);

/// Where a worker serves HTTP/3.
pub(in crate::l7) struct Listener {
    pub(super) part: Part,
    pub(super) keys: Arc<Keys>,
    /// Closed when no more connections are to be accepted.
    pub(super) open: watch::Receiver<()>,
}

/// The addresses of a proxy that HTTP/3 is served on.
pub(in crate::l7) struct Listeners {
    workers: Vec<mpsc::UnboundedSender<Assignment>>,
    keys: Arc<Keys>,
    addresses: Mutex<Vec<Address>>,
}

struct Address {
    local: SocketAddr,
    /// Dropped to accept no more.
    open: watch::Sender<()>,
    state: State,
}

enum State {
    /// Another process has the address.
    Busy,
    Bound(Vec<Part>),
    /// Handed to the workers, or given up.
    Settled,
}

/// What [`Listeners::serve`] is to serve on from here on.
pub(in crate::l7) struct Wanted(Vec<(SocketAddr, Option<State>)>);

impl Listeners {
    pub(in crate::l7) fn new(workers: Vec<mpsc::UnboundedSender<Assignment>>) -> Arc<Listeners> {
        Arc::new(Listeners {
            workers,
            keys: Arc::new(Keys::new()),
            addresses: Mutex::default(),
        })
    }

    /// Binds those of `wanted` that it does not serve on yet; nothing is served before [`Listeners::serve`].
    /// Where `waits`, an address that another process has is bound when it is free.
    ///
    /// # Errors
    /// Names the address that cannot be bound.
    pub(in crate::l7) fn bind(&self, wanted: &[SocketAddr], waits: bool) -> anyhow::Result<Wanted> {
        let known = self.addresses();
        let bind_new = |&local: &SocketAddr| {
            if known.iter().any(|it| it.local == local) {
                return Ok((local, None));
            }
            let state = match bind(local, self.workers.len()) {
                Ok(sockets) => State::Bound(socket::parts(sockets)),
                Err(error) if waits && error.kind() == ErrorKind::AddrInUse => State::Busy,
                Err(error) => {
                    return Err(error).with_context(|| format!("listen on {local}, UDP"));
                }
            };
            Ok((local, Some(state)))
        };
        Ok(Wanted(
            wanted.iter().map(bind_new).collect::<Result<_, _>>()?,
        ))
    }

    /// Serves on what is wanted and on nothing else.
    ///
    /// # Errors
    /// The thread that waits for busy addresses cannot be started.
    pub(in crate::l7) fn serve(self: &Arc<Self>, wanted: Wanted) -> anyhow::Result<()> {
        let mut addresses = self.addresses();
        addresses.retain(|it| wanted.0.iter().any(|(local, _)| *local == it.local));
        let mut is_busy = false;
        for (local, state) in wanted.0 {
            let Some(state) = state else { continue };
            if matches!(state, State::Busy) {
                is_busy = true;
                tracing::info!(%local, "HTTP/3 begins when the UDP address is free");
            }
            let mut address = Address {
                local,
                open: watch::Sender::new(()),
                state,
            };
            self.assign(&mut address);
            addresses.push(address);
        }
        drop(addresses);
        if is_busy {
            let weak = Arc::downgrade(self);
            std::thread::Builder::new()
                .name("http3-bind".to_owned())
                .spawn(move || wait_for_addresses(&weak))
                .context("start the thread that waits for UDP addresses")?;
        }
        Ok(())
    }

    /// Serves no more.
    pub(in crate::l7) fn clear(&self) {
        self.addresses().clear();
    }

    /// Whether an address is still another process's.
    fn bind_busy(&self) -> bool {
        let mut addresses = self.addresses();
        for address in addresses.iter_mut() {
            if !matches!(address.state, State::Busy) {
                continue;
            }
            match bind(address.local, self.workers.len()) {
                Ok(sockets) => {
                    address.state = State::Bound(socket::parts(sockets));
                    self.assign(address);
                    tracing::info!(local = %address.local, "HTTP/3 is served");
                }
                Err(error) if error.kind() == ErrorKind::AddrInUse => {}
                Err(error) => {
                    tracing::warn!(local = %address.local, %error, "HTTP/3 is not served");
                    address.state = State::Settled;
                }
            }
        }
        addresses.iter().any(|it| matches!(it.state, State::Busy))
    }

    fn assign(&self, address: &mut Address) {
        let State::Bound(parts) = &mut address.state else {
            return;
        };
        for (worker, part) in self.workers.iter().zip(parts.drain(..)) {
            let listener = Listener {
                part,
                keys: Arc::clone(&self.keys),
                open: address.open.subscribe(),
            };
            // Fails only for a worker that panicked, which is told when it is waited for.
            let _ = worker.send(Assignment::Http3(listener));
        }
        address.state = State::Settled;
    }

    fn addresses(&self) -> MutexGuard<'_, Vec<Address>> {
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn wait_for_addresses(listeners: &Weak<Listeners>) {
    while let Some(listeners) = listeners.upgrade()
        && listeners.bind_busy()
    {
        drop(listeners);
        std::thread::sleep(BIND_AGAIN);
    }
}

/// `count` sockets on one address, which nobody else may have.
fn bind(address: SocketAddr, count: usize) -> std::io::Result<Vec<UdpSocket>> {
    let socket = || {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::DGRAM.nonblocking(),
            Some(Protocol::UDP),
        )?;
        // Smaller ones serve too.
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
        Ok::<_, std::io::Error>(socket)
    };
    // As for TCP, the first is bound without SO_REUSEPORT, so that it fails where another process of the
    // same user has the address.
    let first = socket()?;
    first.bind(&address.into())?;
    first.set_reuse_port(true)?;
    let mut sockets = vec![first];
    for _ in 1..count {
        let further = socket()?;
        further.set_reuse_port(true)?;
        further.bind(&address.into())?;
        sockets.push(further);
    }
    Ok(sockets.into_iter().map(UdpSocket::from).collect())
}
