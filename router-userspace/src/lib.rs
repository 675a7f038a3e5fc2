//! Viaduct: applications announce themselves, packets and requests follow.
//!
//! ```text
//!  NATS / file
//!     │  RouteEvent                           ┌─▶ L4 plan ─▶ map operations ─▶ eBPF maps ─▶ XDP: packets
//!     ├────────────▶ RouteTable ─▶ Snapshot ──┤   (pure)      (l4/datapath.rs alone names aya)
//!  health │ Event      (one writer: agent)    └─▶ L7 router ─▶ published pointer ─▶ hyper: requests
//!     └──────────────────────────────────────────▶ admin API, metrics, CLI (readers)
//! ```
//!
//! The modules below stand in the order of that flow.

#![forbid(unsafe_code)]

pub mod cli;
pub mod config;

pub mod route;
pub mod source;

pub mod agent;
pub mod event;
pub mod health;
pub mod last_known_good;
pub mod snapshot;

pub mod l4;
pub mod l7;

pub mod admin;
pub mod metrics;
pub mod rejects;
pub mod warning;

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
