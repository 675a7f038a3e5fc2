//! grpcio on both sides: unary and streaming calls to a backend in clear.

use router_tests::lab::FRONT;

use super::*;

#[test]
fn calls_of_every_kind_pass_in_clear() {
    let clients = Clients::new("grpc_backend", "http2");
    clients.python("grpc_client", &[&format!("{FRONT}:80"), HOST]);
    // The deadline of one call reached the backend.
    clients.backend_says("cancelled");
}

#[test]
fn calls_of_every_kind_pass_over_tls() {
    let clients = Clients::new("grpc_backend", "http2");
    let arguments = [&format!("{FRONT}:443"), HOST, &clients.certificate()];
    clients.python("grpc_client", &arguments);
    clients.backend_says("cancelled");
}
