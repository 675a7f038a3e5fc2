//! Who a client is where clients are limited, how many connections each has, and why a connection is
//! ended before its time.
//!
//! Workers share the counts. They are behind locks, 64 of them, each held for one lookup when a connection
//! comes and one when it goes, and only with `http.limits.connections_per_client`; no request takes one.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use http::{HeaderMap, HeaderName};

use crate::l7::frames::Control;

const SHARDS: usize = 64;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Why a client's connection is ended, or a stream of it reset. Index in [`CUTOFFS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cutoff {
    /// More than `http.limits.connections_per_client`.
    Connections,
    /// As many requests as `http.limits.requests_per_connection`.
    Requests,
    /// Sends its body slower than `http.limits.min_bytes_per_second`.
    SlowRequest,
    /// Takes its response slower than that.
    SlowResponse,
    Pings,
    Settings,
    Priorities,
    Resets,
    WindowUpdates,
    UnknownFrames,
}

/// Labels of the metric that counts them.
pub const CUTOFFS: [&str; 10] = [
    "connections_per_client",
    "requests_per_connection",
    "slow_request",
    "slow_response",
    "ping_flood",
    "settings_flood",
    "priority_flood",
    "reset_flood",
    "window_update_flood",
    "unknown_frame_flood",
];

impl From<Control> for Cutoff {
    fn from(control: Control) -> Cutoff {
        match control {
            Control::Ping => Cutoff::Pings,
            Control::Settings => Cutoff::Settings,
            Control::Priority => Cutoff::Priorities,
            Control::Reset => Cutoff::Resets,
            Control::WindowUpdate => Cutoff::WindowUpdates,
            Control::Unknown => Cutoff::UnknownFrames,
        }
    }
}

/// One client: its IPv4 address, or the /64 of its IPv6 address, in which it has any number of them.
pub(super) fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}

/// Who sent a request: the peer, or behind trusted proxies the last in `X-Forwarded-For` that is not one
/// itself. What stands before an entry that is no address is not believed.
pub(super) fn sender(
    peer: IpAddr,
    headers: &HeaderMap,
    is_trusted: impl Fn(IpAddr) -> bool,
) -> IpAddr {
    let mut sender = peer;
    let values = headers.get_all(X_FORWARDED_FOR);
    let entries: Vec<&[u8]> = values
        .iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
        .collect();
    for entry in entries.into_iter().rev() {
        if !is_trusted(sender) {
            break;
        }
        let entry = std::str::from_utf8(entry.trim_ascii()).unwrap_or("");
        match entry.parse() {
            Ok(address) => sender = address,
            Err(_) => break,
        }
    }
    sender
}

/// How many connections each client has, over all workers. As large as there are connections.
#[derive(Debug)]
pub(super) struct Clients {
    hasher: RandomState,
    shards: [Mutex<HashMap<IpAddr, u32>>; SHARDS],
}

impl Clients {
    pub(super) fn new() -> Clients {
        Clients {
            hasher: RandomState::new(),
            shards: std::array::from_fn(|_| Mutex::default()),
        }
    }

    /// Counts one more connection until the place is dropped; `None` if the client has `limit`.
    pub(super) fn enter(self: &Arc<Self>, address: IpAddr, limit: u32) -> Option<ClientPlace> {
        let client = network_of(address);
        let mut shard = self.shard(client);
        let count = shard.entry(client).or_insert(0);
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(ClientPlace {
            clients: Arc::clone(self),
            client,
        })
    }

    fn leave(&self, client: IpAddr) {
        let mut shard = self.shard(client);
        if let Some(count) = shard.get_mut(&client) {
            *count -= 1;
            if *count == 0 {
                shard.remove(&client);
            }
        }
    }

    fn shard(&self, client: IpAddr) -> std::sync::MutexGuard<'_, HashMap<IpAddr, u32>> {
        let index = self.hasher.hash_one(client) as usize % SHARDS;
        self.shards[index]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection of a client.
#[derive(Debug)]
pub(super) struct ClientPlace {
    clients: Arc<Clients>,
    client: IpAddr,
}

impl Drop for ClientPlace {
    fn drop(&mut self) {
        self.clients.leave(self.client);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_has_so_many_places_and_no_more() {
        let clients = Arc::new(Clients::new());
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        let places = [(); 2].map(|()| clients.enter(address, 2).unwrap());
        assert!(clients.enter(address, 2).is_none());
        let mapped = "::ffff:192.0.2.1".parse().unwrap();
        assert!(clients.enter(mapped, 2).is_none());
        assert!(clients.enter("192.0.2.2".parse().unwrap(), 2).is_some());
        drop(places);
        assert!(clients.enter(address, 2).is_some());
        let entries = clients.shards.iter().map(|it| it.lock().unwrap().len());
        assert_eq!(entries.sum::<usize>(), 0);
    }

    #[test]
    fn the_sender_is_the_last_address_that_is_not_a_proxys() {
        let proxy = |address: IpAddr| address.to_string().starts_with("10.");
        for (peer, forwarded, expected) in [
            ("192.0.2.1", "198.51.100.1", "192.0.2.1"),
            ("10.0.0.1", "198.51.100.1", "198.51.100.1"),
            (
                "10.0.0.1",
                "203.0.113.9, 198.51.100.1 ,10.0.0.2",
                "198.51.100.1",
            ),
            ("10.0.0.1", "203.0.113.9, unknown, 10.0.0.2", "10.0.0.2"),
            ("10.0.0.1", "", "10.0.0.1"),
        ] {
            let headers = HeaderMap::from_iter([(X_FORWARDED_FOR, forwarded.parse().unwrap())]);
            let sender = sender(peer.parse().unwrap(), &headers, proxy);
            assert_eq!(sender.to_string(), expected, "{forwarded}");
        }
    }
}
