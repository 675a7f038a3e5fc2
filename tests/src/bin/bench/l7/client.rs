//! A client of HTTP/1.1 that asks at a fixed rate, or anew as soon as it is answered.
//!
//! At a fixed rate a request's time begins when it was due, not when a connection was free for it,
//! so that a proxy which stalls is charged for all that had to wait. One thread without a runtime:
//! timers of milliseconds would send in bursts.

mod connection;

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::prctl::set_timerslack;
use tokio_rustls::rustls::ClientConfig;

use self::connection::{Connection, Progress};
use crate::l7::rows::{BURST, CONNECTIONS};
use crate::report::percentile;

/// How long after the end of a burst its last answers may come.
const GRACE: Duration = Duration::from_secs(2);

/// Whom to ask for what.
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    pub(crate) tls: Option<Arc<ClientConfig>>,
    /// Head and body.
    pub(crate) request: Vec<u8>,
    /// A connection for each request.
    pub(crate) fresh: bool,
}

pub(crate) struct Measured {
    pub(crate) requests: f64,
    pub(crate) requests_per_s: f64,
    pub(crate) errors: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

/// Asks for as long as [`BURST`] on [`CONNECTIONS`] connections; with a rate, so many times a second.
///
/// # Errors
/// A first connection could not be made, or nothing was answered.
pub(crate) fn run(target: &Target, rate: Option<f64>) -> anyhow::Result<Measured> {
    set_timerslack(1).context("set the timer slack")?;
    let start = Instant::now();
    let mut burst = Burst {
        target,
        connections: Vec::new(),
        idle: (0..CONNECTIONS).collect(),
        due: start,
        interval: rate.map(|rate| Duration::from_secs_f64(1.0 / rate)),
        end: start + BURST,
        times: Vec::new(),
        errors: 0,
    };
    for _ in 0..CONNECTIONS {
        burst.connections.push(Connection::open(target)?);
    }
    burst.run()?;
    ensure!(!burst.times.is_empty(), "nothing was answered");
    let requests = burst.times.len() as f64;
    Ok(Measured {
        requests,
        requests_per_s: requests / start.elapsed().as_secs_f64(),
        errors: burst.errors as f64,
        p50_us: percentile(&mut burst.times, 0.50),
        p99_us: percentile(&mut burst.times, 0.99),
    })
}

/// One request.
///
/// # Errors
/// It was not answered with 200 within [`GRACE`].
pub(crate) fn once(target: &Target) -> anyhow::Result<()> {
    let mut connection = Connection::open(target)?;
    let socket = connection.socket().context("a new connection is open")?;
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(GRACE))?;
    match connection.advance(&target.request)? {
        Progress::Answered => Ok(()),
        Progress::Pending => bail!("no answer within {GRACE:?}"),
    }
}

struct Burst<'a> {
    target: &'a Target,
    connections: Vec<Connection>,
    /// Places of connections without a request.
    idle: Vec<usize>,
    /// When the next request ought to begin.
    due: Instant,
    /// Between two requests; without one, they begin as soon as they can.
    interval: Option<Duration>,
    end: Instant,
    /// Microseconds of each answer.
    times: Vec<f64>,
    errors: u64,
}

impl Burst<'_> {
    fn run(&mut self) -> anyhow::Result<()> {
        loop {
            self.begin_what_is_due();
            let left = (self.end + GRACE).saturating_duration_since(Instant::now());
            let over = self.due >= self.end && self.idle.len() == self.connections.len();
            if over || left.is_zero() {
                break;
            }
            let until_due = match self.interval {
                Some(_) if !self.idle.is_empty() && self.due < self.end => {
                    self.due.saturating_duration_since(Instant::now())
                }
                _ => left,
            };
            for place in self.wait(until_due.min(left))? {
                self.advance(place);
            }
        }
        // What was not answered by now is an error, as is what never began.
        self.errors += (self.connections.len() - self.idle.len()) as u64;
        if let Some(interval) = self.interval {
            let missed = self.end.saturating_duration_since(self.due);
            self.errors += (missed.as_secs_f64() / interval.as_secs_f64()) as u64;
        }
        Ok(())
    }

    fn begin_what_is_due(&mut self) {
        loop {
            let now = Instant::now();
            if self.interval.is_none() {
                self.due = now;
            }
            if self.due > now || self.due >= self.end {
                return;
            }
            // The one that has rested longest, so that all are used.
            if self.idle.is_empty() {
                return;
            }
            let place = self.idle.remove(0);
            let due = self.due;
            self.due += self.interval.unwrap_or_default();
            match self.connections[place].begin(self.target, due) {
                Ok(()) => self.advance(place),
                Err(_) => self.fail(place),
            }
        }
    }

    /// Reads and writes what can be on a connection with a request.
    fn advance(&mut self, place: usize) {
        let connection = &mut self.connections[place];
        match connection.advance(&self.target.request) {
            Ok(Progress::Pending) => {}
            Ok(Progress::Answered) => {
                self.times
                    .push(connection.begun.elapsed().as_secs_f64() * 1e6);
                if self.target.fresh {
                    connection.close();
                }
                self.idle.push(place);
            }
            Err(_) => self.fail(place),
        }
    }

    fn fail(&mut self, place: usize) {
        self.errors += 1;
        self.connections[place].close();
        self.idle.push(place);
    }

    /// Places of the connections that can go on, after `timeout` at the latest.
    fn wait(&self, timeout: Duration) -> anyhow::Result<Vec<usize>> {
        let mut places = Vec::with_capacity(CONNECTIONS);
        let mut sockets = Vec::with_capacity(CONNECTIONS);
        for (place, connection) in self.connections.iter().enumerate() {
            if self.idle.contains(&place) {
                continue;
            }
            if let Some(socket) = connection.socket() {
                let mut flags = PollFlags::POLLIN;
                flags.set(PollFlags::POLLOUT, connection.has_to_write());
                places.push(place);
                sockets.push(PollFd::new(socket.as_fd(), flags));
            }
        }
        ppoll(&mut sockets, Some(timeout.into()), None).context("wait for sockets")?;
        let ready = |socket: &PollFd| socket.revents().is_some_and(|flags| !flags.is_empty());
        let ready = places
            .into_iter()
            .zip(&sockets)
            .filter(|(_, socket)| ready(socket));
        Ok(ready.map(|(place, _)| place).collect())
    }
}
