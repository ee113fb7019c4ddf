//! What a run's exit status means, so that scripts may rely on it.

use crate::history::Change;
use crate::verdict::Verdict;

/// A GPU candidate works and its numbers are right.
pub(crate) const GPU_WORKS: u8 = 0;
/// The tool itself failed.
pub const INTERNAL: u8 = 1;
/// Wrong arguments.
pub const USAGE: u8 = 2;
/// Only the CPU works.
pub(crate) const ONLY_CPU: u8 = 10;
/// Something that worked before does not.
pub(crate) const REGRESSED: u8 = 11;
/// A candidate gave wrong results.
pub const WRONG_RESULTS: u8 = 12;
/// No Metal on this kind of machine.
pub(crate) const UNSUPPORTED: u8 = 20;
/// Nothing was learnt, or the CPU control failed.
pub(crate) const INFRASTRUCTURE: u8 = 30;

/// What the status is decided from.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Verdict and whether it is the CPU control, and whether it is about a GPU, of each candidate.
    pub candidates: Vec<(Verdict, bool, bool)>,
    /// Comparisons with the past.
    pub changes: Vec<Change>,
    /// The host can use Metal.
    pub host_supported: bool,
    /// `--allow-unsupported`.
    pub allow_unsupported: bool,
}

/// The status of a run. When several apply: 30 (only if nothing was learnt or the control failed), 12, 11, 20, 10, 0.
///
/// ```
/// use metal_check::{exit::*, verdict::Verdict};
/// let facts = Facts { candidates: vec![(Verdict::Works, true, false), (Verdict::WrongResults, false, true)], host_supported: true, ..Facts::default() };
/// assert_eq!(status(&facts), WRONG_RESULTS);
/// ```
pub fn status(facts: &Facts) -> u8 {
    let any = |wanted: &dyn Fn(Verdict, bool, bool) -> bool| {
        facts
            .candidates
            .iter()
            .any(|(verdict, control, gpu)| wanted(*verdict, *control, *gpu))
    };
    let control_failed = any(&|verdict, control, _| {
        control && verdict != Verdict::Skipped && !verdict.is_usable() && verdict != Verdict::WrongResults
    });
    let learnt = any(&|verdict, _, _| verdict.is_conclusive());
    let tried = any(&|verdict, _, _| verdict != Verdict::Skipped);
    if control_failed || (tried && !learnt) {
        INFRASTRUCTURE
    } else if any(&|verdict, _, _| verdict == Verdict::WrongResults) {
        WRONG_RESULTS
    } else if facts.changes.contains(&Change::Regressed) {
        REGRESSED
    } else if !facts.host_supported {
        if facts.allow_unsupported {
            GPU_WORKS
        } else {
            UNSUPPORTED
        }
    } else if any(&|verdict, _, gpu| gpu && verdict.is_usable()) {
        GPU_WORKS
    } else {
        ONLY_CPU
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(candidates: &[(Verdict, bool, bool)], host_supported: bool, changes: &[Change], expect: u8) {
        assert_eq!(
            status(&Facts {
                candidates: candidates.to_vec(),
                changes: changes.to_vec(),
                host_supported,
                allow_unsupported: false
            }),
            expect,
            "{candidates:?}"
        );
    }

    const CONTROL: (Verdict, bool, bool) = (Verdict::Works, true, false);

    #[test]
    fn precedence() {
        use Verdict::*;
        check(&[CONTROL, (Works, false, true)], true, &[], GPU_WORKS);
        check(&[CONTROL, (BuildFail, false, true)], true, &[], ONLY_CPU);
        check(&[CONTROL, (Skipped, false, true)], true, &[], ONLY_CPU);
        check(
            &[CONTROL, (RunFail, false, true)],
            true,
            &[Change::Regressed],
            REGRESSED,
        );
        check(
            &[CONTROL, (WrongResults, false, true), (Works, false, true)],
            true,
            &[Change::Regressed],
            WRONG_RESULTS,
        );
        check(&[CONTROL], false, &[], UNSUPPORTED);
        check(
            &[(RunFail, true, false), (Works, false, true)],
            true,
            &[],
            INFRASTRUCTURE,
        );
        check(
            &[(InfraError, true, false), (InfraError, false, true)],
            false,
            &[],
            INFRASTRUCTURE,
        );
        check(
            &[(Skipped, true, false), (Skipped, false, true)],
            false,
            &[],
            UNSUPPORTED,
        );
    }
}
