//! Active health checks of the backends of the published snapshot.
//!
//! One task keeps a target for each backend address, probes it about every `[health].interval`, and
//! sends [`Event::Health`] on a flip. Probes are tasks of their own, at most `[health].concurrency`
//! at once; when that is too few for the interval, intervals stretch and nothing queues. It follows
//! the snapshot once a second and forgets what left it. Backends that only serve UDP are not
//! checked; those that speak TLS, or serve VIPs only, are checked by TCP connect whatever the kind of
//! check.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, header};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use rand::Rng;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::config::{Config, HealthCheck, HealthConfig};
use crate::event::Event;
use crate::health::state::State;
use crate::metrics::Metrics;
use crate::route::{Pool, Proto};
use crate::snapshot::{Published, Snapshot};

pub mod state;

/// Backends under check. Further ones count as healthy, and are counted.
pub const MAX_TARGETS: usize = 65_536;

const FOLLOW: Duration = Duration::from_secs(1);

/// Checks until the agent is gone.
pub async fn run(
    published: Published,
    inbox: mpsc::Sender<Event>,
    metrics: Arc<Metrics>,
    mut config: watch::Receiver<Arc<Config>>,
) {
    let health = config.borrow_and_update().health.clone();
    let mut checker = Checker {
        health,
        targets: HashMap::new(),
        due: BTreeSet::new(),
        probes: JoinSet::new(),
        generation: 0,
        revision: None,
        inbox,
        metrics,
    };
    let mut follow = tokio::time::interval(FOLLOW);
    while !checker.inbox.is_closed() {
        let next = checker.next_probe();
        // Every branch is cancel safe: what was not taken stays where it was.
        tokio::select! {
            () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                checker.probe_due(Instant::now());
            }
            Some(probed) = checker.probes.join_next() => {
                checker.probed(probed.expect("a probe does not panic")).await;
            }
            _ = follow.tick() => checker.follow(published.load_full()).await,
            changed = config.changed() => {
                if changed.is_err() {
                    return;
                }
                checker.health = config.borrow_and_update().health.clone();
                checker.revision = None;
            }
        }
    }
}

struct Checker {
    health: HealthConfig,
    targets: HashMap<SocketAddr, Target>,
    /// When each target that has no probe in flight is probed next.
    due: BTreeSet<(Instant, SocketAddr)>,
    probes: JoinSet<Probed>,
    /// Of the latest target.
    generation: u64,
    /// Of the snapshot that `targets` follow.
    revision: Option<u64>,
    inbox: mpsc::Sender<Event>,
    metrics: Arc<Metrics>,
}

#[derive(Clone, Copy)]
struct Target {
    /// Tells a target from an earlier one of the same address, whose probe may be in flight still.
    generation: u64,
    state: State,
    /// Whether an `http` check can be made of it.
    plain_http: bool,
}

/// The end of a probe.
struct Probed {
    address: SocketAddr,
    generation: u64,
    good: bool,
}

impl Checker {
    fn next_probe(&self) -> Option<Instant> {
        let (at, _) = self.due.first()?;
        (self.probes.len() < self.health.concurrency).then_some(*at)
    }

    fn probe_due(&mut self, now: Instant) {
        while self.next_probe().is_some_and(|at| at <= now) {
            let Some((_, address)) = self.due.pop_first() else {
                return;
            };
            let Some(target) = self.targets.get(&address) else {
                continue;
            };
            let path = (self.health.check == HealthCheck::Http && target.plain_http)
                .then(|| self.health.path.clone());
            let (timeout, generation) = (self.health.timeout, target.generation);
            self.probes.spawn(async move {
                let probe = async {
                    match path {
                        Some(path) => http_answers(address, &path).await,
                        None => TcpStream::connect(address).await.is_ok(),
                    }
                };
                Probed {
                    address,
                    generation,
                    good: tokio::time::timeout(timeout, probe).await.unwrap_or(false),
                }
            });
        }
    }

    async fn probed(&mut self, probed: Probed) {
        let Probed {
            address,
            generation,
            good,
        } = probed;
        let counter = if good {
            &self.metrics.probes_good
        } else {
            &self.metrics.probes_bad
        };
        counter.inc();
        let target = self.targets.get_mut(&address);
        let Some(target) = target.filter(|target| target.generation == generation) else {
            return;
        };
        let flipped = target
            .state
            .observe(good, self.health.rise, self.health.fall);
        let healthy = target.state.healthy();
        // A tenth to either side, so that targets that began together drift apart.
        let wait = self
            .health
            .interval
            .mul_f64(rand::rng().random_range(0.9..=1.1));
        self.due.insert((Instant::now() + wait, address));
        if flipped {
            let _ = self
                .inbox
                .send(Event::Health {
                    backend: address,
                    healthy,
                })
                .await;
        }
    }

    /// Brings the targets in line with a snapshot.
    async fn follow(&mut self, snapshot: Arc<Snapshot>) {
        if self.revision == Some(snapshot.revision) {
            return;
        }
        self.revision = Some(snapshot.revision);
        let wanted = match self.health.check {
            HealthCheck::None => HashMap::new(),
            HealthCheck::Tcp | HealthCheck::Http => {
                // A walk over all routes, which may be a million.
                let walk = tokio::task::spawn_blocking(move || backends(&snapshot));
                walk.await.expect("the walk does not panic")
            }
        };
        let gone: Vec<SocketAddr> = self
            .targets
            .keys()
            .filter(|address| !wanted.contains_key(address))
            .copied()
            .collect();
        for address in gone {
            let target = self.targets.remove(&address);
            if target.is_some_and(|target| !target.state.healthy()) {
                let _ = self
                    .inbox
                    .send(Event::Health {
                        backend: address,
                        healthy: true,
                    })
                    .await;
            }
        }
        self.due.retain(|(_, address)| wanted.contains_key(address));
        let mut unchecked = 0;
        for (address, plain_http) in wanted {
            if let Some(target) = self.targets.get_mut(&address) {
                target.plain_http = plain_http;
            } else if self.targets.len() < MAX_TARGETS {
                self.generation += 1;
                self.targets.insert(
                    address,
                    Target {
                        generation: self.generation,
                        state: State::default(),
                        plain_http,
                    },
                );
                let wait = self
                    .health
                    .interval
                    .mul_f64(rand::rng().random_range(0.0..1.0));
                self.due.insert((Instant::now() + wait, address));
            } else {
                unchecked += 1;
            }
        }
        self.metrics.health_targets.set(self.targets.len());
        self.metrics.health_unchecked.set(unchecked);
    }
}

/// Every backend that takes TCP connections, and whether it is known to speak HTTP in clear.
fn backends(snapshot: &Snapshot) -> HashMap<SocketAddr, bool> {
    let mut backends = HashMap::new();
    let mut add = |pool: &Pool, http: bool| {
        for backend in &pool.backends {
            *backends.entry(backend.address).or_insert(false) |= http && backend.tls.is_none();
        }
    };
    for (_, routes) in snapshot.hosts.iter() {
        routes.paths.iter().for_each(|(_, pool)| add(pool, true));
    }
    for (vip, pool) in &snapshot.vips {
        if vip.proto == Proto::Tcp {
            add(pool, false);
        }
    }
    backends
}

/// Whether a GET is answered with 200..=399.
async fn http_answers(address: SocketAddr, path: &str) -> bool {
    let Ok(stream) = TcpStream::connect(address).await else {
        return false;
    };
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
    let Ok((mut sender, connection)) = handshake.await else {
        return false;
    };
    let request = Request::get(path)
        .header(header::HOST, address.to_string())
        .header(header::USER_AGENT, "viaduct-health")
        .body(Empty::<Bytes>::new());
    let Ok(request) = request else { return false };
    let mut response = pin!(sender.send_request(request));
    // A backend that closes after its answer may end the connection first.
    let response = tokio::select! {
        response = &mut response => response,
        _ = connection => response.await,
    };
    response.is_ok_and(|response| (200..400).contains(&response.status().as_u16()))
}

#[cfg(test)]
mod tests;
