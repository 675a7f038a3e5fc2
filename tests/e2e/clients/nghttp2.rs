//! nghttp2's nghttp and h2load.

use router_tests::lab::FRONT;

use super::*;

#[test]
fn nghttp_gets_what_it_asks_for_by_h2c_and_by_tls() {
    let clients = Clients::new("http1_backend", "http1");
    for scheme in ["http", "https"] {
        let mut command = clients.site.lab.client.command(installed("nghttp"));
        let authority = format!(":authority: {HOST}");
        command.args(["-v", "--no-verify-peer", "-H", &authority]);
        let text = succeed(command.arg(format!("{scheme}://{FRONT}/a")));
        assert!(text.contains(":status: 200"), "{text}");
        assert!(text.contains("GET /a 0 "), "{text}");
        assert!(!text.contains("RST_STREAM"), "{text}");
    }
}

#[test]
fn a_hundred_streams_at_once_are_all_answered() {
    const REQUESTS: usize = 20_000;
    let site = Site::running_with(3, |_| ()).unwrap();
    let host = router_tests::app::HOST;
    let mut command = site.lab.client.command(installed("h2load"));
    command.args(["-t1", "-c4", "-m100", &format!("-n{REQUESTS}")]);
    command.arg(format!("--connect-to={FRONT}:80"));
    let text = succeed(command.arg(format!("http://{host}/")));
    let all = format!("{REQUESTS} succeeded, 0 failed, 0 errored, 0 timeout");
    assert!(text.contains(&all), "{text}");
    let statuses = format!("status codes: {REQUESTS} 2xx, 0 3xx, 0 4xx, 0 5xx");
    assert!(text.contains(&statuses), "{text}");
}

#[test]
fn a_hundred_streams_of_tls_and_http2_backends_are_all_answered() {
    const REQUESTS: usize = 5000;
    let clients = Clients::new("h2_backend", "http2");
    let mut command = clients.site.lab.client.command(installed("h2load"));
    command.args(["-t1", "-c2", "-m100", &format!("-n{REQUESTS}")]);
    command.arg(format!("--connect-to={FRONT}:443"));
    let text = succeed(command.arg(format!("https://{HOST}/")));
    let all = format!("{REQUESTS} succeeded, 0 failed, 0 errored, 0 timeout");
    assert!(text.contains(&all), "{text}");
    assert!(text.contains(&format!("{REQUESTS} 2xx")), "{text}");
}
