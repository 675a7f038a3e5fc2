//! The signals that a gateway takes.

use anyhow::Context as _;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Handlers that stand from the first moment, so that no signal ends a gateway half started.
pub(super) struct Signals {
    reload: Signal,
    upgrade: Signal,
    drain: Signal,
    terminate: Signal,
    interrupt: Signal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// SIGHUP.
    Reload,
    /// SIGUSR2.
    Upgrade,
    End(End),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// SIGUSR1, by which gorouter is drained: serve on for a while, then as [`End::Stop`].
    Drain,
    /// SIGTERM or SIGINT: accept no more, let end what is open.
    Stop,
    /// Another process serves.
    HandedOver,
}

impl Signals {
    pub(super) fn install(runtime: &Runtime) -> anyhow::Result<Signals> {
        let _inside = runtime.enter();
        let on = |kind: SignalKind| signal(kind).context("listen for signals");
        Ok(Signals {
            reload: on(SignalKind::hangup())?,
            upgrade: on(SignalKind::user_defined2())?,
            drain: on(SignalKind::user_defined1())?,
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
        })
    }

    /// The next one. May be dropped: none is lost.
    pub(super) async fn next(&mut self) -> Order {
        tokio::select! {
            _ = self.reload.recv() => Order::Reload,
            _ = self.upgrade.recv() => Order::Upgrade,
            _ = self.drain.recv() => Order::End(End::Drain),
            _ = self.terminate.recv() => Order::End(End::Stop),
            _ = self.interrupt.recv() => Order::End(End::Stop),
        }
    }

    /// The next one that ends the gateway; others wait. May be dropped: none is lost.
    pub(super) async fn end(&mut self) -> End {
        tokio::select! {
            _ = self.drain.recv() => End::Drain,
            _ = self.terminate.recv() => End::Stop,
            _ = self.interrupt.recv() => End::Stop,
        }
    }
}
