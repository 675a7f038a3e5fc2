//! The VIP of a packet, and whether its source may have it.

use router_common::{
    Addr, FlowKey, RateCell, SOURCE_DENY, SOURCE_RATE_CELLS, Settings, SourceKey, VIP_CHAIN,
    VipEntry, vip_flags, vip_head,
};

use crate::maps;
use crate::verifier::{forget, load, swap};

#[derive(Clone, Copy)]
pub struct Vip {
    pub index: u32,
    pub entry: &'static VipEntry,
}

impl Vip {
    #[inline(always)]
    pub fn at(index: u32) -> Option<Vip> {
        let entry = maps::VIPS.get(index)?;
        Some(Vip { index, entry })
    }
}

/// The VIP that covers `key`'s destination: one of that port before one of several.
#[inline(always)]
pub fn find(key: &FlowKey, settings: &Settings) -> Option<Vip> {
    let (addr, port, proto) = (key.destination, key.ports.destination(), key.proto);
    let head = vip_head(addr, port, proto, &settings.hash_keys) & settings.vip_mask;
    if let Some(vip) = chain(head, addr, port, proto) {
        return Some(vip);
    }
    Vip::at(range(key, settings).checked_sub(1)?)
}

/// Index of the VIP of several ports that covers `key`'s destination, plus 1; 0: none does.
#[inline(never)]
fn range(key: &FlowKey, settings: &Settings) -> u32 {
    let (addr, port, proto) = (key.destination, key.ports.destination(), key.proto);
    let head = vip_head(addr, 0, proto, &settings.hash_keys) & settings.vip_mask;
    chain(head, addr, port, proto).map_or(0, |vip| vip.index + 1)
}

#[inline(always)]
fn chain(head: u32, addr: Addr, port: u16, proto: u8) -> Option<Vip> {
    let mut next = *maps::VIP_HEADS.get(head)?;
    for _ in 0..VIP_CHAIN {
        if next == 0 {
            return None;
        }
        let index = next - 1;
        let entry = maps::VIPS.get(index)?;
        if entry.covers(addr, port, proto) {
            return Some(Vip {
                index: forget(index, head as u64),
                entry,
            });
        }
        next = entry.next;
    }
    None
}

/// Whether the VIP takes packets of this source.
#[inline(always)]
pub fn admits(vip: Vip, source: &Addr) -> bool {
    vip.entry.flags & (vip_flags::ALLOW_LISTED | vip_flags::DENY_LISTED) == 0
        || listed(vip.index, vip.entry.flags, source)
}

#[inline(never)]
fn listed(index: u32, flags: u8, source: &Addr) -> bool {
    // The whole key: 32 bits of VIP and 128 of address.
    let key = aya_ebpf::maps::lpm_trie::Key::new(
        160,
        SourceKey {
            vip: index.to_be_bytes(),
            source: *source,
        },
    );
    match maps::SOURCES.get(key) {
        Some(verdict) => *verdict != SOURCE_DENY,
        None => flags & vip_flags::ALLOW_LISTED == 0,
    }
}

/// How the VIP stands with new flows in this second.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    Within,
    /// This source asks for too many.
    SourceExceeded,
    /// All sources together do.
    VipExceeded,
}

/// Counts a new flow, unless `dry`.
#[inline(always)]
pub fn count_new(vip: Vip, source: &Addr, settings: &Settings, now: u32, dry: bool) -> Rate {
    if vip.entry.source_rate == 0 && vip.entry.vip_rate == 0 {
        return Rate::Within;
    }
    count_limited(&vip, source, settings, now, dry)
}

#[inline(never)]
fn count_limited(vip: &Vip, source: &Addr, settings: &Settings, now: u32, dry: bool) -> Rate {
    if vip.entry.source_rate != 0 {
        let key = vip_head(*source, vip.index as u16, 0, &settings.hash_keys);
        let count = maps::SOURCE_RATES
            .get(key & (SOURCE_RATE_CELLS - 1))
            .map_or(0, |cell| count(cell, now, dry));
        if count > vip.entry.source_rate {
            return Rate::SourceExceeded;
        }
    }
    if vip.entry.vip_rate != 0 {
        let count = maps::VIP_RATES
            .get(vip.index)
            .map_or(0, |cell| count(cell, now, dry));
        if count > vip.entry.vip_rate {
            return Rate::VipExceeded;
        }
    }
    Rate::Within
}

/// What came in this tick with one more. Two cores at once may count one for two.
#[inline(always)]
fn count(cell: &RateCell, now: u32, dry: bool) -> u32 {
    let word = load(&cell.word);
    let count = if (word >> 32) as u32 == now {
        word as u32
    } else {
        0
    };
    let count = count.saturating_add(1);
    if !dry {
        swap(&cell.word, word, (now as u64) << 32 | count as u64);
    }
    count
}
