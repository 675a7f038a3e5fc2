//! The certificates the gateway shows, by the host that a client names (SNI, RFC 6066 §3).
//!
//! A certificate is found by the DNS names in it: an exact one, then a wildcard for the labels after
//! the first (RFC 9525 §6.3), then the default. Several for one name, of RSA and of ECDSA for example,
//! are tried in turn by what the client can verify. Made by [`super::server`] whenever a file changed.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow, ensure};
use rustls::SignatureScheme;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::files;
use crate::config::CertificateFiles;

/// Pairs of files; each is looked at once a second.
const MAX_CERTIFICATES: usize = 4096;

/// One certificate chain with its key.
#[derive(Debug)]
pub(super) struct Certificate {
    pub file: PathBuf,
    /// Seconds since the Unix epoch; negative is before it.
    pub not_after: i64,
    key: Arc<CertifiedKey>,
    names: Vec<Box<str>>,
}

impl Certificate {
    /// # Errors
    /// Names the file that cannot be read, or is no certificate, or not the other's key.
    pub(super) fn load(files: &CertificateFiles) -> anyhow::Result<Certificate> {
        let file = &files.certificate_file;
        let chain = files::certificates(file)?;
        let key = files::private_key(&files.key_file)?;
        let (names, not_after) =
            names_and_end(&chain[0]).with_context(|| file.display().to_string())?;
        let provider = rustls::crypto::ring::default_provider();
        let key = CertifiedKey::from_der(chain, key, &provider)
            .with_context(|| format!("{} with {}", file.display(), files.key_file.display()))?;
        Ok(Certificate {
            file: file.clone(),
            not_after,
            key: Arc::new(key),
            names,
        })
    }
}

fn names_and_end(der: &[u8]) -> anyhow::Result<(Vec<Box<str>>, i64)> {
    let (_, parsed) = X509Certificate::from_der(der).map_err(|error| anyhow!("{error}"))?;
    let mut names = Vec::new();
    if let Some(alternative) = parsed.subject_alternative_name()? {
        for name in &alternative.value.general_names {
            if let GeneralName::DNSName(name) = name {
                names.push(name.to_ascii_lowercase().into());
            }
        }
    }
    Ok((names, parsed.validity().not_after.timestamp()))
}

/// The pairs of a directory, in the order of their names. A certificate without a key of its name,
/// like a chain's or a CA's, is none.
///
/// # Errors
/// The directory cannot be read.
pub(super) fn pairs(directory: &Path) -> anyhow::Result<Vec<CertificateFiles>> {
    let entries = std::fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let mut pairs = Vec::new();
    for entry in entries {
        let certificate_file = entry?.path();
        let extension = certificate_file.extension().and_then(|it| it.to_str());
        if !matches!(extension, Some("crt" | "pem")) {
            continue;
        }
        let key_file = certificate_file.with_extension("key");
        if key_file.exists() {
            pairs.push(CertificateFiles {
                certificate_file,
                key_file,
            });
        }
    }
    pairs.sort();
    ensure!(
        pairs.len() <= MAX_CERTIFICATES,
        "{}: more than {MAX_CERTIFICATES} certificates",
        directory.display()
    );
    Ok(pairs)
}

/// All certificates of the listeners.
#[derive(Debug, Default)]
pub(super) struct Certificates {
    default: Vec<Arc<CertifiedKey>>,
    exact: HashMap<Box<str>, Vec<Arc<CertifiedKey>>>,
    /// By the labels behind the `*.`.
    wildcard: HashMap<Box<str>, Vec<Arc<CertifiedKey>>>,
}

impl Certificates {
    /// The first is the default; under `strict` there is none.
    pub(super) fn new<'a>(
        certificates: impl IntoIterator<Item = &'a Certificate>,
        strict: bool,
    ) -> Certificates {
        let mut all = Certificates::default();
        for certificate in certificates {
            let key = &certificate.key;
            if all.default.is_empty() && !strict {
                all.default.push(Arc::clone(key));
            }
            for name in &certificate.names {
                let (names, name) = match name.strip_prefix("*.") {
                    Some(parent) => (&mut all.wildcard, parent),
                    None => (&mut all.exact, &**name),
                };
                names.entry(name.into()).or_default().push(Arc::clone(key));
            }
        }
        all
    }

    /// Whether there is one for a client that names this host.
    pub(super) fn serves(&self, host: Option<&str>) -> bool {
        !self.of(host).is_empty()
    }

    /// Whether clients that name `host` are shown other certificates than those that name `sni`.
    pub(super) fn separates(&self, sni: &str, host: &str) -> bool {
        let shown = self.of(Some(sni));
        let is_shown = |key: &Arc<CertifiedKey>| shown.iter().any(|other| Arc::ptr_eq(key, other));
        !self.of(Some(host)).iter().any(is_shown)
    }

    fn of(&self, host: Option<&str>) -> &[Arc<CertifiedKey>] {
        self.named(host).unwrap_or(&self.default)
    }

    fn named(&self, host: Option<&str>) -> Option<&Vec<Arc<CertifiedKey>>> {
        let host = host?.to_ascii_lowercase();
        self.exact.get(&*host).or_else(|| {
            let (_, parent) = host.split_once('.')?;
            self.wildcard.get(parent)
        })
    }

    fn choose(&self, host: Option<&str>, schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let keys = self.of(host);
        keys.iter()
            .find(|key| key.key.choose_scheme(schemes).is_some())
            .or(keys.first())
            .cloned()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.choose(hello.server_name(), hello.signature_schemes())
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519};

    use super::*;

    fn certificate(hosts: &[&str], algorithm: &'static rcgen::SignatureAlgorithm) -> Certificate {
        let directory = tempfile::tempdir().unwrap();
        let files = CertificateFiles {
            certificate_file: directory.path().join("a.crt"),
            key_file: directory.path().join("a.key"),
        };
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.not_after = rcgen::date_time_ymd(2040, 1, 1);
        let made = params.self_signed(&key).unwrap();
        std::fs::write(&files.certificate_file, made.pem()).unwrap();
        std::fs::write(&files.key_file, key.serialize_pem()).unwrap();
        Certificate::load(&files).unwrap()
    }

    #[test]
    fn names_and_end_are_those_of_the_certificate() {
        let certificate = certificate(&["A.com", "*.b.com", "127.0.0.1"], &PKCS_ED25519);
        assert_eq!(certificate.names, ["a.com", "*.b.com"].map(Box::from));
        assert_eq!(certificate.not_after, 2_208_988_800);
    }

    #[test]
    fn of_several_for_a_host_one_is_chosen_that_the_client_can_verify() {
        let one = certificate(&["a.com"], &PKCS_ED25519);
        let other = certificate(&["a.com"], &PKCS_ECDSA_P256_SHA256);
        let all = Certificates::new([&one, &other], true);
        for (schemes, wanted) in [
            (SignatureScheme::ED25519, &one),
            (SignatureScheme::ECDSA_NISTP256_SHA256, &other),
            // Neither: the handshake fails by the first.
            (SignatureScheme::RSA_PSS_SHA256, &one),
        ] {
            let chosen = all.choose(Some("a.com"), &[schemes]).unwrap();
            assert!(Arc::ptr_eq(&chosen, &wanted.key), "{schemes:?}");
        }
    }

    #[test]
    fn hosts_of_one_certificate_are_not_separate() {
        let one = certificate(&["a.com", "*.a.com"], &PKCS_ED25519);
        let other = certificate(&["b.com"], &PKCS_ED25519);
        for (strict, unknown) in [(false, false), (true, true)] {
            let all = Certificates::new([&one, &other], strict);
            assert!(!all.separates("a.com", "x.a.com") && !all.separates("x.a.com", "A.com"));
            assert!(all.separates("a.com", "b.com") && all.separates("b.com", "x.a.com"));
            // Without `strict` the first stands for what has none.
            assert_eq!(all.separates("a.com", "c.com"), unknown);
            assert!(all.separates("b.com", "c.com"));
        }
    }

    #[test]
    fn a_wildcard_stands_for_one_label() {
        let wildcard = certificate(&["*.a.com"], &PKCS_ED25519);
        let all = Certificates::new([&wildcard], true);
        assert!(all.serves(Some("x.a.com")) && all.serves(Some("X.A.com")));
        for host in [Some("a.com"), Some("x.y.a.com"), Some("xa.com"), None] {
            assert!(!all.serves(host), "{host:?}");
        }
        assert!(Certificates::new([&wildcard], false).serves(None));
    }
}
