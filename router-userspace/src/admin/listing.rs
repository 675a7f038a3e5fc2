//! Pages of what the snapshot holds.
//!
//! `?limit=` bounds a page, `?after=` is the `next` of the page before. A page is found by a seek in the
//! snapshot's own structures, so it costs what it shows and no index is kept for it; a listing stays
//! meaningful while routes come and go between pages. Backends over all routes are the exception: see
//! [`backends`].

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::Arc;

use router_common::Mode;
use serde::{Deserialize, Serialize};

use crate::admin::policy::{PolicyRow, policy};
use crate::l4::{MemberState, Views, mode_name, scheduler_name};
use crate::route::conditions::Conditions;
use crate::route::{Backend, Balance, HttpMatch, HttpProtocol, Pool, RouteKey, Vip};
use crate::snapshot::{HostRoute, HostRoutes, Hosts, Snapshot};
use crate::source::kv::status::{Declarer, Revisions};

pub mod backends;

#[cfg(test)]
mod tests;

pub const DEFAULT_LIMIT: usize = 1000;
pub const MAX_LIMIT: usize = 10_000;
/// A page ends behind the route or VIP whose pool brings it to this many backends.
const MAX_BACKENDS: usize = 65_536;

#[derive(Clone, Debug, Default, Deserialize)]
pub struct PageRequest {
    pub limit: Option<usize>,
    pub after: Option<String>,
}

/// One page of a listing.
#[derive(Debug, Serialize)]
pub struct Page<R> {
    pub revision: u64,
    pub rows: Vec<R>,
    /// The cursor of the page that follows, if one does.
    pub next: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct RouteRow {
    /// Host and path.
    pub route: String,
    /// What a request must be beside.
    pub conditions: Option<String>,
    /// What is declared of it.
    pub policy: Option<PolicyRow>,
    /// The keys of the bucket that declare something of it.
    pub declared_by: Vec<Declarer>,
    pub balance: Option<&'static str>,
    pub route_service_url: Option<String>,
    /// Whether so few backends are healthy that all are used.
    pub panic: bool,
    pub backends: Vec<MemberRow>,
}

#[derive(Debug, Serialize)]
pub struct VipRow {
    pub vip: String,
    /// The keys of the bucket that declare its policy or backends.
    pub declared_by: Vec<Declarer>,
    /// Whether so few backends are healthy that all are used.
    pub panic: bool,
    /// Absent without layer 4, as what follows from it below.
    pub forwarding: Option<&'static str>,
    pub scheduler: Option<&'static str>,
    pub backends: Vec<VipMemberRow>,
}

/// A backend in the pool of a VIP.
#[derive(Debug, Serialize)]
pub struct VipMemberRow {
    /// `active`, `draining`, `no_next_hop` or `refused`.
    pub state: Option<&'static str>,
    pub refused: Option<String>,
    #[serde(flatten)]
    pub member: MemberRow,
}

/// A backend in the pool of one route.
#[derive(Debug, Serialize)]
pub struct MemberRow {
    pub address: SocketAddr,
    pub weight: u16,
    pub origin: &'static str,
    pub healthy: bool,
    pub tls: bool,
    pub protocol: &'static str,
    pub app: Option<String>,
    pub instance_id: Option<String>,
    pub instance_index: Option<String>,
    pub availability_zone: Option<String>,
    pub tags: BTreeMap<String, String>,
}

/// In the order of [`Hosts::iter`](crate::snapshot::Hosts::iter), and by path within a host. The cursor
/// is the place of a host and the route as it is [shown](crate::route::HttpMatch).
pub fn routes(
    snapshot: &Snapshot,
    revisions: &Revisions,
    request: &PageRequest,
) -> Result<Page<RouteRow>, String> {
    let cursor = match &request.after {
        None => None,
        Some(after) => Some(RouteCursor::read(after, &snapshot.hosts)?),
    };
    let hosts = match &cursor {
        None => snapshot.hosts.iter(),
        Some(cursor) => snapshot.hosts.iter_from(cursor.host),
    };
    routes_of(hosts, cursor.as_ref(), snapshot, revisions, request)
}

fn routes_of<'s>(
    hosts: impl Iterator<Item = (&'s str, &'s HostRoutes)>,
    cursor: Option<&RouteCursor<'_>>,
    snapshot: &'s Snapshot,
    revisions: &Revisions,
    request: &PageRequest,
) -> Result<Page<RouteRow>, String> {
    let routes = hosts.flat_map(|(host, routes)| in_order(host, routes));
    let routes = routes.skip_while(|route| cursor.is_some_and(|cursor| cursor.is_behind(route)));
    let (mut routes, more) = fill(request, routes, |route| route.pool.backends.len())?;
    let last = routes.last().filter(|_| more);
    let next = last.map(|last| last.cursor(&snapshot.hosts));
    routes.sort_by(|a, b| (a.host, a.path, &a.conditions).cmp(&(b.host, b.path, &b.conditions)));
    let row = |route: ListedRoute<'_>| RouteRow {
        route: format!("{}{}", route.host, route.path),
        declared_by: revisions.of(&RouteKey::Http(HttpMatch {
            host: route.host.into(),
            path: Arc::clone(route.path),
            conditions: route.matched.cloned(),
        })),
        conditions: (!route.conditions.is_empty()).then_some(route.conditions),
        policy: policy(route.pool),
        balance: route.pool.balance().map(Balance::as_str),
        route_service_url: route.pool.route_service_url().map(ToString::to_string),
        panic: snapshot.in_panic(route.pool),
        backends: members(snapshot, route.pool),
    };
    Ok(Page {
        revision: snapshot.revision,
        rows: routes.into_iter().map(row).collect(),
        next,
    })
}

struct ListedRoute<'s> {
    host: &'s str,
    path: &'s Arc<str>,
    matched: Option<&'s Arc<Conditions>>,
    /// As text; empty without any.
    conditions: String,
    pool: &'s Pool,
}

impl ListedRoute<'_> {
    fn cursor(&self, hosts: &Hosts) -> String {
        let place = hosts.place_of(self.host);
        let route = format!("{}{} {}", self.host, self.path, self.conditions);
        format!("{place:x}.{}", route.trim_end())
    }
}

/// The last route of a page.
struct RouteCursor<'a> {
    host: &'a str,
    path: &'a str,
    conditions: &'a str,
}

impl<'a> RouteCursor<'a> {
    /// # Errors
    /// It is no cursor of this process.
    fn read(after: &'a str, hosts: &Hosts) -> Result<RouteCursor<'a>, String> {
        let (place, shown) = after.split_once('.').unwrap_or_default();
        let (route, conditions) = shown.split_once(' ').unwrap_or((shown, ""));
        let (host, path) = route.split_at(route.find('/').unwrap_or(route.len()));
        if u64::from_str_radix(place, 16) != Ok(hosts.place_of(host)) {
            return Err("after: not the next of a page of this gateway since its start".to_owned());
        }
        Ok(RouteCursor {
            host,
            path,
            conditions,
        })
    }

    /// Whether a route of the cursor's host or behind was on the page before.
    fn is_behind(&self, route: &ListedRoute<'_>) -> bool {
        route.host == self.host
            && (&**route.path, &*route.conditions) <= (self.path, self.conditions)
    }
}

/// The routes of a host by path and conditions.
fn in_order<'s>(host: &'s str, routes: &'s HostRoutes) -> Vec<ListedRoute<'s>> {
    let listed = |route: HostRoute<'s>| ListedRoute {
        host,
        path: route.path,
        matched: route.conditions,
        conditions: route
            .conditions
            .map(ToString::to_string)
            .unwrap_or_default(),
        pool: route.pool,
    };
    let mut routes: Vec<ListedRoute<'s>> = routes.iter().map(listed).collect();
    routes.sort_by(|a, b| (a.path, &a.conditions).cmp(&(b.path, &b.conditions)));
    routes
}

/// The VIPs that are registered, and those that the proxy on this host serves without.
pub fn vips(
    snapshot: &Snapshot,
    revisions: &Revisions,
    served: &Views,
    request: &PageRequest,
) -> Result<Page<VipRow>, String> {
    let after = request.after.as_deref().map(str::parse::<Vip>).transpose();
    let after = after.map_err(|error| format!("after: {error}"))?;
    let behind = (
        after.map_or(Bound::Unbounded, Bound::Excluded),
        Bound::Unbounded,
    );
    let registered = snapshot.vips.range(behind).map(|(vip, _)| *vip);
    let l7 = served.range(behind);
    let l7 = l7.filter_map(|(vip, view)| (view.mode == Mode::L7).then_some(*vip));
    let size = |vip: &Vip| snapshot.vips.get(vip).map_or(0, |pool| pool.backends.len());
    let (vips, more) = fill(request, merge(registered, l7), size)?;
    let next = vips.last().filter(|_| more).map(Vip::to_string);
    let row = |vip| vip_row(vip, snapshot, revisions, served);
    Ok(Page {
        revision: snapshot.revision,
        rows: vips.into_iter().map(row).collect(),
        next,
    })
}

fn vip_row(vip: Vip, snapshot: &Snapshot, revisions: &Revisions, served: &Views) -> VipRow {
    let view = served.get(&vip);
    let known = view.into_iter().flat_map(|view| &view.members);
    let states: HashMap<SocketAddr, MemberState> =
        known.map(|member| (member.address, member.state)).collect();
    let pool = snapshot.vips.get(&vip);
    let members = pool.map(|pool| members(snapshot, pool)).unwrap_or_default();
    let with_state = |member: MemberRow| {
        let state = states.get(&member.address).copied();
        VipMemberRow {
            state: state.map(MemberState::as_str),
            refused: state.and_then(MemberState::refusal),
            member,
        }
    };
    VipRow {
        vip: vip.to_string(),
        declared_by: revisions.of(&RouteKey::Vip(vip)),
        panic: pool.is_some_and(|pool| snapshot.in_panic(pool)),
        forwarding: view.map(|view| mode_name(view.mode)),
        scheduler: view.map(|view| scheduler_name(view.scheduler)),
        backends: members.into_iter().map(with_state).collect(),
    }
}

/// Two ascending iterators as one; what both have comes once.
fn merge<T: Ord>(
    one: impl Iterator<Item = T>,
    other: impl Iterator<Item = T>,
) -> impl Iterator<Item = T> {
    let (mut one, mut other) = (one.peekable(), other.peekable());
    std::iter::from_fn(move || match (one.peek(), other.peek()) {
        (Some(a), Some(b)) if a > b => other.next(),
        (Some(a), Some(b)) => {
            if a == b {
                other.next();
            }
            one.next()
        }
        (Some(_), None) => one.next(),
        (None, _) => other.next(),
    })
}

/// As many of what follows a cursor as belong to a page, and whether there are more. `backends` says
/// how many an item is shown with.
///
/// # Errors
/// Names `limit`.
pub(super) fn fill<T>(
    request: &PageRequest,
    items: impl Iterator<Item = T>,
    backends: impl Fn(&T) -> usize,
) -> Result<(Vec<T>, bool), String> {
    let limit = request.limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(format!("limit: {limit} is not in 1..={MAX_LIMIT}"));
    }
    let mut page = Vec::new();
    let mut shown = 0;
    for item in items {
        if page.len() == limit || shown >= MAX_BACKENDS {
            return Ok((page, true));
        }
        shown += backends(&item);
        page.push(item);
    }
    Ok((page, false))
}

fn members(snapshot: &Snapshot, pool: &Pool) -> Vec<MemberRow> {
    let row = |backend: &Arc<Backend>| MemberRow {
        address: backend.address,
        weight: backend.weight,
        origin: backend.origin.as_str(),
        healthy: !snapshot.unhealthy.contains(&backend.address),
        tls: backend.tls().is_some(),
        protocol: match backend.protocol {
            HttpProtocol::Http1 => "http1",
            HttpProtocol::Http2 => "http2",
        },
        app: text(&backend.instance().app),
        instance_id: text(&backend.instance().id),
        instance_index: text(&backend.instance().index),
        availability_zone: text(&backend.instance().availability_zone),
        tags: backend
            .instance()
            .tags
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect(),
    };
    pool.backends.iter().map(row).collect()
}

pub(super) fn text(text: &Option<Arc<str>>) -> Option<String> {
    text.as_deref().map(str::to_owned)
}
