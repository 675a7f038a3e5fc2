//! What is counted, under which name: every `viaduct_*` metric with its unit and help text.
//!
//! Sources and the agent write [`Metrics`] with relaxed atomics; the admin API reads them through
//! [`Scrape`], which also asks both layers for their counters when it is scraped. Layers count for
//! themselves: [`proxy`] puts names to what layer 7 counts.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeLabelSet, EncodeMetric, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::histogram::Histogram;

use crate::l4::datapath::Sockmap;
use crate::l4::{BackendStats, L4Reader, L4Stats, VipStats};
use crate::l7::metrics::L7Metrics;
use crate::last_known_good::State;
use crate::route::Origin;
use crate::route::ownership::{Ground, Refusal};
use crate::route::table::{Change, Size};
use crate::route::wire::Reason;
use crate::snapshot::Published;
use crate::source::kv::status::{State as KvState, Status as KvStatus};
use crate::source::status::{State as SourceState, Statuses};

mod proxy;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

#[derive(Debug)]
pub struct Metrics {
    pub registers: Counter,
    pub unregisters: Counter,
    pub greets: Counter,
    /// In the order of [`Reason::ALL`].
    rejects: [Counter; Reason::ALL.len()],
    /// In the order of [`Ground::ALL`].
    guard_refusals: [Counter; Ground::ALL.len()],
    /// Registrations kept out by `guard.limits`.
    pub over_limit: Counter,
    /// Backends held back by `guard.damping`, each time.
    pub held: Counter,
    pub held_backends: Gauge,
    pub nats_connected: Gauge,
    pub nats_connects: Counter,
    pub nats_first_connect: OnceLock<Instant>,
    pub nats_slow_consumer: Counter,
    /// Messages of instances in isolation segments that this gateway does not serve.
    pub nats_other_segments: Counter,
    pub kv: KvStatus,
    /// Values taken from the bucket.
    pub kv_values: Counter,
    pub kv_rejects: Counter,
    pub kv_deletes: Counter,
    /// Keys of the bucket that have a value.
    pub kv_keys: Gauge,
    /// Sources that follow a server.
    pub sources: Statuses,
    /// Keys of a source that announce something, and values of them that were refused.
    pub source_keys: [Gauge; Origin::ALL.len()],
    pub source_rejects: [Counter; Origin::ALL.len()],
    /// Times a source found the agent's inbox full.
    pub inbox_full: Counter,
    pub files: Files,
    pub state: State,
    pub file_loads: Counter,
    pub file_rejects: Counter,

    added: Counter,
    updated: Counter,
    refreshed: Counter,
    removed: Counter,
    expired: Counter,
    shadowed: Counter,
    full: Counter,
    http_routes: Gauge,
    vips: Gauge,
    entries: [Gauge; Origin::ALL.len()],
    pub batches: Counter,
    pub events: Counter,
    /// From the start of a batch until both layers have its snapshot.
    publish: Histogram,

    pub probes_good: Counter,
    pub probes_bad: Counter,
    /// Not made for want of something of this host's.
    pub probes_unmade: Counter,
    /// Made late because `health.concurrency` were in flight.
    pub probes_delayed: Counter,
    pub health_targets: Gauge,
    pub health_unchecked: Gauge,
    pub vips_in_panic: Gauge,
    /// Backends taken out for unanswered SYNs.
    pub passive_ejections: Counter,
    /// Reports that would have, but for a good check.
    pub passive_overruled: Counter,
    /// Reports for which there was no room.
    pub passive_dropped: Counter,
}

/// How the latest reading of each routes file ended: whether it was taken.
#[derive(Debug, Default)]
pub struct Files(Mutex<BTreeMap<PathBuf, bool>>);

impl Files {
    pub fn read(&self, path: &Path, taken: bool) {
        self.lock().insert(path.to_owned(), taken);
    }

    /// Forgets files that are not configured any more.
    pub fn retain(&self, configured: impl Fn(&PathBuf) -> bool) {
        self.lock().retain(|path, _| configured(path));
    }

    /// How many of the configured files and directories are unread, and how many files are refused.
    pub fn judge<'a>(&self, configured: impl IntoIterator<Item = &'a PathBuf>) -> (usize, usize) {
        let files = self.lock();
        let configured = configured.into_iter();
        let unread = configured.filter(|path| !files.contains_key(*path));
        let refused = files.values().filter(|taken| !**taken);
        (unread.count(), refused.count())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<PathBuf, bool>> {
        self.0.lock().expect("nothing panics while it holds this")
    }
}

impl Counter {
    pub fn inc(&self) {
        self.add(1);
    }

    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Gauge {
    pub fn set(&self, value: usize) {
        self.0.store(value as u64, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Default for Metrics {
    fn default() -> Metrics {
        // 10 µs to 2.6 s: one registration takes tens of microseconds, a full batch milliseconds.
        let buckets = prometheus_client::metrics::histogram::exponential_buckets(1e-5, 4.0, 10);
        Metrics {
            registers: Counter::default(),
            unregisters: Counter::default(),
            greets: Counter::default(),
            rejects: Default::default(),
            guard_refusals: Default::default(),
            over_limit: Counter::default(),
            held: Counter::default(),
            held_backends: Gauge::default(),
            nats_connected: Gauge::default(),
            nats_connects: Counter::default(),
            nats_first_connect: OnceLock::new(),
            nats_slow_consumer: Counter::default(),
            nats_other_segments: Counter::default(),
            kv: KvStatus::default(),
            kv_values: Counter::default(),
            kv_rejects: Counter::default(),
            kv_deletes: Counter::default(),
            kv_keys: Gauge::default(),
            sources: Statuses::default(),
            source_keys: Default::default(),
            source_rejects: Default::default(),
            inbox_full: Counter::default(),
            files: Files::default(),
            state: State::default(),
            file_loads: Counter::default(),
            file_rejects: Counter::default(),
            added: Counter::default(),
            updated: Counter::default(),
            refreshed: Counter::default(),
            removed: Counter::default(),
            expired: Counter::default(),
            shadowed: Counter::default(),
            full: Counter::default(),
            http_routes: Gauge::default(),
            vips: Gauge::default(),
            entries: Default::default(),
            batches: Counter::default(),
            events: Counter::default(),
            publish: Histogram::new(buckets),
            probes_good: Counter::default(),
            probes_bad: Counter::default(),
            probes_unmade: Counter::default(),
            probes_delayed: Counter::default(),
            health_targets: Gauge::default(),
            health_unchecked: Gauge::default(),
            vips_in_panic: Gauge::default(),
            passive_ejections: Counter::default(),
            passive_overruled: Counter::default(),
            passive_dropped: Counter::default(),
        }
    }
}

impl Metrics {
    pub fn reject(&self, reason: Reason) {
        self.rejects[reason as usize].inc();
    }

    pub fn rejects(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Reason::ALL
            .iter()
            .map(|reason| (reason.as_str(), self.rejects[*reason as usize].get()))
    }

    /// Counts what the rules of `[guard]` refuse, if that is why something was refused.
    pub fn guard_refused(&self, error: &anyhow::Error) {
        let mut causes = error.chain();
        if let Some(refusal) = causes.find_map(|cause| cause.downcast_ref::<Refusal>()) {
            self.guard_refusals[refusal.ground as usize].inc();
        }
    }

    /// What the rules of `[guard]` refused, of all sources.
    pub fn guard_refusals(&self, ground: Ground) -> &Counter {
        &self.guard_refusals[ground as usize]
    }

    /// Counts what a batch did to the table, which is `size` big after it.
    pub fn table(&self, change: &Change, size: Size) {
        for (counter, count) in [
            (&self.added, change.added),
            (&self.updated, change.updated),
            (&self.refreshed, change.refreshed),
            (&self.removed, change.removed),
            (&self.expired, change.expired),
            (&self.shadowed, change.shadowed),
            (&self.full, change.full),
            (&self.over_limit, change.over_limit),
            (&self.held, change.held),
        ] {
            if count > 0 {
                counter.add(count);
            }
        }
        self.http_routes.set(size.http_routes);
        self.vips.set(size.vips);
        for (gauge, count) in self.entries.iter().zip(size.entries) {
            gauge.set(count);
        }
    }

    pub fn published(&self, took: Duration) {
        self.publish.observe(took.as_secs_f64());
    }

    /// Entries of the table by what happened to them.
    pub fn changes(&self) -> [(&'static str, u64); 7] {
        [
            ("added", self.added.get()),
            ("updated", self.updated.get()),
            ("refreshed", self.refreshed.get()),
            ("removed", self.removed.get()),
            ("expired", self.expired.get()),
            ("shadowed", self.shadowed.get()),
            ("full", self.full.get()),
        ]
    }

    pub fn size(&self) -> Size {
        Size {
            http_routes: self.http_routes.get() as usize,
            vips: self.vips.get() as usize,
            entries: Origin::ALL.map(|origin| self.entries[origin as usize].get() as usize),
        }
    }
}

/// All that is counted, read when scraped.
#[derive(Clone)]
pub struct Scrape {
    pub metrics: Arc<Metrics>,
    pub published: Published,
    pub l4: Option<L4Reader>,
    pub l7: Arc<L7Metrics>,
    pub sockmap: Option<Arc<Sockmap>>,
}

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut page = Page(encoder);
        encode_sources(&mut page, &self.metrics)?;
        encode_servers(&mut page, &self.metrics)?;
        encode_table(&mut page, &self.metrics)?;
        let snapshot = self.published.load();
        page.gauge(
            "viaduct_snapshot_revision",
            "Revision of the published snapshot",
            snapshot.revision,
        )?;
        page.gauge(
            "viaduct_health_unhealthy_backends",
            "Backends held to be down",
            snapshot.unhealthy.len() as u64,
        )?;
        page.gauge(
            "viaduct_drained_backends",
            "Backends that an operator has drained, at all or for a VIP",
            (snapshot.draining.len() + snapshot.draining_at.len()) as u64,
        )?;
        encode_health(&mut page, &self.metrics)?;
        proxy::encode(&mut page, &self.l7)?;
        if let Some(sockmap) = &self.sockmap {
            proxy::encode_sockmap(&mut page, sockmap)?;
        }
        match &self.l4 {
            // A scrape without layer 4 tells more than no scrape.
            Some(reader) => match reader.stats() {
                Ok(stats) => encode_l4(&mut page, &stats),
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "read layer 4 counters");
                    Ok(())
                }
            },
            None => Ok(()),
        }
    }
}

fn encode_sources(page: &mut Page<'_>, metrics: &Metrics) -> fmt::Result {
    page.counters(
        "viaduct_nats_messages",
        "Messages taken in over NATS",
        [
            ([("kind", "register")], metrics.registers.get()),
            ([("kind", "unregister")], metrics.unregisters.get()),
            ([("kind", "greet")], metrics.greets.get()),
        ],
    )?;
    page.counters(
        "viaduct_nats_rejects",
        "Messages refused, by the field that is wrong",
        metrics
            .rejects()
            .map(|(reason, count)| ([("reason", reason)], count)),
    )?;
    page.counters(
        "viaduct_guard_refusals",
        "Messages, keys, files and registrations refused by guard, by the kind of rule",
        Ground::ALL
            .map(|ground| (ground.as_str(), metrics.guard_refusals(ground).get()))
            .into_iter()
            .chain([
                ("limit", metrics.over_limit.get()),
                ("flapping", metrics.held.get()),
            ])
            .map(|(reason, count)| ([("reason", reason)], count)),
    )?;
    page.gauge(
        "viaduct_guard_held_backends",
        "Backends of routes held back because they came and went too often",
        metrics.held_backends.get(),
    )?;
    page.gauge(
        "viaduct_nats_connected",
        "1 while connected to NATS",
        metrics.nats_connected.get(),
    )?;
    page.counter(
        "viaduct_nats_connects",
        "Connections made to NATS",
        metrics.nats_connects.get(),
    )?;
    page.counter(
        "viaduct_nats_slow_consumer",
        "Messages dropped because more came than could be taken in",
        metrics.nats_slow_consumer.get(),
    )?;
    page.counter(
        "viaduct_nats_other_segments",
        "Messages passed over because their isolation segment is served by others",
        metrics.nats_other_segments.get(),
    )?;
    page.gauge(
        "viaduct_kv_followed",
        "1 while the JetStream bucket is read and followed",
        u64::from(metrics.kv.state() == KvState::Followed),
    )?;
    page.gauge(
        "viaduct_kv_keys",
        "Keys of the JetStream bucket with a value",
        metrics.kv_keys.get(),
    )?;
    page.counters(
        "viaduct_kv_entries",
        "Entries read from the JetStream bucket",
        [
            ([("result", "taken")], metrics.kv_values.get()),
            ([("result", "refused")], metrics.kv_rejects.get()),
            ([("result", "deleted")], metrics.kv_deletes.get()),
        ],
    )?;
    page.counters(
        "viaduct_file_loads",
        "Readings of routes files",
        [
            ([("result", "good")], metrics.file_loads.get()),
            ([("result", "refused")], metrics.file_rejects.get()),
        ],
    )
}

/// Sources that follow a server, and are configured.
fn encode_servers(page: &mut Page<'_>, metrics: &Metrics) -> fmt::Result {
    let sources = metrics.sources.list();
    page.gauges(
        "viaduct_source_connected",
        "1 while a source has its server",
        sources.iter().map(|(origin, status)| {
            let connected = status.state == SourceState::Connected;
            ([("origin", origin.as_str())], usize::from(connected))
        }),
    )?;
    page.gauges(
        "viaduct_source_age_seconds",
        "How long ago the routes of a source were those of its server for sure",
        sources.iter().filter_map(|(origin, status)| {
            let age = status.age()?.as_secs() as usize;
            Some(([("origin", origin.as_str())], age))
        }),
    )?;
    page.gauges(
        "viaduct_source_keys",
        "Keys of a source that announce something",
        sources.iter().map(|(origin, _)| {
            let keys = metrics.source_keys[*origin as usize].get();
            ([("origin", origin.as_str())], keys as usize)
        }),
    )?;
    page.counters(
        "viaduct_source_rejects",
        "Values of a source's keys that were refused",
        sources.iter().map(|(origin, _)| {
            let rejects = metrics.source_rejects[*origin as usize].get();
            ([("origin", origin.as_str())], rejects)
        }),
    )
}

fn encode_table(page: &mut Page<'_>, metrics: &Metrics) -> fmt::Result {
    let size = metrics.size();
    page.counters(
        "viaduct_state_writes",
        "Writings of the routes to disk",
        [
            ([("result", "good")], metrics.state.writes.get()),
            ([("result", "failed")], metrics.state.failures.get()),
        ],
    )?;
    page.gauge(
        "viaduct_http_routes",
        "Pairs of host and path",
        size.http_routes as u64,
    )?;
    page.gauge(
        "viaduct_vips",
        "Virtual IPs with a backend",
        size.vips as u64,
    )?;
    page.gauges(
        "viaduct_route_backends",
        "Backends of routes, by where they were announced",
        Origin::ALL.map(|origin| ([("origin", origin.as_str())], size.entries[origin as usize])),
    )?;
    page.counters(
        "viaduct_route_changes",
        "Backends of routes, by what a registration or the lack of one did to them",
        metrics
            .changes()
            .map(|(kind, count)| ([("change", kind)], count)),
    )?;
    page.counter(
        "viaduct_agent_events",
        "Events taken in by the agent",
        metrics.events.get(),
    )?;
    page.counter(
        "viaduct_agent_inbox_full",
        "Times a source waited because the agent's inbox was full",
        metrics.inbox_full.get(),
    )?;
    page.counter(
        "viaduct_agent_batches",
        "Batches of events",
        metrics.batches.get(),
    )?;
    page.histogram(
        "viaduct_agent_publish_seconds",
        "From the start of a batch until both layers have its snapshot",
        &metrics.publish,
    )
}

fn encode_health(page: &mut Page<'_>, metrics: &Metrics) -> fmt::Result {
    page.counters(
        "viaduct_health_probes",
        "Active health checks, by what they found",
        [
            ([("result", "good")], metrics.probes_good.get()),
            ([("result", "bad")], metrics.probes_bad.get()),
            ([("result", "unmade")], metrics.probes_unmade.get()),
        ],
    )?;
    page.counter(
        "viaduct_health_probes_delayed",
        "Active health checks that waited because too many were in flight",
        metrics.probes_delayed.get(),
    )?;
    page.gauge(
        "viaduct_health_targets",
        "Backends under active check",
        metrics.health_targets.get(),
    )?;
    page.gauge(
        "viaduct_health_unchecked",
        "Backends beyond the bound of active checks",
        metrics.health_unchecked.get(),
    )?;
    page.counters(
        "viaduct_health_passive",
        "Reports of unanswered SYNs that took a backend out or would have",
        [
            ([("result", "ejected")], metrics.passive_ejections.get()),
            ([("result", "overruled")], metrics.passive_overruled.get()),
            ([("result", "dropped")], metrics.passive_dropped.get()),
        ],
    )?;
    page.gauge(
        "viaduct_health_vips_in_panic",
        "Virtual IPs with so few healthy backends that all are used",
        metrics.vips_in_panic.get(),
    )
}

/// Name and help of a metric, and where its value stands.
type Row<S, V> = (&'static str, &'static str, fn(&S) -> V);

fn encode_l4(page: &mut Page<'_>, stats: &L4Stats) -> fmt::Result {
    page.counters(
        "viaduct_l4_packets",
        "Packets by the verdict of the XDP program",
        stats
            .verdicts
            .iter()
            .map(|(verdict, count)| ([("verdict", *verdict)], *count)),
    )?;
    page.gauge(
        "viaduct_l4_active_flows",
        "Flows in the flow table",
        stats.active_flows,
    )?;
    page.gauge(
        "viaduct_l4_flow_capacity",
        "Places of the flow table",
        stats.flow_capacity,
    )?;
    page.gauges(
        "viaduct_l4_map_bytes",
        "Memory of the kernel that a map took when it was opened",
        stats
            .map_bytes
            .iter()
            .map(|(map, bytes)| ([("map", map.as_str())], *bytes as usize)),
    )?;
    page.counter(
        "viaduct_l4_watch_lost",
        "Sampled packets that a watcher was too slow for",
        stats.watch_lost,
    )?;
    page.counter(
        "viaduct_l4_events_lost",
        "Sampled packets that found the ring buffer to the agent full",
        stats.events_lost,
    )?;
    page.counter(
        "viaduct_l4_failed_writes",
        "Writes to the kernel's tables that failed and were repeated",
        stats.failed_writes,
    )?;
    page.counter(
        "viaduct_l4_refused_backends",
        "Backends that a plan of their VIP left out",
        stats.refused,
    )?;
    let vip_rows: [Row<VipStats, [u64; 2]>; 2] = [
        ("viaduct_l4_vip_packets", "Packets of a VIP", |vip| {
            [vip.moved.packets, vip.moved.reply_packets]
        }),
        ("viaduct_l4_vip_bytes", "Bytes of a VIP's packets", |vip| {
            [vip.moved.bytes, vip.moved.reply_bytes]
        }),
    ];
    for (name, help, values) in vip_rows {
        let rows = stats.vips.iter().flat_map(|vip| {
            let [request, reply] = values(vip);
            let labels = |direction| [("vip", vip.vip.as_str()), ("direction", direction)];
            [(labels("request"), request), (labels("reply"), reply)]
        });
        page.counters(name, help, rows)?;
    }
    page.counters(
        "viaduct_l4_vip_flows",
        "Flows begun to a VIP",
        stats
            .vips
            .iter()
            .map(|vip| ([("vip", vip.vip.as_str())], vip.moved.new_flows)),
    )?;
    page.gauges(
        "viaduct_l4_vip_active_flows",
        "Flows of a VIP in the flow table",
        stats
            .vips
            .iter()
            .map(|vip| ([("vip", vip.vip.as_str())], vip.active_flows as usize)),
    )?;
    let backends: Vec<(&VipStats, &BackendStats, String)> = stats
        .vips
        .iter()
        .flat_map(|vip| {
            vip.backends
                .iter()
                .map(move |b| (vip, b, b.address.to_string()))
        })
        .collect();
    let backend_rows: [Row<BackendStats, u64>; 5] = [
        (
            "viaduct_l4_backend_packets",
            "Packets sent to a backend",
            |backend| backend.moved.packets,
        ),
        (
            "viaduct_l4_backend_bytes",
            "Bytes sent to a backend",
            |backend| backend.moved.bytes,
        ),
        (
            "viaduct_l4_backend_reply_packets",
            "Packets that a backend answered with, where answers pass here",
            |backend| backend.moved.reply_packets,
        ),
        (
            "viaduct_l4_backend_reply_bytes",
            "Bytes that a backend answered with, where answers pass here",
            |backend| backend.moved.reply_bytes,
        ),
        (
            "viaduct_l4_backend_flows",
            "Flows begun to a backend",
            |backend| backend.moved.new_flows,
        ),
    ];
    for (name, help, value) in backend_rows {
        let rows = backends.iter().map(|(vip, backend, address)| {
            (
                [("vip", vip.vip.as_str()), ("backend", address)],
                value(backend),
            )
        });
        page.counters(name, help, rows)?;
    }
    page.gauges(
        "viaduct_l4_backend_active_flows",
        "Flows to a backend in the flow table",
        backends.iter().map(|(vip, backend, address)| {
            let labels = [("vip", vip.vip.as_str()), ("backend", address.as_str())];
            (labels, backend.active_flows as usize)
        }),
    )?;
    page.gauges(
        "viaduct_l4_backend_reachable",
        "1 while the next hop to a backend is known",
        backends.iter().map(|(vip, backend, address)| {
            let labels = [("vip", vip.vip.as_str()), ("backend", address.as_str())];
            (labels, usize::from(backend.reachable))
        }),
    )
}

/// Writes families one after another.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let mut metric = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        metric.encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let mut metric = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        metric.encode_gauge(&value)
    }

    fn counters<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = (L, impl EncodeCounterValue)>,
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in rows {
            let mut metric = family.encode_family(&labels)?;
            metric.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        Ok(())
    }

    fn gauges<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = (L, usize)>,
    ) -> fmt::Result {
        let mut family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in rows {
            family
                .encode_family(&labels)?
                .encode_gauge(&(value as u64))?;
        }
        Ok(())
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) -> fmt::Result {
        let metric = self
            .0
            .encode_descriptor(name, help, None, MetricType::Histogram)?;
        histogram.encode(metric)
    }
}
