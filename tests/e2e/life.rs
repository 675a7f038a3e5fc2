//! A gateway's life under load: replaced by another process, started by a service manager, drained.

use std::io::{BufReader, ErrorKind, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use router_tests::app::{HOST, Presence};
use router_tests::client::{self, HttpClient};
use router_tests::process::{DEADLINE, Process, wait_for};
use router_tests::site::{self, ECHO_VIP, PROXY, Site};
use viaduct::config::Config;

/// Longer than the applications' heartbeat, so that a successor that is ready knows them all.
const GRACE: Duration = Duration::from_millis(1500);

#[test]
fn no_request_fails_while_one_process_takes_the_place_of_another() {
    let mut site = Site::running_with(2, |config| handover(config, 2)).unwrap();
    let socket = socket(&site);
    let mut flows: Vec<_> = site
        .lab
        .client
        .run(|| (0..5).map(|_| client::tcp(ECHO_VIP).unwrap()).collect());
    let load = Load::start(&site);
    // More workers, fewer, and one for all.
    for workers in [3, 2, 1] {
        load.wait_for_more(100);
        let mut before = take_over(&mut site, |config| handover(config, workers));
        site.wait_until("/readyz").unwrap();
        load.wait_for_more(100);
        assert!(before.wait().unwrap().success(), "{}", before.log());
    }
    load.wait_for_more(100);
    assert_eq!(load.stop(), Vec::<String>::new());
    assert!(socket.exists());

    for flow in &mut flows {
        assert_eq!(flow.echo(b"still here").unwrap(), b"still here");
    }
    site.kill_app(0);
    site.start_app(0)
        .unwrap()
        .set_presence(Presence::Registered);
    site.wait_until_served(2).unwrap();
}

#[test]
fn a_process_that_fails_to_take_over_changes_nothing() {
    let mut site = Site::running_with(2, |config| handover(config, 2)).unwrap();
    let load = Load::start(&site);
    let failures: [fn(&mut Config); 3] = [
        // Refused before it has layer 4,
        |config| config.http.listen.push(([192, 0, 2, 99], 80).into()),
        // by layer 4,
        |config| config.l4.interfaces.push("eth9".to_owned()),
        // and after it was adopted.
        |config| {
            config.nats.servers = vec!["nats://127.0.0.1:1".to_owned()];
            config.l4.vip_ranges.clear();
            config.handover.ready_timeout = Duration::from_millis(500);
        },
    ];
    for change in failures {
        let running = site.gateway.take();
        site.spawn_gateway(|config| {
            handover(config, 2);
            change(config);
        })
        .unwrap();
        assert!(!site.gateway().wait().unwrap().success());
        site.gateway = running;
        load.wait_for_more(50);
    }
    // The one that began by withdrawing the VIPs has to be undone.
    site.wait_until_served(2).unwrap();
    assert_eq!(load.stop(), Vec::<String>::new());
    site.app(1).set_presence(Presence::Unregistered);
    site.wait_until_spared("b2", site::echo_tcp).unwrap();
    site.app(1).set_presence(Presence::Registered);
    site.wait_until_served(2).unwrap();
}

#[test]
fn a_process_that_is_killed_while_it_takes_over_changes_nothing() {
    let mut site = Site::running_with(1, |config| handover(config, 1)).unwrap();
    let load = Load::start(&site);
    let running = site.gateway.take();
    site.spawn_gateway(|config| {
        handover(config, 2);
        config.nats.startup_grace = Duration::from_secs(3600);
    })
    .unwrap();
    wait_for("layer 4 to be taken over", || {
        let log = site.gateway().log();
        log.contains("another agent takes layer 4 over")
            .then_some(())
    })
    .unwrap();
    site.gateway().kill();
    site.gateway = running;
    wait_for("layer 4 to be taken back", || {
        let log = site.gateway().log();
        log.contains("layer 4 is taken back").then_some(())
    })
    .unwrap();
    load.wait_for_more(50);
    assert_eq!(load.stop(), Vec::<String>::new());
    site.app(0).set_presence(Presence::Unregistered);
    wait_for("the VIP to be gone", || {
        site.lab.client.run(site::echo_tcp).is_err().then_some(())
    })
    .unwrap();
    site.app(0).set_presence(Presence::Registered);
    site.wait_until_served(1).unwrap();
}

#[test]
fn sigusr2_starts_the_binary_that_takes_over() {
    let mut site = Site::running_with(1, |config| handover(config, 1)).unwrap();
    let load = Load::start(&site);
    site.gateway().signal(Signal::SIGUSR2);
    assert!(site.gateway().wait().unwrap().success());
    load.wait_for_more(50);
    let failures = load.stop();
    // The successor is nobody's child any more.
    let log = site.gateway().log();
    let (_, pid) = log.rsplit_once("another process serves pid=").unwrap();
    let pid: i32 = pid.split_whitespace().next().unwrap().parse().unwrap();
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    wait_for("the successor to end", || site.admin("/livez").err()).unwrap();
    assert_eq!(failures, Vec::<String>::new());
}

#[test]
fn two_processes_do_not_write_to_layer_4() {
    let mut site = Site::running(1).unwrap();
    let running = site.gateway.take();
    site.spawn_gateway(|config| {
        config.http.listen.clear();
        config.admin.listen = "127.0.0.1:0".parse().unwrap();
    })
    .unwrap();
    assert!(!site.gateway().wait().unwrap().success());
    let log = site.gateway().log();
    assert!(log.contains("another viaduct runs with it"), "{log}");
    site.gateway = running;
    site.wait_until_served(1).unwrap();
}

#[test]
fn a_drained_gateway_says_so_serves_on_and_then_ends() {
    let mut site = Site::running_with(1, |config| {
        config.http.timeouts.drain_wait = Duration::from_secs(3600);
    })
    .unwrap();
    let mut kept = site.lab.client.run(|| HttpClient::connect(PROXY).unwrap());
    // The same as the signal.
    let mut drain = site.viaduct().unwrap();
    drain.args(["drain", "--gateway", "--config"]);
    assert!(drain.arg(site.config_path()).status().unwrap().success());
    wait_for("503", || {
        let answer = site.admin("/readyz").ok()?;
        (answer.status == 503 && answer.body.contains("draining")).then_some(())
    })
    .unwrap();
    assert_eq!(site.get(HOST, "/").unwrap().status, 200);
    assert_eq!(kept.get(HOST, "/").unwrap().header("connection"), None);
    let mut upgraded = site.lab.client.run(|| {
        let client = HttpClient::connect(PROXY).unwrap();
        client.upgrade(HOST, "/").unwrap()
    });
    assert_eq!(client::read_line(&mut upgraded).unwrap(), "b1");

    // Ends the wait.
    site.gateway().signal(Signal::SIGUSR1);
    wait_for("no new connection", || site.get(HOST, "/").err()).unwrap();
    site.gateway().ensure_alive().unwrap();
    drop(upgraded);
    assert!(site.gateway().wait().unwrap().success());
}

#[test]
fn a_service_manager_hands_over_sockets_and_is_told_of_each_step() {
    let mut site = Site::new(1).unwrap();
    site.start_nats().unwrap();
    let http = site.lab.gateway.run(|| TcpListener::bind(PROXY).unwrap());
    let manager = Manager::new(&site);
    site.write_config(|config| config.http.listen = vec![PROXY])
        .unwrap();
    let command = manager.command(&site, &http);
    site.gateway = Some(Process::start("viaduct", command, site.lab.folder()).unwrap());
    manager.expect("READY=1");
    site.wait_until("/readyz").unwrap();
    site.start_app(0)
        .unwrap()
        .set_presence(Presence::Registered);
    site.wait_until_served(1).unwrap();
    site.gateway().signal(Signal::SIGHUP);
    manager.expect("RELOADING=1");
    manager.expect("READY=1");

    // Between two processes connections wait.
    site.gateway().signal(Signal::SIGTERM);
    manager.expect("STOPPING=1");
    assert!(site.gateway().wait().unwrap().success());
    let waiting = site.lab.client.spawn("waiting", || {
        let mut stream = TcpStream::connect(PROXY).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let request = format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        client::read_line(&mut BufReader::new(stream)).unwrap()
    });
    let command = manager.command(&site, &http);
    site.write_config(|config| {
        config.http.listen = vec![PROXY];
        config.nats.startup_grace = GRACE;
    })
    .unwrap();
    site.gateway = Some(Process::start("viaduct", command, site.lab.folder()).unwrap());
    // It is answered, if not by whom: routes are yet to come.
    let answer = waiting.join().unwrap();
    assert!(answer.starts_with("HTTP/1.1 "), "{answer}");
    site.wait_until_served(1).unwrap();
}

#[test]
fn a_socket_that_is_not_configured_is_refused_by_name() {
    let mut site = Site::new(1).unwrap();
    let other = site
        .lab
        .gateway
        .run(|| TcpListener::bind("127.0.0.1:8081").unwrap());
    site.write_config(|_| ()).unwrap();
    let command = Manager::new(&site).command(&site, &other);
    site.gateway = Some(Process::start("viaduct", command, site.lab.folder()).unwrap());
    assert!(!site.gateway().wait().unwrap().success());
    let log = site.gateway().log();
    assert!(
        log.contains("LISTEN_FDS") && log.contains("127.0.0.1:8081"),
        "{log}"
    );
}

#[test]
fn a_reload_listens_on_other_addresses() {
    let mut site = Site::running(1).unwrap();
    let load = Load::start(&site);
    let other = SocketAddr::new(PROXY.ip(), 8088);
    site.write_config(|config| config.http.listen.push(other))
        .unwrap();
    site.gateway().signal(Signal::SIGHUP);
    let get = |site: &Site| site.lab.client.run(|| client::get(other, HOST, "/"));
    wait_for("the new address", || get(&site).ok()).unwrap();
    site.write_config(|_| ()).unwrap();
    site.gateway().signal(Signal::SIGHUP);
    wait_for("the new address to be gone", || get(&site).err()).unwrap();
    load.wait_for_more(50);
    assert_eq!(load.stop(), Vec::<String>::new());
}

pub(crate) fn handover(config: &mut Config, workers: usize) {
    let folder = config.l4.pin_path.parent().unwrap().parent().unwrap();
    config.handover.socket = Some(folder.join("handover.sock"));
    config.nats.startup_grace = GRACE;
    config.http.workers = workers;
}

fn socket(site: &Site) -> PathBuf {
    let mut config = site.config();
    handover(&mut config, 1);
    config.handover.socket.unwrap()
}

/// Starts another process beside the running one, which is returned.
pub(crate) fn take_over(site: &mut Site, change: impl FnOnce(&mut Config)) -> Process {
    let running = site.gateway.take().unwrap();
    site.spawn_gateway(change).unwrap();
    running
}

/// Requests without end, on new connections and on kept-alive ones.
struct Load {
    stop: Arc<AtomicBool>,
    answers: Arc<Mutex<usize>>,
    clients: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(site: &Site) -> Load {
        let (stop, answers) = (Arc::<AtomicBool>::default(), Arc::<Mutex<usize>>::default());
        let spawn = |name: &str, keep_alive: bool| {
            let (stop, answers) = (Arc::clone(&stop), Arc::clone(&answers));
            site.lab.client.spawn(name, move || {
                let mut kept = None;
                let mut failures = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    match exchange(&mut kept) {
                        Ok(()) => *answers.lock().unwrap() += 1,
                        Err(error) => failures.push(format!("keep alive {keep_alive}: {error:#}")),
                    }
                    if !keep_alive {
                        kept = None;
                    }
                }
                failures
            })
        };
        let clients = [
            ("new-1", false),
            ("new-2", false),
            ("kept-1", true),
            ("kept-2", true),
        ];
        let clients = clients.map(|(name, keep_alive)| spawn(name, keep_alive));
        Load {
            clients: clients.into(),
            stop,
            answers,
        }
    }

    fn wait_for_more(&self, count: usize) {
        let before = *self.answers.lock().unwrap();
        wait_for("answers", || {
            (*self.answers.lock().unwrap() >= before + count).then_some(())
        })
        .unwrap();
    }

    /// What failed.
    fn stop(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        let clients = self.clients.into_iter();
        let failures = clients.flat_map(|client| client.join().unwrap());
        failures.take(10).collect()
    }
}

/// One request, on the connection that was left open if one was.
fn exchange(kept: &mut Option<HttpClient>) -> anyhow::Result<()> {
    let mut client = match kept.take() {
        Some(client) => client,
        None => HttpClient::connect(PROXY)?,
    };
    let response = client.get(HOST, "/")?;
    anyhow::ensure!(
        response.status == 200,
        "{} {}",
        response.status,
        response.body
    );
    if response.header("connection") != Some("close") {
        *kept = Some(client);
    }
    Ok(())
}

/// Plays the service manager: sockets in, notifications out.
struct Manager {
    notified: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(site: &Site) -> Manager {
        let path = site.lab.folder().join("notify.sock");
        let notified = UnixDatagram::bind(&path).unwrap();
        notified
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        Manager { notified, path }
    }

    /// The gateway with `socket` as descriptor 3 (sd_listen_fds(3)).
    fn command(&self, site: &Site, socket: &TcpListener) -> Command {
        let flags = FcntlArg::F_SETFD(FdFlag::empty());
        fcntl(socket, flags).unwrap();
        let mut command = site.lab.gateway.command("bash");
        let descriptor = socket.as_raw_fd();
        command.arg("-c").arg(format!(
            "exec 3<&{descriptor}; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\""
        ));
        command.arg("bash").arg(site::agent().unwrap());
        command.args(["run", "--config"]).arg(site.config_path());
        command.env("NOTIFY_SOCKET", &self.path);
        command
    }

    fn expect(&self, wanted: &str) {
        let mut message = [0; 1024];
        wait_for(wanted, || match self.notified.recv(&mut message) {
            Ok(length) => String::from_utf8_lossy(&message[..length])
                .lines()
                .any(|line| line == wanted)
                .then_some(()),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                None
            }
        })
        .unwrap();
    }
}
