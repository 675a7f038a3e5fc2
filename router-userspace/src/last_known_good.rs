//! The routes as they were last known, on disk: what a gateway serves that starts with every source
//! away.
//!
//! A thread of its own [writes](Writer) the published snapshot to a file, whole, when it became another
//! and at most once every `state.interval`; at a start the file is [read](read) before any source
//! speaks, and the agent [adopts](crate::agent::Agent::adopt) what it held. Health, drains and counters
//! are not kept. The file replaces its predecessor in one step: whoever reads it finds the old or the new
//! one. It is trusted as the configuration is; a checksum tells damage, not forgery.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::config::StateConfig;

mod bytes;
mod events;
mod file;
mod policy;
mod words;
mod writer;

pub use events::Events;
pub use writer::{State, Writer, start};

/// The file, in `state.directory`.
const FILE: &str = "routes.state";
/// It is written under this name.
const NEW_FILE: &str = "routes.state.new";
/// Held by the process that writes.
const LOCK: &str = "lock";
/// What a file may be in bytes: about ten times what four million short routes need.
const MAX_FILE_BYTES: u64 = 4 << 30;

/// What an earlier gateway knew.
#[derive(Debug)]
pub struct Kept {
    pub events: Events,
    /// Since when nothing may have been repeated.
    pub as_of: SystemTime,
}

impl Kept {
    pub fn age(&self) -> Duration {
        self.as_of.elapsed().unwrap_or_default()
    }
}

/// Reads what is kept, if it is kept at all. A file that is not whole is set aside under a name with
/// the time, and the start goes on without it.
pub fn read(config: &StateConfig) -> Option<Kept> {
    let path = config.directory.as_ref()?.join(FILE);
    let error = match file::read(&path) {
        Ok(kept) => return Some(kept),
        Err(file::Unread::Missing) => {
            tracing::info!(path = %path.display(), "no routes are on disk yet");
            return None;
        }
        Err(file::Unread::Unreadable(error)) => {
            tracing::warn!(path = %path.display(), %error, "routes on disk not read");
            return None;
        }
        Err(file::Unread::Corrupt(error)) => error,
    };
    let aside = set_aside(&path);
    match aside {
        Ok(aside) => tracing::warn!(
            path = %path.display(),
            aside = %aside.display(),
            error,
            "routes on disk are damaged or of another version: set aside"
        ),
        Err(failed) => tracing::warn!(
            path = %path.display(),
            error,
            %failed,
            "routes on disk are damaged or of another version, and cannot be set aside"
        ),
    }
    None
}

/// Gives a file a name that no other file set aside has.
fn set_aside(path: &Path) -> std::io::Result<PathBuf> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let mut at = now.unwrap_or_default().as_secs();
    loop {
        let aside = path.with_file_name(format!("{FILE}.corrupt-{at}"));
        match std::fs::hard_link(path, &aside) {
            Ok(()) => {
                std::fs::remove_file(path)?;
                return Ok(aside);
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => at += 1,
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
