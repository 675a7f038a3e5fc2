//! Backends that registered a TLS port.

use std::io::Write;
use std::path::PathBuf;

use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::config::BackendTlsConfig;
use crate::route::BackendTls;

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
    });
    let route = (
        "a.com",
        pool([Backend {
            tls,
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
        error.to_string().contains(path.to_str().unwrap()),
        "{error:#}"
    );
}
