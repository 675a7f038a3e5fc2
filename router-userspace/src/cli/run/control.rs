//! The control thread: sources, the agent and layer 4, on one runtime of one thread.

use std::net::TcpListener;
use std::sync::Arc;
use std::thread;

use anyhow::Context as _;
use tokio::runtime::Builder;
use tokio::sync::{mpsc, oneshot};

use crate::agent::Agent;
use crate::config::Config;
use crate::event::Event;
use crate::l4::{L4, L4Reader};
use crate::snapshot::Published;
use crate::{health, last_known_good, source};

/// What the control thread is given.
pub(super) struct Parts {
    pub context: source::Context,
    pub published: Published,
    /// Of the proxy, for layer 4 to hand connections to.
    pub listeners: Vec<TcpListener>,
    pub reports: mpsc::Sender<health::Unanswered>,
    /// From layer 4 to the checker.
    pub tunnels: health::Tunnels,
}

/// Starts sources, agent and layer 4 on their thread; returns when they run or cannot.
pub(super) fn start(
    parts: Parts,
    events: mpsc::Receiver<Event>,
    stopped: oneshot::Receiver<()>,
) -> anyhow::Result<(thread::JoinHandle<()>, Option<L4Reader>)> {
    let (started, starts) = oneshot::channel();
    let control = async move {
        let Parts {
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
                    Some(start_l4(&config, inbox, tunnels, &listeners)?)
                }
            };
            // Held on to, they would outlive the workers' own and leave clients waiting.
            drop(listeners);
            let reader = l4.as_ref().map(L4::reader);
            let metrics = Arc::clone(&context.metrics);
            let mut agent = Agent::new(&config, published, l4, reports, metrics);
            agent.list_rejects(Arc::clone(&context.rejects));
            if let Some(kept) = last_known_good::read(&config.state) {
                agent.adopt(kept, &config);
            }
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
    config: &Config,
    inbox: mpsc::Sender<Event>,
    tunnels: health::Tunnels,
    listeners: &[TcpListener],
) -> anyhow::Result<L4> {
    let policies_to_come = source::tells_policies(config);
    let l4 = L4::start(&config.l4, policies_to_come, inbox, tunnels);
    let mut l4 = l4.context("layer 4")?;
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

const CONTROL: &str = "control";

/// Ends the process where the control thread would panic.
pub(super) fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        if thread::current().name() == Some(CONTROL) {
            std::process::abort();
        }
    }));
}
