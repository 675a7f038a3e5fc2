use std::collections::BTreeSet;
use std::time::Duration;

use super::*;
use crate::admin::listing::Page;
use crate::admin::listing::backends::{BackendIndex, BackendRow};
use crate::l4::{Views, VipView};
use crate::l7::metrics::L7Metrics;
use crate::metrics::Metrics;
use crate::route::declared::DeclaredRoute;
use crate::route::table::RouteTable;
use crate::route::{Origin, RouteEvent, wire};
use crate::snapshot::{Published, Snapshot};
use crate::source::kv::status::Revisions;

fn snapshot() -> Snapshot {
    let now = Instant::now();
    let mut table = RouteTable::new(Duration::from_secs(120), now);
    let ranges = ["192.0.2.0/24".parse().unwrap()];
    for i in 1..=25 {
        let json = format!(
            r#"{{"host":"10.0.0.{i}","port":80,"uris":["h{i}.x","all.x/p{i}","all.x"],"vips":["tcp/192.0.2.1:{i}"]}}"#
        );
        let registration = wire::register(json.as_bytes(), &ranges).unwrap();
        table.apply(RouteEvent::Register(registration), now);
    }
    table.set_health("10.0.0.3:80".parse().unwrap(), false);
    table.snapshot()
}

fn walk<R>(list: impl Fn(&PageRequest) -> Result<Page<R>, String>) -> Vec<R> {
    let mut request = PageRequest {
        limit: Some(7),
        after: None,
    };
    let mut rows = Vec::new();
    loop {
        let page = list(&request).unwrap();
        assert!(page.rows.len() <= 7);
        rows.extend(page.rows);
        match page.next {
            Some(next) => request.after = Some(next),
            None => return rows,
        }
    }
}

#[test]
fn pages_together_hold_every_row_once() {
    let snapshot = snapshot();
    let routes: BTreeSet<String> =
        walk(|request| listing::routes(&snapshot, &Revisions::default(), request))
            .into_iter()
            .map(|r| r.route)
            .collect();
    assert_eq!(routes.len(), 51);
    assert!(routes.contains("all.x/p25"));
    assert_eq!(
        walk(|request| listing::vips(&snapshot, &Revisions::default(), &Views::default(), request))
            .len(),
        25
    );
    let index = SharedIndex::default();
    let backends: Vec<BackendRow> = walk(|request| index.page(&snapshot, request));
    assert_eq!(backends.len(), 25);
    assert!(
        backends
            .iter()
            .all(|row| (row.http_routes, row.vips) == (3, 1))
    );
    let down = backends
        .iter()
        .filter(|row| !row.healthy)
        .map(|row| row.address.to_string());
    assert_eq!(down.collect::<Vec<_>>(), ["10.0.0.3:80"]);
}

#[test]
fn routes_of_one_path_are_listed_each_with_its_conditions_and_policy() {
    let now = Instant::now();
    let mut table = RouteTable::new(Duration::from_secs(120), now);
    for (conditions, asks) in [
        ("", "compression = true"),
        ("headers = { x-a = \"1\" }", "redirect = { path = \"/b\" }"),
        ("methods = [\"GET\"]", "rewrite = { host = \"b\" }"),
    ] {
        let text = format!(
            "uris = [\"a.x/p\"]\n{conditions}\n{asks}\nbackend = [{{ address = \"10.0.0.1:80\" }}]"
        );
        let route: DeclaredRoute = toml::from_str(&text).unwrap();
        let read = route.read(Origin::File, &[]).unwrap();
        let declared = read.declarations.into_iter().map(RouteEvent::Declare);
        let registered = read.registrations.into_iter().map(RouteEvent::Register);
        for event in declared.chain(registered) {
            table.apply(event, now);
        }
    }
    let snapshot = table.snapshot();
    let mut request = PageRequest {
        limit: Some(1),
        after: None,
    };
    for (conditions, asks, next) in [
        (None, "compression", Some("a.x/p")),
        (Some("GET"), "rewrite host b", Some("a.x/p GET")),
        (Some("x-a=1"), "redirect 307: path /b", None),
    ] {
        let page = listing::routes(&snapshot, &Revisions::default(), &request).unwrap();
        let row = &page.rows[0];
        assert_eq!(
            (&*row.route, row.conditions.as_deref()),
            ("a.x/p", conditions)
        );
        let policy = row.policy.as_ref().unwrap();
        assert_eq!(
            (policy.origin, &*policy.asks),
            ("file", &[asks.to_owned()][..])
        );
        let shown = page.next.as_deref().and_then(|next| next.split_once('.'));
        assert_eq!((row.backends.len(), shown.map(|it| it.1)), (1, next));
        request.after = page.next;
    }
}

#[test]
fn a_bad_page_request_is_refused_by_its_parameter() {
    let snapshot = snapshot();
    for limit in [0, listing::MAX_LIMIT + 1] {
        let request = PageRequest {
            limit: Some(limit),
            after: None,
        };
        assert!(
            listing::routes(&snapshot, &Revisions::default(), &request)
                .unwrap_err()
                .starts_with("limit")
        );
    }
    let request = PageRequest {
        limit: None,
        after: Some("x".to_owned()),
    };
    assert!(
        listing::vips(
            &snapshot,
            &Revisions::default(),
            &Views::default(),
            &request
        )
        .unwrap_err()
        .starts_with("after")
    );
    assert!(
        BackendIndex::default()
            .page(&snapshot, &request)
            .unwrap_err()
            .starts_with("after")
    );
}

#[test]
fn a_busy_address_is_one_clear_error() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let Err(error) = bind(&AdminListen::Tcp(address)) else {
        panic!("bound twice")
    };
    let error = format!("{error:#}");
    assert!(
        error.contains(&format!("admin.listen {address}: ")),
        "{error}"
    );
    assert!(error.contains("in use"), "{error}");
}

#[test]
fn a_left_over_socket_is_replaced_and_a_living_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let address = AdminListen::Unix(directory.path().join("admin.sock"));
    drop(bind(&address).unwrap());
    let living = bind(&address).unwrap();
    assert!(bind(&address).is_err());
    drop(living);
    let file = directory.path().join("a file");
    std::fs::write(&file, "kept").unwrap();
    assert!(bind(&AdminListen::Unix(file.clone())).is_err());
    assert_eq!(std::fs::read_to_string(file).unwrap(), "kept");
}

#[tokio::test]
async fn the_api_answers_on_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    let address = AdminListen::Unix(directory.path().join("admin.sock"));
    let listener = bind(&address).unwrap();
    let published = Published::default();
    published.store(Arc::new(snapshot()));
    let (reload, config) = watch::channel(Arc::<Config>::default());
    let (_drain, draining) = watch::channel(false);
    let (metrics, l7) = (Arc::<Metrics>::default(), Arc::<L7Metrics>::default());
    let scrape = Scrape {
        metrics: Arc::clone(&metrics),
        published,
        l4: None,
        l7,
        sockmap: None,
    };
    let (inbox, _events) = mpsc::channel(1);
    let rejects = Arc::<Rejects>::default();
    let admin = Admin {
        scrape,
        rejects: Arc::clone(&rejects),
        config,
        inbox,
        draining,
        started: Instant::now(),
        backends: SharedIndex::default(),
    };
    tokio::spawn(serve(listener, Arc::new(admin)));
    let get = async |path: &str| {
        crate::cli::client::get(&address, path)
            .await
            .map(|body| String::from_utf8(body.to_vec()).unwrap())
    };

    assert_eq!(get("/livez").await.unwrap(), "ok\n");
    let refused = format!("{:#}", get("/readyz").await.unwrap_err());
    assert!(
        refused.contains("503") && refused.contains("nats: not connected yet"),
        "{refused}"
    );
    metrics.nats_first_connect.get_or_init(Instant::now);
    metrics.reject(wire::Reason::VipRange);
    let refused = format!("{:#}", get("/readyz").await.unwrap_err());
    assert!(
        refused.contains("nats: routes are being collected"),
        "{refused}"
    );
    reload.send_modify(|config| Arc::make_mut(config).nats.startup_grace = Duration::ZERO);
    assert!(get("/readyz").await.unwrap().contains("nats: disconnected"));
    let routes = get("/gorouter/routes").await.unwrap();
    let routes: serde_json::Value = serde_json::from_str(&routes).unwrap();
    assert!(!routes.as_object().unwrap().is_empty());
    rejects.note(crate::route::Origin::Kv, "route.a", "uris: none");
    let refused = get("/v1/rejects").await.unwrap();
    assert!(
        refused.contains(r#""what":"route.a","why":"uris: none""#),
        "{refused}"
    );
    metrics.sources.configure(Origin::Redis, true);
    metrics.sources.lost(Origin::Redis, "refused");
    metrics.source_rejects[Origin::Redis as usize].inc();
    assert!(
        get("/readyz")
            .await
            .unwrap()
            .contains("redis: disconnected")
    );
    let stats = get("/v1/stats").await.unwrap();
    assert!(stats.contains(r#""redis":{"age_seconds":null,"error":"refused","#));
    let text = get("/metrics").await.unwrap();
    for line in [
        "viaduct_nats_rejects_total{reason=\"vip_range\"} 1",
        "viaduct_nats_connected 0",
        "viaduct_source_connected{origin=\"redis\"} 0",
        "viaduct_source_rejects_total{origin=\"redis\"} 1",
        "viaduct_health_unhealthy_backends 1",
        "# TYPE viaduct_agent_publish_seconds histogram",
        "viaduct_agent_publish_seconds_bucket{le=\"+Inf\"} 0",
        "viaduct_http_request_seconds_bucket{le=\"+Inf\"} 0",
    ] {
        assert!(text.contains(line), "{text}\nlacks {line}");
    }
    assert!(
        get("/v1/vips?limit=2")
            .await
            .unwrap()
            .contains("\"next\":\"tcp/192.0.2.1:2\"")
    );
    assert!(get("/v1/stats").await.unwrap().contains("\"revision\":1"));
    assert!(format!("{:#}", get("/v1/routes?limit=0").await.unwrap_err()).contains("limit: 0"));
    assert!(get("/nothing").await.is_err());
}

#[test]
fn a_vip_that_needs_no_registration_is_listed_beside_those_that_do() {
    let declared = "tcp/192.0.2.1:9-11".parse().unwrap();
    let mut view = VipView::default();
    view.mode = router_common::Mode::L7;
    let drains = "tcp/192.0.2.2:80".parse().unwrap();
    let served = Views::from_iter([
        (declared, Arc::new(view)),
        (drains, Arc::new(VipView::default())),
    ]);
    let rows = walk(|request| listing::vips(&snapshot(), &Revisions::default(), &served, request));
    assert_eq!(rows.len(), 26);
    let row = rows.iter().find(|row| row.vip == declared.to_string());
    assert_eq!(row.unwrap().forwarding, Some("l7"));
}
