//! How a frame reaches a backend: kept by the agent so that no packet asks.
//!
//! One task listens to rtnetlink and answers for every watched backend with an
//! [`Event::NextHop`] whenever the answer changes: which interface and VLAN, which hardware addresses,
//! which address of the gateway the backend will see, and how large a packet may be. The kernel resolves
//! and refreshes the neighbours (`NTF_EXT_MANAGED`, Linux 5.16), since XDP cannot ask by ARP or
//! neighbour discovery of its own. Entries that an administrator made permanent are used and left alone.
//! That interfaces came, went or have other names is told with [`Event::Interfaces`].
//!
//! rtnetlink may lose notifications under load and says so; the task then reads everything again. It
//! holds one entry for each watched backend and for each interface and neighbour of the host; the
//! notifications that wait for it are bounded by the socket's receive buffer and what the connection
//! task, which runs on the same thread, has read of it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::Context;
use futures_channel::mpsc::UnboundedReceiver;
use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::link::LinkMessage;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
    NeighbourState,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::SocketAddr;
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::event::Event;
use crate::l4::interface::Interface;
use crate::l4::netlink::PROTOCOL;
use crate::l4::next_hop::route::{Route, next_hop, read_route};

mod route;

/// The way to one backend address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// The device that frames leave by; for a VLAN the one below.
    pub ifindex: u32,
    /// The device's own address on the wire.
    pub source_mac: [u8; 6],
    /// The backend's, or that of the router in front of it.
    pub destination_mac: [u8; 6],
    /// The gateway's address that the backend sees in `nat` mode and on outer headers.
    pub source: IpAddr,
    /// Octets behind the Ethernet header: the lesser of the route's and the device's.
    pub mtu: u16,
    /// VLAN identifier to send with (IEEE 802.1Q-2022, §9.6); 0: untagged.
    pub vlan: u16,
    /// Whether no router is in between.
    pub on_link: bool,
}

/// Routes change in bursts; all watched backends are looked up again this long after the first.
const ROUTE_SETTLE: Duration = Duration::from_millis(50);

/// Between two attempts at opening the socket anew.
const RECONNECT_AFTER: Duration = Duration::from_secs(1);

/// Tells the task what to watch. Dropping it ends the task.
pub struct Watcher {
    /// Unbounded, but never longer than the list of registered backends, which the route table bounds.
    commands: mpsc::UnboundedSender<Command>,
}

enum Command {
    Watch(IpAddr),
    Unwatch(IpAddr),
}

impl Watcher {
    /// Starts the task on the current runtime.
    ///
    /// # Errors
    /// No rtnetlink socket can be had.
    pub fn start(inbox: mpsc::Sender<Event>) -> anyhow::Result<Watcher> {
        let connection = Connection::open()?;
        let (commands, receiver) = mpsc::unbounded_channel();
        let task = Task {
            handle: connection.handle,
            inbox,
            watched: HashMap::new(),
            interfaces: HashMap::new(),
            interfaces_told: false,
            neighbours: HashMap::new(),
            managed: HashSet::new(),
        };
        tokio::spawn(task.run(receiver, connection.messages));
        Ok(Watcher { commands })
    }

    pub fn watch(&self, backend: IpAddr) {
        self.send(Command::Watch(backend));
    }

    pub fn unwatch(&self, backend: IpAddr) {
        self.send(Command::Unwatch(backend));
    }

    fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            tracing::error!("the next hop task has ended; next hops stay as they are");
        }
    }
}

type Messages = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// A rtnetlink socket with the task that serves it.
struct Connection {
    handle: Handle,
    messages: Messages,
}

impl Connection {
    fn open() -> anyhow::Result<Connection> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, handle, messages) =
            rtnetlink::new_multicast_connection(&groups).context("open a rtnetlink socket")?;
        tokio::spawn(connection);
        Ok(Connection { handle, messages })
    }
}

struct Task {
    handle: Handle,
    inbox: mpsc::Sender<Event>,
    watched: HashMap<IpAddr, Watched>,
    interfaces: HashMap<u32, Interface>,
    /// Whether the agent has heard of the interfaces as they are.
    interfaces_told: bool,
    /// By interface index and protocol address, while the kernel holds it valid.
    neighbours: HashMap<(u32, IpAddr), Neighbour>,
    /// Neighbours that the kernel keeps resolved at our request.
    managed: HashSet<(u32, IpAddr)>,
}

#[derive(Clone, Copy)]
struct Neighbour {
    mac: [u8; 6],
    permanent: bool,
}

#[derive(Default)]
struct Watched {
    route: Option<Route>,
    told: Option<NextHop>,
}

impl Task {
    async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>, mut messages: Messages) {
        self.read_all().await;
        let mut routes_changed: Option<Instant> = None;
        loop {
            let settle = async {
                match routes_changed {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            // All three are cancel safe: two receivers and a timer.
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Watch(backend)) => self.watch(backend).await,
                    Some(Command::Unwatch(backend)) => self.unwatch(backend).await,
                    None => return,
                },
                message = messages.next() => match message.map(|(message, _)| message.payload) {
                    Some(NetlinkPayload::InnerMessage(message)) => {
                        if self.take_in(message).await {
                            routes_changed.get_or_insert(Instant::now() + ROUTE_SETTLE);
                        }
                    }
                    Some(NetlinkPayload::Overrun(_)) => {
                        tracing::warn!("rtnetlink notifications were lost; reading everything again");
                        self.read_all().await;
                    }
                    Some(_) => {}
                    None => messages = self.reconnect().await,
                },
                () = settle => {
                    routes_changed = None;
                    self.tell_of_interfaces().await;
                    self.resolve_all().await;
                }
            }
        }
    }

    async fn reconnect(&mut self) -> Messages {
        tracing::warn!("the rtnetlink socket has closed; opening another");
        let messages = loop {
            match Connection::open() {
                Ok(connection) => {
                    self.handle = connection.handle;
                    break connection.messages;
                }
                Err(error) => tracing::error!("{error:#}; next hops stay as they are"),
            }
            tokio::time::sleep(RECONNECT_AFTER).await;
        };
        self.read_all().await;
        messages
    }

    /// Reads interfaces and neighbours anew and resolves every watched backend.
    async fn read_all(&mut self) {
        self.interfaces.clear();
        self.interfaces_told = false;
        self.neighbours.clear();
        if let Err(error) = self.read_interfaces_and_neighbours().await {
            tracing::error!("read interfaces and neighbours: {error}");
        }
        self.tell_of_interfaces().await;
        self.resolve_all().await;
    }

    async fn read_interfaces_and_neighbours(&mut self) -> Result<(), rtnetlink::Error> {
        let mut links = self.handle.link().get().execute();
        while let Some(link) = links.try_next().await? {
            self.note_interface(&link);
        }
        let mut neighbours = self.handle.neighbours().get().execute();
        while let Some(neighbour) = neighbours.try_next().await? {
            self.note_neighbour(&neighbour, true);
        }
        Ok(())
    }

    /// Takes in one notification; true if routes may lead elsewhere now.
    async fn take_in(&mut self, message: RouteNetlinkMessage) -> bool {
        match message {
            RouteNetlinkMessage::NewNeighbour(neighbour) => {
                self.note_neighbour(&neighbour, true);
                self.tell_users_of(&neighbour).await;
                false
            }
            RouteNetlinkMessage::DelNeighbour(neighbour) => {
                self.note_neighbour(&neighbour, false);
                if let Some(key) = neighbour_key(&neighbour) {
                    self.managed.remove(&key);
                }
                // Flushed, or gone with the carrier: whoever uses it asks for it again.
                true
            }
            // Of a bridge's port, not of the device.
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link)
                if link.header.interface_family == AddressFamily::Bridge =>
            {
                false
            }
            RouteNetlinkMessage::NewLink(link) => {
                self.note_interface(&link);
                true
            }
            RouteNetlinkMessage::DelLink(link) => {
                self.interfaces.remove(&link.header.index);
                self.interfaces_told = false;
                true
            }
            RouteNetlinkMessage::NewRoute(_) | RouteNetlinkMessage::DelRoute(_) => true,
            _ => false,
        }
    }

    fn note_interface(&mut self, link: &LinkMessage) {
        let interface = Interface::read(link);
        let before = self.interfaces.get(&interface.index);
        if before.map(|before| (&before.name, before.up)) != Some((&interface.name, interface.up)) {
            self.interfaces_told = false;
        }
        self.interfaces.insert(interface.index, interface);
    }

    async fn tell_of_interfaces(&mut self) {
        if !self.interfaces_told {
            self.interfaces_told = true;
            // As in `tell`.
            let _ = self.inbox.send(Event::Interfaces).await;
        }
    }

    fn note_neighbour(&mut self, neighbour: &NeighbourMessage, present: bool) {
        let Some(key) = neighbour_key(neighbour) else {
            return;
        };
        let mac = neighbour
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                NeighbourAttribute::LinkLayerAddress(address) => address.as_slice().try_into().ok(),
                _ => None,
            });
        let valid = !matches!(
            neighbour.header.state,
            NeighbourState::Failed | NeighbourState::Incomplete | NeighbourState::None
        );
        let permanent = neighbour.header.state == NeighbourState::Permanent;
        match mac {
            Some(mac) if present && valid => {
                self.neighbours.insert(key, Neighbour { mac, permanent })
            }
            _ => self.neighbours.remove(&key),
        };
    }

    async fn tell_users_of(&mut self, neighbour: &NeighbourMessage) {
        let Some((ifindex, address)) = neighbour_key(neighbour) else {
            return;
        };
        let through = |watched: &Watched| {
            watched
                .route
                .is_some_and(|route| route.ifindex == ifindex && route.neighbour == address)
        };
        let users = self.watched.iter().filter(|(_, watched)| through(watched));
        let users: BTreeSet<IpAddr> = users.map(|(backend, _)| *backend).collect();
        for backend in users {
            self.tell(backend).await;
        }
    }

    async fn watch(&mut self, backend: IpAddr) {
        self.watched.entry(backend).or_default();
        self.resolve(backend).await;
    }

    async fn unwatch(&mut self, backend: IpAddr) {
        if let Some(Watched {
            route: Some(route), ..
        }) = self.watched.remove(&backend)
        {
            self.release_unused(route).await;
        }
    }

    async fn resolve_all(&mut self) {
        let backends: Vec<IpAddr> = self.watched.keys().copied().collect();
        for backend in backends {
            self.resolve(backend).await;
        }
    }

    /// Asks the routing table anew and has the kernel keep the neighbour resolved.
    async fn resolve(&mut self, backend: IpAddr) {
        let route = match self.route_to(backend).await {
            Ok(route) => route,
            Err(error) => {
                tracing::warn!(%backend, "no route to this backend: {error:#}");
                None
            }
        };
        let Some(watched) = self.watched.get_mut(&backend) else {
            return;
        };
        let before = std::mem::replace(&mut watched.route, route);
        if let Some(route) = route
            && let Err(error) = self.manage_neighbour(route).await
        {
            tracing::warn!(%backend, "resolve its neighbour {}: {error}", route.neighbour);
        }
        if let Some(before) = before
            && Some(before) != route
        {
            self.release_unused(before).await;
        }
        self.tell(backend).await;
    }

    /// Sends the answer for a backend if it is another than before.
    async fn tell(&mut self, backend: IpAddr) {
        let Some(watched) = self.watched.get_mut(&backend) else {
            return;
        };
        let next_hop = watched.route.and_then(|route| {
            let neighbour = self.neighbours.get(&route.neighbour_key())?;
            next_hop(backend, route, neighbour.mac, &self.interfaces)
        });
        if watched.told == next_hop {
            return;
        }
        watched.told = next_hop;
        // The agent outlives this task; a closed inbox means that it is about to end.
        let _ = self.inbox.send(Event::NextHop { backend, next_hop }).await;
    }

    /// What `ip route get` says; `None` for an address of this host itself.
    async fn route_to(&self, backend: IpAddr) -> anyhow::Result<Option<Route>> {
        let request = match backend {
            IpAddr::V4(v4) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(v4, 32)
                .build(),
            IpAddr::V6(v6) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(v6, 128)
                .build(),
        };
        let mut answers = std::pin::pin!(self.handle.route().get(request).execute());
        let answer = answers.try_next().await?.context("an empty answer")?;
        // The requests that follow wait for this one's stream to end.
        while answers.try_next().await?.is_some() {}
        Ok(read_route(&answer, backend))
    }

    /// Has the kernel keep a neighbour resolved, unless it does already.
    async fn manage_neighbour(&mut self, route: Route) -> Result<(), rtnetlink::Error> {
        let key = route.neighbour_key();
        let permanent = self
            .neighbours
            .get(&key)
            .is_some_and(|neighbour| neighbour.permanent);
        if permanent || self.managed.contains(&key) {
            return Ok(());
        }
        let mut request = self
            .handle
            .neighbours()
            .add(route.ifindex, route.neighbour)
            .state(NeighbourState::None)
            .flags(NeighbourFlags::ExtLearned)
            .replace();
        request.message_mut().attributes.extend([
            NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed),
            NeighbourAttribute::Protocol(PROTOCOL),
        ]);
        request.execute().await?;
        self.managed.insert(key);
        Ok(())
    }

    /// Gives a neighbour back to the kernel's own ageing if no watched backend needs it.
    async fn release_unused(&mut self, route: Route) {
        let key = route.neighbour_key();
        let used = |watched: &Watched| {
            watched
                .route
                .is_some_and(|route| route.neighbour_key() == key)
        };
        if self.watched.values().any(used) || !self.managed.remove(&key) {
            return;
        }
        let mut request = self.handle.neighbours().add(route.ifindex, route.neighbour);
        let message = request.message_mut().clone();
        if let Err(error) = self.handle.neighbours().del(message).execute().await {
            tracing::debug!(neighbour = %route.neighbour, "release: {error}");
        }
    }
}

fn neighbour_key(neighbour: &NeighbourMessage) -> Option<(u32, IpAddr)> {
    neighbour
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                Some((neighbour.header.ifindex, IpAddr::V4(*v4)))
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                Some((neighbour.header.ifindex, IpAddr::V6(*v6)))
            }
            _ => None,
        })
}

/// Gives all neighbours that this program made back to the kernel's own ageing. Says how many.
///
/// # Errors
/// rtnetlink does not answer.
pub(super) async fn release_neighbours() -> anyhow::Result<usize> {
    let (connection, handle, _) = rtnetlink::new_connection().context("open a rtnetlink socket")?;
    let connection = tokio::spawn(connection);
    let mut neighbours = Vec::new();
    let mut answers = handle.neighbours().get().execute();
    while let Some(neighbour) = answers.try_next().await.context("read neighbours")? {
        let ours = NeighbourAttribute::Protocol(PROTOCOL);
        if neighbour.attributes.contains(&ours) {
            neighbours.push(neighbour);
        }
    }
    let mut released = 0;
    for neighbour in neighbours {
        match handle.neighbours().del(neighbour).execute().await {
            Ok(()) => released += 1,
            // Gone meanwhile.
            Err(error) => tracing::debug!("release a neighbour: {error}"),
        }
    }
    connection.abort();
    Ok(released)
}
