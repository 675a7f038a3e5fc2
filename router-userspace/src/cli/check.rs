//! `viaduct check`: a configuration and all that it points to are valid, and this is what they amount
//! to.

use anyhow::Context as _;

use crate::cli::{ConfigOption, Failure, print, resolve};
use crate::source;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    config: ConfigOption,
    /// Print JSON instead of TOML
    #[arg(long)]
    json: bool,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let config = resolve::load(&options.config)?;
    let mut paths = config.file.paths.clone();
    for directory in &config.file.directories {
        paths.extend(source::file::list(directory).map_err(Failure::Usage)?);
    }
    for path in &paths {
        source::file::load(path, &config).map_err(Failure::Usage)?;
    }
    let text = match options.json {
        true => serde_json::to_string_pretty(&config).context("print the configuration")? + "\n",
        false => toml::to_string(&config).context("print the configuration")?,
    };
    Ok(print(&text)?)
}
