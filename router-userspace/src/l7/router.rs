//! Which route a request belongs to: a pure function of the snapshot and the request's head.
//!
//! An exact host wins over a wildcard, a wildcard with more labels over one with fewer, and within
//! a host the longest path prefix; of one path, a route whose conditions hold over the one without,
//! in the [order](Conditions::order) of their conditions. A path of which no route's conditions hold
//! falls through to shorter ones, a host whose paths do not match to the wildcards above it. Called
//! once a request; it allocates only for paths with dot segments.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::sync::Arc;

use http::{HeaderMap, Method};

use crate::route::Pool;
use crate::route::conditions::Conditions;
use crate::snapshot::{HostRoutes, Snapshot};

/// Longest host name looked up: 253 octets (RFC 1035 §2.3.4) and a trailing dot.
pub const MAX_HOST_LEN: usize = 254;

/// What of a request decides its route.
#[derive(Clone, Copy, Debug)]
pub struct Lookup<'r> {
    /// The `Host`, with or without port, in any case.
    pub host: &'r str,
    /// Of the request target, in any case.
    pub path: &'r str,
    pub query: Option<&'r str>,
    pub method: &'r Method,
    pub headers: &'r HeaderMap,
}

/// The pool that serves a request, and the match that led to it.
#[derive(Clone, Copy, Debug)]
pub struct RouteMatch<'a> {
    /// Exact, or `*.`-wildcard.
    pub host: &'a str,
    /// The prefix that matched; empty for the whole host.
    pub path: &'a str,
    pub conditions: Option<&'a Conditions>,
    pub pool: &'a Arc<Pool>,
}

/// Why there is no match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoMatch {
    UnknownRoute,
    /// The path's `..` segments lead out of the root.
    PathAboveRoot,
}

/// Finds the route of a request.
///
/// # Errors
/// Says why the request has no route.
pub fn find<'a>(snapshot: &'a Snapshot, request: &Lookup<'_>) -> Result<RouteMatch<'a>, NoMatch> {
    let path = without_dot_segments(request.path).ok_or(NoMatch::PathAboveRoot)?;
    let resolved = Lookup {
        path: &path,
        ..*request
    };
    find_resolved(snapshot, &resolved).ok_or(NoMatch::UnknownRoute)
}

fn find_resolved<'a>(snapshot: &'a Snapshot, request: &Lookup<'_>) -> Option<RouteMatch<'a>> {
    let name = strip_port(request.host);
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.is_empty() || name.len() > MAX_HOST_LEN {
        return None;
    }
    let mut buffer = [0; MAX_HOST_LEN];
    let key = &mut buffer[..name.len()];
    key.copy_from_slice(name.as_bytes());
    key.make_ascii_lowercase();
    if let Some(found) = find_in_host(snapshot, as_str(key)?, request) {
        return Some(found);
    }
    if key[0] == b'[' {
        return None;
    }
    // Each label in turn gives way to `*`, written over its last byte: `a.b.example.com` is looked
    // up as `*.b.example.com`, `*.example.com`, `*.com`.
    let mut label_start = 0;
    while let Some(len) = key[label_start..].iter().position(|&byte| byte == b'.') {
        let dot = label_start + len;
        if len > 0 {
            key[dot - 1] = b'*';
            if let Some(found) = find_in_host(snapshot, as_str(&key[dot - 1..])?, request) {
                return Some(found);
            }
        }
        label_start = dot + 1;
    }
    None
}

/// The route of the longest path that covers the request's by whole segments: a search for each place
/// where a segment of it ends.
fn find_in_host<'a>(
    snapshot: &'a Snapshot,
    host: &str,
    request: &Lookup<'_>,
) -> Option<RouteMatch<'a>> {
    let (host, routes) = snapshot.hosts.get(host)?;
    let path = request.path.as_bytes();
    let before = |end: usize| path[..end].iter().rposition(|&byte| byte == b'/');
    let longest = longest_path(routes)?;
    let mut end = if path.len() <= longest {
        path.len()
    } else {
        before(longest + 1)?
    };
    loop {
        let found = of_path(routes, &path[..end], request);
        if let Some((path, conditions, pool)) = found {
            return Some(RouteMatch {
                host,
                path,
                conditions,
                pool,
            });
        }
        end = before(end)?;
    }
}

fn longest_path(routes: &HostRoutes) -> Option<usize> {
    let plain = routes.paths().first().map(|(path, _)| path.len());
    let conditional = routes.conditional().first().map(|route| route.path.len());
    plain.max(conditional)
}

/// The first route of just this path whose conditions hold.
fn of_path<'a>(
    routes: &'a HostRoutes,
    path: &[u8],
    request: &Lookup<'_>,
) -> Option<(&'a str, Option<&'a Conditions>, &'a Arc<Pool>)> {
    // As `HostRoutes` are sorted, the request's path read in lower case.
    let order = |known: &str| -> Ordering {
        let wanted = path.iter().map(u8::to_ascii_lowercase);
        let by_length = path.len().cmp(&known.len());
        by_length.then_with(|| known.bytes().cmp(wanted))
    };
    let conditional = routes.conditional();
    let first = conditional.partition_point(|route| order(&route.path).is_lt());
    let mut beside = conditional[first..]
        .iter()
        .take_while(|route| order(&route.path).is_eq());
    let holds =
        |conditions: &Conditions| conditions.hold(request.method, request.headers, request.query);
    if let Some(route) = beside.find(|route| holds(&route.conditions)) {
        return Some((&route.path, Some(&route.conditions), &route.pool));
    }
    let plain = routes.paths().binary_search_by(|(known, _)| order(known));
    let (path, pool) = &routes.paths()[plain.ok()?];
    Some((path, None, pool))
}

/// The host of `host[:port]`, where an IPv6 literal keeps its brackets.
pub(super) fn strip_port(host: &str) -> &str {
    let end = if host.starts_with('[') {
        host.find(']').map_or(host.len(), |bracket| bracket + 1)
    } else {
        host.find(':').unwrap_or(host.len())
    };
    &host[..end]
}

/// The path with `.` and `..` segments resolved, `%2e` read as a dot (RFC 3986 §5.2.4), so that the
/// route is the one of the resource that the backend will serve. `None` if it climbs above the root.
pub(super) fn without_dot_segments(path: &str) -> Option<Cow<'_, str>> {
    let may_have_dots = |pair: &[u8]| pair == b"/." || pair == b"/%";
    if !path.as_bytes().windows(2).any(may_have_dots) {
        return Some(Cow::Borrowed(path));
    }
    let mut kept: Vec<&str> = Vec::new();
    let mut ends_in_directory = false;
    for segment in path.strip_prefix('/').unwrap_or(path).split('/') {
        ends_in_directory = true;
        match dots(segment) {
            Some(1) => {}
            Some(2) => {
                kept.pop()?;
            }
            _ => {
                kept.push(segment);
                ends_in_directory = false;
            }
        }
    }
    if ends_in_directory {
        kept.push("");
    }
    let mut resolved = String::with_capacity(path.len());
    for segment in kept {
        resolved.push('/');
        resolved.push_str(segment);
    }
    Some(Cow::Owned(resolved))
}

/// How many dots the segment consists of, if of nothing else and not more than two.
fn dots(segment: &str) -> Option<usize> {
    let mut rest = segment.as_bytes();
    let mut count = 0;
    while let Some((&first, tail)) = rest.split_first() {
        rest = match (first, tail) {
            (b'.', tail) => tail,
            (b'%', [b'2', b'e' | b'E', tail @ ..]) => tail,
            _ => return None,
        };
        count += 1;
    }
    (1..=2).contains(&count).then_some(count)
}

/// Bytes of a `&str` with ASCII changes only; never `None`, but there is nothing to gain from a panic.
fn as_str(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests;
