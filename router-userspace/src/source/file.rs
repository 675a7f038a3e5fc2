//! Static routes from files: in TOML `[[route]]` after `[[route]]`, or the same in JSON, each as in
//! docs/routes.md.
//!
//! A file is named by the configuration, or lies in a directory that is; one that leaves its directory
//! takes its routes along, while one that is named and missing keeps them. One task looks at the files' size and time of change, and reads one again when either differs or
//! the configuration is reloaded; a file that is being written is left until two looks find it the
//! same. A file with an error keeps the routes it had. Only what differs from before is sent, a route
//! at a time and new ones first, so that a large file neither stalls the agent nor empties a pool on
//! the way.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context as _, anyhow, ensure};
use serde::Deserialize;
use toml::Spanned;

use crate::config::{Config, FileConfig};
use crate::event::Event;
use crate::route::declared::{Announcement, DeclaredRoute};
use crate::route::policy::HttpPolicy;
use crate::route::{Declaration, HttpMatch, Origin};
use crate::source::Context;
use crate::source::ledger::Ledger;

/// Bytes of one file.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Files of one directory.
const MAX_FILES: usize = 10_000;

/// Watches the files of the configuration until the process ends.
pub async fn run(mut context: Context) {
    let mut files: BTreeMap<PathBuf, Known> = BTreeMap::new();
    let mut ledger = Ledger::new(Origin::File);
    let mut listing = Listing::default();
    let mut was_whole = false;
    loop {
        let config = Arc::clone(&context.config.borrow_and_update());
        // The agent dropped what a reload left outside.
        ledger.retain_routes(|route| route.is_allowed(Origin::File, &config));
        let paths = listing.look(&config.file, &context).await;
        files.retain(|path, known| {
            let stays = paths.contains(path);
            if !stays && known.error.is_some() {
                context.rejects.clear(Origin::File, &path.to_string_lossy());
            }
            stays
        });
        let directories = &config.file.directories;
        let is_known = |path: &PathBuf| paths.contains(path) || directories.contains(path);
        context.metrics.files.retain(is_known);
        let mut events = Vec::new();
        for path in &paths {
            let known = files.entry(path.clone()).or_default();
            let Some(read) = look(path, known, &config).await else {
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
                Err(error) => {
                    if known.error.is_none() {
                        context.metrics.guard_refused(&error);
                    }
                    Some(format!("{error:#}"))
                }
            };
            if error.is_none() {
                context.metrics.file_loads.inc();
            }
            note(path, error, &mut known.error, &context);
        }
        let keys: BTreeSet<_> = paths.iter().map(|path| path.to_string_lossy()).collect();
        // Last, so that what moves between files is there all the time.
        events.append(&mut ledger.retain(|key| keys.contains(key)));
        if !context.send(events).await {
            return;
        }
        let is_whole = context.metrics.files.judge(&paths) == (0, 0);
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

/// Tells how the reading of a file or a directory ended; one that stays unreadable is told once.
fn note(path: &Path, error: Option<String>, before: &mut Option<String>, context: &Context) {
    let (metrics, name) = (&context.metrics, path.to_string_lossy());
    metrics.files.read(path, error.is_none());
    match &error {
        None if before.is_some() => context.rejects.clear(Origin::File, &name),
        Some(error) if before.as_ref() != Some(error) => {
            metrics.file_rejects.inc();
            context.rejects.note(Origin::File, &name, error);
            tracing::warn!(error, "routes file refused: its routes stay as they were");
        }
        None | Some(_) => {}
    }
    *before = error;
}

/// What is in each directory; one that cannot be read is as it was.
#[derive(Default)]
struct Listing {
    directories: BTreeMap<PathBuf, Directory>,
}

#[derive(Default)]
struct Directory {
    files: Vec<PathBuf>,
    error: Option<String>,
}

impl Listing {
    /// The files of the configuration and of its directories.
    async fn look(&mut self, config: &FileConfig, context: &Context) -> BTreeSet<PathBuf> {
        self.directories.retain(|path, known| {
            let stays = config.directories.contains(path);
            if !stays && known.error.is_some() {
                context.rejects.clear(Origin::File, &path.to_string_lossy());
            }
            stays
        });
        let mut paths: BTreeSet<PathBuf> = config.paths.iter().cloned().collect();
        for path in &config.directories {
            let directory = path.clone();
            let listed = tokio::task::spawn_blocking(move || list(&directory)).await;
            let known = self.directories.entry(path.clone()).or_default();
            let error = match listed.expect("a directory is listed without a panic") {
                Ok(files) => {
                    known.files = files;
                    None
                }
                Err(error) => Some(format!("{error:#}")),
            };
            note(path, error, &mut known.error, context);
            paths.extend(known.files.iter().cloned());
        }
        paths
    }
}

/// The routes files of a directory, in the order of their names. Hidden ones are somebody's drafts.
///
/// # Errors
/// It cannot be read, or has more than [`MAX_FILES`].
pub fn list(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let name = directory.display();
    let entries = std::fs::read_dir(directory).with_context(|| format!("read {name}"))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("read {name}"))?.path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes()[0] == b'.');
        let extension = path.extension().and_then(|extension| extension.to_str());
        if !hidden && matches!(extension, Some("toml" | "json")) {
            files.push(path);
        }
        ensure!(
            files.len() <= MAX_FILES,
            "read {name}: more than {MAX_FILES} files"
        );
    }
    files.sort();
    Ok(files)
}

/// Reads a file if there is something new in it, and nobody is writing it. One that cannot be read
/// is tried again at the next look.
async fn look(
    path: &Path,
    known: &mut Known,
    config: &Arc<Config>,
) -> Option<anyhow::Result<Announcement>> {
    let before = version(path);
    // Without routes there are none that half a file could withdraw.
    let settled = known.seen == before || known.is_empty;
    known.seen = before;
    if before.is_some() && (known.read == before || !settled) {
        return None;
    }
    let (path, config) = (path.to_owned(), Arc::clone(config));
    let read = tokio::task::spawn_blocking(move || {
        let text = read(&path);
        let after = version(&path);
        let parsed = text.map(|text| parse_file(&path, &text, &config));
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

/// Reads a routes file. What it names is held against `l4.vip_ranges` and the rules of `[guard]`.
///
/// # Errors
/// One message with the file, line and key.
pub fn load(path: &Path, config: &Config) -> anyhow::Result<Announcement> {
    parse_file(path, &read(path)?, config)
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

fn parse_file(path: &Path, text: &str, config: &Config) -> anyhow::Result<Announcement> {
    let is_json = path
        .extension()
        .is_some_and(|extension| extension == "json");
    let content = match is_json {
        true => parse_json(text, config),
        false => parse(text, config),
    };
    content.with_context(|| format!("routes file {}", path.display()))
}

pub(crate) fn parse(text: &str, config: &Config) -> anyhow::Result<Announcement> {
    let file: File<Spanned<DeclaredRoute>> = toml::from_str(text)?;
    let routes = file.route.into_iter().map(|route| {
        let start = route.span().start;
        let line = move || format!("line {}: ", 1 + text[..start].matches('\n').count());
        (route.into_inner(), line)
    });
    read_routes(routes, config)
}

fn parse_json(text: &str, config: &Config) -> anyhow::Result<Announcement> {
    let file: File<DeclaredRoute> = serde_json::from_str(text)?;
    let routes = file.route.into_iter();
    read_routes(routes.map(|route| (route, String::new)), config)
}

/// Reads routes, each with where it stands.
fn read_routes(
    routes: impl Iterator<Item = (DeclaredRoute, impl Fn() -> String)>,
    config: &Config,
) -> anyhow::Result<Announcement> {
    let mut content = Announcement::default();
    let mut policies: BTreeMap<HttpMatch, Arc<HttpPolicy>> = BTreeMap::new();
    for (i, (route, place)) in routes.enumerate() {
        let refused = |why| anyhow!("{}route[{i}].{why:#}", place());
        let read = route.read(Origin::File, &config.l4.vip_ranges);
        let read = read.map_err(refused)?;
        let allowed = config.guard.ownership.check_announced(Origin::File, &read);
        allowed.with_context(|| format!("{}route[{i}]", place()))?;
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
struct File<R> {
    #[serde(default = "Vec::new")]
    route: Vec<R>,
}

#[cfg(test)]
mod tests;
