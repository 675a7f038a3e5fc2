//! Registrations over NATS: how many a second the gateway takes in, what one costs, and how long
//! after its publication the first request and the first packet are served; each in tables of
//! different sizes, because the cost of a registration ought not to depend on that.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::poll::{PollFd, PollFlags, ppoll};
use router_tests::app::{ECHO_PORT, HTTP_PORT};
use router_tests::client::HttpClient;
use router_tests::nats::{Publisher, encode};
use router_tests::process::DEADLINE;
use router_tests::site::{PROXY, Site};
use serde_json::{Value, json};

use crate::report::{Report, percentile};

/// HTTP routes in the table beside those measured.
const TABLES: [usize; 3] = [10, 10_000, 100_000];
const ROUNDS: usize = 5;
/// Messages of one round of the throughput figures.
const MESSAGES: usize = 200_000;
/// Messages written at once, and first services measured in a round.
const BATCH: usize = 1000;
const SAMPLES: usize = 100;

/// Between two probes for a VIP that may not be there yet.
const PROBE_EVERY: Duration = Duration::from_micros(100);

const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 20);
const FIRST_VIP_PORT: u16 = 10_000;

pub(crate) fn measure() -> anyhow::Result<Report> {
    let mut report = Report::new("routes");
    crate::lookup::measure(&mut report)?;
    for table in TABLES {
        let mut bench = Bench::start(table)?;
        eprintln!("routes: filling a table of {table}");
        bench.take_in((0..table).map(|n| register(&host(n), HTTP_PORT)))?;
        for round in 0..ROUNDS {
            eprintln!("routes: table of {table}, round {} of {ROUNDS}", round + 1);
            bench.throughput(&mut report)?;
            bench.first_service(&mut report, round)?;
        }
    }
    Ok(report)
}

struct Bench {
    table: usize,
    markers: usize,
    publisher: Publisher,
    site: Site,
}

type Message = (&'static str, Value);

impl Bench {
    fn start(table: usize) -> anyhow::Result<Bench> {
        let mut site = Site::new(1)?;
        site.start_nats()?;
        site.start_gateway(|config| {
            config.l4.limits.vips = 1024;
            config.nats.stale_threshold = Duration::from_secs(3600);
        })?;
        site.start_app(0)?;
        let publisher = Publisher::connect(&site.lab)?;
        Ok(Bench {
            table,
            markers: 0,
            publisher,
            site,
        })
    }

    /// Repeats of what is known, and changes: an instance that joins a route and leaves it.
    fn throughput(&mut self, report: &mut Report) -> anyhow::Result<()> {
        let table = self.table;
        let repeats = (0..MESSAGES).map(|n| register(&host(n % table), HTTP_PORT));
        let changes = (0..MESSAGES / 2).flat_map(|n| {
            let (subject, message) = register(&host(n % table), ECHO_PORT);
            [(subject, message.clone()), ("router.unregister", message)]
        });
        for (kind, cost) in [
            ("heartbeat", self.take_in(repeats)?),
            ("change", self.take_in(changes)?),
        ] {
            let row = format!("{kind}-{table}");
            let count = MESSAGES as f64;
            report.add(
                &row,
                "viaduct",
                "messages_per_s",
                count / cost.elapsed.as_secs_f64(),
            );
            report.add(
                &row,
                "viaduct",
                "cpu_us_per_message",
                cost.cpu.as_secs_f64() * 1e6 / count,
            );
        }
        Ok(())
    }

    /// Publishes all of it, then a marker, and waits until the marker is served: NATS keeps the
    /// order of one connection.
    fn take_in(&mut self, messages: impl Iterator<Item = Message>) -> anyhow::Result<Cost> {
        self.markers += 1;
        let marker = format!("marker-{}.example.com", self.markers);
        let mut batches = vec![Vec::new()];
        for (n, (subject, message)) in messages.enumerate() {
            if n > 0 && n % BATCH == 0 {
                batches.push(Vec::new());
            }
            let batch = batches.last_mut().expect("there is a first batch");
            encode(batch, subject, message.to_string().as_bytes());
        }
        let (subject, message) = register(&marker, HTTP_PORT);
        let mut connection = self.site.lab.client.run(|| HttpClient::connect(PROXY))?;

        let cpu = self.site.gateway().cpu_time()?;
        let start = Instant::now();
        for batch in &batches {
            self.publisher.publish_encoded(batch)?;
        }
        self.publisher.publish(subject, message.to_string())?;
        while connection.get(&marker, "/")?.status != 200 {
            if start.elapsed() > 3 * DEADLINE {
                bail!("the last of a series of registrations was never served");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let elapsed = start.elapsed();
        Ok(Cost {
            elapsed,
            cpu: self.site.gateway().cpu_time()? - cpu,
        })
    }

    fn first_service(&mut self, report: &mut Report, round: usize) -> anyhow::Result<()> {
        let mut connection = self.site.lab.client.run(|| HttpClient::connect(PROXY))?;
        let socket = self.site.lab.client.run(|| UdpSocket::bind("0.0.0.0:0"))?;
        socket.set_nonblocking(true)?;
        let mut requests = Vec::with_capacity(SAMPLES);
        let mut packets = Vec::with_capacity(SAMPLES);
        for n in 0..SAMPLES {
            let unique = round * SAMPLES + n;
            requests
                .push(self.first_request(&mut connection, &format!("new-{unique}.example.com"))?);
            let port = FIRST_VIP_PORT + u16::try_from(unique).context("ports are enough")?;
            packets.push(self.first_packet(&socket, SocketAddr::from((VIP, port)))?);
        }
        for (kind, mut samples) in [("request", requests), ("packet", packets)] {
            let row = format!("first-{kind}-{}", self.table);
            report.add(&row, "viaduct", "p50_ms", percentile(&mut samples, 0.50));
            report.add(&row, "viaduct", "p99_ms", percentile(&mut samples, 0.99));
        }
        Ok(())
    }

    /// Milliseconds from publishing a new host to the end of its first request that was served.
    fn first_request(&mut self, connection: &mut HttpClient, host: &str) -> anyhow::Result<f64> {
        let message = register(host, HTTP_PORT);
        let start = self.send(&message)?;
        while connection.get(host, "/")?.status != 200 {
            if start.elapsed() > DEADLINE {
                bail!("{host} was never served");
            }
        }
        let elapsed = start.elapsed();
        self.send(&("router.unregister", message.1))?;
        Ok(elapsed.as_secs_f64() * 1e3)
    }

    /// Milliseconds from publishing a new VIP to the first answer to a datagram.
    fn first_packet(&mut self, socket: &UdpSocket, vip: SocketAddr) -> anyhow::Result<f64> {
        let backend = self.site.lab.backend_address(0).to_string();
        let message = json!({"host": backend, "port": ECHO_PORT, "vips": [format!("udp/{vip}")]});
        let start = self.send(&("router.register", message.clone()))?;
        let mut answer = [0; 64];
        let elapsed = 'answered: loop {
            // Until the VIP is there the kernel says that nobody can be reached; that is no answer.
            let _ = socket.send_to(b"first", vip);
            // Asleep until an answer comes: a prober that spins would keep the gateway from its core.
            let mut sockets = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            ppoll(&mut sockets, Some(PROBE_EVERY.into()), None)?;
            while let Ok((_, from)) = socket.recv_from(&mut answer) {
                if from == vip {
                    break 'answered start.elapsed();
                }
            }
            if start.elapsed() > DEADLINE {
                bail!("udp/{vip} was never served");
            }
        };
        self.send(&("router.unregister", message))?;
        Ok(elapsed.as_secs_f64() * 1e3)
    }

    /// Publishes without waiting, and returns the time right before.
    fn send(&mut self, (subject, message): &Message) -> anyhow::Result<Instant> {
        let mut batch = Vec::new();
        encode(&mut batch, subject, message.to_string().as_bytes());
        let start = Instant::now();
        self.publisher.send_encoded(&batch)?;
        Ok(start)
    }
}

/// What a series of messages took.
struct Cost {
    elapsed: Duration,
    /// Of the agent, all threads.
    cpu: Duration,
}

fn register(host: &str, port: u16) -> Message {
    let message = json!({"host": "10.0.0.11", "port": port, "uris": [host]});
    ("router.register", message)
}

fn host(n: usize) -> String {
    format!("app-{n}.example.com")
}
