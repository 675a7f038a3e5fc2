//! Pages of the flow table, for people.
//!
//! [`L4Reader::flows`] reads the kernel's table bucket by bucket on the thread that asks, beside the
//! packets and without the agent. A page ends behind a bucket, whose number is the cursor of the next
//! one, so that no page costs memory beyond its rows and none is read twice.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use router_common::{FlowState, Mode};
use serde::Serialize;

use crate::l4::datapath::Flow;
use crate::l4::stats::{Backends, L4Reader, Serves, mode_name};
use crate::route::Vip;

/// Which flows to list: all that match everything that is given.
#[derive(Clone, Debug, Default)]
pub struct FlowFilter {
    pub vip: Option<Vip>,
    pub client: Option<Endpoint>,
    pub backend: Option<Endpoint>,
}

/// An address with or without a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    address: IpAddr,
    port: Option<u16>,
}

/// One page of flows.
#[derive(Debug, Default, Serialize)]
pub struct FlowPage {
    pub rows: Vec<FlowRow>,
    /// VIPs of which only some flows are in the table: the rest are where the ring alone has them.
    pub untracked_vips: Vec<String>,
    /// The cursor of the page that follows, if one does.
    pub next: Option<u32>,
}

#[derive(Debug, Serialize)]
pub struct FlowRow {
    pub client: SocketAddr,
    pub vip: String,
    /// The address that the client dialed: the VIP's, with one port of it.
    pub dialed: SocketAddr,
    pub backend: SocketAddr,
    /// In which it was made; null for what is no flow (`affinity`, `fragment`).
    pub mode: Option<&'static str>,
    pub state: &'static str,
    /// Since the client's last packet, to about a second.
    pub idle_seconds: u64,
    /// Towards the backend, in `nat` mode.
    pub gateway_port: Option<u16>,
    /// Whether the backend has answered; null in modes whose answers do not pass here.
    pub answered: Option<bool>,
}

impl L4Reader {
    /// At least `limit` flows from bucket `after` on, if there are as many: a bucket is listed whole.
    ///
    /// # Errors
    /// The table cannot be read.
    pub fn flows(&self, filter: &FlowFilter, after: u32, limit: usize) -> anyhow::Result<FlowPage> {
        let vips = self.shared.vips.load();
        let backends = Backends::of(&vips);
        let untracked = vips.iter().filter(|(_, view)| view.untracked);
        let mut page = FlowPage {
            untracked_vips: untracked.map(|(vip, _)| vip.to_string()).collect(),
            ..FlowPage::default()
        };
        let table = &self.shared.flows;
        for bucket in after..table.buckets() {
            if page.rows.len() >= limit {
                page.next = Some(bucket);
                break;
            }
            for flow in table.of_bucket(bucket)? {
                let serves = backends.get(u32::from(flow.entry.backend));
                // The flow of a backend that is gone is over, though the sweep has yet to come by.
                let serves = serves.filter(|serves| serves.generation == flow.entry.generation);
                if let Some(serves) = serves.filter(|serves| filter.admits(&flow, serves)) {
                    page.rows.push(row(&flow, serves));
                }
            }
        }
        Ok(page)
    }
}

impl FlowFilter {
    fn admits(&self, flow: &Flow, serves: &Serves) -> bool {
        let admits = |endpoint: &Option<Endpoint>, address: SocketAddr| {
            endpoint.is_none_or(|endpoint| endpoint.covers(address))
        };
        self.vip.is_none_or(|vip| vip == serves.vip)
            && admits(&self.client, client_of(flow))
            && admits(&self.backend, serves.address)
    }
}

impl Endpoint {
    pub fn covers(&self, address: SocketAddr) -> bool {
        self.address == address.ip() && self.port.is_none_or(|port| port == address.port())
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Endpoint, String> {
        let (address, port) = match text.parse::<SocketAddr>() {
            Ok(address) => (address.ip(), Some(address.port())),
            Err(_) => {
                let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
                let address = bare.unwrap_or(text).parse();
                let address =
                    address.map_err(|_| format!("{text:?} is not ADDRESS or ADDRESS:PORT"))?;
                (address, None)
            }
        };
        Ok(Endpoint {
            address: address.to_canonical(),
            port,
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => SocketAddr::new(self.address, port).fmt(f),
            None => self.address.fmt(f),
        }
    }
}

fn client_of(flow: &Flow) -> SocketAddr {
    SocketAddr::new(flow.entry.client.ip(), flow.entry.ports.source())
}

fn row(flow: &Flow, serves: &Serves) -> FlowRow {
    let entry = &flow.entry;
    let state = flow.slot.state();
    let mode = Mode::from_bits(entry.mode);
    let is_flow = !matches!(state, FlowState::Affinity | FlowState::Fragment);
    FlowRow {
        client: client_of(flow),
        vip: serves.vip.to_string(),
        dialed: SocketAddr::new(serves.vip.address, entry.ports.destination()),
        backend: serves.address,
        mode: is_flow.then_some(mode_name(mode)),
        state: state.name(),
        idle_seconds: flow.idle.as_secs(),
        gateway_port: (is_flow && mode == Mode::Nat).then_some(entry.nat_port),
        answered: (is_flow && mode.translates()).then_some(entry.answered != 0),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use router_common::{Addr, FlowEntry, FlowSlot, Ports};

    use super::*;

    fn flow(mode: Mode, state: FlowState) -> Flow {
        let client: IpAddr = "198.51.100.7".parse().unwrap();
        Flow {
            slot: FlowSlot::new(1, 5, 9, state),
            entry: FlowEntry {
                client: Addr::from(client),
                ports: Ports::new(40000, 9090),
                backend: 5,
                nat_port: 2000,
                answered: 1,
                mode: mode as u8,
                ..FlowEntry::default()
            },
            idle: Duration::from_millis(2500),
        }
    }

    fn serves() -> Serves {
        Serves {
            vip: "tcp/192.0.2.10:9090".parse().unwrap(),
            address: "10.0.0.11:8080".parse().unwrap(),
            generation: 1,
        }
    }

    #[test]
    fn a_flow_is_listed_if_all_that_is_asked_for_matches() {
        let flow = flow(Mode::Nat, FlowState::Established);
        let admits = |vip: &str, client: &str, backend: &str| {
            let endpoint = |text: &str| (!text.is_empty()).then(|| text.parse().unwrap());
            let filter = FlowFilter {
                vip: (!vip.is_empty()).then(|| vip.parse().unwrap()),
                client: endpoint(client),
                backend: endpoint(backend),
            };
            filter.admits(&flow, &serves())
        };
        assert!(admits("", "", ""));
        assert!(admits("tcp/192.0.2.10:9090", "198.51.100.7", "10.0.0.11"));
        assert!(admits("", "198.51.100.7:40000", "10.0.0.11:8080"));
        assert!(!admits("udp/192.0.2.10:9090", "", ""));
        assert!(!admits("", "198.51.100.7:40001", ""));
        assert!(!admits("", "198.51.100.7", "10.0.0.12"));
    }

    #[test]
    fn a_row_says_only_what_its_mode_knows() {
        let nat = row(&flow(Mode::Nat, FlowState::Established), &serves());
        assert_eq!((nat.gateway_port, nat.answered), (Some(2000), Some(true)));
        assert_eq!((nat.state, nat.idle_seconds), ("established", 2));
        let dsr = row(&flow(Mode::Dsr, FlowState::Syn), &serves());
        assert_eq!(
            (dsr.mode, dsr.gateway_port, dsr.answered),
            (Some("dsr"), None, None)
        );
        let affinity = row(&flow(Mode::Dsr, FlowState::Affinity), &serves());
        assert_eq!((affinity.mode, affinity.state), (None, "affinity"));
    }

    #[test]
    fn an_endpoint_is_an_address_with_or_without_a_port() {
        for text in [
            "192.0.2.1",
            "192.0.2.1:80",
            "2001:db8::1",
            "[2001:db8::1]:80",
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        assert_eq!(
            "[2001:db8::1]".parse::<Endpoint>(),
            "2001:db8::1".parse::<Endpoint>()
        );
        assert!("192.0.2.1:".parse::<Endpoint>().is_err());
        assert!("host".parse::<Endpoint>().is_err());
    }
}
