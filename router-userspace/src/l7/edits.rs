//! What a declared route changes in a request and a response: redirects, rewrites and header edits.
//!
//! Pure functions on the types of `http`, called by the request path once the route is known. What a
//! route does not ask for costs a comparison and no allocation. Headers that the gateway itself sets
//! are the business of `headers`; a route may not edit those.

use std::borrow::Cow;

use http::header::{HOST, HeaderMap};
use http::uri::{InvalidUri, PathAndQuery};
use http::{HeaderValue, Uri};

use crate::l7::router::without_dot_segments;
use crate::route::policy::{HeaderEdits, PathRewrite, Redirect, Rewrite};

/// What a redirect is made from.
#[derive(Clone, Copy, Debug)]
pub struct RequestUrl<'r> {
    /// `http` or `https`, as the client sees it.
    pub scheme: &'r str,
    /// The `Host`, with its port if it has one.
    pub authority: &'r str,
    /// In origin form.
    pub path: &'r str,
    pub query: Option<&'r str>,
}

/// The `Location` of a redirect (RFC 9110 §10.2.2), or `None` if it leads to where the request is.
///
/// `matched` is the path of the route. A path that is sent on alone never begins with two slashes, which
/// a client would take for a host; one without scheme and authority stays on the client's, whatever
/// proxies are in between. A change of scheme alone drops the port, which was the other scheme's.
pub fn location(
    redirect: &Redirect,
    matched: &str,
    request: &RequestUrl<'_>,
) -> Option<HeaderValue> {
    let path = match &redirect.path {
        Some(rewrite) => rewritten_path(rewrite, matched, request.path),
        None => Cow::Borrowed(request.path),
    };
    let scheme = redirect.scheme.as_deref().unwrap_or(request.scheme);
    let authority = match redirect.authority.as_deref() {
        Some(authority) => authority,
        None if scheme != request.scheme => without_port(request.authority),
        None => request.authority,
    };
    let elsewhere = scheme != request.scheme || !authority.eq_ignore_ascii_case(request.authority);
    if !elsewhere && path == request.path {
        return None;
    }
    let mut location = String::with_capacity(
        scheme.len() + authority.len() + path.len() + request.query.map_or(0, str::len) + 4,
    );
    if elsewhere {
        location.push_str(scheme);
        location.push_str("://");
        location.push_str(authority);
    }
    location.push('/');
    push_escaped(&mut location, path.trim_start_matches(['/', '\\']));
    if let Some(query) = request.query {
        location.push('?');
        push_escaped(&mut location, query);
    }
    HeaderValue::try_from(location).ok()
}

/// Changes path and `Host` of a request for its backend; `uri` is in origin form, and stays so.
///
/// To be called when what tells the backend of the client's `Host` is set.
///
/// # Errors
/// The path grew beyond what a URI may have; nothing is changed then.
pub fn rewrite_request(
    uri: &mut Uri,
    headers: &mut HeaderMap,
    matched: &str,
    rewrite: &Rewrite,
) -> Result<(), InvalidUri> {
    if let Some(path) = &rewrite.path {
        let path = rewritten_path(path, matched, uri.path());
        if path != uri.path() {
            let target = match uri.query() {
                Some(query) => PathAndQuery::try_from(format!("{path}?{query}"))?,
                None => PathAndQuery::try_from(&*path)?,
            };
            *uri = Uri::from(target);
        }
    }
    if let Some(host) = &rewrite.host {
        headers.insert(HOST, host.clone());
    }
    Ok(())
}

/// Removes, then sets in place of all of the name, then adds.
pub fn apply(edits: &HeaderEdits, headers: &mut HeaderMap) {
    for name in &edits.remove {
        headers.remove(name);
    }
    for (name, value) in &edits.set {
        headers.insert(name.clone(), value.clone());
    }
    for (name, value) in &edits.add {
        headers.append(name.clone(), value.clone());
    }
}

/// The path in place of `path`, of which `matched` is a prefix once dot segments are resolved. What is
/// left of the path alone begins with one `/`, whatever stood behind the prefix.
fn rewritten_path<'p>(rewrite: &'p PathRewrite, matched: &str, path: &'p str) -> Cow<'p, str> {
    let prefix = match rewrite {
        PathRewrite::Full(full) => return Cow::Borrowed(full),
        PathRewrite::Prefix(prefix) => prefix,
    };
    // As the route was found by it; the router refused what leads out of the root.
    let resolved = without_dot_segments(path).unwrap_or(Cow::Borrowed(path));
    let rest = resolved.get(matched.len()..).unwrap_or_default();
    match &**prefix {
        "" => Cow::Owned(format!("/{}", rest.trim_start_matches('/'))),
        prefix => Cow::Owned(format!("{prefix}{rest}")),
    }
}

/// Percent-encodes what some clients would read as something else or not at all: a backslash, quotes,
/// brackets, and what is not ASCII.
fn push_escaped(into: &mut String, text: &str) {
    for byte in text.bytes() {
        match byte {
            b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}' => {
                into.push_str(&format!("%{byte:02X}"));
            }
            byte if byte.is_ascii_graphic() => into.push(char::from(byte)),
            byte => into.push_str(&format!("%{byte:02X}")),
        }
    }
}

fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        // The colons of a bare IPv6 literal stand inside its brackets.
        Some((host, port)) if !port.ends_with(']') => host,
        Some(_) | None => authority,
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, StatusCode};
    use proptest::prelude::*;

    use super::*;

    fn redirect(
        scheme: Option<&str>,
        authority: Option<&str>,
        path: Option<PathRewrite>,
    ) -> Redirect {
        Redirect {
            status: StatusCode::PERMANENT_REDIRECT,
            scheme: scheme.map(Into::into),
            authority: authority.map(Into::into),
            path,
        }
    }

    fn prefix(prefix: &str) -> Option<PathRewrite> {
        Some(PathRewrite::Prefix(prefix.into()))
    }

    fn full(path: &str) -> Option<PathRewrite> {
        Some(PathRewrite::Full(path.into()))
    }

    /// Where a redirect of `matched` leads from a URL.
    fn leads(redirect: &Redirect, matched: &str, url: &str) -> Option<String> {
        let (scheme, rest) = url.split_once("://").unwrap();
        let (authority, target) = rest.split_at(rest.find('/').unwrap());
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (target, None),
        };
        let request = RequestUrl {
            scheme,
            authority,
            path,
            query,
        };
        let location = location(redirect, matched, &request)?;
        Some(location.to_str().unwrap().to_owned())
    }

    #[test]
    fn what_a_redirect_does_not_say_stays() {
        for (redirect, matched, url, wanted) in [
            (
                redirect(Some("https"), None, None),
                "",
                "http://a.x:8080/p/q?r=1",
                Some("https://a.x/p/q?r=1"),
            ),
            (
                redirect(Some("https"), Some("a.x:8443"), None),
                "",
                "http://[2001:db8::1]:80/",
                Some("https://a.x:8443/"),
            ),
            (
                redirect(Some("https"), None, None),
                "",
                "http://[2001:db8::1]/",
                Some("https://[2001:db8::1]/"),
            ),
            (
                redirect(None, Some("www.x"), None),
                "",
                "http://x/p",
                Some("http://www.x/p"),
            ),
            (
                redirect(None, None, full("/new")),
                "/p",
                "http://a.x/P/q?r",
                Some("/new?r"),
            ),
            (
                redirect(None, None, prefix("/new")),
                "/p",
                "http://a.x/P/q",
                Some("/new/q"),
            ),
            (
                redirect(None, None, prefix("")),
                "/p",
                "http://a.x/p",
                Some("/"),
            ),
            (
                redirect(None, None, prefix("/v2")),
                "",
                "http://a.x/q/",
                Some("/v2/q/"),
            ),
        ] {
            assert_eq!(leads(&redirect, matched, url).as_deref(), wanted, "{url}");
        }
    }

    #[test]
    fn a_redirect_to_where_the_request_is_is_none() {
        for (redirect, url) in [
            (redirect(Some("https"), None, None), "https://a.x:8443/p"),
            (redirect(Some("https"), Some("a.x"), None), "https://A.x/p"),
            (redirect(None, None, full("/p")), "http://a.x/p?q"),
            (redirect(None, None, prefix("/p")), "http://a.x/p/q"),
        ] {
            assert_eq!(leads(&redirect, "/p", url), None, "{url}");
        }
    }

    #[test]
    fn no_request_makes_a_redirect_lead_to_another_host() {
        for path in [
            "/p//evil.x",
            "/p/\\evil.x",
            "/p/./\\/evil.x",
            "/p/x/..//evil.x",
        ] {
            let url = format!("http://a.x{path}");
            let location = leads(&redirect(None, None, prefix("")), "/p", &url).unwrap();
            assert!(location.starts_with('/'), "{location}");
            assert!(
                !location.starts_with("//") && !location.contains('\\'),
                "{location}"
            );
        }
    }

    #[test]
    fn a_rewrite_changes_path_and_host_and_keeps_the_query() {
        for (rewrite, matched, target, wanted) in [
            (
                prefix("/new"),
                "/old",
                "/OLD/a%20b?q=/old",
                "/new/a%20b?q=/old",
            ),
            (prefix("/new"), "/old", "/x/../old/./a", "/new/a"),
            (prefix(""), "/old", "/old", "/"),
            (prefix(""), "/old", "/old?q", "/?q"),
            (prefix(""), "/old", "/old//a", "/a"),
            (full("/one"), "/old", "/old/a?q", "/one?q"),
            (None, "/old", "/old/a", "/old/a"),
        ] {
            let mut uri: Uri = target.parse().unwrap();
            let mut headers = HeaderMap::new();
            let rewrite = Rewrite {
                host: Some(HeaderValue::from_static("internal")),
                path: rewrite,
            };
            headers.insert(HOST, HeaderValue::from_static("a.x"));
            rewrite_request(&mut uri, &mut headers, matched, &rewrite).unwrap();
            assert_eq!(uri, wanted, "{target}");
            assert_eq!(headers[HOST], "internal");
        }
    }

    #[test]
    fn a_path_that_grows_too_long_is_an_error() {
        let target = format!("/old/{}", "a".repeat(65_000));
        let mut uri: Uri = target.parse().unwrap();
        let rewrite = Rewrite {
            host: None,
            path: prefix(&format!("/{}", "b".repeat(2000))),
        };
        let done = rewrite_request(&mut uri, &mut HeaderMap::new(), "/old", &rewrite);
        assert!(done.is_err());
        assert_eq!(uri, *target);
    }

    #[test]
    fn headers_are_removed_then_set_then_added() {
        let pair = |name: &'static str, value| {
            let value = HeaderValue::from_static(value);
            (HeaderName::from_static(name), value)
        };
        let edits = HeaderEdits {
            remove: vec![
                HeaderName::from_static("a"),
                HeaderName::from_static("none"),
            ],
            set: vec![pair("b", "set")],
            add: vec![pair("a", "added"), pair("c", "2")],
        };
        let before = [
            pair("a", "1"),
            pair("b", "1"),
            pair("c", "1"),
            pair("d", "1"),
        ];
        let mut headers: HeaderMap = before.into_iter().collect();
        headers.append("b", HeaderValue::from_static("2"));
        apply(&edits, &mut headers);
        let mut after: Vec<String> = headers
            .iter()
            .map(|(name, value)| format!("{name}={}", value.to_str().unwrap()))
            .collect();
        after.sort();
        assert_eq!(after, ["a=added", "b=set", "c=1", "c=2", "d=1"]);
    }

    proptest! {
        #[test]
        fn any_path_is_survived_and_stays_on_its_host(
            path in "/[ -~]{0,40}",
            matched in "(/[a-z]{0,8}){0,3}",
            new in "(/[a-z]{1,8}){0,2}",
        ) {
            let path = path.replace(['?', '#', ' '], "");
            let request = RequestUrl {
                scheme: "http",
                authority: "a.x",
                path: &path,
                query: None,
            };
            let redirect = redirect(None, None, prefix(&new));
            if let Some(location) = location(&redirect, &matched, &request) {
                let location = location.to_str().unwrap();
                prop_assert!(location.starts_with('/') && !location.starts_with("//"));
                prop_assert!(!location.contains('\\'));
            }
        }
    }
}
