//! How each source that follows a server is doing: `/v1/stats`, the metrics, and `/readyz`.
//!
//! Sources write it when they gain or lose their server and when they have read all that is there;
//! the admin API reads it. Routes of a source whose server is away stay, so what counts is how old
//! they may be.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::route::Origin;

/// Of each source; one that is not configured has none.
#[derive(Debug, Default)]
pub struct Statuses(Mutex<[Option<Status>; Origin::ALL.len()]>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub state: State,
    /// When the state began.
    pub since: Instant,
    /// Of the latest attempt, while there is no connection.
    pub error: Option<String>,
    /// When all that the server has was known.
    whole: Option<Instant>,
    /// Whether the server tells every change from then on.
    follows: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// There was no connection yet.
    Connecting,
    Connected,
    Lost,
}

impl Statuses {
    /// A source begins to look for its server, or is switched off.
    pub fn configure(&self, origin: Origin, on: bool) {
        let slot = &mut self.lock()[origin as usize];
        match on {
            true => {
                slot.get_or_insert_with(Status::new);
            }
            false => *slot = None,
        }
    }

    pub fn connected(&self, origin: Origin) {
        self.change(origin, |status, now| {
            if status.state != State::Connected {
                status.since = now;
            }
            status.state = State::Connected;
            status.error = None;
        });
    }

    /// All that the server has was read; `follows`: and it tells every change.
    pub fn whole(&self, origin: Origin, follows: bool) {
        self.change(origin, |status, now| {
            status.whole = Some(now);
            status.follows = follows;
        });
    }

    /// The connection, or an attempt at one, ended.
    pub fn lost(&self, origin: Origin, error: &str) {
        self.change(origin, |status, now| {
            if status.state == State::Connected {
                status.state = State::Lost;
                status.since = now;
            }
            if std::mem::take(&mut status.follows) {
                status.whole = Some(now);
            }
            status.error = Some(error.to_owned());
        });
    }

    pub fn get(&self, origin: Origin) -> Option<Status> {
        self.lock()[origin as usize].clone()
    }

    /// Of the sources that are configured.
    pub fn list(&self) -> Vec<(Origin, Status)> {
        let statuses = self.lock();
        let of = |origin: Origin| Some((origin, statuses[origin as usize].clone()?));
        Origin::ALL.into_iter().filter_map(of).collect()
    }

    fn change(&self, origin: Origin, change: impl FnOnce(&mut Status, Instant)) {
        let slot = &mut self.lock()[origin as usize];
        change(slot.get_or_insert_with(Status::new), Instant::now());
    }

    fn lock(&self) -> MutexGuard<'_, [Option<Status>; Origin::ALL.len()]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Status {
    fn new() -> Status {
        Status {
            state: State::Connecting,
            since: Instant::now(),
            error: None,
            whole: None,
            follows: false,
        }
    }

    /// How long ago the routes were those of the server for sure; `None`: never.
    pub fn age(&self) -> Option<Duration> {
        match self.follows {
            true => Some(Duration::ZERO),
            false => self.whole.map(|whole| whole.elapsed()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_age_from_the_moment_at_which_their_server_is_lost() {
        let statuses = Statuses::default();
        statuses.configure(Origin::Redis, true);
        let state = || {
            let status = statuses.get(Origin::Redis).unwrap();
            (status.state, status.error.clone(), status.age())
        };
        assert_eq!(state(), (State::Connecting, None, None));
        statuses.lost(Origin::Redis, "refused");
        assert_eq!(
            state(),
            (State::Connecting, Some("refused".to_owned()), None)
        );
        statuses.connected(Origin::Redis);
        assert_eq!(state(), (State::Connected, None, None));
        statuses.whole(Origin::Redis, true);
        assert_eq!(state(), (State::Connected, None, Some(Duration::ZERO)));
        statuses.lost(Origin::Redis, "gone");
        let (lost, error, age) = state();
        assert_eq!((lost, error.as_deref()), (State::Lost, Some("gone")));
        assert!(age.unwrap() < Duration::from_secs(10));
        assert_eq!(statuses.list().len(), 1);
        statuses.configure(Origin::Redis, false);
        assert_eq!(statuses.list(), []);
    }
}
