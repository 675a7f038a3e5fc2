//! strace, which counts system calls.

use std::fs;
use std::process::Command;

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use router_tests::process::{Process, wait_for};

use crate::l7::site::Site;
use crate::l7::usage;

/// System calls of a process and its descendants while `f` runs. They take many times as long.
pub(crate) fn count<T>(
    site: &Site,
    pid: u32,
    f: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(f64, T)> {
    let summary = site.path("strace.summary");
    let family = usage::family(pid)?;
    let mut strace = Command::new("strace");
    strace.args(["-f", "-c", "-o"]).arg(&summary);
    for pid in &family {
        strace.arg("-p").arg(pid.to_string());
    }
    let _ = fs::remove_file(site.path("strace.log"));
    let mut strace = Process::start("strace", strace, site.folder())?;
    wait_for("strace to attach", || {
        let attached = strace.log().matches(" attached").count();
        (attached >= family.len()).then_some(())
    })?;
    let result = f()?;
    strace.signal(Signal::SIGINT);
    strace.wait()?;
    let text = fs::read_to_string(&summary).context("read the summary of strace")?;
    let calls = parse(&text).with_context(|| format!("unknown output of strace:\n{text}"))?;
    ensure!(calls > 0.0, "strace saw no system call");
    Ok((calls, result))
}

/// Share of time, seconds, microseconds a call, calls, perhaps errors, and the name.
fn parse(text: &str) -> Option<f64> {
    let total = text.lines().find(|line| line.ends_with(" total"))?;
    total.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_of_strace_is_read() {
        let text = "% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.600000           3    200000           sendto
 40.00    0.400000           2    200100       100 recvfrom
------ ----------- ----------- --------- --------- ----------------
100.00    1.000000           2    400100       100 total
";
        assert_eq!(parse(text), Some(400_100.0));
    }
}
