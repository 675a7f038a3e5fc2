//! Sessions that stay with one instance, by the cookie `__VCAP_ID__` as gorouter has it. Pure.
//!
//! An application begins a session by setting a cookie of `http.sticky.cookies`; the gateway sets its
//! own beside it, with the `private_instance_id` of whoever answered. A request with both is for that
//! instance while it is there. `forward` asks [`session`] and, for the response, [`set_cookie`].

use http::header::{AUTHORIZATION, COOKIE, SET_COOKIE, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue};

use crate::config::HttpSticky;

/// The gateway's own cookie.
const VCAP_ID: &str = "__VCAP_ID__";

/// Longest instance id that is looked for; a registration's are shorter.
const MAX_INSTANCE_LEN: usize = 256;

/// How long, in seconds, a client has for the next request of a negotiation (gorouter's).
const NEGOTIATE_MAX_AGE: u32 = 60;

/// The instance that a request's session is with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Session {
    pub instance: Box<str>,
    /// No other instance will do.
    pub required: bool,
}

/// The session a request belongs to, if any.
pub(super) fn session(headers: &HeaderMap, config: &HttpSticky) -> Option<Session> {
    let required = config.auth_negotiate && negotiates(headers);
    if config.cookies.is_empty() && !required {
        return None;
    }
    let instance = cookie(headers, VCAP_ID)?;
    let begun = || {
        let mut names = config.cookies.iter();
        names.any(|name| cookie(headers, name).is_some())
    };
    if instance.len() > MAX_INSTANCE_LEN || !is_cookie_value(instance) || !(required || begun()) {
        return None;
    }
    Some(Session {
        instance: std::str::from_utf8(instance).ok()?.into(),
        required,
    })
}

/// The `Set-Cookie` to add to a response, if any.
///
/// `instance` is the `private_instance_id` of the backend that answered, and `path` makes the
/// [`cookie_path`].
pub(super) fn set_cookie(
    response: &HeaderMap,
    session: Option<&Session>,
    instance: Option<&str>,
    path: impl FnOnce() -> String,
    config: &HttpSticky,
) -> Option<HeaderValue> {
    let negotiation = config.auth_negotiate && asks_to_negotiate(response);
    let may_begin = !config.cookies.is_empty() && response.contains_key(SET_COOKIE);
    if !may_begin && !negotiation && session.is_none() {
        return None;
    }
    let instance = instance.filter(|id| !id.is_empty() && is_cookie_value(id.as_bytes()))?;
    let moved = session.is_some_and(|session| *session.instance != *instance);
    let cookies = || {
        response
            .get_all(SET_COOKIE)
            .iter()
            .map(HeaderValue::as_bytes)
    };
    if cookies().any(|text| name_of(text) == VCAP_ID.as_bytes()) {
        return None;
    }
    let begins = cookies().find(|text| {
        let mut names = config.cookies.iter();
        names.any(|name| name.as_bytes() == name_of(text))
    });
    let mut attributes = match begins {
        Some(text) => Attributes::of(text),
        None if negotiation || moved => Attributes::default(),
        None => return None,
    };
    if negotiation {
        attributes.max_age.get_or_insert(NEGOTIATE_MAX_AGE);
        attributes.same_site.get_or_insert("Strict");
    }
    attributes.secure |= config.secure;
    attributes.value(instance, &path())
}

/// The part of a request's path that led to its route, as the client wrote it, since clients compare
/// the path of a cookie by case. `route` is the path of the route, lower case.
pub(super) fn cookie_path<'a>(request: &'a str, route: &'a str) -> &'a str {
    match request.get(..route.len()) {
        _ if route.is_empty() => "/",
        Some(path) if path.eq_ignore_ascii_case(route) => path,
        // Written with dot segments.
        _ => route,
    }
}

/// The first cookie of a request with this name (RFC 6265 §4.2; in HTTP/2 they may come in several
/// fields, RFC 9113 §8.2.3).
pub(super) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    let fields = headers.get_all(COOKIE).iter();
    let mut pairs = fields.flat_map(|field| field.as_bytes().split(|&byte| byte == b';'));
    pairs.find_map(|pair| {
        let (found, value) = split_once(pair, b'=')?;
        (found == name.as_bytes()).then_some(value)
    })
}

fn negotiates(headers: &HeaderMap) -> bool {
    headers.get(AUTHORIZATION).is_some_and(is_negotiate)
}

fn asks_to_negotiate(headers: &HeaderMap) -> bool {
    headers.get_all(WWW_AUTHENTICATE).iter().any(is_negotiate)
}

/// Whether the value is of the authentication scheme `Negotiate` (RFC 4559 §4).
fn is_negotiate(value: &HeaderValue) -> bool {
    const SCHEME: &[u8] = b"negotiate";
    let value = value.as_bytes();
    value.len() >= SCHEME.len()
        && value[..SCHEME.len()].eq_ignore_ascii_case(SCHEME)
        && value
            .get(SCHEME.len())
            .is_none_or(|&byte| byte == b' ' || byte == b',')
}

/// What the gateway's cookie takes over from the application's.
#[derive(Debug, Default, PartialEq, Eq)]
struct Attributes<'a> {
    /// Seconds.
    max_age: Option<u32>,
    expires: Option<&'a str>,
    same_site: Option<&'static str>,
    secure: bool,
    partitioned: bool,
}

impl<'a> Attributes<'a> {
    /// Of the text of a `Set-Cookie` (RFC 6265 §5.2); those it does not know are left out.
    fn of(text: &'a [u8]) -> Attributes<'a> {
        let mut attributes = Attributes::default();
        for part in text.split(|&byte| byte == b';').skip(1) {
            let (name, value) = split_once(part, b'=').unwrap_or((part.trim_ascii(), b""));
            let is = |known: &[u8]| name.eq_ignore_ascii_case(known);
            if is(b"Secure") {
                attributes.secure = true;
            } else if is(b"Partitioned") {
                attributes.partitioned = true;
            } else if is(b"SameSite") {
                attributes.same_site = ["Strict", "Lax", "None"]
                    .into_iter()
                    .find(|known| value.eq_ignore_ascii_case(known.as_bytes()));
            } else if is(b"Expires") {
                attributes.expires = std::str::from_utf8(value).ok().filter(|text| is_date(text));
            } else if is(b"Max-Age") && ends_at_once(value) {
                attributes.max_age = Some(0);
            }
        }
        attributes
    }

    fn value(&self, instance: &str, path: &str) -> Option<HeaderValue> {
        use std::fmt::Write;
        let path = if path.contains(';') { "/" } else { path };
        let mut text = format!("{VCAP_ID}={instance}; Path={path}");
        if let Some(expires) = self.expires {
            let _ = write!(text, "; Expires={expires}");
        }
        if let Some(max_age) = self.max_age {
            let _ = write!(text, "; Max-Age={max_age}");
        }
        text.push_str("; HttpOnly");
        if self.secure {
            text.push_str("; Secure");
        }
        if let Some(same_site) = self.same_site {
            let _ = write!(text, "; SameSite={same_site}");
        }
        if self.partitioned {
            text.push_str("; Partitioned");
        }
        HeaderValue::try_from(text).ok()
    }
}

/// The name of the cookie that a `Set-Cookie` sets.
fn name_of(set_cookie: &[u8]) -> &[u8] {
    let pair = set_cookie.split(|&byte| byte == b';').next().unwrap_or(b"");
    split_once(pair, b'=').map_or(b"", |(name, _)| name)
}

fn split_once(text: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|&byte| byte == separator)?;
    Some((text[..at].trim_ascii(), text[at + 1..].trim_ascii()))
}

/// Whether all are `cookie-octet`s (RFC 6265 §4.1.1).
fn is_cookie_value(value: &[u8]) -> bool {
    value
        .iter()
        .all(|byte| matches!(byte, 0x21 | 0x23..=0x2b | 0x2d..=0x3a | 0x3c..=0x5b | 0x5d..=0x7e))
}

/// Whether a text has no byte that the forms of a date (RFC 9110 §5.6.7) have not.
fn is_date(text: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b" ,:-+".contains(&byte);
    !text.is_empty() && text.len() <= 64 && text.bytes().all(known)
}

/// Whether a `Max-Age` deletes the cookie.
fn ends_at_once(value: &[u8]) -> bool {
    let (sign, digits) = match value.split_first() {
        Some((b'-', digits)) => (true, digits),
        _ => (false, value),
    };
    let number = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    number && (sign || digits.iter().all(|&digit| digit == b'0'))
}

#[cfg(test)]
mod tests;
