//! `[guard]`: who may register what, how much of it, and how often.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context as _, anyhow, ensure};
use serde::{Deserialize, Serialize};

use crate::route::Origin;
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
    /// `prefix` is `nats.subject_prefix`.
    pub(super) fn validate(&self, prefix: &str) -> anyhow::Result<()> {
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
    type Error = anyhow::Error;

    fn try_from(table: GuardTable) -> anyhow::Result<GuardConfig> {
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
