//! The benchmarks: `cargo xtask bench`.
//!
//! Everything runs on this machine, in a lab. Rounds of what is compared are interleaved, so that a
//! machine that slows down slows all alike; each figure is the median of the rounds with the least
//! and the greatest beside it. Loops are bounded, and no figure is judged here.

#![forbid(unsafe_code)]

mod l4;
mod l7;
mod path;
mod report;
mod routes;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use crate::report::Report;

#[derive(Parser)]
#[command(name = "bench", about = "Measure the gateway")]
struct Cli {
    /// What to measure; without a name, everything
    which: Option<Bench>,
    /// Of l4, only the rows whose names begin so
    #[arg(default_value = "")]
    rows: String,
    /// One JSON object a line instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Bench {
    /// The packet program, in nanoseconds a packet
    L4,
    /// TCP through the gateway, beside nftables and plain routing
    Path,
    /// The proxy beside nginx and HAProxy
    L7,
    /// Registrations over NATS, and how soon they are served
    Routes,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let chosen = cli
        .which
        .map_or(Bench::value_variants().to_vec(), |bench| vec![bench]);
    for bench in chosen {
        let measured = match bench {
            Bench::L4 => l4::measure(&cli.rows),
            Bench::Path => path::measure(),
            Bench::L7 => l7::measure(),
            Bench::Routes => routes::measure(),
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
