//! What the kernel says of a network interface, by rtnetlink.
//!
//! [`Interface::named`] asks at once, for whoever attaches or explains (`datapath/attach`, `viaduct
//! doctor`); [`Interface::read`] takes a message apart, for `next_hop`, which hears of every change.
//! Of the caller's network namespace, which /sys need not be mounted from. Changes nothing.

use anyhow::{Context, bail};
use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    InfoData, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    pub index: u32,
    pub name: String,
    /// As `ip -details link` has it: "veth", "bridge", "vlan"; none for what a driver made.
    pub kind: Option<String>,
    /// The interface below, of the same namespace, for those that stand on another.
    pub lower: Option<u32>,
    /// The VLAN identifier (IEEE 802.1Q-2022, §9.6) of a "vlan".
    pub vlan: Option<u16>,
    /// An Ethernet address; none for devices without.
    pub mac: Option<[u8; 6]>,
    /// Octets behind the link's header.
    pub mtu: u32,
    pub up: bool,
    pub loopback: bool,
}

impl Interface {
    /// # Errors
    /// There is none of that name, or rtnetlink does not answer.
    pub fn named(name: &str) -> anyhow::Result<Interface> {
        let index = nix::net::if_::if_nametoindex(name)
            .map_err(|_| anyhow::anyhow!("there is no interface {name:?}"))?;
        Interface::indexed(index).with_context(|| format!("ask about interface {name}"))
    }

    /// # Errors
    /// There is none of that index, or rtnetlink does not answer.
    pub fn indexed(index: u32) -> anyhow::Result<Interface> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST;
        let payload = RouteNetlinkMessage::GetLink(message).into();
        let mut request = NetlinkMessage::new(header, payload);
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);

        let mut socket = Socket::new(NETLINK_ROUTE).context("open a rtnetlink socket")?;
        socket.bind_auto().context("bind a rtnetlink socket")?;
        socket
            .connect(&SocketAddr::new(0, 0))
            .context("connect a rtnetlink socket")?;
        socket.send(&bytes, 0).context("ask rtnetlink")?;
        let (answer, _) = socket.recv_from_full().context("hear from rtnetlink")?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
            .context("read rtnetlink's answer")?;
        match answer.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                Ok(Interface::read(&link))
            }
            NetlinkPayload::Error(error) => Err(error.to_io()).context("rtnetlink"),
            _ => bail!("rtnetlink answered something else"),
        }
    }

    pub(super) fn read(link: &LinkMessage) -> Interface {
        let mut interface = Interface {
            index: link.header.index,
            up: link.header.flags.contains(LinkFlags::Up),
            loopback: link.header.flags.contains(LinkFlags::Loopback),
            ..Interface::default()
        };
        let mut elsewhere = false;
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::IfName(name) => interface.name.clone_from(name),
                LinkAttribute::Address(address) => {
                    interface.mac = address.as_slice().try_into().ok();
                }
                LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
                LinkAttribute::Link(lower) => interface.lower = Some(*lower),
                // The index below is of that other namespace.
                LinkAttribute::LinkNetNsId(_) => elsewhere = true,
                LinkAttribute::LinkInfo(infos) => interface.read_kind(infos),
                _ => {}
            }
        }
        if elsewhere {
            interface.lower = None;
        }
        interface
    }

    fn read_kind(&mut self, infos: &[LinkInfo]) {
        for info in infos {
            match info {
                LinkInfo::Kind(kind) => self.kind = Some(kind.to_string()),
                LinkInfo::Data(InfoData::Vlan(data)) => {
                    self.vlan = data.iter().find_map(|vlan| match vlan {
                        InfoVlan::Id(id) => Some(*id),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_an_interface_of_every_namespace() {
        let lo = Interface::named("lo").unwrap();
        assert_eq!((lo.index, lo.name.as_str(), lo.loopback), (1, "lo", true));
        assert_eq!((lo.kind, lo.lower, lo.vlan), (None, None, None));
        assert!(lo.mtu >= 1500);
        let error = Interface::named("no-such-device").unwrap_err();
        assert_eq!(error.to_string(), "there is no interface \"no-such-device\"");
        Interface::indexed(u32::MAX >> 1).unwrap_err();
    }
}
