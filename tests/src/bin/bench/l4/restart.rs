//! What an established flow notices of an agent that is killed and started again.
//!
//! A client in the lab sends a datagram every millisecond to the echo VIP, which one instance serves,
//! and keeps a TCP connection busy beside it. SIGKILL ends the agent; the next one is started at once
//! and waited for.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use router_tests::client::{self, TcpClient};
use router_tests::site::{ECHO_VIP, Site};

use crate::report::Report;

const ROUNDS: usize = 3;
const PACE: Duration = Duration::from_millis(1);
/// After the last datagram, before what has not come back counts as lost.
const PATIENCE: Duration = Duration::from_millis(500);
const ROW: &str = "restart";

pub(super) fn measure(report: &mut Report, prefix: &str) -> anyhow::Result<()> {
    if !ROW.starts_with(prefix) {
        return Ok(());
    }
    let mut site = Site::running(1)?;
    for round in 1..=ROUNDS {
        eprintln!("l4: round {round} of {ROUNDS}, restart");
        let over = Arc::new(AtomicBool::new(false));
        let [of_datagrams, of_segments] = [Arc::clone(&over), Arc::clone(&over)];
        let (socket, connection) = site.lab.client.run(established)?;
        let datagrams = thread::spawn(move || datagrams(&socket, &of_datagrams));
        let segments = thread::spawn(move || segments(connection, &of_segments));
        site.gateway().kill();
        let restarted = site.start_gateway(|_| ());
        over.store(true, Ordering::Relaxed);
        let (sent, returned) = joined(datagrams)?;
        let longest = joined(segments)?;
        restarted?;
        for (metric, sample) in [
            ("datagrams", f64::from(sent)),
            ("lost_datagrams", f64::from(sent - returned)),
            ("longest_tcp_round_trip_ms", longest.as_secs_f64() * 1e3),
        ] {
            report.add(ROW, "viaduct", metric, sample);
        }
    }
    Ok(())
}

/// Two flows that have been answered.
fn established() -> anyhow::Result<(UdpSocket, TcpClient)> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(ECHO_VIP)?;
    socket.set_read_timeout(Some(client::TIMEOUT))?;
    client::udp_on(&socket)?;
    Ok((socket, client::tcp(ECHO_VIP)?))
}

/// Datagrams sent and returned.
fn datagrams(socket: &UdpSocket, over: &AtomicBool) -> anyhow::Result<(u32, u32)> {
    let receiver = socket.try_clone()?;
    receiver.set_read_timeout(Some(PATIENCE))?;
    let returned = thread::spawn(move || {
        let mut answer = [0; 512];
        let mut returned = 0;
        while receiver.recv(&mut answer).is_ok() {
            returned += 1;
        }
        returned
    });
    let mut sent = 0;
    while !over.load(Ordering::Relaxed) {
        socket.send(b"who").context("send a datagram")?;
        sent += 1;
        thread::sleep(PACE);
    }
    let returned = returned.join().ok().context("the receiver panicked")?;
    Ok((sent, returned))
}

/// The longest that one octet took to come back.
fn segments(mut connection: TcpClient, over: &AtomicBool) -> anyhow::Result<Duration> {
    let mut longest = Duration::ZERO;
    while !over.load(Ordering::Relaxed) {
        let start = Instant::now();
        ensure!(connection.echo(b"x")? == b"x", "the echo differs");
        longest = longest.max(start.elapsed());
        thread::sleep(PACE);
    }
    Ok(longest)
}

fn joined<T>(thread: JoinHandle<anyhow::Result<T>>) -> anyhow::Result<T> {
    thread.join().ok().context("a client panicked")?
}
