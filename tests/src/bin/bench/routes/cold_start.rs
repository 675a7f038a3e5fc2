//! Row `cold-start`: from the start of the process until all routes that were on disk are served, with
//! the NATS server away.

use std::time::{Duration, Instant};

use anyhow::bail;
use nix::sys::signal::Signal;
use router_tests::app::HTTP_PORT;
use router_tests::client::HttpClient;
use router_tests::process::DEADLINE;
use router_tests::site::PROXY;

use super::{Bench, host, register};
use crate::report::Report;

/// Starts, at most.
const STARTS: usize = 3;

impl Bench {
    /// Starts the gateway anew; nothing but this may follow.
    pub(super) fn cold_start(&mut self, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
        eprintln!("routes: table of {}, cold starts", self.table);
        self.restart()?;
        self.site.wait_until("/readyz")?;
        self.take_in((0..self.table).map(|n| register(&host(n), HTTP_PORT)))?;
        let last = host(self.table - 1);
        for round in 0..rounds.min(STARTS) {
            // A gateway that ends writes what it knows.
            self.site.gateway().signal(Signal::SIGTERM);
            self.site.gateway().wait()?;
            if round == 0 {
                self.site.nats = None;
            }
            let start = Instant::now();
            self.restart()?;
            while !self.is_served(&last) {
                self.site.gateway().ensure_alive()?;
                if start.elapsed() > 2 * DEADLINE {
                    bail!("the routes on disk were never served");
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            let seconds = start.elapsed().as_secs_f64();
            let row = self.row("cold-start");
            report.add(&row, "viaduct", "start_s", seconds);
            let rss = self.site.gateway().memory()? as f64;
            report.add(&row, "viaduct", "rss_mib", rss / f64::from(1 << 20));
        }
        Ok(())
    }

    fn restart(&mut self) -> anyhow::Result<()> {
        let directory = self.site.lab.folder().join("state");
        self.site.gateway = None;
        self.site.spawn_gateway(|config| {
            config.l4.limits.vips = 1024;
            config.nats.stale_threshold = Duration::from_secs(3600);
            config.state.directory = Some(directory);
            // Written at the end alone.
            config.state.interval = Duration::from_secs(3600);
        })
    }

    fn is_served(&self, host: &str) -> bool {
        let served = || Some(HttpClient::connect(PROXY).ok()?.get(host, "/").ok()?.status == 200);
        self.site.lab.client.run(served).unwrap_or_default()
    }
}
