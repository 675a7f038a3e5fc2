//! Layer 4: packets for VIPs.

use std::io::{Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::thread;

use router_tests::app::{ECHO_PORT, Presence, VIP};
use router_tests::client::{self, TcpClient};
use router_tests::process::wait_for;
use router_tests::site::{self, ECHO_VIP, Site};

#[test]
fn a_large_transfer_arrives_unchanged() {
    // Made before anyone waits for them.
    let bytes = noise(24 << 20);
    let site = Site::running(2).unwrap();
    site.lab.client.run(|| {
        let mut reader = client::tcp(ECHO_VIP).unwrap().into_stream();
        let mut writer = reader.try_clone().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| writer.write_all(&bytes).unwrap());
            let mut answer = vec![0; bytes.len()];
            reader.read_exact(&mut answer).unwrap();
            // Not assert_eq, which would print both.
            assert!(answer == bytes, "the bytes that came back differ");
        });
    });
}

/// Bytes that no shift, repetition or loss leaves the same (xorshift64, Marsaglia 2003).
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..length / 8).flat_map(|_| next().to_le_bytes()).collect()
}

#[test]
fn a_udp_flow_stays_with_its_backend() {
    let site = Site::running(3).unwrap();
    site.lab.client.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(ECHO_VIP).unwrap();
        socket.set_read_timeout(Some(client::TIMEOUT)).unwrap();
        let first = client::udp_on(&socket).unwrap();
        for _ in 0..50 {
            assert_eq!(client::udp_on(&socket).unwrap(), first);
        }
    });
}

#[test]
fn a_flow_lives_on_while_its_backend_drains_and_new_ones_go_elsewhere() {
    let site = Site::running(3).unwrap();
    let mut flow = flow_to(&site, "b1");
    site.app(0).set_presence(Presence::Unregistered);
    site.wait_until_spared("b1", site::echo_tcp).unwrap();
    site.wait_until_spared("b1", site::echo_udp).unwrap();
    for _ in 0..20 {
        assert_eq!(flow.echo(b"still there").unwrap(), b"still there");
    }
}

#[test]
fn flows_stay_where_they_are_when_a_backend_joins_or_leaves() {
    let mut site = Site::new(3).unwrap();
    site.start_nats().unwrap();
    site.start_gateway(|_| ()).unwrap();
    for index in [0, 1] {
        site.start_app(index)
            .unwrap()
            .set_presence(Presence::Registered);
    }
    site.wait_until_served(2).unwrap();
    let mut flows: Vec<TcpClient> = site
        .lab
        .client
        .run(|| (0..40).map(|_| client::tcp(ECHO_VIP).unwrap()).collect());

    site.start_app(2)
        .unwrap()
        .set_presence(Presence::Registered);
    site.wait_until_served(3).unwrap();
    site.app(1).set_presence(Presence::Unregistered);
    site.wait_until_spared("b2", site::echo_tcp).unwrap();
    for flow in &mut flows {
        // A flow that moved would meet a backend that knows nothing of it, and be reset.
        assert_eq!(flow.echo(b"where I was").unwrap(), b"where I was");
    }
}

#[test]
fn a_backend_reaches_the_vip_by_its_own_segment() {
    let site = Site::running(3).unwrap();
    site.lab.backends[0].run(|| {
        for _ in 0..50 {
            site::echo_tcp().unwrap();
            site::echo_udp().unwrap();
        }
    });
}

#[test]
fn traffic_for_no_vip_passes() {
    let site = Site::running(2).unwrap();
    for index in 0..2 {
        let direct = SocketAddr::from((site.lab.backend_address(index), ECHO_PORT));
        site.lab.client.run(|| {
            assert_eq!(client::udp(direct).unwrap(), format!("b{}", index + 1));
            assert_eq!(
                client::tcp(direct).unwrap().backend,
                format!("b{}", index + 1)
            );
        });
    }
}

#[test]
fn a_port_of_the_vip_that_nobody_claimed_is_not_served() {
    let site = Site::running(1).unwrap();
    let nobody = SocketAddr::from((VIP, 4711));
    site.lab.client.run(|| {
        assert!(client::tcp(nobody).is_err());
        assert!(site::echo_tcp().is_ok());
    });
}

/// Opens flows until one is with the backend of that name.
fn flow_to(site: &Site, name: &str) -> TcpClient {
    wait_for(&format!("a flow to {name}"), || {
        let flow = site.lab.client.run(|| client::tcp(ECHO_VIP)).unwrap();
        (flow.backend == name).then_some(flow)
    })
    .unwrap()
}

#[test]
fn a_backend_is_reached_again_after_its_neighbour_entry_was_flushed() {
    let site = Site::running(1).unwrap();
    for round in 0..3 {
        site.lab.gateway.ip(&["neigh flush dev back"]).unwrap();
        wait_for(&format!("a new connection after flush {round}"), || {
            site.lab.client.run(|| client::tcp(ECHO_VIP)).ok()
        })
        .unwrap();
    }
}
