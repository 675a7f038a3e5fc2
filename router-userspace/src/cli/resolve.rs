//! What a configuration points to, looked at before anything is started: `viaduct check` refuses what
//! `viaduct run` would.
//!
//! What depends on the moment is not looked at: whether an address is free or a server answers.

use std::path::Path;

use anyhow::{Context as _, ensure};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::cli::run::log_filter;
use crate::cli::{ConfigOption, Failure, block_on};
use crate::config::{Config, NatsConfig};
use crate::l7;
use crate::source::nats;

/// Reads the configuration and all that it points to but routes files, which a running gateway may
/// see change.
///
/// # Errors
/// [`Failure::Usage`] naming the key.
pub fn load(option: &ConfigOption) -> Result<Config, Failure> {
    let config = option.load()?;
    resolve(&config).map_err(Failure::Usage)?;
    Ok(config)
}

pub fn resolve(config: &Config) -> anyhow::Result<()> {
    log_filter(&config.log)?;
    if !config.nats.servers.is_empty() {
        nats_files(&config.nats)?;
        block_on(nats::check(&config.nats))?;
    }
    l7::check_files(&config.http)
}

fn nats_files(nats: &NatsConfig) -> anyhow::Result<()> {
    if let Some(path) = &nats.ca_file {
        certificates(path).context("nats.ca_file")?;
    }
    if let Some(path) = &nats.client_certificate_file {
        certificates(path).context("nats.client_certificate_file")?;
    }
    if let Some(path) = &nats.client_key_file {
        PrivateKeyDer::from_pem_file(path)
            .with_context(|| format!("nats.client_key_file {}", path.display()))?;
    }
    Ok(())
}

fn certificates(path: &Path) -> anyhow::Result<()> {
    let name = || path.display().to_string();
    let certificates = CertificateDer::pem_file_iter(path)
        .with_context(name)?
        .collect::<Result<Vec<_>, _>>()
        .with_context(name)?;
    ensure!(!certificates.is_empty(), "{}: no certificate in it", name());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    #[test]
    fn what_a_configuration_points_to_is_named_by_its_key_when_it_is_bad() {
        let directory = tempfile::tempdir().unwrap();
        let junk = directory.path().join("junk");
        std::fs::write(&junk, "junk").unwrap();
        let junk = junk.display();
        for (text, key) in [
            ("[log]\nfilter = \"a=b=c\"\n".to_owned(), "log.filter"),
            (
                "[nats]\nservers = [\"http://[\"]\n".to_owned(),
                "nats.servers",
            ),
            (
                "[nats]\nuser = \"u\"\npassword = \"file:/nonexistent\"\n".to_owned(),
                "nats.password",
            ),
            ("[nats]\nuser = \"u\"\n".to_owned(), "nats.password"),
            ("[nats]\nnkey_seed = \"SUA\"\n".to_owned(), "nats.nkey_seed"),
            (
                format!("[nats]\ncredentials_file = \"{junk}\"\n"),
                "nats.credentials_file",
            ),
            (format!("[nats]\nca_file = \"{junk}\"\n"), "nats.ca_file"),
            (
                format!(
                    "[nats]\nclient_certificate_file = \"{junk}\"\nclient_key_file = \"{junk}\"\n"
                ),
                "nats.client_certificate_file",
            ),
            (
                format!("[http.backend_tls]\nca_file = \"{junk}\"\n"),
                "http.backend_tls.ca_file",
            ),
            (
                format!(
                    "[http.tls]\nlisten = [\"[::]:443\"]\n\
                     certificates = [{{ certificate_file = \"{junk}\", key_file = \"{junk}\" }}]\n"
                ),
                "http.tls.certificates",
            ),
        ] {
            let config = config::parse(&text).unwrap();
            let error = format!("{:#}", resolve(&config).unwrap_err());
            assert!(error.contains(key), "{text}: {error}");
        }
        resolve(&Config::default()).unwrap();
    }
}
