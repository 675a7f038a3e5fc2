//! QUIC connections by the server that their connection ID names.

use std::net::SocketAddr;

use router_common::Verdict;
use viaduct::config::{Forwarding, QuicConfig};
use viaduct::route::{Backend, Instance, Origin};

use crate::fixture::*;
use crate::packets::*;

/// Octets of a server ID, and the three bits that say so.
const CONFIG: QuicConfig = QuicConfig {
    server_id_octets: 4,
    config: 2,
};

/// A connection ID of 12 octets (draft-ietf-quic-load-balancers-21, §3): configuration, server, nonce.
fn connection_id(config: u8, server: u8) -> Vec<u8> {
    let mut id = vec![config << 5 | 11, 0xa0, 0xb0, 0xc0, server];
    id.extend([0x77; 7]);
    id
}

/// RFC 8999 §5.1: first octet, version, length and destination connection ID, and so on.
fn long_header(id: &[u8]) -> Vec<u8> {
    let mut datagram = vec![0xc3, 0, 0, 0, 1, id.len() as u8];
    datagram.extend(id);
    datagram.extend([0x55; 40]);
    datagram
}

/// RFC 8999 §5.2: first octet, connection ID, and so on.
fn short_header(id: &[u8]) -> Vec<u8> {
    [&[0x41][..], id, &[0x55; 40]].concat()
}

#[test]
fn a_connection_id_leads_to_its_server_from_any_address() {
    let mut gateway = Gateway::new();
    for (host, mode) in (10..).zip([Forwarding::Dsr, Forwarding::Ipip, Forwarding::Gue]) {
        for family in FAMILIES {
            let address = family.vip(host, 443);
            let vip = vip("udp", address);
            gateway.configure(vip, |config| {
                config.forwarding = Some(mode);
                config.quic = Some(CONFIG);
            });
            let backend = |server: u8| {
                let mut backend = Backend::new(family.backend(server, 443), Origin::Nats);
                let id = format!("a0b0c0{server:02x}");
                let instance = Instance {
                    tags: [("quic_server_id".into(), id.into())].into(),
                    ..Instance::default()
                };
                backend.instance = instance.shared();
                backend
            };
            gateway.set_backends(vip, (1..5).map(backend).collect());
            for hook in HOOKS {
                gateway.hook = hook;
                let row = format!("{hook:?} {mode:?} {family:?}");
                by_connection_id(&mut gateway, &row, vip, address);
            }
            // A server that left keeps its connections while it drains.
            gateway.set_backends(vip, (2..5).map(backend).collect());
            let client = gateway.client(family);
            let datagram = udp(client, address, &short_header(&connection_id(2, 1)));
            let out = gateway.expect("draining", &datagram.frame(), Verdict::Forwarded);
            assert_eq!(gateway.backend_of(vip, &out), family.backend(1, 443));
            gateway.now += DRAIN;
            gateway.set_backends(vip, (2..5).map(backend).collect());
            let out = gateway.expect("gone", &datagram.frame(), Verdict::NewFlow);
            assert_ne!(gateway.backend_of(vip, &out), family.backend(1, 443));
        }
    }
}

fn by_connection_id(
    gateway: &mut Gateway,
    row: &str,
    vip: viaduct::route::Vip,
    address: SocketAddr,
) {
    let family = Family::of(address);
    for server in 1..5 {
        let id = connection_id(2, server);
        for payload in [long_header(&id), short_header(&id)] {
            // A client that changed its address.
            for _ in 0..3 {
                let client = gateway.client(family);
                let frame = udp(client, address, &payload).frame();
                let out = gateway.expect(row, &frame, Verdict::Forwarded);
                let backend = gateway.backend_of(vip, &out);
                assert_eq!(backend, family.backend(server, 443), "{row}");
            }
        }
    }
    // What names no server is a flow like any other, and stays where it began.
    for payload in [
        long_header(&connection_id(2, 99)),
        short_header(&connection_id(2, 99)),
        long_header(&connection_id(1, 1)),
        short_header(&connection_id(7, 1)),
        vec![0x41; 3],
        vec![0xc3, 0, 0, 0, 1, 8],
        Vec::new(),
    ] {
        let client = gateway.client(family);
        let frame = udp(client, address, &payload).frame();
        let out = gateway.expect(row, &frame, Verdict::NewFlow);
        let backend = gateway.backend_of(vip, &out);
        let out = gateway.expect(row, &frame, Verdict::Forwarded);
        assert_eq!(gateway.backend_of(vip, &out), backend, "{row}");
    }
}
