//! Where the programs sit, through what happens to interfaces and configurations.

use std::net::UdpSocket;
use std::process::Output;
use std::sync::mpsc;
use std::thread;

use aya::maps::{Array, Map, MapData};
use aya::programs::{SchedClassifier, TcAttachType};
use nix::sys::signal::Signal;
use router_common::Settings;
use router_tests::client;
use router_tests::lab::INTERFACES;
use router_tests::process::wait_for;
use router_tests::site::{ECHO_VIP, Site};
use viaduct::config::Attach;

/// An interface of the gateway that no traffic uses.
const SPARE: &str = "spare";

#[test]
fn an_interface_that_is_replaced_or_renamed_is_attached_again() {
    let mut site = Site::new(1).unwrap();
    site.start_nats().unwrap();
    let add = format!("link add {SPARE} type veth peer name other-end");
    let gateway_ip = |site: &Site, line: &str| site.lab.gateway.ip(&[line]).unwrap();
    gateway_ip(&site, &add);
    site.start_gateway(|config| config.l4.interfaces.push(SPARE.to_owned()))
        .unwrap();
    wait_until(&site, SPARE, "native");

    gateway_ip(&site, &format!("link del {SPARE}"));
    gateway_ip(&site, &add);
    wait_until(&site, SPARE, "native");

    gateway_ip(&site, &format!("link set {SPARE} name renamed"));
    wait_until(&site, "renamed", "");
    gateway_ip(&site, &format!("link set renamed name {SPARE}"));
    wait_until(&site, SPARE, "native");

    gateway_ip(&site, &format!("link set {SPARE} down"));
    gateway_ip(&site, &format!("link set {SPARE} up"));
    wait_until(&site, SPARE, "native");
    wait_until(&site, INTERFACES[0], "native");
}

#[test]
fn an_interface_that_is_not_configured_any_more_is_let_go() {
    let mut site = Site::new(1).unwrap();
    site.start_nats().unwrap();
    let add = format!("link add {SPARE} type veth peer name other-end");
    site.lab.gateway.ip(&[&add]).unwrap();
    site.start_gateway(|config| config.l4.interfaces.push(SPARE.to_owned()))
        .unwrap();
    stop(&mut site);
    assert_eq!(hooks(&site, SPARE), "native");
    site.start_gateway(|_| ()).unwrap();
    wait_until(&site, SPARE, "");
    wait_until(&site, INTERFACES[0], "native");
}

#[test]
fn another_hook_takes_over_without_losing_a_packet() {
    let mut site = Site::running(2).unwrap();
    let socket = site.lab.client.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(ECHO_VIP).unwrap();
        socket.set_read_timeout(Some(client::TIMEOUT)).unwrap();
        socket
    });
    let (stop_exchanges, stopped) = mpsc::channel::<()>();
    let exchanges = thread::spawn(move || {
        let mut count = 0;
        while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
            client::udp_on(&socket).unwrap();
            count += 1;
        }
        count
    });
    for (attach, hook) in [
        (Attach::Tcx, "tcx"),
        (Attach::Native, "native"),
        (Attach::Auto, "tcx"),
        (Attach::Auto, "tcx"),
        (Attach::Generic, "generic"),
        (Attach::Native, "native"),
    ] {
        stop(&mut site);
        site.start_gateway(|config| config.l4.attach = attach)
            .unwrap();
        for interface in INTERFACES {
            wait_until(&site, interface, hook);
        }
    }
    drop(stop_exchanges);
    assert!(exchanges.join().unwrap() > 0);
}

#[test]
fn detach_leaves_nothing() {
    for attach in [Attach::Native, Attach::Tcx] {
        let mut site = Site::running_with(1, |config| config.l4.attach = attach).unwrap();
        assert_ne!(managed_neighbours(&site), "");
        stop(&mut site);
        let detach = run(&site, &["detach"]);
        assert!(detach.status.success(), "{detach:?}");
        for interface in INTERFACES {
            wait_until(&site, interface, "");
        }
        assert!(!site.config().l4.pin_path.exists());
        assert_eq!(managed_neighbours(&site), "");
        let again = run(&site, &["detach"]);
        assert!(again.status.success(), "{again:?}");
    }
}

#[test]
fn maps_of_another_layout_are_refused_by_name_and_left_alone() {
    let mut site = Site::new(1).unwrap();
    site.start_nats().unwrap();
    site.start_gateway(|_| ()).unwrap();
    stop(&mut site);
    let pin = site.config().l4.pin_path.join("SETTINGS");
    let settings = || -> Array<MapData, Settings> {
        let map = MapData::from_pin(&pin).unwrap();
        Array::try_from(Map::Array(map)).unwrap()
    };
    let ours = settings().get(&0, 0).unwrap();
    let theirs = Settings { layout: 99, ..ours };
    settings().set(0, theirs, 0).unwrap();

    site.spawn_gateway(|_| ()).unwrap();
    assert_eq!(site.gateway().wait().unwrap().code(), Some(1));
    let log = site.gateway().log();
    assert!(log.contains("are of layout 99"), "{log}");
    assert!(log.contains("run `viaduct detach`"), "{log}");
    assert_eq!(settings().get(&0, 0).unwrap(), theirs);
    for interface in INTERFACES {
        assert_eq!(hooks(&site, interface), "native");
    }
}

#[test]
fn the_doctor_says_how_each_interface_is_used_and_what_is_missing() {
    let mut site = Site::new(1).unwrap();
    site.start_nats().unwrap();
    site.write_config(|config| config.l4.attach = Attach::Auto)
        .unwrap();
    let report = run(&site, &["doctor"]);
    let text = String::from_utf8(report.stdout).unwrap();
    assert!(report.status.success(), "{text}");
    assert!(text.contains("front (veth, MTU 1500)"), "{text}");
    assert!(
        text.contains("attach is tcx: a device of software"),
        "{text}"
    );

    site.write_config(|config| {
        config.l4.interfaces.push("absent".to_owned());
        config.nats.servers = vec!["nats://127.0.0.1:9".to_owned()];
    })
    .unwrap();
    let report = run(&site, &["doctor", "--json"]);
    assert_eq!(report.status.code(), Some(1));
    let checks: Vec<serde_json::Value> = String::from_utf8(report.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let missing: Vec<&str> = checks
        .iter()
        .filter(|check| check["verdict"] == "missing")
        .map(|check| check["name"].as_str().unwrap())
        .collect();
    assert_eq!(missing, ["interface absent", "nats"]);
    assert!(
        checks
            .iter()
            .all(|check| check["verdict"] == "good" || check["remedy"].is_string())
    );
}

fn stop(site: &mut Site) {
    site.gateway().signal(Signal::SIGTERM);
    assert!(site.gateway().wait().unwrap().success());
}

fn run(site: &Site, arguments: &[&str]) -> Output {
    let mut command = site.viaduct().unwrap();
    command.args(arguments).arg("--config");
    command.arg(site.config_path()).output().unwrap()
}

/// The kernel takes a program off a moment after the last reference to its link is gone.
fn wait_until(site: &Site, interface: &str, expected: &str) {
    wait_for(&format!("{expected:?} on {interface}"), || {
        (hooks(site, interface) == expected).then_some(())
    })
    .unwrap();
}

/// Where programs sit on an interface of the gateway, of all hooks there are.
fn hooks(site: &Site, interface: &str) -> String {
    let link = output(site, "ip", &["-oneline", "link", "show", "dev", interface]);
    let words: Vec<&str> = link.split_whitespace().collect();
    let mut hooks = Vec::new();
    if words.contains(&"xdp") {
        hooks.push("native");
    }
    if words.contains(&"xdpgeneric") {
        hooks.push("generic");
    }
    let tcx = || SchedClassifier::query_tcx(interface, TcAttachType::Ingress);
    let at_tc = match site.lab.gateway.run(tcx) {
        Ok((_, programs)) => !programs.is_empty(),
        // Before Linux 6.6 a filter of clsact stands in.
        Err(_) => !filters(site, interface).is_empty(),
    };
    if at_tc {
        hooks.push("tcx");
    }
    hooks.join(" ")
}

/// What `tc` prints of the filters for packets that come in; nothing for a device that is not there.
fn filters(site: &Site, interface: &str) -> String {
    output(site, "tc", &["filter", "show", "dev", interface, "ingress"])
}

fn managed_neighbours(site: &Site) -> String {
    let neighbours = output(site, "ip", &["neigh"]);
    let managed = neighbours.lines().filter(|line| line.contains("managed"));
    managed.collect()
}

/// What a program of iproute2 prints in the gateway's namespace.
fn output(site: &Site, program: &str, arguments: &[&str]) -> String {
    let output = site.lab.gateway.command(program).args(arguments).output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}
