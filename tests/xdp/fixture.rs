//! One loaded program, the tables a planner would give it, and packets by etherparse.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, Instant};

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use router_common::Verdict;
use viaduct::config::{FlowTimeouts, L4Config, L4Limits, PortRange};
use viaduct::l4::datapath::{Datapath, Options};
use viaduct::l4::next_hop::NextHop;
use viaduct::l4::plan::{Planner, World};
use viaduct::l4::policy::Policies;
use viaduct::route::{Backend, Origin, Pool, Vip};

/// Kernel: include/uapi/linux/bpf.h, `enum xdp_action`.
pub const ABORTED: u32 = 0;
pub const DROP: u32 = 1;
pub const PASS: u32 = 2;
pub const TX: u32 = 3;
pub const REDIRECT: u32 = 4;

/// BPF_PROG_TEST_RUN makes frames come in by the loopback interface.
pub const INGRESS: u32 = 1;
pub const EGRESS: u32 = 7;

pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub const GATEWAY_INNER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];
pub const BACKEND_MAC: [u8; 6] = [2, 0, 0, 0, 0, 4];

/// More than a VIP's drain time.
pub const DRAIN: Duration = Duration::from_secs(3600);

pub const CLIENT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 7), 40000);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 254);
pub const VIP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 10), 80);

pub fn backend(host: u8) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, host), 8080)
}

pub fn options() -> Options {
    Options {
        limits: L4Limits {
            vips: 16,
            backends: 64,
            flows: 65_536,
        },
        timeouts: FlowTimeouts::default(),
        nat_ports: PortRange {
            first: 1024,
            last: 32767,
        },
        gue_port: 6080,
        pin_path: None,
    }
}

/// The program under test with its tables.
pub struct Gateway {
    pub datapath: Datapath,
    planner: Planner,
    policies: Policies,
    next_hops: HashMap<IpAddr, NextHop>,
    pub now: Instant,
}

/// What became of a packet.
#[derive(Debug)]
pub struct Outcome {
    pub action: u32,
    pub verdict: Verdict,
    pub frame: Vec<u8>,
}

impl Gateway {
    /// Backends 10.0.0.1 to 10.0.0.250 are reached through interface `egress`.
    pub fn new(options: &Options, egress: u32) -> Gateway {
        let datapath =
            Datapath::open(options).expect("load the program: needs root and a BPF toolchain");
        let hop = NextHop {
            ifindex: egress,
            source_mac: GATEWAY_INNER_MAC,
            destination_mac: BACKEND_MAC,
            source: IpAddr::V4(GATEWAY),
            mtu: 1500,
            vlan: 0,
            on_link: true,
        };
        let planner = Planner::new(
            options.limits.vips,
            options.limits.backends,
            *datapath.hash_keys(),
            datapath.vip_mask(),
        );
        Gateway {
            datapath,
            planner,
            policies: Policies::new(&L4Config::default()),
            next_hops: (1..=250)
                .map(|host| (IpAddr::V4(*backend(host).ip()), hop))
                .collect(),
            now: Instant::now(),
        }
    }

    /// TCP and UDP to [`VIP`] go to these backends.
    pub fn serving(hosts: &[u8]) -> Gateway {
        let mut gateway = Gateway::new(&options(), EGRESS);
        gateway.set_pool("tcp", hosts);
        gateway.set_pool("udp", hosts);
        gateway
    }

    /// Plans and writes the pool of a VIP at [`VIP`]'s address and port.
    pub fn set_pool(&mut self, proto: &str, hosts: &[u8]) {
        let vip = format!("{proto}/{VIP}").parse().expect("a VIP");
        self.set_vip(vip, hosts);
    }

    pub fn set_vip(&mut self, vip: Vip, hosts: &[u8]) {
        let pool = Pool {
            backends: hosts
                .iter()
                .map(|host| Arc::new(pool_backend(*host)))
                .collect(),
            balance: None,
            route_service_url: None,
        };
        let world = World {
            now: self.now,
            policies: &self.policies,
            timeouts: &FlowTimeouts::default(),
            ticks_per_second: self.datapath.ticks_per_second(),
            next_hops: &self.next_hops,
            unhealthy: &imbl::HashSet::new(),
            panic_threshold: 0,
            draining: &imbl::HashSet::new(),
        };
        let pool = (!hosts.is_empty()).then_some(&pool);
        let plan = self.planner.plan(vip, pool, &world);
        assert_eq!(plan.refused, []);
        for op in plan.ops {
            self.datapath.apply(&op).expect("write to the kernel");
        }
    }

    /// Runs the program on one frame; exactly one verdict must be counted.
    pub fn send(&mut self, frame: &[u8]) -> Outcome {
        let before = self.datapath.counters().verdicts().expect("counters");
        let run = self.datapath.run(frame).expect("run");
        let after = self.datapath.counters().verdicts().expect("counters");
        let counted: Vec<Verdict> = before
            .iter()
            .zip(&after)
            .flat_map(|(before, after)| vec![after.0; (after.1 - before.1) as usize])
            .collect();
        let [verdict] = counted[..] else {
            panic!("verdicts counted for one packet: {counted:?}")
        };
        assert_ne!(run.action, ABORTED, "aborted, {verdict:?}: {frame:02x?}");
        Outcome {
            action: run.action,
            verdict,
            frame: run.frame,
        }
    }
}

fn pool_backend(host: u8) -> Backend {
    Backend::new(SocketAddr::V4(backend(host)), Origin::Nats)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    Syn,
    Ack,
    Fin,
    Rst,
}

/// A TCP segment from the client's side of the gateway.
pub fn tcp(from: SocketAddrV4, to: SocketAddrV4, segment: Segment, payload: &[u8]) -> Vec<u8> {
    tcp_frame(CLIENT_MAC, GATEWAY_MAC, from, to, segment, payload, 64)
}

/// A TCP segment from the backends' side.
pub fn tcp_reply(
    from: SocketAddrV4,
    to: SocketAddrV4,
    segment: Segment,
    payload: &[u8],
) -> Vec<u8> {
    tcp_frame(
        BACKEND_MAC,
        GATEWAY_INNER_MAC,
        from,
        to,
        segment,
        payload,
        64,
    )
}

pub fn tcp_frame(
    source_mac: [u8; 6],
    destination_mac: [u8; 6],
    from: SocketAddrV4,
    to: SocketAddrV4,
    segment: Segment,
    payload: &[u8],
    ttl: u8,
) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(source_mac, destination_mac)
        .ipv4(from.ip().octets(), to.ip().octets(), ttl)
        .tcp(from.port(), to.port(), 1000, 64240);
    let builder = match segment {
        Segment::Syn => builder.syn(),
        Segment::Ack => builder.ack(2000),
        Segment::Fin => builder.fin().ack(2000),
        Segment::Rst => builder.rst(),
    };
    let mut frame = Vec::new();
    builder
        .write(&mut frame, payload)
        .expect("build a TCP segment");
    frame
}

pub fn udp(from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    udp_frame(CLIENT_MAC, GATEWAY_MAC, from, to, payload)
}

pub fn udp_reply(from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    udp_frame(BACKEND_MAC, GATEWAY_INNER_MAC, from, to, payload)
}

fn udp_frame(
    source_mac: [u8; 6],
    destination_mac: [u8; 6],
    from: SocketAddrV4,
    to: SocketAddrV4,
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(source_mac, destination_mac)
        .ipv4(from.ip().octets(), to.ip().octets(), 64)
        .udp(from.port(), to.port())
        .write(&mut frame, payload)
        .expect("build a datagram");
    frame
}

/// A frame as an independent parser reads it, with both checksums found right.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    pub source_mac: [u8; 6],
    pub destination_mac: [u8; 6],
    pub from: SocketAddrV4,
    pub to: SocketAddrV4,
    pub ttl: u8,
    pub payload: Vec<u8>,
}

pub fn read(frame: &[u8]) -> Seen {
    let packet = SlicedPacket::from_ethernet(frame).expect("a sound frame");
    let eth = packet
        .link
        .expect("Ethernet")
        .to_header()
        .expect("Ethernet")
        .ethernet2()
        .expect("Ethernet II");
    let ip = match packet.net.expect("IP") {
        etherparse::NetSlice::Ipv4(ip) => ip.header().to_header(),
        other => panic!("not IPv4: {other:?}"),
    };
    assert_eq!(
        ip.header_checksum,
        ip.calc_header_checksum(),
        "IPv4 header checksum"
    );
    let (source, destination, payload) = match packet.transport.expect("TCP or UDP") {
        TransportSlice::Tcp(tcp) => {
            let sum = tcp
                .calc_checksum_ipv4(ip.source, ip.destination)
                .expect("length");
            assert_eq!(tcp.checksum(), sum, "TCP checksum");
            (
                tcp.source_port(),
                tcp.destination_port(),
                tcp.payload().to_vec(),
            )
        }
        TransportSlice::Udp(udp) => {
            let sum =
                udp.to_header()
                    .calc_checksum_ipv4_raw(ip.source, ip.destination, udp.payload());
            assert_eq!(udp.checksum(), sum.expect("length"), "UDP checksum");
            (
                udp.source_port(),
                udp.destination_port(),
                udp.payload().to_vec(),
            )
        }
        other => panic!("neither TCP nor UDP: {other:?}"),
    };
    Seen {
        source_mac: eth.source,
        destination_mac: eth.destination,
        from: SocketAddrV4::new(ip.source.into(), source),
        to: SocketAddrV4::new(ip.destination.into(), destination),
        ttl: ip.time_to_live,
        payload,
    }
}
