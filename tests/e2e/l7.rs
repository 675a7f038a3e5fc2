//! Layer 7: requests by Host.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::sync::atomic::Ordering;

use router_tests::app::{HOST, Presence};
use router_tests::client::{self, HttpClient};
use router_tests::lab::CLIENT;
use router_tests::process::wait_for;
use router_tests::site::{self, PROXY, Site, Tally};

#[test]
fn requests_of_one_connection_reach_every_backend() {
    let site = Site::running(3).unwrap();
    let names: BTreeSet<String> = site.lab.client.run(|| {
        let mut connection = HttpClient::connect(PROXY).unwrap();
        (0..30)
            .map(|_| connection.get(HOST, "/").unwrap().body.trim().to_owned())
            .collect()
    });
    assert_eq!(names, ["b1", "b2", "b3"].map(str::to_owned).into());
}

#[test]
fn a_host_that_nobody_registered_is_404() {
    let site = Site::running(1).unwrap();
    let response = site.get("nobody.example.com", "/").unwrap();
    assert_eq!(response.status, 404);
    assert_eq!(response.header("x-cf-routererror"), Some("unknown_route"));
}

#[test]
fn a_backend_learns_who_asked() {
    let site = Site::running(1).unwrap();
    let head = site
        .get(HOST, "/headers")
        .unwrap()
        .body
        .to_ascii_lowercase();
    for line in [
        format!("\r\nhost: {HOST}\r\n"),
        format!("\r\nx-forwarded-for: {CLIENT}\r\n"),
        "\r\nx-forwarded-proto: http\r\n".to_owned(),
    ] {
        assert!(head.contains(&line), "{line:?} is not in {head:?}");
    }
    assert!(
        head.contains("\r\nx-request-id: "),
        "no X-Request-Id in {head:?}"
    );
}

#[test]
fn an_upgraded_connection_carries_bytes_and_outlives_the_registration() {
    let site = Site::running(1).unwrap();
    let mut stream = site.lab.client.run(|| {
        HttpClient::connect(PROXY)
            .unwrap()
            .upgrade(HOST, "/")
            .unwrap()
    });
    assert_eq!(client::read_line(&mut stream).unwrap(), "b1");
    site.app(0).set_presence(Presence::Unregistered);
    wait_for("404", || {
        (site.get(HOST, "/").ok()?.status == 404).then_some(())
    })
    .unwrap();
    for size in [1, 1000, 50_000] {
        let data = vec![b'x'; size];
        stream.get_mut().write_all(&data).unwrap();
        let mut answer = vec![0; size];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, data);
    }
}

#[test]
fn only_requests_under_way_fail_when_a_backend_is_killed() {
    const CLIENTS: usize = 4;
    const REQUESTS: usize = 300;
    let mut site = Site::running(3).unwrap();
    let requests = || {
        // A connection of its own for each request, so that none is lost with the connection.
        (0..REQUESTS).filter(|_| site::hello().is_err()).count()
    };
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| site.lab.client.spawn(&format!("client-{n}"), requests))
        .collect();
    let served = &site.app(1).served.http_requests;
    let before = served.load(Ordering::Relaxed);
    wait_for("b2 to be busy", || {
        (served.load(Ordering::Relaxed) > before + 50).then_some(())
    })
    .unwrap();
    assert!(
        clients.iter().all(|client| !client.is_finished()),
        "every client is still at it"
    );
    site.kill_app(1);
    let failed: usize = clients
        .into_iter()
        .map(|client| client.join().unwrap())
        .sum();
    assert!(
        failed <= CLIENTS,
        "{failed} requests failed with {CLIENTS} under way"
    );

    let after: Tally = site.tally(100, site::hello).unwrap();
    assert!(!after.contains_key("b2"), "{after:?}");
}
