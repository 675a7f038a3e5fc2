//! Connections of one host that pass TCP by: every byte arrives, once, in order.

use std::io::{BufRead, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use router_common::{SOCKMAP_BYTES, SOCKMAP_MARK, SockmapCounter};
use router_tests::app::{App, HOST, Presence};
use router_tests::client::{HttpClient, TIMEOUT};
use router_tests::netns::Netns;
use router_tests::process::wait_for;
use router_tests::site::{PROXY, Site};
use socket2::{Domain, SockRef, Socket, Type};
use viaduct::l4::datapath::{Sockmap, cgroup2_mount};

/// Around what a message, a page, a budget and TCP's buffers hold.
const SIZES: [usize; 12] = [
    1,
    2,
    1023,
    4096,
    4097,
    65_535,
    65_537,
    SOCKMAP_BYTES as usize - 1025,
    SOCKMAP_BYTES as usize,
    SOCKMAP_BYTES as usize + 1,
    1 << 20,
    5 << 20,
];

#[test]
fn bytes_are_equal_whatever_the_sizes() {
    let host = Host::new();
    host.run(|| {
        for address in [
            IpAddr::from(Ipv4Addr::LOCALHOST),
            IpAddr::from(Ipv6Addr::LOCALHOST),
        ] {
            let before = host.count(SockmapCounter::Connections);
            let (mut proxy, backend) = connection(address, host.mark);
            let backend = thread::spawn(|| echo(backend));
            for (seed, size) in SIZES.into_iter().cycle().take(60).enumerate() {
                exchange(&mut proxy, seed as u64, size);
            }
            proxy.shutdown(Shutdown::Write).unwrap();
            assert_eq!(proxy.read(&mut [0; 16]).unwrap(), 0);
            backend.join().unwrap();
            assert_eq!(host.count(SockmapCounter::Connections), before + 1);
        }
    });
}

#[test]
fn small_exchanges_stay_past_tcp() {
    let host = Host::new();
    host.run(|| {
        let (mut proxy, backend) = host.connection();
        let backend = thread::spawn(|| echo(backend));
        for seed in 0..2000 {
            exchange(&mut proxy, seed, 1 + seed as usize % 8000);
        }
        drop(proxy);
        backend.join().unwrap();
        assert_eq!(host.count(SockmapCounter::Fallbacks), 0);
    });
}

#[test]
fn many_connections_at_once_are_not_confused() {
    let host = Host::new();
    host.run(|| {
        thread::scope(|scope| {
            for client in 0..16 {
                let host = &host;
                scope.spawn(move || {
                    for round in 0..4 {
                        let (mut proxy, backend) = host.connection();
                        let backend = thread::spawn(|| echo(backend));
                        for exchange_ in 0..40_u64 {
                            let seed = client << 32 | round << 16 | exchange_;
                            exchange(&mut proxy, seed, 1 + (seed as usize * 7919) % 70_000);
                        }
                        drop(proxy);
                        backend.join().unwrap();
                    }
                });
            }
        });
        assert_eq!(host.count(SockmapCounter::Connections), 64);
    });
}

#[test]
fn what_was_sent_arrives_before_the_end_of_the_connection() {
    let host = Host::new();
    host.run(|| {
        for size in [1, 5000, SOCKMAP_BYTES as usize - 2000, 1 << 20] {
            let (mut proxy, mut backend) = host.connection();
            let sender = thread::spawn(move || backend.write_all(&bytes(9, size)).unwrap());
            let mut received = Vec::new();
            proxy.read_to_end(&mut received).unwrap();
            sender.join().unwrap();
            assert!(received == bytes(9, size), "{size} octets");
        }
        let (mut proxy, mut backend) = host.connection();
        proxy.write_all(b"request").unwrap();
        proxy.shutdown(Shutdown::Write).unwrap();
        let mut request = Vec::new();
        backend.read_to_end(&mut request).unwrap();
        backend.write_all(b"response").unwrap();
        drop(backend);
        let mut response = Vec::new();
        proxy.read_to_end(&mut response).unwrap();
        assert_eq!((&*request, &*response), (&b"request"[..], &b"response"[..]));
    });
}

#[test]
fn a_reset_follows_what_was_sent() {
    let host = Host::new();
    host.run(|| {
        let (mut proxy, mut backend) = host.connection();
        backend.write_all(&bytes(3, 5000)).unwrap();
        SockRef::from(&backend)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(backend);
        let mut received = vec![0; 5000];
        proxy.read_exact(&mut received).unwrap();
        assert!(received == bytes(3, 5000));
        let error = proxy.read(&mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    });
}

#[test]
fn who_sends_to_an_end_that_is_gone_hears_of_it() {
    let host = Host::new();
    host.run(|| {
        let (mut proxy, backend) = host.connection();
        drop(backend);
        assert_eq!(proxy.read(&mut [0; 16]).unwrap(), 0);
        let error = (0..2).find_map(|_| proxy.write_all(b"late").err()).unwrap();
        assert!(
            [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()),
            "{error}"
        );
    });
}

#[test]
fn what_nobody_reads_stops_its_sender_and_arrives_whole() {
    let host = Host::new();
    host.run(|| {
        for block in [1, 100, 65_536] {
            let (mut reader, mut sender) = host.connection();
            sender.set_nonblocking(true).unwrap();
            let all = bytes(5, 32 << 20);
            let mut sent = 0;
            while let Ok(count) = sender.write(&all[sent..sent + block]) {
                sent += count;
                assert!(sent + block < all.len(), "{sent} octets unread, and no end");
            }
            sender.shutdown(Shutdown::Write).unwrap();
            let mut received = Vec::new();
            reader.read_to_end(&mut received).unwrap();
            assert!(received == all[..sent], "{sent} octets by {block}");
        }
    });
}

#[test]
fn connections_without_the_mark_are_left_alone() {
    let host = Host::new();
    host.run(|| {
        for mark in [0, !host.mark, host.mark ^ 0x8000] {
            let (mut proxy, backend) = connection(Ipv4Addr::LOCALHOST.into(), mark);
            let backend = thread::spawn(|| echo(backend));
            exchange(&mut proxy, 1, 10_000);
            drop(proxy);
            backend.join().unwrap();
        }
        assert_eq!(host.count(SockmapCounter::Connections), 0);
    });
}

#[test]
fn it_is_tried_out_before_it_is_used() {
    let host = Host::new();
    // Which of the two depends on the kernel; that there is an end and a reason does not.
    if let Err(error) = host.run(|| host.sockmap.try_out(host.mark)) {
        assert!(error.to_string().contains("FIONREAD"), "{error:#}");
    }
}

#[test]
fn a_backend_on_this_host_serves_requests_past_tcp_and_upgrades_besides() {
    let host = Host::new();
    if host.run(|| host.sockmap.try_out(host.mark)).is_err() {
        // On such a kernel the gateway refuses to start with it.
        return;
    }
    let mut site = Site::new(1).unwrap();
    site.start_nats().unwrap();
    site.start_gateway(|config| config.http.sockmap = true)
        .unwrap();
    let app = App::start(&site.lab.gateway, "here", Ipv4Addr::LOCALHOST).unwrap();
    app.set_presence(Presence::Registered);
    wait_for("the backend on this host", || {
        let response = site.get(HOST, "/").ok()?;
        (response.status == 200).then_some(())
    })
    .unwrap();
    site.lab.client.run(|| {
        let mut connection = HttpClient::connect(PROXY).unwrap();
        for length in [0, 900, 1000, 1024, 2000, 5000] {
            let path = format!("/{}", "x".repeat(length));
            let response = connection.get(HOST, &path).unwrap();
            assert_eq!((response.status, &*response.body), (200, "here\n"));
        }
        let mut upgraded = HttpClient::connect(PROXY)
            .unwrap()
            .upgrade(HOST, "/")
            .unwrap();
        let mut greeting = String::new();
        upgraded.read_line(&mut greeting).unwrap();
        assert_eq!(greeting, "here\n");
        upgraded.get_mut().write_all(b"ping").unwrap();
        let mut echoed = [0; 4];
        upgraded.read_exact(&mut echoed).unwrap();
        assert_eq!(&echoed, b"ping");
    });
    let metrics = site.admin("/metrics").unwrap().body;
    let count = |name: &str| -> u64 {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {metrics}"))
            .trim()
            .parse()
            .unwrap()
    };
    // One more is the trial at the start.
    assert!(count("viaduct_http_sockmap_connections_total ") >= 2);
    assert_eq!(count("viaduct_http_sockmap_fallbacks_total "), 0);
}

/// The programs for one mark, and a network to try them in.
struct Host {
    sockmap: Sockmap,
    mark: u32,
    netns: Netns,
}

impl Host {
    fn new() -> Host {
        static HOSTS: AtomicU32 = AtomicU32::new(0);

        let process = std::process::id();
        let number = HOSTS.fetch_add(1, Ordering::Relaxed);
        let netns = Netns::create(&format!("viaduct-sockmap-{process}-{number}")).unwrap();
        netns.ip(&["link set lo up"]).unwrap();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let root = cgroup2_mount(&mounts).unwrap();
        let mark = SOCKMAP_MARK | (process.wrapping_mul(16) + number) & 0xffff;
        Host {
            sockmap: Sockmap::attach(&root, mark).unwrap(),
            mark,
            netns,
        }
    }

    fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.netns.run(f)
    }

    fn connection(&self) -> (TcpStream, TcpStream) {
        connection(Ipv4Addr::LOCALHOST.into(), self.mark)
    }

    fn count(&self, counter: SockmapCounter) -> u64 {
        self.sockmap.count(counter)
    }
}

/// The end that connects, marked, and the one that accepts.
fn connection(address: IpAddr, mark: u32) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let to: SocketAddr = listener.local_addr().unwrap();
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
    socket.set_mark(mark).unwrap();
    socket.connect(&to.into()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let dialed = TcpStream::from(socket);
    for stream in [&dialed, &accepted] {
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_write_timeout(Some(TIMEOUT)).unwrap();
    }
    (dialed, accepted)
}

/// Sends `size` octets, and gets them back.
fn exchange(stream: &mut TcpStream, seed: u64, size: usize) {
    let sent = bytes(seed, size);
    let mut received = vec![0; size];
    let mut writer = stream.try_clone().unwrap();
    thread::scope(|scope| {
        let sent = &sent;
        scope.spawn(move || {
            writer
                .write_all(&(sent.len() as u64).to_be_bytes())
                .unwrap();
            writer.write_all(sent).unwrap();
        });
        read_exact(stream, &mut received).unwrap();
    });
    assert!(received == sent, "{size} octets of seed {seed}");
}

/// Reads a length and as many octets, and sends them back, until the other end closes.
fn echo(mut stream: TcpStream) {
    let mut size = [0; 8];
    while read_exact(&mut stream, &mut size).is_ok() {
        let mut body = vec![0; u64::from_be_bytes(size) as usize];
        read_exact(&mut stream, &mut body).unwrap();
        stream.write_all(&body).unwrap();
    }
}

/// The kernel wakes a blocking reader for other things than bytes, such as room to write, and then
/// says EAGAIN (net/ipv4/tcp_bpf.c, `tcp_bpf_recvmsg`).
fn read_exact(stream: &mut TcpStream, mut buffer: &mut [u8]) -> std::io::Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !buffer.is_empty() {
        match stream.read(buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => buffer = &mut buffer[count..],
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Octets that tell of any that is lost, doubled or out of place.
fn bytes(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        // Marsaglia, "Xorshift RNGs", 2003.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}
