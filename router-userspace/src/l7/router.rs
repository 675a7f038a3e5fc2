//! Which route a request belongs to: a pure function of the snapshot, the `Host` and the path.
//!
//! An exact host wins over a wildcard, a wildcard with more labels over one with fewer, and within
//! a host the longest path prefix. A host whose paths do not match falls through to the wildcards
//! above it. Called once a request; it allocates only for paths with dot segments.

use std::borrow::Cow;
use std::sync::Arc;

use crate::route::Pool;
use crate::snapshot::Snapshot;

/// Longest host name looked up: 253 octets (RFC 1035 §2.3.4) and a trailing dot.
pub const MAX_HOST_LEN: usize = 254;

/// The pool that serves a request, and the match that led to it.
#[derive(Debug)]
pub struct RouteMatch<'a> {
    /// Exact, or `*.`-wildcard.
    pub host: &'a str,
    /// The prefix that matched; empty for the whole host.
    pub path: &'a str,
    pub pool: &'a Arc<Pool>,
}

/// Why there is no match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoMatch {
    UnknownRoute,
    /// The path's `..` segments lead out of the root.
    PathAboveRoot,
}

/// Finds the route for a `Host` header value, with or without port, and the path of a request
/// target, without query. Neither needs to be lower case.
///
/// # Errors
/// Says why the request has no route.
pub fn find<'a>(snapshot: &'a Snapshot, host: &str, path: &str) -> Result<RouteMatch<'a>, NoMatch> {
    let path = without_dot_segments(path).ok_or(NoMatch::PathAboveRoot)?;
    find_resolved(snapshot, host, &path).ok_or(NoMatch::UnknownRoute)
}

fn find_resolved<'a>(snapshot: &'a Snapshot, host: &str, path: &str) -> Option<RouteMatch<'a>> {
    let name = strip_port(host);
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.is_empty() || name.len() > MAX_HOST_LEN {
        return None;
    }
    let mut buffer = [0; MAX_HOST_LEN];
    let key = &mut buffer[..name.len()];
    key.copy_from_slice(name.as_bytes());
    key.make_ascii_lowercase();
    if let Some(found) = find_in_host(snapshot, as_str(key)?, path) {
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
            if let Some(found) = find_in_host(snapshot, as_str(&key[dot - 1..])?, path) {
                return Some(found);
            }
        }
        label_start = dot + 1;
    }
    None
}

fn find_in_host<'a>(snapshot: &'a Snapshot, host: &str, path: &str) -> Option<RouteMatch<'a>> {
    let (host, routes) = snapshot.hosts.get(host)?;
    let (prefix, pool) = longest_prefix(&routes.paths, path)?;
    Some(RouteMatch {
        host,
        path: prefix,
        pool,
    })
}

/// The longest of the paths, lower case and sorted as in [`HostRoutes`](crate::snapshot::HostRoutes), that covers `path` by whole
/// segments: a binary search for each place where a segment of `path` ends.
fn longest_prefix<'a>(
    paths: &'a [(Arc<str>, Arc<Pool>)],
    path: &str,
) -> Option<&'a (Arc<str>, Arc<Pool>)> {
    let path = path.as_bytes();
    let before = |end: usize| path[..end].iter().rposition(|&byte| byte == b'/');
    let longest = paths.first()?.0.len();
    let mut end = if path.len() <= longest {
        path.len()
    } else {
        before(longest + 1)?
    };
    loop {
        let wanted = path[..end].iter().map(u8::to_ascii_lowercase);
        let found = paths.binary_search_by(|(known, _)| {
            end.cmp(&known.len())
                .then_with(|| known.bytes().cmp(wanted.clone()))
        });
        match found {
            Ok(at) => return Some(&paths[at]),
            Err(_) => end = before(end)?,
        }
    }
}

/// The host of `host[:port]`, where an IPv6 literal keeps its brackets.
fn strip_port(host: &str) -> &str {
    let end = if host.starts_with('[') {
        host.find(']').map_or(host.len(), |bracket| bracket + 1)
    } else {
        host.find(':').unwrap_or(host.len())
    };
    &host[..end]
}

/// The path with `.` and `..` segments resolved, `%2e` read as a dot (RFC 3986 §5.2.4), so that the
/// route is the one of the resource that the backend will serve. `None` if it climbs above the root.
fn without_dot_segments(path: &str) -> Option<Cow<'_, str>> {
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
