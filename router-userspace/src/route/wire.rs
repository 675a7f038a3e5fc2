//! `router.register` and `router.unregister` as they are on the wire.
//!
//! A source hands in the bytes of a message and gets a [`Registration`] or [`Unregistration`] whose
//! every part is valid, or a [`Reject`] that names the field. Nothing is half applied: one bad entry
//! of a list refuses the message. Limits of a message are the constants here.
//!
//! The JSON is read as leniently as Go's `encoding/json` reads it for gorouter: names in any case,
//! unknown fields ignored, `null` like an absent field, the last of two equal names wins. Stricter
//! than gorouter on purpose: backends are IP addresses with a port, URIs are not empty and their
//! hosts can be hosts, strings are UTF-8, and a message without a route is refused.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;
use ipnet::IpNet;
use serde::de::{self, DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::route::ownership::Refusal;
use crate::route::policy::{BALANCE_PERCENT, HashKey, HashOf};
use crate::route::{
    Backend, BackendTls, Balance, HttpMatch, HttpProtocol, Instance, Origin, Registration,
    RouteKey, TlsRoots, Unregistration, Vip,
};

/// Bytes of one message; nats-server's own default limit.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// Entries of `uris`, and of `vips`.
pub const MAX_ROUTES: usize = 1024;
pub const MAX_TAGS: usize = 256;
/// Bytes of every string but `uris` and `vips`.
pub const MAX_TEXT_BYTES: usize = 2048;
/// RFC 1035 §2.3.4, as text without the trailing dot.
pub const MAX_HOST_BYTES: usize = 253;
pub const MAX_LABEL_BYTES: usize = 63;
pub const MAX_PATH_BYTES: usize = 2048;
/// The shortest lifetime a registration can ask for; smaller and negative ones count as this.
pub const MIN_STALE_AFTER: Duration = Duration::from_secs(1);
pub const DEFAULT_WEIGHT: u16 = 100;
pub const MAX_WEIGHT: u16 = 1000;

/// Why a message was refused: the label of the counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// More than [`MAX_MESSAGE_BYTES`].
    Size,
    /// Not JSON.
    Syntax,
    /// A field of the wrong JSON type, or a number out of its range.
    Type,
    Host,
    Port,
    Uri,
    Vip,
    /// A VIP outside `l4.vip_ranges`.
    VipRange,
    /// Not the publisher's to register, by the rules of `[guard]`.
    Owner,
    Weight,
    RouteServiceUrl,
    /// What hashing needs.
    Options,
    /// A list or string longer than its bound.
    TooLong,
    /// Neither `uris` nor `vips`.
    NoRoute,
}

/// A refused message: the reason, and one line that names the field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reject {
    pub reason: Reason,
    message: String,
}

/// Reads the payload of a `router.register`.
///
/// # Errors
/// Also when a VIP lies outside `vip_ranges`, which is every VIP if there are none.
pub fn register(payload: &[u8], vip_ranges: &[IpNet]) -> Result<Registration, Reject> {
    let message = decode(payload)?;
    let address = message.address()?;
    let routes = message.routes(Some(vip_ranges))?;
    let weight = match message.weight {
        None => DEFAULT_WEIGHT,
        Some(weight) => check_weight(weight)?,
    };
    let route_service_url = message.text("route_service_url", &message.route_service_url)?;
    if route_service_url
        .as_deref()
        .is_some_and(|url| !url.starts_with("https"))
    {
        let message = "route_service_url: does not start with https".to_owned();
        return Err(Reject {
            reason: Reason::RouteServiceUrl,
            message,
        });
    }
    let tls = match message.tls_port {
        Some(1..) => {
            let san = &message.server_cert_domain_san;
            Some(BackendTls {
                server_name: message.text("server_cert_domain_san", san)?,
                roots: TlsRoots::Backends,
            })
        }
        None | Some(0) => None,
    };
    let instance = Instance {
        app: message.text("app", &message.app)?,
        id: message.text("private_instance_id", &message.instance_id)?,
        index: message.text("private_instance_index", &message.instance_index)?,
        availability_zone: message.text("availability_zone", &message.availability_zone)?,
        isolation_segment: message.text("isolation_segment", &message.isolation_segment)?,
        tags: message.tags()?,
        tls,
    };
    let backend = Backend {
        address,
        weight,
        protocol: match message.protocol.as_deref() {
            Some("http2") => HttpProtocol::Http2,
            Some(_) | None => HttpProtocol::Http1,
        },
        instance: instance.shared(),
        origin: Origin::Nats,
    };
    Ok(Registration {
        routes,
        backend: Arc::new(backend),
        stale_after: stale_after(message.stale_threshold_in_seconds),
        balance: match &message.options {
            Some(options) => options.balance()?,
            None => None,
        },
        route_service_url,
    })
}

/// Reads the payload of a `router.unregister`: the same JSON, of which host, port, routes and the
/// instance count. Says the isolation segment beside.
///
/// VIPs are not held against `vip_ranges`: whatever was let in may leave.
pub fn unregister(payload: &[u8]) -> Result<(Unregistration, Option<Arc<str>>), Reject> {
    let message = decode(payload)?;
    let gone = Unregistration {
        address: message.address()?,
        routes: message.routes(None)?,
        instance_id: message.text("private_instance_id", &message.instance_id)?,
        origin: Origin::Nats,
    };
    let segment = message.text("isolation_segment", &message.isolation_segment)?;
    Ok((gone, segment))
}

/// Normalises one entry of `uris`: `host[/path]`, lower case, cut at `?`, without the slashes at
/// either end.
///
/// # Errors
/// What is wrong with it, to be put behind the name of its field.
pub fn parse_uri(uri: &str) -> Result<HttpMatch, &'static str> {
    let uri = uri.split_once('?').map_or(uri, |(before, _)| before);
    let uri = uri.trim_end_matches('/');
    let uri = uri.strip_prefix('/').unwrap_or(uri);
    let (host, path) = uri.split_at(uri.find('/').unwrap_or(uri.len()));
    let host = host.strip_suffix('.').unwrap_or(host);
    check_host(host)?;
    if path.len() > MAX_PATH_BYTES {
        return Err("the path is longer than 2048 bytes");
    }
    if !path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("the path has a character that a request target cannot have");
    }
    Ok(HttpMatch {
        host: lower_case(host),
        path: lower_case(path),
        conditions: None,
    })
}

/// Parses one entry of `vips` and holds it against the ranges, if any are given.
pub fn parse_vip(vip: &str, ranges: Option<&[IpNet]>) -> Result<Vip, (Reason, String)> {
    let vip: Vip = vip
        .parse()
        .map_err(|error| (Reason::Vip, format!("{error}")))?;
    match ranges {
        Some(ranges) if !ranges.iter().any(|range| range.contains(&vip.address)) => {
            Err((Reason::VipRange, format!("{vip} is outside l4.vip_ranges")))
        }
        Some(_) | None => Ok(vip),
    }
}

/// Whether `address` can be a backend's: not unspecified, not multicast.
pub fn check_backend_address(address: IpAddr) -> Result<(), &'static str> {
    if address.is_unspecified() || address.is_multicast() {
        return Err("not the address of a host");
    }
    Ok(())
}

impl Reason {
    pub const ALL: [Reason; 14] = [
        Reason::Size,
        Reason::Syntax,
        Reason::Type,
        Reason::Host,
        Reason::Port,
        Reason::Uri,
        Reason::Vip,
        Reason::VipRange,
        Reason::Owner,
        Reason::Weight,
        Reason::RouteServiceUrl,
        Reason::Options,
        Reason::TooLong,
        Reason::NoRoute,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Size => "size",
            Reason::Syntax => "syntax",
            Reason::Type => "type",
            Reason::Host => "host",
            Reason::Port => "port",
            Reason::Uri => "uri",
            Reason::Vip => "vip",
            Reason::VipRange => "vip_range",
            Reason::Owner => "owner",
            Reason::Weight => "weight",
            Reason::RouteServiceUrl => "route_service_url",
            Reason::Options => "options",
            Reason::TooLong => "too_long",
            Reason::NoRoute => "no_route",
        }
    }
}

impl From<Refusal> for Reject {
    fn from(refusal: Refusal) -> Reject {
        Reject {
            reason: Reason::Owner,
            message: refusal.to_string(),
        }
    }
}

impl fmt::Display for Reject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Reject {}

/// The fields of a message, borrowed from its bytes where they hold no escapes.
#[derive(Default)]
struct Message<'a> {
    host: Option<Text<'a>>,
    port: Option<u16>,
    tls_port: Option<u16>,
    uris: Option<Vec<Text<'a>>>,
    vips: Option<Vec<Text<'a>>>,
    weight: Option<i64>,
    app: Option<Text<'a>>,
    instance_id: Option<Text<'a>>,
    instance_index: Option<Text<'a>>,
    stale_threshold_in_seconds: Option<i64>,
    isolation_segment: Option<Text<'a>>,
    server_cert_domain_san: Option<Text<'a>>,
    route_service_url: Option<Text<'a>>,
    tags: Option<Tags<'a>>,
    protocol: Option<Text<'a>>,
    availability_zone: Option<Text<'a>>,
    options: Option<Options<'a>>,
}

impl Message<'_> {
    fn address(&self) -> Result<SocketAddr, Reject> {
        let reject = |reason, message| Err(Reject { reason, message });
        let Some(host) = self.host.as_deref() else {
            return reject(Reason::Host, "host: missing".to_owned());
        };
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        let Ok(ip) = bare.parse::<IpAddr>() else {
            return reject(
                Reason::Host,
                format!("host: {} is not an IP address", shown(host)),
            );
        };
        if let Err(why) = check_backend_address(ip) {
            return reject(Reason::Host, format!("host: {ip} is {why}"));
        }
        let (field, port) = match self.tls_port {
            Some(port @ 1..) => ("tls_port", port),
            None | Some(0) => ("port", self.port.unwrap_or(0)),
        };
        if port == 0 {
            let why = if self.port.is_some() {
                "0 is not a port"
            } else {
                "missing"
            };
            return reject(Reason::Port, format!("{field}: {why}"));
        }
        Ok(SocketAddr::new(ip, port))
    }

    fn routes(&self, vip_ranges: Option<&[IpNet]>) -> Result<Vec<RouteKey>, Reject> {
        let uris = self.uris.as_deref().unwrap_or_default();
        let vips = self.vips.as_deref().unwrap_or_default();
        for (field, count) in [("uris", uris.len()), ("vips", vips.len())] {
            check_length(field, count, MAX_ROUTES, "entries")?;
        }
        if uris.is_empty() && vips.is_empty() {
            let message = "uris: neither uris nor vips name a route".to_owned();
            return Err(Reject {
                reason: Reason::NoRoute,
                message,
            });
        }
        let mut routes = Vec::with_capacity(uris.len() + vips.len());
        for (i, uri) in uris.iter().enumerate() {
            let http = parse_uri(uri).map_err(|why| Reject {
                reason: Reason::Uri,
                message: format!("uris[{i}]: {}: {why}", shown(uri)),
            })?;
            routes.push(RouteKey::Http(http));
        }
        for (i, vip) in vips.iter().enumerate() {
            let vip = parse_vip(vip, vip_ranges).map_err(|(reason, why)| Reject {
                reason,
                message: format!("vips[{i}]: {}: {why}", shown(vip)),
            })?;
            routes.push(RouteKey::Vip(vip));
        }
        Ok(routes)
    }

    fn tags(&self) -> Result<BTreeMap<Arc<str>, Arc<str>>, Reject> {
        let mut tags = BTreeMap::new();
        let Some(Tags(pairs)) = &self.tags else {
            return Ok(tags);
        };
        check_length("tags", pairs.len(), MAX_TAGS, "entries")?;
        for (name, value) in pairs {
            check_length("tags", name.len().max(value.len()), MAX_TEXT_BYTES, "bytes")?;
            tags.insert(Arc::from(&**name), Arc::from(&**value));
        }
        Ok(tags)
    }

    /// An optional string; the empty one says nothing.
    fn text(&self, field: &str, text: &Option<Text<'_>>) -> Result<Option<Arc<str>>, Reject> {
        match text.as_deref() {
            None | Some("") => Ok(None),
            Some(text) => {
                check_length(field, text.len(), MAX_TEXT_BYTES, "bytes")?;
                Ok(Some(Arc::from(text)))
            }
        }
    }
}

fn check_length(field: &str, length: usize, most: usize, unit: &str) -> Result<(), Reject> {
    if length <= most {
        return Ok(());
    }
    let message = format!("{field}: {length} {unit}, at most {most}");
    Err(Reject {
        reason: Reason::TooLong,
        message,
    })
}

fn check_weight(weight: i64) -> Result<u16, Reject> {
    match u16::try_from(weight) {
        Ok(weight @ 0..=MAX_WEIGHT) => Ok(weight),
        Ok(_) | Err(_) => {
            let message = format!("weight: {weight} is not in 0..={MAX_WEIGHT}");
            Err(Reject {
                reason: Reason::Weight,
                message,
            })
        }
    }
}

/// 0 asks for the gateway's threshold, as an absent field does.
fn stale_after(seconds: Option<i64>) -> Option<Duration> {
    match seconds? {
        0 => None,
        seconds => {
            let seconds = u64::try_from(seconds).unwrap_or(0);
            Some(Duration::from_secs(seconds).max(MIN_STALE_AFTER))
        }
    }
}

fn check_host(host: &str) -> Result<(), &'static str> {
    if host.is_empty() {
        return Err("no host");
    }
    if host.len() > MAX_HOST_BYTES {
        return Err("the host is longer than 253 bytes");
    }
    let labels = match host.strip_prefix("*.") {
        Some(rest) => rest,
        None => host,
    };
    for label in labels.split('.') {
        if label.is_empty() {
            return Err("the host has an empty label");
        }
        if label.len() > MAX_LABEL_BYTES {
            return Err("a label of the host is longer than 63 bytes");
        }
        if label.contains('*') {
            return Err("* stands only for the first labels of a host: *.example.com");
        }
        if !label
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        {
            return Err("the host has a character other than letters, digits, - and _");
        }
    }
    Ok(())
}

fn lower_case(text: &str) -> Arc<str> {
    if text.is_empty() {
        Arc::default()
    } else if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Arc::from(text.to_ascii_lowercase())
    } else {
        Arc::from(text)
    }
}

/// A value from outside as it may stand in a log line.
fn shown(text: &str) -> String {
    const MOST: usize = 80;
    match text.char_indices().nth(MOST) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}...", &text[..end]),
    }
}

fn decode(payload: &[u8]) -> Result<Message<'_>, Reject> {
    if payload.len() > MAX_MESSAGE_BYTES {
        let message = format!("{} bytes, at most {MAX_MESSAGE_BYTES}", payload.len());
        return Err(Reject {
            reason: Reason::Size,
            message,
        });
    }
    let field = Cell::new("");
    let mut json = serde_json::Deserializer::from_slice(payload);
    let decoded = MessageSeed { field: &field }
        .deserialize(&mut json)
        .and_then(|message| json.end().map(|()| message));
    decoded.map_err(|error| {
        let reason = if error.is_data() {
            Reason::Type
        } else {
            Reason::Syntax
        };
        let error = error.to_string();
        // serde quotes the value it refuses, however long it is.
        let text: String = match error.char_indices().nth(200) {
            None => error,
            Some((end, _)) => format!("{}...", &error[..end]),
        };
        let message = match field.get() {
            "" => text,
            field => format!("{field}: {text}"),
        };
        Reject { reason, message }
    })
}

/// Reads a [`Message`] and notes the field it is at, for the error that ends it.
struct MessageSeed<'c> {
    field: &'c Cell<&'static str>,
}

impl<'de> DeserializeSeed<'de> for MessageSeed<'_> {
    type Value = Message<'de>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Message<'de>, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MessageSeed<'_> {
    type Value = Message<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Message<'de>, A::Error> {
        let mut message = Message::default();
        while let Some(Text(key)) = map.next_key()? {
            let Some(name) = field_name(&key) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            self.field.set(name);
            match name {
                "host" => read(&mut map, &mut message.host)?,
                "port" => read(&mut map, &mut message.port)?,
                "tls_port" => read(&mut map, &mut message.tls_port)?,
                "uris" => read(&mut map, &mut message.uris)?,
                "vips" => read(&mut map, &mut message.vips)?,
                "weight" => read(&mut map, &mut message.weight)?,
                "app" => read(&mut map, &mut message.app)?,
                "private_instance_id" => read(&mut map, &mut message.instance_id)?,
                "private_instance_index" => read(&mut map, &mut message.instance_index)?,
                "stale_threshold_in_seconds" => {
                    read(&mut map, &mut message.stale_threshold_in_seconds)?;
                }
                "isolation_segment" => read(&mut map, &mut message.isolation_segment)?,
                "server_cert_domain_san" => read(&mut map, &mut message.server_cert_domain_san)?,
                "route_service_url" => read(&mut map, &mut message.route_service_url)?,
                "tags" => read(&mut map, &mut message.tags)?,
                "protocol" => read(&mut map, &mut message.protocol)?,
                "availability_zone" => read(&mut map, &mut message.availability_zone)?,
                "options" => read(&mut map, &mut message.options)?,
                // A time that only gorouter's latency metric uses; its type is checked all the same.
                _ => read(&mut map, &mut None::<i64>)?,
            }
            self.field.set("");
        }
        Ok(message)
    }
}

/// The field a key names, in whatever case.
fn field_name(key: &str) -> Option<&'static str> {
    const NAMES: [&str; 18] = [
        "host",
        "port",
        "tls_port",
        "uris",
        "vips",
        "weight",
        "app",
        "private_instance_id",
        "private_instance_index",
        "stale_threshold_in_seconds",
        "isolation_segment",
        "server_cert_domain_san",
        "route_service_url",
        "tags",
        "protocol",
        "availability_zone",
        "options",
        "endpoint_updated_at_ns",
    ];
    NAMES
        .into_iter()
        .find(|name| name.eq_ignore_ascii_case(key))
}

/// Reads a value over an earlier one of the same name; `null` leaves that as it was.
fn read<'de, A: MapAccess<'de>, T: Deserialize<'de>>(
    map: &mut A,
    into: &mut Option<T>,
) -> Result<(), A::Error> {
    if let Some(value) = map.next_value()? {
        *into = Some(value);
    }
    Ok(())
}

/// A string, borrowed if it can be.
struct Text<'a>(Cow<'a, str>);

impl std::ops::Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Text<'de>, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        json.deserialize_str(TextVisitor)
    }
}

/// `tags` in the order of the message; a `null` value is the empty string, as in Go.
struct Tags<'a>(Vec<(Text<'a>, Text<'a>)>);

impl<'de> Deserialize<'de> for Tags<'de> {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Tags<'de>, D::Error> {
        struct TagsVisitor;
        impl<'de> Visitor<'de> for TagsVisitor {
            type Value = Tags<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tags<'de>, A::Error> {
                let mut pairs = Vec::new();
                while let Some((name, value)) = map.next_entry::<Text<'de>, Option<Text<'de>>>()? {
                    pairs.push((name, value.unwrap_or(Text(Cow::Borrowed("")))));
                }
                Ok(Tags(pairs))
            }
        }
        json.deserialize_map(TagsVisitor)
    }
}

/// `options`, of which gorouter's route policies are not read.
#[derive(Default)]
struct Options<'a> {
    loadbalancing: Option<Text<'a>>,
    hash_header: Option<Text<'a>>,
    hash_balance: Option<HashBalance>,
}

impl Options<'_> {
    /// An unknown algorithm says nothing, so the pool keeps what it had.
    fn balance(&self) -> Result<Option<Balance>, Reject> {
        match self.loadbalancing.as_deref() {
            Some("round-robin") => Ok(Some(Balance::RoundRobin)),
            Some("least-connection") => Ok(Some(Balance::LeastConnections)),
            Some("hash") => self.hash().map(|key| Some(Balance::Hash(Arc::new(key)))),
            Some(_) | None => Ok(None),
        }
    }

    fn hash(&self) -> Result<HashKey, Reject> {
        let reject = |message| Reject {
            reason: Reason::Options,
            message,
        };
        let header = self.hash_header.as_deref().unwrap_or_default();
        check_length("options.hash_header", header.len(), MAX_TEXT_BYTES, "bytes")?;
        let name = HeaderName::from_bytes(header.as_bytes()).map_err(|_| {
            let header = shown(header);
            reject(format!(
                "options.hash_header: {header} is not the name of a header"
            ))
        })?;
        let balance_percent = match &self.hash_balance {
            None => None,
            Some(HashBalance(0.0)) => None,
            Some(HashBalance(factor)) => {
                let percent = (factor * 100.0).round() as u32;
                if !BALANCE_PERCENT.contains(&percent) {
                    let message = format!("options.hash_balance: {factor} is not 0 or 1.1 to 10");
                    return Err(reject(message));
                }
                Some(percent)
            }
        };
        Ok(HashKey {
            of: HashOf::Header(name.as_str().into()),
            balance_percent,
        })
    }
}

impl<'de> Deserialize<'de> for Options<'de> {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Options<'de>, D::Error> {
        struct OptionsVisitor;
        impl<'de> Visitor<'de> for OptionsVisitor {
            type Value = Options<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Options<'de>, A::Error> {
                let mut options = Options::default();
                while let Some(Text(key)) = map.next_key()? {
                    if key.eq_ignore_ascii_case("loadbalancing") {
                        read(&mut map, &mut options.loadbalancing)?;
                    } else if key.eq_ignore_ascii_case("hash_header") {
                        read(&mut map, &mut options.hash_header)?;
                    } else if key.eq_ignore_ascii_case("hash_balance") {
                        read(&mut map, &mut options.hash_balance)?;
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(options)
            }
        }
        json.deserialize_map(OptionsVisitor)
    }
}

/// A number, or a string of one as Cloud Controller keeps it; the empty one is 0.
struct HashBalance(f64);

impl<'de> Deserialize<'de> for HashBalance {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<HashBalance, D::Error> {
        struct NumberVisitor;
        impl Visitor<'_> for NumberVisitor {
            type Value = HashBalance;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number")
            }

            fn visit_f64<E: de::Error>(self, number: f64) -> Result<HashBalance, E> {
                Ok(HashBalance(number))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<HashBalance, E> {
                Ok(HashBalance(number as f64))
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<HashBalance, E> {
                Ok(HashBalance(number as f64))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<HashBalance, E> {
                match text {
                    "" => Ok(HashBalance(0.0)),
                    text => text
                        .parse()
                        .map(HashBalance)
                        .map_err(|_| E::invalid_value(de::Unexpected::Str(text), &"a number")),
                }
            }
        }
        json.deserialize_any(NumberVisitor)
    }
}

#[cfg(test)]
mod tests;
