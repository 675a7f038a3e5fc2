//! A packet that never was, for the loaded program to be asked about; and what such a packet became.
//! Pure.
//!
//! Called by [`super::explain`]. Headers are written by hand, since they are few and the same every
//! time: Ethernet, IPv4 or IPv6, TCP or UDP, no payload.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::Serialize;

use crate::route::Proto;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const TCP: u8 = 6;
const UDP: u8 = 17;
const IPV4: u8 = 4;
const IPV6: u8 = 41;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
/// Locally administered: nobody's.
const SOURCE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const DESTINATION_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const TTL: u8 = 64;

/// A client's packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    pub proto: Proto,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// TCP in the middle of a connection, not the segment that opens it.
    pub established: bool,
}

impl Probe {
    /// The frame. Both addresses must be of one family.
    pub fn frame(&self) -> Vec<u8> {
        let segment = self.segment();
        let mut frame = Vec::from(DESTINATION_MAC);
        frame.extend(SOURCE_MAC);
        let proto = match self.proto {
            Proto::Tcp => TCP,
            Proto::Udp => UDP,
        };
        let len = segment.len() as u16;
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend(ETHERTYPE_IPV4.to_be_bytes());
                frame.extend(ipv4_header(source, destination, proto, len));
            }
            (source, destination) => {
                let v6 = |address: IpAddr| match address {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                    IpAddr::V6(v6) => v6,
                };
                frame.extend(ETHERTYPE_IPV6.to_be_bytes());
                frame.extend(ipv6_header(v6(source), v6(destination), proto, len));
            }
        }
        frame.extend(segment);
        frame
    }

    /// Header of RFC 9293 §3.1 or RFC 768, with its checksum.
    fn segment(&self) -> Vec<u8> {
        let mut segment = Vec::from(self.source.port().to_be_bytes());
        segment.extend(self.destination.port().to_be_bytes());
        let (proto, checksum_at) = match self.proto {
            Proto::Tcp => {
                let flags = if self.established { ACK } else { SYN };
                let ack = u32::from(self.established);
                segment.extend(1_u32.to_be_bytes());
                segment.extend(ack.to_be_bytes());
                segment.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
                (TCP, 16)
            }
            Proto::Udp => {
                segment.extend([0, 8, 0, 0]);
                (UDP, 6)
            }
        };
        let mut pseudo = octets(self.source.ip());
        pseudo.extend(octets(self.destination.ip()));
        pseudo.extend([0, proto]);
        pseudo.extend((segment.len() as u16).to_be_bytes());
        pseudo.extend(&segment);
        // Zero would mean that UDP has none.
        let sum = match checksum(&pseudo) {
            0 => 0xffff,
            sum => sum,
        };
        segment[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
        segment
    }
}

/// A frame as it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Leaving {
    pub source_mac: String,
    pub destination_mac: String,
    /// 0: untagged.
    pub vlan: u16,
    pub outer: Option<Outer>,
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

/// The header in front of an encapsulated packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Outer {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Source and destination port, in `gue` mode.
    pub udp: Option<(u16, u16)>,
}

/// Reads a frame that carries TCP or UDP, also in IP or GUE; `None` if it does not.
pub fn read(frame: &[u8], encapsulated: bool) -> Option<Leaving> {
    let (macs, rest) = frame.split_at_checked(12)?;
    let (mut ethertype, mut rest) = take_u16(rest)?;
    let mut vlan = 0;
    if ethertype == ETHERTYPE_VLAN {
        (vlan, rest) = take_u16(rest)?;
        (ethertype, rest) = take_u16(rest)?;
    }
    let version = match ethertype {
        ETHERTYPE_IPV4 => IPV4,
        ETHERTYPE_IPV6 => IPV6,
        _ => return None,
    };
    let mut ip = Ip::read(rest, version)?;
    let mut outer = None;
    if encapsulated {
        let mut udp = None;
        let mut version = ip.next;
        let mut inside = ip.payload;
        if ip.next == UDP {
            let (source, rest) = take_u16(inside)?;
            let (destination, _) = take_u16(rest)?;
            udp = Some((source, destination));
            inside = inside.get(8..)?;
            // GUE variant 1: the version of the packet inside says what it is.
            version = if inside.first()? >> 4 == 4 {
                IPV4
            } else {
                IPV6
            };
        }
        outer = Some(Outer {
            source: ip.source,
            destination: ip.destination,
            udp,
        });
        ip = Ip::read(inside, version)?;
    }
    if !matches!(ip.next, TCP | UDP) {
        return None;
    }
    let (source_port, rest) = take_u16(ip.payload)?;
    let (destination_port, _) = take_u16(rest)?;
    Some(Leaving {
        destination_mac: mac(&macs[..6]),
        source_mac: mac(&macs[6..]),
        vlan: vlan & 0xfff,
        outer,
        source: SocketAddr::new(ip.source, source_port),
        destination: SocketAddr::new(ip.destination, destination_port),
    })
}

struct Ip<'a> {
    source: IpAddr,
    destination: IpAddr,
    next: u8,
    payload: &'a [u8],
}

impl Ip<'_> {
    fn read(packet: &[u8], version: u8) -> Option<Ip<'_>> {
        let v4 = |at: usize| {
            let octets: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
            Some(IpAddr::from(octets))
        };
        let v6 = |at: usize| {
            let octets: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
            Some(IpAddr::from(octets))
        };
        match version {
            IPV4 => Some(Ip {
                source: v4(12)?,
                destination: v4(16)?,
                next: *packet.get(9)?,
                payload: packet.get(usize::from(packet.first()? & 15) * 4..)?,
            }),
            IPV6 => Some(Ip {
                source: v6(8)?,
                destination: v6(24)?,
                next: *packet.get(6)?,
                payload: packet.get(40..)?,
            }),
            _ => None,
        }
    }
}

fn ipv4_header(source: Ipv4Addr, destination: Ipv4Addr, proto: u8, len: u16) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend((20 + len).to_be_bytes());
    // No identification, don't fragment.
    header.extend([0, 0, 0x40, 0, TTL, proto, 0, 0]);
    header.extend(source.octets());
    header.extend(destination.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header
}

fn ipv6_header(source: Ipv6Addr, destination: Ipv6Addr, next: u8, len: u16) -> Vec<u8> {
    let mut header = vec![0x60, 0, 0, 0];
    header.extend(len.to_be_bytes());
    header.extend([next, TTL]);
    header.extend(source.octets());
    header.extend(destination.octets());
    header
}

/// RFC 1071, of an even number of octets.
fn checksum(octets: &[u8]) -> u16 {
    let words = octets.chunks_exact(2);
    let mut sum: u32 = words
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().into(),
        IpAddr::V6(v6) => v6.octets().into(),
    }
}

fn take_u16(octets: &[u8]) -> Option<(u16, &[u8])> {
    let (word, rest) = octets.split_first_chunk()?;
    Some((u16::from_be_bytes(*word), rest))
}

pub(super) fn mac(octets: &[u8]) -> String {
    let octets: Vec<String> = octets.iter().map(|octet| format!("{octet:02x}")).collect();
    octets.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(proto: Proto, source: &str, destination: &str) -> Probe {
        Probe {
            proto,
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            established: false,
        }
    }

    #[test]
    fn a_probe_is_read_back_as_it_was_made() {
        for (source, destination) in [
            ("198.51.100.7:40000", "192.0.2.10:443"),
            ("[2001:db8:1::7]:40000", "[2001:db8::10]:443"),
        ] {
            for proto in [Proto::Tcp, Proto::Udp] {
                let probe = probe(proto, source, destination);
                let leaving = read(&probe.frame(), false).unwrap();
                assert_eq!(leaving.source, probe.source);
                assert_eq!(leaving.destination, probe.destination);
                assert_eq!((leaving.vlan, leaving.outer), (0, None));
            }
        }
    }

    #[test]
    fn checksums_add_up_to_nothing() {
        let tcp = probe(Proto::Tcp, "198.51.100.7:40000", "192.0.2.10:443");
        let frame = tcp.frame();
        assert_eq!(checksum(&frame[14..34]), 0);
        let mut pseudo = frame[26..34].to_vec();
        pseudo.extend([0, 6, 0, 20]);
        pseudo.extend(&frame[34..]);
        assert_eq!(checksum(&pseudo), 0);
        assert_eq!(frame[47], SYN);
        let middle = Probe {
            established: true,
            ..tcp
        };
        assert_eq!(middle.frame()[47], ACK);
    }

    #[test]
    fn the_packet_inside_is_told_from_the_one_outside() {
        let inner = probe(Proto::Tcp, "198.51.100.7:40000", "192.0.2.10:443").frame();
        let (from, to) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 11));
        let packet = &inner[14..];
        let wrap = |proto: u8, between: &[u8]| {
            let len = (between.len() + packet.len()) as u16;
            let mut frame = inner[..12].to_vec();
            frame.extend([0x81, 0, 0, 7]);
            frame.extend(ETHERTYPE_IPV4.to_be_bytes());
            frame.extend(ipv4_header(from, to, proto, len));
            frame.extend(between);
            frame.extend(packet);
            read(&frame, true).unwrap()
        };
        let ipip = wrap(IPV4, &[]);
        let outer = Outer {
            source: from.into(),
            destination: to.into(),
            udp: None,
        };
        assert_eq!((ipip.outer, ipip.vlan), (Some(outer), 7));
        assert_eq!(ipip.destination, "192.0.2.10:443".parse().unwrap());
        let gue = wrap(UDP, &[0x80, 1, 0x17, 0xc0, 0, 48, 0, 0]);
        assert_eq!(gue.outer.unwrap().udp, Some((0x8001, 6080)));
        assert_eq!(gue.source, "198.51.100.7:40000".parse().unwrap());
    }

    #[test]
    fn a_frame_cut_short_anywhere_is_no_frame() {
        let frame = probe(Proto::Udp, "198.51.100.7:40000", "192.0.2.10:443").frame();
        for len in 0..38 {
            assert_eq!(read(&frame[..len], false), None);
            assert_eq!(read(&frame[..len], true), None);
        }
    }
}
