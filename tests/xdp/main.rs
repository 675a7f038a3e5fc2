//! The packet programs on single frames: tables in, frame in, verdict and bytes out.
//!
//! Runs the real programs in the kernel by BPF_PROG_TEST_RUN, at both hooks. etherparse builds the frames,
//! and those that are expected, so nothing of ours checks itself. Loading takes longer than thousands of
//! packets, so the rows of a table share one gateway; every row has clients of its own.

mod answers;
mod differential;
mod encapsulation;
mod errors;
mod explain;
mod fixture;
mod flows;
mod fragments;
mod hostile;
mod model;
mod packets;
mod probe;
mod quic;
mod ring;
mod scheduling;
mod translation;
mod vips;
