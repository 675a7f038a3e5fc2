//! One contender in one row: the load, and what it cost.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, ensure};

use crate::l7::client::{self, Target};
use crate::l7::h2load;
use crate::l7::idle;
use crate::l7::peers::Contender;
use crate::l7::rows::{BURST, CONNECTIONS, Front, Load, Request, Row, STREAMS};
use crate::l7::site::{HOST, Role, Site};
use crate::l7::{syscalls, tunnel, usage, wrk};

/// Metrics, whose names end in their units, with a sample each.
pub(crate) type Figures = Vec<(&'static str, f64)>;

/// Requests, or messages of a tunnel.
struct Served {
    count: f64,
    per_s: f64,
    /// Microseconds, median and 99th percentile, where the client measured them as it ought to.
    times: Option<(f64, f64)>,
    errors: f64,
}

pub(crate) fn measure(
    site: &Site,
    row: &Row,
    contender: &Contender,
    syscalls: bool,
) -> anyhow::Result<Figures> {
    if row.load == Load::Idle {
        return measure_idle(site, contender);
    }
    let mut figures = Figures::new();
    let before = contender.id().ok().map(usage::cpu).transpose()?;
    let full = saturate(site, row, contender.address)?;
    if let Some(before) = before {
        let used = usage::cpu(contender.id()?)?.since(before);
        let per_request = |time: std::time::Duration| time.as_secs_f64() * 1e6 / full.count;
        figures.push(("cpu_us_per_request", per_request(used.total())));
        figures.push(("user_us_per_request", per_request(used.user)));
        figures.push(("system_us_per_request", per_request(used.system)));
        let cores = used.total().as_secs_f64() / BURST.as_secs_f64();
        figures.push(("cores_used", cores));
    }
    figures.push(("requests_per_s", full.per_s));
    let half = match full.times {
        Some(_) => full,
        None => paced(site, row, contender.address, full.per_s / 2.0)?,
    };
    let (p50, p99) = half.times.context("a paced client measures times")?;
    figures.extend([("p50_us", p50), ("p99_us", p99), ("errors", half.errors)]);
    if syscalls && contender.process.is_some() {
        let (calls, served) = syscalls::count(site, contender.id()?, || {
            saturate(site, row, contender.address)
        })?;
        figures.push(("syscalls_per_request", calls / served.count));
    }
    Ok(figures)
}

/// One request of the row's kind is answered as it ought to be.
pub(crate) fn try_once(site: &Site, row: &Row, address: SocketAddr) -> anyhow::Result<()> {
    match row.load {
        Load::Streams | Load::Calls => {
            let mut client = h2(site, row, address)?;
            client.once = true;
            client.saturate().map(drop)
        }
        Load::Messages => site.run(Role::Client, || tunnel::try_once(address)),
        Load::KeepAlive(_) | Load::NewConnection | Load::Idle | Load::Routes => {
            let target = target(site, row, address)?;
            site.run(Role::Client, || client::once(&target))
        }
    }
}

/// So many requests a second, or as many messages as come back through a tunnel: how many, and how many
/// requests failed.
pub(crate) fn mixed(
    site: &Site,
    row: &Row,
    address: SocketAddr,
    rate: f64,
) -> anyhow::Result<(f64, f64)> {
    let served = match row.load {
        Load::Messages => saturate(site, row, address)?,
        _ => paced(site, row, address, rate)?,
    };
    Ok((served.count, served.errors))
}

/// As often as there is an answer.
fn saturate(site: &Site, row: &Row, address: SocketAddr) -> anyhow::Result<Served> {
    let tls = row.front == Front::Tls;
    match row.load {
        Load::NewConnection if tls => {
            let target = target(site, row, address)?;
            let measured = site.run(Role::Client, || client::run(&target, None))?;
            ensure!(
                measured.errors == 0.0,
                "{} handshakes failed",
                measured.errors
            );
            Ok(Served {
                count: measured.requests,
                per_s: measured.requests_per_s,
                times: None,
                errors: 0.0,
            })
        }
        Load::KeepAlive(_) if tls => {
            let client = h2load::Client {
                http1: true,
                connections: CONNECTIONS,
                streams: 1,
                ..h2(site, row, address)?
            };
            client.saturate().map(Served::from)
        }
        Load::Streams | Load::Calls => h2(site, row, address)?.saturate().map(Served::from),
        Load::Messages => {
            let measured = site.run(Role::Client, || tunnel::measure(address))?;
            Ok(Served {
                count: measured.messages,
                per_s: measured.messages_per_s,
                times: Some((measured.p50_us, measured.p99_us)),
                errors: 0.0,
            })
        }
        Load::KeepAlive(_) | Load::NewConnection | Load::Routes | Load::Idle => {
            saturate_by_wrk(site, row, address)
        }
    }
}

fn saturate_by_wrk(site: &Site, row: &Row, address: SocketAddr) -> anyhow::Result<Served> {
    let host = format!("Host: {HOST}");
    let mut headers = vec![host.as_str()];
    if row.load == Load::NewConnection {
        headers.push("Connection: close");
    }
    let request = request(row);
    let script = match request {
        Request::Post64k => Some(write_script(site)?),
        Request::Small | Request::Get16k | Request::Get1m => None,
    };
    let command = site.command(Role::Client, "wrk");
    let measured = wrk::run(
        command,
        address,
        request.path(),
        &headers,
        script.as_deref(),
    )?;
    Ok(Served {
        count: measured.requests,
        per_s: measured.requests_per_s,
        times: None,
        errors: 0.0,
    })
}

/// So many requests a second.
fn paced(site: &Site, row: &Row, address: SocketAddr, rate: f64) -> anyhow::Result<Served> {
    if matches!(row.load, Load::Streams | Load::Calls) {
        let log = site.path("h2load.log");
        let measured = h2(site, row, address)?.paced(rate, &log)?;
        return Ok(Served {
            times: Some((measured.p50, measured.p99)),
            ..Served::from(measured)
        });
    }
    let target = target(site, row, address)?;
    let measured = site.run(Role::Client, || client::run(&target, Some(rate)))?;
    Ok(Served {
        count: measured.requests,
        per_s: measured.requests_per_s,
        times: Some((measured.p50_us, measured.p99_us)),
        errors: measured.errors,
    })
}

fn measure_idle(site: &Site, contender: &Contender) -> anyhow::Result<Figures> {
    let (address, id) = (contender.address, contender.id()?);
    let (each, before) = site.run(Role::Client, || idle::measure(address, id))?;
    Ok(vec![
        ("rss_kib_per_connection", each),
        ("rss_mib_without", before / 1024.0),
    ])
}

/// The client of HTTP/2.
fn h2<'a>(site: &Site, row: &Row, address: SocketAddr) -> anyhow::Result<h2load::Client<'a>> {
    let message = match row.load {
        Load::Calls => Some(write(site, "message", b"\0\0\0\0\x05hello")?),
        _ => None,
    };
    Ok(h2load::Client {
        command: site.command(Role::Client, "h2load"),
        address,
        tls: row.front == Front::Tls,
        http1: false,
        once: false,
        connections: 1,
        streams: STREAMS,
        path: match row.load {
            Load::Calls => "/bench.Echo/Unary",
            _ => request(row).path(),
        },
        message,
    })
}

/// For the client of HTTP/1.1.
fn target(site: &Site, row: &Row, address: SocketAddr) -> anyhow::Result<Target> {
    let fresh = row.load == Load::NewConnection;
    let request = request(row);
    let path = request.path();
    let connection = if fresh { "Connection: close\r\n" } else { "" };
    let mut octets = match request {
        Request::Post64k => format!("POST {path} HTTP/1.1\r\nContent-Length: {}\r\n", BODY.len()),
        Request::Small | Request::Get16k | Request::Get1m => format!("GET {path} HTTP/1.1\r\n"),
    };
    octets += &format!("Host: {HOST}\r\n{connection}\r\n");
    let mut octets = octets.into_bytes();
    if request == Request::Post64k {
        octets.extend_from_slice(BODY);
    }
    Ok(Target {
        address,
        tls: match row.front {
            Front::Tls => Some(site.tls()?),
            Front::Http | Front::H2c => None,
        },
        request: octets,
        fresh,
    })
}

/// Of a POST.
const BODY: &[u8] = &[b'x'; 64 * 1024];

fn request(row: &Row) -> Request {
    match row.load {
        Load::KeepAlive(request) => request,
        _ => Request::Small,
    }
}

fn write_script(site: &Site) -> anyhow::Result<PathBuf> {
    let length = BODY.len();
    let script = format!("wrk.method = \"POST\"\nwrk.body = string.rep(\"x\", {length})\n");
    write(site, "post.lua", script.as_bytes())
}

fn write(site: &Site, name: &str, octets: &[u8]) -> anyhow::Result<PathBuf> {
    let path = site.path(name);
    fs::write(&path, octets).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

impl From<h2load::Measured> for Served {
    fn from(measured: h2load::Measured) -> Served {
        Served {
            count: measured.requests,
            per_s: measured.requests_per_s,
            times: None,
            errors: 0.0,
        }
    }
}
