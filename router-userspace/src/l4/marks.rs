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
