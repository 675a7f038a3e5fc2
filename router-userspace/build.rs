//! Builds the programs of `router-ebpf` and leaves them in `OUT_DIR` for `l4/datapath.rs` to embed.
//!
//! Takes whichever toolchain is there: a rustc with a prebuilt `core` for BPF (Debian's `rustc-web`
//! with `libstd-rust-web-dev-bpf`), else a rustup nightly with `rust-src`. Without one, or without
//! bpf-linker, it embeds empty objects and says so: the workspace still builds, lints and runs its
//! unit tests, and layer 4 refuses to start. `VIADUCT_REQUIRE_EBPF=1` makes that an error.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const PROGRAMS: [&str; 5] = [
    "viaduct-xdp",
    "viaduct-pass",
    "viaduct-decap",
    "viaduct-sockmap",
    "viaduct-bench",
];
const TARGET: &str = "bpfel-unknown-none";
/// Crates that use unstable features on a stable compiler: inline assembly for BPF.
const BOOTSTRAP: &str = "aya_ebpf,viaduct_xdp";

fn main() {
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for input in [
        "router-ebpf",
        "router-common/src",
        "router-common/Cargo.toml",
        "Cargo.lock",
    ] {
        println!("cargo:rerun-if-changed={}", workspace.join(input).display());
    }
    println!("cargo:rerun-if-env-changed=VIADUCT_REQUIRE_EBPF");
    println!("cargo:rerun-if-env-changed=PATH");

    // target/<profile>/build/<package>/out: the tools and the BPF build are shared by all profiles.
    let target_dir = out_dir
        .ancestors()
        .nth(4)
        .expect("OUT_DIR lies in the target directory");
    let linker = find_linker(target_dir);
    let toolchain = Toolchain::find();
    let (Some(linker), Some(toolchain)) = (&linker, &toolchain) else {
        let missing = if linker.is_none() {
            "bpf-linker"
        } else {
            "a Rust toolchain for BPF"
        };
        let remedy = "`cargo xtask setup` installs it";
        assert!(
            env::var_os("VIADUCT_REQUIRE_EBPF").is_none(),
            "{missing} is not installed; {remedy}"
        );
        println!("cargo:warning={missing} is not installed: built without layer 4; {remedy}");
        for program in PROGRAMS {
            std::fs::write(out_dir.join(program), []).expect("write to OUT_DIR");
        }
        return;
    };
    println!("cargo:rerun-if-changed={}", linker.display());
    build(&workspace, target_dir, linker, toolchain, &out_dir);
}

enum Toolchain {
    /// A rustc whose sysroot holds `core` for the target.
    Prebuilt(PathBuf),
    /// Nightly, which builds `core` from rust-src.
    Nightly,
}

impl Toolchain {
    fn find() -> Option<Toolchain> {
        let debian = PathBuf::from("/usr/bin/rustc");
        let libdir =
            output(Command::new(&debian).args(["--print", "target-libdir", "--target", TARGET]));
        if libdir.is_some_and(|dir| Path::new(&dir).is_dir()) {
            return Some(Toolchain::Prebuilt(debian));
        }
        let sysroot =
            output(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]))?;
        Path::new(&sysroot)
            .join("lib/rustlib/src/rust/library/core")
            .is_dir()
            .then_some(Toolchain::Nightly)
    }
}

fn output(command: &mut Command) -> Option<String> {
    let output = command
        .env_remove("RUSTC")
        .env_remove("RUSTUP_TOOLCHAIN")
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn find_linker(target_dir: &Path) -> Option<PathBuf> {
    let own = target_dir.join("tools/bin");
    let path = env::var_os("PATH")?;
    std::iter::once(own)
        .chain(env::split_paths(&path))
        .map(|dir| dir.join("bpf-linker"))
        .find(|file| file.is_file())
}

fn build(
    workspace: &Path,
    target_dir: &Path,
    linker: &Path,
    toolchain: &Toolchain,
    out_dir: &Path,
) {
    let bpf_dir = target_dir.join("bpf");
    let mut cargo = match toolchain {
        Toolchain::Prebuilt(rustc) => {
            let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
            cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", BOOTSTRAP);
            cargo
        }
        Toolchain::Nightly => {
            let mut cargo = Command::new("rustup");
            cargo
                .args(["run", "nightly", "cargo"])
                .env_remove("RUSTC")
                .env_remove("RUSTUP_TOOLCHAIN");
            cargo
        }
    };
    cargo.args([
        "build",
        "--package",
        "router-ebpf",
        "--bins",
        "--release",
        "--target",
        TARGET,
    ]);
    if matches!(toolchain, Toolchain::Nightly) {
        cargo.arg("-Zbuild-std=core");
    }
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    let flags = [
        &format!("--cfg=bpf_target_arch=\"{arch}\""),
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
        &format!("-Clinker={}", linker.display()),
    ]
    .join("\x1f");
    cargo
        .current_dir(workspace)
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .arg("--target-dir")
        .arg(&bpf_dir);
    let output = cargo
        .output()
        .unwrap_or_else(|error| panic!("run {cargo:?}: {error}"));
    assert!(
        output.status.success(),
        "building the BPF programs failed\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for program in PROGRAMS {
        let built = bpf_dir.join(TARGET).join("release").join(program);
        std::fs::copy(&built, out_dir.join(program))
            .unwrap_or_else(|error| panic!("copy {}: {error}", built.display()));
    }
}
