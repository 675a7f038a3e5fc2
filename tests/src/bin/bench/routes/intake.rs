//! Rows `fill`, `rss`, `heartbeat`, `change` and `intake`: as many messages as the gateway takes in.

use router_tests::app::HTTP_PORT;

use super::{Bench, change, host, register};
use crate::report::Report;

/// Messages of one round of heartbeats and changes.
const MESSAGES: usize = 200_000;
/// New routes of one round, beside the table.
const NEW: usize = 20_000;
/// Smaller tables are filled too quickly, and are too small, to be measured by that.
const SMALLEST_FILL: usize = 10_000;

impl Bench {
    /// Registers the routes of the table.
    pub(super) fn fill(&mut self, chosen: &[&str], report: &mut Report) -> anyhow::Result<()> {
        let before = self.site.gateway().memory()?;
        let table = self.table;
        let cost = self.take_in((0..table).map(|n| register(&host(n), HTTP_PORT)))?;
        let grown = self.site.gateway().memory()? - before;
        if table < SMALLEST_FILL {
            return Ok(());
        }
        if chosen.contains(&"fill") {
            cost.report(report, &self.row("fill"), table);
        }
        if chosen.contains(&"rss") {
            let bytes = grown as f64 / table as f64;
            report.add(&self.row("rss"), "viaduct", "bytes_per_route", bytes);
        }
        Ok(())
    }

    /// Repeats of what is known, instances that join a route and leave it, and new routes.
    pub(super) fn throughput(
        &mut self,
        chosen: &[&str],
        report: &mut Report,
    ) -> anyhow::Result<()> {
        if chosen.contains(&"heartbeat") {
            let hosts: Vec<String> = (0..MESSAGES).map(|n| self.known(n)).collect();
            let cost = self.take_in(hosts.iter().map(|host| register(host, HTTP_PORT)))?;
            cost.report(report, &self.row("heartbeat"), MESSAGES);
        }
        if chosen.contains(&"change") {
            let hosts: Vec<String> = (0..MESSAGES / 2).map(|n| self.known(n)).collect();
            let cost = self.take_in(hosts.iter().flat_map(|host| change(host)))?;
            cost.report(report, &self.row("change"), MESSAGES);
        }
        if chosen.contains(&"intake") {
            let new = |n| register(&format!("new-{n}.example.org"), HTTP_PORT);
            let cost = self.take_in((0..NEW).map(new))?;
            cost.report(report, &self.row("intake"), NEW);
            self.take_in((0..NEW).map(|n| ("router.unregister", new(n).1)))?;
        }
        Ok(())
    }
}
