//! `viaduct detach`: removes what layer 4 pinned, for good.

use crate::cli::{ConfigOption, Failure};
use crate::l4;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    config: ConfigOption,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let config = options.config.load()?;
    let removed = l4::detach(&config.l4.pin_path)?;
    println!(
        "{removed} pins removed from {}",
        config.l4.pin_path.display()
    );
    Ok(())
}
