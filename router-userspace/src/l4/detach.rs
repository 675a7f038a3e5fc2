//! Removes every trace of layer 4 from the kernel, for `viaduct detach`.

use std::path::Path;

use crate::l4::{local_routes, next_hop, pins};

/// How many there were.
#[derive(Clone, Copy, Debug)]
pub struct Detached {
    /// Links and maps below the pin path.
    pub pins: usize,
    /// Neighbours and routes of this network namespace.
    pub neighbours: usize,
    pub routes: usize,
}

/// Takes the programs off their interfaces first, then removes what they lived on.
///
/// # Errors
/// Names what could not be removed; what comes after it is left as it is.
pub async fn detach(pin_path: &Path) -> anyhow::Result<Detached> {
    Ok(Detached {
        pins: pins::detach(pin_path)?,
        routes: local_routes::remove_all()?,
        neighbours: next_hop::release_neighbours().await?,
    })
}
