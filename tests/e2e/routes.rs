//! From a message on NATS to what is served, and back.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use router_tests::app::{HOST, HTTP_PORT, Presence, VIP};
use router_tests::nats::Publisher;
use router_tests::process::wait_for;
use router_tests::site::{self, Exchange, Site};
use viaduct::config::Config;

const EXCHANGES: [Exchange; 3] = [site::echo_tcp, site::echo_udp, site::hello];

/// Longer than the heartbeat of the lab's applications, shorter than a test's patience.
const STALE: Duration = Duration::from_secs(3);

fn prune_soon(config: &mut Config) {
    config.nats.prune_interval = Duration::from_millis(200);
    config.nats.stale_threshold = STALE;
}

#[test]
fn an_instance_is_served_once_it_registers_and_no_more_once_it_unregisters() {
    let mut site = Site::new(1).unwrap();
    site.start_nats().unwrap();
    site.start_gateway(|_| ()).unwrap();
    site.start_app(0).unwrap();
    assert_eq!(site.get(HOST, "/").unwrap().status, 503);

    site.app(0).set_presence(Presence::Registered);
    site.wait_until_served(1).unwrap();

    site.app(0).set_presence(Presence::Unregistered);
    wait_for("404", || {
        (site.get(HOST, "/").ok()?.status == 404).then_some(())
    })
    .unwrap();
    wait_for("the VIP to be gone", || {
        site.lab.client.run(site::echo_tcp).is_err().then_some(())
    })
    .unwrap();
}

#[test]
fn one_of_several_instances_leaves_without_a_failed_exchange() {
    let site = Site::running(3).unwrap();
    site.app(1).set_presence(Presence::Unregistered);
    for exchange in EXCHANGES {
        site.wait_until_spared("b2", exchange).unwrap();
        let after = site.tally(100, exchange).unwrap();
        assert!(!after.contains_key("b2"), "{after:?}");
    }
}

#[test]
fn an_instance_that_falls_silent_is_pruned() {
    let site = Site::running_with(2, prune_soon).unwrap();
    site.app(0).set_presence(Presence::Silent);
    for exchange in EXCHANGES {
        site.wait_until_spared("b1", exchange).unwrap();
    }
    // The other one goes on.
    site.tally(50, site::hello).unwrap();
}

#[test]
fn while_nats_is_away_nothing_is_pruned_and_afterwards_silence_counts_anew() {
    let mut site = Site::running_with(2, prune_soon).unwrap();
    site.app(1).set_presence(Presence::Silent);
    site.nats = None;

    let away = Instant::now();
    while away.elapsed() < 2 * STALE {
        for exchange in EXCHANGES {
            site.tally(1, exchange).unwrap();
        }
    }
    // b2 said nothing for twice the threshold, and is served all the same.
    site.wait_until_served(2).unwrap();

    site.start_nats().unwrap();
    wait_for("the silent instance to be pruned", || {
        // Nothing fails on the way.
        (!site.tally(30, site::hello).unwrap().contains_key("b2")).then_some(())
    })
    .unwrap();
    for exchange in EXCHANGES {
        site.wait_until_spared("b2", exchange).unwrap();
        site.tally(50, exchange).unwrap();
    }
}

#[test]
fn a_gateway_starts_without_nats_and_takes_routes_once_it_appears() {
    let mut site = Site::new(2).unwrap();
    site.spawn_gateway(|_| ()).unwrap();
    site.wait_until("/livez").unwrap();
    for index in 0..2 {
        site.start_app(index)
            .unwrap()
            .set_presence(Presence::Registered);
    }
    site.start_nats().unwrap();
    site.wait_until("/readyz").unwrap();
    site.wait_until_served(2).unwrap();
}

#[test]
fn a_gateway_says_that_it_starts_and_answers_a_greeting() {
    let mut site = Site::new(1).unwrap();
    site.start_nats().unwrap();
    let mut listener = Publisher::connect(&site.lab).unwrap();
    listener.subscribe("router.start").unwrap();
    site.start_gateway(|config| config.nats.stale_threshold = Duration::from_secs(77))
        .unwrap();
    let start = listener.next_message().unwrap();
    assert_eq!(start["minimumRegisterIntervalInSeconds"], 20);
    assert_eq!(start["pruneThresholdInSeconds"], 77);

    let mut asker = Publisher::connect(&site.lab).unwrap();
    asker.subscribe("inbox.lab").unwrap();
    asker.request("router.greet", "inbox.lab").unwrap();
    assert_eq!(asker.next_message().unwrap()["id"], start["id"]);
}

#[test]
fn bad_messages_are_refused_and_everything_else_goes_on() {
    let mut site = Site::running(2).unwrap();
    let long_host = "h".repeat(900_000);
    let bad: Vec<Vec<u8>> = [
        "",
        "null",
        "[]",
        "{",
        "\"router.register\"",
        &"[".repeat(100_000),
        r#"{"host":"10.0.0.11","port":0,"uris":["bad.example.com"]}"#,
        r#"{"host":"10.0.0.11","port":70000,"uris":["bad.example.com"]}"#,
        r#"{"host":"10.0.0.11","port":"8080","uris":["bad.example.com"]}"#,
        r#"{"host":"10.0.0.11","port":8080,"uris":"bad.example.com"}"#,
        r#"{"host":"","port":8080,"uris":["bad.example.com"]}"#,
        r#"{"host":"10.0.0.11","port":8080,"uris":["bad.example.com"],"weight":1001}"#,
        r#"{"host":"10.0.0.11","port":9000,"vips":["tcp/203.0.113.1:80"]}"#,
        r#"{"host":"10.0.0.11","port":9000,"vips":["tcp/192.0.2.10:0"]}"#,
        r#"{"host":"10.0.0.11","port":9000,"vips":["sctp/192.0.2.10:80"]}"#,
        &format!(r#"{{"host":"10.0.0.11","port":8080,"uris":["{long_host}"]}}"#),
    ]
    .map(|text| text.as_bytes().to_vec())
    .into_iter()
    .chain([b"{\"host\":\"10.0.0.11\",\"port\":8080,\"uris\":[\"\xff\xfe\"]}".to_vec()])
    .collect();

    let mut publisher = Publisher::connect(&site.lab).unwrap();
    for message in &bad {
        for subject in ["router.register", "router.unregister"] {
            publisher.publish(subject, message).unwrap();
        }
    }
    register_and_wait(&site, &mut publisher, "after.example.com");

    // Each of them, by the field that is wrong.
    let stats: serde_json::Value =
        serde_json::from_str(&site.admin("/v1/stats").unwrap().body).unwrap();
    let rejects = stats["nats"]["rejects"].as_object().unwrap();
    for reason in [
        "syntax",
        "type",
        "port",
        "host",
        "uri",
        "weight",
        "vip",
        "vip_range",
    ] {
        assert!(
            rejects[reason].as_u64().unwrap() > 0,
            "{reason} in {rejects:?}"
        );
    }
    site.gateway().ensure_alive().unwrap();
    assert_eq!(site.get("bad.example.com", "/").unwrap().status, 404);
    for exchange in EXCHANGES {
        assert_eq!(site.tally(60, exchange).unwrap().len(), 2);
    }
}

#[test]
fn a_vip_outside_the_ranges_is_not_taken() {
    let mut site = Site::running(1).unwrap();
    let mut publisher = Publisher::connect(&site.lab).unwrap();
    for vip in ["tcp/198.51.100.1:22", "udp/203.0.113.9:53"] {
        let message = format!(r#"{{"host":"10.0.0.11","port":9000,"vips":["{vip}"]}}"#);
        publisher.publish("router.register", message).unwrap();
    }
    // Refusals of one kind are logged now and then, the first at once.
    wait_for("the refusal in the log", || {
        let log = site.gateway().log();
        (log.contains("tcp/198.51.100.1:22") && log.contains("vip_ranges")).then_some(())
    })
    .unwrap();
    register_and_wait(&site, &mut publisher, "after.example.com");
    let vips = site.admin("/v1/vips").unwrap().body;
    assert!(vips.contains(&VIP.to_string()), "{vips}");
    assert!(
        !vips.contains("198.51.100.1") && !vips.contains("203.0.113.9"),
        "{vips}"
    );
}

/// Registers a host and waits until it is served. NATS keeps the order of one connection: all that
/// was published before has been read then.
fn register_and_wait(site: &Site, publisher: &mut Publisher, host: &str) {
    let message = format!(r#"{{"host":"10.0.0.11","port":{HTTP_PORT},"uris":["{host}"]}}"#);
    publisher.publish("router.register", message).unwrap();
    wait_for(host, || {
        (site.get(host, "/").ok()?.status == 200).then_some(())
    })
    .unwrap();
}

#[test]
fn a_gateway_that_starts_with_nats_away_serves_what_was_last_known() {
    let mut site = Site::new(2).unwrap();
    let directory = site.lab.folder().join("state");
    let keep = |config: &mut Config| {
        prune_soon(config);
        config.state.directory = Some(directory.clone());
    };
    site.start_nats().unwrap();
    site.start_gateway(keep).unwrap();
    for index in 0..2 {
        let app = site.start_app(index).unwrap();
        app.set_presence(Presence::Registered);
    }
    site.wait_until_served(2).unwrap();
    // As before a reboot, which takes the pinned maps with it.
    site.gateway().signal(Signal::SIGTERM);
    assert!(site.gateway().wait().unwrap().success());
    let mut detach = site.viaduct().unwrap();
    detach.args(["detach", "--config"]).arg(site.config_path());
    assert!(detach.status().unwrap().success());
    site.nats = None;
    site.app(1).set_presence(Presence::Silent);

    site.start_gateway(keep).unwrap();
    // Layer 4 finds the way to them again.
    site.wait_until_served(2).unwrap();
    let away = Instant::now();
    while away.elapsed() < 2 * STALE {
        for exchange in EXCHANGES {
            site.tally(1, exchange).unwrap();
        }
    }
    site.wait_until_served(2).unwrap();
    let stats = site.admin("/v1/stats").unwrap().body;
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    assert!(stats["state"]["restored_age_seconds"].is_u64(), "{stats}");
    assert_ne!(stats["route_backends"]["adopted"], 0);

    site.start_nats().unwrap();
    for exchange in EXCHANGES {
        site.wait_until_spared("b2", exchange).unwrap();
        site.tally(50, exchange).unwrap();
    }
}
