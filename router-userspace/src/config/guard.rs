//! `[guard]`: who may register what, how much of it, and how often.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use serde::{Deserialize, Serialize};

use crate::route::Origin;
use crate::route::damping::Settings;
use crate::route::ownership::{HostPattern, Owner, Ownership, Rule, VipPattern};

/// `[guard]` with its rules in the form in which they are asked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "GuardTable", into = "GuardTable")]
pub struct GuardConfig {
    pub ownership: Arc<Ownership>,
    /// In the order of [`Origin`]'s variants.
    pub limits: [SourceLimits; Origin::ALL.len()],
    table: GuardTable,
}

/// `[guard]` as it is written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct GuardTable {
    default: Unowned,
    reserved_hosts: Vec<String>,
    owner: Vec<OwnerTable>,
    limits: BTreeMap<String, SourceLimits>,
    damping: DampingTable,
}

/// How backends that come and go are held back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct DampingTable {
    /// Leaves, each halved with every `half_life`, above which a backend is held back; 0: never.
    suppress: u32,
    /// To how many they fall before it is used again.
    reuse: u32,
    #[serde(with = "humantime_serde")]
    half_life: Duration,
    /// The longest it is held back after it left.
    #[serde(with = "humantime_serde")]
    max_suppress: Duration,
}

impl Default for DampingTable {
    fn default() -> DampingTable {
        DampingTable {
            suppress: 0,
            reuse: 2,
            half_life: Duration::from_secs(60),
            max_suppress: Duration::from_secs(600),
        }
    }
}

/// What becomes of hosts and VIPs that no rule covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Unowned {
    #[default]
    Allow,
    Refuse,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct OwnerTable {
    hosts: Vec<String>,
    vips: Vec<String>,
    sources: Vec<String>,
    subjects: Vec<String>,
}

/// How much of the route table a source may take; `None`: what the table has room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SourceLimits {
    /// Routes with backends of this source.
    pub routes: Option<usize>,
    /// Backends of routes: one that serves three routes counts three times.
    pub backends: Option<usize>,
}

impl GuardConfig {
    /// `None`: nobody is held back.
    pub fn damping(&self) -> Option<Settings> {
        let table = &self.table.damping;
        (table.suppress > 0).then(|| Settings {
            suppress: f64::from(table.suppress),
            reuse: f64::from(table.reuse),
            half_life: table.half_life,
            longest: table.max_suppress,
        })
    }

    /// `prefix` is `nats.subject_prefix`.
    pub(super) fn validate(&self, prefix: &str) -> anyhow::Result<()> {
        let damping = &self.table.damping;
        ensure!(
            damping.suppress == 0 || (1..damping.suppress).contains(&damping.reuse),
            "guard.damping.reuse must be at least 1 and below guard.damping.suppress"
        );
        let lives = damping.max_suppress.as_secs_f64() / damping.half_life.as_secs_f64();
        let ceiling = f64::from(damping.reuse) * lives.exp2();
        ensure!(
            damping.suppress == 0 || (lives < 64.0 && ceiling > f64::from(damping.suppress)),
            "guard.damping.max_suppress: not enough half-lives to get above suppress, or 64 and more"
        );
        for (at, owner) in self.table.owner.iter().enumerate() {
            for subject in &owner.subjects {
                let after = subject.strip_prefix(prefix);
                let token = after.and_then(|after| after.strip_prefix(".register."));
                ensure!(
                    token.is_some_and(is_token),
                    "guard.owner[{at}].subjects: {subject:?} is not {prefix}.register.NAME"
                );
            }
        }
        Ok(())
    }
}

impl TryFrom<GuardTable> for GuardConfig {
    /// With all its causes, of which serde shows one line.
    type Error = String;

    fn try_from(table: GuardTable) -> Result<GuardConfig, String> {
        GuardConfig::read(table).map_err(|error| format!("{error:#}"))
    }
}

impl GuardConfig {
    fn read(table: GuardTable) -> anyhow::Result<GuardConfig> {
        let reserved = patterns::<HostPattern>(&table.reserved_hosts);
        let reserved = reserved.context("guard.reserved_hosts")?;
        let rules = table.owner.iter().enumerate().map(|(at, owner)| {
            let rule = owner.rule();
            rule.with_context(|| format!("guard.owner[{at}]"))
        });
        let rules: Vec<Rule> = rules.collect::<anyhow::Result<_>>()?;
        let refuse = table.default == Unowned::Refuse;
        let mut limits = [SourceLimits::default(); Origin::ALL.len()];
        for (name, of_source) in &table.limits {
            limits[source("guard.limits", name)? as usize] = *of_source;
        }
        Ok(GuardConfig {
            ownership: Arc::new(Ownership::new(&reserved, &rules, refuse)?),
            limits,
            table,
        })
    }
}

impl From<GuardConfig> for GuardTable {
    fn from(guard: GuardConfig) -> GuardTable {
        guard.table
    }
}

impl OwnerTable {
    fn rule(&self) -> anyhow::Result<Rule> {
        ensure!(
            !self.hosts.is_empty() || !self.vips.is_empty(),
            "neither hosts nor vips"
        );
        ensure!(
            !self.sources.is_empty() || !self.subjects.is_empty(),
            "neither sources nor subjects: guard.reserved_hosts is for what is nobody's"
        );
        let sources = self.sources.iter().map(|name| source("sources", name));
        let owner = Owner {
            sources: sources.collect::<anyhow::Result<BTreeSet<Origin>>>()?,
            subjects: self.subjects.iter().map(|name| (&**name).into()).collect(),
        };
        Ok(Rule {
            hosts: patterns::<HostPattern>(&self.hosts).context("hosts")?,
            vips: patterns::<VipPattern>(&self.vips).context("vips")?,
            owner,
        })
    }
}

fn patterns<P: std::str::FromStr<Err = anyhow::Error>>(texts: &[String]) -> anyhow::Result<Vec<P>> {
    texts.iter().map(|text| text.parse()).collect()
}

fn source(key: &str, name: &str) -> anyhow::Result<Origin> {
    let mut sources = Origin::ALL.into_iter().filter(|o| *o != Origin::Adopted);
    let known = sources.find(|origin| origin.as_str() == name);
    known.ok_or_else(|| anyhow!("{key}: {name:?} is not a source"))
}

fn is_token(token: &str) -> bool {
    !token.is_empty() && !token.contains(['.', '*', '>', ' ', '\t', '\r', '\n'])
}
