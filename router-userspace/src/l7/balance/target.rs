//! A backend of a pool as one worker sees it, and who is looked for by name.

use std::rc::Rc;
use std::sync::Arc;

use http::HeaderValue;

use crate::l7::backend::BackendState;
use crate::l7::balance::hash;
use crate::route::Backend;

/// A backend as a member of a pool.
pub(in crate::l7) struct Target {
    pub backend: Rc<BackendState>,
    pub instance: InstanceHeaders,
    /// `private_instance_id`, if it has one.
    pub instance_id: Option<Arc<str>>,
    /// The tag `process_id`.
    process: Option<Arc<str>>,
    pub(super) weight: u16,
    /// What stands for it in hashes.
    pub(super) seed: u64,
}

/// What the backend is told of itself, made once a pool instead of once a request.
#[derive(Default)]
pub(in crate::l7) struct InstanceHeaders {
    pub app: Option<HeaderValue>,
    pub id: Option<HeaderValue>,
    pub index: Option<HeaderValue>,
}

/// The one instance a request asks for: `X-CF-App-Instance` or `X-CF-Process-Instance`.
pub(in crate::l7) struct WantedInstance<'a> {
    pub id: &'a [u8],
    pub is_process: bool,
    /// `None`: any of the process.
    pub index: Option<&'a [u8]>,
}

impl Target {
    pub(super) fn new(backend: &Backend, state: Rc<BackendState>) -> Target {
        let instance_id = backend.instance().id.clone();
        let instance = match state.is_route_service() {
            true => InstanceHeaders::default(),
            false => InstanceHeaders::new(backend),
        };
        Target {
            backend: state,
            instance,
            instance_id: instance_id.filter(|id| !id.is_empty()),
            process: backend.instance().tags.get("process_id").cloned(),
            weight: backend.weight,
            seed: hash::seed(backend),
        }
    }

    pub(super) fn is(&self, wanted: &WantedInstance<'_>) -> bool {
        let id = if wanted.is_process {
            self.process.as_deref().map(str::as_bytes)
        } else {
            self.instance.app.as_ref().map(HeaderValue::as_bytes)
        };
        let index = self.instance.index.as_ref().map(HeaderValue::as_bytes);
        id == Some(wanted.id) && (wanted.index.is_none() || index == wanted.index)
    }
}

impl InstanceHeaders {
    fn new(backend: &Backend) -> InstanceHeaders {
        let value = |text: &Option<Arc<str>>| {
            text.as_deref()
                .filter(|text| !text.is_empty())
                .and_then(|text| text.parse().ok())
        };
        InstanceHeaders {
            app: value(&backend.instance().app),
            id: value(&backend.instance().id).or_else(|| backend.address.to_string().parse().ok()),
            index: value(&backend.instance().index),
        }
    }
}
