//! Which backend a flow is on in the modes whose answers pass elsewhere, through changes of the ring.

use std::net::SocketAddr;

use router_common::Verdict;
use viaduct::config::Forwarding;
use viaduct::route::Vip;

use crate::fixture::*;
use crate::packets::*;

const MODES: [Forwarding; 3] = [Forwarding::Dsr, Forwarding::Ipip, Forwarding::Gue];

fn backends(family: Family, hosts: std::ops::Range<u8>) -> Vec<SocketAddr> {
    hosts.map(|host| family.backend(host, 80)).collect()
}

/// Sends a segment that must be forwarded; its backend.
#[track_caller]
fn forwarded(
    gateway: &mut Gateway,
    vip: Vip,
    from: SocketAddr,
    segment: Segment,
    verdict: Verdict,
) -> SocketAddr {
    let to = SocketAddr::new(vip.address, vip.ports.first);
    let frame = tcp(from, to, segment, b"").frame();
    let out = gateway.expect(&format!("{segment:?}"), &frame, verdict);
    assert_eq!(out.action, Action::Redirect);
    gateway.backend_of(vip, &out)
}

fn tracked(gateway: &Gateway) -> usize {
    gateway.datapath.flows().iter().count()
}

#[test]
fn connections_survive_changes_of_the_ring() {
    let mut gateway = Gateway::with(&viaduct::l4::datapath::Options {
        limits: viaduct::config::L4Limits {
            flows: 8192,
            ..options().limits
        },
        ..options()
    });
    for (hook, family) in [
        (Hook::Xdp, Family::V4),
        (Hook::Xdp, Family::V6),
        (Hook::Tcx, Family::V4),
        (Hook::Tcx, Family::V6),
    ] {
        gateway.hook = hook;
        for mode in MODES {
            let address = gateway.address(family, 80);
            let vip = vip("tcp", address);
            gateway.serve(vip, mode, &backends(family, 1..5));
            survive(&mut gateway, vip, family);
            gateway.remove(vip);
        }
    }
}

fn survive(gateway: &mut Gateway, vip: Vip, family: Family) {
    let clients: Vec<_> = (0..80).map(|_| gateway.client(family)).collect();
    let open = |gateway: &mut Gateway, client: &SocketAddr| {
        forwarded(gateway, vip, *client, Segment::Syn, Verdict::NewFlow)
    };
    let before: Vec<_> = clients.iter().map(|client| open(gateway, client)).collect();
    // The ring alone says where they are.
    let known = tracked(gateway);
    // Three of four backends leave, and three others come.
    let mut next = backends(family, 4..8);
    gateway.set_pool(vip, &next);
    let mut moved = 0;
    for (client, backend) in clients.iter().zip(&before) {
        for _ in 0..2 {
            let still = forwarded(gateway, vip, *client, Segment::Ack, Verdict::Forwarded);
            assert_eq!(still, *backend, "an old connection");
        }
        moved += usize::from(!next.contains(backend));
    }
    assert!(moved > 30, "{moved} of 80 were on three of four backends");
    assert!(tracked(gateway) >= known + moved, "pinned in the table");

    // A RST of an unknown connection is forwarded, and forgotten.
    let known = tracked(gateway);
    for _ in 0..20 {
        let client = gateway.client(family);
        forwarded(gateway, vip, client, Segment::Rst, Verdict::Forwarded);
    }
    assert_eq!(tracked(gateway), known, "a RST opens no flow");

    // A new connection is on the ring as it is, and stays there when it changes again.
    let mut others = Vec::new();
    for _ in 0..80 {
        let client = gateway.client(family);
        let backend = open(gateway, &client);
        assert!(next.contains(&backend), "a new connection to {backend}");
        others.push((client, backend));
    }
    next.truncate(3);
    gateway.set_pool(vip, &next);
    for (client, backend) in clients
        .iter()
        .zip(&before)
        .chain(others.iter().map(|(client, backend)| (client, backend)))
    {
        let still = forwarded(gateway, vip, *client, Segment::Ack, Verdict::Forwarded);
        assert_eq!(still, *backend, "after the second change");
    }
    // A port that is used again is a new connection: it belongs where the ring says.
    for (client, backend) in clients.iter().zip(&before) {
        if next.contains(backend) {
            continue;
        }
        forwarded(gateway, vip, *client, Segment::Rst, Verdict::Forwarded);
        let again = open(gateway, client);
        assert!(next.contains(&again), "{again} takes nothing new");
        let still = forwarded(gateway, vip, *client, Segment::Ack, Verdict::Forwarded);
        assert_eq!(still, again);
    }
    // When the drain is over, nothing goes to those who left, and whoever asks is served.
    gateway.now += DRAIN;
    gateway.set_pool(vip, &next);
    for (client, backend) in clients.iter().zip(&before) {
        let to = forwarded(gateway, vip, *client, Segment::Ack, Verdict::Forwarded);
        assert!(next.contains(&to), "{to} is gone");
        assert!(to == *backend || !next.contains(backend));
    }
}

#[test]
fn datagrams_stay_where_they_began() {
    let mut gateway = Gateway::new();
    for hook in HOOKS {
        gateway.hook = hook;
        for family in FAMILIES {
            for mode in MODES {
                let address = gateway.address(family, 80);
                let vip = vip("udp", address);
                gateway.serve(vip, mode, &backends(family, 1..5));
                let mut flows = Vec::new();
                for _ in 0..40 {
                    let client = gateway.client(family);
                    let frame = udp(client, address, b"x").frame();
                    let out = gateway.expect("first", &frame, Verdict::NewFlow);
                    flows.push((frame, gateway.backend_of(vip, &out)));
                }
                gateway.set_pool(vip, &backends(family, 4..8));
                for (frame, backend) in &flows {
                    let out = gateway.expect("more", frame, Verdict::Forwarded);
                    assert_eq!(gateway.backend_of(vip, &out), *backend);
                }
                gateway.remove(vip);
            }
        }
    }
}

#[test]
fn a_vip_changes_its_mode_while_flows_go_on() {
    let mut gateway = Gateway::new();
    for hook in HOOKS {
        gateway.hook = hook;
        for family in FAMILIES {
            from_translation_to_tunnel(&mut gateway, family);
            from_tunnel_to_tunnel(&mut gateway, family);
        }
    }
}

/// Flows that answers are led back for keep their mode.
fn from_translation_to_tunnel(gateway: &mut Gateway, family: Family) {
    let address = gateway.address(family, 80);
    let vip = vip("tcp", address);
    let pool = backends(family, 1..4);
    gateway.serve(vip, Forwarding::Nat, &pool);
    let mut flows = Vec::new();
    for _ in 0..20 {
        let client = gateway.client(family);
        let syn = tcp(client, address, Segment::Syn, b"");
        let out = gateway.expect("SYN", &syn.frame(), Verdict::NewFlow);
        flows.push((client, read(&out.frame)));
    }
    for mode in [Forwarding::Dsr, Forwarding::Gue, Forwarding::Dnat] {
        gateway.serve(vip, mode, &pool);
        for (client, sent) in &flows {
            let ack = tcp(*client, address, Segment::Ack, b"more").frame();
            let seen = read(&gateway.expect("ACK", &ack, Verdict::Forwarded).frame);
            assert_eq!((seen.from, seen.to), (sent.from, sent.to), "{mode:?}");
            let answer = sent.answer(b"").frame();
            let seen = read(&gateway.expect("answer", &answer, Verdict::Replied).frame);
            assert_eq!((seen.from, seen.to), (address, *client), "{mode:?}");
        }
        // A new one is of the new mode.
        let client = gateway.client(family);
        let syn = tcp(client, address, Segment::Syn, b"");
        let out = gateway.expect("SYN", &syn.frame(), Verdict::NewFlow);
        match mode {
            Forwarding::Dsr => assert_eq!(read(&out.frame).to, address),
            Forwarding::Dnat => assert_eq!(read(&out.frame).from, client),
            _ => assert!(out.frame.len() > syn.frame().len()),
        }
    }
    gateway.remove(vip);
}

/// Where the ring says where flows are, they stay there, whatever is around them.
fn from_tunnel_to_tunnel(gateway: &mut Gateway, family: Family) {
    let address = gateway.address(family, 80);
    let vip = vip("tcp", address);
    let pool = backends(family, 1..4);
    gateway.serve(vip, Forwarding::Dsr, &pool);
    let mut flows = Vec::new();
    for _ in 0..20 {
        let client = gateway.client(family);
        let backend = forwarded(gateway, vip, client, Segment::Syn, Verdict::NewFlow);
        flows.push((client, backend));
    }
    for mode in [Forwarding::Ipip, Forwarding::Gue, Forwarding::Dsr] {
        gateway.serve(vip, mode, &pool);
        for (client, backend) in &flows {
            let still = forwarded(gateway, vip, *client, Segment::Ack, Verdict::Forwarded);
            assert_eq!(still, *backend, "{mode:?}");
        }
    }
    gateway.remove(vip);
}
