//! `[http.access_log]`, `[http.metrics]` and `[http.tracing]`: what is told of requests, and to whom.
//!
//! Lines are made in `l7/access_log`, metrics in `metrics/proxy`.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::ensure;
use http::uri::{Authority, PathAndQuery};
use http::{HeaderName, Uri};
use serde::{Deserialize, Serialize};

/// Most headers that are logged beside those every line has.
const MAX_LOGGED_HEADERS: usize = 32;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpAccessLog {
    /// A file, or `stdout`; without this and `syslog`, there is no access log.
    pub path: Option<PathBuf>,
    /// Instead of a file: `unix:/dev/log`, or `udp://ADDRESS:PORT`.
    pub syslog: Option<SyslogAddress>,
    pub format: AccessLogFormat,
    /// Request headers that are logged beside those every line has, as backends get them.
    pub headers: Vec<String>,
    pub redact_query: RedactQuery,
    /// Neither the client's address nor `X-Forwarded-For` is logged.
    pub disable_client_address: bool,
}

/// Where syslog takes datagrams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SyslogAddress {
    Unix(PathBuf),
    Udp(SocketAddr),
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

/// What `/metrics` has beside the sums of the gateway. The admin API has it in any case.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpMetrics {
    /// 29 series for each route that had requests.
    pub per_route: bool,
    /// The same for each backend, of which there are two otherwise.
    pub per_backend: bool,
}

/// What becomes of trace contexts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpTracing {
    pub mode: TraceMode,
    /// `traceparent` and `tracestate` are looked at.
    pub w3c: bool,
    /// `b3` and `X-B3-*` are.
    pub b3: bool,
    /// Only contexts of `trusted_proxies` are believed.
    pub trusted_only: bool,
    /// Share of the traces begun here that are marked as sampled, 0 to 1.
    pub sample: f64,
    /// A collector that sampled requests are exported to, over OTLP/HTTP with protobuf: `http://HOST:PORT` or
    /// with a path beside `/v1/traces`. Unset: none.
    pub endpoint: Option<CollectorUrl>,
    /// The `service.name` of the spans.
    pub service_name: String,
}

/// Where spans are posted to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CollectorUrl {
    authority: Authority,
    path: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TraceMode {
    /// Trace headers are passed on unread.
    #[default]
    Off,
    /// Valid ones are passed on as they are, others are removed.
    Pass,
    /// The gateway is a span of the trace that came, or of a new one.
    Begin,
}

/// What becomes of `Forwarded` (RFC 7239).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ForwardedHeader {
    /// That of `trusted_proxies` is kept, that of others removed.
    #[default]
    Off,
    /// The same, and the gateway adds its part.
    Append,
    /// It is the gateway's alone.
    Replace,
}

impl TryFrom<String> for SyslogAddress {
    type Error = String;

    fn try_from(text: String) -> Result<SyslogAddress, String> {
        let address = match (text.strip_prefix("unix:"), text.strip_prefix("udp://")) {
            (Some(path), _) if path.starts_with('/') => Some(SyslogAddress::Unix(path.into())),
            (_, Some(udp)) => udp.parse().ok().map(SyslogAddress::Udp),
            _ => None,
        };
        address.ok_or_else(|| format!("{text:?} is neither unix:/PATH nor udp://ADDRESS:PORT"))
    }
}

impl From<SyslogAddress> for String {
    fn from(address: SyslogAddress) -> String {
        address.to_string()
    }
}

impl fmt::Display for SyslogAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SyslogAddress::Unix(path) => write!(f, "unix:{}", path.display()),
            SyslogAddress::Udp(address) => write!(f, "udp://{address}"),
        }
    }
}

impl CollectorUrl {
    /// The port of OTLP over HTTP.
    const PORT: u16 = 4318;

    const PATH: &str = "/v1/traces";

    pub fn authority(&self) -> &str {
        self.authority.as_str()
    }

    /// To be connected to; the host may be a name.
    pub fn host_and_port(&self) -> (&str, u16) {
        let host = self.authority.host().trim_matches(['[', ']']);
        (host, self.authority.port_u16().unwrap_or(Self::PORT))
    }

    pub fn path(&self) -> &str {
        &self.path
    }
}

impl TryFrom<String> for CollectorUrl {
    type Error = String;

    fn try_from(text: String) -> Result<CollectorUrl, String> {
        let wanted = || format!("{text:?} is not of the form http://HOST:PORT/PATH");
        let uri: Uri = text.parse().map_err(|_| wanted())?;
        let authority = uri.authority().filter(|it| !it.as_str().contains('@'));
        let (Some("http"), Some(authority)) = (uri.scheme_str(), authority) else {
            return Err(wanted());
        };
        let path = match uri.path_and_query().map_or("/", PathAndQuery::as_str) {
            "/" => Self::PATH,
            path => path,
        };
        Ok(CollectorUrl {
            authority: authority.clone(),
            path: path.to_owned(),
        })
    }
}

impl From<CollectorUrl> for String {
    fn from(url: CollectorUrl) -> String {
        url.to_string()
    }
}

impl fmt::Display for CollectorUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.authority, self.path)
    }
}

impl Default for HttpTracing {
    fn default() -> HttpTracing {
        HttpTracing {
            mode: TraceMode::Off,
            w3c: true,
            b3: false,
            trusted_only: false,
            sample: 1.0,
            endpoint: None,
            service_name: "viaduct".to_owned(),
        }
    }
}

impl HttpTracing {
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        ensure!(
            (0.0..=1.0).contains(&self.sample),
            "http.tracing.sample must be from 0 to 1"
        );
        ensure!(
            self.endpoint.is_none() || self.mode == TraceMode::Begin,
            "http.tracing.endpoint needs http.tracing.mode = \"begin\""
        );
        Ok(())
    }
}

impl HttpAccessLog {
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        ensure!(
            self.path.is_none() || self.syslog.is_none(),
            "http.access_log has path or syslog, not both"
        );
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syslog_is_a_socket_of_this_host_or_an_address() {
        for text in ["unix:/dev/log", "udp://192.0.2.1:514", "udp://[::1]:514"] {
            let address = SyslogAddress::try_from(text.to_owned()).unwrap();
            assert_eq!(String::from(address), text);
        }
        for bad in [
            "/dev/log",
            "unix:log",
            "udp://host:514",
            "tcp://192.0.2.1:514",
            "",
        ] {
            assert!(SyslogAddress::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_collector_without_a_path_has_that_of_traces() {
        let url = |text: &str| CollectorUrl::try_from(text.to_owned());
        for (text, whole) in [
            ("http://otel:4318", "http://otel:4318/v1/traces"),
            ("http://otel/", "http://otel/v1/traces"),
            ("http://[::1]:1/a?b", "http://[::1]:1/a?b"),
        ] {
            assert_eq!(url(text).unwrap().to_string(), whole);
        }
        assert_eq!(url("http://[::1]").unwrap().host_and_port(), ("::1", 4318));
        for bad in [
            "https://otel",
            "otel:4318",
            "/v1",
            "http://",
            "http://a@b",
            "",
        ] {
            assert!(url(bad).is_err(), "{bad}");
        }
    }
}
