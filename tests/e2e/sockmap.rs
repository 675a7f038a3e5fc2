//! Prototype experiments.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use router_tests::cgroup::Cgroup;
use router_tests::netns::Netns;
use socket2::{Domain, Socket, Type};
use viaduct::l4::datapath::Sockmap;

fn pair(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_mark(router_common::SOCKMAP_MARK).unwrap();
    socket.connect(&listener.local_addr().unwrap().into()).unwrap();
    let (backend, _) = listener.accept().unwrap();
    (socket.into(), backend)
}

#[test]
fn experiments() {
    let cgroup = Cgroup::create().unwrap();
    let ns = Netns::create(&format!("sockexp{}", std::process::id())).unwrap();
    ns.ip(&["link set lo up"]).unwrap();
    let sockmap = Sockmap::attach(cgroup.path(), 3).unwrap();
    cgroup.enter().unwrap();
    ns.run(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (mut proxy, mut backend) = pair(&listener);
        eprintln!("counts {:?}", sockmap.counts().unwrap());
        proxy.write_all(b"hello").unwrap();
        let mut buffer = [0; 3];
        // FIONREAD
        let inq = |s: &TcpStream| {
            use std::os::fd::AsRawFd;
            let out = std::process::Command::new("true").status();
            let _ = out;
            let mut n: i32 = -1;
            let _ = (s.as_raw_fd(), &mut n);
            n
        };
        let _ = inq;
        backend.read_exact(&mut buffer).unwrap();
        eprintln!("got {:?}", buffer);
        backend.read_exact(&mut buffer[..2]).unwrap();
        // data counters of TCP say whether it went past
        let ss = std::process::Command::new("ss").args(["-tinO"]).output().unwrap();
        eprintln!("{}", String::from_utf8_lossy(&ss.stdout));
        // backpressure
        proxy.set_nonblocking(true).unwrap();
        backend.set_nonblocking(true).unwrap();
        for (name, stream) in [("request", &mut proxy), ("response", &mut backend)] {
            let block = vec![7u8; 65536];
            let mut total = 0;
            let error = loop {
                match stream.write(&block) {
                    Ok(n) => total += n,
                    Err(e) => break Some(e),
                }
                if total > 64 << 20 {
                    break None;
                }
            };
            eprintln!("{name}: wrote {total} unread, then {error:?}");
        }
        eprintln!("counts {:?}", sockmap.counts().unwrap());
        let _ = proxy.set_read_timeout(Some(Duration::from_secs(1)));
    });
    cgroup.leave().unwrap();
}

#[test]
fn script() {
    let Ok(script) = std::env::var("SOCKSCRIPT") else { return };
    let cgroup = Cgroup::create().unwrap();
    let ns = Netns::create(&format!("sockscr{}", std::process::id())).unwrap();
    ns.ip(&["link set lo up"]).unwrap();
    let sockmap = Sockmap::attach(cgroup.path(), 3).unwrap();
    cgroup.enter().unwrap();
    let status = ns.command("python3").arg("-u").arg(script).status().unwrap();
    eprintln!("{status:?} counts {:?}", sockmap.counts().unwrap());
    cgroup.leave().unwrap();
}
