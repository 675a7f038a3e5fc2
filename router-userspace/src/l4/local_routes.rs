//! Routes that make the kernel take packets to VIPs of `l7` mode as its own.
//!
//! Without one it would forward them, or answer that there is no route. No address is added anywhere.
//! The routes carry our protocol number, so that the next agent, and `viaduct detach`, find them.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use anyhow::Context;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::l4::netlink::{self, PROTOCOL};
use crate::route::Vip;

/// Kernel: include/uapi/linux/rtnetlink.h.
const RT_TABLE_LOCAL: u8 = 255;
/// The loopback interface is the first of every namespace.
const LOOPBACK: u32 = 1;

/// Which addresses are local on account of which VIPs.
#[derive(Default)]
pub(super) struct LocalRoutes {
    users: HashMap<IpAddr, BTreeSet<Vip>>,
    held: HashSet<IpAddr>,
}

impl LocalRoutes {
    /// Takes over what an earlier agent left; [`Self::remove_unused`] drops what nobody asked for since.
    pub(super) fn adopt() -> anyhow::Result<LocalRoutes> {
        Ok(LocalRoutes {
            users: HashMap::new(),
            held: ours()?.into_iter().collect(),
        })
    }

    /// Makes the address of `vip` local, or gives it up when no other VIP has it.
    pub(super) fn set(&mut self, vip: Vip, local: bool) {
        let address = vip.address;
        if local {
            self.users.entry(address).or_default().insert(vip);
            if self.held.insert(address)
                && let Err(error) = add(address)
            {
                tracing::error!(%vip, "make its address local: {error:#}");
            }
        } else if let Some(users) = self.users.get_mut(&address) {
            users.remove(&vip);
            if users.is_empty() {
                self.users.remove(&address);
                self.remove(address);
            }
        }
    }

    pub(super) fn remove_unused(&mut self) {
        let unused = self
            .held
            .iter()
            .filter(|held| !self.users.contains_key(held));
        for address in unused.copied().collect::<Vec<_>>() {
            self.remove(address);
        }
    }

    fn remove(&mut self, address: IpAddr) {
        self.held.remove(&address);
        if let Err(error) = netlink::send(RouteNetlinkMessage::DelRoute(route(address)), 0) {
            tracing::debug!(%address, "not local any more: {error:#}");
        }
    }
}

/// Removes every route that layer 4 added. Says how many.
pub(super) fn remove_all() -> anyhow::Result<usize> {
    let routes = ours()?;
    for address in &routes {
        netlink::send(RouteNetlinkMessage::DelRoute(route(*address)), 0)
            .with_context(|| format!("remove the local route to {address}"))?;
    }
    Ok(routes.len())
}

fn add(address: IpAddr) -> anyhow::Result<()> {
    let message = RouteNetlinkMessage::NewRoute(route(address));
    match netlink::send(message, NLM_F_CREATE | NLM_F_EXCL) {
        // An address of this host already.
        Err(error) if is_there(&error) => Ok(()),
        done => done.map(|_| ()),
    }
}

fn is_there(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<std::io::Error>();
    error.is_some_and(|error| error.kind() == std::io::ErrorKind::AlreadyExists)
}

fn ours() -> anyhow::Result<Vec<IpAddr>> {
    let mut addresses = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut all = RouteMessage::default();
        all.header.address_family = family;
        let routes = netlink::dump(RouteNetlinkMessage::GetRoute(all)).context("read routes")?;
        for route in routes {
            let RouteNetlinkMessage::NewRoute(route) = route else {
                continue;
            };
            if route.header.protocol == PROTOCOL && route.header.kind == RouteType::Local {
                addresses.extend(route.attributes.iter().find_map(destination));
            }
        }
    }
    Ok(addresses)
}

fn destination(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        RouteAttribute::Destination(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

/// As `ip route add local ADDRESS dev lo`.
fn route(address: IpAddr) -> RouteMessage {
    let mut message = RouteMessage::default();
    let (family, prefix_len, destination) = match address {
        IpAddr::V4(v4) => (AddressFamily::Inet, 32, RouteAddress::Inet(v4)),
        IpAddr::V6(v6) => (AddressFamily::Inet6, 128, RouteAddress::Inet6(v6)),
    };
    message.header.address_family = family;
    message.header.destination_prefix_length = prefix_len;
    message.header.table = RT_TABLE_LOCAL;
    message.header.protocol = PROTOCOL;
    message.header.scope = RouteScope::Host;
    message.header.kind = RouteType::Local;
    message.attributes = vec![
        RouteAttribute::Destination(destination),
        RouteAttribute::Oif(LOOPBACK),
    ];
    message
}
