//! Keys of `[http.limits]` that have a table of their own.

use anyhow::ensure;
use serde::{Deserialize, Serialize};

use crate::route::policy::Rate;

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpRate {
    pub per_second: u32,
    /// As `per_second` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u32>,
}

impl HttpRate {
    pub fn rate(self) -> Rate {
        Rate {
            per_second: self.per_second,
            burst: self.burst.unwrap_or(self.per_second),
        }
    }

    pub(super) fn validate(self, key: &str) -> anyhow::Result<()> {
        let Rate { per_second, burst } = self.rate();
        ensure!(per_second > 0, "{key}.per_second must be at least 1");
        ensure!(burst > 0, "{key}.burst must be at least 1");
        Ok(())
    }
}
