//! The flow table: which client talks to which backend through which gateway port.
//!
//! Three plain arrays, shared by all cores, instead of hash or LRU maps: a lookup is one cache line
//! and no helper call, an insert cannot fail for want of memory, and nothing is locked.
//!
//! ```text
//!  client -> VIP            hash                          backend -> gateway port      hash
//!                            │ bucket                                                   │ bucket
//!  FLOW_SLOTS  [ tag | backend | seen | state ] x 8       RETURNS  [ hash | entry ] x 8 ┘
//!                            │ bucket * 8 + way                        │ entry
//!  FLOWS       [ client, VIP, gateway port, MACs, ... ] <──────────────┘
//! ```
//!
//! A slot's place is its entry's place, so there is no allocator. An entry and its return slot are
//! made together and cleared together, by whoever holds the slot after a compare-and-swap.

use crate::{Addr, Ports};

/// Slots of a bucket: one cache line of 64 bytes.
pub const FLOW_WAYS: usize = 8;
/// Return slots of a bucket: one cache line of 64 bytes.
pub const RETURN_WAYS: usize = 8;
/// Words that [`FlowKey::hash`] takes in, plus one.
pub const HASH_WORDS: usize = 11;

/// The 5-tuple of a packet as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowKey {
    pub source: Addr,
    pub destination: Addr,
    pub ports: Ports,
    /// IANA protocol number.
    pub proto: u8,
}

/// The public key of the ring hash: every gateway puts a flow on the same slot of the ring.
/// The first binary digits of pi's fraction.
pub const RING_KEYS: [u64; HASH_WORDS] = [
    0x243f_6a88_85a3_08d3,
    0x1319_8a2e_0370_7345,
    0xa409_3822_299f_31d1,
    0x082e_fa98_ec4e_6c89,
    0x4528_21e6_38d0_1377,
    0xbe54_66cf_34e9_0c6d,
    0xc0ac_29b7_c97c_50dd,
    0x3f84_d5b5_b547_0917,
    0x9216_d5d9_8979_fb1b,
    0xd131_0ba6_98df_b5ad,
    0x2ffd_72db_d01a_dfb7,
];

impl FlowKey {
    /// A hash that is strongly universal over its random keys, so that nobody who does not know them
    /// can choose tuples that collide: the multilinear family, Lemire and Kaser, "Strongly universal
    /// string hashing is fast", The Computer Journal 57(11), 2014, §3. It is linear, so [`mix64`] follows:
    /// clients that count up their ports would leave a pattern otherwise.
    #[inline(always)]
    pub fn hash(&self, keys: &[u64; HASH_WORDS]) -> u64 {
        let source = self.source.words();
        let destination = self.destination.words();
        let mut sum = keys[0]
            .wrapping_add(keys[1].wrapping_mul(source[3] as u64))
            .wrapping_add(keys[2].wrapping_mul(destination[3] as u64))
            .wrapping_add(keys[3].wrapping_mul(self.ports.word() as u64))
            .wrapping_add(keys[4].wrapping_mul(self.proto as u64));
        // The other words of two IPv4 addresses are constant and cannot tell flows apart.
        if !(self.source.is_v4() && self.destination.is_v4()) {
            sum = sum
                .wrapping_add(keys[5].wrapping_mul(source[0] as u64))
                .wrapping_add(keys[6].wrapping_mul(source[1] as u64))
                .wrapping_add(keys[7].wrapping_mul(source[2] as u64))
                .wrapping_add(keys[8].wrapping_mul(destination[0] as u64))
                .wrapping_add(keys[9].wrapping_mul(destination[1] as u64))
                .wrapping_add(keys[10].wrapping_mul(destination[2] as u64));
        }
        mix64(sum)
    }
}

/// Scatters neighbouring numbers. A bijection, so that it takes nothing from a hash's universality.
#[inline(always)]
pub const fn mix(number: u32) -> u32 {
    let number = (number ^ number >> 16).wrapping_mul(0x7feb_352d);
    number ^ number >> 15
}

/// The same for 64 bits: the finalizer of MurmurHash3 less its last round.
#[inline(always)]
pub const fn mix64(number: u64) -> u64 {
    let number = (number ^ number >> 32).wrapping_mul(0xff51_afd7_ed55_8ccd);
    number ^ number >> 32
}

/// Where a flow is in its life. TCP as far as a gateway needs RFC 9293 §3.3.2.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowState {
    Free = 0,
    /// TCP, and the client has sent nothing but SYN: the first to go when room is needed.
    Syn = 1,
    Established = 2,
    /// The client has sent FIN, the backend may go on.
    FinClient = 3,
    /// The backend has sent FIN, the client may go on.
    FinBackend = 4,
    /// Both have sent FIN, or one of them RST.
    Closing = 5,
    Udp = 6,
    /// The entry behind the slot is being written or cleared: nobody else reads it or takes the place.
    Held = 7,
    /// No flow, but where a client goes: [`FlowKey`] without its port.
    Affinity = 8,
    /// No flow, but where the fragments of one datagram go: the identification instead of the ports.
    Fragment = 9,
}

impl FlowState {
    pub const COUNT: usize = 10;

    #[inline(always)]
    pub const fn from_bits(bits: u8) -> FlowState {
        match bits & 15 {
            0 => FlowState::Free,
            1 => FlowState::Syn,
            2 => FlowState::Established,
            3 => FlowState::FinClient,
            4 => FlowState::FinBackend,
            5 => FlowState::Closing,
            6 => FlowState::Udp,
            8 => FlowState::Affinity,
            9 => FlowState::Fragment,
            _ => FlowState::Held,
        }
    }

    /// The name in the API and `viaduct flows`.
    pub const fn name(self) -> &'static str {
        match self {
            FlowState::Free => "free",
            FlowState::Syn => "syn",
            FlowState::Established => "established",
            FlowState::FinClient => "fin_client",
            FlowState::FinBackend => "fin_backend",
            FlowState::Closing => "closing",
            FlowState::Udp => "udp",
            FlowState::Held => "held",
            FlowState::Affinity => "affinity",
            FlowState::Fragment => "fragment",
        }
    }

    /// The state after a TCP segment from the client.
    #[inline(always)]
    pub const fn after_client(self, flags: TcpFlags) -> FlowState {
        if flags.rst() {
            return FlowState::Closing;
        }
        match self {
            FlowState::Syn | FlowState::Established if flags.fin() => FlowState::FinClient,
            FlowState::FinBackend if flags.fin() => FlowState::Closing,
            FlowState::Syn if !flags.syn() => FlowState::Established,
            state => state,
        }
    }

    /// The state after a TCP segment from the backend.
    #[inline(always)]
    pub const fn after_backend(self, flags: TcpFlags) -> FlowState {
        if flags.rst() {
            return FlowState::Closing;
        }
        match self {
            FlowState::Syn | FlowState::Established if flags.fin() => FlowState::FinBackend,
            FlowState::FinClient if flags.fin() => FlowState::Closing,
            state => state,
        }
    }
}

/// Byte 13 of a TCP header (RFC 9293 §3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    #[inline(always)]
    pub const fn fin(self) -> bool {
        self.0 & 0x01 != 0
    }

    #[inline(always)]
    pub const fn syn(self) -> bool {
        self.0 & 0x02 != 0
    }

    #[inline(always)]
    pub const fn rst(self) -> bool {
        self.0 & 0x04 != 0
    }

    #[inline(always)]
    pub const fn ack(self) -> bool {
        self.0 & 0x10 != 0
    }

    /// Whether the segment asks for a new connection.
    #[inline(always)]
    pub const fn opens(self) -> bool {
        self.0 & 0x17 == 0x02
    }
}

/// `tag:24 | backend:16 | seen:16 | state:8`. One word, so that it changes by one compare-and-swap.
///
/// `tag` is of the flow's hash, from bits that do not choose its bucket; `seen` counts ticks (see
/// `Settings::tick_shift`) modulo 2^16; 0 is a free slot.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowSlot(pub u64);

impl FlowSlot {
    #[inline(always)]
    pub const fn new(tag: u32, backend: u32, seen: u32, state: FlowState) -> FlowSlot {
        FlowSlot(
            (tag as u64) << 40
                | ((backend & 0xffff) as u64) << 24
                | ((seen & 0xffff) as u64) << 8
                | state as u64,
        )
    }

    /// The tag of a flow with this hash. Buckets are chosen by the low bits.
    #[inline(always)]
    pub const fn tag_of(hash: u64) -> u32 {
        (hash >> 40) as u32
    }

    #[inline(always)]
    pub const fn tag(self) -> u32 {
        (self.0 >> 40) as u32
    }

    #[inline(always)]
    pub const fn backend(self) -> u32 {
        (self.0 >> 24) as u32 & 0xffff
    }

    #[inline(always)]
    pub const fn seen(self) -> u32 {
        (self.0 >> 8) as u32 & 0xffff
    }

    #[inline(always)]
    pub const fn state(self) -> FlowState {
        FlowState::from_bits(self.0 as u8)
    }

    /// The same flow seen `now` in `state`.
    #[inline(always)]
    pub const fn touched(self, now: u32, state: FlowState) -> FlowSlot {
        FlowSlot(self.0 & !0xff_ffff | ((now & 0xffff) as u64) << 8 | state as u64)
    }

    /// Whether there is an entry behind it to be read.
    #[inline(always)]
    pub const fn is_flow(self) -> bool {
        !matches!(self.state(), FlowState::Free | FlowState::Held)
    }

    /// Ticks since the client's last packet.
    #[inline(always)]
    pub const fn age(self, now: u32) -> u32 {
        ticks_since(self.seen(), now)
    }
}

/// The longest time that ticks can tell, and so the longest timeout: four to nine hours.
pub const MAX_TICKS: u32 = (1 << 15) - 1;

/// Ticks from `then` to `now`, both modulo 2^16.
///
/// Another core may have read the clock a moment later than this one: what is in the future is now.
#[inline(always)]
pub const fn ticks_since(then: u32, now: u32) -> u32 {
    match now.wrapping_sub(then) & 0xffff {
        age if age > MAX_TICKS => 0,
        age => age,
    }
}

/// The slots of eight flows whose hash starts alike.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct FlowBucket {
    pub slots: [FlowSlot; FLOW_WAYS],
}

/// `hash:32 | entry + 1:32`; 0 is free. The hash is of the backend's answer: backend to gateway port.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReturnSlot(pub u64);

impl ReturnSlot {
    #[inline(always)]
    pub const fn new(hash: u32, entry: u32) -> ReturnSlot {
        ReturnSlot((hash as u64) << 32 | (entry + 1) as u64)
    }

    #[inline(always)]
    pub const fn hash(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The index in `FLOWS`; meaningless in a free slot.
    #[inline(always)]
    pub const fn entry(self) -> u32 {
        (self.0 as u32).wrapping_sub(1)
    }
}

/// The return slots of eight flows whose answers' hash starts alike.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ReturnBucket {
    pub slots: [ReturnSlot; RETURN_WAYS],
}

/// One flow: all that both directions need beyond the backend's entry. One cache line.
///
/// The map aligns it, not the type: BPF's stack has no such alignment, and LLVM takes it for granted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowEntry {
    pub client: Addr,
    /// The client's port and the VIP's, as in the client's packets.
    pub ports: Ports,
    /// Index of the VIP in `VIPS`.
    pub vip: u32,
    /// The interface the client's packets come in by; answers leave there.
    pub client_ifindex: u32,
    /// High half of the hash of the backend's answers: which return slot is ours.
    pub return_hash: u32,
    /// Ticks when the backend last answered, as in [`FlowSlot`].
    pub reply_seen: u16,
    pub backend: u16,
    /// Of the backend entry when the flow was made; another means the backend is gone.
    pub generation: u16,
    /// The gateway's port towards the backend, host byte order.
    pub nat_port: u16,
    /// Who the client's packets come from on the wire: the client, or the router on its side.
    pub client_mac: [u8; 6],
    /// Our own address on that wire.
    pub local_mac: [u8; 6],
    /// The tag of the client's frames, as in [`crate::BackendEntry::vlan`].
    pub client_vlan: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// The [`crate::Mode`] it was made in, which it keeps.
    pub mode: u8,
    /// 1 once the backend has answered: a datagram alone may be forged.
    pub answered: u8,
    /// 1: not a flow, but where the fragments of one of its answers go.
    pub reply: u8,
    pub reserved: [u8; 6],
}

const _: () = assert!(size_of::<FlowBucket>() == 64);
const _: () = assert!(size_of::<ReturnBucket>() == 64);
const _: () = assert!(size_of::<FlowEntry>() == 64);

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::IpAddr;
    use proptest::prelude::*;

    fn key(source: &str, destination: &str, ports: Ports) -> FlowKey {
        let addr = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap());
        FlowKey {
            source: addr(source),
            destination: addr(destination),
            ports,
            proto: 6,
        }
    }

    #[test]
    fn the_hash_tells_every_field_apart() {
        let base = key("198.51.100.7", "192.0.2.10", Ports::new(40000, 80));
        let others = [
            key("198.51.100.8", "192.0.2.10", Ports::new(40000, 80)),
            key("198.51.100.7", "192.0.2.11", Ports::new(40000, 80)),
            key("198.51.100.7", "192.0.2.10", Ports::new(40001, 80)),
            key("198.51.100.7", "192.0.2.10", Ports::new(40000, 81)),
            FlowKey { proto: 17, ..base },
            key("2001:db8::7", "2001:db8::10", Ports::new(40000, 80)),
        ];
        for other in others {
            assert_ne!(base.hash(&RING_KEYS), other.hash(&RING_KEYS), "{other:?}");
        }
        let v6 = key("2001:db8::7", "2001:db8::10", Ports::new(40000, 80));
        for (source, destination) in [
            ("2001:db9::7", "2001:db8::10"),
            ("2001:db8:0:1::7", "2001:db8::10"),
            ("2001:db8::7", "2001:db8::1:0:10"),
        ] {
            let other = key(source, destination, Ports::new(40000, 80));
            assert_ne!(v6.hash(&RING_KEYS), other.hash(&RING_KEYS));
        }
    }

    #[test]
    fn consecutive_ports_spread_over_buckets() {
        let buckets = 1024;
        let mut filled = vec![0u32; buckets];
        for port in 0..8192u16 {
            let key = key("198.51.100.7", "192.0.2.10", Ports::new(1024 + port, 80));
            filled[(key.hash(&RING_KEYS) >> 54) as usize] += 1;
        }
        // 8 on average; a Poisson tail beyond 28 has a chance below 1e-7.
        assert!(
            filled.iter().all(|&count| count <= 28),
            "{:?}",
            filled.iter().max()
        );
    }

    proptest! {
        #[test]
        fn clients_that_count_up_spread_whatever_the_keys_are(
            keys: [u64; HASH_WORDS],
            address_step in 0u32..4,
            port_step in 1u16..4,
        ) {
            let mut filled = vec![0u32; 1024];
            for number in 0..8192u32 {
                let source = Addr::from(core::net::Ipv4Addr::from(0xc612_0000 + number * address_step));
                let ports = Ports::new(1024 + number as u16 * port_step, 80);
                let key = FlowKey { source, ports, ..key("0.0.0.0", "192.0.2.10", ports) };
                filled[key.hash(&keys) as usize % 1024] += 1;
            }
            // 8 on average; a Poisson tail beyond 40 has a chance below 1e-14.
            prop_assert!(filled.iter().all(|&count| count <= 40), "{:?}", filled.iter().max());
        }

        #[test]
        fn a_slot_reads_back_what_went_in(
            tag in 0u32..1 << 24,
            backend in 0u32..1 << 16,
            seen in 0u32..1 << 16,
            state in 0u8..10,
            later in 0u32..=MAX_TICKS,
        ) {
            let slot = FlowSlot::new(tag, backend, seen, FlowState::from_bits(state));
            prop_assert_eq!((slot.tag(), slot.backend(), slot.seen()), (tag, backend, seen));
            prop_assert_eq!(slot.state() as u8, state);
            let touched = slot.touched(later, FlowState::Udp);
            prop_assert_eq!(touched, FlowSlot::new(tag, backend, later, FlowState::Udp));
            prop_assert_eq!(slot.age(seen.wrapping_add(later)), later);
        }

        #[test]
        fn a_return_slot_is_never_free(hash: u32, entry in 0u32..1 << 24) {
            let slot = ReturnSlot::new(hash, entry);
            prop_assert_ne!(slot.0, 0);
            prop_assert_eq!((slot.hash(), slot.entry()), (hash, entry));
        }
    }

    #[test]
    fn a_time_in_the_future_is_now() {
        assert_eq!(ticks_since(1001, 1000), 0);
        assert_eq!(ticks_since(0, 0xffff), 0);
        assert_eq!(ticks_since(0xffff, 1), 2);
    }

    #[test]
    fn tcp_states_follow_both_sides() {
        use FlowState::*;
        let (syn, ack, fin, rst) = (
            TcpFlags(0x02),
            TcpFlags(0x10),
            TcpFlags(0x11),
            TcpFlags(0x04),
        );
        let client = [
            (Syn, syn, Syn),
            (Syn, ack, Established),
            (Syn, fin, FinClient),
            (Established, ack, Established),
            (Established, fin, FinClient),
            (FinBackend, ack, FinBackend),
            (FinBackend, fin, Closing),
            (FinClient, fin, FinClient),
            (Established, rst, Closing),
            (Closing, ack, Closing),
        ];
        for (state, flags, next) in client {
            assert_eq!(
                state.after_client(flags),
                next,
                "{state:?} {flags:?} from the client"
            );
        }
        let backend = [
            (Syn, TcpFlags(0x12), Syn),
            (Established, ack, Established),
            (Established, fin, FinBackend),
            (FinClient, fin, Closing),
            (FinClient, ack, FinClient),
            (Syn, rst, Closing),
        ];
        for (state, flags, next) in backend {
            assert_eq!(
                state.after_backend(flags),
                next,
                "{state:?} {flags:?} from the backend"
            );
        }
        assert!(syn.opens() && !TcpFlags(0x12).opens() && !TcpFlags(0x06).opens());
    }
}
