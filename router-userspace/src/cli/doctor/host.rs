//! What layer 4 needs of the kernel and of this process.

use std::fs;
use std::path::Path;

use anyhow::Context;

use super::Check;
use crate::config::{Forwarding, L4Config, PortRange};
use crate::l4::datapath::{cgroup2_mount, missing_capabilities};
use crate::l4::pins::is_bpffs;

/// The oldest kernel that the programs are tested on.
const OLDEST: Version = Version(6, 1);
/// The first with links at tc's ingress.
const TCX: Version = Version(6, 6);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

pub(super) fn checks(config: &L4Config) -> Vec<Check> {
    let release = read("/proc/sys/kernel/osrelease");
    let mut checks = vec![
        kernel(&release),
        tc(&release),
        btf(Path::new("/sys/kernel/btf/vmlinux").exists()),
        capabilities(),
        bpffs(config),
        cgroup2(&read("/proc/self/mounts")),
        ports(
            config.nat_ports,
            &read("/proc/sys/net/ipv4/ip_local_port_range"),
        ),
    ];
    let setting = |key: &str| read(&format!("/proc/sys/net/ipv4/{key}")) == "1";
    if uses(config, Forwarding::Dnat) {
        checks.push(forwarding(setting("ip_forward")));
    }
    if uses(config, Forwarding::L7) {
        checks.push(rp_filter(setting("conf/all/rp_filter")));
    }
    checks
}

fn uses(config: &L4Config, mode: Forwarding) -> bool {
    let mut of_vips = config.vip.iter().map(|vip| vip.forwarding);
    config.forwarding == mode || of_vips.any(|of_vip| of_vip == Some(mode))
}

fn kernel(release: &str) -> Check {
    const REMEDY: &str = "run Linux 6.1 or later";
    match version(release) {
        Some(version) if version >= OLDEST => Check::good("kernel", release),
        Some(_) => Check::missing("kernel", release, REMEDY),
        None => Check::hint("kernel", format!("{release:?} is no version"), REMEDY),
    }
}

fn tc(release: &str) -> Check {
    match version(release) {
        Some(version) if version < TCX => Check::hint(
            "tc",
            "no tcx before 6.6: attach = \"tcx\" uses a filter of clsact, which `tc` can remove",
            "nothing has to be done",
        ),
        _ => Check::good("tc", "tcx"),
    }
}

fn btf(there: bool) -> Check {
    match there {
        true => Check::good("btf", "/sys/kernel/btf/vmlinux"),
        false => Check::hint(
            "btf",
            "the kernel has no type information",
            "none is needed to run; for bpftool's sake use a kernel with CONFIG_DEBUG_INFO_BTF",
        ),
    }
}

fn capabilities() -> Check {
    match missing_capabilities() {
        Ok(missing) if missing.is_empty() => {
            Check::good("capabilities", "CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN")
        }
        Ok(missing) => Check::missing(
            "capabilities",
            format!("this process has no {}", missing.join(", ")),
            "run as root, or grant them (AmbientCapabilities= in a systemd unit)",
        ),
        Err(error) => Check::hint("capabilities", format!("{error:#}"), "mount /proc"),
    }
}

fn bpffs(config: &L4Config) -> Check {
    let path = &config.pin_path;
    let mut there = path.ancestors().filter(|path| path.exists());
    match there.next() {
        Some(there) if is_bpffs(there) => Check::good("bpffs", path.display().to_string()),
        _ if path.starts_with("/sys/fs/bpf") => Check::hint(
            "bpffs",
            "none on /sys/fs/bpf",
            "viaduct mounts one if it has CAP_SYS_ADMIN: else mount -t bpf bpf /sys/fs/bpf",
        ),
        _ => Check::missing(
            "bpffs",
            format!("l4.pin_path {} is on another file system", path.display()),
            "mount -t bpf there, or set l4.pin_path to a folder below /sys/fs/bpf",
        ),
    }
}

/// Where programs for clients on this host attach.
fn cgroup2(mounts: &str) -> Check {
    match cgroup2_mount(mounts) {
        Some(path) => Check::good("cgroup2", path.display().to_string()),
        None => Check::hint(
            "cgroup2",
            "not mounted: clients on this host cannot dial VIPs",
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified",
        ),
    }
}

/// The kernel picks local ports of its own connections from a range that must not be the gateway's.
fn ports(ours: PortRange, range: &str) -> Check {
    let mut numbers = range.split_whitespace().map(str::parse::<u16>);
    let (Some(Ok(first)), Some(Ok(last))) = (numbers.next(), numbers.next()) else {
        return Check::hint(
            "ports",
            "net.ipv4.ip_local_port_range cannot be read",
            "mount /proc",
        );
    };
    let found = format!("l4.nat_ports {ours}, net.ipv4.ip_local_port_range {first}-{last}");
    if ours.last < first || ours.first > last {
        return Check::good("ports", found);
    }
    Check::missing(
        "ports",
        format!("{found}: they overlap"),
        format!(
            "set one to ports that the other does not have, as in \
             sysctl net.ipv4.ip_local_port_range=\"{} 65535\"",
            u32::from(ours.last) + 1
        ),
    )
}

/// Backends of `dnat` VIPs have the gateway as their router, also for what is no answer to a client.
fn forwarding(on: bool) -> Check {
    match on {
        true => Check::good("forwarding", "net.ipv4.ip_forward = 1"),
        false => Check::hint(
            "forwarding",
            "net.ipv4.ip_forward = 0: backends reach nobody but the clients of their VIPs",
            "sysctl net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1",
        ),
    }
}

/// What goes up to the proxy passes the kernel's own check of sources.
fn rp_filter(strict: bool) -> Check {
    match strict {
        false => Check::good("rp_filter", "not strict"),
        true => Check::hint(
            "rp_filter",
            "net.ipv4.conf.all.rp_filter = 1: clients whose route back is another interface are dropped",
            "sysctl net.ipv4.conf.all.rp_filter=2",
        ),
    }
}

fn version(release: &str) -> Option<Version> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some(Version(number()?, number()?))
}

fn read(path: &str) -> String {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"));
    text.map(|text| text.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn a_kernel_is_judged_by_its_version() {
        for (release, verdict) in [
            ("6.1.0-38-cloud-amd64", Verdict::Good),
            ("7.0", Verdict::Good),
            ("5.15.0-1", Verdict::Missing),
            ("unknown", Verdict::Hint),
        ] {
            assert_eq!(kernel(release).verdict, verdict, "{release}");
        }
        assert_eq!(tc("6.1.0").verdict, Verdict::Hint);
        assert_eq!(tc("6.6.0").verdict, Verdict::Good);
    }

    #[test]
    fn ports_that_overlap_are_missing_and_the_remedy_parts_them() {
        let ours = "1024-32767".parse().unwrap();
        assert_eq!(ports(ours, "32768\t60999").verdict, Verdict::Good);
        let check = ports(ours, "32000 60999");
        assert_eq!(check.verdict, Verdict::Missing);
        assert!(check.remedy.contains("\"32768 65535\""), "{}", check.remedy);
        assert_eq!(ports(ours, "").verdict, Verdict::Hint);
    }

    #[test]
    fn cgroup2_is_found_wherever_it_is_mounted() {
        let mounts = "tmpfs /tmp tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2(mounts).found, "/sys/fs/cgroup/unified");
        assert_eq!(cgroup2("cgroup /x cgroup rw 0 0\n").verdict, Verdict::Hint);
    }

    #[test]
    fn a_mode_is_in_use_where_any_vip_has_it() {
        let text = "[l4]\nvip_ranges = [\"192.0.2.0/24\"]\n[[l4.vip]]\naddress = \"tcp/192.0.2.10:80\"\nforwarding = \"dnat\"\n";
        let config = crate::config::parse(text).unwrap().l4;
        assert!(uses(&config, Forwarding::Nat) && uses(&config, Forwarding::Dnat));
        assert!(!uses(&config, Forwarding::L7));
    }
}
