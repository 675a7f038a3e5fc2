//! What keeps the agent from starting, and what it says then.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use router_tests::process::Process;
use router_tests::site::{self, Site};

#[test]
fn the_example_configuration_is_valid_once_its_secret_is_there() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/viaduct.toml");
    let text = fs::read_to_string(example).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (path, password) = (
        folder.path().join("viaduct.toml"),
        folder.path().join("password"),
    );
    fs::write(
        &path,
        text.replace("/etc/viaduct/nats-password", password.to_str().unwrap()),
    )
    .unwrap();
    let check = || viaduct(&["check", "--config", path.to_str().unwrap()]);
    let output = check();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("nats.password"),
        "{}",
        stderr(&output)
    );
    fs::write(&password, "secret").unwrap();
    let output = check();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn a_bad_configuration_is_refused_by_file_line_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.toml");
    for (text, wanted) in [
        (
            "[http]\nlisten = [\"0.0.0.0:80\"]\nlissten = 1\n",
            ["bad.toml", "line 3", "lissten"],
        ),
        (
            "[l4]\ninterfaces = \"eth0\"\n",
            ["bad.toml", "line 2", "interfaces"],
        ),
        ("[nats]\nservers = [\n", ["bad.toml", "line", ""]),
    ] {
        fs::write(&path, text).unwrap();
        for command in ["run", "check"] {
            let output = viaduct(&[command, "--config", path.to_str().unwrap()]);
            let message = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{command}: {message}");
            for part in wanted {
                assert!(
                    message.contains(part),
                    "{command}: {message:?} lacks {part:?}"
                );
            }
        }
    }
}

#[test]
fn a_configuration_that_does_not_exist_is_named() {
    let output = viaduct(&["run", "--config", "/nonexistent/viaduct.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("/nonexistent/viaduct.toml"));
}

#[test]
fn an_interface_that_does_not_exist_is_named() {
    let mut site = Site::new(1).unwrap();
    site.spawn_gateway(|config| config.l4.interfaces = vec!["eth9".to_owned()])
        .unwrap();
    assert!(!site.gateway().wait().unwrap().success());
    assert!(
        site.gateway().log().contains("eth9"),
        "{}",
        site.gateway().log()
    );
}

#[test]
fn a_busy_port_is_named() {
    let mut site = Site::new(1).unwrap();
    let _busy = site
        .lab
        .gateway
        .run(|| TcpListener::bind("0.0.0.0:80").unwrap());
    site.spawn_gateway(|_| ()).unwrap();
    assert_eq!(site.gateway().wait().unwrap().code(), Some(1));
    assert!(
        site.gateway().log().contains("0.0.0.0:80"),
        "{}",
        site.gateway().log()
    );
}

#[test]
fn missing_privileges_are_named() {
    let mut site = Site::new(1).unwrap();
    // Ports below 1024 take a privilege too; layer 4 is what is meant here.
    site.spawn_gateway(|config| config.http.listen = vec![([0, 0, 0, 0], 8080).into()])
        .unwrap();
    site.gateway().kill();
    let mut command = site.lab.gateway.command("setpriv");
    command
        .args(["--bounding-set=-all", "--inh-caps=-all"])
        .arg(site::agent().unwrap());
    let output = command
        .args(["run", "--config"])
        .arg(site.config_path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("CAP_"), "{}", stderr(&output));
}

#[test]
fn a_kernel_without_btf_is_no_obstacle() {
    let mut site = Site::new(1).unwrap();
    let mut command = site.lab.gateway.command("unshare");
    command.args(["--mount", "sh", "-c"]);
    command.arg("mount -t tmpfs none /sys/kernel/btf && exec \"$@\"");
    command.arg("sh").arg(site::agent().unwrap());
    site.write_config(|_| ()).unwrap();
    command.args(["run", "--config"]).arg(site.config_path());
    let folder = site.lab.folder().to_owned();
    site.gateway = Some(Process::start("viaduct", command, &folder).unwrap());
    site.wait_until("/livez").unwrap();
}

/// Runs the agent's binary in the namespace of the test, for what ends before it touches anything.
fn viaduct(arguments: &[&str]) -> Output {
    Command::new(site::agent().unwrap())
        .args(arguments)
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
