//! VIPs of `l7` mode: handed to the proxy, with no address or listener of their own.

use std::net::SocketAddr;

use nix::sys::signal::Signal;
use router_tests::app::HOST;
use router_tests::client;
use router_tests::process::wait_for;
use router_tests::site::{ECHO_VIP, Site};
use viaduct::config::Attach;

/// One on a port, and one of each family on any: the proxy listens on none of these.
const VIPS: [&str; 3] = [
    "tcp/192.0.2.20:8088",
    "tcp/192.0.2.21:*",
    "tcp/[2001:db8::20]:*",
];
const SERVED: [&str; 4] = [
    "192.0.2.20:8088",
    "192.0.2.21:1",
    "192.0.2.21:65000",
    "[2001:db8::20]:4711",
];

#[test]
fn requests_to_a_vip_reach_the_proxy_on_any_port() {
    for attach in [Attach::Native, Attach::Tcx] {
        let mut site = running(attach);
        for address in SERVED {
            assert_eq!(get(&site, address), Some(200), "{address}");
        }
        assert_eq!(get(&site, "192.0.2.20:8089"), None);
        // The others go on as before.
        site.lab.client.run(|| client::tcp(ECHO_VIP).unwrap());
        assert_eq!(local_routes(&site).lines().count(), 3);

        site.gateway().kill();
        start(&mut site, attach);
        for address in SERVED {
            assert_eq!(get(&site, address), Some(200), "{address} after a restart");
        }
    }
}

#[test]
fn detach_takes_the_routes_of_vips_away() {
    let mut site = running(Attach::Native);
    site.gateway().signal(Signal::SIGTERM);
    assert!(site.gateway().wait().unwrap().success());
    let mut detach = site.viaduct().unwrap();
    detach.args(["detach", "--config"]).arg(site.config_path());
    assert!(detach.status().unwrap().success());
    assert_eq!(local_routes(&site), "");
}

#[test]
fn a_vip_of_another_mode_is_not_local() {
    let mut site = running(Attach::Native);
    site.write_config(|config| {
        config.http.listen.push("[::]:81".parse().unwrap());
    })
    .unwrap();
    site.gateway().signal(Signal::SIGHUP);
    wait_for("the routes to be gone", || {
        local_routes(&site).is_empty().then_some(())
    })
    .unwrap();
    assert_eq!(get(&site, SERVED[0]), None);
}

fn running(attach: Attach) -> Site {
    let mut site = Site::running(1).unwrap();
    site.gateway().signal(Signal::SIGTERM);
    assert!(site.gateway().wait().unwrap().success());
    start(&mut site, attach);
    site
}

fn start(site: &mut Site, attach: Attach) {
    site.start_gateway(|config| {
        config.http.listen.push("[::]:81".parse().unwrap());
        config.l4.attach = attach;
        config.l4.vip = VIPS
            .iter()
            .map(|vip| {
                let text = format!("address = \"{vip}\"\nforwarding = \"l7\"");
                toml::from_str(&text).unwrap()
            })
            .collect();
    })
    .unwrap();
    site.wait_until_served(1).unwrap();
}

/// The status that a client gets; none if nobody answers.
fn get(site: &Site, address: &str) -> Option<u16> {
    let address: SocketAddr = address.parse().unwrap();
    let response = site.lab.client.run(|| client::get(address, HOST, "/"));
    response.ok().map(|response| response.status)
}

/// Those of the gateway's namespace that the agent made.
fn local_routes(site: &Site) -> String {
    let routes = |family: &str| {
        let mut ip = site.lab.gateway.command("ip");
        let output = ip
            .args([family, "route", "show", "table", "local"])
            .output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    let all = routes("-4") + &routes("-6");
    let ours = all.lines().filter(|line| line.contains("proto 215"));
    ours.map(|line| format!("{line}\n")).collect()
}
