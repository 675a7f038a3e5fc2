//! `viaduct stats --routes` and `--backends`: what layer 7 counted of each.

use serde_json::Value;

use crate::cli::client;
use crate::cli::table::{cell, table};
use crate::config::AdminListen;

/// The rows of `kind`, `route` or `backend`, as a table or one object a line.
pub(super) async fn text(admin: &AdminListen, kind: &str, json: bool) -> anyhow::Result<String> {
    let mut rows = Vec::new();
    let path = format!("/v1/stats/{kind}s");
    client::pages(admin, &path, |page| {
        rows.extend(page);
        Ok(())
    })
    .await?;
    if json {
        return Ok(rows.iter().map(|row| format!("{row}\n")).collect());
    }
    let headings = [
        &*kind.to_uppercase(),
        "IN FLIGHT",
        "2XX",
        "3XX",
        "4XX",
        "5XX",
        "ABORTED",
        "P50 MS",
        "P99 MS",
    ];
    let cells: Vec<_> = rows.iter().map(|row| cells(row, kind)).collect();
    Ok(table(headings, &cells))
}

fn cells(row: &Value, kind: &str) -> [String; 9] {
    let class = |index: usize| cell(&row["responses"][index]);
    let ms = |quantile: &str| match row["latency"][quantile].as_f64() {
        Some(seconds) => format!("{:.1}", seconds * 1000.0),
        None => "-".to_owned(),
    };
    [
        cell(&row[kind]),
        cell(&row["in_flight"]),
        class(1),
        class(2),
        class(3),
        class(4),
        cell(&row["aborted"]),
        ms("p50"),
        ms("p99"),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_row_has_its_classes_and_latencies() {
        let row = json!({ "route": "a.com", "in_flight": 1, "responses": [9, 2, 3, 4, 5], "aborted": 6,
            "latency": { "p50": 0.00126, "p99": null } });
        let expected = ["a.com", "1", "2", "3", "4", "5", "6", "1.3", "-"];
        assert_eq!(cells(&row, "route"), expected);
    }
}
