//! A backend in use by one request: counted from the choice of the backend until the end of the
//! response's body or of the upgraded connection.

use std::rc::Rc;

use tokio::time::Instant;

use crate::l7::backend::{BackendState, Connection};
use crate::l7::balance::{PoolState, Target};
use crate::l7::client::Client;
use crate::l7::error::{BackendTimeout, Failure};
use crate::l7::proxy_protocol;
use crate::l7::worker::Worker;

pub(super) struct Lease {
    worker: Rc<Worker>,
    pool: Rc<PoolState>,
    index: usize,
    connection: Option<Connection>,
    /// The connection began with a PROXY header, and so is of this client only.
    is_of_one_client: bool,
}

impl Lease {
    pub(super) fn new(worker: &Rc<Worker>, pool: &Rc<PoolState>, index: usize) -> Lease {
        let lease = Lease {
            worker: Rc::clone(worker),
            pool: Rc::clone(pool),
            index,
            connection: None,
            is_of_one_client: false,
        };
        lease.backend().begin_request();
        lease
    }

    pub(super) fn target(&self) -> &Target {
        &self.pool.targets[self.index]
    }

    pub(super) fn backend(&self) -> &Rc<BackendState> {
        &self.target().backend
    }

    /// A kept-alive connection unless `fresh`, else a new one; of HTTP/1 if the request `upgrades`. A
    /// new one of its own if backends are told of `client` by a PROXY header.
    ///
    /// # Errors
    /// The backend cannot be connected to, which ejects it unless the gateway is at fault.
    pub(super) async fn connect(
        &mut self,
        client: &Client,
        fresh: bool,
        upgrades: bool,
    ) -> Result<(), Failure> {
        let (backend_idle, proxy_protocol) = self.worker.settings(|settings| {
            (
                settings.timeouts.backend_idle,
                settings.backend_proxy_protocol,
            )
        });
        let proxy_header = proxy_protocol::header(proxy_protocol, client.peer, client.local);
        self.is_of_one_client = proxy_header.is_some();
        let now = self.worker.now();
        let kept = match fresh || self.is_of_one_client {
            true => None,
            false => self.backend().take(now, backend_idle, upgrades).await,
        };
        let connection = match kept {
            Some(connection) => {
                self.worker.metrics.backend_connections_reused.add(1);
                connection
            }
            None => self.open(upgrades, proxy_header).await?,
        };
        self.connection = Some(connection);
        Ok(())
    }

    /// The backend and the connection to it.
    ///
    /// # Panics
    /// [`Lease::connect`] has not succeeded.
    pub(super) fn connected(&mut self) -> (&Target, &mut Connection) {
        let connection = self.connection.as_mut().expect("the lease is connected");
        (&self.pool.targets[self.index], connection)
    }

    async fn open(
        &self,
        upgrades: bool,
        proxy_header: Option<Vec<u8>>,
    ) -> Result<Connection, Failure> {
        let (connect, ejection) = self
            .worker
            .settings(|settings| (settings.timeouts.connect, settings.timeouts.ejection));
        let tls = self.worker.tls.backend();
        let opening = self.backend().open(upgrades, tls, proxy_header);
        let opened = match tokio::time::timeout(connect, opening).await {
            Ok(opened) => opened,
            Err(_) => Err(Failure::BackendTimeout(BackendTimeout::Connect)),
        };
        match &opened {
            Ok(_) => self.worker.metrics.backend_connections_opened.add(1),
            Err(Failure::Gateway(_)) => {}
            Err(failure) => {
                self.worker.metrics.ejections.add(1);
                self.backend().eject(Instant::now() + ejection);
                tracing::info!(
                    backend = %self.backend().address(),
                    %failure,
                    reason = ?failure,
                    "backend ejected"
                );
            }
        }
        opened
    }

    /// The response has ended cleanly: the connection may carry another request.
    pub(super) fn finish(mut self) {
        if let Some(connection) = self.connection.take()
            && !self.is_of_one_client
        {
            let limit = self
                .worker
                .settings(|settings| settings.limits.idle_per_backend);
            self.backend().keep(connection, self.worker.now(), limit);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.backend().end_request();
    }
}
