//! The harness program of router-ebpf/src/bench.rs, run by BPF_PROG_TEST_RUN.

use anyhow::{Context, ensure};
use aya::Ebpf;
use aya::maps::{Array, MapData, ProgramArray};
use aya::programs::{ProgramFd, TestRun, TestRunOptions, Xdp};
use viaduct::l4::{BENCH_PROGRAM, PASS_PROGRAM};

use super::stream::{Headers, Stream, client_headers};

/// Kernel: include/uapi/linux/bpf.h, `enum xdp_action`.
const ABORTED: u32 = 0;

/// Flows that the harness knows from the beginning, and the place behind them for others.
pub(super) const KNOWN_FLOWS: u32 = 524_288;
/// Words of the longest frame that is laid.
const FRAME_WORDS: usize = 12;

/// The harness and its maps.
pub(super) struct Harness {
    ebpf: Ebpf,
    frame: Array<MapData, [u64; FRAME_WORDS]>,
    flows: Array<MapData, Headers>,
    stream: Array<MapData, [u32; 7]>,
    target: ProgramArray<MapData>,
    /// Passes at once: what the harness costs itself.
    pub(super) pass: ProgramFd,
    /// Puts octets in front and sends: what the harness and a target share when frames grow.
    pub(super) grow: ProgramFd,
    /// Sources that fresh streams have used up.
    fresh: u32,
    /// Keeps `pass` loaded.
    _pass: Ebpf,
}

impl Harness {
    pub(super) fn load() -> anyhow::Result<Harness> {
        ensure!(
            !BENCH_PROGRAM.is_empty(),
            "built without the BPF programs: run `cargo xtask setup`"
        );
        let mut ebpf = Ebpf::load(BENCH_PROGRAM).context("load the harness")?;
        load(&mut ebpf, "bench")?;
        let grow = load(&mut ebpf, "grow")?;
        let mut pass_program = Ebpf::load(PASS_PROGRAM).context("load the pass program")?;
        let pass = load(&mut pass_program, "pass")?;
        let mut take = |name: &str| {
            ebpf.take_map(name)
                .with_context(|| format!("no map {name}"))
        };
        let mut flows = Array::try_from(take("FLOW_HEADERS")?)?;
        for number in 0..KNOWN_FLOWS {
            flows.set(number, client_headers(number), 0)?;
        }
        Ok(Harness {
            frame: Array::try_from(take("FRAME")?)?,
            flows,
            stream: Array::try_from(take("STREAM")?)?,
            target: ProgramArray::try_from(take("TARGET")?)?,
            pass,
            grow,
            fresh: 1 << 24,
            ebpf,
            _pass: pass_program,
        })
    }

    /// Writes flows behind the known ones.
    pub(super) fn set_others(&mut self, others: &[Headers]) -> anyhow::Result<()> {
        for (number, headers) in (KNOWN_FLOWS..).zip(others) {
            self.flows.set(number, headers, 0)?;
        }
        Ok(())
    }

    /// Runs `target` over `runs` packets of the stream; nanoseconds of one, the harness included, by
    /// the kernel's clock.
    ///
    /// `growth` is what the target puts in front if it is [`Self::grow`].
    pub(super) fn run(
        &mut self,
        target: &ProgramFd,
        stream: &Stream,
        runs: u32,
        growth: u32,
    ) -> anyhow::Result<f64> {
        self.target.set(0, target, 0)?;
        let mut words = [0; FRAME_WORDS];
        for (word, octets) in words.iter_mut().zip(stream.frame.as_chunks::<8>().0) {
            *word = u64::from_ne_bytes(*octets);
        }
        self.frame.set(0, words, 0)?;
        let mut first_run = 0;
        if stream.fresh {
            first_run = self.fresh;
            self.fresh += runs;
        }
        let settings = [
            first_run,
            stream.first,
            stream.count - 1,
            u32::from(stream.fresh),
            stream.frame.len() as u32,
            u32::from(stream.v6),
            growth,
        ];
        self.stream.set(0, settings, 0)?;
        let result = program(&mut self.ebpf, "bench")?.test_run(TestRunOptions {
            data_in: Some(&stream.frame),
            repeat: runs,
            ..TestRunOptions::default()
        })?;
        ensure!(
            result.return_value != ABORTED,
            "the harness could not lay a packet"
        );
        Ok(result.duration.as_nanos() as f64)
    }
}

fn load(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<ProgramFd> {
    let program = program(ebpf, name)?;
    program
        .load()
        .with_context(|| format!("load program {name}"))?;
    Ok(program.fd()?.try_clone()?)
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut Xdp> {
    Ok(ebpf
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?
        .try_into()?)
}
