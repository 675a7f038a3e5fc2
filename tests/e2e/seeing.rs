//! What an operator sees of layer 4: flows, stats, live packets, and what would become of one.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::{Output, Stdio};

use router_tests::app::{ECHO_PORT, HTTP_PORT};
use router_tests::client;
use router_tests::lab::CLIENT;
use router_tests::process::wait_for;
use router_tests::site::{self, ECHO_VIP, Site};
use serde_json::Value;
use viaduct::config::Forwarding;

use crate::modes::{self, client_v6, decapsulate};

#[test]
fn a_flow_is_listed_with_its_backend_and_found_by_each_filter() {
    let site = Site::running(2).unwrap();
    let mut flow = site.lab.client.run(|| client::tcp(ECHO_VIP)).unwrap();
    assert_eq!(flow.echo(b"hello").unwrap(), b"hello");
    let client = flow.local_address().unwrap().to_string();
    let rows = json_lines(&good(&run(
        &site,
        &["flows", "--client", &client, "--json"],
    )));
    let [row] = &rows[..] else {
        panic!("one flow of {client}: {rows:?}");
    };
    let vip = format!("tcp/{ECHO_VIP}");
    let backend = backend_of(&site, &flow.backend);
    assert_eq!(row["vip"], vip);
    assert!(row["backend"].as_str().unwrap().starts_with(&backend));
    assert_eq!(
        (&row["mode"], &row["state"]),
        (&"nat".into(), &"established".into())
    );
    assert_eq!(row["answered"], true);
    for (filter, expected) in [
        (["--vip", &vip], 1),
        (["--backend", &backend], 1),
        (["--vip", "tcp/192.0.2.99:1"], 0),
        (["--backend", "10.0.0.99"], 0),
    ] {
        let arguments = [&["flows", "--client", &client, "--json"], &filter[..]].concat();
        let found = json_lines(&good(&run(&site, &arguments))).len();
        assert_eq!(found, expected, "{filter:?}");
    }
    let limited = good(&run(&site, &["flows", "--limit", "1", "--json"]));
    assert_eq!(json_lines(&limited).len(), 1);
}

#[test]
fn the_backend_that_is_explained_is_the_one_that_gets_the_flow() {
    let site = Site::running(3).unwrap();
    let vip = format!("tcp/{ECHO_VIP}");
    for port in 41_000..41_010_u16 {
        let from = format!("{CLIENT}:{port}");
        let explain = |more: &[&str]| {
            let arguments = [&["explain", &vip, "--from", &from, "--json"], more].concat();
            serde_json::from_str::<Value>(&good(&run(&site, &arguments))).unwrap()
        };
        let before = explain(&[]);
        assert_eq!(before["flow_table"], "not_found", "{before}");
        assert_eq!(before["verdict"], "new_flow", "{before}");
        assert_eq!(explain(&["--ack"])["verdict"], "unknown_flow");

        let flow = site.lab.client.run(|| client::tcp_from(port, ECHO_VIP));
        let flow = flow.unwrap();
        let backend = backend_of(&site, &flow.backend);
        let after = explain(&["--ack"]);
        for told in [&before, &after] {
            let address = told["backend"]["address"].as_str().unwrap();
            assert!(address.starts_with(&backend), "{told}");
        }
        assert_eq!(after["flow_state"], "established", "{after}");
        assert_eq!(after["leaves"]["destination"], after["backend"]["address"]);
    }
    let told = good(&run(&site, &["explain", &vip, "--from", "198.51.100.7:1"]));
    assert!(
        told.contains("ring slot") && told.contains("verdict new_flow"),
        "{told}"
    );
}

#[test]
fn an_address_nobody_has_is_explained_and_a_bad_question_refused() {
    let site = Site::running(1).unwrap();
    let from = ["--from", "198.51.100.7:40000"];
    let told = good(&run(
        &site,
        &[&["explain", "tcp/192.0.2.99:1"], &from[..]].concat(),
    ));
    assert!(told.contains("verdict not_for_us, action pass"), "{told}");
    let refused = run(&site, &["explain", &format!("tcp/{ECHO_VIP}")]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("from"));
    let told = good(&run(&site, &["explain", "http://nobody.example.com/"]));
    assert!(told.contains("no route"), "{told}");
    let url = format!("http://{}/", router_tests::app::HOST);
    let told = good(&run(&site, &["explain", &url]));
    assert!(
        told.contains(&format!(":{HTTP_PORT}: weight 100, 100.0 %")),
        "{told}"
    );
}

#[test]
fn who_watches_sees_packets_and_sampling_ends_with_them() {
    let site = Site::running(2).unwrap();
    let vip = format!("tcp/{ECHO_VIP}");
    let packets = watch(&site, &vip, 40, || {
        site.lab.client.run(site::echo_tcp).unwrap();
    });
    let of = |verdict: &str| packets.iter().find(|packet| packet["verdict"] == verdict);
    for (verdict, dialed) in [
        ("new_flow", Value::from(ECHO_VIP.to_string())),
        ("forwarded", Value::from(ECHO_VIP.to_string())),
        ("replied", Value::Null),
    ] {
        let packet = of(verdict).unwrap_or_else(|| panic!("{verdict}: {packets:?}"));
        assert_eq!(
            (&packet["vip"], &packet["dialed"]),
            (&vip.clone().into(), &dialed)
        );
        let client = packet["client"].as_str().unwrap();
        assert!(client.starts_with(&CLIENT.to_string()), "{packet}");
        assert!(packet["backend"].as_str().unwrap().starts_with("10.0.0."));
    }
    wait_for("no sampling", || (sample(&site) == 0).then_some(())).unwrap();
}

#[test]
fn packets_of_ipip_and_of_both_families_are_explained_and_watched() {
    for (forwarding, mode) in [(Forwarding::Nat, "nat"), (Forwarding::Ipip, "ipip")] {
        let mut site = Site::new(1).unwrap();
        site.start_nats().unwrap();
        site.start_gateway(|config| config.l4.forwarding = forwarding)
            .unwrap();
        let _decapsulates = (mode == "ipip").then(|| decapsulate(&site.lab.backends[0]));
        for vip in modes::VIPS {
            let vip: IpAddr = vip.parse().unwrap();
            let port = modes::serve(&site, forwarding, vip).port();
            let (client, own) = match vip {
                IpAddr::V4(_) => (IpAddr::from(CLIENT), site.lab.backend_address(0).into()),
                IpAddr::V6(_) => (client_v6(), "fd00::11".parse().unwrap()),
            };
            let to = SocketAddr::new(vip, port);
            let backend = SocketAddr::new(own, port);
            explains(&site, mode, to, SocketAddr::new(client, 41_000), backend);
            watches(&site, mode, to, client, backend);
        }
    }
}

fn explains(site: &Site, mode: &str, to: SocketAddr, from: SocketAddr, backend: SocketAddr) {
    let (vip, from) = (format!("tcp/{to}"), from.to_string());
    let told = run(site, &["explain", &vip, "--from", &from, "--json"]);
    let told: Value = serde_json::from_str(&good(&told)).unwrap();
    assert_eq!(told["verdict"], "new_flow", "{told}");
    assert_eq!(told["vip"]["mode"], mode, "{told}");
    assert_eq!(told["backend"]["address"], backend.to_string(), "{told}");
    let leaves = &told["leaves"];
    if mode == "ipip" {
        // Inside is what the client sent, whatever family the VIP is of.
        assert_eq!(leaves["source"], from, "{told}");
        assert_eq!(leaves["destination"], to.to_string(), "{told}");
        let outer = &leaves["outer"]["destination"];
        assert_eq!(outer, &backend.ip().to_string(), "{told}");
    } else {
        assert_eq!(leaves["destination"], backend.to_string(), "{told}");
    }
}

fn watches(site: &Site, mode: &str, to: SocketAddr, client: IpAddr, backend: SocketAddr) {
    let vip = format!("tcp/{to}");
    let packets = watch(site, &vip, 20, || {
        site.lab.client.run(|| TcpStream::connect(to)).unwrap();
    });
    let of = |verdict: &str| packets.iter().find(|packet| packet["verdict"] == verdict);
    for verdict in ["new_flow", "forwarded"] {
        let packet = of(verdict).unwrap_or_else(|| panic!("{verdict}: {packets:?}"));
        assert_eq!(packet["vip"], vip, "{packet}");
        assert_eq!(packet["dialed"], to.to_string(), "{packet}");
        assert_eq!(packet["backend"], backend.to_string(), "{packet}");
        let seen: SocketAddr = packet["client"].as_str().unwrap().parse().unwrap();
        assert_eq!(seen.ip(), client, "{packet}");
    }
    // Answers of a backend that knows the client do not come by.
    assert_eq!(of("replied").is_some(), mode == "nat", "{packets:?}");
}

#[test]
fn rates_and_fill_are_what_traffic_makes_them() {
    let site = Site::running(2).unwrap();
    let vip = format!("tcp/{ECHO_VIP}");
    let mut command = site.viaduct().unwrap();
    command.args(["stats", "--rate", "--json"]);
    command.arg("--config").arg(site.config_path());
    let stats = command.stdout(Stdio::piped()).spawn().unwrap();
    let output = std::thread::scope(|scope| {
        let stats = scope.spawn(move || stats.wait_with_output().unwrap());
        while !stats.is_finished() {
            site.lab.client.run(site::echo_tcp).unwrap();
        }
        stats.join().unwrap()
    });
    let rates = json_lines(&good(&output));
    let of_vip = rates.iter().filter(|row| row["vip"] == vip);
    let (total, backends): (Vec<&Value>, Vec<&Value>) =
        of_vip.partition(|row| row["backend"].is_null());
    let count = |row: &Value, name: &str| row[name].as_u64().unwrap();
    assert_eq!((total.len(), backends.len()), (1, 2));
    for name in ["packets", "bytes", "reply_packets", "new_flows"] {
        assert!(count(total[0], name) > 0, "{name}: {rates:?}");
    }
    assert!(count(total[0], "packets") > count(total[0], "new_flows"));

    let stats: Value = serde_json::from_str(&site.admin("/v1/stats").unwrap().body).unwrap();
    assert_eq!(stats["l4"]["flow_capacity"], 65_536);
    let maps = stats["l4"]["map_bytes"].as_array().unwrap();
    let flows = maps.iter().find(|map| map[0] == "FLOWS").unwrap();
    assert!(flows[1].as_u64().unwrap() >= 65_536 * 64);
    let table = good(&run(&site, &["stats"]));
    assert!(
        table.contains("NEW FLOWS") && table.contains(&vip),
        "{table}"
    );
}

#[test]
fn a_backend_drained_by_hand_gets_nothing_new_until_that_is_undone() {
    let site = Site::running(2).unwrap();
    let echo = |index: usize| {
        let rows = json_lines(&good(&run(&site, &["vips", "--json"])));
        let vip = rows
            .iter()
            .find(|row| row["vip"] == format!("tcp/{ECHO_VIP}"));
        let members = vip.unwrap()["backends"].as_array().unwrap().clone();
        let of = format!("{}:", site.lab.backend_address(index));
        let addresses = members
            .iter()
            .map(|member| member["address"].as_str().unwrap());
        let mut addresses = addresses.filter(|address| address.starts_with(&of));
        addresses.next().unwrap().to_owned()
    };
    let http = format!("{}:{HTTP_PORT}", site.lab.backend_address(0));
    let echo = echo(0);
    for backend in [&http, &echo] {
        good(&run(&site, &["drain", backend]));
    }
    site.wait_until_spared("b1", site::echo_tcp).unwrap();
    site.wait_until_spared("b1", site::hello).unwrap();
    let backends = good(&run(&site, &["backends"]));
    let line = backends.lines().find(|line| line.starts_with(&http));
    assert!(line.unwrap().contains(" drained "), "{backends}");
    assert!(good(&run(&site, &["drain"])).contains(&echo));

    for backend in [&http, &echo] {
        good(&run(&site, &["drain", backend, "--undo"]));
    }
    wait_for("nothing to be drained", || {
        good(&run(&site, &["drain"])).is_empty().then_some(())
    })
    .unwrap();
    gets(&site, site::echo_tcp);
    gets(&site, site::hello);
}

#[test]
fn a_backend_drained_for_one_vip_goes_on_with_the_others() {
    let site = Site::running(2).unwrap();
    let vip = format!("tcp/{ECHO_VIP}");
    // It serves TCP and UDP, which are two VIPs.
    let backend = format!("{}:{ECHO_PORT}", site.lab.backend_address(0));
    let told = good(&run(&site, &["drain", &backend, "--vip", &vip]));
    assert!(told.contains(&format!("--vip {vip} --undo")), "{told}");
    site.wait_until_spared("b1", site::echo_tcp).unwrap();
    gets(&site, site::echo_udp);
    let listed = good(&run(&site, &["drain"]));
    assert_eq!(listed, format!("{backend} {vip}\n"));

    good(&run(&site, &["drain", &backend, "--vip", &vip, "--undo"]));
    gets(&site, site::echo_tcp);
    assert_eq!(good(&run(&site, &["drain"])), "");
}

/// Waits until the first backend has something new.
fn gets(site: &Site, exchange: site::Exchange) {
    wait_for("b1 to get something new", || {
        (site.lab.client.run(exchange).ok()? == "b1").then_some(())
    })
    .unwrap();
}

#[test]
fn a_backend_that_leaves_syns_unanswered_is_held_to_be_down() {
    let site = Site::running(2).unwrap();
    let silent = site.lab.backend_address(0).to_string();
    // It still resolves, and gets every SYN, but has no way back.
    let blackhole = format!("route add blackhole {}/32", router_tests::lab::BACK);
    site.lab.backends[0].ip(&[&blackhole]).unwrap();
    wait_for("the silent backend to be down", || {
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| site.lab.client.run(site::echo_tcp));
            }
        });
        let backends = good(&run(&site, &["backends"]));
        let mut lines = backends.lines();
        let is_down = |line: &str| line.starts_with(&silent) && line.contains(" down ");
        lines.any(is_down).then_some(())
    })
    .unwrap();
}

#[test]
fn completions_name_every_command() {
    let output = std::process::Command::new(site::agent().unwrap())
        .args(["completions", "bash"])
        .output()
        .unwrap();
    let script = good(&output);
    for command in ["flows", "explain", "watch", "drain", "completions"] {
        assert!(script.contains(command), "{command}");
    }
}

/// What `viaduct watch` shows of so many packets of a VIP, while `exchange` makes some again and again.
fn watch(site: &Site, vip: &str, count: usize, exchange: impl Fn()) -> Vec<Value> {
    let mut command = site.viaduct().unwrap();
    command.args(["watch", "--json", "--vip", vip, "--count"]);
    command.arg(count.to_string());
    command.arg("--config").arg(site.config_path());
    let watch = command.stdout(Stdio::piped()).spawn().unwrap();
    wait_for("sampling", || (sample(site) == 1).then_some(())).unwrap();
    let output = std::thread::scope(|scope| {
        let watch = scope.spawn(move || watch.wait_with_output().unwrap());
        wait_for("enough packets", || {
            exchange();
            watch.is_finished().then_some(())
        })
        .unwrap();
        watch.join().unwrap()
    });
    let packets = json_lines(&good(&output));
    assert_eq!(packets.len(), count);
    packets
}

/// One packet in how many is reported.
fn sample(site: &Site) -> u64 {
    let stats = site.admin("/v1/stats").unwrap().body;
    let stats: Value = serde_json::from_str(&stats).unwrap();
    stats["l4"]["sample"].as_u64().unwrap()
}

/// The address of the instance with this name.
fn backend_of(site: &Site, name: &str) -> String {
    let number: usize = name.strip_prefix('b').unwrap().parse().unwrap();
    site.lab.backend_address(number - 1).to_string()
}

fn json_lines(text: &str) -> Vec<Value> {
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
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
