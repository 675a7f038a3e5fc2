use super::*;

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
