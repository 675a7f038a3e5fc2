use std::cell::Cell;
use std::time::{Duration, Instant};

use super::backends::BackendIndex;
use super::*;
use crate::route::table::RouteTable;
use crate::route::{RouteEvent, wire};

fn register(table: &mut RouteTable, address: &str, uris: &[String]) {
    let message = serde_json::json!({ "host": address, "port": 80, "uris": uris });
    let registration = wire::register(message.to_string().as_bytes(), &[]).unwrap();
    table.apply(RouteEvent::Register(registration), Instant::now());
}

fn table(hosts: usize) -> RouteTable {
    let mut table = RouteTable::new(Duration::from_secs(120), Instant::now());
    for number in 0..hosts {
        register(&mut table, "10.0.0.1", &[format!("h{number}.x")]);
    }
    table
}

#[test]
fn a_page_of_routes_looks_at_no_more_than_it_shows() {
    let snapshot = table(20_000).snapshot();
    let mut request = PageRequest {
        limit: Some(100),
        after: None,
    };
    let mut shown = 0;
    loop {
        let cursor = request.after.as_deref();
        let cursor = cursor.map(|after| RouteCursor::read(after, &snapshot.hosts).unwrap());
        let hosts = match &cursor {
            None => snapshot.hosts.iter(),
            Some(cursor) => snapshot.hosts.iter_from(cursor.host),
        };
        let visited = Cell::new(0);
        let counted = hosts.inspect(|_| visited.set(visited.get() + 1));
        let page = routes_of(
            counted,
            cursor.as_ref(),
            &snapshot,
            &Default::default(),
            &request,
        );
        let page = page.unwrap();
        shown += page.rows.len();
        // The last of the page before, and one that tells that there are more.
        assert!(visited.get() <= 102, "{} visited", visited.get());
        match page.next {
            Some(next) => request.after = Some(next),
            None => break,
        }
    }
    assert_eq!(shown, 20_000);
}

#[test]
fn a_page_ends_where_its_pools_are_large() {
    let mut table = table(0);
    for pool in 0..20 {
        for backend in 0..4000 {
            let address = format!("10.{pool}.{}.{}", backend / 200, 1 + backend % 200);
            register(&mut table, &address, &[format!("h{pool}.x")]);
        }
    }
    let snapshot = table.snapshot();
    let page = routes(&snapshot, &Default::default(), &PageRequest::default()).unwrap();
    assert_eq!((page.rows.len(), page.next.is_some()), (17, true));
}

#[test]
fn what_stays_is_listed_once_while_routes_come_and_go() {
    let mut table = table(0);
    for number in 0..300 {
        let uris = ["", "/a", "/b"].map(|path| format!("stays{number}.x{path}"));
        register(&mut table, "10.0.0.1", &uris);
        register(&mut table, "10.0.0.2", &[format!("goes{number}.x")]);
    }
    let mut request = PageRequest {
        limit: Some(10),
        after: None,
    };
    let mut seen = Vec::new();
    for step in 0.. {
        let snapshot = table.snapshot();
        let page = routes(&snapshot, &Default::default(), &request).unwrap();
        seen.extend(page.rows.into_iter().map(|row| row.route));
        let Some(next) = page.next else { break };
        // What the cursor names may be among what goes.
        if let Some((host, _)) = next.rsplit_once(".x") {
            let (_, host) = host.split_once('.').unwrap();
            let gone = serde_json::json!({
                "host": "10.0.0.2", "port": 80, "uris": [format!("{host}.x"), format!("goes{step}.x")],
            });
            let (gone, _) = wire::unregister(gone.to_string().as_bytes()).unwrap();
            table.apply(RouteEvent::Unregister(gone), Instant::now());
        }
        register(&mut table, "10.0.0.3", &[format!("new{step}.x")]);
        request.after = Some(next);
    }
    seen.retain(|route| route.starts_with("stays"));
    assert_eq!(seen.len(), 900);
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 900);
}

#[test]
fn a_cursor_of_another_process_is_refused() {
    let snapshot = table(10).snapshot();
    let other = table(10).snapshot();
    let request = PageRequest {
        limit: Some(5),
        after: None,
    };
    let page = routes(&other, &Default::default(), &request).unwrap();
    for after in [page.next, Some("h1.x".to_owned()), Some(String::new())] {
        let request = PageRequest { limit: None, after };
        let error = routes(&snapshot, &Default::default(), &request).unwrap_err();
        assert!(error.starts_with("after: "), "{error}");
    }
}

#[test]
fn the_index_of_backends_follows_what_changes() {
    let mut table = table(5);
    let mut index = BackendIndex::default();
    let mut counts = |table: &mut RouteTable| -> Vec<(String, u32)> {
        let page = index
            .page(&table.snapshot(), &PageRequest::default())
            .unwrap();
        let count = |row: backends::BackendRow| (row.address.to_string(), row.http_routes);
        page.rows.into_iter().map(count).collect()
    };
    assert_eq!(counts(&mut table), [("10.0.0.1:80".to_owned(), 5)]);
    register(
        &mut table,
        "10.0.0.2",
        &["h1.x".to_owned(), "new.x".to_owned()],
    );
    let (gone, _) =
        wire::unregister(br#"{"host":"10.0.0.1","port":80,"uris":["h1.x","h2.x"]}"#).unwrap();
    table.apply(RouteEvent::Unregister(gone), Instant::now());
    assert_eq!(
        counts(&mut table),
        [("10.0.0.1:80".to_owned(), 3), ("10.0.0.2:80".to_owned(), 2)]
    );
}
