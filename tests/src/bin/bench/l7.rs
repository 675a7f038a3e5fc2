//! The proxy beside its peers: same client, same backend, one thread each, one core for each proxy.
//!
//! CPU time per request is the figure to compare. It is measured while a client asks as often as it
//! is answered; then the same client asks half as often, and latencies are of that. `direct` is the
//! client at the backend without a proxy: what it reaches is what a proxy could reach at most. All
//! share one namespace and talk by its loopback, so that the cost of a network is not measured.
//!
//! Rounds of a row take the contenders in turns. A contender that cannot do a row, or that fails in
//! it, is left out of the row with a line that says why.

mod backend;
pub(crate) mod client;
mod h2load;
mod idle;
mod load;
mod peers;
mod rows;
mod site;
pub(crate) mod soak;
mod syscalls;
mod tunnel;
mod usage;
mod wrk;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use router_tests::process::wait_for;

use self::backend::Backends;
use self::load::Figures;
use self::peers::{Contender, Peer};
use self::rows::{Load, ROWS, Row};
use self::site::Site;
use crate::report::Report;

pub(crate) use self::backend::nginx_config;
pub(crate) use self::wrk::wrk;

const ROUNDS: usize = 7;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Of l7 and routes: rounds of each row
    #[arg(long)]
    pub(crate) rounds: Option<usize>,
    /// Of l7 and routes: only these rows
    #[arg(long = "rows", value_delimiter = ',')]
    pub(crate) names: Vec<String>,
    /// Of l7: only these contenders
    #[arg(long, value_delimiter = ',')]
    peers: Vec<Peer>,
    /// Of l7: count system calls as well
    #[arg(long)]
    syscalls: bool,
}

pub(crate) fn measure(options: &Options) -> anyhow::Result<Report> {
    let rounds = options.rounds.unwrap_or(ROUNDS);
    ensure!(rounds > 0, "--rounds is at least 1");
    let rows = chosen_rows(&options.names)?;
    let peers = chosen_peers(&options.peers);
    let site = Site::new()?;
    let _backends = Backends::start(&site)?;
    let mut report = Report::beside("l7", peers::PROXIES);
    for row in rows {
        let mut contenders = Vec::new();
        for peer in peers.iter().filter(|peer| peer.is_of(&row)) {
            match start(*peer, &site, &row) {
                Ok(contender) => contenders.push(contender),
                Err(error) => leave_out(*peer, &row, &error),
            }
        }
        run(
            &site,
            &row,
            contenders,
            (rounds, options.syscalls),
            &mut report,
        );
    }
    Ok(report)
}

/// Rounds of one row.
fn run(
    site: &Site,
    row: &Row,
    mut contenders: Vec<Contender>,
    (rounds, syscalls): (usize, bool),
    report: &mut Report,
) {
    for round in 0..rounds {
        let mut next = Vec::with_capacity(contenders.len());
        for contender in contenders {
            let peer = contender.peer;
            eprintln!(
                "l7: round {} of {}, {}, {}",
                round + 1,
                rounds,
                row.name,
                peer.name()
            );
            match one_round(site, row, contender, syscalls) {
                Ok((contender, figures)) => {
                    for (metric, sample) in figures {
                        report.add(row.name, peer.name(), metric, sample);
                    }
                    next.push(contender);
                }
                Err(error) => leave_out(peer, row, &error),
            }
        }
        // Nobody is always the one that follows another.
        if !next.is_empty() {
            next.rotate_left(1);
        }
        contenders = next;
    }
}

fn one_round(
    site: &Site,
    row: &Row,
    mut contender: Contender,
    syscalls: bool,
) -> anyhow::Result<(Contender, Figures)> {
    if row.load == Load::Idle {
        // What connections once took is not always given back.
        let peer = contender.peer;
        drop(contender);
        contender = start(peer, site, row)?;
    }
    let figures = load::measure(site, row, &contender, syscalls)?;
    Ok((contender, figures))
}

/// Starts a contender, and waits until it serves the row's requests.
fn start(peer: Peer, site: &Site, row: &Row) -> anyhow::Result<Contender> {
    if !peer.is_installed() {
        bail!("it is not installed");
    }
    let mut contender = peer.start(site, row)?;
    let mut last = None;
    let served = wait_for("the first answer", || {
        if let Some(Err(error)) = contender.process.as_mut().map(|p| p.ensure_alive()) {
            return Some(Err(error));
        }
        match load::try_once(site, row, contender.address) {
            Ok(()) => Some(Ok(())),
            Err(error) => {
                last = Some(error);
                None
            }
        }
    });
    match (served, last) {
        (Ok(alive), _) => alive?,
        (Err(late), Some(error)) => return Err(error.context(late.to_string())),
        (Err(late), None) => return Err(late),
    }
    Ok(contender)
}

fn leave_out(peer: Peer, row: &Row, error: &anyhow::Error) {
    // One line, whatever a server printed.
    let reason = format!("{error:#}");
    let reason: Vec<&str> = reason.split_whitespace().collect();
    eprintln!(
        "l7: {}, {} is left out: {}",
        row.name,
        peer.name(),
        reason.join(" ")
    );
}

fn chosen_rows(names: &[String]) -> anyhow::Result<Vec<Row>> {
    let find = |name: &String| {
        let row = ROWS.iter().find(|row| row.name == name).copied();
        row.with_context(|| {
            let names: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
            format!("no row {name}; there are {}", names.join(", "))
        })
    };
    if names.is_empty() {
        return Ok(ROWS.to_vec());
    }
    names.iter().map(find).collect()
}

fn chosen_peers(peers: &[Peer]) -> Vec<Peer> {
    if peers.is_empty() {
        return Peer::value_variants().to_vec();
    }
    peers.to_vec()
}
