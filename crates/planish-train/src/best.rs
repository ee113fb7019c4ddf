//! The best evaluation so far, and when to give up.

/// Keeps the step with the lowest loss; ties keep the earlier one.
#[derive(Debug, Clone, PartialEq)]
pub struct Best {
    patience: usize,
    min_delta: f64,
    best: Option<(usize, f64)>,
    without_new: usize,
}

impl Best {
    /// Nothing seen yet. `patience` 0 never gives up.
    pub fn new(patience: usize, min_delta: f64) -> Self {
        Self {
            patience,
            min_delta,
            best: None,
            without_new: 0,
        }
    }

    /// What a checkpoint kept: the best so far, and the evaluations since.
    pub fn restore(&mut self, best: Option<(usize, f64)>, without_new: usize) {
        self.best = best;
        self.without_new = without_new;
    }

    /// Takes an evaluation into account and says whether it is a new best: lower than the best by more than `min_delta`.
    pub(crate) fn offer(&mut self, step: usize, loss: f64) -> bool {
        let improves = self
            .best
            .map_or(loss.is_finite(), |(_, best)| loss < best - self.min_delta);
        if improves {
            self.best = Some((step, loss));
            self.without_new = 0;
        } else {
            self.without_new += 1;
        }
        improves
    }

    /// Step and loss of the best.
    pub fn found(&self) -> Option<(usize, f64)> {
        self.best
    }

    /// The step of the best; 0 before any.
    pub fn step(&self) -> usize {
        self.best.map_or(0, |(step, _)| step)
    }

    /// Evaluations since the best.
    pub(crate) fn without_new(&self) -> usize {
        self.without_new
    }

    /// Evaluations without a new best that are still allowed.
    pub fn patience_left(&self) -> Option<usize> {
        (self.patience > 0).then(|| self.patience.saturating_sub(self.without_new))
    }

    /// Whether the run should end.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.patience > 0 && self.without_new >= self.patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offers losses at steps 0, 10, 20…; returns the best step and the step at which the run ends.
    fn follow(patience: usize, min_delta: f64, losses: &[f64]) -> (usize, Option<usize>) {
        let mut best = Best::new(patience, min_delta);
        for (i, &loss) in losses.iter().enumerate() {
            best.offer(i * 10, loss);
            if best.is_exhausted() {
                return (best.step(), Some(i * 10));
            }
        }
        (best.step(), None)
    }

    #[test]
    fn lowest_loss_wins_and_ties_keep_the_earlier() {
        assert_eq!(follow(0, 0.0, &[3.0, 2.0, 2.5, 2.0, 1.9, 2.2]), (40, None));
        assert_eq!(follow(0, 0.0, &[2.0, 2.0, 2.0]), (0, None));
        assert_eq!(follow(0, 0.1, &[2.0, 1.95, 1.85]), (20, None));
    }

    #[test]
    fn run_ends_after_as_many_evaluations_as_patience_allows() {
        assert_eq!(follow(2, 0.0, &[3.0, 2.0, 2.1, 2.2, 1.0]), (10, Some(30)));
        assert_eq!(follow(2, 0.0, &[3.0, 2.0, 2.1, 1.5, 1.6, 1.7]), (30, Some(50)));
    }

    #[test]
    fn nan_is_never_the_best() {
        assert_eq!(follow(0, 0.0, &[f64::NAN, 3.0, f64::NAN, f64::INFINITY]), (10, None));
    }

    #[test]
    fn restored_counters_stop_at_the_same_evaluation() {
        let mut first = Best::new(3, 0.0);
        [3.0, 2.0, 2.1]
            .iter()
            .enumerate()
            .for_each(|(i, &loss)| _ = first.offer(i, loss));
        let mut resumed = Best::new(3, 0.0);
        resumed.restore(first.found(), first.without_new());
        assert_eq!(resumed, first);
        assert_eq!(resumed.patience_left(), Some(2));
    }
}
