//! A nats-server for the tests of the sources that speak to one, on a port of its own.

use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A real nats-server, ended with the test.
pub struct Server {
    child: Child,
    pub address: SocketAddr,
    /// Where other servers of its cluster find it.
    pub cluster: Option<SocketAddr>,
}

impl Server {
    /// On a port the server finds by itself, or on that of an earlier one.
    pub async fn start(port: Option<u16>) -> Server {
        Server::start_with(port, &[]).await
    }

    pub async fn start_with(port: Option<u16>, arguments: &[&str]) -> Server {
        let directory = tempfile::tempdir().unwrap();
        let port = port.map_or("-1".to_owned(), |port| port.to_string());
        let child = Command::new("nats-server")
            .args(["-a", "127.0.0.1", "-p", &port, "--ports_file_dir"])
            .arg(directory.path())
            .args(arguments)
            .stderr(Stdio::null())
            .spawn()
            .expect("nats-server is installed");
        let ports = directory
            .path()
            .join(format!("nats-server_{}.ports", child.id()));
        let address = until("the server tells its port", || address(&ports, "nats")).await;
        let cluster = self::address(&ports, "cluster");
        Server {
            child,
            address,
            cluster,
        }
    }

    /// One of a configuration file; what it says of the listener is overruled.
    pub async fn start_configured(port: Option<u16>, configuration: &str) -> Server {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(configuration.as_bytes()).unwrap();
        Server::start_with(port, &["-c", file.path().to_str().unwrap()]).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn address(ports: &Path, kind: &str) -> Option<SocketAddr> {
    let ports: serde_json::Value = serde_json::from_slice(&std::fs::read(ports).ok()?).ok()?;
    let url = ports[kind][0].as_str()?;
    url.split_once("://")?.1.parse().ok()
}

/// Polls until there is an answer.
pub async fn until<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(answer) = poll() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
