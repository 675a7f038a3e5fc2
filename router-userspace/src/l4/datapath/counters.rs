//! What the programs count, read from any thread; and what the sweep counts, read by the agent.

use std::sync::Arc;

use anyhow::Context;
use aya::Ebpf;
use aya::maps::{Array, MapData, PerCpuArray};
use router_common::{BackendCounters, BackendLoad, Verdict};

use super::{Datapath, reopen};

/// The kernel's counters, readable from any thread.
#[derive(Clone)]
pub struct Counters(Arc<CounterMaps>);

struct CounterMaps {
    verdicts: PerCpuArray<MapData, u64>,
    backends: PerCpuArray<MapData, BackendCounters>,
    load: Array<MapData, BackendLoad>,
    local_flows: Array<MapData, u64>,
    events_lost: PerCpuArray<MapData, u64>,
}

impl Counters {
    pub(super) fn open(ebpf: &Ebpf) -> anyhow::Result<Counters> {
        Ok(Counters(Arc::new(CounterMaps {
            verdicts: PerCpuArray::try_from(reopen(ebpf, "VERDICTS")?)?,
            backends: PerCpuArray::try_from(reopen(ebpf, "BACKEND_COUNTERS")?)?,
            load: Array::try_from(reopen(ebpf, "BACKEND_LOAD")?)?,
            local_flows: Array::try_from(reopen(ebpf, "LOCAL_FLOWS")?)?,
            events_lost: PerCpuArray::try_from(reopen(ebpf, "EVENTS_LOST")?)?,
        })))
    }

    /// Packets by verdict, of all CPUs.
    pub fn verdicts(&self) -> anyhow::Result<Vec<(Verdict, u64)>> {
        let maps = &self.0;
        let sum = |verdict: &Verdict| {
            let values = maps.verdicts.get(&(*verdict as u32), 0);
            Ok((*verdict, values.context("read VERDICTS")?.iter().sum()))
        };
        Verdict::ALL.iter().map(sum).collect()
    }

    /// What one backend's flows moved, on all CPUs.
    pub fn backend(&self, id: u32) -> anyhow::Result<BackendCounters> {
        let mut total = BackendCounters::default();
        let values = self.0.backends.get(&id, 0);
        for value in values.context("read BACKEND_COUNTERS")?.iter() {
            total += *value;
        }
        Ok(total)
    }

    /// Sampled packets that the programs found no room for in their ring buffer.
    pub fn events_lost(&self) -> anyhow::Result<u64> {
        let values = self.0.events_lost.get(&0, 0);
        Ok(values.context("read EVENTS_LOST")?.iter().sum())
    }

    /// Sockets of this host that are connected to a backend.
    pub fn local_flows(&self, id: u32) -> anyhow::Result<u64> {
        let flows = self.0.local_flows.get(&id, 0).context("read LOCAL_FLOWS")?;
        // Below 0 where sockets end that were there before counting began anew.
        Ok(flows.cast_signed().max(0).unsigned_abs())
    }

    /// What a backend is doing.
    pub fn load(&self, id: u32) -> anyhow::Result<BackendLoad> {
        self.0.load.get(&id, 0).context("read BACKEND_LOAD")
    }
}

impl Datapath {
    /// The flows of a backend that sweeps have counted since the last call.
    pub fn flows_of(&mut self, id: u32) -> anyhow::Result<u32> {
        take_count(&mut self.maps.backend_flows, id).context("take from BACKEND_FLOWS")
    }

    /// The flows of a VIP that sweeps have counted since the last call and that are not on the backend
    /// their ring's slot names.
    pub fn moved_flows(&mut self, vip: u32) -> anyhow::Result<u32> {
        take_count(&mut self.maps.moved_flows, vip).context("take from MOVED_FLOWS")
    }

    /// What a backend is doing.
    pub fn load_of(&self, id: u32) -> anyhow::Result<BackendLoad> {
        self.counters.load(id)
    }

    /// Sets right how many flows a backend has, as a sweep counted them.
    ///
    /// The kernel takes the value whole: what the programs add to it between the read and the write,
    /// a microsecond, is lost.
    pub fn set_load_flows(&mut self, id: u32, flows: u32) -> anyhow::Result<()> {
        let map = &mut self.maps.backend_load;
        let load = map.get(&id, 0).context("read BACKEND_LOAD")?;
        let counted = i64::from(flows);
        if load.flows != counted {
            let load = BackendLoad {
                flows: counted,
                ..load
            };
            map.set(id, load, 0).context("write BACKEND_LOAD")?;
        }
        Ok(())
    }
}

fn take_count(map: &mut Array<MapData, u32>, index: u32) -> anyhow::Result<u32> {
    let count = map.get(&index, 0)?;
    if count != 0 {
        map.set(index, 0, 0)?;
    }
    Ok(count)
}
