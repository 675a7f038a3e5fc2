//! `/v1/flows` and `/v1/watch`: what layer 4 forwards, listed and live.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::Deserialize;

use crate::admin::listing::{DEFAULT_LIMIT, MAX_LIMIT};
use crate::admin::{Admin, refuse, with_layer_4};
use crate::l4::flow_list::FlowFilter;
use crate::l4::watch::{MAX_WATCHERS, Sight, WatchFilter, Watcher};

#[derive(Debug, Default, Deserialize)]
pub(super) struct FlowRequest {
    vip: Option<String>,
    client: Option<String>,
    backend: Option<String>,
    limit: Option<usize>,
    after: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct WatchRequest {
    sample: Option<u32>,
    vip: Option<String>,
}

/// A page of the flow table. Pages are a little longer than `limit`: see [`crate::l4::flow_list`].
pub(super) async fn flows(
    State(admin): State<Arc<Admin>>,
    Query(request): Query<FlowRequest>,
) -> Response {
    let (filter, limit) = match filter(&request) {
        Ok(filter) => filter,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, error),
    };
    let after = request.after.unwrap_or(0);
    with_layer_4(&admin, move |reader| reader.flows(&filter, after, limit)).await
}

fn filter(request: &FlowRequest) -> Result<(FlowFilter, usize), String> {
    let limit = request.limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(format!("limit: {limit} is not in 1..={MAX_LIMIT}"));
    }
    let filter = FlowFilter {
        vip: parse("vip", request.vip.as_deref())?,
        client: parse("client", request.client.as_deref())?,
        backend: parse("backend", request.backend.as_deref())?,
    };
    Ok((filter, limit))
}

/// A line of JSON for each sampled packet, for as long as the client listens.
pub(super) async fn watch(
    State(admin): State<Arc<Admin>>,
    Query(request): Query<WatchRequest>,
) -> Response {
    let vip = match parse("vip", request.vip.as_deref()) {
        Ok(vip) => vip,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, error),
    };
    let sample = request.sample.unwrap_or(1);
    if sample == 0 {
        return refuse(StatusCode::BAD_REQUEST, "sample: one packet in 0");
    }
    let Some(reader) = &admin.scrape.l4 else {
        return refuse(StatusCode::NOT_FOUND, super::LAYER_4_IS_OFF);
    };
    let Some(watcher) = reader.watch(WatchFilter { sample, vip }) else {
        let error = format!("{MAX_WATCHERS} watch already");
        return refuse(StatusCode::SERVICE_UNAVAILABLE, error);
    };
    let lines = stream::unfold(watcher, |mut watcher: Watcher| async {
        let sights = watcher.next().await?;
        Some((Ok::<_, std::convert::Infallible>(lines(&sights)), watcher))
    });
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    (kind, Body::from_stream(lines)).into_response()
}

fn lines(sights: &[Sight]) -> Bytes {
    let mut lines = Vec::new();
    for sight in sights {
        serde_json::to_writer(&mut lines, sight).expect("plain fields are valid JSON");
        lines.push(b'\n');
    }
    lines.into()
}

fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(
    name: &str,
    text: Option<&str>,
) -> Result<Option<T>, String> {
    let parsed = text.map(str::parse).transpose();
    parsed.map_err(|error| format!("{name}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_filter_is_refused_by_its_parameter() {
        let text = |text: &str| Some(text.to_owned());
        for (request, name) in [
            (
                FlowRequest {
                    vip: text("192.0.2.1:80"),
                    ..FlowRequest::default()
                },
                "vip",
            ),
            (
                FlowRequest {
                    client: text("nobody"),
                    ..FlowRequest::default()
                },
                "client",
            ),
            (
                FlowRequest {
                    backend: text(":80"),
                    ..FlowRequest::default()
                },
                "backend",
            ),
            (
                FlowRequest {
                    limit: Some(0),
                    ..FlowRequest::default()
                },
                "limit",
            ),
        ] {
            let error = filter(&request).unwrap_err();
            assert!(error.starts_with(name), "{error}");
        }
        assert!(filter(&FlowRequest::default()).is_ok());
    }
}
