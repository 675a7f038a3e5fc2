//! Both programs against the model: random packets through random changes of the tables.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};
use router_common::{Mode, Verdict};
use viaduct::config::{FlowTimeouts, Forwarding, Reject, Scheduler};
use viaduct::l4::datapath::Options;
use viaduct::route::{Proto, Vip};

use crate::fixture::*;
use crate::model::{Fate, Model, ModelVip};
use crate::packets::*;

/// What is served: last part of the address, port or range, mode, scheduler, whether it is silent.
const SERVED: [(u8, &str, Forwarding, Scheduler, bool); 9] = [
    (10, "80", Forwarding::Nat, Scheduler::Maglev, false),
    (10, "81", Forwarding::Dsr, Scheduler::Maglev, false),
    (10, "70-90", Forwarding::Ipip, Scheduler::SourceHash, true),
    (11, "80", Forwarding::Ipip, Scheduler::Maglev, false),
    (11, "*", Forwarding::Gue, Scheduler::Maglev, false),
    (12, "80", Forwarding::Gue, Scheduler::SourceHash, true),
    (12, "85", Forwarding::Nat, Scheduler::SourceHash, true),
    (13, "80", Forwarding::Dsr, Scheduler::SourceHash, false),
    (14, "80", Forwarding::L7, Scheduler::Maglev, false),
];

/// A client that some VIPs refuse.
const DENIED: u16 = 3;

struct Served {
    vip: Vip,
    forwarding: Forwarding,
    by_source: bool,
    silent: bool,
    denies: bool,
}

/// The programs and the model, with the same tables.
struct Both {
    gateway: Gateway,
    model: Model,
    served: Vec<Served>,
    /// Packets that both agreed on, by verdict.
    agreed: BTreeMap<&'static str, u32>,
}

impl Both {
    fn new() -> Both {
        // The model knows no time.
        let long = Duration::from_secs(3600);
        let mut gateway = Gateway::with(&Options {
            timeouts: FlowTimeouts {
                tcp_syn: long,
                tcp_established: long,
                tcp_closing: long,
                udp: long,
            },
            ..options()
        });
        let mut served = Vec::new();
        for (host, ports, forwarding, scheduler, silent) in SERVED {
            for family in FAMILIES {
                for proto in ["tcp", "udp"] {
                    if forwarding == Forwarding::L7 && proto == "udp" {
                        continue;
                    }
                    let vip = match family.vip(host, 0).ip() {
                        IpAddr::V4(ip) => vip(proto, format!("{ip}:{ports}")),
                        IpAddr::V6(ip) => vip(proto, format!("[{ip}]:{ports}")),
                    };
                    let denies = host == 11 && proto == "tcp";
                    gateway.configure(vip, |config| {
                        config.forwarding = Some(forwarding);
                        if forwarding != Forwarding::L7 {
                            config.scheduler = Some(scheduler);
                            config.reject = silent.then_some(Reject::Drop);
                        }
                        if denies {
                            let bits = if family == Family::V4 { 32 } else { 128 };
                            let net = format!("{}/{bits}", family.client(DENIED).ip());
                            config.deny = vec![net.parse().expect("a prefix")];
                        }
                    });
                    served.push(Served {
                        vip,
                        forwarding,
                        by_source: scheduler == Scheduler::SourceHash,
                        silent,
                        denies,
                    });
                }
            }
        }
        let mut both = Both {
            gateway,
            model: Model::default(),
            served,
            agreed: BTreeMap::new(),
        };
        for number in 0..both.served.len() {
            both.write_pool(number, 0b1111);
            let vip = model_of(&both.gateway, &both.served[number]);
            both.model.vips.push(vip);
        }
        both
    }

    /// Gives a VIP the backends whose bit is set.
    fn write_pool(&mut self, number: usize, bits: u8) {
        let vip = self.served[number].vip;
        let family = Family::of(SocketAddr::new(vip.address, 0));
        let hosts = (0..8).filter(|bit| bits >> bit & 1 == 1);
        let pool: Vec<_> = hosts
            .map(|host| family.backend(1 + host, vip.ports.first.max(1)))
            .collect();
        self.gateway.set_pool(vip, &pool);
    }

    fn set_pool(&mut self, number: usize, bits: u8) {
        self.write_pool(number, bits);
        self.model.vips[number] = model_of(&self.gateway, &self.served[number]);
    }

    fn send(&mut self, hook: Hook, frame: &[u8]) -> Result<(), TestCaseError> {
        self.gateway.hook = hook;
        let expected = self.model.receive(frame, hook == Hook::Xdp);
        let out = self.gateway.send(frame);
        let Some(expected) = expected else {
            return Ok(());
        };
        let found = Fate {
            // Not every refusal can be told to the client.
            verdict: match (expected.verdict, out.verdict) {
                (Verdict::Rejected, Verdict::NoBackend) => Verdict::Rejected,
                // The prefilter may take one address for another, but the packet passes all the same.
                (Verdict::NotForUs, Verdict::NotAReply) => Verdict::NotForUs,
                (_, verdict) => verdict,
            },
            backend: out.moved.keys().next().copied(),
        };
        prop_assert_eq!(found, expected, "{:?} {:02x?}", hook, frame);
        *self.agreed.entry(expected.verdict.name()).or_default() += 1;
        Ok(())
    }
}

fn model_of(gateway: &Gateway, served: &Served) -> ModelVip {
    let vip = served.vip;
    let planned = &gateway.planner.vips()[&vip];
    let client = Family::of(SocketAddr::new(vip.address, 0)).client(DENIED);
    let ids = |wanted: bool| {
        let members = planned.members.values();
        let wanted = members.filter(|member| member.is_active() || !wanted);
        wanted.map(|member| member.id).collect()
    };
    ModelVip {
        address: vip.address,
        ports: vip.ports.first..=vip.ports.last,
        proto: if vip.proto == Proto::Tcp { 6 } else { 17 },
        mode: match served.forwarding {
            Forwarding::Nat => Mode::Nat,
            Forwarding::Dnat => Mode::Dnat,
            Forwarding::Dsr => Mode::Dsr,
            Forwarding::Ipip => Mode::Ipip,
            Forwarding::Gue => Mode::Gue,
            Forwarding::L7 => Mode::L7,
        },
        by_source: served.by_source,
        silent: served.silent,
        denied: if served.denies {
            vec![client.ip()]
        } else {
            Vec::new()
        },
        active: ids(true),
        members: ids(false),
        ring: gateway
            .rings
            .get(&planned.index())
            .cloned()
            .unwrap_or_default(),
    }
}

#[derive(Clone, Debug)]
enum Step {
    Send(Hook, Vec<u8>),
    SetPool(Index, u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let hook = prop_oneof![Just(Hook::Xdp), Just(Hook::Tcx)];
    let damage = prop::collection::vec((any::<Index>(), any::<u8>()), 0..3);
    let damage = prop_oneof![3 => Just(Vec::new()), 1 => damage];
    let send = (hook, frame(), damage).prop_map(|(hook, mut frame, damage)| {
        for (at, value) in damage {
            let at = 12 + at.index(frame.len().min(100) - 12);
            frame[at] = value;
        }
        Step::Send(hook, frame)
    });
    let set_pool = (any::<Index>(), prop_oneof![Just(0u8), any::<u8>()])
        .prop_map(|(vip, bits)| Step::SetPool(vip, bits));
    prop::collection::vec(prop_oneof![50 => send, 1 => set_pool], 100)
}

/// Packets of few clients to few VIPs, so that many belong together.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    let family = prop_oneof![Just(Family::V4), Just(Family::V6)];
    let port = prop_oneof![3 => Just(80u16), 1 => 69u16..92];
    let segment = prop_oneof![
        3 => Just(Segment::Syn),
        4 => Just(Segment::Ack),
        1 => Just(Segment::Fin),
        1 => Just(Segment::Rst),
    ];
    let shape = (0u8..12, 0u16..4, 0usize..60);
    (family, 0u16..40, 10u8..16, port, segment, shape).prop_map(
        |(family, client, host, port, segment, (kind, id, len))| {
            let (from, to) = (family.client(client), family.vip(host, port));
            let payload = vec![0x5a; len + 24];
            let packet = match kind % 3 {
                0 => udp(from, to, &payload),
                _ => tcp(from, to, segment, &payload),
            };
            let packet = Packet {
                vlan: if kind == 7 { 100 } else { 0 },
                hops: if kind == 8 { 1 } else { 64 },
                ..packet
            };
            match (kind, family) {
                (9, Family::V4) => icmp(from.ip(), to.ip(), 8, 0, [0; 4], &payload),
                (9, Family::V6) => icmp(from.ip(), to.ip(), 128, 0, [0; 4], &payload),
                (10 | 11, Family::V4) => fragments_v4(&packet, id, 24)[len % 2].clone(),
                (10 | 11, Family::V6) => fragments_v6(&packet, id.into(), 24)[len % 2].clone(),
                _ => packet.frame(),
            }
        },
    )
}

#[test]
fn both_programs_do_what_the_model_says() {
    // The runner takes a function that changes nothing; only this thread runs it.
    let both = RefCell::new(Both::new());
    let mut runner = TestRunner::new(Config {
        cases: 60,
        failure_persistence: None,
        // A step depends on all before it.
        max_shrink_iters: 0,
        ..Config::default()
    });
    let check = |steps: Vec<Step>| {
        let mut both = both.borrow_mut();
        for step in steps {
            match step {
                Step::SetPool(vip, bits) => {
                    let number = vip.index(both.served.len());
                    both.set_pool(number, bits);
                }
                Step::Send(hook, frame) if frame.len() < hook.shortest(&frame) => {}
                Step::Send(hook, frame) => both.send(hook, &frame)?,
            }
        }
        Ok(())
    };
    runner.run(&steps(), check).unwrap();
    let agreed = both.into_inner().agreed;
    for verdict in [
        Verdict::NotForUs,
        Verdict::NoSuchVip,
        Verdict::HandedUp,
        Verdict::Forwarded,
        Verdict::NewFlow,
        Verdict::EchoAnswered,
        Verdict::Rejected,
        Verdict::Malformed,
        Verdict::Fragment,
        Verdict::TtlExpired,
        Verdict::NoBackend,
        Verdict::UnknownFlow,
        Verdict::SourceDenied,
    ] {
        let packets = agreed.get(verdict.name()).copied().unwrap_or(0);
        assert!(packets > 0, "no packet met {verdict:?}: {agreed:?}");
    }
}
