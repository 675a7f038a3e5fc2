//! The PROXY protocol, versions 1 and 2: who a proxy before us speaks for, and telling backends.
//!
//! From bytes to a header and back, without I/O; [`crate::l7::handshake`] reads them off a connection.
//! Source: "The PROXY protocol, versions 1 & 2", Willy Tarreau, 2020-03-05. Of the extensions (TLVs)
//! of version 2 nothing is used, its checksum is not looked at, and addresses that are not of the
//! Internet count as none.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::config::BackendProxyProtocol;

/// Enough to tell what a header says: all of version 1 (§2.1), or the addresses of version 2.
pub(super) const PEEK_BYTES: usize = 107;

/// The longest header of version 2 that is taken, extensions and all.
const MAX_V2_BYTES: usize = 4096;

const V1_SIGNATURE: &[u8] = b"PROXY ";
const V2_SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const V2_FIXED_BYTES: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// It may become a header.
    Incomplete,
    /// The connection does not begin with a header.
    Absent,
    /// The first `len` bytes, of which the last may not be here yet, are a header.
    Header {
        len: usize,
        addresses: Addresses,
    },
    Invalid(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Addresses {
    /// The connection speaks for itself, or for something without an address: it keeps its own.
    Own,
    Of {
        source: SocketAddr,
        destination: SocketAddr,
    },
}

/// Judges the first bytes of a connection: all there are, or [`PEEK_BYTES`] of them.
pub(super) fn parse(bytes: &[u8]) -> Parsed {
    if bytes.starts_with(V1_SIGNATURE) {
        return parse_v1(bytes);
    }
    if bytes.starts_with(V2_SIGNATURE) {
        return parse_v2(bytes);
    }
    if V1_SIGNATURE.starts_with(bytes) || V2_SIGNATURE.starts_with(bytes) {
        return Parsed::Incomplete;
    }
    Parsed::Absent
}

fn parse_v1(bytes: &[u8]) -> Parsed {
    let bytes = &bytes[..bytes.len().min(PEEK_BYTES)];
    let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") else {
        return match bytes.len() < PEEK_BYTES {
            true => Parsed::Incomplete,
            false => Parsed::Invalid("version 1 is longer than 107 bytes"),
        };
    };
    let Ok(line) = std::str::from_utf8(&bytes[V1_SIGNATURE.len()..end]) else {
        return Parsed::Invalid("version 1 is not ASCII");
    };
    let addresses = match line.split_once(' ').unwrap_or((line, "")) {
        // What follows it is to be ignored (§2.1).
        ("UNKNOWN", _) => Some(Addresses::Own),
        ("TCP4", rest) => v1_addresses::<Ipv4Addr>(rest),
        ("TCP6", rest) => v1_addresses::<Ipv6Addr>(rest),
        _ => return Parsed::Invalid("version 1 is of an unknown family"),
    };
    match addresses {
        Some(addresses) => Parsed::Header {
            len: end + 2,
            addresses,
        },
        None => Parsed::Invalid("addresses of version 1"),
    }
}

fn v1_addresses<A: std::str::FromStr + Into<IpAddr>>(text: &str) -> Option<Addresses> {
    let mut words = text.split(' ');
    let (source, destination) = (words.next()?, words.next()?);
    let (source_port, destination_port) = (words.next()?, words.next()?);
    if words.next().is_some() {
        return None;
    }
    let address = |text: &str| Some(text.parse::<A>().ok()?.into());
    Some(Addresses::Of {
        source: SocketAddr::new(address(source)?, v1_port(source_port)?),
        destination: SocketAddr::new(address(destination)?, v1_port(destination_port)?),
    })
}

fn v1_port(text: &str) -> Option<u16> {
    let is_decimal = text.bytes().all(|byte| byte.is_ascii_digit())
        && (text.len() == 1 || !text.starts_with('0'));
    is_decimal.then(|| text.parse().ok()).flatten()
}

/// §2.2: signature, version and command, family and transport, length of what follows.
fn parse_v2(bytes: &[u8]) -> Parsed {
    let Some((fixed, rest)) = bytes.split_at_checked(V2_FIXED_BYTES) else {
        return Parsed::Incomplete;
    };
    let rest_len = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    let len = V2_FIXED_BYTES + rest_len;
    if len > MAX_V2_BYTES {
        return Parsed::Invalid("version 2 is too long");
    }
    let own = Parsed::Header {
        len,
        addresses: Addresses::Own,
    };
    let addresses_len = match (fixed[12], fixed[13]) {
        // Local, whatever the family is said to be.
        (0x20, _) => return own,
        // Unspecified; unix sockets.
        (0x21, 0x00) => return own,
        (0x21, 0x31 | 0x32) if rest_len >= 216 => return own,
        // IPv4 and IPv6 over TCP, and over UDP as of a proxy that takes HTTP/3.
        (0x21, 0x11 | 0x12) => 12,
        (0x21, 0x21 | 0x22) => 36,
        (0x21, _) => return Parsed::Invalid("version 2 is of an unknown family"),
        _ => return Parsed::Invalid("version 2 has another version or command"),
    };
    if rest_len < addresses_len {
        return Parsed::Invalid("version 2 is shorter than its addresses");
    }
    let Some(addresses) = rest.get(..addresses_len) else {
        return Parsed::Incomplete;
    };
    let (ips, ports) = addresses.split_at(addresses_len - 4);
    let (source, destination) = ips.split_at(ips.len() / 2);
    let (source_port, destination_port) = ports.split_at(2);
    Parsed::Header {
        len,
        addresses: Addresses::Of {
            source: SocketAddr::new(v2_ip(source), v2_port(source_port)),
            destination: SocketAddr::new(v2_ip(destination), v2_port(destination_port)),
        },
    }
}

fn v2_ip(bytes: &[u8]) -> IpAddr {
    match <[u8; 4]>::try_from(bytes) {
        Ok(bytes) => bytes.into(),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).expect("an address of 4 or 16 bytes")),
    }
}

fn v2_port(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

/// What a connection to a backend begins with, on behalf of a client at `source` that dialed
/// `destination`; nothing if it is switched off. IPv4 addresses beside IPv6 ones are written as mapped.
pub(super) fn header(
    version: BackendProxyProtocol,
    source: SocketAddr,
    destination: SocketAddr,
) -> Option<Vec<u8>> {
    let (source_ip, destination_ip) = same_family(source.ip(), destination.ip());
    let source = SocketAddr::new(source_ip, source.port());
    let destination = SocketAddr::new(destination_ip, destination.port());
    match version {
        BackendProxyProtocol::Off => None,
        BackendProxyProtocol::V1 => Some(header_v1(source, destination)),
        BackendProxyProtocol::V2 => Some(header_v2(source, destination)),
    }
}

fn same_family(one: IpAddr, other: IpAddr) -> (IpAddr, IpAddr) {
    let (one, other) = (one.to_canonical(), other.to_canonical());
    let mapped = |address| match address {
        IpAddr::V4(address) => IpAddr::V6(address.to_ipv6_mapped()),
        IpAddr::V6(_) => address,
    };
    match one.is_ipv4() == other.is_ipv4() {
        true => (one, other),
        false => (mapped(one), mapped(other)),
    }
}

fn header_v1(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
    let (from, to) = (source.ip(), destination.ip());
    let (from_port, to_port) = (source.port(), destination.port());
    format!("PROXY {family} {from} {to} {from_port} {to_port}\r\n").into_bytes()
}

fn header_v2(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let mut addresses = Vec::with_capacity(36);
    for address in [source, destination] {
        match address.ip() {
            IpAddr::V4(ip) => addresses.extend(ip.octets()),
            IpAddr::V6(ip) => addresses.extend(ip.octets()),
        }
    }
    for address in [source, destination] {
        addresses.extend(address.port().to_be_bytes());
    }
    let family = if source.is_ipv4() { 0x11 } else { 0x21 };
    let mut header = V2_SIGNATURE.to_vec();
    header.extend([0x21, family, 0, addresses.len() as u8]);
    header.extend(addresses);
    header
}

#[cfg(test)]
mod tests;
