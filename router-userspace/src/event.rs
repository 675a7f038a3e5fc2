//! Everything the agent reacts to: one closed list.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;

use tokio::sync::{Semaphore, oneshot};

use crate::config::VipConfig;
use crate::l4::explain::Question;
use crate::l4::next_hop::NextHop;
use crate::route::{Origin, RouteEvent, Vip};

/// Depth of the agent's inbox: a few milliseconds of its work. A full inbox makes sources wait, and
/// is counted. The NATS source reads on while it waits and drops, and counts, what is beyond its
/// budget of bytes; a routes file is sent as fast as the agent takes it in.
pub const INBOX_DEPTH: usize = 8192;

#[derive(Debug)]
pub enum Event {
    Route(RouteEvent),
    /// A source says how a VIP is served where the configuration does not, or no longer does.
    VipPolicy {
        vip: Vip,
        policy: Option<Box<VipConfig>>,
    },
    /// A source lost or regained its server. Pruning of its routes pauses in between.
    SourceConnected {
        origin: Origin,
        connected: bool,
    },
    /// The checker changed its mind about a backend.
    Health {
        backend: SocketAddr,
        healthy: bool,
    },
    /// The way to a backend became known, changed, or was lost.
    NextHop {
        backend: IpAddr,
        next_hop: Option<NextHop>,
    },
    /// What layer 4 would do with a packet.
    Explain(Question),
    /// An operator has a backend drained, or undoes that; at both layers, or for one VIP.
    Drain {
        backend: SocketAddr,
        vip: Option<Vip>,
        drain: bool,
    },
    /// Network interfaces came, went, or have other names.
    Interfaces,
    /// The source that sent this may read so many bytes more: what it sent before is taken in.
    Release {
        budget: Arc<Semaphore>,
        bytes: usize,
    },
    /// The configuration file was read again and is valid.
    Reload(Box<crate::config::Config>),
    /// The proxy listens elsewhere than before: one descriptor for each address.
    Listeners(Vec<TcpListener>),
    /// Another agent takes layer 4 over; answered once this one writes no more.
    HoldLayer4(oneshot::Sender<()>),
    /// The other agent is gone.
    ResumeLayer4,
}
