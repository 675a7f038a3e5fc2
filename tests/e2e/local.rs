//! Clients on the gateway's own host, which dial VIPs that no route of theirs leads to.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use router_common::PROBE_MARK;
use router_tests::app::{ECHO_PORT, HOST, Presence, VIP, VIP_ECHO_PORT, VIP_HTTP_PORT};
use router_tests::cgroup::Cgroup;
use router_tests::client::{self, TIMEOUT};
use router_tests::nats::Publisher;
use router_tests::process::wait_for;
use router_tests::site::{self, ECHO_VIP, Site};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use viaduct::config::{Config, LocalClients};

#[test]
fn connections_are_balanced_and_show_the_vip() {
    let host = Host::running(3, |_| ());
    let outside = host.run(|| TcpStream::connect_timeout(&ECHO_VIP, TIMEOUT));
    assert_eq!(
        outside.unwrap_err().kind(),
        ErrorKind::NetworkUnreachable,
        "outside of the cgroup a VIP is not translated"
    );

    host.cgroup.enter().unwrap();
    let tally = host.tally(90, site::echo_tcp);
    assert_eq!(tally.len(), 3, "{tally:?}");
    assert!(tally.values().all(|&count| count >= 10), "{tally:?}");
    host.run(|| {
        let mut flow = client::tcp(ECHO_VIP).unwrap();
        assert_eq!(flow.echo(b"ping").unwrap(), b"ping");
        let stream = flow.into_stream();
        assert_eq!(stream.peer_addr().unwrap(), ECHO_VIP);
        assert_eq!(host.local_flows(), 1);
        drop(stream);
        assert_eq!(host.local_flows(), 0);
    });
    assert!(host.counted("translated") >= 91);
    let stats = host.stats();
    let new_flows = stats["l4"]["vips"].as_array().unwrap().iter();
    let new_flows = new_flows.map(|vip| vip["new_flows"].as_u64().unwrap());
    assert!(new_flows.sum::<u64>() >= 91, "{stats}");
}

#[test]
fn datagrams_go_to_one_backend_a_socket_and_answers_show_the_vip() {
    let host = Host::running(3, |_| ());
    host.cgroup.enter().unwrap();
    let tally = host.tally(90, site::echo_udp);
    assert_eq!(tally.len(), 3, "{tally:?}");
    let tally = host.tally(60, || Ok(ask(&unconnected(), ECHO_VIP)));
    assert_eq!(tally.len(), 3, "{tally:?}");
    host.run(|| {
        let socket = unconnected();
        let first = ask(&socket, ECHO_VIP);
        for _ in 0..20 {
            assert_eq!(ask(&socket, ECHO_VIP), first);
        }
        // The same socket without a VIP in between.
        let other = if first == "b1" { 1 } else { 0 };
        let direct = SocketAddr::from((host.site.lab.backend_address(other), ECHO_PORT));
        assert_ne!(ask(&socket, direct), first);
        assert_eq!(ask(&socket, ECHO_VIP), first);

        socket.connect(ECHO_VIP).unwrap();
        assert_eq!(socket.peer_addr().unwrap(), ECHO_VIP);
        assert_eq!(host.local_flows(), 1);
        socket.send(b"who").unwrap();
        let (_, from) = socket.recv_from(&mut [0; 512]).unwrap();
        assert_eq!(from, ECHO_VIP);
        socket.connect(direct).unwrap();
        assert_eq!(socket.peer_addr().unwrap(), direct);
        assert_eq!(host.local_flows(), 0);
    });
}

#[test]
fn a_backend_that_drains_keeps_its_sockets_and_gets_no_others() {
    let host = Host::running(2, |_| ());
    host.cgroup.enter().unwrap();
    let (mut flow, socket) = host.run(|| {
        let flow = wait_for("a connection to b1", || {
            let flow = client::tcp(ECHO_VIP).unwrap();
            (flow.backend == "b1").then_some(flow)
        });
        let socket = wait_for("a socket that sends to b1", || {
            let socket = unconnected();
            (ask(&socket, ECHO_VIP) == "b1").then_some(socket)
        });
        (flow.unwrap(), socket.unwrap())
    });
    host.site.app(0).set_presence(Presence::Unregistered);
    for exchange in [site::echo_tcp, site::echo_udp] {
        wait_for("b1 to get nothing new", || {
            (!host.tally(30, exchange).contains_key("b1")).then_some(())
        })
        .unwrap();
    }
    assert_eq!(flow.echo(b"still there").unwrap(), b"still there");
    assert_eq!(ask(&socket, ECHO_VIP), "b1");
}

#[test]
fn a_vip_without_backends_refuses_unless_it_is_silent() {
    let [refusing, silent]: [SocketAddr; 2] =
        ["192.0.2.20:7", "192.0.2.20:8"].map(|vip| vip.parse().unwrap());
    let host = Host::running(1, |config| {
        let silent = format!("address = 'tcp/{silent}'\nreject = 'drop'");
        config.l4.vip = vec![toml::from_str(&silent).unwrap()];
    });
    // Nobody has this address, so no backend is ever ready.
    let message = json!({
        "host": "10.0.0.99", "port": 1,
        "vips": [
            format!("tcp/{refusing}"), format!("udp/{refusing}"), format!("tcp/{silent}"),
        ],
    });
    let mut publisher = Publisher::connect(&host.site.lab).unwrap();
    publisher
        .publish("router.register", message.to_string())
        .unwrap();
    wait_for("the VIPs", || (host.vips() == 6).then_some(())).unwrap();
    host.cgroup.enter().unwrap();
    host.run(|| {
        let kind = |address| TcpStream::connect(address).unwrap_err().kind();
        assert_eq!(kind(refusing), ErrorKind::ConnectionRefused);
        let sent = unconnected().send_to(b"who", refusing);
        assert_eq!(sent.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(kind(silent), ErrorKind::NetworkUnreachable);
        // What is no VIP is none of ours.
        let nobody = SocketAddr::from((VIP, 4711));
        assert_eq!(kind(nobody), ErrorKind::NetworkUnreachable);
    });
    assert_eq!(
        (host.counted("rejected"), host.counted("no_backend")),
        (2, 1)
    );
}

#[test]
fn source_lists_and_rates_know_local_clients_by_the_loopback_address() {
    let host = Host::running(1, |config| {
        let vip = |port, policy: &str| {
            let policy = format!("address = 'tcp/{VIP}:{port}'\n{policy}");
            toml::from_str(&policy).unwrap()
        };
        config.l4.vip = vec![
            vip(VIP_ECHO_PORT, "allow = ['127.0.0.0/8', '198.51.100.0/24']"),
            vip(80, "deny = ['127.0.0.1/32']"),
        ];
    });
    host.cgroup.enter().unwrap();
    host.run(|| {
        site::echo_tcp().unwrap();
        let denied = TcpStream::connect((VIP, 80)).unwrap_err();
        assert_eq!(denied.kind(), ErrorKind::PermissionDenied);
    });
    assert_eq!(host.counted("source_denied"), 1);
}

#[test]
fn schedulers_and_affinity_are_those_of_packets() {
    let web = SocketAddr::from((VIP, VIP_HTTP_PORT));
    let host = Host::running(3, |config| {
        config.l4.vip = [
            format!("address = 'tcp/{ECHO_VIP}'\nscheduler = 'round-robin'"),
            format!("address = 'udp/{ECHO_VIP}'\nscheduler = 'least-connections'"),
            format!("address = 'tcp/{web}'\naffinity = '10m'"),
        ]
        .map(|vip| toml::from_str(&vip).unwrap())
        .into();
    });
    host.cgroup.enter().unwrap();
    let tally = host.tally(30, site::echo_tcp);
    assert!(tally.values().all(|&count| count == 10), "{tally:?}");

    let get = || Ok(client::get(web, HOST, "/")?.body.trim().to_owned());
    assert_eq!(host.tally(20, get).len(), 1);

    let sockets: Vec<UdpSocket> = host.run(|| {
        let connected = || {
            let socket = unconnected();
            socket.connect(ECHO_VIP).unwrap();
            socket
        };
        (0..24).map(|_| connected()).collect()
    });
    let mut tally = site::Tally::new();
    for socket in &sockets {
        *tally.entry(client::udp_on(socket).unwrap()).or_default() += 1;
    }
    // Eight each, give or take what two random choices leave.
    assert!(
        tally.len() == 3 && tally.values().all(|&count| count >= 5),
        "{tally:?}"
    );
}

#[test]
fn ipv6_and_ipv4_in_ipv6_sockets_are_translated_alike() {
    let host = Host::running(1, |_| ());
    let backend: SocketAddr = format!("[fd00::11]:{ECHO_PORT}").parse().unwrap();
    let vip: SocketAddr = format!("[2001:db8::10]:{VIP_ECHO_PORT}").parse().unwrap();
    let listener = host.site.lab.backends[0].run(|| {
        let datagrams = UdpSocket::bind(backend).unwrap();
        thread::spawn(move || {
            let mut datagram = [0; 512];
            while let Ok((length, from)) = datagrams.recv_from(&mut datagram) {
                let answer = [b"b6 ", &datagram[..length]].concat();
                datagrams.send_to(&answer, from).unwrap();
            }
        });
        TcpListener::bind(backend).unwrap()
    });
    thread::spawn(move || {
        for stream in listener.incoming() {
            stream.unwrap().write_all(b"b6\n").unwrap();
        }
    });
    let message = json!({
        "host": "fd00::11", "port": ECHO_PORT, "vips": [format!("tcp/{vip}"), format!("udp/{vip}")],
    });
    let mut publisher = Publisher::connect(&host.site.lab).unwrap();
    publisher
        .publish("router.register", message.to_string())
        .unwrap();
    host.cgroup.enter().unwrap();
    host.run(|| {
        let mut stream = wait_for("the IPv6 VIP", || TcpStream::connect(vip).ok()).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), vip);
        let mut greeting = [0; 3];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"b6\n");
        let socket = UdpSocket::bind("[::]:0").unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let name = wait_for("the IPv6 VIP by UDP", || {
            socket.send_to(b"who", vip).ok()?;
            let mut answer = [0; 512];
            let (length, from) = socket.recv_from(&mut answer).ok()?;
            assert_eq!(from, vip);
            Some(String::from_utf8_lossy(&answer[..length]).into_owned())
        });
        assert_eq!(name.unwrap(), "b6 who");

        // The same sockets speak to IPv4 VIPs (RFC 3493 §3.7).
        let mapped = SocketAddr::from((VIP.to_ipv6_mapped(), VIP_ECHO_PORT));
        let stream = client::tcp(mapped).unwrap().into_stream();
        assert_eq!(stream.peer_addr().unwrap(), mapped);
        assert_eq!(ask(&socket, mapped), "b1");
    });
}

#[test]
fn sockets_with_our_mark_mean_the_vip_itself() {
    let host = Host::running(1, |_| ());
    host.cgroup.enter().unwrap();
    host.run(|| {
        let dial = |mark| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
            socket.set_mark(mark).unwrap();
            socket.connect(&ECHO_VIP.into()).map_err(|e| e.kind())
        };
        assert_eq!(dial(PROBE_MARK | 7), Err(ErrorKind::NetworkUnreachable));
        assert_eq!(dial(7), Ok(()));
    });
}

#[test]
fn translation_goes_on_without_the_agent_and_ends_with_detach() {
    let mut host = Host::running(2, |_| ());
    host.cgroup.enter().unwrap();
    let stream = host.run(|| client::tcp(ECHO_VIP).unwrap().into_stream());
    host.cgroup.leave().unwrap();
    for _ in 0..2 {
        host.site.gateway().kill();
        host.cgroup.enter().unwrap();
        assert_eq!(host.tally(40, site::echo_tcp).len(), 2);
        host.cgroup.leave().unwrap();
        let path = host.cgroup.path().to_owned();
        host.site.start_gateway(translate_in(path)).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), ECHO_VIP);
        assert_eq!(host.local_flows(), 1);
        assert_eq!(host.pins().len(), 9, "{:?}", host.pins());
    }
    drop(stream);
    assert_eq!(host.local_flows(), 0);

    host.site.gateway().kill();
    let mut detach = host.site.viaduct().unwrap();
    detach
        .args(["detach", "--config"])
        .arg(host.site.config_path());
    assert!(detach.status().unwrap().success());
    host.cgroup.enter().unwrap();
    let dialed = || host.run(|| TcpStream::connect_timeout(&ECHO_VIP, TIMEOUT).err());
    // The kernel takes programs off a cgroup a moment after the last reference is gone.
    wait_for("the programs to be gone", || {
        (dialed()?.kind() == ErrorKind::NetworkUnreachable).then_some(())
    })
    .unwrap();
}

/// A gateway's host, with a cgroup for its local clients. This process is moved into it and out:
/// each test runs in a process of its own.
struct Host {
    /// Dropped first: the programs must be able to count its sockets' ends.
    cgroup: Cgroup,
    site: Site,
}

impl Host {
    fn running(backends: usize, change: impl FnOnce(&mut Config)) -> Host {
        let cgroup = Cgroup::create().unwrap();
        let local = translate_in(cgroup.path().to_owned());
        let site = Site::running_with(backends, |config| {
            local(config);
            change(config);
        });
        Host {
            site: site.unwrap(),
            cgroup,
        }
    }

    /// Runs `f` where the gateway is.
    fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.site.lab.gateway.run(f)
    }

    fn tally(
        &self,
        count: usize,
        exchange: impl Fn() -> anyhow::Result<String> + Send + Sync,
    ) -> site::Tally {
        self.run(|| {
            let mut tally = site::Tally::new();
            for _ in 0..count {
                *tally.entry(exchange().unwrap()).or_default() += 1;
            }
            tally
        })
    }

    fn stats(&self) -> Value {
        serde_json::from_str(&self.site.admin("/v1/stats").unwrap().body).unwrap()
    }

    fn vips(&self) -> usize {
        self.stats()["l4"]["vips"].as_array().unwrap().len()
    }

    /// Connected sockets of this host, by all backends.
    fn local_flows(&self) -> u64 {
        let stats = self.stats();
        let vips = stats["l4"]["vips"].as_array().unwrap().iter();
        let backends = vips.flat_map(|vip| vip["backends"].as_array().unwrap());
        backends
            .map(|backend| backend["local_flows"].as_u64().unwrap())
            .sum()
    }

    fn counted(&self, verdict: &str) -> u64 {
        let stats = self.stats();
        let mut verdicts = stats["l4"]["verdicts"].as_array().unwrap().iter();
        let found = verdicts.find(|pair| pair[0] == verdict).unwrap();
        found[1].as_u64().unwrap()
    }

    /// Pinned links that are of no interface.
    fn pins(&self) -> Vec<String> {
        let links = self.site.lab.bpffs().join("viaduct/links");
        let links = std::fs::read_dir(links).unwrap();
        let names = links.map(|link| link.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("local_")).collect()
    }
}

fn translate_in(cgroup: std::path::PathBuf) -> impl FnOnce(&mut Config) {
    |config| config.l4.local_clients = LocalClients::Cgroup(cgroup)
}

fn unconnected() -> UdpSocket {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket
}

/// Sends one datagram and returns the name of who answered, which must be who was asked.
fn ask(socket: &UdpSocket, address: SocketAddr) -> String {
    socket.send_to(b"who", address).unwrap();
    let mut answer = [0; 512];
    let (length, from) = socket.recv_from(&mut answer).unwrap();
    assert_eq!(from, address);
    let answer = String::from_utf8_lossy(&answer[..length]);
    answer.strip_suffix(" who").unwrap().to_owned()
}
