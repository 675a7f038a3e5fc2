//! What the configuration and sources say of each VIP, ready for the planner. Pure.
//!
//! [`super::L4`] makes [`Policies`] when it starts and at each reload, takes in what sources announce,
//! and plans anew the VIPs whose policy is another. A VIP that the configuration has a policy of is
//! served by that one alone.

use std::collections::HashMap;
use std::time::Duration;

use ipnet::IpNet;
use router_common::{Mode, Scheduler};

use crate::config::{self, Forwarding, L4Config, QuicConfig, Reject, VipConfig};
use crate::route::Vip;

/// How one VIP is served.
#[derive(Clone, Debug, PartialEq)]
pub struct VipPolicy {
    pub mode: Mode,
    pub scheduler: Scheduler,
    /// Drop what no backend can take instead of answering.
    pub silent: bool,
    pub affinity: Option<Duration>,
    pub slow_start: Duration,
    pub drain: Duration,
    pub allow: Vec<IpNet>,
    pub deny: Vec<IpNet>,
    /// New flows a second; 0: no bound.
    pub source_rate: u32,
    pub vip_rate: u32,
    pub challenge: bool,
    pub track: bool,
    pub quic: Option<QuicConfig>,
}

/// The policies of all VIPs.
#[derive(Clone, Debug, PartialEq)]
pub struct Policies {
    default: VipPolicy,
    vips: HashMap<Vip, VipPolicy>,
    /// By sources.
    announced: HashMap<Vip, VipPolicy>,
    /// What was found in the maps of an earlier agent, until sources have spoken.
    adopted: HashMap<Vip, VipPolicy>,
}

impl Policies {
    pub fn new(config: &L4Config) -> Policies {
        let default = VipPolicy {
            mode: mode(config.forwarding),
            scheduler: scheduler(config.scheduler),
            silent: config.reject == Reject::Drop,
            affinity: None,
            slow_start: config.slow_start,
            drain: config.drain,
            allow: Vec::new(),
            deny: Vec::new(),
            source_rate: 0,
            vip_rate: 0,
            challenge: false,
            track: false,
            quic: None,
        };
        let vips = config
            .vip
            .iter()
            .map(|vip| (vip.address, default.with(vip)));
        Policies {
            vips: vips.collect(),
            default,
            announced: HashMap::new(),
            adopted: HashMap::new(),
        }
    }

    /// Those of another configuration, before sources speak again. What was adopted stays.
    pub fn of_config(&self, config: &L4Config) -> Policies {
        Policies {
            adopted: self.adopted.clone(),
            ..Policies::new(config)
        }
    }

    /// Takes over what `read` finds in the maps, given the policy of VIPs that have none of their own.
    pub fn adopt(&mut self, read: impl FnOnce(&VipPolicy) -> HashMap<Vip, VipPolicy>) {
        self.adopted = read(&self.default);
    }

    /// Forgets what was adopted; returns the VIPs that are now served otherwise.
    pub fn forget_adopted(&mut self) -> Vec<Vip> {
        let adopted = std::mem::take(&mut self.adopted);
        let others = adopted.into_iter();
        let others = others.filter(|(vip, policy)| self.policy_of(vip) != policy);
        others.map(|(vip, _)| vip).collect()
    }

    /// Takes in what a source says of a VIP, or that it says nothing any more.
    pub fn announce(&mut self, vip: Vip, policy: Option<&VipConfig>) {
        match policy {
            Some(policy) => self.announced.insert(vip, self.default.with(policy)),
            None => self.announced.remove(&vip),
        };
    }

    pub fn policy_of(&self, vip: &Vip) -> &VipPolicy {
        self.of(vip).unwrap_or(&self.default)
    }

    fn of(&self, vip: &Vip) -> Option<&VipPolicy> {
        let of_source = || self.announced.get(vip).or_else(|| self.adopted.get(vip));
        self.vips.get(vip).or_else(of_source)
    }

    /// Whether a VIP is served without any registration: the proxy on this host needs none.
    pub fn is_declared(&self, vip: &Vip) -> bool {
        let policy = self.of(vip);
        policy.is_some_and(|policy| policy.mode == Mode::L7)
    }

    /// The VIPs that are served without any registration.
    pub fn declared(&self) -> impl Iterator<Item = Vip> {
        let of_sources = self.announced.keys().chain(self.adopted.keys());
        let vips = self.vips.keys().chain(of_sources);
        vips.copied().filter(|vip| self.is_declared(vip))
    }
}

impl VipPolicy {
    fn with(&self, config: &VipConfig) -> VipPolicy {
        VipPolicy {
            mode: config.forwarding.map_or(self.mode, mode),
            scheduler: config.scheduler.map_or(self.scheduler, scheduler),
            silent: config
                .reject
                .map_or(self.silent, |reject| reject == Reject::Drop),
            affinity: config.affinity,
            slow_start: config.slow_start.unwrap_or(self.slow_start),
            drain: config.drain.unwrap_or(self.drain),
            allow: config.allow.clone(),
            deny: config.deny.clone(),
            source_rate: config.source_rate,
            vip_rate: config.vip_rate,
            challenge: config.challenge,
            track: config.track,
            quic: config.quic,
        }
    }

    /// Whether flows that the ring alone can place are in the flow table as well.
    pub fn tracks(&self) -> bool {
        self.track || self.affinity.is_some()
    }
}

fn mode(forwarding: Forwarding) -> Mode {
    match forwarding {
        Forwarding::Nat => Mode::Nat,
        Forwarding::Dnat => Mode::Dnat,
        Forwarding::Dsr => Mode::Dsr,
        Forwarding::Ipip => Mode::Ipip,
        Forwarding::Gue => Mode::Gue,
        Forwarding::L7 => Mode::L7,
    }
}

fn scheduler(scheduler: config::Scheduler) -> Scheduler {
    match scheduler {
        config::Scheduler::Maglev => Scheduler::Maglev,
        config::Scheduler::SourceHash => Scheduler::SourceHash,
        config::Scheduler::RoundRobin => Scheduler::RoundRobin,
        config::Scheduler::LeastConnections => Scheduler::LeastConnections,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_of_a_vip_comes_before_what_sources_say_of_it() {
        let [configured, announced]: [Vip; 2] =
            ["tcp/192.0.2.1:80", "tcp/192.0.2.2:80"].map(|vip| vip.parse().unwrap());
        let with = |vip, forwarding| VipConfig {
            forwarding: Some(forwarding),
            ..VipConfig::new(vip)
        };
        let mut policies = Policies::new(&L4Config {
            vip: vec![with(configured, Forwarding::Dsr)],
            ..L4Config::default()
        });
        for vip in [configured, announced] {
            policies.announce(vip, Some(&with(vip, Forwarding::L7)));
        }
        assert_eq!(policies.policy_of(&configured).mode, Mode::Dsr);
        assert_eq!(policies.policy_of(&announced).mode, Mode::L7);
        let declared: Vec<Vip> = policies.declared().collect();
        assert_eq!(declared, [announced]);
        policies.announce(announced, None);
        assert_eq!(policies.policy_of(&announced).mode, Mode::Nat);
        assert_eq!(policies.declared().count(), 0);
    }

    #[test]
    fn what_was_adopted_holds_until_sources_have_spoken() {
        let [silent, configured, announced]: [Vip; 3] =
            ["tcp/192.0.2.1:80", "tcp/192.0.2.2:80", "tcp/192.0.2.3:80"]
                .map(|vip| vip.parse().unwrap());
        let with = |vip, forwarding| VipConfig {
            forwarding: Some(forwarding),
            ..VipConfig::new(vip)
        };
        let config = L4Config {
            vip: vec![with(configured, Forwarding::Dsr)],
            ..L4Config::default()
        };
        let mut policies = Policies::new(&config);
        policies.adopt(|default| {
            let adopted = VipPolicy {
                mode: Mode::Ipip,
                ..default.clone()
            };
            HashMap::from([silent, configured, announced].map(|vip| (vip, adopted.clone())))
        });
        policies.announce(announced, Some(&with(announced, Forwarding::Gue)));
        let mut policies = {
            let mut reloaded = policies.of_config(&config);
            reloaded.announce(announced, Some(&with(announced, Forwarding::Gue)));
            reloaded
        };
        let modes = |policies: &Policies| {
            [silent, configured, announced].map(|vip| policies.policy_of(&vip).mode)
        };
        assert_eq!(modes(&policies), [Mode::Ipip, Mode::Dsr, Mode::Gue]);
        let mut changed = policies.forget_adopted();
        changed.sort();
        assert_eq!(changed, [silent, configured, announced]);
        assert_eq!(modes(&policies), [Mode::Nat, Mode::Dsr, Mode::Gue]);
        assert_eq!(policies.forget_adopted(), []);
    }
}
