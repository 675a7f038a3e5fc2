use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::*;
use crate::config::Config;
use crate::event::Event;
use crate::metrics::Metrics;
use crate::rejects::Rejects;
use crate::route::{Balance, HttpProtocol, RouteEvent};

fn config() -> Arc<Config> {
    Arc::new(crate::config::parse("[l4]\nvip_ranges = [\"192.0.2.0/24\"]").unwrap())
}

#[test]
fn a_route_has_every_property_of_a_registration() {
    let text = r#"
        [[route]]
        uris = ["A.x/P/", "*.x"]
        vips = ["tcp/192.0.2.1:80"]
        balance = "least-connections"
        route_service_url = "https://r"
        [[route.backend]]
        address = "10.0.0.1:8080"
        weight = 7
        protocol = "http2"
        tls = { server_name = "san" }
        [[route.backend]]
        address = "[2001:db8::1]:80"
    "#;
    let Announcement {
        registrations,
        declarations,
    } = parse(text, &config()).unwrap();
    assert_eq!(registrations.len(), 2);
    let routes: Vec<String> = registrations[0]
        .routes
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(routes, ["a.x/p", "*.x", "tcp/192.0.2.1:80"]);
    let backend = &registrations[0].backend;
    assert_eq!((backend.weight, backend.protocol), (7, HttpProtocol::Http2));
    assert_eq!(backend.tls().unwrap().server_name.as_deref(), Some("san"));
    let declared: Vec<String> = declarations.iter().map(|d| d.route.to_string()).collect();
    assert_eq!(declared, ["a.x/p", "*.x"]);
    let policy = &declarations[0].policy;
    assert_eq!(policy.balance, Some(Balance::LeastConnections));
    assert_eq!(policy.route_service_url.as_deref(), Some("https://r"));
    assert_eq!(
        (
            registrations[1].backend.weight,
            registrations[1].backend.tls()
        ),
        (100, None)
    );
}

#[test]
fn a_mistake_is_named_by_line_and_key() {
    let backend = "[[route.backend]]\naddress = \"10.0.0.1:80\"\n";
    for (text, parts) in [
        (
            format!("[[route]]\nuris = [\"\"]\n{backend}"),
            ["line 2", "uris"],
        ),
        (
            format!("[[route]]\nurls = [\"a\"]\n{backend}"),
            ["line 2", "urls"],
        ),
        (
            format!("[[route]]\n\nvips = [\"tcp/10.0.0.1:80\"]\n{backend}"),
            ["line 1", "vips[0]"],
        ),
        (format!("[[route]]\n{backend}"), ["route[0]", "neither"]),
        (
            "[[route]]\nuris = [\"a\"]\n".to_owned(),
            ["line 1", "backend"],
        ),
        (
            format!("[[route]]\nuris = [\"a\"]\n{backend}weight = 1001\n"),
            ["line 5", "weight"],
        ),
        (
            "[[route]]\nuris = [\"a\"]\n[[route.backend]]\naddress = \"10.0.0.1:0\"\n".to_owned(),
            ["line 4", "port 0"],
        ),
    ] {
        let error = format!("{:#}", parse(&text, &config()).unwrap_err());
        for part in parts {
            assert!(error.contains(part), "{text:?}: {error:?} lacks {part:?}");
        }
    }
}

fn text(uris: &[&str]) -> String {
    let route = |uri| {
        format!("[[route]]\nuris = [{uri:?}]\n[[route.backend]]\naddress = \"10.0.0.1:80\"\n")
    };
    uris.iter().map(route).collect()
}

#[tokio::test]
async fn a_bad_file_keeps_the_routes_it_had_and_a_good_one_changes_what_differs() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("routes.toml");
    let write = |uris: &[&str]| std::fs::write(&path, text(uris)).unwrap();
    let mut config = Config::default();
    config.file.paths = vec![path.clone()];
    config.file.poll_interval = Duration::from_millis(5);
    let (reload, config) = watch::channel(Arc::new(config));
    let (inbox, mut events) = mpsc::channel(8);
    let metrics = Arc::<Metrics>::default();
    let rejects = Arc::<Rejects>::default();
    tokio::spawn(run(Context {
        inbox,
        metrics: Arc::clone(&metrics),
        rejects: Arc::clone(&rejects),
        config,
    }));
    let mut next = async || match next_route(&mut events).await {
        Event::Route(RouteEvent::Register(registration)) => format!("+{}", registration.routes[0]),
        Event::Route(RouteEvent::Unregister(gone)) => format!("-{}", gone.routes[0]),
        Event::Route(RouteEvent::Declare(declared)) => format!("declare {}", declared.route),
        Event::Route(RouteEvent::Withdraw(gone)) => format!("withdraw {}", gone.route),
        event => panic!("{event:?}"),
    };
    let refused = async |count: u64| {
        while metrics.file_rejects.get() < count {
            tokio::task::yield_now().await;
        }
        assert_eq!(metrics.files.judge([&path]), (0, 1));
    };

    assert_eq!(metrics.files.judge([&path]), (1, 0));
    refused(1).await;
    write(&["a.x", "b.x"]);
    assert_eq!([next().await, next().await], ["+a.x", "+b.x"]);
    // The mark is made before the routes are sent.
    assert_eq!(metrics.files.judge([&path]), (0, 0));
    write(&["not a host"]);
    refused(2).await;
    let refusals = rejects.list();
    assert_eq!((refusals.len(), refusals[0].origin), (1, Origin::File));
    assert!(refusals[0].why.contains("line 2"), "{}", refusals[0].why);
    write(&["b.x", "new.example.com"]);
    assert_eq!([next().await, next().await], ["+new.example.com", "-a.x"]);
    assert_eq!(rejects.list(), []);
    std::fs::remove_file(&path).unwrap();
    refused(3).await;
    reload.send_modify(|config| Arc::make_mut(config).file.paths.clear());
    assert_eq!([next().await, next().await], ["-b.x", "-new.example.com"]);
}

#[tokio::test]
async fn a_file_that_is_being_written_is_left_until_it_rests() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("routes.toml");
    std::fs::write(&path, text(&["a.x", "b.x"])).unwrap();
    let mut known = Known::default();
    let first = look(&path, &mut known, &config()).await.unwrap().unwrap();
    assert_eq!(first.registrations.len(), 2);
    known.is_empty = first.is_empty();
    assert!(
        look(&path, &mut known, &config()).await.is_none(),
        "nothing new"
    );
    // Half of it is a good file too.
    std::fs::write(&path, text(&["a.x"])).unwrap();
    assert!(look(&path, &mut known, &config()).await.is_none());
    std::fs::write(&path, text(&["a.x", "b.x", "c.x"])).unwrap();
    assert!(look(&path, &mut known, &config()).await.is_none());
    let rested = look(&path, &mut known, &config()).await.unwrap().unwrap();
    assert_eq!(rested.registrations.len(), 3);
    std::fs::remove_file(&path).unwrap();
    for _ in 0..2 {
        let error = look(&path, &mut known, &config())
            .await
            .unwrap()
            .unwrap_err();
        assert!(
            format!("{error:#}").contains("routes.toml"),
            "it is tried again"
        );
    }
}

#[tokio::test]
async fn the_files_of_a_directory_come_and_go_and_one_that_is_bad_keeps_its_routes() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("routes");
    let write = |name: &str, text: &str| {
        // As editors and deployments do: whole or not at all.
        let draft = folder.path().join("draft");
        std::fs::write(&draft, text).unwrap();
        std::fs::rename(draft, directory.join(name)).unwrap();
    };
    let config = format!("[file]\ndirectories = [{directory:?}]\npoll_interval = \"5ms\"\n");
    let gateway = crate::source::rig::Gateway::start(Origin::File, &config, run);
    let name = directory.to_string_lossy();
    gateway.refuses(&name, "read").await;
    assert_eq!(gateway.metrics.files.judge([&directory]), (0, 1));
    std::fs::create_dir(&directory).unwrap();
    write("a.toml", &text(&["a.x"]));
    let json = r#"{"route":[{"uris":["b.x"],"backend":[{"address":"10.0.0.2:80","weight":7}]}]}"#;
    write("b.json", json);
    write(".hidden.toml", "nonsense");
    write("notes.txt", "nonsense");
    gateway.serves("a.x", &["10.0.0.1:80"]).await;
    gateway.serves("b.x", &["10.0.0.2:80*7"]).await;
    assert_eq!(gateway.rejects.list(), []);
    let file = |name: &str| directory.join(name).to_string_lossy().into_owned();
    write("a.toml", "[[route]]\nurls = []\n");
    gateway.refuses(&file("a.toml"), "line 2").await;
    write("b.json", &json.replace("b.x", "b b"));
    gateway.refuses(&file("b.json"), "line 1").await;
    write("b.json", r#"{"route":[{"uris":["b.x"]}]}"#);
    gateway.refuses(&file("b.json"), "route[0].backend").await;
    write("c.json", &json.replace("b.x", "c.x"));
    gateway.serves("c.x", &["10.0.0.2:80*7"]).await;
    gateway.serves("a.x", &["10.0.0.1:80"]).await;
    gateway.serves("b.x", &["10.0.0.2:80*7"]).await;
    std::fs::remove_file(directory.join("a.toml")).unwrap();
    gateway.serves("a.x", &[]).await;
    // A directory that is away says nothing of its files.
    std::fs::rename(&directory, folder.path().join("away")).unwrap();
    gateway.refuses(&name, "read").await;
    assert_eq!(gateway.backends("c.x"), ["10.0.0.2:80*7"]);
    gateway.reload("").await;
    gateway.serves("c.x", &[]).await;
    assert_eq!(gateway.rejects.list(), []);
}

/// The example of docs/routes.md.
fn example() -> &'static str {
    let (_, from) = include_str!("../../../../docs/routes.md")
        .split_once("```toml\n")
        .unwrap();
    from.split_once("```").unwrap().0
}

#[test]
fn the_documented_example_is_valid_and_has_every_key() {
    let content = parse(example(), &config()).unwrap();
    assert_eq!(content.registrations.len(), 5);
    assert_eq!(content.declarations.len(), 5);
    for key in [
        "uris",
        "vips",
        "methods",
        "headers",
        "query",
        "balance",
        "hash",
        "redirect",
        "rewrite",
        "request_headers",
        "response_headers",
        "timeouts",
        "retries",
        "limits",
        "compression",
        "zone",
        "app",
        "instance_id",
        "instance_index",
        "tls",
        "protocol",
        "weight",
    ] {
        assert!(
            example().contains(&format!("{key} = "))
                || example().contains(&format!("route.{key}]")),
            "{key}"
        );
    }
}

#[test]
fn routes_that_contradict_each_other_are_refused() {
    let route = |asks: &str| format!("[[route]]\nuris = [\"a.x\"]\n{asks}\n");
    let same = route("compression = true").repeat(2);
    assert_eq!(parse(&same, &config()).unwrap().declarations.len(), 2);
    let other = route("compression = true") + &route("balance = \"round-robin\"");
    let error = parse(&other, &config()).unwrap_err().to_string();
    assert!(
        error.starts_with("line 4: route[1].uris: ") && error.contains("a.x"),
        "{error}"
    );
}

/// The next event that is not about the source itself.
async fn next_route(events: &mut tokio::sync::mpsc::Receiver<Event>) -> Event {
    loop {
        match events.recv().await.unwrap() {
            Event::SourceConnected { .. } => {}
            event => return event,
        }
    }
}

#[test]
fn a_route_that_rules_give_to_others_refuses_the_file_by_its_place() {
    let rules = "[[guard.owner]]\nhosts = [\"b.x\"]\nsources = [\"kv\"]";
    let config = crate::config::parse(rules).unwrap();
    assert!(parse(&text(&["a.x"]), &config).is_ok());
    let error = format!("{:#}", parse(&text(&["a.x", "b.x"]), &config).unwrap_err());
    assert_eq!(
        error,
        "line 5: route[1]: uris: b.x is not to be registered here: guard.owner[0] gives it to kv"
    );
}
