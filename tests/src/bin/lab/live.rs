//! The live view: instances come and go, clients never stop, and a table says who gets what.
//!
//! Redraws on a terminal; elsewhere it prints a line a second.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use router_tests::app::{App, HOST, Presence, VIP, VIP_ECHO_PORT, VIP_HTTP_PORT};
use router_tests::lab::FRONT;
use router_tests::process::INTERRUPTED;
use router_tests::site::{self, Exchange, Site};

/// How often the view is drawn.
const REFRESH: Duration = Duration::from_secs(1);

type Step = fn(&mut Site) -> anyhow::Result<()>;

/// What happens to the instances, one step every [`STEP`], over and over.
const STEP: Duration = Duration::from_secs(8);
const SCRIPT: &[(&str, Step)] = &[
    ("all three instances are registered", |_| Ok(())),
    ("b2 unregistered: it gets nothing new", |site| {
        set(site, 1, Presence::Unregistered)
    }),
    ("b2 registered again", |site| {
        set(site, 1, Presence::Registered)
    }),
    (
        "b3 was killed without a word: requests are retried elsewhere",
        |site| {
            site.kill_app(2);
            Ok(())
        },
    ),
    ("b3 was started anew", |site| {
        site.start_app(2)?.set_presence(Presence::Registered);
        Ok(())
    }),
];

/// Pause between two exchanges of the lab's clients. Slow enough to leave the machine alone.
const PAUSE: Duration = Duration::from_millis(20);

/// Ctrl-C and SIGTERM, as a channel. Until it is read, a signal only waits.
pub(crate) fn interrupts() -> anyhow::Result<Receiver<()>> {
    use tokio::signal::unix::{SignalKind, signal};

    let (sender, receiver) = mpsc::channel();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        )
    };
    let wait = move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        INTERRUPTED.store(true, Ordering::Relaxed);
        // Nobody listens any more when the lab ends on its own.
        let _ = sender.send(());
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(wait)
        .context("start a thread")?;
    Ok(receiver)
}

/// Shows the site until interrupted.
pub(crate) fn show(site: &mut Site, interrupted: &Receiver<()>) -> anyhow::Result<()> {
    let clients = Clients::start(site);
    let started = Instant::now();
    let terminal = std::io::stdout().is_terminal();
    if terminal {
        print!("\x1b[2J");
    } else {
        println!("{}", try_by_hand(site));
    }
    let mut before = rows(site);
    let mut step = 0;
    loop {
        match interrupted.recv_timeout(REFRESH) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        let due = (started.elapsed().as_secs() / STEP.as_secs()) as usize % SCRIPT.len();
        if due != step {
            step = due;
            (SCRIPT[step].1)(site)?;
        }
        site.gateway
            .as_mut()
            .context("the gateway runs")?
            .ensure_alive()?;
        let rows = rows(site);
        if terminal {
            let view = table(
                site,
                &rows,
                &before,
                SCRIPT[step].0,
                started,
                &clients.failed,
            );
            // Over the view before: home, each line to its end, then whatever is left below.
            print!("\x1b[H{}\x1b[J", view.replace('\n', "\x1b[K\n"));
            std::io::stdout().flush().context("write to the terminal")?;
        } else {
            println!("{}", line(&rows, &before, SCRIPT[step].0));
        }
        before = rows;
    }
    println!("\nlab: removing namespaces and processes");
    clients.stop();
    Ok(())
}

fn set(site: &mut Site, index: usize, presence: Presence) -> anyhow::Result<()> {
    site.app(index).set_presence(presence);
    Ok(())
}

/// Steady traffic of all three kinds from the client's namespace.
struct Clients {
    stop: Arc<AtomicBool>,
    failed: Arc<AtomicU64>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Clients {
    fn start(site: &Site) -> Clients {
        let stop = Arc::new(AtomicBool::new(false));
        let failed = Arc::new(AtomicU64::new(0));
        let exchanges: [(&str, Exchange); 3] = [
            ("tcp", site::echo_tcp),
            ("udp", site::echo_udp),
            ("http", site::hello),
        ];
        let spawn = |(name, exchange): (&str, Exchange)| {
            let (stop, failed) = (stop.clone(), failed.clone());
            site.lab.client.spawn(name, move || {
                while !stop.load(Ordering::Relaxed) {
                    if exchange().is_err() {
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                    thread::sleep(PAUSE);
                }
            })
        };
        let threads = exchanges.into_iter().map(spawn).collect();
        Clients {
            stop,
            failed,
            threads,
        }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            // A panic of a client has been printed.
            let _ = thread.join();
        }
    }
}

/// What one instance got since it was started.
#[derive(Clone)]
struct Row {
    name: String,
    address: String,
    state: &'static str,
    /// tcp, udp, http
    served: [u64; 3],
}

fn rows(site: &Site) -> Vec<Row> {
    let row = |(index, app): (usize, &Option<App>)| {
        let served = app.as_ref().map_or([0; 3], |app| {
            let served = &app.served;
            [&served.tcp, &served.udp, &served.http_requests].map(|n| n.load(Ordering::Relaxed))
        });
        let state = match app.as_ref().map(App::presence) {
            Some(Presence::Registered) => "registered",
            Some(Presence::Unregistered) => "unregistered",
            Some(Presence::Silent) => "silent",
            None => "killed",
        };
        let address = site.lab.backend_address(index).to_string();
        Row {
            name: format!("b{}", index + 1),
            address,
            state,
            served,
        }
    };
    site.apps().iter().enumerate().map(row).collect()
}

fn table(
    site: &Site,
    rows: &[Row],
    before: &[Row],
    event: &str,
    started: Instant,
    failed: &AtomicU64,
) -> String {
    let mut text = format!(
        "Viaduct lab, up {} s. {event}.\n\n{:<5} {:<11} {:<13} {:>7} {:>7} {:>7} {:>9}\n",
        started.elapsed().as_secs(),
        "",
        "address",
        "state",
        "tcp/s",
        "udp/s",
        "http/s",
        "total",
    );
    for (row, before) in rows.iter().zip(before) {
        let [tcp, udp, http] = rates(row, before);
        let total: u64 = row.served.iter().sum();
        let Row {
            name,
            address,
            state,
            ..
        } = row;
        let _ = writeln!(
            text,
            "{name:<5} {address:<11} {state:<13} {tcp:>7} {udp:>7} {http:>7} {total:>9}"
        );
    }
    let failed = failed.load(Ordering::Relaxed);
    let _ = writeln!(
        text,
        "\nexchanges that failed for a client: {failed}\n\n{}",
        try_by_hand(site)
    );
    text
}

fn line(rows: &[Row], before: &[Row], event: &str) -> String {
    let mut text = format!("{event}:");
    for (row, before) in rows.iter().zip(before) {
        let [tcp, udp, http] = rates(row, before);
        let _ = write!(text, "  {} tcp {tcp}/s udp {udp}/s http {http}/s", row.name);
    }
    text
}

/// An instance that was started anew counts from 0 again.
fn rates(row: &Row, before: &Row) -> [u64; 3] {
    std::array::from_fn(|kind| row.served[kind].saturating_sub(before.served[kind]))
}

fn try_by_hand(site: &Site) -> String {
    let client = format!("nsenter --net=/run/netns/{}", site.lab.client.name());
    let gateway = format!("nsenter --net=/run/netns/{}", site.lab.gateway.name());
    let viaduct = site::agent().map_or("viaduct".to_owned(), |path| path.display().to_string());
    format!(
        "Try, in another terminal as root:\n\
         \x20 {client} curl -s -H 'Host: {HOST}' http://{FRONT}/headers\n\
         \x20 {client} curl -s http://{VIP}:{VIP_HTTP_PORT}/\n\
         \x20 {client} bash -c 'exec 3<>/dev/tcp/{VIP}/{VIP_ECHO_PORT}; head -1 <&3'\n\
         \x20 {client} bash -c 'exec 3<>/dev/udp/{VIP}/{VIP_ECHO_PORT}; echo hi >&3; head -1 <&3'\n\
         \x20 {gateway} {viaduct} routes\n\
         \x20 {gateway} {viaduct} vips\n\
         \x20 {gateway} {viaduct} stats\n\
         Ctrl-C ends the lab and removes everything."
    )
}
