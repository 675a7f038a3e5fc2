//! What the kernel says of a network interface, by rtnetlink.
//!
//! [`Interface::named`] asks at once, for whoever attaches or explains (`datapath/attach`, `viaduct
//! doctor`); [`Interface::read`] takes a message apart, for `next_hop`, which hears of every change.
//! Of the caller's network namespace, which /sys need not be mounted from. Changes nothing.

use anyhow::Context;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    InfoData, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};

use crate::l4::netlink;

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
        let answers = netlink::send(RouteNetlinkMessage::GetLink(message), 0)?;
        let link = answers.iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        });
        Ok(Interface::read(link.context("rtnetlink tells nothing")?))
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
        assert_eq!(
            error.to_string(),
            "there is no interface \"no-such-device\""
        );
        Interface::indexed(u32::MAX >> 1).unwrap_err();
    }
}
