//! What an objective reports besides its loss.

use std::collections::BTreeMap;

/// Sums or means of named figures, such as `reward_margin`; the names are those of
/// [`Objective::figures`](crate::objective::Objective::figures) and of the fields of `metrics.jsonl`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Figures(BTreeMap<String, f64>);

impl Figures {
    /// The figure of this name, if the objective has it.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).copied()
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, &value)| (name.as_str(), value))
    }

    /// Adds to the sum of a figure.
    pub(crate) fn add(&mut self, name: &str, value: f64) {
        match self.0.get_mut(name) {
            Some(sum) => *sum += value,
            None => _ = self.0.insert(name.to_owned(), value),
        }
    }

    /// The means of sums over `n` items.
    pub(crate) fn means(&self, n: usize) -> Self {
        Self(
            self.iter()
                .map(|(name, sum)| (name.to_owned(), sum / n.max(1) as f64))
                .collect(),
        )
    }
}

impl FromIterator<(String, f64)> for Figures {
    fn from_iter<I: IntoIterator<Item = (String, f64)>>(figures: I) -> Self {
        Self(figures.into_iter().collect())
    }
}
