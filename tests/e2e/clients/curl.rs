//! curl, by each version of HTTP and TLS that it speaks.

use std::fs;

use router_tests::lab::CLIENT;
use viaduct::config::{Config, ProxyProtocol};

use super::*;

/// In clear: HTTP/1.0, 1.1, and HTTP/2 by prior knowledge.
const CLEAR: [(&str, &str); 3] = [
    // curl's word for 1.0.
    ("--http1.0", "1"),
    ("--http1.1", "1.1"),
    ("--http2-prior-knowledge", "2"),
];

#[test]
fn every_version_of_http_is_answered_in_its_own() {
    let clients = Clients::new("http1_backend", "http1");
    for (option, version) in CLEAR {
        let answer = clients.curl(&[
            option,
            "-w",
            "%{http_version} %{http_code}",
            &url("http", "/a"),
        ]);
        assert!(
            answer.ends_with(&format!("{version} 200")),
            "{option}: {answer}"
        );
        assert!(answer.starts_with("GET /a 0 "), "{option}: {answer}");
    }
    // An upgrade to h2c is not taken, and the request is answered by HTTP/1.1.
    let answer = clients.curl(&["--http2", "-w", "%{http_version}", &url("http", "/")]);
    assert!(answer.ends_with("1.1"), "{answer}");
}

#[test]
fn every_version_of_tls_is_spoken_and_alpn_chooses_that_of_http() {
    let clients = Clients::new("http1_backend", "http1");
    let certificate = clients.certificate();
    for tls in [
        ["--tlsv1.2", "--tls-max", "1.2"],
        ["--tlsv1.3", "--tls-max", "1.3"],
    ] {
        for (option, version) in [("--http1.1", "1.1"), ("--http2", "2")] {
            let target = url("https", "/a");
            let mut arguments = vec![
                option,
                "--cacert",
                &certificate,
                "-w",
                "%{http_version}",
                &target,
            ];
            arguments.extend(tls);
            let answer = clients.curl(&arguments);
            assert!(
                answer.contains("x-forwarded-proto: https\n"),
                "{tls:?}: {answer}"
            );
            assert!(answer.ends_with(version), "{tls:?}: {answer}");
        }
    }
    let old = [
        "--tlsv1.1",
        "--tls-max",
        "1.1",
        "--ciphers",
        "DEFAULT@SECLEVEL=0",
    ];
    let mut command = clients.curl_command(&["--cacert", &certificate, &url("https", "/")]);
    let refused = command.args(old).output().unwrap();
    assert_eq!(refused.status.code(), Some(35), "TLS 1.1: {refused:?}");
}

#[test]
fn bodies_arrive_whole_with_a_length_and_without_and_after_100_continue() {
    let clients = Clients::new("http1_backend", "http1");
    let file = clients.site.lab.folder().join("body");
    for size in [0, 1, 65_536, 3_000_000] {
        let body: Vec<u8> = (0..size).map(|n: u32| ((n * 31) >> 3) as u8).collect();
        fs::write(&file, body).unwrap();
        let sum = succeed(Command::new("sha256sum").arg(&file));
        let expected = format!("POST /a {size} {} ", sum.split(' ').next().unwrap());
        let upload = format!("@{}", file.display());
        for version in ["--http1.1", "--http2-prior-knowledge"] {
            for header in [
                "Expect: 100-continue",
                "Transfer-Encoding: chunked",
                "X-Plain: yes",
            ] {
                // Chunks are of HTTP/1 alone, and over HTTP/2 no 100 is sent.
                if version != "--http1.1" && header != "X-Plain: yes" {
                    continue;
                }
                let target = url("http", "/a");
                // Long enough that nobody gives up waiting for the 100.
                let wait = ["--expect100-timeout", "60"];
                let what = [version, "-H", header, "--data-binary", &upload, &target];
                let answer = clients.curl(&[&wait[..], &what].concat());
                let line = answer.lines().next().unwrap().to_owned() + " ";
                assert_eq!(line, expected, "{version} {header}: {answer}");
            }
        }
    }
}

#[test]
fn a_refusal_before_the_body_reaches_the_client() {
    let clients = Clients::new("http1_backend", "http1");
    let file = clients.site.lab.folder().join("body");
    fs::write(&file, vec![0; 1_000_000]).unwrap();
    let upload = format!("@{}", file.display());
    let answer = clients.curl(&[
        "--http1.1",
        "-w",
        "%{http_code}",
        "--data-binary",
        &upload,
        &url("http", "/refuse"),
    ]);
    assert_eq!(answer, "413");
}

#[test]
fn trailers_pass_and_an_early_hint_is_in_nobodys_way() {
    let clients = Clients::new("http1_backend", "http1");
    for (version, _) in &CLEAR[1..] {
        let answer = clients.curl(&[version, "-w", "%{http_code}", &url("http", "/hints")]);
        assert!(answer.ends_with("200"), "{version}: {answer}");

        let arguments = [
            version,
            "-D",
            "-",
            "-H",
            "TE: trailers",
            &url("http", "/trailers"),
        ];
        let answer = clients.curl(&arguments).to_ascii_lowercase();
        assert!(answer.contains("x-sum: 42"), "{version}: {answer}");
    }
}

#[test]
fn a_proxy_header_is_taken_and_its_absence_refused() {
    let clients = Clients::with("http1_backend", "http1", |config: &mut Config| {
        config.http.proxy_protocol = ProxyProtocol::Require;
        config.http.trusted_proxies = vec![format!("{CLIENT}/32").parse().unwrap()];
    });
    let certificate = clients.certificate();
    for arguments in [
        vec!["--http1.1", "http"],
        vec!["--http2-prior-knowledge", "http"],
        vec!["--cacert", &certificate, "https"],
    ] {
        let (scheme, options) = arguments.split_last().unwrap();
        let target = url(scheme, "/a");
        let with = [options, &["--haproxy-protocol", &target]].concat();
        let answer = clients.curl(&with);
        let client = format!("x-forwarded-for: {CLIENT}\n");
        assert!(answer.contains(&client), "{arguments:?}: {answer}");

        let mut without = clients.curl_command(&[options, &[&target]].concat());
        let output = without.output().unwrap();
        assert!(!output.status.success(), "{arguments:?}: {output:?}");
    }
}

impl Clients {
    /// curl's output; panics if it failed.
    #[track_caller]
    pub(super) fn curl(&self, arguments: &[&str]) -> String {
        succeed(&mut self.curl_command(arguments))
    }

    fn curl_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.site.lab.client.command(installed("curl"));
        command.args([
            "--silent",
            "--show-error",
            "--max-time",
            "60",
            "--noproxy",
            "*",
        ]);
        for port in [80, 443] {
            let resolve = format!("{HOST}:{port}:{}", router_tests::lab::FRONT);
            command.args(["--resolve", &resolve]);
        }
        command.args(arguments);
        command
    }
}

fn url(scheme: &str, path: &str) -> String {
    format!("{scheme}://{HOST}{path}")
}
