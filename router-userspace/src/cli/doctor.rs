//! `viaduct doctor`: whether this host can run the gateway as it is configured, and what to do if not.
//!
//! Looks, and changes nothing; it may be run beside a running gateway. Layer 4 is looked at when it has
//! interfaces. Each check is a line with what was found, and a remedy wherever something is missing.

use serde::Serialize;

use crate::cli::{ConfigOption, Failure, block_on, print};
use crate::config::Config;
use crate::l4::datapath::Sockmap;
use crate::l7;
use crate::source::nats;

mod host;
mod interfaces;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    config: ConfigOption,
    /// Print JSON, one object a check
    #[arg(long)]
    json: bool,
}

/// What became of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Good,
    /// It works, but not as well as it could, or a mode that is not in use would not.
    Hint,
    /// The gateway would not start, or not do what it is configured for.
    Missing,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: String,
    verdict: Verdict,
    found: String,
    /// What to do; empty where all is well.
    #[serde(skip_serializing_if = "String::is_empty")]
    remedy: String,
}

impl Check {
    fn good(name: impl Into<String>, found: impl Into<String>) -> Check {
        Check {
            name: name.into(),
            verdict: Verdict::Good,
            found: found.into(),
            remedy: String::new(),
        }
    }

    fn hint(name: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check {
            verdict: Verdict::Hint,
            remedy: remedy.into(),
            ..Check::good(name, found)
        }
    }

    fn missing(
        name: impl Into<String>,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Check {
        Check {
            verdict: Verdict::Missing,
            ..Check::hint(name, found, remedy)
        }
    }
}

/// # Errors
/// Something that is needed is missing.
pub fn run(options: &Options) -> Result<(), Failure> {
    let config = options.config.load()?;
    let mut checks = Vec::new();
    if config.l4.interfaces.is_empty() {
        checks.push(Check::good("layer 4", "off: l4.interfaces is empty"));
    } else {
        checks.extend(host::checks(&config.l4));
        checks.extend(interfaces::checks(&config.l4));
    }
    if config.http.sockmap {
        checks.push(sockmap());
    }
    checks.push(nats_server(&config));
    print(&match options.json {
        true => json(&checks)?,
        false => text(&checks),
    })?;
    let missing = checks
        .iter()
        .filter(|check| check.verdict == Verdict::Missing)
        .count();
    match missing {
        0 => Ok(()),
        count => Err(Failure::Failed(anyhow::anyhow!(
            "{count} of {} checks found something missing",
            checks.len()
        ))),
    }
}

/// The one check that does something: the programs are on the host's cgroup while it lasts.
fn sockmap() -> Check {
    match Sockmap::attach_to_host(l7::sockmap::mark()) {
        Ok(_) => Check::good("http.sockmap", "bytes pass TCP by on this host"),
        Err(error) => Check::missing(
            "http.sockmap",
            format!("{error:#}"),
            "set it to false, or give the gateway what is missing",
        ),
    }
}

fn nats_server(config: &Config) -> Check {
    let servers = config.nats.servers.join(", ");
    if config.nats.servers.is_empty() {
        return Check::good("nats", "none: nats.servers is empty");
    }
    match block_on(nats::reach(&config.nats)) {
        Ok(version) => Check::good("nats", format!("{servers} answers, version {version}")),
        Err(error) => Check::missing(
            "nats",
            format!("{error:#}"),
            "start the server, or set nats.servers, its credentials and certificates",
        ),
    }
}

fn json(checks: &[Check]) -> anyhow::Result<String> {
    let mut text = String::new();
    for check in checks {
        text.push_str(&serde_json::to_string(check)?);
        text.push('\n');
    }
    Ok(text)
}

fn text(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.len()).max();
    let width = width.unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let word = match check.verdict {
            Verdict::Good => "good",
            Verdict::Hint => "hint",
            Verdict::Missing => "MISSING",
        };
        text.push_str(&format!(
            "{word:<7}  {:<width$}  {}\n",
            check.name, check.found
        ));
        if !check.remedy.is_empty() {
            text.push_str(&format!("{:<7}  {:<width$}  -> {}\n", "", "", check.remedy));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_not_good_comes_with_its_remedy() {
        let checks = [
            Check::good("kernel", "6.1"),
            Check::missing("bpffs", "none", "mount one"),
        ];
        assert_eq!(
            text(&checks),
            "good     kernel  6.1\n\
             MISSING  bpffs   none\n\
             \u{20}                -> mount one\n"
        );
        assert_eq!(
            json(&checks[..1]).unwrap(),
            "{\"name\":\"kernel\",\"verdict\":\"good\",\"found\":\"6.1\"}\n"
        );
    }
}
