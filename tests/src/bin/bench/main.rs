//! The benchmarks: `cargo xtask bench`.
//!
//! Everything runs on this machine, in a lab. Rounds of what is compared are interleaved, so that a
//! machine that slows down slows all alike; each figure is the median of the rounds with the least
//! and the greatest beside it. Loops are bounded, and no figure is judged here.

#![forbid(unsafe_code)]

mod harness;
mod ipvs;
mod l4;
mod l7;
mod local;
mod path;
mod report;
mod routes;
mod stream;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use crate::report::Report;

/// The gateway's own, for what is measured in this process.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
#[command(name = "bench", about = "Measure the gateway")]
struct Cli {
    /// What to measure; without a name, everything but soak and ipvs
    which: Option<Bench>,
    /// Of l4, only the rows whose names begin so
    #[arg(default_value = "")]
    prefix: String,
    /// One JSON object a line instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    l7: l7::Options,
    /// Of soak: how long
    #[arg(long, default_value_t = 60)]
    minutes: u32,
}

#[derive(Clone, Copy, ValueEnum)]
enum Bench {
    /// The packet program, in nanoseconds a packet
    L4,
    /// TCP through the gateway, beside nftables and plain routing
    Path,
    /// The proxy beside nginx, HAProxy, Envoy, Sozu and Pingora
    L7,
    /// Clients on the gateway's own host, which dial a VIP, beside dialing its backend
    Local,
    /// Registrations over NATS, and how soon they are served
    Routes,
    /// The proxy's memory under all kinds of requests, for --minutes
    Soak,
    /// The gateway beside IPVS, in the machine of `cargo xtask bench ipvs`
    Ipvs,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let all = vec![
        Bench::L4,
        Bench::Path,
        Bench::L7,
        Bench::Local,
        Bench::Routes,
    ];
    let chosen = cli.which.map_or(all, |bench| vec![bench]);
    for bench in chosen {
        let measured = match bench {
            Bench::L4 => l4::measure(&cli.prefix),
            Bench::Path => path::measure(),
            Bench::L7 => l7::measure(&cli.l7),
            Bench::Local => local::measure(),
            Bench::Routes => routes::measure(&cli.l7.names, cli.l7.rounds),
            Bench::Soak => l7::soak::measure(cli.minutes),
            Bench::Ipvs => ipvs::measure(),
        };
        match measured {
            Ok(report) => print(&report, cli.json),
            Err(error) => {
                eprintln!("bench: {error:#}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn print(report: &Report, json: bool) {
    if json {
        print!("{}", report.json())
    } else {
        println!("{}", report.table())
    }
}
