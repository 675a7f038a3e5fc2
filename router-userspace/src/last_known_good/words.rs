//! Routes and backends as the file has them: each word written, and read below.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use super::bytes::{Decoder, Encoder};
use crate::config::PortRange;
use crate::route::conditions::{Condition, Conditions, ValueMatch};
use crate::route::policy::{HashKey, HashOf};
use crate::route::{
    Backend, BackendTls, Balance, HttpMatch, HttpProtocol, Instance, Origin, Proto, TlsRoots, Vip,
    wire,
};

pub fn put_http<W: Write>(
    out: &mut Encoder<W>,
    host: &str,
    path: &str,
    conditions: Option<&Conditions>,
) -> io::Result<()> {
    out.text(host)?;
    out.text(path)?;
    out.option(conditions, |out, conditions| {
        out.list(conditions.methods(), |out, method| out.text(method))?;
        out.list(conditions.headers(), put_condition)?;
        out.list(conditions.query(), put_condition)
    })
}

pub fn http(input: &mut Decoder<'_>) -> Option<HttpMatch> {
    Some(HttpMatch {
        host: input.text()?,
        path: input.text()?,
        conditions: input
            .option(|input| {
                let methods = input.list(Decoder::text)?;
                let headers = input.list(condition)?;
                Some(Conditions::new(methods, headers, input.list(condition)?))
            })?
            .map(Arc::new),
    })
}

fn put_condition<W: Write>(out: &mut Encoder<W>, condition: &Condition) -> io::Result<()> {
    out.text(&condition.name)?;
    match &condition.value {
        ValueMatch::Present => out.byte(0),
        ValueMatch::Exact(text) => out.byte(1).and_then(|()| out.text(text)),
        ValueMatch::Prefix(text) => out.byte(2).and_then(|()| out.text(text)),
    }
}

fn condition(input: &mut Decoder<'_>) -> Option<Condition> {
    Some(Condition {
        name: input.text()?,
        value: match input.byte()? {
            0 => ValueMatch::Present,
            1 => ValueMatch::Exact(input.text()?),
            2 => ValueMatch::Prefix(input.text()?),
            3.. => return None,
        },
    })
}

pub fn put_vip<W: Write>(out: &mut Encoder<W>, vip: &Vip) -> io::Result<()> {
    out.flag(vip.proto == Proto::Udp)?;
    put_address(out, vip.address)?;
    out.number(vip.ports.first.into())?;
    out.number(vip.ports.last.into())
}

pub fn vip(input: &mut Decoder<'_>) -> Option<Vip> {
    let vip = Vip {
        proto: match input.flag()? {
            true => Proto::Udp,
            false => Proto::Tcp,
        },
        address: address(input)?.to_canonical(),
        ports: PortRange {
            first: input.small()?,
            last: input.small()?,
        },
    };
    // As texts have it, for what a range may be.
    vip.to_string().parse().ok()
}

fn put_address<W: Write>(out: &mut Encoder<W>, address: IpAddr) -> io::Result<()> {
    match address {
        IpAddr::V4(address) => out.bytes(&address.octets()),
        IpAddr::V6(address) => out.bytes(&address.octets()),
    }
}

fn address(input: &mut Decoder<'_>) -> Option<IpAddr> {
    let bytes = input.bytes()?;
    let v4 = <[u8; 4]>::try_from(bytes).map(Ipv4Addr::from);
    let v6 = || <[u8; 16]>::try_from(bytes).map(Ipv6Addr::from);
    v4.map(IpAddr::V4).or_else(|_| v6().map(IpAddr::V6)).ok()
}

pub fn put_balance<W: Write>(out: &mut Encoder<W>, balance: &Balance) -> io::Result<()> {
    let key = match balance {
        Balance::RoundRobin => return out.byte(0),
        Balance::LeastConnections => return out.byte(1),
        Balance::Hash(key) => key,
    };
    out.byte(2)?;
    out.option(key.balance_percent, |out, percent| {
        out.number(percent.into())
    })?;
    match &key.of {
        HashOf::Source => out.byte(0),
        HashOf::Header(name) => out.byte(1).and_then(|()| out.text(name)),
        HashOf::Cookie(name) => out.byte(2).and_then(|()| out.text(name)),
    }
}

pub fn balance(input: &mut Decoder<'_>) -> Option<Balance> {
    match input.byte()? {
        0 => return Some(Balance::RoundRobin),
        1 => return Some(Balance::LeastConnections),
        2 => {}
        3.. => return None,
    }
    Some(Balance::Hash(Arc::new(HashKey {
        balance_percent: input.option(Decoder::small)?,
        of: match input.byte()? {
            0 => HashOf::Source,
            1 => HashOf::Header(input.text()?),
            2 => HashOf::Cookie(input.text()?),
            3.. => return None,
        },
    })))
}

pub fn put_backend<W: Write>(out: &mut Encoder<W>, backend: &Backend) -> io::Result<()> {
    // By name, so that a new field cannot be forgotten. All become adopted ones.
    let Backend {
        address,
        weight,
        protocol,
        instance: _,
        origin: _,
    } = backend;
    let Instance {
        app,
        id,
        index,
        availability_zone,
        isolation_segment,
        tags,
        tls,
    } = backend.instance();
    put_address(out, address.ip())?;
    out.number(address.port().into())?;
    out.number((*weight).into())?;
    out.option(tls.as_ref(), |out, tls| {
        out.text_option(tls.server_name.as_ref())?;
        out.flag(tls.roots == TlsRoots::RouteServices)
    })?;
    out.flag(*protocol == HttpProtocol::Http2)?;
    for text in [app, id, index, availability_zone, isolation_segment] {
        out.text_option(text.as_ref())?;
    }
    out.number(tags.len() as u64)?;
    tags.iter().try_for_each(|(name, value)| {
        out.text(name)?;
        out.text(value)
    })
}

pub fn backend(input: &mut Decoder<'_>) -> Option<Backend> {
    let address = SocketAddr::new(address(input)?, input.small()?);
    let weight = input.small()?;
    let tls = input.option(|input| {
        Some(BackendTls {
            server_name: input.text_option()?,
            roots: match input.flag()? {
                true => TlsRoots::RouteServices,
                false => TlsRoots::Backends,
            },
        })
    })?;
    let backend = Backend {
        address,
        weight,
        protocol: match input.flag()? {
            true => HttpProtocol::Http2,
            false => HttpProtocol::Http1,
        },
        instance: Instance {
            app: input.text_option()?,
            id: input.text_option()?,
            index: input.text_option()?,
            availability_zone: input.text_option()?,
            isolation_segment: input.text_option()?,
            tags: input
                .list(|input| Some((input.text()?, input.text()?)))?
                .into_iter()
                .collect::<BTreeMap<_, _>>(),
            tls,
        }
        .shared(),
        origin: Origin::Adopted,
    };
    (backend.weight <= wire::MAX_WEIGHT).then_some(backend)
}
