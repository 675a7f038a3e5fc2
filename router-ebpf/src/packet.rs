//! The only bounds checks and pointer casts: a frame becomes a [`Packet`], or is none of ours.
//!
//! Words are loaded as they lie on the wire. An IPv4 header stands at an offset of 14 octets, so the
//! loads are unaligned; the verifier allows that on the architectures that do (kernel:
//! Documentation/bpf/verifier.rst, `CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS`).

use aya_ebpf::programs::XdpContext;
use router_common::{
    Addr, FlowKey, IPPROTO_TCP, IPPROTO_UDP, Ports, TcpFlags, Verdict, prefilter_bit,
};

use crate::maps;

const ETH_LEN: usize = 14;
/// IANA 0x0800, as the half-word lies in the frame.
const ETHERTYPE_IPV4: u16 = 0x0800_u16.to_be();
const IPV4_MIN_LEN: usize = 20;
const TCP_MIN_LEN: usize = 20;
const UDP_LEN: usize = 8;
/// RFC 791 §3.1: more fragments, and the fragment offset.
const FRAGMENT: u16 = 0x3fff_u16.to_be();

/// RFC 791 §3.1. Fields as they lie in the frame.
#[repr(C)]
pub struct Ipv4Header {
    pub version_ihl: u8,
    pub tos: u8,
    pub total_len: u16,
    pub id: u16,
    pub fragment: u16,
    pub ttl: u8,
    pub proto: u8,
    pub checksum: u16,
    pub source: u32,
    pub destination: u32,
}

#[repr(C)]
pub struct EthHeader {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype: u16,
}

/// An unfragmented IPv4 TCP or UDP packet whose headers are whole.
pub struct Packet {
    pub eth: *mut EthHeader,
    pub ip: *mut Ipv4Header,
    /// Source and destination port.
    pub ports: *mut u32,
    /// Of TCP or UDP.
    pub checksum: *mut u16,
    pub key: FlowKey,
    /// All clear for UDP.
    pub tcp: TcpFlags,
    /// Octets of the frame, without padding.
    pub len: u64,
    /// The prefilter says that a VIP may have this destination,
    pub to_vip: bool,
    /// or that backends may answer to it.
    pub to_gateway: bool,
}

impl Packet {
    /// Reads the headers of a frame.
    ///
    /// Traffic for neither a VIP nor a gateway address of ours leaves after the destination is known,
    /// whatever else is wrong with it.
    #[inline(always)]
    pub fn parse(ctx: &XdpContext) -> Result<Packet, Verdict> {
        let data = ctx.data();
        let end = ctx.data_end();
        if data + ETH_LEN + IPV4_MIN_LEN > end {
            return Err(Verdict::NotForUs);
        }
        let eth = data as *mut EthHeader;
        let ip = (data + ETH_LEN) as *mut Ipv4Header;
        // SAFETY: both headers lie before `end`, as checked above.
        let (ethertype, destination) = unsafe { ((*eth).ethertype, (*ip).destination) };
        if ethertype != ETHERTYPE_IPV4 {
            return Err(Verdict::NotForUs);
        }
        let destination = Addr::from_v4_word(destination);
        let (word, bit) = prefilter_bit(destination);
        let bits = maps::PREFILTER.get(word).ok_or(Verdict::Internal)? >> (bit & 63) & 3;
        if bits == 0 {
            return Err(Verdict::NotForUs);
        }
        // SAFETY: as above.
        let ip_ref = unsafe { &*ip };
        let header_len = (ip_ref.version_ihl & 0x0f) as usize * 4;
        let total_len = u16::from_be(ip_ref.total_len) as usize;
        let proto = ip_ref.proto;
        let l4_len = match proto {
            IPPROTO_TCP => TCP_MIN_LEN,
            IPPROTO_UDP => UDP_LEN,
            _ => return Err(Verdict::NoSuchVip),
        };
        if ip_ref.fragment & FRAGMENT != 0 {
            return Err(refuse(destination, bits, Verdict::Fragment));
        }
        if ip_ref.version_ihl >> 4 != 4
            || header_len < IPV4_MIN_LEN
            || total_len < header_len + l4_len
        {
            return Err(refuse(destination, bits, Verdict::Malformed));
        }
        // Here, and not where it is counted down: an expired packet must not make a flow.
        if ip_ref.ttl <= 1 {
            return Err(refuse(destination, bits, Verdict::TtlExpired));
        }
        let l4 = data + ETH_LEN + header_len;
        if l4 + l4_len > end {
            return Err(refuse(destination, bits, Verdict::Malformed));
        }
        // SAFETY: `l4_len` octets from `l4` lie before `end`; the ports are at 0, and the checksum and
        // flags of TCP at 16 and 13 (RFC 9293 §3.1), the checksum of UDP at 6 (RFC 768).
        let (ports, tcp, checksum) = unsafe {
            let ports = Ports::from_word(*(l4 as *const u32));
            if proto == IPPROTO_TCP {
                (
                    ports,
                    TcpFlags(*((l4 + 13) as *const u8)),
                    (l4 + 16) as *mut u16,
                )
            } else {
                (ports, TcpFlags(0), (l4 + 6) as *mut u16)
            }
        };
        let source = Addr::from_v4_word(ip_ref.source);
        Ok(Packet {
            eth,
            ip,
            ports: l4 as *mut u32,
            checksum,
            key: FlowKey {
                source,
                destination,
                ports,
                proto,
            },
            tcp,
            len: (ETH_LEN + total_len) as u64,
            to_vip: bits & 1 != 0,
            to_gateway: bits & 2 != 0,
        })
    }
}

/// The verdict on a packet to `destination` that cannot be served: `verdict` if a VIP has that
/// address and the gateway itself does not, else it is none of our business.
#[inline(never)]
fn refuse(destination: Addr, bits: u64, verdict: Verdict) -> Verdict {
    // SAFETY: only whether the key is there matters.
    if bits & 2 == 0 && unsafe { maps::VIP_ADDRESSES.get(destination) }.is_some() {
        return verdict;
    }
    Verdict::NotForUs
}
