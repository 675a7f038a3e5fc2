//! `[http.access_log]`: what is written down of each request.
//!
//! The lines themselves are made in `l7/access_log`.

use std::path::PathBuf;

use anyhow::ensure;
use http::HeaderName;
use serde::{Deserialize, Serialize};

/// Most headers that are logged beside those every line has.
const MAX_LOGGED_HEADERS: usize = 32;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpAccessLog {
    /// A file, or `stdout`; unset: no access log.
    pub path: Option<PathBuf>,
    pub format: AccessLogFormat,
    /// Request headers that are logged beside those every line has, as backends get them.
    pub headers: Vec<String>,
    pub redact_query: RedactQuery,
    /// Neither the client's address nor `X-Forwarded-For` is logged.
    pub disable_client_address: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccessLogFormat {
    /// One object a line.
    #[default]
    Json,
    /// The line of Cloud Foundry's gorouter.
    Gorouter,
}

/// What becomes of the query in targets and referrers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RedactQuery {
    #[default]
    None,
    /// It is left out, with its `?`.
    All,
    /// Its SHA-1 is there in hexadecimal, as gorouter does.
    Hash,
}

impl HttpAccessLog {
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        ensure!(
            self.headers.len() <= MAX_LOGGED_HEADERS,
            "http.access_log.headers must be at most {MAX_LOGGED_HEADERS}"
        );
        for name in &self.headers {
            ensure!(
                HeaderName::from_bytes(name.as_bytes()).is_ok(),
                "http.access_log.headers: {name:?} is no name of a header"
            );
        }
        Ok(())
    }
}
