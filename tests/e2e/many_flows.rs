//! Ten thousand flows at once, through everything that may happen to the membership of their VIP.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use router_tests::app::{ECHO_PORT, Presence};
use router_tests::process::wait_for;
use router_tests::site::{self, ECHO_VIP, Site};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::{self, Runtime};
use tokio::time::timeout;

const FLOWS: usize = 10_000;
/// Opened, or waiting for their echo, at the same time: less than a listener's backlog.
const AT_ONCE: usize = 256;
/// For one step of one flow, on a machine where all of them compete for a core.
const PATIENCE: Duration = Duration::from_secs(20);
/// One end of every flow, and what else there is.
const DESCRIPTORS: u64 = FLOWS as u64 + 1000;

#[test]
fn ten_thousand_flows_outlive_backends_that_join_leave_and_are_drained() {
    allow_descriptors();
    let mut site = Site::new(4).unwrap();
    site.start_nats().unwrap();
    site.start_gateway(|_| ()).unwrap();
    for index in 0..3 {
        start(&mut site, index);
    }
    site.wait_until_served(3).unwrap();
    // From here on this thread has descriptors of its own, since many systems allow no process twice
    // as many.
    unshare(CloneFlags::CLONE_FILES).unwrap();
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut flows = Flows::open(&site, &runtime);
    for name in ["b1", "b2", "b3"] {
        let count = flows.backends[name];
        assert!(count > FLOWS / 6, "{:?}", flows.backends);
    }
    flows.echo(&runtime, "before anything changed");

    start(&mut site, 3);
    site.wait_until_served(4).unwrap();
    flows.echo(&runtime, "after b4 joined");

    site.app(0).set_presence(Presence::Unregistered);
    site.wait_until_spared("b1", site::echo_tcp).unwrap();
    flows.echo(&runtime, "after b1 left");

    let drained = SocketAddr::from((site.lab.backend_address(1), ECHO_PORT));
    let mut drain = site.viaduct().unwrap();
    drain.args(["drain", &drained.to_string(), "--config"]);
    assert!(drain.arg(site.config_path()).status().unwrap().success());
    site.wait_until_spared("b2", site::echo_tcp).unwrap();
    flows.echo(&runtime, "after b2 was drained");

    site.app(0).set_presence(Presence::Registered);
    wait_for("b1 to get something new", || {
        (site.lab.client.run(site::echo_tcp).ok()? == "b1").then_some(())
    })
    .unwrap();
    flows.echo(&runtime, "after b1 came back");
}

fn start(site: &mut Site, index: usize) {
    let app = site.start_app(index).unwrap();
    app.set_presence(Presence::Registered);
}

/// Connections of the client to the echo VIP.
struct Flows {
    connections: Vec<TcpStream>,
    /// How many each backend took.
    backends: BTreeMap<String, usize>,
    rounds: u64,
}

impl Flows {
    fn open(site: &Site, runtime: &Runtime) -> Flows {
        // Sockets stay in the namespace where they were opened, whoever uses them.
        let opened: Vec<(TcpStream, String)> = site
            .lab
            .client
            .run(|| {
                let each = (0..FLOWS).map(|number| async move {
                    let opened = timeout(PATIENCE, connect()).await;
                    let opened = opened.context("waited").and_then(|opened| opened);
                    opened.with_context(|| format!("open flow {number}"))
                });
                let all = stream::iter(each).buffer_unordered(AT_ONCE);
                runtime.block_on(all.try_collect())
            })
            .unwrap_or_else(|error| panic!("{error:#}; {}", counters(site)));
        let mut flows = Flows {
            connections: Vec::new(),
            backends: BTreeMap::new(),
            rounds: 0,
        };
        for (connection, backend) in opened {
            flows.connections.push(connection);
            *flows.backends.entry(backend).or_default() += 1;
        }
        flows
    }

    /// Every one of them gets back what it sends.
    fn echo(&mut self, runtime: &Runtime, when: &str) {
        self.rounds += 1;
        let round = self.rounds;
        let each = self.connections.iter_mut().enumerate();
        let each = each.map(|(number, connection)| async move {
            let sent = (round << 32 | number as u64).to_be_bytes();
            let echoed = timeout(PATIENCE, exchange(connection, sent)).await;
            echoed.context("waited").and_then(|echoed| echoed).err()
        });
        let all = stream::iter(each).buffer_unordered(AT_ONCE);
        let errors = all.filter_map(std::future::ready).collect();
        let lost: Vec<anyhow::Error> = runtime.block_on(errors);
        let first = lost.first();
        assert!(lost.is_empty(), "{} lost {when}: {first:?}", lost.len());
    }
}

/// The connection and the name that it is greeted with.
async fn connect() -> anyhow::Result<(TcpStream, String)> {
    let mut connection = TcpStream::connect(ECHO_VIP).await.context("connect")?;
    connection.set_nodelay(true)?;
    let mut greeting = Vec::new();
    while greeting.last() != Some(&b'\n') {
        greeting.push(connection.read_u8().await.context("read the greeting")?);
    }
    greeting.pop();
    Ok((connection, String::from_utf8(greeting)?))
}

async fn exchange(connection: &mut TcpStream, sent: [u8; 8]) -> anyhow::Result<()> {
    connection.write_all(&sent).await.context("write")?;
    let mut echoed = [0; 8];
    connection.read_exact(&mut echoed).await.context("read")?;
    ensure!(echoed == sent, "{echoed:?} came back for {sent:?}");
    Ok(())
}

fn allow_descriptors() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let most = most.max(DESCRIPTORS);
    setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, most).unwrap();
}

/// What the gateway says became of the packets.
fn counters(site: &Site) -> String {
    match site.admin("/v1/stats") {
        Ok(response) => response.body,
        Err(error) => format!("{error:#}"),
    }
}
