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
