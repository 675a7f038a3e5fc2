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
//! One task looks at the files' size and time of change, and reads one again when either differs or
//! the configuration is reloaded; a file that is being written is left until two looks find it the
//! same. A file with an error keeps the routes it had. Only what differs from before is sent, a route
//! at a time and new ones first, so that a large file neither stalls the agent nor empties a pool on
//! the way.

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
    RouteKey, Unregistration, wire,
};
use crate::source::Context;

/// Bytes of one file.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Watches the files of the configuration until the process ends.
pub async fn run(mut context: Context) {
    let mut files: BTreeMap<PathBuf, Known> = BTreeMap::new();
    let mut announced = Announced::new();
    loop {
        let config = Arc::clone(&context.config.borrow_and_update());
        let mut changed = files.len();
        files.retain(|path, _| config.file.paths.contains(path));
        context.metrics.files.retain(&config.file.paths);
        changed -= files.len();
        for path in &config.file.paths {
            let known = files.entry(path.clone()).or_default();
            let Some(read) = look(path, known, &config.l4.vip_ranges).await else {
                continue;
            };
            let error = match read {
                Ok(registrations) => {
                    let path = path.display();
                    tracing::info!(%path, registrations = registrations.len(), "routes file read");
                    known.registrations = registrations;
                    changed += 1;
                    None
                }
                Err(error) => Some(format!("{error:#}")),
            };
            context.metrics.files.read(path, error.is_none());
            match &error {
                None => context.metrics.file_loads.inc(),
                // One that stays unreadable is told once.
                Some(error) if known.error.as_ref() != Some(error) => {
                    context.metrics.file_rejects.inc();
                    tracing::warn!(error, "routes file refused: its routes stay as they were");
                }
                Some(_) => {}
            }
            known.error = error;
        }
        // The agent dropped what a reload left outside.
        announced.retain(|(route, _), _| route.is_allowed(&config.l4));
        if changed > 0 {
            let wanted = wanted(&files);
            for event in differences(&announced, &wanted) {
                if context.inbox.send(Event::Route(event)).await.is_err() {
                    return;
                }
            }
            announced = wanted;
        }
        tokio::select! {
            () = tokio::time::sleep(config.file.poll_interval) => {}
            reloaded = context.config.changed() => {
                if reloaded.is_err() {
                    return;
                }
                for known in files.values_mut() {
                    known.read = None;
                }
            }
        }
    }
}

/// Reads a file if there is something new in it, and nobody is writing it. One that cannot be read
/// is tried again at the next look.
async fn look(
    path: &Path,
    known: &mut Known,
    vip_ranges: &[IpNet],
) -> Option<anyhow::Result<Vec<Registration>>> {
    let before = version(path);
    // Without routes there are none that half a file could withdraw.
    let settled = known.seen == before || known.registrations.is_empty();
    known.seen = before;
    if before.is_some() && (known.read == before || !settled) {
        return None;
    }
    let (path, vip_ranges) = (path.to_owned(), vip_ranges.to_vec());
    let read = tokio::task::spawn_blocking(move || {
        let text = read(&path);
        let after = version(&path);
        let parsed = text.map(|text| parse_file(&path, &text, &vip_ranges));
        (parsed, after)
    });
    let (parsed, after) = read.await.expect("a file is read without a panic");
    if before != after {
        return None;
    }
    match parsed {
        Ok(parsed) => {
            known.read = before;
            Some(parsed)
        }
        Err(error) => Some(Err(error)),
    }
}

/// What the files announce together; the last word on an address of a route counts.
fn wanted(files: &BTreeMap<PathBuf, Known>) -> Announced {
    let mut wanted = Announced::new();
    for registration in files.values().flat_map(|file| &file.registrations) {
        for route in &registration.routes {
            let one = Registration {
                routes: vec![route.clone()],
                ..registration.clone()
            };
            wanted.insert((route.clone(), registration.backend.address), one);
        }
    }
    wanted
}

fn differences<'a>(
    from: &'a Announced,
    to: &'a Announced,
) -> impl Iterator<Item = RouteEvent> + 'a {
    let added = to
        .iter()
        .filter(|(key, registration)| from.get(key) != Some(registration))
        .map(|(_, registration)| RouteEvent::Register(registration.clone()));
    let removed = from
        .keys()
        .filter(|key| !to.contains_key(key))
        .map(|(route, address)| {
            RouteEvent::Unregister(Unregistration {
                routes: vec![route.clone()],
                address: *address,
                origin: Origin::File,
            })
        });
    added.chain(removed)
}

/// Reads a routes file. VIPs are held against `vip_ranges`, as those of registrations are.
///
/// # Errors
/// One message with the file, line and key.
pub fn load(path: &Path, vip_ranges: &[IpNet]) -> anyhow::Result<Vec<Registration>> {
    parse_file(path, &read(path)?, vip_ranges)
}

fn read(path: &Path) -> anyhow::Result<String> {
    let name = path.display();
    let metadata = std::fs::metadata(path).with_context(|| format!("read {name}"))?;
    ensure!(
        metadata.len() <= MAX_FILE_BYTES,
        "read {name}: longer than {MAX_FILE_BYTES} bytes"
    );
    std::fs::read_to_string(path).with_context(|| format!("read {name}"))
}

fn parse_file(path: &Path, text: &str, vip_ranges: &[IpNet]) -> anyhow::Result<Vec<Registration>> {
    parse(text, vip_ranges).with_context(|| format!("routes file {}", path.display()))
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

/// Registrations of one route each.
type Announced = BTreeMap<(RouteKey, SocketAddr), Registration>;

#[derive(Default)]
struct Known {
    /// At the latest look.
    seen: Option<Version>,
    /// Whose content was taken or refused; `None`: to be read again.
    read: Option<Version>,
    registrations: Vec<Registration>,
    error: Option<String>,
}

/// What changes when a file does: when it was written, and its length.
type Version = (SystemTime, u64);

/// `None` while the file cannot be looked at.
fn version(path: &Path) -> Option<Version> {
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
            weight @ 0..=wire::MAX_WEIGHT => Ok(Weight(weight)),
            weight => Err(de::Error::custom(format!(
                "weight {weight} is not in 0..=1000"
            ))),
        }
    }
}

#[cfg(test)]
mod tests;
