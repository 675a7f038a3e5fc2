//! The commands of the real binary against a running gateway, and its signals.

use std::process::Output;

use nix::sys::signal::Signal;
use router_tests::app::{HOST, HTTP_PORT};
use router_tests::process::wait_for;
use router_tests::site::Site;
use viaduct::config::HealthCheck;

#[test]
fn what_is_registered_by_hand_is_listed_and_served_until_it_is_withdrawn() {
    let site = Site::running(1).unwrap();
    let vip = "tcp/192.0.2.77:7000";
    let backend = format!("{}:{HTTP_PORT}", site.lab.backend_address(0));
    let by_hand = |command: &str| {
        let arguments = [
            command,
            "--uri",
            "hand.example.com",
            "--vip",
            vip,
            "--address",
            &backend,
            "--app",
            "byhand",
        ];
        good(&run(&site, &arguments));
    };
    by_hand("register");
    wait_for("the host", || {
        (site.get("hand.example.com", "/").ok()?.status == 200).then_some(())
    })
    .unwrap();
    let routes = good(&run(&site, &["routes"]));
    for heading in ["ROUTE", "BACKEND", "WEIGHT", "HEALTH", "ORIGIN", "APP"] {
        assert!(routes.contains(heading), "{routes}");
    }
    for (command, words) in [
        ("routes", ["hand.example.com", &backend, "byhand"]),
        ("vips", [vip, &backend, "byhand"]),
        ("backends", [&backend, "up", "nats"]),
        (
            "stats",
            ["nats.registers", "l4.active_flows", "http_routes"],
        ),
    ] {
        let table = good(&run(&site, &[command]));
        for word in words {
            assert!(table.contains(word), "{command}: {table}\nlacks {word}");
        }
        let json = good(&run(&site, &[command, "--json"]));
        let rows: Vec<serde_json::Value> = json
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert!(!rows.is_empty() && rows.iter().all(serde_json::Value::is_object));
    }
    by_hand("unregister");
    wait_for("404", || {
        (site.get("hand.example.com", "/").ok()?.status == 404).then_some(())
    })
    .unwrap();
    assert!(!good(&run(&site, &["vips"])).contains(vip));
}

#[test]
fn a_reload_is_applied_whole_or_refused_by_name() {
    let mut site = Site::running(1).unwrap();
    site.write_config(|config| {
        config.admin.listen = "127.0.0.1:9".parse().unwrap();
        config.l4.vip_ranges.clear();
    })
    .unwrap();
    site.gateway().signal(Signal::SIGHUP);
    wait_for("the refusal", || {
        let log = site.gateway().log();
        (log.contains("not reloaded") && log.contains("admin.listen")).then_some(())
    })
    .unwrap();
    assert!(
        site.admin("/v1/vips").unwrap().body.contains("tcp/"),
        "nothing of it was applied"
    );

    site.write_config(|config| config.l4.vip_ranges.clear())
        .unwrap();
    site.gateway().signal(Signal::SIGHUP);
    wait_for("the VIPs to be dropped", || {
        (!site.admin("/v1/vips").ok()?.body.contains("tcp/")).then_some(())
    })
    .unwrap();
    assert_eq!(site.get(HOST, "/").unwrap().status, 200);
}

#[test]
fn sigusr1_drains_the_gateway_as_it_does_gorouter() {
    let mut site = Site::running(1).unwrap();
    site.gateway().signal(Signal::SIGUSR1);
    assert!(site.gateway().wait().unwrap().success());
}

#[test]
fn an_instance_that_stops_answering_is_avoided_and_told() {
    let mut site = Site::running_with(2, |config| {
        config.health.check = HealthCheck::Tcp;
        config.health.interval = std::time::Duration::from_millis(100);
        config.health.fall = 2;
    })
    .unwrap();
    site.kill_app(0);
    let down = format!("{}:{HTTP_PORT}", site.lab.backend_address(0));
    wait_for("the instance to be down", || {
        let backends = good(&run(&site, &["backends"]));
        let line = backends.lines().find(|line| line.starts_with(&down))?;
        line.contains(" down ").then_some(())
    })
    .unwrap();
    for _ in 0..20 {
        assert_eq!(router_hello(&site), "b2");
    }
    let metrics = site.admin("/metrics").unwrap().body;
    assert!(
        !metrics.contains("viaduct_health_unhealthy_backends 0"),
        "{metrics}"
    );
}

fn router_hello(site: &Site) -> String {
    let response = site.get(HOST, "/").unwrap();
    assert_eq!(response.status, 200);
    response.body.trim().to_owned()
}

/// Runs a command of the binary beside the gateway, with its configuration.
fn run(site: &Site, arguments: &[&str]) -> Output {
    let mut command = site.viaduct().unwrap();
    command.args(arguments);
    command.arg("--config").arg(site.config_path());
    command.output().unwrap()
}

fn good(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
