//! Rows `first-request` and `first-packet`: from publishing a registration to its first service.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::bail;
use nix::poll::{PollFd, PollFlags, ppoll};
use router_tests::app::{ECHO_PORT, HTTP_PORT};
use router_tests::client::HttpClient;
use router_tests::process::DEADLINE;
use router_tests::site::PROXY;
use serde_json::json;

use super::{Bench, register};
use crate::report::{Report, percentile};

/// Of each layer in a round.
const SAMPLES: usize = 100;

/// Between two probes for a VIP that may not be there yet.
const PROBE_EVERY: Duration = Duration::from_micros(100);

const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 20);
const FIRST_VIP_PORT: u16 = 10_000;
const VIP_PORTS: usize = 40_000;

impl Bench {
    /// Adds to the rows `PREFIX-request` and `PREFIX-packet`.
    pub(super) fn first_service(
        &mut self,
        prefix: &str,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let mut connection = self.site.lab.client.run(|| HttpClient::connect(PROXY))?;
        let socket = self.site.lab.client.run(|| UdpSocket::bind("0.0.0.0:0"))?;
        socket.set_nonblocking(true)?;
        let mut requests = Vec::with_capacity(SAMPLES);
        let mut packets = Vec::with_capacity(SAMPLES);
        for _ in 0..SAMPLES {
            self.firsts += 1;
            let unique = self.firsts;
            requests
                .push(self.first_request(&mut connection, &format!("new-{unique}.example.com"))?);
            let port = u16::try_from(unique % VIP_PORTS).expect("less than all ports");
            let vip = SocketAddr::from((VIP, FIRST_VIP_PORT + port));
            packets.push(self.first_packet(&socket, vip)?);
        }
        for (kind, mut samples) in [("request", requests), ("packet", packets)] {
            let row = self.row(&format!("{prefix}-{kind}"));
            for (metric, share) in [("p50_ms", 0.50), ("p99_ms", 0.99), ("worst_ms", 1.0)] {
                report.add(&row, "viaduct", metric, percentile(&mut samples, share));
            }
        }
        Ok(())
    }

    /// Milliseconds from publishing a new host to the end of its first request that was served.
    fn first_request(&mut self, connection: &mut HttpClient, host: &str) -> anyhow::Result<f64> {
        let message = register(host, HTTP_PORT);
        let start = self.send(&message)?;
        while connection.get(host, "/")?.status != 200 {
            if start.elapsed() > DEADLINE {
                bail!("{host} was never served");
            }
        }
        let elapsed = start.elapsed();
        self.send(&("router.unregister", message.1))?;
        Ok(elapsed.as_secs_f64() * 1e3)
    }

    /// Milliseconds from publishing a new VIP to the first answer to a datagram.
    fn first_packet(&mut self, socket: &UdpSocket, vip: SocketAddr) -> anyhow::Result<f64> {
        let backend = self.site.lab.backend_address(0).to_string();
        let message = json!({"host": backend, "port": ECHO_PORT, "vips": [format!("udp/{vip}")]});
        let start = self.send(&("router.register", message.clone()))?;
        let mut answer = [0; 64];
        let elapsed = 'answered: loop {
            // Until the VIP is there the kernel says that nobody can be reached; that is no answer.
            let _ = socket.send_to(b"first", vip);
            // Asleep until an answer comes: a prober that spins would keep the gateway from its core.
            let mut sockets = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            ppoll(&mut sockets, Some(PROBE_EVERY.into()), None)?;
            while let Ok((_, from)) = socket.recv_from(&mut answer) {
                if from == vip {
                    break 'answered start.elapsed();
                }
            }
            if start.elapsed() > DEADLINE {
                bail!("udp/{vip} was never served");
            }
        };
        self.send(&("router.unregister", message))?;
        Ok(elapsed.as_secs_f64() * 1e3)
    }
}
