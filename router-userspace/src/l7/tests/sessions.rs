//! Sticky sessions between real sockets.

use http::header::{SET_COOKIE, WWW_AUTHENTICATE};

use super::*;
use crate::route::Instance;

/// A backend of this instance that answers with its id, and begins a session at `/Login`.
async fn instance(id: &'static str) -> Backend {
    let serving = TestBackend::answering(move |request| {
        let mut response = Response::new(full(id));
        let headers = response.headers_mut();
        match request.uri().path() {
            "/Login" => {
                headers.append(SET_COOKIE, "JSESSIONID=1; Secure".parse().unwrap());
            }
            "/Negotiate" => {
                headers.append(WWW_AUTHENTICATE, "Negotiate".parse().unwrap());
            }
            _ => {}
        }
        response
    })
    .await;
    Backend {
        instance: Instance {
            id: Some(id.into()),
            ..Instance::default()
        }
        .shared(),
        ..backend(serving.address)
    }
}

async fn get(gateway: &Gateway, path: &str, headers: &str) -> String {
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: a.com\r\nConnection: close\r\n{headers}\r\n");
    gateway.exchange(request).await
}

#[tokio::test]
async fn a_session_stays_with_the_instance_that_began_it() {
    let backends = [instance("one").await, instance("two").await];
    let gateway = Gateway::start(snapshot([("a.com", pool(backends))]));
    let login = get(&gateway, "/Login", "").await;
    assert!(
        login.contains("set-cookie: JSESSIONID=1; Secure\r\n"),
        "{login}"
    );
    let id = if login.ends_with("one") { "one" } else { "two" };
    let cookie = format!("set-cookie: __VCAP_ID__={id}; Path=/; HttpOnly; Secure\r\n");
    assert!(login.contains(&cookie), "{login}");

    let session = format!("Cookie: JSESSIONID=1; __VCAP_ID__={id}\r\n");
    for _ in 0..4 {
        let response = get(&gateway, "/", &session).await;
        assert!(response.ends_with(id), "{response}");
        assert!(!response.contains("__VCAP_ID__"), "{response}");
    }
    assert_eq!(gateway.metrics.totals().sticky_hits, 4);
}

#[tokio::test]
async fn a_session_whose_instance_is_gone_moves_and_the_client_is_told() {
    let gateway = Gateway::start(snapshot([("a.com", pool([instance("new").await]))]));
    let session = "Cookie: JSESSIONID=1; __VCAP_ID__=gone\r\n";
    let response = get(&gateway, "/", session).await;
    assert!(response.ends_with("new"), "{response}");
    assert!(response.contains("set-cookie: __VCAP_ID__=new; Path=/; HttpOnly\r\n"));
    assert_eq!(gateway.metrics.totals().sticky_misses, 1);
}

#[tokio::test]
async fn the_cookie_is_for_the_path_of_the_route() {
    let mut snapshot = snapshot([("a.com", pool([]))]);
    let routes = snapshot.hosts.get_mut("a.com").unwrap();
    let pool = Arc::new(pool([instance("one").await]));
    routes.insert("/login".into(), None, pool);
    let gateway = Gateway::start(snapshot);
    let response = get(&gateway, "/Login", "").await;
    assert!(
        response.contains("__VCAP_ID__=one; Path=/Login; "),
        "{response}"
    );
}

#[tokio::test]
async fn a_negotiation_stays_or_fails() {
    let mut config = config();
    config.sticky.auth_negotiate = true;
    let pool = pool([instance("one").await, instance("two").await]);
    let gateway = Gateway::with_config(snapshot([("a.com", pool)]), config);
    let response = get(&gateway, "/Negotiate", "").await;
    assert!(
        response.contains("; Path=/; Max-Age=60; HttpOnly; SameSite=Strict\r\n"),
        "{response}"
    );
    let negotiates = |id| format!("Authorization: Negotiate YII\r\nCookie: __VCAP_ID__={id}\r\n");
    for _ in 0..2 {
        let response = get(&gateway, "/", &negotiates("two")).await;
        assert!(response.ends_with("two"), "{response}");
    }
    let response = get(&gateway, "/", &negotiates("gone")).await;
    assert_status(&response, 502);
    assert!(
        response.contains("x-cf-routererror: endpoint_failure (No endpoints available)\r\n"),
        "{response}"
    );
}
