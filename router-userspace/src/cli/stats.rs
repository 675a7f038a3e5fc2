//! `viaduct stats`: what the running gateway has counted, or counts a second.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Map, Value, json};

use crate::cli::client::{self, AdminOption};
use crate::cli::table::{cell, table};
use crate::cli::{Failure, block_on, print};
use crate::config::AdminListen;

mod traffic;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Print what VIPs and backends do a second, over so many seconds [default: 1]
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
          value_parser = clap::value_parser!(u16).range(1..=3600))]
    rate: Option<u16>,
    /// Print what layer 7 counted of each route
    #[arg(long, conflicts_with_all = ["rate", "backends"])]
    routes: bool,
    /// Print what layer 7 counted of each backend
    #[arg(long, conflicts_with = "rate")]
    backends: bool,
    /// Print JSON: all counters in one object, or with another option one object a row
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    admin: AdminOption,
}

const PATH: &str = "/v1/stats";
/// Counters of a VIP and of a backend.
const COUNTERS: [&str; 5] = [
    "packets",
    "bytes",
    "reply_packets",
    "reply_bytes",
    "new_flows",
];

pub fn run(options: &Options) -> Result<(), Failure> {
    let admin = options.admin.address()?;
    if options.routes || options.backends {
        let kind = if options.routes { "route" } else { "backend" };
        let text = block_on(traffic::text(&admin, kind, options.json))?;
        return Ok(print(&text)?);
    }
    let text = match options.rate {
        Some(seconds) => {
            let seconds = Duration::from_secs(seconds.into());
            let rates = block_on(rates(&admin, seconds))?;
            match options.json {
                true => rates.iter().map(|row| format!("{row}\n")).collect(),
                false => table(headings("/S"), &rates.iter().map(cells).collect::<Vec<_>>()),
            }
        }
        None => {
            let stats = block_on(client::get_json(&admin, PATH))?;
            match options.json {
                true => format!("{stats}\n"),
                false => counters(stats),
            }
        }
    };
    Ok(print(&text)?)
}

/// VIPs and backends in a table, then the rest.
fn counters(mut stats: Value) -> String {
    let mut text = String::new();
    let rows = rows(&stats);
    if !rows.is_empty() {
        let cells: Vec<_> = rows.iter().map(cells).collect();
        text = table(headings(""), &cells) + "\n";
    }
    if let Value::Object(l4) = &mut stats["l4"] {
        l4.remove("vips");
    }
    let mut rest = Vec::new();
    flatten("", &stats, &mut rest);
    text + &table(["COUNTER", "VALUE"], &rest)
}

/// What each VIP and backend did a second.
async fn rates(admin: &AdminListen, over: Duration) -> anyhow::Result<Vec<Value>> {
    let before = client::get_json(admin, PATH).await?;
    let begin = tokio::time::Instant::now();
    tokio::time::sleep(over).await;
    let after = client::get_json(admin, PATH).await?;
    let seconds = begin.elapsed().as_secs_f64();
    after["l4"].as_object().context("layer 4 is off")?;
    Ok(rows(&after)
        .into_iter()
        .map(|row| rate(row, &rows(&before), seconds))
        .collect())
}

/// Counters become what they grew by a second. What was not there before began at nothing.
fn rate(mut row: Value, before: &[Value], seconds: f64) -> Value {
    let same =
        |other: &&Value| (&other["vip"], &other["backend"]) == (&row["vip"], &row["backend"]);
    let before = before.iter().find(same).cloned().unwrap_or_default();
    for name in COUNTERS {
        let count = |row: &Value| row[name].as_u64().unwrap_or(0);
        let grown = count(&row).saturating_sub(count(&before));
        row[name] = json!((grown as f64 / seconds).round() as u64);
    }
    row
}

/// A row for each VIP, whose `backend` is null, and one for each of its backends.
fn rows(stats: &Value) -> Vec<Value> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut rows = Vec::new();
    for vip in list(&stats["l4"]["vips"]) {
        rows.push(row(&vip["vip"], &Value::Null, &vip));
        for backend in list(&vip["backends"]) {
            rows.push(row(&vip["vip"], &backend["address"], &backend));
        }
    }
    rows
}

fn row(vip: &Value, backend: &Value, of: &Value) -> Value {
    let mut row = Map::new();
    row.insert("vip".to_owned(), vip.clone());
    row.insert("backend".to_owned(), backend.clone());
    row.insert("active_flows".to_owned(), of["active_flows"].clone());
    for name in COUNTERS {
        row.insert(name.to_owned(), of[name].clone());
    }
    Value::Object(row)
}

fn headings(unit: &str) -> [String; 8] {
    let counted = |name: &str| format!("{name}{unit}");
    [
        "VIP".to_owned(),
        "BACKEND".to_owned(),
        "FLOWS".to_owned(),
        counted("PACKETS"),
        counted("BYTES"),
        counted("REPLIES"),
        counted("REPLY BYTES"),
        counted("NEW FLOWS"),
    ]
}

fn cells(row: &Value) -> [String; 8] {
    let [packets, bytes, replies, reply_bytes, new_flows] = COUNTERS.map(|name| cell(&row[name]));
    let backend = match &row["backend"] {
        Value::Null => "all".to_owned(),
        backend => cell(backend),
    };
    [
        cell(&row["vip"]),
        backend,
        cell(&row["active_flows"]),
        packets,
        bytes,
        replies,
        reply_bytes,
        new_flows,
    ]
}

/// Every leaf under its dotted name.
fn flatten(name: &str, value: &Value, rows: &mut Vec<[String; 2]>) {
    let under = |key: &str| match name {
        "" => key.to_owned(),
        name => format!("{name}.{key}"),
    };
    match value {
        Value::Object(fields) => {
            fields
                .iter()
                .for_each(|(key, value)| flatten(&under(key), value, rows));
        }
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                match item.as_array().map(Vec::as_slice) {
                    // A counter with its name, as layers list them.
                    Some([Value::String(key), count]) => flatten(&under(key), count, rows),
                    Some(_) | None => flatten(&under(&i.to_string()), item, rows),
                }
            }
        }
        leaf => rows.push([name.to_owned(), cell(leaf)]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_counters_get_dotted_names() {
        let mut rows = Vec::new();
        let stats = json!({ "a": { "b": 1 }, "v": [["pass", 2]], "w": [{ "x": null }] });
        flatten("", &stats, &mut rows);
        assert_eq!(rows, [["a.b", "1"], ["v.pass", "2"], ["w.0.x", "-"]]);
    }

    fn stats(packets: u64, backend_packets: u64) -> Value {
        json!({ "uptime_seconds": 5, "l4": { "active_flows": 2, "vips": [{
            "vip": "tcp/192.0.2.10:80", "active_flows": 2, "packets": packets, "bytes": 0,
            "reply_packets": 0, "reply_bytes": 0, "new_flows": 1, "backends": [{
                "address": "10.0.0.11:80", "active_flows": 1, "packets": backend_packets, "bytes": 0,
                "reply_packets": 0, "reply_bytes": 0, "new_flows": 0 }] }] } })
    }

    #[test]
    fn vips_and_backends_are_a_table_and_the_rest_is_listed() {
        let text = counters(stats(1234, 567));
        let words = |line: usize| -> Vec<String> {
            let line = text.lines().nth(line).unwrap();
            line.split_whitespace().map(str::to_owned).collect()
        };
        assert_eq!(words(1)[..4], ["tcp/192.0.2.10:80", "all", "2", "1234"]);
        assert_eq!(words(2)[1..4], ["10.0.0.11:80", "1", "567"]);
        assert!(text.contains("l4.active_flows") && !text.contains("l4.vips"));
    }

    #[test]
    fn a_rate_is_what_was_counted_over_the_time_it_took() {
        let (before, after) = (rows(&stats(100, 90)), rows(&stats(300, 10)));
        let rates: Vec<Value> = after
            .into_iter()
            .map(|row| rate(row, &before, 2.0))
            .collect();
        assert_eq!(rates[0]["packets"], 100);
        assert_eq!(rates[0]["active_flows"], 2);
        // The counters of a backend that left and came back begin anew.
        assert_eq!(rates[1]["packets"], 0);
    }
}
