//! `viaduct run`: starts the parts, waits for signals, stops the parts.
//!
//! Threads: `control` (sources and the agent, one current-thread runtime), `health` (active checks),
//! `admin` (the admin API), the workers of layer 7, and this one, which waits for signals and for a process
//! that takes over. A panic on `control` aborts the process: packets go on by the pinned programs, and
//! the service manager starts the agent anew, where a gateway that learns nothing more would go on
//! unseen. SIGHUP reads the configuration again; SIGUSR2 starts the binary anew, to take over; SIGTERM
//! and SIGINT drain layer 7 and end, SIGUSR1 does so after a wait; a second one ends at once. One that
//! comes during the start is taken when it is over. docs/life.md tells all of this to operators.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use sd_notify::NotifyState;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, oneshot, watch};

use crate::admin::listing::backends::SharedIndex;
use crate::admin::{self, Admin};
use crate::cli::run::handover::Predecessor;
use crate::cli::run::inherited::Inherited;
use crate::cli::run::log::LogFilter;
use crate::cli::run::signals::{End, Order, Signals};
use crate::cli::{ConfigOption, Failure, resolve};
use crate::config::{self, AdminListen, Config};
use crate::event::{Event, INBOX_DEPTH};
use crate::l4::datapath::Sockmap;
use crate::l7::metrics::L7Metrics;
use crate::l7::{self, Proxy};
use crate::metrics::{Metrics, Scrape};
use crate::snapshot::Published;
use crate::{health, last_known_good, source};

mod control;
mod handover;
mod inherited;
mod log;
mod reload;
mod signals;

pub(crate) use log::filter as log_filter;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    config: ConfigOption,
}

/// How often a process that takes over looks whether it is ready.
const READY_POLL: Duration = Duration::from_millis(20);

pub fn run(options: &Options) -> Result<(), Failure> {
    // While there is one thread.
    let activated = Inherited::from_service_manager()?;
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("start a runtime")?;
    let signals = Signals::install(&runtime)?;
    let config = resolve::load(&options.config)?;
    let log = log::start(&config.log).map_err(Failure::Usage)?;
    control::abort_on_panic();
    let Some(gateway) = Gateway::start(config, log, runtime, signals, activated)? else {
        return Ok(());
    };
    gateway.run(options.config.path().as_deref())?;
    Ok(())
}

/// All that runs.
struct Gateway {
    config: watch::Sender<Arc<Config>>,
    inbox: mpsc::Sender<Event>,
    log: LogFilter,
    proxy: Option<Proxy>,
    admin: AdminPart,
    handover: Option<UnixListener>,
    draining: watch::Sender<bool>,
    /// Dropped to end the control thread.
    stop: oneshot::Sender<()>,
    control: thread::JoinHandle<()>,
    /// Keeps the routes on disk.
    state: Option<last_known_good::Writer>,
    /// Held to the end: dropping it takes what is on its way between sockets with it.
    _sockmap: Option<Arc<Sockmap>>,
    /// For signals and the drain of layer 7.
    runtime: Runtime,
    signals: Signals,
}

/// What this thread has of the admin API.
struct AdminPart {
    /// Of its listener, to hand over.
    socket: OwnedFd,
    /// Dropped to answer nothing new.
    open: oneshot::Sender<()>,
}

impl Gateway {
    /// Returns once everything serves; `None`: it was told to end before.
    fn start(
        config: Config,
        log: LogFilter,
        runtime: Runtime,
        mut signals: Signals,
        activated: Inherited,
    ) -> anyhow::Result<Option<Gateway>> {
        let started = Instant::now();
        let published = Published::default();
        let metrics = Arc::<Metrics>::default();
        let l7_metrics = Arc::<L7Metrics>::default();
        let sockmap = match config.http.sockmap {
            true => Some(Arc::new(
                Sockmap::attach_to_host(l7::sockmap::mark()).context("http.sockmap")?,
            )),
            false => None,
        };
        let (mut predecessor, sockets) = Sockets::take(&config, activated)?;
        let proxy = match config.http.is_on() {
            false => None,
            true => Some(
                l7::stand_by(
                    &config.http,
                    Arc::clone(&published),
                    Arc::clone(&l7_metrics),
                    sockets.http,
                )
                .context("layer 7")?,
            ),
        };
        tracing::info!(
            http = ?proxy.as_ref().map(Proxy::local_addresses).unwrap_or_default(),
            interfaces = ?config.l4.interfaces,
            admin = %config.admin.listen,
            takes_over = predecessor.is_some(),
            "starting"
        );
        if let Some(predecessor) = &mut predecessor
            && !config.l4.interfaces.is_empty()
        {
            predecessor.release_layer_4()?;
        }
        let (draining, drained) = watch::channel(false);
        let (inbox, events) = mpsc::channel(INBOX_DEPTH);
        let (config, configured) = watch::channel(Arc::new(config));
        let (stop, stopped) = oneshot::channel();
        let rejects = Arc::default();
        let context = source::Context {
            inbox: inbox.clone(),
            metrics: Arc::clone(&metrics),
            rejects: Arc::clone(&rejects),
            config: configured.clone(),
        };
        let (reports, reported) = mpsc::channel(health::REPORTS_DEPTH);
        let tunnels = health::Tunnels::default();
        let listeners = proxy.as_ref().map(Proxy::listeners).transpose()?;
        let parts = control::Parts {
            context,
            published: Arc::clone(&published),
            listeners: listeners.unwrap_or_default(),
            reports,
            tunnels: Arc::clone(&tunnels),
        };
        let (control, l4) = control::start(parts, events, stopped)?;
        // What was on disk is read.
        let state = last_known_good::start(
            &configured.borrow().state,
            Arc::clone(&published),
            Arc::clone(&metrics),
        )?;
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
            sockmap: sockmap.clone(),
        };
        let api = Arc::new(Admin {
            scrape,
            rejects,
            config: configured,
            inbox: inbox.clone(),
            draining: drained,
            started,
            backends: SharedIndex::default(),
        });
        spawn_checks(checks)?;
        if let Some(predecessor) = &mut predecessor {
            let patience = config.borrow().handover.ready_timeout;
            let ready = wait_until_ready(&api, predecessor, patience);
            let ended = runtime.block_on(async {
                tokio::select! {
                    ready = ready => ready.map(|()| false),
                    _ = signals.end() => Ok(true),
                }
            });
            if ended? {
                return Ok(None);
            }
        }
        if let Some(proxy) = &proxy {
            proxy.serve()?;
        }
        let admin = start_admin(sockets.admin, api)?;
        let handover = sockets.handover.map(|listener| {
            let _inside = runtime.enter();
            UnixListener::from_std(listener)
        });
        let handover = handover.transpose().context("handover.socket")?;
        if let Some(predecessor) = predecessor {
            // It may have ended by itself; this process serves all the same.
            if let Err(error) = predecessor.serving() {
                tracing::warn!("{error:#}");
            }
        }
        notify(&[NotifyState::Ready]);
        Ok(Some(Gateway {
            config,
            inbox,
            log,
            proxy,
            admin,
            handover,
            draining,
            stop,
            control,
            state,
            _sockmap: sockmap,
            runtime,
            signals,
        }))
    }

    fn run(mut self, path: Option<&Path>) -> anyhow::Result<()> {
        loop {
            let next = self.runtime.block_on(async {
                tokio::select! {
                    order = self.signals.next() => Next::Order(order),
                    stream = handover::successor(self.handover.as_ref()) => Next::Successor(stream),
                }
            });
            match next {
                Next::Order(Order::Reload) => self.reload(path),
                Next::Order(Order::Upgrade) => self.upgrade(),
                Next::Order(Order::End(end)) => return self.end(end),
                Next::Successor(stream) => {
                    if let Some(end) = self.hand_over(stream) {
                        return self.end(end);
                    }
                }
            }
        }
    }

    fn reload(&mut self, path: Option<&Path>) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => notify(&[NotifyState::Reloading, now]),
            Err(error) => tracing::debug!(%error, "read the clock"),
        }
        match self.try_reload(path) {
            Ok(()) => tracing::info!("configuration reloaded"),
            Err(error) => tracing::error!(
                error = format!("{error:#}"),
                "configuration not reloaded: everything stays as it was"
            ),
        }
        notify(&[NotifyState::Ready]);
    }

    /// Reads the configuration again and applies it whole, or not at all.
    fn try_reload(&mut self, path: Option<&Path>) -> anyhow::Result<()> {
        let Some(path) = path else {
            bail!("the gateway runs without a configuration file")
        };
        let new = config::load(path)?;
        reload::check(&self.config.borrow(), &new)?;
        let filter = log_filter(&new.log)?;
        let mut listeners = None;
        match &self.proxy {
            // The last that may fail, and by itself whole or nothing.
            Some(proxy) => {
                if proxy.reload(&new.http)? {
                    listeners = Some(proxy.listeners()?);
                }
            }
            None => ensure!(
                !new.http.is_on(),
                "http.listen and http.tls.listen: layer 7 is off, and needs a restart to begin"
            ),
        }
        self.log.reload(filter).context("log.filter")?;
        // Sources first: what they sent by the old configuration is before the event.
        self.config.send_replace(Arc::new(new.clone()));
        // Waits at most for the agent to take in what is before it.
        self.tell(Event::Reload(Box::new(new)))?;
        match listeners {
            Some(listeners) => self.tell(Event::Listeners(listeners)),
            None => Ok(()),
        }
    }

    fn tell(&self, event: Event) -> anyhow::Result<()> {
        let told = self.runtime.block_on(self.inbox.send(event));
        told.map_err(|_| anyhow!("the control thread has ended"))
    }

    /// Starts the binary that is there at this moment, as this process was started.
    fn upgrade(&self) {
        if self.handover.is_none() {
            tracing::error!(
                "SIGUSR2 starts a process that takes over by handover.socket: it is unset"
            );
            return;
        }
        let mut arguments = std::env::args_os();
        let Some(binary) = arguments.next() else {
            tracing::error!("this process does not know its binary");
            return;
        };
        match Command::new(&binary).args(arguments).spawn() {
            Ok(mut child) => {
                tracing::info!(pid = child.id(), ?binary, "started a process to take over");
                thread::spawn(move || match child.wait() {
                    Ok(status) => {
                        tracing::warn!(%status, "the process that was to take over ended")
                    }
                    Err(error) => tracing::error!(%error, "wait for the process that takes over"),
                });
            }
            Err(error) => tracing::error!(%error, ?binary, "start a process to take over"),
        }
    }

    /// Attends to a process that takes over; `None`: it did not, and everything is as before.
    fn hand_over(&mut self, stream: UnixStream) -> Option<End> {
        let sockets = match self.sockets() {
            Ok(sockets) => sockets,
            Err(error) => {
                tracing::error!("hand over: {error:#}");
                return None;
            }
        };
        let handed = self.runtime.block_on(async {
            tokio::select! {
                handed = handover::hand_over(stream, sockets, &self.inbox) => Ok(handed),
                end = self.signals.end() => Err(end),
            }
        });
        match handed {
            Ok(Ok(pid)) => {
                tracing::info!(pid, "another process serves");
                if let Some(pid) = pid {
                    notify(&[NotifyState::MainPid(pid)]);
                }
                Some(End::HandedOver)
            }
            Ok(Err(error)) => {
                tracing::warn!("not handed over: {error:#}; everything goes on as before");
                None
            }
            Err(end) => Some(end),
        }
    }

    /// Descriptors of all listening sockets.
    fn sockets(&self) -> anyhow::Result<Vec<OwnedFd>> {
        let mut sockets = vec![self.admin.socket.try_clone()?];
        if let Some(handover) = &self.handover {
            sockets.push(handover.as_fd().try_clone_to_owned()?);
        }
        if let Some(proxy) = &self.proxy {
            sockets.extend(proxy.sockets()?.into_iter().map(OwnedFd::from));
        }
        Ok(sockets)
    }

    fn end(mut self, end: End) -> anyhow::Result<()> {
        tracing::info!(?end, "stopping");
        let config = self.config.borrow().clone();
        // Whoever is started from here on starts by itself.
        drop(self.handover.take());
        self.draining.send_replace(true);
        if end == End::HandedOver {
            drop((self.admin.open, self.admin.socket));
        } else {
            notify(&[NotifyState::Stopping]);
            if let Some(path) = &config.handover.socket {
                // Left over, the next start removes it.
                let _ = std::fs::remove_file(path);
            }
        }
        if let Some(proxy) = self.proxy.take() {
            let timeouts = &config.http.timeouts;
            let drained = async {
                match end {
                    End::HandedOver => proxy.retire(timeouts.drain).await,
                    End::Drain | End::Stop => proxy.drain(timeouts.drain).await,
                }
            };
            self.runtime.block_on(async {
                if end == End::Drain {
                    tracing::info!(wait = ?timeouts.drain_wait, "serving on until drained by others");
                    tokio::select! {
                        () = tokio::time::sleep(timeouts.drain_wait) => {}
                        _ = self.signals.end() => {}
                    }
                }
                tokio::select! {
                    () = drained => {}
                    _ = self.signals.end() => {}
                }
            });
        }
        drop(self.stop);
        // The control thread aborts the process where it would panic.
        let _ = self.control.join();
        if let Some(state) = self.state {
            state.stop();
        }
        if end != End::HandedOver
            && let AdminListen::Unix(path) = &config.admin.listen
        {
            // Left over, the next start removes it.
            let _ = std::fs::remove_file(path);
        }
        Ok(())
    }
}

enum Next {
    Order(Order),
    Successor(UnixStream),
}

/// The listening sockets of a gateway, those of layer 7 as far as they are there.
struct Sockets {
    http: Vec<std::net::TcpListener>,
    admin: admin::Listener,
    handover: Option<std::os::unix::net::UnixListener>,
}

impl Sockets {
    /// From the process that this one takes the place of if there is one, else from the service
    /// manager; and binds what neither has.
    fn take(
        config: &Config,
        activated: Inherited,
    ) -> anyhow::Result<(Option<Predecessor>, Sockets)> {
        let path = config.handover.socket.as_deref();
        let (predecessor, mut inherited) = match path.map(Predecessor::find).transpose()?.flatten()
        {
            Some((predecessor, sockets)) => (Some(predecessor), Inherited::new(sockets)?),
            None => (None, activated),
        };
        let http = inherited.take_http(&config.http);
        let admin = match inherited.take_admin(&config.admin.listen) {
            Some(listener) => listener.into_nonblocking()?,
            None => admin::bind(&config.admin.listen)?,
        };
        let handover = match path {
            None => None,
            Some(path) => Some(match inherited.take_unix(path) {
                Some(listener) => listener,
                None => handover::bind(path)?,
            }),
        };
        if predecessor.is_none() {
            ensure!(
                inherited.is_empty(),
                "LISTEN_FDS: neither http.listen, http.tls.listen nor admin.listen names {inherited}"
            );
        } else if !inherited.is_empty() {
            tracing::info!(addresses = %inherited, "no longer configured, and not taken over");
        }
        let sockets = Sockets {
            http,
            admin,
            handover,
        };
        Ok((predecessor, sockets))
    }
}

/// Returns when this process may serve in the other's place: it knows the routes, or nobody else
/// serves.
async fn wait_until_ready(
    admin: &Admin,
    predecessor: &mut Predecessor,
    patience: Duration,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        let readiness = admin.readiness();
        // What is good enough for a gateway alone is not, where the other one knows more.
        if readiness.ready && readiness.degraded.is_empty() {
            return Ok(());
        }
        if predecessor.is_gone() {
            tracing::warn!(waiting = ?readiness.waiting, "the other process ended: serving before ready");
            return Ok(());
        }
        ensure!(
            begun.elapsed() < patience,
            "not ready within handover.ready_timeout {patience:?}: {}; the running gateway goes on",
            [readiness.waiting, readiness.degraded].concat().join(", ")
        );
        tokio::time::sleep(READY_POLL).await;
    }
}

/// Tells the service manager, if there is one that listens.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        tracing::warn!(%error, "tell the service manager");
    }
}

fn spawn_checks(checks: impl Future<Output = ()> + Send + 'static) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new()
        .name("health".to_owned())
        .spawn(move || runtime.block_on(checks))
        .context("start the health thread")?;
    Ok(())
}

fn start_admin(listener: admin::Listener, api: Arc<Admin>) -> anyhow::Result<AdminPart> {
    let socket = listener.try_clone()?;
    let (open, closed) = oneshot::channel::<()>();
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let serve = async move {
        tokio::select! {
            ended = admin::serve(listener, api) => if let Err(error) = ended {
                tracing::error!(error = format!("{error:#}"), "the admin API ended");
            },
            _ = closed => {}
        }
        // Answers that were begun.
        std::future::pending::<()>().await;
    };
    thread::Builder::new()
        .name("admin".to_owned())
        .spawn(move || runtime.block_on(serve))
        .context("start the admin thread")?;
    Ok(AdminPart { socket, open })
}
