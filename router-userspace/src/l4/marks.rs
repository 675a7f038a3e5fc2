//! Which marks lead health checks to which backends.
//!
//! A backend of a VIP whose mode is one way serves under the VIP's address; a check of it is sent to the
//! VIP, with a mark that the datapath takes for the backend's id. [`super::L4`] tells of each VIP it
//! planned; the checker reads what is published.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use router_common::{Mode, PROBE_MARK};

use crate::health::{Marks, Tunnels};
use crate::l4::plan::PlannedVip;
use crate::route::{Proto, Vip};

/// Backend and VIP, as the checker dials it, with the mark.
type Mark = ((SocketAddr, SocketAddr), u32);

/// The marks of all VIPs.
pub(super) struct CheckMarks {
    by_vip: HashMap<Vip, Vec<Mark>>,
    marks: Marks,
    tunnels: Tunnels,
}

impl CheckMarks {
    pub(super) fn new(tunnels: Tunnels) -> CheckMarks {
        CheckMarks {
            by_vip: HashMap::new(),
            marks: Marks::new(),
            tunnels,
        }
    }

    /// Takes in who serves a VIP; `None`: nobody does any more.
    pub(super) fn set(&mut self, vip: Vip, mode: Mode, planned: Option<&PlannedVip>) {
        let marks = planned.map_or_else(Vec::new, |planned| marks_of(vip, mode, planned));
        let before = match marks.is_empty() {
            true => self.by_vip.remove(&vip).unwrap_or_default(),
            false => self.by_vip.insert(vip, marks.clone()).unwrap_or_default(),
        };
        if before == marks {
            return;
        }
        // Of VIPs that share the port, the last one planned has the mark.
        for (key, mark) in before {
            if self.marks.get(&key) == Some(&mark) {
                self.marks.remove(&key);
            }
        }
        self.marks.extend(marks);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.marks.is_empty()
    }

    /// Tells the checker, unless it knows; where the datapath does not act on marks, of none.
    pub(super) fn publish(&self, acted_on: bool) {
        let marks = match acted_on {
            true => self.marks.clone(),
            false => Marks::new(),
        };
        if !self.tunnels.load().ptr_eq(&marks) {
            self.tunnels.store(Arc::new(marks));
        }
    }
}

/// Every member that did not leave has one, also while it is down: that is to be found out.
fn marks_of(vip: Vip, mode: Mode, planned: &PlannedVip) -> Vec<Mark> {
    if vip.proto != Proto::Tcp || !mode.is_one_way() {
        return Vec::new();
    }
    let members = planned.members.iter();
    let staying = members.filter(|(_, member)| member.drain_until.is_none());
    // In these modes the port that the client dialed is the backend's.
    let within = |address: &SocketAddr| {
        vip.ports.first <= address.port() && address.port() <= vip.ports.last
    };
    let dialed = staying.filter(|(address, _)| within(address));
    let mark = dialed.map(|(address, member)| {
        let vip = SocketAddr::from((vip.address, address.port()));
        ((*address, vip), PROBE_MARK | member.id)
    });
    mark.collect()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::config::{FlowTimeouts, Forwarding, L4Config};
    use crate::l4::next_hop::NextHop;
    use crate::l4::plan::{Planner, World};
    use crate::l4::policy::Policies;
    use crate::route::{Backend, Origin, Pool};

    /// A planner whose VIPs are all forwarded alike, with what it tells the checker.
    struct Gateway {
        planner: Planner,
        policies: Policies,
        now: Instant,
        marks: CheckMarks,
        tunnels: Tunnels,
    }

    impl Gateway {
        fn new(forwarding: Forwarding) -> Gateway {
            let tunnels = Tunnels::default();
            Gateway {
                planner: Planner::new(8, 8, [1; router_common::HASH_WORDS], 31),
                policies: Policies::new(&L4Config {
                    forwarding,
                    ..L4Config::default()
                }),
                now: Instant::now(),
                marks: CheckMarks::new(Arc::clone(&tunnels)),
                tunnels,
            }
        }

        fn plan(&mut self, vip: &str, backends: &[&str]) {
            let vip: Vip = vip.parse().unwrap();
            let backends: Vec<SocketAddr> = backends.iter().map(|b| b.parse().unwrap()).collect();
            let hop = NextHop {
                ifindex: 1,
                source_mac: [2; 6],
                destination_mac: [4; 6],
                source: [10, 0, 0, 254].into(),
                mtu: 1500,
                vlan: 0,
                on_link: true,
            };
            let hops: HashMap<IpAddr, NextHop> = backends.iter().map(|b| (b.ip(), hop)).collect();
            let unhealthy = backends.iter().take(1).copied().collect();
            let world = World {
                now: self.now,
                policies: &self.policies,
                timeouts: &FlowTimeouts::default(),
                ticks_per_second: 1.0,
                next_hops: &hops,
                unhealthy: &unhealthy,
                panic_threshold: 0,
                draining: &imbl::HashSet::new(),
                draining_at: &imbl::HashSet::new(),
            };
            let pool = Pool {
                backends: backends
                    .iter()
                    .map(|b| Arc::new(Backend::new(*b, Origin::Nats)))
                    .collect(),
                ..Pool::default()
            };
            let pool = (!backends.is_empty()).then_some(&pool);
            self.planner.plan(vip, pool, &world);
            let mode = self.policies.policy_of(&vip).mode;
            self.marks.set(vip, mode, self.planner.vips().get(&vip));
            self.marks.publish(true);
        }

        /// Backend, VIP and id of each mark.
        fn published(&self) -> Vec<(String, String, u32)> {
            let marks = self.tunnels.load();
            let published = marks.iter().map(|((backend, vip), mark)| {
                (backend.to_string(), vip.to_string(), mark ^ PROBE_MARK)
            });
            published.collect()
        }
    }

    fn mark(backend: &str, vip: &str, id: u32) -> (String, String, u32) {
        (backend.to_owned(), vip.to_owned(), id)
    }

    #[test]
    fn every_member_of_a_one_way_tcp_vip_has_a_mark_also_while_it_is_down() {
        let pool = ["10.0.0.1:80", "10.0.0.2:80"];
        for forwarding in [Forwarding::Dsr, Forwarding::Ipip, Forwarding::Gue] {
            let mut gateway = Gateway::new(forwarding);
            gateway.plan("tcp/192.0.2.1:80", &pool);
            gateway.plan("udp/192.0.2.1:80", &pool);
            let vip = "192.0.2.1:80";
            let expected = [mark(pool[0], vip, 1), mark(pool[1], vip, 2)];
            assert_eq!(gateway.published(), expected);
            gateway.marks.publish(false);
            assert_eq!(gateway.published(), []);
        }
        for forwarding in [Forwarding::Nat, Forwarding::Dnat] {
            let mut gateway = Gateway::new(forwarding);
            gateway.plan("tcp/192.0.2.1:80", &pool);
            assert_eq!(gateway.published(), []);
        }
    }

    #[test]
    fn a_vip_of_several_ports_is_checked_at_its_backends_port() {
        let mut gateway = Gateway::new(Forwarding::Dsr);
        gateway.plan("tcp/192.0.2.1:80-89", &["10.0.0.1:81", "10.0.0.2:90"]);
        assert_eq!(
            gateway.published(),
            [mark("10.0.0.1:81", "192.0.2.1:81", 1)]
        );
    }

    #[test]
    fn a_mark_is_gone_before_its_id_passes_to_another_backend() {
        let mut gateway = Gateway::new(Forwarding::Dsr);
        gateway.plan("tcp/192.0.2.1:80", &["10.0.0.1:80"]);
        gateway.plan("tcp/192.0.2.1:80", &[]);
        assert_eq!(gateway.published(), []);
        gateway.now += Duration::from_secs(24 * 3600);
        gateway.plan("tcp/192.0.2.1:80", &[]);
        // Ids go round: whoever takes all of them has that one too.
        let ids: Vec<u32> = (1..=8)
            .map(|host| {
                let vip = format!("192.0.2.2:{host}");
                let backend = format!("10.0.0.{host}:{host}");
                gateway.plan(&format!("tcp/{vip}"), &[&backend]);
                let published = gateway.published();
                let found = published.iter().find(|mark| mark.1 == vip);
                found.unwrap().2
            })
            .collect();
        assert!(ids.contains(&1));
        assert_eq!(gateway.published().len(), 8);
    }
}
