//! Rows `storm`: every backend of the table registers again every 20 seconds, as gorouter asks of them,
//! evenly spread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use router_tests::app::HTTP_PORT;

use super::stream::{BATCH_EVERY, Stream};
use super::{Bench, encoded, register};
use crate::report::Report;

/// gorouter's `minimum_register_interval_in_seconds`.
const INTERVAL: Duration = Duration::from_secs(20);

/// How long the storm alone is measured in each round.
const MEASURED: Duration = Duration::from_secs(5);

impl Bench {
    pub(super) fn storm(&mut self, chosen: &[&str], report: &mut Report) -> anyhow::Result<()> {
        let batches = INTERVAL.as_millis() / BATCH_EVERY.as_millis();
        let batch = self.table.div_ceil(usize::try_from(batches)?);
        let messages = (0..self.table).map(|n| register(&self.known(n), HTTP_PORT));
        let storm = Stream::start(&self.site.lab, Arc::new(encoded(messages, batch)))?;
        if chosen.contains(&"storm") {
            // The first batches find caches cold.
            std::thread::sleep(Duration::from_secs(1));
            let registers = self.registers()?;
            let (cpu, start) = (self.cpu_time()?, Instant::now());
            std::thread::sleep(MEASURED);
            let (elapsed, cpu) = (start.elapsed(), self.cpu_time()? - cpu);
            let refreshes = (self.registers()? - registers) as f64;
            let row = self.row("storm");
            let share = cpu.as_secs_f64() / elapsed.as_secs_f64();
            let per_s = refreshes / elapsed.as_secs_f64();
            let cpu_us = cpu.as_secs_f64() * 1e6 / refreshes;
            report.add(&row, "viaduct", "share_of_core", share);
            report.add(&row, "viaduct", "refreshes_per_s", per_s);
            report.add(&row, "viaduct", "cpu_us_per_refresh", cpu_us);
        }
        if chosen.iter().any(|kind| kind.starts_with("storm-first")) {
            self.first_service("storm-first", report)?;
        }
        storm.stop()?;
        Ok(())
    }

    /// Messages `router.register` that the gateway has read.
    fn registers(&self) -> anyhow::Result<u64> {
        let stats: serde_json::Value = serde_json::from_str(&self.site.admin("/v1/stats")?.body)?;
        Ok(stats["nats"]["registers"].as_u64().unwrap_or_default())
    }
}
