//! The log on stderr.

use anyhow::Context as _;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::config::{LogConfig, LogFormat};

pub(super) type LogFilter = reload::Handle<EnvFilter, Registry>;

/// Logs to stderr, in the configured format.
pub(super) fn start(config: &LogConfig) -> anyhow::Result<LogFilter> {
    let (filter, handle) = reload::Layer::new(filter(config)?);
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

pub(crate) fn filter(config: &LogConfig) -> anyhow::Result<EnvFilter> {
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| config.filter.clone());
    // The client logs each of its events, which the source tells in its own words.
    EnvFilter::try_new(format!(
        "async_nats=warn,async_nats::connector=off,{filter}"
    ))
    .with_context(|| format!("log.filter {filter:?}"))
}
