//! `[state]`: what is kept on disk for a start without any source.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StateConfig {
    /// Where the last known routes are kept; unset, they are not.
    pub directory: Option<PathBuf>,
    /// The shortest time from one writing of the routes to the next.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
}

impl Default for StateConfig {
    fn default() -> StateConfig {
        StateConfig {
            directory: None,
            interval: Duration::from_secs(5),
        }
    }
}

impl StateConfig {
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        ensure!(
            !self.interval.is_zero(),
            "state.interval must be longer than 0s"
        );
        if let Some(directory) = &self.directory {
            ensure!(
                directory.is_absolute(),
                "state.directory {} is not an absolute path",
                directory.display()
            );
        }
        Ok(())
    }
}
