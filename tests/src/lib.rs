//! The lab: real network namespaces, a real NATS server, the real agent, and applications to put
//! behind it. `cargo xtask run`, the end-to-end tests and the benchmarks are all built of this.
//!
//! Everything here blocks: a test reads from top to bottom. What must run at the same time runs on
//! threads of its own, inside the namespace it belongs to.

#![forbid(unsafe_code)]

pub mod cgroup;
pub mod netns;

pub mod lab;
pub mod process;

pub mod app;
pub mod client;
pub mod nats;

pub mod site;
