use std::net::SocketAddr;
use std::process::Command;

use zookeeper_client::{Acls, CreateMode};

use super::*;
use crate::source::rig::{Gateway, Link, OWNED, Server as Process, free_address, until};
use crate::source::status::State;

/// Where the distribution keeps the server; it brings no program of its own.
const CLASS_PATH: &str = "/etc/zookeeper/conf:/usr/share/java/zookeeper.jar";

struct Server {
    process: Process,
    folder: tempfile::TempDir,
}

impl Server {
    async fn start() -> Server {
        Server::start_at(free_address(), tempfile::tempdir().unwrap()).await
    }

    async fn start_at(address: SocketAddr, folder: tempfile::TempDir) -> Server {
        let config = folder.path().join("zoo.cfg");
        let text = format!(
            "tickTime=200\nminSessionTimeout=400\ndataDir={}\nclientPort={}\n\
             clientPortAddress=127.0.0.1\nadmin.enableServer=false\n",
            folder.path().display(),
            address.port()
        );
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new("java");
        command.args(["-XX:TieredStopAtLevel=1", "-Xmx128m", "-cp", CLASS_PATH]);
        command.arg("-Dzookeeper.forceSync=no");
        command.arg("org.apache.zookeeper.server.quorum.QuorumPeerMain");
        command.arg(&config);
        let process = Process::start(command, address).await;
        Server { process, folder }
    }

    async fn client(&self) -> Client {
        let connector = Client::connector().with_session_timeout(Duration::from_secs(20));
        let mut connector = connector.with_auth("digest", b"admin:p");
        loop {
            let server = self.process.address.to_string();
            match connector.connect(&server).await {
                Ok(client) => return client,
                // It listens before it serves.
                Err(_) => connector = Client::connector().with_auth("digest", b"admin:p"),
            }
        }
    }
}

async fn create(client: &Client, path: &str, data: &str) {
    let options = CreateMode::Persistent.with_acls(Acls::anyone_all());
    if let Some((parent, _)) = path
        .rsplit_once('/')
        .filter(|(parent, _)| !parent.is_empty())
    {
        client.mkdir(parent, &options).await.unwrap();
    }
    client
        .create(path, data.as_bytes(), &options)
        .await
        .unwrap();
}

const MAP: &str = "[[zookeeper.map]]\nuris = [\"{service}.x\"]\n";

fn config(server: SocketAddr, more: &str) -> String {
    format!("[zookeeper]\nservers = [\"{server}\"]\n{more}{MAP}")
}

fn route(uri: &str, address: &str) -> String {
    format!(r#"{{"uris":["{uri}"],"backend":[{{"address":"{address}"}}]}}"#)
}

#[tokio::test]
async fn routes_and_instances_are_served_and_followed() {
    let server = Server::start().await;
    for recursive in ["", "recursive_watches = false\n"] {
        let client = server.client().await;
        create(&client, "/viaduct/routes/a", &route("a.x", "10.0.0.1:80")).await;
        create(
            &client,
            "/viaduct/routes/team/b",
            &route("b.x", "10.0.0.1:80"),
        )
        .await;
        create(&client, "/services/shop/1", "10.0.0.1:81").await;
        create(&client, "/elsewhere", "x").await;
        let text = config(server.process.address, recursive);
        let gateway = Gateway::start(Origin::Zookeeper, &text, run);
        gateway.serves("a.x", &["10.0.0.1:80"]).await;
        gateway.serves("b.x", &["10.0.0.1:80"]).await;
        gateway.serves("shop.x", &["10.0.0.1:81"]).await;
        gateway.is_whole().await;
        create(&client, "/services/other/1", "10.0.0.3:80").await;
        gateway.serves("other.x", &["10.0.0.3:80"]).await;

        // As long as its instance has a session.
        let instance = server.client().await;
        let options = CreateMode::Ephemeral.with_acls(Acls::anyone_all());
        let data = br#"{"host":"10.0.0.2","port":82}"#;
        let created = instance.create("/services/shop/2", data, &options).await;
        created.unwrap();
        gateway
            .serves("shop.x", &["10.0.0.1:81", "10.0.0.2:82"])
            .await;
        drop(instance);
        gateway.serves("shop.x", &["10.0.0.1:81"]).await;
        let data = route("c.x", "10.0.0.1:80");
        client
            .set_data("/viaduct/routes/a", data.as_bytes(), None)
            .await
            .unwrap();
        gateway.serves("c.x", &["10.0.0.1:80"]).await;
        gateway.serves("a.x", &[]).await;
        client
            .set_data("/services/shop/1", b"", None)
            .await
            .unwrap();
        gateway.serves("shop.x", &[]).await;
        assert_eq!(gateway.rejects.list(), []);
        gateway
            .reload(&text.replace("{service}.x", "{service}.y"))
            .await;
        gateway.serves("other.y", &["10.0.0.3:80"]).await;
        gateway.serves("other.x", &[]).await;
        for path in [
            "/viaduct/routes/a",
            "/viaduct/routes/team/b",
            "/viaduct/routes/team",
            "/services/shop/1",
            "/services/shop",
            "/services/other/1",
            "/services/other",
            "/elsewhere",
        ] {
            client.delete(path, None).await.unwrap();
        }
        until(
            || "all are gone".to_owned(),
            || gateway.snapshot().hosts.is_empty(),
        )
        .await;
    }
}

#[tokio::test]
async fn routes_outlast_a_server_that_stalls_or_ends() {
    let server = Server::start().await;
    let client = server.client().await;
    create(&client, "/services/a/1", "10.0.0.1:80").await;
    create(&client, "/services/b/1", "10.0.0.1:80").await;
    let link = Link::to(server.process.address).await;
    let text = config(link.address, "session_timeout = \"2s\"\n");
    let gateway = Gateway::start(Origin::Zookeeper, &text, run);
    gateway.is_whole().await;
    link.hold_up(true);
    gateway.is(State::Lost).await;
    client.delete("/services/b/1", None).await.unwrap();
    create(&client, "/services/c/1", "10.0.0.1:80").await;
    assert_eq!(gateway.backends("b.x"), ["10.0.0.1:80"]);
    link.hold_up(false);
    gateway.serves("c.x", &["10.0.0.1:80"]).await;
    gateway.serves("b.x", &[]).await;
    assert_eq!(gateway.backends("a.x"), ["10.0.0.1:80"]);

    let Server { process, folder } = server;
    let address = process.stop();
    gateway.is(State::Lost).await;
    assert_eq!(gateway.backends("a.x"), ["10.0.0.1:80"]);
    let server = Server::start_at(address, folder).await;
    let client = server.client().await;
    create(&client, "/services/d/1", "10.0.0.1:80").await;
    gateway.serves("d.x", &["10.0.0.1:80"]).await;
    assert_eq!(gateway.backends("a.x"), ["10.0.0.1:80"]);
}

#[tokio::test]
async fn garbage_is_refused_by_path_and_keeps_what_was_there() {
    let server = Server::start().await;
    let client = server.client().await;
    create(&client, "/services/a/1", "10.0.0.1:80").await;
    let text = config(server.process.address, "");
    let gateway = Gateway::start(Origin::Zookeeper, &text, run);
    gateway.is_whole().await;
    let set = client.set_data("/services/a/1", b"nonsense", None).await;
    set.unwrap();
    gateway.refuses("/services/a/1", "nonsense").await;
    create(&client, "/services/b/1", "").await;
    let set = client.set_data("/services/b/1", b"\xff\0", None).await;
    set.unwrap();
    gateway.refuses("/services/b/1", "value: not UTF-8").await;
    create(&client, "/services/c d/1", "10.0.0.1:80").await;
    gateway.refuses("/services/c d/1", "host").await;
    create(&client, "/viaduct/routes/e", "{").await;
    gateway.refuses("/viaduct/routes/e", "EOF").await;
    create(&client, "/services/f/1/2", "10.0.0.1:80").await;
    gateway.refuses("/services/f/1/2", "deeper").await;
    create(&client, "/services/g/1", "10.0.0.1:80").await;
    gateway.serves("g.x", &["10.0.0.1:80"]).await;
    assert_eq!(gateway.backends("a.x"), ["10.0.0.1:80"]);
    client.delete("/services/b/1", None).await.unwrap();
    let set = client.set_data("/services/a/1", b"10.0.0.2:80", None).await;
    set.unwrap();
    gateway.serves("a.x", &["10.0.0.2:80"]).await;
    assert_eq!(gateway.rejects.list().len(), 3);
}

#[tokio::test]
async fn a_node_that_may_not_be_read_is_refused_and_a_user_who_may_reads_it() {
    let server = Server::start().await;
    let client = server.client().await;
    create(&client, "/services/a/1", "10.0.0.1:80").await;
    create(&client, "/services/b", "").await;
    let options = CreateMode::Persistent.with_acls(Acls::creator_all());
    for (path, data) in [
        ("/services/a/2", &b"10.0.0.2:80"[..]),
        ("/services/c", b""),
        ("/services/c/1", b"10.0.0.1:80"),
    ] {
        client.create(path, data, &options).await.unwrap();
    }
    let text = |user: &str| {
        let more = format!("user = {user:?}\npassword = \"p\"\n");
        config(server.process.address, &more)
    };
    let gateway = Gateway::start(Origin::Zookeeper, &text("other"), run);
    gateway.is_whole().await;
    gateway.serves("a.x", &["10.0.0.1:80"]).await;
    gateway.refuses("/services/a/2", "not authorized").await;
    gateway.refuses("/services/c", "not authorized").await;
    gateway.reload(&text("admin")).await;
    gateway.serves("a.x", &["10.0.0.1:80", "10.0.0.2:80"]).await;
    gateway.serves("c.x", &["10.0.0.1:80"]).await;
    gateway.is_whole().await;
    assert_eq!(gateway.rejects.list(), []);
    gateway.reload(&text("other")).await;
    gateway.refuses("/services/c", "not authorized").await;
    gateway.is_whole().await;
    assert_eq!(gateway.backends("c.x"), ["10.0.0.1:80"], "it stays");
}

#[tokio::test]
async fn a_host_that_a_rule_gives_to_others_is_refused() {
    let server = Server::start().await;
    let client = server.client().await;
    let key = "/viaduct/routes/a";
    create(&client, key, &route("owned.x", "10.0.0.1:80")).await;
    create(&client, "/services/free/1", "10.0.0.1:80").await;
    let text = config(server.process.address, "") + OWNED;
    let gateway = Gateway::start(Origin::Zookeeper, &text, run);
    gateway.serves("free.x", &["10.0.0.1:80"]).await;
    gateway
        .refuses(key, "guard.owner[0] gives it to nats")
        .await;
    assert!(gateway.backends("owned.x").is_empty());
}
