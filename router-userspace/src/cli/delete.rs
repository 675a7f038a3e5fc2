//! `viaduct delete NAME`: takes an entry out of the bucket.

use anyhow::{anyhow, bail};

use crate::cli::declared::{self, BucketOption};
use crate::cli::{Failure, block_on, print};
use crate::source::kv::store::{Store, Written};

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// A route's name, or a VIP: shop, tcp/192.0.2.10:80
    name: String,
    /// Only if it is at this revision
    #[arg(long)]
    revision: Option<u64>,
    #[command(flatten)]
    bucket: BucketOption,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let nats = options.bucket.load()?.nats;
    let key = declared::key(&options.name)?.to_string();
    block_on(async {
        let store = Store::open(&nats).await?;
        let entry = store.entry(&key).await?;
        if entry.value.is_none() {
            bail!("{key}: not in the bucket {}", nats.bucket);
        }
        if let Some(wanted) = options.revision
            && wanted != entry.revision
        {
            bail!("{key}: at revision {}, not at {wanted}", entry.revision);
        }
        match store.delete(&key, entry.revision).await? {
            Written::At(_) => Ok(()),
            Written::Conflict => Err(anyhow!("{key}: somebody else has just changed it")),
        }
    })?;
    Ok(print(&format!("{key} deleted\n"))?)
}
