//! What stands in the bucket: keys, and the JSON of their values. Pure.
//!
//! The source reads entries with it, and the commands that write the bucket check them with it before
//! they do, so that what one takes the other does not refuse. The keys of a value are in
//! docs/control.md.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use anyhow::{Context as _, anyhow, bail, ensure};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::config::{Config, PortRange, VipConfig};
use crate::route::declared::{Announcement, DeclaredRoute};
use crate::route::ownership::Claimant;
use crate::route::wire::MAX_MESSAGE_BYTES;
use crate::route::{Origin, RouteKey, Vip};

/// Bytes of a key, as a NATS subject has room for it.
pub const MAX_KEY_BYTES: usize = 512;
/// Bytes of a value.
pub const MAX_VALUE_BYTES: usize = MAX_MESSAGE_BYTES;

/// A key of the bucket: `route.NAME`, or `vip.PROTO.ADDRESS.PORT`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// Letters, digits and `-_=/.`, with no `.` at either end or beside another.
    Route(String),
    Vip(Vip),
}

/// What an entry declares.
#[derive(Debug)]
pub enum Declared {
    Route(Announcement),
    Vip(Box<VipConfig>),
}

impl Key {
    /// Reads the value of this key as it is to be acted on. VIPs are held against `l4.vip_ranges`,
    /// and all against the rules of `[guard]`.
    ///
    /// # Errors
    /// One message that begins with the key of the value that is wrong.
    pub fn read(&self, value: &[u8], config: &Config) -> anyhow::Result<Declared> {
        ensure!(
            value.len() <= MAX_VALUE_BYTES,
            "{} bytes, at most {MAX_VALUE_BYTES}",
            value.len()
        );
        match self {
            Key::Route(_) => {
                let route: DeclaredRoute =
                    deserialize(&mut serde_json::Deserializer::from_slice(value))?;
                let announcement = route.read(Origin::Kv, &config.l4.vip_ranges)?;
                config
                    .guard
                    .ownership
                    .check_announced(Origin::Kv, &announcement)?;
                Ok(Declared::Route(announcement))
            }
            Key::Vip(vip) => {
                let mut policy: Map<String, Value> =
                    deserialize(&mut serde_json::Deserializer::from_slice(value))?;
                let address = Value::String(vip.to_string());
                let named = policy.insert("address".to_owned(), address.clone());
                ensure!(
                    named.is_none_or(|named| named == address),
                    "address: the key names {vip}"
                );
                let policy: VipConfig = deserialize(Value::Object(policy))?;
                config.l4.check_vip(&policy)?;
                let claimant = Claimant::Source(Origin::Kv);
                let route = RouteKey::Vip(*vip);
                config.guard.ownership.check(claimant, &[route])?;
                Ok(Declared::Vip(Box::new(policy)))
            }
        }
    }
}

/// As serde does, with the path to what is wrong in place of its line.
fn deserialize<'de, T: DeserializeOwned>(
    json: impl serde::Deserializer<'de, Error = serde_json::Error>,
) -> anyhow::Result<T> {
    serde_path_to_error::deserialize(json).map_err(|error| {
        let (path, why) = (error.path().to_string(), error.inner().to_string());
        match (path.as_str(), why.rsplit_once(" at line ")) {
            (".", _) => anyhow!(why),
            (path, Some((why, _))) => anyhow!("{path}: {why}"),
            (path, None) => anyhow!("{path}: {why}"),
        }
    })
}

/// IPv6 addresses are written with `-` for `:`, which no key may have, and any port is `any`.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vip = match self {
            Key::Route(name) => return write!(f, "route.{name}"),
            Key::Vip(vip) => vip,
        };
        let address = vip.address.to_string().replace(':', "-");
        write!(f, "vip.{}.{address}.", vip.proto.as_str())?;
        match vip.ports {
            ANY_PORT => f.write_str("any"),
            ports if vip.is_range() => ports.fmt(f),
            port => port.first.fmt(f),
        }
    }
}

const ANY_PORT: PortRange = PortRange {
    first: 0,
    last: u16::MAX,
};

impl FromStr for Key {
    type Err = anyhow::Error;

    fn from_str(key: &str) -> anyhow::Result<Key> {
        ensure!(
            key.len() <= MAX_KEY_BYTES,
            "a key of more than {MAX_KEY_BYTES} bytes"
        );
        if let Some(name) = key.strip_prefix("route.") {
            let allowed = |byte: u8| {
                byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'=' | b'/')
            };
            let is_token = |token: &str| !token.is_empty() && token.bytes().all(allowed);
            ensure!(
                name.split('.').all(is_token),
                "the name of a route is of letters, digits, -, _, =, / and single dots"
            );
            return Ok(Key::Route(name.to_owned()));
        }
        let Some(vip) = key.strip_prefix("vip.") else {
            bail!("neither route.NAME nor vip.PROTO.ADDRESS.PORT");
        };
        let parsed = Key::Vip(parse_vip(vip).context("vip.PROTO.ADDRESS.PORT")?);
        ensure!(
            parsed.to_string() == key,
            "this VIP is written {parsed}: one VIP has one key"
        );
        Ok(parsed)
    }
}

fn parse_vip(text: &str) -> anyhow::Result<Vip> {
    let (proto, rest) = text.split_once('.').context("no address")?;
    let (address, ports) = rest.rsplit_once('.').context("no port")?;
    let address = match address.parse::<Ipv4Addr>() {
        Ok(v4) => IpAddr::V4(v4),
        Err(_) => {
            let v6 = address.replace('-', ":").parse::<Ipv6Addr>();
            IpAddr::V6(v6.map_err(|_| anyhow!("{address:?} is not an address"))?)
        }
    };
    let ports = if ports == "any" { "*" } else { ports };
    let vip = match address {
        IpAddr::V4(v4) => format!("{proto}/{v4}:{ports}"),
        IpAddr::V6(v6) => format!("{proto}/[{v6}]:{ports}"),
    };
    Ok(vip.parse()?)
}

/// The key of a VIP's policy.
impl From<Vip> for Key {
    fn from(vip: Vip) -> Key {
        Key::Vip(vip)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::route::Proto;

    #[test]
    fn a_key_reads_back_as_it_was_written() {
        for key in [
            "route.shop",
            "route.shop.example.com/api_v2=x",
            "vip.tcp.192.0.2.10.9090",
            "vip.udp.2001-db8--10.53",
            "vip.tcp.--1.80",
            "vip.tcp.192.0.2.10.8000-8999",
            "vip.udp.2001-db8--10.any",
        ] {
            assert_eq!(key.parse::<Key>().unwrap().to_string(), key);
        }
        let vip: Vip = "udp/[2001:db8::10]:53".parse().unwrap();
        assert_eq!(
            "vip.udp.2001-db8--10.53".parse::<Key>().unwrap(),
            vip.into()
        );
    }

    #[test]
    fn what_is_no_key_is_refused_and_says_why() {
        for (key, why) in [
            ("shop", "neither route.NAME"),
            ("route.", "name of a route"),
            ("route.a..b", "name of a route"),
            ("route.a b", "name of a route"),
            ("vip.tcp.192.0.2.10", "not an address"),
            ("vip.sctp.192.0.2.10.80", "tcp/ or udp/"),
            ("vip.tcp.192.0.2.10.0", "port of a VIP"),
            ("vip.tcp.192.0.2.10.080", "is written vip.tcp.192.0.2.10.80"),
            ("vip.tcp.--ffff-192.0.2.10.80", "one VIP has one key"),
        ] {
            let error = format!("{:#}", key.parse::<Key>().unwrap_err());
            assert!(error.contains(why), "{key}: {error}");
        }
    }

    fn config() -> Config {
        crate::config::parse("[l4]\nvip_ranges = [\"192.0.2.0/24\"]").unwrap()
    }

    #[track_caller]
    fn refused(key: &str, value: &str) -> String {
        let key: Key = key.parse().unwrap();
        format!("{:#}", key.read(value.as_bytes(), &config()).unwrap_err())
    }

    #[test]
    fn a_route_and_a_policy_are_read_from_their_json() {
        let key: Key = "route.shop".parse().unwrap();
        let value =
            br#"{"uris": ["a.x"], "vips": ["tcp/192.0.2.1:80"], "timeouts": {"total": "5s"},
            "backend": [{"address": "10.0.0.1:80", "weight": 7}]}"#;
        let Declared::Route(route) = key.read(value, &config()).unwrap() else {
            panic!("a route")
        };
        assert_eq!(route.registrations[0].backend.weight, 7);
        assert_eq!(route.registrations[0].backend.origin, Origin::Kv);
        assert_eq!(route.declarations.len(), 1);
        let key: Key = "vip.tcp.192.0.2.1.80".parse().unwrap();
        let value = br#"{"forwarding": "ipip", "drain": "1m", "allow": ["198.51.100.0/24"]}"#;
        let Declared::Vip(policy) = key.read(value, &config()).unwrap() else {
            panic!("a policy")
        };
        assert_eq!(policy.address, "tcp/192.0.2.1:80".parse().unwrap());
        assert_eq!(policy.drain, Some(std::time::Duration::from_secs(60)));
    }

    #[test]
    fn a_refused_value_is_told_by_the_name_of_its_key() {
        let route = |value| refused("route.a", value);
        assert!(route("").contains("EOF"));
        assert!(route("\u{fffd}").contains("expected value"));
        assert!(route(r#"{"uris": "a.x"}"#).starts_with("uris: "));
        assert!(route(r#"{"uri": ["a.x"]}"#).starts_with("uri: unknown field"));
        let address = r#"{"uris": ["a.x"], "backend": [{"address": "host:80"}]}"#;
        assert!(route(address).starts_with("backend[0].address: "));
        let outside =
            r#"{"vips": ["tcp/203.0.113.1:80"], "backend": [{"address": "10.0.0.1:80"}]}"#;
        assert!(route(outside).starts_with("vips[0]: "));
        let vip = |value| refused("vip.tcp.192.0.2.1.80", value);
        assert!(vip(r#"{"forwarding": "fly"}"#).starts_with("forwarding: unknown variant"));
        assert!(vip(r#"{"address": "tcp/192.0.2.2:80"}"#).starts_with("address: "));
        assert!(vip(r#"{"affinity": "0s"}"#).contains("affinity must be"));
        assert!(vip(r#"{"quic": {"server_id_octets": 4}}"#).contains("quic is for UDP"));
        let outside = refused("vip.tcp.203.0.113.1.80", "{}");
        assert!(outside.contains("outside l4.vip_ranges"));
        let long = format!("{}{{}}", " ".repeat(MAX_VALUE_BYTES));
        assert!(route(&long).contains("at most 1048576"));
    }

    proptest! {
        #[test]
        fn any_vip_has_a_key(tcp: bool, v4: bool, bits: u128, first in 1u16.., last: u16) {
            let address = match v4 {
                true => IpAddr::V4((bits as u32).into()),
                false => IpAddr::V6(bits.into()).to_canonical(),
            };
            let proto = if tcp { Proto::Tcp } else { Proto::Udp };
            let ports = PortRange { first, last: last.max(first) };
            let key = Key::Vip(Vip { proto, address, ports });
            prop_assert_eq!(key.to_string().parse::<Key>().unwrap(), key);
        }

        #[test]
        fn no_bytes_panic(value: Vec<u8>, key in ".*") {
            for key in ["route.a", "vip.tcp.192.0.2.1.80"] {
                let _ = key.parse::<Key>().unwrap().read(&value, &config());
            }
            let _ = key.parse::<Key>();
        }
    }
}
