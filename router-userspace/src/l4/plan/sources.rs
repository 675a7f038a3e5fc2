//! Which sources a VIP takes, as prefixes of `SOURCES`.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use router_common::{Addr, SOURCE_ALLOW, SOURCE_DENY, SourceKey, vip_flags};

use super::{MapOp, PlannedVip};
use crate::l4::policy::VipPolicy;

/// Address and bits of it, to verdict.
pub(super) type Sources = BTreeMap<(Addr, u8), u32>;

pub(super) fn of(policy: &VipPolicy) -> Sources {
    let allowed = policy.allow.iter().map(|net| (prefix(net), SOURCE_ALLOW));
    let denied = policy.deny.iter().map(|net| (prefix(net), SOURCE_DENY));
    allowed.chain(denied).collect()
}

pub(super) fn flags(policy: &VipPolicy) -> u8 {
    if !policy.allow.is_empty() {
        vip_flags::ALLOW_LISTED
    } else if !policy.deny.is_empty() {
        vip_flags::DENY_LISTED
    } else {
        0
    }
}

pub(super) fn key(index: u32, source: Addr) -> SourceKey {
    SourceKey {
        vip: index.to_be_bytes(),
        source,
    }
}

impl PlannedVip {
    /// Before the VIP says that it has a list.
    pub(super) fn add_sources(&mut self, wanted: &Sources, ops: &mut Vec<MapOp>) {
        for (&(source, prefix_len), &verdict) in wanted {
            if self.sources.insert((source, prefix_len), verdict) != Some(verdict) {
                ops.push(MapOp::SetSource {
                    key: key(self.index, source),
                    prefix_len,
                    verdict,
                });
            }
        }
    }

    /// After the VIP no longer says that it has one.
    pub(super) fn remove_sources(&mut self, wanted: &Sources, ops: &mut Vec<MapOp>) {
        let index = self.index;
        self.sources.retain(|&(source, prefix_len), _| {
            let stays = wanted.contains_key(&(source, prefix_len));
            if !stays {
                let key = key(index, source);
                ops.push(MapOp::RemoveSource { key, prefix_len });
            }
            stays
        });
    }
}

/// Those with a verdict.
pub(super) fn prefixes(sources: &Sources, verdict: u32) -> Vec<IpNet> {
    let of = sources.iter().filter(|(_, given)| **given == verdict);
    let nets = of.filter_map(|((source, bits), _)| {
        let (address, bits) = match source.ip() {
            IpAddr::V4(v4) => (IpAddr::V4(v4), bits.checked_sub(96)?),
            v6 => (v6, *bits),
        };
        IpNet::new(address, bits).ok()
    });
    nets.collect()
}

fn prefix(net: &IpNet) -> (Addr, u8) {
    let bits = match net {
        // Behind the 96 bits that IPv4 addresses have in common here.
        IpNet::V4(v4) => 96 + v4.prefix_len(),
        IpNet::V6(v6) => v6.prefix_len(),
    };
    (Addr::from(net.network()), bits)
}
