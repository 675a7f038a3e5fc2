//! Declared state: written by one command, served by both layers, taken back by another.

use std::process::Output;

use router_tests::app::HTTP_PORT;
use router_tests::process::wait_for;
use router_tests::site::{self, ECHO_VIP, Site};

#[test]
fn routes_and_policies_are_served_as_they_are_applied_and_go_as_they_are_deleted() {
    let site = Site::running(2).unwrap();
    let backend = format!("{}:{HTTP_PORT}", site.lab.backend_address(0));
    let vip = format!("tcp/{ECHO_VIP}");
    let file = site.lab.folder().join("declared.toml");
    let declare = |scheduler: &str| {
        let text = format!(
            "[[route]]\nname = \"by-hand\"\nuris = [\"declared.example.com\"]\n\
             backend = [{{ address = \"{backend}\" }}]\n\
             [[vip]]\naddress = \"{vip}\"\nscheduler = \"{scheduler}\"\n"
        );
        std::fs::write(&file, text).unwrap();
        run(&site, &["apply", file.to_str().unwrap()])
    };
    assert!(good(&declare("round-robin")).contains("created"));
    serves(&site, 200);
    scheduled(&site, &vip, "round-robin");
    assert_eq!(site.tally(20, site::echo_tcp).unwrap().len(), 2);
    let routes = good(&run(&site, &["routes"]));
    assert!(routes.contains("route.by-hand@"), "{routes}");

    let wrong = declare("fair");
    assert_eq!(wrong.status.code(), Some(2));
    let said = String::from_utf8(wrong.stderr).unwrap();
    assert!(said.contains("scheduler: unknown variant `fair`"), "{said}");
    assert!(good(&declare("source-hash")).contains("unchanged"));
    scheduled(&site, &vip, "source-hash");

    good(&run(&site, &["delete", "by-hand"]));
    good(&run(&site, &["delete", &vip]));
    serves(&site, 404);
    scheduled(&site, &vip, "maglev");
    assert_eq!(site.tally(60, site::echo_tcp).unwrap().len(), 2);
}

#[test]
fn a_restart_while_nats_is_away_keeps_declared_policies() {
    let mut site = Site::running(1).unwrap();
    let vip = format!("tcp/{ECHO_VIP}");
    let file = site.lab.folder().join("declared.toml");
    let policy = format!("[[vip]]\naddress = \"{vip}\"\nscheduler = \"source-hash\"\n");
    std::fs::write(&file, policy).unwrap();
    good(&run(&site, &["apply", file.to_str().unwrap()]));
    scheduled(&site, &vip, "source-hash");

    site.gateway().signal(nix::sys::signal::Signal::SIGTERM);
    assert!(site.gateway().wait().unwrap().success());
    site.nats = None;
    site.start_gateway(|_| ()).unwrap();
    assert_eq!(scheduler(&site, &vip).as_deref(), Some("source-hash"));
    assert_eq!(site.tally(3, site::echo_tcp).unwrap().len(), 1);

    site.start_nats().unwrap();
    wait_for("the policy to be deleted", || {
        run(&site, &["delete", &vip]).status.success().then_some(())
    })
    .unwrap();
    scheduled(&site, &vip, "maglev");
}

fn serves(site: &Site, status: u16) {
    let what = format!("{status} of the declared route");
    wait_for(&what, || {
        (site.get("declared.example.com", "/").ok()?.status == status).then_some(())
    })
    .unwrap();
}

fn scheduled(site: &Site, vip: &str, scheduler: &str) {
    wait_for(scheduler, || {
        (self::scheduler(site, vip)? == scheduler).then_some(())
    })
    .unwrap();
}

fn scheduler(site: &Site, vip: &str) -> Option<String> {
    let body = site.admin("/v1/vips").ok()?.body;
    let vips: serde_json::Value = serde_json::from_str(&body).ok()?;
    let mut rows = vips["rows"].as_array()?.iter();
    let row = rows.find(|row| row["vip"] == vip)?;
    Some(row["scheduler"].as_str()?.to_owned())
}

fn run(site: &Site, arguments: &[&str]) -> Output {
    let mut command = site.viaduct().unwrap();
    command
        .args(arguments)
        .arg("--config")
        .arg(site.config_path());
    command.output().unwrap()
}

fn good(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout.clone()).unwrap()
}
