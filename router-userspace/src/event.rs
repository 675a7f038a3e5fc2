//! Everything the agent reacts to: one closed list.

use std::net::{IpAddr, SocketAddr};

use crate::l4::next_hop::NextHop;
use crate::route::{Origin, RouteEvent};

/// Depth of the agent's inbox. A full inbox makes sources wait, which NATS turns into back-pressure
/// on the socket; nothing is dropped. 8192 registrations are about 25 ms of the agent's work.
pub const INBOX_DEPTH: usize = 8192;

#[derive(Clone, Debug)]
pub enum Event {
    Route(RouteEvent),
    /// A source lost or regained its server. Pruning of its routes pauses in between.
    SourceConnected {
        origin: Origin,
        connected: bool,
    },
    /// An active health check changed its mind about a backend.
    Health {
        backend: SocketAddr,
        healthy: bool,
    },
    /// The way to a backend became known, changed, or was lost.
    NextHop {
        backend: IpAddr,
        next_hop: Option<NextHop>,
    },
    /// The configuration file was read again and is valid.
    Reload(Box<crate::config::Config>),
}
