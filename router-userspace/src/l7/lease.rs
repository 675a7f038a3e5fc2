//! A backend in use by one request: counted from the choice of the backend until the end of the
//! response's body or of the upgraded connection.

use std::rc::Rc;
use std::time::Duration;

use http::StatusCode;
use tokio::time::Instant;

use crate::l7::backend::{BackendState, Connection, Purpose};
use crate::l7::balance::{PoolState, Target};
use crate::l7::client::Client;
use crate::l7::error::{BackendTimeout, Failure, REASONS};
use crate::l7::outlier;
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
    /// `None` if the route or the backend is at its limit.
    pub(super) fn begin(worker: &Rc<Worker>, pool: &Rc<PoolState>, index: usize) -> Option<Lease> {
        let limit = worker.settings(|settings| pool.limit(settings));
        if let Some(route) = &pool.route
            && !route.in_flight.try_enter(worker.index, pool.route_limit())
        {
            return None;
        }
        if !pool.targets[index].backend.begin_request(limit) {
            if let Some(route) = &pool.route {
                route.in_flight.leave(worker.index);
            }
            return None;
        }
        Some(Lease {
            worker: Rc::clone(worker),
            pool: Rc::clone(pool),
            index,
            connection: None,
            is_of_one_client: false,
        })
    }

    pub(super) fn pool(&self) -> &PoolState {
        &self.pool
    }

    pub(super) fn target(&self) -> &Target {
        &self.pool.targets[self.index]
    }

    pub(super) fn backend(&self) -> &Rc<BackendState> {
        &self.target().backend
    }

    /// A kept-alive connection unless `fresh`, else a new one. A new one of its own if backends are told of `client` by a PROXY header.
    ///
    /// # Errors
    /// The backend cannot be connected to, which ejects it unless the gateway is at fault.
    pub(super) async fn connect(
        &mut self,
        client: &Client,
        fresh: bool,
        purpose: Purpose,
    ) -> Result<(), Failure> {
        let (backend_idle, proxy_protocol) = self.worker.settings(|settings| {
            (
                settings.timeouts.backend_idle,
                settings.backend_proxy_protocol,
            )
        });
        let proxy_header = match self.backend().is_route_service() {
            true => None,
            false => proxy_protocol::header(proxy_protocol, client.peer, client.local),
        };
        self.is_of_one_client = proxy_header.is_some();
        let now = self.worker.now();
        let kept = match fresh || self.is_of_one_client {
            true => None,
            false => self.backend().take(now, backend_idle, purpose).await,
        };
        let connection = match kept {
            Some(connection) => {
                self.worker.metrics.backend_connections_reused.add(1);
                connection
            }
            // Boxed, as all that few requests need: their futures are moved whole.
            None => Box::pin(self.open(purpose, proxy_header)).await?,
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
        purpose: Purpose,
        proxy_header: Option<Vec<u8>>,
    ) -> Result<Connection, Failure> {
        let connect = self.worker.settings(|settings| settings.timeouts.connect);
        let tls = match self.backend().is_route_service() {
            true => self.worker.tls.route_services(),
            false => self.worker.tls.backend(),
        };
        let opening = self.backend().open(purpose, tls, proxy_header);
        let opened = match tokio::time::timeout(connect, opening).await {
            Ok(opened) => opened,
            Err(_) => Err(Failure::BackendTimeout(BackendTimeout::Connect)),
        };
        match &opened {
            Ok(_) => self.worker.metrics.backend_connections_opened.add(1),
            Err(Failure::Gateway(_)) => {}
            Err(failure) => self.could_not_connect(failure),
        }
        opened
    }

    /// Nobody is there, or cannot be spoken to, which no share of the pool excuses.
    fn could_not_connect(&self, failure: &Failure) {
        let ejection = self.worker.settings(|settings| settings.ejection.clone());
        if let Some(duration) = self.backend().outlier().eject(Instant::now(), &ejection) {
            self.worker.metrics.ejections.add(1);
            self.count_ejection();
            self.log_ejection(duration, REASONS[failure.reason()]);
        }
    }

    /// The head of a response has come.
    pub(super) fn answered(&self, status: StatusCode) {
        match status {
            StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
                // A route service passes on what backends answer.
                if !self.backend().is_route_service() =>
            {
                self.answered_badly(status.as_str());
            }
            _ => self.backend().outlier().succeeded(),
        }
    }

    /// A response has not come, and the backend is at fault.
    pub(super) fn failed(&self, failure: &Failure) {
        self.backend().record_failure();
        self.answered_badly(REASONS[failure.reason()]);
    }

    fn answered_badly(&self, reason: &str) {
        let ejection = self.worker.settings(|settings| settings.ejection.clone());
        let outlier = self.backend().outlier();
        if !outlier.failed(&ejection) {
            return;
        }
        let metrics = &self.worker.metrics;
        let now = self.worker.now();
        let count = self.pool.targets.len();
        if !outlier::may_eject(self.pool.ejected(now), count, &ejection) {
            metrics.ejections_refused.add(1);
        } else if let Some(duration) = outlier.eject(now, &ejection) {
            metrics.failure_ejections.add(1);
            self.count_ejection();
            self.log_ejection(duration, reason);
        }
    }

    fn count_ejection(&self) {
        self.backend().traffic().ejections.add(1);
        self.pool.traffic.ejections.add(1);
    }

    fn log_ejection(&self, duration: Duration, reason: &str) {
        tracing::info!(
            backend = %self.backend().address(),
            reason,
            seconds = duration.as_secs_f64(),
            "backend ejected"
        );
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
        if let Some(route) = &self.pool.route {
            route.in_flight.leave(self.worker.index);
        }
    }
}
