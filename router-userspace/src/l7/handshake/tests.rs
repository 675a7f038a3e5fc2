//! Handshakes over real sockets, with rustls or plain bytes on the other side.

use std::path::PathBuf;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_rustls::TlsConnector;

use super::*;
use crate::config::{CertificateFiles, ClientAuth, HttpConfig, HttpTlsConfig, TlsVersion};
use crate::l7::Settings;
use crate::l7::metrics::L7Metrics;

/// A CA, and what it signed in a directory.
struct Ca {
    directory: TempDir,
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
    pem_file: PathBuf,
}

impl Ca {
    fn new() -> Ca {
        let directory = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let pem_file = directory.path().join("ca.pem");
        std::fs::write(&pem_file, certificate.pem()).unwrap();
        Ca {
            directory,
            issuer: Issuer::new(params, key),
            der: certificate.der().clone(),
            pem_file,
        }
    }

    fn sign(&self, hosts: &[&str]) -> (rcgen::Certificate, KeyPair) {
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(hosts).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }

    fn write(&self, name: &str, hosts: &[&str]) -> CertificateFiles {
        let (certificate, key) = self.sign(hosts);
        let files = CertificateFiles {
            certificate_file: self.directory.path().join(format!("{name}.crt")),
            key_file: self.directory.path().join(format!("{name}.key")),
        };
        std::fs::write(&files.certificate_file, certificate.pem()).unwrap();
        std::fs::write(&files.key_file, key.serialize_pem()).unwrap();
        files
    }

    fn config(&self, certificates: Vec<CertificateFiles>) -> HttpConfig {
        HttpConfig {
            tls: HttpTlsConfig {
                listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
                certificates,
                ..HttpTlsConfig::default()
            },
            ..HttpConfig::default()
        }
    }

    /// A client that trusts this CA, and shows `identity`.
    fn client(&self, identity: Option<(rcgen::Certificate, KeyPair)>) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        match identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
                let chain = vec![certificate.der().clone()];
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        }
    }
}

/// One worker's handshakes and what they counted.
struct Server {
    config: HttpConfig,
    handshakes: Handshakes,
    tls: Arc<Tls>,
    metrics: Arc<L7Metrics>,
    listener: TcpListener,
}

impl Server {
    async fn start(config: HttpConfig) -> Server {
        let metrics = Arc::<L7Metrics>::default();
        let tls = Tls::start(&config, Arc::clone(&metrics)).unwrap();
        Server {
            config,
            handshakes: Handshakes::new(Arc::clone(&tls), metrics.add_worker()),
            tls,
            metrics,
            listener: TcpListener::bind("127.0.0.1:0").await.unwrap(),
        }
    }

    async fn connect(&self) -> TcpStream {
        let address = self.listener.local_addr().unwrap();
        TcpStream::connect(address).await.unwrap()
    }

    async fn accept(&self, kind: ListenerKind) -> Result<Established, HandshakeFailure> {
        let (stream, peer) = self.listener.accept().await.unwrap();
        let rules = Settings::new(&self.config).unwrap().handshake_rules(peer);
        self.handshakes.establish(kind, &rules, stream, peer).await
    }

    /// Both sides of a TLS handshake. The client reads and writes once, so that alerts and tickets come.
    async fn handshake(&self, client: &ClientConfig, host: &str) -> Handshake {
        let connector = TlsConnector::from(Arc::new(client.clone()));
        let host = ServerName::try_from(host.to_owned()).unwrap();
        let client = async {
            let mut stream = connector.connect(host, self.connect().await).await?;
            stream.write_all(b"?").await?;
            stream.read_u8().await?;
            Ok(stream)
        };
        let server = async {
            let mut established = self.accept(ListenerKind::Https).await?;
            let _ = established.stream.read_u8().await;
            let _ = established.stream.write_all(b"!").await;
            let _ = established.stream.flush().await;
            Ok(established)
        };
        let (client, server) = tokio::join!(client, server);
        Handshake { client, server }
    }

    #[track_caller]
    fn assert_counted(&self, reason: &str, count: u64) {
        let failures = self.metrics.totals().handshake_failures;
        assert!(
            failures.contains(&(reason, count)),
            "{reason}: {failures:?}"
        );
    }
}

struct Handshake {
    client: io::Result<tokio_rustls::client::TlsStream<TcpStream>>,
    server: Result<Established, HandshakeFailure>,
}

impl Handshake {
    /// The certificate that the client was shown.
    fn leaf(&self) -> CertificateDer<'static> {
        let client = self.client.as_ref().unwrap().get_ref().1;
        client.peer_certificates().unwrap()[0].clone().into_owned()
    }

    fn is_resumed(&self) -> bool {
        let client = self.client.as_ref().unwrap().get_ref().1;
        client.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    fn failure(&self) -> HandshakeFailure {
        *self.server.as_ref().expect_err("the handshake fails")
    }

    fn session(&self) -> &TlsSession {
        self.server.as_ref().unwrap().tls.as_ref().unwrap()
    }
}

fn leaf(files: &CertificateFiles) -> CertificateDer<'static> {
    use rustls::pki_types::pem::PemObject;
    CertificateDer::from_pem_file(&files.certificate_file).unwrap()
}

#[tokio::test]
async fn a_client_is_shown_the_certificate_of_the_host_it_names() {
    let ca = Ca::new();
    let default = ca.write("default", &["default.com", "no-match.com"]);
    let wildcard = ca.write("wildcard", &["*.a.com"]);
    let exact = ca.write("exact", &["b.a.com"]);
    let files = vec![default.clone(), wildcard.clone(), exact.clone()];
    let server = Server::start(ca.config(files)).await;
    for (host, wanted) in [
        ("default.com", &default),
        ("b.a.com", &exact),
        ("c.a.com", &wildcard),
        ("C.A.com", &wildcard),
    ] {
        let handshake = server.handshake(&ca.client(None), host).await;
        assert_eq!(handshake.leaf(), leaf(wanted), "{host}");
        let sni = handshake.session().sni.as_deref();
        assert_eq!(sni, Some(&*host.to_lowercase()));
        assert_eq!(handshake.session().version, "TLSv1_3");
        assert!(!handshake.session().cipher.is_empty());
    }
    // By another name, the default is shown, and the client does not want it.
    let handshake = server.handshake(&ca.client(None), "x.c.a.com").await;
    assert_eq!(handshake.failure(), HandshakeFailure::TlsRefusedByClient);
    server.assert_counted("tls_refused_by_client", 1);
    assert_eq!(server.metrics.totals().tls_handshakes, 4);
}

#[tokio::test]
async fn a_client_without_a_name_gets_the_default() {
    let ca = Ca::new();
    let default = ca.write("default", &["127.0.0.1"]);
    let other = ca.write("other", &["a.com"]);
    let server = Server::start(ca.config(vec![default.clone(), other])).await;
    let handshake = server.handshake(&ca.client(None), "127.0.0.1").await;
    assert_eq!(handshake.leaf(), leaf(&default));
    assert_eq!(handshake.session().sni, None);
}

#[tokio::test]
async fn strict_sni_refuses_unknown_names_by_the_right_alert() {
    let ca = Ca::new();
    let mut config = ca.config(vec![ca.write("a", &["a.com", "127.0.0.1"])]);
    config.tls.strict_sni = true;
    let server = Server::start(config).await;
    let known = server.handshake(&ca.client(None), "a.com").await;
    assert!(known.client.is_ok());
    for host in ["b.com", "127.0.0.1"] {
        let handshake = server.handshake(&ca.client(None), host).await;
        assert_eq!(handshake.failure(), HandshakeFailure::TlsUnknownName);
        let error = handshake.client.unwrap_err().to_string();
        assert!(error.contains("UnrecognisedName"), "{error}");
    }
    server.assert_counted("tls_unknown_name", 2);
}

#[tokio::test]
async fn http2_is_chosen_by_alpn_unless_it_is_off() {
    let ca = Ca::new();
    let files = vec![ca.write("a", &["a.com"])];
    for (http2, offered, chosen) in [
        (true, &["h2", "http/1.1"][..], Some("h2")),
        (true, &["http/1.1"], Some("http/1.1")),
        (true, &[], None),
        (false, &["h2", "http/1.1"], Some("http/1.1")),
    ] {
        let mut config = ca.config(files.clone());
        config.tls.http2 = http2;
        let server = Server::start(config).await;
        let mut client = ca.client(None);
        client.alpn_protocols = offered.iter().map(|it| it.as_bytes().to_vec()).collect();
        let handshake = server.handshake(&client, "a.com").await;
        assert_eq!(handshake.session().alpn_h2, chosen == Some("h2"));
        let client = handshake.client.unwrap();
        assert_eq!(
            client.get_ref().1.alpn_protocol(),
            chosen.map(str::as_bytes)
        );
    }
    let server = Server::start(ca.config(files)).await;
    let mut client = ca.client(None);
    client.alpn_protocols = vec![b"ftp".to_vec()];
    let handshake = server.handshake(&client, "a.com").await;
    assert_eq!(handshake.failure(), HandshakeFailure::TlsIncompatible);
}

#[tokio::test]
async fn a_session_is_resumed_by_any_worker_and_after_a_reload() {
    let ca = Ca::new();
    let files = ca.write("a", &["a.com"]);
    let server = Server::start(ca.config(vec![files])).await;
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let client = client_of_version(&ca, version);
        assert!(!server.handshake(&client, "a.com").await.is_resumed());
        assert!(server.handshake(&client, "a.com").await.is_resumed());

        let mut other = Server::start(server.config.clone()).await;
        other.handshakes = Handshakes::new(Arc::clone(&server.tls), other.metrics.add_worker());
        assert!(other.handshake(&client, "a.com").await.is_resumed());

        ca.write("a", &["a.com"]);
        server.tls.reload(&server.config).unwrap();
        assert!(server.handshake(&client, "a.com").await.is_resumed());
        assert_eq!(other.metrics.totals().tls_resumptions, 1);
    }
}

fn client_of_version(ca: &Ca, version: &'static rustls::SupportedProtocolVersion) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(ca.der.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

#[tokio::test]
async fn a_reload_drops_no_connection_and_serves_new_ones_with_the_new_certificate() {
    let ca = Ca::new();
    let files = ca.write("a", &["a.com"]);
    let server = Server::start(ca.config(vec![files.clone()])).await;
    let mut before = server.handshake(&ca.client(None), "a.com").await;
    assert_eq!(before.leaf(), leaf(&files));
    ca.write("a", &["a.com"]);
    server.tls.reload(&server.config).unwrap();
    let after = server.handshake(&ca.client(None), "a.com").await;
    assert_eq!(after.leaf(), leaf(&files));
    assert_ne!(after.leaf(), before.leaf());

    let client = before.client.as_mut().unwrap();
    client.write_all(b"still here").await.unwrap();
    let mut read = [0; 10];
    let stream = &mut before.server.as_mut().unwrap().stream;
    stream.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"still here");
}

#[tokio::test]
async fn clients_show_a_certificate_as_they_are_asked_to() {
    let ca = Ca::new();
    let other_ca = Ca::new();
    let files = vec![ca.write("a", &["a.com"])];
    for (auth, wanted) in [
        (ClientAuth::None, [Ok(false), Ok(false), Ok(false)]),
        (
            ClientAuth::Request,
            [
                Ok(false),
                Ok(true),
                Err(HandshakeFailure::TlsClientCertificateInvalid),
            ],
        ),
        (
            ClientAuth::Require,
            [
                Err(HandshakeFailure::TlsClientCertificateMissing),
                Ok(true),
                Err(HandshakeFailure::TlsClientCertificateInvalid),
            ],
        ),
    ] {
        let mut config = ca.config(files.clone());
        config.tls.client_auth = auth;
        config.tls.client_ca_file = (auth != ClientAuth::None).then(|| ca.pem_file.clone());
        let server = Server::start(config).await;
        let shown = ca.sign(&["client"]);
        let value = client_cert::value(ClientCertFormat::Base64, shown.0.der());
        let identities = [None, Some(shown), Some(other_ca.sign(&["client"]))];
        for (identity, wanted) in identities.into_iter().zip(wanted) {
            let handshake = server.handshake(&ca.client(identity), "a.com").await;
            match wanted {
                Err(failure) => {
                    assert_eq!(handshake.failure(), failure, "{auth:?}");
                    assert!(handshake.client.is_err());
                }
                Ok(is_shown) => {
                    let shown = handshake.session().client_certificate.as_ref();
                    assert_eq!(shown, is_shown.then_some(&value), "{auth:?}");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_resumed_session_keeps_its_certificate_until_the_clients_ca_changes() {
    let ca = Ca::new();
    let mut config = ca.config(vec![ca.write("a", &["a.com"])]);
    config.tls.client_auth = ClientAuth::Require;
    config.tls.client_ca_file = Some(ca.pem_file.clone());
    let server = Server::start(config).await;
    let client = ca.client(Some(ca.sign(&["client"])));
    let first = server.handshake(&client, "a.com").await;
    let again = server.handshake(&client, "a.com").await;
    assert!(again.is_resumed());
    assert!(first.session().client_certificate.is_some());
    assert_eq!(
        again.session().client_certificate,
        first.session().client_certificate
    );
    let other_ca = std::fs::read(Ca::new().pem_file).unwrap();
    std::fs::write(&ca.pem_file, other_ca).unwrap();
    server.tls.reload(&server.config).unwrap();
    let refused = server.handshake(&client, "a.com").await;
    assert_eq!(
        refused.failure(),
        HandshakeFailure::TlsClientCertificateInvalid
    );
}

/// A ClientHello that offers `version` and one cipher suite of it.
fn hello_of_version(version: [u8; 2]) -> Vec<u8> {
    let mut body = version.to_vec();
    body.extend([7; 32]);
    body.push(0);
    body.extend([0, 2, 0xc0, 0x13]);
    body.extend([1, 0]);
    let mut hello = vec![22, 3, 1, 0, body.len() as u8 + 4, 1, 0, 0, body.len() as u8];
    hello.extend(body);
    hello
}

#[tokio::test]
async fn what_cannot_be_served_is_told_by_an_alert_and_counted() {
    let ca = Ca::new();
    let server = Server::start(ca.config(vec![ca.write("a", &["a.com"])])).await;
    for (bytes, failure) in [
        // TLS 1.1.
        (hello_of_version([3, 2]), HandshakeFailure::TlsIncompatible),
        (
            b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n".to_vec(),
            HandshakeFailure::TlsMalformed,
        ),
        (vec![0xff; 600], HandshakeFailure::TlsMalformed),
    ] {
        let client = async {
            let mut client = server.connect().await;
            client.write_all(&bytes).await.unwrap();
            client.read_u8().await
        };
        let (alert, server) = tokio::join!(client, server.accept(ListenerKind::Https));
        assert_eq!(server.unwrap_err(), failure);
        assert_eq!(alert.unwrap(), 21, "an alert record");
    }
    let (client, failed) = tokio::join!(
        async { drop(server.connect().await) },
        server.accept(ListenerKind::Https)
    );
    let () = client;
    assert_eq!(failed.unwrap_err(), HandshakeFailure::Closed);
    server.assert_counted("tls_incompatible", 1);
    server.assert_counted("tls_malformed", 2);
    server.assert_counted("closed", 1);
}

#[tokio::test]
async fn tls_1_2_is_refused_where_1_3_is_the_least() {
    let ca = Ca::new();
    let mut config = ca.config(vec![ca.write("a", &["a.com"])]);
    config.tls.min_version = TlsVersion::Tls13;
    let server = Server::start(config).await;
    let client = client_of_version(&ca, &rustls::version::TLS12);
    let handshake = server.handshake(&client, "a.com").await;
    assert_eq!(handshake.failure(), HandshakeFailure::TlsIncompatible);
}

#[tokio::test(start_paused = true)]
async fn a_slow_handshake_is_cut() {
    let ca = Ca::new();
    let server = Server::start(ca.config(vec![ca.write("a", &["a.com"])])).await;
    let mut client = server.connect().await;
    client.write_all(&[22, 3, 1]).await.unwrap();
    let began = Instant::now();
    let failed = server.accept(ListenerKind::Https).await.unwrap_err();
    assert_eq!(failed, HandshakeFailure::TlsTimeout);
    assert!(began.elapsed() >= server.config.timeouts.tls_handshake);
    server.assert_counted("tls_timeout", 1);
}

#[tokio::test(start_paused = true)]
async fn handshakes_wait_for_a_place_and_are_counted() {
    let ca = Ca::new();
    let mut server = Server::start(ca.config(vec![ca.write("a", &["a.com"])])).await;
    server.handshakes.slots = Semaphore::new(0);
    let handshake = server.handshake(&ca.client(None), "a.com").await;
    assert_eq!(handshake.failure(), HandshakeFailure::TlsTimeout);
    assert_eq!(server.metrics.totals().tls_handshakes_full, 1);
    server.handshakes.slots = Semaphore::new(1);
    assert!(
        server
            .handshake(&ca.client(None), "a.com")
            .await
            .client
            .is_ok()
    );
    assert!(
        server
            .handshake(&ca.client(None), "a.com")
            .await
            .client
            .is_ok()
    );
}

fn proxied(mode: ProxyProtocol, trusted: &str) -> HttpConfig {
    HttpConfig {
        proxy_protocol: mode,
        trusted_proxies: vec![trusted.parse().unwrap()],
        ..HttpConfig::default()
    }
}

const HEADER: &[u8] = b"PROXY TCP4 192.0.2.1 198.51.100.2 40000 443\r\n";

#[tokio::test]
async fn a_header_is_read_to_its_end_and_no_further() {
    let server = Server::start(proxied(ProxyProtocol::Accept, "127.0.0.0/8")).await;
    let mut v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11".to_vec();
    v2.extend((12 + 500_u16).to_be_bytes());
    v2.extend([192, 0, 2, 1, 198, 51, 100, 2, 0x9c, 0x40, 0x01, 0xbb]);
    v2.extend([4; 500]);
    for header in [HEADER, &v2] {
        let mut client = server.connect().await;
        // In two parts, the first of which is not enough to know anything.
        client.write_all(&header[..3]).await.unwrap();
        let rest = async {
            tokio::task::yield_now().await;
            client.write_all(&header[3..]).await.unwrap();
            client.write_all(b"GET").await.unwrap();
        };
        let (established, ()) = tokio::join!(server.accept(ListenerKind::Http), rest);
        let mut established = established.unwrap();
        assert_eq!(established.peer, "192.0.2.1:40000".parse().unwrap());
        assert_eq!(established.local, "198.51.100.2:443".parse().unwrap());
        let mut read = [0; 3];
        established.stream.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"GET");
    }
}

#[tokio::test]
async fn tls_begins_behind_the_header() {
    let ca = Ca::new();
    let mut config = ca.config(vec![ca.write("a", &["a.com"])]);
    config.proxy_protocol = ProxyProtocol::Require;
    config.trusted_proxies = vec!["127.0.0.1/32".parse().unwrap()];
    let server = Server::start(config).await;
    let client = async {
        let mut stream = server.connect().await;
        stream.write_all(HEADER).await.unwrap();
        let host = ServerName::try_from("a.com").unwrap();
        let connector = TlsConnector::from(Arc::new(ca.client(None)));
        connector.connect(host, stream).await.unwrap()
    };
    let (_client, established) = tokio::join!(client, server.accept(ListenerKind::Https));
    let established = established.unwrap();
    assert_eq!(established.peer, "192.0.2.1:40000".parse().unwrap());
    assert!(established.tls.is_some());
}

/// What becomes of a connection from 127.0.0.1 that sends `bytes`.
async fn outcome(
    mode: ProxyProtocol,
    trusted: &str,
    bytes: &[u8],
) -> Result<String, HandshakeFailure> {
    let server = Server::start(proxied(mode, trusted)).await;
    let mut client = server.connect().await;
    client.write_all(bytes).await.unwrap();
    let established = server.accept(ListenerKind::Http).await?;
    let own = client.local_addr().unwrap();
    Ok(match established.peer == own {
        true => "own".to_owned(),
        false => established.peer.to_string(),
    })
}

#[tokio::test(start_paused = true)]
async fn headers_are_believed_from_trusted_proxies_only() {
    use HandshakeFailure::{
        ProxyHeaderInvalid, ProxyHeaderMissing, ProxyHeaderTimeout, ProxyHeaderUntrusted,
    };
    use ProxyProtocol::{Accept, Off, Require};
    let (us, others) = ("127.0.0.0/8", "192.0.2.0/24");
    let own = || Ok("own".to_owned());
    let get = b"GET / HTTP/1.1\r\n\r\n";
    let client = Ok("192.0.2.1:40000".to_owned());
    let bad = b"PROXY TCP9 a b c d\r\n";
    let invalid = "version 1 is of an unknown family";
    for (mode, trusted, bytes, wanted) in [
        (Off, us, HEADER, own()),
        (Accept, us, HEADER, client.clone()),
        (Accept, us, get, own()),
        (Accept, us, b"", own()),
        (Accept, us, b"PROX", Err(ProxyHeaderTimeout)),
        (Accept, us, b"PROXY UNKNOWN\r\n", own()),
        (Accept, us, bad, Err(ProxyHeaderInvalid(invalid))),
        (Accept, others, HEADER, Err(ProxyHeaderUntrusted)),
        (Accept, others, bad, Err(ProxyHeaderUntrusted)),
        (Accept, others, get, own()),
        (Require, us, HEADER, client),
        (Require, us, get, Err(ProxyHeaderMissing)),
        (Require, us, b"", Err(ProxyHeaderTimeout)),
        (Require, others, HEADER, Err(ProxyHeaderUntrusted)),
        (Require, others, get, Err(ProxyHeaderUntrusted)),
    ] {
        let outcome = outcome(mode, trusted, bytes).await;
        let shown = String::from_utf8_lossy(bytes);
        assert_eq!(outcome, wanted, "{mode:?} {trusted} {shown}");
    }
}
