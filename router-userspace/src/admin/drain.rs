//! `/v1/drain`: backends that an operator takes out of both layers, or of one VIP, without their help;
//! `/v1/drain/gateway`: the gateway itself, to its end.
//!
//! The paths that change the gateway. What they take is a JSON body, which a page of another site
//! cannot have a browser send here unasked (Fetch standard, §3.3: a simple request has no such type).

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::admin::{Admin, refuse};
use crate::event::Event;
use crate::route::Vip;
use crate::route::table::MAX_DRAINING;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DrainRequest {
    backend: SocketAddr,
    /// Without it, whatever the backend serves at both layers.
    vip: Option<String>,
    /// False undoes it.
    drain: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DrainGatewayRequest {
    drain: bool,
}

/// The backends that are drained.
pub(super) async fn list(State(admin): State<Arc<Admin>>) -> Response {
    let snapshot = admin.scrape.published.load();
    let mut backends: Vec<SocketAddr> = snapshot.draining.iter().copied().collect();
    backends.sort();
    let mut of_vips: Vec<&(Vip, SocketAddr)> = snapshot.draining_at.iter().collect();
    of_vips.sort();
    let of_vips: Vec<Value> = of_vips
        .into_iter()
        .map(|(vip, backend)| json!({ "vip": vip.to_string(), "backend": backend }))
        .collect();
    Json(json!({ "backends": backends, "of_vips": of_vips })).into_response()
}

/// Answers once the agent has the order; it takes effect within milliseconds.
pub(super) async fn drain(
    State(admin): State<Arc<Admin>>,
    Json(request): Json<DrainRequest>,
) -> Response {
    let DrainRequest {
        backend,
        vip,
        drain,
    } = request;
    let vip = match vip.as_deref().map(str::parse::<Vip>).transpose() {
        Ok(vip) => vip,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, format!("vip: {error}")),
    };
    let snapshot = admin.scrape.published.load();
    let full = snapshot.draining.len() + snapshot.draining_at.len() >= MAX_DRAINING;
    if drain && full {
        let error = format!("{MAX_DRAINING} backends are drained already");
        return refuse(StatusCode::INSUFFICIENT_STORAGE, error);
    }
    let order = Event::Drain {
        backend,
        vip,
        drain,
    };
    match admin.inbox.send(order).await {
        Ok(()) => StatusCode::ACCEPTED.into_response(),
        Err(_) => refuse(StatusCode::SERVICE_UNAVAILABLE, "the agent has ended"),
    }
}

/// Does what SIGUSR1 does, by that signal, so that there is one way to drain.
pub(super) async fn drain_gateway(Json(request): Json<DrainGatewayRequest>) -> Response {
    if !request.drain {
        let error = "drain: a gateway that drains is not brought back";
        return refuse(StatusCode::BAD_REQUEST, error);
    }
    match kill(Pid::this(), Signal::SIGUSR1) {
        Ok(()) => StatusCode::ACCEPTED.into_response(),
        Err(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}
