//! Pages of what the snapshot holds, in the order of their keys.
//!
//! `?limit=` bounds a page, `?after=` is the `next` of the page before. A page is made by one walk
//! over the snapshot that keeps the `limit` smallest keys after the cursor, so it needs no index and
//! no memory beyond the page, and a listing stays meaningful while routes come and go between pages.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use router_common::Mode;
use serde::{Deserialize, Serialize};

use crate::admin::policy::{PolicyRow, policy};
use crate::l4::{MemberState, Views, mode_name, scheduler_name};
use crate::route::{Backend, Balance, HttpMatch, HttpProtocol, Pool, RouteKey, Vip};
use crate::snapshot::Snapshot;
use crate::source::kv::status::{Declarer, Revisions};

pub const DEFAULT_LIMIT: usize = 1000;
pub const MAX_LIMIT: usize = 10_000;

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

/// A backend over all its routes.
#[derive(Debug, Serialize)]
pub struct BackendRow {
    pub address: SocketAddr,
    pub healthy: bool,
    /// By an operator.
    pub draining: bool,
    pub origin: &'static str,
    pub app: Option<String>,
    pub instance_index: Option<String>,
    pub http_routes: u64,
    pub vips: u64,
}

/// The cursor is that of a route as it is [shown](crate::route::HttpMatch).
pub fn routes(
    snapshot: &Snapshot,
    revisions: &Revisions,
    request: &PageRequest,
) -> Result<Page<RouteRow>, String> {
    let after = request.after.as_deref().map(|after| {
        let (route, conditions) = after.split_once(' ').unwrap_or((after, ""));
        let (host, path) = route.split_at(route.find('/').unwrap_or(route.len()));
        (host, path, conditions.to_owned())
    });
    let mut page = Smallest::new(request, after)?;
    for (host, routes) in snapshot.hosts.iter() {
        for route in routes.iter() {
            let conditions = route.conditions.map(ToString::to_string);
            let key = (host, &**route.path, conditions.unwrap_or_default());
            page.offer(key, || (route.pool, route.conditions));
        }
    }
    Ok(page.finish(
        snapshot,
        |(host, path, conditions)| match &**conditions {
            "" => format!("{host}{path}"),
            conditions => format!("{host}{path} {conditions}"),
        },
        |(host, path, conditions), (pool, matched)| RouteRow {
            route: format!("{host}{path}"),
            declared_by: revisions.of(&RouteKey::Http(HttpMatch {
                host: host.into(),
                path: path.into(),
                conditions: matched.cloned(),
            })),
            conditions: (!conditions.is_empty()).then_some(conditions),
            policy: policy(pool),
            balance: pool.balance().map(Balance::as_str),
            route_service_url: pool.route_service_url().map(ToString::to_string),
            panic: snapshot.in_panic(pool),
            backends: members(snapshot, pool),
        },
    ))
}

/// The VIPs that are registered, and those that the proxy on this host serves without.
pub fn vips(
    snapshot: &Snapshot,
    revisions: &Revisions,
    served: &Views,
    request: &PageRequest,
) -> Result<Page<VipRow>, String> {
    let after = request.after.as_deref().map(str::parse::<Vip>).transpose();
    let mut page = Smallest::new(request, after.map_err(|error| format!("after: {error}"))?)?;
    let l7 = served.iter().filter(|(_, view)| view.mode == Mode::L7);
    for vip in snapshot.vips.keys().chain(l7.map(|(vip, _)| vip)) {
        page.offer(*vip, || ());
    }
    Ok(page.finish(snapshot, Vip::to_string, |vip, ()| {
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
    }))
}

pub fn backends(snapshot: &Snapshot, request: &PageRequest) -> Result<Page<BackendRow>, String> {
    let after = request
        .after
        .as_deref()
        .map(str::parse::<SocketAddr>)
        .transpose();
    let mut page = Smallest::new(request, after.map_err(|error| format!("after: {error}"))?)?;
    let mut count = |pool: &Pool, http_routes: u64, vips: u64| {
        for backend in &pool.backends {
            let row = page.offer(backend.address, || BackendRow {
                address: backend.address,
                healthy: !snapshot.unhealthy.contains(&backend.address),
                draining: snapshot.draining.contains(&backend.address),
                origin: backend.origin.as_str(),
                app: text(&backend.instance().app),
                instance_index: text(&backend.instance().index),
                http_routes: 0,
                vips: 0,
            });
            if let Some(row) = row {
                row.http_routes += http_routes;
                row.vips += vips;
            }
        }
    };
    for (_, routes) in snapshot.hosts.iter() {
        routes.pools().for_each(|pool| count(pool, 1, 0));
    }
    snapshot.vips.values().for_each(|pool| count(pool, 0, 1));
    Ok(page.finish(snapshot, SocketAddr::to_string, |_, row| row))
}

/// The smallest keys after a cursor, with their values.
pub(super) struct Smallest<K, V> {
    after: Option<K>,
    limit: usize,
    rows: BTreeMap<K, V>,
    more: bool,
}

impl<K: Ord, V> Smallest<K, V> {
    pub(super) fn new(request: &PageRequest, after: Option<K>) -> Result<Smallest<K, V>, String> {
        let limit = request.limit.unwrap_or(DEFAULT_LIMIT);
        if !(1..=MAX_LIMIT).contains(&limit) {
            return Err(format!("limit: {limit} is not in 1..={MAX_LIMIT}"));
        }
        Ok(Smallest {
            after,
            limit,
            rows: BTreeMap::new(),
            more: false,
        })
    }

    /// Keeps the key if it belongs to the page. What does not belong now never will.
    pub(super) fn offer(&mut self, key: K, value: impl FnOnce() -> V) -> Option<&mut V> {
        if self.after.as_ref().is_some_and(|after| key <= *after) {
            return None;
        }
        if self.rows.len() == self.limit && !self.rows.contains_key(&key) {
            self.more = true;
            if self
                .rows
                .last_key_value()
                .is_some_and(|(last, _)| key > *last)
            {
                return None;
            }
            self.rows.pop_last();
        }
        Some(self.rows.entry(key).or_insert_with(value))
    }

    pub(super) fn finish<R>(
        self,
        snapshot: &Snapshot,
        cursor: impl Fn(&K) -> String,
        row: impl Fn(K, V) -> R,
    ) -> Page<R> {
        let last = self.rows.last_key_value().map(|(key, _)| cursor(key));
        Page {
            revision: snapshot.revision,
            next: last.filter(|_| self.more),
            rows: self
                .rows
                .into_iter()
                .map(|(key, value)| row(key, value))
                .collect(),
        }
    }
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

fn text(text: &Option<Arc<str>>) -> Option<String> {
    text.as_deref().map(str::to_owned)
}
