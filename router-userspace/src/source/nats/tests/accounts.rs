//! Subjects of their own: who published is told by what the server makes of the accounts of publishers.

use async_nats::ConnectOptions;

use super::*;

/// As in docs/guarding.md.
const ACCOUNTS: &str = "accounts {
  GATEWAY: {
    users: [ { user: viaduct, password: secret } ]
    imports: [
      { stream: { account: SHOP, subject: router.register }, to: router.register.shop }
      { stream: { account: SHOP, subject: router.unregister }, to: router.unregister.shop }
      { stream: { account: BLOG, subject: router.register }, to: router.register.blog }
      { stream: { account: BLOG, subject: router.unregister }, to: router.unregister.blog }
    ]
  }
  SHOP: {
    users: [ { user: shop, password: secret } ]
    exports: [
      { stream: router.register, accounts: [GATEWAY] }
      { stream: router.unregister, accounts: [GATEWAY] }
    ]
  }
  BLOG: {
    users: [ { user: blog, password: secret } ]
    exports: [
      { stream: router.register, accounts: [GATEWAY] }
      { stream: router.unregister, accounts: [GATEWAY] }
    ]
  }
}";

const GUARD: &str = r#"
[l4]
vip_ranges = ["192.0.2.0/24"]
[guard]
default = "refuse"
reserved_hosts = ["login.shop.x"]
[[guard.owner]]
hosts = ["shop.x", "*.shop.x"]
vips = ["192.0.2.16/28"]
subjects = ["router.register.shop"]
[[guard.owner]]
hosts = ["*.blog.x"]
subjects = ["router.register.blog"]
"#;

fn message(host: &str, vip: Option<&str>) -> String {
    let vips: Vec<&str> = vip.into_iter().collect();
    serde_json::json!({ "host": "10.0.0.1", "port": 80, "uris": [host], "vips": vips }).to_string()
}

async fn publisher(server: &Server, user: &str) -> Client {
    let options = ConnectOptions::with_user_and_password(user.to_owned(), "secret".to_owned());
    options.connect(server.address.to_string()).await.unwrap()
}

fn configured(server: &Server, guard: &str) -> Config {
    let mut config = crate::config::parse(guard).unwrap();
    config.nats.servers = vec![format!("nats://{}", server.address)];
    config.nats.user = Some("viaduct".to_owned());
    config.nats.password = Some(toml::Value::String("secret".to_owned()).try_into().unwrap());
    config
}

/// Repeats a registration until it is served: what comes before the subscription is lost.
async fn register_until_served(gateway: &Gateway, client: &Client, host: &str) {
    let served = async {
        while !gateway.published.load().hosts.contains(host) {
            publish(client, "router.register", message(host, None)).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let served = tokio::time::timeout(Duration::from_secs(20), served).await;
    served.expect("it is served");
}

#[tokio::test]
async fn an_account_registers_and_withdraws_its_own_hosts_and_vips_alone() {
    let server = Server::start_configured(None, ACCOUNTS).await;
    let gateway = Gateway::of(configured(&server, GUARD)).await;
    let (shop, blog) = (
        publisher(&server, "shop").await,
        publisher(&server, "blog").await,
    );
    register_until_served(&gateway, &shop, "pay.shop.x").await;
    register_until_served(&gateway, &blog, "a.blog.x").await;

    for (host, vip) in [
        ("pay.shop.x", None),
        ("a.blog.x", Some("tcp/192.0.2.17:80")),
        ("*.x", None),
        ("other.y", None),
    ] {
        publish(&blog, "router.register", message(host, vip)).await;
    }
    publish(&blog, "router.unregister", message("pay.shop.x", None)).await;
    publish(&shop, "router.register", message("login.shop.x", None)).await;
    publish(
        &shop,
        "router.register",
        message("shop.x", Some("tcp/192.0.2.17:443")),
    )
    .await;
    gateway
        .until(
            "the shop has its VIP, and the blog was refused",
            |now, metrics| {
                let refused: u64 = [Ground::Reserved, Ground::Owned, Ground::Unowned]
                    .map(|ground| metrics.guard_refusals(ground).get())
                    .iter()
                    .sum();
                now.vips.len() == 1 && refused == 6
            },
        )
        .await;
    let now = gateway.published.load();
    for (host, is_served) in [
        ("pay.shop.x", true),
        ("a.blog.x", true),
        ("shop.x", true),
        ("login.shop.x", false),
        ("*.x", false),
        ("other.y", false),
    ] {
        assert_eq!(now.hosts.contains(host), is_served, "{host}");
    }
    let rejects: Vec<(&str, u64)> = gateway.metrics.rejects().filter(|(_, n)| *n > 0).collect();
    assert_eq!(rejects, [("owner", 6)]);
    let listed = gateway.rejects.list();
    let of_blog = listed.iter().find(|reject| {
        let subject = reject.what.starts_with("router.unregister.blog ");
        subject && reject.why.contains("uris: pay.shop.x") && reject.why.contains("guard.owner[0]")
    });
    assert!(of_blog.is_some(), "{listed:?}");

    publish(&shop, "router.unregister", message("pay.shop.x", None)).await;
    gateway
        .until("the shop withdrew", |now, _| {
            !now.hosts.contains("pay.shop.x")
        })
        .await;
}

#[tokio::test]
async fn subjects_are_listened_to_while_a_rule_names_them() {
    let server = Server::start_configured(None, ACCOUNTS).await;
    let gateway = Gateway::of(configured(&server, "")).await;
    let shop = publisher(&server, "shop").await;
    let ours = publisher(&server, "viaduct").await;
    register_until_served(&gateway, &ours, "pay.shop.x").await;
    assert!(!gateway.published.load().hosts.contains("shop.x"));
    gateway.reload(configured(&server, GUARD)).await;
    register_until_served(&gateway, &shop, "shop.x").await;
    assert!(
        gateway.published.load().hosts.contains("pay.shop.x"),
        "it may be of the subject that owns the host"
    );
    gateway
        .reload(configured(&server, "[guard]\ndefault = \"refuse\""))
        .await;
    gateway
        .until("nothing is left", |now, _| now.hosts.is_empty())
        .await;
}
