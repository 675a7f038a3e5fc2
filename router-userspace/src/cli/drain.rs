//! `viaduct drain`: takes a backend out of both layers without its help.

use std::net::SocketAddr;

use serde_json::json;

use crate::cli::client::{self, AdminOption};
use crate::cli::table::cell;
use crate::cli::{Failure, block_on, print};

const PATH: &str = "/v1/drain";

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The backend, ADDRESS:PORT; without one, those that are drained are listed
    backend: Option<SocketAddr>,
    /// Give it new flows and requests again
    #[arg(long, requires = "backend")]
    undo: bool,
    #[command(flatten)]
    admin: AdminOption,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let admin = options.admin.address()?;
    let Some(backend) = options.backend else {
        let drained = block_on(client::get_json(&admin, PATH))?;
        let backends = drained["backends"].as_array();
        let backends = backends.map(Vec::as_slice).unwrap_or_default();
        let lines: String = backends.iter().map(|row| cell(row) + "\n").collect();
        return Ok(print(&lines)?);
    };
    let order = json!({ "backend": backend, "drain": !options.undo });
    block_on(client::post(&admin, PATH, &order))?;
    Ok(print(&match options.undo {
        true => format!("{backend} gets new flows and requests again\n"),
        false => format!(
            "{backend} gets no new flows and requests; `viaduct drain {backend} --undo` undoes it, and \
             so does a restart of the gateway\n"
        ),
    })?)
}
