//! The tables of sources that follow a server: `[redis]`, `[etcd]`, `[zookeeper]` and `[consul]`.

use std::path::PathBuf;
use std::time::Duration;

use ::http::Uri;
use anyhow::{Context as _, anyhow, ensure};
use serde::{Deserialize, Serialize};

use super::{Secret, ensure_positive};
use crate::route::wire;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RedisConfig {
    /// `redis://HOST[:PORT]` or, over TLS, `rediss://`: replicas of the same data, of which one at a
    /// time is followed. Empty switches the source off.
    pub servers: Vec<String>,
    pub user: Option<String>,
    pub password: Option<Secret>,
    pub database: u16,
    /// What every key begins with.
    pub key_prefix: String,
    /// PEM certificates to trust in place of the system's.
    pub ca_file: Option<PathBuf>,
    pub client_certificate_file: Option<PathBuf>,
    pub client_key_file: Option<PathBuf>,
    /// How long a connect and an answer may take.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// How often everything is read where the server does not tell of changes.
    #[serde(with = "humantime_serde")]
    pub poll_interval: Duration,
    /// How often everything is read where it does, in case it was not heard.
    #[serde(with = "humantime_serde")]
    pub rescan_interval: Duration,
}

impl Default for RedisConfig {
    fn default() -> RedisConfig {
        RedisConfig {
            servers: Vec::new(),
            user: None,
            password: None,
            database: 0,
            key_prefix: String::new(),
            ca_file: None,
            client_certificate_file: None,
            client_key_file: None,
            timeout: TIMEOUT,
            poll_interval: Duration::from_secs(5),
            rescan_interval: Duration::from_secs(60),
        }
    }
}

const TIMEOUT: Duration = Duration::from_secs(5);

impl RedisConfig {
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        for (i, server) in self.servers.iter().enumerate() {
            Server::parse(server, ["redis", "rediss"], 6379)
                .with_context(|| format!("redis.servers[{i}] {server:?}"))?;
        }
        ensure!(
            self.user.is_none() || self.password.is_some(),
            "redis.user without redis.password"
        );
        ensure!(
            self.client_certificate_file.is_some() == self.client_key_file.is_some(),
            "redis.client_certificate_file and redis.client_key_file go together"
        );
        ensure_positive(&[
            ("redis.timeout", self.timeout),
            ("redis.poll_interval", self.poll_interval),
            ("redis.rescan_interval", self.rescan_interval),
        ])
    }
}

/// A server as a URL names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    pub tls: bool,
    /// A name or an address; an IPv6 address without brackets.
    pub host: String,
    pub port: u16,
}

impl Server {
    /// `SCHEME://HOST[:PORT]`, the second scheme being that of TLS.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(url: &str, schemes: [&str; 2], port: u16) -> anyhow::Result<Server> {
        let [plain, tls] = schemes;
        let shape = || anyhow!("not {plain}://HOST[:PORT] or {tls}://HOST[:PORT]");
        let uri: Uri = url.parse().map_err(|_| shape())?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(shape());
        };
        ensure!(schemes.contains(&scheme) && uri.query().is_none(), shape());
        ensure!(matches!(uri.path(), "" | "/"), shape());
        ensure!(
            !authority.as_str().contains('@'),
            "user and password are keys of their own"
        );
        let host = authority.host();
        // A port that is none is not left out.
        let port = match &authority.as_str()[host.len()..] {
            "" => port,
            text => text
                .strip_prefix(':')
                .and_then(|text| text.parse().ok())
                .ok_or_else(shape)?,
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        Ok(Server {
            tls: scheme == tls,
            host: host.to_owned(),
            port,
        })
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EtcdConfig {
    /// `http://HOST[:PORT]` or `https://`: members of one cluster, of which one at a time is asked.
    /// Empty switches the source off.
    pub endpoints: Vec<String>,
    pub user: Option<String>,
    pub password: Option<Secret>,
    /// What keys begin with whose values are declared routes; empty for none.
    pub routes_prefix: String,
    pub map: Vec<InstanceMap>,
    /// PEM certificates to trust in place of the system's.
    pub ca_file: Option<PathBuf>,
    pub client_certificate_file: Option<PathBuf>,
    pub client_key_file: Option<PathBuf>,
    /// How long a connect and an answer may take.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// How often everything is read again, in case a change was not heard.
    #[serde(with = "humantime_serde")]
    pub rescan_interval: Duration,
}

/// How keys of a service registry become routes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InstanceMap {
    /// What the keys begin with; the rest is `SERVICE/INSTANCE`.
    pub prefix: String,
    /// Only this service; unset, every one.
    pub service: Option<String>,
    /// Only instances with this tag.
    pub tag: Option<String>,
    /// Routes of an instance; `{service}` stands for its service.
    pub uris: Vec<String>,
    pub vips: Vec<String>,
    /// Names of fields where a value is a JSON object; `a.b` is `b` of the object `a`.
    pub host: String,
    pub port: String,
    pub weight: String,
    pub tags: String,
}

impl Default for EtcdConfig {
    fn default() -> EtcdConfig {
        EtcdConfig {
            endpoints: Vec::new(),
            user: None,
            password: None,
            routes_prefix: ROUTES_PREFIX.to_owned(),
            map: Vec::new(),
            ca_file: None,
            client_certificate_file: None,
            client_key_file: None,
            timeout: TIMEOUT,
            rescan_interval: Duration::from_secs(300),
        }
    }
}

impl Default for InstanceMap {
    fn default() -> InstanceMap {
        InstanceMap {
            prefix: "/services/".to_owned(),
            service: None,
            tag: None,
            uris: Vec::new(),
            vips: Vec::new(),
            host: "host".to_owned(),
            port: "port".to_owned(),
            weight: "weight".to_owned(),
            tags: "tags".to_owned(),
        }
    }
}

const ROUTES_PREFIX: &str = "/viaduct/routes/";

impl EtcdConfig {
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        for (i, endpoint) in self.endpoints.iter().enumerate() {
            Server::parse(endpoint, ["http", "https"], 2379)
                .with_context(|| format!("etcd.endpoints[{i}] {endpoint:?}"))?;
        }
        ensure!(
            self.user.is_some() == self.password.is_some(),
            "etcd.user and etcd.password go together"
        );
        ensure!(
            self.client_certificate_file.is_some() == self.client_key_file.is_some(),
            "etcd.client_certificate_file and etcd.client_key_file go together"
        );
        ensure!(
            !self.routes_prefix.is_empty() || !self.map.is_empty(),
            "etcd.routes_prefix: empty, and no etcd.map"
        );
        validate_maps("etcd", &self.map)?;
        ensure_positive(&[
            ("etcd.timeout", self.timeout),
            ("etcd.rescan_interval", self.rescan_interval),
        ])
    }
}

fn validate_maps(section: &str, maps: &[InstanceMap]) -> anyhow::Result<()> {
    for (i, map) in maps.iter().enumerate() {
        let key = format!("{section}.map[{i}]");
        ensure!(
            map.prefix.ends_with('/'),
            "{key}.prefix {:?} does not end with /",
            map.prefix
        );
        validate_routes(&key, &map.uris, &map.vips)?;
        for (name, path) in [
            ("host", &map.host),
            ("port", &map.port),
            ("weight", &map.weight),
            ("tags", &map.tags),
        ] {
            ensure!(
                path.split('.').all(|field| !field.is_empty()),
                "{key}.{name} {path:?} is not a field"
            );
        }
    }
    Ok(())
}

/// Routes in which `{service}` stands for a service.
fn validate_routes(key: &str, uris: &[String], vips: &[String]) -> anyhow::Result<()> {
    ensure!(
        !uris.is_empty() || !vips.is_empty(),
        "{key}: neither uris nor vips"
    );
    for (i, uri) in uris.iter().enumerate() {
        wire::parse_uri(&uri.replace("{service}", "service"))
            .map_err(|why| anyhow!("{key}.uris[{i}] {uri:?}: {why}"))?;
    }
    for (i, vip) in vips.iter().enumerate() {
        wire::parse_vip(vip, None).map_err(|(_, why)| anyhow!("{key}.vips[{i}] {vip:?}: {why}"))?;
    }
    Ok(())
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ZookeeperConfig {
    /// `HOST[:PORT]`: servers of one ensemble, of which one at a time is asked. Empty switches the
    /// source off.
    pub servers: Vec<String>,
    /// Of the scheme `digest`.
    pub user: Option<String>,
    pub password: Option<Secret>,
    /// What paths begin with whose data is declared routes; empty for none.
    pub routes_prefix: String,
    pub map: Vec<InstanceMap>,
    /// Whether a watch covers all below a node, where the server can: from 3.6 on.
    pub recursive_watches: bool,
    /// How long a connect and an answer may take.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// How long a server that says nothing is waited for.
    #[serde(with = "humantime_serde")]
    pub session_timeout: Duration,
    /// How often everything is read again, in case a change was not heard.
    #[serde(with = "humantime_serde")]
    pub rescan_interval: Duration,
}

impl Default for ZookeeperConfig {
    fn default() -> ZookeeperConfig {
        ZookeeperConfig {
            servers: Vec::new(),
            user: None,
            password: None,
            routes_prefix: ROUTES_PREFIX.to_owned(),
            map: Vec::new(),
            recursive_watches: true,
            timeout: TIMEOUT,
            session_timeout: Duration::from_secs(10),
            rescan_interval: Duration::from_secs(300),
        }
    }
}

impl ZookeeperConfig {
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        for (i, server) in self.servers.iter().enumerate() {
            let authority = server.parse::<::http::uri::Authority>();
            let is_server = authority.is_ok_and(|server| !server.as_str().contains('@'));
            ensure!(
                is_server,
                "zookeeper.servers[{i}] {server:?} is not HOST[:PORT]"
            );
        }
        ensure!(
            self.user.is_some() == self.password.is_some(),
            "zookeeper.user and zookeeper.password go together"
        );
        ensure!(
            !self.routes_prefix.is_empty() || !self.map.is_empty(),
            "zookeeper.routes_prefix: empty, and no zookeeper.map"
        );
        validate_maps("zookeeper", &self.map)?;
        let prefixes = self.map.iter().map(|map| &map.prefix);
        for prefix in
            prefixes.chain((!self.routes_prefix.is_empty()).then_some(&self.routes_prefix))
        {
            let path = prefix
                .strip_prefix('/')
                .and_then(|path| path.strip_suffix('/'));
            let is_path = path.is_some_and(|path| path.split('/').all(|name| !name.is_empty()));
            ensure!(
                is_path,
                "zookeeper: the prefix {prefix:?} is not of the form /PATH/"
            );
        }
        ensure_positive(&[
            ("zookeeper.timeout", self.timeout),
            ("zookeeper.session_timeout", self.session_timeout),
            ("zookeeper.rescan_interval", self.rescan_interval),
        ])
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConsulConfig {
    /// `http://HOST[:PORT]` or `https://` of an agent. Unset switches the source off.
    pub address: Option<String>,
    pub token: Option<Secret>,
    /// The agent's own unless given.
    pub datacenter: Option<String>,
    /// What tags begin with that say which routes a service has: `viaduct.uris=HOST/PATH,...`.
    pub tag_prefix: String,
    pub map: Vec<ServiceMap>,
    /// What keys of the key-value store begin with whose values are declared routes; empty for none.
    pub routes_prefix: String,
    /// PEM certificates to trust in place of the system's.
    pub ca_file: Option<PathBuf>,
    pub client_certificate_file: Option<PathBuf>,
    pub client_key_file: Option<PathBuf>,
    /// How long a connect and an answer may take.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// How long a query waits for a change.
    #[serde(with = "humantime_serde")]
    pub wait: Duration,
}

/// Routes of services that have no tags for it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServiceMap {
    /// Only this service; unset, every one.
    pub service: Option<String>,
    /// Only instances with this tag.
    pub tag: Option<String>,
    /// Routes of an instance; `{service}` stands for its service.
    pub uris: Vec<String>,
    pub vips: Vec<String>,
}

impl Default for ConsulConfig {
    fn default() -> ConsulConfig {
        ConsulConfig {
            address: None,
            token: None,
            datacenter: None,
            tag_prefix: "viaduct.".to_owned(),
            map: Vec::new(),
            routes_prefix: ROUTES_PREFIX.trim_start_matches('/').to_owned(),
            ca_file: None,
            client_certificate_file: None,
            client_key_file: None,
            timeout: TIMEOUT,
            wait: Duration::from_secs(60),
        }
    }
}

impl ConsulConfig {
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        if let Some(address) = &self.address {
            Server::parse(address, ["http", "https"], 8500)
                .with_context(|| format!("consul.address {address:?}"))?;
        }
        ensure!(!self.tag_prefix.is_empty(), "consul.tag_prefix is empty");
        ensure!(
            self.client_certificate_file.is_some() == self.client_key_file.is_some(),
            "consul.client_certificate_file and consul.client_key_file go together"
        );
        for (i, map) in self.map.iter().enumerate() {
            validate_routes(&format!("consul.map[{i}]"), &map.uris, &map.vips)?;
        }
        ensure!(
            self.wait <= Duration::from_secs(600),
            "consul.wait must be at most 10m"
        );
        ensure_positive(&[("consul.timeout", self.timeout), ("consul.wait", self.wait)])
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse;

    #[test]
    fn a_mistake_is_named_by_its_key() {
        for (text, key) in [
            ("[redis]\nservers = [\"http://a\"]", "redis.servers[0]"),
            (
                "[redis]\nservers = [\"redis://a:99999\"]",
                "redis.servers[0]",
            ),
            (
                "[redis]\nservers = [\"redis://u:p@a\"]",
                "keys of their own",
            ),
            ("[redis]\nservers = [\"redis://a/1\"]", "redis.servers[0]"),
            ("[redis]\nuser = \"u\"", "redis.user"),
            ("[redis]\npoll_interval = \"0s\"", "redis.poll_interval"),
            ("[etcd]\nendpoints = [\"a:2379\"]", "etcd.endpoints[0]"),
            ("[etcd]\npassword = \"p\"", "etcd.user"),
            ("[etcd]\nroutes_prefix = \"\"", "etcd.routes_prefix"),
            ("[[etcd.map]]\n", "etcd.map[0]: neither uris nor vips"),
            ("[[etcd.map]]\nuris = [\"a b\"]", "etcd.map[0].uris[0]"),
            ("[[etcd.map]]\nvips = [\"a\"]", "etcd.map[0].vips[0]"),
            (
                "[[etcd.map]]\nuris = [\"a\"]\nprefix = \"/a\"",
                "etcd.map[0].prefix",
            ),
            (
                "[[etcd.map]]\nuris = [\"a\"]\nhost = \"a..b\"",
                "etcd.map[0].host",
            ),
            ("[zookeeper]\nservers = [\"a/b\"]", "zookeeper.servers[0]"),
            ("[zookeeper]\nroutes_prefix = \"a/\"", "\"a/\""),
            ("[consul]\naddress = \"a\"", "consul.address"),
            ("[consul]\nwait = \"1h\"", "consul.wait"),
            ("[[consul.map]]\nuris = [\"\"]", "consul.map[0].uris[0]"),
            ("[[consul.map]]\nprefix = \"/a/\"", "prefix"),
        ] {
            let error = format!("{:#}", parse(text).expect_err(text));
            assert!(error.contains(key), "{text}: {error:?} lacks {key:?}");
        }
    }

    #[test]
    fn the_documented_examples_are_valid() {
        let text = include_str!("../../../docs/sources.md");
        let blocks = text.split("```toml\n").skip(1);
        let blocks = blocks.map(|rest| rest.split("```").next().unwrap());
        let config = parse(&blocks.collect::<String>()).unwrap();
        assert_eq!(config.redis.servers.len(), 2);
        assert_eq!((config.etcd.map.len(), config.consul.map.len()), (1, 1));
        assert_eq!(config.zookeeper.map[0].host, "address");
        let defaults = super::super::Config::default();
        assert_eq!(config.etcd.rescan_interval, defaults.etcd.rescan_interval);
        assert_eq!(config.consul.wait, defaults.consul.wait);
        assert_eq!(config.redis.poll_interval, defaults.redis.poll_interval);
    }
}
