//! A frame as the two hooks have it: an XDP buffer, or a socket buffer at tcx.
//!
//! The decision core is written against [`Frame`] and compiled once for each, and once more for
//! `explain`, which changes no map. What differs is how a frame grows, how a checksum that may be
//! left to the hardware is updated, and how a frame is sent on.

use core::mem::offset_of;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::bindings::{
    __sk_buff, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6,
    BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR,
    TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, xdp_md,
};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::helpers::generated::{
    bpf_skb_change_tail, bpf_skb_vlan_pop, bpf_skb_vlan_push, bpf_xdp_adjust_head,
    bpf_xdp_adjust_tail, bpf_xdp_get_buff_len,
};
use aya_ebpf::programs::{TcContext, XdpContext};
use aya_log_ebpf::warn;
use router_common::checksum::Delta;

use crate::packet::{ETH_LEN, VLAN_LEN};
use crate::stage::Stages;
use crate::verifier::{bounded, packet_pointer};

/// Octets in front of which no header is looked for: Ethernet, a tag, IPv6 with extension headers,
/// ICMP and what it quotes.
const HEADERS: u32 = 256;

/// What goes between the Ethernet header and the packet.
#[derive(Clone, Copy)]
pub struct Room {
    pub octets: u32,
    /// The outer header is IPv6,
    pub v6: bool,
    /// and UDP follows it.
    pub udp: bool,
    /// The packet goes inside, and does not become something else.
    pub encapsulates: bool,
}

impl Room {
    pub const NONE: Room = Room {
        octets: 0,
        v6: false,
        udp: false,
        encapsulates: false,
    };
}

pub trait Frame: Stages {
    /// Maps stay as they are; [`router_common::PacketEvent`] says what would be done.
    const DRY: bool;
    /// Whether a VLAN tag is in the frame, and not kept beside it.
    const TAG_INSIDE: bool;

    fn data(&self) -> usize;
    fn data_end(&self) -> usize;
    /// Where it came in.
    fn ifindex(&self) -> u32;
    /// Octets of the frame, the ones beyond `data_end` too.
    fn len(&self) -> u32;
    /// Whether there are so many.
    fn holds(&self, octets: u32) -> bool;
    /// The tag that is kept beside the frame; 0: none.
    fn vlan(&self) -> u16;
    /// Makes the headers lie between `data` and `data_end`.
    fn pull(&self);
    /// Whether a packet of `ip_len` octets and `room` more fit into `mtu`.
    fn fits(&self, ip_len: u32, room: u32, mtu: u32) -> bool;
    /// Makes room for an Ethernet header with the tag `vlan` (0: none), then `room`, in front of the
    /// packet that begins at `l3`. Where the room begins, with its headers still to be written.
    fn resize(&self, l3: u32, room: Room, vlan: u16) -> Option<u32>;
    /// Cuts the frame to `len` octets.
    fn cut(&self, len: u32) -> bool;
    /// Updates the TCP, UDP or ICMPv6 checksum at `offset` by what changed of the addresses, which a
    /// checksum still to be made has in it, and of the rest, which it has not.
    fn update_checksum(&self, offset: u32, addresses: Delta, rest: Delta, udp: bool) -> bool;
    /// Back out where it came in, or through another interface.
    fn send(&self, ifindex: u32) -> i32;
    fn pass(&self) -> i32;
    fn drop(&self) -> i32;
    /// Tells the agent's log that the tables contradict each other.
    fn complain(&self);
}

/// A pointer to a `T` at `offset` of the frame, which must not lie beyond what verifier and masks allow.
#[inline(always)]
pub fn at<T>(frame: &impl Frame, offset: u32) -> Option<*mut T> {
    let start = frame.data() + bounded::<0x3ff>(offset);
    if start + size_of::<T>() > frame.data_end() {
        return None;
    }
    Some(start as *mut T)
}

macro_rules! xdp_frame {
    ($name:ident, $dry:literal) => {
        pub struct $name<'a>(pub &'a XdpContext);

        impl $name<'_> {
            #[inline(always)]
            pub fn raw(&self) -> *mut xdp_md {
                self.0.ctx
            }
        }

        impl Frame for $name<'_> {
            const DRY: bool = $dry;
            const TAG_INSIDE: bool = true;

            #[inline(always)]
            fn data(&self) -> usize {
                packet_pointer::<{ offset_of!(xdp_md, data) }, _>(self.0.ctx)
            }

            #[inline(always)]
            fn data_end(&self) -> usize {
                packet_pointer::<{ offset_of!(xdp_md, data_end) }, _>(self.0.ctx)
            }

            #[inline(always)]
            fn ifindex(&self) -> u32 {
                self.0.ingress_ifindex() as u32
            }

            #[inline(always)]
            fn len(&self) -> u32 {
                // SAFETY: the helper takes any XDP buffer.
                unsafe { bpf_xdp_get_buff_len(self.0.ctx) as u32 }
            }

            #[inline(always)]
            fn holds(&self, octets: u32) -> bool {
                // Mostly there is nothing beyond `data_end`.
                (self.data_end() - self.data()) as u32 >= octets || self.len() >= octets
            }

            #[inline(always)]
            fn vlan(&self) -> u16 {
                0
            }

            #[inline(always)]
            fn pull(&self) {}

            #[inline(always)]
            fn fits(&self, ip_len: u32, room: u32, mtu: u32) -> bool {
                ip_len + room <= mtu
            }

            #[inline(always)]
            fn resize(&self, l3: u32, room: Room, vlan: u16) -> Option<u32> {
                let l2 = if vlan == 0 {
                    ETH_LEN
                } else {
                    ETH_LEN + VLAN_LEN
                };
                let delta = l3 as i32 - (l2 + room.octets) as i32;
                // SAFETY: the helper checks the headroom, and pointers are taken anew after it.
                if delta != 0 && unsafe { bpf_xdp_adjust_head(self.0.ctx, delta) } != 0 {
                    return None;
                }
                Some(l2)
            }

            #[inline(always)]
            fn cut(&self, len: u32) -> bool {
                let delta = len as i32 - self.len() as i32;
                // SAFETY: as above.
                delta <= 0 && unsafe { bpf_xdp_adjust_tail(self.0.ctx, delta) } == 0
            }

            #[inline(always)]
            fn update_checksum(
                &self,
                offset: u32,
                addresses: Delta,
                rest: Delta,
                udp: bool,
            ) -> bool {
                let Some(checksum) = at::<u16>(self, offset) else {
                    return false;
                };
                let delta = addresses.and(rest);
                // SAFETY: `at` checked that it lies in the frame.
                unsafe {
                    *checksum = if udp {
                        delta.apply_udp(*checksum)
                    } else {
                        delta.apply(*checksum)
                    };
                }
                true
            }

            #[inline(always)]
            fn send(&self, ifindex: u32) -> i32 {
                if self.ifindex() == ifindex {
                    return XDP_TX as i32;
                }
                // SAFETY: the helper takes any index and only notes it for after the program.
                unsafe { bpf_redirect(ifindex, 0) as i32 }
            }

            #[inline(always)]
            fn pass(&self) -> i32 {
                XDP_PASS as i32
            }

            #[inline(always)]
            fn drop(&self) -> i32 {
                XDP_DROP as i32
            }

            #[inline(always)]
            fn complain(&self) {
                warn!(self.0, "the tables contradict each other; packet dropped");
            }
        }
    };
}

xdp_frame!(Xdp, false);
xdp_frame!(Dry, true);

pub struct Tcx<'a>(pub &'a TcContext);

impl Tcx<'_> {
    #[inline(always)]
    pub fn raw(&self) -> *mut __sk_buff {
        self.0.skb.skb
    }
}

impl Frame for Tcx<'_> {
    const DRY: bool = false;
    const TAG_INSIDE: bool = false;

    #[inline(always)]
    fn data(&self) -> usize {
        packet_pointer::<{ offset_of!(__sk_buff, data) }, _>(self.0.skb.skb)
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        packet_pointer::<{ offset_of!(__sk_buff, data_end) }, _>(self.0.skb.skb)
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the context is valid for the whole run.
        unsafe { (*self.0.skb.skb).ifindex }
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.len()
    }

    #[inline(always)]
    fn holds(&self, octets: u32) -> bool {
        self.len() >= octets
    }

    #[inline(always)]
    fn vlan(&self) -> u16 {
        // SAFETY: as above.
        unsafe {
            if (*self.0.skb.skb).vlan_present == 0 {
                return 0;
            }
            (*self.0.skb.skb).vlan_tci as u16
        }
    }

    #[inline(always)]
    fn pull(&self) {
        let wanted = if self.len() < HEADERS {
            self.len()
        } else {
            HEADERS
        };
        if self.data() + wanted as usize > self.data_end() {
            // What cannot be pulled is found missing by whoever reads it.
            let _ = self.0.pull_data(wanted);
        }
    }

    #[inline(always)]
    fn fits(&self, ip_len: u32, room: u32, mtu: u32) -> bool {
        // A packet that is still to be cut into segments is as long as each of them will be.
        // SAFETY: as above.
        let segment = unsafe { (*self.0.skb.skb).gso_size };
        segment != 0 || ip_len + room <= mtu
    }

    #[inline(always)]
    fn resize(&self, _l3: u32, room: Room, vlan: u16) -> Option<u32> {
        if room.octets != 0 {
            let family = if room.v6 {
                BPF_F_ADJ_ROOM_ENCAP_L3_IPV6
            } else {
                BPF_F_ADJ_ROOM_ENCAP_L3_IPV4
            };
            let udp = if room.udp {
                BPF_F_ADJ_ROOM_ENCAP_L4_UDP
            } else {
                0
            };
            let encapsulation = if room.encapsulates { family | udp } else { 0 };
            let flags = u64::from(encapsulation | BPF_F_ADJ_ROOM_FIXED_GSO);
            self.0
                .adjust_room(room.octets as i32, BPF_ADJ_ROOM_MAC, flags)
                .ok()?;
        }
        if self.vlan() != vlan {
            // SAFETY: both helpers take any socket buffer; pointers are taken anew after them.
            unsafe {
                if self.vlan() != 0 && bpf_skb_vlan_pop(self.0.skb.skb) != 0 {
                    return None;
                }
                if vlan != 0 && bpf_skb_vlan_push(self.0.skb.skb, 0x8100_u16.to_be(), vlan) != 0 {
                    return None;
                }
            }
        }
        Some(ETH_LEN)
    }

    #[inline(always)]
    fn cut(&self, len: u32) -> bool {
        // SAFETY: the helper takes any length; pointers are taken anew after it.
        unsafe { bpf_skb_change_tail(self.0.skb.skb, len, 0) == 0 }
    }

    #[inline(always)]
    fn update_checksum(&self, offset: u32, addresses: Delta, rest: Delta, udp: bool) -> bool {
        let offset = bounded::<0x3ff>(offset);
        let mangled = u64::from(if udp { BPF_F_MARK_MANGLED_0 } else { 0 });
        let pseudo = u64::from(BPF_F_PSEUDO_HDR);
        self.0
            .l4_csum_replace(offset, 0, addresses.folded().into(), pseudo | mangled)
            .is_ok()
            && self
                .0
                .l4_csum_replace(offset, 0, rest.folded().into(), mangled)
                .is_ok()
    }

    #[inline(always)]
    fn send(&self, ifindex: u32) -> i32 {
        // SAFETY: the helper takes any index and only notes it for after the program.
        unsafe { bpf_redirect(ifindex, 0) as i32 }
    }

    #[inline(always)]
    fn pass(&self) -> i32 {
        // Whatever program comes next may have its say.
        TC_ACT_UNSPEC
    }

    #[inline(always)]
    fn drop(&self) -> i32 {
        TC_ACT_SHOT
    }

    #[inline(always)]
    fn complain(&self) {
        warn!(self.0, "the tables contradict each other; packet dropped");
    }
}

const _: () = assert!(TC_ACT_REDIRECT == 7);
