//! Layer 7: stands in for the proxy until it is merged.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::config::HttpConfig;
use crate::snapshot::Published;

pub mod metrics {
    use std::collections::BTreeMap;
    use std::net::SocketAddr;
    use std::time::Duration;

    use serde::Serialize;

    pub const LATENCY_BOUNDS_US: [u64; 1] = [500];

    #[derive(Debug, Default)]
    pub struct L7Metrics;

    #[derive(Clone, Debug, Default, Serialize)]
    pub struct L7Totals {
        pub responses: [u64; 5],
        pub aborted: u64,
        pub errors: Vec<(&'static str, u64)>,
        pub requests_in_flight: u64,
        pub connections_open: u64,
        pub connections_accepted: u64,
        pub connections_full: u64,
        pub accept_errors: u64,
        pub connections_timed_out: u64,
        pub retries: u64,
        pub ejections: u64,
        pub upgrades: u64,
        pub upgrades_open: u64,
        pub backend_connections_opened: u64,
        pub backend_connections_reused: u64,
        pub bytes_in: u64,
        pub bytes_out: u64,
        pub latency_buckets: [u64; 2],
        pub latency_sum: Duration,
    }

    #[derive(Clone, Copy, Debug, Default, Serialize)]
    pub struct L7BackendTotals {
        pub requests: u64,
        pub failures: u64,
        pub in_flight: u64,
        pub idle_connections: u64,
        pub ejected_by: u64,
    }

    impl L7Metrics {
        pub fn totals(&self) -> L7Totals {
            L7Totals::default()
        }

        pub fn backends(&self) -> BTreeMap<SocketAddr, L7BackendTotals> {
            BTreeMap::new()
        }
    }
}

pub struct Proxy;

pub fn start(
    config: &HttpConfig,
    published: Published,
    metrics: Arc<metrics::L7Metrics>,
) -> anyhow::Result<Proxy> {
    let _ = (config, published, metrics);
    Ok(Proxy)
}

impl Proxy {
    pub fn local_addresses(&self) -> &[SocketAddr] {
        &[]
    }

    pub fn check_reload(&self, config: &HttpConfig) -> anyhow::Result<()> {
        let _ = config;
        Ok(())
    }

    pub fn reload(&self, config: &HttpConfig) -> anyhow::Result<()> {
        let _ = config;
        Ok(())
    }

    pub async fn drain(self, timeout: Duration) {
        let _ = timeout;
        std::future::ready(()).await;
    }
}
