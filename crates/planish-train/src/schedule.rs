//! Learning-rate schedules: the rate of every optimizer update, worked out in f64 before it is narrowed.

use std::f64::consts::PI;

use crate::{Error, Result};

/// A warm-up followed by a [`Shape`], as a function of the number `t` of updates already done.
///
/// `t < W`: `w0 + (lr − w0)·t/W`; after that the shape, over `u = (t − W)/(M − W)` held in `[0, 1]`, between `lr` and
/// `lr_min`. `W` = [`warmup_steps`](Self::warmup_steps), `M` = [`total_steps`](Self::total_steps).
///
/// # Example
/// ```
/// use planish_train::schedule::{Schedule, Shape};
///
/// let schedule = Schedule::new(Shape::Cosine, 1e-4, 100).with_warmup(10)?;
/// assert_eq!(schedule.at(10), 1e-4);
/// assert!(schedule.at(0) > 0.0); // the first update already trains
/// assert_eq!(schedule.at(100), 0.0);
/// # Ok::<(), planish_train::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// What follows the warm-up.
    pub shape: Shape,
    /// Rate at the end of the warm-up.
    pub learning_rate: f64,
    /// Rate at the end of the run; ignored by [`Shape::Constant`].
    pub min_learning_rate: f64,
    /// Rate of the first update, when there is a warm-up.
    pub warmup_start: f64,
    /// Updates of the warm-up; 0 is none.
    pub warmup_steps: usize,
    /// Updates of the whole run.
    pub total_steps: usize,
}

/// How the rate falls from `lr` (at `u = 0`) to `lr_min` (at `u = 1`).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Shape {
    /// `lr` throughout.
    Constant,
    /// `lr + (lr_min − lr)·u`.
    Linear,
    /// `lr_min + (lr − lr_min)·(1 + cos(πu))/2`.
    #[default]
    Cosine,
    /// Cosine that starts again `cycles` times, each of the same length.
    CosineRestarts {
        /// How many falls there are, at least 1.
        cycles: u32,
    },
    /// `lr_min + (lr − lr_min)·(1 − u)^power`.
    Polynomial {
        /// Exponent, above 0.
        power: f64,
    },
    /// Warm-up, stable, decay: `lr` until the last `decay_share` of the updates, then linear to `lr_min`.
    Wsd {
        /// Share of the updates after the warm-up that decay, in `(0, 1]`.
        decay_share: f64,
    },
}

impl Schedule {
    /// A schedule with the [default warm-up](default_warmup) that falls to 0.
    pub fn new(shape: Shape, learning_rate: f64, total_steps: usize) -> Self {
        let warmup_steps = default_warmup(total_steps);
        Self {
            shape,
            learning_rate,
            min_learning_rate: 0.0,
            warmup_start: even_start(learning_rate, warmup_steps),
            warmup_steps,
            total_steps,
        }
    }

    /// Sets the length of the warm-up; its first rate is one even step above zero.
    ///
    /// # Errors
    /// [`Error::Config`] when the warm-up is not shorter than the run.
    pub fn with_warmup(mut self, warmup_steps: usize) -> Result<Self> {
        self.warmup_steps = warmup_steps;
        self.warmup_start = even_start(self.learning_rate, warmup_steps);
        self.check()?;
        Ok(self)
    }

    /// Sets the last rate.
    ///
    /// # Errors
    /// [`Error::Config`] when it is negative or above the learning rate.
    pub(crate) fn with_min(mut self, min_learning_rate: f64) -> Result<Self> {
        self.min_learning_rate = min_learning_rate;
        self.check()?;
        Ok(self)
    }

    /// Refuses values outside their range.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check(&self) -> Result<()> {
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let rules = [
            (self.total_steps > 0, "train.steps", "the run has no update".to_owned()),
            (
                positive(self.learning_rate),
                "optimizer.learning_rate",
                format!("{} is not a positive number", self.learning_rate),
            ),
            (
                (0.0..=self.learning_rate).contains(&self.min_learning_rate),
                "schedule.min_learning_rate",
                format!(
                    "{} is not between 0 and the learning rate {}",
                    self.min_learning_rate, self.learning_rate
                ),
            ),
            (
                self.warmup_steps == 0 || self.warmup_steps < self.total_steps,
                "schedule.warmup_steps",
                format!(
                    "a warm-up of {} updates leaves nothing of a run of {}; set it below {0} or leave it out",
                    self.warmup_steps, self.total_steps
                ),
            ),
        ];
        match rules.into_iter().find(|(holds, ..)| !holds) {
            Some((_, key, reason)) => Err(Error::Config { key, reason }),
            None => self.shape.check(),
        }
    }

    /// The rate of the update that follows `t` earlier ones.
    pub fn at(&self, t: usize) -> f64 {
        if t < self.warmup_steps {
            let share = t as f64 / self.warmup_steps as f64;
            return self.warmup_start + (self.learning_rate - self.warmup_start) * share;
        }
        let length = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((t - self.warmup_steps) as f64 / length as f64).min(1.0);
        self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * self.shape.height(progress)
    }
}

/// Updates of warm-up when none are asked for: 3 % of the run and at least 10, but never more than a quarter of it.
pub fn default_warmup(total_steps: usize) -> usize {
    (total_steps * 3 / 100).max(10).min(total_steps / 4)
}

impl Shape {
    /// What is left of `lr − lr_min` after the share `u` of the run.
    fn height(&self, u: f64) -> f64 {
        let cosine = |u: f64| (1.0 + (PI * u).cos()) / 2.0;
        match *self {
            Self::Constant => 1.0,
            Self::Linear => 1.0 - u,
            Self::Cosine => cosine(u),
            Self::CosineRestarts { .. } if u >= 1.0 => 0.0,
            Self::CosineRestarts { cycles } => cosine((u * f64::from(cycles)).fract()),
            Self::Polynomial { power } => (1.0 - u).powf(power),
            Self::Wsd { decay_share } => ((1.0 - u) / decay_share).min(1.0),
        }
    }

    fn check(&self) -> Result<()> {
        let (holds, key, reason) = match *self {
            Self::CosineRestarts { cycles } => (cycles >= 1, "schedule.cycles", format!("{cycles} is below 1")),
            Self::Polynomial { power } => (
                power > 0.0 && power.is_finite(),
                "schedule.power",
                format!("{power} is not a positive number"),
            ),
            Self::Wsd { decay_share } => (
                decay_share > 0.0 && decay_share <= 1.0,
                "schedule.decay_share",
                format!("{decay_share} is not in (0, 1]"),
            ),
            _ => return Ok(()),
        };
        if holds {
            Ok(())
        } else {
            Err(Error::Config { key, reason })
        }
    }
}

/// One of `warmup_steps + 1` even steps from 0 to the learning rate.
fn even_start(learning_rate: f64, warmup_steps: usize) -> f64 {
    learning_rate / (warmup_steps + 1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reference() -> Schedule {
        Schedule {
            shape: Shape::Cosine,
            learning_rate: 5e-5,
            min_learning_rate: 0.0,
            warmup_start: 1e-7,
            warmup_steps: 100,
            total_steps: 5000,
        }
    }

    #[test]
    fn cosine_with_warmup_matches_the_reference_run() {
        let check = |t, rate: f64| {
            let found = reference().at(t);
            assert!((found - rate).abs() <= 1e-14, "t {t}: {found} is not {rate}");
        };
        check(0, 1.0e-7);
        check(1, 5.99e-7);
        check(50, 2.505e-5);
        check(99, 4.9501e-5);
        check(100, 5e-5);
        check(1000, 4.595220262e-5);
        check(2550, 2.5e-5);
        check(5000, 0.0);
    }

    #[test]
    fn shapes_start_at_the_rate_and_end_at_the_least() {
        let shapes = [
            Shape::Linear,
            Shape::Cosine,
            Shape::CosineRestarts { cycles: 3 },
            Shape::Polynomial { power: 2.0 },
            Shape::Wsd { decay_share: 0.2 },
        ];
        for shape in shapes {
            let schedule = Schedule::new(shape, 1.0, 90)
                .with_warmup(0)
                .unwrap()
                .with_min(0.1)
                .unwrap();
            assert!((schedule.at(0) - 1.0).abs() < 1e-15, "{shape:?}");
            assert!((schedule.at(90) - 0.1).abs() < 1e-15, "{shape:?}");
            assert_eq!(schedule.at(90), schedule.at(1000), "{shape:?} goes on after the run");
        }
        assert_eq!(Schedule::new(Shape::Constant, 1.0, 90).at(90), 1.0);
    }

    #[test]
    fn shapes_have_their_known_middles() {
        let at = |shape, t| Schedule::new(shape, 1.0, 100).with_warmup(0).unwrap().at(t);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} is not {b}");
        close(at(Shape::Linear, 25), 0.75);
        close(at(Shape::Polynomial { power: 2.0 }, 50), 0.25);
        close(at(Shape::Wsd { decay_share: 0.2 }, 80), 1.0);
        close(at(Shape::Wsd { decay_share: 0.2 }, 90), 0.5);
        close(at(Shape::CosineRestarts { cycles: 2 }, 25), 0.5);
        close(at(Shape::CosineRestarts { cycles: 2 }, 50), 1.0);
    }

    #[test]
    fn default_warmup_leaves_most_of_a_short_run() {
        let table = [
            (0, 0),
            (1, 0),
            (3, 0),
            (6, 1),
            (20, 5),
            (40, 10),
            (100, 10),
            (1000, 30),
            (100_000, 3000),
        ];
        for (steps, warmup) in table {
            assert_eq!(default_warmup(steps), warmup, "{steps} steps");
        }
    }

    #[test]
    fn err_warmup_that_fills_the_run() {
        for warmup in [100, 101] {
            let error = Schedule::new(Shape::Cosine, 1e-4, 100).with_warmup(warmup).unwrap_err();
            assert!(error.to_string().contains("schedule.warmup_steps"), "{error}");
        }
        assert!(Schedule::new(Shape::Cosine, 1e-4, 0).check().is_err());
        assert!(Schedule::new(Shape::Cosine, f64::NAN, 10).check().is_err());
        assert!(Schedule::new(Shape::Cosine, 1e-4, 10).with_min(1.0).is_err());
        assert!(
            Schedule::new(Shape::Wsd { decay_share: 0.0 }, 1e-4, 10)
                .check()
                .is_err()
        );
    }

    proptest! {
        #[test]
        fn prop_rate_stays_within_its_bounds(steps in 1usize..5000, t in 0usize..6000, lr in 1e-6..1.0f64, share in 0.0..1.0f64, pick in 0..5) {
            let shape = [Shape::Constant, Shape::Linear, Shape::Cosine, Shape::CosineRestarts { cycles: 4 }, Shape::Wsd { decay_share: 0.3 }][pick as usize];
            let schedule = Schedule::new(shape, lr, steps).with_min(lr * share).unwrap();
            let rate = schedule.at(t);
            prop_assert!(rate.is_finite() && rate <= lr * (1.0 + 1e-12));
            prop_assert!(rate >= (lr * share).min(schedule.warmup_start) * (1.0 - 1e-12));
        }

        #[test]
        fn prop_warmup_rises(steps in 8usize..5000) {
            let schedule = Schedule::new(Shape::Cosine, 1e-4, steps);
            for t in 0..schedule.warmup_steps {
                prop_assert!(schedule.at(t) < schedule.at(t + 1));
            }
        }
    }
}
