use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use redis::Commands;

use super::*;
use crate::source::rig::{Gateway, Link, OWNED, free_address};
use crate::source::status::State;

/// Servers end with their test.
struct Server {
    process: crate::source::rig::Server,
    folder: tempfile::TempDir,
}

impl Server {
    async fn start(arguments: &[&str]) -> Server {
        Server::start_at(free_address(), arguments).await
    }

    async fn start_at(address: SocketAddr, arguments: &[&str]) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--save", "", "--dir"]);
        command.arg(folder.path());
        command.args(["--port", &address.port().to_string()]);
        command.args(arguments);
        let process = crate::source::rig::Server::start(command, address).await;
        Server { process, folder }
    }

    /// Whoever writes the keys.
    fn writer(&self) -> redis::Connection {
        let client = Client::open(format!("redis://{}", self.process.address)).unwrap();
        client.get_connection().unwrap()
    }
}

/// Nothing is read again within a test but what is told of.
const NOTIFY: [&str; 2] = ["--notify-keyspace-events", "KA"];

fn config(address: SocketAddr, more: &str) -> String {
    format!(
        "[redis]\nservers = [\"redis://{address}\"]\nrescan_interval = \"1h\"\n\
         poll_interval = \"20ms\"\n{more}"
    )
}

async fn push(server: &Server, key: &str, elements: &[&str]) {
    let (mut writer, key) = (server.writer(), key.to_owned());
    let elements: Vec<String> = elements.iter().map(|&text| text.to_owned()).collect();
    tokio::task::spawn_blocking(move || {
        let _: () = writer.rpush(key, elements).unwrap();
    })
    .await
    .unwrap();
}

async fn delete(server: &Server, key: &str) {
    let (mut writer, key) = (server.writer(), key.to_owned());
    tokio::task::spawn_blocking(move || {
        let _: () = writer.del(key).unwrap();
    })
    .await
    .unwrap();
}

async fn run_command(server: &Server, words: &[&[u8]]) {
    let mut writer = server.writer();
    let mut command = redis::cmd(std::str::from_utf8(words[0]).unwrap());
    for word in &words[1..] {
        command.arg(*word);
    }
    tokio::task::spawn_blocking(move || {
        let _: redis::Value = command.query(&mut writer).unwrap();
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn hipache_and_dinp_keys_are_served_and_followed() {
    for (arguments, follows) in [(&NOTIFY[..], true), (&[][..], false)] {
        let server = Server::start(arguments).await;
        push(
            &server,
            "frontend:a.x",
            &["shop", "http://10.0.0.1:80", "http://10.0.0.2"],
        )
        .await;
        push(&server, "/rs/b.x", &["10.0.0.3:81"]).await;
        run_command(&server, &[b"SET", b"/cname/c.y", b"/rs/b.x"]).await;
        run_command(&server, &[b"SET", b"unrelated", b"1"]).await;
        let text = config(server.process.address, "");
        let gateway = Gateway::start(Origin::Redis, &text, run);
        gateway.serves("a.x", &["10.0.0.1:80", "10.0.0.2:80"]).await;
        gateway.serves("b.x", &["10.0.0.3:81"]).await;
        gateway.serves("c.y", &["10.0.0.3:81"]).await;
        gateway.is_whole().await;
        let age = gateway.metrics.sources.get(Origin::Redis).unwrap().age();
        assert_eq!(age == Some(Duration::ZERO), follows);

        push(
            &server,
            "frontend:*.w.x",
            &["w", "http://[2001:db8::1]:8080/"],
        )
        .await;
        gateway.serves("*.w.x", &["[2001:db8::1]:8080"]).await;
        push(&server, "/rs/b.x", &["10.0.0.4:81"]).await;
        gateway.serves("b.x", &["10.0.0.3:81", "10.0.0.4:81"]).await;
        gateway.serves("c.y", &["10.0.0.3:81", "10.0.0.4:81"]).await;
        push(&server, "frontend:a.x", &["http://10.0.0.1:80"]).await;
        gateway
            .serves("a.x", &["10.0.0.1:80*200", "10.0.0.2:80"])
            .await;
        run_command(&server, &[b"SADD", b"dead:a.x", b"1"]).await;
        gateway.serves("a.x", &["10.0.0.1:80*200"]).await;
        run_command(&server, &[b"SADD", b"dead:a.x", b"0", b"2"]).await;
        // All of them: the host stays, and is answered that nobody can serve it.
        gateway
            .serves("a.x", &["10.0.0.1:80*0", "10.0.0.2:80*0"])
            .await;
        run_command(&server, &[b"PEXPIRE", b"dead:a.x", b"1"]).await;
        gateway
            .serves("a.x", &["10.0.0.1:80*200", "10.0.0.2:80"])
            .await;
        delete(&server, "/rs/b.x").await;
        gateway.serves("b.x", &[]).await;
        gateway.serves("c.y", &[]).await;
        run_command(&server, &[b"RENAME", b"frontend:a.x", b"frontend:d.x"]).await;
        gateway.serves("a.x", &[]).await;
        gateway
            .serves("d.x", &["10.0.0.1:80*200", "10.0.0.2:80"])
            .await;
        assert_eq!(gateway.rejects.list(), []);
    }
}

#[tokio::test]
async fn routes_outlast_the_server_and_follow_it_when_it_is_back() {
    let server = Server::start(&NOTIFY).await;
    push(&server, "/rs/a.x", &["10.0.0.1:80"]).await;
    push(&server, "/rs/b.x", &["10.0.0.1:80"]).await;
    let text = config(server.process.address, "");
    let gateway = Gateway::start(Origin::Redis, &text, run);
    gateway.is_whole().await;
    let address = server.process.stop();
    gateway.is(State::Lost).await;
    let status = gateway.metrics.sources.get(Origin::Redis).unwrap();
    assert!(status.error.is_some() && status.age() > Some(Duration::ZERO));
    assert_eq!(gateway.backends("a.x"), ["10.0.0.1:80"]);
    let revision = gateway.snapshot().revision;

    // While it was away: one stayed, one went, one came.
    let elsewhere = Server::start(&[]).await;
    push(&elsewhere, "/rs/a.x", &["10.0.0.1:80"]).await;
    push(&elsewhere, "/rs/c.x", &["10.0.0.1:80"]).await;
    run_command(&elsewhere, &[b"SAVE"]).await;
    let dump = elsewhere.folder.path().join("dump.rdb");
    let folder = dump.parent().unwrap().to_str().unwrap();
    let arguments = [&NOTIFY[..], &["--dir", folder]].concat();
    let _back = Server::start_at(address, &arguments).await;
    gateway.serves("c.x", &["10.0.0.1:80"]).await;
    gateway.serves("b.x", &[]).await;
    gateway.is(State::Connected).await;
    assert_eq!(gateway.backends("a.x"), ["10.0.0.1:80"]);
    let changes = gateway.snapshot().revision - revision;
    assert!(changes <= 2, "only what differs is changed: {changes}");
}

#[tokio::test]
async fn a_server_that_stalls_is_lost_and_another_one_is_asked() {
    let server = Server::start(&NOTIFY).await;
    push(&server, "/rs/a.x", &["10.0.0.1:80"]).await;
    let link = Link::to(server.process.address).await;
    let short = "timeout = \"100ms\"\n";
    let text = config(link.address, short).replace("\"1h\"", "\"10ms\"");
    let gateway = Gateway::start(Origin::Redis, &text, run);
    gateway.is_whole().await;
    link.hold_up(true);
    gateway.is(State::Lost).await;
    assert_eq!(gateway.backends("a.x"), ["10.0.0.1:80"]);
    let servers = format!(
        "[redis]\nservers = [\"redis://{}\", \"redis://{}\"]\n{short}",
        link.address, server.process.address
    );
    gateway.reload(&servers).await;
    gateway.is(State::Connected).await;
    push(&server, "/rs/b.x", &["10.0.0.1:80"]).await;
    gateway.serves("b.x", &["10.0.0.1:80"]).await;
}

#[tokio::test]
async fn garbage_in_any_field_is_refused_by_name_and_keeps_what_was_there() {
    let server = Server::start(&NOTIFY).await;
    push(&server, "frontend:good.x", &["g", "http://10.0.0.1:80"]).await;
    push(&server, "/rs/turns.x", &["10.0.0.1:80"]).await;
    push(&server, "/rs/type.x", &["10.0.0.2:80"]).await;
    let text = config(server.process.address, "");
    let gateway = Gateway::start(Origin::Redis, &text, run);
    gateway.is_whole().await;
    push(&server, "/rs/turns.x", &["nonsense"]).await;
    gateway.refuses("/rs/turns.x", "[1]: \"nonsense\"").await;
    delete(&server, "/rs/type.x").await;
    gateway.serves("type.x", &[]).await;
    run_command(&server, &[b"SET", b"/rs/type.x", b"10.0.0.2:80"]).await;
    gateway.refuses("/rs/type.x", "WRONGTYPE").await;
    for (key, elements, why) in [
        ("frontend:*", ["n", "http://10.0.0.1"], "key: "),
        ("frontend:a b", ["n", "http://10.0.0.1"], "key: "),
        ("frontend:a/b", ["n", "http://10.0.0.1"], "key: "),
        ("frontend:1.x", ["n", "ftp://10.0.0.1"], "[1]: "),
        ("frontend:2.x", ["n", "http://backend:80"], "is a name"),
        ("frontend:3.x", ["n", "http://0.0.0.0"], "[1]: "),
        ("frontend:4.x", ["n", "http://10.0.0.1:99999"], "[1]: "),
        ("frontend:5.x", ["n", "http://u:p@10.0.0.1"], "[1]: "),
        ("/rs/6.x", ["10.0.0.1:80", "10.0.0.1:0"], "[1]"),
        ("/rs/7.x", ["10.0.0.1", "10.0.0.1:80"], "[0]"),
    ] {
        push(&server, key, &elements).await;
        gateway.refuses(key, why).await;
    }
    run_command(&server, &[b"SET", b"/cname/8.x", b"/rx/a"]).await;
    gateway.refuses("/cname/8.x", "is not /rs/HOST").await;
    run_command(
        &server,
        &[b"RPUSH", b"frontend:\xff.x", b"n", b"http://10.0.0.1"],
    )
    .await;
    gateway.refuses("frontend:\\xff.x", "key: not UTF-8").await;
    run_command(&server, &[b"RPUSH", b"/rs/9.x", b"\xff\0"]).await;
    gateway.refuses("/rs/9.x", "[0]: not UTF-8").await;

    gateway.serves("good.x", &["10.0.0.1:80"]).await;
    gateway.serves("turns.x", &["10.0.0.1:80"]).await;
    assert_eq!(gateway.snapshot().hosts.len(), 2);
    let refused = gateway.metrics.source_rejects[Origin::Redis as usize].get();
    assert_eq!(refused, gateway.rejects.list().len() as u64);
    run_command(&server, &[b"LREM", b"/rs/turns.x", b"0", b"nonsense"]).await;
    push(&server, "/rs/turns.x", &["10.0.0.5:80"]).await;
    gateway
        .serves("turns.x", &["10.0.0.1:80", "10.0.0.5:80"])
        .await;
    run_command(&server, &[b"FLUSHDB"]).await;
    let rescanned = text.replace("1h", "10ms");
    gateway.reload(&rescanned).await;
    crate::source::rig::until(
        || format!("what is gone is forgotten: {:?}", gateway.rejects.list()),
        || gateway.rejects.list().is_empty() && gateway.snapshot().hosts.is_empty(),
    )
    .await;
}

#[tokio::test]
async fn a_user_with_few_rights_polls_and_without_rights_is_told_so() {
    let server = Server::start(&[&NOTIFY[..], &["--requirepass", "admin"]].concat()).await;
    let client = Client::open(format!("redis://:admin@{}", server.process.address)).unwrap();
    let mut admin = client.get_connection().unwrap();
    for rule in [
        "SETUSER reader on >secret ~app:* resetchannels +lrange +srandmember +getrange +scan +select +ping",
        "SETUSER nobody on >secret",
    ] {
        let mut acl = redis::cmd("ACL");
        rule.split(' ').for_each(|word| {
            acl.arg(word);
        });
        let _: () = acl.query(&mut admin).unwrap();
    }
    let _: () = admin.rpush("app:/rs/a.x", "10.0.0.1:80").unwrap();
    let _: () = admin.rpush("/rs/b.x", "10.0.0.1:80").unwrap();
    let text = |user: &str| {
        let more = format!("user = {user:?}\npassword = \"secret\"\nkey_prefix = \"app:\"\n");
        config(server.process.address, &more)
    };
    let gateway = Gateway::start(Origin::Redis, &text("nobody"), run);
    let error = || gateway.error();
    crate::source::rig::until(error, || error().contains("no permissions")).await;
    gateway.reload(&text("reader")).await;
    gateway.serves("a.x", &["10.0.0.1:80"]).await;
    let _: () = admin.rpush("app:/rs/a.x", "10.0.0.2:80").unwrap();
    gateway.serves("a.x", &["10.0.0.1:80", "10.0.0.2:80"]).await;
    assert_eq!(gateway.backends("b.x"), [""; 0], "of another prefix");
    gateway
        .reload(&text("reader").replace("secret", "wrong"))
        .await;
    crate::source::rig::until(error, || error().contains("authentication failed")).await;
    assert_eq!(gateway.backends("a.x").len(), 2);
    gateway.reload("").await;
    gateway.serves("a.x", &[]).await;
    assert_eq!(gateway.metrics.sources.list(), []);
}

#[tokio::test]
async fn it_speaks_tls_to_a_server_that_its_certificates_vouch_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(path("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(path("key.pem"), made.signing_key.serialize_pem()).unwrap();
    let tls = free_address();
    let (port, certificate, key) = (tls.port().to_string(), path("cert.pem"), path("key.pem"));
    let arguments = [
        ["--tls-port", &port],
        ["--tls-cert-file", &certificate],
        ["--tls-key-file", &key],
        ["--tls-ca-cert-file", &certificate],
    ];
    let server = Server::start(&arguments.concat()).await;
    push(&server, "/rs/a.x", &["10.0.0.1:80"]).await;
    let text = |more: &str| {
        format!(
            "[redis]\nservers = [\"rediss://localhost:{}\"]\n{more}",
            tls.port()
        )
    };
    let gateway = Gateway::start(Origin::Redis, &text(""), run);
    let error = || gateway.error();
    crate::source::rig::until(error, || error().contains("certificate")).await;
    let ca = format!("ca_file = {:?}\n", path("cert.pem"));
    gateway.reload(&text(&ca)).await;
    crate::source::rig::until(error, || !error().contains("UnknownIssuer")).await;
    let client = "client_certificate_file = \"CERT\"\nclient_key_file = \"KEY\"\n";
    let client = client.replace("CERT", &path("cert.pem"));
    let client = client.replace("KEY", &path("key.pem"));
    gateway.reload(&text(&(ca + &client))).await;
    gateway.serves("a.x", &["10.0.0.1:80"]).await;
}

#[tokio::test]
async fn a_host_that_a_rule_gives_to_others_is_refused() {
    let server = Server::start(&NOTIFY).await;
    let text = config(server.process.address, OWNED);
    let gateway = Gateway::start(Origin::Redis, &text, run);
    push(&server, "frontend:owned.x", &["", "http://10.0.0.1:80"]).await;
    push(&server, "/rs/free.x", &["10.0.0.1:80"]).await;
    gateway.serves("free.x", &["10.0.0.1:80"]).await;
    crate::source::rig::until(
        || format!("it is refused: {:?}", gateway.rejects.list()),
        || {
            let list = gateway.rejects.list();
            list.iter()
                .any(|reject| reject.why.contains("guard.owner[0]"))
        },
    )
    .await;
    assert!(gateway.rejects.list()[0].what.contains("owned.x"));
    assert!(gateway.backends("owned.x").is_empty());
}
