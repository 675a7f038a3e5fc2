//! The network of a lab.
//!
//! ```text
//!  client ───────────────── front gateway back ───────── switch (a bridge)
//!  198.51.100.7    198.51.100.1          10.0.0.1         │     │     │
//!  192.0.2.0/24 via the gateway                          b1    b2    b3   10.0.0.11, .12, .13
//!                                                        default via the gateway
//! ```
//!
//! From the client a packet enters by `front` and leaves by `back` (`XDP_REDIRECT`); from a backend
//! that dials a VIP it leaves by the interface it came from (`XDP_TX`). IPv6 lies beside: the
//! client's net is 2001:db8:1::/64, the backends' fd00::/64, the VIPs' 2001:db8::/64.
//!
//! Names carry the process id, so that labs run beside each other and [`Lab::new`] can remove what
//! a killed one left. Dropping the lab removes everything.

use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, process};

use anyhow::{Context, ensure};
use aya::programs::{Xdp, XdpMode};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns::{self, Netns};

pub const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// The gateway's address on the client's side.
pub const FRONT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The gateway's address on the backends' side; the NATS server is reached there.
pub const BACK: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

/// The gateway's interfaces.
pub const INTERFACES: [&str; 2] = ["front", "back"];

/// Addresses that the client sends to the gateway.
pub const VIP_RANGE: &str = "192.0.2.0/24";
pub const VIP_RANGE_V6: &str = "2001:db8::/64";

const PREFIX: &str = "viaduct-";
const RUN: &str = "/run";
const BPFFS: &str = "bpf";

/// A lab's network, its folder and its private bpffs.
pub struct Lab {
    /// Dropped first: the programs must leave the interfaces before those go.
    pass: Vec<aya::Ebpf>,
    pub client: Netns,
    pub gateway: Netns,
    switch: Netns,
    /// b1, b2, ...
    pub backends: Vec<Netns>,
    folder: Folder,
}

impl Lab {
    /// Builds the network with `backends` of them.
    ///
    /// # Errors
    /// Not root, iproute2 or ethtool is missing, or this was built without the eBPF toolchain.
    pub fn new(backends: usize) -> anyhow::Result<Lab> {
        static LABS: AtomicU32 = AtomicU32::new(0);

        ensure!(
            nix::unistd::geteuid().is_root(),
            "a lab needs root: it makes network namespaces"
        );
        ensure!((1..=200).contains(&backends), "a lab has 1 to 200 backends");
        remove_leftovers();

        let name = match LABS.fetch_add(1, Ordering::Relaxed) {
            0 => format!("{PREFIX}{}", process::id()),
            n => format!("{PREFIX}{}-{n}", process::id()),
        };
        let create = |role: &str| Netns::create(&format!("{name}-{role}"));
        let mut lab = Lab {
            pass: Vec::new(),
            client: create("client")?,
            gateway: create("gateway")?,
            switch: create("switch")?,
            backends: (1..=backends)
                .map(|n| create(&format!("b{n}")))
                .collect::<Result<_, _>>()?,
            folder: Folder::create(&name)?,
        };
        lab.connect_client()?;
        lab.connect_backends()?;
        lab.pass = vec![
            pass_all(&lab.client, "eth0")?,
            pass_all(&lab.switch, "uplink")?,
        ];
        Ok(lab)
    }

    /// Where logs and configurations of this lab are; removed with it.
    pub fn folder(&self) -> &Path {
        &self.folder.path
    }

    /// A bpffs of this lab's own. What is pinned there goes with the lab.
    pub fn bpffs(&self) -> PathBuf {
        self.folder.bpffs()
    }

    /// The address of the backend at `index` of [`Lab::backends`].
    pub fn backend_address(&self, index: usize) -> Ipv4Addr {
        backend_address(index)
    }

    /// Changes the MTU of every device between the client and the backends.
    pub fn set_mtu(&self, mtu: u32) -> anyhow::Result<()> {
        let set = |device: &str| format!("link set {device} mtu {mtu}");
        // A bridge takes the least of its ports, so they go first.
        for index in 0..self.backends.len() {
            self.switch.ip(&[&set(&format!("b{}", index + 1))])?;
            self.backends[index].ip(&[&set("eth0")])?;
        }
        self.switch.ip(&[&set("uplink"), &set("bridge")])?;
        self.gateway
            .ip(&INTERFACES.map(set).each_ref().map(String::as_str))?;
        self.client.ip(&[&set("eth0")])
    }

    fn connect_client(&self) -> anyhow::Result<()> {
        let gateway = self.gateway.name();
        self.client.ip(&[
            "link set lo up",
            &format!("link add eth0 type veth peer name front netns {gateway}"),
            "link set eth0 up",
            &format!("address add {CLIENT}/24 dev eth0"),
            "address add 2001:db8:1::7/64 dev eth0 nodad",
        ])?;
        self.gateway.ip(&[
            "link set lo up",
            "link set front up",
            &format!("address add {FRONT}/24 dev front"),
            "address add 2001:db8:1::1/64 dev front nodad",
        ])?;
        self.client.ip(&[
            &format!("route add {VIP_RANGE} via {FRONT}"),
            &format!("route add 10.0.0.0/24 via {FRONT}"),
            &format!("route add {VIP_RANGE_V6} via 2001:db8:1::1"),
            "route add fd00::/64 via 2001:db8:1::1",
        ])?;
        no_offload(&self.client, "eth0")?;
        no_offload(&self.gateway, "front")?;
        trust_every_source(&self.client)
    }

    fn connect_backends(&self) -> anyhow::Result<()> {
        let switch = self.switch.name();
        self.switch.ip(&[
            "link set lo up",
            "link add bridge type bridge",
            "link set bridge up",
        ])?;
        self.gateway.ip(&[
            &format!("link add back type veth peer name uplink netns {switch}"),
            "link set back up",
            &format!("address add {BACK}/24 dev back"),
            "address add fd00::1/64 dev back nodad",
        ])?;
        self.switch.ip(&["link set uplink master bridge up"])?;
        no_offload(&self.gateway, "back")?;
        trust_every_source(&self.gateway)?;
        self.gateway.sysctl("ipv4/ip_forward", "1")?;
        self.gateway.sysctl("ipv6/conf/all/forwarding", "1")?;

        for (index, backend) in self.backends.iter().enumerate() {
            let port = format!("b{}", index + 1);
            let address = backend_address(index);
            backend.ip(&[
                "link set lo up",
                &format!("link add eth0 type veth peer name {port} netns {switch}"),
                "link set eth0 up",
                &format!("address add {address}/24 dev eth0"),
                &format!("address add fd00::{}/64 dev eth0 nodad", 11 + index),
                &format!("route add default via {BACK}"),
                "route add default via fd00::1",
            ])?;
            self.switch
                .ip(&[&format!("link set {port} master bridge up")])?;
            no_offload(backend, "eth0")?;
            trust_every_source(backend)?;
        }
        Ok(())
    }
}

/// A folder of the lab's own, with a bpffs mounted inside.
struct Folder {
    path: PathBuf,
}

impl Folder {
    fn create(name: &str) -> anyhow::Result<Folder> {
        let folder = Folder {
            path: Path::new(RUN).join(name),
        };
        let bpffs = folder.bpffs();
        fs::create_dir_all(&bpffs).with_context(|| format!("create {}", bpffs.display()))?;
        netns::output(
            process::Command::new("mount")
                .args(["-t", "bpf", "bpf"])
                .arg(&bpffs),
        )?;
        Ok(folder)
    }

    fn bpffs(&self) -> PathBuf {
        self.path.join(BPFFS)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = remove_folder(&self.path) {
            eprintln!("lab: remove {}: {error:#}", self.path.display());
        }
    }
}

/// Unmounting drops the pins, and with them the links: the programs leave the interfaces. A lab that
/// was killed early may have mounted nothing.
fn remove_folder(path: &Path) -> anyhow::Result<()> {
    let bpffs = path.join(BPFFS);
    if is_mount_point(&bpffs) {
        netns::output(process::Command::new("umount").arg(bpffs))?;
    }
    fs::remove_dir_all(path)?;
    Ok(())
}

/// Whether a folder lies on another file system than the one it is in.
fn is_mount_point(path: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
    path.parent()
        .is_some_and(|parent| device(path).is_some() && device(path) != device(parent))
}

fn backend_address(index: usize) -> Ipv4Addr {
    let host = u8::try_from(11 + index).expect("a lab has at most 200 backends");
    Ipv4Addr::new(10, 0, 0, host)
}

/// Makes the kernel compute checksums before it sends, and check them when it receives.
///
/// A veth leaves that to the other end, by a mark that a frame loses on its way through XDP. A wire
/// has no such mark, and so neither has the lab.
fn no_offload(netns: &Netns, device: &str) -> anyhow::Result<()> {
    let mut ethtool = netns.command("ethtool");
    netns::output(ethtool.args(["-K", device, "tx", "off", "rx", "off"]))?;
    Ok(())
}

/// Answers from a VIP come by the way of the gateway's own address, which a reverse-path filter
/// could take for forged.
fn trust_every_source(netns: &Netns) -> anyhow::Result<()> {
    netns.sysctl("ipv4/conf/all/rp_filter", "0")?;
    netns.sysctl("ipv4/conf/default/rp_filter", "0")
}

/// Attaches a program that passes every packet: without one here, what the gateway sends out of
/// the other end by `XDP_TX` is queued and never received.
fn pass_all(netns: &Netns, device: &str) -> anyhow::Result<aya::Ebpf> {
    ensure!(
        !viaduct::l4::PASS_PROGRAM.is_empty(),
        "this was built without the eBPF toolchain; run `cargo xtask setup` and build again"
    );
    netns.run(|| {
        let mut object =
            aya::Ebpf::load(viaduct::l4::PASS_PROGRAM).context("load the pass program")?;
        let (_, program) = object
            .programs_mut()
            .next()
            .context("the object has no program")?;
        let program: &mut Xdp = program.try_into()?;
        program.load().context("load the pass program")?;
        let attach = program.attach(device, XdpMode::Driver);
        attach.with_context(|| format!("attach the pass program to {device}"))?;
        Ok(object)
    })
}

/// Removes what labs of dead processes left: their processes first, then namespaces and folders.
fn remove_leftovers() {
    for name in names_in("/run/netns")
        .into_iter()
        .filter(|name| is_leftover(name))
    {
        for pid in netns::ip(&["netns", "pids", &name])
            .unwrap_or_default()
            .lines()
        {
            if let Ok(pid) = pid.trim().parse() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        // Another lab may clean up at the same time, and then it is gone already.
        let _ = netns::ip(&["netns", "del", &name]);
    }
    for name in names_in(RUN).into_iter().filter(|name| is_leftover(name)) {
        let _ = remove_folder(&Path::new(RUN).join(name));
    }
}

fn names_in(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect()
}

/// Whether a name is one of a lab whose process is gone.
fn is_leftover(name: &str) -> bool {
    let pid = name
        .strip_prefix(PREFIX)
        .and_then(|rest| rest.split('-').next());
    let pid = pid.and_then(|pid| pid.parse::<u32>().ok());
    pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_labs_of_dead_processes_are_left_over() {
        let alive = process::id();
        assert!(!is_leftover(&format!("viaduct-{alive}-client")));
        assert!(!is_leftover(&format!("viaduct-{alive}")));
        // Linux has no process ids above 4194304.
        assert!(is_leftover("viaduct-4194305-client"));
        assert!(is_leftover("viaduct-4194305-2-b1"));
        assert!(!is_leftover("viaduct"));
        assert!(!is_leftover("viaduct-"));
        assert!(!is_leftover("viaduct-bpf"));
        assert!(!is_leftover("other-4194305"));
    }
}
