//! `viaduct register` and `viaduct unregister`: one message to NATS by hand.
//!
//! The message goes through the same checks as on arrival before it is sent, so that a mistake is
//! told here and not only in the gateway's log. VIP ranges are the gateway's to know.

use std::net::SocketAddr;

use anyhow::anyhow;
use ipnet::IpNet;
use serde_json::{Map, Value, json};

use crate::cli::{ConfigOption, Failure, block_on};
use crate::route::wire;
use crate::source::nats;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    config: ConfigOption,
    /// NATS server instead of the configured ones
    #[arg(long, value_name = "URL")]
    nats: Option<String>,
    /// Host and path to serve, like app.example.com/shop; may be repeated
    #[arg(long)]
    uri: Vec<String>,
    /// Virtual IP to serve, like tcp/192.0.2.10:9090; may be repeated
    #[arg(long)]
    vip: Vec<String>,
    /// Address and port of the backend
    #[arg(long)]
    address: SocketAddr,
    /// The backend speaks TLS
    #[arg(long)]
    tls: bool,
    /// Name its certificate must carry
    #[arg(long, requires = "tls")]
    server_name: Option<String>,
    /// Share of new flows and requests, 0..=1000; 0 drains [default: 100]
    #[arg(long)]
    weight: Option<u16>,
    /// What it speaks [default: http1]
    #[arg(long)]
    protocol: Option<Protocol>,
    /// Application id
    #[arg(long)]
    app: Option<String>,
    /// Instance id
    #[arg(long)]
    instance_id: Option<String>,
    /// Instance index
    #[arg(long)]
    instance_index: Option<String>,
    /// Seconds until it is forgotten unless repeated
    #[arg(long, value_name = "SECONDS")]
    stale_after: Option<u32>,
    /// How requests are spread over its pool [default: the gateway's]
    #[arg(long)]
    balance: Option<Balance>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Protocol {
    Http1,
    Http2,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Balance {
    RoundRobin,
    #[value(alias = "least-connections")]
    LeastConnection,
}

pub fn register(options: &Options) -> Result<(), Failure> {
    let payload = message(options);
    let everywhere: [IpNet; 2] = ["0.0.0.0/0", "::/0"].map(|net| net.parse().expect("a prefix"));
    wire::register(&payload, &everywhere).map_err(|reject| Failure::Usage(anyhow!("{reject}")))?;
    publish(options, "register", payload)
}

pub fn unregister(options: &Options) -> Result<(), Failure> {
    let payload = message(options);
    wire::unregister(&payload).map_err(|reject| Failure::Usage(anyhow!("{reject}")))?;
    publish(options, "unregister", payload)
}

fn publish(options: &Options, kind: &str, payload: Vec<u8>) -> Result<(), Failure> {
    let mut config = options.config.load()?.nats;
    if let Some(server) = &options.nats {
        config.servers = vec![server.clone()];
    }
    if config.servers.is_empty() {
        return Err(Failure::Usage(anyhow!(
            "nats.servers is empty and no --nats is given"
        )));
    }
    Ok(block_on(nats::publish(&config, kind, payload))?)
}

fn message(options: &Options) -> Vec<u8> {
    let mut message = Map::new();
    let mut set = |field: &str, value: Value| {
        message.insert(field.to_owned(), value);
    };
    set("host", json!(options.address.ip()));
    set(
        if options.tls { "tls_port" } else { "port" },
        json!(options.address.port()),
    );
    for (field, list) in [("uris", &options.uri), ("vips", &options.vip)] {
        if !list.is_empty() {
            set(field, json!(list));
        }
    }
    for (field, text) in [
        ("server_cert_domain_san", &options.server_name),
        ("app", &options.app),
        ("private_instance_id", &options.instance_id),
        ("private_instance_index", &options.instance_index),
    ] {
        if let Some(text) = text {
            set(field, json!(text));
        }
    }
    if let Some(weight) = options.weight {
        set("weight", json!(weight));
    }
    if let Some(seconds) = options.stale_after {
        set("stale_threshold_in_seconds", json!(seconds));
    }
    if let Some(protocol) = options.protocol {
        let protocol = match protocol {
            Protocol::Http1 => "http1",
            Protocol::Http2 => "http2",
        };
        set("protocol", json!(protocol));
    }
    if let Some(balance) = options.balance {
        let balance = match balance {
            Balance::RoundRobin => "round-robin",
            Balance::LeastConnection => "least-connection",
        };
        set("options", json!({ "loadbalancing": balance }));
    }
    Value::Object(message).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn flags_become_the_message_of_the_wire() {
        let command = Command::parse_from([
            "register",
            "--uri",
            "a.x",
            "--uri",
            "b.x/p",
            "--vip",
            "tcp/192.0.2.1:80",
            "--address",
            "[2001:db8::1]:8443",
            "--tls",
            "--server-name",
            "san",
            "--weight",
            "7",
            "--app",
            "a",
            "--stale-after",
            "5",
            "--balance",
            "least-connection",
            "--protocol",
            "http2",
        ]);
        let ranges = ["192.0.2.0/24".parse().unwrap()];
        let registration = wire::register(&message(&command.options), &ranges).unwrap();
        assert_eq!(registration.routes.len(), 3);
        let backend = &registration.backend;
        assert_eq!(backend.address, "[2001:db8::1]:8443".parse().unwrap());
        assert_eq!(backend.tls().unwrap().server_name.as_deref(), Some("san"));
        assert_eq!(
            (backend.weight, backend.instance().app.as_deref()),
            (7, Some("a"))
        );
        assert!(registration.stale_after.is_some() && registration.balance.is_some());
    }
}
