//! What is measured: each row with what it asks of a proxy, of the backend and of the client.

use std::time::Duration;

/// Of one burst of load. CPU time is counted in ticks of 10 ms, 0.5 % of it.
pub(crate) const BURST: Duration = Duration::from_secs(2);
/// Of clients that speak HTTP/1.1.
pub(crate) const CONNECTIONS: usize = 32;
/// In flight on the one connection of a client that speaks HTTP/2.
pub(crate) const STREAMS: usize = 100;
/// Kept open without a request.
pub(crate) const IDLE_CONNECTIONS: usize = 10_000;
/// Beside the one that is asked for.
pub(crate) const MANY_ROUTES: usize = 100_000;

#[derive(Clone, Copy)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) front: Front,
    pub(crate) back: Back,
    pub(crate) access_log: bool,
    pub(crate) load: Load,
}

/// What a proxy listens for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Front {
    Http,
    /// HTTP/2 by prior knowledge.
    H2c,
    /// HTTP/1.1 and HTTP/2 by ALPN.
    Tls,
}

/// What a proxy speaks to its backend.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Back {
    Http1,
    /// HTTP/2 by prior knowledge, with trailers.
    Grpc,
    WebSocket,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Load {
    /// HTTP/1.1 on kept connections.
    KeepAlive(Request),
    /// HTTP/1.1 on a connection for each request; over TLS with a full handshake.
    NewConnection,
    /// HTTP/2, [`STREAMS`] at once.
    Streams,
    /// The same, POSTs of one message with `TE: trailers`.
    Calls,
    /// 64 octets there and back in one tunnel.
    Messages,
    /// Connections that have had a request.
    Idle,
    /// `KeepAlive(Small)`, by a gateway with one route and by one with [`MANY_ROUTES`].
    Routes,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    Small,
    Get16k,
    Get1m,
    Post64k,
}

impl Request {
    pub(crate) fn path(self) -> &'static str {
        match self {
            Request::Small => "/small",
            Request::Get16k => "/16k",
            Request::Get1m => "/1m",
            Request::Post64k => "/post",
        }
    }
}

pub(crate) const ROWS: &[Row] = &[
    http1("get", Load::KeepAlive(Request::Small)),
    http1("get-new-connection", Load::NewConnection),
    http1("get-16k", Load::KeepAlive(Request::Get16k)),
    http1("get-1m", Load::KeepAlive(Request::Get1m)),
    http1("post-64k", Load::KeepAlive(Request::Post64k)),
    Row {
        access_log: true,
        ..http1("get-access-log", Load::KeepAlive(Request::Small))
    },
    http1("get-routes", Load::Routes),
    Row {
        front: Front::Tls,
        ..http1("tls-get", Load::KeepAlive(Request::Small))
    },
    Row {
        front: Front::Tls,
        ..http1("tls-handshake", Load::NewConnection)
    },
    Row {
        front: Front::Tls,
        ..http1("h2-tls", Load::Streams)
    },
    Row {
        front: Front::H2c,
        ..http1("h2c", Load::Streams)
    },
    Row {
        front: Front::H2c,
        back: Back::Grpc,
        ..http1("grpc", Load::Calls)
    },
    Row {
        back: Back::WebSocket,
        ..http1("websocket", Load::Messages)
    },
    http1("idle", Load::Idle),
];

/// HTTP/1.1 on both sides, without an access log.
const fn http1(name: &'static str, load: Load) -> Row {
    Row {
        name,
        front: Front::Http,
        back: Back::Http1,
        access_log: false,
        load,
    }
}
