//! `viaduct run`: starts the parts, waits for signals, stops the parts.
//!
//! Threads: `control` (sources and the agent, one current-thread runtime), `admin` (the admin API
//! and health checks), the workers of layer 7, and this one, which waits for signals. A panic on
//! `control` aborts the process: packets go on by the pinned programs, and the service manager starts
//! the agent anew, where a gateway that learns nothing more would go on unseen. SIGHUP reads the
//! configuration again; SIGTERM, SIGINT and SIGUSR1, by which gorouter is drained, drain layer 7 and end; a second one
//! ends at once. One that comes during the start is taken when it is over.

use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, anyhow, bail};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::admin::{self, Admin};
use crate::agent::Agent;
use crate::cli::{ConfigOption, Failure, resolve};
use crate::config::{self, Config, L4Config, LogConfig, LogFormat, NatsConfig};
use crate::event::{Event, INBOX_DEPTH};
use crate::l4::{L4, L4Reader};
use crate::l7::metrics::L7Metrics;
use crate::l7::{self, Proxy};
use crate::metrics::{Metrics, Scrape};
use crate::snapshot::Published;
use crate::{health, source};

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    config: ConfigOption,
}

/// Keys, and tables ending in a dot, that a reload changes; `http` is layer 7's to judge.
const RELOADABLE: [&str; 15] = [
    "nats.prune_interval",
    "nats.stale_threshold",
    "nats.minimum_register_interval",
    "nats.startup_grace",
    "file.",
    "http.",
    "l4.drain",
    "l4.forwarding",
    "l4.reject",
    "l4.scheduler",
    "l4.slow_start",
    "l4.vip",
    "l4.vip_ranges",
    "health.",
    "log.filter",
];

pub fn run(options: &Options) -> Result<(), Failure> {
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("start a runtime")?;
    let signals = Signals::install(&runtime)?;
    let config = resolve::load(&options.config)?;
    let log = start_log(&config.log).map_err(Failure::Usage)?;
    abort_on_control_panic();
    let gateway = Gateway::start(config, log, runtime, signals)?;
    gateway.run(options.config.path().as_deref())?;
    Ok(())
}

type LogFilter = reload::Handle<EnvFilter, Registry>;

/// All that runs.
struct Gateway {
    config: watch::Sender<Arc<Config>>,
    inbox: mpsc::Sender<Event>,
    log: LogFilter,
    proxy: Option<Proxy>,
    draining: watch::Sender<bool>,
    /// Dropped to end the control thread.
    stop: oneshot::Sender<()>,
    control: thread::JoinHandle<()>,
    /// For signals and the drain of layer 7.
    runtime: Runtime,
    signals: Signals,
}

impl Gateway {
    fn start(
        config: Config,
        log: LogFilter,
        runtime: Runtime,
        signals: Signals,
    ) -> anyhow::Result<Gateway> {
        let started = Instant::now();
        let published = Published::default();
        let metrics = Arc::<Metrics>::default();
        let l7_metrics = Arc::<L7Metrics>::default();
        let admin_listener = admin::bind(&config.admin.listen)?;
        let proxy = match config.http.is_on() {
            false => None,
            true => Some(
                l7::start(
                    &config.http,
                    Arc::clone(&published),
                    Arc::clone(&l7_metrics),
                )
                .context("layer 7")?,
            ),
        };
        tracing::info!(
            http = ?proxy.as_ref().map(Proxy::local_addresses).unwrap_or_default(),
            interfaces = ?config.l4.interfaces,
            admin = %config.admin.listen,
            "starting"
        );
        let (draining, drained) = watch::channel(false);
        let (inbox, events) = mpsc::channel(INBOX_DEPTH);
        let (config, configured) = watch::channel(Arc::new(config));
        let (stop, stopped) = oneshot::channel();
        let context = source::Context {
            inbox: inbox.clone(),
            metrics: Arc::clone(&metrics),
            config: configured.clone(),
        };
        let (reports, reported) = mpsc::channel(health::REPORTS_DEPTH);
        let tunnels = health::Tunnels::default();
        let listeners = proxy.as_ref().map(Proxy::listeners).transpose()?;
        let parts = ControlParts {
            context,
            published: Arc::clone(&published),
            listeners: listeners.unwrap_or_default(),
            reports,
            tunnels: Arc::clone(&tunnels),
        };
        let (control, l4) = start_control(parts, events, stopped)?;
        let checks = health::run(
            Arc::clone(&published),
            inbox.clone(),
            Arc::clone(&metrics),
            configured.clone(),
            reported,
            tunnels,
        );
        let scrape = Scrape {
            metrics,
            published,
            l4,
            l7: l7_metrics,
        };
        let admin = Admin {
            scrape,
            config: configured,
            inbox: inbox.clone(),
            draining: drained,
            started,
        };
        start_admin(admin_listener, admin, checks)?;
        Ok(Gateway {
            config,
            inbox,
            log,
            proxy,
            draining,
            stop,
            control,
            runtime,
            signals,
        })
    }

    fn run(mut self, path: Option<&Path>) -> anyhow::Result<()> {
        loop {
            let stop = self.runtime.block_on(async {
                tokio::select! {
                    _ = self.signals.hangup.recv() => false,
                    () = any(&mut self.signals.stop) => true,
                }
            });
            if stop {
                break;
            }
            match self.reload(path) {
                Ok(()) => tracing::info!("configuration reloaded"),
                Err(error) => tracing::error!(
                    error = format!("{error:#}"),
                    "configuration not reloaded: everything stays as it was"
                ),
            }
        }
        tracing::info!("stopping");
        self.draining.send_replace(true);
        if let Some(proxy) = self.proxy.take() {
            let timeout = self.config.borrow().http.timeouts.drain;
            self.runtime.block_on(async {
                tokio::select! {
                    () = proxy.drain(timeout) => {}
                    () = any(&mut self.signals.stop) => {}
                }
            });
        }
        drop(self.stop);
        // The control thread aborts the process where it would panic.
        let _ = self.control.join();
        let config = self.config.borrow().clone();
        if let config::AdminListen::Unix(path) = &config.admin.listen {
            // Left over, the next start removes it.
            let _ = std::fs::remove_file(path);
        }
        Ok(())
    }

    /// Reads the configuration again and applies it whole, or not at all.
    fn reload(&mut self, path: Option<&Path>) -> anyhow::Result<()> {
        let Some(path) = path else {
            bail!("the gateway runs without a configuration file")
        };
        let new = config::load(path)?;
        check_reload(&self.config.borrow(), &new)?;
        if let Some(proxy) = &self.proxy {
            proxy.check_reload(&new.http)?;
        }
        let filter = log_filter(&new.log)?;
        if let Some(proxy) = &self.proxy {
            proxy.reload(&new.http)?;
        }
        self.log.reload(filter).context("log.filter")?;
        // Sources first: what they sent by the old configuration is before the event.
        self.config.send_replace(Arc::new(new.clone()));
        // Waits at most for the agent to take in what is before it.
        let event = Event::Reload(Box::new(new));
        self.runtime
            .block_on(self.inbox.send(event))
            .map_err(|_| anyhow!("the control thread has ended"))?;
        Ok(())
    }
}

/// What the control thread is given.
struct ControlParts {
    context: source::Context,
    published: Published,
    /// Of the proxy, for layer 4 to hand connections to.
    listeners: Vec<TcpListener>,
    reports: mpsc::Sender<health::Unanswered>,
    /// From layer 4 to the checker.
    tunnels: health::Tunnels,
}

/// Starts sources, agent and layer 4 on their thread; returns when they run or cannot.
fn start_control(
    parts: ControlParts,
    events: mpsc::Receiver<Event>,
    stopped: oneshot::Receiver<()>,
) -> anyhow::Result<(thread::JoinHandle<()>, Option<L4Reader>)> {
    let (started, starts) = oneshot::channel();
    let control = async move {
        let ControlParts {
            context,
            published,
            listeners,
            reports,
            tunnels,
        } = parts;
        let config = Arc::clone(&context.config.borrow());
        let start = async {
            let l4 = match config.l4.interfaces.is_empty() {
                true => None,
                false => {
                    let inbox = context.inbox.clone();
                    Some(start_l4(&config.l4, inbox, tunnels, &listeners)?)
                }
            };
            // Held on to, they would outlive the workers' own and leave clients waiting.
            drop(listeners);
            let reader = l4.as_ref().map(L4::reader);
            let metrics = Arc::clone(&context.metrics);
            let agent = Agent::new(&config, published, l4, reports, metrics);
            source::start(&context).await?;
            anyhow::Ok((agent, reader))
        };
        match start.await {
            Ok((agent, reader)) => {
                let _ = started.send(Ok(reader));
                // The agent's work is not torn: it is cancelled only where it waits.
                tokio::select! {
                    () = agent.run(events) => {}
                    _ = stopped => {}
                }
            }
            Err(error) => {
                let _ = started.send(Err(error));
            }
        }
    };
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let thread = thread::Builder::new()
        .name(CONTROL.to_owned())
        .spawn(move || runtime.block_on(control))
        .context("start the control thread")?;
    let reader = starts
        .blocking_recv()
        .context("the control thread ended at its start")??;
    Ok((thread, reader))
}

/// Layer 4 starts without handing connections up where nobody listens or the kernel will not.
fn start_l4(
    config: &L4Config,
    inbox: mpsc::Sender<Event>,
    tunnels: health::Tunnels,
    listeners: &[TcpListener],
) -> anyhow::Result<L4> {
    let mut l4 = L4::start(config, inbox, tunnels).context("layer 4")?;
    if !listeners.is_empty()
        && let Err(error) = l4.hand_up_to(listeners)
    {
        let error = format!("{error:#}");
        tracing::warn!(
            error,
            "connections to VIPs of l7 mode do not reach the proxy"
        );
    }
    Ok(l4)
}

fn start_admin(
    listener: admin::Listener,
    admin: Admin,
    checks: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let serve = async move {
        tokio::spawn(checks);
        if let Err(error) = admin::serve(listener, admin).await {
            tracing::error!(error = format!("{error:#}"), "the admin API ended");
        }
    };
    thread::Builder::new()
        .name("admin".to_owned())
        .spawn(move || runtime.block_on(serve))
        .context("start the admin thread")?;
    Ok(())
}

const CONTROL: &str = "control";

fn abort_on_control_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        if thread::current().name() == Some(CONTROL) {
            std::process::abort();
        }
    }));
}

/// Handlers that stand from the first moment, so that no signal ends a gateway half started.
struct Signals {
    hangup: Signal,
    stop: [Signal; 3],
}

impl Signals {
    fn install(runtime: &Runtime) -> anyhow::Result<Signals> {
        let _inside = runtime.enter();
        let on = |kind: SignalKind| signal(kind).context("listen for signals");
        Ok(Signals {
            hangup: on(SignalKind::hangup())?,
            stop: [
                on(SignalKind::terminate())?,
                on(SignalKind::interrupt())?,
                on(SignalKind::user_defined1())?,
            ],
        })
    }
}

/// The next of some signals.
async fn any(signals: &mut [Signal; 3]) {
    let [one, two, three] = signals;
    tokio::select! {
        _ = one.recv() => {}
        _ = two.recv() => {}
        _ = three.recv() => {}
    }
}

/// Refuses a configuration that differs in what a running gateway cannot change.
fn check_reload(old: &Config, new: &Config) -> anyhow::Result<()> {
    // Secrets are not printed, so they are compared by themselves.
    let secrets = |nats: &NatsConfig| {
        (
            nats.password.clone(),
            nats.token.clone(),
            nats.nkey_seed.clone(),
        )
    };
    let mut changed = Vec::new();
    let (from, to) = (toml::Value::try_from(old)?, toml::Value::try_from(new)?);
    differences("", Some(&from), Some(&to), &mut changed);
    if secrets(&old.nats) != secrets(&new.nats) {
        changed.push("nats.password, nats.token or nats.nkey_seed".to_owned());
    }
    changed.retain(|key| {
        !RELOADABLE.iter().any(|known| match known.ends_with('.') {
            true => key.starts_with(known),
            false => key == known,
        })
    });
    if !changed.is_empty() {
        bail!("{} cannot change without a restart", changed.join(", "));
    }
    Ok(())
}

/// The dotted names of every leaf that differs.
fn differences(
    name: &str,
    old: Option<&toml::Value>,
    new: Option<&toml::Value>,
    changed: &mut Vec<String>,
) {
    let (Some(toml::Value::Table(from)), Some(toml::Value::Table(to))) = (old, new) else {
        if old != new {
            changed.push(name.to_owned());
        }
        return;
    };
    let mut keys: Vec<&String> = from.keys().chain(to.keys()).collect();
    keys.sort();
    keys.dedup();
    for key in keys {
        let name = if name.is_empty() {
            key.clone()
        } else {
            format!("{name}.{key}")
        };
        differences(&name, from.get(key), to.get(key), changed);
    }
}

/// Logs to stderr, in the configured format.
fn start_log(config: &LogConfig) -> anyhow::Result<LogFilter> {
    let (filter, handle) = reload::Layer::new(log_filter(config)?);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match config.format {
        LogFormat::Text => lines
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .context("start the log")?;
    Ok(handle)
}

pub(crate) fn log_filter(config: &LogConfig) -> anyhow::Result<EnvFilter> {
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| config.filter.clone());
    // The client logs each of its events, which the source tells in its own words.
    EnvFilter::try_new(format!("async_nats=warn,{filter}"))
        .with_context(|| format!("log.filter {filter:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reload_names_what_needs_a_restart() {
        let old = config::parse("[nats]\npassword = \"a\"\nuser = \"u\"\n").unwrap();
        let check = |text: &str| {
            check_reload(&old, &config::parse(text).unwrap()).map_err(|error| format!("{error:#}"))
        };
        let same = "[nats]\npassword = \"a\"\nuser = \"u\"\nstale_threshold = \"1s\"\n";
        check(&format!(
            "{same}[l4]\nvip_ranges = [\"192.0.2.0/24\"]\ndrain = \"1s\"\nforwarding = \"ipip\"\n\
             [[l4.vip]]\naddress = \"tcp/192.0.2.10:80\"\nscheduler = \"round-robin\"\n\
             [health]\ncheck = \"tcp\"\n"
        ))
        .unwrap();
        let error = check(&format!(
            "{same}[l4]\ninterfaces = [\"eth0\"]\ngue_port = 6081\n"
        ));
        assert_eq!(
            error.unwrap_err(),
            "l4.gue_port, l4.interfaces cannot change without a restart"
        );
        let error = check("[nats]\npassword = \"b\"\nuser = \"u\"\n").unwrap_err();
        assert!(
            error.contains("nats.password") && !error.contains("\"b\""),
            "{error}"
        );
    }
}
