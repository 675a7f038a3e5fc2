//! What keeps the agent from starting, and what it says then.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use router_tests::site::{self, Site};

#[test]
fn the_example_configuration_is_valid() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/viaduct.toml");
    let output = viaduct(&["check", "--config", example.to_str().unwrap()]);
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
