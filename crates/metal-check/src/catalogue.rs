//! The catalogue of failures: one table, `rules.toml`, compiled into the crate.

use regex::{Regex, RegexSet};
use serde::{Deserialize, Serialize};
use std::sync::LazyLock;

/// Where a build or a run dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // each variant is the word itself
pub enum Phase {
    Toolchain,
    Fetch,
    Configure,
    Shader,
    Compile,
    Rust,
    Link,
    Load,
    Device,
    Run,
    Verify,
    None,
    Unknown,
}

impl Phase {
    /// The lower-case word of reports.
    pub fn word(self) -> &'static str {
        match self {
            Phase::Toolchain => "toolchain",
            Phase::Fetch => "fetch",
            Phase::Configure => "configure",
            Phase::Shader => "shader",
            Phase::Compile => "compile",
            Phase::Rust => "rust",
            Phase::Link => "link",
            Phase::Load => "load",
            Phase::Device => "device",
            Phase::Run => "run",
            Phase::Verify => "verify",
            Phase::None => "none",
            Phase::Unknown => "unknown",
        }
    }
}

/// Who can mend it at the source. The remedy never depends on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Owner {
    /// Tools or settings of this machine.
    LocalSetup,
    /// How planish or its dependencies are built and shipped.
    OurPackaging,
    /// MLX or mlx-rs.
    Upstream,
    /// macOS or Xcode.
    Apple,
    /// The machine itself.
    Hardware,
    /// Nobody is named.
    None,
}

/// How much a rule knows; the smaller wins within one incident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strength {
    /// The text names one cause.
    #[default]
    Specific,
    /// The text names a family of causes.
    Broad,
    /// The text only shows the phase.
    Phase,
}

/// One entry of the catalogue.
#[derive(Debug)]
pub struct Entry {
    /// Stable name.
    pub code: String,
    /// Where it dies.
    pub phase: Phase,
    /// Who owns it.
    pub owner: Owner,
    /// What is known about it.
    pub cause: String,
    /// What a user can do today.
    pub remedy: String,
    /// Threads that report it.
    pub links: Vec<String>,
    /// Codes that give way to this one.
    pub beats: Vec<String>,
    pub(crate) rules: Vec<Rule>,
}

/// One compiled rule; see the head of `rules.toml` for the meaning of the fields.
#[derive(Debug)]
pub(crate) struct Rule {
    pub(crate) text: Vec<Regex>,
    pub(crate) line: Vec<String>,
    pub(crate) near: Option<Regex>,
    pub(crate) unless: Option<Regex>,
    pub(crate) strength: Strength,
    pub(crate) notes: bool,
    pub(crate) phase_only: bool,
}

/// The whole table in order of precedence.
pub fn entries() -> &'static [Entry] {
    #[allow(clippy::expect_used)] // the committed table, checked by `every_rule_compiles`
    static TABLE: LazyLock<Vec<Entry>> =
        LazyLock::new(|| load(include_str!("../rules.toml")).expect("the committed table"));
    &TABLE
}

/// All rules over single lines as one set, which a line is matched against at once.
pub(crate) struct LineRules {
    pub(crate) patterns: RegexSet,
    /// For each pattern the place of its entry in the table, and its rule.
    pub(crate) owners: Vec<(usize, &'static Rule)>,
}

/// See [`LineRules`].
pub(crate) fn line_rules() -> &'static LineRules {
    static RULES: LazyLock<LineRules> = LazyLock::new(|| {
        let all = entries()
            .iter()
            .enumerate()
            .flat_map(|(rank, entry)| entry.rules.iter().map(move |rule| (rank, rule)));
        let (patterns, owners): (Vec<&str>, Vec<_>) = all
            .flat_map(|(rank, rule)| rule.line.iter().map(move |pattern| (pattern.as_str(), (rank, rule))))
            .unzip();
        #[allow(clippy::expect_used)] // the committed table, checked by `every_rule_compiles`
        LineRules {
            patterns: RegexSet::new(patterns).expect("the committed table"),
            owners,
        }
    });
    &RULES
}

/// The entry of one code.
pub fn entry(code: &str) -> Option<&'static Entry> {
    entries().iter().find(|entry| entry.code == code)
}

#[derive(Deserialize)]
struct File {
    code: Vec<RawEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    code: String,
    phase: Phase,
    owner: Owner,
    cause: String,
    remedy: String,
    links: Vec<String>,
    #[serde(default)]
    beats: Vec<String>,
    #[serde(default)]
    rule: Vec<RawRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    #[serde(default)]
    text: Vec<String>,
    #[serde(default)]
    line: Vec<String>,
    near: Option<String>,
    unless: Option<String>,
    #[serde(default)]
    strength: Strength,
    #[serde(default)]
    notes: bool,
    confidence: Option<String>,
}

fn load(source: &str) -> Result<Vec<Entry>, String> {
    let file: File = toml::from_str(source).map_err(|error| error.to_string())?;
    file.code.into_iter().map(compile_entry).collect()
}

fn compile_entry(raw: RawEntry) -> Result<Entry, String> {
    let rules = raw
        .rule
        .iter()
        .map(compile_rule)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("{}: {error}", raw.code))?;
    let RawEntry {
        code,
        phase,
        owner,
        cause,
        remedy,
        links,
        beats,
        ..
    } = raw;
    Ok(Entry {
        code,
        phase,
        owner,
        cause,
        remedy,
        links,
        beats,
        rules,
    })
}

fn compile_rule(raw: &RawRule) -> Result<Rule, String> {
    let squeezed = |pattern: &String| regex(&format!("(?six){pattern}"));
    Ok(Rule {
        text: raw.text.iter().map(squeezed).collect::<Result<_, _>>()?,
        line: raw.line.iter().map(|pattern| format!("(?i){pattern}")).collect(),
        near: raw.near.as_ref().map(squeezed).transpose()?,
        unless: raw.unless.as_ref().map(squeezed).transpose()?,
        strength: raw.strength,
        notes: raw.notes,
        phase_only: raw.confidence.as_deref() == Some("phase") || raw.strength == Strength::Phase,
    })
}

fn regex(pattern: &str) -> Result<Regex, String> {
    Regex::new(pattern).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_compiles() {
        let table = load(include_str!("../rules.toml")).unwrap();
        assert!(table.len() > 40);
        assert!(line_rules().owners.len() > 100);
    }

    #[test]
    fn every_remedy_names_an_action_and_every_link_is_a_thread() {
        let action = Regex::new(r"(?i)\b(use|set|run|select|install|keep|log in|update|read|put|give|train|rebuild|wipe|pair|evaluate|clean|do not train|make steps)\b").unwrap();
        let thread = Regex::new(r"^https://github\.com/[\w.-]+/[\w.-]+(/(issues|pull)/\d+)?$").unwrap();
        for entry in entries() {
            assert!(action.is_match(&entry.remedy), "{}: {}", entry.code, entry.remedy);
            assert!(
                !entry.remedy.to_lowercase().contains("wait for"),
                "{} tells people to wait",
                entry.code
            );
            for link in &entry.links {
                assert!(thread.is_match(link), "{}: {link}", entry.code);
            }
        }
    }

    #[test]
    fn beaten_codes_exist_and_codes_are_unique() {
        for (index, one) in entries().iter().enumerate() {
            assert!(one.beats.iter().all(|code| entry(code).is_some()), "{}", one.code);
            assert!(
                entries()[..index].iter().all(|other| other.code != one.code),
                "{} twice",
                one.code
            );
        }
    }

    #[test]
    fn unknown_blames_nobody() {
        let unknown = entry("UNKNOWN").unwrap();
        assert_eq!(unknown.owner, Owner::None);
        for word in ["upstream", "MLX bug", "Apple", "blocked"] {
            assert!(
                !format!("{} {}", unknown.cause, unknown.remedy).contains(word),
                "{word}"
            );
        }
    }
}
