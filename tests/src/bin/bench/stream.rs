//! Packets that the harness lays one after another, and the headers in which they differ.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, bail};
use etherparse::PacketBuilder;

pub(crate) const PORT: u16 = 9090;
pub(crate) const VIP_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// Ends as the IPv4 one, as the clients do: one table of differences serves both families.
pub(crate) const VIP_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0xc000, 0x020a);
/// First of the clients' addresses; they go up by one.
const CLIENT: u32 = u32::from_be_bytes([198, 18, 0, 0]);

/// Octets of every IPv4 frame and of every IPv6 one: as many as the harness lays.
const V4_LEN: usize = 64;
const V6_LEN: usize = 96;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Syn,
    Ack,
    Udp,
    Echo,
}

/// Last words of source and destination, and ports, as they lie in a packet.
pub(crate) type Headers = [[u16; 2]; 3];

/// Packets of `count` flows in turn, a power of two.
#[derive(Clone)]
pub(crate) struct Stream {
    pub(crate) frame: Vec<u8>,
    pub(crate) v6: bool,
    /// Place of its first flow in the harness's table.
    pub(crate) first: u32,
    pub(crate) count: u32,
    /// Every packet has a source of its own.
    pub(crate) fresh: bool,
}

impl Stream {
    /// Of known clients.
    pub(crate) fn known(kind: Kind, v6: bool, count: u32) -> anyhow::Result<Stream> {
        let to = vip(v6);
        Ok(Stream {
            frame: frame(kind, client(0, v6), to, client_port(0), PORT)?,
            v6,
            first: 0,
            count,
            fresh: false,
        })
    }

    /// Of clients that have not been here.
    pub(crate) fn fresh(kind: Kind, v6: bool) -> anyhow::Result<Stream> {
        Ok(Stream {
            fresh: true,
            ..Stream::known(kind, v6, 1)?
        })
    }

    /// The frame of one of the known clients.
    pub(crate) fn known_frame(kind: Kind, number: u32) -> anyhow::Result<Vec<u8>> {
        let port = client_port(number);
        frame(kind, client(number, false), vip(false), port, PORT)
    }
}

pub(crate) fn client_headers(number: u32) -> Headers {
    let [a, b] = halves(CLIENT + number);
    let [c, d] = halves(VIP_V4.to_bits());
    [[a, b], [c, d], [client_port(number).to_be(), PORT.to_be()]]
}

/// The differing headers of an IPv4 frame.
pub(crate) fn headers_of(frame: &[u8]) -> Headers {
    let half = |at: usize| u16::from_ne_bytes([frame[at], frame[at + 1]]);
    [26, 30, 34].map(|at| [half(at), half(at + 2)])
}

/// What answers a forwarded IPv4 frame: its headers, the other way round.
pub(crate) fn answer_to(frame: &[u8]) -> Headers {
    let [source, destination, [from, to]] = headers_of(frame);
    [destination, source, [to, from]]
}

pub(crate) fn frame(
    kind: Kind,
    source: IpAddr,
    destination: IpAddr,
    source_port: u16,
    destination_port: u16,
) -> anyhow::Result<Vec<u8>> {
    let link = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let (ip, len) = match (source, destination) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (link.ipv4(from.octets(), to.octets(), 64), V4_LEN),
        (IpAddr::V6(from), IpAddr::V6(to)) => (link.ipv6(from.octets(), to.octets(), 64), V6_LEN),
        _ => bail!("addresses of two families"),
    };
    let fill = |headers: usize| len.checked_sub(headers).map(|room| vec![0; room]);
    let fill = |headers| fill(headers).context("headers are too long");
    let mut frame = Vec::new();
    match kind {
        Kind::Syn | Kind::Ack => {
            let tcp = ip.tcp(source_port, destination_port, 1, 64_240);
            let tcp = if kind == Kind::Syn {
                tcp.syn()
            } else {
                tcp.ack(1)
            };
            let payload = fill(tcp.size(0))?;
            tcp.write(&mut frame, &payload)?;
        }
        Kind::Udp => {
            let udp = ip.udp(source_port, destination_port);
            let payload = fill(udp.size(0))?;
            udp.write(&mut frame, &payload)?;
        }
        Kind::Echo => {
            let echo = ip.icmpv4_echo_request(1, 1);
            let payload = fill(echo.size(0))?;
            echo.write(&mut frame, &payload)?;
        }
    }
    Ok(frame)
}

pub(crate) fn client(number: u32, v6: bool) -> IpAddr {
    let last = CLIENT + number;
    if v6 {
        Ipv6Addr::from_bits(0x2001_0db8_00ff_0000 << 64 | u128::from(last)).into()
    } else {
        Ipv4Addr::from_bits(last).into()
    }
}

fn vip(v6: bool) -> IpAddr {
    if v6 { VIP_V6.into() } else { VIP_V4.into() }
}

fn client_port(number: u32) -> u16 {
    40_000 + (number % 7919) as u16
}

fn halves(word: u32) -> [u16; 2] {
    [(word >> 16) as u16, word as u16].map(u16::to_be)
}
