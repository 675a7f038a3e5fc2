//! `viaduct flows`: who talks to which backend, as the kernel's flow table has it.

use serde_json::Value;

use crate::cli::client::{self, AdminOption};
use crate::cli::table::{cell, table};
use crate::cli::{Failure, block_on, print};
use crate::config::AdminListen;
use crate::l4::flow_list::Endpoint;
use crate::route::Vip;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Only flows of this VIP, tcp/ADDRESS:PORT
    #[arg(long)]
    vip: Option<Vip>,
    /// Only flows of this client, with or without a port
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    client: Option<Endpoint>,
    /// Only flows to this backend, with or without a port
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    backend: Option<Endpoint>,
    /// List no more than so many
    #[arg(long, value_name = "COUNT", default_value_t = 1000)]
    limit: usize,
    /// Print JSON, one object a row
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    admin: AdminOption,
}

const HEADINGS: [&str; 9] = [
    "CLIENT", "DIALED", "VIP", "BACKEND", "MODE", "STATE", "IDLE", "PORT", "ANSWERED",
];

pub fn run(options: &Options) -> Result<(), Failure> {
    let admin = options.admin.address()?;
    Ok(block_on(list(options, &admin))?)
}

async fn list(options: &Options, admin: &AdminListen) -> anyhow::Result<()> {
    let mut left = options.limit;
    let mut after = 0;
    let mut untracked: Vec<String>;
    let mut first = true;
    loop {
        let path = format!(
            "/v1/flows?after={after}{}",
            query(options, left.min(10_000))
        );
        let mut answer = client::get_json(admin, &path).await?;
        let mut rows = match answer["rows"].take() {
            Value::Array(rows) => rows,
            _ => Vec::new(),
        };
        rows.truncate(left);
        left -= rows.len();
        untracked = names(&answer["untracked_vips"]);
        if first || !rows.is_empty() {
            print(&page(options.json, &rows))?;
        }
        first = false;
        match answer["next"].as_u64() {
            Some(next) if left > 0 => after = next,
            Some(_) | None => break,
        }
    }
    if !options.json && !untracked.is_empty() {
        print(&footer(&untracked))?;
    }
    Ok(())
}

fn query(options: &Options, limit: usize) -> String {
    let filters = [
        ("vip", options.vip.map(|vip| vip.to_string())),
        ("client", options.client.map(|client| client.to_string())),
        (
            "backend",
            options.backend.map(|backend| backend.to_string()),
        ),
    ];
    let mut query = format!("&limit={}", limit.max(1));
    for (name, value) in filters {
        if let Some(value) = value {
            query.push_str(&format!("&{name}={}", client::escape(&value)));
        }
    }
    query
}

fn page(json: bool, rows: &[Value]) -> String {
    if json {
        return rows.iter().map(|row| format!("{row}\n")).collect();
    }
    let rows: Vec<[String; 9]> = rows
        .iter()
        .map(|row| {
            [
                cell(&row["client"]),
                cell(&row["dialed"]),
                cell(&row["vip"]),
                cell(&row["backend"]),
                cell(&row["mode"]),
                cell(&row["state"]),
                format!("{}s", cell(&row["idle_seconds"])),
                cell(&row["gateway_port"]),
                match &row["answered"] {
                    Value::Bool(true) => "yes".to_owned(),
                    Value::Bool(false) => "no".to_owned(),
                    other => cell(other),
                },
            ]
        })
        .collect();
    table(HEADINGS, &rows)
}

fn footer(untracked: &[String]) -> String {
    format!(
        "The ring alone says where most TCP flows of these VIPs are, so that not all are listed; \
         `track = true` would have them in the table: {}\n",
        untracked.join(", ")
    )
}

fn names(value: &Value) -> Vec<String> {
    let names = value.as_array().map(Vec::as_slice).unwrap_or_default();
    names.iter().map(cell).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_flow_is_a_line_with_what_its_mode_knows() {
        let row = json!({
            "client": "198.51.100.7:40000", "dialed": "192.0.2.10:80", "vip": "tcp/192.0.2.10:80",
            "backend": "10.0.0.11:80", "mode": "nat", "state": "established", "idle_seconds": 3,
            "gateway_port": 2000, "answered": true
        });
        let text = page(false, &[row]);
        let words: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(words[4..], ["nat", "established", "3s", "2000", "yes"]);
        assert_eq!(text.lines().next().unwrap().split_whitespace().count(), 9);
    }

    #[test]
    fn the_footer_names_the_vips_whose_flows_are_not_all_listed() {
        let names = names(&json!(["tcp/192.0.2.10:80", "tcp/[2001:db8::1]:80"]));
        assert!(footer(&names).ends_with("tcp/192.0.2.10:80, tcp/[2001:db8::1]:80\n"));
    }
}
