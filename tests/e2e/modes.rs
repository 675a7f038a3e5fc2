//! Every forwarding mode but l7, at both hooks, over both families: megabytes of TCP and datagrams, there
//! and back unchanged.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use aya::Ebpf;
use aya::programs::{SchedClassifier, TcAttachType, tc};
use router_tests::client::TIMEOUT;
use router_tests::nats::Publisher;
use router_tests::netns::Netns;
use router_tests::process::wait_for;
use router_tests::site::Site;
use serde_json::json;
use viaduct::config::{Attach, Forwarding};
use viaduct::l4::DECAP_PROGRAM;

pub(crate) const VIPS: [&str; 2] = ["192.0.2.10", "2001:db8::10"];
const MEGABYTES: usize = 4 << 20;

#[test]
fn nat_carries_transfers_unchanged() {
    carries_transfers(Forwarding::Nat);
}

#[test]
fn dnat_carries_transfers_unchanged_and_shows_the_client() {
    carries_transfers(Forwarding::Dnat);
}

#[test]
fn dsr_carries_transfers_unchanged_and_shows_the_client() {
    carries_transfers(Forwarding::Dsr);
}

#[test]
fn ipip_carries_transfers_unchanged_and_shows_the_client() {
    carries_transfers(Forwarding::Ipip);
}

#[test]
fn gue_carries_transfers_unchanged_and_shows_the_client() {
    carries_transfers(Forwarding::Gue);
}

#[test]
fn a_datagram_of_9000_octets_goes_in_one_frame() {
    let mut site = Site::new(1).unwrap();
    site.lab.set_mtu(9000).unwrap();
    site.start_nats().unwrap();
    site.start_gateway(|_| ()).unwrap();
    let vip: IpAddr = VIPS[0].parse().unwrap();
    let to = SocketAddr::new(vip, serve(&site, Forwarding::Nat, vip).port());
    // Cut into fragments it would count as several.
    let before = (verdicts(&site, "new_flow"), verdicts(&site, "forwarded"));
    site.lab.client.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        // With the headers of IP and UDP, 9000.
        socket.send(&[7; 8972]).unwrap();
        socket.recv(&mut [0; 64]).unwrap();
    });
    let after = (verdicts(&site, "new_flow"), verdicts(&site, "forwarded"));
    assert_eq!(after, (before.0 + 1, before.1));
}

fn verdicts(site: &Site, name: &str) -> u64 {
    let stats = site.admin("/v1/stats").unwrap().body;
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    let mut verdicts = stats["l4"]["verdicts"].as_array().unwrap().iter();
    let found = verdicts.find(|verdict| verdict[0] == name);
    found.unwrap()[1].as_u64().unwrap()
}

fn carries_transfers(forwarding: Forwarding) {
    let sent = bytes();
    for attach in [Attach::Native, Attach::Tcx] {
        let mut site = Site::new(1).unwrap();
        site.start_nats().unwrap();
        site.start_gateway(|config| {
            config.l4.forwarding = forwarding;
            config.l4.attach = attach;
        })
        .unwrap();
        let _decapsulates = matches!(forwarding, Forwarding::Ipip | Forwarding::Gue)
            .then(|| decapsulate(&site.lab.backends[0]));
        for vip in VIPS {
            let vip: IpAddr = vip.parse().unwrap();
            let row = format!("{forwarding:?} by {attach:?} to {vip}");
            let at = serve(&site, forwarding, vip);
            transfer(&site, SocketAddr::new(vip, at.port()), &sent, &row);
            let source = datagram(&site, SocketAddr::new(vip, at.port()), &row);
            let client = [IpAddr::from([198, 51, 100, 7]), client_v6()];
            let shown = client.contains(&source);
            assert_eq!(shown, forwarding != Forwarding::Nat, "{row}: {source}");
        }
    }
}

/// Starts an echo on the backend, where packets of the mode arrive, and registers it. Where it listens.
pub(crate) fn serve(site: &Site, forwarding: Forwarding, vip: IpAddr) -> SocketAddr {
    let backend = &site.lab.backends[0];
    let own = match vip {
        IpAddr::V4(_) => IpAddr::V4(site.lab.backend_address(0)),
        IpAddr::V6(_) => "fd00::11".parse().unwrap(),
    };
    let address = if !matches!(forwarding, Forwarding::Nat | Forwarding::Dnat) {
        // Else an IPv6 address is not to be had at once.
        let nodad = if vip.is_ipv6() { "nodad" } else { "" };
        let add = format!("address add {vip} dev lo {nodad}");
        backend.ip(&[&add]).unwrap();
        vip
    } else {
        own
    };
    let tcp = backend
        .run(|| TcpListener::bind((address, 0)))
        .unwrap_or_else(|error| panic!("bind the echo to {address}: {error}"));
    let at = tcp.local_addr().unwrap();
    let udp = backend.run(|| UdpSocket::bind(at)).expect("bind the echo");
    thread::spawn(move || echo(&tcp));
    thread::spawn(move || tell_sources(&udp));
    let mut publisher = Publisher::connect(&site.lab).unwrap();
    let to = SocketAddr::new(vip, at.port());
    let message = json!({
        "host": own.to_string(),
        "port": at.port(),
        "vips": [format!("tcp/{to}"), format!("udp/{to}")],
    });
    publisher
        .publish("router.register", message.to_string())
        .unwrap();
    wait_for("the VIP to be served", || {
        let connect = || TcpStream::connect_timeout(&to, TIMEOUT);
        site.lab.client.run(connect).ok()
    })
    .unwrap();
    at
}

/// Takes outer headers off whatever comes to the backend, until it is dropped.
pub(crate) fn decapsulate(backend: &Netns) -> Ebpf {
    backend.run(|| {
        let mut object = Ebpf::load(DECAP_PROGRAM).unwrap();
        // Needed where the kernel has no tcx; it may be there already.
        let _ = tc::qdisc_add_clsact("eth0");
        let program: &mut SchedClassifier =
            object.program_mut("decap").unwrap().try_into().unwrap();
        program.load().unwrap();
        program.attach("eth0", TcAttachType::Ingress).unwrap();
        object
    })
}

fn echo(listener: &TcpListener) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { return };
        thread::spawn(move || io::copy(&mut &stream, &mut &stream));
    }
}

/// Answers each datagram by the address it came from.
fn tell_sources(socket: &UdpSocket) {
    let mut datagram = [0; 64];
    while let Ok((_, source)) = socket.recv_from(&mut datagram) {
        let _ = socket.send_to(source.ip().to_string().as_bytes(), source);
    }
}

fn transfer(site: &Site, to: SocketAddr, sent: &[u8], row: &str) {
    site.lab.client.run(|| {
        let mut reader = TcpStream::connect(to).expect(row);
        reader.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut writer = reader.try_clone().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| writer.write_all(sent).expect(row));
            let mut received = vec![0; sent.len()];
            reader.read_exact(&mut received).expect(row);
            // Not assert_eq, which would print both.
            assert!(received == sent, "{row}: the bytes that came back differ");
        });
    });
}

/// Whom the backend saw a datagram come from.
fn datagram(site: &Site, to: SocketAddr, row: &str) -> IpAddr {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => [0; 4].into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    site.lab.client.run(|| {
        let socket = UdpSocket::bind((any, 0)).unwrap();
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.send(b"who am I").unwrap();
        let mut answer = [0; 64];
        let len = socket.recv(&mut answer).expect(row);
        std::str::from_utf8(&answer[..len])
            .unwrap()
            .parse()
            .unwrap()
    })
}

pub(crate) fn client_v6() -> IpAddr {
    "2001:db8:1::7".parse().unwrap()
}

/// Bytes that no shift, repetition or loss leaves the same (xorshift64, Marsaglia 2003).
fn bytes() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..MEGABYTES / 8)
        .flat_map(|_| next().to_le_bytes())
        .collect()
}
