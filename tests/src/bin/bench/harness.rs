//! The harness program of router-ebpf/src/bench.rs, run by BPF_PROG_TEST_RUN.

use anyhow::{Context, ensure};
use aya::Ebpf;
use aya::maps::{Array, MapData, ProgramArray};
use aya::programs::{ProgramFd, TestRun, TestRunAttrs, TestRunOptions, Xdp, XdpMode};
use viaduct::l4::{BENCH_PROGRAM, PASS_PROGRAM};

use crate::stream::{Headers, Stream, client_headers};

/// Kernel: include/uapi/linux/bpf.h, `enum xdp_action`.
const ABORTED: u32 = 0;

/// Clients' flows that [`Stream::known`] is of, and the place behind them for 65,536 others.
pub(crate) const KNOWN_FLOWS: u32 = 524_288;
/// Words of the longest frame that is laid.
const FRAME_WORDS: usize = 12;

/// Frames at once of those that really go somewhere, as a driver hands over in one poll.
const BATCH: u32 = 64;

/// The harness and its maps.
pub(crate) struct Harness {
    ebpf: Ebpf,
    frame: Array<MapData, [u64; FRAME_WORDS]>,
    flows: Array<MapData, Headers>,
    stream: Array<MapData, [u32; 7]>,
    received: Array<MapData, u64>,
    target: ProgramArray<MapData>,
    /// Passes at once: what the harness costs itself.
    pub(crate) pass: ProgramFd,
    /// Puts octets in front and sends: what the harness and a target share when frames grow.
    pub(crate) grow: ProgramFd,
    /// Sends every packet back.
    pub(crate) tx: ProgramFd,
    /// Sources that fresh streams have used up.
    fresh: u32,
    /// Keeps `pass` loaded.
    _pass: Ebpf,
}

impl Harness {
    pub(crate) fn load() -> anyhow::Result<Harness> {
        ensure!(
            !BENCH_PROGRAM.is_empty(),
            "built without the BPF programs: run `cargo xtask setup`"
        );
        let mut ebpf = Ebpf::load(BENCH_PROGRAM).context("load the harness")?;
        load(&mut ebpf, "bench")?;
        let grow = load(&mut ebpf, "grow")?;
        let tx = load(&mut ebpf, "tx")?;
        load(&mut ebpf, "drop")?;
        let mut pass_program = Ebpf::load(PASS_PROGRAM).context("load the pass program")?;
        let pass = load(&mut pass_program, "pass")?;
        let mut take = |name: &str| {
            ebpf.take_map(name)
                .with_context(|| format!("no map {name}"))
        };
        Ok(Harness {
            frame: Array::try_from(take("FRAME")?)?,
            flows: Array::try_from(take("FLOW_HEADERS")?)?,
            stream: Array::try_from(take("STREAM")?)?,
            received: Array::try_from(take("RECEIVED")?)?,
            target: ProgramArray::try_from(take("TARGET")?)?,
            pass,
            grow,
            tx,
            fresh: 1 << 24,
            ebpf,
            _pass: pass_program,
        })
    }

    /// Writes the known flows.
    pub(crate) fn set_known(&mut self) -> anyhow::Result<()> {
        for number in 0..KNOWN_FLOWS {
            self.flows.set(number, client_headers(number), 0)?;
        }
        Ok(())
    }

    /// Writes flows behind the known ones.
    pub(crate) fn set_others(&mut self, others: &[Headers]) -> anyhow::Result<()> {
        for (number, headers) in (KNOWN_FLOWS..).zip(others) {
            self.flows.set(number, headers, 0)?;
        }
        Ok(())
    }

    /// Runs `target` over `runs` packets of the stream; nanoseconds of one, the harness included, by
    /// the kernel's clock.
    ///
    /// `growth` is what the target puts in front if it is [`Self::grow`].
    pub(crate) fn run(
        &mut self,
        target: &ProgramFd,
        stream: &Stream,
        runs: u32,
        growth: u32,
    ) -> anyhow::Result<f64> {
        self.lay(Some(target), stream, runs, growth)?;
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

    /// Sends packets of the stream through `target` as if they had come in by an interface of the
    /// caller's namespace; without a target they are dropped. What becomes of them happens: the
    /// kernel's stack gets what is passed, an interface what is sent or redirected to it.
    pub(crate) fn send(
        &mut self,
        target: Option<&ProgramFd>,
        stream: &Stream,
        frames: u32,
        ifindex: u32,
    ) -> anyhow::Result<()> {
        self.lay(target, stream, frames, 0)?;
        self.received.set(0, 0, 0)?;
        // Kernel: include/uapi/linux/bpf.h, `struct xdp_md`: data, data_end, data_meta,
        // ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [0, stream.frame.len() as u32, 0, ifindex, 0, 0];
        program(&mut self.ebpf, "bench")?
            .test_run(TestRunOptions {
                data_in: Some(&stream.frame),
                ctx_in: Some(context.map(u32::to_ne_bytes).as_flattened()),
                repeat: frames,
                attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
                ..TestRunOptions::default()
            })
            .context("send frames")?;
        Ok(())
    }

    /// What came in where [`Self::drop_at`] is, since sending began.
    pub(crate) fn received(&self) -> anyhow::Result<u64> {
        Ok(self.received.get(&0, 0)?)
    }

    /// Ends and counts every frame that comes in by an interface, from here on.
    pub(crate) fn drop_at(&mut self, interface: &str) -> anyhow::Result<()> {
        let program = program(&mut self.ebpf, "drop")?;
        program.attach(interface, XdpMode::Driver)?;
        Ok(())
    }

    /// Calls `f` while one of the harness's own programs is at an interface.
    pub(crate) fn floor_at<T>(
        &mut self,
        interface: &str,
        name: &str,
        f: impl FnOnce(&mut Harness) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let link = program(&mut self.ebpf, name)?.attach(interface, XdpMode::Driver)?;
        let result = f(self);
        program(&mut self.ebpf, name)?.detach(link)?;
        result
    }

    fn lay(
        &mut self,
        target: Option<&ProgramFd>,
        stream: &Stream,
        runs: u32,
        growth: u32,
    ) -> anyhow::Result<()> {
        match target {
            Some(target) => self.target.set(0, target, 0)?,
            None => self.target.clear_index(&0)?,
        }
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
        Ok(())
    }
}

fn load(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<ProgramFd> {
    let program = program(ebpf, name)?;
    program
        .load()
        .with_context(|| format!("load program {name}"))?;
    Ok(program.fd()?.try_clone()?)
}

pub(crate) fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut Xdp> {
    Ok(ebpf
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?
        .try_into()?)
}
