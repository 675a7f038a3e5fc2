//! What a VIP's policy makes of it, and how it changes while packets come.

use std::collections::BTreeMap as Map;

use router_common::{SOURCE_ALLOW, SOURCE_DENY};

use super::*;
use crate::config::QuicConfig;
use crate::route::Instance;

impl Bench {
    /// Gives VIP 1 this policy.
    fn set_policy(&mut self, change: impl FnOnce(&mut VipConfig)) {
        let mut policy = VipConfig::new(vip(1));
        change(&mut policy);
        self.config.vip = vec![policy];
    }

    fn entry(&self) -> VipEntry {
        self.kernel.entry(vip(1)).expect("VIP 1").1
    }

    fn flags(&self) -> u8 {
        self.entry().flags
    }
}

fn with_tag(host: u8, id: &str) -> Backend {
    Backend {
        instance: Instance {
            tags: Map::from([("quic_server_id".into(), id.into())]),
            ..Instance::default()
        }
        .shared(),
        ..backend(host)
    }
}

fn refusals(plan: &Plan) -> Vec<Refusal> {
    plan.refused.iter().map(|(_, refusal)| *refusal).collect()
}

#[test]
fn the_policy_is_written_into_the_vip() {
    let mut bench = Bench::new(4, 16);
    bench.set_policy(|vip| {
        vip.forwarding = Some(Forwarding::Gue);
        vip.scheduler = Some(Schedule::LeastConnections);
        vip.affinity = Some(Duration::from_secs(600));
        vip.source_rate = 7;
        vip.vip_rate = 70;
        vip.challenge = true;
        vip.reject = Some(crate::config::Reject::Drop);
    });
    bench.plan(vip(1), &[1]);
    let entry = bench.entry();
    assert_eq!(Mode::from_bits(entry.mode), Mode::Gue);
    assert_eq!(
        Scheduler::from_bits(entry.scheduler),
        Scheduler::LeastConnections
    );
    assert_eq!(
        (entry.affinity, entry.source_rate, entry.vip_rate),
        (1200, 4, 35)
    );
    assert_eq!(
        entry.flags,
        vip_flags::CHALLENGE | vip_flags::SILENT | vip_flags::TRACK
    );
}

/// Any policy, as far as the maps hold it.
fn any_policy() -> impl Strategy<Value = VipConfig> {
    let modes = [
        Forwarding::Nat,
        Forwarding::Dnat,
        Forwarding::Dsr,
        Forwarding::Ipip,
        Forwarding::Gue,
    ];
    let schedulers = [
        Schedule::Maglev,
        Schedule::RoundRobin,
        Schedule::LeastConnections,
        Schedule::SourceHash,
    ];
    let nets = ["203.0.113.0/24", "10.0.0.0/8", "2001:db8::/32", "0.0.0.0/0"];
    let nets = prop::sample::subsequence(nets.map(|net| net.parse().unwrap()).to_vec(), 0..3);
    let how = (
        prop::sample::select(modes.to_vec()),
        prop::sample::select(schedulers.to_vec()),
        any::<bool>(),
        prop::option::of(1u64..100_000),
    );
    let quic = prop::option::of((1u8..9, 0u8..7));
    let rates = (any::<u32>(), any::<u32>());
    (how, nets.clone(), nets, rates, any::<(bool, bool)>(), quic).prop_map(
        |((mode, scheduler, silent, affinity), allow, deny, rates, flags, quic)| VipConfig {
            forwarding: Some(mode),
            scheduler: Some(scheduler),
            reject: silent.then_some(crate::config::Reject::Drop),
            affinity: affinity.map(Duration::from_millis),
            deny: deny
                .into_iter()
                .filter(|net| !allow.contains(net))
                .collect(),
            allow,
            source_rate: rates.0,
            vip_rate: rates.1,
            challenge: flags.0,
            track: flags.1,
            quic: quic.map(|(server_id_octets, config)| QuicConfig {
                server_id_octets,
                config,
            }),
            ..VipConfig::new(vip(1))
        },
    )
}

proptest! {
    #[test]
    fn what_an_earlier_agent_was_told_of_a_vip_is_read_from_the_maps(policy in any_policy()) {
        let mut bench = Bench::new(4, 16);
        bench.config.vip = vec![policy];
        bench.plan(vip(1), &[1, 2]);
        // This agent is told nothing, or not yet.
        bench.config.vip = Vec::new();
        bench.restart();
        let policies = Policies::new(&bench.config);
        let default = policies.policy_of(&vip(2));
        bench.adopted = bench.planner.policies(default, TICKS_PER_SECOND);
        prop_assert_eq!(bench.plan(vip(1), &[1, 2]).ops, vec![]);
    }
}

#[test]
fn a_mode_takes_the_backends_it_can_reach() {
    let v6: SocketAddr = "[2001:db8::1]:8080".parse().unwrap();
    let other_port = SocketAddr::new(address(2).ip(), 9);
    for (forwarding, wanted) in [
        (Forwarding::Nat, vec![Refusal::AddressFamily]),
        (Forwarding::Dnat, vec![Refusal::AddressFamily]),
        (
            Forwarding::Dsr,
            vec![
                Refusal::PortDiffers,
                Refusal::NotOnLink,
                Refusal::AddressFamily,
            ],
        ),
        (Forwarding::Ipip, vec![Refusal::PortDiffers]),
        (Forwarding::Gue, vec![Refusal::PortDiffers]),
    ] {
        let mut bench = Bench::new(4, 16).forwarding(forwarding);
        bench.next_hops.insert(v6.ip(), hop(6));
        bench.next_hops.insert(
            address(3).ip(),
            NextHop {
                on_link: false,
                ..hop(3)
            },
        );
        let pool = pool_of([
            backend(1),
            Backend::new(other_port, Origin::Nats),
            backend(3),
            Backend::new(v6, Origin::Nats),
        ]);
        let plan = bench.plan_pool(vip(1), &pool);
        assert_eq!(refusals(&plan), wanted, "{forwarding:?}");
        let served = bench.kernel.serving(vip(1)).len();
        assert_eq!(served, 4 - wanted.len(), "{forwarding:?}");
    }
}

#[test]
fn a_vip_of_many_ports_takes_backends_of_any_port() {
    let mut bench = Bench::new(4, 16).forwarding(Forwarding::Dsr);
    let range: Vip = "tcp/192.0.2.1:8000-8999".parse().unwrap();
    let pool = pool_of([Backend::new(
        SocketAddr::new(address(1).ip(), 9),
        Origin::Nats,
    )]);
    let plan = bench.plan_pool(range, &pool);
    assert_eq!(plan.refused, []);
    let to_dialed =
        |op: &MapOp| matches!(op, MapOp::SetBackend { entry, .. } if entry.port_for(8080) == 8080);
    assert!(plan.ops.iter().any(to_dialed), "{plan:?}");
}

#[test]
fn the_narrowest_vip_is_found_first() {
    let mut bench = Bench::new(8, 16);
    let vips = [
        "tcp/192.0.2.1:*",
        "tcp/192.0.2.1:8080",
        "tcp/192.0.2.1:8000-8999",
        "tcp/192.0.2.1:8080-8081",
        "udp/192.0.2.1:8080",
    ];
    for vip in vips {
        bench.plan(vip.parse().unwrap(), &[1]);
    }
    let found = |bench: &Bench, text: &str| {
        let found = bench.kernel.find(text);
        found.map(|(_, entry)| vip_of(&entry).to_string())
    };
    for (dialed, wanted) in [
        ("tcp/192.0.2.1:8080", Some("tcp/192.0.2.1:8080")),
        ("tcp/192.0.2.1:8081", Some("tcp/192.0.2.1:8080-8081")),
        ("tcp/192.0.2.1:8082", Some("tcp/192.0.2.1:8000-8999")),
        ("tcp/192.0.2.1:1", Some("tcp/192.0.2.1:*")),
        ("udp/192.0.2.1:8080", Some("udp/192.0.2.1:8080")),
        ("udp/192.0.2.1:1", None),
    ] {
        assert_eq!(found(&bench, dialed).as_deref(), wanted, "{dialed}");
    }
    bench.restart();
    for vip in vips {
        assert_eq!(bench.plan(vip.parse().unwrap(), &[1]).ops, []);
    }
    bench.plan("tcp/192.0.2.1:8080".parse().unwrap(), &[]);
    bench.now += DRAIN;
    bench.plan("tcp/192.0.2.1:8080".parse().unwrap(), &[]);
    let dialed = found(&bench, "tcp/192.0.2.1:8080");
    assert_eq!(dialed.as_deref(), Some("tcp/192.0.2.1:8080-8081"));
}

#[test]
fn a_chain_that_is_full_takes_no_more() {
    let mut bench = Bench::new(32, 32);
    let range = |last: u32| -> Vip { format!("tcp/192.0.2.1:1-{last}").parse().unwrap() };
    for last in 2..2 + VIP_CHAIN {
        assert_eq!(bench.plan(range(last), &[1]).refused, []);
    }
    let plan = bench.plan(range(100), &[1]);
    assert_eq!(refusals(&plan), [Refusal::ChainFull]);
    assert!(plan.ops.is_empty());
}

#[test]
fn a_backend_of_weight_0_drains_as_long_as_it_is_registered() {
    let mut bench = Bench::new(4, 16);
    bench.plan(vip(1), &[1, 2]);
    let drained = Backend {
        weight: 0,
        ..backend(1)
    };
    bench.plan_pool(vip(1), &pool_of([drained.clone(), backend(2)]));
    assert_eq!(bench.kernel.serving(vip(1)), addresses(&[2]));
    bench.now += DRAIN * 10;
    assert_eq!(bench.planner.due(bench.now), []);
    assert_eq!(bench.kernel.backends.len(), 2);
    bench.unhealthy.insert(address(2));
    bench.plan_pool(vip(1), &pool_of([drained, backend(2)]));
    assert_eq!(
        bench.kernel.serving(vip(1)),
        addresses(&[2]),
        "rather an unhealthy one"
    );
}

#[test]
fn sources_are_listed_before_the_vip_asks_and_go_after() {
    let mut bench = Bench::new(4, 16);
    bench.set_policy(|vip| vip.deny = vec!["198.51.100.0/24".parse().unwrap()]);
    bench.plan(vip(1), &[1]);
    assert_eq!(bench.flags(), vip_flags::DENY_LISTED);
    let listed: Vec<_> = bench.kernel.sources.iter().collect();
    let net = Addr::from(IpAddr::from([198, 51, 100, 0]));
    assert_eq!(listed, [(&([0; 4], net, 120), &SOURCE_DENY)]);
    bench.set_policy(|vip| vip.allow = vec!["198.51.100.0/24".parse().unwrap()]);
    let plan = bench.plan(vip(1), &[1]);
    assert!(
        matches!(
            plan.ops[..],
            [
                MapOp::SetSource {
                    verdict: SOURCE_ALLOW,
                    ..
                },
                MapOp::SetVip { .. }
            ]
        ),
        "{:?}",
        plan.ops
    );
    bench.set_policy(|_| {});
    let plan = bench.plan(vip(1), &[1]);
    assert!(
        matches!(
            plan.ops[..],
            [MapOp::SetVip { .. }, MapOp::RemoveSource { .. }]
        ),
        "{:?}",
        plan.ops
    );
}

#[test]
fn a_vip_that_goes_takes_its_sources_along() {
    let mut bench = Bench::new(4, 16);
    bench.set_policy(|vip| vip.deny = vec!["198.51.100.0/24".parse().unwrap()]);
    bench.plan(vip(1), &[1]);
    bench.plan(vip(1), &[]);
    bench.now += DRAIN;
    bench.plan(vip(1), &[]);
    assert!(bench.kernel.sources.is_empty() && bench.kernel.vips.is_empty());
}

#[test]
fn a_server_id_leads_to_its_backend_until_that_is_cleared() {
    let vip: Vip = "udp/192.0.2.1:8080".parse().unwrap();
    let mut bench = Bench::new(4, 16);
    bench.config.vip = vec![VipConfig {
        forwarding: Some(Forwarding::Gue),
        quic: Some(QuicConfig {
            server_id_octets: 2,
            config: 3,
        }),
        ..VipConfig::new(vip)
    }];
    let plan = bench.plan_pool(
        vip,
        &pool_of([
            with_tag(1, "0a0B"),
            with_tag(2, "0a"),
            with_tag(3, "0a0b"),
            with_tag(4, "x0y0"),
            backend(5),
        ]),
    );
    assert_eq!(
        plan.refused,
        [
            (address(2), Refusal::QuicServerId),
            (address(3), Refusal::QuicServerIdTaken),
            (address(4), Refusal::QuicServerId),
        ]
    );
    let key = members::quic_key(0, [10, 11, 0, 0, 0, 0, 0, 0]);
    assert_eq!(
        bench.kernel.quic_servers,
        HashMap::from([(key, bench.id(1))])
    );
    bench.plan_pool(vip, &pool_of([backend(5)]));
    assert_eq!(bench.kernel.quic_servers.len(), 1, "it drains");
    bench.restart();
    bench.now += DRAIN;
    bench.plan_pool(vip, &pool_of([backend(5)]));
    assert!(bench.kernel.quic_servers.is_empty());
}

#[test]
fn answers_from_backends_pass_while_a_vip_is_in_dnat_mode() {
    let mut bench = Bench::new(4, 16).forwarding(Forwarding::Dnat);
    bench.plan(vip(1), &[1]);
    assert!(bench.kernel.dnat && bench.kernel.prefilter_knows(address(1).ip(), ANSWER));
    assert!(!bench.kernel.prefilter_knows(hop(1).source, ANSWER));
    bench.plan(vip(1), &[]);
    bench.now += DRAIN;
    bench.plan(vip(1), &[]);
    assert!(!bench.kernel.dnat && bench.kernel.prefilter.values().all(|bits| *bits == 0));
}

#[test]
fn flows_of_an_earlier_mode_are_found_until_they_are_over() {
    let mut bench = Bench::new(4, 16).forwarding(Forwarding::Dnat);
    bench.plan(vip(1), &[1]);
    bench.config.forwarding = Forwarding::Ipip;
    bench.plan(vip(1), &[1]);
    assert_eq!(Mode::from_bits(bench.entry().mode), Mode::Ipip);
    assert_eq!(bench.flags(), vip_flags::TRACK);
    assert!(bench.kernel.dnat && bench.kernel.prefilter_knows(address(1).ip(), ANSWER));
    bench.settle(0);
    bench.settle(0);
    assert_eq!(bench.flags(), vip_flags::TRACK, "too early");
    bench.now += bench.config.timeouts.tcp_established;
    bench.settle(0);
    assert_eq!(bench.flags(), 0);
    assert!(!bench.kernel.dnat && !bench.kernel.prefilter_knows(address(1).ip(), ANSWER));
}

#[test]
fn flows_elsewhere_keep_no_earlier_mode_where_the_flow_table_is_asked_anyhow() {
    for (forwarding, scheduler) in [
        (Forwarding::Nat, Schedule::Maglev),
        (Forwarding::Ipip, Schedule::RoundRobin),
    ] {
        let mut bench = Bench::new(4, 16).forwarding(Forwarding::Dnat);
        bench.plan(vip(1), &[1]);
        bench.config.forwarding = forwarding;
        bench.config.scheduler = scheduler;
        bench.plan(vip(1), &[1]);
        bench.now += bench.config.timeouts.tcp_established;
        bench.settle(7);
        assert_eq!(bench.flags(), 0);
        assert!(!bench.kernel.dnat);
    }
}

#[test]
fn flows_that_affinity_placed_are_found_when_it_is_switched_off() {
    let mut bench = Bench::new(4, 16).forwarding(Forwarding::Ipip);
    bench.set_policy(|vip| vip.affinity = Some(Duration::from_secs(60)));
    bench.plan(vip(1), &[1, 2]);
    bench.set_policy(|_| {});
    bench.plan(vip(1), &[1, 2]);
    assert_eq!(bench.entry().affinity, 0);
    assert_eq!(bench.flags(), vip_flags::TRACK);
    bench.now += bench.config.timeouts.tcp_established;
    bench.settle(1);
    bench.settle(1);
    assert_eq!(bench.flags(), vip_flags::TRACK, "some are elsewhere");
    bench.settle(0);
    assert_eq!(bench.flags(), 0);
}

#[test]
fn the_proxys_vip_is_served_without_a_registration() {
    let mut bench = Bench::new(4, 16);
    bench.set_policy(|vip| vip.forwarding = Some(Forwarding::L7));
    bench.plan(vip(1), &[]);
    assert_eq!(Mode::from_bits(bench.entry().mode), Mode::L7);
    bench.restart();
    assert_eq!(bench.plan(vip(1), &[]).ops, []);
    bench.now += DRAIN;
    assert_eq!(bench.planner.due(bench.now), []);
    bench.set_policy(|_| {});
    bench.plan(vip(1), &[]);
    assert!(bench.kernel.vips.is_empty());
}

#[test]
fn a_registered_vip_of_the_proxy_outlives_a_new_agent_until_it_is_claimed() {
    let mut bench = Bench::new(4, 16).forwarding(Forwarding::L7);
    bench.plan(vip(1), &[1]);
    bench.restart();
    assert_eq!(bench.kernel.vips.len(), 1);
    bench.now += DRAIN;
    assert_eq!(bench.planner.due(bench.now), [vip(1)]);
    bench.plan(vip(1), &[]);
    assert!(bench.kernel.vips.is_empty());
}

#[test]
fn a_vip_that_goes_up_to_the_proxy_lets_its_backends_drain() {
    let mut bench = Bench::new(4, 16).forwarding(Forwarding::Ipip);
    bench.plan(vip(1), &[1]);
    bench.config.forwarding = Forwarding::L7;
    bench.plan(vip(1), &[1]);
    let entry = bench.entry();
    assert_eq!((Mode::from_bits(entry.mode), entry.backends), (Mode::L7, 0));
    assert_eq!(entry.flags, vip_flags::TRACK);
    assert_eq!(bench.kernel.backends.len(), 1);
    bench.now += DRAIN;
    bench.plan(vip(1), &[1]);
    assert!(bench.kernel.backends.is_empty());
}

#[test]
fn ipv6_is_served_like_ipv4() {
    let mut bench = Bench::new(4, 16);
    let vip: Vip = "tcp/[2001:db8::10]:80".parse().unwrap();
    let address: SocketAddr = "[2001:db8::1]:8080".parse().unwrap();
    let source = "2001:db8::fe".parse().unwrap();
    bench
        .next_hops
        .insert(address.ip(), NextHop { source, ..hop(1) });
    let pool = pool_of([Backend::new(address, Origin::Nats)]);
    assert_eq!(bench.plan_pool(vip, &pool).refused, []);
    assert_eq!(bench.kernel.serving(vip), BTreeSet::from([address]));
    assert!(bench.kernel.prefilter_knows(source, ANSWER));
}

#[test]
fn the_proxy_takes_no_udp() {
    let vip: Vip = "udp/192.0.2.1:8080".parse().unwrap();
    let mut bench = Bench::new(4, 16).forwarding(Forwarding::Ipip);
    bench.plan(vip, &[1]);
    bench.config.forwarding = Forwarding::L7;
    assert_eq!(refusals(&bench.plan(vip, &[1])), [Refusal::NotTcp]);
    bench.now += DRAIN;
    bench.plan(vip, &[1]);
    assert!(bench.kernel.vips.is_empty() && bench.kernel.backends.is_empty());
    assert_eq!(refusals(&bench.plan(vip, &[1])), [Refusal::NotTcp]);
}

/// Gives a VIP one of some policies that differ in all that is written beside backends.
fn policy(vip: Vip, which: u8) -> VipConfig {
    let mut policy = VipConfig::new(vip);
    match which {
        0 => policy.forwarding = Some(Forwarding::Nat),
        1 => policy.forwarding = Some(Forwarding::Dnat),
        2 => {
            policy.forwarding = Some(Forwarding::Ipip);
            policy.deny = vec!["198.51.100.0/24".parse().unwrap()];
        }
        3 => {
            policy.forwarding = Some(Forwarding::Gue);
            policy.scheduler = Some(Schedule::RoundRobin);
            policy.allow = vec!["198.51.0.0/16".parse().unwrap()];
        }
        4 => {
            policy.forwarding = Some(Forwarding::Dsr);
            policy.affinity = Some(Duration::from_secs(60));
            policy.quic = Some(QuicConfig {
                server_id_octets: 1,
                config: 0,
            });
        }
        _ => policy.forwarding = Some(Forwarding::L7),
    }
    policy
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn whatever_the_policies_an_agent_may_end_between_any_two_operations(
        steps in prop::collection::vec(
            (0usize..3, 0u8..6, prop::collection::btree_set(1u8..6, 0..4), 0u64..80), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let vips: [Vip; 3] = [
            "tcp/192.0.2.1:8080",
            "tcp/192.0.2.1:8080-8081",
            "tcp/192.0.2.1:*",
        ]
        .map(|vip| vip.parse().unwrap());
        let mut bench = Bench::new(3, 32);
        let mut ops = Vec::new();
        let mut pools: Map<Vip, Pool> = Map::new();
        let kernel = bench.kernel.clone();
        for (which, kind, hosts, seconds) in steps {
            bench.now += Duration::from_secs(seconds);
            let vip = vips[which];
            bench.config.vip.retain(|policy| policy.address != vip);
            bench.config.vip.push(policy(vip, kind));
            let tagged = |host: u8| with_tag(host, &format!("{host:02x}"));
            pools.insert(vip, pool_of(hosts.into_iter().map(tagged)));
            for vip in bench.planner.due(bench.now).into_iter().chain([vip]) {
                ops.extend(bench.plan_pool(vip, &pools[&vip]).ops);
            }
        }
        bench.kernel = kernel;
        for op in &ops[..cut.index(ops.len() + 1)] {
            bench.kernel.apply(op);
        }
        bench.restart();
        for (vip, pool) in &pools {
            prop_assert_eq!(bench.plan_pool(*vip, pool).refused, vec![]);
            let entry = bench.kernel.entry(*vip);
            let policies = Policies::new(&bench.config);
            if let Some((_, entry)) = entry {
                prop_assert_eq!(entry.mode, policies.policy_of(vip).mode as u8);
            }
        }
        let second = bench.kernel.vips.clone();
        for (vip, pool) in &pools {
            prop_assert_eq!(bench.plan_pool(*vip, pool).ops, vec![]);
        }
        prop_assert_eq!(second, bench.kernel.vips.clone());
        // Without registrations and policies nothing is left.
        bench.config.vip.clear();
        for vip in vips {
            bench.plan(vip, &[]);
        }
        bench.now += DRAIN;
        for vip in bench.planner.due(bench.now) {
            bench.plan(vip, &[]);
        }
        let Kernel { backends, vips, heads, addresses, sources, quic_servers, dnat, .. } = bench.kernel;
        prop_assert!(backends.is_empty() && vips.is_empty() && heads.is_empty());
        prop_assert!(addresses.is_empty() && sources.is_empty() && quic_servers.is_empty());
        prop_assert!(!dnat && bench.kernel.prefilter.values().all(|bits| *bits == 0));
    }
}
