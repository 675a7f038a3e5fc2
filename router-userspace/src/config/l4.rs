//! `[l4]` and `[[l4.vip]]` as types, with their defaults and contradictions.
//!
//! [`crate::l4::policy`] turns the keys of a VIP and the defaults beside them into its policy.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use ipnet::IpNet;
use router_common::MAX_BACKENDS;
use serde::{Deserialize, Serialize};

use super::PortRange;
use crate::route::{Proto, Vip};

/// Prefixes in `allow` and `deny` over all VIPs.
pub const MAX_SOURCE_PREFIXES: usize = 65_536;
/// Four hours: the least that the flow table's clock can tell at any length of its ticks.
pub const MAX_AFFINITY: Duration = Duration::from_secs(4 * 3600);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct L4Config {
    /// Where the XDP program attaches. Empty switches layer 4 off.
    pub interfaces: Vec<String>,
    pub attach: Attach,
    /// Whose sockets dial VIPs without a packet: on this host nothing passes XDP.
    pub local_clients: LocalClients,
    /// Registrations of VIPs outside are refused.
    pub vip_ranges: Vec<IpNet>,
    pub forwarding: Forwarding,
    pub scheduler: Scheduler,
    pub reject: Reject,
    /// How long the flows of a backend that left may go on.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
    /// How long a backend that joins others takes to get its full share; `0s`: none.
    #[serde(with = "humantime_serde")]
    pub slow_start: Duration,
    /// The gateway's ports in `nat` mode; must not overlap the kernel's `ip_local_port_range`.
    pub nat_ports: PortRange,
    /// UDP port that backends of `gue` VIPs decapsulate at.
    pub gue_port: u16,
    pub timeouts: FlowTimeouts,
    pub limits: L4Limits,
    /// Where maps and links are pinned; a bpffs is mounted there if none is.
    pub pin_path: PathBuf,
    /// Policies of single VIPs; what one does not say is as above.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vip: Vec<VipConfig>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attach {
    /// XDP on network cards, the classifier on veths, bridges, tunnels and other devices of software.
    #[default]
    Auto,
    /// XDP in the driver.
    Native,
    /// XDP on socket buffers.
    Generic,
    /// A classifier at tc's ingress, by a link where the kernel has them (Linux 6.6).
    Tcx,
}

/// The cgroup whose processes' sockets are translated, with all below it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum LocalClients {
    /// Every process's, where cgroup2 is mounted: also of those in other network namespaces.
    #[default]
    Auto,
    Off,
    /// A folder of cgroup2.
    Cgroup(PathBuf),
}

impl TryFrom<String> for LocalClients {
    type Error = &'static str;

    fn try_from(text: String) -> Result<LocalClients, &'static str> {
        match text.as_str() {
            "auto" => Ok(LocalClients::Auto),
            "off" => Ok(LocalClients::Off),
            path if path.starts_with('/') => Ok(LocalClients::Cgroup(path.into())),
            _ => Err("local clients are \"auto\", \"off\" or the absolute path of a cgroup"),
        }
    }
}

impl From<LocalClients> for String {
    fn from(clients: LocalClients) -> String {
        match clients {
            LocalClients::Auto => "auto".to_owned(),
            LocalClients::Off => "off".to_owned(),
            LocalClients::Cgroup(path) => path.to_string_lossy().into_owned(),
        }
    }
}

/// How a VIP's packets get to its backends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Forwarding {
    #[default]
    Nat,
    Dnat,
    Dsr,
    Ipip,
    Gue,
    /// To the proxy on this host.
    L7,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheduler {
    #[default]
    Maglev,
    SourceHash,
    RoundRobin,
    LeastConnections,
}

/// What becomes of a packet that no backend can take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reject {
    /// By RST, or by ICMP port unreachable.
    #[default]
    Answer,
    Drop,
}

/// How long a flow without packets is remembered, by the state it is in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FlowTimeouts {
    /// TCP before the backend answered.
    #[serde(with = "humantime_serde")]
    pub tcp_syn: Duration,
    #[serde(with = "humantime_serde")]
    pub tcp_established: Duration,
    /// TCP after a RST, or a FIN of both sides.
    #[serde(with = "humantime_serde")]
    pub tcp_closing: Duration,
    #[serde(with = "humantime_serde")]
    pub udp: Duration,
}

/// Capacities of the kernel maps, fixed when they are created.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct L4Limits {
    /// 64 KiB of kernel memory each.
    pub vips: u32,
    /// Memberships of a backend in a VIP, draining ones included.
    pub backends: u32,
    /// Rounded up to a power of two; 88 bytes each. Twice as many as expected leaves room in every bucket.
    pub flows: u32,
}

/// The policy of one VIP; its backends come from registrations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VipConfig {
    pub address: Vip,
    pub forwarding: Option<Forwarding>,
    pub scheduler: Option<Scheduler>,
    pub reject: Option<Reject>,
    /// How long a client stays on its backend after its last packet.
    #[serde(
        default,
        with = "humantime_serde",
        skip_serializing_if = "Option::is_none"
    )]
    pub affinity: Option<Duration>,
    #[serde(
        default,
        with = "humantime_serde",
        skip_serializing_if = "Option::is_none"
    )]
    pub slow_start: Option<Duration>,
    #[serde(
        default,
        with = "humantime_serde",
        skip_serializing_if = "Option::is_none"
    )]
    pub drain: Option<Duration>,
    /// Sources that are served; empty: all that are not denied. The longest prefix that matches in
    /// either list decides.
    #[serde(default)]
    pub allow: Vec<IpNet>,
    #[serde(default)]
    pub deny: Vec<IpNet>,
    /// New flows a second from one source; 0: no bound.
    #[serde(default)]
    pub source_rate: u32,
    /// New flows a second; 0: no bound.
    #[serde(default)]
    pub vip_rate: u32,
    /// Beyond `vip_rate`, clients must show that they exist instead of being refused.
    #[serde(default)]
    pub challenge: bool,
    /// Keeps every flow in the flow table, also where the ring alone would do.
    #[serde(default)]
    pub track: bool,
    pub quic: Option<QuicConfig>,
}

/// Where in a QUIC connection ID the server's is (draft-ietf-quic-load-balancers-21, §3 and §5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuicConfig {
    /// 1 to 8.
    pub server_id_octets: u8,
    /// The three bits of the first octet, 0 to 6; 7 means that there is no server ID.
    #[serde(default)]
    pub config: u8,
}

impl Default for L4Config {
    fn default() -> L4Config {
        L4Config {
            interfaces: Vec::new(),
            attach: Attach::Auto,
            local_clients: LocalClients::Auto,
            vip_ranges: Vec::new(),
            forwarding: Forwarding::Nat,
            scheduler: Scheduler::Maglev,
            reject: Reject::Answer,
            drain: Duration::from_secs(300),
            slow_start: Duration::ZERO,
            nat_ports: PortRange {
                first: 1024,
                last: 32767,
            },
            gue_port: 6080,
            timeouts: FlowTimeouts::default(),
            limits: L4Limits::default(),
            pin_path: PathBuf::from("/sys/fs/bpf/viaduct"),
            vip: Vec::new(),
        }
    }
}

impl Default for FlowTimeouts {
    fn default() -> FlowTimeouts {
        FlowTimeouts {
            tcp_syn: Duration::from_secs(30),
            tcp_established: Duration::from_secs(2 * 3600),
            tcp_closing: Duration::from_secs(10),
            udp: Duration::from_secs(60),
        }
    }
}

impl Default for L4Limits {
    fn default() -> L4Limits {
        L4Limits {
            vips: 256,
            backends: 16_384,
            flows: 262_144,
        }
    }
}

impl L4Config {
    /// Whether registrations may claim this VIP address.
    pub fn allows_vip(&self, address: IpAddr) -> bool {
        self.vip_ranges.iter().any(|range| range.contains(&address))
    }

    /// Whether a VIP may be served by this policy, whoever it is of.
    ///
    /// # Errors
    /// Names the VIP and the key.
    pub fn check_vip(&self, vip: &VipConfig) -> anyhow::Result<()> {
        let address = vip.address;
        ensure!(
            self.allows_vip(address.address),
            "{address} is outside l4.vip_ranges"
        );
        vip.validate(vip.forwarding.unwrap_or(self.forwarding))
            .with_context(|| address.to_string())
    }

    pub(super) fn validate(&self) -> anyhow::Result<()> {
        let timeouts = [
            ("l4.timeouts.tcp_syn", self.timeouts.tcp_syn),
            ("l4.timeouts.tcp_established", self.timeouts.tcp_established),
            ("l4.timeouts.tcp_closing", self.timeouts.tcp_closing),
            ("l4.timeouts.udp", self.timeouts.udp),
        ];
        for (key, value) in timeouts {
            ensure!(!value.is_zero(), "{key} must be longer than 0s");
        }
        ensure!(self.limits.vips >= 1, "l4.limits.vips must be at least 1");
        ensure!(
            (1..=MAX_BACKENDS).contains(&self.limits.backends),
            "l4.limits.backends must be 1..={MAX_BACKENDS}"
        );
        ensure!(
            (1024..=1 << 24).contains(&self.limits.flows),
            "l4.limits.flows must be 1024..=16777216"
        );
        ensure!(self.gue_port != 0, "l4.gue_port must be 1..=65535");
        let mut seen = BTreeSet::new();
        for interface in &self.interfaces {
            ensure!(
                seen.insert(interface),
                "l4.interfaces names {interface:?} twice"
            );
        }
        self.validate_vips()
    }

    fn validate_vips(&self) -> anyhow::Result<()> {
        let mut seen = BTreeSet::new();
        for (i, vip) in self.vip.iter().enumerate() {
            let address = vip.address;
            ensure!(seen.insert(address), "l4.vip[{i}]: {address} stands twice");
            self.check_vip(vip)
                .with_context(|| format!("l4.vip[{i}]"))?;
        }
        let l7 = |vip: &&VipConfig| vip.forwarding.unwrap_or(self.forwarding) == Forwarding::L7;
        ensure!(
            self.vip.iter().filter(l7).count() <= self.limits.vips as usize,
            "l4.vip: more VIPs with forwarding l7 than l4.limits.vips"
        );
        let prefixes = |vip: &VipConfig| vip.allow.len() + vip.deny.len();
        ensure!(
            self.vip.iter().map(prefixes).sum::<usize>() <= MAX_SOURCE_PREFIXES,
            "l4.vip: more than {MAX_SOURCE_PREFIXES} prefixes in allow and deny"
        );
        Ok(())
    }
}

impl VipConfig {
    /// A VIP of which nothing is said but its address.
    pub fn new(address: Vip) -> VipConfig {
        VipConfig {
            address,
            forwarding: None,
            scheduler: None,
            reject: None,
            affinity: None,
            slow_start: None,
            drain: None,
            allow: Vec::new(),
            deny: Vec::new(),
            source_rate: 0,
            vip_rate: 0,
            challenge: false,
            track: false,
            quic: None,
        }
    }

    fn validate(&self, forwarding: Forwarding) -> anyhow::Result<()> {
        if forwarding == Forwarding::L7 {
            ensure!(
                self.address.proto == Proto::Tcp,
                "forwarding l7 serves TCP only"
            );
            let balanced = [
                ("scheduler", self.scheduler.is_some()),
                ("affinity", self.affinity.is_some()),
                ("slow_start", self.slow_start.is_some()),
                ("drain", self.drain.is_some()),
                ("track", self.track),
            ];
            for (key, given) in balanced {
                ensure!(
                    !given,
                    "{key} means nothing with forwarding l7, where [http] balances"
                );
            }
        }
        if let Some(affinity) = self.affinity {
            ensure!(
                !affinity.is_zero() && affinity <= MAX_AFFINITY,
                "affinity must be longer than 0s and at most {}",
                humantime_serde::re::humantime::format_duration(MAX_AFFINITY)
            );
        }
        if self.challenge {
            ensure!(self.vip_rate > 0, "challenge needs a vip_rate");
            ensure!(
                self.address.proto == Proto::Tcp,
                "challenge is for TCP only"
            );
        }
        if let Some(quic) = self.quic {
            ensure!(self.address.proto == Proto::Udp, "quic is for UDP only");
            ensure!(
                matches!(
                    forwarding,
                    Forwarding::Dsr | Forwarding::Ipip | Forwarding::Gue
                ),
                "quic needs forwarding dsr, ipip or gue: the others follow flows"
            );
            ensure!(
                (1..=8).contains(&quic.server_id_octets),
                "quic.server_id_octets must be 1..=8"
            );
            ensure!(quic.config <= 6, "quic.config must be 0..=6");
        }
        self.validate_sources()
    }

    fn validate_sources(&self) -> anyhow::Result<()> {
        let mut seen = BTreeSet::new();
        for prefix in self.allow.iter().chain(&self.deny) {
            ensure!(
                prefix.addr().is_ipv4() == self.address.address.is_ipv4(),
                "{prefix} in allow or deny is not of the VIP's address family"
            );
            ensure!(
                seen.insert(prefix.trunc()),
                "{prefix} stands twice in allow and deny"
            );
        }
        Ok(())
    }
}
