//! `viaduct.toml` as types. Every key is optional, unknown keys are refused, and every default is here.
//!
//! Durations are written `"5s"`, `"250ms"`, `"2m"`. [`load`] refuses what contradicts itself, so the
//! rest of the program takes a `Config` at its word.

use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use ::http::uri::{Authority, PathAndQuery};
use anyhow::{Context, ensure};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

mod guard;
mod http;
mod l4;
mod sources;
mod state;

pub use guard::{GuardConfig, SourceLimits};
pub use http::{
    AccessLogFormat, BackendProxyProtocol, BackendTlsConfig, CertificateFiles, ClientAuth,
    ClientCertFormat, CollectorUrl, ForwardedClientCert, ForwardedHeader, HttpAccessLog,
    HttpBalance, HttpConfig, HttpEjection, HttpLimits, HttpMetrics, HttpRate, HttpRetries,
    HttpRouteServices, HttpSticky, HttpTimeouts, HttpTlsConfig, HttpTracing, HttpZoneBalance,
    ProxyProtocol, RedactQuery, SyslogAddress, TlsVersion, TraceMode,
};
pub use l4::{
    Attach, FlowTimeouts, Forwarding, L4Config, L4Limits, LocalClients, MAX_AFFINITY,
    MAX_SOURCE_PREFIXES, QuicConfig, Reject, Scheduler, VipConfig,
};
pub use sources::{
    ConsulConfig, EtcdConfig, InstanceMap, RedisConfig, Server, ServiceMap, ZookeeperConfig,
};
pub use state::StateConfig;

/// The longest `health.interval`.
const MAX_HEALTH_INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// Reads and validates a configuration file.
///
/// # Errors
/// One message naming the file and, for TOML errors, the line and key.
pub fn load(path: &Path) -> anyhow::Result<Config> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    parse(&text).with_context(|| format!("configuration {}", path.display()))
}

/// Parses and validates the text of a configuration file.
pub fn parse(text: &str) -> anyhow::Result<Config> {
    let config: Config = toml::from_str(text)?;
    config.validate()?;
    Ok(config)
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub nats: NatsConfig,
    pub file: FileConfig,
    pub redis: RedisConfig,
    pub etcd: EtcdConfig,
    pub zookeeper: ZookeeperConfig,
    pub consul: ConsulConfig,
    pub http: HttpConfig,
    pub l4: L4Config,
    pub guard: GuardConfig,
    pub health: HealthConfig,
    pub admin: AdminConfig,
    pub handover: HandoverConfig,
    pub state: StateConfig,
    pub log: LogConfig,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NatsConfig {
    /// Empty switches the source off.
    pub servers: Vec<String>,
    pub user: Option<String>,
    pub password: Option<Secret>,
    pub token: Option<Secret>,
    pub nkey_seed: Option<Secret>,
    /// A NATS credentials file (JWT and seed).
    pub credentials_file: Option<PathBuf>,
    /// PEM certificates to trust beside the system's.
    pub ca_file: Option<PathBuf>,
    pub client_certificate_file: Option<PathBuf>,
    pub client_key_file: Option<PathBuf>,
    /// First token of the subjects: `router.register`, `router.start`, ...
    pub subject_prefix: String,
    /// The JetStream bucket of declared routes and policies of VIPs, made if there is none. Empty: none
    /// is looked for.
    pub bucket: String,
    /// Which registrations are taken in, by the isolation segment that they name.
    pub routing_table_sharding_mode: ShardingMode,
    pub isolation_segments: Vec<String>,
    /// The longest an expired registration is served on: how often expired ones are looked for, at
    /// least once a second.
    #[serde(with = "humantime_serde")]
    pub prune_interval: Duration,
    /// The longest a registration lives without being repeated.
    #[serde(with = "humantime_serde")]
    pub stale_threshold: Duration,
    /// What instances are asked to repeat their registration at, in `router.start`.
    #[serde(with = "humantime_serde")]
    pub minimum_register_interval: Duration,
    /// How long registrations are collected after the first connect before `/readyz` says ready: one
    /// interval of the instances, so that each has spoken. Also how long a gateway that has routes
    /// from elsewhere waits for NATS.
    #[serde(with = "humantime_serde")]
    pub startup_grace: Duration,
}

/// In gorouter's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShardingMode {
    #[default]
    All,
    /// Those of `isolation_segments`.
    Segments,
    /// Those, and those that name none.
    SharedAndSegments,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FileConfig {
    /// Files of static routes, in JSON where they are named so, else in TOML.
    pub paths: Vec<PathBuf>,
    /// Directories whose `*.toml` and `*.json` are such files.
    pub directories: Vec<PathBuf>,
    /// How often they are looked at for a change.
    #[serde(with = "humantime_serde")]
    pub poll_interval: Duration,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HealthConfig {
    pub check: HealthCheck,
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    /// How far from the interval a check may fall, to either side, in percent: up to 50.
    pub jitter: u8,
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// Good answers in a row before a backend that was down is used again.
    pub rise: u32,
    /// Bad answers in a row before a backend is avoided.
    pub fall: u32,
    /// Path and query that an `http` check asks for.
    pub path: String,
    /// The `Host` of an `http` check; unset, it is the backend's address.
    pub host: Option<String>,
    /// The statuses of a good answer to an `http` check.
    pub status: StatusSet,
    /// Probes in flight at once.
    pub concurrency: usize,
    /// Percent of a pool that must be healthy, 0..=100. With fewer, health is not looked at: all of the
    /// pool are used, as they are when none is healthy.
    pub panic_threshold: u8,
    /// Whether a backend that leaves layer 4's SYNs unanswered is avoided for a while, where no
    /// active check says that it is well.
    pub passive: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HealthCheck {
    #[default]
    None,
    Tcp,
    Http,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdminConfig {
    /// `ADDRESS:PORT` or `unix:/PATH`.
    pub listen: AdminListen,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HandoverConfig {
    /// A unix socket by which a process started later takes this one's place; unset, none does.
    pub socket: Option<PathBuf>,
    /// How long that process may take to be ready, as `/readyz` has it, before it gives up.
    #[serde(with = "humantime_serde")]
    pub ready_timeout: Duration,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    pub format: LogFormat,
    /// In the syntax of `RUST_LOG`, which wins over it.
    pub filter: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

impl Default for NatsConfig {
    fn default() -> NatsConfig {
        NatsConfig {
            servers: vec!["nats://127.0.0.1:4222".to_owned()],
            user: None,
            password: None,
            token: None,
            nkey_seed: None,
            credentials_file: None,
            ca_file: None,
            client_certificate_file: None,
            client_key_file: None,
            subject_prefix: "router".to_owned(),
            bucket: "viaduct".to_owned(),
            routing_table_sharding_mode: ShardingMode::All,
            isolation_segments: Vec::new(),
            prune_interval: Duration::from_secs(30),
            stale_threshold: Duration::from_secs(120),
            minimum_register_interval: Duration::from_secs(20),
            startup_grace: Duration::from_secs(20),
        }
    }
}

impl Default for FileConfig {
    fn default() -> FileConfig {
        FileConfig {
            paths: Vec::new(),
            directories: Vec::new(),
            poll_interval: Duration::from_secs(1),
        }
    }
}

impl Default for HealthConfig {
    fn default() -> HealthConfig {
        HealthConfig {
            check: HealthCheck::None,
            interval: Duration::from_secs(5),
            jitter: 10,
            timeout: Duration::from_secs(2),
            rise: 2,
            fall: 3,
            path: "/".to_owned(),
            host: None,
            status: StatusSet::default(),
            concurrency: 256,
            panic_threshold: 0,
            passive: true,
        }
    }
}

impl Default for AdminConfig {
    fn default() -> AdminConfig {
        AdminConfig {
            listen: AdminListen::Tcp(SocketAddr::from(([127, 0, 0, 1], 9901))),
        }
    }
}

impl Default for HandoverConfig {
    fn default() -> HandoverConfig {
        HandoverConfig {
            socket: None,
            ready_timeout: Duration::from_secs(120),
        }
    }
}

impl Default for LogConfig {
    fn default() -> LogConfig {
        LogConfig {
            format: LogFormat::Text,
            filter: "info".to_owned(),
        }
    }
}

impl NatsConfig {
    /// Whether instances of an isolation segment are this gateway's to serve.
    pub fn serves_segment(&self, segment: Option<&str>) -> bool {
        match (self.routing_table_sharding_mode, segment) {
            (ShardingMode::All, _) | (ShardingMode::SharedAndSegments, None) => true,
            (ShardingMode::Segments, None) => false,
            (_, Some(segment)) => self.isolation_segments.iter().any(|known| known == segment),
        }
    }
}

impl Config {
    fn validate(&self) -> anyhow::Result<()> {
        let nats = &self.nats;
        for subject in nats.subject_prefix.split('.') {
            ensure!(
                !subject.is_empty() && !subject.contains(['*', '>', ' ', '\t', '\r', '\n']),
                "nats.subject_prefix {:?} is not a NATS subject",
                nats.subject_prefix
            );
        }
        ensure!(
            nats.routing_table_sharding_mode != ShardingMode::Segments
                || !nats.isolation_segments.is_empty(),
            "nats.routing_table_sharding_mode segments needs nats.isolation_segments"
        );
        let in_bucket = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        ensure!(
            nats.bucket.bytes().all(in_bucket),
            "nats.bucket {:?} is not of letters, digits, - and _",
            nats.bucket
        );
        ensure!(
            nats.client_certificate_file.is_some() == nats.client_key_file.is_some(),
            "nats.client_certificate_file and nats.client_key_file go together"
        );
        let positive = [
            ("nats.prune_interval", nats.prune_interval),
            ("nats.stale_threshold", nats.stale_threshold),
            (
                "nats.minimum_register_interval",
                nats.minimum_register_interval,
            ),
            ("file.poll_interval", self.file.poll_interval),
            ("health.interval", self.health.interval),
            ("health.timeout", self.health.timeout),
            ("handover.ready_timeout", self.handover.ready_timeout),
        ];
        ensure_positive(&positive)?;
        let at_least_one = [
            ("health.rise", self.health.rise as usize),
            ("health.fall", self.health.fall as usize),
            ("health.concurrency", self.health.concurrency),
        ];
        ensure_at_least_one(&at_least_one)?;
        if let Some(socket) = &self.handover.socket {
            ensure!(
                socket.is_absolute(),
                "handover.socket {} is not an absolute path",
                socket.display()
            );
        }
        self.redis.validate()?;
        self.etcd.validate()?;
        self.zookeeper.validate()?;
        self.consul.validate()?;
        self.state.validate()?;
        self.http.validate()?;
        self.health.validate()?;
        self.guard.validate(&nats.subject_prefix)?;
        self.l4.validate()
    }
}

fn ensure_positive(values: &[(&str, Duration)]) -> anyhow::Result<()> {
    for (key, value) in values {
        ensure!(!value.is_zero(), "{key} must be longer than 0s");
    }
    Ok(())
}

fn ensure_at_least_one(values: &[(&str, usize)]) -> anyhow::Result<()> {
    for (key, value) in values {
        ensure!(*value >= 1, "{key} must be at least 1");
    }
    Ok(())
}

impl HealthConfig {
    fn validate(&self) -> anyhow::Result<()> {
        ensure!(
            self.path.starts_with('/') && self.path.parse::<PathAndQuery>().is_ok(),
            "health.path {:?} is not a path that starts with /",
            self.path
        );
        if let Some(host) = &self.host {
            ensure!(
                host.parse::<Authority>().is_ok() && !host.contains('@'),
                "health.host {host:?} is not HOST or HOST:PORT"
            );
        }
        ensure!(
            self.interval <= MAX_HEALTH_INTERVAL,
            "health.interval must be at most 24h"
        );
        ensure!(self.jitter <= 50, "health.jitter must be 0..=50");
        ensure!(
            self.panic_threshold <= 100,
            "health.panic_threshold must be 0..=100"
        );
        Ok(())
    }
}

/// A secret: the value itself, or where to find it.
///
/// Written `"env:NAME"`, `"file:/PATH"`, or in clear. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The secret's value.
    ///
    /// # Errors
    /// The environment variable or file it points to is missing.
    pub fn reveal(&self) -> anyhow::Result<String> {
        if let Some(name) = self.0.strip_prefix("env:") {
            return std::env::var(name).with_context(|| format!("environment variable {name}"));
        }
        if let Some(path) = self.0.strip_prefix("file:") {
            let text = std::fs::read_to_string(path).with_context(|| format!("read {path}"))?;
            return Ok(text.trim_end().to_owned());
        }
        Ok(self.0.clone())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let pointer = self.0.starts_with("env:") || self.0.starts_with("file:");
        serializer.serialize_str(if pointer { &self.0 } else { "(hidden)" })
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
        String::deserialize(deserializer).map(Secret)
    }
}

/// Ports `first..=last`, written `"1024-32767"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortRange {
    pub first: u16,
    pub last: u16,
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for PortRange {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<PortRange, &'static str> {
        const SHAPE: &str = "a port range is written FIRST-LAST with 1 <= FIRST <= LAST <= 65535";
        let (first, last) = text.split_once('-').ok_or(SHAPE)?;
        let first: u16 = first.trim().parse().map_err(|_| SHAPE)?;
        let last: u16 = last.trim().parse().map_err(|_| SHAPE)?;
        if first == 0 || first > last {
            return Err(SHAPE);
        }
        Ok(PortRange { first, last })
    }
}

/// HTTP statuses, written `"200-299, 404"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusSet(Vec<RangeInclusive<u16>>);

impl StatusSet {
    pub fn contains(&self, status: u16) -> bool {
        self.0.iter().any(|range| range.contains(&status))
    }
}

impl Default for StatusSet {
    fn default() -> StatusSet {
        StatusSet(vec![200..=399])
    }
}

impl fmt::Display for StatusSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, range) in self.0.iter().enumerate() {
            f.write_str(if at == 0 { "" } else { "," })?;
            match range.start() == range.end() {
                true => write!(f, "{}", range.start())?,
                false => write!(f, "{}-{}", range.start(), range.end())?,
            }
        }
        Ok(())
    }
}

impl FromStr for StatusSet {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<StatusSet, &'static str> {
        const SHAPE: &str = "statuses are written 200-299,404, each of 200..=599";
        let status = |text: &str| match text.trim().parse() {
            Ok(status @ 200..=599) => Ok(status),
            Ok(_) | Err(_) => Err(SHAPE),
        };
        let range = |text: &str| {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            let (first, last) = (status(first)?, status(last)?);
            if first > last {
                return Err(SHAPE);
            }
            Ok(first..=last)
        };
        text.split(',')
            .map(range)
            .collect::<Result<_, _>>()
            .map(StatusSet)
    }
}

/// Where the admin API listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminListen {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl fmt::Display for AdminListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AdminListen::Tcp(address) => address.fmt(f),
            AdminListen::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for AdminListen {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<AdminListen, &'static str> {
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(AdminListen::Unix(PathBuf::from(path))),
            Some(_) => Err("the path of a unix: address is absolute"),
            None => text
                .parse()
                .map(AdminListen::Tcp)
                .map_err(|_| "an admin address is ADDRESS:PORT or unix:/PATH"),
        }
    }
}

/// serde by `Display` and `FromStr`, so that the file, the flags and the printed config agree.
macro_rules! serde_as_text {
    ($($ty:ty),*) => {$(
        impl Serialize for $ty {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $ty {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<$ty, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    )*};
}
serde_as_text!(PortRange, StatusSet, AdminListen, crate::route::Vip);

#[cfg(test)]
mod tests;
