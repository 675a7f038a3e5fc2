use std::net::SocketAddr;
use std::process::Command;

use super::*;
use crate::route::ownership::Ground;
use crate::source::rig::{Gateway, Link, OWNED, Server as Process, free_address, until};
use crate::source::status::State;

struct Server {
    process: Process,
    folder: tempfile::TempDir,
    scheme: &'static str,
}

impl Server {
    async fn start() -> Server {
        let folder = tempfile::tempdir().unwrap();
        Server::start_at(free_address(), folder, "http", &[]).await
    }

    async fn start_at(
        address: SocketAddr,
        folder: tempfile::TempDir,
        scheme: &'static str,
        more: &[&str],
    ) -> Server {
        let mut command = Command::new("etcd");
        let (client, peer) = (format!("{scheme}://{address}"), free_address());
        let peer = format!("http://{peer}");
        command.arg("--data-dir").arg(folder.path().join("data"));
        command.args(["--listen-client-urls", &client]);
        command.args(["--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer]);
        command.args(["--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("default={peer}")]);
        command.arg("--unsafe-no-fsync").args(more);
        let process = Process::start(command, address).await;
        let server = Server {
            process,
            folder,
            scheme,
        };
        if scheme == "http" {
            // It listens before it has elected itself.
            let client = server.client().await;
            let status = json!({ "key": "AA==" });
            while client
                .ask::<Value>("/v3/kv/range", &status)
                .await
                .is_err_and(|error| !format!("{error:#}").contains("user"))
            {
                tokio::task::yield_now().await;
            }
        }
        server
    }

    fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.process.address)
    }

    async fn client(&self) -> Client {
        let config = EtcdConfig {
            timeout: Duration::from_secs(30),
            ..EtcdConfig::default()
        };
        connect(&config, &self.url()).await.unwrap()
    }

    async fn call(&self, path: &str, body: Value) -> Value {
        self.client().await.ask(path, &body).await.unwrap()
    }

    async fn put(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        let (key, value) = (BASE64_STANDARD.encode(key), BASE64_STANDARD.encode(value));
        self.call("/v3/kv/put", json!({ "key": key, "value": value }))
            .await;
    }

    async fn delete(&self, key: impl AsRef<[u8]>) {
        let key = BASE64_STANDARD.encode(key);
        self.call("/v3/kv/deleterange", json!({ "key": key })).await;
    }
}

const MAP: &str = "[[etcd.map]]\nuris = [\"{service}.x\"]\nvips = [\"tcp/192.0.2.1:80\"]\n";

fn config(url: &str, more: &str) -> String {
    format!("[l4]\nvip_ranges = [\"192.0.2.0/24\"]\n[etcd]\nendpoints = [\"{url}\"]\n{more}{MAP}")
}

fn route(uri: &str, address: &str) -> String {
    format!(r#"{{"uris":["{uri}"],"backend":[{{"address":"{address}"}}]}}"#)
}

#[tokio::test]
async fn routes_and_instances_are_served_and_followed() {
    let server = Server::start().await;
    server
        .put("/viaduct/routes/a", route("a.x", "10.0.0.1:80"))
        .await;
    server.put("/services/shop/1", "10.0.0.1:81").await;
    server.put("/elsewhere", "x").await;
    let gateway = Gateway::start(Origin::Etcd, &config(&server.url(), ""), run);
    gateway.serves("a.x", &["10.0.0.1:80"]).await;
    gateway.serves("shop.x", &["10.0.0.1:81"]).await;
    gateway.is_whole().await;
    assert_eq!(gateway.vip_backends("tcp/192.0.2.1:80"), ["10.0.0.1:81"]);

    let instance = r#"{"host":"10.0.0.2","port":82,"weight":50,"tags":["web"]}"#;
    server.put("/services/shop/2", instance).await;
    gateway
        .serves("shop.x", &["10.0.0.1:81", "10.0.0.2:82*50"])
        .await;
    server
        .put("/viaduct/routes/a", route("b.x", "10.0.0.1:80"))
        .await;
    gateway.serves("b.x", &["10.0.0.1:80"]).await;
    gateway.serves("a.x", &[]).await;
    server.delete("/services/shop/1").await;
    gateway.serves("shop.x", &["10.0.0.2:82*50"]).await;
    assert_eq!(gateway.rejects.list(), []);

    // What the ranges do not have goes, and comes back with them.
    let text = config(&server.url(), "");
    gateway
        .reload(&text.replace("192.0.2.0/24", "192.0.2.128/25"))
        .await;
    gateway.refuses("/services/shop/2", "vips[0]").await;
    until(
        || "the VIP is gone".to_owned(),
        || gateway.vip_backends("tcp/192.0.2.1:80").is_empty(),
    )
    .await;
    gateway.reload(&text).await;
    until(
        || "the VIP is back".to_owned(),
        || gateway.vip_backends("tcp/192.0.2.1:80") == ["10.0.0.2:82"],
    )
    .await;
    gateway
        .reload(&text.replace("{service}.x", "{service}.y"))
        .await;
    gateway.serves("shop.y", &["10.0.0.2:82*50"]).await;
    gateway.serves("shop.x", &[]).await;
    gateway.reload("").await;
    gateway.serves("b.x", &[]).await;
}

#[tokio::test]
async fn an_instance_goes_with_its_lease() {
    let server = Server::start().await;
    let lease = server.call("/v3/lease/grant", json!({ "TTL": 1000 })).await;
    let key = BASE64_STANDARD.encode("/services/shop/1");
    let value = BASE64_STANDARD.encode("10.0.0.1:81");
    let put = json!({ "key": key, "value": value, "lease": lease["ID"] });
    server.call("/v3/kv/put", put).await;
    let gateway = Gateway::start(Origin::Etcd, &config(&server.url(), ""), run);
    gateway.serves("shop.x", &["10.0.0.1:81"]).await;
    gateway.is_whole().await;
    // To be revoked is to expire at once.
    let revoke = json!({ "ID": lease["ID"] });
    server.call("/v3/kv/lease/revoke", revoke).await;
    gateway.serves("shop.x", &[]).await;
}

#[tokio::test]
async fn more_than_a_page_is_read_at_one_revision() {
    let server = Server::start().await;
    let client = server.client().await;
    let count = PAGE + 10;
    for chunk in (0..count).collect::<Vec<_>>().chunks(100) {
        let puts: Vec<Value> = chunk
            .iter()
            .map(|i| {
                let key = BASE64_STANDARD.encode(format!("/services/s{i}/1"));
                let value = BASE64_STANDARD.encode("10.0.0.1:81");
                json!({ "request_put": { "key": key, "value": value } })
            })
            .collect();
        let put = json!({ "success": puts });
        let _: Value = client.ask("/v3/kv/txn", &put).await.unwrap();
    }
    let gateway = Gateway::start(Origin::Etcd, &config(&server.url(), ""), run);
    gateway.is_whole().await;
    until(
        || format!("all are served: {}", gateway.snapshot().hosts.len()),
        || gateway.snapshot().hosts.len() == count,
    )
    .await;
}

#[tokio::test]
async fn long_values_are_read_in_shorter_pages() {
    let server = Server::start().await;
    for i in 0..5 {
        let route = route("a.x", &format!("10.0.0.{i}:80"));
        let padded = format!("{route}{}", " ".repeat(1_000_000));
        server.put(format!("/viaduct/routes/{i}"), padded).await;
    }
    let gateway = Gateway::start(Origin::Etcd, &config(&server.url(), ""), run);
    let backends: Vec<String> = (0..5).map(|i| format!("10.0.0.{i}:80")).collect();
    let backends: Vec<&str> = backends.iter().map(String::as_str).collect();
    gateway.serves("a.x", &backends).await;
}

#[tokio::test]
async fn routes_outlast_the_server_and_a_compaction_while_it_was_away() {
    let server = Server::start().await;
    server.put("/services/a/1", "10.0.0.1:80").await;
    server.put("/services/b/1", "10.0.0.1:80").await;
    let link = Link::to(server.process.address).await;
    let url = format!("http://{}", link.address);
    let short = "timeout = \"300ms\"\nrescan_interval = \"10ms\"\n";
    let gateway = Gateway::start(Origin::Etcd, &config(&url, short), run);
    gateway.is_whole().await;
    link.hold_up(true);
    gateway.is(State::Lost).await;
    server.delete("/services/b/1").await;
    server.put("/services/c/1", "10.0.0.1:80").await;
    let kv = server.call("/v3/kv/range", json!({ "key": "AA==" })).await;
    let revision = kv["header"]["revision"].clone();
    server
        .call("/v3/kv/compaction", json!({ "revision": revision }))
        .await;
    assert_eq!(gateway.backends("b.x"), ["10.0.0.1:80"]);
    link.hold_up(false);
    gateway.is(State::Connected).await;
    gateway.serves("c.x", &["10.0.0.1:80"]).await;
    gateway.serves("b.x", &[]).await;
    assert_eq!(gateway.backends("a.x"), ["10.0.0.1:80"]);

    let Server {
        process, folder, ..
    } = server;
    let address = process.stop();
    gateway.is(State::Lost).await;
    assert_eq!(gateway.backends("a.x"), ["10.0.0.1:80"]);
    let server = Server::start_at(address, folder, "http", &[]).await;
    server.put("/services/d/1", "10.0.0.1:80").await;
    gateway.serves("d.x", &["10.0.0.1:80"]).await;
}

#[tokio::test]
async fn a_watch_from_a_compacted_revision_reads_everything_again() {
    let server = Server::start().await;
    for _ in 0..3 {
        server.put("/services/a/1", "10.0.0.1:80").await;
    }
    server
        .call("/v3/kv/compaction", json!({ "revision": "3" }))
        .await;
    let client = server.client().await;
    let watch = client.watch("/services/", 1).await.unwrap();
    let gateway = Gateway::start(Origin::Etcd, "[etcd]\n", |context| async {
        let maps = [];
        let layout = Layout {
            routes_prefix: "/services/",
            maps: &maps,
        };
        let mut store = Store::new(context, Origin::Etcd);
        let error = follow(vec![watch], &layout, &mut store).await.unwrap_err();
        store.statuses().lost(Origin::Etcd, &error.to_string());
    });
    let error = || gateway.error();
    until(error, || error() == "watch: compacted up to revision 3").await;
}

#[tokio::test]
async fn garbage_is_refused_by_key_and_keeps_what_was_there() {
    let server = Server::start().await;
    server.put("/services/a/1", "10.0.0.1:80").await;
    let gateway = Gateway::start(Origin::Etcd, &config(&server.url(), ""), run);
    gateway.is_whole().await;
    server.put("/services/a/1", "nonsense").await;
    gateway.refuses("/services/a/1", "nonsense").await;
    server.put(b"/services/\xff/1", "10.0.0.1:80").await;
    gateway.refuses("/services/\\xff/1", "key: not UTF-8").await;
    server.put("/services/b/1", b"\xff\0").await;
    gateway.refuses("/services/b/1", "value: not UTF-8").await;
    server.put("/viaduct/routes/c", "{").await;
    gateway.refuses("/viaduct/routes/c", "EOF").await;
    server.put("/services/d/1", "x".repeat(1_200_000)).await;
    gateway.refuses("/services/d/1", "longer than").await;
    server.put("/services/e/1", "10.0.0.1:80").await;
    gateway.serves("e.x", &["10.0.0.1:80"]).await;
    assert_eq!(gateway.backends("a.x"), ["10.0.0.1:80"]);
    assert_eq!(gateway.rejects.list().len(), 5);
    server.delete(b"/services/\xff/1").await;
    server.put("/services/a/1", "10.0.0.2:80").await;
    gateway.serves("a.x", &["10.0.0.2:80"]).await;
    assert_eq!(gateway.rejects.list().len(), 3);
}

#[tokio::test]
async fn a_user_without_rights_is_told_so_and_one_with_rights_reads() {
    let server = Server::start().await;
    server.put("/services/a/1", "10.0.0.1:80").await;
    for (path, body) in [
        ("user/add", json!({ "name": "root", "password": "p" })),
        ("role/add", json!({ "name": "root" })),
        ("user/grant", json!({ "user": "root", "role": "root" })),
        ("user/add", json!({ "name": "nobody", "password": "p" })),
        ("user/add", json!({ "name": "reader", "password": "p" })),
        ("role/add", json!({ "name": "read" })),
        (
            "role/grant",
            json!({ "name": "read", "perm": {
                "permType": "READ",
                "key": BASE64_STANDARD.encode("/services/"),
                "range_end": BASE64_STANDARD.encode("/services0"),
            }}),
        ),
        ("user/grant", json!({ "user": "reader", "role": "read" })),
        ("enable", json!({})),
    ] {
        server.call(&format!("/v3/auth/{path}"), body).await;
    }
    let text = |user: &str, password: &str| {
        let more = format!("user = {user:?}\npassword = {password:?}\nroutes_prefix = \"\"\n");
        config(&server.url(), &more)
    };
    let gateway = Gateway::start(Origin::Etcd, &text("nobody", "p"), run);
    let error = || gateway.error();
    until(error, || error().contains("permission denied")).await;
    gateway.reload(&text("reader", "p")).await;
    gateway.serves("a.x", &["10.0.0.1:80"]).await;
    gateway.is_whole().await;
    gateway.reload(&text("reader", "wrong")).await;
    until(error, || error().contains("authentication failed")).await;
    assert_eq!(gateway.backends("a.x"), ["10.0.0.1:80"]);
}

#[tokio::test]
async fn it_speaks_tls_to_a_server_that_its_certificates_vouch_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    std::fs::write(path("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(path("key.pem"), made.signing_key.serialize_pem()).unwrap();
    let (certificate, key) = (path("cert.pem"), path("key.pem"));
    let tls = ["--cert-file", &certificate, "--key-file", &key];
    let server = Server::start_at(free_address(), folder, "https", &tls).await;
    let gateway = Gateway::start(Origin::Etcd, &config(&server.url(), ""), run);
    let error = || gateway.error();
    until(error, || error().contains("certificate")).await;
    let ca = format!("ca_file = {certificate:?}\n");
    gateway.reload(&config(&server.url(), &ca)).await;
    gateway.is_whole().await;
}

#[tokio::test]
async fn a_host_that_a_rule_gives_to_others_is_refused_until_a_reload_allows_it() {
    let server = Server::start().await;
    let plain = config(&server.url(), "");
    let gateway = Gateway::start(Origin::Etcd, &(plain.clone() + OWNED), run);
    gateway.is_whole().await;
    let key = "/viaduct/routes/a";
    server.put(key, route("owned.x", "10.0.0.1:80")).await;
    gateway
        .refuses(key, "guard.owner[0] gives it to nats")
        .await;
    server.put("/services/free/1", "10.0.0.1:80").await;
    gateway.serves("free.x", &["10.0.0.1:80"]).await;
    assert_eq!(gateway.metrics.guard_refusals(Ground::Owned).get(), 1);
    assert!(gateway.backends("owned.x").is_empty());
    gateway.reload(&plain).await;
    gateway.serves("owned.x", &["10.0.0.1:80"]).await;
    gateway.reload(&(plain + OWNED)).await;
    gateway.serves("owned.x", &[]).await;
    gateway.serves("free.x", &["10.0.0.1:80"]).await;
}
