//! `[http.tls]` and `[http.backend_tls]`: certificates of both sides of a request.
//!
//! Only what can be judged without opening a file is judged here; [`crate::l7`] reads the files, when
//! it starts and again when they change.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::ensure;
use serde::{Deserialize, Serialize};

/// TLS towards clients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpTlsConfig {
    /// Addresses that speak TLS; empty switches it off.
    pub listen: Vec<SocketAddr>,
    /// The first is the default, for clients that name no host or one that no certificate is for.
    pub certificates: Vec<CertificateFiles>,
    /// Every `NAME.crt` or `NAME.pem` in it that has a `NAME.key`, in the order of their names.
    pub certificate_directory: Option<PathBuf>,
    /// Refuses clients that would get the default certificate for want of another.
    pub strict_sni: bool,
    pub min_version: TlsVersion,
    /// Offers HTTP/2 by ALPN.
    pub http2: bool,
    /// Serves HTTP/3 on the UDP ports of `listen`, and says so to clients (RFC 7838).
    pub http3: bool,
    /// Every client of HTTP/3 shows first that it gets what is sent to its address, which costs it a round
    /// trip (Retry, RFC 9000 §8.1.2); otherwise only while many handshakes are under way.
    pub http3_retry: bool,
    pub client_auth: ClientAuth,
    /// PEM certificates that those of clients are verified against.
    pub client_ca_file: Option<PathBuf>,
}

/// A certificate chain, leaf first, and the leaf's key, both PEM.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateFiles {
    pub certificate_file: PathBuf,
    pub key_file: PathBuf,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TlsVersion {
    #[default]
    #[serde(rename = "1.2")]
    Tls12,
    #[serde(rename = "1.3")]
    Tls13,
}

/// Whether clients show a certificate. One that is shown must verify.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientAuth {
    #[default]
    None,
    Request,
    Require,
}

/// TLS towards backends that registered with `tls_port`. Without roots they are answered for by 503.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BackendTlsConfig {
    /// PEM certificates that those of backends are verified against.
    pub ca_file: Option<PathBuf>,
    /// The system's bundle as well, which vouches for the public web.
    pub system_roots: bool,
    /// What the gateway shows to backends that ask for a certificate.
    pub certificate_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
}

impl Default for HttpTlsConfig {
    fn default() -> HttpTlsConfig {
        HttpTlsConfig {
            listen: Vec::new(),
            certificates: Vec::new(),
            certificate_directory: None,
            strict_sni: false,
            min_version: TlsVersion::Tls12,
            http2: true,
            http3: false,
            http3_retry: false,
            client_auth: ClientAuth::None,
            client_ca_file: None,
        }
    }
}

impl HttpTlsConfig {
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        ensure!(
            self.listen.is_empty()
                || !self.certificates.is_empty()
                || self.certificate_directory.is_some(),
            "http.tls.listen needs http.tls.certificates or http.tls.certificate_directory"
        );
        ensure!(
            cfg!(feature = "http3") || !self.http3,
            "http.tls.http3: the program was built without HTTP/3"
        );
        ensure!(
            self.http3 || !self.http3_retry,
            "http.tls.http3_retry needs http.tls.http3"
        );
        ensure!(
            (self.client_auth == ClientAuth::None) == self.client_ca_file.is_none(),
            "http.tls.client_auth and http.tls.client_ca_file go together"
        );
        Ok(())
    }
}

impl BackendTlsConfig {
    /// Whether there is anything to verify backends with.
    pub fn has_roots(&self) -> bool {
        self.ca_file.is_some() || self.system_roots
    }

    pub(super) fn validate(&self) -> anyhow::Result<()> {
        ensure!(
            self.certificate_file.is_some() == self.key_file.is_some(),
            "http.backend_tls.certificate_file and http.backend_tls.key_file go together"
        );
        ensure!(
            self.certificate_file.is_none() || self.has_roots(),
            "http.backend_tls.certificate_file needs ca_file or system_roots"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{ClientAuth, TlsVersion, parse};

    #[test]
    fn tls_is_read_whole() {
        let config = parse(
            r#"
            [http]
            trusted_proxies = ["192.0.2.1/32"]
            proxy_protocol = "accept"
            backend_proxy_protocol = "v2"
            forwarded_client_cert = "sanitize_set"
            forwarded_client_cert_format = "hash-subject"
            [http.tls]
            listen = ["[::]:443"]
            certificates = [{ certificate_file = "/a.crt", key_file = "/a.key" }]
            certificate_directory = "/etc/certs"
            strict_sni = true
            min_version = "1.3"
            http2 = false
            http3 = true
            http3_retry = true
            client_auth = "request"
            client_ca_file = "/ca.pem"
            [http.backend_tls]
            system_roots = true
            certificate_file = "/g.crt"
            key_file = "/g.key"
            "#,
        )
        .unwrap();
        let tls = &config.http.tls;
        assert_eq!(tls.min_version, TlsVersion::Tls13);
        assert_eq!(tls.client_auth, ClientAuth::Request);
        assert!(config.http.backend_tls.has_roots());
        let text = toml::to_string(&config).unwrap();
        assert_eq!(parse(&text).unwrap(), config, "{text}");
    }

    #[test]
    fn what_contradicts_itself_is_refused_by_name() {
        for (text, wanted) in [
            (
                "[http.tls]\nlisten = [\"[::]:443\"]\n",
                "http.tls.certificates",
            ),
            ("[http.tls]\nclient_auth = \"require\"\n", "client_ca_file"),
            ("[http.tls]\nclient_ca_file = \"/ca\"\n", "client_auth"),
            ("[http.tls]\nmin_version = \"1.1\"\n", "min_version"),
            ("[http.tls]\nhttp3_retry = true\n", "http.tls.http3"),
            ("[http.backend_tls]\nkey_file = \"/k\"\n", "go together"),
            (
                "[http.backend_tls]\ncertificate_file = \"/c\"\nkey_file = \"/k\"\n",
                "system_roots",
            ),
            ("[http]\nproxy_protocol = \"accept\"\n", "trusted_proxies"),
            (
                "[http]\nproxy_protocol = \"require\"\ntrusted_proxies = [\"10.0.0.1/32\"]\n\
                 [http.tls]\nhttp3 = true\n",
                "http.tls.http3",
            ),
            ("[http.timeouts]\nproxy_header = \"0s\"\n", "proxy_header"),
        ] {
            let message = format!("{:#}", parse(text).unwrap_err());
            assert!(message.contains(wanted), "{text}: {message}");
        }
    }
}
