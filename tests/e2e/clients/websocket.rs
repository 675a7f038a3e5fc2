//! Python's websockets on both sides; over HTTP/2, a client that writes frames by hand.

use router_tests::lab::FRONT;

use super::*;

#[test]
fn messages_pings_and_close_codes_pass_in_clear() {
    let clients = Clients::new("websocket_backend", "http1");
    clients.python("websocket_client", &[&FRONT.to_string(), "80", HOST]);
    clients.backend_says("closed 4001");
}

#[test]
fn messages_pings_and_close_codes_pass_over_tls() {
    let clients = Clients::new("websocket_backend", "http1");
    let arguments = [&FRONT.to_string(), "443", HOST, &clients.certificate()];
    clients.python("websocket_client", &arguments);
    clients.backend_says("closed 4001");
}

#[test]
fn an_extended_connect_becomes_an_upgrade() {
    let clients = Clients::new("websocket_backend", "http1");
    clients.python("h2_client", &[&FRONT.to_string(), "80", HOST, "websocket"]);
    clients.backend_says("closed 1000");
}
