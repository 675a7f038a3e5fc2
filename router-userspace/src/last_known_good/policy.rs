//! Declared policies as the file has them: each part written, and read below.

use std::io::{self, Write};
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, StatusCode};

use super::bytes::{Decoder, Encoder};
use super::words;
use crate::route::Origin;
use crate::route::policy::{
    HeaderEdits, HttpPolicy, PathRewrite, Rate, Redirect, Rewrite, RouteLimits, RouteRetries,
    RouteTimeouts,
};

pub fn put<W: Write>(out: &mut Encoder<W>, policy: &HttpPolicy) -> io::Result<()> {
    // By name, so that a new field cannot be forgotten.
    let HttpPolicy {
        origin: _,
        balance,
        route_service_url,
        redirect,
        rewrite,
        request_headers,
        response_headers,
        timeouts,
        retries,
        limits,
        compression,
    } = policy;
    out.option(balance.as_ref(), words::put_balance)?;
    out.text_option(route_service_url.as_ref())?;
    out.option(redirect.as_ref(), put_redirect)?;
    out.option(rewrite.host.as_ref(), |out, host| {
        out.bytes(host.as_bytes())
    })?;
    out.option(rewrite.path.as_ref(), put_path)?;
    put_edits(out, request_headers)?;
    put_edits(out, response_headers)?;
    let RouteTimeouts {
        response_headers,
        body_idle,
        total,
    } = timeouts;
    for timeout in [response_headers, body_idle, total] {
        out.option(timeout.as_ref(), put_duration)?;
    }
    let RouteRetries { attempts, methods } = retries;
    out.option(*attempts, |out, attempts| out.number(attempts as u64))?;
    out.list(methods, |out, method| out.text(method.as_str()))?;
    put_limits(out, limits)?;
    out.flag(*compression)
}

pub fn policy(input: &mut Decoder<'_>) -> Option<HttpPolicy> {
    Some(HttpPolicy {
        origin: Origin::Adopted,
        balance: input.option(words::balance)?,
        route_service_url: input.text_option()?,
        redirect: input.option(redirect)?,
        rewrite: Rewrite {
            host: input.option(value)?,
            path: input.option(path)?,
        },
        request_headers: edits(input)?,
        response_headers: edits(input)?,
        timeouts: RouteTimeouts {
            response_headers: input.option(duration)?,
            body_idle: input.option(duration)?,
            total: input.option(duration)?,
        },
        retries: RouteRetries {
            attempts: input.option(Decoder::small)?,
            methods: input.list(|input| Method::from_bytes(input.bytes()?).ok())?,
        },
        limits: limits(input)?,
        compression: input.flag()?,
    })
}

fn put_redirect<W: Write>(out: &mut Encoder<W>, redirect: &Redirect) -> io::Result<()> {
    let Redirect {
        status,
        scheme,
        authority,
        path,
    } = redirect;
    out.number(status.as_u16().into())?;
    out.text_option(scheme.as_ref())?;
    out.text_option(authority.as_ref())?;
    out.option(path.as_ref(), put_path)
}

fn redirect(input: &mut Decoder<'_>) -> Option<Redirect> {
    Some(Redirect {
        status: StatusCode::from_u16(input.small()?).ok()?,
        scheme: input.text_option()?,
        authority: input.text_option()?,
        path: input.option(path)?,
    })
}

fn put_path<W: Write>(out: &mut Encoder<W>, path: &PathRewrite) -> io::Result<()> {
    let (is_prefix, text) = match path {
        PathRewrite::Full(text) => (false, text),
        PathRewrite::Prefix(text) => (true, text),
    };
    out.flag(is_prefix)?;
    out.text(text)
}

fn path(input: &mut Decoder<'_>) -> Option<PathRewrite> {
    let is_prefix = input.flag()?;
    let text = input.text()?;
    Some(match is_prefix {
        true => PathRewrite::Prefix(text),
        false => PathRewrite::Full(text),
    })
}

fn put_edits<W: Write>(out: &mut Encoder<W>, edits: &HeaderEdits) -> io::Result<()> {
    let HeaderEdits { remove, set, add } = edits;
    out.list(remove, |out, name| out.text(name.as_str()))?;
    for headers in [set, add] {
        out.list(headers, |out, (name, value)| {
            out.text(name.as_str())?;
            out.bytes(value.as_bytes())
        })?;
    }
    Ok(())
}

fn edits(input: &mut Decoder<'_>) -> Option<HeaderEdits> {
    let header = |input: &mut Decoder<'_>| Some((name(input)?, value(input)?));
    Some(HeaderEdits {
        remove: input.list(name)?,
        set: input.list(header)?,
        add: input.list(header)?,
    })
}

fn name(input: &mut Decoder<'_>) -> Option<HeaderName> {
    HeaderName::from_bytes(input.bytes()?).ok()
}

fn value(input: &mut Decoder<'_>) -> Option<HeaderValue> {
    HeaderValue::from_bytes(input.bytes()?).ok()
}

fn put_duration<W: Write>(out: &mut Encoder<W>, duration: &Duration) -> io::Result<()> {
    out.number(duration.as_secs())?;
    out.number(duration.subsec_nanos().into())
}

fn duration(input: &mut Decoder<'_>) -> Option<Duration> {
    let (seconds, nanos) = (input.number()?, input.small()?);
    (nanos < 1_000_000_000).then(|| Duration::new(seconds, nanos))
}

fn put_limits<W: Write>(out: &mut Encoder<W>, limits: &RouteLimits) -> io::Result<()> {
    let RouteLimits {
        request_body_bytes,
        requests_per_backend,
        requests,
        rate,
        client_rate,
    } = limits;
    let numbers = [
        *request_body_bytes,
        requests_per_backend.map(u64::from),
        requests.map(u64::from),
    ];
    for number in numbers {
        out.option(number, Encoder::number)?;
    }
    for rate in [rate, client_rate] {
        out.option(*rate, |out, rate| {
            out.number(rate.per_second.into())?;
            out.number(rate.burst.into())
        })?;
    }
    Ok(())
}

fn limits(input: &mut Decoder<'_>) -> Option<RouteLimits> {
    let rate = |input: &mut Decoder<'_>| {
        Some(Rate {
            per_second: input.small()?,
            burst: input.small()?,
        })
    };
    Some(RouteLimits {
        request_body_bytes: input.option(Decoder::number)?,
        requests_per_backend: input.option(Decoder::small)?,
        requests: input.option(Decoder::small)?,
        rate: input.option(rate)?,
        client_rate: input.option(rate)?,
    })
}
