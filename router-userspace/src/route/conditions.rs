//! What a request must be, beside host and path, to be on a declared route.
//!
//! Part of the identity of a route ([`HttpMatch`](crate::route::HttpMatch)): made where a declaration
//! is read, kept in order by [`HostRoutes`](crate::snapshot::HostRoutes), asked by the router. Only
//! what a request's head says is looked at.

use std::cmp::{Ordering, Reverse};
use std::fmt;
use std::sync::Arc;

use http::{HeaderMap, Method};

/// Conditions of one route. All of them must hold.
///
/// Two with the same conditions are equal, in whatever order they were given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Conditions {
    methods: Vec<Arc<str>>,
    headers: Vec<Condition>,
    query: Vec<Condition>,
}

/// A header or query parameter that must be there.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Condition {
    /// Of a header: lower case.
    pub name: Arc<str>,
    pub value: ValueMatch,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ValueMatch {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Present,
}

impl Conditions {
    /// `methods`: one of these, any if there are none. `query`: of the query's `name=value` pairs as
    /// they stand there, percent-encoding and all.
    pub fn new(
        mut methods: Vec<Arc<str>>,
        mut headers: Vec<Condition>,
        mut query: Vec<Condition>,
    ) -> Conditions {
        methods.sort_unstable();
        methods.dedup();
        for conditions in [&mut headers, &mut query] {
            conditions.sort_unstable();
            conditions.dedup();
        }
        Conditions {
            methods,
            headers,
            query,
        }
    }

    pub fn methods(&self) -> &[Arc<str>] {
        &self.methods
    }

    pub fn headers(&self) -> &[Condition] {
        &self.headers
    }

    pub fn query(&self) -> &[Condition] {
        &self.query
    }

    pub fn is_empty(&self) -> bool {
        self.count() == 0
    }

    /// Whether a request meets all of them. One of several headers or parameters of a name is enough.
    pub fn hold(&self, method: &Method, headers: &HeaderMap, query: Option<&str>) -> bool {
        let method = method.as_str();
        (self.methods.is_empty() || self.methods.iter().any(|wanted| **wanted == *method))
            && self.headers.iter().all(|wanted| {
                let mut values = headers.get_all(&*wanted.name).iter();
                values.any(|value| wanted.value.covers(value.as_bytes()))
            })
            && self.query.iter().all(|wanted| {
                let mut pairs = query.unwrap_or_default().split('&');
                pairs.any(|pair| {
                    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                    *name == *wanted.name && wanted.value.covers(value.as_bytes())
                })
            })
    }

    /// Which is tried first on one path: the one with more conditions, its methods counting as one;
    /// of as many the one with methods, then the one with more headers; then by the methods, the
    /// headers and the parameters in order of their names, of one name an exact value before a prefix,
    /// a longer prefix before a shorter, and mere presence last. Equal only for equal conditions.
    pub fn order(&self, other: &Conditions) -> Ordering {
        let rank = |conditions: &Conditions| {
            Reverse((
                conditions.count(),
                !conditions.methods.is_empty(),
                conditions.headers.len(),
            ))
        };
        rank(self).cmp(&rank(other)).then_with(|| self.cmp(other))
    }

    fn count(&self) -> usize {
        usize::from(!self.methods.is_empty()) + self.headers.len() + self.query.len()
    }
}

impl ValueMatch {
    fn covers(&self, value: &[u8]) -> bool {
        match self {
            ValueMatch::Exact(wanted) => value == wanted.as_bytes(),
            ValueMatch::Prefix(wanted) => value.starts_with(wanted.as_bytes()),
            ValueMatch::Present => true,
        }
    }

    /// The more specific is the lesser.
    fn rank(&self) -> (u8, Reverse<usize>, &str) {
        match self {
            ValueMatch::Exact(text) => (0, Reverse(0), text),
            ValueMatch::Prefix(text) => (1, Reverse(text.len()), text),
            ValueMatch::Present => (2, Reverse(0), ""),
        }
    }
}

impl Ord for ValueMatch {
    fn cmp(&self, other: &ValueMatch) -> Ordering {
        self.rank().cmp(&other.rank())
    }
}

impl PartialOrd for ValueMatch {
    fn partial_cmp(&self, other: &ValueMatch) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// `GET|HEAD x-canary=yes user-agent=curl/* x-debug ?preview=1`
impl fmt::Display for Conditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut between = "";
        if !self.methods.is_empty() {
            f.write_str(&self.methods.join("|"))?;
            between = " ";
        }
        for (conditions, mark) in [(&self.headers, ""), (&self.query, "?")] {
            for Condition { name, value } in conditions {
                write!(f, "{between}{mark}{name}")?;
                match value {
                    ValueMatch::Exact(text) => write!(f, "={text}")?,
                    ValueMatch::Prefix(text) => write!(f, "={text}*")?,
                    ValueMatch::Present => {}
                }
                between = " ";
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(name: &str, value: ValueMatch) -> Condition {
        Condition {
            name: name.into(),
            value,
        }
    }

    fn exact(name: &str, value: &str) -> Condition {
        condition(name, ValueMatch::Exact(value.into()))
    }

    fn prefix(name: &str, value: &str) -> Condition {
        condition(name, ValueMatch::Prefix(value.into()))
    }

    fn present(name: &str) -> Condition {
        condition(name, ValueMatch::Present)
    }

    fn of_headers(headers: &[Condition]) -> Conditions {
        Conditions::new(Vec::new(), headers.to_vec(), Vec::new())
    }

    #[test]
    fn all_conditions_must_hold_and_one_of_several_values_is_enough() {
        let conditions = Conditions::new(
            vec!["GET".into(), "HEAD".into()],
            vec![exact("x-a", "1"), prefix("x-b", "pre"), present("x-c")],
            vec![exact("q", "a%20b"), present("flag")],
        );
        let mut headers = HeaderMap::new();
        for (name, value) in [("x-a", "0"), ("x-a", "1"), ("x-b", "prefix"), ("x-c", "")] {
            headers.append(name, value.parse().unwrap());
        }
        let query = Some("flag&q=other&q=a%20b");
        assert!(conditions.hold(&Method::HEAD, &headers, query));
        assert!(!conditions.hold(&Method::POST, &headers, query));
        for query in [
            None,
            Some("q=a%20b"),
            Some("flag&q=a b"),
            Some("flagged&q=a%20b"),
        ] {
            assert!(!conditions.hold(&Method::GET, &headers, query), "{query:?}");
        }
        for name in ["x-a", "x-b", "x-c"] {
            let mut fewer = headers.clone();
            fewer.remove(name);
            assert!(!conditions.hold(&Method::GET, &fewer, query), "{name}");
        }
        assert!(Conditions::default().hold(&Method::GET, &headers, None));
    }

    #[test]
    fn the_same_conditions_are_equal_in_any_order() {
        assert_eq!(
            of_headers(&[exact("b", "1"), exact("a", "1"), exact("b", "1")]),
            of_headers(&[exact("a", "1"), exact("b", "1")])
        );
    }

    #[test]
    fn the_more_specific_is_tried_first() {
        let method = |headers: &[Condition]| {
            Conditions::new(vec!["GET".into()], headers.to_vec(), Vec::new())
        };
        let in_order = [
            method(&[exact("a", "1")]),
            of_headers(&[exact("a", "1"), present("b")]),
            Conditions::new(Vec::new(), vec![present("a")], vec![present("q")]),
            method(&[]),
            of_headers(&[exact("a", "1")]),
            of_headers(&[exact("a", "2")]),
            of_headers(&[prefix("a", "12")]),
            of_headers(&[prefix("a", "1")]),
            of_headers(&[present("a")]),
            of_headers(&[exact("b", "1")]),
            Conditions::new(Vec::new(), Vec::new(), vec![exact("q", "1")]),
        ];
        for (i, first) in in_order.iter().enumerate() {
            for (j, second) in in_order.iter().enumerate() {
                assert_eq!(first.order(second), i.cmp(&j), "{first} and {second}");
            }
        }
    }

    #[test]
    fn conditions_are_shown_on_one_line() {
        let conditions = Conditions::new(
            vec!["HEAD".into(), "GET".into()],
            vec![prefix("user-agent", "curl/"), present("x-debug")],
            vec![exact("preview", "1")],
        );
        assert_eq!(
            conditions.to_string(),
            "GET|HEAD user-agent=curl/* x-debug ?preview=1"
        );
    }
}
