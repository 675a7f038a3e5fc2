//! Health checks of backends that serve under the VIP's address, through the real datapath.

use std::fs;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use aya::programs::{SchedClassifier, TcAttachType};
use nix::sys::signal::Signal;
use router_tests::lab::{CLIENT, INTERFACES, VIP_RANGE};
use router_tests::nats::Publisher;
use router_tests::process::wait_for;
use router_tests::site::Site;
use serde_json::{Value, json};
use socket2::SockRef;
use viaduct::config::{Config, Forwarding, HealthCheck};

const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);

#[test]
fn a_backend_whose_service_at_the_vip_is_down_gets_no_clients() {
    let mut site = direct_return(2);
    // The first serves the VIP and not its own address, the second the other way round.
    let serves_vip = Service::start(&site, 0, VIP, 0);
    let port = serves_vip.port;
    let serves_itself = Service::start(&site, 1, site.lab.backend_address(1), port);
    site.start_gateway(checked).unwrap();
    register(&site, 2, port);
    wait_for("the first alone to be healthy", || {
        (healthy(&site, 2) == [true, false]).then_some(())
    })
    .unwrap();
    every_client_is_served(&site, port);
    assert!(verdicts(&site, "probed") > 0);

    // Each check has asked the backend it was for.
    let _second_serves_vip = Service::start(&site, 1, VIP, port);
    drop((serves_vip, serves_itself));
    wait_for("the second alone to be healthy", || {
        (healthy(&site, 2) == [false, true]).then_some(())
    })
    .unwrap();
    every_client_is_served(&site, port);
}

#[test]
fn checks_of_a_vip_leave_nothing_behind() {
    let mut site = direct_return(1);
    let service = Service::start(&site, 0, VIP, 0);
    site.start_gateway(checked).unwrap();
    assert_eq!(egress_programs(&site), [0, 0]);
    register(&site, 1, service.port);
    let attached = |site: &Site| (egress_programs(site) == [1, 1]).then_some(());
    wait_for("programs where checks go out", || attached(&site)).unwrap();

    // The next agent takes them over.
    stop(&mut site);
    assert_eq!(egress_programs(&site), [1, 1]);
    site.start_gateway(checked).unwrap();
    assert_eq!(egress_programs(&site), [1, 1]);
    let before = verdicts(&site, "probed");
    wait_for("checks", || {
        (verdicts(&site, "probed") > before).then_some(())
    })
    .unwrap();

    stop(&mut site);
    let mut detach = site.viaduct().unwrap();
    detach.arg("detach").arg("--config").arg(site.config_path());
    assert!(detach.output().unwrap().status.success());
    wait_for("no programs", || {
        (egress_programs(&site) == [0, 0]).then_some(())
    })
    .unwrap();
}

/// A site whose backends have the VIP, and whose gateway has a way to it, as by its uplink.
fn direct_return(backends: usize) -> Site {
    let mut site = Site::new(backends).unwrap();
    for backend in &site.lab.backends {
        let line = format!("address add {VIP}/32 dev lo");
        backend.ip(&[&line]).unwrap();
        // The bridge asks all of them for the VIP, and none may answer for it.
        backend.sysctl("ipv4/conf/all/arp_ignore", "1").unwrap();
    }
    let route = format!("route add {VIP_RANGE} via {CLIENT}");
    site.lab.gateway.ip(&[&route]).unwrap();
    site.start_nats().unwrap();
    site
}

fn checked(config: &mut Config) {
    config.l4.forwarding = Forwarding::Dsr;
    config.health.check = HealthCheck::Tcp;
    config.health.interval = Duration::from_millis(50);
    config.health.timeout = Duration::from_secs(5);
}

/// Takes every connection, and hangs up.
struct Service {
    listener: TcpListener,
    port: u16,
}

impl Service {
    /// Of a backend; `port` may be 0.
    fn start(site: &Site, index: usize, address: Ipv4Addr, port: u16) -> Service {
        let bind = || TcpListener::bind((address, port)).unwrap();
        let listener = site.lab.backends[index].run(bind);
        let accepting = listener.try_clone().unwrap();
        thread::spawn(move || while accepting.accept().is_ok() {});
        let port = listener.local_addr().unwrap().port();
        Service { listener, port }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Listens no more, whoever else has a descriptor.
        let _ = SockRef::from(&self.listener).shutdown(Shutdown::Both);
    }
}

fn register(site: &Site, backends: usize, port: u16) {
    let mut publisher = Publisher::connect(&site.lab).unwrap();
    for index in 0..backends {
        let message = json!({
            "host": site.lab.backend_address(index),
            "port": port,
            "vips": [format!("tcp/{VIP}:{port}")],
        });
        publisher
            .publish("router.register", message.to_string())
            .unwrap();
    }
}

/// Of each backend; empty until all are known.
fn healthy(site: &Site, backends: usize) -> Vec<bool> {
    let listed = json_of(site, "/v1/backends");
    let listed = listed["rows"].as_array().unwrap();
    let of = |index| {
        let ip = site.lab.backend_address(index).to_string();
        let is_it = |backend: &&Value| {
            let address: SocketAddr = backend["address"].as_str().unwrap().parse().unwrap();
            address.ip().to_string() == ip
        };
        listed.iter().find(is_it)?["healthy"].as_bool()
    };
    (0..backends)
        .map(of)
        .collect::<Option<_>>()
        .unwrap_or_default()
}

/// Whom the other backend got would be refused.
fn every_client_is_served(site: &Site, port: u16) {
    let connect = || (0..20).all(|_| TcpStream::connect((VIP, port)).is_ok());
    let served = || site.lab.client.run(connect).then_some(());
    wait_for("20 clients in a row to be served", served).unwrap();
}

fn verdicts(site: &Site, name: &str) -> u64 {
    let stats = json_of(site, "/v1/stats");
    let mut verdicts = stats["l4"]["verdicts"].as_array().unwrap().iter();
    let found = verdicts.find(|verdict| verdict[0] == name);
    found.unwrap()[1].as_u64().unwrap()
}

fn json_of(site: &Site, path: &str) -> Value {
    serde_json::from_str(&site.admin(path).unwrap().body).unwrap()
}

/// How many programs see what goes out, by interface; where the kernel has no tcx, pins say it.
fn egress_programs(site: &Site) -> [usize; 2] {
    INTERFACES.map(|interface| {
        let query = || SchedClassifier::query_tcx(interface, TcAttachType::Egress);
        match site.lab.gateway.run(query) {
            Ok((_, programs)) => programs.len(),
            Err(_) => egress_pins(site, interface),
        }
    })
}

fn egress_pins(site: &Site, interface: &str) -> usize {
    let links = fs::read_dir(site.config().l4.pin_path.join("links"));
    let names = links
        .into_iter()
        .flatten()
        .map(|link| link.unwrap().file_name());
    let names = names.map(|name| name.into_string().unwrap());
    let of_interface = names.filter(|name| name.starts_with(&format!("{interface}:")));
    of_interface
        .filter(|name| name.ends_with("-egress"))
        .count()
}

fn stop(site: &mut Site) {
    site.gateway().signal(Signal::SIGTERM);
    assert!(site.gateway().wait().unwrap().success());
}
