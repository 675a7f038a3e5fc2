//! What the records of a file say, one after another.
//!
//! They are read while they are applied: all registrations of a large file at once would take as much
//! memory as the table that comes of them, and leave it in pieces. [`file`](super::file) reads all of
//! them once before, so that nothing of a malformed file is applied.

use std::collections::VecDeque;
use std::sync::Arc;

use super::bytes::Decoder;
use super::file::{DECLARATION, END, HTTP_POOL, VIP_POOL};
use super::{policy, words};
use crate::route::policy::HttpPolicy;
use crate::route::{Backend, Balance, Declaration, Registration, RouteEvent, RouteKey};

/// Declarations first, all of [`Origin::Adopted`](crate::route::Origin::Adopted).
#[derive(Debug, Default)]
pub struct Events {
    content: Vec<u8>,
    /// Where the next record begins.
    at: usize,
    known: Known,
    /// What is left of the last record.
    pending: VecDeque<RouteEvent>,
}

/// What later records refer to.
#[derive(Debug, Default)]
struct Known {
    backends: Vec<Arc<Backend>>,
    policy: Option<Arc<HttpPolicy>>,
}

impl Events {
    /// Of the records that begin at `at` and that [`check`] found to be whole.
    pub fn new(content: Vec<u8>, at: usize) -> Events {
        Events {
            content,
            at,
            ..Events::default()
        }
    }
}

#[cfg(test)]
impl From<Vec<RouteEvent>> for Events {
    fn from(events: Vec<RouteEvent>) -> Events {
        Events {
            content: vec![END],
            pending: events.into(),
            ..Events::default()
        }
    }
}

impl Iterator for Events {
    type Item = RouteEvent;

    fn next(&mut self) -> Option<RouteEvent> {
        while self.pending.is_empty() {
            let mut input = Decoder(&self.content[self.at..]);
            if !record(&mut input, &mut self.known, &mut self.pending)? {
                return None;
            }
            self.at = self.content.len() - input.0.len();
        }
        self.pending.pop_front()
    }
}

/// Reads all records and their end. `None`: they are malformed.
pub fn check(input: &mut Decoder<'_>) -> Option<()> {
    let mut known = Known::default();
    let mut events = VecDeque::new();
    while record(input, &mut known, &mut events)? {
        events.clear();
    }
    Some(())
}

/// Reads a record; whether it was not the end.
fn record(
    input: &mut Decoder<'_>,
    known: &mut Known,
    events: &mut VecDeque<RouteEvent>,
) -> Option<bool> {
    let route = match input.byte()? {
        END => return Some(false),
        DECLARATION => {
            let route = words::http(input)?;
            let policy = policy::policy(input)?;
            // Routes of one declaration share it, and stand together as often as not.
            let policy = match &known.policy {
                Some(last) if **last == policy => Arc::clone(last),
                Some(_) | None => Arc::new(policy),
            };
            known.policy = Some(Arc::clone(&policy));
            events.push_back(RouteEvent::Declare(Declaration { route, policy }));
            return Some(true);
        }
        HTTP_POOL => RouteKey::Http(words::http(input)?),
        VIP_POOL => RouteKey::Vip(words::vip(input)?),
        _ => return None,
    };
    pool(input, route, &mut known.backends, events)?;
    Some(true)
}

/// Reads the registrations that make a pool.
fn pool(
    input: &mut Decoder<'_>,
    route: RouteKey,
    backends: &mut Vec<Arc<Backend>>,
    events: &mut VecDeque<RouteEvent>,
) -> Option<()> {
    let balance: Option<Balance> = input.option(words::balance)?;
    let route_service_url = input.text_option()?;
    let count = input.number()?;
    for _ in 0..count {
        let number: usize = input.small()?;
        if number == backends.len() {
            backends.push(Arc::new(words::backend(input)?));
        }
        events.push_back(RouteEvent::Register(Registration {
            routes: vec![route.clone()],
            backend: Arc::clone(backends.get(number)?),
            stale_after: None,
            balance: balance.clone(),
            route_service_url: route_service_url.clone(),
        }));
    }
    Some(())
}
