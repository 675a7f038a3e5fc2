//! Whether a load balancer in front should send traffic here. Pure.
//!
//! The gateway becomes ready when it has a reason to believe that it knows the routes: its routes
//! files were read, and NATS was reached once. If NATS stays away, it is ready after the start-up
//! grace all the same if it serves anything, from files or adopted from before the restart; with
//! nothing to serve, another gateway answers better. It stays ready when NATS is lost later: routes
//! stay as they are, and all gateways of a site lose NATS together. The loss is told as `degraded`.

use std::time::Duration;

use serde::Serialize;

/// The facts readiness depends on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sources {
    pub draining: bool,
    pub nats_configured: bool,
    pub nats_connected: bool,
    pub nats_connects: u64,
    pub files_configured: u64,
    /// Readings so far, good or bad.
    pub files_read: u64,
    pub has_routes: bool,
    pub uptime: Duration,
    /// How long NATS may take after the start.
    pub grace: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Readiness {
    pub ready: bool,
    /// Why it is not ready.
    pub waiting: Vec<&'static str>,
    /// What is wrong although it is ready.
    pub degraded: Vec<&'static str>,
}

pub fn judge(sources: &Sources) -> Readiness {
    let mut waiting = Vec::new();
    let mut degraded = Vec::new();
    if sources.draining {
        waiting.push("draining");
    }
    if sources.files_read < sources.files_configured {
        waiting.push("file: not read yet");
    }
    if sources.nats_configured && !sources.nats_connected {
        let serves_without = sources.has_routes && sources.uptime >= sources.grace;
        if sources.nats_connects > 0 || serves_without {
            degraded.push("nats: disconnected");
        } else {
            waiting.push("nats: not connected yet");
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

    #[track_caller]
    fn check(sources: Sources, waiting: &[&str], degraded: &[&str]) {
        let readiness = judge(&sources);
        assert_eq!(readiness.ready, waiting.is_empty());
        assert_eq!(
            (&readiness.waiting[..], &readiness.degraded[..]),
            (waiting, degraded)
        );
    }

    #[test]
    fn it_waits_for_the_first_connect_and_bears_the_loss_of_a_later_one() {
        let fresh = Sources {
            nats_configured: true,
            ..Sources::default()
        };
        let fresh = Sources {
            grace: Duration::from_secs(20),
            ..fresh
        };
        check(Sources::default(), &[], &[]);
        check(fresh, &["nats: not connected yet"], &[]);
        let connected = Sources {
            nats_connected: true,
            nats_connects: 1,
            ..fresh
        };
        check(connected, &[], &[]);
        check(
            Sources {
                nats_connected: false,
                ..connected
            },
            &[],
            &["nats: disconnected"],
        );
        let late = Sources {
            uptime: fresh.grace,
            ..fresh
        };
        check(late, &["nats: not connected yet"], &[]);
        check(
            Sources {
                has_routes: true,
                ..late
            },
            &[],
            &["nats: disconnected"],
        );
        check(
            Sources {
                files_configured: 1,
                ..connected
            },
            &["file: not read yet"],
            &[],
        );
        check(
            Sources {
                draining: true,
                ..connected
            },
            &["draining"],
            &[],
        );
    }
}
