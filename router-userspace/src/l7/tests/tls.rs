//! TLS and PROXY headers of clients, and backends that registered a TLS port.

use std::io::Write;
use std::path::PathBuf;

use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::config::{BackendTlsConfig, CertificateFiles, HttpTlsConfig};
use crate::route::{BackendTls, Instance, TlsRoots};

/// A TLS backend for `app.internal` that answers 200, and a file with its certificate.
async fn tls_backend() -> (SocketAddr, tempfile::NamedTempFile) {
    let made = rcgen::generate_simple_self_signed(["app.internal".to_owned()]).unwrap();
    let mut ca_file = tempfile::NamedTempFile::new().unwrap();
    ca_file.write_all(made.cert.pem().as_bytes()).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let (listener, address) = scripted().await;
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            // A client that does not trust the certificate leaves during the handshake.
            let Ok(mut stream) = acceptor.accept(stream).await else {
                continue;
            };
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let response = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret";
            stream.write_all(response).await.unwrap();
        }
    });
    (address, ca_file)
}

fn gateway(address: SocketAddr, name: Option<&str>, ca_file: Option<PathBuf>) -> Gateway {
    let tls = Some(BackendTls {
        server_name: name.map(Into::into),
        roots: TlsRoots::Backends,
    });
    let route = (
        "a.com",
        pool([Backend {
            instance: Instance {
                tls,
                ..Instance::default()
            }
            .shared(),
            ..backend(address)
        }]),
    );
    let config = HttpConfig {
        backend_tls: BackendTlsConfig {
            ca_file,
            ..BackendTlsConfig::default()
        },
        ..config()
    };
    Gateway::with_config(snapshot([route]), config)
}

#[tokio::test]
async fn a_backend_with_the_right_certificate_is_served_from() {
    let (address, ca_file) = tls_backend().await;
    let ca_file = Some(ca_file.path().to_owned());
    let response = gateway(address, Some("app.internal"), ca_file)
        .get("a.com")
        .await;
    assert!(response.ends_with("\r\n\r\nsecret"), "{response}");
}

#[tokio::test]
async fn a_backend_whose_certificate_does_not_verify_is_526() {
    let (address, ca_file) = tls_backend().await;
    let (_, other_ca_file) = tls_backend().await;
    let known = || Some(ca_file.path().to_owned());
    for (name, ca_file) in [
        (Some("other.internal"), known()),
        (None, known()),
        (Some("app.internal"), Some(other_ca_file.path().to_owned())),
    ] {
        let response = gateway(address, name, ca_file).get("a.com").await;
        assert_status(&response, 526);
        assert!(response.contains("x-cf-routererror: endpoint_failure (invalid certificate)\r\n"));
    }
}

#[tokio::test]
async fn without_a_ca_file_the_gateway_is_at_fault_and_no_backend_ejected() {
    let (address, _) = tls_backend().await;
    let gateway = gateway(address, Some("app.internal"), None);
    let response = gateway.get("a.com").await;
    assert_status(&response, 503);
    assert!(response.contains("x-cf-routererror: gateway_failure (no certificate roots)\r\n"));
    let totals = gateway.metrics.totals();
    assert!(totals.errors.contains(&("gateway_tls_roots", 1)));
    assert_eq!((totals.retries, totals.ejections), (0, 0));
}

#[tokio::test]
async fn a_backend_that_speaks_no_tls_is_525() {
    let plain = TestBackend::named("plain").await;
    let (_, ca_file) = tls_backend().await;
    let ca_file = Some(ca_file.path().to_owned());
    let response = gateway(plain.address, Some("app.internal"), ca_file)
        .get("a.com")
        .await;
    assert_status(&response, 525);
}

#[tokio::test]
async fn a_ca_file_without_certificates_is_an_error_that_names_it() {
    let empty = tempfile::NamedTempFile::new().unwrap();
    let path = empty.path().to_owned();
    let config = HttpConfig {
        backend_tls: BackendTlsConfig {
            ca_file: Some(path.clone()),
            ..BackendTlsConfig::default()
        },
        ..config()
    };
    let error = start(&config, Published::default(), Arc::default())
        .err()
        .unwrap();
    assert!(
        format!("{error:#}").contains(path.to_str().unwrap()),
        "{error:#}"
    );
}

/// A route whose backend answers with the client's address as it was told.
async fn told_address() -> Snapshot {
    let backend_of = |request: Request<Incoming>| {
        let told = &request.headers()["x-forwarded-for"];
        Response::new(full(told.to_str().unwrap().to_owned()))
    };
    let app = TestBackend::answering(backend_of).await;
    snapshot([("a.com", pool([backend(app.address)]))])
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n\r\n";

#[tokio::test]
async fn requests_come_in_tls_with_a_proxy_header_before_it() {
    let made = rcgen::generate_simple_self_signed(["a.com".to_owned()]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let files = CertificateFiles {
        certificate_file: directory.path().join("a.crt"),
        key_file: directory.path().join("a.key"),
    };
    std::fs::write(&files.certificate_file, made.cert.pem()).unwrap();
    std::fs::write(&files.key_file, made.signing_key.serialize_pem()).unwrap();
    let config = HttpConfig {
        listen: Vec::new(),
        tls: HttpTlsConfig {
            listen: config().listen,
            certificates: vec![files],
            ..HttpTlsConfig::default()
        },
        proxy_protocol: ProxyProtocol::Accept,
        trusted_proxies: vec!["127.0.0.1/32".parse().unwrap()],
        ..config()
    };
    let gateway = Gateway::with_config(told_address().await, config);

    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = TlsConnector::from(Arc::new(client));
    for (header, told) in [
        ("", "127.0.0.1"),
        ("PROXY TCP4 192.0.2.7 198.51.100.1 1 443\r\n", "192.0.2.7"),
    ] {
        let mut stream = gateway.connect().await;
        stream.write_all(header.as_bytes()).await.unwrap();
        let host = ServerName::try_from("a.com").unwrap();
        let mut stream = connector.connect(host, stream).await.unwrap();
        stream.write_all(GET).await.unwrap();
        let mut response = Vec::new();
        stream.read_to_end(&mut response).await.unwrap();
        let response = String::from_utf8(response).unwrap();
        assert_status(&response, 200);
        assert!(response.ends_with(&format!("\r\n\r\n{told}")), "{response}");
    }
}

#[tokio::test]
async fn a_client_cannot_speak_for_another_by_a_proxy_header() {
    let config = HttpConfig {
        proxy_protocol: ProxyProtocol::Accept,
        trusted_proxies: vec!["192.0.2.0/24".parse().unwrap()],
        ..config()
    };
    let gateway = Gateway::with_config(told_address().await, config);
    let header = b"PROXY TCP4 192.0.2.7 198.51.100.1 1 443\r\n";
    let mut stream = gateway.connect().await;
    stream.write_all(&[header, GET].concat()).await.unwrap();
    let mut response = Vec::new();
    // What was not read resets the connection.
    let _ = stream.read_to_end(&mut response).await;
    assert_eq!(response, b"");
    let untrusted = ("proxy_header_untrusted", 1);
    gateway
        .totals(|totals| totals.handshake_failures.contains(&untrusted))
        .await;
    let response = gateway.get("a.com").await;
    assert!(response.ends_with("\r\n\r\n127.0.0.1"), "{response}");
}

#[tokio::test]
async fn a_reload_takes_other_settings_of_tls_and_of_the_proxy_protocol() {
    let gateway = Gateway::start(Snapshot::default());
    let mut wanted = config();
    wanted.backend_tls.system_roots = true;
    wanted.proxy_protocol = ProxyProtocol::Accept;
    gateway.proxy.check_reload(&wanted).unwrap();
}
