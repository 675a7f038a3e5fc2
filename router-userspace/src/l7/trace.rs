//! Which trace a request is part of: W3C Trace Context (`traceparent`, `tracestate`) and B3, in one
//! header or several.
//!
//! Called before a request is looked at. With `begin` the gateway is a span of its own: a trace that
//! came goes on under a new span id, and a request without one begins a trace. What is no valid context
//! goes no further. Spans are exported by [`otlp`](crate::l7::otlp).

use data_encoding::HEXLOWER;
use http::{HeaderMap, HeaderName, HeaderValue};
use rand::Rng;

use crate::config::{HttpTracing, TraceMode};
use crate::l7::client::Client;

pub(super) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub(super) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
pub(super) const B3: HeaderName = HeaderName::from_static("b3");
pub(super) const B3_TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
pub(super) const B3_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-spanid");
pub(super) const B3_PARENT_ID: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// Length of a `traceparent` of version 00 (Trace Context §3.2.2), which longer ones begin like.
const TRACEPARENT_LEN: usize = 55;

/// Big-endian, as it is written; those of B3 may have 64 bits, whose upper half is 0.
pub(super) type TraceId = u128;

/// Where a request stands in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Context {
    trace: TraceId,
    span: u64,
    sampled: bool,
}

/// The trace that a request is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Traced {
    pub trace: TraceId,
    /// The gateway's own span, if it is one and is sampled.
    pub span: Option<SpanContext>,
}

/// A span of the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SpanContext {
    pub trace: TraceId,
    pub span: u64,
    /// Whose part it is; `None`: the trace begins with it.
    pub parent: Option<u64>,
}

/// Checks and sets the trace headers of a request as `http.tracing` asks for; the trace it is part of,
/// if that is looked at.
pub(super) fn settle(client: &Client, headers: &mut HeaderMap) -> Option<Traced> {
    let worker = &client.worker;
    worker.settings(|settings| {
        let tracing = &settings.tracing;
        let is_believed = || !tracing.trusted_only || settings.trusts(client.peer.ip());
        match tracing.mode {
            TraceMode::Off => None,
            TraceMode::Pass => {
                let trace = pass(headers, tracing, is_believed())?;
                Some(Traced { trace, span: None })
            }
            TraceMode::Begin => {
                worker.with_rng(|rng| Some(begin(headers, tracing, is_believed(), rng)))
            }
        }
    })
}

/// Removes what is not believed or no context, and leaves the rest as it is.
fn pass(headers: &mut HeaderMap, tracing: &HttpTracing, is_believed: bool) -> Option<TraceId> {
    let w3c = w3c_of(headers).filter(|_| is_believed);
    if tracing.w3c && w3c.is_none() {
        remove_w3c(headers);
    }
    let b3 = b3_of(headers).filter(|_| is_believed);
    if tracing.b3 && b3.is_none() {
        remove_b3(headers);
    }
    let known = w3c.filter(|_| tracing.w3c).or(b3.filter(|_| tracing.b3));
    Some(known?.trace)
}

fn begin(
    headers: &mut HeaderMap,
    tracing: &HttpTracing,
    is_believed: bool,
    rng: &mut impl Rng,
) -> Traced {
    let w3c = w3c_of(headers).filter(|_| tracing.w3c && is_believed);
    let b3 = b3_of(headers).filter(|_| tracing.b3 && is_believed);
    let came = w3c.or(b3);
    let context = Context {
        // An id of zeros is none (§3.2.2.3).
        trace: came.map_or_else(|| rng.random_range(1..=TraceId::MAX), |it| it.trace),
        span: rng.random_range(1..=u64::MAX),
        sampled: came.map_or_else(|| rng.random_bool(tracing.sample), |it| it.sampled),
    };
    if tracing.w3c {
        if w3c.is_none() {
            // It belongs to a trace that has ended here (§3.3.1.4).
            headers.remove(TRACESTATE);
        }
        headers.insert(TRACEPARENT, value(&traceparent(&context)));
    }
    if tracing.b3 {
        set_b3(headers, &context, came.map(|it| it.span));
    }
    let span = SpanContext {
        trace: context.trace,
        span: context.span,
        parent: came.map(|it| it.span),
    };
    Traced {
        trace: context.trace,
        span: context.sampled.then_some(span),
    }
}

/// Has a sampled request go out as part of `span`, which is below `own`, in the headers that it has.
pub(super) fn set_span(headers: &mut HeaderMap, own: &SpanContext, span: u64) {
    let context = Context {
        trace: own.trace,
        span,
        sampled: true,
    };
    if headers.contains_key(TRACEPARENT) {
        headers.insert(TRACEPARENT, value(&traceparent(&context)));
    }
    if headers.contains_key(B3) {
        set_b3(headers, &context, Some(own.span));
    }
}

fn traceparent(context: &Context) -> String {
    let Context {
        trace,
        span,
        sampled,
    } = context;
    format!("00-{trace:032x}-{span:016x}-{:02x}", u8::from(*sampled))
}

fn set_b3(headers: &mut HeaderMap, context: &Context, parent: Option<u64>) {
    remove_b3(headers);
    let trace = match u64::try_from(context.trace) {
        Ok(short) => format!("{short:016x}"),
        Err(_) => format!("{:032x}", context.trace),
    };
    let span = format!("{:016x}", context.span);
    let sampled = if context.sampled { "1" } else { "0" };
    let mut single = format!("{trace}-{span}-{sampled}");
    if let Some(parent) = parent {
        let parent = format!("{parent:016x}");
        single = format!("{single}-{parent}");
        headers.insert(B3_PARENT_ID, value(&parent));
    }
    headers.insert(B3_TRACE_ID, value(&trace));
    headers.insert(B3_SPAN_ID, value(&span));
    headers.insert(B3_SAMPLED, HeaderValue::from_static(sampled));
    headers.insert(B3, value(&single));
}

fn value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("hexadecimal digits and hyphens")
}

fn remove_w3c(headers: &mut HeaderMap) {
    for name in [TRACEPARENT, TRACESTATE] {
        headers.remove(name);
    }
}

fn remove_b3(headers: &mut HeaderMap) {
    for name in [
        B3,
        B3_TRACE_ID,
        B3_SPAN_ID,
        B3_PARENT_ID,
        B3_SAMPLED,
        B3_FLAGS,
    ] {
        headers.remove(name);
    }
}

/// `None` if there is no `traceparent`, more than one, or one that is not valid (§3.2.2).
fn w3c_of(headers: &HeaderMap) -> Option<Context> {
    let bytes = the_one(headers, &TRACEPARENT)?;
    let (head, rest) = bytes.split_at_checked(TRACEPARENT_LEN)?;
    let mut parts = head.split(|&byte| byte == b'-');
    let [version] = hex(parts.next()?)?;
    let trace = TraceId::from_be_bytes(hex(parts.next()?)?);
    let span = u64::from_be_bytes(hex(parts.next()?)?);
    let [flags] = hex(parts.next()?)?;
    let is_valid = match version {
        0 => rest.is_empty(),
        0xff => false,
        _ => rest.is_empty() || rest[0] == b'-',
    };
    (is_valid && trace != 0 && span != 0).then_some(Context {
        trace,
        span,
        sampled: flags & 1 == 1,
    })
}

/// Of `b3`, or else of the several headers.
fn b3_of(headers: &HeaderMap) -> Option<Context> {
    if let Some(single) = the_one(headers, &B3) {
        let mut parts = single.split(|&byte| byte == b'-');
        let (trace, span) = (parts.next()?, parts.next()?);
        return b3(trace, span, parts.next());
    }
    let trace = the_one(headers, &B3_TRACE_ID)?;
    let span = the_one(headers, &B3_SPAN_ID)?;
    let sampled = match the_one(headers, &B3_FLAGS) {
        Some(b"1") => Some(&b"d"[..]),
        _ => the_one(headers, &B3_SAMPLED),
    };
    b3(trace, span, sampled)
}

/// No decision about sampling is one for it: whoever comes next may decide.
fn b3(trace: &[u8], span: &[u8], sampled: Option<&[u8]>) -> Option<Context> {
    let trace = match trace.len() {
        16 => TraceId::from(u64::from_be_bytes(hex(trace)?)),
        _ => TraceId::from_be_bytes(hex(trace)?),
    };
    let span = u64::from_be_bytes(hex(span)?);
    let sampled = match sampled {
        None | Some(b"1" | b"d" | b"true") => true,
        Some(b"0" | b"false") => false,
        Some(_) => return None,
    };
    (trace != 0 && span != 0).then_some(Context {
        trace,
        span,
        sampled,
    })
}

fn the_one<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a [u8]> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?;
    values.next().is_none().then_some(value.as_bytes())
}

/// Bytes from digits in lower case, as many as there must be.
fn hex<const LEN: usize>(digits: &[u8]) -> Option<[u8; LEN]> {
    if digits.len() != 2 * LEN {
        return None;
    }
    let mut bytes = [0; LEN];
    HEXLOWER.decode_mut(digits, &mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

    fn tracing(mode: TraceMode, w3c: bool, b3: bool) -> HttpTracing {
        HttpTracing {
            mode,
            w3c,
            b3,
            ..HttpTracing::default()
        }
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    fn begun(headers: &mut HeaderMap, tracing: &HttpTracing) -> String {
        let mut rng = SmallRng::seed_from_u64(7);
        let traced = begin(headers, tracing, true, &mut rng);
        format!("{:032x}", traced.trace)
    }

    fn text(headers: &HeaderMap, name: &str) -> String {
        headers[name].to_str().unwrap().to_owned()
    }

    #[test]
    fn a_trace_goes_on_under_a_new_span() {
        let mut headers = headers(&[("traceparent", PARENT), ("tracestate", "a=b")]);
        let tracing = tracing(TraceMode::Begin, true, true);
        assert_eq!(begun(&mut headers, &tracing), TRACE);
        let parent = text(&headers, "traceparent");
        assert!(parent.starts_with(&format!("00-{TRACE}-")) && parent.ends_with("-00"));
        assert_ne!(parent, PARENT);
        assert_eq!(headers["tracestate"], "a=b");
        let span = &parent[36..52];
        assert_eq!(text(&headers, "x-b3-spanid"), span);
        assert_eq!(headers["x-b3-parentspanid"], "b7ad6b7169203331");
        assert_eq!(
            text(&headers, "b3"),
            format!("{TRACE}-{span}-0-b7ad6b7169203331")
        );
    }

    #[test]
    fn a_trace_of_b3_goes_on_in_both_forms() {
        for b3 in [
            &[("b3", "463ac35c9f6413ad-a2fb4a1d1a96d312-1-05e3ac9a4f6e3b90")][..],
            &[
                ("x-b3-traceid", "463ac35c9f6413ad"),
                ("x-b3-spanid", "a2fb4a1d1a96d312"),
                ("x-b3-flags", "1"),
            ],
        ] {
            let mut headers = headers(b3);
            begun(&mut headers, &tracing(TraceMode::Begin, true, true));
            assert_eq!(headers["x-b3-traceid"], "463ac35c9f6413ad");
            assert_eq!(headers["x-b3-parentspanid"], "a2fb4a1d1a96d312");
            assert_eq!(headers["x-b3-sampled"], "1");
            assert!(!headers.contains_key("x-b3-flags"));
            let parent = text(&headers, "traceparent");
            assert!(
                parent.starts_with("00-0000000000000000463ac35c9f6413ad-"),
                "{parent}"
            );
        }
    }

    #[test]
    fn what_is_no_context_is_replaced() {
        for bad in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00-more",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-00",
            "00-00000000000000000000000000000000-b7ad6b7169203331-00",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-00",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
            "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00.more",
        ] {
            let came = headers(&[("traceparent", bad), ("tracestate", "a=b")]);
            let mut begins = came.clone();
            assert_ne!(
                begun(&mut begins, &tracing(TraceMode::Begin, true, false)),
                TRACE
            );
            assert!(
                w3c_of(&begins).is_some_and(|it| it.sampled) && !begins.contains_key("tracestate")
            );
            let mut passes = came.clone();
            assert_eq!(
                pass(&mut passes, &tracing(TraceMode::Pass, true, false), true),
                None
            );
            assert!(passes.is_empty());
        }
        let mut twice = headers(&[("traceparent", PARENT), ("traceparent", PARENT)]);
        assert_eq!(
            pass(&mut twice, &tracing(TraceMode::Pass, true, false), true),
            None
        );
    }

    #[test]
    fn a_later_version_is_read_like_the_first() {
        let later = format!("cc{}-more", &PARENT[2..]);
        let mut headers = headers(&[("traceparent", &later)]);
        assert_eq!(
            begun(&mut headers, &tracing(TraceMode::Begin, true, false)),
            TRACE
        );
    }

    #[test]
    fn a_context_that_passes_is_left_as_it_is() {
        let came = headers(&[("traceparent", PARENT), ("tracestate", "a=b")]);
        let mut passes = came.clone();
        let trace = pass(&mut passes, &tracing(TraceMode::Pass, true, true), true);
        assert_eq!(
            (trace.map(|it| format!("{it:032x}")), &passes),
            (Some(TRACE.to_owned()), &came)
        );
        assert_eq!(
            pass(&mut passes, &tracing(TraceMode::Pass, true, true), false),
            None
        );
        assert!(passes.is_empty());
    }

    #[test]
    fn a_format_that_is_off_is_not_looked_at() {
        let came = headers(&[("b3", "nonsense"), ("traceparent", "nonsense")]);
        let mut passes = came.clone();
        pass(&mut passes, &tracing(TraceMode::Pass, false, false), true);
        assert_eq!(passes, came);
    }

    #[test]
    fn no_more_traces_are_sampled_than_are_to_be() {
        let none = HttpTracing {
            sample: 0.0,
            ..tracing(TraceMode::Begin, true, false)
        };
        let mut headers = HeaderMap::new();
        begun(&mut headers, &none);
        assert!(text(&headers, "traceparent").ends_with("-00"));
    }

    proptest! {
        #[test]
        fn what_comes_out_is_a_context_whatever_came(
            parent in "[ -~]{0,60}",
            b3 in "[0-9a-fd-]{0,70}",
        ) {
            let mut headers = headers(&[("traceparent", parent.trim()), ("b3", &b3)]);
            let trace = begun(&mut headers, &tracing(TraceMode::Begin, true, true));
            for context in [w3c_of(&headers), b3_of(&headers)] {
                prop_assert_eq!(format!("{:032x}", context.unwrap().trace), trace.clone());
            }
        }
    }
}
