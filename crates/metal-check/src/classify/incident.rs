//! Cuts the finds of a log into incidents: a root, and the consequences after it.

use super::lines::{Kind, Sorted};
use super::markers::{self, Cascade};
use super::verdict;
use crate::catalogue::{self, Entry, Phase, Rule, Strength};

/// One place where something matched.
#[derive(Debug, Clone)]
pub(super) struct Find {
    pub(super) entry: &'static Entry,
    /// Place of the entry in the table.
    pub(super) rank: usize,
    /// `None` for finds that are computed, not matched.
    pub(super) rule: Option<&'static Rule>,
    /// Index of the first matched line.
    pub(super) first: usize,
    /// Index of the last matched line.
    pub(super) last: usize,
    pub(super) strength: Strength,
    pub(super) phase_only: bool,
}

impl Find {
    /// The matched lines: the ends only where they are far apart, because what stands between belongs to others.
    pub(super) fn span(&self) -> impl Iterator<Item = usize> + use<> {
        let far = self.last - self.first > 3;
        (self.first..=self.last).filter({
            let (first, last) = (self.first, self.last);
            move |index| !far || *index == first || *index == last
        })
    }

    fn is_unknown(&self) -> bool {
        self.entry.code == "UNKNOWN"
    }
}

/// A root failure with what followed from it.
#[derive(Debug)]
pub(super) struct Incident {
    pub(super) first: usize,
    /// Every line that belongs to it, in order.
    pub(super) lines: Vec<usize>,
    pub(super) best: (&'static Entry, Option<Find>),
    /// Where an unrecognised failure died, if a consequence tells.
    pub(super) unknown_phase: Option<Phase>,
}

impl Incident {
    pub(super) fn holds(&self, find: &Find) -> bool {
        self.lines.contains(&find.first)
    }
}

enum Event<'a> {
    Found(&'a Find),
    Followed(usize, Cascade),
    Opened(usize, Option<Cascade>),
    Succeeded(usize, Phase),
}

impl Event<'_> {
    fn index(&self) -> usize {
        match self {
            Event::Found(find) => find.first,
            Event::Followed(index, _) | Event::Opened(index, _) | Event::Succeeded(index, _) => *index,
        }
    }
}

/// The incidents that did not recover, in the order of the log.
pub(super) fn live_incidents(sorted: &Sorted, finds: &[Find]) -> Vec<Incident> {
    let groups = group(&events(sorted, finds));
    let judged: Vec<(Draft, bool)> = groups
        .into_iter()
        .map(|draft| (draft.recovered(sorted), draft))
        .map(|(recovered, draft)| (draft, recovered))
        .collect();
    let ended_badly = judged
        .iter()
        .rev()
        .any(|(draft, recovered)| !recovered && draft.has_consequence);
    let mut live: Vec<Incident> = judged
        .iter()
        .filter(|(_, recovered)| !recovered)
        .filter_map(|(draft, _)| draft.judge(sorted))
        .collect();
    // A failure that ended the log without a root of its own is explained by the last thing that seemed to recover.
    if ended_badly && live.iter().all(|incident| incident.best.0.code == "UNKNOWN") {
        let explained = judged
            .iter()
            .rev()
            .filter(|(draft, recovered)| *recovered && !draft.finds.is_empty());
        if let Some(incident) = explained
            .filter(|(draft, _)| !draft.overtaken(sorted))
            .find_map(|(draft, _)| draft.judge(sorted))
        {
            live.insert(0, incident);
        }
    }
    live
}

fn events<'a>(sorted: &Sorted, finds: &'a [Find]) -> Vec<Event<'a>> {
    let mut events: Vec<Event> = finds.iter().map(Event::Found).collect();
    for (index, line) in sorted
        .unified
        .iter()
        .enumerate()
        .filter(|(index, _)| sorted.kinds[*index] != Kind::Mute)
    {
        let cascade = sorted.cascades[index];
        if markers::opens_target(line) {
            events.push(Event::Opened(index, cascade));
        } else if let Some(cascade) = cascade {
            events.push(Event::Followed(index, cascade));
        }
    }
    let successes = sorted
        .successes
        .iter()
        .enumerate()
        .filter_map(|(index, phase)| Some((index, (*phase)?)));
    events.extend(successes.map(|(index, phase)| Event::Succeeded(index, phase)));
    // At one line the finds come before the consequence.
    events.sort_by_key(|event| (event.index(), matches!(event, Event::Followed(..))));
    events
}

/// An incident before its cause is decided.
#[derive(Default)]
struct Draft {
    finds: Vec<Find>,
    lines: Vec<usize>,
    hint: Option<Phase>,
    has_consequence: bool,
    closed: bool,
    /// Its phase succeeded afterwards: whatever comes is another incident.
    sealed: bool,
    /// `make` or ninja named the file that failed.
    named_file: bool,
}

/// A consequence closes an incident that has a root; the next root opens another. Consequences before any root wait for it:
/// a program that runs programs may print their standard output, with the summary, before their standard error.
fn group(events: &[Event]) -> Vec<Draft> {
    let mut groups: Vec<Draft> = Vec::new();
    let mut current = Draft::default();
    for event in events {
        match event {
            Event::Found(find) => {
                if current.sealed || (current.closed && !continues(&current, find)) {
                    groups.push(std::mem::take(&mut current));
                }
                current.lines.extend(find.span());
                current.finds.push((*find).clone());
            }
            Event::Followed(index, cascade) => {
                current.closed |= !current.finds.is_empty();
                current.follow(*index, *cascade);
            }
            Event::Opened(index, cascade) => {
                if !current.finds.is_empty() {
                    groups.push(std::mem::take(&mut current));
                }
                current.follow(*index, cascade.unwrap_or(Cascade::Unclear));
            }
            Event::Succeeded(_, reached) => {
                current.sealed |= !current.finds.is_empty() && covers(*reached, current.phase())
            }
        }
    }
    groups.push(current);
    groups.retain(|draft| !draft.lines.is_empty());
    groups
}

/// How far below a consequence the text may stand that explains a vague headline above it.
const EXPLAINED_WITHIN: usize = 15;

/// A find on the line of the consequence itself, or one that explains a headline of which only the phase was known, is
/// still the same incident; unless `make` or ninja already named the failing file.
fn continues(current: &Draft, find: &Find) -> bool {
    let Some(&last) = current.lines.last() else { return true };
    let vague = current.finds.iter().all(|found| found.strength > find.strength);
    last >= find.first
        || current.finds.iter().all(Find::is_unknown)
        || (vague && !current.named_file && find.first - last <= EXPLAINED_WITHIN)
}

/// Whether a success at this phase means that the earlier phase is over.
fn covers(reached: Phase, phase: Phase) -> bool {
    reached >= phase && (phase != Phase::Toolchain || reached >= Phase::Configure)
}

impl Draft {
    fn follow(&mut self, index: usize, cascade: Cascade) {
        self.lines.push(index);
        self.has_consequence = true;
        if let Cascade::Hints(phase) = cascade {
            self.hint.get_or_insert(phase);
            self.named_file |= !self.finds.is_empty() && matches!(phase, Phase::Shader | Phase::Compile | Phase::Link);
        }
    }

    fn first(&self) -> usize {
        self.lines.iter().copied().min().unwrap_or(0)
    }

    fn last(&self) -> usize {
        self.lines.iter().copied().max().unwrap_or(0)
    }

    /// The most specific find, then the earliest, then the table's order; else the catch-all of the hinted phase.
    fn judge(&self, sorted: &Sorted) -> Option<Incident> {
        let window = sorted
            .joined_between(self.first().saturating_sub(20), self.last() + 40)
            .text;
        let fits = |find: &&Find| {
            find.rule.is_none_or(|rule| {
                rule.near.as_ref().is_none_or(|near| near.is_match(&window))
                    && rule.unless.as_ref().is_none_or(|unless| !unless.is_match(&window))
            })
        };
        let fitting: Vec<&Find> = self
            .finds
            .iter()
            .filter(|find| !find.is_unknown())
            .filter(fits)
            .collect();
        let unbeaten = fitting
            .iter()
            .filter(|find| !fitting.iter().any(|other| other.entry.beats.contains(&find.entry.code)));
        let best = unbeaten.min_by_key(|find| (find.strength, find.first, find.rank));
        let (best, unknown_phase) = match best {
            Some(find) => ((find.entry, Some((*find).clone())), None),
            None => (
                self.hint.and_then(catch_all).unwrap_or_else(|| verdict("UNKNOWN")),
                self.hint,
            ),
        };
        let mut lines = self.lines.clone();
        lines.sort_unstable();
        lines.dedup();
        (!self.finds.is_empty() || self.has_consequence).then_some(Incident {
            first: self.first(),
            lines,
            best,
            unknown_phase,
        })
    }

    /// The phase that its finds show, the earliest of them.
    fn phase(&self) -> Phase {
        let phases = self
            .finds
            .iter()
            .filter(|find| !find.is_unknown())
            .map(|find| find.entry.phase);
        phases.min().or(self.hint).unwrap_or(Phase::Unknown)
    }

    /// Whether what failed here succeeded later.
    fn recovered(&self, sorted: &Sorted) -> bool {
        let after = self.root_line() + 1;
        let phase = self.phase();
        if phase >= Phase::Load && phase != Phase::Unknown {
            // Only a run that ended well after it recovers what failed at run time; wrong numbers never do.
            return phase != Phase::Verify && self.overtaken(sorted);
        }
        if self.overtaken(sorted) {
            return true;
        }
        if phase > Phase::Configure {
            return false;
        }
        let reached = sorted.successes[after..]
            .iter()
            .position(|success| success.is_some_and(|reached| covers(reached, phase)));
        let Some(reached) = reached else { return false };
        let between = || (after..after + reached).map(|index| (&sorted.cascades[index], &sorted.unified[index]));
        let stopped =
            between().any(|(cascade, line)| cascade.is_some() || line.trim_start().starts_with("CMake Error"));
        !stopped || between().any(|(_, line)| markers::is_retry(line))
    }

    /// Whether the whole build or run succeeded after it and nothing failed afterwards.
    fn overtaken(&self, sorted: &Sorted) -> bool {
        let at_run_time = self.phase() >= Phase::Load && self.phase() != Phase::Unknown;
        let wanted = if at_run_time { Phase::Run } else { Phase::Link };
        let after = self.last() + 1;
        let Some(at) = sorted.successes[after..]
            .iter()
            .rposition(|success| success.is_some_and(|reached| reached >= wanted))
        else {
            return false;
        };
        (after + at + 1..sorted.lines.len())
            .all(|index| sorted.cascades[index].is_none() || sorted.kinds[index] == Kind::Mute)
    }

    fn root_line(&self) -> usize {
        self.finds
            .iter()
            .map(|find| find.last)
            .min()
            .unwrap_or_else(|| self.last())
    }
}

fn catch_all(phase: Phase) -> Option<(&'static Entry, Option<Find>)> {
    let code = match phase {
        Phase::Fetch => "FETCH_OTHER",
        Phase::Configure => "CONFIGURE_OTHER",
        Phase::Shader => "SHADER_OTHER",
        Phase::Compile => "BUILD_OTHER",
        Phase::Rust => "RUST_COMPILE",
        Phase::Link => "LINK_OTHER",
        Phase::Load => "LOAD_OTHER",
        Phase::Device => "DEVICE_OTHER",
        Phase::Run => "RUN_OTHER",
        _ => return None,
    };
    catalogue::entry(code).map(|entry| (entry, None))
}
