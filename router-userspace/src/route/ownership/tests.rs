use proptest::prelude::*;

use super::*;

fn rule(hosts: &[&str], vips: &[&str], sources: &[Origin], subjects: &[&str]) -> Rule {
    Rule {
        hosts: hosts.iter().map(|host| host.parse().unwrap()).collect(),
        vips: vips.iter().map(|vip| vip.parse().unwrap()).collect(),
        owner: Owner {
            sources: sources.iter().copied().collect(),
            subjects: subjects.iter().map(|subject| (*subject).into()).collect(),
        },
    }
}

fn route(text: &str) -> RouteKey {
    match text.parse() {
        Ok(vip) => RouteKey::Vip(vip),
        Err(_) => RouteKey::Http(wire::parse_uri(text).unwrap()),
    }
}

fn reserved(hosts: &[&str]) -> Vec<HostPattern> {
    hosts.iter().map(|host| host.parse().unwrap()).collect()
}

const NATS: Claimant<'_> = Claimant::Source(Origin::Nats);
const FILE: Claimant<'_> = Claimant::Source(Origin::File);
const SHOP: Claimant<'_> = Claimant::Subject("router.register.shop");

#[test]
fn the_most_specific_rule_decides() {
    let rules = [
        rule(&["*.x", "x"], &["192.0.2.0/24"], &[Origin::File], &[]),
        rule(
            &["*.shop.x", "shop.x"],
            &["192.0.2.16/28", "tcp/192.0.2.1:443"],
            &[],
            &["router.register.shop"],
        ),
        rule(&["a.shop.x"], &["udp/192.0.2.16:53"], &[Origin::Nats], &[]),
    ];
    let ownership = Ownership::new(&[], &rules, false).unwrap();
    for (text, owner) in [
        ("x", FILE),
        ("b.x/path", FILE),
        ("shop.x", SHOP),
        ("pay.eu.shop.x", SHOP),
        ("a.shop.x", NATS),
        ("b.a.shop.x", SHOP),
        ("myshop.x", FILE),
        ("tcp/192.0.2.1:80", FILE),
        ("tcp/192.0.2.1:443", SHOP),
        ("udp/192.0.2.1:443", FILE),
        ("tcp/192.0.2.16:53", SHOP),
        ("udp/192.0.2.16:53", NATS),
    ] {
        for claimant in [NATS, FILE, SHOP] {
            let allowed = ownership.check(claimant, &[route(text)]).is_ok();
            assert_eq!(allowed, claimant == owner, "{text} by {claimant:?}");
        }
        assert_eq!(ownership.keeps(Origin::Nats, &route(text)), owner != FILE);
        assert!(ownership.keeps(Origin::Adopted, &route(text)));
    }
    for open in ["y", "x.y", "tcp/198.51.100.1:80"] {
        assert_eq!(ownership.check(SHOP, &[route(open)]), Ok(()));
    }
    let told = ownership.check(NATS, &[route("y"), route("pay.shop.x")]);
    assert_eq!(
        told.unwrap_err().to_string(),
        "uris: pay.shop.x is not to be registered here: guard.owner[1] gives it to \
         router.register.shop"
    );
}

#[test]
fn a_wildcard_and_a_range_need_the_leave_of_all_they_reach_into() {
    let both = rule(
        &["*.x"],
        &["192.0.2.0/24"],
        &[Origin::File, Origin::Nats],
        &[],
    );
    let one = rule(
        &["pay.shop.x"],
        &["tcp/192.0.2.1:443"],
        &[Origin::File],
        &[],
    );
    let ownership = Ownership::new(&[], &[both, one], false).unwrap();
    for text in [
        "*.x",
        "*.shop.x",
        "tcp/192.0.2.1:*",
        "tcp/192.0.2.1:440-450",
    ] {
        assert_eq!(ownership.check(FILE, &[route(text)]), Ok(()), "{text}");
        let refusal = ownership.check(NATS, &[route(text)]).unwrap_err();
        assert_eq!(refusal.ground, Ground::Owned, "{text}");
        assert!(refusal.to_string().contains("guard.owner[1]"), "{refusal}");
    }
    for text in [
        "*.pay.shop.x",
        "*.y.x",
        "tcp/192.0.2.1:1-442",
        "udp/192.0.2.1:*",
    ] {
        assert_eq!(ownership.check(NATS, &[route(text)]), Ok(()), "{text}");
    }
}

#[test]
fn a_reserved_host_is_nobodys() {
    let rules = [rule(&["login.x"], &[], &[Origin::File], &[])];
    let hosts = reserved(&["login.x", "*.admin.x"]);
    let ownership = Ownership::new(&hosts, &rules, false).unwrap();
    for text in [
        "login.x",
        "login.x/p",
        "*.x",
        "a.admin.x",
        "b.a.admin.x",
        "*.admin.x",
    ] {
        let refusal = ownership.check(FILE, &[route(text)]).unwrap_err();
        assert_eq!(refusal.ground, Ground::Reserved, "{text}");
        assert!(!ownership.keeps(Origin::Adopted, &route(text)));
    }
    for text in ["admin.x", "a.login.x", "*.login.x", "x", "tcp/192.0.2.1:80"] {
        assert_eq!(ownership.check(NATS, &[route(text)]), Ok(()), "{text}");
    }
}

#[test]
fn what_no_rule_covers_can_be_refused() {
    let rules = [rule(&["*.x"], &["192.0.2.1"], &[Origin::Nats], &[])];
    let ownership = Ownership::new(&[], &rules, true).unwrap();
    for text in ["x", "a.y", "*.y", "tcp/192.0.2.2:80"] {
        let refusal = ownership.check(NATS, &[route(text)]).unwrap_err();
        assert_eq!(refusal.ground, Ground::Unowned, "{text}");
    }
    assert_eq!(ownership.check(NATS, &[route("a.x")]), Ok(()));
}

#[test]
fn one_host_or_vip_has_one_rule() {
    for (hosts, vips, told) in [
        (
            &["a.x", "A.x."][..],
            &[][..],
            "guard.owner[0].hosts: a.x stands twice",
        ),
        (
            &[],
            &["192.0.2.1", "192.0.2.1/32"],
            "guard.owner[0].vips: 192.0.2.1/32 stands",
        ),
    ] {
        let rules = [rule(hosts, vips, &[Origin::Nats], &[])];
        let error = Ownership::new(&[], &rules, false).unwrap_err().to_string();
        assert!(error.starts_with(told), "{error}");
    }
    for bad in ["a.x/p", "", "a..x", "*", "a.*.x"] {
        assert!(bad.parse::<HostPattern>().is_err(), "{bad}");
    }
    for bad in ["tcp/192.0.2.1", "192.0.2.1:80", "192.0.2.0/33", "host"] {
        assert!(bad.parse::<VipPattern>().is_err(), "{bad}");
    }
}

/// Whether every host of `a` that a request can have is one of `b`, or some are.
fn overlap(a: &str, b: &str) -> (bool, bool) {
    let below = |host: &str, of: &str| of.strip_prefix('*').is_some_and(|of| host.ends_with(of));
    let covered = match (a.strip_prefix('*'), b.strip_prefix('*')) {
        (Some(a), Some(b)) => a.ends_with(b),
        (None, Some(_)) => below(a, b),
        (_, None) => a == b,
    };
    let reached = match (a.strip_prefix('*'), b.strip_prefix('*')) {
        (Some(of_a), Some(of_b)) => of_b.ends_with(of_a),
        (Some(_), None) => below(b, a),
        (None, _) => false,
    };
    (covered, reached)
}

fn host() -> impl Strategy<Value = String> {
    let labels = prop::collection::vec(prop::sample::select(vec!["a", "b", "ab"]), 1..4);
    (any::<bool>(), labels).prop_map(|(wildcard, labels)| {
        let before = if wildcard { "*." } else { "" };
        before.to_owned() + &labels.join(".")
    })
}

proptest! {
    /// Beside a search of all rules for the longest that covers and for those that are reached into.
    #[test]
    fn it_answers_as_a_search_of_every_rule_does(
        patterns in prop::collection::btree_map(host(), any::<bool>(), 0..12),
        asked in prop::collection::vec(host(), 1..20),
        refuse in any::<bool>(),
    ) {
        let rules: Vec<Rule> = patterns
            .iter()
            .map(|(host, of_file)| {
                let source = if *of_file { Origin::File } else { Origin::Nats };
                rule(&[host], &[], &[source], &[])
            })
            .collect();
        let ownership = Ownership::new(&[], &rules, refuse).unwrap();
        for host in &asked {
            let covering = patterns.iter().filter(|(pattern, _)| overlap(host, pattern).0);
            // Of those that cover a host, the longer name is the narrower; the host itself comes first.
            let decides = covering.max_by_key(|(pattern, _)| {
                let name = pattern.strip_prefix("*.");
                (name.is_none(), name.map_or(pattern.len(), str::len))
            });
            let mut reached = patterns
                .iter()
                .filter(|(pattern, _)| overlap(host, pattern) == (false, true));
            let wanted = decides.map_or(!refuse, |(_, of_file)| *of_file)
                && reached.all(|(_, of_file)| *of_file);
            let route = route(host);
            prop_assert_eq!(ownership.check(FILE, &[route]).is_ok(), wanted, "{}", host);
        }
    }

    /// Port by port: a VIP may be registered if each of its ports may, where rules of one address do
    /// not straddle.
    #[test]
    fn a_vip_of_several_ports_may_be_registered_if_each_of_its_ports_may(
        owned in prop::collection::btree_map(1_u16..40, any::<bool>(), 0..8),
        whole in prop::option::of(any::<bool>()),
        first in 1_u16..40,
        count in 0_u16..10,
    ) {
        let source = |of_file: bool| if of_file { Origin::File } else { Origin::Nats };
        let mut rules: Vec<Rule> = owned
            .iter()
            .map(|(port, of_file)| rule(&[], &[&format!("tcp/192.0.2.1:{port}")], &[source(*of_file)], &[]))
            .collect();
        if let Some(of_file) = whole {
            rules.push(rule(&[], &["192.0.2.0/28"], &[source(of_file)], &[]));
        }
        let ownership = Ownership::new(&[], &rules, false).unwrap();
        let last = first + count;
        let vip = format!("tcp/192.0.2.1:{first}-{last}");
        let single = |port: u16| owned.get(&port).copied().or(whole).unwrap_or(true);
        // What covers the range itself is asked too, if every one of its ports has a rule of its own.
        let of_range = first == last || whole.unwrap_or(true);
        let wanted = (first..=last).all(single) && of_range;
        prop_assert_eq!(ownership.check(FILE, &[route(&vip)]).is_ok(), wanted);
    }
}
