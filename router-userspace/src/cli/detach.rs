//! `viaduct detach`: removes every trace of layer 4 from the kernel.
//!
//! Links and filters, pinned maps, and the neighbours that it had kept resolved in this namespace.

use anyhow::anyhow;

use crate::cli::{ConfigOption, Failure, block_on, client, print};
use crate::l4;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    config: ConfigOption,
    /// Even while something answers at the gateway's admin address
    #[arg(long)]
    force: bool,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let config = options.config.load()?;
    let admin = &config.admin.listen;
    if !options.force && block_on(client::get(admin, "/livez")).is_ok() {
        return Err(Failure::Failed(anyhow!(
            "a gateway answers at {admin} and would go on without its programs: stop it first"
        )));
    }
    let removed = block_on(l4::detach(&config.l4.pin_path))?;
    Ok(print(&format!(
        "{} pins removed from {}, {} routes and {} neighbours of this namespace\n",
        removed.pins,
        config.l4.pin_path.display(),
        removed.routes,
        removed.neighbours,
    ))?)
}
