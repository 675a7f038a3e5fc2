use proptest::prelude::*;

use super::*;

#[track_caller]
fn check(probes: &str, wanted: &str) {
    let mut state = State::default();
    let seen: String = probes
        .chars()
        .map(|probe| {
            state.observe(probe == '+', 2, 3);
            if state.healthy() { 'H' } else { 'D' }
        })
        .collect();
    assert_eq!(seen, wanted, "{probes}");
}

#[test]
fn it_flips_after_enough_in_a_row() {
    check("---", "HHD");
    check("--+--+---", "HHHHHHHHD");
    check("---+-++", "HHDDDDH");
    check("---++--+---", "HHDDHHHHHHD");
    check("+++", "HHH");
}

#[test]
fn a_check_vouches_only_while_it_is_good() {
    let mut state = State::default();
    assert!(!state.vouches(), "nobody has asked yet");
    for (good, vouches) in [
        (true, true),
        (false, false),
        (true, true),
        (false, false),
        (false, false),
        (true, false),
        (true, true),
    ] {
        state.observe(good, 2, 2);
        assert_eq!(state.vouches(), vouches);
    }
}

proptest! {
    #[test]
    fn a_flip_needs_as_many_in_a_row_as_configured(
        probes in prop::collection::vec(any::<bool>(), 0..64),
        rise in 1u32..5,
        fall in 1u32..5,
    ) {
        let mut state = State::default();
        // The naive way: look back over all of them after each.
        let mut healthy = true;
        for end in 1..=probes.len() {
            state.observe(probes[end - 1], rise, fall);
            let seen = &probes[..end];
            let run = seen.iter().rev().take_while(|good| **good == seen[end - 1]).count() as u32;
            match seen[end - 1] {
                true if run >= rise => healthy = true,
                false if run >= fall => healthy = false,
                _ => {}
            }
            prop_assert_eq!(state.healthy(), healthy);
        }
    }

    #[test]
    fn panic_is_where_the_share_of_the_healthy_is_below_the_threshold(
        members in prop::collection::vec(any::<bool>(), 0..40),
        threshold in 0u8..=100,
    ) {
        let address = |at: usize| SocketAddr::from(([10, 0, 0, 1], at as u16 + 1));
        let down: imbl::HashSet<SocketAddr> = (0..members.len())
            .filter(|at| !members[*at])
            .map(address)
            .collect();
        let healthy = members.iter().filter(|healthy| **healthy).count();
        let wanted = !members.is_empty()
            && (healthy == 0
                || (healthy as f64 / members.len() as f64) < f64::from(threshold) / 100.0);
        // Shares such as 7 of 25 are not exact in binary.
        let exact = healthy * 100 != members.len() * usize::from(threshold);
        let panic = in_panic((0..members.len()).map(address), &down, threshold);
        prop_assert!(panic == wanted || !exact);
    }
}

#[test]
fn a_pool_panics_below_the_threshold_and_when_all_are_down() {
    let address = |at: u16| SocketAddr::from(([10, 0, 0, 1], at));
    let check = |down: u16, all: u16, threshold: u8| {
        let unhealthy = (1..=down).map(address).collect();
        in_panic((1..=all).map(address), &unhealthy, threshold)
    };
    assert!(
        !check(3, 4, 0),
        "by default the last healthy one carries on"
    );
    assert!(check(4, 4, 0));
    assert!(!check(2, 4, 50), "exactly the threshold will do");
    assert!(check(3, 4, 50));
    assert!(check(1, 4, 100));
    assert!(!check(0, 4, 100));
    assert!(!check(4, 0, 50), "there is nobody to use");
}

fn report(syns: u64, answered: u64) -> Unanswered {
    Unanswered {
        backend: SocketAddr::from(([10, 0, 0, 1], 80)),
        syns,
        answered,
    }
}

/// Until when a backend is out that was left alone from `now` on.
fn seconds_out(state: Passive, now: Instant) -> u64 {
    match state {
        Passive::Out { until, .. } => (until - now).as_secs(),
        Passive::Trusted | Passive::Trial { .. } => 0,
    }
}

#[test]
fn each_time_out_is_twice_as_long_up_to_five_minutes() {
    let mut now = Instant::now();
    let mut state = Passive::default();
    let mut times = Vec::new();
    for _ in 0..9 {
        state = state.observe(report(5, 0), false, now);
        assert!(state.is_out());
        times.push(seconds_out(state, now));
        let again = state.observe(report(5, 0), false, now);
        assert_eq!(again, state, "what is out is not judged");
        now += Duration::from_secs(seconds_out(state, now));
        assert!(state.at(now - Duration::from_millis(1)).is_out());
        state = state.at(now);
        assert!(matches!(state, Passive::Trial { .. }), "{state:?}");
    }
    assert_eq!(times, [5, 10, 20, 40, 80, 160, 300, 300, 300]);
    let quiet = now + MAX_BACKOFF;
    assert_eq!(state.at(quiet - Duration::from_millis(1)), state);
    assert_eq!(state.at(quiet), Passive::Trusted);
}

#[test]
fn any_answer_and_a_good_check_clear_a_backend() {
    let now = Instant::now();
    let out = Passive::Trusted.observe(report(5, 0), false, now);
    let trial = out.at(now + FIRST_BACKOFF);
    for state in [Passive::Trusted, out, trial] {
        let after = |report, vouched| state.observe(report, vouched, now);
        assert_eq!(after(report(500, 1), false), Passive::Trusted);
        assert_eq!(after(report(500, 0), true), Passive::Trusted);
        assert_eq!(after(report(MIN_UNANSWERED - 1, 0), false), state);
    }
    assert!(
        trial
            .observe(report(MIN_UNANSWERED, 0), false, now)
            .is_out()
    );
}
