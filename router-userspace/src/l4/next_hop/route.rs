//! From the routing table's answer to a next hop. Pure.

use std::collections::HashMap;
use std::net::IpAddr;

use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia,
};

use super::NextHop;
use crate::l4::interface::Interface;

/// Where the routing table sends a backend's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) ifindex: u32,
    /// Whose hardware address the frame needs: the router's, or the backend's own.
    pub(super) neighbour: IpAddr,
    pub(super) source: IpAddr,
    /// Of the route alone.
    pub(super) mtu: Option<u32>,
}

impl Route {
    pub(super) fn neighbour_key(&self) -> (u32, IpAddr) {
        (self.ifindex, self.neighbour)
    }
}

/// `None` for an address of this host itself, or where there is no way.
pub(super) fn read_route(answer: &RouteMessage, backend: IpAddr) -> Option<Route> {
    if answer.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut ifindex, mut neighbour, mut source, mut mtu) = (None, backend, None, None);
    for attribute in &answer.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Gateway(gateway) => neighbour = address(gateway)?,
            // Of the other family (RFC 5549).
            RouteAttribute::Via(RouteVia::Inet(gateway)) => neighbour = IpAddr::V4(*gateway),
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => neighbour = IpAddr::V6(*gateway),
            RouteAttribute::PrefSource(preferred) => source = address(preferred),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(Route {
        ifindex: ifindex?,
        neighbour,
        source: source?,
        mtu,
    })
}

fn address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

/// `None` if a frame with one VLAN tag, or none, cannot get there.
pub(super) fn next_hop(
    backend: IpAddr,
    route: Route,
    destination_mac: [u8; 6],
    interfaces: &HashMap<u32, Interface>,
) -> Option<NextHop> {
    let device = interfaces.get(&route.ifindex)?;
    let (ifindex, vlan) = match device.vlan {
        None => (device.index, 0),
        Some(vlan) => {
            let lower = interfaces.get(&device.lower?)?;
            if lower.vlan.is_some() {
                return None;
            }
            (lower.index, vlan)
        }
    };
    let mtu = route.mtu.map_or(device.mtu, |mtu| mtu.min(device.mtu));
    Some(NextHop {
        ifindex,
        source_mac: device.mac?,
        destination_mac,
        source: route.source,
        mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        vlan,
        on_link: route.neighbour == backend,
    })
}

#[cfg(test)]
mod tests;
