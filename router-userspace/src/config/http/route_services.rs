//! `[http.route_services]`: requests that go through a service before they reach their route's backends.
//!
//! Which routes have a service, registrations and routes files say. The rules are in
//! `l7/route_service`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use serde::{Deserialize, Serialize};

use crate::config::{BackendTlsConfig, Secret, ensure_at_least_one, ensure_positive};

/// Most entries of `hairpinning_allowlist`.
const MAX_ALLOWED_HOSTS: usize = 256;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpRouteServices {
    /// Signs what is sent to services. Without it, requests of routes with a service are answered 502.
    pub secret: Option<Secret>,
    /// Signatures of this secret are taken as well, and none are made: for changing `secret`.
    pub previous_secret: Option<Secret>,
    /// From a request's being sent to its service until it has to be back.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// Whether services are told to call back by `https`, whatever the client used.
    pub recommend_https: bool,
    /// Whether services that are routes of this gateway are reached without leaving it.
    pub hairpinning: bool,
    /// Hosts of services for which that holds, `*.`-wildcards for one label; empty: all.
    pub hairpinning_allowlist: Vec<String>,
    /// Attempts of one request at the addresses of its service, the first included.
    pub max_attempts: usize,
    /// Whether a signature is checked also on routes without a service.
    pub strict_signature_validation: bool,
    /// Roots that the certificates of services are verified with.
    pub ca_file: Option<PathBuf>,
    pub system_roots: bool,
    /// Shown to services that ask for a certificate.
    pub certificate_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
}

impl Default for HttpRouteServices {
    fn default() -> HttpRouteServices {
        HttpRouteServices {
            secret: None,
            previous_secret: None,
            timeout: Duration::from_secs(60),
            recommend_https: true,
            hairpinning: false,
            hairpinning_allowlist: Vec::new(),
            max_attempts: 3,
            strict_signature_validation: false,
            ca_file: None,
            system_roots: true,
            certificate_file: None,
            key_file: None,
        }
    }
}

impl HttpRouteServices {
    /// How services are verified; `None` if none is ever called.
    pub fn tls(&self) -> Option<BackendTlsConfig> {
        self.secret.as_ref()?;
        Some(BackendTlsConfig {
            ca_file: self.ca_file.clone(),
            system_roots: self.system_roots,
            certificate_file: self.certificate_file.clone(),
            key_file: self.key_file.clone(),
        })
    }

    pub(super) fn validate(&self) -> anyhow::Result<()> {
        ensure_positive(&[("http.route_services.timeout", self.timeout)])?;
        ensure_at_least_one(&[("http.route_services.max_attempts", self.max_attempts)])?;
        ensure!(
            self.secret.is_some() || self.previous_secret.is_none(),
            "http.route_services.previous_secret needs http.route_services.secret"
        );
        ensure!(
            self.secret.is_some() || !self.strict_signature_validation,
            "http.route_services.strict_signature_validation needs http.route_services.secret"
        );
        ensure!(
            self.ca_file.is_some() || self.system_roots,
            "http.route_services needs ca_file or system_roots"
        );
        ensure!(
            self.certificate_file.is_some() == self.key_file.is_some(),
            "http.route_services.certificate_file and http.route_services.key_file go together"
        );
        ensure!(
            self.hairpinning_allowlist.len() <= MAX_ALLOWED_HOSTS,
            "http.route_services.hairpinning_allowlist has more than {MAX_ALLOWED_HOSTS} entries"
        );
        for entry in &self.hairpinning_allowlist {
            ensure!(
                is_host_pattern(entry),
                "http.route_services.hairpinning_allowlist: {entry:?} is neither HOST.DOMAIN nor *.DOMAIN"
            );
        }
        Ok(())
    }
}

/// Two labels at least, the first of which may be `*` before two others.
fn is_host_pattern(entry: &str) -> bool {
    let name = entry.strip_prefix("*.").unwrap_or(entry);
    let is_label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    name.contains('.') && name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use crate::config::parse;

    #[test]
    fn route_services_are_read_whole() {
        let config = parse(
            r#"
            [http.route_services]
            secret = "env:SECRET"
            previous_secret = "file:/secret"
            timeout = "30s"
            recommend_https = false
            hairpinning = true
            hairpinning_allowlist = ["*.example.com", "waf.example.org"]
            max_attempts = 2
            strict_signature_validation = true
            ca_file = "/ca.pem"
            system_roots = false
            certificate_file = "/g.crt"
            key_file = "/g.key"
            "#,
        )
        .unwrap();
        assert!(config.http.route_services.tls().is_some());
        let text = toml::to_string(&config).unwrap();
        assert_eq!(parse(&text).unwrap(), config, "{text}");
    }

    #[test]
    fn without_a_secret_no_roots_are_needed() {
        assert_eq!(parse("").unwrap().http.route_services.tls(), None);
    }

    #[test]
    fn what_contradicts_itself_is_refused_by_name() {
        for (text, wanted) in [
            ("previous_secret = \"a\"", "previous_secret"),
            (
                "strict_signature_validation = true",
                "strict_signature_validation",
            ),
            ("timeout = \"0s\"", "timeout"),
            ("max_attempts = 0", "max_attempts"),
            ("system_roots = false", "ca_file"),
            ("key_file = \"/k\"", "go together"),
            ("hairpinning_allowlist = [\"com\"]", "\"com\""),
            ("hairpinning_allowlist = [\"*.com\"]", "\"*.com\""),
            ("hairpinning_allowlist = [\"a.*.com\"]", "\"a.*.com\""),
        ] {
            let text = format!("[http.route_services]\n{text}\n");
            let message = format!("{:#}", parse(&text).unwrap_err());
            assert!(message.contains(wanted), "{text}: {message}");
        }
    }
}
