//! The lab itself: what the other modules take for granted.

use std::net::SocketAddr;
use std::process::Command;

use router_tests::app::{ECHO_PORT, HTTP_PORT};
use router_tests::client;
use router_tests::lab::{BACK, FRONT, Lab};
use router_tests::nats::Publisher;
use router_tests::process::wait_for;
use router_tests::site::Site;

#[test]
fn client_and_backends_reach_each_other_through_the_gateway() {
    let mut site = Site::new(3).unwrap();
    site.start_nats().unwrap();
    for index in 0..3 {
        let app = site.start_app(index).unwrap();
        let (name, address) = (app.name.clone(), app.address);
        let (echo, http) = (
            SocketAddr::from((address, ECHO_PORT)),
            (address, HTTP_PORT).into(),
        );
        site.lab.client.run(|| {
            let mut connection = client::tcp(echo).unwrap();
            let data = vec![7; 1 << 20];
            assert_eq!(connection.backend, name);
            assert_eq!(connection.echo(&data[..1 << 16]).unwrap(), &data[..1 << 16]);
            assert_eq!(client::udp(echo).unwrap(), name);
            assert_eq!(
                client::get(http, "any", "/").unwrap().body,
                format!("{name}\n")
            );
        });
    }
}

#[test]
fn the_client_has_a_way_to_the_vips_only_by_the_gateway() {
    let lab = Lab::new(1).unwrap();
    let route = lab
        .client
        .command("ip")
        .args(["route", "get", "192.0.2.10"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&route.stdout).contains(&format!("via {FRONT}")));
    let route = lab.backends[0]
        .command("ip")
        .args(["route", "get", "192.0.2.10"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&route.stdout).contains(&format!("via {BACK}")));
}

#[test]
fn a_dropped_lab_leaves_nothing() {
    let lab = Lab::new(2).unwrap();
    let (folder, name) = (lab.folder().to_owned(), lab.client.name().to_owned());
    assert!(namespaces().contains(&name));
    drop(lab);
    assert!(!folder.exists());
    assert!(!namespaces().contains(&name));
}

#[test]
fn a_killed_lab_is_removed_by_the_next() {
    // A process inside first, and then a name for where it is: a lab of another test, which may clean
    // up at any time, finds both or none.
    let mut inside = Command::new("unshare")
        .args(["--net", "sleep", "1000"])
        .spawn()
        .unwrap();
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    let pid = inside.id().to_string();
    wait_for("a namespace", || {
        (namespace(&pid) != namespace("self")).then_some(())
    })
    .unwrap();
    // No process has an id above 4194304.
    let name = "viaduct-4194399-client";
    let attached = Command::new("ip")
        .args(["netns", "attach", name, &pid])
        .status()
        .unwrap();
    assert!(attached.success());
    let _lab = Lab::new(1).unwrap();
    assert!(!namespaces().contains(name));
    assert!(!inside.wait().unwrap().success());
}

#[test]
fn two_labs_run_side_by_side() {
    let mut sites = [Site::new(1).unwrap(), Site::new(1).unwrap()];
    for site in &mut sites {
        site.start_nats().unwrap();
        Publisher::connect(&site.lab)
            .unwrap()
            .publish("any.subject", "{}")
            .unwrap();
    }
}

fn namespaces() -> String {
    let output = Command::new("ip").args(["netns", "list"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}
