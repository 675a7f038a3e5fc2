//! Python's aioquic, and curl to be told of HTTP/3.

use router_tests::lab::FRONT;

use super::*;
use crate::life;

#[test]
fn requests_are_served_and_clients_of_tcp_are_told() {
    let clients = Clients::with("http1_backend", "http1", |config| {
        config.http.tls.http3 = true;
    });
    clients.http3_client();
    let certificate = clients.certificate();
    let target = format!("https://{HOST}/");
    let head = clients.curl(&["--http2", "--cacert", &certificate, "-I", &target]);
    assert!(
        head.contains("alt-svc: h3=\":443\"; ma=86400\r\n"),
        "{head}"
    );
}

#[test]
fn a_process_that_takes_over_serves_when_the_old_one_has_ended() {
    let change = |config: &mut Config| {
        config.http.tls.http3 = true;
        life::handover(config, 2);
    };
    let mut clients = Clients::with("http1_backend", "http1", change);
    clients.http3_client();
    let tls = tls_of(&clients.site);
    let mut before = life::take_over(&mut clients.site, |config| {
        tls(config);
        change(config);
    });
    assert!(before.wait().unwrap().success(), "{}", before.log());
    register(&clients.site, 0, "http1");
    clients.http3_client();
}

impl Clients {
    #[track_caller]
    fn http3_client(&self) {
        let certificate = self.certificate();
        self.python(
            "http3_client",
            &[&FRONT.to_string(), "443", HOST, &certificate],
        );
    }
}
