//! Every way a server asks who is there, and clusters.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use serde_json::{Value, json};

use super::*;
use crate::config::Secret;

const PATIENCE: Duration = Duration::from_secs(20);

fn secret(text: &str) -> Option<Secret> {
    Some(toml::Value::String(text.to_owned()).try_into().unwrap())
}

fn nats(server: &Server) -> NatsConfig {
    NatsConfig {
        servers: vec![format!("nats://{}", server.address)],
        ..NatsConfig::default()
    }
}

/// A gateway comes in with what is right, and takes routes in; with what is wrong it is told by key.
async fn check(right: NatsConfig, wrong: NatsConfig, told: &str) {
    let gateway = Gateway::configured(right.clone()).await;
    publish_until_served(&gateway, &right).await;
    let error = reach(&wrong).await.unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains(told), "{error}");
}

async fn publish_until_served(gateway: &Gateway, nats: &NatsConfig) {
    gateway
        .until("it is connected", |_, metrics| {
            metrics.nats_connected.get() == 1
        })
        .await;
    // What comes before its subscription is lost.
    let served = async {
        while !gateway.published.load().hosts.contains("a.x") {
            let published = super::super::publish(nats, "register", ONE.into());
            published.await.unwrap();
        }
    };
    let served = tokio::time::timeout(PATIENCE, served).await;
    served.expect("it is served");
}

#[tokio::test]
async fn user_and_password() {
    let configuration = "authorization { user: viaduct, password: right }";
    let server = Server::start_configured(None, configuration).await;
    let with = |password| NatsConfig {
        user: Some("viaduct".to_owned()),
        password: secret(password),
        ..nats(&server)
    };
    let told = "nats.user and nats.password are refused by the server";
    check(with("right"), with("wrong"), told).await;
    let error = format!("{:#}", reach(&nats(&server)).await.unwrap_err());
    assert!(error.contains("a client without user"), "{error}");
}

#[tokio::test]
async fn a_token_and_one_that_becomes_right_later() {
    let server = Server::start_configured(None, "authorization { token: right }").await;
    let with = |token| NatsConfig {
        token: secret(token),
        ..nats(&server)
    };
    check(
        with("right"),
        with("wrong"),
        "nats.token is refused by the server",
    )
    .await;
    let late = Gateway::configured(with("later")).await;
    let port = Some(server.address.port());
    drop(server);
    let server = Server::start_configured(port, "authorization { token: later }").await;
    let nats = NatsConfig {
        token: secret("later"),
        ..nats(&server)
    };
    publish_until_served(&late, &nats).await;
}

#[tokio::test]
async fn an_nkey() {
    let key = KeyPair::new_user();
    let configuration = format!(
        "authorization {{ users: [ {{ nkey: {} }} ] }}",
        key.public_key()
    );
    let server = Server::start_configured(None, &configuration).await;
    let with = |key: &KeyPair| NatsConfig {
        nkey_seed: secret(&key.seed().unwrap()),
        ..nats(&server)
    };
    let told = "nats.nkey_seed is refused by the server";
    check(with(&key), with(&KeyPair::new_user()), told).await;
    let bad = NatsConfig {
        nkey_seed: secret("SUNOSEED"),
        ..nats(&server)
    };
    let error = format!("{:#}", super::super::check(&bad).await.unwrap_err());
    assert!(error.starts_with("nats.nkey_seed"), "{error}");
}

/// A JWT of NATS: claims about one key, signed by another.
fn jwt(issuer: &KeyPair, subject: &str, kind: &str, more: Value) -> String {
    let mut nats = json!({ "type": kind, "version": 2 });
    nats.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    let claims = json!({
        "jti": uuid::Uuid::new_v4().to_string(), "iat": 1_700_000_000, "iss": issuer.public_key(),
        "name": kind, "sub": subject, "nats": nats,
    });
    let header = json!({ "typ": "JWT", "alg": "ed25519-nkey" });
    let part = |json: Value| URL_SAFE_NO_PAD.encode(json.to_string());
    let signed = format!("{}.{}", part(header), part(claims));
    let signature = URL_SAFE_NO_PAD.encode(issuer.sign(signed.as_bytes()).unwrap());
    format!("{signed}.{signature}")
}

#[tokio::test]
async fn a_credentials_file() {
    let (operator, account) = (KeyPair::new_operator(), KeyPair::new_account());
    let of_operator = jwt(&operator, &operator.public_key(), "operator", json!({}));
    let unlimited = json!({ "limits": {
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
        "conn": -1, "leaf": -1,
    }});
    let of_account = jwt(&operator, &account.public_key(), "account", unlimited);
    let configuration = format!(
        "operator: {of_operator}\nresolver: MEMORY\nresolver_preload: {{ {}: {of_account} }}",
        account.public_key()
    );
    let server = Server::start_configured(None, &configuration).await;
    let folder = tempfile::tempdir().unwrap();
    let credentials = |name: &str, issuer: &KeyPair| {
        let user = KeyPair::new_user();
        let claims = json!({ "subs": -1, "data": -1, "payload": -1 });
        let of_user = jwt(issuer, &user.public_key(), "user", claims);
        let path = folder.path().join(name);
        let text = format!(
            "-----BEGIN NATS USER JWT-----\n{of_user}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
            user.seed().unwrap()
        );
        std::fs::write(&path, text).unwrap();
        NatsConfig {
            credentials_file: Some(path),
            ..nats(&server)
        }
    };
    let right = credentials("right.creds", &account);
    let wrong = credentials("wrong.creds", &KeyPair::new_account());
    check(
        right,
        wrong,
        "nats.credentials_file is refused by the server",
    )
    .await;
    let absent = NatsConfig {
        credentials_file: Some(folder.path().join("absent.creds")),
        ..nats(&server)
    };
    let error = format!("{:#}", super::super::check(&absent).await.unwrap_err());
    assert!(
        error.contains("nats.credentials_file") && error.contains("absent.creds"),
        "{error}"
    );
}

#[tokio::test]
async fn tls_with_client_certificates() {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let authority = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let file = write(name, params.self_signed(&key).unwrap().pem());
        (Issuer::new(params, key), file)
    };
    let issue = |issuer: &Issuer<'_, KeyPair>, name: &str| {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, issuer).unwrap().pem();
        (
            write(&format!("{name}.crt"), certificate),
            write(&format!("{name}.key"), key.serialize_pem()),
        )
    };
    let (ours, our_ca) = authority("ca.pem");
    let (theirs, their_ca) = authority("other.pem");
    let (certificate, key) = issue(&ours, "server");
    let configuration = format!(
        "tls {{ cert_file: {certificate:?}, key_file: {key:?}, ca_file: {our_ca:?}, verify: true }}"
    );
    let server = Server::start_configured(None, &configuration).await;
    let with = |ca: &std::path::PathBuf, issuer, name: &str| {
        let (certificate, key) = issue(issuer, name);
        NatsConfig {
            servers: vec![format!("tls://{}", server.address)],
            ca_file: Some(ca.clone()),
            client_certificate_file: Some(certificate),
            client_key_file: Some(key),
            ..NatsConfig::default()
        }
    };
    let right = with(&our_ca, &ours, "client");
    check(
        right.clone(),
        with(&their_ca, &ours, "client2"),
        "nats.ca_file",
    )
    .await;
    assert!(reach(&with(&our_ca, &theirs, "client3")).await.is_err());
    let none = NatsConfig {
        client_certificate_file: None,
        client_key_file: None,
        ..right
    };
    assert!(reach(&none).await.is_err());
}

#[tokio::test]
async fn a_cluster_serves_on_without_the_server_that_was_connected_to() {
    let cluster = |routes: String| {
        format!("cluster {{ name: site, listen: \"127.0.0.1:-1\", routes: [{routes}] }}")
    };
    // Its port alone is wanted.
    let later = Server::start(None).await.address;
    let first = Server::start_configured(None, &cluster(String::new())).await;
    let gateway = Gateway::configured(NatsConfig {
        servers: vec![
            format!("nats://{later}"),
            format!("nats://{}", first.address),
        ],
        stale_threshold: Duration::from_secs(3600),
        ..NatsConfig::default()
    })
    .await;
    publish_until_served(&gateway, &nats(&first)).await;
    let route = format!("\"nats://{}\"", first.cluster.unwrap());
    let second = Server::start_configured(Some(later.port()), &cluster(route)).await;

    // What is told to one is known by the other.
    let other = client(second.address).await;
    repeat_until_served(&gateway, &other, "b.x").await;
    drop(first);
    gateway
        .until("it is connected to the other", |_, metrics| {
            metrics.nats_connects.get() == 2 && metrics.nats_connected.get() == 1
        })
        .await;
    repeat_until_served(&gateway, &other, "c.x").await;
    assert_eq!(gateway.published.load().hosts.len(), 3);
}

/// Registers a host again and again, as instances do: what is published before the servers know of
/// the gateway's subscription reaches nobody.
async fn repeat_until_served(gateway: &Gateway, instance: &Client, host: &str) {
    let registration = format!(r#"{{"host":"10.0.0.1","port":80,"uris":["{host}"]}}"#);
    let served = async {
        while !gateway.published.load().hosts.contains(host) {
            publish(instance, "router.register", registration.as_str()).await;
        }
    };
    let served = tokio::time::timeout(PATIENCE, served).await;
    served.expect("updates go on");
}
