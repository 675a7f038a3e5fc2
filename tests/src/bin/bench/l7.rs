//! The proxy beside nginx and HAProxy: same client, same one backend, one worker each, connections
//! kept alive on both sides.
//!
//! CPU time per request is the figure to compare: client, proxy and backend share the machine's
//! cores, so requests per second say as much of the others as of the proxy. `direct` is the client
//! at the backend without a proxy, the floor of the latencies. All of them share one namespace and
//! talk by its loopback, so that the cost of a network is not measured.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use router_tests::client;
use router_tests::lab::Lab;
use router_tests::nats::Publisher;
use router_tests::netns::Netns;
use router_tests::process::{Process, wait_for};
use router_tests::site::Site;
use serde_json::json;

use crate::report::Report;

const ROUNDS: usize = 5;
/// Of one measurement. CPU time is counted in ticks of 10 ms, which is 0.5 % of it.
const SECONDS: u64 = 2;
const CONNECTIONS: usize = 32;

const HOST: &str = "bench.example.com";
const BACKEND_PORT: u16 = 8080;
const VIADUCT_PORT: u16 = 80;
const NGINX_PORT: u16 = 8081;
const HAPROXY_PORT: u16 = 8082;

/// Name of the row, and the path to ask for.
const ROWS: [(&str, &str); 2] = [("get-keepalive", "/small"), ("get-64k", "/large")];

pub(crate) fn measure() -> anyhow::Result<Report> {
    let mut site = Site::new(1)?;
    let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let backend = local(BACKEND_PORT);
    let _backend = start_backend(&site.lab)?;
    let nginx = start_nginx(&site.lab, backend)?;
    let haproxy = start_haproxy(&site.lab, backend)?;
    site.start_nats()?;
    site.start_gateway(|config| {
        config.l4.interfaces = Vec::new();
        config.http.workers = 1;
    })?;
    let viaduct = site.gateway.as_ref().context("the gateway was started")?;
    let mut publisher = Publisher::connect(&site.lab)?;

    let contenders = [
        ("viaduct", local(VIADUCT_PORT), Some(viaduct)),
        ("nginx", local(NGINX_PORT), Some(&nginx)),
        ("haproxy", local(HAPROXY_PORT), Some(&haproxy)),
        ("direct", backend, None),
    ];
    let mut report = Report::new("l7");
    for round in 0..ROUNDS {
        for (row, path) in ROWS {
            register(&mut publisher, backend)?;
            for (who, address, process) in contenders {
                eprintln!("l7: round {} of {ROUNDS}, {row}, {who}", round + 1);
                wait_until_served(&site.lab, address, path)?;
                let before = process.map(Process::cpu_time).transpose()?;
                let header = format!("Host: {HOST}");
                let load = wrk(&site.lab.gateway, address, path, &header)?;
                let after = process.map(Process::cpu_time).transpose()?;
                if let (Some(before), Some(after)) = (before, after) {
                    let cpu_us = (after - before).as_secs_f64() * 1e6;
                    report.add(row, who, "cpu_us_per_request", cpu_us / load.requests);
                }
                report.add(row, who, "requests_per_s", load.requests_per_s);
                report.add(row, who, "p50_us", load.p50.as_secs_f64() * 1e6);
                report.add(row, who, "p99_us", load.p99.as_secs_f64() * 1e6);
            }
        }
    }
    Ok(report)
}

fn register(publisher: &mut Publisher, backend: SocketAddr) -> anyhow::Result<()> {
    let message = json!({"host": backend.ip(), "port": backend.port(), "uris": [HOST]});
    publisher.publish("router.register", message.to_string())
}

fn wait_until_served(lab: &Lab, address: SocketAddr, path: &str) -> anyhow::Result<()> {
    wait_for(&format!("http://{address}{path}"), || {
        let response = lab.gateway.run(|| client::get(address, HOST, path)).ok()?;
        (response.status == 200).then_some(())
    })
}

fn start_backend(lab: &Lab) -> anyhow::Result<Process> {
    let root = lab.folder().join("www");
    fs::create_dir_all(&root)?;
    fs::write(root.join("small"), "hello from the backend\n".repeat(4))?;
    fs::write(root.join("large"), "x".repeat(64 * 1024))?;
    let server = format!("listen {BACKEND_PORT}; root {};", root.display());
    let config = nginx_config(lab.folder(), "backend", "", &server);
    start(
        lab.gateway.command("nginx"),
        lab,
        "nginx-backend",
        &config,
        &["-c"],
    )
}

fn start_nginx(lab: &Lab, backend: SocketAddr) -> anyhow::Result<Process> {
    let upstream = format!("upstream backend {{ server {backend}; keepalive {CONNECTIONS}; }}");
    let server = format!(
        "listen {NGINX_PORT};
         location / {{
             proxy_pass http://backend;
             proxy_http_version 1.1;
             proxy_buffers 16 16k;
             proxy_set_header Connection '';
             proxy_set_header Host $host;
             proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
             proxy_set_header X-Forwarded-Proto $scheme;
             proxy_set_header X-Forwarded-Host $host;
             proxy_set_header X-Request-Id $request_id;
         }}"
    );
    let config = nginx_config(lab.folder(), "proxy", &upstream, &server);
    start(
        lab.gateway.command("nginx"),
        lab,
        "nginx-proxy",
        &config,
        &["-c"],
    )
}

/// One process, no access log, keep-alive without an end, and every path inside the lab.
pub(crate) fn nginx_config(folder: &Path, name: &str, upstream: &str, server: &str) -> String {
    let folder = folder.display();
    format!(
        "daemon off; master_process off; error_log stderr; pid {folder}/{name}.pid;
         events {{ worker_connections 1024; }}
         http {{
             access_log off; sendfile on; tcp_nopush on;
             keepalive_requests 1000000000; keepalive_timeout 600s;
             client_body_temp_path {folder}/{name}-body; proxy_temp_path {folder}/{name}-proxy;
             fastcgi_temp_path {folder}/{name}-fastcgi; uwsgi_temp_path {folder}/{name}-uwsgi;
             scgi_temp_path {folder}/{name}-scgi;
             {upstream}
             server {{ {server} }}
         }}\n"
    )
}

fn start_haproxy(lab: &Lab, backend: SocketAddr) -> anyhow::Result<Process> {
    let config = format!(
        "global
             nbthread 1
             maxconn 4096
         defaults
             mode http
             timeout connect 5s
             timeout client 600s
             timeout server 600s
             option http-keep-alive
             http-reuse always
         frontend front
             bind :{HAPROXY_PORT}
             option forwardfor
             http-request set-header X-Forwarded-Proto http
             http-request set-header X-Forwarded-Host %[req.hdr(host)]
             http-request set-header X-Request-Id %[uuid()]
             default_backend backends
         backend backends
             server b1 {backend}\n"
    );
    start(
        lab.gateway.command("haproxy"),
        lab,
        "haproxy",
        &config,
        &["-db", "-f"],
    )
}

/// Starts a server in the foreground with its configuration in a file named last.
fn start(
    mut command: Command,
    lab: &Lab,
    name: &str,
    config: &str,
    options: &[&str],
) -> anyhow::Result<Process> {
    let path = lab.folder().join(format!("{name}.conf"));
    fs::write(&path, config).with_context(|| format!("write {}", path.display()))?;
    command.args(options).arg(path);
    Process::start(name, command, lab.folder())
}

/// What wrk measured.
pub(crate) struct Load {
    requests: f64,
    pub(crate) requests_per_s: f64,
    p50: Duration,
    pub(crate) p99: Duration,
}

/// Asks for a path with one more header, by one thread and [`CONNECTIONS`] connections.
pub(crate) fn wrk(
    netns: &Netns,
    address: SocketAddr,
    path: &str,
    header: &str,
) -> anyhow::Result<Load> {
    let mut wrk = netns.command("wrk");
    wrk.args(["--latency", "-t1"])
        .arg(format!("-c{CONNECTIONS}"))
        .arg(format!("-d{SECONDS}s"));
    wrk.args(["-H", header])
        .arg(format!("http://{address}{path}"));
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
    parse_wrk(&text).with_context(|| format!("unknown output of wrk:\n{text}"))
}

fn parse_wrk(text: &str) -> Option<Load> {
    let after = |label: &str| {
        text.lines()
            .find_map(|line| line.trim().strip_prefix(label))
            .map(str::trim)
    };
    let total = text.lines().find(|line| line.contains(" requests in "))?;
    Some(Load {
        requests: total.split_whitespace().next()?.parse().ok()?,
        requests_per_s: after("Requests/sec:")?.parse().ok()?,
        p50: parse_duration(after("50%")?)?,
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
        let load = parse_wrk(text).unwrap();
        assert_eq!(load.requests, 88424.0);
        assert_eq!(load.requests_per_s, 44210.55);
        assert_eq!(load.p50, Duration::from_micros(713));
        assert_eq!(load.p99, Duration::from_micros(2500));
    }
}
