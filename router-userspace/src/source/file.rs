//! Static routes from TOML files, the same in content as a registration over NATS.
//!
//! ```toml
//! [[route]]
//! uris = ["app.example.com/shop"]        # either may be left out
//! vips = ["tcp/192.0.2.10:9090"]
//! balance = "least-connections"          # round-robin
//! route_service_url = "https://..."
//!
//! [[route.backend]]
//! address = "10.0.0.1:8080"
//! weight = 100
//! protocol = "http2"                     # http1
//! tls = { server_name = "app.internal" } # {} checks the certificate against the address
//! ```
//!
//! One task looks at the files' size and time of change, and reads them again when either differs or
//! the configuration is reloaded. A file with an error keeps the routes it had.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context as _, bail, ensure};
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de};
use toml::Spanned;

use crate::config::HttpBalance;
use crate::event::Event;
use crate::route::{
    Backend, BackendTls, Balance, HttpMatch, HttpProtocol, Origin, Registration, RouteEvent,
    RouteKey, wire,
};
use crate::source::Context;

/// Bytes of one file.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Watches the files of the configuration until the process ends.
pub async fn run(mut context: Context) {
    let mut files: BTreeMap<PathBuf, Known> = BTreeMap::new();
    loop {
        let config = Arc::clone(&context.config.borrow_and_update());
        let mut changed = files.len();
        files.retain(|path, _| config.file.paths.contains(path));
        changed -= files.len();
        for path in &config.file.paths {
            let version = version(path);
            let known = files.entry(path.clone()).or_default();
            if known.version.as_ref() == Some(&version) {
                continue;
            }
            known.version = Some(version);
            let (path, ranges) = (path.clone(), config.l4.vip_ranges.clone());
            let loaded = tokio::task::spawn_blocking(move || load(&path, &ranges)).await;
            match loaded.expect("a file is read without a panic") {
                Ok(registrations) => {
                    tracing::info!(registrations = registrations.len(), "routes file read");
                    known.registrations = registrations;
                    changed += 1;
                    context.metrics.file_loads.inc();
                }
                Err(error) => {
                    context.metrics.file_rejects.inc();
                    let error = format!("{error:#}");
                    tracing::warn!(error, "routes file refused: its routes stay as they were");
                }
            }
        }
        if changed > 0 {
            let registrations = files.values().flat_map(|file| file.registrations.clone());
            let registrations = registrations.collect();
            let event = RouteEvent::Replace {
                origin: Origin::File,
                registrations,
            };
            if context.inbox.send(Event::Route(event)).await.is_err() {
                return;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(config.file.poll_interval) => {}
            reloaded = context.config.changed() => {
                if reloaded.is_err() {
                    return;
                }
                for known in files.values_mut() {
                    known.version = None;
                }
            }
        }
    }
}

/// Reads a routes file. VIPs are held against `vip_ranges`, as those of registrations are.
///
/// # Errors
/// One message with the file, line and key.
pub fn load(path: &Path, vip_ranges: &[IpNet]) -> anyhow::Result<Vec<Registration>> {
    let name = path.display();
    let metadata = std::fs::metadata(path).with_context(|| format!("read {name}"))?;
    ensure!(
        metadata.len() <= MAX_FILE_BYTES,
        "read {name}: longer than {MAX_FILE_BYTES} bytes"
    );
    let text = std::fs::read_to_string(path).with_context(|| format!("read {name}"))?;
    parse(&text, vip_ranges).with_context(|| format!("routes file {name}"))
}

fn parse(text: &str, vip_ranges: &[IpNet]) -> anyhow::Result<Vec<Registration>> {
    let file: File = toml::from_str(text)?;
    let mut registrations = Vec::new();
    for (i, route) in file.route.into_iter().enumerate() {
        let mut routes: Vec<RouteKey> = route
            .uris
            .into_iter()
            .map(|Uri(http)| http.into())
            .collect();
        for (j, vip) in route.vips.iter().enumerate() {
            let line = 1 + text[..vip.span().start].matches('\n').count();
            let vip = wire::parse_vip(vip.as_ref(), Some(vip_ranges));
            let vip = vip
                .map_err(|(_, why)| anyhow::anyhow!("line {line}: route[{i}].vips[{j}]: {why}"))?;
            routes.push(RouteKey::Vip(vip));
        }
        if routes.is_empty() {
            bail!("route[{i}]: neither uris nor vips");
        }
        for backend in route.backend {
            registrations.push(Registration {
                routes: routes.clone(),
                backend: Arc::new(backend.into()),
                stale_after: None,
                balance: route.balance.map(|balance| match balance {
                    HttpBalance::RoundRobin => Balance::RoundRobin,
                    HttpBalance::LeastConnections => Balance::LeastConnections,
                }),
                route_service_url: route
                    .route_service_url
                    .as_ref()
                    .map(|Https(url)| url.clone()),
            });
        }
    }
    Ok(registrations)
}

#[derive(Default)]
struct Known {
    /// `None`: to be read whatever it is.
    version: Option<Version>,
    registrations: Vec<Registration>,
}

/// What changes when a file does; `None` while it cannot be looked at.
type Version = Option<(SystemTime, u64)>;

fn version(path: &Path) -> Version {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    route: Vec<Route>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Route {
    #[serde(default)]
    uris: Vec<Uri>,
    #[serde(default)]
    vips: Vec<Spanned<String>>,
    balance: Option<HttpBalance>,
    route_service_url: Option<Https>,
    backend: Vec<FileBackend>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileBackend {
    address: Address,
    #[serde(default)]
    weight: Weight,
    tls: Option<FileTls>,
    #[serde(default)]
    protocol: FileProtocol,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileTls {
    server_name: Option<Arc<str>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FileProtocol {
    #[default]
    Http1,
    Http2,
}

struct Uri(HttpMatch);
struct Https(Arc<str>);
struct Address(SocketAddr);
struct Weight(u16);

impl Default for Weight {
    fn default() -> Weight {
        Weight(wire::DEFAULT_WEIGHT)
    }
}

impl From<HttpMatch> for RouteKey {
    fn from(http: HttpMatch) -> RouteKey {
        RouteKey::Http(http)
    }
}

impl From<FileBackend> for Backend {
    fn from(backend: FileBackend) -> Backend {
        Backend {
            weight: backend.weight.0,
            tls: backend.tls.map(|tls| BackendTls {
                server_name: tls.server_name,
            }),
            protocol: match backend.protocol {
                FileProtocol::Http1 => HttpProtocol::Http1,
                FileProtocol::Http2 => HttpProtocol::Http2,
            },
            ..Backend::new(backend.address.0, Origin::File)
        }
    }
}

// Checked while the file is read, so that TOML's errors point at the line.
impl<'de> Deserialize<'de> for Uri {
    fn deserialize<D: Deserializer<'de>>(toml: D) -> Result<Uri, D::Error> {
        let uri = String::deserialize(toml)?;
        wire::parse_uri(&uri).map(Uri).map_err(de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Https {
    fn deserialize<D: Deserializer<'de>>(toml: D) -> Result<Https, D::Error> {
        let url = String::deserialize(toml)?;
        match url.starts_with("https") {
            true => Ok(Https(url.into())),
            false => Err(de::Error::custom("a route service starts with https")),
        }
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(toml: D) -> Result<Address, D::Error> {
        let address = SocketAddr::deserialize(toml)?;
        wire::check_backend_address(address.ip()).map_err(de::Error::custom)?;
        match address.port() {
            0 => Err(de::Error::custom("port 0 is not a port")),
            1.. => Ok(Address(address)),
        }
    }
}

impl<'de> Deserialize<'de> for Weight {
    fn deserialize<D: Deserializer<'de>>(toml: D) -> Result<Weight, D::Error> {
        match u16::deserialize(toml)? {
            weight @ 1..=wire::MAX_WEIGHT => Ok(Weight(weight)),
            weight => Err(de::Error::custom(format!(
                "weight {weight} is not in 1..=1000"
            ))),
        }
    }
}

#[cfg(test)]
mod tests;
