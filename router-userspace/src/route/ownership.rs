//! Who may register which hosts and VIPs: the rules of `[guard]`, asked once by every way in.
//!
//! A rule names hosts and VIPs and who may register them. The most specific rule that covers a host or
//! VIP decides; what none covers is decided by the default. A wildcard, or a VIP of several ports, also
//! needs the leave of every rule that it reaches into, for it would serve what those have no route of.
//! Pure. A question costs a lookup for each label of a host, or for each length of prefix.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context as _, anyhow, bail, ensure};
use ipnet::IpNet;

use crate::config::PortRange;
use crate::route::declared::Announcement;
use crate::route::{HttpMatch, Origin, Proto, RouteKey, Vip, wire};

/// Hosts and VIPs that rules name, in all.
pub const MAX_PATTERNS: usize = 65_536;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claimant<'a> {
    /// A source; of NATS those who publish to the subject that all may use.
    Source(Origin),
    /// A subject of NATS of its own.
    Subject(&'a str),
    /// Somebody of a source, of whom no more is known: of NATS, anyone.
    AnyOf(Origin),
}

/// Who may register what a rule names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    pub sources: BTreeSet<Origin>,
    pub subjects: BTreeSet<Arc<str>>,
}

/// What a rule names of HTTP: `example.com`, or with `*.` before it every name below.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostPattern {
    below: bool,
    /// Without `*.`.
    name: Arc<str>,
}

/// What a rule names of layer 4: a prefix of addresses with all their ports, or one VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VipPattern {
    net: IpNet,
    /// `None`: of both protocols.
    proto: Option<Proto>,
    ports: PortRange,
}

/// One `[[guard.owner]]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    pub hosts: Vec<HostPattern>,
    pub vips: Vec<VipPattern>,
    pub owner: Owner,
}

/// Why a route is refused: the label of the counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ground {
    /// `guard.reserved_hosts` names the host, or a wildcard would serve one of them.
    Reserved,
    /// A rule gives it to others.
    Owned,
    /// No rule covers it, and `guard.default` refuses that.
    Unowned,
}

/// A route that is not the claimant's to register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub ground: Ground,
    route: RouteKey,
    /// Where the rule stands in the configuration, and what it names.
    rule: String,
}

/// All rules, as they are asked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ownership {
    reserved: Hosts,
    owned: Hosts,
    vips: Vips,
    owners: Vec<Owner>,
    refuse_unowned: bool,
}

/// Rules by the names that hosts end in.
type Hosts = HashMap<Arc<str>, Name>;

/// What rules say of a name.
#[derive(Clone, Debug, Default, PartialEq)]
struct Name {
    exact: Option<RuleId>,
    /// Of all names below it.
    below: Option<RuleId>,
    /// Rules of some of the names below it, without repetition.
    within: BTreeSet<RuleId>,
}

/// Rules by the lengths of prefixes that some have, the longest first.
type Vips = BTreeMap<std::cmp::Reverse<u8>, HashMap<IpNet, Vec<(VipPattern, RuleId)>>>;

const UNOWNED: &str = "guard.default refuses what no guard.owner names";

/// The position of a rule.
type RuleId = u32;

impl Ownership {
    /// # Errors
    /// Names the rule: one host or VIP has one rule.
    pub fn new(
        reserved: &[HostPattern],
        rules: &[Rule],
        refuse_unowned: bool,
    ) -> anyhow::Result<Ownership> {
        let patterns = rules.iter().map(|rule| rule.hosts.len() + rule.vips.len());
        ensure!(
            reserved.len() + patterns.sum::<usize>() <= MAX_PATTERNS,
            "guard: more than {MAX_PATTERNS} hosts and VIPs in all"
        );
        let mut ownership = Ownership {
            owners: rules.iter().map(|rule| rule.owner.clone()).collect(),
            refuse_unowned,
            ..Ownership::default()
        };
        for (at, host) in reserved.iter().enumerate() {
            let id = u32::try_from(at).expect("MAX_PATTERNS fits");
            // One that is reserved twice is reserved.
            add_host(&mut ownership.reserved, host, id);
        }
        for (at, rule) in rules.iter().enumerate() {
            let id = u32::try_from(at).expect("rules of a file fit");
            for host in &rule.hosts {
                ensure!(
                    add_host(&mut ownership.owned, host, id).is_none(),
                    "guard.owner[{at}].hosts: {host} stands twice"
                );
            }
            for vip in &rule.vips {
                ensure!(
                    ownership.add_vip(*vip, id),
                    "guard.owner[{at}].vips: {vip} stands twice"
                );
            }
        }
        Ok(ownership)
    }

    /// Whether rules name subjects, so that others than the one all may use have to be listened to.
    pub fn names_subjects(&self) -> bool {
        self.owners.iter().any(|owner| !owner.subjects.is_empty())
    }

    /// # Errors
    /// The first of the routes that is not the claimant's to register.
    pub fn check(&self, claimant: Claimant<'_>, routes: &[RouteKey]) -> Result<(), Refusal> {
        if self.is_open() {
            return Ok(());
        }
        routes.iter().try_for_each(|route| match route {
            RouteKey::Http(http) => self.check_host(claimant, http),
            RouteKey::Vip(vip) => self.check_vip(claimant, *vip),
        })
    }

    /// The same of all that a key or file of a source says.
    ///
    /// # Errors
    /// The first of the routes that is not the source's to register or to declare.
    pub fn check_announced(&self, origin: Origin, said: &Announcement) -> Result<(), Refusal> {
        let claimant = Claimant::Source(origin);
        if self.is_open() {
            return Ok(());
        }
        let mut before: &[RouteKey] = &[];
        for registration in &said.registrations {
            // Those of every backend of a route are the same.
            if registration.routes != before {
                self.check(claimant, &registration.routes)?;
                before = &registration.routes;
            }
        }
        let mut declarations = said.declarations.iter();
        declarations.try_for_each(|declaration| self.check_host(claimant, &declaration.route))
    }

    /// Whether what a source announced before may stay under these rules, as far as the source tells.
    pub fn keeps(&self, origin: Origin, route: &RouteKey) -> bool {
        let route = std::slice::from_ref(route);
        self.check(Claimant::AnyOf(origin), route).is_ok()
    }

    /// Whether everything is everyone's.
    fn is_open(&self) -> bool {
        let has_rules = !self.reserved.is_empty() || !self.owners.is_empty();
        !has_rules && !self.refuse_unowned
    }

    fn check_host(&self, claimant: Claimant<'_>, http: &HttpMatch) -> Result<(), Refusal> {
        let refusal = |ground, rule| Refusal {
            ground,
            route: RouteKey::Http(http.clone()),
            rule,
        };
        let host = &*http.host;
        let (covering, mut within) = find(&self.reserved, host);
        if covering.or_else(|| within.next()).is_some() {
            let rule = "guard.reserved_hosts keeps it from everyone".to_owned();
            return Err(refusal(Ground::Reserved, rule));
        }
        let (covering, mut within) = find(&self.owned, host);
        if covering.is_none() && self.refuse_unowned {
            return Err(refusal(Ground::Unowned, UNOWNED.to_owned()));
        }
        match covering
            .into_iter()
            .chain(&mut within)
            .find(|id| !self.admits(*id, claimant))
        {
            Some(id) => Err(refusal(Ground::Owned, self.rule(id))),
            None => Ok(()),
        }
    }

    fn check_vip(&self, claimant: Claimant<'_>, vip: Vip) -> Result<(), Refusal> {
        let refusal = |ground, rule| Refusal {
            ground,
            route: RouteKey::Vip(vip),
            rule,
        };
        let touching = self.touching(vip);
        let covers = |(pattern, _): &&(VipPattern, RuleId)| pattern.covers(vip);
        // The longest prefix first; of one address, one protocol before both, then the fewest ports.
        let covering = touching
            .iter()
            .filter(covers)
            .min_by_key(|(pattern, _)| pattern.breadth());
        if covering.is_none() && self.refuse_unowned {
            return Err(refusal(Ground::Unowned, UNOWNED.to_owned()));
        }
        let within = touching.iter().filter(|rule| !covers(rule));
        let mut asked = covering.into_iter().chain(within);
        match asked.find(|(_, id)| !self.admits(*id, claimant)) {
            Some((_, id)) => Err(refusal(Ground::Owned, self.rule(*id))),
            None => Ok(()),
        }
    }

    /// Rules that have a port of the VIP.
    fn touching(&self, vip: Vip) -> Vec<(VipPattern, RuleId)> {
        let of_length = |(length, rules): (&std::cmp::Reverse<u8>, _)| {
            let net = IpNet::new(vip.address, length.0).ok()?;
            let rules: &HashMap<IpNet, Vec<(VipPattern, RuleId)>> = rules;
            rules.get(&net.trunc())
        };
        let rules = self.vips.iter().filter_map(of_length).flatten();
        let touching = rules.filter(|(pattern, _)| pattern.touches(vip));
        touching.copied().collect()
    }

    fn admits(&self, id: RuleId, claimant: Claimant<'_>) -> bool {
        self.owners[id as usize].admits(claimant)
    }

    fn rule(&self, id: RuleId) -> String {
        let Owner { sources, subjects } = &self.owners[id as usize];
        let sources = sources.iter().map(|source| source.as_str());
        let owners: Vec<&str> = sources.chain(subjects.iter().map(|s| &**s)).collect();
        format!("guard.owner[{id}] gives it to {}", owners.join(", "))
    }

    fn add_vip(&mut self, pattern: VipPattern, id: RuleId) -> bool {
        let length = std::cmp::Reverse(pattern.net.prefix_len());
        let rules = self.vips.entry(length).or_default();
        let rules = rules.entry(pattern.net).or_default();
        let is_new = rules.iter().all(|(known, _)| *known != pattern);
        rules.push((pattern, id));
        is_new
    }
}

impl Owner {
    fn admits(&self, claimant: Claimant<'_>) -> bool {
        match claimant {
            Claimant::Source(origin) => self.sources.contains(&origin),
            Claimant::Subject(subject) => self.subjects.contains(subject),
            Claimant::AnyOf(Origin::Adopted) => true,
            Claimant::AnyOf(Origin::Nats) => {
                self.sources.contains(&Origin::Nats) || !self.subjects.is_empty()
            }
            Claimant::AnyOf(origin) => self.sources.contains(&origin),
        }
    }
}

/// The rule that there was of the same pattern.
fn add_host(hosts: &mut Hosts, pattern: &HostPattern, id: RuleId) -> Option<RuleId> {
    for above in names_above(&pattern.name) {
        hosts.entry(above.into()).or_default().within.insert(id);
    }
    let name = hosts.entry(Arc::clone(&pattern.name)).or_default();
    match pattern.below {
        true => name.below.replace(id),
        false => name.exact.replace(id),
    }
}

/// The most specific rule that covers a host, and those that a wildcard reaches into.
fn find<'h>(hosts: &'h Hosts, host: &str) -> (Option<RuleId>, impl Iterator<Item = RuleId> + 'h) {
    let wildcard = host.strip_prefix("*.");
    let name = hosts.get(wildcard.unwrap_or(host));
    let own = name.and_then(|name| match wildcard {
        Some(_) => name.below,
        None => name.exact,
    });
    let covering = own.or_else(|| {
        let mut above = names_above(wildcard.unwrap_or(host));
        above.find_map(|above| hosts.get(above)?.below)
    });
    let within = name.filter(|_| wildcard.is_some());
    let within = within
        .into_iter()
        .flat_map(|name| name.within.iter().copied());
    (covering, within)
}

/// `b.c` and `c` of `a.b.c`.
fn names_above(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices('.').map(|(at, _)| &name[at + 1..])
}

impl Ground {
    pub const ALL: [Ground; 3] = [Ground::Reserved, Ground::Owned, Ground::Unowned];

    pub fn as_str(self) -> &'static str {
        match self {
            Ground::Reserved => "reserved_host",
            Ground::Owned => "owner",
            Ground::Unowned => "no_owner",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let field = match self.route {
            RouteKey::Http(_) => "uris",
            RouteKey::Vip(_) => "vips",
        };
        let Refusal { route, rule, .. } = self;
        write!(f, "{field}: {route} is not to be registered here: {rule}")
    }
}

impl std::error::Error for Refusal {}

impl VipPattern {
    fn covers(self, vip: Vip) -> bool {
        self.proto.is_none_or(|proto| proto == vip.proto)
            && self.net.contains(&vip.address)
            && self.ports.first <= vip.ports.first
            && vip.ports.last <= self.ports.last
    }

    /// Whether they have a port of one address in common.
    fn touches(self, vip: Vip) -> bool {
        self.proto.is_none_or(|proto| proto == vip.proto)
            && self.net.contains(&vip.address)
            && self.ports.first <= vip.ports.last
            && vip.ports.first <= self.ports.last
    }

    /// The less the more specific, among patterns that cover the same VIP.
    fn breadth(self) -> (std::cmp::Reverse<u8>, bool, u16) {
        let ports = self.ports.last - self.ports.first;
        let length = std::cmp::Reverse(self.net.prefix_len());
        (length, self.proto.is_none(), ports)
    }
}

impl FromStr for HostPattern {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<HostPattern> {
        let host = wire::parse_uri(text).map_err(|why| anyhow!("{text:?}: {why}"))?;
        if !host.path.is_empty() || text.contains(['/', '?']) {
            bail!("{text:?}: a host has no path");
        }
        let below = host.host.strip_prefix("*.");
        Ok(HostPattern {
            below: below.is_some(),
            name: below.map_or_else(|| Arc::clone(&host.host), Arc::from),
        })
    }
}

impl FromStr for VipPattern {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<VipPattern> {
        if text.starts_with("tcp/") || text.starts_with("udp/") {
            let vip: Vip = text.parse().with_context(|| format!("{text:?}"))?;
            return Ok(VipPattern {
                net: vip.address.into(),
                proto: Some(vip.proto),
                ports: vip.ports,
            });
        }
        let address = text.parse::<IpAddr>().map(IpNet::from);
        let net = address.or_else(|_| text.parse::<IpNet>());
        let net = net.map_err(|_| anyhow!("{text:?}: neither a VIP nor a prefix of addresses"))?;
        Ok(VipPattern {
            net: net.trunc(),
            proto: None,
            ports: PortRange {
                first: 0,
                last: u16::MAX,
            },
        })
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let before = if self.below { "*." } else { "" };
        write!(f, "{before}{}", self.name)
    }
}

impl fmt::Display for VipPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.proto {
            None => self.net.fmt(f),
            Some(proto) => {
                let (address, ports) = (self.net.addr(), self.ports);
                Vip {
                    proto,
                    address,
                    ports,
                }
                .fmt(f)
            }
        }
    }
}

#[cfg(test)]
mod tests;
