//! The gateway alone under all kinds of requests at a modest rate, while routes come and go: whether
//! its memory grows.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::ensure;
use router_tests::process::wait_for;

use crate::l7::backend::Backends;
use crate::l7::peers::{Peer, viaduct};
use crate::l7::rows::{Load, ROWS, Request, Row};
use crate::l7::site::Site;
use crate::l7::{load, usage};
use crate::report::Report;

/// Requests a second, and fewer of what is large.
const RATE: f64 = 500.0;
const RATE_OF_1M: f64 = 50.0;

/// Routes that are replaced by others with each pass over the rows.
const CHANGING_ROUTES: usize = 1000;

/// Memory is reported for so many equal parts of the time.
const PARTS: u32 = 6;

/// Runs for so many minutes.
///
/// # Errors
/// A part of the load could not be run at all; single requests that fail are counted.
pub(crate) fn measure(minutes: u32) -> anyhow::Result<Report> {
    ensure!(minutes > 0, "--minutes is at least 1");
    let part = Duration::from_secs(60 * u64::from(minutes)) / PARTS;
    let site = Site::new()?;
    let _backends = Backends::start(&site)?;
    let gateway = viaduct::start_mixed(&site, |front| Peer::Viaduct.address(front))?;
    for row in rows() {
        wait_for(row.name, || load::try_once(&site, row, address(row)).ok())?;
    }
    let mut report = Report::new("soak");
    let start = Instant::now();
    for pass in 0.. {
        let parts_over = start.elapsed().div_duration_f64(part) as u32;
        if parts_over >= PARTS {
            break;
        }
        let first = pass % 2 * CHANGING_ROUTES;
        viaduct::write_mixed_routes(&site, first..first + CHANGING_ROUTES)?;
        let (mut requests, mut errors) = (0.0, 0.0);
        for row in rows() {
            let (served, failed) = load::mixed(&site, row, address(row), rate(row))?;
            requests += served;
            errors += failed;
        }
        let name = format!("part-{}-of-{PARTS}", parts_over + 1);
        let rss = usage::resident_kib(gateway.id())? / 1024.0;
        report.add(&name, "viaduct", "rss_mib", rss);
        report.add(&name, "viaduct", "requests_per_pass", requests);
        report.add(&name, "viaduct", "errors_per_pass", errors);
        eprintln!("soak: {name}, {rss:.1} MiB");
    }
    Ok(report)
}

fn rows() -> impl Iterator<Item = &'static Row> {
    let is_mixed = |row: &&Row| !matches!(row.load, Load::Idle | Load::Routes) && !row.access_log;
    ROWS.iter().filter(is_mixed)
}

fn address(row: &Row) -> SocketAddr {
    Peer::Viaduct.address(row.front)
}

fn rate(row: &Row) -> f64 {
    match row.load {
        Load::KeepAlive(Request::Get1m) => RATE_OF_1M,
        _ => RATE,
    }
}
