//! Which way a check takes to its backend. Pure.
//!
//! A backend of a `dsr`, `ipip` or `gue` VIP serves under the VIP's address: that its own address takes
//! connections says little. Where layer 4 publishes a mark for it in [`Tunnels`], the checker connects to the
//! VIP with that mark on the socket, and the datapath sends these packets to this one backend, as it
//! would a client's. Without a mark a check goes to the backend's own address.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::health::members::Takes;

/// By backend and TCP VIP of it: the mark, never 0, of packets to the VIP that are for the backend.
pub type Marks = imbl::OrdMap<(SocketAddr, SocketAddr), u32>;

/// Where layer 4 publishes the marks that its datapath acts on. Empty, every check goes directly.
pub type Tunnels = Arc<ArcSwap<Marks>>;

/// The way of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeVia {
    /// To the backend's own address.
    Direct,
    /// To the VIP, by packets with this mark (SO_MARK, socket(7)).
    Tunnel { vip: SocketAddr, mark: u32 },
}

impl ProbeVia {
    /// The way to a backend. One that serves HTTP routes too is asked where these lead, at its own
    /// address; of several VIPs it is the first in order, so that each check asks the same.
    pub fn choose(backend: SocketAddr, takes: Takes, marks: &Marks) -> ProbeVia {
        let least = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let of_backend = marks.range((backend, least)..).next();
        match (takes, of_backend) {
            (Takes::Tcp, Some(((address, vip), mark))) if *address == backend => ProbeVia::Tunnel {
                vip: *vip,
                mark: *mark,
            },
            (Takes::Tcp | Takes::Http, _) => ProbeVia::Direct,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_takes_the_tunnel_where_there_is_a_mark() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let marks: Marks = [
            (("10.0.0.1:80", "192.0.2.2:80"), 12_u32),
            (("10.0.0.1:80", "192.0.2.1:80"), 11),
            (("10.0.0.3:80", "192.0.2.1:80"), 31),
            (("[fd00::1]:80", "[2001:db8::1]:80"), 61),
        ]
        .into_iter()
        .map(|((backend, vip), mark)| ((at(backend), at(vip)), mark))
        .collect();
        let check = |backend: &str, takes, wanted: Option<(&str, u32)>| {
            let wanted = wanted.map_or(ProbeVia::Direct, |(vip, mark)| ProbeVia::Tunnel {
                vip: at(vip),
                mark,
            });
            assert_eq!(ProbeVia::choose(at(backend), takes, &marks), wanted);
        };
        check("10.0.0.1:80", Takes::Tcp, Some(("192.0.2.1:80", 11)));
        check("10.0.0.1:80", Takes::Http, None);
        check("10.0.0.1:81", Takes::Tcp, None);
        check("10.0.0.2:80", Takes::Tcp, None);
        check("10.0.0.3:80", Takes::Tcp, Some(("192.0.2.1:80", 31)));
        check("[fd00::1]:80", Takes::Tcp, Some(("[2001:db8::1]:80", 61)));
        check("[fd00::2]:80", Takes::Tcp, None);
    }
}
