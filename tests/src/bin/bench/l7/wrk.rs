//! wrk, which asks for a path as often as it is answered (HTTP/1.1 without TLS).

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use router_tests::netns::Netns;

use crate::l7::rows::{BURST, CONNECTIONS};

/// What a client measured.
pub(crate) struct Measured {
    pub(crate) requests: f64,
    pub(crate) requests_per_s: f64,
    pub(crate) p99: Duration,
}

/// Asks for a path with one more header.
pub(crate) fn wrk(
    netns: &Netns,
    address: SocketAddr,
    path: &str,
    header: &str,
) -> anyhow::Result<Measured> {
    run(netns.command("wrk"), address, path, &[header], None)
}

/// The same by a command whose last argument is wrk, by a script if there is one: one thread and
/// [`CONNECTIONS`] connections for as long as [`BURST`].
pub(crate) fn run(
    mut wrk: Command,
    address: SocketAddr,
    path: &str,
    headers: &[&str],
    script: Option<&Path>,
) -> anyhow::Result<Measured> {
    wrk.args(["--latency", "-t1"])
        .arg(format!("-c{CONNECTIONS}"))
        .arg(format!("-d{}s", BURST.as_secs()));
    for header in headers {
        wrk.args(["-H", header]);
    }
    if let Some(script) = script {
        wrk.arg("-s").arg(script);
    }
    wrk.arg(format!("http://{address}{path}"));
    let output = wrk.output().context("start wrk")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "wrk: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(
        !text.contains("Non-2xx") && !text.contains("Socket errors"),
        "requests to {address} failed:\n{text}"
    );
    parse(&text).with_context(|| format!("unknown output of wrk:\n{text}"))
}

fn parse(text: &str) -> Option<Measured> {
    let after = |label: &str| {
        text.lines()
            .find_map(|line| line.trim().strip_prefix(label))
            .map(str::trim)
    };
    let total = text.lines().find(|line| line.contains(" requests in "))?;
    Some(Measured {
        requests: total.split_whitespace().next()?.parse().ok()?,
        requests_per_s: after("Requests/sec:")?.parse().ok()?,
        p99: parse_duration(after("99%")?)?,
    })
}

/// `713.00us`, `1.13ms` or `1.02s`.
fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (value, unit) = text.split_at(digits);
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        _ => return None,
    };
    Some(Duration::from_secs_f64(
        value.parse::<f64>().ok()? * seconds,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_of_wrk_is_read() {
        let text = "Running 2s test @ http://127.0.0.1/small
  1 threads and 32 connections
  Latency Distribution
     50%  713.00us
     75%    0.91ms
     90%    1.13ms
     99%    2.50ms
  88424 requests in 2.00s, 21.50MB read
Requests/sec:  44210.55
Transfer/sec:     10.75MB
";
        let measured = parse(text).unwrap();
        assert_eq!(measured.requests, 88424.0);
        assert_eq!(measured.requests_per_s, 44210.55);
        assert_eq!(measured.p99, Duration::from_micros(2500));
    }
}
