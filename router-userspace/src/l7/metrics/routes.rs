//! One worker's counters of each route.
//!
//! A route keeps its counters over every change of its pool. When it has left the snapshot and its last
//! request has ended, they are added to those of [`OTHER`], as are from the start those of routes beyond
//! [`MAX_ROUTES`]; so sums over all routes never go back.

use std::collections::HashMap;
use std::sync::Arc;

use crate::l7::metrics::{Traffic, WorkerMetrics};
use crate::route::HttpMatch;

/// Routes with counters of their own, of one worker: 300 bytes each.
pub const MAX_ROUTES: usize = 10_000;

/// What routes are called together that are gone or too many.
pub const OTHER: &str = "(other)";

/// What requests of no route are called.
pub const UNKNOWN: &str = "(unknown)";

#[derive(Debug)]
pub(in crate::l7) struct RouteCounters {
    metrics: Arc<WorkerMetrics>,
    known: HashMap<HttpMatch, Arc<Traffic>>,
    /// Readers do not see them all.
    changed: bool,
    /// At which revision all were looked for, and none was left that is still in use.
    swept: Option<u64>,
}

impl RouteCounters {
    pub(in crate::l7) fn new(metrics: Arc<WorkerMetrics>) -> RouteCounters {
        RouteCounters {
            metrics,
            known: HashMap::new(),
            changed: false,
            swept: None,
        }
    }

    /// Those of a route that is in the snapshot.
    pub(in crate::l7) fn of(&mut self, route: &HttpMatch) -> Arc<Traffic> {
        if let Some(known) = self.known.get(route) {
            return Arc::clone(known);
        }
        if self.known.len() >= MAX_ROUTES {
            return Arc::clone(&self.metrics.other_routes);
        }
        let traffic = Arc::<Traffic>::default();
        self.known.insert(route.clone(), Arc::clone(&traffic));
        self.changed = true;
        traffic
    }

    /// Lets go of routes that have left the snapshot of this revision, and shows readers the others.
    /// Called about once a second.
    pub(in crate::l7) fn sweep(
        &mut self,
        revision: u64,
        is_published: impl Fn(&HttpMatch) -> bool,
    ) {
        let mut gone = Vec::new();
        if self.swept != Some(revision) {
            let mut is_swept = true;
            self.known.retain(|route, traffic| {
                if is_published(route) {
                    return true;
                }
                // One is here and one with the readers; pools have the rest.
                let is_in_use = Arc::strong_count(traffic) > 2;
                is_swept &= !is_in_use;
                if !is_in_use {
                    gone.push(Arc::clone(traffic));
                }
                is_in_use
            });
            self.swept = is_swept.then_some(revision);
        }
        if !std::mem::take(&mut self.changed) && gone.is_empty() {
            return;
        }
        let known = self.known.iter();
        let list = known.map(|(route, traffic)| (route.clone(), Arc::clone(traffic)));
        self.metrics.publish_routes(list.collect(), &gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::l7::metrics::{Outcome, TrafficTotals};

    fn route(name: &str) -> HttpMatch {
        HttpMatch {
            host: name.into(),
            path: "".into(),
            conditions: None,
        }
    }

    fn request(traffic: &Traffic) {
        traffic.begin();
        traffic.end(&Outcome {
            status: Some(http::StatusCode::OK),
            latency: std::time::Duration::ZERO,
            bytes_in: 0,
            bytes_out: 0,
        });
    }

    fn other(metrics: &WorkerMetrics) -> u64 {
        let mut totals = TrafficTotals::default();
        metrics.other_routes.add_to(&mut totals);
        totals.responses[1]
    }

    #[test]
    fn routes_beyond_the_bound_share_their_counters() {
        let metrics = Arc::<WorkerMetrics>::default();
        let mut counters = RouteCounters::new(Arc::clone(&metrics));
        for index in 0..MAX_ROUTES + 2 {
            request(&counters.of(&route(&format!("{index}.com"))));
        }
        assert_eq!(other(&metrics), 2);
        request(&counters.of(&route("0.com")));
        assert_eq!(other(&metrics), 2);
    }

    #[test]
    fn a_route_that_left_is_counted_with_the_others_once_its_last_request_has_ended() {
        let metrics = Arc::<WorkerMetrics>::default();
        let mut counters = RouteCounters::new(Arc::clone(&metrics));
        let in_use = counters.of(&route("a.com"));
        request(&counters.of(&route("b.com")));
        request(&in_use);
        counters.sweep(1, |_| true);
        counters.sweep(2, |_| false);
        assert_eq!((other(&metrics), metrics.routes().len()), (1, 1));
        request(&in_use);
        drop(in_use);
        counters.sweep(2, |_| false);
        assert_eq!((other(&metrics), metrics.routes().len()), (3, 0));
    }

    #[test]
    fn a_route_has_one_set_of_counters_over_changes_of_its_pool() {
        let mut counters = RouteCounters::new(Arc::default());
        let one = counters.of(&route("a.com"));
        counters.sweep(1, |_| true);
        assert!(Arc::ptr_eq(&one, &counters.of(&route("a.com"))));
    }
}
