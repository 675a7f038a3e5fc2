//! What the values of hipache's and DINP's keys say. Pure.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, anyhow, ensure};

use crate::config::Server;
use crate::route::declared::Announcement;
use crate::route::table::MAX_POOL_BACKENDS;
use crate::route::{Backend, BackendTls, Instance, Origin, Registration, RouteKey, TlsRoots, wire};

/// A host by hipache's list: a name, then URLs. A URL that is there twice has twice the weight.
pub(super) fn frontend(
    host: &str,
    list: &[Vec<u8>],
    dead: &[Vec<u8>],
) -> anyhow::Result<Announcement> {
    let Some((name, urls)) = list.split_first() else {
        return Ok(Announcement::default());
    };
    let name = std::str::from_utf8(name).context("[0]: not UTF-8")?;
    let is_dead = |at: usize| dead.contains(&at.to_string().into_bytes());
    let mut backends: BTreeMap<SocketAddr, Backend> = BTreeMap::new();
    let mut any_alive = false;
    for (at, url) in urls.iter().enumerate() {
        let backend = std::str::from_utf8(url)
            .context("not UTF-8")
            .and_then(backend);
        let backend = backend.with_context(|| format!("[{}]", at + 1))?;
        let known = backends.entry(backend.address).or_insert(Backend {
            weight: 0,
            ..backend
        });
        if !is_dead(at) {
            any_alive = true;
            known.weight = (known.weight + wire::DEFAULT_WEIGHT).min(wire::MAX_WEIGHT);
        }
    }
    if any_alive {
        backends.retain(|_, backend| backend.weight > 0);
    }
    let app = (!name.is_empty() && name.len() <= wire::MAX_TEXT_BYTES).then(|| name.into());
    let backends = backends.into_values().map(|backend| Backend {
        instance: Instance {
            app: app.clone(),
            ..backend.instance().clone()
        }
        .shared(),
        ..backend
    });
    announcement(host, backends.collect())
}

/// A host by DINP's list of `address:port`.
pub(super) fn instances(host: &str, list: &[Vec<u8>]) -> anyhow::Result<Announcement> {
    let mut backends = Vec::with_capacity(list.len());
    for (at, instance) in list.iter().enumerate() {
        let text = std::str::from_utf8(instance).with_context(|| format!("[{at}]: not UTF-8"))?;
        let address: SocketAddr = text
            .trim()
            .parse()
            .map_err(|_| anyhow!("[{at}]: {text:?} is not ADDRESS:PORT"))?;
        check(address).with_context(|| format!("[{at}]"))?;
        backends.push(Backend::new(address, Origin::Redis));
    }
    announcement(host, backends)
}

/// The host whose instances an alias has, if the key is there.
pub(super) fn alias(value: &[u8]) -> anyhow::Result<Option<&str>> {
    if value.is_empty() {
        return Ok(None);
    }
    let value = std::str::from_utf8(value).context("not UTF-8")?.trim();
    let host = value.strip_prefix("/rs/").filter(|host| !host.is_empty());
    let host = host.ok_or_else(|| anyhow!("{value:?} is not /rs/HOST"))?;
    Ok(Some(host))
}

/// `http[s]://ADDRESS[:PORT][/]`.
fn backend(url: &str) -> anyhow::Result<Backend> {
    let server =
        Server::parse(url.trim(), ["http", "https"], 0).with_context(|| format!("{url:?}"))?;
    let ip = server.host.parse().map_err(|_| {
        anyhow!(
            "{url:?}: a backend is named by its address, {:?} is a name",
            server.host
        )
    })?;
    let port = match (server.port, server.tls) {
        (0, false) => 80,
        (0, true) => 443,
        (port, _) => port,
    };
    let address = SocketAddr::new(ip, port);
    check(address)?;
    let tls = server.tls.then_some(BackendTls {
        server_name: None,
        roots: TlsRoots::Backends,
    });
    Ok(Backend {
        instance: Instance {
            tls,
            ..Instance::default()
        }
        .shared(),
        ..Backend::new(address, Origin::Redis)
    })
}

fn check(address: SocketAddr) -> anyhow::Result<()> {
    wire::check_backend_address(address.ip()).map_err(|why| anyhow!("{address}: {why}"))?;
    ensure!(address.port() != 0, "{address}: port 0 is not a port");
    Ok(())
}

fn announcement(host: &str, backends: Vec<Backend>) -> anyhow::Result<Announcement> {
    ensure!(
        backends.len() <= MAX_POOL_BACKENDS,
        "more than {MAX_POOL_BACKENDS} backends"
    );
    ensure!(!host.contains(['/', '?']), "key: {host:?} is not a host");
    let route = wire::parse_uri(host).map_err(|why| anyhow!("key: {why}"))?;
    let registrations = backends.into_iter().map(|backend| Registration {
        routes: vec![RouteKey::Http(route.clone())],
        backend: Arc::new(backend),
        stale_after: None,
        balance: None,
        route_service_url: None,
    });
    Ok(Announcement {
        registrations: registrations.collect(),
        declarations: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_value_stops_it_and_what_is_taken_is_of_the_host(
            host in "[a-z*. /]{0,8}",
            list in proptest::collection::vec(
                prop_oneof![
                    "(https?://)?[0-9.\\[\\]:]{0,12}/?".prop_map(String::into_bytes),
                    proptest::collection::vec(any::<u8>(), 0..12),
                    (0u8..4, 1u16..99).prop_map(|(n, port)| {
                        format!("http://10.0.0.{n}:{port}").into_bytes()
                    }),
                ],
                0..4,
            ),
            dead in proptest::collection::vec("[0-9]{1,2}".prop_map(String::into_bytes), 0..3),
        ) {
            let _ = alias(&list.concat());
            for read in [frontend(&host, &list, &dead), instances(&host, &list)] {
                let Ok(announcement) = read else { continue };
                for registration in announcement.registrations {
                    prop_assert_eq!(registration.routes[0].to_string(), host.trim_end_matches('.'));
                    prop_assert!(registration.backend.address.port() > 0);
                    prop_assert!(registration.backend.weight <= wire::MAX_WEIGHT);
                }
            }
        }
    }
}
