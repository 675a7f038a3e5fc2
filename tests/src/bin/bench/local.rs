//! Clients on the gateway's own host: dialing a VIP beside dialing its one backend.
//!
//! Both go to the same instance by the same wires, so what differs is what the programs of the cgroup
//! cost: on connections nothing after connect(), on datagrams a look at each that names its address.
//! The two take turns within a round, some milliseconds each.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use router_tests::app::ECHO_PORT;
use router_tests::cgroup::Cgroup;
use router_tests::client;
use router_tests::site::{ECHO_VIP, Site};
use viaduct::config::LocalClients;

use crate::report::Report;

const ROUNDS: usize = 9;
/// Of each contender, in a round.
const TURNS: u32 = 40;

/// Makes some exchanges with an address.
type Turn = Box<dyn FnMut() -> anyhow::Result<()>>;

/// Name of the row, how many exchanges a turn makes, and what makes them.
type Row = (&'static str, u32, fn(SocketAddr) -> anyhow::Result<Turn>);

const ROWS: [Row; 4] = [
    ("tcp-keepalive", 100, keep_alive),
    ("tcp-connect", 25, connect),
    ("udp-connected", 100, connected),
    ("udp-unconnected", 100, unconnected),
];

pub(crate) fn measure() -> anyhow::Result<Report> {
    let cgroup = Cgroup::create()?;
    let site = Site::running_with(1, |config| {
        config.l4.local_clients = LocalClients::Cgroup(cgroup.path().to_owned());
    })?;
    let backend = SocketAddr::from((site.lab.backend_address(0), ECHO_PORT));
    cgroup.enter()?;
    let measured = site.lab.gateway.run(|| {
        let mut report = Report::new("local");
        for round in 0..ROUNDS {
            for (row, exchanges, turn) in ROWS {
                eprintln!("local: round {} of {ROUNDS}, {row}", round + 1);
                let mut contenders = [
                    ("viaduct", turn(ECHO_VIP)?, Duration::ZERO),
                    ("direct", turn(backend)?, Duration::ZERO),
                ];
                for _ in 0..TURNS {
                    for (who, turn, spent) in &mut contenders {
                        let begun = Instant::now();
                        for _ in 0..exchanges {
                            turn().with_context(|| format!("{row}, {who}"))?;
                        }
                        *spent += begun.elapsed();
                    }
                }
                for (who, _, spent) in &contenders {
                    let sample = spent.as_secs_f64() * 1e6 / f64::from(TURNS * exchanges);
                    report.add(row, who, "us_per_exchange", sample);
                }
            }
        }
        Ok(report)
    });
    cgroup.leave()?;
    measured
}

/// Four octets there and back on one connection.
fn keep_alive(address: SocketAddr) -> anyhow::Result<Turn> {
    let mut connection = client::tcp(address)?;
    Ok(Box::new(move || {
        ensure!(connection.echo(b"ping")? == b"ping", "the echo differs");
        Ok(())
    }))
}

/// A connection of its own, with the application's greeting.
fn connect(address: SocketAddr) -> anyhow::Result<Turn> {
    Ok(Box::new(move || client::tcp(address).map(drop)))
}

fn connected(address: SocketAddr) -> anyhow::Result<Turn> {
    let socket = socket()?;
    socket.connect(address)?;
    Ok(Box::new(move || client::udp_on(&socket).map(drop)))
}

/// Each datagram names its address, and each answer tells whom it is from.
fn unconnected(address: SocketAddr) -> anyhow::Result<Turn> {
    let socket = socket()?;
    Ok(Box::new(move || {
        socket.send_to(b"who", address)?;
        let (_, from) = socket.recv_from(&mut [0; 512])?;
        ensure!(from == address, "{address} answered as {from}");
        Ok(())
    }))
}

fn socket() -> anyhow::Result<UdpSocket> {
    let socket = UdpSocket::bind("0.0.0.0:0").context("bind")?;
    socket.set_read_timeout(Some(client::TIMEOUT))?;
    Ok(socket)
}
