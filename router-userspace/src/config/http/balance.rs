//! `[http.retries]`, `[http.ejection]` and `[http.sticky]`: what happens when a backend fails, and
//! which requests stay with one.
//!
//! The rules themselves are in `l7/retry_budget`, `l7/outlier` and `l7/sticky`.

use std::time::Duration;

use anyhow::ensure;
use http::HeaderName;
use serde::{Deserialize, Serialize};

/// Whether backends of the gateway's own zone come first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HttpZoneBalance {
    #[default]
    None,
    /// For the first attempt of a request; later ones take any.
    Prefer,
}

/// How many attempts beyond the first a route's requests may make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpRetries {
    /// Of the requests of the last ten seconds, by each worker.
    pub budget_percent: u32,
    /// What may be retried in each second whatever the budget says, by each worker.
    pub min_per_second: u32,
    /// Bytes of an idempotent request's body that are kept to send it again; a request with a longer
    /// body is sent once. At most this much for each open request.
    pub buffer_bytes: usize,
}

/// When a backend is avoided for what it did to requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpEjection {
    /// How long, the first time. Doubles with each ejection until a request succeeds.
    #[serde(with = "humantime_serde")]
    pub base: Duration,
    #[serde(with = "humantime_serde")]
    pub max: Duration,
    /// Responses of 502, 503 or 504, or none at all, one after another; 0: they do not eject.
    pub consecutive_failures: u32,
    /// How much of a pool may be ejected for such responses at once, though always one of several.
    pub max_percent: u32,
}

/// Which requests stay with the backend that served the first of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpSticky {
    /// Cookies of applications that begin a session; empty: none does.
    pub cookies: Vec<String>,
    /// The gateway's own cookie is `Secure`, whatever the application's is.
    pub secure: bool,
    /// Requests of `Authorization: Negotiate`, which proves a connection and not a client, stay with
    /// the backend that asked for it.
    pub auth_negotiate: bool,
}

impl Default for HttpRetries {
    fn default() -> HttpRetries {
        HttpRetries {
            budget_percent: 20,
            min_per_second: 3,
            buffer_bytes: 16 * 1024,
        }
    }
}

impl Default for HttpEjection {
    fn default() -> HttpEjection {
        HttpEjection {
            base: Duration::from_secs(30),
            max: Duration::from_secs(300),
            consecutive_failures: 5,
            max_percent: 50,
        }
    }
}

impl Default for HttpSticky {
    fn default() -> HttpSticky {
        HttpSticky {
            cookies: vec!["JSESSIONID".to_owned()],
            secure: false,
            auth_negotiate: false,
        }
    }
}

impl HttpRetries {
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        ensure!(
            self.budget_percent <= 1000,
            "http.retries.budget_percent must be at most 1000"
        );
        ensure!(
            self.buffer_bytes <= 1024 * 1024,
            "http.retries.buffer_bytes must be at most 1048576"
        );
        Ok(())
    }
}

impl HttpEjection {
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        ensure!(
            self.max >= self.base,
            "http.ejection.max must be at least http.ejection.base"
        );
        ensure!(
            self.max_percent <= 100,
            "http.ejection.max_percent must be at most 100"
        );
        Ok(())
    }
}

impl HttpSticky {
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        for name in &self.cookies {
            // Both are tokens (RFC 6265 §4.1.1, RFC 9110 §5.1).
            ensure!(
                HeaderName::from_bytes(name.as_bytes()).is_ok(),
                "http.sticky.cookies: {name:?} is no name of a cookie"
            );
        }
        Ok(())
    }
}
