//! What changes under load fails no request, ends no WebSocket and leaks no memory.
//!
//! Clients go on until told to stop, and count; a request is lost only if no retry could have saved
//! it, and none here is.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use router_tests::app::{HOST, HTTP_PORT, Presence};
use router_tests::client::{self, HttpClient, TIMEOUT};
use router_tests::lab::FRONT;
use router_tests::nats::{self, Publisher};
use router_tests::process::wait_for;
use router_tests::site::{PROXY, Site};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use viaduct::config::{CertificateFiles, Config};

const CLIENTS: usize = 4;

/// No client makes more requests, so that a test that hangs ends.
const MAX_REQUESTS: usize = 1_000_000;

const TLS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(FRONT), 443);

#[test]
fn no_request_fails_while_backends_are_killed_and_come_back() {
    // Whoever is back is to be tried again soon.
    let soon = |config: &mut Config| {
        config.http.ejection.base = Duration::from_millis(100);
        config.http.ejection.max = Duration::from_millis(100);
    };
    let mut site = Site::running_with(3, soon).unwrap();
    let load = Load::start(&site, kept_alive);
    for round in 0..9 {
        let index = round % 3;
        load.wait_for_more(200);
        site.kill_app(index);
        load.wait_for_more(200);
        site.start_app(index)
            .unwrap()
            .set_presence(Presence::Registered);
        let served = Arc::clone(&site.app(index).served);
        wait_for("the instance to be served again", || {
            let is_served = served.http_requests.load(Ordering::Relaxed) > 0;
            (is_served || load.has_failed()).then_some(())
        })
        .unwrap();
    }
    load.end();
}

#[test]
fn no_request_fails_while_its_route_changes_a_thousand_times() {
    let site = Site::running(3).unwrap();
    // What it says from here on, the test says for it.
    site.app(2).set_presence(Presence::Silent);
    let load = Load::start(&site, kept_alive);
    let mut publisher = Publisher::connect(&site.lab).unwrap();
    let message = registration(&site, 2, HOST);
    for change in 0..1000 {
        let subject = ["router.unregister", "router.register"][change % 2];
        publisher.publish(subject, &message).unwrap();
    }
    wait_until_known(&site, &mut publisher, "last.example.com");
    load.wait_for_more(200);
    load.end();
}

#[test]
fn no_handshake_fails_while_certificates_are_replaced() {
    let made: Vec<_> = (0..5)
        .map(|_| rcgen::generate_simple_self_signed([HOST.to_owned()]).unwrap())
        .collect();
    let mut site = Site::new(1).unwrap();
    let folder = site.lab.folder().to_owned();
    let replace = |made: &rcgen::CertifiedKey<rcgen::KeyPair>| {
        // Between the two the gateway sees a key that is not the certificate's, and keeps the last pair.
        std::fs::write(folder.join("server.key"), made.signing_key.serialize_pem()).unwrap();
        std::fs::write(folder.join("server.crt"), made.cert.pem()).unwrap();
    };
    replace(&made[0]);
    site.start_nats().unwrap();
    site.start_gateway(|config| {
        config.http.tls.listen = vec![([0, 0, 0, 0], TLS.port()).into()];
        config.http.tls.certificates = vec![CertificateFiles {
            certificate_file: folder.join("server.crt"),
            key_file: folder.join("server.key"),
        }];
    })
    .unwrap();
    site.start_app(0)
        .unwrap()
        .set_presence(Presence::Registered);
    site.wait_until_served(1).unwrap();

    let mut roots = RootCertStore::empty();
    for made in &made {
        roots.add(made.cert.der().clone()).unwrap();
    }
    let config = ClientConfig::builder().with_root_certificates(roots);
    let mut config = config.with_no_client_auth();
    // Each connection is to see a certificate.
    config.resumption = tokio_rustls::rustls::client::Resumption::disabled();
    let config = Arc::new(config);
    let of_load = Arc::clone(&config);
    let load = Load::start(&site, move |done| {
        while !done() {
            over_tls(&of_load)?;
        }
        Ok(())
    });
    for made in &made[1..] {
        replace(made);
        wait_for("the new certificate", || {
            let shown = site.lab.client.run(|| over_tls(&config).unwrap());
            (shown == *made.cert.der()).then_some(())
        })
        .unwrap();
    }
    load.wait_for_more(20);
    load.end();
}

#[test]
fn a_thousand_websockets_survive_ten_thousand_route_changes() {
    const WEBSOCKETS: usize = 1000;
    const BATCHES: usize = 100;
    /// Of each batch; a registration and its end are two changes.
    const REGISTRATIONS: usize = 50;
    // The client's ends and the instance's are of this process.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let site = Site::running(2).unwrap();
    let mut sockets: Vec<_> = site.lab.client.run(|| {
        let open = || {
            let mut socket = HttpClient::connect(PROXY)?.upgrade(HOST, "/")?;
            client::read_line(&mut socket)?;
            anyhow::Ok(socket)
        };
        (0..WEBSOCKETS).map(|_| open().unwrap()).collect()
    });
    let mut publisher = Publisher::connect(&site.lab).unwrap();
    for (batch, socket) in sockets.iter_mut().enumerate().take(BATCHES) {
        let mut messages = Vec::new();
        for n in 0..REGISTRATIONS {
            // Other hosts, other paths of the same host, and every tenth time the host itself.
            let uri = match n % 10 {
                0 => HOST.to_owned(),
                1..5 => format!("{HOST}/{batch}/{n}"),
                _ => format!("h{n}.example.com"),
            };
            let message = registration(&site, n % 2, &uri);
            nats::encode(&mut messages, "router.unregister", message.as_bytes());
            nats::encode(&mut messages, "router.register", message.as_bytes());
        }
        publisher.publish_encoded(&messages).unwrap();
        wait_until_known(&site, &mut publisher, &format!("batch{batch}.example.com"));
        // One of them on the way.
        echo(socket, batch).unwrap_or_else(|error| panic!("after batch {batch}: {error:#}"));
    }
    for (n, socket) in sockets.iter_mut().enumerate() {
        echo(socket, n).unwrap_or_else(|error| panic!("WebSocket {n}: {error:#}"));
    }
}

#[test]
fn memory_does_not_grow_from_round_to_round() {
    const WARM_UP: usize = 3;
    const ROUNDS: usize = 8;
    /// What allocators and the kernel may keep beyond the warm-up. A leak of 1 KiB a request takes
    /// more.
    const SLACK_BYTES: u64 = 16 << 20;
    let mut site = Site::running(2).unwrap();
    let mut publisher = Publisher::connect(&site.lab).unwrap();
    let mut warm = 0;
    for round in 0..WARM_UP + ROUNDS {
        if round == WARM_UP {
            warm = site.gateway().memory().unwrap();
        }
        mixed_load(&site, &mut publisher, round);
    }
    let after = site.gateway().memory().unwrap();
    assert!(
        after <= warm + SLACK_BYTES,
        "{} KiB after {WARM_UP} rounds, {} KiB after {ROUNDS} more",
        warm >> 10,
        after >> 10
    );
}

/// 2700 requests by kept-alive, new and upgraded connections and over HTTP/2; 400 route changes.
fn mixed_load(site: &Site, publisher: &mut Publisher, round: usize) {
    site.lab.client.run(|| {
        let mut kept = HttpClient::connect(PROXY).unwrap();
        for n in 0..1000 {
            assert_eq!(kept.get(HOST, &format!("/{n}")).unwrap().status, 200);
        }
        for _ in 0..100 {
            assert_eq!(client::get(PROXY, HOST, "/").unwrap().status, 200);
            assert_eq!(client::get(PROXY, "nobody", "/").unwrap().status, 404);
        }
        for _ in 0..500 {
            drop(
                HttpClient::connect(PROXY)
                    .unwrap()
                    .upgrade(HOST, "/")
                    .unwrap(),
            );
        }
    });
    let mut h2load = site.lab.client.command("h2load");
    h2load.args(["-n1000", "-c10", "-m10", &format!("--connect-to={PROXY}")]);
    let output = h2load.arg(format!("http://{HOST}/")).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("1000 succeeded"), "{text}");

    let mut messages = Vec::new();
    for subject in ["router.register", "router.unregister"] {
        for n in 0..200 {
            let message = registration(site, n % 2, &format!("h{n}.round{round}.example.com"));
            nats::encode(&mut messages, subject, message.as_bytes());
        }
    }
    publisher.publish_encoded(&messages).unwrap();
    wait_until_known(site, publisher, "round.example.com");
}

/// Clients that make requests until they are told to stop.
struct Load {
    state: Arc<LoadState>,
    clients: Vec<JoinHandle<anyhow::Result<()>>>,
}

#[derive(Default)]
struct LoadState {
    stopped: AtomicBool,
    requests: AtomicUsize,
}

impl Load {
    /// Each client asks before each request whether it is done.
    fn start(
        site: &Site,
        client: impl Fn(&dyn Fn() -> bool) -> anyhow::Result<()> + Clone + Send + 'static,
    ) -> Load {
        let state = Arc::new(LoadState::default());
        let clients = (0..CLIENTS).map(|n| {
            let (state, client) = (Arc::clone(&state), client.clone());
            site.lab.client.spawn(&format!("client-{n}"), move || {
                client(&|| {
                    let made = state.requests.fetch_add(1, Ordering::Relaxed);
                    state.stopped.load(Ordering::Relaxed) || made >= CLIENTS * MAX_REQUESTS
                })
            })
        });
        let clients = clients.collect();
        Load { state, clients }
    }

    #[track_caller]
    fn wait_for_more(&self, requests: usize) {
        let made = || self.state.requests.load(Ordering::Relaxed);
        let wanted = made() + requests;
        wait_for("more requests", || {
            (made() >= wanted || self.has_failed()).then_some(())
        })
        .unwrap();
    }

    /// A client ended before it was told to. [`Load::end`] says why.
    fn has_failed(&self) -> bool {
        self.clients.iter().any(JoinHandle::is_finished)
    }

    /// Fails if a request of any client did.
    #[track_caller]
    fn end(self) {
        self.state.stopped.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.join().unwrap().unwrap();
        }
    }
}

/// Requests on one connection after another, a hundred each.
fn kept_alive(done: &dyn Fn() -> bool) -> anyhow::Result<()> {
    loop {
        let mut connection = HttpClient::connect(PROXY)?;
        for _ in 0..100 {
            if done() {
                return Ok(());
            }
            let response = connection.get(HOST, "/")?;
            ensure!(
                response.status == 200,
                "{} {}",
                response.status,
                response.body
            );
        }
    }
}

/// A request over TLS on a connection of its own: the certificate that was shown.
fn over_tls(config: &Arc<ClientConfig>) -> anyhow::Result<CertificateDer<'static>> {
    let tcp = TcpStream::connect_timeout(&TLS, TIMEOUT).context("connect")?;
    tcp.set_read_timeout(Some(TIMEOUT))?;
    let name = ServerName::try_from(HOST).expect("the host is a name");
    let tls = ClientConnection::new(Arc::clone(config), name)?;
    let mut stream = StreamOwned::new(tls, tcp);
    let request = format!("GET / HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).context("write")?;
    let mut response = String::new();
    stream.read_to_string(&mut response).context("read")?;
    ensure!(response.starts_with("HTTP/1.1 200 "), "{response}");
    let shown = stream.conn.peer_certificates().and_then(<[_]>::first);
    Ok(shown.context("no certificate")?.clone())
}

fn echo(socket: &mut std::io::BufReader<TcpStream>, n: usize) -> anyhow::Result<()> {
    let message = format!("message {n}");
    socket.get_mut().write_all(message.as_bytes())?;
    let mut answer = vec![0; message.len()];
    socket.read_exact(&mut answer)?;
    ensure!(answer == message.as_bytes(), "another answer");
    Ok(())
}

/// What an instance's registration says of its HTTP port, for another URI.
fn registration(site: &Site, index: usize, uri: &str) -> String {
    let (address, name) = (site.lab.backend_address(index), format!("b{}", index + 1));
    format!(
        r#"{{"host":"{address}","port":{HTTP_PORT},"uris":["{uri}"],"app":"lab","private_instance_id":"{name}"}}"#
    )
}

/// Registers a host and waits until it is served, and so all that was published before; then ends it.
fn wait_until_known(site: &Site, publisher: &mut Publisher, host: &str) {
    let message = registration(site, 0, host);
    publisher.publish("router.register", &message).unwrap();
    wait_for(host, || {
        (site.get(host, "/").ok()?.status == 200).then_some(())
    })
    .unwrap();
    publisher.publish("router.unregister", &message).unwrap();
}
