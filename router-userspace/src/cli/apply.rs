//! `viaduct apply FILE` and `viaduct diff FILE`: writes the entries of a file to the bucket, or says
//! what that would change.
//!
//! Nothing is written before every entry is valid and is at the revision that the file asks for. Each
//! entry is then written over the revision that was read, so that nobody's change is lost unseen; the
//! bucket has no transactions, so an entry that somebody changes in that moment ends the command with
//! those before it written. Entries that the file does not name stay.

use std::path::PathBuf;

use anyhow::{anyhow, bail};
use serde_json::{Value, json};

use crate::cli::declared::{self, BucketOption, Item};
use crate::cli::table::table;
use crate::cli::{Failure, block_on, print};
use crate::config::NatsConfig;
use crate::source::kv::store::{Entry, Store, Written};

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// TOML, or JSON if it is named *.json
    file: PathBuf,
    #[command(flatten)]
    bucket: BucketOption,
    /// Check everything and say what would be written
    #[arg(long)]
    dry_run: bool,
    /// Print JSON, one object an entry
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug, clap::Args)]
pub struct DiffOptions {
    /// TOML, or JSON if it is named *.json
    file: PathBuf,
    #[command(flatten)]
    bucket: BucketOption,
    /// Print JSON, one object an entry
    #[arg(long)]
    json: bool,
}

pub fn apply(options: &Options) -> Result<(), Failure> {
    let config = options.bucket.load()?;
    let items = declared::load(&options.file, &config).map_err(Failure::Usage)?;
    let changes = block_on(async {
        let (mut store, mut changes) = plan(&config.nats, items).await?;
        if !options.dry_run {
            write(&mut store, &mut changes).await?;
        }
        anyhow::Ok(changes)
    })?;
    let text = match options.json {
        true => changes.iter().map(|change| change.row() + "\n").collect(),
        false => {
            let rows: Vec<[String; 3]> = changes.iter().map(Change::cells).collect();
            table(["KEY", "RESULT", "REVISION"], &rows)
        }
    };
    Ok(print(&text)?)
}

pub fn diff(options: &DiffOptions) -> Result<(), Failure> {
    let config = options.bucket.load()?;
    let items = declared::load(&options.file, &config).map_err(Failure::Usage)?;
    let (_, changes) = block_on(plan(&config.nats, items))?;
    let text: String = match options.json {
        true => changes.iter().map(|change| change.row() + "\n").collect(),
        false => changes.iter().map(Change::lines).collect(),
    };
    Ok(print(&text)?)
}

/// What becomes of one entry.
struct Change {
    item: Item,
    before: Entry,
    /// What the entry says before, if that is JSON.
    said: Option<Value>,
    /// The revision that was written.
    written: Option<u64>,
}

impl Change {
    fn kind(&self) -> &'static str {
        match &self.said {
            _ if self.before.value.is_none() => "created",
            Some(said) if *said == self.item.value => "unchanged",
            _ => "updated",
        }
    }

    fn cells(&self) -> [String; 3] {
        let revision = self.written.unwrap_or(self.before.revision);
        [
            self.item.key.to_string(),
            self.kind().to_owned(),
            revision.to_string(),
        ]
    }

    fn row(&self) -> String {
        let row = json!({
            "key": self.item.key.to_string(),
            "result": self.kind(),
            "revision": self.written.unwrap_or(self.before.revision),
            "before": self.said,
            "after": self.item.value,
        });
        row.to_string()
    }

    /// `+` what is new, `~` what is another, and the keys that differ.
    fn lines(&self) -> String {
        let key = &self.item.key;
        match (self.kind(), &self.said) {
            ("unchanged", _) => String::new(),
            ("created", _) => format!("+ {key}\n"),
            (_, None) => format!("~ {key}: was not JSON\n"),
            (_, Some(said)) => {
                let mut text = format!("~ {key}\n");
                for (name, before, after) in differences(said, &self.item.value) {
                    text.push_str(&format!("    {name}: {before} -> {after}\n"));
                }
                text
            }
        }
    }
}

/// The keys that two tables have different, with the value of each.
fn differences(before: &Value, after: &Value) -> Vec<(String, String, String)> {
    let keys = |value: &Value| -> Vec<String> {
        let table = value.as_object();
        table
            .map(|table| table.keys().cloned().collect())
            .unwrap_or_default()
    };
    let mut names = [keys(before), keys(after)].concat();
    names.sort();
    names.dedup();
    names.retain(|name| before.get(name) != after.get(name));
    let shown = |value: Option<&Value>| value.map_or("-".to_owned(), Value::to_string);
    let difference = |name: String| {
        let (before, after) = (shown(before.get(&name)), shown(after.get(&name)));
        (name, before, after)
    };
    names.into_iter().map(difference).collect()
}

/// Reads what the bucket has of each entry.
async fn plan(nats: &NatsConfig, items: Vec<Item>) -> anyhow::Result<(Store, Vec<Change>)> {
    let store = Store::open(nats).await?;
    let mut changes = Vec::with_capacity(items.len());
    for item in items {
        let key = item.key.to_string();
        let before = store.entry(&key).await?;
        let at = before.value.as_ref().map_or(0, |_| before.revision);
        match item.revision {
            Some(0) if at != 0 => bail!("{key}: is there already, at revision {at}"),
            Some(wanted) if wanted != at => {
                bail!("{key}: at revision {at}, not at {wanted}: nothing is written")
            }
            Some(_) | None => {}
        }
        let said = before.value.as_deref();
        changes.push(Change {
            said: said.and_then(|said| serde_json::from_slice(said).ok()),
            item,
            before,
            written: None,
        });
    }
    Ok((store, changes))
}

async fn write(store: &mut Store, changes: &mut [Change]) -> anyhow::Result<()> {
    let all = changes.len();
    for (done, change) in changes.iter_mut().enumerate() {
        if change.kind() == "unchanged" {
            continue;
        }
        let key = change.item.key.to_string();
        let so_far = || format!("{key}: {done} of {all} entries are as the file has them");
        let value = change.item.value.to_string().into();
        let written = store.put(&key, value, change.before.revision).await;
        match written.map_err(|error| error.context(so_far()))? {
            Written::At(revision) => change.written = Some(revision),
            Written::Conflict => {
                return Err(anyhow!("somebody else has just changed it").context(so_far()));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::nats_server::Server;

    #[test]
    fn a_difference_names_the_keys_that_differ() {
        let change = |before: Option<&str>, after: Value| Change {
            item: Item {
                key: "route.a".parse().unwrap(),
                revision: None,
                value: after,
            },
            before: Entry {
                revision: 7,
                value: before.map(|text| text.to_owned().into()),
            },
            said: before.and_then(|text| serde_json::from_str(text).ok()),
            written: None,
        };
        let after = json!({ "uris": ["a.x"], "compression": true });
        let lines = |before| change(before, after.clone()).lines();
        assert_eq!(lines(None), "+ route.a\n");
        assert_eq!(lines(Some(r#"{"compression":true,"uris":["a.x"]}"#)), "");
        assert_eq!(lines(Some("no")), "~ route.a: was not JSON\n");
        assert_eq!(
            lines(Some(r#"{"uris": ["a.x"], "retries": {}}"#)),
            "~ route.a\n    compression: - -> true\n    retries: {} -> -\n"
        );
    }

    #[tokio::test]
    async fn a_file_is_written_whole_or_what_is_wrong_is_told_before() {
        let folder = tempfile::tempdir().unwrap();
        let server =
            Server::start_with(None, &["-js", "-sd", folder.path().to_str().unwrap()]).await;
        let nats = NatsConfig {
            servers: vec![format!("nats://{}", server.address)],
            ..NatsConfig::default()
        };
        let item = |name: &str, revision, host: &str| Item {
            key: format!("route.{name}").parse().unwrap(),
            revision,
            value: json!({ "uris": [host] }),
        };
        let apply = async |items: Vec<Item>| {
            let (mut store, mut changes) = plan(&nats, items).await?;
            write(&mut store, &mut changes).await?;
            anyhow::Ok(changes.iter().map(Change::cells).collect::<Vec<_>>())
        };
        let row = |key: &str, result: &str, revision: u64| {
            [key.to_owned(), result.to_owned(), revision.to_string()]
        };
        let first = vec![item("a", None, "a.x"), item("b", Some(0), "b.x")];
        assert_eq!(
            apply(first).await.unwrap(),
            [row("route.a", "created", 1), row("route.b", "created", 2)]
        );
        let second = vec![item("a", Some(1), "c.x"), item("b", None, "b.x")];
        assert_eq!(
            apply(second).await.unwrap(),
            [row("route.a", "updated", 3), row("route.b", "unchanged", 2)]
        );
        // The second asks for what is not so: the first is not written either.
        let stale = vec![item("a", None, "d.x"), item("b", Some(1), "d.x")];
        let error = format!("{:#}", apply(stale).await.unwrap_err());
        assert!(
            error.starts_with("route.b: at revision 2, not at 1"),
            "{error}"
        );
        let there = apply(vec![item("a", Some(0), "d.x")]).await.unwrap_err();
        assert!(format!("{there:#}").contains("is there already"));
        let (mut store, mut changes) = plan(&nats, vec![item("a", None, "e.x")]).await.unwrap();
        assert_eq!(changes[0].before.revision, 3, "nothing was written");
        // Somebody is faster.
        apply(vec![item("a", None, "f.x")]).await.unwrap();
        let error = write(&mut store, &mut changes).await.unwrap_err();
        let error = format!("{error:#}");
        assert!(
            error.contains("0 of 1 entries") && error.contains("somebody else"),
            "{error}"
        );
    }
}
