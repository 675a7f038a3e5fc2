//! Where routes come from.
//!
//! A source is a task that turns what its client tells it into [`Event::Route`]s. It decodes and
//! refuses by itself, sends in the order of arrival, and waits while the agent's inbox is full. It
//! says when it loses or regains its server, tries again for ever, and never ends by bad input. All
//! sources run on the agent's thread, where a panic ends the process.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use crate::config::Config;
use crate::event::Event;
use crate::metrics::Metrics;
use crate::rejects::Rejects;
use crate::route::{Origin, RouteEvent};

pub mod api;
pub mod consul;
pub mod etcd;
pub mod file;
pub mod kv;
pub mod ledger;
mod mapping;
pub mod nats;
#[cfg(test)]
pub(crate) mod nats_server;
pub mod redis;
#[cfg(test)]
mod rig;
pub mod status;
mod store;
pub mod zookeeper;

/// What every source works with.
#[derive(Clone)]
pub struct Context {
    pub inbox: mpsc::Sender<Event>,
    pub metrics: Arc<Metrics>,
    pub rejects: Arc<Rejects>,
    /// The configuration in force; a reload changes it.
    pub config: watch::Receiver<Arc<Config>>,
}

impl Context {
    /// Sends on to the agent, in order, and waits while its inbox is full. `false`: the agent is gone.
    pub async fn send(&self, events: Vec<RouteEvent>) -> bool {
        for event in events {
            if self.inbox.send(Event::Route(event)).await.is_err() {
                return false;
            }
        }
        true
    }
}

/// The sources whose state is waited for before what was adopted at the start is let go. Each tells
/// by [`Event::SourceConnected`] that its state is whole, or that it is away.
pub fn configured(config: &Config) -> Vec<Origin> {
    let nats = !config.nats.servers.is_empty();
    let files = !config.file.paths.is_empty() || !config.file.directories.is_empty();
    let sources = [
        (Origin::File, files),
        (Origin::Kv, nats && !config.nats.bucket.is_empty()),
        (Origin::Nats, nats),
        (Origin::Etcd, !config.etcd.endpoints.is_empty()),
        (Origin::Consul, config.consul.address.is_some()),
        (Origin::Zookeeper, !config.zookeeper.servers.is_empty()),
        (Origin::Redis, !config.redis.servers.is_empty()),
    ];
    let sources = sources.into_iter().filter(|(_, is_on)| *is_on);
    sources.map(|(origin, _)| origin).collect()
}

/// Whether a source is configured that may have policies of VIPs.
pub fn tells_policies(config: &Config) -> bool {
    configured(config).contains(&Origin::Kv)
}

/// Starts every configured source. Must be called inside a tokio runtime.
///
/// # Errors
/// Only for configuration that can be seen to be wrong, like a credentials file that is not there:
/// a server that cannot be reached is not an error.
pub async fn start(context: &Context) -> anyhow::Result<()> {
    let config = Arc::clone(&context.config.borrow());
    if !config.nats.servers.is_empty() {
        nats::start(&config.nats, context.clone()).await?;
        if !config.nats.bucket.is_empty() {
            kv::start(&config.nats, context.clone()).await?;
        }
    }
    tokio::spawn(file::run(context.clone()));
    tokio::spawn(redis::run(context.clone()));
    tokio::spawn(etcd::run(context.clone()));
    tokio::spawn(zookeeper::run(context.clone()));
    tokio::spawn(consul::run(context.clone()));
    Ok(())
}
