//! The XDP program on single frames: tables in, frame in, verdict and bytes out.
//!
//! Runs the real program in the kernel by BPF_PROG_TEST_RUN. etherparse builds the frames and reads
//! what comes out, so nothing of ours checks itself.

mod fixture;
mod flows;
mod hostile;
mod nat;
