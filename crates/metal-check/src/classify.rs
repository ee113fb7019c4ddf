//! Names the cause of a failure in a log, with the lines that prove it.
//!
//! Two questions in order: which *incident* is the root, and which rule understands it.
//!
//! 1. [`crate::text::clean`] makes lines; `lines` sorts them: warnings, quoted source, progress and hints can prove nothing.
//! 2. Every rule of the [`catalogue`] is searched in what is left; generic error lines nobody understands are kept as such.
//! 3. `incident` cuts the finds into incidents (a root and the consequences after it) and drops those that recovered.
//! 4. The first incident decides; within it the most specific rule, then the earliest line, then the order of the table.

mod incident;
mod lines;
mod markers;
mod parity;

use crate::catalogue::{self, Entry, Owner, Phase, Strength};
use crate::text;
use incident::{Find, Incident};
use lines::{Kind, Sorted};
use serde::{Deserialize, Serialize};

/// Version of the object that `--classify --json` prints.
pub const SCHEMA: u32 = 1;
/// Lines kept at the end of a log that no specific rule understood.
const TAIL_LINES: usize = 40;
/// Evidence lines kept beyond the matched ones.
const MAX_EVIDENCE: usize = 12;

/// How sure the classifier is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Confidence {
    /// A rule recognised the cause.
    Exact,
    /// Only the phase is known.
    Phase,
    /// Nothing was recognised.
    Unknown,
}

/// A line of the log that supports the answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Number in the original file, from 1.
    pub line: usize,
    /// The line without escape sequences and frames.
    pub text: String,
}

/// The answer: a code of the [`catalogue`], its evidence and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Classification {
    /// Version of this object.
    pub schema: u32,
    /// The code.
    pub code: String,
    /// Where it died.
    pub phase: Phase,
    /// How sure.
    pub confidence: Confidence,
    /// Who owns it.
    pub owner: Owner,
    /// What proves it, in the order of the log.
    pub evidence: Vec<Evidence>,
    /// Codes of later, independent failures of the same log.
    pub secondary: Vec<String>,
    /// What a user can do today.
    pub remedy: String,
    /// Threads that report it.
    pub links: Vec<String>,
    /// The last lines, where no specific rule understood the failure.
    pub tail: Vec<String>,
}

/// Classifies the bytes of a log. Never fails: what it does not understand is `UNKNOWN`, what shows no failure `NONE`.
///
/// ```
/// let log = b"[ 1%] Compiling Metal kernels\nxcrun: error: unable to find utility \"metal\", not a developer tool or in PATH\n";
/// let answer = metal_check::classify::classify(log);
/// assert_eq!(answer.code, "TOOLCHAIN_METAL_MISSING");
/// assert_eq!(answer.evidence[0].line, 2);
/// ```
pub fn classify(log: &[u8]) -> Classification {
    let sorted = lines::sort(text::clean(log));
    let finds = collect_finds(&sorted);
    let incidents = incident::live_incidents(&sorted, &finds);
    let Some(root) = choose(&incidents) else {
        return answer(&sorted, verdict("NONE"), None, &[]);
    };
    let best = override_across(&finds, &incidents, root);
    let secondary = secondary_codes(&incidents, root, &best.0.code);
    answer(&sorted, best, Some(root), &secondary)
}

type Best = (&'static Entry, Option<Find>);

/// A native failure explains a failed cargo build better than a rustc diagnostic of another crate.
fn choose(incidents: &[Incident]) -> Option<&Incident> {
    let rust = |incident: &&Incident| incident.best.0.code == "RUST_COMPILE";
    incidents
        .iter()
        .find(|incident| !rust(incident) && incident.best.0.code != "UNKNOWN")
        .or_else(|| incidents.iter().find(|incident| incident.best.0.code != "UNKNOWN"))
        .or_else(|| incidents.first())
}

/// A code may beat another wherever it stands in the log (`beats` in the table).
fn override_across(finds: &[Find], incidents: &[Incident], root: &Incident) -> Best {
    let chosen = &root.best;
    finds
        .iter()
        .filter(|find| {
            find.entry.beats.contains(&chosen.0.code) && incidents.iter().any(|incident| incident.holds(find))
        })
        .min_by_key(|find| find.first)
        .map_or_else(|| (chosen.0, chosen.1.clone()), |find| (find.entry, Some(find.clone())))
}

fn secondary_codes(incidents: &[Incident], root: &Incident, code: &str) -> Vec<String> {
    let mut codes: Vec<String> = Vec::new();
    for other in incidents.iter().filter(|incident| incident.first > root.first) {
        let name = &other.best.0.code;
        if name != code && name != "UNKNOWN" && !codes.contains(name) {
            codes.push(name.clone());
        }
    }
    codes
}

fn verdict(code: &str) -> Best {
    let table = catalogue::entries();
    (catalogue::entry(code).unwrap_or(&table[table.len() - 1]), None)
}

fn answer(sorted: &Sorted, (entry, find): Best, root: Option<&Incident>, secondary: &[String]) -> Classification {
    let confidence = match (&find, entry.code.as_str()) {
        (_, "UNKNOWN") => Confidence::Unknown,
        (_, "NONE") => Confidence::Exact,
        (Some(find), _) if !find.phase_only => Confidence::Exact,
        _ => Confidence::Phase,
    };
    let keep_tail = confidence != Confidence::Exact;
    Classification {
        schema: SCHEMA,
        code: entry.code.clone(),
        phase: root
            .and_then(|incident| incident.unknown_phase)
            .filter(|_| entry.code == "UNKNOWN")
            .unwrap_or(entry.phase),
        confidence,
        owner: entry.owner,
        evidence: root.map_or_else(Vec::new, |incident| evidence(sorted, incident, find.as_ref())),
        secondary: secondary.to_vec(),
        remedy: entry.remedy.clone(),
        links: entry.links.clone(),
        tail: if keep_tail { tail(sorted) } else { Vec::new() },
    }
}

fn tail(sorted: &Sorted) -> Vec<String> {
    let from = sorted.lines.len().saturating_sub(TAIL_LINES);
    sorted.lines[from..].iter().map(|line| line.text.clone()).collect()
}

/// The matched lines first, then the other finds of the incident up to a limit, in the order of the log.
fn evidence(sorted: &Sorted, incident: &Incident, find: Option<&Find>) -> Vec<Evidence> {
    let mut indices: Vec<usize> = find.map_or_else(Vec::new, |find| find.span().collect());
    for index in incident.lines.iter().copied() {
        if indices.len() >= MAX_EVIDENCE {
            break;
        }
        if !indices.contains(&index) {
            indices.push(index);
        }
    }
    indices.sort_unstable();
    indices.dedup();
    indices
        .into_iter()
        .map(|index| &sorted.lines[index])
        .filter(|line| !line.text.trim().is_empty())
        .map(|line| Evidence {
            line: line.number,
            text: line.text.trim().to_owned(),
        })
        .collect()
}

/// Every place where a rule of the catalogue or a bare error line matches.
fn collect_finds(sorted: &Sorted) -> Vec<Find> {
    let joined = sorted.joined();
    let mut finds = Vec::new();
    for (rank, entry) in catalogue::entries().iter().enumerate() {
        for rule in &entry.rules {
            let mut add = |first: usize, last: usize| {
                let notes_only = (first..=last)
                    .filter(|index| sorted.kinds[*index].is_live())
                    .all(|index| sorted.kinds[index] == Kind::Note);
                if !notes_only || rule.notes {
                    finds.push(Find {
                        entry,
                        rank,
                        rule: Some(rule),
                        first,
                        last,
                        strength: rule.strength,
                        phase_only: rule.phase_only,
                    });
                }
            };
            for pattern in &rule.text {
                for (first, last) in joined.search(pattern) {
                    add(first, last);
                }
            }
        }
    }
    finds.extend(line_finds(sorted));
    finds.extend(split_finds(sorted));
    finds.extend(parity::failures(sorted));
    finds.extend(markers::bare_errors(sorted));
    finds.sort_by_key(|find| (find.first, find.strength, find.rank));
    finds
}

/// Where the rules over single lines match.
fn line_finds(sorted: &Sorted) -> Vec<Find> {
    let rules = catalogue::line_rules();
    let mut finds = Vec::new();
    for (index, line) in sorted.live().filter(|(index, _)| sorted.kinds[*index] == Kind::Plain) {
        let line = line.trim_start();
        for matched in rules.patterns.matches(line) {
            let (rank, rule) = rules.owners[matched];
            let entry = &catalogue::entries()[rank];
            if !(entry.code == "RUN_OTHER" && markers::is_build_script_panic(line)) {
                finds.push(Find {
                    entry,
                    rank,
                    rule: Some(rule),
                    first: index,
                    last: index,
                    strength: rule.strength,
                    phase_only: rule.phase_only,
                });
            }
        }
    }
    finds
}

/// How far apart the two halves of a diagnostic may be when another job's lines stand between them.
const MAX_SPLIT: usize = 6;

/// Finds in a diagnostic whose halves are separated by lines of another job that look like nothing known.
fn split_finds(sorted: &Sorted) -> Vec<Find> {
    let live: Vec<(usize, &str)> = sorted.live().collect();
    let mut finds = Vec::new();
    for (position, (first, head)) in live.iter().enumerate() {
        if !markers::opens_diagnostic(head) {
            continue;
        }
        for (last, rest) in live.iter().skip(position + 2).take(MAX_SPLIT) {
            let pair = format!("{}{}", lines::squeeze(head), lines::squeeze(rest));
            let seam = lines::squeeze(head).len();
            for (rank, entry) in catalogue::entries().iter().enumerate() {
                for rule in entry.rules.iter().filter(|rule| rule.strength == Strength::Specific) {
                    let crosses = |found: regex::Match| found.start() < seam && found.end() > seam;
                    if rule.text.iter().any(|pattern| pattern.find(&pair).is_some_and(crosses)) {
                        finds.push(Find {
                            entry,
                            rank,
                            rule: Some(rule),
                            first: *first,
                            last: *last,
                            strength: rule.strength,
                            phase_only: rule.phase_only,
                        });
                    }
                }
            }
        }
    }
    finds
}

#[cfg(test)]
mod tests;
