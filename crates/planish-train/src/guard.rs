//! Watches the gradient norm: refuses what is not finite, and remarks on what is unusually large.

use std::collections::VecDeque;

/// Updates in a row that may be refused before the run ends.
pub(crate) const MAX_REFUSED_IN_A_ROW: usize = 3;
/// A norm this many times the running median is a spike.
pub(crate) const SPIKE_FACTOR: f64 = 10.0;
/// Norms that the median runs over.
const MEMORY: usize = 64;
/// Norms before the median means anything.
const LEAST: usize = 8;

/// What to make of one update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Ordinary.
    Normal,
    /// Applied, but worth a line.
    Spike,
    /// Not applied.
    Refused,
    /// Not applied, and one too many in a row.
    Diverged,
}

/// The memory of the guard.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Guard {
    norms: VecDeque<f64>,
    refused_in_a_row: usize,
}

impl Guard {
    /// Judges an update by the norm of its gradient; `finite` is the device's own test of loss and gradient.
    pub fn judge(&mut self, norm: f64, finite: bool) -> Verdict {
        if !finite {
            self.refused_in_a_row += 1;
            return if self.refused_in_a_row >= MAX_REFUSED_IN_A_ROW {
                Verdict::Diverged
            } else {
                Verdict::Refused
            };
        }
        self.refused_in_a_row = 0;
        let is_spike = self.median().is_some_and(|median| norm > SPIKE_FACTOR * median);
        self.norms.push_back(norm);
        if self.norms.len() > MEMORY {
            self.norms.pop_front();
        }
        if is_spike { Verdict::Spike } else { Verdict::Normal }
    }

    /// Refused updates since the last one that was applied.
    pub(crate) fn refused_in_a_row(&self) -> usize {
        self.refused_in_a_row
    }

    /// The norms that the median runs over, oldest first, and the refused updates in a row: what a checkpoint keeps.
    pub fn memory(&self) -> (Vec<f64>, usize) {
        (self.norms.iter().copied().collect(), self.refused_in_a_row)
    }

    /// A guard with the [`memory`](Self::memory) of another.
    pub(crate) fn with_memory(norms: &[f64], refused_in_a_row: usize) -> Self {
        Self {
            norms: norms.iter().copied().collect(),
            refused_in_a_row,
        }
    }

    fn median(&self) -> Option<f64> {
        if self.norms.len() < LEAST {
            return None;
        }
        let mut sorted: Vec<f64> = self.norms.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        Some(sorted[sorted.len() / 2])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn third_refusal_in_a_row_ends_the_run() {
        let mut guard = Guard::default();
        assert_eq!(guard.judge(f64::NAN, false), Verdict::Refused);
        assert_eq!(guard.judge(1.0, true), Verdict::Normal);
        assert_eq!(guard.judge(f64::INFINITY, false), Verdict::Refused);
        assert_eq!(guard.judge(f64::INFINITY, false), Verdict::Refused);
        assert_eq!(guard.judge(f64::INFINITY, false), Verdict::Diverged);
    }

    #[test]
    fn spike_is_ten_times_the_median_and_waits_for_a_history() {
        let mut guard = Guard::default();
        assert_eq!(guard.judge(1000.0, true), Verdict::Normal);
        (0..20).for_each(|_| assert_eq!(guard.judge(1.0, true), Verdict::Normal));
        assert_eq!(guard.judge(9.9, true), Verdict::Normal);
        assert_eq!(guard.judge(10.1, true), Verdict::Spike);
    }

    #[test]
    fn memory_restores_the_same_guard() {
        let mut guard = Guard::default();
        (0..100).for_each(|i| _ = guard.judge(f64::from(i), true));
        guard.judge(0.0, false);
        let (norms, refused) = guard.memory();
        assert_eq!(Guard::with_memory(&norms, refused), guard);
    }
}
