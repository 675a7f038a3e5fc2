//! Registrations over NATS: how many a second the gateway takes in, what one costs, how long after its
//! publication the first request and the first packet are served, and what requests notice; each in
//! tables of different sizes, because the cost of a registration ought not to depend on that.
//!
//! Each table has a site of its own, which is filled once; the rows of a table are measured in it one
//! after another. A row is chosen by its name, or by its kind, which is the name without the table.

mod alone;
mod churn;
mod cold_start;
mod first;
mod intake;
mod storm;
mod stream;

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use router_tests::app::{ECHO_PORT, HTTP_PORT};
use router_tests::client::HttpClient;
use router_tests::nats::{Publisher, encode};
use router_tests::process::DEADLINE;
use router_tests::site::{PROXY, Site};
use serde_json::{Value, json};

use crate::report::Report;

/// HTTP routes in the table beside those measured.
const TABLES: [usize; 4] = [10, 10_000, 100_000, 1_000_000];
/// The table of the rows that are of one size only.
const LARGEST: usize = 1_000_000;
const ROUNDS: usize = 5;
/// Messages written at once.
const BATCH: usize = 1000;
/// Steps between two routes that are spoken of one after another, so that they are not neighbours in
/// memory. Prime, and of no table a divisor.
const STRIDE: usize = 7919;

/// Kinds of rows of every table, of the router and the route table by themselves,
const ALONE: [&str; 2] = ["lookup", "table"];
/// and of a gateway.
const KINDS: [&str; 6] = [
    "fill",
    "heartbeat",
    "change",
    "intake",
    "first-request",
    "first-packet",
];
/// Kinds of rows of the largest table.
const KINDS_OF_LARGEST: [&str; 6] = [
    "rss",
    "storm",
    "storm-first-request",
    "storm-first-packet",
    "churn",
    "cold-start",
];

pub(crate) fn measure(names: &[String], rounds: Option<usize>) -> anyhow::Result<Report> {
    let rounds = rounds.unwrap_or(ROUNDS);
    ensure!(rounds > 0, "--rounds is at least 1");
    let all = || TABLES.into_iter().flat_map(rows_of);
    let is_known = |name: &&String| all().any(|(kind, row)| **name == kind || **name == row);
    if let Some(name) = names.iter().find(|name| !is_known(name)) {
        let rows: Vec<String> = all().map(|(_, row)| row).collect();
        bail!("no row {name}; there are {}", rows.join(", "));
    }
    let is_chosen = |kind: &str, row: &str| {
        names.is_empty() || names.iter().any(|name| name == kind || name == row)
    };
    let mut report = Report::new("routes");
    for table in TABLES {
        let chosen: Vec<&str> = rows_of(table)
            .filter(|(kind, row)| is_chosen(kind, row))
            .map(|(kind, _)| kind)
            .collect();
        if !chosen.is_empty() {
            of_table(table, &chosen, rounds, &mut report)?;
        }
    }
    Ok(report)
}

/// Kinds and names of a table's rows.
fn rows_of(table: usize) -> impl Iterator<Item = (&'static str, String)> {
    let largest = KINDS_OF_LARGEST.iter().filter(move |_| table == LARGEST);
    let kinds = ALONE.iter().chain(&KINDS).chain(largest);
    kinds.map(move |kind| (*kind, format!("{kind}-{table}")))
}

fn of_table(
    table: usize,
    chosen: &[&str],
    rounds: usize,
    report: &mut Report,
) -> anyhow::Result<()> {
    let has = |kind: &str| chosen.contains(&kind);
    if ALONE.into_iter().any(has) {
        alone::measure(table, chosen, rounds, report)?;
    }
    if chosen.iter().all(|kind| ALONE.contains(kind)) {
        return Ok(());
    }
    let mut bench = Bench::start(table)?;
    // So that no later row waits for the way to the application to be found.
    bench.take_in(std::iter::empty())?;
    eprintln!("routes: filling a table of {table}");
    bench.fill(chosen, report)?;
    for round in 0..rounds {
        eprintln!("routes: table of {table}, round {} of {rounds}", round + 1);
        bench.throughput(chosen, report)?;
        if has("first-request") || has("first-packet") {
            bench.first_service("first", report)?;
        }
        if chosen.iter().any(|kind| kind.starts_with("storm")) {
            bench.storm(chosen, report)?;
        }
        if has("churn") {
            bench.churn(round, report)?;
        }
    }
    if has("cold-start") {
        bench.cold_start(rounds, report)?;
    }
    Ok(())
}

struct Bench {
    table: usize,
    markers: usize,
    /// Hosts and ports that were used for a first service.
    firsts: usize,
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
            firsts: 0,
            publisher,
            site,
        })
    }

    /// The name of a row.
    fn row(&self, kind: &str) -> String {
        format!("{kind}-{}", self.table)
    }

    /// The `n`th host of the table to be spoken of.
    fn known(&self, n: usize) -> String {
        host(n * STRIDE % self.table)
    }

    /// Publishes all of it, then a marker, and waits until the marker is served: NATS keeps the
    /// order of one connection.
    fn take_in(&mut self, messages: impl Iterator<Item = Message>) -> anyhow::Result<Cost> {
        self.markers += 1;
        let marker = format!("marker-{}.example.com", self.markers);
        let batches = encoded(messages, BATCH);
        let (subject, message) = register(&marker, HTTP_PORT);
        let mut connection = self.site.lab.client.run(|| HttpClient::connect(PROXY))?;

        let before = self.cpu_time()?;
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
            cpu: self.cpu_time()? - before,
        })
    }

    /// CPU time of the gateway's threads so far: the first field of `/proc/PID/task/TID/schedstat`
    /// (Documentation/scheduler/sched-stats.rst).
    fn cpu_time(&mut self) -> anyhow::Result<Duration> {
        let tasks = format!("/proc/{}/task", self.site.gateway().id());
        let mut nanos = 0;
        for task in std::fs::read_dir(&tasks).with_context(|| format!("read {tasks}"))? {
            let stat = std::fs::read_to_string(task?.path().join("schedstat"));
            // A thread may have ended meanwhile.
            let first = stat.unwrap_or_default();
            let first = first.split(' ').next().and_then(|field| field.parse().ok());
            nanos += first.unwrap_or(0_u64);
        }
        Ok(Duration::from_nanos(nanos))
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

impl Cost {
    fn report(&self, report: &mut Report, row: &str, messages: usize) {
        let messages = messages as f64;
        let per_s = messages / self.elapsed.as_secs_f64();
        let cpu_us = self.cpu.as_secs_f64() * 1e6 / messages;
        report.add(row, "viaduct", "messages_per_s", per_s);
        report.add(row, "viaduct", "cpu_us_per_message", cpu_us);
    }
}

fn encoded(messages: impl Iterator<Item = Message>, batch_size: usize) -> Vec<Vec<u8>> {
    let mut batches = vec![Vec::new()];
    for (n, (subject, message)) in messages.enumerate() {
        if n > 0 && n % batch_size == 0 {
            batches.push(Vec::new());
        }
        let batch = batches.last_mut().expect("there is a first batch");
        encode(batch, subject, message.to_string().as_bytes());
    }
    batches
}

/// An instance that comes to a route, and leaves it.
fn change(host: &str) -> [Message; 2] {
    let (subject, message) = register(host, ECHO_PORT);
    [(subject, message.clone()), ("router.unregister", message)]
}

fn register(host: &str, port: u16) -> Message {
    let message = json!({"host": "10.0.0.11", "port": port, "uris": [host]});
    ("router.register", message)
}

fn host(n: usize) -> String {
    format!("app-{n}.example.com")
}
