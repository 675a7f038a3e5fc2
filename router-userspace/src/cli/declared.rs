//! What `viaduct apply`, `get`, `delete` and `diff` share: the bucket they speak to, and the files
//! whose entries they write to it.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, anyhow, ensure};
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value};
use toml::Spanned;

use crate::cli::{ConfigOption, Failure};
use crate::config::Config;
use crate::route::Vip;
use crate::source::kv::entry::Key;

/// Bytes of a file.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Which bucket a command works on.
#[derive(Clone, Debug, clap::Args)]
pub struct BucketOption {
    #[command(flatten)]
    config: ConfigOption,
    /// NATS server instead of the configured ones
    #[arg(long, value_name = "URL")]
    nats: Option<String>,
    /// Bucket instead of the configured one
    #[arg(long)]
    bucket: Option<String>,
}

impl BucketOption {
    /// The servers and the bucket, and what routes are held against: without `l4.vip_ranges` here, the
    /// gateways alone know theirs.
    ///
    /// # Errors
    /// The configuration, or that it names no server or bucket.
    pub fn load(&self) -> Result<Config, Failure> {
        let mut config = self.config.load()?;
        let (nats, l4) = (&mut config.nats, &mut config.l4);
        if let Some(server) = &self.nats {
            nats.servers = vec![server.clone()];
        }
        if let Some(bucket) = &self.bucket {
            nats.bucket.clone_from(bucket);
        }
        for (key, is_empty) in [
            ("nats.servers", nats.servers.is_empty()),
            ("nats.bucket", nats.bucket.is_empty()),
        ] {
            if is_empty {
                return Err(Failure::Usage(anyhow!("{key} is empty")));
            }
        }
        if l4.vip_ranges.is_empty() {
            let everywhere = ["0.0.0.0/0", "::/0"];
            let everywhere = everywhere.map(|net| net.parse::<IpNet>().expect("a prefix"));
            l4.vip_ranges.extend(everywhere);
        }
        Ok(config)
    }
}

/// One entry as a file has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    pub key: Key,
    /// To be written over the entry of this revision alone; 0: over none.
    pub revision: Option<u64>,
    pub value: Value,
}

/// The key that an argument names: `shop`, `route.shop`, `tcp/192.0.2.10:80` or
/// `vip.tcp.192.0.2.10.80`.
pub fn key(name: &str) -> Result<Key, Failure> {
    let key = match name.parse::<Vip>() {
        Ok(vip) => Ok(Key::Vip(vip)),
        Err(_) if name.starts_with("route.") || name.starts_with("vip.") => name.parse(),
        Err(_) => format!("route.{name}").parse(),
    };
    key.with_context(|| name.to_owned()).map_err(Failure::Usage)
}

/// Reads a file of entries, JSON if it is named so, and checks each as the gateway will.
///
/// # Errors
/// One message with the file, the line, the entry and the key.
pub fn load(path: &Path, config: &Config) -> anyhow::Result<Vec<Item>> {
    let name = path.display();
    let metadata = std::fs::metadata(path).with_context(|| format!("read {name}"))?;
    ensure!(
        metadata.len() <= MAX_FILE_BYTES,
        "read {name}: longer than {MAX_FILE_BYTES} bytes"
    );
    let text = std::fs::read_to_string(path).with_context(|| format!("read {name}"))?;
    let items = match path.extension().is_some_and(|end| end == "json") {
        true => parse_json(&text, config),
        false => parse_toml(&text, config),
    };
    items.with_context(|| name.to_string())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File<T> {
    #[serde(default = "Vec::new")]
    route: Vec<T>,
    #[serde(default = "Vec::new")]
    vip: Vec<T>,
}

fn parse_toml(text: &str, config: &Config) -> anyhow::Result<Vec<Item>> {
    let file: File<Spanned<toml::Table>> = toml::from_str(text)?;
    let table = |table: Spanned<toml::Table>| {
        let line = 1 + text[..table.span().start].matches('\n').count();
        let value = serde_json::to_value(table.into_inner());
        (Some(line), value.expect("TOML can be JSON"))
    };
    let file = File {
        route: file.route.into_iter().map(table).collect(),
        vip: file.vip.into_iter().map(table).collect(),
    };
    items(file, config)
}

fn parse_json(text: &str, config: &Config) -> anyhow::Result<Vec<Item>> {
    let file: File<Map<String, Value>> = serde_json::from_str(text)?;
    let table = |table| (None, Value::Object(table));
    let file = File {
        route: file.route.into_iter().map(table).collect(),
        vip: file.vip.into_iter().map(table).collect(),
    };
    items(file, config)
}

fn items(file: File<(Option<usize>, Value)>, config: &Config) -> anyhow::Result<Vec<Item>> {
    let mut items = Vec::new();
    let mut keys = BTreeSet::new();
    for (kind, name, entries) in [("route", "name", file.route), ("vip", "address", file.vip)] {
        for (i, (line, value)) in entries.into_iter().enumerate() {
            let place = || match line {
                Some(line) => format!("line {line}: {kind}[{i}]"),
                None => format!("{kind}[{i}]"),
            };
            let item = item(kind, name, value, config).with_context(place)?;
            ensure!(
                keys.insert(item.key.clone()),
                "{}: {} stands twice",
                place(),
                item.key
            );
            items.push(item);
        }
    }
    Ok(items)
}

fn item(kind: &str, name: &str, mut value: Value, config: &Config) -> anyhow::Result<Item> {
    let table = value.as_object_mut().expect("an entry is a table");
    let named = table.remove(name);
    let named = named.as_ref().and_then(Value::as_str);
    let named = named.ok_or_else(|| anyhow!("{name}: missing, or not a string"))?;
    let key = match kind {
        "route" => format!("route.{named}").parse(),
        _ => named.parse().map(Key::Vip).map_err(anyhow::Error::from),
    };
    let key: Key = key.with_context(|| format!("{name} {named:?}"))?;
    let revision = match table.remove("revision") {
        None => None,
        Some(revision) => {
            let number = revision.as_u64();
            Some(number.ok_or_else(|| anyhow!("revision: {revision} is not one"))?)
        }
    };
    key.read(value.to_string().as_bytes(), config)
        .with_context(|| key.to_string())?;
    Ok(Item {
        key,
        revision,
        value,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        crate::config::parse("[l4]\nvip_ranges = [\"192.0.2.0/24\"]").unwrap()
    }

    const TOML: &str = r#"
        [[route]]
        name = "shop"
        revision = 7
        uris = ["shop.x"]
        timeouts = { total = "5s" }
        [[route.backend]]
        address = "10.0.0.1:80"

        [[vip]]
        address = "tcp/192.0.2.1:80"
        forwarding = "ipip"
    "#;

    #[test]
    fn toml_and_json_say_the_same() {
        let json = r#"{
            "route": [{"name": "shop", "revision": 7, "uris": ["shop.x"], "timeouts": {"total": "5s"},
                "backend": [{"address": "10.0.0.1:80"}]}],
            "vip": [{"address": "tcp/192.0.2.1:80", "forwarding": "ipip"}]
        }"#;
        let items = parse_toml(TOML, &config()).unwrap();
        assert_eq!(items, parse_json(json, &config()).unwrap());
        let keys: Vec<String> = items.iter().map(|item| item.key.to_string()).collect();
        assert_eq!(keys, ["route.shop", "vip.tcp.192.0.2.1.80"]);
        assert_eq!(items[0].revision, Some(7));
        assert_eq!(items[1].value, serde_json::json!({ "forwarding": "ipip" }));
    }

    #[test]
    fn what_is_wrong_is_told_by_line_entry_and_key() {
        let error = |text: &str| format!("{:#}", parse_toml(text, &config()).unwrap_err());
        let wrong = TOML.replace("10.0.0.1:80", "host:80");
        let told = error(&wrong);
        let wanted = "line 2: route[0]: route.shop: backend[0].address: ";
        assert!(told.starts_with(wanted), "{told}");
        for (text, wanted) in [
            (
                "[[route]]\nuris = ['a.x']",
                "line 1: route[0]: name: missing",
            ),
            ("[[route]]\nname = 'a..b'", "route[0]: name \"a..b\": "),
            ("[[vip]]\naddress = 'tcp/192.0.2.1'", "vip[0]: address "),
            (
                "[[vip]]\naddress = 'tcp/203.0.113.1:80'",
                "outside l4.vip_ranges",
            ),
            (
                "[[vip]]\naddress = 'tcp/192.0.2.1:80'\nrevision = -1",
                "revision: -1",
            ),
            ("[[backend]]\naddress = '10.0.0.1:80'", "unknown field"),
        ] {
            let told = error(text);
            assert!(told.contains(wanted), "{text}: {told}");
        }
        let twice = error(&[TOML, TOML].concat());
        assert!(twice.contains("route.shop stands twice"), "{twice}");
    }

    #[test]
    fn an_argument_names_a_key() {
        for (name, wanted) in [
            ("shop", "route.shop"),
            ("route.shop", "route.shop"),
            ("tcp/192.0.2.1:80", "vip.tcp.192.0.2.1.80"),
            ("vip.tcp.192.0.2.1.80", "vip.tcp.192.0.2.1.80"),
        ] {
            assert_eq!(key(name).unwrap().to_string(), wanted);
        }
        assert!(key("a b").is_err());
    }
}
