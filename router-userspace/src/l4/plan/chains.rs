//! `VIP_HEADS` and the chains behind it: how a packet finds its VIP.
//!
//! VIPs whose heads fall together are one chain, those of fewer ports first, so that the first one that
//! covers a packet is the narrowest. A VIP is written before anything names it, and is unlinked before
//! it is cleared.

use std::collections::HashMap;

use router_common::{HASH_WORDS, VIP_CHAIN, VipEntry, vip_head};

use super::MapOp;

pub(super) struct Chains {
    hash_keys: [u64; HASH_WORDS],
    vip_mask: u32,
    /// By place, in the order of the chain.
    chains: HashMap<u32, Vec<Link>>,
}

/// A VIP as the kernel has it.
#[derive(Clone, Copy)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) entry: VipEntry,
}

impl Chains {
    pub(super) fn new(hash_keys: [u64; HASH_WORDS], vip_mask: u32) -> Chains {
        Chains {
            hash_keys,
            vip_mask,
            chains: HashMap::new(),
        }
    }

    /// Where the chain of a VIP begins.
    pub(super) fn place(&self, entry: &VipEntry) -> u32 {
        let port = match entry.is_range() {
            true => 0,
            false => entry.port_first,
        };
        vip_head(entry.addr, port, entry.proto, &self.hash_keys) & self.vip_mask
    }

    pub(super) fn has_room(&self, entry: &VipEntry) -> bool {
        let chain = self.chains.get(&self.place(entry));
        chain.is_none_or(|chain| chain.len() < VIP_CHAIN as usize)
    }

    /// Writes a VIP, and links it if it is new. Its `next` is for the chain to say.
    pub(super) fn set(&mut self, index: u32, entry: VipEntry, ops: &mut Vec<MapOp>) {
        let place = self.place(&entry);
        let chain = self.chains.entry(place).or_default();
        if let Some(at) = chain.iter().position(|link| link.index == index) {
            let next = chain[at].entry.next;
            chain[at].entry = VipEntry { next, ..entry };
            ops.push(chain[at].write());
            return;
        }
        let at = chain.partition_point(|link| order(&link.entry) < order(&entry));
        let next = chain.get(at).map_or(0, |link| link.index + 1);
        let link = Link {
            index,
            entry: VipEntry { next, ..entry },
        };
        ops.push(link.write());
        chain.insert(at, link);
        lead_to(place, chain, at, index + 1, ops);
    }

    /// Unlinks a VIP and clears it.
    pub(super) fn remove(&mut self, index: u32, entry: &VipEntry, ops: &mut Vec<MapOp>) {
        let place = self.place(entry);
        let chain = self.chains.get_mut(&place).expect("set before");
        let at = chain.iter().position(|link| link.index == index);
        let at = at.expect("set before");
        let gone = chain.remove(at);
        lead_to(place, chain, at, gone.entry.next, ops);
        if chain.is_empty() {
            self.chains.remove(&place);
        }
        ops.push(MapOp::SetVip {
            index,
            entry: VipEntry::default(),
        });
    }

    /// Takes over a chain as it stands in the kernel.
    pub(super) fn adopt(&mut self, place: u32, chain: Vec<Link>) {
        self.chains.insert(place, chain);
    }
}

impl Link {
    fn write(&self) -> MapOp {
        MapOp::SetVip {
            index: self.index,
            entry: self.entry,
        }
    }
}

/// Has what is before `at` in the chain lead to the VIP `next`, an index plus 1, or to the end.
fn lead_to(place: u32, chain: &mut [Link], at: usize, next: u32, ops: &mut Vec<MapOp>) {
    match at.checked_sub(1) {
        Some(before) => {
            chain[before].entry.next = next;
            ops.push(chain[before].write());
        }
        None => ops.push(MapOp::SetVipHead { place, first: next }),
    }
}

/// The fewest ports first; the rest so that any two gateways agree.
fn order(entry: &VipEntry) -> impl Ord {
    let ports = entry.port_last - entry.port_first;
    (ports, entry.port_first, entry.proto, entry.addr)
}
