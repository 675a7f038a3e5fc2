//! `/v1/rejects`: what sources refused lately, the latest first. One page: there are at most
//! [`MAX_REJECTS`](crate::rejects::MAX_REJECTS).

use std::sync::Arc;
use std::time::SystemTime;

use axum::extract::State;
use axum::response::{IntoResponse, Json, Response};
use serde_json::{Value, json};

use crate::admin::Admin;
use crate::rejects::Reject;

pub(super) async fn list(State(admin): State<Arc<Admin>>) -> Response {
    let rows: Vec<Value> = admin.rejects.list().into_iter().map(row).collect();
    Json(json!({ "rows": rows })).into_response()
}

fn row(reject: Reject) -> Value {
    let at = reject.at.duration_since(SystemTime::UNIX_EPOCH);
    json!({
        "origin": reject.origin.as_str(),
        "what": reject.what,
        "why": reject.why,
        "count": reject.count,
        "at": at.unwrap_or_default().as_secs(),
    })
}
