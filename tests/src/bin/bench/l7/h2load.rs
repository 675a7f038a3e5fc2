//! h2load of nghttp2: HTTP/2, and HTTP/1.1 over TLS.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use crate::l7::rows::BURST;
use crate::l7::site::HOST;
use crate::report::percentile;

/// A client of one thread that asks for as long as [`BURST`].
pub(crate) struct Client<'a> {
    /// A command whose last argument is h2load.
    pub(crate) command: Command,
    pub(crate) address: SocketAddr,
    pub(crate) tls: bool,
    /// HTTP/1.1 instead of HTTP/2.
    pub(crate) http1: bool,
    /// One request is enough.
    pub(crate) once: bool,
    pub(crate) connections: usize,
    /// At once on each connection.
    pub(crate) streams: usize,
    pub(crate) path: &'a str,
    /// What a call sends; makes it a POST of gRPC.
    pub(crate) message: Option<PathBuf>,
}

/// What h2load measured.
pub(crate) struct Measured {
    pub(crate) requests: f64,
    pub(crate) requests_per_s: f64,
    /// Microseconds, only of a paced client.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

impl Client<'_> {
    /// As often as it is answered.
    pub(crate) fn saturate(self) -> anyhow::Result<Measured> {
        self.run(&[])
    }

    /// Requests per second, of all connections together.
    ///
    /// A request that has to wait for a stream is counted from when it is sent.
    pub(crate) fn paced(self, rate: f64, log: &Path) -> anyhow::Result<Measured> {
        let each = (rate / self.connections as f64).max(1.0);
        // It appends to a file that is there.
        let _ = fs::remove_file(log);
        let options = [
            format!("--rps={each:.0}"),
            format!("--log-file={}", log.display()),
        ];
        let mut measured = self.run(&options)?;
        let text = fs::read_to_string(log).context("read the log of h2load")?;
        let mut latencies: Vec<f64> = text.lines().filter_map(latency).collect();
        ensure!(!latencies.is_empty(), "h2load logged no request");
        measured.p50 = percentile(&mut latencies, 0.50);
        measured.p99 = percentile(&mut latencies, 0.99);
        Ok(measured)
    }

    fn run(self, options: &[String]) -> anyhow::Result<Measured> {
        let Client { address, path, .. } = self;
        let mut h2load = self.command;
        h2load.args(["-t1", &format!("--connect-to={address}")]);
        if self.once {
            h2load.args(["-n1", "-c1", "-m1", "-N5s"]);
        } else {
            h2load.args([
                format!("-D{}", BURST.as_secs()),
                format!("-c{}", self.connections),
                format!("-m{}", self.streams),
            ]);
            h2load.args(options);
        }
        if self.http1 {
            h2load.arg("--h1");
        }
        if let Some(message) = self.message {
            h2load.arg("-d").arg(message);
            h2load.args(["-H", "content-type: application/grpc", "-H", "te: trailers"]);
        }
        let scheme = if self.tls { "https" } else { "http" };
        h2load.arg(format!("{scheme}://{HOST}{path}"));
        let output = h2load.output().context("start h2load")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "h2load: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let (measured, failed) =
            parse(&text).with_context(|| format!("unknown output of h2load:\n{text}"))?;
        ensure!(
            failed == 0.0 && measured.requests > 0.0,
            "requests failed: {}",
            outcome(&text)
        );
        Ok(measured)
    }
}

/// What was measured, and how many requests failed.
fn parse(text: &str) -> Option<(Measured, f64)> {
    let line = |start: &str| text.lines().find_map(|line| line.strip_prefix(start));
    let count = |line: &str, what: &str| -> Option<f64> {
        let part = line.split(',').find(|part| part.trim().ends_with(what))?;
        part.trim().split(' ').next()?.parse().ok()
    };
    let requests = line("requests: ")?;
    let statuses = line("status codes: ")?;
    let failed = ["failed", "errored", "timeout"]
        .into_iter()
        .map(|what| count(requests, what))
        .chain([count(statuses, "4xx"), count(statuses, "5xx")])
        .sum::<Option<f64>>()?;
    let measured = Measured {
        requests: count(requests, "succeeded")?,
        requests_per_s: count(line("finished in ")?, "req/s")?,
        p50: f64::NAN,
        p99: f64::NAN,
    };
    Some((measured, failed))
}

/// How the requests went.
fn outcome(text: &str) -> String {
    let lines = ["requests: ", "status codes: "]
        .map(|start| text.lines().find(|line| line.starts_with(start)));
    lines.map(Option::unwrap_or_default).join(", ")
}

/// Start, status and microseconds, with tabs between.
fn latency(line: &str) -> Option<f64> {
    line.split('\t').nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_of_h2load_is_read() {
        let text = "Application protocol: h2c

finished in 1.00s, 47465.00 req/s, 7.74MB/s
requests: 47465 total, 47565 started, 47465 done, 47464 succeeded, 1 failed, 0 errored, 0 timeout
status codes: 47464 2xx, 0 3xx, 0 4xx, 1 5xx
time for request:      141us     14.08ms      1.99ms      1.19ms    84.79%
";
        let (measured, failed) = parse(text).unwrap();
        assert_eq!(measured.requests, 47464.0);
        assert_eq!(measured.requests_per_s, 47465.0);
        assert_eq!(failed, 2.0);
        assert_eq!(latency("1795370418128154\t200\t20780"), Some(20780.0));
    }
}
