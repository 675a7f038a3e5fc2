//! Live events: sampled packets, handed from the programs' ring buffer to whoever watches.
//!
//! One thread sleeps until the programs report something and passes it to every [`Watcher`] by a
//! broadcast channel of [`BACKLOG`] events. A watcher that is too slow loses the oldest and is told
//! how many. The agent has the programs sample what the watchers [want](Tap::wanted), about once a
//! second, and nothing while there is none. What the programs find no room for in their ring is lost
//! and counted.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Instant, SystemTime};

use anyhow::Context;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rand::Rng;
use router_common::{
    IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP, NO_BACKEND, PacketEvent, Verdict,
};
use serde::Serialize;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

use crate::config::PortRange;
use crate::l4::datapath::{Events, MonotonicClock};
use crate::l4::stats::{Backends, L4Reader, Shared, Views};
use crate::route::{Proto, Vip};

/// Watchers at once.
pub const MAX_WATCHERS: usize = 16;
/// Events that wait for a slow watcher.
pub const BACKLOG: usize = 4096;
/// Events that a watcher gets at a time, if there are as many.
const BATCH: usize = 256;

/// Where watchers come and go.
pub(super) struct Tap {
    sender: broadcast::Sender<PacketEvent>,
    /// One packet in how many each watcher wants.
    wants: Mutex<Wants>,
    lost: AtomicU64,
    clock: MonotonicClock,
}

#[derive(Default)]
struct Wants {
    next_id: u64,
    samples: BTreeMap<u64, u32>,
}

impl Tap {
    /// Starts the thread that reads the programs' reports; it ends with the process.
    pub(super) fn start(events: Events, clock: MonotonicClock) -> anyhow::Result<Tap> {
        let (sender, _) = broadcast::channel(BACKLOG);
        let reports = sender.clone();
        thread::Builder::new()
            .name("l4-events".to_owned())
            .spawn(move || {
                if let Err(error) = pass_on(events, &reports) {
                    tracing::error!(%error, "wait for sampled packets: watchers see none");
                }
            })
            .context("start the thread that reads sampled packets")?;
        Ok(Tap {
            sender,
            wants: Mutex::default(),
            lost: AtomicU64::new(0),
            clock,
        })
    }

    /// One packet in how many is to be reported; 0: none.
    pub(super) fn wanted(&self) -> u32 {
        self.lock().finest()
    }

    /// Events that watchers were too slow for.
    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Wants> {
        self.wants
            .lock()
            .expect("nothing panics while it holds this")
    }
}

fn pass_on(mut events: Events, watchers: &broadcast::Sender<PacketEvent>) -> nix::Result<()> {
    loop {
        let mut readable = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        match poll(&mut readable, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        for event in events.by_ref() {
            // Where nobody watches any more, the programs are about to stop.
            let _ = watchers.send(event);
        }
    }
}

impl Wants {
    fn finest(&self) -> u32 {
        self.samples.values().copied().min().unwrap_or(0)
    }
}

/// Which packets to show.
#[derive(Clone, Copy, Debug)]
pub struct WatchFilter {
    /// One in so many, at least 1.
    pub sample: u32,
    pub vip: Option<Vip>,
}

/// Someone who is shown sampled packets. Dropping it ends the sampling on its account.
pub struct Watcher {
    id: u64,
    filter: WatchFilter,
    shared: Arc<Shared>,
    events: broadcast::Receiver<PacketEvent>,
    /// Of `vips`, which is what was published when they were made.
    backends: Backends,
    vips: Arc<Views>,
}

/// What a watcher gets.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Sight {
    Packet(PacketRow),
    Lost {
        /// Events it was too slow for.
        lost: u64,
    },
}

/// A packet that was sampled.
#[derive(Debug, Serialize)]
pub struct PacketRow {
    /// Seconds since 1970-01-01 UTC.
    pub time: f64,
    pub verdict: &'static str,
    pub proto: &'static str,
    /// Who sent it; of an answer, whom it went to.
    pub client: SocketAddr,
    /// What the client sent it to; null for an answer.
    pub dialed: Option<SocketAddr>,
    pub vip: Option<String>,
    pub backend: Option<SocketAddr>,
    /// Of the Ethernet frame without checksum.
    pub bytes: u32,
}

impl L4Reader {
    /// `None`: there are [`MAX_WATCHERS`].
    pub fn watch(&self, filter: WatchFilter) -> Option<Watcher> {
        let tap = &self.shared.tap;
        let events = tap.sender.subscribe();
        let mut wants = tap.lock();
        if wants.samples.len() >= MAX_WATCHERS {
            return None;
        }
        let id = wants.next_id;
        wants.next_id += 1;
        wants.samples.insert(id, filter.sample.max(1));
        let vips = self.shared.vips.load_full();
        Some(Watcher {
            id,
            filter,
            shared: Arc::clone(&self.shared),
            events,
            backends: Backends::of(&vips),
            vips,
        })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.tap.lock().samples.remove(&self.id);
    }
}

impl Watcher {
    /// The next packets, at least one. `None`: there are no more.
    pub async fn next(&mut self) -> Option<Vec<Sight>> {
        let mut sights = Vec::new();
        while sights.is_empty() {
            match self.events.recv().await {
                Ok(event) => sights.extend(self.see(&event)),
                Err(RecvError::Lagged(lost)) => sights.push(self.lose(lost)),
                Err(RecvError::Closed) => return None,
            }
        }
        while sights.len() < BATCH {
            match self.events.try_recv() {
                Ok(event) => sights.extend(self.see(&event)),
                Err(TryRecvError::Lagged(lost)) => sights.push(self.lose(lost)),
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            }
        }
        Some(sights)
    }

    fn lose(&self, lost: u64) -> Sight {
        self.shared.tap.lost.fetch_add(lost, Ordering::Relaxed);
        Sight::Lost { lost }
    }

    fn see(&mut self, event: &PacketEvent) -> Option<Sight> {
        // The programs report as many as the most curious watcher wants.
        let finest = self.shared.tap.wanted().max(1);
        let sample = self.filter.sample.max(1);
        if sample > finest && !rand::rng().random_ratio(finest, sample) {
            return None;
        }
        let vips = self.shared.vips.load_full();
        if !Arc::ptr_eq(&vips, &self.vips) {
            self.backends = Backends::of(&vips);
            self.vips = vips;
        }
        let row = row(event, &self.vips, &self.backends, self.filter.vip)?;
        let time = wall_clock(self.shared.tap.clock.instant_of(event.monotonic_ns));
        Some(Sight::Packet(PacketRow { time, ..row }))
    }
}

/// All of a packet but its time; `None` if it is not for `only`.
fn row(
    event: &PacketEvent,
    vips: &Views,
    backends: &Backends,
    only: Option<Vip>,
) -> Option<PacketRow> {
    let verdict = Verdict::ALL.get(event.verdict as usize)?;
    let is_answer = *verdict == Verdict::Replied;
    let source = SocketAddr::new(event.source.ip(), event.source_port);
    let destination = SocketAddr::new(event.destination.ip(), event.destination_port);
    let serves = match event.backend {
        NO_BACKEND => None,
        id => backends.get(id),
    };
    let vip = match serves {
        Some(serves) => Some(serves.vip),
        None => vip_of(vips, event.proto, destination),
    };
    if only.is_some() && only != vip {
        return None;
    }
    Some(PacketRow {
        time: 0.0,
        verdict: verdict.name(),
        proto: match event.proto {
            IPPROTO_TCP => "tcp",
            IPPROTO_UDP => "udp",
            IPPROTO_ICMP | IPPROTO_ICMPV6 => "icmp",
            _ => "other",
        },
        client: if is_answer { destination } else { source },
        dialed: (!is_answer).then_some(destination),
        vip: vip.map(|vip| vip.to_string()),
        backend: serves.map(|serves| serves.address),
        bytes: event.len,
    })
}

/// The VIP that covers an address.
fn vip_of(vips: &Views, proto: u8, destination: SocketAddr) -> Option<Vip> {
    let proto = match proto {
        IPPROTO_TCP => Proto::Tcp,
        IPPROTO_UDP => Proto::Udp,
        _ => return None,
    };
    let exact = Vip::new(proto, destination);
    if vips.contains_key(&exact) {
        return Some(exact);
    }
    let lowest = Vip {
        ports: PortRange { first: 0, last: 0 },
        ..exact
    };
    let of_address = vips
        .range(lowest..)
        .map(|(vip, _)| *vip)
        .take_while(|vip| vip.proto == proto && vip.address == exact.address);
    let covers = |vip: &Vip| (vip.ports.first..=vip.ports.last).contains(&destination.port());
    of_address.into_iter().find(covers)
}

fn wall_clock(then: Instant) -> f64 {
    let now = SystemTime::now();
    let then = now - Instant::now().saturating_duration_since(then);
    let since = then.duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use router_common::Addr;

    use super::*;
    use crate::l4::stats::{MemberState, MemberView, VipView};

    fn vips() -> Views {
        let member = MemberView {
            address: "10.0.0.11:8080".parse().unwrap(),
            id: Some(5),
            generation: 1,
            state: MemberState::Active,
            weight: 100,
        };
        let view = VipView {
            members: vec![member],
            ..VipView::default()
        };
        let none = VipView::default();
        [
            ("tcp/192.0.2.10:9090", view),
            ("tcp/192.0.2.10:5000-5999", none.clone()),
            ("udp/192.0.2.11:*", none),
        ]
        .into_iter()
        .map(|(vip, view)| (vip.parse().unwrap(), Arc::new(view)))
        .collect()
    }

    fn packet(verdict: Verdict, source: &str, destination: &str) -> PacketEvent {
        let (source, destination): (SocketAddr, SocketAddr) =
            (source.parse().unwrap(), destination.parse().unwrap());
        let addr = |ip: IpAddr| Addr::from(ip);
        PacketEvent {
            source: addr(source.ip()),
            destination: addr(destination.ip()),
            source_port: source.port(),
            destination_port: destination.port(),
            verdict: verdict as u32,
            proto: IPPROTO_TCP,
            len: 60,
            ..PacketEvent::default()
        }
    }

    #[test]
    fn a_packet_to_a_backend_is_told_with_its_vip() {
        let vips = vips();
        let backends = Backends::of(&vips);
        let mut event = packet(Verdict::NewFlow, "198.51.100.7:40000", "192.0.2.10:9090");
        event.backend = 5;
        let row = row(&event, &vips, &backends, None).unwrap();
        assert_eq!(row.verdict, "new_flow");
        assert_eq!(row.client.to_string(), "198.51.100.7:40000");
        assert_eq!(row.dialed.unwrap().to_string(), "192.0.2.10:9090");
        assert_eq!(row.vip.as_deref(), Some("tcp/192.0.2.10:9090"));
        assert_eq!(row.backend.unwrap().to_string(), "10.0.0.11:8080");
    }

    #[test]
    fn an_answer_is_told_by_whom_it_went_to() {
        let vips = vips();
        let mut event = packet(Verdict::Replied, "10.0.0.11:8080", "198.51.100.7:40000");
        event.backend = 5;
        let row = row(&event, &vips, &Backends::of(&vips), None).unwrap();
        assert_eq!(row.client.to_string(), "198.51.100.7:40000");
        assert_eq!((row.dialed, row.vip.is_some()), (None, true));
    }

    #[test]
    fn what_reached_no_backend_is_told_with_the_vip_it_was_for() {
        let vips = vips();
        let backends = Backends::of(&vips);
        let vip = |destination: &str, only: Option<&str>| {
            let event = packet(Verdict::NoBackend, "198.51.100.7:40000", destination);
            let only = only.map(|vip| vip.parse().unwrap());
            row(&event, &vips, &backends, only).map(|row| row.vip.unwrap_or_default())
        };
        let range = "tcp/192.0.2.10:5000-5999";
        assert_eq!(vip("192.0.2.10:5500", None).as_deref(), Some(range));
        assert_eq!(vip("192.0.2.10:6000", None).as_deref(), Some(""));
        assert_eq!(vip("192.0.2.10:5500", Some(range)).as_deref(), Some(range));
        assert_eq!(vip("192.0.2.10:9090", Some(range)), None);
    }

    #[test]
    fn the_programs_sample_for_the_most_curious_watcher() {
        let mut wants = Wants::default();
        assert_eq!(wants.finest(), 0);
        wants.samples.extend([(1, 100), (2, 10)]);
        assert_eq!(wants.finest(), 10);
        wants.samples.remove(&2);
        assert_eq!(wants.finest(), 100);
    }
}
