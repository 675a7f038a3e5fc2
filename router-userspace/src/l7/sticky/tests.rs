use http::HeaderName;
use proptest::prelude::*;

use super::*;

fn config() -> HttpSticky {
    HttpSticky {
        auth_negotiate: true,
        ..HttpSticky::default()
    }
}

fn headers(fields: &[(HeaderName, &str)]) -> HeaderMap {
    let parsed = fields
        .iter()
        .map(|(name, value)| (name.clone(), value.parse().unwrap()));
    parsed.collect()
}

#[test]
fn a_request_belongs_to_the_instance_its_cookies_name() {
    let session = |cookies: &str| session(&headers(&[(COOKIE, cookies)]), &config());
    let with = |instance: &str| {
        Some(Session {
            instance: instance.into(),
            required: false,
        })
    };
    for (cookies, wanted) in [
        ("JSESSIONID=1; __VCAP_ID__=abc-7", with("abc-7")),
        ("__VCAP_ID__=abc;JSESSIONID=", with("abc")),
        ("a=b;  __VCAP_ID__ = abc ; JSESSIONID=1", with("abc")),
        ("__VCAP_ID__=a=b; JSESSIONID=1", with("a=b")),
        (
            "__VCAP_ID__=first; JSESSIONID=1; __VCAP_ID__=second",
            with("first"),
        ),
        ("__VCAP_ID__=abc", None),
        ("JSESSIONID=1", None),
        ("jsessionid=1; __VCAP_ID__=abc", None),
        ("JSESSIONID; __VCAP_ID__=abc", None),
        ("JSESSIONID=1; __vcap_id__=abc", None),
        ("JSESSIONID=1; __VCAP_ID__=a\"b", None),
        ("JSESSIONID=1; X__VCAP_ID__=abc", None),
        (";;=;==; =", None),
        ("", None),
    ] {
        assert_eq!(session(cookies), wanted, "{cookies}");
    }
}

#[test]
fn cookies_may_come_in_several_fields() {
    let fields = headers(&[(COOKIE, "JSESSIONID=1"), (COOKIE, "__VCAP_ID__=abc")]);
    assert_eq!(&*session(&fields, &config()).unwrap().instance, "abc");
}

#[test]
fn an_instance_id_that_none_can_have_is_no_session() {
    let long = format!("JSESSIONID=1; __VCAP_ID__={}", "a".repeat(257));
    assert_eq!(session(&headers(&[(COOKIE, &long)]), &config()), None);
}

#[test]
fn without_names_of_cookies_there_are_no_sessions() {
    let off = HttpSticky {
        cookies: Vec::new(),
        ..HttpSticky::default()
    };
    let fields = headers(&[
        (COOKIE, "JSESSIONID=1; __VCAP_ID__=abc"),
        (AUTHORIZATION, "Negotiate abc"),
    ]);
    assert_eq!(session(&fields, &off), None);
}

#[test]
fn a_negotiation_is_with_one_instance_only() {
    for (value, required) in [
        ("Negotiate YII", true),
        ("negotiate", true),
        ("NegotiateX YII", false),
        ("Basic YII", false),
    ] {
        let fields = headers(&[(COOKIE, "__VCAP_ID__=abc"), (AUTHORIZATION, value)]);
        assert_eq!(session(&fields, &config()).is_some(), required, "{value}");
        assert_eq!(session(&fields, &HttpSticky::default()), None);
    }
    let fields = headers(&[(AUTHORIZATION, "Negotiate YII")]);
    assert_eq!(session(&fields, &config()), None, "its first request");
}

fn root() -> String {
    "/".to_owned()
}

fn answer(set_cookies: &[&str], session: Option<&str>) -> Option<String> {
    let fields: Vec<_> = set_cookies.iter().map(|&text| (SET_COOKIE, text)).collect();
    let session = session.map(|instance| Session {
        instance: instance.into(),
        required: false,
    });
    let value = set_cookie(
        &headers(&fields),
        session.as_ref(),
        Some("abc"),
        || "/App".to_owned(),
        &config(),
    );
    value.map(|value| value.to_str().unwrap().to_owned())
}

#[test]
fn an_applications_cookie_begins_a_session_with_its_attributes() {
    for (set_cookie, wanted) in [
        ("JSESSIONID=1", "; HttpOnly"),
        (
            "JSESSIONID=1; Secure; HttpOnly; Path=/x; Domain=a.com",
            "; HttpOnly; Secure",
        ),
        (
            "JSESSIONID=1; SameSite=none; secure; partitioned",
            "; HttpOnly; Secure; SameSite=None; Partitioned",
        ),
        ("JSESSIONID=1; SameSite=LAX", "; HttpOnly; SameSite=Lax"),
        ("JSESSIONID=1; SameSite=else", "; HttpOnly"),
        (
            "JSESSIONID=1; Expires=Wed, 21 Oct 2026 07:28:00 GMT; Max-Age=3600",
            "; Expires=Wed, 21 Oct 2026 07:28:00 GMT; HttpOnly",
        ),
        ("JSESSIONID=; Max-Age=-1", "; Max-Age=0; HttpOnly"),
        ("JSESSIONID=; max-age=0", "; Max-Age=0; HttpOnly"),
        ("JSESSIONID=; Max-Age=--1", "; HttpOnly"),
        ("JSESSIONID=; Max-Age=", "; HttpOnly"),
        ("JSESSIONID=; Expires=<script>", "; HttpOnly"),
        ("JSESSIONID=1;;;=;; ;Secure", "; HttpOnly; Secure"),
    ] {
        let wanted = format!("__VCAP_ID__=abc; Path=/App{wanted}");
        assert_eq!(answer(&[set_cookie], None), Some(wanted), "{set_cookie}");
    }
}

#[test]
fn other_responses_set_no_cookie() {
    for set_cookies in [
        &[][..],
        &["other=1; JSESSIONID=2"],
        &["JSESSIONID"],
        &["=JSESSIONID"],
        &["JSESSIONID=1", "__VCAP_ID__=mine"],
    ] {
        assert_eq!(answer(set_cookies, None), None, "{set_cookies:?}");
    }
    assert_eq!(answer(&[], Some("abc")), None, "it stayed");
}

#[test]
fn a_session_that_had_to_move_is_told() {
    let wanted = "__VCAP_ID__=abc; Path=/App; HttpOnly".to_owned();
    assert_eq!(answer(&[], Some("gone")), Some(wanted));
    assert_eq!(answer(&["__VCAP_ID__=mine"], Some("gone")), None);
}

#[test]
fn a_challenge_to_negotiate_begins_a_short_session() {
    let fields = headers(&[(WWW_AUTHENTICATE, "Negotiate")]);
    let value = set_cookie(&fields, None, Some("abc"), root, &config()).unwrap();
    assert_eq!(
        value,
        "__VCAP_ID__=abc; Path=/; Max-Age=60; HttpOnly; SameSite=Strict"
    );
    let off = HttpSticky::default();
    assert_eq!(set_cookie(&fields, None, Some("abc"), root, &off), None);
}

#[test]
fn an_instance_that_fits_no_cookie_gets_none() {
    let fields = headers(&[(SET_COOKIE, "JSESSIONID=1")]);
    for instance in [None, Some(""), Some("a;b"), Some("a b"), Some("ä")] {
        let value = set_cookie(&fields, None, instance, root, &config());
        assert_eq!(value, None, "{instance:?}");
    }
}

#[test]
fn secure_may_be_asked_for_by_the_gateway() {
    let secure = HttpSticky {
        secure: true,
        ..HttpSticky::default()
    };
    let fields = headers(&[(SET_COOKIE, "JSESSIONID=1")]);
    let value = set_cookie(&fields, None, Some("abc"), root, &secure).unwrap();
    assert_eq!(value, "__VCAP_ID__=abc; Path=/; HttpOnly; Secure");
}

#[test]
fn the_path_is_the_routes_as_the_client_writes_it() {
    for (request, route, wanted) in [
        ("/", "", "/"),
        ("/App/x", "", "/"),
        ("/App/x", "/app", "/App"),
        ("/App", "/app", "/App"),
        ("/./app/x", "/app", "/app"),
        ("/ä", "/a", "/a"),
    ] {
        assert_eq!(cookie_path(request, route), wanted, "{request} on {route}");
    }
    let value = Attributes::default().value("abc", "/a;b").unwrap();
    assert_eq!(value, "__VCAP_ID__=abc; Path=/; HttpOnly");
}

proptest! {
    #[test]
    fn no_bytes_are_too_strange(cookies: Vec<Vec<u8>>, set_cookies: Vec<Vec<u8>>) {
        let mut fields = HeaderMap::new();
        for (name, values) in [(COOKIE, cookies), (SET_COOKIE, set_cookies)] {
            for bytes in values {
                if let Ok(value) = HeaderValue::from_bytes(&bytes) {
                    fields.append(&name, value);
                }
            }
        }
        let session = session(&fields, &config());
        set_cookie(&fields, session.as_ref(), Some("abc"), root, &config());
    }

    #[test]
    fn attributes_never_add_others(rest in "[ -~]{0,40}") {
        let text = format!("JSESSIONID=1; {rest}");
        let value = answer(&[&text], None).unwrap();
        let known = ["Path=", "Expires=", "Max-Age=", "HttpOnly", "Secure", "SameSite=", "Partitioned"];
        for attribute in value.split("; ").skip(1) {
            prop_assert!(known.iter().any(|name| attribute.starts_with(name)), "{}", value);
        }
    }
}
