//! How a frame reaches a backend: kept by the agent so that no packet asks.

use std::net::IpAddr;

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
