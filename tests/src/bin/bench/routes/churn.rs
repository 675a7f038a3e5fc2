//! Row `churn`: what requests notice of 10,000 changes of routes a second.

use std::sync::Arc;

use anyhow::ensure;
use router_tests::site::PROXY;

use super::stream::{BATCH_EVERY, Stream};
use super::{Bench, change, encoded, host};
use crate::l7::client::{self, Measured, Target};
use crate::report::Report;

/// An instance that comes to a route, and one that leaves it, are two.
const CHANGES_PER_S: usize = 10_000;
const REQUESTS_PER_S: f64 = 2000.0;

impl Bench {
    /// Requests for routes that stay, without and with changes of others, in turns that begin with
    /// either.
    pub(super) fn churn(&mut self, round: usize, report: &mut Report) -> anyhow::Result<()> {
        let batch = CHANGES_PER_S * usize::try_from(BATCH_EVERY.as_millis())? / 1000;
        // But of the first, which is what requests are for.
        let messages = (1..self.table.min(100_000)).map(|n| self.known(n));
        let messages = messages.flat_map(|host| change(&host));
        let batches = Arc::new(encoded(messages, batch));
        let mut p99 = [0.0; 2];
        let turns = match round % 2 {
            0 => [false, true],
            _ => [true, false],
        };
        for churns in turns {
            let stream = churns.then(|| Stream::start(&self.site.lab, Arc::clone(&batches)));
            let measured = self.site.lab.client.run(requests)?;
            if let Some(stream) = stream {
                stream?.stop()?;
            }
            ensure!(
                measured.errors == 0.0,
                "{} requests failed",
                measured.errors
            );
            let row = self.row(if churns { "churn" } else { "churn-quiet" });
            report.add(&row, "viaduct", "p50_us", measured.p50_us);
            report.add(&row, "viaduct", "p99_us", measured.p99_us);
            p99[usize::from(churns)] = measured.p99_us;
        }
        report.add(
            &self.row("churn"),
            "viaduct",
            "p99_of_quiet",
            p99[1] / p99[0],
        );
        Ok(())
    }
}

fn requests() -> anyhow::Result<Measured> {
    let target = Target {
        address: PROXY,
        tls: None,
        request: format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", host(0)).into_bytes(),
        fresh: false,
    };
    client::run(&target, Some(REQUESTS_PER_S))
}
