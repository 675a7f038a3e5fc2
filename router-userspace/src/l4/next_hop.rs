//! How a frame reaches a backend: kept by the agent so that no packet asks.
//!
//! One task listens to rtnetlink and answers for every watched backend with an
//! [`Event::NextHop`] whenever the answer changes: which interface, which hardware addresses, and which
//! address of the gateway the backend will see. The kernel resolves and refreshes the neighbours
//! (`NTF_EXT_MANAGED`, Linux 5.16), since XDP cannot send ARP requests of its own.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::Context;
use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
    NeighbourState,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::event::Event;

/// The way to one backend address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    pub ifindex: u32,
    /// The device's own address on the wire.
    pub source_mac: [u8; 6],
    /// The backend's, or that of the router in front of it.
    pub destination_mac: [u8; 6],
    /// The gateway's address that the backend sees in `nat` mode.
    pub source: IpAddr,
}

/// Routes change in bursts; all watched backends are looked up again this long after the first.
const ROUTE_SETTLE: Duration = Duration::from_millis(50);

/// Tells the task what to watch. Dropping it ends the task.
pub struct Watcher {
    /// Unbounded, but never longer than the list of backends, which `l4.limits.backends` bounds.
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
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Route,
        ];
        let (connection, handle, messages) =
            rtnetlink::new_multicast_connection(&groups).context("open a rtnetlink socket")?;
        tokio::spawn(connection);
        let (commands, receiver) = mpsc::unbounded_channel();
        let task = Task {
            handle,
            inbox,
            watched: HashMap::new(),
            links: HashMap::new(),
            neighbours: HashMap::new(),
        };
        tokio::spawn(task.run(receiver, messages.map(|(message, _)| message.payload)));
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

struct Task {
    handle: Handle,
    inbox: mpsc::Sender<Event>,
    watched: HashMap<IpAddr, Watched>,
    /// Hardware address by interface index.
    links: HashMap<u32, [u8; 6]>,
    /// Hardware address by interface index and protocol address, while the kernel holds it valid.
    neighbours: HashMap<(u32, IpAddr), [u8; 6]>,
}

#[derive(Default)]
struct Watched {
    route: Option<Route>,
    told: Option<NextHop>,
}

/// Where the routing table sends a backend's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Route {
    ifindex: u32,
    /// Whose hardware address the frame needs: the router's, or the backend's own.
    neighbour: IpAddr,
    source: IpAddr,
}

impl Task {
    async fn run(
        mut self,
        mut commands: mpsc::UnboundedReceiver<Command>,
        messages: impl futures_util::Stream<Item = NetlinkPayload<RouteNetlinkMessage>>,
    ) {
        let mut messages = std::pin::pin!(messages);
        self.read_links_and_neighbours().await;
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
                message = messages.next() => match message {
                    Some(NetlinkPayload::InnerMessage(message)) => {
                        if self.take_in(message).await {
                            routes_changed.get_or_insert(Instant::now() + ROUTE_SETTLE);
                        }
                    }
                    Some(_) => {}
                    None => {
                        tracing::error!("the rtnetlink socket has closed; next hops stay as they are");
                        return;
                    }
                },
                () = settle => {
                    routes_changed = None;
                    self.resolve_all().await;
                }
            }
        }
    }

    async fn read_links_and_neighbours(&mut self) {
        let mut links = self.handle.link().get().execute();
        loop {
            match links.try_next().await {
                Ok(Some(link)) => self.note_link(&link),
                Ok(None) => break,
                Err(error) => return tracing::error!("list interfaces: {error}"),
            }
        }
        let mut neighbours = self.handle.neighbours().get().execute();
        loop {
            match neighbours.try_next().await {
                Ok(Some(neighbour)) => self.note_neighbour(&neighbour, true),
                Ok(None) => break,
                Err(error) => return tracing::error!("list neighbours: {error}"),
            };
        }
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
                self.tell_users_of(&neighbour).await;
                false
            }
            RouteNetlinkMessage::NewLink(link) => {
                self.note_link(&link);
                true
            }
            RouteNetlinkMessage::DelLink(link) => {
                self.links.remove(&link.header.index);
                true
            }
            RouteNetlinkMessage::NewRoute(_) | RouteNetlinkMessage::DelRoute(_) => true,
            _ => false,
        }
    }

    fn note_link(&mut self, link: &LinkMessage) {
        for attribute in &link.attributes {
            if let LinkAttribute::Address(address) = attribute
                && let Ok(mac) = address.as_slice().try_into()
            {
                self.links.insert(link.header.index, mac);
            }
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
        match mac {
            Some(mac) if present && valid => self.neighbours.insert(key, mac),
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
        let Some(Watched {
            route: Some(route), ..
        }) = self.watched.remove(&backend)
        else {
            return;
        };
        let shared = self.watched.values().any(|other| {
            other.route.is_some_and(|other| {
                other.neighbour == route.neighbour && other.ifindex == route.ifindex
            })
        });
        if !shared && let Err(error) = self.release_neighbour(route).await {
            tracing::debug!(%backend, "release its neighbour entry: {error}");
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
        let changed = watched.route != route;
        watched.route = route;
        if let Some(route) = route
            && changed
            && let Err(error) = self.manage_neighbour(route).await
        {
            tracing::warn!(%backend, "resolve its neighbour {}: {error}", route.neighbour);
        }
        self.tell(backend).await;
    }

    /// Sends the answer for a backend if it is another than before.
    async fn tell(&mut self, backend: IpAddr) {
        let Some(watched) = self.watched.get_mut(&backend) else {
            return;
        };
        let next_hop = watched.route.and_then(|route| {
            Some(NextHop {
                ifindex: route.ifindex,
                source_mac: *self.links.get(&route.ifindex)?,
                destination_mac: *self.neighbours.get(&(route.ifindex, route.neighbour))?,
                source: route.source,
            })
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
        let IpAddr::V4(v4) = backend else {
            return Ok(None);
        };
        let request = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(v4, 32)
            .build();
        let mut answers = std::pin::pin!(self.handle.route().get(request).execute());
        let answer = answers.try_next().await?.context("an empty answer")?;
        // The requests that follow wait for this one's stream to end.
        while answers.try_next().await?.is_some() {}
        Ok(read_route(&answer, backend))
    }

    async fn manage_neighbour(&self, route: Route) -> Result<(), rtnetlink::Error> {
        let mut request = self
            .handle
            .neighbours()
            .add(route.ifindex, route.neighbour)
            .state(NeighbourState::None)
            .flags(NeighbourFlags::ExtLearned)
            .replace();
        let managed = NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed);
        request.message_mut().attributes.push(managed);
        request.execute().await
    }

    async fn release_neighbour(&self, route: Route) -> Result<(), rtnetlink::Error> {
        let mut request = self.handle.neighbours().add(route.ifindex, route.neighbour);
        let message = request.message_mut().clone();
        self.handle.neighbours().del(message).execute().await
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

fn read_route(answer: &RouteMessage, backend: IpAddr) -> Option<Route> {
    if answer.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut ifindex, mut neighbour, mut source) = (None, backend, None);
    for attribute in &answer.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(v4)) => neighbour = IpAddr::V4(*v4),
            RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => source = Some(IpAddr::V4(*v4)),
            _ => {}
        }
    }
    Some(Route {
        ifindex: ifindex?,
        neighbour,
        source: source?,
    })
}
