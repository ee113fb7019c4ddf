//! What changed since last time, out of an append-only file.

use crate::verdict::Verdict;
use serde::{Deserialize, Serialize};

/// One line: one candidate of one run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Time of the run, UTC, `YYYYMMDDTHHMMSSZ`.
    pub time: String,
    /// Candidate id.
    pub candidate: String,
    /// macOS major.minor, or the kernel elsewhere.
    pub os: String,
    /// Xcode, or `none`.
    pub xcode: String,
    /// Chip.
    pub chip: String,
    /// What came out.
    pub verdict: Verdict,
    /// Its code.
    pub code: String,
    /// Tag of MLX.
    pub mlx: String,
    /// Name and version of this tool.
    pub tool: String,
}

impl Entry {
    fn same_machine(&self, other: &Entry) -> bool {
        (&self.os, &self.xcode, &self.chip) == (&other.os, &other.xcode, &other.chip)
    }
}

/// How a candidate compares with its past.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// Never seen.
    New,
    /// Failed before.
    NowWorks,
    /// Worked before.
    Regressed,
    /// Failed before in the same way.
    StillFailing,
    /// Failed before in another way.
    StillFailingDifferently,
    /// Worked before, works now; or nothing was learnt now.
    Unchanged,
}

/// The comparison of one candidate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Comparison {
    /// Candidate id.
    pub id: String,
    /// How it compares.
    pub change: Change,
    /// What is different about the machine or MLX since then; credit goes to nobody in particular.
    pub env_changed: Vec<String>,
}

/// Reads a history; lines that are no entries come back by number.
pub fn parse(text: &str) -> (Vec<Entry>, Vec<usize>) {
    let mut broken = Vec::new();
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let entries = lines
        .filter_map(|(index, line)| serde_json::from_str(line).map_err(|_| broken.push(index + 1)).ok())
        .collect();
    (entries, broken)
}

/// One line to append, with its line feed, to be written in one piece.
pub fn line(entry: &Entry) -> String {
    serde_json::to_string(entry).unwrap_or_default() + "\n"
}

/// Compares one entry with the past: its last conclusive line on the same machine, else the newest on another.
///
/// ```
/// # use metal_check::history::*; use metal_check::verdict::Verdict;
/// # let entry = |verdict, xcode: &str| Entry { time: "1".into(), candidate: "c".into(), os: "26.1".into(), xcode: xcode.into(), chip: "M2".into(), verdict, code: "X".into(), mlx: "0.32.2".into(), tool: "t".into() };
/// let comparison = compare(&[entry(Verdict::BuildFail, "26.1")], &entry(Verdict::Works, "26.6"));
/// assert_eq!((comparison.change, comparison.env_changed[0].as_str()), (Change::NowWorks, "Xcode 26.1 → 26.6"));
/// ```
pub fn compare(past: &[Entry], now: &Entry) -> Comparison {
    let conclusive = || {
        past.iter()
            .filter(|entry| entry.candidate == now.candidate && entry.verdict.is_conclusive())
    };
    let newest =
        |entries: &mut dyn Iterator<Item = &Entry>| entries.max_by(|one, other| one.time.cmp(&other.time)).cloned();
    let before =
        newest(&mut conclusive().filter(|entry| entry.same_machine(now))).or_else(|| newest(&mut conclusive()));
    let (change, env_changed) = match &before {
        None => (Change::New, Vec::new()),
        Some(_) if !now.verdict.is_conclusive() => (Change::Unchanged, Vec::new()),
        Some(before) => (change(before, now), differences(before, now)),
    };
    Comparison {
        id: now.candidate.clone(),
        change,
        env_changed,
    }
}

fn change(before: &Entry, now: &Entry) -> Change {
    match (before.verdict.is_usable(), now.verdict.is_usable()) {
        (true, true) => Change::Unchanged,
        (true, false) => Change::Regressed,
        (false, true) => Change::NowWorks,
        (false, false) if before.code == now.code => Change::StillFailing,
        (false, false) => Change::StillFailingDifferently,
    }
}

fn differences(before: &Entry, now: &Entry) -> Vec<String> {
    let pairs = [
        ("macOS", &before.os, &now.os),
        ("Xcode", &before.xcode, &now.xcode),
        ("chip", &before.chip, &now.chip),
        ("MLX", &before.mlx, &now.mlx),
    ];
    pairs
        .into_iter()
        .filter(|(_, one, other)| one != other)
        .map(|(what, one, other)| format!("{what} {one} → {other}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(time: &str, verdict: Verdict, code: &str) -> Entry {
        Entry {
            time: time.into(),
            candidate: "c".into(),
            os: "15.6".into(),
            xcode: "26.1".into(),
            chip: "M2".into(),
            verdict,
            code: code.into(),
            mlx: "0.32.2".into(),
            tool: "t".into(),
        }
    }

    fn check(past: &[Entry], now: Entry, expect: Change) {
        assert_eq!(compare(past, &now).change, expect);
    }

    #[test]
    fn changes() {
        let (works, fails) = (entry("1", Verdict::Works, "NONE"), entry("1", Verdict::BuildFail, "A"));
        check(&[], works.clone(), Change::New);
        check(
            std::slice::from_ref(&fails),
            entry("2", Verdict::Works, "NONE"),
            Change::NowWorks,
        );
        check(
            std::slice::from_ref(&works),
            entry("2", Verdict::RunFail, "B"),
            Change::Regressed,
        );
        check(
            std::slice::from_ref(&fails),
            entry("2", Verdict::BuildFail, "A"),
            Change::StillFailing,
        );
        check(
            std::slice::from_ref(&fails),
            entry("2", Verdict::BuildFail, "B"),
            Change::StillFailingDifferently,
        );
        check(
            std::slice::from_ref(&works),
            entry("2", Verdict::WorksSlow, "NONE"),
            Change::Unchanged,
        );
    }

    #[test]
    fn inconclusive_runs_are_looked_past() {
        let past = [
            entry("1", Verdict::Works, "NONE"),
            entry("2", Verdict::InfraError, "FETCH_OFFLINE"),
            entry("3", Verdict::Skipped, "X"),
        ];
        check(&past, entry("4", Verdict::RunFail, "B"), Change::Regressed);
        check(
            &past,
            entry("4", Verdict::InfraError, "FETCH_OFFLINE"),
            Change::Unchanged,
        );
    }

    #[test]
    fn broken_lines_are_named_and_skipped() {
        let text =
            line(&entry("1", Verdict::Works, "NONE")) + "{half a li\n\n" + &line(&entry("2", Verdict::Works, "NONE"));
        let (entries, broken) = parse(&text);
        assert_eq!((entries.len(), broken), (2, vec![2]));
    }

    const VERDICTS: [Verdict; 8] = [
        Verdict::Works,
        Verdict::WorksVirtual,
        Verdict::WorksSlow,
        Verdict::WrongResults,
        Verdict::RunFail,
        Verdict::BuildFail,
        Verdict::Skipped,
        Verdict::InfraError,
    ];

    proptest! {
        #[test]
        fn prop_same_run_twice_is_no_change_and_order_does_not_matter(picks in proptest::collection::vec((0_usize..8, 0_usize..3), 1..12)) {
            let mut past: Vec<Entry> = picks.iter().enumerate().map(|(index, (verdict, code))| entry(&format!("{index:03}"), VERDICTS[*verdict], ["A", "B", "NONE"][*code])).collect();
            let last = past.iter().rev().find(|entry| entry.verdict.is_conclusive()).cloned();
            if let Some(mut again) = last {
                again.time = "999".into();
                let change = compare(&past, &again).change;
                prop_assert!(matches!(change, Change::Unchanged | Change::StillFailing));
                past.reverse();
                prop_assert_eq!(compare(&past, &again).change, change);
            }
            let text: String = past.iter().map(line).collect();
            prop_assert_eq!(parse(&text).0, past);
        }
    }
}
