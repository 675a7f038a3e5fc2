//! What the loaded program would do with a packet, and why.
//!
//! The admin API asks by [`Event::Explain`](crate::event::Event::Explain), since the program leaves
//! what it saw in a map of the agent's own; [`L4::explain`] runs it on a [`Probe`] and puts names to the
//! numbers that come back. No table is changed.

use std::net::SocketAddr;

use router_common::{Mode, PacketEvent, RingSlot, Scheduler, Verdict};
use serde::Serialize;
use tokio::sync::oneshot;

use crate::l4::L4;
use crate::l4::plan::{PlannedMember, PlannedVip};
use crate::l4::probe::{self, Leaving, Probe};
use crate::l4::stats::{mode_name, scheduler_name};
use crate::route::{Proto, Vip};

/// A question, and where its answer goes.
#[derive(Debug)]
pub struct Question {
    pub probe: Probe,
    pub answer: oneshot::Sender<anyhow::Result<Explanation>>,
}

/// What became of a packet that never was.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// In sentences, in the order in which things happen.
    pub steps: Vec<String>,
    pub vip: Option<VipFound>,
    /// What the ring was last asked; null if it was not.
    pub ring: Option<SlotFound>,
    pub flow_table: TableAnswer,
    /// The state of the flow that was found.
    pub flow_state: Option<&'static str>,
    pub backend: Option<BackendFound>,
    /// The packet as it leaves; null if it does not.
    pub leaves: Option<Leaving>,
    pub verdict: &'static str,
    /// `pass`, `drop`, `transmit` (out by where it came in), `redirect` or `aborted`.
    pub action: &'static str,
}

#[derive(Clone, Debug, Serialize)]
pub struct VipFound {
    pub vip: String,
    pub index: u32,
    pub mode: &'static str,
    pub scheduler: &'static str,
    /// That take new flows.
    pub active_backends: usize,
}

#[derive(Clone, Debug, Serialize)]
pub struct SlotFound {
    pub slot: u32,
    pub current: Option<SocketAddr>,
    /// Where flows of this slot are that are older than its last change.
    pub previous: Option<SocketAddr>,
    /// Whether every flow of the slot is on `current`.
    pub quiet: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TableAnswer {
    NotAsked,
    NotFound,
    Found,
}

#[derive(Clone, Debug, Serialize)]
pub struct BackendFound {
    pub address: SocketAddr,
    pub id: u32,
    pub weight: u16,
    pub draining: bool,
    /// It leaves by this one,
    pub interface: String,
    /// for this address.
    pub mac: String,
    pub mtu: u16,
}

impl L4 {
    /// Runs the program on a packet.
    ///
    /// # Errors
    /// The kernel took no `explain` program, or cannot run it.
    pub fn explain(&mut self, probe: &Probe) -> anyhow::Result<Explanation> {
        let (run, event) = self.datapath.explain(&probe.frame())?;
        let vips = self.planner.vips();
        let mut named = vips.iter();
        let found = named.find(|(_, planned)| event.vip == planned.index() + 1);
        let policy = found.map(|(vip, _)| self.policies.policy_of(vip));
        let scheduler = policy.map_or(Scheduler::default(), |policy| policy.scheduler);
        let member = |id: u32| {
            let members = found.map(|(_, planned)| planned.members.iter());
            members.into_iter().flatten().find(|(_, m)| m.id == id)
        };
        let mode = Mode::from_bits(event.mode);
        let backend = member(event.backend);
        let encapsulated = matches!(mode, Mode::Ipip | Mode::Gue);
        let verdict = Verdict::ALL.get(event.verdict as usize);
        let action = action(run.action);
        let mut explanation = Explanation {
            steps: Vec::new(),
            vip: found.map(|(vip, planned)| vip_found(vip, planned, mode, scheduler)),
            ring: (event.asked_ring != 0).then(|| {
                let address = |id: u32| member(id).map(|(address, _)| *address);
                slot_found(&event, address)
            }),
            flow_table: match (event.asked_table, event.flow_state) {
                (0, _) => TableAnswer::NotAsked,
                (_, 0) => TableAnswer::NotFound,
                _ => TableAnswer::Found,
            },
            flow_state: (event.flow_state != 0)
                .then(|| router_common::FlowState::from_bits(event.flow_state).name()),
            backend: backend.map(|(address, member)| backend_found(*address, member)),
            leaves: backend
                .filter(|_| matches!(action, "transmit" | "redirect"))
                .and_then(|_| probe::read(&run.frame, encapsulated)),
            verdict: verdict.map_or("unknown", |verdict| verdict.name()),
            action,
        };
        explanation.steps = steps(probe, &explanation);
        Ok(explanation)
    }
}

fn vip_found(vip: &Vip, planned: &PlannedVip, mode: Mode, scheduler: Scheduler) -> VipFound {
    let members = planned.members.values();
    VipFound {
        vip: vip.to_string(),
        index: planned.index(),
        mode: mode_name(mode),
        scheduler: scheduler_name(scheduler),
        active_backends: members.filter(|member| member.is_active()).count(),
    }
}

fn slot_found(event: &PacketEvent, address: impl Fn(u32) -> Option<SocketAddr>) -> SlotFound {
    let content: RingSlot = event.slot_content;
    SlotFound {
        slot: event.slot,
        current: address(content.current()),
        previous: address(content.previous()),
        quiet: content.is_quiet(),
    }
}

fn backend_found(address: SocketAddr, member: &PlannedMember) -> BackendFound {
    let entry = &member.entry;
    let name = nix::net::if_::if_indextoname(entry.ifindex);
    BackendFound {
        address,
        id: member.id,
        weight: entry.weight,
        draining: !member.is_active(),
        interface: match name {
            Ok(name) => name.to_string_lossy().into_owned(),
            Err(_) => format!("interface {}", entry.ifindex),
        },
        mac: probe::mac(&entry.destination_mac),
        mtu: entry.mtu,
    }
}

/// Kernel: include/uapi/linux/bpf.h, `enum xdp_action`.
fn action(action: u32) -> &'static str {
    match action {
        1 => "drop",
        2 => "pass",
        3 => "transmit",
        4 => "redirect",
        _ => "aborted",
    }
}

fn steps(probe: &Probe, found: &Explanation) -> Vec<String> {
    let dialed = format!("{}/{}", probe.proto.as_str(), probe.destination);
    let mut steps = Vec::new();
    match &found.vip {
        None if found.verdict == Verdict::NotForUs.name() => {
            let address = probe.destination.ip();
            steps.push(format!("no VIP and no backend's answers have {address}"));
        }
        None => steps.push(format!("no VIP covers {dialed}")),
        Some(vip) => steps.push(format!(
            "{dialed} is of VIP {} (index {}): mode {}, scheduler {}, {} backends take new flows",
            vip.vip, vip.index, vip.mode, vip.scheduler, vip.active_backends
        )),
    }
    if let Some(ring) = &found.ring {
        steps.push(ring_step(ring));
    }
    steps.extend(table_step(probe, found));
    if let Some(backend) = &found.backend {
        steps.push(format!(
            "backend {}{}, by {} to {}, mtu {}",
            backend.address,
            if backend.draining {
                ", which drains"
            } else {
                ""
            },
            backend.interface,
            backend.mac,
            backend.mtu
        ));
    }
    if let Some(leaves) = &found.leaves {
        steps.push(leaving_step(probe, found, leaves));
    }
    steps.push(format!(
        "verdict {}, action {}",
        found.verdict, found.action
    ));
    steps
}

fn ring_step(ring: &SlotFound) -> String {
    let name = |backend: Option<SocketAddr>| match backend {
        Some(address) => address.to_string(),
        None => "nobody".to_owned(),
    };
    let current = name(ring.current);
    match ring.quiet {
        true => format!("ring slot {} names {current}", ring.slot),
        false => format!(
            "ring slot {} names {current}, and for flows older than its last change {}",
            ring.slot,
            name(ring.previous)
        ),
    }
}

fn table_step(probe: &Probe, found: &Explanation) -> Option<String> {
    let vip = found.vip.as_ref()?;
    let opens = probe.proto == Proto::Udp || !probe.established;
    Some(match (found.flow_table, found.flow_state) {
        (TableAnswer::Found, Some(state)) => format!("the flow table has it, {state}"),
        (TableAnswer::NotAsked, _) if vip.mode == mode_name(Mode::L7) => {
            "the proxy on this host serves it".to_owned()
        }
        (TableAnswer::NotAsked, _) if found.backend.is_some() => {
            "the flow table is not asked: the ring alone says where this flow is".to_owned()
        }
        (TableAnswer::NotAsked, _) => return None,
        (TableAnswer::NotFound | TableAnswer::Found, _) if opens => {
            "the flow table has no such flow: it begins".to_owned()
        }
        (TableAnswer::NotFound | TableAnswer::Found, _) => {
            "the flow table has no such flow".to_owned()
        }
    })
}

fn leaving_step(probe: &Probe, found: &Explanation, leaves: &Leaving) -> String {
    if let Some(outer) = &leaves.outer {
        let ports = outer.udp.map(|(source, destination)| {
            format!(" in UDP from port {source} to port {destination}")
        });
        return format!(
            "encapsulated{}: outer header {} -> {}",
            ports.unwrap_or_default(),
            outer.source,
            outer.destination
        );
    }
    if (leaves.source, leaves.destination) == (probe.source, probe.destination) {
        return format!("sent on as it is, to {}", leaves.destination_mac);
    }
    // The program picks a port when there is a flow to pick it for.
    let begins = found.flow_table != TableAnswer::Found && leaves.source != probe.source;
    let source = match begins {
        true => format!("{} with a free port", leaves.source.ip()),
        false => leaves.source.to_string(),
    };
    format!(
        "translated: {} -> {} becomes {source} -> {}",
        probe.source, probe.destination, leaves.destination
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::l4::probe::Outer;

    fn probe() -> Probe {
        Probe {
            proto: Proto::Tcp,
            source: "198.51.100.7:40000".parse().unwrap(),
            destination: "192.0.2.10:443".parse().unwrap(),
            established: false,
        }
    }

    fn explanation(mode: Mode) -> Explanation {
        let backend: SocketAddr = "10.0.0.11:443".parse().unwrap();
        Explanation {
            steps: Vec::new(),
            vip: Some(VipFound {
                vip: "tcp/192.0.2.10:443".to_owned(),
                index: 3,
                mode: mode_name(mode),
                scheduler: "maglev",
                active_backends: 2,
            }),
            ring: Some(SlotFound {
                slot: 77,
                current: Some(backend),
                previous: None,
                quiet: true,
            }),
            flow_table: TableAnswer::NotAsked,
            flow_state: None,
            backend: Some(BackendFound {
                address: backend,
                id: 5,
                weight: 100,
                draining: false,
                interface: "back".to_owned(),
                mac: "02:00:00:00:00:0b".to_owned(),
                mtu: 1500,
            }),
            leaves: probe::read(&probe().frame(), false),
            verdict: "new_flow",
            action: "redirect",
        }
    }

    #[test]
    fn a_flow_by_the_ring_alone_is_told_step_by_step() {
        let mut found = explanation(Mode::Ipip);
        let leaves = found.leaves.as_mut().unwrap();
        leaves.outer = Some(Outer {
            source: "10.0.0.1".parse().unwrap(),
            destination: "10.0.0.11".parse().unwrap(),
            udp: None,
        });
        assert_eq!(
            steps(&probe(), &found),
            [
                "tcp/192.0.2.10:443 is of VIP tcp/192.0.2.10:443 (index 3): mode ipip, scheduler \
                 maglev, 2 backends take new flows",
                "ring slot 77 names 10.0.0.11:443",
                "the flow table is not asked: the ring alone says where this flow is",
                "backend 10.0.0.11:443, by back to 02:00:00:00:00:0b, mtu 1500",
                "encapsulated: outer header 10.0.0.1 -> 10.0.0.11",
                "verdict new_flow, action redirect",
            ]
        );
    }

    #[test]
    fn a_known_flow_is_told_with_its_state_and_port() {
        let mut found = explanation(Mode::Nat);
        found.flow_table = TableAnswer::Found;
        found.flow_state = Some("established");
        let leaves = found.leaves.as_mut().unwrap();
        leaves.source = "10.0.0.1:2000".parse().unwrap();
        leaves.destination = "10.0.0.11:443".parse().unwrap();
        let told = steps(&probe(), &found).join("\n");
        assert!(
            told.contains("the flow table has it, established"),
            "{told}"
        );
        assert!(
            told.contains("becomes 10.0.0.1:2000 -> 10.0.0.11:443"),
            "{told}"
        );
        found.flow_table = TableAnswer::NotFound;
        let told = steps(&probe(), &found).join("\n");
        assert!(told.contains("10.0.0.1 with a free port"), "{told}");
    }

    #[test]
    fn a_packet_for_nobody_is_told_in_two_steps() {
        let found = Explanation {
            vip: None,
            ring: None,
            backend: None,
            leaves: None,
            verdict: "no_such_vip",
            action: "pass",
            ..explanation(Mode::Nat)
        };
        assert_eq!(
            steps(&probe(), &found),
            [
                "no VIP covers tcp/192.0.2.10:443",
                "verdict no_such_vip, action pass",
            ]
        );
    }
}
