//! Static routes from TOML files: `[[route]]` after `[[route]]`, each as in docs/routes.md.
//!
//! One task looks at the files' size and time of change, and reads one again when either differs or
//! the configuration is reloaded; a file that is being written is left until two looks find it the
//! same. A file with an error keeps the routes it had. Only what differs from before is sent, a route
//! at a time and new ones first, so that a large file neither stalls the agent nor empties a pool on
//! the way.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context as _, anyhow, ensure};
use ipnet::IpNet;
use serde::Deserialize;
use toml::Spanned;

use crate::event::Event;
use crate::route::declared::{Announcement, DeclaredRoute};
use crate::route::policy::HttpPolicy;
use crate::route::{Declaration, HttpMatch, Origin};
use crate::source::Context;
use crate::source::ledger::Ledger;

/// Bytes of one file.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Watches the files of the configuration until the process ends.
pub async fn run(mut context: Context) {
    let mut files: BTreeMap<PathBuf, Known> = BTreeMap::new();
    let mut ledger = Ledger::new(Origin::File);
    let mut was_whole = false;
    loop {
        let config = Arc::clone(&context.config.borrow_and_update());
        // The agent dropped what a reload left outside.
        ledger.retain_routes(|route| route.is_allowed(&config.l4));
        files.retain(|path, _| config.file.paths.contains(path));
        context.metrics.files.retain(&config.file.paths);
        let mut events = Vec::new();
        for path in &config.file.paths {
            let known = files.entry(path.clone()).or_default();
            let Some(read) = look(path, known, &config.l4.vip_ranges).await else {
                continue;
            };
            let key = path.to_string_lossy();
            let error = match read {
                Ok(content) => {
                    let path = path.display();
                    let registrations = content.registrations.len();
                    let declarations = content.declarations.len();
                    tracing::info!(%path, registrations, declarations, "routes file read");
                    known.is_empty = content.is_empty();
                    events.append(&mut ledger.set(&key, content));
                    None
                }
                Err(error) => Some(format!("{error:#}")),
            };
            context.metrics.files.read(path, error.is_none());
            match &error {
                None => {
                    context.metrics.file_loads.inc();
                    context.rejects.clear(Origin::File, &key);
                }
                // One that stays unreadable is told once.
                Some(error) if known.error.as_ref() != Some(error) => {
                    context.metrics.file_rejects.inc();
                    context.rejects.note(Origin::File, &key, error);
                    tracing::warn!(error, "routes file refused: its routes stay as they were");
                }
                Some(_) => {}
            }
            known.error = error;
        }
        // Last, so that what moves between files is there all the time.
        let configured = |key: &str| {
            let mut paths = config.file.paths.iter();
            paths.any(|path| path.to_string_lossy() == key)
        };
        events.append(&mut ledger.retain(configured));
        if !context.send(events).await {
            return;
        }
        let is_whole = context.metrics.files.judge(&config.file.paths) == (0, 0);
        if is_whole != was_whole {
            was_whole = is_whole;
            let event = Event::SourceConnected {
                origin: Origin::File,
                connected: is_whole,
            };
            if context.inbox.send(event).await.is_err() {
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
) -> Option<anyhow::Result<Announcement>> {
    let before = version(path);
    // Without routes there are none that half a file could withdraw.
    let settled = known.seen == before || known.is_empty;
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

/// Reads a routes file. VIPs are held against `vip_ranges`, as those of registrations are.
///
/// # Errors
/// One message with the file, line and key.
pub fn load(path: &Path, vip_ranges: &[IpNet]) -> anyhow::Result<Announcement> {
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

fn parse_file(path: &Path, text: &str, vip_ranges: &[IpNet]) -> anyhow::Result<Announcement> {
    parse(text, vip_ranges).with_context(|| format!("routes file {}", path.display()))
}

pub(crate) fn parse(text: &str, vip_ranges: &[IpNet]) -> anyhow::Result<Announcement> {
    let file: File = toml::from_str(text)?;
    let mut content = Announcement::default();
    let mut policies: BTreeMap<HttpMatch, Arc<HttpPolicy>> = BTreeMap::new();
    for (i, route) in file.route.into_iter().enumerate() {
        let start = route.span().start;
        let refused = |why| {
            let line = 1 + text[..start].matches('\n').count();
            anyhow!("line {line}: route[{i}].{why:#}")
        };
        let read = route.into_inner().read(Origin::File, vip_ranges);
        let read = read.map_err(refused)?;
        for Declaration { route, policy } in &read.declarations {
            let before = policies.insert(route.clone(), Arc::clone(policy));
            ensure!(
                before.is_none_or(|before| before == *policy),
                refused(anyhow!(
                    "uris: an earlier route asks for something else for {route}"
                ))
            );
        }
        content.registrations.extend(read.registrations);
        content.declarations.extend(read.declarations);
    }
    Ok(content)
}

struct Known {
    /// At the latest look.
    seen: Option<Version>,
    /// Whose content was taken or refused; `None`: to be read again.
    read: Option<Version>,
    /// Whether its content announces nothing.
    is_empty: bool,
    error: Option<String>,
}

impl Default for Known {
    fn default() -> Known {
        Known {
            seen: None,
            read: None,
            is_empty: true,
            error: None,
        }
    }
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
    route: Vec<Spanned<DeclaredRoute>>,
}

#[cfg(test)]
mod tests;
