//! What a process and all that it started have used.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::Context;

/// CPU time.
#[derive(Clone, Copy, Default)]
pub(crate) struct Usage {
    pub(crate) user: Duration,
    pub(crate) system: Duration,
}

impl Usage {
    pub(crate) fn since(self, before: Usage) -> Usage {
        Usage {
            user: self.user.saturating_sub(before.user),
            system: self.system.saturating_sub(before.system),
        }
    }

    pub(crate) fn total(self) -> Duration {
        self.user + self.system
    }
}

/// CPU time of a process and its descendants so far, in whole ticks of 10 ms.
///
/// proc_pid_stat(5), fields 14 and 15, in `sysconf(_SC_CLK_TCK)`.
pub(crate) fn cpu(pid: u32) -> anyhow::Result<Usage> {
    let mut usage = Usage::default();
    for pid in family(pid)? {
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue; // It has ended.
        };
        let fields = after_name(&stat).context("no name in /proc/PID/stat")?;
        let mut ticks = fields.split(' ').skip(11).map(str::parse::<u64>);
        let mut next = || ticks.next().context("/proc/PID/stat is short");
        usage.user += Duration::from_millis(next()?? * 10);
        usage.system += Duration::from_millis(next()?? * 10);
    }
    Ok(usage)
}

/// Resident memory of a process and its descendants, in KiB: proc_pid_status(5), `VmRSS`.
pub(crate) fn resident_kib(pid: u32) -> anyhow::Result<f64> {
    let mut sum = 0;
    for pid in family(pid)? {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next());
        sum += kib.map_or(Ok(0), str::parse::<u64>)?;
    }
    Ok(sum as f64)
}

/// A process and its descendants.
pub(crate) fn family(pid: u32) -> anyhow::Result<Vec<u32>> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").context("list processes")? {
        let name = entry?.file_name();
        let Some(child) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        let parent = after_name(&stat).and_then(|fields| fields.split(' ').nth(1));
        if let Some(parent) = parent.and_then(|parent| parent.parse().ok()) {
            children.entry(parent).or_default().push(child);
        }
    }
    let mut family = vec![pid];
    let mut next = 0;
    while let Some(parent) = family.get(next) {
        let born = children.remove(parent).unwrap_or_default();
        family.extend(born);
        next += 1;
    }
    Ok(family)
}

/// From the third field of /proc/PID/stat on: the second is a name in brackets, of any characters.
fn after_name(stat: &str) -> Option<&str> {
    Some(stat.rsplit_once(") ")?.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory_and_is_of_its_own_family() {
        let own = std::process::id();
        assert_eq!(family(own).unwrap()[0], own);
        assert!(resident_kib(own).unwrap() > 0.0);
        cpu(own).unwrap();
    }
}
