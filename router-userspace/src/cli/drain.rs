//! `viaduct drain`: takes a backend out of both layers, or of one VIP, without its help; or the
//! gateway itself out of service.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::cli::client::{self, AdminOption};
use crate::cli::table::cell;
use crate::cli::{Failure, block_on, print};
use crate::route::Vip;

const PATH: &str = "/v1/drain";
const GATEWAY_PATH: &str = "/v1/drain/gateway";

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The backend, ADDRESS:PORT; without one, those that are drained are listed
    backend: Option<SocketAddr>,
    /// Only as a backend of this VIP, PROTO/ADDRESS:PORT
    #[arg(long, requires = "backend")]
    vip: Option<Vip>,
    /// Give it new flows and requests again
    #[arg(long, requires = "backend")]
    undo: bool,
    /// The gateway itself: it serves on for http.timeouts.drain_wait, lets end what is open, and ends
    #[arg(long, conflicts_with = "backend")]
    gateway: bool,
    #[command(flatten)]
    admin: AdminOption,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let admin = options.admin.address()?;
    if options.gateway {
        block_on(client::post(
            &admin,
            GATEWAY_PATH,
            &json!({ "drain": true }),
        ))?;
        return Ok(print("the gateway drains, and then ends\n")?);
    }
    let Some(backend) = options.backend else {
        let drained = block_on(client::get_json(&admin, PATH))?;
        let backends = drained["backends"].as_array();
        let backends = backends.map(Vec::as_slice).unwrap_or_default();
        let of_vips = drained["of_vips"].as_array();
        let of_vips = of_vips.map(Vec::as_slice).unwrap_or_default();
        let of_vip = |row: &Value| format!("{} {}", cell(&row["backend"]), cell(&row["vip"]));
        let rows = backends.iter().map(cell).chain(of_vips.iter().map(of_vip));
        let lines: String = rows.map(|row| row + "\n").collect();
        return Ok(print(&lines)?);
    };
    let mut order = json!({ "backend": backend, "drain": !options.undo });
    let (mut what, mut option) = ("flows and requests".to_owned(), String::new());
    if let Some(vip) = options.vip {
        order["vip"] = vip.to_string().into();
        (what, option) = (format!("flows of {vip}"), format!(" --vip {vip}"));
    }
    block_on(client::post(&admin, PATH, &order))?;
    Ok(print(&match options.undo {
        true => format!("{backend} gets new {what} again\n"),
        false => format!(
            "{backend} gets no new {what}; `viaduct drain {backend}{option} --undo` undoes it, and so \
             does a restart of the gateway\n"
        ),
    })?)
}
