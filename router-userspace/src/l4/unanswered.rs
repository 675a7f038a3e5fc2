//! Which backends let SYNs go unanswered, as layer 4 sees it.
//!
//! [`L4::unanswered`] compares the kernel's counters with what they were at the last two calls, each
//! about a second apart: SYNs of the earlier second have had one more to be answered in. The health
//! checker judges. Only in `nat` and `dnat` mode do answers pass here: what other modes forward says
//! nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;

use router_common::BackendLoad;

use crate::health::Unanswered;
use crate::l4::L4;

#[derive(Default)]
pub(super) struct Watch {
    /// What was read at the last call and the one before, by backend id with its generation.
    read: HashMap<(u32, u16), [BackendLoad; 2]>,
    /// Reported without an answer, and not with one since.
    suspects: BTreeSet<SocketAddr>,
}

impl L4 {
    /// Backends that got SYNs and answered none, and suspects that answered.
    pub fn unanswered(&mut self) -> Vec<Unanswered> {
        let mut reports: BTreeMap<SocketAddr, Unanswered> = BTreeMap::new();
        let mut read = HashMap::new();
        let mut suspects = BTreeSet::new();
        for (vip, planned) in self.planner.vips() {
            if !self.policies.policy_of(vip).mode.translates() {
                continue;
            }
            for (address, member) in &planned.members {
                let load = match self.datapath.load_of(member.id) {
                    Ok(load) => load,
                    Err(error) => {
                        tracing::error!(backend = %address, "{error:#}");
                        continue;
                    }
                };
                if self.unanswered.suspects.contains(address) {
                    suspects.insert(*address);
                }
                let key = (member.id, member.entry.generation);
                // The first look at a backend is where counting begins.
                let [last, earlier] = self.unanswered.read.get(&key).copied().unwrap_or([load; 2]);
                read.insert(key, [load, last]);
                add(&mut reports, *address, [&earlier, &last, &load]);
            }
        }
        self.unanswered = Watch { read, suspects };
        let reports = reports.into_values();
        reports
            .filter(|report| self.unanswered.tells(report))
            .collect()
    }
}

impl Watch {
    /// Whether the checker is to hear of it: that a backend answers which always did is no news.
    fn tells(&mut self, report: &Unanswered) -> bool {
        match report.answered {
            0 if report.syns > 0 => {
                self.suspects.insert(report.backend);
                true
            }
            0 => false,
            _ => self.suspects.remove(&report.backend),
        }
    }
}

/// Adds what a backend did as a member of one VIP to its report, from three readings.
fn add(
    reports: &mut BTreeMap<SocketAddr, Unanswered>,
    backend: SocketAddr,
    [earlier, last, now]: [&BackendLoad; 3],
) {
    let report = reports.entry(backend).or_insert(Unanswered {
        backend,
        syns: 0,
        answered: 0,
    });
    report.syns += last.opened.saturating_sub(earlier.opened);
    report.answered += now.answered.saturating_sub(earlier.answered);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(opened: u64, answered: u64) -> BackendLoad {
        BackendLoad {
            flows: 0,
            opened,
            answered,
        }
    }

    fn backend() -> SocketAddr {
        "10.0.0.11:80".parse().unwrap()
    }

    fn report(readings: &[[(u64, u64); 3]]) -> Unanswered {
        let mut reports = BTreeMap::new();
        for readings in readings {
            let [earlier, last, now] = readings.map(|(opened, answered)| load(opened, answered));
            add(&mut reports, backend(), [&earlier, &last, &now]);
        }
        reports.into_values().next().unwrap()
    }

    #[test]
    fn syns_have_a_second_to_be_answered_in() {
        let just_sent = report(&[[(10, 10), (10, 10), (13, 10)]]);
        assert_eq!((just_sent.syns, just_sent.answered), (0, 0));
        let unanswered = report(&[[(10, 10), (13, 10), (20, 10)]]);
        assert_eq!((unanswered.syns, unanswered.answered), (3, 0));
        let answered_late = report(&[[(10, 10), (13, 10), (13, 12)]]);
        assert_eq!((answered_late.syns, answered_late.answered), (3, 2));
    }

    #[test]
    fn a_backend_is_reported_once_with_what_it_did_for_all_its_vips() {
        let of_both = report(&[[(0, 0), (2, 0), (2, 0)], [(7, 7), (8, 8), (8, 8)]]);
        assert_eq!((of_both.syns, of_both.answered), (3, 1));
    }

    #[test]
    fn counters_that_began_anew_say_nothing() {
        let anew = report(&[[(10, 9), (0, 0), (0, 0)]]);
        assert_eq!((anew.syns, anew.answered), (0, 0));
    }

    #[test]
    fn answers_are_news_only_of_a_suspect() {
        let mut watch = Watch::default();
        let of = |syns, answered| Unanswered {
            backend: backend(),
            syns,
            answered,
        };
        assert!(!watch.tells(&of(5, 5)) && !watch.tells(&of(0, 0)));
        assert!(watch.tells(&of(5, 0)) && watch.tells(&of(1, 0)));
        assert!(watch.tells(&of(0, 1)));
        assert!(!watch.tells(&of(5, 5)));
    }
}
