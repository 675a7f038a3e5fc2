//! The agent ends, by accident or by order, and comes back.

use nix::sys::signal::Signal;
use router_tests::client;
use router_tests::lab::INTERFACES;
use router_tests::process::{Process, wait_for};
use router_tests::site::{self, ECHO_VIP, Site};

#[test]
fn packets_flow_on_while_the_agent_is_dead_and_when_it_is_back() {
    let mut site = Site::running(3).unwrap();
    let mut flows: Vec<_> = site
        .lab
        .client
        .run(|| (0..20).map(|_| client::tcp(ECHO_VIP).unwrap()).collect());
    let mut echo_all = |when: &str| {
        for flow in &mut flows {
            assert_eq!(
                flow.echo(when.as_bytes()).unwrap(),
                when.as_bytes(),
                "{when}"
            );
        }
    };

    site.gateway().kill();
    echo_all("without an agent");
    assert_eq!(site.tally(60, site::echo_tcp).unwrap().len(), 3);
    assert_eq!(site.tally(60, site::echo_udp).unwrap().len(), 3);

    site.start_gateway(|_| ()).unwrap();
    echo_all("as the agent is ready");
    assert_eq!(site.tally(60, site::echo_tcp).unwrap().len(), 3);
    site.wait_until_served(3).unwrap();
    echo_all("once routes are back");
}

#[test]
fn no_packet_is_lost_between_two_agents() {
    let mut site = Site::running(2).unwrap();
    let socket = site.lab.client.run(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(ECHO_VIP).unwrap();
        socket.set_read_timeout(Some(client::TIMEOUT)).unwrap();
        socket
    });
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let exchanges = std::thread::spawn(move || {
        let mut count = 0;
        while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            client::udp_on(&socket).unwrap();
            count += 1;
        }
        count
    });
    for _ in 0..3 {
        site.gateway().signal(Signal::SIGTERM);
        site.gateway().wait().unwrap();
        site.start_gateway(|_| ()).unwrap();
    }
    drop(stop);
    assert!(exchanges.join().unwrap() > 0);
}

#[test]
fn sigterm_ends_the_agent_well_and_detach_takes_its_programs_away() {
    let mut site = Site::running(1).unwrap();
    site.gateway().signal(Signal::SIGTERM);
    assert!(site.gateway().wait().unwrap().success());
    assert_eq!(attached(&site), INTERFACES.len());

    let mut detach = site.viaduct().unwrap();
    let status = detach
        .args(["detach", "--config"])
        .arg(site.config_path())
        .status()
        .unwrap();
    assert!(status.success());
    // The kernel takes a program off its interface a moment after the last reference is gone.
    wait_for("the interfaces to be free", || {
        (attached(&site) == 0).then_some(())
    })
    .unwrap();
    assert!(!site.config().l4.pin_path.exists());
}

#[test]
fn a_vip_outside_the_ranges_of_a_new_agent_is_not_adopted() {
    let mut site = Site::running(1).unwrap();
    site.gateway().kill();
    site.lab.client.run(|| site::echo_tcp().unwrap());
    site.start_gateway(|config| config.l4.vip_ranges.clear())
        .unwrap();
    wait_for("the VIP to be gone", || {
        site.lab.client.run(site::echo_tcp).is_err().then_some(())
    })
    .unwrap();
    assert!(!site.admin("/v1/vips").unwrap().body.contains("tcp/"));
}

#[test]
fn the_capabilities_of_the_packaged_service_are_enough_to_take_over() {
    let unit = include_str!("../../packaging/viaduct.service");
    let line = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let capabilities = line.unwrap().to_lowercase().replace("cap_", "+");
    let bounding = format!("--bounding-set=-all,{}", capabilities.replace(' ', ","));

    let mut site = Site::running(1).unwrap();
    site.gateway().kill();
    let mut command = site.lab.gateway.command("setpriv");
    command.args([bounding.as_str(), "--inh-caps=-all"]);
    command
        .arg(site::agent().unwrap())
        .args(["run", "--config"]);
    command.arg(site.config_path());
    let folder = site.lab.folder().to_owned();
    site.gateway = Some(Process::start("viaduct", command, &folder).unwrap());
    site.wait_until("/readyz").unwrap();
    site.wait_until_served(1).unwrap();
}

/// How many of the gateway's interfaces have an XDP program.
fn attached(site: &Site) -> usize {
    let links = site
        .lab
        .gateway
        .command("ip")
        .args(["-oneline", "link"])
        .output()
        .unwrap();
    String::from_utf8(links.stdout)
        .unwrap()
        .lines()
        .filter(|link| link.contains(" xdp"))
        .count()
}
