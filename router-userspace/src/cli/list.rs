//! `viaduct routes | vips | backends`: what the running gateway has.

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

pub fn routes(options: &Options) -> Result<(), Failure> {
    let headings = [
        "ROUTE", "BACKEND", "WEIGHT", "HEALTH", "ORIGIN", "APP", "DECLARED", "POLICY",
    ];
    list(options, "/v1/routes", headings, route_members)
}

pub fn vips(options: &Options) -> Result<(), Failure> {
    let headings = [
        "VIP",
        "FORWARDING",
        "BACKEND",
        "STATE",
        "WEIGHT",
        "HEALTH",
        "ORIGIN",
        "APP",
        "DECLARED",
    ];
    list(options, "/v1/vips", headings, vip_members)
}

pub fn backends(options: &Options) -> Result<(), Failure> {
    let headings = ["BACKEND", "HEALTH", "ORIGIN", "ROUTES", "VIPS", "APP"];
    list(options, "/v1/backends", headings, |row| {
        vec![[
            cell(&row["address"]),
            health(row).to_owned(),
            cell(&row["origin"]),
            cell(&row["http_routes"]),
            cell(&row["vips"]),
            cell(&row["app"]),
        ]]
    })
}

/// Prints a listing page by page, a table with headings for each.
fn list<const N: usize>(
    options: &Options,
    path: &str,
    headings: [&str; N],
    cells: impl Fn(&Value) -> Vec<[String; N]>,
) -> Result<(), Failure> {
    let print_page = |rows: Vec<Value>| match options.json {
        true => print(
            &rows
                .iter()
                .map(|row| format!("{row}\n"))
                .collect::<String>(),
        ),
        false => print(&table(
            headings,
            &rows.iter().flat_map(&cells).collect::<Vec<_>>(),
        )),
    };
    let admin = options.admin.address()?;
    Ok(block_on(client::pages(&admin, path, print_page))?)
}

/// As [`members`], with conditions behind the name and, on the first, where in the bucket and what is
/// declared of the route.
fn route_members(route: &Value) -> Vec<[String; 8]> {
    let asks = route["policy"]["asks"].as_array().into_iter().flatten();
    let asks: Vec<String> = asks.map(cell).collect();
    let mut policy = match route["policy"].is_null() {
        true => "-".to_owned(),
        false => asks.join("; "),
    };
    let mut keys = declarers(route);
    let mut backends = members(route, "route");
    if backends.is_empty() {
        // The gateway answers itself.
        let mut alone = [(); 6].map(|()| "-".to_owned());
        alone[0] = cell(&route["route"]);
        alone[4] = cell(&route["policy"]["origin"]);
        backends.push(alone);
    }
    if let Some(conditions) = route["conditions"].as_str() {
        backends[0][0].push_str(&format!(" [{conditions}]"));
    }
    let row = |[route, backend, weight, health, origin, app]: [String; 6]| {
        let (keys, policy) = (std::mem::take(&mut keys), std::mem::take(&mut policy));
        [route, backend, weight, health, origin, app, keys, policy]
    };
    backends.into_iter().map(row).collect()
}

/// The keys of the bucket that declare something of a row: `route.shop@12`.
fn declarers(row: &Value) -> String {
    let keys = row["declared_by"].as_array().into_iter().flatten();
    let key = |key: &Value| format!("{}@{}", cell(&key["key"]), key["revision"]);
    match keys.map(key).collect::<Vec<_>>().join(" ") {
        none if none.is_empty() => "-".to_owned(),
        keys => keys,
    }
}

/// A row for each backend of a pool; the name stands on the first.
fn members(row: &Value, name: &str) -> Vec<[String; 6]> {
    let mut name = cell(&row[name]);
    let backends = row["backends"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let panic = row["panic"] == Value::Bool(true);
    let row = |backend: &Value| {
        [
            std::mem::take(&mut name),
            cell(&backend["address"]),
            cell(&backend["weight"]),
            match (health(backend), panic) {
                ("down", true) => "down, used",
                (health, _) => health,
            }
            .to_owned(),
            cell(&backend["origin"]),
            cell(&backend["app"]),
        ]
    };
    backends.iter().map(row).collect()
}

/// As [`members`], with what layer 4 makes of each.
fn vip_members(row: &Value) -> Vec<[String; 9]> {
    let mut forwarding = cell(&row["forwarding"]);
    let mut keys = declarers(row);
    let states = row["backends"].as_array().into_iter().flatten();
    let states = states.map(|backend| cell(&backend["state"]));
    let mut rows: Vec<[String; 9]> = members(row, "vip")
        .into_iter()
        .zip(states)
        .map(|([vip, backend, weight, health, origin, app], state)| {
            let (forwarding, keys) = (std::mem::take(&mut forwarding), std::mem::take(&mut keys));
            [
                vip, forwarding, backend, state, weight, health, origin, app, keys,
            ]
        })
        .collect();
    if rows.is_empty() {
        // Served by the proxy on the gateway, which needs no backend here.
        let mut row_without = [(); 9].map(|()| "-".to_owned());
        row_without[0] = cell(&row["vip"]);
        row_without[1] = forwarding;
        row_without[8] = keys;
        rows.push(row_without);
    }
    rows
}

fn health(row: &Value) -> &'static str {
    if row["draining"] == Value::Bool(true) {
        return "drained";
    }
    if row["healthy"] == Value::Bool(false) {
        "down"
    } else {
        "up"
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_vip_is_listed_with_what_layer_4_makes_of_it() {
        let row = json!({
            "vip": "tcp/192.0.2.1:80", "forwarding": "ipip",
            "backends": [{ "address": "1", "state": "active" }, { "address": "2", "state": "refused" }],
        });
        let rows = vip_members(&row);
        assert_eq!(rows[0][..4], ["tcp/192.0.2.1:80", "ipip", "1", "active"]);
        assert_eq!(rows[1][..4], ["", "", "2", "refused"]);
        let row = json!({ "vip": "tcp/192.0.2.1:80", "forwarding": "l7", "backends": [] });
        let rows = vip_members(&row);
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0][..3], ["tcp/192.0.2.1:80", "l7", "-"]);
    }

    #[test]
    fn a_declared_route_is_listed_with_its_conditions_and_what_it_asks_for() {
        let row = json!({
            "route": "a.x/p", "conditions": "GET x-a=1",
            "policy": { "origin": "file", "asks": ["compression", "timeouts total 5s"] },
            "declared_by": [{ "key": "route.a", "revision": 12 }],
            "backends": [{ "address": "1", "origin": "nats" }, { "address": "2" }],
        });
        let rows = route_members(&row);
        assert_eq!(rows[0][..2], ["a.x/p [GET x-a=1]", "1"]);
        assert_eq!(
            rows[0][4..],
            ["nats", "-", "route.a@12", "compression; timeouts total 5s"]
        );
        assert_eq!((&*rows[1][0], &*rows[1][6], &*rows[1][7]), ("", "", ""));
        let row = json!({
            "route": "a.x", "conditions": null, "backends": [],
            "policy": { "origin": "file", "asks": ["redirect 308: scheme https"] },
        });
        let rows = route_members(&row);
        assert_eq!(rows.len(), 1);
        assert_eq!(
            rows[0],
            [
                "a.x",
                "-",
                "-",
                "-",
                "file",
                "-",
                "-",
                "redirect 308: scheme https"
            ]
        );
    }

    #[test]
    fn a_pool_is_listed_under_one_name() {
        let row = json!({ "route": "a.x", "backends": [{ "address": "1", "healthy": false }, {}] });
        let rows = members(&row, "route");
        assert_eq!(
            (
                rows[0][0].as_str(),
                rows[0][3].as_str(),
                rows[1][0].as_str()
            ),
            ("a.x", "down", "")
        );
    }

    #[test]
    fn what_is_down_in_a_pool_in_panic_is_listed_as_used() {
        let row = json!({ "vip": "v", "panic": true, "backends": [{ "healthy": false }, {}] });
        let health: Vec<String> = members(&row, "vip")
            .into_iter()
            .map(|r| r[3].clone())
            .collect();
        assert_eq!(health, ["down, used", "up"]);
    }
}
