//! Clients and servers that others wrote, at either end of the real gateway: curl, nghttp2, and
//! Python's aioquic, grpcio, h2 and websockets.
//!
//! `cargo xtask setup` installs them; one that is missing fails its tests with that advice. The Python
//! programs lie beside the modules, and say themselves what was not as it has to be.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use router_tests::nats::Publisher;
use router_tests::netns::Netns;
use router_tests::process::{Process, wait_for};
use router_tests::site::Site;
use viaduct::config::{CertificateFiles, Config};

mod curl;
mod grpc;
mod h2;
mod http3;
mod nghttp2;
mod websocket;

/// The host that every backend here serves.
pub(crate) const HOST: &str = "clients.example.com";

/// A site with TLS and one backend, which is a Python program.
pub(crate) struct Clients {
    /// Dropped first.
    backend: Process,
    pub(crate) site: Site,
}

impl Clients {
    /// Starts `program`, and registers it with `protocol`, which is `http1` or `http2`.
    fn new(program: &str, protocol: &str) -> Clients {
        Clients::with(program, protocol, |_| ())
    }

    fn with(program: &str, protocol: &str, change: impl FnOnce(&mut Config)) -> Clients {
        let mut site = Site::new(1).unwrap();
        site.start_nats().unwrap();
        let tls = tls_of(&site);
        site.start_gateway(|config| {
            tls(config);
            change(config);
        })
        .unwrap();
        let backend = start_backend(&site, 0, program);
        register(&site, 0, protocol);
        Clients { backend, site }
    }

    /// Where the certificate is that clients are to trust.
    fn certificate(&self) -> String {
        certificate_file(&self.site).display().to_string()
    }

    /// Runs a Python program in the client's namespace to its end, and returns what it printed.
    #[track_caller]
    fn python(&self, program: &str, arguments: &[&str]) -> String {
        let mut command = python(&self.site.lab.client, program);
        succeed(command.args(arguments))
    }

    /// Waits until the backend has printed a line.
    #[track_caller]
    fn backend_says(&self, line: &str) {
        wait_for(line, || {
            let log = self.backend.log();
            log.lines().any(|found| found == line).then_some(())
        })
        .unwrap();
    }
}

/// Writes a certificate for [`HOST`], and makes a configuration use it at port 443.
pub(crate) fn tls_of(site: &Site) -> impl FnOnce(&mut Config) + use<> {
    write_certificate(site);
    let files = CertificateFiles {
        certificate_file: certificate_file(site),
        key_file: site.lab.folder().join("server.key"),
    };
    |config| {
        config.http.tls.listen = vec![([0, 0, 0, 0], 443).into()];
        config.http.tls.certificates = vec![files];
    }
}

/// A new key and certificate in place of those that were there.
pub(crate) fn write_certificate(site: &Site) {
    let made = rcgen::generate_simple_self_signed([HOST.to_owned()]).unwrap();
    for (path, text) in [
        (
            site.lab.folder().join("server.key"),
            made.signing_key.serialize_pem(),
        ),
        (certificate_file(site), made.cert.pem()),
    ] {
        let beside = path.with_extension("new");
        fs::write(&beside, text).unwrap();
        fs::rename(beside, path).unwrap();
    }
}

pub(crate) fn certificate_file(site: &Site) -> PathBuf {
    site.lab.folder().join("server.crt")
}

/// Starts a program on a backend of the site, and waits until it listens.
pub(crate) fn start_backend(site: &Site, index: usize, program: &str) -> Process {
    let mut command = python(&site.lab.backends[index], program);
    let address = site.lab.backend_address(index).to_string();
    command.args([&address, BACKEND_PORT]);
    let name = format!("{program}-{index}");
    let mut process = Process::start(&name, command, site.lab.folder()).unwrap();
    wait_for("the backend to listen", || match process.ensure_alive() {
        Ok(()) => process.log().contains("ready\n").then_some(Ok(())),
        Err(error) => Some(Err(error)),
    })
    .unwrap()
    .unwrap();
    process
}

const BACKEND_PORT: &str = "8080";

/// Registers what listens at a backend's port for [`HOST`], and waits until the gateway knows.
pub(crate) fn register(site: &Site, index: usize, protocol: &str) {
    let address = site.lab.backend_address(index);
    let message = format!(
        r#"{{"host":"{address}","port":{BACKEND_PORT},"uris":["{HOST}"],"protocol":"{protocol}"}}"#
    );
    let mut publisher = Publisher::connect(&site.lab).unwrap();
    publisher.publish("router.register", message).unwrap();
    let known = format!("{address}:{BACKEND_PORT}");
    wait_for("the registration", || {
        site.admin("/v1/routes")
            .ok()?
            .body
            .contains(&known)
            .then_some(())
    })
    .unwrap();
}

/// One of the Python programs beside this file, as a command in a namespace.
fn python(netns: &Netns, program: &str) -> Command {
    let python = tools().join("clients/bin/python").display().to_string();
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("e2e/clients")
        .join(format!("{program}.py"));
    let mut command = netns.command(installed(&python));
    command.arg(path);
    command
}

/// `target/tools`, where `cargo xtask setup` installs.
fn tools() -> PathBuf {
    let own = std::env::current_exe().expect("a process finds its binary");
    let target = own.ancestors().nth(3);
    target.expect("target/PROFILE/deps/NAME").join("tools")
}

/// A program of this path or, without slashes, of `PATH`.
///
/// # Panics
/// It is not there.
#[track_caller]
fn installed(program: &str) -> &str {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let mut files = std::env::split_paths(&folders).map(|folder| folder.join(program));
    assert!(
        files.any(|file| file.is_file()),
        "{program} is missing; install it by `cargo xtask setup`"
    );
    program
}

/// Runs a command to its end, and returns what it printed; panics unless it ended with 0.
#[track_caller]
fn succeed(command: &mut Command) -> String {
    output(command).unwrap_or_else(|error| panic!("{error:#}"))
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let line = format!("{command:?}");
    let output = command.output().with_context(|| format!("start {line}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{line}: {}\n{text}\n{errors}",
        output.status
    );
    Ok(text)
}
