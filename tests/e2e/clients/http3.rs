//! Python's aioquic, and curl to be told of HTTP/3.

use router_tests::lab::FRONT;

use super::*;

#[test]
fn requests_are_served_and_clients_of_tcp_are_told() {
    let clients = Clients::with("http1_backend", "http1", |config| {
        config.http.tls.http3 = true;
    });
    let certificate = clients.certificate();
    clients.python(
        "http3_client",
        &[&FRONT.to_string(), "443", HOST, &certificate],
    );
    let target = format!("https://{HOST}/");
    let head = clients.curl(&["--http2", "--cacert", &certificate, "-I", &target]);
    assert!(
        head.contains("alt-svc: h3=\":443\"; ma=86400\r\n"),
        "{head}"
    );
}
