//! Backends over all their routes, in pages in the order of their addresses.
//!
//! The snapshot has no such order, and the writer of routes does not pay for one. [`BackendIndex`] is
//! made by the first page that is asked for, follows the snapshot from page to page by what is not
//! shared, and is dropped by the admin API when nobody has asked for a while. About 70 bytes an address.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::{Arc, Mutex, PoisonError};

use imbl::ordmap::DiffItem;
use serde::Serialize;

use crate::admin::listing::{Page, PageRequest, fill, text};
use crate::route::{Backend, Origin, Pool, Vip};
use crate::snapshot::{HostRoutes, Hosts, Snapshot};

/// A backend over all its routes.
#[derive(Debug, Serialize)]
pub struct BackendRow {
    pub address: SocketAddr,
    pub healthy: bool,
    /// By an operator.
    pub draining: bool,
    pub origin: &'static str,
    pub app: Option<String>,
    pub instance_index: Option<String>,
    pub http_routes: u32,
    pub vips: u32,
}

/// The backends of the snapshot followed last.
#[derive(Default)]
pub struct BackendIndex {
    hosts: Hosts,
    vips: imbl::OrdMap<Vip, Arc<Pool>>,
    uses: BTreeMap<(SocketAddr, Origin), Uses>,
}

/// How many pools have an address by one source.
struct Uses {
    http_routes: u32,
    vips: u32,
    /// As it was registered last.
    latest: Arc<Backend>,
}

/// The index while it is asked.
#[derive(Default)]
pub struct SharedIndex(Mutex<Option<AskedIndex>>);

#[derive(Default)]
struct AskedIndex {
    index: BackendIndex,
    /// Since [`SharedIndex::forget_unasked`] was called last.
    asked: bool,
}

#[derive(Clone, Copy)]
enum Layer {
    Http,
    Vip,
}

impl SharedIndex {
    /// As [`BackendIndex::page`].
    pub fn page(
        &self,
        snapshot: &Snapshot,
        request: &PageRequest,
    ) -> Result<Page<BackendRow>, String> {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = shared.get_or_insert_default();
        asked.asked = true;
        asked.index.page(snapshot, request)
    }

    /// Drops the index if it was not asked since this was called last.
    pub fn forget_unasked(&self) {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        drop(shared.take_if(|asked| !std::mem::take(&mut asked.asked)));
    }
}

impl BackendIndex {
    /// A page of what `snapshot` holds.
    ///
    /// # Errors
    /// Names `limit` or `after`.
    pub fn page(
        &mut self,
        snapshot: &Snapshot,
        request: &PageRequest,
    ) -> Result<Page<BackendRow>, String> {
        let after = request.after.as_deref().map(str::parse::<SocketAddr>);
        let after = after.transpose();
        let after = after.map_err(|error| format!("after: {error}"))?;
        self.follow(snapshot);
        let behind = after.map(|after| (after, Origin::Adopted));
        let behind = (
            behind.map_or(Bound::Unbounded, Bound::Excluded),
            Bound::Unbounded,
        );
        let mut uses = self.uses.range(behind).peekable();
        let rows = std::iter::from_fn(|| {
            let (&(address, _), first) = uses.next()?;
            let mut row = first.row(snapshot);
            while let Some((_, other)) = uses.next_if(|((of, _), _)| *of == address) {
                row.http_routes += other.http_routes;
                row.vips += other.vips;
            }
            Some(row)
        });
        let (rows, more) = fill(request, rows, |_| 1)?;
        let last = rows.last().filter(|_| more);
        Ok(Page {
            revision: snapshot.revision,
            next: last.map(|last| last.address.to_string()),
            rows,
        })
    }

    fn follow(&mut self, snapshot: &Snapshot) {
        let hosts = std::mem::replace(&mut self.hosts, snapshot.hosts.clone());
        let vips = std::mem::replace(&mut self.vips, snapshot.vips.clone());
        let uses = &mut self.uses;
        hosts.diff(&snapshot.hosts, &mut |old, new| {
            let pools = |routes| Option::into_iter(routes).flat_map(HostRoutes::pools);
            pools(old).for_each(|pool| forget(uses, pool, Layer::Http));
            pools(new).for_each(|pool| count(uses, pool, Layer::Http));
        });
        for item in vips.diff(&snapshot.vips) {
            let (old, new) = match item {
                DiffItem::Add(_, new) => (None, Some(new)),
                DiffItem::Update { old, new } => (Some(old.1), Some(new.1)),
                DiffItem::Remove(_, old) => (Some(old), None),
            };
            old.into_iter()
                .for_each(|pool| forget(uses, pool, Layer::Vip));
            new.into_iter()
                .for_each(|pool| count(uses, pool, Layer::Vip));
        }
    }
}

impl Uses {
    fn row(&self, snapshot: &Snapshot) -> BackendRow {
        let backend = &*self.latest;
        BackendRow {
            address: backend.address,
            healthy: !snapshot.unhealthy.contains(&backend.address),
            draining: snapshot.draining.contains(&backend.address),
            origin: backend.origin.as_str(),
            app: text(&backend.instance().app),
            instance_index: text(&backend.instance().index),
            http_routes: self.http_routes,
            vips: self.vips,
        }
    }

    fn of(&mut self, layer: Layer) -> &mut u32 {
        match layer {
            Layer::Http => &mut self.http_routes,
            Layer::Vip => &mut self.vips,
        }
    }
}

fn count(uses: &mut BTreeMap<(SocketAddr, Origin), Uses>, pool: &Pool, layer: Layer) {
    for backend in &pool.backends {
        let uses = uses.entry((backend.address, backend.origin));
        let uses = uses.or_insert_with(|| Uses {
            http_routes: 0,
            vips: 0,
            latest: Arc::clone(backend),
        });
        if !Arc::ptr_eq(&uses.latest, backend) {
            uses.latest = Arc::clone(backend);
        }
        *uses.of(layer) += 1;
    }
}

fn forget(uses: &mut BTreeMap<(SocketAddr, Origin), Uses>, pool: &Pool, layer: Layer) {
    for backend in &pool.backends {
        let Entry::Occupied(mut known) = uses.entry((backend.address, backend.origin)) else {
            continue;
        };
        *known.get_mut().of(layer) -= 1;
        if (known.get().http_routes, known.get().vips) == (0, 0) {
            known.remove();
        }
    }
}
