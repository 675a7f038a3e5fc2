//! `viaduct rejects`: what the running gateway refused lately.

use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::cli::client::{self, AdminOption};
use crate::cli::table::{cell, table};
use crate::cli::{Failure, block_on, print};

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    admin: AdminOption,
    /// Print JSON, one object a row
    #[arg(long)]
    json: bool,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let admin = options.admin.address()?;
    let answer = block_on(client::get_json(&admin, "/v1/rejects"))?;
    let rows = answer["rows"].as_array().map(Vec::as_slice);
    let rows = rows.unwrap_or_default();
    let text = match options.json {
        true => rows.iter().map(|row| format!("{row}\n")).collect(),
        false => {
            let now = SystemTime::now();
            let rows: Vec<[String; 5]> = rows.iter().map(|row| cells(row, now)).collect();
            table(["ORIGIN", "AGO", "TIMES", "WHAT", "WHY"], &rows)
        }
    };
    Ok(print(&text)?)
}

fn cells(row: &Value, now: SystemTime) -> [String; 5] {
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs(row["at"].as_u64().unwrap_or_default());
    let ago = now.duration_since(at).unwrap_or_default().as_secs();
    let ago = humantime_serde::re::humantime::format_duration(Duration::from_secs(ago));
    // Names and reasons come from outside.
    let text = |value: &Value| cell(value).escape_debug().to_string();
    [
        cell(&row["origin"]),
        ago.to_string(),
        cell(&row["count"]),
        text(&row["what"]),
        text(&row["why"]).replace("\\\"", "\""),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_name_cannot_draw_on_the_terminal() {
        let row = json!({
            "origin": "kv", "what": "route.\u{1b}[2J", "why": "uris: \"x\" is wrong", "count": 2, "at": 40,
        });
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        assert_eq!(
            cells(&row, now),
            ["kv", "1m", "2", "route.\\u{1b}[2J", "uris: \"x\" is wrong"]
        );
    }
}
