use std::net::SocketAddr;
use std::path::Path;

use rcgen::{CertificateParams, KeyPair};
use rustls::ServerConfig;
use rustls::server::WebPkiClientVerifier;
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::config::{CertificateFiles, HttpTlsConfig};

/// Certificate and key files in a directory of their own.
struct Files {
    directory: TempDir,
}

impl Files {
    fn new() -> Files {
        let directory = tempfile::tempdir().unwrap();
        Files { directory }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    /// Writes `NAME.crt` and `NAME.key` for these hosts.
    fn write(&self, name: &str, hosts: &[&str]) -> CertificateFiles {
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(hosts).unwrap();
        let certificate = certificate.self_signed(&key).unwrap();
        let files = CertificateFiles {
            certificate_file: self.path(&format!("{name}.crt")),
            key_file: self.path(&format!("{name}.key")),
        };
        std::fs::write(&files.certificate_file, certificate.pem()).unwrap();
        std::fs::write(&files.key_file, key.serialize_pem()).unwrap();
        files
    }
}

fn config(certificates: Vec<CertificateFiles>, directory: Option<&Path>) -> HttpConfig {
    HttpConfig {
        tls: HttpTlsConfig {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
            certificates,
            certificate_directory: directory.map(Path::to_owned),
            ..HttpTlsConfig::default()
        },
        ..HttpConfig::default()
    }
}

fn start(config: &HttpConfig) -> (Arc<Tls>, Arc<L7Metrics>) {
    let metrics = Arc::<L7Metrics>::default();
    (Tls::start(config, Arc::clone(&metrics)).unwrap(), metrics)
}

/// As two looks a second apart.
fn settle(tls: &Tls) {
    tls.look(false);
    tls.look(false);
}

/// The names of the files in use.
fn in_use(metrics: &L7Metrics) -> Vec<String> {
    let certificates = metrics.tls.certificates().into_iter();
    let name = |(path, _): (std::path::PathBuf, i64)| {
        path.file_name().unwrap().to_str().unwrap().to_owned()
    };
    certificates.map(name).collect()
}

fn serves(tls: &Tls, host: &str) -> bool {
    tls.server().unwrap().serves(Some(host))
}

#[test]
fn a_changed_certificate_is_taken_up() {
    let files = Files::new();
    let pair = files.write("one", &["a.com"]);
    let mut config = config(vec![pair], None);
    config.tls.strict_sni = true;
    let (tls, metrics) = start(&config);
    assert!(serves(&tls, "a.com") && !serves(&tls, "b.com"));
    files.write("one", &["b.com"]);
    settle(&tls);
    assert!(serves(&tls, "b.com") && !serves(&tls, "a.com"));
    assert_eq!(metrics.tls.loads_and_refusals(), (1, 0));
}

#[test]
fn a_bad_file_keeps_the_certificate_and_is_counted_once() {
    let files = Files::new();
    let pair = files.write("one", &["a.com"]);
    let other = files.write("other", &["b.com"]);
    let mut config = config(vec![pair.clone()], None);
    config.tls.strict_sni = true;
    let (tls, metrics) = start(&config);
    let mut refusals = 0;
    let other_key = std::fs::read(other.key_file).unwrap();
    for bad in [b"junk".to_vec(), other_key] {
        std::fs::write(&pair.key_file, bad).unwrap();
        settle(&tls);
        settle(&tls);
        refusals += 1;
        assert_eq!(metrics.tls.loads_and_refusals(), (0, refusals));
        assert!(serves(&tls, "a.com"));
    }
    std::fs::remove_file(&pair.certificate_file).unwrap();
    settle(&tls);
    assert_eq!(metrics.tls.loads_and_refusals(), (0, refusals + 1));
    assert!(serves(&tls, "a.com"));
}

#[test]
fn a_directory_is_followed_and_a_bad_pair_in_it_left_out() {
    let files = Files::new();
    files.write("b", &["b.com"]);
    files.write("a", &["a.com"]);
    std::fs::write(files.path("bad.crt"), "junk").unwrap();
    std::fs::write(files.path("bad.key"), "junk").unwrap();
    std::fs::write(files.path("ca.crt"), "no key of this name").unwrap();
    let (tls, metrics) = start(&config(Vec::new(), Some(files.directory.path())));
    assert_eq!(in_use(&metrics), ["a.crt", "b.crt"]);
    assert_eq!(metrics.tls.loads_and_refusals(), (0, 1));

    files.write("c", &["c.com"]);
    std::fs::remove_file(files.path("a.crt")).unwrap();
    settle(&tls);
    settle(&tls);
    assert_eq!(in_use(&metrics), ["b.crt", "c.crt"]);

    for name in ["b.crt", "c.crt"] {
        std::fs::remove_file(files.path(name)).unwrap();
    }
    settle(&tls);
    assert!(serves(&tls, "c.com"), "the last ones stay");
}

#[test]
fn a_start_without_a_good_certificate_names_the_file() {
    let files = Files::new();
    let pair = files.write("one", &["a.com"]);
    std::fs::write(&pair.key_file, "junk").unwrap();
    let error = check(&config(vec![pair], None)).unwrap_err();
    assert!(format!("{error:#}").contains("one.key"), "{error:#}");

    let error = check(&config(Vec::new(), Some(&files.path("missing")))).unwrap_err();
    assert!(
        format!("{error:#}").contains("http.tls.certificate_directory"),
        "{error:#}"
    );
    let empty = tempfile::tempdir().unwrap();
    let error = check(&config(Vec::new(), Some(empty.path()))).unwrap_err();
    assert!(format!("{error:#}").contains("no certificate"), "{error:#}");
}

#[test]
fn a_reload_takes_another_configuration_whole_or_not_at_all() {
    let files = Files::new();
    let one = files.write("one", &["a.com"]);
    let two = files.write("two", &["b.com"]);
    let first = config(vec![one.clone()], None);
    let (tls, metrics) = start(&first);
    let mut second = config(vec![two.clone(), one], None);
    second.backend_tls.ca_file = Some(files.path("missing"));
    assert!(tls.check_reload(&second).is_err());
    assert!(tls.reload(&second).is_err());
    assert_eq!(in_use(&metrics), ["one.crt"]);

    second.backend_tls.ca_file = Some(two.certificate_file.clone());
    tls.check_reload(&second).unwrap();
    tls.reload(&second).unwrap();
    assert_eq!(in_use(&metrics), ["two.crt", "one.crt"]);
    assert!(tls.backend().is_some());

    // The same configuration: as a look, but at once.
    std::fs::write(&two.key_file, "junk").unwrap();
    tls.check_reload(&second).unwrap();
    tls.reload(&second).unwrap();
    assert_eq!(metrics.tls.loads_and_refusals().1, 1);
    assert_eq!(in_use(&metrics), ["two.crt", "one.crt"]);
}

#[test]
fn backends_are_verified_with_what_changed() {
    let files = Files::new();
    let ca = files.write("ca", &["ca"]);
    let mut config = HttpConfig::default();
    config.backend_tls.ca_file = Some(ca.certificate_file.clone());
    let (tls, metrics) = start(&config);
    let before = tls.backend().unwrap();
    std::fs::write(&ca.certificate_file, "junk").unwrap();
    settle(&tls);
    assert!(Arc::ptr_eq(&before, &tls.backend().unwrap()));
    files.write("ca", &["ca"]);
    settle(&tls);
    assert!(!Arc::ptr_eq(&before, &tls.backend().unwrap()));
    assert_eq!(metrics.tls.loads_and_refusals(), (1, 1));
    assert!(tls.server().is_none());
}

/// A backend that demands a certificate of `ca_file` and speaks HTTP/2 if it may.
fn demanding_backend(files: &CertificateFiles, ca_file: &Path) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = super::files::roots(ca_file).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider));
    let chain = super::files::certificates(&files.certificate_file).unwrap();
    let key = super::files::private_key(&files.key_file).unwrap();
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

#[tokio::test]
async fn a_backend_is_shown_the_gateways_certificate_and_offered_http2_if_it_speaks_it() {
    let files = Files::new();
    let app = files.write("app", &["app.internal"]);
    let gateway = files.write("gateway", &["gateway.internal"]);
    let acceptor = demanding_backend(&app, &gateway.certificate_file);
    let mut config = HttpConfig::default();
    config.backend_tls.ca_file = Some(app.certificate_file);
    config.backend_tls.certificate_file = Some(gateway.certificate_file);
    config.backend_tls.key_file = Some(gateway.key_file);
    let (tls, _) = start(&config);
    let client = tls.backend().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    for http2 in [true, false] {
        let stream = TcpStream::connect(address).await.unwrap();
        let handshake = client.handshake(stream, Some("app.internal"), address.ip(), http2);
        let accept = async {
            let (stream, _) = listener.accept().await.unwrap();
            acceptor.accept(stream).await.unwrap()
        };
        let (handshake, accepted) = tokio::join!(handshake, accept);
        assert_eq!(handshake.unwrap().1, http2);
        assert!(accepted.get_ref().1.peer_certificates().is_some());
    }
}
