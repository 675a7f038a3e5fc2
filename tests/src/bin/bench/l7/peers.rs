//! Who is measured: the gateway, its peers, and the backend itself.
//!
//! All add the client's address, scheme and host and an id to a request, have one thread or worker
//! for requests, and keep their connections to the backend.

mod envoy;
mod haproxy;
mod nginx;
mod pingora;
mod sozu;
pub(crate) mod viaduct;

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, bail};
use clap::ValueEnum;
use router_tests::process::Process;

use crate::l7::backend;
use crate::l7::rows::{Front, IDLE_CONNECTIONS, Load, Row};
use crate::l7::site::{Site, local};

/// Connections to the backend that a peer may keep, where it asks for a number.
const KEPT_CONNECTIONS: usize = 512;

/// Connections of clients, where a peer asks for a number: the idle ones, and some.
const CLIENT_CONNECTIONS: usize = IDLE_CONNECTIONS + 1000;

/// What the gateway's figures are compared with: the contenders that are proxies, and not ours.
pub(crate) const PROXIES: &[&str] = &["nginx", "haproxy", "envoy", "sozu", "pingora"];

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Peer {
    Viaduct,
    /// The gateway with 100,000 routes beside
    #[value(name = "viaduct-100k")]
    ViaductManyRoutes,
    Nginx,
    Haproxy,
    Envoy,
    Sozu,
    Pingora,
    /// The client at the backend, without a proxy
    Direct,
}

/// Somebody who serves.
pub(crate) struct Contender {
    pub(crate) peer: Peer,
    pub(crate) address: SocketAddr,
    /// Of the proxy; none is `direct`.
    pub(crate) process: Option<Process>,
}

impl Peer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Peer::Viaduct => "viaduct",
            Peer::ViaductManyRoutes => "viaduct-100k",
            Peer::Nginx => "nginx",
            Peer::Haproxy => "haproxy",
            Peer::Envoy => "envoy",
            Peer::Sozu => "sozu",
            Peer::Pingora => "pingora",
            Peer::Direct => "direct",
        }
    }

    pub(crate) fn address(self, front: Front) -> SocketAddr {
        let first = match front {
            Front::Http | Front::H2c => 8000,
            Front::Tls => 8400,
        };
        local(first + self as u16)
    }

    /// Whether a row is for it at all.
    pub(crate) fn is_of(self, row: &Row) -> bool {
        match self {
            Peer::Viaduct => true,
            Peer::ViaductManyRoutes => row.load == Load::Routes,
            Peer::Direct => match row.load {
                Load::Idle | Load::Routes => false,
                Load::Calls | Load::Messages => true,
                // The backend speaks plain HTTP/1.1 otherwise.
                _ => row.front == Front::Http && !row.access_log,
            },
            _ => row.load != Load::Routes,
        }
    }

    /// What it cannot do of a row.
    fn lacks(self, row: &Row) -> Option<&'static str> {
        match self {
            Peer::Sozu if row.front == Front::H2c => Some("it has no h2c for clients"),
            _ => None,
        }
    }

    /// Whether its program is there.
    pub(crate) fn is_installed(self) -> bool {
        let program = match self {
            Peer::Viaduct | Peer::ViaductManyRoutes | Peer::Direct => return true,
            Peer::Pingora => "pingora-proxy",
            Peer::Nginx | Peer::Haproxy | Peer::Envoy | Peer::Sozu => self.name(),
        };
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::env::split_paths(&path).chain(["/usr/sbin".into()]);
        folders
            .map(|folder| folder.join(program))
            .any(|file| Path::is_file(&file))
    }

    /// Starts it for a row; it may not serve yet.
    ///
    /// # Errors
    /// The row is beyond it; the message says why.
    pub(crate) fn start(self, site: &Site, row: &Row) -> anyhow::Result<Contender> {
        if let Some(lack) = self.lacks(row) {
            bail!(lack);
        }
        let process = match self {
            Peer::Viaduct | Peer::ViaductManyRoutes => viaduct::start(site, row, self).map(Some),
            Peer::Nginx => nginx::start(site, row).map(Some),
            Peer::Haproxy => haproxy::start(site, row).map(Some),
            Peer::Envoy => envoy::start(site, row).map(Some),
            Peer::Sozu => sozu::start(site, row).map(Some),
            Peer::Pingora => pingora::start(site, row).map(Some),
            Peer::Direct => Ok(None),
        };
        Ok(Contender {
            peer: self,
            address: match self {
                Peer::Direct => backend::address(row.back),
                _ => self.address(row.front),
            },
            process: process?,
        })
    }
}

impl Contender {
    /// Of the proxy.
    pub(crate) fn id(&self) -> anyhow::Result<u32> {
        let process = self.process.as_ref();
        Ok(process.context("direct has no process")?.id())
    }
}
