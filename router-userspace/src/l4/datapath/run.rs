//! The programs run by the agent itself (BPF_PROG_TEST_RUN): on a packet that never was, over the
//! flow table.

use anyhow::Context;
use aya::programs::{ProgramFd, TestRun, TestRunOptions, TestRunResult};
use router_common::{PacketEvent, SWEEP_BUCKETS, SweepRequest, SweepResult};

use super::{Datapath, programs};

/// The smallest frame that BPF_PROG_TEST_RUN takes is an Ethernet header.
pub(super) const EMPTY_FRAME: [u8; 64] = [0; 64];
/// What a program may add to a frame: 256 octets of headroom.
const ROOM: usize = 256;

/// What one run of a packet program on a given frame did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Kernel, include/uapi/linux/bpf.h: `enum xdp_action`, or `TCX_*` of the classifier.
    pub action: u32,
    pub frame: Vec<u8>,
    pub nanoseconds: u64,
}

impl Datapath {
    /// Runs the packet program on a frame as if it had just come in, without sending anything.
    pub fn run(&mut self, frame: &[u8]) -> anyhow::Result<Run> {
        run(
            programs::xdp(&mut self.ebpf, programs::PACKETS)?,
            frame,
            None,
        )
    }

    /// The same for the classifier, which gets the frame as a socket buffer.
    pub fn run_tcx(&mut self, frame: &[u8]) -> anyhow::Result<Run> {
        run(
            programs::classifier(&mut self.ebpf, programs::PACKETS_TCX)?,
            frame,
            None,
        )
    }

    /// Runs the program of health checks on a frame of this host that is about to leave with `mark`.
    pub fn run_probe(&mut self, frame: &[u8], mark: u32) -> anyhow::Result<Run> {
        // Kernel: include/uapi/linux/bpf.h, `struct __sk_buff`, up to `mark`, the third word.
        let mut context = [0; 12];
        context[8..].copy_from_slice(&mark.to_ne_bytes());
        let program = programs::classifier(&mut self.ebpf, programs::PROBE)?;
        run(program, frame, Some(&context))
    }

    /// What the packet program would do to a frame, and what it looked at. Changes no table.
    pub fn explain(&mut self, frame: &[u8]) -> anyhow::Result<(Run, PacketEvent)> {
        // The program adds to what is there.
        self.maps.clear_explained()?;
        let run = run(
            programs::xdp(&mut self.ebpf, programs::EXPLAIN)?,
            frame,
            None,
        )?;
        Ok((run, self.maps.explained()?))
    }

    /// The packet program, for a program array.
    pub fn packet_program(&mut self) -> anyhow::Result<ProgramFd> {
        let program = programs::xdp(&mut self.ebpf, programs::PACKETS)?;
        Ok(program.fd()?.try_clone()?)
    }

    /// How many shares [`Self::sweep`] has the flow table in.
    pub fn sweep_shares(&self) -> u32 {
        (self.settings.bucket_mask + 1).div_ceil(SWEEP_BUCKETS)
    }

    /// Forgets what is over in one share of the flow table and counts the rest for
    /// [`Self::flows_of`] and [`Self::moved_flows`].
    pub fn sweep(&mut self, share: u32) -> anyhow::Result<SweepResult> {
        let request = SweepRequest {
            first_bucket: share * SWEEP_BUCKETS,
            ..SweepRequest::default()
        };
        self.maps.set_sweep(request)?;
        let program = programs::xdp(&mut self.ebpf, programs::SWEEP)?;
        test_run(program, &EMPTY_FRAME, None, None)?;
        Ok(self.maps.sweep()?.result)
    }
}

/// Runs a program once, in the kernel's own context or the one given.
pub(super) fn test_run<P>(
    program: &P,
    frame: &[u8],
    out: Option<&mut [u8]>,
    context: Option<&[u8]>,
) -> anyhow::Result<TestRunResult>
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let options = TestRunOptions {
        data_in: Some(frame),
        data_out: out,
        ctx_in: context,
        ..TestRunOptions::default()
    };
    program.test_run(options).context("run a program")
}

fn run<P>(program: &P, frame: &[u8], context: Option<&[u8]>) -> anyhow::Result<Run>
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let mut out = vec![0; frame.len() + ROOM];
    let result = test_run(program, frame, Some(&mut out), context)?;
    out.truncate(result.data_size_out as usize);
    Ok(Run {
        action: result.return_value,
        frame: out,
        nanoseconds: result.duration.as_nanos() as u64,
    })
}
