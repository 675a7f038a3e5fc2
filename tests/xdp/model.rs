//! What the packet path promises, as plainly as it can be said: no tricks, no speed, and nothing from the
//! programs but the content of the rings.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use router_common::{Mode, RingSlot, Verdict};

/// A VIP with what its ring says.
pub struct ModelVip {
    pub address: IpAddr,
    pub ports: std::ops::RangeInclusive<u16>,
    pub proto: u8,
    pub mode: Mode,
    pub by_source: bool,
    pub silent: bool,
    pub denied: Vec<IpAddr>,
    /// Backends that take new flows.
    pub active: Vec<u32>,
    /// Backends that may keep theirs.
    pub members: Vec<u32>,
    pub ring: Box<[RingSlot]>,
}

/// What should become of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fate {
    pub verdict: Verdict,
    /// Whose counters count it.
    pub backend: Option<u32>,
}

const fn only(verdict: Verdict) -> Fate {
    Fate {
        verdict,
        backend: None,
    }
}

/// What this model has nothing to say about.
const fn unsaid() -> Fate {
    only(Verdict::UnknownError)
}

/// A packet's 5-tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub source_port: u16,
    pub destination_port: u16,
    pub proto: u8,
}

/// Which fragments belong together.
type Datagram = (IpAddr, IpAddr, u8, u32);

#[derive(Default)]
pub struct Model {
    pub vips: Vec<ModelVip>,
    /// Backends of flows, and whether a FIN or RST ended them as far as the gateway can tell.
    flows: HashMap<Tuple, Known>,
    /// Where those of a datagram go, and since when.
    fragments: HashMap<Datagram, (u32, Instant)>,
}

#[derive(Clone, Copy)]
struct Known {
    backend: u32,
    closed: bool,
}

/// What of a frame matters.
struct Headers {
    /// The frame holds all of the packet.
    whole: bool,
    tuple: Tuple,
    hops: u8,
    flags: u8,
    /// Identification of the datagram, and whether this is a piece without ports.
    fragment: Option<(u32, bool)>,
    /// The transport header is whole, and the lengths agree with that.
    sound: bool,
    icmp: Option<u8>,
    known_protocol: bool,
}

impl Model {
    /// What becomes of a frame, which changes what becomes of later ones. `None`: not for this model to
    /// say, since it knows neither sizes nor time nor ICMP errors.
    pub fn receive(&mut self, frame: &[u8], takes_tags: bool) -> Option<Fate> {
        // A classifier gets the tag beside the frame: one inside is a second.
        if !takes_tags && u16_at(frame, 12) == Some(0x8100) {
            return Some(only(Verdict::NotForUs));
        }
        let fate = self.fate(frame);
        let may_not_fit = fate.backend.is_some() && claimed_len(frame) > 1400;
        (!may_not_fit && fate != unsaid()).then_some(fate)
    }

    fn fate(&mut self, frame: &[u8]) -> Fate {
        let Some((destination, headers)) = read(frame) else {
            return only(Verdict::NotForUs);
        };
        if !self.vips.iter().any(|vip| vip.address == destination) {
            return only(Verdict::NotForUs);
        }
        let Some(headers) = headers else {
            return only(Verdict::Malformed);
        };
        let icmp = if destination.is_ipv4() { 1 } else { 58 };
        if headers.hops <= 1 && headers.tuple.proto != icmp {
            return only(Verdict::TtlExpired);
        }
        // ICMP of the other family.
        if matches!(headers.tuple.proto, 1 | 58) && headers.tuple.proto != icmp {
            return only(Verdict::Malformed);
        }
        if !headers.known_protocol {
            return only(Verdict::NoSuchVip);
        }
        if !headers.whole {
            return only(Verdict::Malformed);
        }
        if let Some((id, true)) = headers.fragment {
            let tuple = &headers.tuple;
            let datagram = (tuple.source, tuple.destination, tuple.proto, id);
            return match self.fragments.get(&datagram) {
                // They are forgotten some time after this.
                Some((_, since)) if since.elapsed() > Duration::from_secs(20) => unsaid(),
                Some(&(backend, _)) => Fate {
                    verdict: Verdict::Forwarded,
                    backend: Some(backend),
                },
                None => only(Verdict::Fragment),
            };
        }
        if !headers.sound {
            return only(Verdict::Malformed);
        }
        if let Some(kind) = headers.icmp {
            return only(match (kind, icmp) {
                (8, 1) | (128, 58) => Verdict::EchoAnswered,
                (3 | 11 | 12, 1) | (1..=4, 58) => return unsaid(),
                _ => Verdict::NoSuchVip,
            });
        }
        let fate = self.serve(&headers);
        if let (Some((id, false)), Some(backend)) = (headers.fragment, fate.backend) {
            let tuple = &headers.tuple;
            let datagram = (tuple.source, tuple.destination, tuple.proto, id);
            self.fragments.insert(datagram, (backend, Instant::now()));
        }
        fate
    }

    fn serve(&mut self, headers: &Headers) -> Fate {
        let tuple = headers.tuple;
        let covers = |vip: &&ModelVip| {
            vip.address == tuple.destination
                && vip.proto == tuple.proto
                && vip.ports.contains(&tuple.destination_port)
        };
        let narrowest = self.vips.iter().filter(covers);
        let Some(vip) = narrowest.min_by_key(|vip| vip.ports.end() - vip.ports.start()) else {
            return only(Verdict::NoSuchVip);
        };
        if vip.denied.contains(&tuple.source) {
            return only(Verdict::SourceDenied);
        }
        if vip.mode == Mode::L7 {
            return only(Verdict::HandedUp);
        }
        let tcp = tuple.proto == 6;
        let (fin, syn, rst, ack) = (
            tcp && headers.flags & 1 != 0,
            tcp && headers.flags & 2 != 0,
            tcp && headers.flags & 4 != 0,
            tcp && headers.flags & 16 != 0,
        );
        let opens = !tcp || syn && !fin && !rst && !ack;
        let translates = matches!(vip.mode, Mode::Nat | Mode::Dnat);
        let slot = vip.slot(&tuple);
        let nobody = match vip.silent {
            true => only(Verdict::NoBackend),
            // A reset is never reset.
            false if rst => only(Verdict::NoBackend),
            false => only(Verdict::Rejected),
        };
        let forwarded = |backend: u32, verdict: Verdict| Fate {
            verdict,
            backend: Some(backend),
        };
        // The ring alone decides about TCP in modes whose answers pass elsewhere, where it has not changed.
        if tcp && !translates && slot.is_quiet() {
            if opens && vip.active.is_empty() || !vip.members.contains(&slot.current()) {
                return nobody;
            }
            let verdict = if opens {
                Verdict::NewFlow
            } else {
                Verdict::Forwarded
            };
            return forwarded(slot.current(), verdict);
        }
        if let Some(known) = self.flows.get_mut(&tuple)
            && vip.members.contains(&known.backend)
            && !(known.closed && opens && tcp)
        {
            // One side's FIN is not the end where the other's passes here too.
            known.closed |= rst || fin && !translates;
            return forwarded(known.backend, Verdict::Forwarded);
        }
        if !opens && translates {
            return only(Verdict::UnknownFlow);
        }
        let current = slot.current();
        let backend = match opens {
            false
                if slot.previous() != RingSlot::NOBODY
                    && vip.members.contains(&slot.previous()) =>
            {
                slot.previous()
            }
            _ if vip.active.is_empty() => return nobody,
            _ => current,
        };
        if !rst {
            let known = Known {
                backend,
                closed: false,
            };
            self.flows.insert(tuple, known);
        }
        let verdict = if opens {
            Verdict::NewFlow
        } else {
            Verdict::Forwarded
        };
        forwarded(backend, verdict)
    }
}

impl ModelVip {
    fn slot(&self, tuple: &Tuple) -> RingSlot {
        let ports = if self.by_source {
            [0; 4]
        } else {
            let (a, b) = (tuple.source_port, tuple.destination_port);
            [a.to_be_bytes(), b.to_be_bytes()]
                .concat()
                .try_into()
                .expect("four octets")
        };
        let hash = ring_hash(tuple, ports);
        self.ring[((hash * self.ring.len() as u64) >> 32) as usize]
    }
}

/// Pi's fraction in hexadecimal digits (OEIS A062964); a key is a word of it, made odd.
const PI: [u64; 11] = [
    0x243f_6a88_85a3_08d3,
    0x1319_8a2e_0370_7344,
    0xa409_3822_299f_31d0,
    0x082e_fa98_ec4e_6c89,
    0x4528_21e6_38d0_1377,
    0xbe54_66cf_34e9_0c6c,
    0xc0ac_29b7_c97c_50dd,
    0x3f84_d5b5_b547_0917,
    0x9216_d5d9_8979_fb1b,
    0xd131_0ba6_98df_b5ac,
    0x2ffd_72db_d01a_dfb7,
];

/// The high half of the multilinear hash of a 5-tuple over words as they lie in memory, mixed.
fn ring_hash(tuple: &Tuple, ports: [u8; 4]) -> u64 {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    let word = |octets: &[u8]| u64::from(u32::from_ne_bytes(octets.try_into().expect("a word")));
    let (source, destination) = (octets(tuple.source), octets(tuple.destination));
    let mut words = vec![
        word(&source[12..]),
        word(&destination[12..]),
        word(&ports),
        u64::from(tuple.proto),
    ];
    if tuple.source.is_ipv6() || tuple.destination.is_ipv6() {
        words.extend(source[..12].chunks(4).map(word));
        words.extend(destination[..12].chunks(4).map(word));
    }
    let products = words.iter().zip(&PI[1..]);
    let sum = products.fold(PI[0], |sum, (word, key)| {
        sum.wrapping_add(word.wrapping_mul(key | 1))
    });
    let mixed = (sum ^ sum >> 32).wrapping_mul(0xff51_afd7_ed55_8ccd);
    (mixed ^ mixed >> 32) >> 32
}

/// The destination, and the other headers unless they contradict themselves. `None`: nothing that a
/// gateway looks at.
fn read(frame: &[u8]) -> Option<(IpAddr, Option<Headers>)> {
    let mut ethertype = u16_at(frame, 12)?;
    let mut l3 = 14;
    if ethertype == 0x8100 {
        ethertype = u16_at(frame, 16)?;
        l3 = 18;
    }
    match ethertype {
        0x0800 => read_v4(frame, l3),
        0x86dd => read_v6(frame, l3),
        _ => None,
    }
}

fn read_v4(frame: &[u8], l3: usize) -> Option<(IpAddr, Option<Headers>)> {
    let ip = frame.get(l3..l3 + 20)?;
    let address = |at: usize| -> [u8; 4] { ip[at..at + 4].try_into().expect("four octets") };
    let destination = IpAddr::V4(Ipv4Addr::from(address(16)));
    let source = IpAddr::V4(Ipv4Addr::from(address(12)));
    let header = usize::from(ip[0] & 15) * 4;
    if ip[0] >> 4 != 4 || header < 20 || ip[9] == 58 {
        return Some((destination, None));
    }
    let total = usize::from(u16_at(ip, 2)?);
    let field = u16_at(ip, 6)?;
    let fragment = match (field & 0x1fff, field & 0x2000) {
        (0, 0) => None,
        (offset, _) => Some((u32::from(u16_at(ip, 4)?), offset != 0)),
    };
    let headers = transport(
        frame,
        l3 + header,
        (l3 + total).saturating_sub(l3 + header),
        ip[9],
    );
    let headers = Headers {
        whole: l3 + total <= frame.len(),
        tuple: Tuple {
            source,
            destination,
            ..headers.tuple
        },
        hops: ip[8],
        fragment,
        ..headers
    };
    Some((destination, Some(headers)))
}

fn read_v6(frame: &[u8], l3: usize) -> Option<(IpAddr, Option<Headers>)> {
    let ip = frame.get(l3..l3 + 40)?;
    let address = |at: usize| -> [u8; 16] { ip[at..at + 16].try_into().expect("an address") };
    let destination = IpAddr::V6(Ipv6Addr::from(address(24)));
    let source = IpAddr::V6(Ipv6Addr::from(address(8)));
    if ip[0] >> 4 != 6 {
        return Some((destination, None));
    }
    let end = l3 + 40 + usize::from(u16_at(ip, 4)?);
    let (mut next, mut at) = (ip[6], l3 + 40);
    let mut fragment = None;
    // At most six extension headers.
    for _ in 0..6 {
        if !matches!(next, 0 | 43 | 44 | 60) {
            break;
        }
        let Some(header) = frame.get(at..at + 8) else {
            return Some((destination, None));
        };
        at += match next {
            44 => 8,
            _ => 8 + usize::from(header[1]) * 8,
        };
        let was_fragment = next == 44;
        next = header[0];
        if was_fragment {
            let field = u16_at(header, 2)?;
            let id = u32::from_ne_bytes(header[4..8].try_into().expect("four octets"));
            match (field & 0xfff8, field & 1) {
                (0, 0) => {}
                (offset, _) => fragment = Some((id, offset != 0)),
            }
            if fragment.is_some_and(|(_, later)| later) {
                break;
            }
        }
    }
    let later = fragment.is_some_and(|(_, later)| later);
    // Headers are read from a frame's first 768 octets.
    if !later && matches!(next, 0 | 43 | 44 | 60) || at > 0x2ff {
        return Some((destination, None));
    }
    let headers = transport(frame, at, end.saturating_sub(at), next);
    let headers = Headers {
        whole: end <= frame.len(),
        tuple: Tuple {
            source,
            destination,
            ..headers.tuple
        },
        hops: ip[7],
        fragment,
        ..headers
    };
    Some((destination, Some(headers)))
}

/// What a transport header of `len` octets says, at most.
fn transport(frame: &[u8], at: usize, len: usize, proto: u8) -> Headers {
    let needed = match proto {
        6 => 20,
        17 | 1 | 58 => 8,
        _ => 0,
    };
    let header = frame.get(at..at + needed).filter(|_| len >= needed);
    let ported = matches!(proto, 6 | 17);
    let port = |offset: usize| match header {
        Some(header) if ported => u16_at(header, offset).expect("in the header"),
        _ => 0,
    };
    Headers {
        tuple: Tuple {
            source: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            destination: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            source_port: port(0),
            destination_port: port(2),
            proto,
        },
        whole: false,
        hops: 0,
        flags: header.filter(|_| proto == 6).map_or(0, |header| header[13]),
        fragment: None,
        sound: header.is_some(),
        icmp: header
            .filter(|_| matches!(proto, 1 | 58))
            .map(|header| header[0]),
        known_protocol: needed != 0,
    }
}

/// Octets of the IP packet, as its header has it.
fn claimed_len(frame: &[u8]) -> usize {
    let l3 = match u16_at(frame, 12) {
        Some(0x8100) => 18,
        _ => 14,
    };
    let v6 = frame.get(l3).is_some_and(|octet| octet >> 4 == 6);
    let at = if v6 { l3 + 4 } else { l3 + 2 };
    usize::from(u16_at(frame, at).unwrap_or(0))
}

fn u16_at(octets: &[u8], at: usize) -> Option<u16> {
    let pair = octets.get(at..at + 2)?;
    Some(u16::from_be_bytes([pair[0], pair[1]]))
}
