//! Python's h2 on both sides, frame by frame.

use nix::sys::signal::Signal;
use router_tests::lab::FRONT;

use super::*;

#[test]
fn trailers_pass_both_ways() {
    let clients = Clients::new("h2_backend", "http2");
    clients.h2_client("trailers");
}

#[test]
fn a_reset_ends_one_stream_and_no_other() {
    let clients = Clients::new("h2_backend", "http2");
    clients.h2_client("resets");
    // What the client resets is reset at the backend.
    clients.backend_says("reset /hold");
}

#[test]
fn a_response_before_the_end_of_the_request_is_whole() {
    let clients = Clients::new("http1_backend", "http1");
    clients.h2_client("early");
}

#[test]
fn a_drain_says_goaway_and_lets_streams_end() {
    let mut clients = Clients::new("h2_backend", "http2");
    let mut command = python(&clients.site.lab.client, "h2_client");
    command.args([&FRONT.to_string(), "80", HOST, "drain"]);
    let mut client = Process::start("h2_client", command, clients.site.lab.folder()).unwrap();
    wait_for("the stream to be open", || {
        client.log().contains("open\n").then_some(())
    })
    .unwrap();
    clients.site.gateway().signal(Signal::SIGTERM);
    let status = client.wait().unwrap();
    assert!(status.success(), "{status}: {}", client.log());
    let status = clients.site.gateway().wait().unwrap();
    assert!(status.success(), "{status}");
}

impl Clients {
    #[track_caller]
    fn h2_client(&self, case: &str) {
        self.python("h2_client", &[&FRONT.to_string(), "80", HOST, case]);
    }
}
