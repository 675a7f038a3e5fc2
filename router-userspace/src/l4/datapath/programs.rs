//! Which programs there are, and which of them layer 4 can do without.

use anyhow::{Context, bail};
use aya::Ebpf;
use aya::programs::{Program, SchedClassifier, Xdp};

/// Decides about every frame that comes in.
pub(super) const PACKETS: &str = "viaduct";
/// The same decisions where frames come as socket buffers.
pub(super) const PACKETS_TCX: &str = "viaduct_tcx";
/// Sends health checks that go out to the backends they are for.
pub(super) const PROBE: &str = "viaduct_probe";
pub(super) const EXPLAIN: &str = "explain";
pub(super) const SWEEP: &str = "sweep";
pub(super) const CLOCK: &str = "clock";
/// Finds the proxy's listener for connections to VIPs of `l7` mode.
pub(super) const SK_LOOKUP: &str = "viaduct_sk_lookup";

/// Names in the object, and whether layer 4 starts without.
const PROGRAMS: [(&str, bool); 7] = [
    (PACKETS, false),
    (SWEEP, false),
    (CLOCK, false),
    (PACKETS_TCX, true),
    (PROBE, true),
    (EXPLAIN, true),
    (SK_LOOKUP, true),
];

/// A program, and what the kernel made of it.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub name: &'static str,
    /// Instructions that the verifier walked through; 0 where the kernel does not tell (before 5.16).
    /// Or why the kernel refused it.
    pub outcome: Result<u32, String>,
}

/// Hands every program to the kernel.
///
/// # Errors
/// The kernel refused one that is needed.
pub(super) fn load(ebpf: &mut Ebpf) -> anyhow::Result<Vec<Loaded>> {
    let mut loaded = Vec::with_capacity(PROGRAMS.len());
    for (name, optional) in PROGRAMS {
        let outcome = match load_one(ebpf, name) {
            Ok(verified_insns) => {
                tracing::info!(program = name, verified_insns, "loaded");
                Ok(verified_insns)
            }
            Err(error) if optional => {
                tracing::warn!(program = name, "goes without this program: {error:#}");
                Err(format!("{error:#}"))
            }
            Err(error) => return Err(error),
        };
        loaded.push(Loaded { name, outcome });
    }
    Ok(loaded)
}

pub(super) fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut Xdp> {
    ebpf.program_mut(name)
        .with_context(|| format!("no program {name}"))?
        .try_into()
        .with_context(|| format!("{name} is no XDP program"))
}

pub(super) fn classifier<'a>(
    ebpf: &'a mut Ebpf,
    name: &str,
) -> anyhow::Result<&'a mut SchedClassifier> {
    ebpf.program_mut(name)
        .with_context(|| format!("no program {name}"))?
        .try_into()
        .with_context(|| format!("{name} is no classifier"))
}

/// Hands one program to the kernel; how many instructions the verifier walked through.
pub(super) fn load_one(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<u32> {
    let program = ebpf
        .program_mut(name)
        .with_context(|| format!("no program {name}"))?;
    match program {
        Program::Xdp(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        _ => bail!("program {name} is of another kind"),
    }
    .with_context(|| format!("load program {name}"))?;
    let info = program.info().context("read about a program")?;
    Ok(info.verified_instruction_count().unwrap_or(0))
}
