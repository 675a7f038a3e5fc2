//! A request as one line: an object of JSON, or the words of gorouter
//! (accesslog/schema/access_log_record.go).

use std::borrow::Cow;
use std::io::Write;
use std::time::Duration;

use data_encoding::HEXLOWER;
use http::{HeaderValue, Version};
use ring::digest;

use crate::config::{AccessLogFormat, RedactQuery};
use crate::l7::access_log::Rules;
use crate::l7::access_log::entry::{Ended, Entry, EntryBackend, RequestLine};
use crate::l7::access_log::{escape, timestamp};

pub(super) fn render(line: &mut Vec<u8>, rules: &Rules, entry: &Entry, ended: &Ended<'_>) {
    match rules.format {
        AccessLogFormat::Json => json(line, rules, entry, ended),
        AccessLogFormat::Gorouter => gorouter(line, rules, entry, ended),
    }
    line.push(b'\n');
}

/// Members that are not known are left out.
fn json(line: &mut Vec<u8>, rules: &Rules, entry: &Entry, ended: &Ended<'_>) {
    line.extend_from_slice(b"{\"time\":\"");
    timestamp::write(line, ended.began);
    line.push(b'"');
    if let Some(status) = ended.status {
        push(line, format_args!(",\"status\":{}", status.as_u16()));
    }
    if let Some(request) = &entry.request {
        text(line, "method", request.method.as_str().as_bytes());
        text(line, "target", &target(rules, request));
        text(line, "protocol", protocol(request.version).as_bytes());
        optional(line, "host", host(request));
    }
    if let Some(route) = ended.route {
        text(line, "route", route.to_string().as_bytes());
    }
    let service = entry.route_service.as_ref();
    optional(
        line,
        "route_service",
        service.map(|it| it.as_str().as_bytes()),
    );
    if rules.client_address {
        text(line, "client", ended.peer.to_string().as_bytes());
        optional(line, "x_forwarded_for", bytes(&entry.forwarded_for));
    }
    optional(line, "x_forwarded_proto", bytes(&entry.forwarded_proto));
    push(
        line,
        format_args!(
            ",\"bytes_received\":{},\"bytes_sent\":{}",
            ended.bytes_in, ended.bytes_out
        ),
    );
    json_backend(line, entry);
    seconds(line, "duration_seconds", Some(ended.total));
    let referer = entry
        .referer
        .as_ref()
        .map(|it| redacted(rules, it.as_bytes()));
    optional(line, "referer", referer.as_deref());
    optional(line, "user_agent", bytes(&entry.user_agent));
    optional(line, "request_id", bytes(&entry.request_id));
    if let Some(trace) = entry.trace {
        push(line, format_args!(",\"trace_id\":\"{trace:032x}\""));
    }
    if let Some(tls) = ended.tls {
        text(line, "tls_version", tls.version.as_bytes());
        let cipher = Some(tls.cipher.as_bytes());
        optional(line, "tls_cipher", cipher.filter(|it| !it.is_empty()));
        optional(line, "tls_sni", tls.sni.as_deref().map(str::as_bytes));
    }
    optional(line, "error", entry.error.map(str::as_bytes));
    optional(
        line,
        "aborted",
        ended.aborted.map(|it| it.as_str().as_bytes()),
    );
    let values = rules.headers.iter().zip(&entry.headers);
    let mut known = values.filter_map(|((_, name), value)| Some((name, value.as_ref()?)));
    if let Some((name, value)) = known.next() {
        push(line, format_args!(",\"headers\":{{\"{name}\":"));
        escape::json(line, value.as_bytes());
        for (name, value) in known {
            text(line, name, value.as_bytes());
        }
        line.push(b'}');
    }
    line.push(b'}');
}

fn json_backend(line: &mut Vec<u8>, entry: &Entry) {
    let Some(backend) = &entry.backend else {
        return;
    };
    text(line, "backend", backend.address.to_string().as_bytes());
    optional(line, "app_id", bytes(&backend.app));
    optional(line, "app_index", bytes(&backend.index));
    optional(line, "instance_id", bytes(&backend.instance_id));
    push(line, format_args!(",\"attempts\":{}", entry.attempts));
    seconds(line, "connect_seconds", entry.times.connect());
    seconds(line, "backend_seconds", entry.times.backend());
}

fn gorouter(line: &mut Vec<u8>, rules: &Rules, entry: &Entry, ended: &Ended<'_>) {
    match entry.request.as_ref().and_then(host) {
        Some(host) => escape::bare(line, host),
        None => line.push(b'-'),
    }
    line.extend_from_slice(b" - [");
    timestamp::write(line, ended.began);
    line.extend_from_slice(b"] ");
    match &entry.request {
        Some(request) => {
            let target = target(rules, request);
            let line_parts = [request.method.as_str().as_bytes(), &target];
            line.push(b'"');
            for part in line_parts {
                escape::inside_quotes(line, part);
                line.push(b' ');
            }
            line.extend_from_slice(protocol(request.version).as_bytes());
            line.push(b'"');
        }
        None => dash(line),
    }
    line.push(b' ');
    match ended.status {
        Some(status) => push(line, format_args!("{}", status.as_u16())),
        None => dash(line),
    }
    push(
        line,
        format_args!(" {} {}", ended.bytes_in, ended.bytes_out),
    );
    let referer = entry
        .referer
        .as_ref()
        .map(|it| redacted(rules, it.as_bytes()));
    let shown = rules.client_address;
    let peer = shown.then(|| ended.peer.to_string());
    let backend = entry.backend.as_ref().map(|it| it.address.to_string());
    for value in [
        referer.as_deref(),
        bytes(&entry.user_agent),
        peer.as_deref().map(str::as_bytes),
        backend.as_deref().map(str::as_bytes),
    ] {
        line.push(b' ');
        quoted_or_dash(line, value);
    }
    let forwarded_for = bytes(&entry.forwarded_for).filter(|_| shown);
    named(line, "x_forwarded_for", forwarded_for);
    named(line, "x_forwarded_proto", bytes(&entry.forwarded_proto));
    named(line, "vcap_request_id", bytes(&entry.request_id));
    let gateway = ended
        .total
        .saturating_sub(entry.times.backend().unwrap_or_default());
    push(
        line,
        format_args!(
            " response_time:{:.6} gorouter_time:{:.6}",
            ended.total.as_secs_f64(),
            gateway.as_secs_f64()
        ),
    );
    let of_backend = |value: fn(&EntryBackend) -> &Option<HeaderValue>| {
        entry.backend.as_ref().and_then(|it| bytes(value(it)))
    };
    named(line, "app_id", of_backend(|it| &it.app));
    named(line, "app_index", of_backend(|it| &it.index));
    named(line, "instance_id", of_backend(|it| &it.instance_id));
    let aborted = ended.aborted.map(|it| format!("aborted ({})", it.as_str()));
    let error = entry.error.or(aborted.as_deref());
    named(line, "x_cf_routererror", error.map(str::as_bytes));
    for ((_, name), value) in rules.headers.iter().zip(&entry.headers) {
        named(line, name, bytes(value));
    }
}

fn bytes(value: &Option<HeaderValue>) -> Option<&[u8]> {
    value.as_ref().map(HeaderValue::as_bytes)
}

fn host(request: &RequestLine) -> Option<&[u8]> {
    let authority = || request.target.authority().map(|it| it.as_str().as_bytes());
    bytes(&request.host).or_else(authority)
}

/// The target in origin form, or as it came where it has no path.
fn target<'a>(rules: &Rules, request: &'a RequestLine) -> Cow<'a, [u8]> {
    match request.target.path_and_query() {
        Some(target) => redacted(rules, target.as_str().as_bytes()),
        None => Cow::Owned(request.target.to_string().into_bytes()),
    }
}

/// Without its query, if that is not to be logged.
fn redacted<'a>(rules: &Rules, url: &'a [u8]) -> Cow<'a, [u8]> {
    let Some(at) = url.iter().position(|&byte| byte == b'?') else {
        return Cow::Borrowed(url);
    };
    match rules.redact_query {
        RedactQuery::None => Cow::Borrowed(url),
        RedactQuery::All => Cow::Borrowed(&url[..at]),
        RedactQuery::Hash => {
            let query = &url[at + 1..];
            let hash = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, query);
            let mut redacted = url[..=at].to_vec();
            redacted.extend_from_slice(HEXLOWER.encode(hash.as_ref()).as_bytes());
            Cow::Owned(redacted)
        }
    }
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2.0",
        Version::HTTP_3 => "HTTP/3.0",
        _ => "HTTP/1.1",
    }
}

fn text(line: &mut Vec<u8>, name: &str, value: &[u8]) {
    push(line, format_args!(",\"{name}\":"));
    escape::json(line, value);
}

fn optional(line: &mut Vec<u8>, name: &str, value: Option<&[u8]>) {
    if let Some(value) = value {
        text(line, name, value);
    }
}

fn seconds(line: &mut Vec<u8>, name: &str, value: Option<Duration>) {
    if let Some(value) = value {
        push(line, format_args!(",\"{name}\":{:.6}", value.as_secs_f64()));
    }
}

fn named(line: &mut Vec<u8>, name: &str, value: Option<&[u8]>) {
    push(line, format_args!(" {name}:"));
    quoted_or_dash(line, value);
}

fn quoted_or_dash(line: &mut Vec<u8>, value: Option<&[u8]>) {
    match value {
        Some(value) if !value.is_empty() => escape::quoted(line, value),
        _ => dash(line),
    }
}

fn dash(line: &mut Vec<u8>) {
    line.extend_from_slice(b"\"-\"");
}

fn push(line: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    line.write_fmt(text).expect("a vector takes all");
}
