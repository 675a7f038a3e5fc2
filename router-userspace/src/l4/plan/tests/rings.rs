//! What slots remember, and for how long.

use super::*;

const LIFETIME: Duration = Duration::from_secs(7200);

fn bench() -> Bench {
    Bench::new(4, 16).forwarding(Forwarding::Ipip)
}

/// What is in the slots, with how many hold it.
fn contents(bench: &Bench) -> BTreeMap<(u32, u32), usize> {
    let mut contents = BTreeMap::new();
    for slot in bench.slots(vip(1)) {
        *contents
            .entry((slot.current(), slot.previous()))
            .or_default() += 1;
    }
    contents
}

fn pairs(bench: &Bench) -> Vec<(u32, u32)> {
    contents(bench).into_keys().collect()
}

#[test]
fn a_new_ring_is_quiet() {
    let mut bench = bench();
    bench.plan(vip(1), &[1, 2]);
    assert_eq!(pairs(&bench), [(1, 0), (2, 0)]);
}

#[test]
fn a_slot_remembers_the_backend_it_was_quiet_with() {
    let mut bench = bench();
    bench.plan(vip(1), &[1]);
    bench.plan(vip(1), &[2]);
    assert_eq!(pairs(&bench), [(2, 1)]);
    bench.plan(vip(1), &[3]);
    assert_eq!(pairs(&bench), [(3, 1)], "not the one in between");
    bench.plan(vip(1), &[1]);
    assert_eq!(
        pairs(&bench),
        [(1, 1)],
        "flows made meanwhile are elsewhere"
    );
}

#[test]
fn only_slots_that_change_remember() {
    let mut bench = bench();
    bench.plan(vip(1), &[1, 2, 3]);
    let before: Vec<RingSlot> = bench.slots(vip(1)).to_vec();
    bench.plan(vip(1), &[1, 2]);
    for (old, new) in before.iter().zip(bench.slots(vip(1))) {
        match old.current() == new.current() {
            true => assert_eq!(old, new),
            false => assert_eq!(new.previous(), old.current()),
        }
    }
}

#[test]
fn a_slot_forgets_a_backend_that_is_cleared() {
    let mut bench = bench();
    bench.plan(vip(1), &[1]);
    bench.plan(vip(1), &[2]);
    bench.now += DRAIN;
    bench.plan(vip(1), &[2]);
    assert_eq!(pairs(&bench), [(2, RingSlot::NOBODY)]);
    assert_eq!(bench.kernel.backends.len(), 1);
}

#[test]
fn a_slot_forgets_when_older_flows_are_over_and_is_quiet_when_none_is_elsewhere() {
    let mut bench = bench();
    bench.config.drain = LIFETIME * 2;
    bench.plan(vip(1), &[1]);
    bench.plan(vip(1), &[2]);
    bench.settle(0);
    bench.settle(0);
    assert_eq!(pairs(&bench), [(2, 1)], "too early");
    bench.now += LIFETIME;
    bench.settle(1);
    assert_eq!(pairs(&bench), [(2, RingSlot::NOBODY)]);
    bench.settle(0);
    assert_eq!(pairs(&bench), [(2, 0)]);
    assert_eq!(bench.settle(0), 0);
}

#[test]
fn slots_forget_each_in_its_own_time() {
    let mut bench = bench();
    bench.config.drain = LIFETIME * 4;
    bench.plan(vip(1), &[1, 2]);
    bench.plan(vip(1), &[2]);
    bench.now += LIFETIME / 2;
    bench.plan(vip(1), &[3]);
    assert_eq!(pairs(&bench), [(3, 1), (3, 2)]);
    bench.now += LIFETIME / 2;
    bench.settle(1);
    assert_eq!(pairs(&bench), [(3, 2), (3, RingSlot::NOBODY)]);
    bench.now += LIFETIME / 2;
    bench.settle(1);
    assert_eq!(pairs(&bench), [(3, RingSlot::NOBODY)]);
}

#[test]
fn a_slot_that_was_quiet_in_between_remembers_for_the_whole_time_again() {
    let mut bench = bench();
    bench.plan(vip(1), &[1]);
    bench.plan(vip(1), &[2]);
    bench.now += DRAIN;
    bench.plan(vip(1), &[2]);
    bench.settle(0);
    bench.settle(0);
    assert_eq!(pairs(&bench), [(2, 0)]);
    bench.config.drain = LIFETIME * 2;
    bench.plan(vip(1), &[3]);
    bench.now += LIFETIME - DRAIN;
    bench.settle(0);
    assert_eq!(pairs(&bench), [(bench.id(3), 2)]);
}

#[test]
fn what_a_sweep_found_does_not_hold_for_a_ring_that_changed_since() {
    let mut bench = bench();
    bench.plan(vip(1), &[1]);
    bench.plan(vip(1), &[2]);
    bench.now += DRAIN;
    bench.plan(vip(1), &[2]);
    bench.settle(1);
    bench.plan(vip(1), &[3]);
    bench.settle(0);
    assert_eq!(pairs(&bench), [(bench.id(3), RingSlot::NOBODY)]);
    bench.settle(0);
    assert_eq!(pairs(&bench), [(bench.id(3), 0)]);
}

#[test]
fn a_ring_without_backends_keeps_where_its_flows_are() {
    let mut bench = bench();
    bench.plan(vip(1), &[1]);
    bench.plan(vip(1), &[]);
    assert_eq!(bench.kernel.entry(vip(1)).unwrap().1.backends, 0);
    assert_eq!(pairs(&bench), [(1, 1)]);
    bench.plan(vip(1), &[2]);
    assert_eq!(pairs(&bench), [(2, 1)]);
}

#[test]
fn a_drain_does_not_end_early_while_flows_may_be_in_the_ring_alone() {
    let mut bench = bench();
    bench.plan(vip(1), &[1]);
    bench.plan(vip(1), &[2]);
    bench.planner.end_drains(bench.now, |_| true);
    assert_eq!(bench.planner.due(bench.now), []);
}

#[test]
fn rings_of_modes_and_schedulers_that_ask_the_flow_table_remember_nobody() {
    for (forwarding, scheduler) in [
        (Forwarding::Nat, Schedule::Maglev),
        (Forwarding::Dnat, Schedule::SourceHash),
        (Forwarding::Gue, Schedule::RoundRobin),
        (Forwarding::Dsr, Schedule::LeastConnections),
    ] {
        let mut bench = Bench::new(4, 16).forwarding(forwarding);
        bench.config.scheduler = scheduler;
        bench.plan(vip(1), &[1]);
        bench.plan(vip(1), &[2]);
        assert_eq!(pairs(&bench), [(2, 0)], "{forwarding:?} {scheduler:?}");
    }
}

#[test]
fn turns_fill_the_ring_and_their_number_is_said() {
    let mut bench = bench();
    bench.config.scheduler = Schedule::RoundRobin;
    let heavy = Backend {
        weight: 200,
        ..backend(1)
    };
    bench.plan_pool(vip(1), &pool_of([heavy, backend(2)]));
    let (_, entry) = bench.kernel.entry(vip(1)).unwrap();
    assert_eq!((entry.ring_len, entry.backends), (3, 2));
    let slots = bench.slots(vip(1));
    assert_eq!(slots[..3], slots[3..6]);
}

#[test]
fn two_gateways_that_heard_in_another_order_have_the_same_ring() {
    let (mut one, mut other) = (bench(), bench());
    one.plan(vip(1), &[1, 2, 3, 4]);
    for hosts in [&[4][..], &[2, 4], &[1, 2, 4], &[1, 2, 3, 4]] {
        other.plan(vip(1), hosts);
    }
    let serving = |bench: &Bench| -> Vec<SocketAddr> {
        let address = |slot: &RingSlot| bench.kernel.backends[&slot.current()].address.ip();
        let slots = bench.slots(vip(1)).iter();
        slots
            .map(|slot| SocketAddr::new(address(slot), 0))
            .collect()
    };
    assert_eq!(serving(&one), serving(&other));
}

#[test]
fn a_backend_that_joins_others_gets_its_share_in_steps() {
    let mut bench = bench();
    bench.config.slow_start = Duration::from_secs(100);
    bench.plan(vip(1), &[1]);
    bench.plan(vip(1), &[1, 2]);
    let share = |bench: &Bench| {
        let id = bench.id(2);
        let slots = bench.slots(vip(1)).iter();
        slots.filter(|slot| slot.current() == id).count()
    };
    let mut shares = vec![share(&bench)];
    for _ in 0..9 {
        assert_eq!(bench.planner.due(bench.now), []);
        bench.now += Duration::from_secs(10);
        assert_eq!(bench.planner.due(bench.now), [vip(1)]);
        bench.plan(vip(1), &[1, 2]);
        shares.push(share(&bench));
    }
    assert!(
        shares.is_sorted() && shares[0] <= RING_SIZE / 11 + 1,
        "{shares:?}"
    );
    assert!(shares[9].abs_diff(RING_SIZE / 2) <= 1, "{shares:?}");
    bench.now += Duration::from_secs(1000);
    assert_eq!(bench.planner.due(bench.now), []);
}

#[test]
fn the_first_backend_of_a_pool_gets_all_at_once() {
    let mut bench = bench();
    bench.config.slow_start = Duration::from_secs(100);
    bench.plan(vip(1), &[1, 2]);
    bench.now += Duration::from_secs(50);
    assert_eq!(bench.planner.due(bench.now), []);
}

#[test]
fn a_new_agent_remembers_what_the_slots_do() {
    let mut bench = bench();
    bench.config.drain = LIFETIME * 4;
    bench.plan(vip(1), &[1]);
    bench.plan(vip(1), &[2]);
    bench.restart();
    bench.plan(vip(1), &[2]);
    assert_eq!(pairs(&bench), [(2, 1)]);
    bench.now += LIFETIME;
    bench.settle(0);
    bench.settle(0);
    assert_eq!(pairs(&bench), [(2, 0)]);
}
