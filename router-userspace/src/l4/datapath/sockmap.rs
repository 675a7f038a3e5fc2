//! Loads `viaduct-sockmap` and keeps it on a cgroup.

use std::fs::File;
use std::path::Path;

use anyhow::Context;
use aya::maps::{MapData, PerCpuArray, SockHash};
use aya::programs::{CgroupAttachMode, SkMsg, SockOps};
use aya::{Ebpf, EbpfLoader};

static PROGRAM: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/viaduct-sockmap"));

pub struct Sockmap {
    ebpf: Ebpf,
}

impl Sockmap {
    pub fn attach(cgroup: &Path, directions: u32) -> anyhow::Result<Sockmap> {
        let mut ebpf = EbpfLoader::new()
            .override_global("DIRECTIONS", &directions, true)
            .load(PROGRAM)
            .context("load the maps")?;
        let sockets = SockHash::<_, u64>::try_from(ebpf.map("SOCKETS").context("SOCKETS")?)?;
        let fd = sockets.fd().try_clone()?;
        let redirect: &mut SkMsg = ebpf
            .program_mut("viaduct_redirect")
            .context("viaduct_redirect")?
            .try_into()?;
        redirect.load()?;
        redirect.attach(&fd)?;
        let established: &mut SockOps = ebpf
            .program_mut("viaduct_established")
            .context("viaduct_established")?
            .try_into()?;
        established.load()?;
        let cgroup = File::open(cgroup).context("open the cgroup")?;
        established.attach(cgroup, CgroupAttachMode::Single)?;
        Ok(Sockmap { ebpf })
    }

    pub fn counts(&self) -> anyhow::Result<Vec<u64>> {
        let counts =
            PerCpuArray::<&MapData, u64>::try_from(self.ebpf.map("COUNTS").context("COUNTS")?)?;
        (0..4)
            .map(|index| Ok(counts.get(&index, 0)?.iter().sum()))
            .collect()
    }
}
