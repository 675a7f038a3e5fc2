//! `viaduct get [NAME]`: what the bucket declares, in the form that `viaduct apply` takes.

use anyhow::{Context as _, anyhow};
use serde_json::{Map, Value, json};

use crate::cli::declared::{self, BucketOption};
use crate::cli::{Failure, block_on, print};
use crate::source::kv::entry::Key;
use crate::source::kv::store::{Entry, Store};

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// A route's name, or a VIP: shop, tcp/192.0.2.10:80; without one, everything
    name: Option<String>,
    #[command(flatten)]
    bucket: BucketOption,
    /// Print JSON, one object an entry
    #[arg(long)]
    json: bool,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let nats = options.bucket.load()?.nats;
    let key = options.name.as_deref().map(declared::key).transpose()?;
    let mut entries = block_on(async {
        let store = Store::open(&nats).await?;
        match key {
            None => store.entries().await,
            Some(key) => {
                let key = key.to_string();
                let entry = store.entry(&key).await?;
                if entry.value.is_none() {
                    return Err(anyhow!("{key}: not in the bucket {}", nats.bucket));
                }
                Ok(vec![(key, entry)])
            }
        }
    })?;
    entries.sort_by(|(one, _), (other, _)| one.cmp(other));
    let text = match options.json {
        true => entries.iter().map(|(key, entry)| row(key, entry)).collect(),
        false => file(&entries)?,
    };
    Ok(print(&text)?)
}

fn row(key: &str, entry: &Entry) -> String {
    let value = entry.value.as_deref().unwrap_or_default();
    let row = match serde_json::from_slice::<Value>(value) {
        Ok(value) => json!({ "key": key, "revision": entry.revision, "value": value }),
        Err(_) => {
            let text = String::from_utf8_lossy(value);
            json!({ "key": key, "revision": entry.revision, "text": text })
        }
    };
    format!("{row}\n")
}

/// The entries as TOML, each with its revision. What cannot be that stands in a comment.
fn file(entries: &[(String, Entry)]) -> anyhow::Result<String> {
    let mut text = String::new();
    for (key, entry) in entries {
        let value = entry.value.as_deref().unwrap_or_default();
        let (kind, name) = match key.parse::<Key>() {
            Ok(Key::Route(name)) => ("route", ("name", name)),
            Ok(Key::Vip(vip)) => ("vip", ("address", vip.to_string())),
            Err(error) => {
                text.push_str(&format!("# {key}: {error:#}\n\n"));
                continue;
            }
        };
        let Ok(Value::Object(table)) = serde_json::from_slice(value) else {
            text.push_str(&format!("# {key}: its value is not a JSON object\n\n"));
            continue;
        };
        let mut entry = Map::from_iter([
            (name.0.to_owned(), name.1.into()),
            ("revision".to_owned(), entry.revision.into()),
        ]);
        entry.extend(table);
        let mut file = json!({ kind: [entry] });
        drop_nulls(&mut file);
        text.push_str(&toml::to_string(&file).with_context(|| format!("print {key}"))?);
        text.push('\n');
    }
    Ok(text)
}

/// TOML has none, and where a key may be absent it says as much.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(table) => {
            table.retain(|_, value| !value.is_null());
            table.values_mut().for_each(drop_nulls);
        }
        Value::Array(list) => {
            list.retain(|value| !value.is_null());
            list.iter_mut().for_each(drop_nulls);
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_can_be_applied() {
        let entry = |revision, value: &str| Entry {
            revision,
            value: Some(value.to_owned().into()),
        };
        let entries = [
            (
                "route.shop".to_owned(),
                entry(
                    7,
                    r#"{"uris": ["a.x"], "balance": null, "timeouts": {"total": "5s"},
                        "backend": [{"address": "10.0.0.1:80", "tls": {}}]}"#,
                ),
            ),
            (
                "vip.tcp.192.0.2.1.80".to_owned(),
                entry(8, r#"{"drain": "1m"}"#),
            ),
            ("other".to_owned(), entry(9, "{}")),
            ("route.bad".to_owned(), entry(10, "no")),
        ];
        let text = file(&entries).unwrap();
        assert!(text.contains("# other: neither route.NAME"), "{text}");
        assert!(text.contains("# route.bad: its value is not"), "{text}");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file.toml");
        std::fs::write(&path, &text).unwrap();
        let config = crate::config::parse("[l4]\nvip_ranges = [\"192.0.2.0/24\"]").unwrap();
        let items = declared::load(&path, &config).unwrap();
        let got: Vec<(String, Option<u64>)> = items
            .iter()
            .map(|item| (item.key.to_string(), item.revision))
            .collect();
        let wanted = [("route.shop", 7), ("vip.tcp.192.0.2.1.80", 8)];
        assert_eq!(got, wanted.map(|(key, at)| (key.to_owned(), Some(at))));
        assert_eq!(items[0].value["backend"][0]["tls"], json!({}));
    }
}
