//! What a running gateway can change, and what needs a restart.

use anyhow::bail;

use crate::config::{Config, NatsConfig};

/// Keys, and tables ending in a dot, that a reload changes; `http` is layer 7's to judge.
const RELOADABLE: [&str; 21] = [
    "nats.prune_interval",
    "nats.stale_threshold",
    "nats.minimum_register_interval",
    "nats.startup_grace",
    "file.",
    "guard.",
    "redis.",
    "etcd.",
    "zookeeper.",
    "consul.",
    "http.",
    "l4.drain",
    "l4.forwarding",
    "l4.reject",
    "l4.scheduler",
    "l4.slow_start",
    "l4.vip",
    "l4.vip_ranges",
    "handover.ready_timeout",
    "health.",
    "log.filter",
];

/// Refuses a configuration that differs in what a running gateway cannot change.
pub(super) fn check(old: &Config, new: &Config) -> anyhow::Result<()> {
    // Secrets are not printed, so they are compared by themselves.
    let secrets = |nats: &NatsConfig| {
        (
            nats.password.clone(),
            nats.token.clone(),
            nats.nkey_seed.clone(),
        )
    };
    let mut changed = Vec::new();
    let (from, to) = (toml::Value::try_from(old)?, toml::Value::try_from(new)?);
    differences("", Some(&from), Some(&to), &mut changed);
    if secrets(&old.nats) != secrets(&new.nats) {
        changed.push("nats.password, nats.token or nats.nkey_seed".to_owned());
    }
    changed.retain(|key| {
        !RELOADABLE.iter().any(|known| match known.ends_with('.') {
            true => key.starts_with(known),
            false => key == known,
        })
    });
    if !changed.is_empty() {
        bail!("{} cannot change without a restart", changed.join(", "));
    }
    Ok(())
}

/// The dotted names of every leaf that differs.
fn differences(
    name: &str,
    old: Option<&toml::Value>,
    new: Option<&toml::Value>,
    changed: &mut Vec<String>,
) {
    let (Some(toml::Value::Table(from)), Some(toml::Value::Table(to))) = (old, new) else {
        if old != new {
            changed.push(name.to_owned());
        }
        return;
    };
    let mut keys: Vec<&String> = from.keys().chain(to.keys()).collect();
    keys.sort();
    keys.dedup();
    for key in keys {
        let name = if name.is_empty() {
            key.clone()
        } else {
            format!("{name}.{key}")
        };
        differences(&name, from.get(key), to.get(key), changed);
    }
}

#[cfg(test)]
mod tests {
    use crate::config;

    #[test]
    fn a_reload_names_what_needs_a_restart() {
        let old = config::parse("[nats]\npassword = \"a\"\nuser = \"u\"\n").unwrap();
        let check = |text: &str| {
            super::check(&old, &config::parse(text).unwrap()).map_err(|error| format!("{error:#}"))
        };
        let same = "[nats]\npassword = \"a\"\nuser = \"u\"\nstale_threshold = \"1s\"\n";
        check(&format!(
            "{same}[l4]\nvip_ranges = [\"192.0.2.0/24\"]\ndrain = \"1s\"\nforwarding = \"ipip\"\n\
             [[l4.vip]]\naddress = \"tcp/192.0.2.10:80\"\nscheduler = \"round-robin\"\n\
             [health]\ncheck = \"tcp\"\n"
        ))
        .unwrap();
        let error = check(&format!(
            "{same}[l4]\ninterfaces = [\"eth0\"]\ngue_port = 6081\n"
        ));
        assert_eq!(
            error.unwrap_err(),
            "l4.gue_port, l4.interfaces cannot change without a restart"
        );
        let error = check("[nats]\npassword = \"b\"\nuser = \"u\"\n").unwrap_err();
        assert!(
            error.contains("nats.password") && !error.contains("\"b\""),
            "{error}"
        );
    }
}
