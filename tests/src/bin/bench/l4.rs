//! Layer 4: the packet program by itself, through veths, and what a change of the tables takes.
//!
//! [`packets`] has most rows; the prefix of a name chooses among all of them.

use crate::report::Report;

mod gateway;
mod packets;
mod restart;
mod tables;
mod veth;

/// Measures the rows whose names begin with `prefix`.
pub(crate) fn measure(prefix: &str) -> anyhow::Result<Report> {
    let mut report = Report::new("l4");
    tables::measure_memory(&mut report, prefix)?;
    packets::measure(&mut report, prefix)?;
    veth::measure(&mut report, prefix)?;
    tables::measure_changes(&mut report, prefix)?;
    restart::measure(&mut report, prefix)?;
    Ok(report)
}

/// Whether rows whose names begin with `group` may be among those that were asked for.
fn may_match(group: &str, prefix: &str) -> bool {
    group.starts_with(prefix) || prefix.starts_with(group)
}
