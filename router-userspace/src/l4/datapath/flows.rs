//! The flow table, read while packets flow.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use aya::Ebpf;
use aya::maps::{Array, MapData};
use router_common::{FLOW_WAYS, FlowBucket, FlowEntry, FlowSlot};

use super::reopen;
use super::settings::Clock;

/// Reads the flow table from any thread.
#[derive(Clone)]
pub struct Flows {
    maps: Arc<FlowMaps>,
    clock: Clock,
    buckets: u32,
}

struct FlowMaps {
    slots: Array<MapData, FlowBucket>,
    entries: Array<MapData, FlowEntry>,
}

/// One flow.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    pub slot: FlowSlot,
    pub entry: FlowEntry,
    /// Since the client's last packet, to about a second.
    pub idle: Duration,
}

impl Flows {
    pub(super) fn open(ebpf: &Ebpf, clock: Clock, buckets: u32) -> anyhow::Result<Flows> {
        let maps = FlowMaps {
            slots: Array::try_from(reopen(ebpf, "FLOW_SLOTS")?)?,
            entries: Array::try_from(reopen(ebpf, "FLOWS")?)?,
        };
        Ok(Flows {
            maps: Arc::new(maps),
            clock,
            buckets,
        })
    }

    /// Places for flows.
    pub fn capacity(&self) -> u64 {
        u64::from(self.buckets) * FLOW_WAYS as u64
    }

    /// How many buckets the table has, each of eight places.
    pub fn buckets(&self) -> u32 {
        self.buckets
    }

    /// The flows of one bucket: one system call, and two more and one for each flow where there are
    /// any. A flow that begins or ends meanwhile may be among them or not; one whose place was taken
    /// over at this very moment is left out.
    pub fn of_bucket(&self, bucket: u32) -> anyhow::Result<Vec<Flow>> {
        self.bucket(bucket, self.clock.ticks_at(Instant::now()))
    }

    /// Every flow, as [`Self::of_bucket`] has them.
    pub fn iter(&self) -> impl Iterator<Item = anyhow::Result<Flow>> + '_ {
        let now = self.clock.ticks_at(Instant::now());
        (0..self.buckets).flat_map(move |bucket| {
            let flows = self.bucket(bucket, now);
            let (flows, error) = match flows {
                Ok(flows) => (flows, None),
                Err(error) => (Vec::new(), Some(Err(error))),
            };
            flows.into_iter().map(Ok).chain(error)
        })
    }

    fn bucket(&self, bucket: u32, now: u32) -> anyhow::Result<Vec<Flow>> {
        let read = || self.maps.slots.get(&bucket, 0).context("read FLOW_SLOTS");
        let slots = read()?.slots;
        if !slots.iter().any(|slot| slot.is_flow()) {
            return Ok(Vec::new());
        }
        let mut flows = Vec::new();
        for (way, slot) in slots.iter().enumerate().filter(|(_, slot)| slot.is_flow()) {
            let index = bucket * FLOW_WAYS as u32 + way as u32;
            let entry = self.maps.entries.get(&index, 0).context("read FLOWS")?;
            flows.push((way, *slot, entry));
        }
        let after = read()?.slots;
        let same = |way: usize, slot: FlowSlot| {
            let later = after[way];
            later.is_flow() && (later.tag(), later.backend()) == (slot.tag(), slot.backend())
        };
        Ok(flows
            .into_iter()
            .filter(|(way, slot, _)| same(*way, *slot))
            .map(|(_, slot, entry)| Flow {
                slot,
                entry,
                idle: self.clock.duration_of(slot.age(now)),
            })
            .collect())
    }
}
