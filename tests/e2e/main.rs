//! End to end: the real agent, a real NATS server, real namespaces, real traffic.
//!
//! Needs root, and fails without it. Each test has a lab of its own, so they run side by side.

#![allow(
    clippy::unwrap_used,
    reason = "a test panics where its site fails, and so do its helpers"
)]

mod attach;
mod cli;
mod clients;
mod control;
mod hand_up;
mod health;
mod l4;
mod l7;
mod lab;
mod life;
mod local;
mod many_flows;
mod modes;
mod restart;
mod routes;
mod seeing;
mod sockmap;
mod start;
mod under_load;
