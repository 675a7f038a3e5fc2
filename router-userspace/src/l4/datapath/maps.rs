//! The maps: how large each is, whether a pinned one may be taken over, and writing to them.

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError, MapInfo, PerCpuArray, PerCpuValues};
use router_common::{
    Addr, BackendCounters, BackendEntry, BackendLoad, FLOW_WAYS, FlowBucket, FlowEntry, LAYOUT,
    LocalPeer, LocalSocket, PREFILTER_WORDS, PacketEvent, QuicKey, RING_SIZE, RateCell,
    ReturnBucket, Ring, RingSlot, SOURCE_RATE_CELLS, Settings, SourceKey, SweepRequest, Verdict,
    VipEntry,
};

use super::{array, take};
use crate::config::L4Limits;
use crate::l4::plan::{Installed, MapOp};

/// Source prefixes of all VIPs together. Memory is taken for those there are.
const MAX_SOURCES: u32 = 1 << 17;
/// Entries of `LOCAL_PEERS`: half as many pairs of a socket and a VIP it sends datagrams to. 7 MiB.
const MAX_LOCAL_PEERS: u32 = 65_536;
/// Places in `VIP_HEADS` for each VIP: chains of several are rare then.
const HEADS_PER_VIP: u32 = 4;

/// A pinned map as it must be.
pub(super) struct Shape {
    pub(super) name: &'static str,
    /// `None`: as the object says.
    pub(super) entries: Option<u32>,
    value_len: usize,
}

/// Every map that is pinned. The others (`SWEEP`, `CLOCK`, `EXPLAINED`, `EVENTS`, `EVENTS_LOST` and the log)
/// are the agent's own.
pub(super) fn shapes(limits: &L4Limits) -> [Shape; 23] {
    let buckets = buckets(limits);
    let backends = limits.backends + 1;
    let vips = limits.vips;
    [
        shape::<Settings>("SETTINGS", None),
        shape::<u64>("PREFILTER", Some(PREFILTER_WORDS)),
        shape::<u32>("VIP_HEADS", Some(vip_heads(limits))),
        shape::<VipEntry>("VIPS", Some(vips)),
        shape::<u32>("VIP_ADDRESSES", Some(vips)),
        shape::<Ring>("RINGS", Some(vips)),
        shape::<u64>("CURSORS", Some(vips)),
        shape::<BackendEntry>("BACKENDS", Some(backends)),
        shape::<BackendCounters>("BACKEND_COUNTERS", Some(backends)),
        shape::<BackendLoad>("BACKEND_LOAD", Some(backends)),
        shape::<u32>("BACKEND_FLOWS", Some(backends)),
        shape::<u32>("MOVED_FLOWS", Some(vips)),
        shape::<FlowBucket>("FLOW_SLOTS", Some(buckets)),
        shape::<FlowEntry>("FLOWS", Some(buckets * FLOW_WAYS as u32)),
        shape::<ReturnBucket>("RETURNS", Some(buckets * 2)),
        shape::<u32>("SOURCES", Some(MAX_SOURCES)),
        shape::<RateCell>("SOURCE_RATES", Some(SOURCE_RATE_CELLS)),
        shape::<RateCell>("VIP_RATES", Some(vips)),
        shape::<u32>("QUIC_SERVERS", Some(limits.backends)),
        shape::<LocalSocket>("LOCAL_SOCKETS", None),
        shape::<LocalPeer>("LOCAL_PEERS", Some(MAX_LOCAL_PEERS)),
        shape::<u64>("LOCAL_FLOWS", Some(backends)),
        shape::<u64>("VERDICTS", Some(Verdict::COUNT)),
    ]
}

fn shape<V>(name: &'static str, entries: Option<u32>) -> Shape {
    Shape {
        name,
        entries,
        value_len: size_of::<V>(),
    }
}

/// Buckets of `FLOW_SLOTS`: a power of two.
pub(super) fn buckets(limits: &L4Limits) -> u32 {
    (limits.flows.next_power_of_two() / FLOW_WAYS as u32).max(1)
}

/// Length of `VIP_HEADS`: a power of two.
pub(super) fn vip_heads(limits: &L4Limits) -> u32 {
    (HEADS_PER_VIP * limits.vips).next_power_of_two()
}

/// Octets of the kernel's memory that each map takes, by its own account: one that grows with what is
/// in it is listed as it is at this moment.
pub(super) fn memory(ebpf: &Ebpf) -> Vec<(String, u64)> {
    let maps = ebpf.maps();
    let mut memory: Vec<(String, u64)> = maps
        .filter_map(|(name, map)| Some((name.to_owned(), memory_of(map)?)))
        .collect();
    memory.sort();
    memory
}

/// Kernel: kernel/bpf/syscall.c, `bpf_map_show_fdinfo`.
fn memory_of(map: &Map) -> Option<u64> {
    let data = match map {
        Map::Array(data)
        | Map::PerCpuArray(data)
        | Map::HashMap(data)
        | Map::LpmTrie(data)
        | Map::RingBuf(data)
        | Map::SockMap(data) => data,
        _ => return None,
    };
    let path = format!("/proc/self/fdinfo/{}", data.fd().as_fd().as_raw_fd());
    let info = std::fs::read_to_string(path).ok()?;
    let octets = info
        .lines()
        .find_map(|line| line.strip_prefix("memlock:"))?;
    octets.trim().parse().ok()
}

/// A pinned map that another version or another configuration made would be misread.
///
/// # Errors
/// Names the map, and what to do.
pub(super) fn check_pinned(path: &Path, shapes: &[Shape]) -> anyhow::Result<()> {
    let settings = path.join("SETTINGS");
    if settings.exists() {
        check_layout(&settings)?;
    }
    for shape in shapes {
        let pin = path.join(shape.name);
        if pin.exists() {
            check_shape(&pin, shape)?;
        }
    }
    Ok(())
}

fn check_layout(settings: &Path) -> anyhow::Result<()> {
    let found = match MapInfo::from_pin(settings) {
        Ok(info) if info.value_size() as usize != size_of::<Settings>() => "another".to_owned(),
        Ok(_) => {
            let map = MapData::from_pin(settings).context("open the pinned SETTINGS")?;
            let map: Array<MapData, Settings> = Array::try_from(Map::Array(map))?;
            match map.get(&0, 0).context("read SETTINGS")?.layout {
                // Of an agent that ended before it wrote them: the maps are as new.
                0 | LAYOUT => return Ok(()),
                layout => layout.to_string(),
            }
        }
        Err(error) => return Err(error).context("open the pinned SETTINGS"),
    };
    bail!(
        "the pinned maps in {} are of layout {found}, this viaduct's of {LAYOUT}: run `viaduct detach` \
         (which ends their flows) and start again",
        settings.parent().unwrap_or(settings).display(),
    );
}

fn check_shape(pin: &Path, shape: &Shape) -> anyhow::Result<()> {
    let info = MapInfo::from_pin(pin).with_context(|| format!("open {}", pin.display()))?;
    let entries = info.max_entries();
    let wanted = shape.entries.unwrap_or(entries);
    ensure!(
        info.value_size() as usize == shape.value_len && entries == wanted,
        "the pinned map {} has {entries} entries of {} octets, not {wanted} of {}: undo the change \
         of l4.limits, or run `viaduct detach` (which ends its flows) and start again",
        pin.display(),
        info.value_size(),
        shape.value_len,
    );
    Ok(())
}

/// The maps that the agent writes or reads by itself.
pub(super) struct Maps {
    cpus: usize,
    settings: Array<MapData, Settings>,
    prefilter: Array<MapData, u64>,
    vip_heads: Array<MapData, u32>,
    vips: Array<MapData, VipEntry>,
    vip_addresses: HashMap<MapData, Addr, u32>,
    rings: Array<MapData, Ring>,
    backends: Array<MapData, BackendEntry>,
    backend_counters: PerCpuArray<MapData, BackendCounters>,
    pub(super) backend_load: Array<MapData, BackendLoad>,
    pub(super) backend_flows: Array<MapData, u32>,
    pub(super) moved_flows: Array<MapData, u32>,
    local_flows: Array<MapData, u64>,
    sources: LpmTrie<MapData, SourceKey, u32>,
    vip_rates: Array<MapData, RateCell>,
    quic_servers: HashMap<MapData, QuicKey, u32>,
    sweep: Array<MapData, SweepRequest>,
    explained: Array<MapData, PacketEvent>,
}

impl Maps {
    pub(super) fn take(ebpf: &mut Ebpf) -> anyhow::Result<Maps> {
        Ok(Maps {
            cpus: aya::util::nr_cpus()
                .map_err(|(_, error)| error)
                .context("count CPUs")?,
            settings: array(ebpf, "SETTINGS")?,
            prefilter: array(ebpf, "PREFILTER")?,
            vip_heads: array(ebpf, "VIP_HEADS")?,
            vips: array(ebpf, "VIPS")?,
            vip_addresses: HashMap::try_from(take(ebpf, "VIP_ADDRESSES")?)?,
            rings: array(ebpf, "RINGS")?,
            backends: array(ebpf, "BACKENDS")?,
            backend_counters: PerCpuArray::try_from(take(ebpf, "BACKEND_COUNTERS")?)?,
            backend_load: array(ebpf, "BACKEND_LOAD")?,
            backend_flows: array(ebpf, "BACKEND_FLOWS")?,
            moved_flows: array(ebpf, "MOVED_FLOWS")?,
            local_flows: array(ebpf, "LOCAL_FLOWS")?,
            sources: LpmTrie::try_from(take(ebpf, "SOURCES")?)?,
            vip_rates: array(ebpf, "VIP_RATES")?,
            quic_servers: HashMap::try_from(take(ebpf, "QUIC_SERVERS")?)?,
            sweep: array(ebpf, "SWEEP")?,
            explained: array(ebpf, "EXPLAINED")?,
        })
    }

    pub(super) fn apply(&mut self, op: &MapOp) -> anyhow::Result<()> {
        match op {
            MapOp::SetBackend { id, entry } => self.backends.set(*id, entry, 0)?,
            MapOp::ClearBackend { id, generation } => self.clear_backend(*id, *generation)?,
            MapOp::SetRing { vip, slots } => self.rings.set(*vip, ring(slots)?, 0)?,
            MapOp::SetVip { index, entry } => {
                self.vips.set(*index, entry, 0)?;
                // Whoever has the index next begins with a count of its own.
                if *entry == VipEntry::default() {
                    self.vip_rates.set(*index, RateCell::default(), 0)?;
                }
            }
            MapOp::SetVipHead { place, first } => self.vip_heads.set(*place, first, 0)?,
            MapOp::SetVipAddress { addr, vips: 0 } => {
                absent_is_fine(self.vip_addresses.remove(addr))?;
            }
            MapOp::SetVipAddress { addr, vips } => self.vip_addresses.insert(addr, vips, 0)?,
            MapOp::SetPrefilter { word, bits } => self.prefilter.set(*word, bits, 0)?,
            MapOp::SetSource {
                key,
                prefix_len,
                verdict,
            } => self
                .sources
                .insert(&source_key(*key, *prefix_len), verdict, 0)?,
            MapOp::RemoveSource { key, prefix_len } => {
                absent_is_fine(self.sources.remove(&source_key(*key, *prefix_len)))?;
            }
            MapOp::SetQuicServer { key, backend } => self.quic_servers.insert(key, backend, 0)?,
            MapOp::RemoveQuicServer { key } => absent_is_fine(self.quic_servers.remove(key))?,
            MapOp::SetDnat { .. } => bail!("dnat is a setting, of no map here"),
        }
        Ok(())
    }

    pub(super) fn installed(&self, dnat: bool) -> anyhow::Result<Installed> {
        let mut vips = Vec::new();
        let mut rings = Vec::new();
        for index in 0..self.vips.len() {
            let entry = self.vips.get(&index, 0).context("read VIPS")?;
            if entry.proto != 0 {
                vips.push((index, entry));
                let ring = self.rings.get(&index, 0).context("read RINGS")?;
                rings.push((index, ring.slots.into()));
            }
        }
        let heads =
            (0..self.vip_heads.len()).map(|place| Ok((place, self.vip_heads.get(&place, 0)?)));
        let heads: Vec<(u32, u32)> = heads
            .collect::<Result<_, MapError>>()
            .context("read VIP_HEADS")?;
        let backends = (1..self.backends.len()).map(|id| Ok((id, self.backends.get(&id, 0)?)));
        let backends: Vec<(u32, BackendEntry)> = backends
            .collect::<Result<_, MapError>>()
            .context("read BACKENDS")?;
        let sources: Vec<(Key<SourceKey>, u32)> = self
            .sources
            .iter()
            .collect::<Result<_, _>>()
            .context("read SOURCES")?;
        let quic_servers = self.quic_servers.iter().collect::<Result<_, _>>();
        Ok(Installed {
            vips,
            heads: heads.into_iter().filter(|(_, first)| *first != 0).collect(),
            // A free one in whose id others were keeps its generation.
            backends: backends
                .into_iter()
                .filter(|(_, entry)| entry.generation != 0)
                .collect(),
            rings,
            sources: sources
                .into_iter()
                .map(|(key, verdict)| {
                    (
                        key.data(),
                        (key.prefix_len() - SOURCE_VIP_BITS) as u8,
                        verdict,
                    )
                })
                .collect(),
            quic_servers: quic_servers.context("read QUIC_SERVERS")?,
            dnat,
        })
    }

    pub(super) fn settings(&self) -> anyhow::Result<Settings> {
        self.settings.get(&0, 0).context("read SETTINGS")
    }

    pub(super) fn set_settings(&mut self, settings: Settings) -> anyhow::Result<()> {
        self.settings.set(0, settings, 0).context("write SETTINGS")
    }

    pub(super) fn set_sweep(&mut self, request: SweepRequest) -> anyhow::Result<()> {
        self.sweep.set(0, request, 0).context("write SWEEP")
    }

    pub(super) fn sweep(&self) -> anyhow::Result<SweepRequest> {
        self.sweep.get(&0, 0).context("read SWEEP")
    }

    pub(super) fn clear_explained(&mut self) -> anyhow::Result<()> {
        let nothing = PacketEvent::default();
        self.explained.set(0, nothing, 0).context("clear EXPLAINED")
    }

    pub(super) fn explained(&self) -> anyhow::Result<PacketEvent> {
        self.explained.get(&0, 0).context("read EXPLAINED")
    }

    pub(super) fn clear_local_flows(&mut self) -> anyhow::Result<()> {
        for id in 0..self.local_flows.len() {
            self.local_flows
                .set(id, 0, 0)
                .context("write LOCAL_FLOWS")?;
        }
        Ok(())
    }

    fn clear_backend(&mut self, id: u32, generation: u16) -> anyhow::Result<()> {
        let free = BackendEntry {
            generation,
            ..BackendEntry::default()
        };
        self.backends.set(id, free, 0)?;
        let zero = PerCpuValues::try_from(vec![BackendCounters::default(); self.cpus])?;
        self.backend_counters.set(id, zero, 0)?;
        self.backend_load.set(id, BackendLoad::default(), 0)?;
        self.backend_flows.set(id, 0, 0)?;
        self.local_flows.set(id, 0, 0)?;
        Ok(())
    }
}

/// Bits in front of the source in a key of `SOURCES`.
const SOURCE_VIP_BITS: u32 = 32;

fn source_key(key: SourceKey, prefix_len: u8) -> Key<SourceKey> {
    Key::new(SOURCE_VIP_BITS + u32::from(prefix_len), key)
}

fn ring(slots: &[RingSlot]) -> anyhow::Result<Ring> {
    let slots: [RingSlot; RING_SIZE] = slots.try_into().context("a ring of another size")?;
    Ok(Ring {
        slots,
        reserved: Default::default(),
    })
}

fn absent_is_fine(removed: Result<(), MapError>) -> Result<(), MapError> {
    match removed {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_that_are_masked_are_powers_of_two() {
        for (vips, flows) in [(1, 1024), (255, 5000), (256, 1 << 24), (65_536, 262_144)] {
            let limits = L4Limits {
                vips,
                flows,
                ..L4Limits::default()
            };
            assert!(buckets(&limits).is_power_of_two());
            assert!(buckets(&limits) * FLOW_WAYS as u32 >= flows);
            assert!(vip_heads(&limits).is_power_of_two());
            assert!(vip_heads(&limits) >= 4 * vips);
        }
    }

    #[test]
    fn no_map_is_sized_twice() {
        let shapes = shapes(&L4Limits::default());
        let names: std::collections::BTreeSet<_> = shapes.iter().map(|shape| shape.name).collect();
        assert_eq!(names.len(), shapes.len());
    }
}
