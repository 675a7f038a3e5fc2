//! Whether a load balancer in front should send traffic here. Pure.
//!
//! The gateway becomes ready when it has a reason to believe that it knows the routes: its routes
//! files were read, NATS was reached, and instances had the start-up grace to announce themselves. If
//! NATS stays away, it is ready after the grace all the same if it serves anything, from files or
//! adopted from before the restart; with nothing to serve, another gateway answers better. It stays
//! ready when NATS is lost later: routes stay as they are, and all gateways of a site lose NATS
//! together. The loss is told as `degraded`, and so is a routes file that was refused. The bucket of
//! declared state is judged in the same way; where the server has no JetStream, it is not.

use std::time::Duration;

use serde::Serialize;

use crate::route::Origin;
use crate::source::kv::status::State as KvState;
use crate::source::status::{State, Status};

/// The facts readiness depends on.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    pub draining: bool,
    pub nats_configured: bool,
    pub nats_connected: bool,
    /// Since the first connect; `None` before it.
    pub nats_known_for: Option<Duration>,
    /// Routes files that were not looked at yet.
    pub files_unread: usize,
    /// Routes files whose latest reading was refused.
    pub files_refused: usize,
    pub kv: KvState,
    pub has_routes: bool,
    pub uptime: Duration,
    /// `nats.startup_grace`.
    pub grace: Duration,
    /// Sources that follow another server, and are configured.
    pub followed: Vec<(Origin, Status)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Readiness {
    pub ready: bool,
    /// Why it is not ready.
    pub waiting: Vec<String>,
    /// What is wrong although it is ready.
    pub degraded: Vec<String>,
}

pub fn judge(sources: &Sources) -> Readiness {
    let mut waiting = Vec::new();
    let mut degraded = Vec::new();
    if sources.draining {
        waiting.push("draining".to_owned());
    }
    if sources.files_unread > 0 {
        waiting.push("file: not read yet".to_owned());
    }
    if sources.files_refused > 0 {
        degraded.push("file: refused".to_owned());
    }
    let serves_without = sources.has_routes && sources.uptime >= sources.grace;
    if sources.nats_configured {
        match sources.nats_known_for {
            None if serves_without => degraded.push("nats: disconnected".to_owned()),
            None => waiting.push("nats: not connected yet".to_owned()),
            Some(known_for) => {
                if known_for < sources.grace {
                    waiting.push("nats: routes are being collected".to_owned());
                }
                if !sources.nats_connected {
                    degraded.push("nats: disconnected".to_owned());
                }
            }
        }
    }
    match sources.kv {
        KvState::Unread if serves_without => {
            degraded.push("kv: not read".to_owned());
        }
        KvState::Unread => waiting.push("kv: not read yet".to_owned()),
        KvState::Lost => degraded.push("kv: not followed".to_owned()),
        KvState::Off | KvState::Followed => {}
    }
    for (origin, status) in &sources.followed {
        let origin = origin.as_str();
        if status.age().is_none() && !serves_without {
            waiting.push(format!("{origin}: not read yet"));
        } else if status.state != State::Connected || status.age().is_none() {
            degraded.push(format!("{origin}: disconnected"));
        }
    }
    Readiness {
        ready: waiting.is_empty(),
        waiting,
        degraded,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::status::Statuses;

    #[track_caller]
    fn check(sources: Sources, waiting: &[&str], degraded: &[&str]) {
        let readiness = judge(&sources);
        assert_eq!(readiness.ready, waiting.is_empty());
        assert_eq!(readiness.waiting, waiting);
        assert_eq!(readiness.degraded, degraded);
    }

    const GRACE: Duration = Duration::from_secs(20);

    #[test]
    fn it_waits_for_the_first_connect_and_a_grace_and_bears_the_loss_of_a_later_one() {
        let fresh = Sources {
            nats_configured: true,
            grace: GRACE,
            ..Sources::default()
        };
        check(Sources::default(), &[], &[]);
        check(fresh.clone(), &["nats: not connected yet"], &[]);
        let connected = Sources {
            nats_connected: true,
            nats_known_for: Some(Duration::ZERO),
            ..fresh
        };
        check(
            connected.clone(),
            &["nats: routes are being collected"],
            &[],
        );
        check(
            Sources {
                grace: Duration::ZERO,
                ..connected.clone()
            },
            &[],
            &[],
        );
        let settled = Sources {
            nats_known_for: Some(GRACE),
            ..connected
        };
        check(settled.clone(), &[], &[]);
        let lost = Sources {
            nats_connected: false,
            ..settled.clone()
        };
        check(lost, &[], &["nats: disconnected"]);
        let draining = Sources {
            draining: true,
            ..settled
        };
        check(draining, &["draining"], &[]);
    }

    #[test]
    fn without_nats_it_serves_what_it_has_after_the_grace() {
        let late = Sources {
            nats_configured: true,
            grace: GRACE,
            uptime: GRACE,
            ..Sources::default()
        };
        check(late.clone(), &["nats: not connected yet"], &[]);
        let serving = Sources {
            has_routes: true,
            ..late
        };
        check(serving, &[], &["nats: disconnected"]);
    }

    #[test]
    fn the_bucket_is_waited_for_and_its_loss_is_told() {
        let unread = Sources {
            kv: KvState::Unread,
            grace: GRACE,
            uptime: GRACE,
            ..Sources::default()
        };
        check(unread.clone(), &["kv: not read yet"], &[]);
        let serving = Sources {
            has_routes: true,
            ..unread
        };
        check(serving.clone(), &[], &["kv: not read"]);
        let with = |kv| Sources {
            kv,
            ..serving.clone()
        };
        check(with(KvState::Followed), &[], &[]);
        check(with(KvState::Off), &[], &[]);
        check(with(KvState::Lost), &[], &["kv: not followed"]);
    }

    #[test]
    fn files_are_waited_for_and_a_refused_one_is_told() {
        let unread = Sources {
            files_unread: 1,
            ..Sources::default()
        };
        check(unread, &["file: not read yet"], &[]);
        let refused = Sources {
            files_refused: 1,
            ..Sources::default()
        };
        check(refused, &[], &["file: refused"]);
    }
    #[test]
    fn a_server_is_waited_for_until_it_was_read_and_its_loss_is_told() {
        let statuses = Statuses::default();
        statuses.configure(Origin::Redis, true);
        let judged = |has_routes, waiting: &[&str], degraded: &[&str]| {
            let sources = Sources {
                followed: statuses.list(),
                has_routes,
                ..Sources::default()
            };
            check(sources, waiting, degraded);
        };
        judged(false, &["redis: not read yet"], &[]);
        judged(true, &[], &["redis: disconnected"]);
        statuses.connected(Origin::Redis);
        judged(false, &["redis: not read yet"], &[]);
        statuses.whole(Origin::Redis, true);
        judged(false, &[], &[]);
        statuses.lost(Origin::Redis, "gone");
        judged(false, &[], &["redis: disconnected"]);
    }
}
