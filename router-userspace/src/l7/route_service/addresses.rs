//! Where services are: each worker's pools of the addresses that the names of services resolve to.
//!
//! The system's resolver is asked, on a thread of its own, when a service is first called and about
//! every [`REFRESH_INTERVAL`] while it is; it tells no lifetimes. A failed look-up keeps what was
//! found before. The pools are not of any snapshot: nobody checks the health of services, and
//! requests eject their addresses as those of backends.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::uri::Authority;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::l7::balance::PoolState;
use crate::l7::error::{Failure, RouteServiceFailure};
use crate::l7::router::RouteMatch;
use crate::l7::worker::Worker;
use crate::route::policy::HttpPolicy;
use crate::route::{Backend, BackendTls, Instance, Origin, Pool, TlsRoots};

const REFRESH_INTERVAL: Duration = Duration::from_secs(30);

/// How long after a failed look-up there is no other.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// After how long without a request a service is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(600);

/// Services known at once. More are there only if routes name more in ten minutes; the resolver is
/// asked for each request of those.
const MAX_SERVICES: usize = 1024;

/// Addresses of one service; further ones are not used.
const MAX_ADDRESSES: usize = 16;

const HTTPS_PORT: u16 = 443;

/// By authority.
#[derive(Default)]
pub(in crate::l7) struct Services(RefCell<HashMap<Box<str>, Rc<Service>>>);

struct Service {
    authority: Authority,
    /// As of the latest look-up that found any address.
    pool: RefCell<Option<Arc<Pool>>>,
    /// When the latest look-up ended, or a further one began.
    asked: Cell<Option<Instant>>,
    used: Cell<Instant>,
    /// Held by the first look-up, for which requests wait.
    first: Mutex<()>,
}

impl Services {
    /// The pool of a service, of which one request makes `attempts`.
    ///
    /// # Errors
    /// The name has no address, or is not resolved within `http.timeouts.connect`.
    pub(in crate::l7) async fn pool(
        &self,
        worker: &Rc<Worker>,
        authority: &Authority,
        attempts: usize,
    ) -> Result<Rc<PoolState>, Failure> {
        let timeout = worker.settings(|settings| settings.timeouts.connect);
        let service = self.service(authority, worker.now());
        if service.pool.borrow().is_none() {
            let _first = service.first.lock().await;
            if service.pool.borrow().is_none() && service.is_due(RETRY_INTERVAL) {
                service.look_up(timeout, attempts).await;
            }
        } else if service.is_due(REFRESH_INTERVAL) {
            service.asked.set(Some(Instant::now()));
            let service = Rc::clone(&service);
            tokio::task::spawn_local(async move { service.look_up(timeout, attempts).await });
        }
        let pool = service.pool.borrow();
        let pool = pool
            .as_ref()
            .ok_or(Failure::RouteService(RouteServiceFailure::Unresolved))?;
        // No route has such a host.
        let host = format!("https://{authority}");
        Ok(worker.pool(&RouteMatch {
            host: &host,
            path: "",
            conditions: None,
            pool,
        }))
    }

    /// Forgets services that are not called anymore, and with them their connections.
    pub(in crate::l7) fn sweep(&self, now: Instant) {
        let mut services = self.0.borrow_mut();
        services.retain(|_, service| now.duration_since(service.used.get()) < FORGET_AFTER);
    }

    fn service(&self, authority: &Authority, now: Instant) -> Rc<Service> {
        let mut services = self.0.borrow_mut();
        if let Some(service) = services.get(authority.as_str()) {
            service.used.set(now);
            return Rc::clone(service);
        }
        let service = Rc::new(Service {
            authority: authority.clone(),
            pool: RefCell::default(),
            asked: Cell::new(None),
            used: Cell::new(now),
            first: Mutex::default(),
        });
        if services.len() < MAX_SERVICES {
            services.insert(authority.as_str().into(), Rc::clone(&service));
        }
        service
    }
}

impl Service {
    /// Whether it is time to ask the resolver.
    fn is_due(&self, interval: Duration) -> bool {
        let asked = self.asked.get();
        asked.is_none_or(|asked| asked.elapsed() >= interval)
    }

    async fn look_up(&self, timeout: Duration, attempts: usize) {
        let host = self.authority.host();
        let looking = resolve(host, self.authority.port_u16().unwrap_or(HTTPS_PORT));
        let found = match tokio::time::timeout(timeout, looking).await {
            Ok(found) => found,
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)),
        };
        self.asked.set(Some(Instant::now()));
        match found {
            Ok(addresses) => {
                let found = pool_of(host, &addresses, attempts);
                let mut pool = self.pool.borrow_mut();
                // Another pool would begin anew with its turns and limits.
                if pool.as_deref() != Some(&found) {
                    tracing::debug!(host, ?addresses, "route service resolved");
                    *pool = Some(Arc::new(found));
                }
            }
            Err(error) => tracing::warn!(host, %error, "route service not resolved"),
        }
    }
}

/// The addresses of a host, in order and at least one.
async fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let name = without_brackets(host);
    let found: Vec<SocketAddr> = tokio::net::lookup_host((name, port)).await?.collect();
    // The resolver puts first what this host can reach best (RFC 6724 §6).
    let Some(best) = found.first().copied() else {
        return Err(io::Error::from(io::ErrorKind::NotFound));
    };
    let mut addresses: Vec<SocketAddr> = found
        .into_iter()
        .filter(|address| address.is_ipv4() == best.is_ipv4())
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses.truncate(MAX_ADDRESSES);
    Ok(addresses)
}

fn pool_of(host: &str, addresses: &[SocketAddr], attempts: usize) -> Pool {
    let instance = Instance {
        tls: Some(BackendTls {
            server_name: Some(without_brackets(host).into()),
            roots: TlsRoots::RouteServices,
        }),
        ..Instance::default()
    };
    let instance = instance.shared();
    let backend = |&address: &SocketAddr| {
        Arc::new(Backend {
            instance: instance.clone(),
            ..Backend::new(address, Origin::File)
        })
    };
    let mut policy = HttpPolicy::new(Origin::File);
    policy.retries.attempts = Some(attempts);
    // What the gateway bounds is what one backend gets.
    policy.limits.requests_per_backend = Some(0);
    Pool {
        backends: addresses.iter().map(backend).collect(),
        policy: Some(Arc::new(policy)),
        ..Pool::default()
    }
}

/// An IPv6 address as it is written outside of a URL.
fn without_brackets(host: &str) -> &str {
    let inner = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    inner.unwrap_or(host)
}
