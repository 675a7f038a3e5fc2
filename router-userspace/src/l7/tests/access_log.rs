//! The access log of requests over real sockets.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::*;
use crate::config::{AccessLogFormat, HttpAccessLog, RedactQuery, SyslogAddress};
use crate::route::Instance;

/// A gateway with an access log, and the directory that the log is in.
struct Logged {
    gateway: Gateway,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Logged {
    fn start(routes: Snapshot, log: HttpAccessLog) -> Logged {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("access.log");
        let config = HttpConfig {
            access_log: HttpAccessLog {
                path: Some(path.clone()),
                ..log
            },
            ..config()
        };
        Logged {
            gateway: Gateway::with_config(routes, config),
            path,
            _directory: directory,
        }
    }

    /// The lines of the log once there are `count`.
    async fn lines(&self, count: usize) -> Vec<String> {
        lines_of(&self.path, count).await
    }
}

async fn lines_of(path: &Path, count: usize) -> Vec<String> {
    poll_until(|| {
        let text = std::fs::read_to_string(path).ok()?;
        let lines: Vec<String> = text.lines().map(mask).collect();
        (text.ends_with('\n') && lines.len() >= count).then_some(lines)
    })
    .await
}

/// A line without what differs from run to run: digits become `N`, ids `ID`.
fn mask(line: &str) -> String {
    let mut masked = String::new();
    let mut rest = line;
    while let Some(first) = rest.chars().next() {
        let len = rest
            .find(|c: char| !c.is_ascii_hexdigit() && c != '-')
            .unwrap_or(rest.len());
        let word = &rest[..len];
        if len == 36 && word.matches('-').count() == 4 {
            masked.push_str("ID");
            rest = &rest[len..];
        } else {
            masked.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    let is_time = |masked: &str| {
        ["_time:", "_seconds\":", "time\":\"", "- ["]
            .iter()
            .any(|it| masked.ends_with(it))
    };
    let mut out = String::new();
    let mut chars = masked.chars().peekable();
    while let Some(char) = chars.next() {
        out.push(char);
        if is_time(&out) {
            while chars
                .next_if(|c| c.is_ascii_digit() || "-:.TZ".contains(*c))
                .is_some()
            {}
            out.push('T');
        }
        if out.ends_with("127.0.0.1:") {
            while chars.next_if(char::is_ascii_digit).is_some() {}
            out.push('P');
        }
    }
    out
}

fn gorouter() -> HttpAccessLog {
    HttpAccessLog {
        format: AccessLogFormat::Gorouter,
        ..HttpAccessLog::default()
    }
}

fn instance(address: SocketAddr) -> Backend {
    Backend {
        instance: Instance {
            app: Some("app-1".into()),
            id: Some("inst-2".into()),
            index: Some("3".into()),
            ..Instance::default()
        }
        .shared(),
        ..backend(address)
    }
}

const REQUEST: &str = "POST /p/q?a=1&b=2 HTTP/1.1\r\nHost: a.com\r\nReferer: http://r/?s\r\n\
                       User-Agent: agent \"x\"\r\nX-Foo-Bar: é\r\nContent-Length: 5\r\n\
                       X-Forwarded-For: 192.0.2.1\r\nConnection: close\r\n\r\nhello";

#[tokio::test]
async fn a_request_is_logged_as_gorouter_does() {
    let a = TestBackend::named("hi").await;
    let log = HttpAccessLog {
        headers: vec!["X-Foo-Bar".to_owned(), "X-None".to_owned()],
        ..gorouter()
    };
    let logged = Logged::start(snapshot([("a.com", pool([instance(a.address)]))]), log);
    assert_status(&logged.gateway.exchange(REQUEST).await, 200);
    assert_eq!(
        logged.lines(1).await,
        [concat!(
            r#"a.com - [T] "POST /p/q?a=1&b=2 HTTP/1.1" 200 5 2 "http://r/?s" "agent \"x\"" "#,
            r#""127.0.0.1:P" "127.0.0.1:P" x_forwarded_for:"127.0.0.1" x_forwarded_proto:"http" "#,
            r#"vcap_request_id:"ID" response_time:T gorouter_time:T app_id:"app-1" app_index:"3" "#,
            r#"instance_id:"inst-2" x_cf_routererror:"-" x_foo_bar:"é" x_none:"-""#,
        )]
    );
}

#[tokio::test]
async fn a_request_is_logged_as_json() {
    let a = TestBackend::named("hi").await;
    let log = HttpAccessLog {
        headers: vec!["X-Foo-Bar".to_owned(), "X-None".to_owned()],
        ..HttpAccessLog::default()
    };
    let logged = Logged::start(snapshot([("a.com", pool([instance(a.address)]))]), log);
    assert_status(&logged.gateway.exchange(REQUEST).await, 200);
    assert_eq!(
        logged.lines(1).await,
        [concat!(
            r#"{"time":"T","status":200,"method":"POST","target":"/p/q?a=1&b=2","protocol":"HTTP/1.1","#,
            r#""host":"a.com","route":"a.com","client":"127.0.0.1:P","x_forwarded_for":"127.0.0.1","#,
            r#""x_forwarded_proto":"http","bytes_received":5,"bytes_sent":2,"backend":"127.0.0.1:P","#,
            r#""app_id":"app-1","app_index":"3","instance_id":"inst-2","attempts":1,"#,
            r#""connect_seconds":T,"backend_seconds":T,"duration_seconds":T,"referer":"http://r/?s","#,
            r#""user_agent":"agent \"x\"","request_id":"ID","headers":{"x-foo-bar":"é"}}"#,
        )]
    );
}

#[tokio::test]
async fn what_the_gateway_answers_is_logged_with_the_reason() {
    let logged = Logged::start(
        snapshot([("a.com", pool([backend(refusing().await)]))]),
        gorouter(),
    );
    logged.gateway.get("unknown.com").await;
    logged.gateway.exchange("GET / HTTP/1.1\r\n\r\n").await;
    logged.gateway.exchange("no request\r\n\r\n").await;
    logged.gateway.get("a.com").await;
    let lines = logged.lines(4).await;
    assert_eq!(
        lines[..3],
        [
            concat!(
                r#"unknown.com - [T] "GET / HTTP/1.1" 404 0 63 "-" "-" "127.0.0.1:P" "-" x_forwarded_for:"-" "#,
                r#"x_forwarded_proto:"-" vcap_request_id:"-" response_time:T gorouter_time:T app_id:"-" "#,
                r#"app_index:"-" instance_id:"-" x_cf_routererror:"unknown_route""#,
            ),
            concat!(
                r#"- - [T] "GET / HTTP/1.1" 400 0 47 "-" "-" "127.0.0.1:P" "-" x_forwarded_for:"-" "#,
                r#"x_forwarded_proto:"-" vcap_request_id:"-" response_time:T gorouter_time:T app_id:"-" "#,
                r#"app_index:"-" instance_id:"-" x_cf_routererror:"empty_host""#,
            ),
            concat!(
                r#"- - [T] "-" 400 0 0 "-" "-" "127.0.0.1:P" "-" x_forwarded_for:"-" "#,
                r#"x_forwarded_proto:"-" vcap_request_id:"-" response_time:T gorouter_time:T app_id:"-" "#,
                r#"app_index:"-" instance_id:"-" x_cf_routererror:"unparsable""#,
            ),
        ]
    );
    assert!(
        lines[3].contains(r#""127.0.0.1:P" "127.0.0.1:P""#),
        "{}",
        lines[3]
    );
    let error = r#"x_cf_routererror:"endpoint_failure (connection refused)""#;
    assert!(lines[3].ends_with(error), "{}", lines[3]);
}

#[tokio::test]
async fn an_aborted_response_is_logged_with_what_was_sent_of_it_and_who_left() {
    let (listener, address) = scripted().await;
    let logged = Logged::start(
        snapshot([("a.com", pool([backend(address)]))]),
        HttpAccessLog::default(),
    );
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n";
    for leaves in ["backend", "client"] {
        let mut client = logged.gateway.connect().await;
        let request = b"GET / HTTP/1.1\r\nHost: a.com\r\n\r\n";
        client.write_all(request).await.unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        read_until(&mut stream, "\r\n\r\n").await;
        stream
            .write_all(format!("{head}1234").as_bytes())
            .await
            .unwrap();
        read_until(&mut client, "1234").await;
        match leaves {
            "backend" => {
                drop(stream);
                read_to_end(&mut client).await;
            }
            _ => {
                drop(client);
                read_to_end(&mut stream).await;
            }
        }
    }
    let lines = logged.lines(2).await;
    for (line, aborted) in lines.iter().zip(["backend", "client"]) {
        let end = format!(r#""aborted":"{aborted}"}}"#);
        assert!(
            line.contains(r#""status":200,"#) && line.ends_with(&end),
            "{line}"
        );
        assert!(
            line.contains(r#""bytes_received":0,"bytes_sent":4,"#),
            "{line}"
        );
    }
}

#[tokio::test]
async fn a_client_that_leaves_before_an_answer_has_no_status() {
    let (listener, address) = scripted().await;
    let logged = Logged::start(snapshot([("a.com", pool([backend(address)]))]), gorouter());
    let mut client = logged.gateway.connect().await;
    let request = b"GET /slow HTTP/1.1\r\nHost: a.com\r\n\r\n";
    client.write_all(request).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;
    drop(client);
    let lines = logged.lines(1).await;
    assert!(
        lines[0].starts_with(r#"a.com - [T] "GET /slow HTTP/1.1" "-" 0 0 "#),
        "{}",
        lines[0]
    );
    assert!(
        lines[0].ends_with(r#"x_cf_routererror:"aborted (client)""#),
        "{}",
        lines[0]
    );
}

#[tokio::test]
async fn an_upgraded_connection_is_logged_at_its_end_with_its_bytes() {
    let (listener, address) = scripted().await;
    let logged = Logged::start(snapshot([("a.com", pool([backend(address)]))]), gorouter());
    let mut client = logged.gateway.connect().await;
    let upgrade = "GET /chat HTTP/1.1\r\nHost: a.com\r\nConnection: Upgrade\r\n\
                   Upgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n";
    client.write_all(upgrade.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;
    let switch =
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    stream.write_all(switch.as_bytes()).await.unwrap();
    read_until(&mut client, "\r\n\r\n").await;
    client.write_all(b"ping!").await.unwrap();
    read_until(&mut stream, "ping!").await;
    stream.write_all(b"pong").await.unwrap();
    read_until(&mut client, "pong").await;
    assert_eq!(std::fs::read_to_string(&logged.path).unwrap(), "");
    drop((client, stream));
    let lines = logged.lines(1).await;
    assert!(
        lines[0].starts_with(r#"a.com - [T] "GET /chat HTTP/1.1" 101 5 4 "#),
        "{}",
        lines[0]
    );
}

#[tokio::test]
async fn a_request_of_http2_is_logged_by_its_authority() {
    let a = TestBackend::named("hi").await;
    let logged = Logged::start(
        snapshot([("a.com", pool([backend(a.address)]))]),
        gorouter(),
    );
    let io = TokioIo::new(logged.gateway.connect().await);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = Request::get("http://a.com/x?y").body(full("")).unwrap();
    let response = sender.send_request(request).await.unwrap();
    response.into_body().collect().await.unwrap();
    let lines = logged.lines(1).await;
    assert!(
        lines[0].starts_with(r#"a.com - [T] "GET /x?y HTTP/2.0" 200 0 2 "#),
        "{}",
        lines[0]
    );
}

#[tokio::test]
async fn queries_and_clients_can_be_left_out() {
    let a = TestBackend::named("hi").await;
    let routes = snapshot([("a.com", pool([backend(a.address)]))]);
    let log = HttpAccessLog {
        redact_query: RedactQuery::All,
        disable_client_address: true,
        ..gorouter()
    };
    let logged = Logged::start(routes, log);
    logged.gateway.exchange(REQUEST).await;
    let lines = logged.lines(1).await;
    let expected = r#"a.com - [T] "POST /p/q HTTP/1.1" 200 5 2 "http://r/" "agent \"x\"" "-" "127.0.0.1:P" x_forwarded_for:"-" "#;
    assert!(lines[0].starts_with(expected), "{}", lines[0]);

    let hashed = HttpAccessLog {
        path: Some(logged.path.clone()),
        redact_query: RedactQuery::Hash,
        ..gorouter()
    };
    let config = HttpConfig {
        access_log: hashed,
        ..config()
    };
    logged.gateway.proxy.reload(&config).unwrap();
    logged.gateway.exchange(REQUEST).await;
    let lines = logged.lines(2).await;
    let expected =
        r#"a.com - [T] "POST /p/q?d53cf64e768f4ef09c806bbe12258c78211b2690 HTTP/1.1" 200 "#;
    assert!(lines[1].starts_with(expected), "{}", lines[1]);
}

#[tokio::test]
async fn no_header_breaks_a_line() {
    let a = TestBackend::named("hi").await;
    let routes = snapshot([("a.com", pool([backend(a.address)]))]);
    let logged = Logged::start(routes, HttpAccessLog::default());
    let mut request =
        b"GET / HTTP/1.1\r\nHost: a.com\r\nUser-Agent: \xff\"\\\t\xc2\x85\x80\",\"status\":1\r\n"
            .to_vec();
    request.extend_from_slice(b"Connection: close\r\n\r\n");
    assert_status(&logged.gateway.exchange(&request).await, 200);
    logged.lines(1).await;
    let text = std::fs::read_to_string(&logged.path).unwrap();
    let line: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        line["user_agent"],
        "\u{fffd}\"\\\t\u{85}\u{fffd}\",\"status\":1"
    );
    assert_eq!(line["status"], 200);
}

#[tokio::test]
async fn a_log_that_was_moved_away_is_begun_anew_after_a_reload() {
    let a = TestBackend::named("hi").await;
    let routes = snapshot([("a.com", pool([backend(a.address)]))]);
    let logged = Logged::start(routes, gorouter());
    logged.gateway.get("a.com").await;
    logged.lines(1).await;
    let rotated = logged.path.with_extension("1");
    std::fs::rename(&logged.path, &rotated).unwrap();
    let config = HttpConfig {
        access_log: HttpAccessLog {
            path: Some(logged.path.clone()),
            ..gorouter()
        },
        ..config()
    };
    logged.gateway.proxy.reload(&config).unwrap();
    logged.gateway.get("b.com").await;
    assert!(logged.lines(1).await[0].starts_with("b.com "));
    assert_eq!(lines_of(&rotated, 1).await.len(), 1);
}

#[tokio::test]
async fn a_log_that_was_moved_away_is_begun_anew_without_being_told() {
    let a = TestBackend::named("hi").await;
    let routes = snapshot([("a.com", pool([backend(a.address)]))]);
    let logged = Logged::start(routes, gorouter());
    logged.gateway.get("a.com").await;
    logged.lines(1).await;
    std::fs::rename(&logged.path, logged.path.with_extension("1")).unwrap();
    let anew = async {
        while std::fs::metadata(&logged.path).map_or(0, |it| it.len()) == 0 {
            logged.gateway.get("a.com").await;
        }
    };
    tokio::time::timeout(PATIENCE, anew).await.unwrap();
    assert!(logged.lines(1).await[0].starts_with("a.com "));
}

#[tokio::test]
async fn a_path_that_cannot_be_opened_refuses_the_reload_and_the_start() {
    let gateway = Gateway::start(Snapshot::default());
    let config = HttpConfig {
        access_log: HttpAccessLog {
            path: Some("/nowhere/access.log".into()),
            ..gorouter()
        },
        ..config()
    };
    let expected = "http.access_log.path /nowhere/access.log: ";
    let error = gateway.proxy.reload(&config).unwrap_err();
    assert!(format!("{error:#}").starts_with(expected), "{error:#}");
    let error = start(&config, Published::default(), Arc::default());
    let error = error.err().unwrap();
    assert!(format!("{error:#}").starts_with(expected), "{error:#}");
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_up_no_request_and_costs_lines() {
    let a = TestBackend::named("hi").await;
    let routes = snapshot([("a.com", pool([backend(a.address)]))]);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let config = HttpConfig {
        access_log: HttpAccessLog {
            path: Some(path.clone()),
            ..gorouter()
        },
        ..config()
    };
    let gateway = Gateway::with_config(routes, config);
    let agent = "x".repeat(4000);
    let request = format!("GET / HTTP/1.1\r\nHost: a.com\r\nUser-Agent: {agent}\r\n\r\n");
    let mut client = gateway.connect().await;
    let mut sent = 0_u64;
    let dropping = async {
        while gateway.metrics.access_log.dropped() == 0 {
            client.write_all(request.as_bytes()).await.unwrap();
            read_until(&mut client, "\r\n\r\nhi").await;
            sent += 1;
        }
    };
    tokio::time::timeout(PATIENCE, dropping).await.unwrap();
    let totals = gateway
        .totals(|totals| totals.requests_in_flight == 0)
        .await;
    assert_eq!((totals.responses[1], totals.aborted), (sent, 0));

    // Whoever begins to read gets whole lines, and none is unaccounted for.
    let mut reader = std::fs::File::open(&path).unwrap();
    let metrics = Arc::clone(&gateway.metrics);
    let read = std::thread::spawn(move || {
        let mut text = String::new();
        while metrics.access_log.written() + metrics.access_log.dropped() < sent {
            let mut bytes = [0; 65536];
            let len = reader.read(&mut bytes).unwrap();
            text.push_str(std::str::from_utf8(&bytes[..len]).unwrap());
        }
        text
    });
    let text = tokio::task::spawn_blocking(|| read.join().unwrap())
        .await
        .unwrap();
    assert!(text.lines().all(|line| line.starts_with("a.com - [")));
}

#[tokio::test]
async fn the_last_lines_are_written_before_the_end() {
    let a = TestBackend::named("hi").await;
    let routes = snapshot([("a.com", pool([backend(a.address)]))]);
    let Logged {
        gateway,
        path,
        _directory,
    } = Logged::start(routes, gorouter());
    for _ in 0..3 {
        gateway.get("a.com").await;
    }
    gateway.proxy.drain(PATIENCE).await;
    assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 3);
}

/// The gateway with its access log at this syslog.
fn logging_to(address: String) -> Gateway {
    let log = HttpAccessLog {
        syslog: Some(SyslogAddress::try_from(address).unwrap()),
        ..HttpAccessLog::default()
    };
    let config = HttpConfig {
        access_log: log,
        ..config()
    };
    Gateway::with_config(snapshot([]), config)
}

/// The line of a datagram whose head is as RFC 5424 has it.
fn line_of(datagram: &[u8]) -> serde_json::Value {
    let text = std::str::from_utf8(datagram).unwrap();
    let mut words = text.splitn(8, ' ');
    assert_eq!(words.next(), Some("<190>1"));
    let time = words.next().unwrap();
    assert_eq!((time.len(), &time[time.len() - 1..]), (27, "Z"), "{time}");
    assert_ne!(words.next(), Some(""));
    let pid = std::process::id().to_string();
    let rest: Vec<_> = words.by_ref().take(4).collect();
    assert_eq!(rest, ["viaduct", &pid, "access", "-"]);
    serde_json::from_str(words.next().unwrap()).unwrap()
}

#[tokio::test]
async fn each_line_is_a_datagram_of_syslog_over_udp() {
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let gateway = logging_to(format!("udp://{}", socket.local_addr().unwrap()));
    assert_status(&gateway.get("b.com").await, 404);
    assert_status(&gateway.get("c.com").await, 404);
    let mut buffer = vec![0; 65536];
    for host in ["b.com", "c.com"] {
        let len = tokio::time::timeout(PATIENCE, socket.recv(&mut buffer)).await;
        let line = line_of(&buffer[..len.unwrap().unwrap()]);
        assert_eq!(
            (&line["host"], &line["status"]),
            (&host.into(), &404.into())
        );
    }
    poll_until(|| (gateway.metrics.access_log.written() == 2).then_some(())).await;
}

#[tokio::test]
async fn a_syslog_of_the_host_may_go_and_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let socket = tokio::net::UnixDatagram::bind(&path).unwrap();
    let gateway = logging_to(format!("unix:{}", path.display()));
    let counters = &gateway.metrics.access_log;
    let mut buffer = vec![0; 65536];
    assert_status(&gateway.get("b.com").await, 404);
    let len = tokio::time::timeout(PATIENCE, socket.recv(&mut buffer)).await;
    line_of(&buffer[..len.unwrap().unwrap()]);
    drop(socket);
    std::fs::remove_file(&path).unwrap();
    assert_status(&gateway.get("lost.com").await, 404);
    poll_until(|| (counters.dropped() == 1).then_some(())).await;
    let socket = tokio::net::UnixDatagram::bind(&path).unwrap();
    assert_status(&gateway.get("c.com").await, 404);
    let len = tokio::time::timeout(PATIENCE, socket.recv(&mut buffer)).await;
    let line = line_of(&buffer[..len.unwrap().unwrap()]);
    assert_eq!(line["host"], "c.com");
    poll_until(|| (counters.written() == 2).then_some(())).await;
}

#[tokio::test]
async fn a_syslog_that_is_not_there_is_an_error_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log").display().to_string();
    let log = HttpAccessLog {
        syslog: Some(SyslogAddress::try_from(format!("unix:{path}")).unwrap()),
        ..HttpAccessLog::default()
    };
    let error = AccessLog::check(&log).unwrap_err().to_string();
    assert!(
        error.contains("http.access_log.syslog") && error.contains(&path),
        "{error}"
    );
}
