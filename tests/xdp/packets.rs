//! Frames as etherparse builds and reads them.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    EtherType, IpFragOffset, IpHeaders, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header,
    PacketBuilder, SlicedPacket, TcpHeader, TransportSlice, VlanHeader, VlanId,
};

use crate::fixture::{BACKEND_MAC, CLIENT_MAC, GATEWAY_INNER_MAC, GATEWAY_MAC};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    Syn,
    Ack,
    Fin,
    Rst,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp(Segment),
    Udp,
}

/// A TCP segment or a UDP datagram, from the Ethernet header on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub source_mac: [u8; 6],
    pub destination_mac: [u8; 6],
    /// VLAN identifier; 0: untagged.
    pub vlan: u16,
    pub from: SocketAddr,
    pub to: SocketAddr,
    /// Time to live, or hop limit.
    pub hops: u8,
    /// Type of service, or traffic class.
    pub class: u8,
    /// Of IPv4.
    pub dont_fragment: bool,
    pub transport: Transport,
    pub payload: Vec<u8>,
}

/// From a client's side of the gateway.
pub fn tcp(from: SocketAddr, to: SocketAddr, segment: Segment, payload: &[u8]) -> Packet {
    Packet {
        source_mac: CLIENT_MAC,
        destination_mac: GATEWAY_MAC,
        vlan: 0,
        from,
        to,
        hops: 64,
        class: 0,
        dont_fragment: true,
        transport: Transport::Tcp(segment),
        payload: payload.to_vec(),
    }
}

pub fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Packet {
    Packet {
        transport: Transport::Udp,
        ..tcp(from, to, Segment::Syn, payload)
    }
}

impl Packet {
    /// The same from the backends' side.
    pub fn at_backends(self) -> Packet {
        Packet {
            source_mac: BACKEND_MAC,
            destination_mac: GATEWAY_INNER_MAC,
            ..self
        }
    }

    pub fn answer(&self, payload: &[u8]) -> Packet {
        let transport = match self.transport {
            Transport::Tcp(_) => Transport::Tcp(Segment::Ack),
            Transport::Udp => Transport::Udp,
        };
        Packet {
            from: self.to,
            to: self.from,
            transport,
            payload: payload.to_vec(),
            hops: 64,
            ..self.clone()
        }
        .at_backends()
    }

    pub fn frame(&self) -> Vec<u8> {
        let eth = PacketBuilder::ethernet2(self.source_mac, self.destination_mac);
        let ip = match self.vlan {
            0 => eth.ip(self.ip()),
            id => eth.vlan(tag(id)).ip(self.ip()),
        };
        let (from, to) = (self.from.port(), self.to.port());
        let mut frame = Vec::new();
        match self.transport {
            Transport::Tcp(segment) => ip
                .tcp_header(tcp_header(from, to, segment))
                .write(&mut frame, &self.payload),
            Transport::Udp => ip.udp(from, to).write(&mut frame, &self.payload),
        }
        .expect("build a packet");
        frame
    }

    /// From the IP header on.
    pub fn bytes(&self) -> Vec<u8> {
        let untagged = Packet {
            vlan: 0,
            ..self.clone()
        };
        untagged.frame().split_off(14)
    }

    /// Where the IP header begins.
    pub fn l3(&self) -> usize {
        if self.vlan == 0 { 14 } else { 18 }
    }

    /// Where the transport header begins.
    pub fn l4(&self) -> usize {
        self.l3() + if self.from.is_ipv4() { 20 } else { 40 }
    }

    fn ip(&self) -> IpHeaders {
        match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => IpHeaders::Ipv4(
                Ipv4Header {
                    dscp: (self.class >> 2).try_into().expect("six bits"),
                    ecn: (self.class & 3).try_into().expect("two bits"),
                    identification: 0x1234,
                    dont_fragment: self.dont_fragment,
                    time_to_live: self.hops,
                    source: from.octets(),
                    destination: to.octets(),
                    ..Ipv4Header::default()
                },
                Default::default(),
            ),
            (IpAddr::V6(from), IpAddr::V6(to)) => IpHeaders::Ipv6(
                Ipv6Header {
                    traffic_class: self.class,
                    flow_label: Ipv6FlowLabel::try_new(0x5_4321).expect("twenty bits"),
                    payload_length: 0,
                    next_header: IpNumber::TCP,
                    hop_limit: self.hops,
                    source: from.octets(),
                    destination: to.octets(),
                },
                Default::default(),
            ),
            mixed => panic!("addresses of two families: {mixed:?}"),
        }
    }
}

fn tag(id: u16) -> VlanHeader {
    VlanHeader::Single(etherparse::SingleVlanHeader {
        vlan_id: VlanId::try_new(id).expect("twelve bits"),
        ether_type: EtherType(0),
        ..Default::default()
    })
}

fn tcp_header(from: u16, to: u16, segment: Segment) -> TcpHeader {
    let header = TcpHeader::new(from, to, 1000, 64240);
    let acknowledges = TcpHeader {
        ack: true,
        acknowledgment_number: 2000,
        ..header.clone()
    };
    match segment {
        Segment::Syn => TcpHeader {
            syn: true,
            ..header
        },
        Segment::Ack => acknowledges,
        Segment::Fin => TcpHeader {
            fin: true,
            ..acknowledges
        },
        Segment::Rst => TcpHeader {
            rst: true,
            ..header
        },
    }
}

/// The outer header of a tunnel, as it must be.
pub struct Outer {
    pub from: IpAddr,
    pub to: IpAddr,
    pub class: u8,
    pub proto: IpNumber,
    /// Of IPv6.
    pub flow_label: u32,
}

impl Outer {
    pub fn bytes(&self, payload: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut header = Ipv4Header {
                    dscp: (self.class >> 2).try_into().expect("six bits"),
                    ecn: (self.class & 3).try_into().expect("two bits"),
                    total_len: (20 + payload) as u16,
                    identification: 0,
                    dont_fragment: true,
                    time_to_live: 64,
                    protocol: self.proto,
                    source: from.octets(),
                    destination: to.octets(),
                    ..Ipv4Header::default()
                };
                header.header_checksum = header.calc_header_checksum();
                header.write(&mut bytes).expect("build a header");
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                Ipv6Header {
                    traffic_class: self.class,
                    flow_label: Ipv6FlowLabel::try_new(self.flow_label).expect("twenty bits"),
                    payload_length: payload as u16,
                    next_header: self.proto,
                    hop_limit: 64,
                    source: from.octets(),
                    destination: to.octets(),
                }
                .write(&mut bytes)
                .expect("build a header");
            }
            mixed => panic!("addresses of two families: {mixed:?}"),
        }
        bytes
    }
}

/// An Ethernet header, with the tag `vlan` if it is not 0.
pub fn ethernet(source: [u8; 6], destination: [u8; 6], vlan: u16, v6: bool) -> Vec<u8> {
    let mut bytes = [destination, source].concat();
    if vlan != 0 {
        bytes.extend([0x81, 0x00]);
        bytes.extend(vlan.to_be_bytes());
    }
    bytes.extend(if v6 { [0x86, 0xdd] } else { [0x08, 0x00] });
    bytes
}

/// Cuts an IPv4 packet's frame in two at `at` octets behind its IP header, which must be a multiple of 8.
pub fn fragments_v4(packet: &Packet, id: u16, at: usize) -> [Vec<u8>; 2] {
    let (l3, l4) = (packet.l3(), packet.l4());
    let frame = packet.frame();
    let piece = |bytes: &[u8], offset: usize, more: bool| {
        let (mut header, _) = Ipv4Header::from_slice(&frame[l3..]).expect("an IPv4 header");
        header.identification = id;
        header.dont_fragment = false;
        header.more_fragments = more;
        header.fragment_offset = IpFragOffset::try_new((offset / 8) as u16).expect("13 bits");
        header.total_len = (20 + bytes.len()) as u16;
        header.header_checksum = header.calc_header_checksum();
        let mut piece = frame[..l3].to_vec();
        header.write(&mut piece).expect("build a header");
        piece.extend_from_slice(bytes);
        piece
    };
    let (first, later) = frame[l4..].split_at(at);
    [piece(first, 0, true), piece(later, at, false)]
}

/// The same by fragment headers (RFC 8200 §4.5).
pub fn fragments_v6(packet: &Packet, id: u32, at: usize) -> [Vec<u8>; 2] {
    let frame = packet.frame();
    let (first, later) = frame[packet.l4()..].split_at(at);
    [
        with_fragment_header(packet, id, 0, true, first),
        with_fragment_header(packet, id, at, false, later),
    ]
}

pub fn with_fragment_header(
    packet: &Packet,
    id: u32,
    offset: usize,
    more: bool,
    bytes: &[u8],
) -> Vec<u8> {
    let next = packet.frame()[packet.l3() + 6];
    let mut header = vec![next, 0];
    header.extend((offset as u16 | u16::from(more)).to_be_bytes());
    header.extend(id.to_be_bytes());
    with_extension(packet, 44, &header, bytes)
}

/// The packet with an extension header of number `number`, whose first octet is already right.
pub fn with_extension(packet: &Packet, number: u8, header: &[u8], payload: &[u8]) -> Vec<u8> {
    let l3 = packet.l3();
    let mut frame = packet.frame();
    frame.truncate(packet.l4());
    frame[l3 + 6] = number;
    let len = (header.len() + payload.len()) as u16;
    frame[l3 + 4..l3 + 6].copy_from_slice(&len.to_be_bytes());
    frame.extend_from_slice(header);
    frame.extend_from_slice(payload);
    frame
}

/// A packet as an independent parser reads it, with its checksums found right.
pub fn read(frame: &[u8]) -> Packet {
    let packet = SlicedPacket::from_ethernet(frame).expect("a sound frame");
    let eth = packet
        .link
        .as_ref()
        .expect("Ethernet")
        .to_header()
        .expect("Ethernet")
        .ethernet2()
        .expect("Ethernet II");
    let vlan = packet.vlan_ids().first().map_or(0, |id| id.value());
    let (from, to, hops, class, dont_fragment) = match packet.net.as_ref().expect("IP") {
        etherparse::NetSlice::Ipv4(ip) => {
            let ip = ip.header().to_header();
            let sum = ip.calc_header_checksum();
            assert_eq!(ip.header_checksum, sum, "IPv4 header checksum");
            let class = ip.dscp.value() << 2 | ip.ecn.value();
            let (from, to) = (IpAddr::from(ip.source), IpAddr::from(ip.destination));
            (from, to, ip.time_to_live, class, ip.dont_fragment)
        }
        etherparse::NetSlice::Ipv6(ip) => {
            let ip = ip.header().to_header();
            let (from, to) = (IpAddr::from(ip.source), IpAddr::from(ip.destination));
            (from, to, ip.hop_limit, ip.traffic_class, true)
        }
        other => panic!("not IP: {other:?}"),
    };
    let (transport, ports, payload) = match packet.transport.as_ref().expect("TCP or UDP") {
        TransportSlice::Tcp(tcp) => {
            let segment = match (tcp.syn(), tcp.fin(), tcp.rst()) {
                (true, ..) => Segment::Syn,
                (_, true, _) => Segment::Fin,
                (.., true) => Segment::Rst,
                _ => Segment::Ack,
            };
            let ports = (tcp.source_port(), tcp.destination_port());
            (Transport::Tcp(segment), ports, tcp.payload().to_vec())
        }
        TransportSlice::Udp(udp) => {
            let ports = (udp.source_port(), udp.destination_port());
            (Transport::Udp, ports, udp.payload().to_vec())
        }
        other => panic!("neither TCP nor UDP: {other:?}"),
    };
    assert!(
        checksum_is_right(&packet),
        "transport checksum: {frame:02x?}"
    );
    Packet {
        source_mac: eth.source,
        destination_mac: eth.destination,
        vlan,
        from: SocketAddr::new(from, ports.0),
        to: SocketAddr::new(to, ports.1),
        hops,
        class,
        dont_fragment,
        transport,
        payload,
    }
}

/// Of TCP, UDP or ICMP.
pub fn checksum_is_right(packet: &SlicedPacket<'_>) -> bool {
    use etherparse::NetSlice::{Ipv4, Ipv6};
    let net = packet.net.as_ref().expect("IP");
    let (found, right) = match (packet.transport.as_ref().expect("a transport"), net) {
        (TransportSlice::Tcp(tcp), Ipv4(ip)) => {
            let (from, to) = (ip.header().source(), ip.header().destination());
            (tcp.checksum(), tcp.calc_checksum_ipv4(from, to).ok())
        }
        (TransportSlice::Tcp(tcp), Ipv6(ip)) => {
            let (from, to) = (ip.header().source(), ip.header().destination());
            (tcp.checksum(), tcp.calc_checksum_ipv6(from, to).ok())
        }
        (TransportSlice::Udp(udp), Ipv4(ip)) => {
            let (from, to) = (ip.header().source(), ip.header().destination());
            let header = udp.to_header();
            let right = header.calc_checksum_ipv4_raw(from, to, udp.payload());
            (udp.checksum(), right.ok())
        }
        (TransportSlice::Udp(udp), Ipv6(ip)) => {
            let (from, to) = (ip.header().source(), ip.header().destination());
            let header = udp.to_header();
            let right = header.calc_checksum_ipv6_raw(from, to, udp.payload());
            (udp.checksum(), right.ok())
        }
        (TransportSlice::Icmpv4(icmp), Ipv4(_)) => {
            let right = icmp.header().icmp_type.calc_checksum(icmp.payload());
            (icmp.header().checksum, Some(right))
        }
        (TransportSlice::Icmpv6(icmp), Ipv6(ip)) => {
            let (from, to) = (ip.header().source(), ip.header().destination());
            let kind = icmp.header().icmp_type;
            let right = kind.calc_checksum(from, to, icmp.payload());
            (icmp.header().checksum, right.ok())
        }
        other => panic!("a transport of the other family: {other:?}"),
    };
    Some(found) == right
}

/// An ICMP packet of either family, from `from`'s side of the gateway.
pub fn icmp(
    from: IpAddr,
    to: IpAddr,
    kind: u8,
    code: u8,
    rest: [u8; 4],
    payload: &[u8],
) -> Vec<u8> {
    let eth = PacketBuilder::ethernet2(CLIENT_MAC, GATEWAY_MAC);
    let mut frame = Vec::new();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => eth
            .ipv4(from.octets(), to.octets(), 64)
            .icmpv4_raw(kind, code, rest)
            .write(&mut frame, payload),
        (IpAddr::V6(from), IpAddr::V6(to)) => eth
            .ipv6(from.octets(), to.octets(), 64)
            .icmpv6_raw(kind, code, rest)
            .write(&mut frame, payload),
        mixed => panic!("addresses of two families: {mixed:?}"),
    }
    .expect("build an ICMP packet");
    frame
}

/// The same from the backends' side.
pub fn from_backend(mut frame: Vec<u8>) -> Vec<u8> {
    frame[..6].copy_from_slice(&GATEWAY_INNER_MAC);
    frame[6..12].copy_from_slice(&BACKEND_MAC);
    frame
}
