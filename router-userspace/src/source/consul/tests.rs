use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::*;
use crate::source::rig::{Gateway, Link, OWNED, free_address, until};
use crate::source::status::State;

/// A double of an agent: the three endpoints with the indexes, waits, refusals and shapes of answers
/// that Consul's HTTP API documents for blocking queries.
struct Double {
    address: SocketAddr,
    state: Arc<Mutex<Answers>>,
    changed: watch::Sender<u64>,
    serving: AbortHandle,
}

#[derive(Default)]
struct Answers {
    /// `id`, `Address`, `Port` and `Tags` of the passing instances of each service.
    services: BTreeMap<String, Vec<Value>>,
    routes: BTreeMap<String, Vec<u8>>,
    /// The index of the latest change of each path.
    indexes: HashMap<String, u64>,
    token: Option<String>,
}

impl Double {
    async fn start() -> Double {
        Double::start_at(free_address()).await
    }

    async fn start_at(address: SocketAddr) -> Double {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let state = Arc::new(Mutex::new(Answers::default()));
        let (changed, changes) = watch::channel(10);
        let shared = Arc::clone(&state);
        let serving = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (state, changes) = (Arc::clone(&shared), changes.clone());
                let service = hyper::service::service_fn(move |request| {
                    answer(request, Arc::clone(&state), changes.clone())
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service);
                connections.spawn(async move {
                    let _ = connection.await;
                });
            }
        });
        Double {
            address,
            state,
            changed,
            serving: serving.abort_handle(),
        }
    }

    fn change(&self, path: &str, change: impl FnOnce(&mut Answers)) {
        let index = *self.changed.borrow() + 1;
        let mut state = self.state.lock().unwrap();
        change(&mut state);
        for path in [path, "catalog/services"] {
            state.indexes.insert(path.to_owned(), index);
        }
        drop(state);
        self.changed.send_replace(index);
    }

    fn go_back_to(&self, to: u64) {
        let mut state = self.state.lock().unwrap();
        state.indexes.values_mut().for_each(|index| *index = to);
        drop(state);
        self.changed.send_replace(to);
    }

    fn set(&self, service: &str, instances: &[Value]) {
        self.change(&format!("health/service/{service}"), |state| {
            let instances = instances.to_vec();
            match instances.is_empty() {
                true => state.services.remove(service),
                false => state.services.insert(service.to_owned(), instances),
            };
        });
    }

    fn put(&self, key: &str, value: &[u8]) {
        self.change("kv/viaduct/routes/", |state| {
            state.routes.insert(key.to_owned(), value.to_vec());
        });
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn answer(
    request: Request<Incoming>,
    state: Arc<Mutex<Answers>>,
    mut changes: watch::Receiver<u64>,
) -> Result<Response<Full<Bytes>>, std::convert::Infallible> {
    let refuse = |status: u16, text: &'static str| {
        let answer = Response::builder().status(status);
        Ok(answer.body(Full::from(text)).unwrap())
    };
    let path = request
        .uri()
        .path()
        .strip_prefix("/v1/")
        .unwrap()
        .to_owned();
    let query: HashMap<&str, &str> = request
        .uri()
        .query()
        .unwrap()
        .split('&')
        .map(|pair| pair.split_once('=').unwrap())
        .collect();
    let token = request.headers().get("x-consul-token");
    let wanted = state.lock().unwrap().token.clone();
    if wanted.is_some_and(|wanted| token.is_none_or(|token| token != wanted.as_str())) {
        return refuse(
            403,
            "Permission denied: token lacks permission 'service:read'",
        );
    }
    let since: u64 = query["index"].parse().unwrap();
    let wait = query["wait"].strip_suffix("ms").unwrap().parse().unwrap();
    let index = || {
        let state = state.lock().unwrap();
        state.indexes.get(&path).copied().unwrap_or(10)
    };
    let passed = async {
        while index() == since {
            changes.changed().await.unwrap();
        }
    };
    if since > 0 {
        let _ = tokio::time::timeout(Duration::from_millis(wait), passed).await;
    }
    let index = index();
    let state = state.lock().unwrap();
    let body = if path == "catalog/services" {
        let tags = |instances: &Vec<Value>| -> Vec<Value> {
            let tags = instances.iter().filter_map(|one| one["Tags"].as_array());
            tags.flatten().cloned().collect()
        };
        let services = state.services.iter();
        json!(
            services
                .map(|(name, list)| (name, tags(list)))
                .collect::<BTreeMap<_, _>>()
        )
    } else if let Some(name) = path.strip_prefix("health/service/") {
        assert_eq!(query["passing"], "true");
        let instances = state.services.get(name).into_iter().flatten();
        let entries = instances.map(|service| {
            json!({
                "Node": { "Node": "n1", "Address": "10.0.9.9", "Datacenter": "dc1" },
                "Service": service,
                "Checks": [{ "Status": "passing" }],
            })
        });
        entries.collect()
    } else {
        assert_eq!((&*path, query["recurse"]), ("kv/viaduct/routes/", "true"));
        if state.routes.is_empty() {
            return refuse(404, "");
        }
        let entries = state.routes.iter().map(|(key, value)| {
            json!({ "Key": key, "Value": BASE64_STANDARD.encode(value), "Flags": 0 })
        });
        entries.collect()
    };
    let response = Response::builder().header("X-Consul-Index", index);
    Ok(response.body(Full::from(body.to_string())).unwrap())
}

fn instance(id: &str, address: &str, port: u32, tags: &[&str]) -> Value {
    json!({ "ID": id, "Service": "s", "Address": address, "Port": port, "Tags": tags, "Meta": {} })
}

fn config(address: SocketAddr, more: &str) -> String {
    format!(
        "[l4]\nvip_ranges = [\"192.0.2.0/24\"]\n[consul]\naddress = \"http://{address}\"\n{more}"
    )
}

const MAP: &str = "[[consul.map]]\nservice = \"mapped\"\ntag = \"web\"\nuris = [\"{service}.m\"]\n";

#[tokio::test]
async fn services_by_tags_and_maps_and_routes_of_the_store_are_served_and_followed() {
    let double = Double::start().await;
    let tags = [
        "viaduct.uris=a.x, a.y/p",
        "viaduct.vips=tcp/192.0.2.1:80",
        "other",
    ];
    double.set("tagged", &[instance("1", "10.0.0.1", 80, &tags)]);
    double.set("untagged", &[instance("1", "10.0.0.1", 80, &["web"])]);
    double.set(
        "mapped",
        &[
            instance("1", "", 81, &["web"]),
            instance("2", "10.0.0.2", 82, &["db"]),
        ],
    );
    let gateway = Gateway::start(Origin::Consul, &config(double.address, MAP), run);
    gateway.is_whole().await;
    gateway.serves("a.x", &["10.0.0.1:80"]).await;
    gateway.serves("a.y/p", &["10.0.0.1:80"]).await;
    gateway.serves("mapped.m", &["10.0.9.9:81"]).await;
    assert_eq!(gateway.vip_backends("tcp/192.0.2.1:80"), ["10.0.0.1:80"]);
    assert_eq!(gateway.snapshot().hosts.len(), 3);

    let heavy = ["viaduct.uris=a.x", "viaduct.weight=7"];
    double.set(
        "tagged",
        &[
            instance("1", "10.0.0.1", 80, &tags),
            instance("2", "10.0.0.3", 80, &heavy),
        ],
    );
    gateway
        .serves("a.x", &["10.0.0.1:80", "10.0.0.3:80*7"])
        .await;
    double.set("tagged", &[instance("2", "10.0.0.3", 80, &heavy)]);
    gateway.serves("a.x", &["10.0.0.3:80*7"]).await;
    gateway.serves("a.y/p", &[]).await;
    double.set("tagged", &[]);
    gateway.serves("a.x", &[]).await;
    double.set("new", &[instance("1", "2001:db8::1", 80, &heavy)]);
    gateway.serves("a.x", &["[2001:db8::1]:80*7"]).await;
    let route = br#"{"uris":["kv.x"],"backend":[{"address":"10.0.0.1:80"}]}"#;
    double.put("viaduct/routes/a", route);
    gateway.serves("kv.x", &["10.0.0.1:80"]).await;
    double.change("kv/viaduct/routes/", |state| state.routes.clear());
    gateway.serves("kv.x", &[]).await;
    assert_eq!(gateway.rejects.list(), []);
    gateway
        .reload(&config(double.address, &MAP.replace("}.m", "}.n")))
        .await;
    gateway.serves("mapped.n", &["10.0.9.9:81"]).await;
    gateway.serves("mapped.m", &[]).await;
}

#[tokio::test]
async fn more_services_than_queries_take_turns() {
    let double = Double::start().await;
    let count = MAX_ASKED + 20;
    let set = |i: usize, address: &str| {
        let tag = format!("viaduct.uris=h{i}.x");
        double.set(&format!("s{i}"), &[instance("1", address, 80, &[&tag])]);
    };
    (0..count).for_each(|i| set(i, "10.0.0.1"));
    let gateway = Gateway::start(Origin::Consul, &config(double.address, ""), run);
    gateway.is_whole().await;
    until(
        || format!("all are served: {}", gateway.snapshot().hosts.len()),
        || gateway.snapshot().hosts.len() == count,
    )
    .await;
    set(0, "10.0.0.2");
    set(count - 1, "10.0.0.2");
    gateway.serves("h0.x", &["10.0.0.2:80"]).await;
    let last = format!("h{}.x", count - 1);
    gateway.serves(&last, &["10.0.0.2:80"]).await;
}

#[tokio::test]
async fn routes_outlast_an_agent_that_stalls_or_ends_and_an_index_that_goes_back() {
    let double = Double::start().await;
    let at = |host: &str| {
        [instance(
            "1",
            "10.0.0.1",
            80,
            &[&format!("viaduct.uris={host}")],
        )]
    };
    double.set("a", &at("a.x"));
    double.set("b", &at("b.x"));
    let link = Link::to(double.address).await;
    let short = "timeout = \"300ms\"\nwait = \"100ms\"\n";
    let gateway = Gateway::start(Origin::Consul, &config(link.address, short), run);
    gateway.is_whole().await;
    link.hold_up(true);
    gateway.is(State::Lost).await;
    double.set("b", &[]);
    double.set("c", &at("c.x"));
    assert_eq!(gateway.backends("b.x"), ["10.0.0.1:80"]);
    link.hold_up(false);
    gateway.serves("c.x", &["10.0.0.1:80"]).await;
    gateway.serves("b.x", &[]).await;
    assert_eq!(gateway.backends("a.x"), ["10.0.0.1:80"]);

    // Restored from a snapshot: what it says holds, though its indexes are lower.
    double.change("health/service/c", |state| {
        state.services = BTreeMap::from([("a".to_owned(), at("a.x").to_vec())]);
    });
    double.go_back_to(3);
    gateway.serves("c.x", &[]).await;
    let address = double.address;
    drop(double);
    gateway.is(State::Lost).await;
    assert_eq!(gateway.backends("a.x"), ["10.0.0.1:80"]);
    // Connections that end may hold the address for a moment.
    while std::net::TcpListener::bind(address).is_err() {
        tokio::task::yield_now().await;
    }
    let double = Double::start_at(address).await;
    double.set("d", &at("d.x"));
    gateway.serves("d.x", &["10.0.0.1:80"]).await;
    gateway.serves("a.x", &[]).await;
}

#[tokio::test]
async fn garbage_is_refused_by_instance_and_keeps_what_was_there() {
    let double = Double::start().await;
    let tag = |text: &'static str| ["viaduct.uris=a.x", text];
    double.set("good", &[instance("1", "10.0.0.1", 80, &tag("x"))]);
    let gateway = Gateway::start(Origin::Consul, &config(double.address, ""), run);
    gateway.serves("a.x", &["10.0.0.1:80"]).await;
    for (i, (bad, why)) in [
        (instance("1", "backend", 80, &tag("x")), "Address: "),
        (instance("1", "0.0.0.0", 80, &tag("x")), "not the address"),
        (instance("1", "10.0.0.2", 0, &tag("x")), "port 0"),
        (instance("1", "10.0.0.2", 65536, &tag("x")), "Port: "),
        (instance("1", "10.0.0.2", 80, &tag("viaduct.uris=")), "host"),
        (
            instance("1", "10.0.0.2", 80, &tag("viaduct.weight=x")),
            "weight",
        ),
        (
            instance("1", "10.0.0.2", 80, &tag("viaduct.other=x")),
            "other",
        ),
        (
            instance("1", "10.0.0.2", 80, &tag("viaduct.vips=tcp/10.0.0.1:80")),
            "vips[0]",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        double.set(&format!("bad{i}"), &[bad]);
        gateway.refuses(&format!("service/bad{i}/n1/1"), why).await;
    }
    double.put("viaduct/routes/a", b"{");
    gateway.refuses("kv/viaduct/routes/a", "EOF").await;
    double.put("viaduct/routes/b", b"\xff\0");
    gateway.refuses("kv/viaduct/routes/b", "not UTF-8").await;
    double.set("good", &[instance("1", "10.0.0.1", 0, &tag("x"))]);
    gateway.refuses("service/good/n1/1", "port 0").await;
    assert_eq!(gateway.backends("a.x"), ["10.0.0.1:80"]);
    double.set("bad0", &[]);
    double.set("good", &[instance("1", "10.0.0.3", 80, &tag("x"))]);
    gateway.serves("a.x", &["10.0.0.3:80"]).await;
    until(
        || format!("what is gone is forgotten: {:?}", gateway.rejects.list()),
        || gateway.rejects.list().len() == 9,
    )
    .await;
}

#[tokio::test]
async fn a_token_without_rights_is_told_so() {
    let double = Double::start().await;
    double.change("", |state| state.token = Some("good".to_owned()));
    double.set("a", &[instance("1", "10.0.0.1", 80, &["viaduct.uris=a.x"])]);
    let text = |token: &str| config(double.address, &format!("token = {token:?}\n"));
    let gateway = Gateway::start(Origin::Consul, &text("bad"), run);
    let error = || gateway.error();
    until(error, || {
        error().contains("403") && error().contains("Permission denied")
    })
    .await;
    gateway.reload(&text("good")).await;
    gateway.serves("a.x", &["10.0.0.1:80"]).await;
}

#[tokio::test]
async fn a_host_that_a_rule_gives_to_others_is_refused() {
    let double = Double::start().await;
    let owned = ["viaduct.uris=owned.x"];
    double.set("one", &[instance("1", "10.0.0.1", 80, &owned)]);
    let free = ["viaduct.uris=free.x"];
    double.set("two", &[instance("1", "10.0.0.1", 80, &free)]);
    let text = config(double.address, OWNED);
    let gateway = Gateway::start(Origin::Consul, &text, run);
    gateway.serves("free.x", &["10.0.0.1:80"]).await;
    until(
        || format!("it is refused: {:?}", gateway.rejects.list()),
        || {
            let list = gateway.rejects.list();
            list.iter()
                .any(|reject| reject.why.contains("guard.owner[0]"))
        },
    )
    .await;
    assert!(gateway.backends("owned.x").is_empty());
}
