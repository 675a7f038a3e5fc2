//! The words of the route table: what a source announces and what both layers read.
//!
//! Everything here is valid by construction. Bytes from outside become these types in
//! [`wire`] or in a source, or are refused there; nothing downstream checks again.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;

use crate::config::{Config, PortRange};
use crate::route::conditions::Conditions;
use crate::route::policy::{HashKey, HttpPolicy};

pub mod conditions;
pub mod damping;
pub mod declared;
pub mod expiry;
pub mod ownership;
pub mod policy;
pub mod table;
pub mod wire;

/// The transport protocol of a VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Proto {
    Tcp,
    Udp,
}

/// A virtual IP: the address, protocol and ports that clients dial.
///
/// Written `tcp/192.0.2.10:9090`, with several ports `tcp/192.0.2.10:8000-8999`, with any port
/// `tcp/192.0.2.10:*`. Backends of a VIP of several ports get packets on the port that was dialed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vip {
    pub proto: Proto,
    /// Never an IPv4 address in the form of an IPv6 one.
    pub address: IpAddr,
    /// One port is a range of one; 0 to 65,535 is any port, no other begins with 0.
    pub ports: PortRange,
}

/// What an HTTP request must match: a host, a path prefix by whole segments, and conditions if any.
///
/// `host` is lower case without port or trailing dot; a wildcard is written `*.example.com` and
/// matches one or more labels in the place of `*`. `path` is empty or starts with `/`, is lower
/// case and has no trailing `/` or query.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HttpMatch {
    pub host: Arc<str>,
    pub path: Arc<str>,
    /// Of a declared route; never empty ones.
    pub conditions: Option<Arc<Conditions>>,
}

/// What a route matches.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RouteKey {
    Http(HttpMatch),
    Vip(Vip),
}

/// Where a backend was announced, in the order of precedence: of what several sources say of one
/// backend of a route, or of how a route is served, the first holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// A routes file; stays until the file changes.
    File,
    /// A key of the JetStream bucket; stays until it is deleted.
    Kv,
    /// A `router.register` message; expires unless repeated.
    Nats,
    Etcd,
    Consul,
    Zookeeper,
    Redis,
    /// Found in the pinned maps of an earlier agent, or on disk as the last that it knew; goes to
    /// whoever speaks of it first, and expires once every source had the time to.
    Adopted,
}

/// One `address:port` that serves, with all that its registration said of it.
///
/// Shared between the pools of every route of the same registration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    pub address: SocketAddr,
    /// Share of new flows and requests relative to the rest of the pool, 0..=1000; default 100. At 0 it
    /// drains: it gets nothing new, and its flows go on.
    pub weight: u16,
    pub protocol: HttpProtocol,
    /// `None`: as [`Instance::default`]. By itself, for in a table of many routes most say nothing.
    pub instance: Option<Arc<Instance>>,
    pub origin: Origin,
}

/// What a registration says of the instance that serves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instance {
    /// Application id; `X-CF-ApplicationID` and the access log.
    pub app: Option<Arc<str>>,
    /// `private_instance_id`; `X-CF-InstanceID` and stickiness.
    pub id: Option<Arc<str>>,
    pub index: Option<Arc<str>>,
    pub availability_zone: Option<Arc<str>>,
    pub isolation_segment: Option<Arc<str>>,
    pub tags: BTreeMap<Arc<str>, Arc<str>>,
    /// Whether the L7 proxy speaks TLS to it, and the name its certificate must carry.
    pub tls: Option<BackendTls>,
}

impl Backend {
    /// A backend of which nothing is said but its address: HTTP/1 in clear, of the default weight.
    pub fn new(address: SocketAddr, origin: Origin) -> Backend {
        Backend {
            address,
            weight: wire::DEFAULT_WEIGHT,
            protocol: HttpProtocol::Http1,
            instance: None,
            origin,
        }
    }

    pub fn instance(&self) -> &Instance {
        static UNNAMED: Instance = Instance {
            app: None,
            id: None,
            index: None,
            availability_zone: None,
            isolation_segment: None,
            tags: BTreeMap::new(),
            tls: None,
        };
        self.instance.as_deref().unwrap_or(&UNNAMED)
    }

    pub fn tls(&self) -> Option<&BackendTls> {
        self.instance().tls.as_ref()
    }
}

impl Instance {
    /// As a [`Backend`] has it.
    pub fn shared(self) -> Option<Arc<Instance>> {
        (self != Instance::default()).then(|| Arc::new(self))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BackendTls {
    /// `server_cert_domain_san`; `None` checks the certificate against the backend's address.
    pub server_name: Option<Arc<str>>,
    pub roots: TlsRoots,
}

/// What a backend's certificate is verified with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TlsRoots {
    /// `http.backend_tls`.
    #[default]
    Backends,
    /// `http.route_services`: the backend is an address of such a service.
    RouteServices,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum HttpProtocol {
    #[default]
    Http1,
    Http2,
}

/// How a pool chooses among its backends at layer 7 (`options.loadbalancing`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Balance {
    RoundRobin,
    LeastConnections,
    /// The same backend for the same key while the pool stays.
    Hash(Arc<HashKey>),
}

/// The backends of one route, sorted by address. Never empty in a snapshot, unless its policy answers
/// without them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    /// Most pools have one, and it stands in place.
    pub backends: SmallVec<[Arc<Backend>; 1]>,
    /// [`Pool::balance`] and [`Pool::route_service_url`] are what holds. `None`: nothing.
    pub registered: Option<Arc<Registered>>,
    /// What is declared of the route. `None`: all as the gateway's defaults.
    pub policy: Option<Arc<HttpPolicy>>,
}

/// What registrations say of a whole pool; mostly nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registered {
    pub balance: Option<Balance>,
    pub route_service_url: Option<Arc<str>>,
}

impl Registered {
    /// As a [`Pool`] has it.
    pub fn shared(self) -> Option<Arc<Registered>> {
        (self != Registered::default()).then(|| Arc::new(self))
    }
}

impl Pool {
    /// How requests are balanced: as declared, or else as registered. `None`: the gateway's default.
    pub fn balance(&self) -> Option<&Balance> {
        let declared = self.policy.as_ref();
        let declared = declared.and_then(|policy| policy.balance.as_ref());
        declared.or_else(|| self.registered.as_ref()?.balance.as_ref())
    }

    /// Where requests go first: as declared, or else as registered.
    pub fn route_service_url(&self) -> Option<&Arc<str>> {
        let declared = self.policy.as_ref();
        let declared = declared.and_then(|policy| policy.route_service_url.as_ref());
        declared.or_else(|| self.registered.as_ref()?.route_service_url.as_ref())
    }
}

/// One instance's announcement: the same backend for every route it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    pub routes: Vec<RouteKey>,
    pub backend: Arc<Backend>,
    /// How long it lives without being repeated; `None`: the gateway's `stale_threshold`.
    pub stale_after: Option<Duration>,
    pub balance: Option<Balance>,
    pub route_service_url: Option<Arc<str>>,
}

/// One instance's withdrawal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unregistration {
    pub routes: Vec<RouteKey>,
    pub address: SocketAddr,
    /// Another instance, which has the address after this one, stays. `None`: whichever is there.
    pub instance_id: Option<Arc<str>>,
    pub origin: Origin,
}

/// How a source wants a route to be served, whoever registers its backends. Stays until withdrawn.
///
/// A route that is declared before its backends are registered is never served otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declaration {
    pub route: HttpMatch,
    pub policy: Arc<HttpPolicy>,
}

/// The end of a source's [`Declaration`]. The route's backends stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Withdrawal {
    pub route: HttpMatch,
    pub origin: Origin,
}

/// One change announced by a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteEvent {
    Register(Registration),
    Unregister(Unregistration),
    Declare(Declaration),
    Withdraw(Withdrawal),
}

impl RouteKey {
    /// Whether what a source said of it before may stay under a configuration.
    pub fn is_allowed(&self, origin: Origin, config: &Config) -> bool {
        let in_range = match self {
            RouteKey::Http(_) => true,
            RouteKey::Vip(vip) => config.l4.allows_vip(vip.address),
        };
        in_range && config.guard.ownership.keeps(origin, self)
    }
}

impl Balance {
    /// As `options.loadbalancing` names it.
    pub fn as_str(&self) -> &'static str {
        match self {
            Balance::RoundRobin => "round-robin",
            Balance::LeastConnections => "least-connections",
            Balance::Hash(_) => "hash",
        }
    }
}

impl Proto {
    pub fn as_str(self) -> &'static str {
        match self {
            Proto::Tcp => "tcp",
            Proto::Udp => "udp",
        }
    }
}

impl Origin {
    /// In the order of precedence.
    pub const ALL: [Origin; 8] = [
        Origin::File,
        Origin::Kv,
        Origin::Nats,
        Origin::Etcd,
        Origin::Consul,
        Origin::Zookeeper,
        Origin::Redis,
        Origin::Adopted,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Origin::File => "file",
            Origin::Kv => "kv",
            Origin::Nats => "nats",
            Origin::Etcd => "etcd",
            Origin::Consul => "consul",
            Origin::Zookeeper => "zookeeper",
            Origin::Redis => "redis",
            Origin::Adopted => "adopted",
        }
    }

    /// Whether what was announced is forgotten unless it is repeated.
    pub fn expires(self) -> bool {
        matches!(self, Origin::Nats | Origin::Adopted)
    }
}

impl Vip {
    pub fn new(proto: Proto, address: SocketAddr) -> Vip {
        Vip {
            proto,
            address: address.ip().to_canonical(),
            ports: PortRange {
                first: address.port(),
                last: address.port(),
            },
        }
    }

    pub fn is_range(&self) -> bool {
        self.ports.first != self.ports.last
    }
}

impl fmt::Display for Vip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/", self.proto.as_str())?;
        match self.address {
            IpAddr::V4(v4) => write!(f, "{v4}:")?,
            IpAddr::V6(v6) => write!(f, "[{v6}]:")?,
        }
        match self.ports {
            ANY_PORT => f.write_str("*"),
            ports if self.is_range() => ports.fmt(f),
            port => port.first.fmt(f),
        }
    }
}

const ANY_PORT: PortRange = PortRange {
    first: 0,
    last: u16::MAX,
};

/// Why a string is not a VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VipError {
    /// Does not start with `tcp/` or `udp/`.
    Proto,
    /// What follows the protocol is not `address:port`.
    Address,
    Port,
}

impl fmt::Display for VipError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            VipError::Proto => "a VIP starts with tcp/ or udp/",
            VipError::Address => "a VIP is written tcp/ADDRESS:PORT or udp/[ADDRESS]:PORT",
            VipError::Port => "the port of a VIP is 1..=65535, FIRST-LAST or *",
        })
    }
}

impl std::error::Error for VipError {}

impl FromStr for Vip {
    type Err = VipError;

    fn from_str(text: &str) -> Result<Vip, VipError> {
        let (proto, rest) = text.split_once('/').ok_or(VipError::Proto)?;
        let proto = match proto {
            "tcp" => Proto::Tcp,
            "udp" => Proto::Udp,
            _ => return Err(VipError::Proto),
        };
        let (address, ports) = rest.rsplit_once(':').ok_or(VipError::Address)?;
        let v6 = address
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        let address = match v6 {
            Some(v6) => v6.parse::<Ipv6Addr>().map(IpAddr::V6),
            None => address.parse::<Ipv4Addr>().map(IpAddr::V4),
        };
        Ok(Vip {
            proto,
            address: address.map_err(|_| VipError::Address)?.to_canonical(),
            ports: parse_ports(ports).ok_or(VipError::Port)?,
        })
    }
}

fn parse_ports(text: &str) -> Option<PortRange> {
    if text == "*" {
        return Some(ANY_PORT);
    }
    if text.contains('-') {
        return text.parse().ok();
    }
    match text.parse() {
        Ok(port @ 1..) => Some(PortRange {
            first: port,
            last: port,
        }),
        Ok(0) | Err(_) => None,
    }
}

/// `app.example.com/shop`, and behind a space its conditions.
impl fmt::Display for HttpMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.host, self.path)?;
        match &self.conditions {
            Some(conditions) => write!(f, " {conditions}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for RouteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RouteKey::Http(http) => http.fmt(f),
            RouteKey::Vip(vip) => vip.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vip_reads_back_as_it_was_written() {
        for text in [
            "tcp/192.0.2.10:9090",
            "udp/[2001:db8::10]:53",
            "tcp/192.0.2.10:8000-8999",
            "tcp/[2001:db8::10]:1-65535",
            "udp/192.0.2.10:*",
        ] {
            assert_eq!(text.parse::<Vip>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn one_vip_has_one_form() {
        for (text, wanted) in [
            ("tcp/192.0.2.10:80-80", "tcp/192.0.2.10:80"),
            ("tcp/[::ffff:192.0.2.10]:80", "tcp/192.0.2.10:80"),
            ("tcp/[2001:DB8:0::10]:080", "tcp/[2001:db8::10]:80"),
        ] {
            let vip: Vip = text.parse().unwrap();
            assert_eq!(vip, wanted.parse().unwrap());
            assert_eq!(vip.to_string(), wanted);
        }
    }

    #[test]
    fn what_is_no_vip_is_refused() {
        for (text, wanted) in [
            ("192.0.2.10:80", VipError::Proto),
            ("sctp/192.0.2.10:80", VipError::Proto),
            ("tcp/192.0.2.10", VipError::Address),
            ("tcp/2001:db8::10:80", VipError::Address),
            ("tcp/[192.0.2.10]:80", VipError::Address),
            ("tcp/host:80", VipError::Address),
            ("tcp/192.0.2.10:0", VipError::Port),
            ("tcp/192.0.2.10:65536", VipError::Port),
            ("tcp/192.0.2.10:9-8", VipError::Port),
            ("tcp/192.0.2.10:0-9", VipError::Port),
            ("tcp/192.0.2.10:1-2-3", VipError::Port),
            ("tcp/192.0.2.10:", VipError::Port),
        ] {
            assert_eq!(text.parse::<Vip>(), Err(wanted), "{text}");
        }
    }
}
