//! An application instance: serves TCP, UDP and HTTP in a backend's namespace, announces itself by
//! heartbeat over NATS as an application of Cloud Foundry would, and counts what reaches it.
//!
//! One thread with a single-threaded runtime each. [`App::kill`] closes every socket at once, which
//! is all that other hosts see of a killed process.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{oneshot, watch};

use crate::lab::BACK;
use crate::nats;
use crate::netns::Netns;

/// The virtual address that every instance serves behind.
pub const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// The name that every instance serves HTTP for.
pub const HOST: &str = "hello.example.com";

/// Ports of the VIP, and of each instance behind it.
pub const VIP_HTTP_PORT: u16 = 80;
pub const VIP_ECHO_PORT: u16 = 7;
pub const HTTP_PORT: u16 = 8080;
pub const ECHO_PORT: u16 = 9000;

/// How often an instance repeats its registrations.
pub const HEARTBEAT: Duration = Duration::from_secs(1);

/// Bytes of a request's head that an instance reads before it hangs up.
const HEAD_BYTES: u64 = 64 * 1024;

/// A running instance.
pub struct App {
    pub name: String,
    pub address: Ipv4Addr,
    pub served: Arc<Served>,
    presence: watch::Sender<Presence>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What reached an instance.
#[derive(Debug, Default)]
pub struct Served {
    /// Connections to the echo service.
    pub tcp: AtomicU64,
    /// Datagrams to the echo service.
    pub udp: AtomicU64,
    pub http_requests: AtomicU64,
}

/// What an instance tells the gateway of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Nothing, as one that hangs.
    Silent,
    /// That it serves, every [`HEARTBEAT`] and whenever a gateway starts.
    Registered,
    /// Once, that it serves no more.
    Unregistered,
}

impl App {
    /// Starts an instance that serves and is silent.
    pub fn start(netns: &Netns, name: &str, address: Ipv4Addr) -> anyhow::Result<App> {
        let served = Arc::new(Served::default());
        let (presence, wanted) = watch::channel(Presence::Silent);
        let (stop, stopped) = oneshot::channel();
        let (ready, started) = std::sync::mpsc::channel();
        let instance = Instance {
            name: name.into(),
            served: served.clone(),
        };
        let thread = netns.spawn(name, move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime
                .expect("the system has file descriptors left")
                .block_on(async {
                    match instance.listen(address).await {
                        Ok(()) => {
                            // The receiver waits below.
                            let _ = ready.send(Ok(()));
                            tokio::spawn(announce(address, instance.name.clone(), wanted));
                            let _ = stopped.await;
                        }
                        Err(error) => drop(ready.send(Err(error))),
                    }
                });
        });
        started
            .recv()
            .context("an instance ended before it was ready")??;
        Ok(App {
            name: name.to_owned(),
            address,
            served,
            presence,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    pub fn set_presence(&self, presence: Presence) {
        // Fails only once the instance is gone.
        let _ = self.presence.send(presence);
    }

    pub fn presence(&self) -> Presence {
        *self.presence.borrow()
    }

    /// Ends it without a word to anyone: listeners and connections close at once.
    pub fn kill(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the instance has been printed.
            let _ = thread.join();
        }
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The registrations of an instance: its HTTP port for a host and a VIP alike, its echo port for
/// two VIPs.
pub fn registrations(name: &str, address: Ipv4Addr) -> [Value; 2] {
    let common = |port: u16, uris: Value, vips: Value| {
        json!({
            "host": address.to_string(), "port": port, "uris": uris, "vips": vips,
            "app": "lab", "private_instance_id": name,
        })
    };
    let vip = |proto, port| format!("{proto}/{VIP}:{port}");
    [
        common(HTTP_PORT, json!([HOST]), json!([vip("tcp", VIP_HTTP_PORT)])),
        common(
            ECHO_PORT,
            json!([]),
            json!([vip("tcp", VIP_ECHO_PORT), vip("udp", VIP_ECHO_PORT)]),
        ),
    ]
}

/// Keeps the gateway informed, across restarts of the NATS server.
async fn announce(address: Ipv4Addr, name: Arc<str>, mut wanted: watch::Receiver<Presence>) {
    let server = SocketAddr::from((BACK, nats::PORT)).to_string();
    let options = async_nats::ConnectOptions::new()
        .name(&*name)
        .retry_on_initial_connect()
        .reconnect_delay_callback(|_| Duration::from_millis(100));
    let client = options
        .connect(server)
        .await
        .expect("connecting is retried for ever");
    let mut starts = client
        .subscribe("router.start")
        .await
        .expect("the subject is valid");
    let messages = registrations(&name, address).map(|message| message.to_string());
    loop {
        let subject = match *wanted.borrow_and_update() {
            Presence::Registered => Some("router.register"),
            Presence::Unregistered => Some("router.unregister"),
            Presence::Silent => None,
        };
        for message in subject.iter().flat_map(|_| &messages) {
            let subject = subject.expect("the loop runs only with one");
            // While the server is away the client keeps a bounded number of messages.
            let _ = client.publish(subject, message.clone().into()).await;
        }
        let repeats = *wanted.borrow() == Presence::Registered;
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            _ = starts.next(), if repeats => {}
            () = tokio::time::sleep(HEARTBEAT), if repeats => {}
        }
    }
}

/// What the tasks of an instance share.
#[derive(Clone)]
struct Instance {
    name: Arc<str>,
    served: Arc<Served>,
}

impl Instance {
    /// Binds every port, and serves them from tasks.
    async fn listen(&self, address: Ipv4Addr) -> anyhow::Result<()> {
        let echo = TcpListener::bind((address, ECHO_PORT))
            .await
            .context("bind the echo port")?;
        let http = TcpListener::bind((address, HTTP_PORT))
            .await
            .context("bind the HTTP port")?;
        let datagrams = UdpSocket::bind((address, ECHO_PORT))
            .await
            .context("bind the UDP port")?;
        tokio::spawn(accept(echo, self.clone(), Instance::echo));
        tokio::spawn(accept(http, self.clone(), Instance::http));
        tokio::spawn(self.clone().answer_datagrams(datagrams));
        Ok(())
    }

    async fn answer_datagrams(self, socket: UdpSocket) {
        let mut datagram = vec![0; 64 * 1024];
        // An error is one of an earlier datagram (ICMP), not of the socket.
        loop {
            if let Ok((length, peer)) = socket.recv_from(&mut datagram).await {
                self.served.udp.fetch_add(1, Ordering::Relaxed);
                let answer = [self.name.as_bytes(), b" ", &datagram[..length]].concat();
                let _ = socket.send_to(&answer, peer).await;
            }
        }
    }

    /// Greets with the name, then returns every byte.
    async fn echo(self, mut stream: TcpStream) -> std::io::Result<()> {
        self.served.tcp.fetch_add(1, Ordering::Relaxed);
        stream
            .write_all(format!("{}\n", self.name).as_bytes())
            .await?;
        copy_back(&mut stream).await
    }

    /// HTTP/1.1 with keep-alive: answers any GET with the name, `/headers` with the head it got,
    /// and an upgrade with 101, to echo from there on.
    async fn http(self, stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream);
        loop {
            let head = read_head(&mut reader).await?;
            if head.is_empty() {
                return Ok(());
            }
            self.served.http_requests.fetch_add(1, Ordering::Relaxed);
            let name = &self.name;
            if head.to_ascii_lowercase().contains("\r\nupgrade:") {
                let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
                              Upgrade: websocket\r\n\r\n";
                reader.get_mut().write_all(switch.as_bytes()).await?;
                reader
                    .get_mut()
                    .write_all(format!("{name}\n").as_bytes())
                    .await?;
                return copy_back(&mut reader).await;
            }
            let body = match head.split(' ').nth(1) {
                Some("/headers") => head,
                _ => format!("{name}\n"),
            };
            let length = body.len();
            let response = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\r\n{body}"
            );
            reader.get_mut().write_all(response.as_bytes()).await?;
        }
    }
}

/// Serves each connection from a task of its own; connections are bounded by the lab's clients.
async fn accept<F>(listener: TcpListener, instance: Instance, serve: fn(Instance, TcpStream) -> F)
where
    F: Future<Output = std::io::Result<()>> + Send + 'static,
{
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            tokio::spawn(serve(instance.clone(), stream));
        }
    }
}

/// A request's head with its blank line; empty at the end of the connection.
async fn read_head(reader: &mut BufReader<TcpStream>) -> std::io::Result<String> {
    let mut head = String::new();
    let mut limited = reader.take(HEAD_BYTES);
    while limited.read_line(&mut head).await? > 0 {
        if head.ends_with("\r\n\r\n") {
            return Ok(head);
        }
    }
    Ok(String::new())
}

async fn copy_back(
    stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin),
) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return stream.shutdown().await,
            length => stream.write_all(&buffer[..length]).await?,
        }
    }
}
