//! End to end: the real agent, a real NATS server, real namespaces, real traffic.
//!
//! Needs root, and fails without it. Each test has a lab of its own, so they run side by side.

mod lab;
