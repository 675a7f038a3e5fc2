//! `viaduct explain`: what the running gateway would do with a packet or a request.

use std::net::SocketAddr;

use serde_json::Value;

use crate::cli::client::{self, AdminOption};
use crate::cli::table::cell;
use crate::cli::{Failure, block_on, print};

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// tcp/ADDRESS:PORT, udp/ADDRESS:PORT or http://HOST/PATH
    what: String,
    /// The client of a packet
    #[arg(long, value_name = "ADDRESS:PORT")]
    from: Option<SocketAddr>,
    /// A TCP segment that opens a connection [default]
    #[arg(long, conflicts_with = "ack")]
    syn: bool,
    /// A TCP segment in the middle of a connection
    #[arg(long)]
    ack: bool,
    /// The method of a request [default: GET]
    #[arg(long)]
    method: Option<String>,
    /// A header of a request; may be given several times
    #[arg(long, value_name = "NAME: VALUE")]
    header: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    admin: AdminOption,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let admin = options.admin.address()?;
    let mut path = format!("/v1/explain?what={}", client::escape(&options.what));
    if let Some(from) = options.from {
        path.push_str(&format!("&from={}", client::escape(&from.to_string())));
    }
    if options.ack {
        path.push_str("&established=true");
    }
    if let Some(method) = &options.method {
        path.push_str(&format!("&method={}", client::escape(method)));
    }
    if !options.header.is_empty() {
        let headers = client::escape(&options.header.join("\n"));
        path.push_str(&format!("&headers={headers}"));
    }
    let explanation = block_on(client::get_json(&admin, &path))?;
    if options.json {
        return Ok(print(&format!("{explanation}\n"))?);
    }
    Ok(print(&steps(&explanation))?)
}

/// One line a step.
fn steps(explanation: &Value) -> String {
    let steps = explanation["steps"].as_array();
    let steps = steps.map(Vec::as_slice).unwrap_or_default();
    steps.iter().map(|step| cell(step) + "\n").collect()
}
