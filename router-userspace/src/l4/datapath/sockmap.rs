//! Loads `viaduct_established` and `viaduct_redirect` (router-ebpf/src/sockmap.rs), and finds out first
//! whether the kernel does what is needed of it.
//!
//! Used by `cli/run` where `http.sockmap` is on. Nothing is pinned: what is on its way between two
//! sockets is lost when the maps are gone, so [`Sockmap`] has to outlive the proxy, and each agent
//! has its own mark and its own maps. Which connections are marked is layer 7's to say.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;

use anyhow::{Context, ensure};
use aya::maps::{MapData, PerCpuArray, SockHash};
use aya::programs::{CgroupAttachMode, SkMsg, SockOps};
use aya::{Ebpf, EbpfLoader};
use router_common::SockmapCounter;
use socket2::{Domain, Socket, Type};

use super::local::cgroup2_mount;

static PROGRAM: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/viaduct-sockmap"));

/// The programs on a cgroup, until dropped.
pub struct Sockmap {
    counters: PerCpuArray<MapData, u64>,
    #[expect(dead_code, reason = "held, never looked at: dropping it detaches")]
    ebpf: Ebpf,
}

impl Sockmap {
    /// For every socket of the host that has `mark`, and for whom it connects to.
    ///
    /// # Errors
    /// As [`Sockmap::attach`], or no cgroup2 is mounted.
    pub fn attach_to_host(mark: u32) -> anyhow::Result<Sockmap> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
        let root = cgroup2_mount(&mounts).context("no cgroup2 is mounted")?;
        let sockmap = Sockmap::attach(&root, mark)?;
        sockmap.try_out(mark)?;
        Ok(sockmap)
    }

    /// For sockets in a cgroup and below it.
    ///
    /// # Errors
    /// Built without BPF programs, the cgroup is not there, or the kernel refuses a program.
    pub fn attach(cgroup: &Path, mark: u32) -> anyhow::Result<Sockmap> {
        ensure!(!PROGRAM.is_empty(), "built without BPF programs");
        let mut ebpf = EbpfLoader::new()
            .override_global("MARK", &mark, true)
            .load(PROGRAM)
            .context("create the maps")?;
        let sockets: SockHash<_, u64> =
            ebpf.map("SOCKETS").context("no map SOCKETS")?.try_into()?;
        let sockets = sockets.fd().try_clone().context("duplicate a descriptor")?;
        let redirect: &mut SkMsg = ebpf
            .program_mut("viaduct_redirect")
            .context("no program viaduct_redirect")?
            .try_into()?;
        redirect.load().context("load viaduct_redirect")?;
        redirect
            .attach(&sockets)
            .context("attach viaduct_redirect")?;
        let established: &mut SockOps = ebpf
            .program_mut("viaduct_established")
            .context("no program viaduct_established")?
            .try_into()?;
        established.load().context("load viaduct_established")?;
        let cgroup = File::open(cgroup).context("open the cgroup")?;
        // Without a flag: a link allows others' programs beside it by itself.
        established
            .attach(cgroup, CgroupAttachMode::Single)
            .context("attach viaduct_established")?;
        let counters = ebpf
            .take_map("SOCKMAP_COUNTERS")
            .context("no map SOCKMAP_COUNTERS")?
            .try_into()?;
        Ok(Sockmap { counters, ebpf })
    }

    /// Since it was attached; 0 where the kernel does not tell.
    pub fn count(&self, counter: SockmapCounter) -> u64 {
        self.counters
            .get(&(counter as u32), 0)
            .map_or(0, |cores| cores.iter().sum())
    }

    /// Sends some bytes to a socket of our own.
    ///
    /// # Errors
    /// They do not go past TCP here, or the kernel does not count what has not been read of them:
    /// FIONREAD says 0 on older kernels, and who believes that, as nginx does, waits for ever for the
    /// rest of a request that is longer than its buffer.
    pub fn try_out(&self, mark: u32) -> anyhow::Result<()> {
        let before = self.count(SockmapCounter::Connections);
        let (mut active, mut passive) = connection(mark).context("connect to this host")?;
        ensure!(
            self.count(SockmapCounter::Connections) > before,
            "a connection to this host is not seen by viaduct_established"
        );
        active.write_all(b"sockmap").context("send")?;
        passive.read_exact(&mut [0; 3]).context("receive")?;
        let unread = rustix::io::ioctl_fionread(&passive).context("ask FIONREAD")?;
        ensure!(
            unread == 4,
            "this kernel's FIONREAD does not count what passes TCP by, so some backends would wait for \
             ever: it lacks the change \"bpf, sockmap: Fix FIONREAD for sockmap\""
        );
        Ok(())
    }
}

fn connection(mark: u32) -> anyhow::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let active = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    active.set_mark(mark)?;
    active.connect(&listener.local_addr()?.into())?;
    let (passive, _) = listener.accept()?;
    Ok((active.into(), passive))
}
