use super::*;
use crate::route::Origin;

#[test]
fn an_empty_file_is_the_default() {
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn the_effective_config_reads_back_as_itself() {
    let config = Config::default();
    let text = toml::to_string(&config).unwrap();
    assert_eq!(parse(&text).unwrap(), config, "{text}");
}

#[test]
fn a_wrong_value_is_refused_by_line_and_key() {
    for (text, wanted) in [
        ("[nats]\nserver = []\n", &["line 2", "server"][..]),
        ("[l4]\nnat_ports = \"9-1\"\n", &["line 2", "port range"]),
        ("[http]\nlisten = [\"here\"]\n", &["line 2", "listen"]),
        ("[http.timeouts]\nconnect = 5\n", &["line 2", "connect"]),
        (
            "[l4]\ninterfaces = [\"a\", \"a\"]\n",
            &["l4.interfaces", "twice"],
        ),
        (
            "[nats]\nprune_interval = \"0s\"\n",
            &["nats.prune_interval"],
        ),
        (
            "[nats]\nsubject_prefix = \"a.>\"\n",
            &["nats.subject_prefix"],
        ),
        ("[admin]\nlisten = \"unix:here\"\n", &["line 2", "absolute"]),
        ("[health]\nstatus = \"299-200\"\n", &["line 2", "statuses"]),
        ("[health]\nstatus = \"\"\n", &["line 2", "statuses"]),
        ("[health]\nstatus = \"200,99\"\n", &["line 2", "statuses"]),
        ("[health]\npath = \"a\"\n", &["health.path"]),
        ("[health]\npath = \"/a b\"\n", &["health.path"]),
        ("[health]\nhost = \"a b\"\n", &["health.host"]),
        ("[health]\njitter = 51\n", &["health.jitter"]),
        (
            "[health]\npanic_threshold = 101\n",
            &["health.panic_threshold"],
        ),
    ] {
        let message = format!("{:#}", parse(text).unwrap_err());
        for part in wanted {
            assert!(
                message.contains(part),
                "{text:?}: {message:?} lacks {part:?}"
            );
        }
    }
}

#[test]
fn a_secret_is_never_printed() {
    let config = parse("[nats]\npassword = \"hunter2\"\n").unwrap();
    assert!(!format!("{config:?}").contains("hunter2"));
    assert!(!toml::to_string(&config).unwrap().contains("hunter2"));
}

#[test]
fn statuses_are_ranges_and_single_ones() {
    let config = parse("[health]\nstatus = \"200-299, 404\"\n").unwrap();
    let good = |status| config.health.status.contains(status);
    assert_eq!(
        [199, 200, 299, 300, 404, 405].map(good),
        [false, true, true, false, true, false]
    );
    let text = toml::to_string(&config).unwrap();
    assert!(text.contains("status = \"200-299,404\""), "{text}");
    assert_eq!(parse(&text).unwrap(), config);
}

#[test]
fn a_vips_policy_is_read_whole() {
    let config = parse(
        r#"
        [l4]
        vip_ranges = ["192.0.2.0/24", "2001:db8::/64"]
        forwarding = "ipip"
        scheduler = "source-hash"
        reject = "drop"
        slow_start = "30s"
        [[l4.vip]]
        address = "tcp/192.0.2.10:8000-8999"
        forwarding = "dsr"
        scheduler = "least-connections"
        affinity = "10m"
        slow_start = "1m"
        drain = "2m"
        reject = "answer"
        allow = ["198.51.100.0/24"]
        deny = ["198.51.100.7/32"]
        source_rate = 10
        vip_rate = 100
        challenge = true
        track = true
        [[l4.vip]]
        address = "udp/[2001:db8::10]:443"
        quic = { server_id_octets = 4, config = 1 }
        "#,
    )
    .unwrap();
    assert_eq!(config.l4.vip.len(), 2);
    assert_eq!(
        config.l4.vip[0].address.to_string(),
        "tcp/192.0.2.10:8000-8999"
    );
    let text = toml::to_string(&config).unwrap();
    assert_eq!(parse(&text).unwrap(), config, "{text}");
}

#[test]
fn a_policy_that_contradicts_itself_is_refused_by_name() {
    let tcp = "address = \"tcp/192.0.2.10:80\"\n";
    let udp = "address = \"udp/192.0.2.10:443\"\n";
    for (vip, wanted) in [
        (
            format!("{tcp}[[l4.vip]]\n{tcp}"),
            "tcp/192.0.2.10:80 stands twice",
        ),
        (
            "address = \"tcp/10.0.0.1:80\"".to_owned(),
            "outside l4.vip_ranges",
        ),
        ("forwarding = \"nat\"".to_owned(), "address"),
        (format!("{tcp}forwards = \"nat\""), "forwards"),
        (format!("{udp}forwarding = \"l7\""), "l7 serves TCP only"),
        (
            format!("{tcp}forwarding = \"l7\"\naffinity = \"1m\""),
            "affinity means nothing",
        ),
        (format!("{tcp}affinity = \"5h\""), "at most 4h"),
        (format!("{tcp}affinity = \"0s\""), "longer than 0s"),
        (
            format!("{tcp}challenge = true"),
            "challenge needs a vip_rate",
        ),
        (
            format!("{udp}challenge = true\nvip_rate = 1"),
            "challenge is for TCP",
        ),
        (
            format!("{tcp}quic = {{ server_id_octets = 4 }}"),
            "quic is for UDP",
        ),
        (
            format!("{udp}quic = {{ server_id_octets = 4 }}"),
            "quic needs forwarding",
        ),
        (
            format!("{udp}forwarding = \"gue\"\nquic = {{ server_id_octets = 9 }}"),
            "server_id_octets must be 1..=8",
        ),
        (
            format!("{udp}forwarding = \"gue\"\nquic = {{ server_id_octets = 4, config = 7 }}"),
            "quic.config must be 0..=6",
        ),
        (
            format!("{tcp}allow = [\"2001:db8::/64\"]"),
            "address family",
        ),
        (
            format!("{tcp}allow = [\"10.0.0.0/8\"]\ndeny = [\"10.1.0.0/8\"]"),
            "10.1.0.0/8 stands twice",
        ),
    ] {
        let text = format!("[l4]\nvip_ranges = [\"192.0.2.0/24\"]\n[[l4.vip]]\n{vip}\n");
        let message = format!("{:#}", parse(&text).unwrap_err());
        assert!(
            message.contains(wanted),
            "{text}: {message:?} lacks {wanted:?}"
        );
    }
}

#[test]
fn more_backends_than_a_ring_can_name_are_refused() {
    let error = parse("[l4.limits]\nbackends = 65535\n").unwrap_err();
    assert_eq!(format!("{error:#}"), "l4.limits.backends must be 1..=65534");
}

#[test]
fn how_requests_are_balanced_is_read_whole() {
    let config = parse(
        r#"
        [http]
        zone = "z1"
        balance_zone = "prefer"
        slow_start = "30s"
        [http.timeouts]
        queue = "1s"
        [http.limits]
        requests_per_backend = 100
        queue = 10
        [http.retries]
        budget_percent = 10
        min_per_second = 1
        buffer_bytes = 4096
        [http.ejection]
        base = "1s"
        max = "1m"
        consecutive_failures = 3
        max_percent = 30
        [http.sticky]
        cookies = ["session"]
        secure = true
        auth_negotiate = true
        "#,
    )
    .unwrap();
    assert_eq!(config.http.ejection.max, Duration::from_secs(60));
    let text = toml::to_string(&config).unwrap();
    assert_eq!(parse(&text).unwrap(), config, "{text}");
}

#[test]
fn what_cannot_be_balanced_by_is_refused_by_name() {
    for (text, wanted) in [
        ("[http]\nbalance_zone = \"prefer\"", "http.balance_zone"),
        ("[http.ejection]\nbase = \"10m\"", "http.ejection.max"),
        (
            "[http.ejection]\nmax_percent = 101",
            "http.ejection.max_percent",
        ),
        (
            "[http.retries]\nbudget_percent = 1001",
            "http.retries.budget_percent",
        ),
        (
            "[http.retries]\nbuffer_bytes = 1048577",
            "http.retries.buffer_bytes",
        ),
        ("[http.sticky]\ncookies = [\"a=b\"]", "http.sticky.cookies"),
        ("[http.sticky]\ncookie = \"a\"", "cookie"),
        ("[http.timeouts]\nejection = \"1s\"", "ejection"),
    ] {
        let error = format!("{:#}", parse(text).unwrap_err());
        assert!(error.contains(wanted), "{error} on {text}");
    }
}

#[test]
fn segments_are_served_as_the_sharding_mode_says() {
    let nats = |text: &str| super::parse(&format!("[nats]\n{text}")).map(|config| config.nats);
    let served = |nats: &NatsConfig| {
        [None, Some("ours"), Some("theirs")].map(|segment| nats.serves_segment(segment))
    };
    let ours = "isolation_segments = [\"ours\"]\n";
    assert_eq!(served(&nats(ours).unwrap()), [true, true, true]);
    for (mode, wanted) in [
        ("all", [true, true, true]),
        ("segments", [false, true, false]),
        ("shared-and-segments", [true, true, false]),
    ] {
        let mode = format!("routing_table_sharding_mode = \"{mode}\"\n");
        assert_eq!(served(&nats(&(mode + ours)).unwrap()), wanted);
    }
    let error = nats("routing_table_sharding_mode = \"segments\"").unwrap_err();
    assert!(format!("{error:#}").contains("needs nats.isolation_segments"));
    assert!(nats("bucket = \"a.b\"").is_err());
    assert!(nats("bucket = \"\"").is_ok());
}

#[test]
fn guard_is_read_whole_and_written_back() {
    let config = parse(
        r#"
        [guard]
        default = "refuse"
        reserved_hosts = ["login.x", "*.admin.x"]
        [[guard.owner]]
        hosts = ["shop.x", "*.shop.x"]
        vips = ["192.0.2.16/28", "tcp/192.0.2.10:443"]
        subjects = ["router.register.shop"]
        sources = ["file"]
        [guard.limits.nats]
        routes = 10
        [guard.damping]
        suppress = 5
        "#,
    )
    .unwrap();
    let of_nats = config.guard.limits[Origin::Nats as usize];
    assert_eq!((of_nats.routes, of_nats.backends), (Some(10), None));
    assert!(config.guard.ownership.names_subjects());
    assert!(config.guard.damping().is_some() && Config::default().guard.damping().is_none());
    let text = toml::to_string(&config).unwrap();
    assert_eq!(parse(&text).unwrap(), config, "{text}");
}

#[test]
fn a_rule_of_guard_that_cannot_hold_is_refused_by_name() {
    for (text, wanted) in [
        (
            "reserved_hosts = ['a.x/p']",
            "guard.reserved_hosts: \"a.x/p\"",
        ),
        ("default = 'open'", "default"),
        (
            "[guard.limits.adopted]\nroutes = 1",
            "\"adopted\" is not a source",
        ),
        (
            "[[guard.owner]]\nsources = ['kv']",
            "guard.owner[0]: neither hosts nor vips",
        ),
        (
            "[[guard.owner]]\nhosts = ['a.x']",
            "neither sources nor subjects",
        ),
        (
            "[[guard.owner]]\nhosts = ['a.x']\nsources = ['nat']",
            "guard.owner[0]: sources: \"nat\" is not a source",
        ),
        (
            "[[guard.owner]]\nhosts = ['a.x']\nsubjects = ['router.register']",
            "is not router.register.NAME",
        ),
        (
            "[[guard.owner]]\nvips = ['192.0.2.1:80']\nsources = ['kv']",
            "guard.owner[0]: vips: \"192.0.2.1:80\"",
        ),
        ("[guard.damping]\nsuppress = 2", "guard.damping.reuse"),
        (
            "[guard.damping]\nsuppress = 5\nmax_suppress = '1m'",
            "guard.damping.max_suppress",
        ),
    ] {
        let error = format!("{:#}", parse(&format!("[guard]\n{text}")).unwrap_err());
        assert!(error.contains(wanted), "{text}: {error}");
    }
}
