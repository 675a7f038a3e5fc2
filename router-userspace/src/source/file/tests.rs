use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::*;
use crate::config::Config;
use crate::metrics::Metrics;

fn ranges() -> Vec<IpNet> {
    vec!["192.0.2.0/24".parse().unwrap()]
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
    let registrations = parse(text, &ranges()).unwrap();
    assert_eq!(registrations.len(), 2);
    let routes: Vec<String> = registrations[0]
        .routes
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(routes, ["a.x/p", "*.x", "tcp/192.0.2.1:80"]);
    let backend = &registrations[0].backend;
    assert_eq!((backend.weight, backend.protocol), (7, HttpProtocol::Http2));
    assert_eq!(
        backend.tls.as_ref().unwrap().server_name.as_deref(),
        Some("san")
    );
    assert_eq!(registrations[0].balance, Some(Balance::LeastConnections));
    assert_eq!(
        (
            registrations[1].backend.weight,
            &registrations[1].backend.tls
        ),
        (100, &None)
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
            ["line 3", "vips[0]"],
        ),
        (format!("[[route]]\n{backend}"), ["route[0]", "neither"]),
        (
            "[[route]]\nuris = [\"a\"]\n".to_owned(),
            ["line 1", "backend"],
        ),
        (
            format!("[[route]]\nuris = [\"a\"]\n{backend}weight = 0\n"),
            ["line 5", "weight"],
        ),
        (
            "[[route]]\nuris = [\"a\"]\n[[route.backend]]\naddress = \"10.0.0.1:0\"\n".to_owned(),
            ["line 4", "port 0"],
        ),
    ] {
        let error = format!("{:#}", parse(&text, &ranges()).unwrap_err());
        for part in parts {
            assert!(error.contains(part), "{text:?}: {error:?} lacks {part:?}");
        }
    }
}

#[tokio::test]
async fn a_bad_file_keeps_the_routes_it_had() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("routes.toml");
    let write = |uri: &str| {
        let text =
            format!("[[route]]\nuris = [{uri:?}]\n[[route.backend]]\naddress = \"10.0.0.1:80\"\n");
        std::fs::write(&path, text).unwrap();
    };
    let mut config = Config::default();
    config.file.paths = vec![path.clone()];
    config.file.poll_interval = Duration::from_millis(5);
    let (reload, config) = watch::channel(Arc::new(config));
    let (inbox, mut events) = mpsc::channel(8);
    let metrics = Arc::<Metrics>::default();
    tokio::spawn(run(Context {
        inbox,
        metrics: Arc::clone(&metrics),
        config,
    }));

    while metrics.file_rejects.get() < 1 {
        tokio::task::yield_now().await;
    }
    write("a.x");
    let replaced = async |events: &mut mpsc::Receiver<Event>| match events.recv().await.unwrap() {
        Event::Route(RouteEvent::Replace {
            origin: Origin::File,
            registrations,
        }) => registrations,
        event => panic!("{event:?}"),
    };
    assert_eq!(replaced(&mut events).await[0].routes[0].to_string(), "a.x");
    let rejects = metrics.file_rejects.get();
    write("not a host");
    while metrics.file_rejects.get() == rejects {
        tokio::task::yield_now().await;
    }
    write("changed.x");
    assert_eq!(
        replaced(&mut events).await[0].routes[0].to_string(),
        "changed.x"
    );
    reload.send_modify(|config| Arc::make_mut(config).file.paths.clear());
    assert!(replaced(&mut events).await.is_empty());
}
