//! Connections to NATS: what the configuration says of them, and the few that others than the source
//! make, for one message, for JetStream or for a look.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use async_nats::{Client, ConnectOptions, ToServerAddrs};
use futures_util::StreamExt;
use rand::Rng;
use tokio::sync::mpsc;

use crate::config::NatsConfig;

/// Bytes the client reads at a time. It does so 128 times at most before others of its thread have
/// their turn (tokio's budget of a task), so this says how much comes between two turns of the agent:
/// about as many messages as its inbox holds. Of a server that is faster, the rest waits in the socket.
const READ_BYTES: u16 = 4096;

/// Messages the client holds until this task runs: those that it reads in one turn.
const SUBSCRIPTION_CAPACITY: usize = 1 << 16;

/// Events of the client that wait for this task. More are dropped: it needs none of
/// them and looks for itself once a second.
pub(super) const CLIENT_EVENTS: usize = 64;

const MAX_BACKOFF: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Also how soon a server that went away without a word is noticed: after two missed answers.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// Publishes one message by hand and waits until the server has taken it: what comes back to an inbox
/// of the same connection was handled after it.
///
/// # Errors
/// Also when no server answers within the timeout of a connect, and what the server says against it.
pub async fn publish(config: &NatsConfig, kind: &str, payload: Vec<u8>) -> anyhow::Result<()> {
    let servers = config.servers.join(", ");
    let (events_in, mut events) = mpsc::channel(CLIENT_EVENTS);
    let client = connect(config, "viaduct", events_in).await?;
    let subject = format!("{}.{kind}", config.subject_prefix);
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await.context("subscribe")?;
    client
        .publish(subject.clone(), payload.into())
        .await
        .context("publish")?;
    client.publish(inbox, "".into()).await.context("publish")?;
    let refused = async {
        while let Some(event) = events.recv().await {
            if let async_nats::Event::ServerError(error) = event {
                return error;
            }
        }
        std::future::pending().await
    };
    // The server's errors come before its answer, and so are looked at first.
    let taken = async {
        tokio::select! {
            biased;
            error = refused => bail!("{error}"),
            _ = answers.next() => Ok(()),
        }
    };
    tokio::time::timeout(CONNECT_TIMEOUT, taken)
        .await
        .map_err(|_| anyhow!("no answer within {CONNECT_TIMEOUT:?}"))
        .flatten()
        .with_context(|| format!("publish {subject} to {servers}"))
}

/// Connects to a server, and says which version it is of.
///
/// # Errors
/// None answers, or it refuses.
pub async fn reach(config: &NatsConfig) -> anyhow::Result<String> {
    let (events, _) = mpsc::channel(CLIENT_EVENTS);
    let client = connect(config, "viaduct", events).await?;
    Ok(client.server_info().version)
}

/// Connects once, under a name that the server shows.
///
/// # Errors
/// Names the servers, and the keys that they refuse.
pub async fn connect(
    config: &NatsConfig,
    name: &str,
    events: mpsc::Sender<async_nats::Event>,
) -> anyhow::Result<Client> {
    let options = options(config, events).await?.name(name);
    let client = options.connect(&config.servers[..]).await;
    client
        .map_err(|error| anyhow!(explain(config, &error.to_string())))
        .with_context(|| format!("connect to {}", config.servers.join(", ")))
}

/// What the client says of a connection that was not made, with the keys that it may be about.
pub(super) fn explain(config: &NatsConfig, error: &str) -> String {
    let lower = error.to_lowercase();
    if lower.contains("authorization") || lower.contains("authentication") {
        let said = match config {
            NatsConfig { user: Some(_), .. } => "nats.user and nats.password are",
            NatsConfig { token: Some(_), .. } => "nats.token is",
            NatsConfig {
                nkey_seed: Some(_), ..
            } => "nats.nkey_seed is",
            NatsConfig {
                credentials_file: Some(_),
                ..
            } => "nats.credentials_file is",
            NatsConfig {
                client_certificate_file: Some(_),
                ..
            } => "nats.client_certificate_file is",
            _ => "a client without user, token, key or certificate is",
        };
        return format!("{said} refused by the server: {error}");
    }
    if lower.contains("tls") || lower.contains("certificate") {
        return format!(
            "{error}: nats.ca_file, or what the server makes of nats.client_certificate_file"
        );
    }
    error.to_owned()
}

/// Checks all that can be checked without a server, but the certificate files.
///
/// # Errors
/// Names the key.
pub async fn check(config: &NatsConfig) -> anyhow::Result<()> {
    config
        .servers
        .to_server_addrs()
        .with_context(|| format!("nats.servers {:?}", config.servers))?;
    let (events, _) = mpsc::channel(1);
    options(config, events).await?;
    Ok(())
}

/// What the configuration says of the connection, checked as far as it can be without one.
///
/// # Errors
/// Names the key.
pub async fn options(
    config: &NatsConfig,
    events: mpsc::Sender<async_nats::Event>,
) -> anyhow::Result<ConnectOptions> {
    let mut options = ConnectOptions::new()
        .name("viaduct")
        .read_buffer_capacity(READ_BYTES)
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .connection_timeout(CONNECT_TIMEOUT)
        .ping_interval(PING_INTERVAL)
        .reconnect_delay_callback(backoff)
        .event_callback(move |event| {
            // A full channel loses an event, not the order of those that fit.
            let _ = events.try_send(event);
            std::future::ready(())
        });
    let secret = |key: &str, secret: &crate::config::Secret| {
        secret.reveal().with_context(|| format!("nats.{key}"))
    };
    match (&config.user, &config.password) {
        (Some(user), Some(password)) => {
            options = options.user_and_password(user.clone(), secret("password", password)?);
        }
        (None, None) => {}
        (Some(_), None) => bail!("nats.user without nats.password"),
        (None, Some(_)) => bail!("nats.password without nats.user"),
    }
    if let Some(token) = &config.token {
        options = options.token(secret("token", token)?);
    }
    if let Some(seed) = &config.nkey_seed {
        let seed = secret("nkey_seed", seed)?;
        nkeys::KeyPair::from_seed(&seed).context("nats.nkey_seed")?;
        options = options.nkey(seed);
    }
    if let Some(path) = &config.credentials_file {
        options = options
            .credentials_file(path)
            .await
            .with_context(|| format!("nats.credentials_file {}", path.display()))?;
    }
    if let Some(path) = &config.ca_file {
        options = options.add_root_certificates(path.clone());
    }
    if let (Some(certificate), Some(key)) =
        (&config.client_certificate_file, &config.client_key_file)
    {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    Ok(options)
}

/// The wait before an attempt: doubling from 10 ms, half of it by chance, so that the gateways of a
/// site do not come back to a restarted server all at once.
fn backoff(attempt: usize) -> Duration {
    let exponent = u32::try_from(attempt.saturating_sub(1))
        .unwrap_or(u32::MAX)
        .min(16);
    if attempt <= 1 {
        return Duration::ZERO;
    }
    let most = Duration::from_millis(10 << exponent).min(MAX_BACKOFF);
    rand::rng().random_range(most / 2..=most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_grows_to_its_bound_and_varies() {
        assert_eq!(backoff(1), Duration::ZERO);
        for attempt in 2..100 {
            let most = Duration::from_millis(10 << (attempt - 1).min(16)).min(MAX_BACKOFF);
            assert!((most / 2..=most).contains(&backoff(attempt)));
        }
        assert!(backoff(usize::MAX) >= MAX_BACKOFF / 2);
    }
}
