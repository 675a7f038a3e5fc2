//! Proves a site by traffic. Each fact is a line: `ok   tcp reaches every backend: b1=34 b2=33 b3=33`.

use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::thread;

use anyhow::{Context, bail, ensure};
use router_tests::app::Presence;
use router_tests::netns::Netns;
use router_tests::process::wait_for;
use router_tests::site::{self, Exchange, Site, Tally};

/// Exchanges of one kind for one fact. A backend of three is missed by chance once in 10^17.
const EXCHANGES: usize = 100;

type Fact = fn(&mut Site) -> anyhow::Result<String>;

/// Checks every fact, also after one failed; true if all held.
pub(crate) fn all(site: &mut Site, interrupted: &Receiver<()>) -> anyhow::Result<bool> {
    let facts: [(&str, Fact); 8] = [
        ("the program is attached in native mode", native_mode),
        ("tcp reaches every backend", |site| {
            everyone(site, site::echo_tcp)
        }),
        ("udp reaches every backend", |site| {
            everyone(site, site::echo_udp)
        }),
        ("http reaches every backend", |site| {
            everyone(site, site::hello)
        }),
        ("a backend reaches the VIP by its own segment", same_segment),
        ("an unregistered backend gets nothing new", unregistered),
        (
            "a backend that registers again is served again",
            registered_again,
        ),
        ("a killed backend's requests succeed elsewhere", killed),
    ];
    let mut all_held = true;
    for (name, fact) in facts {
        ensure!(interrupted.try_recv().is_err(), "interrupted");
        match fact(site) {
            Ok(evidence) => println!("ok   {name}: {evidence}"),
            Err(error) => {
                println!("FAIL {name}: {error:#}");
                all_held = false;
            }
        }
    }
    if !all_held && let Some(gateway) = &site.gateway {
        eprintln!("--- the gateway printed:\n{}", gateway.log());
    }
    Ok(all_held)
}

fn native_mode(site: &mut Site) -> anyhow::Result<String> {
    // iproute2 shows `xdp` for native mode and `xdpgeneric` for the kernel's fallback.
    let mut ip = site.lab.gateway.command("ip");
    let output = ip.args(["-oneline", "link"]).output().context("start ip")?;
    let links = String::from_utf8_lossy(&output.stdout).into_owned();
    for interface in router_tests::lab::INTERFACES {
        let link = links
            .lines()
            .find(|line| line.contains(&format!(" {interface}@")));
        let link = link.with_context(|| format!("no interface {interface}"))?;
        ensure!(
            link.contains(" xdp "),
            "{interface} has no native XDP program: {link}"
        );
    }
    Ok(router_tests::lab::INTERFACES.join(" "))
}

fn everyone(site: &Site, exchange: Exchange) -> anyhow::Result<String> {
    let tally = site.tally(EXCHANGES, exchange)?;
    all_of(site, &tally)
}

fn all_of(site: &Site, tally: &Tally) -> anyhow::Result<String> {
    let running = site.apps().iter().flatten().count();
    let text = site::display(tally);
    ensure!(
        tally.len() == running,
        "{} of {running} backends answered: {text}",
        tally.len()
    );
    Ok(text)
}

fn same_segment(site: &mut Site) -> anyhow::Result<String> {
    let backend: &Netns = &site.lab.backends[0];
    let tally = backend.run(|| {
        let mut tally = Tally::new();
        for _ in 0..EXCHANGES {
            *tally.entry(site::echo_tcp()?).or_default() += 1;
        }
        anyhow::Ok(tally)
    })?;
    all_of(site, &tally)
}

fn unregistered(site: &mut Site) -> anyhow::Result<String> {
    site.app(1).set_presence(Presence::Unregistered);
    let exchanges: [Exchange; 3] = [site::echo_tcp, site::echo_udp, site::hello];
    for exchange in exchanges {
        site.wait_until_spared("b2", exchange)?;
    }
    let mut evidence = Tally::new();
    for exchange in exchanges {
        for (name, count) in site.tally(EXCHANGES, exchange)? {
            *evidence.entry(name).or_default() += count;
        }
    }
    let text = site::display(&evidence);
    ensure!(!evidence.contains_key("b2"), "b2 was served: {text}");
    Ok(text)
}

fn registered_again(site: &mut Site) -> anyhow::Result<String> {
    site.app(1).set_presence(Presence::Registered);
    site.wait_until_served(3)?;
    everyone(site, site::hello)
}

/// Kills a backend while clients ask. A request it had taken may fail, and each client has one at a
/// time; every other request has to succeed.
fn killed(site: &mut Site) -> anyhow::Result<String> {
    const CLIENTS: usize = 4;
    let requests = || {
        let mut tally = Tally::new();
        for _ in 0..5 * EXCHANGES {
            let outcome = site::hello().unwrap_or_else(|_| "failed".to_owned());
            *tally.entry(outcome).or_default() += 1;
        }
        tally
    };
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| site.lab.client.spawn(&format!("client-{n}"), requests))
        .collect();
    let served = &site.app(2).served.http_requests;
    let before = served.load(Ordering::Relaxed);
    wait_for("b3 to be busy", || {
        (served.load(Ordering::Relaxed) > before + 50).then_some(())
    })?;
    site.kill_app(2);
    let mut total = Tally::new();
    for client in clients.into_iter().map(thread::JoinHandle::join) {
        let Ok(tally) = client else {
            bail!("a client panicked")
        };
        for (name, count) in tally {
            *total.entry(name).or_default() += count;
        }
    }
    let failed = total.get("failed").copied().unwrap_or_default();
    let text = site::display(&total);
    ensure!(failed <= CLIENTS, "more failed than were under way: {text}");

    let after = site.tally(EXCHANGES, site::hello)?;
    ensure!(
        !after.contains_key("b3"),
        "b3 still answers: {}",
        site::display(&after)
    );
    Ok(format!(
        "while it died {text}; then {}",
        site::display(&after)
    ))
}
