//! Envoy. It adds `X-Forwarded-For`, `-Proto` and `X-Request-Id` without being told.

use router_tests::process::Process;
use serde_json::{Value, json};

use crate::l7::backend;
use crate::l7::peers::Peer;
use crate::l7::rows::{Back, Front, Row};
use crate::l7::site::{Role, Site};

pub(crate) fn start(site: &Site, row: &Row) -> anyhow::Result<Process> {
    let listener = json!({
        "name": "front",
        "address": address(Peer::Envoy.address(row.front)),
        "filter_chains": [{
            "filters": [{
                "name": "envoy.filters.network.http_connection_manager",
                "typed_config": connection_manager(site, row),
            }],
            "transport_socket": match row.front {
                Front::Http | Front::H2c => Value::Null,
                Front::Tls => tls(site),
            },
        }],
    });
    let endpoint = json!({"endpoint": {"address": address(backend::address(row.back))}});
    let config = json!({
        "static_resources": {
            "listeners": [listener],
            "clusters": [{
                "name": "backends",
                "type": "STATIC",
                "load_assignment": {
                    "cluster_name": "backends",
                    "endpoints": [{"lb_endpoints": [endpoint]}],
                },
                "typed_extension_protocol_options": {
                    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                        "@type": "type.googleapis.com/\
                                  envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                        "explicit_http_config": match row.back {
                            Back::Grpc => json!({"http2_protocol_options": {}}),
                            Back::Http1 | Back::WebSocket => json!({"http_protocol_options": {}}),
                        },
                    },
                },
            }],
        },
    });
    let mut command = site.command(Role::Proxy, "envoy");
    command.args([
        "--concurrency",
        "1",
        "--log-level",
        "error",
        "--disable-hot-restart",
    ]);
    // It tells JSON by the file's name.
    let path = site.path("envoy.json");
    std::fs::write(&path, config.to_string())?;
    command.arg("-c").arg(path);
    Process::start(Peer::Envoy.name(), command, site.folder())
}

fn connection_manager(site: &Site, row: &Row) -> Value {
    let access_log = match row.access_log {
        true => json!([{
            "name": "envoy.access_loggers.file",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
                "path": site.path("envoy-access.log"),
            },
        }]),
        false => json!([]),
    };
    let host = json!({"header": {"key": "x-forwarded-host", "value": "%REQ(:AUTHORITY)%"}});
    let route =
        json!({"match": {"prefix": "/"}, "route": {"cluster": "backends", "timeout": "0s"}});
    json!({
        "@type": "type.googleapis.com/\
                  envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "front",
        "codec_type": "AUTO",
        "use_remote_address": true,
        "access_log": access_log,
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "http2_protocol_options": {"max_concurrent_streams": 256},
        "route_config": {
            "request_headers_to_add": [host],
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}],
        },
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
            },
        }],
    })
}

fn tls(site: &Site) -> Value {
    json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/\
                      envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "common_tls_context": {
                "alpn_protocols": ["h2", "http/1.1"],
                "tls_params": {"tls_maximum_protocol_version": "TLSv1_3"},
                "tls_certificates": [{
                    "certificate_chain": {"filename": site.certificate_path()},
                    "private_key": {"filename": site.key_path()},
                }],
            },
        },
    })
}

fn address(address: std::net::SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip(), "port_value": address.port()}})
}
