//! Health checks of this host that are to reach one backend of a VIP.

use std::net::SocketAddr;

use router_common::{MAX_BACKENDS, NO_BACKEND, PROBE_MARK, Verdict};
use viaduct::config::Forwarding;
use viaduct::l4::datapath::Run;
use viaduct::l4::next_hop::NextHop;

use crate::fixture::*;
use crate::packets::*;

/// Kernel: include/uapi/linux/bpf.h, `enum tcx_action_base`.
const NEXT: u32 = -1_i32 as u32;
const REDIRECT: u32 = 7;

/// Mode, family of the VIP, family of the backends.
const ONE_WAY: [(Forwarding, Family, Family); 8] = [
    (Forwarding::Dsr, Family::V4, Family::V4),
    (Forwarding::Dsr, Family::V6, Family::V6),
    (Forwarding::Ipip, Family::V4, Family::V4),
    (Forwarding::Ipip, Family::V4, Family::V6),
    (Forwarding::Ipip, Family::V6, Family::V6),
    (Forwarding::Gue, Family::V4, Family::V4),
    (Forwarding::Gue, Family::V6, Family::V6),
    (Forwarding::Gue, Family::V6, Family::V4),
];

#[test]
fn a_check_travels_to_its_backend_as_a_clients_packet_does() {
    let mut gateway = Gateway::new();
    gateway.hook = Hook::Tcx;
    for (mode, inside, outside) in ONE_WAY {
        let address = gateway.address(inside, 80);
        let vip = vip("tcp", address);
        let backends = [1, 2].map(|host| outside.backend(host, 80));
        for (backend, last) in backends.iter().zip(1..) {
            let hop = NextHop {
                destination_mac: [2, 0, 0, 0, 1, last],
                ..next_hop(outside)
            };
            gateway.next_hops.insert(backend.ip(), hop);
        }
        gateway.serve(vip, mode, &backends);
        let client = gateway.client(inside);
        for segment in [Segment::Syn, Segment::Ack] {
            let row = format!("{mode:?} {inside:?} in {outside:?}, {segment:?}");
            let frame = tcp(client, address, segment, b"").frame();
            let out = gateway.send(&frame);
            let chosen = gateway.backend_of(vip, &out);
            for backend in backends {
                let mark = PROBE_MARK | gateway.id_of(vip, backend);
                let (run, verdicts) = leave(&mut gateway, &frame, mark);
                assert_eq!(run.action, REDIRECT, "{row}");
                assert_eq!(run.frame == out.frame, backend == chosen, "{row}");
                assert_eq!(run.frame.len(), out.frame.len(), "{row}");
                assert_eq!(verdicts, [Verdict::Probed], "{row}");
            }
        }
    }
}

#[test]
fn whatever_is_no_check_of_a_backend_at_its_vip_leaves_untouched_and_uncounted() {
    let mut gateway = Gateway::new();
    let client = gateway.client(Family::V4);
    let serve = |gateway: &mut Gateway, mode, host| {
        let address = gateway.address(Family::V4, 80);
        let backend = Family::V4.backend(host, 80);
        gateway.serve(vip("tcp", address), mode, &[backend]);
        (address, gateway.id_of(vip("tcp", address), backend))
    };
    let (ours, id) = serve(&mut gateway, Forwarding::Dsr, 1);
    let (other, id_of_other) = serve(&mut gateway, Forwarding::Ipip, 2);
    let (translated, id_of_translated) = serve(&mut gateway, Forwarding::Nat, 3);
    let (gone, id_of_gone) = serve(&mut gateway, Forwarding::Dsr, 4);
    gateway.remove(vip("tcp", gone));
    let syn = |to| tcp(client, to, Segment::Syn, b"").frame();
    let port_81 = SocketAddr::new(ours.ip(), 81);
    for (row, frame, mark) in [
        ("no mark", syn(ours), 0),
        ("the id alone", syn(ours), id),
        ("another's mark", syn(ours), 0x0001_0000 | id),
        ("of no backend", syn(ours), PROBE_MARK | NO_BACKEND),
        ("of an unused id", syn(ours), PROBE_MARK | 1000),
        ("beyond all ids", syn(ours), PROBE_MARK | MAX_BACKENDS),
        ("of another VIP", syn(ours), PROBE_MARK | id_of_other),
        ("to another VIP", syn(other), PROBE_MARK | id),
        ("to another port", syn(port_81), PROBE_MARK | id),
        ("UDP", udp(client, ours, b"").frame(), PROBE_MARK | id),
        ("to no VIP", syn(client), PROBE_MARK | id),
        ("nat", syn(translated), PROBE_MARK | id_of_translated),
        ("gone", syn(gone), PROBE_MARK | id_of_gone),
    ] {
        let (run, verdicts) = leave(&mut gateway, &frame, mark);
        assert_eq!((run.action, &run.frame), (NEXT, &frame), "{row}");
        assert_eq!(verdicts, [], "{row}");
    }
    let mark = PROBE_MARK | id;
    let (run, _) = leave(&mut gateway, &syn(ours), mark);
    assert_eq!(run.action, REDIRECT);
}

/// Has a frame leave with a mark; what was counted. Nothing may be for a backend.
fn leave(gateway: &mut Gateway, frame: &[u8], mark: u32) -> (Run, Vec<Verdict>) {
    let (run, verdicts, moved) = gateway.counting(|datapath| datapath.run_probe(frame, mark));
    assert!(moved.is_empty(), "{moved:?}");
    (run, verdicts)
}
