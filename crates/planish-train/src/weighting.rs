//! Distrust weights of a data set, as a run uses them.

use planish_data::Dataset;
use planish_loss::distrust::{self, Mode, Provenance, Weights};

use crate::options::DistrustOptions;
use crate::{Error, Result};

/// The weight of each example of the training split; 1 for all without distrust.
#[derive(Debug, Clone)]
pub(crate) struct ExampleWeights {
    mode: Mode,
    weights: Option<Weights>,
    /// `α·c²` of each example that has provenance.
    values: Vec<Option<f64>>,
    notes: Vec<String>,
}

impl ExampleWeights {
    pub(crate) fn of(data: &Dataset, options: &DistrustOptions) -> Result<Self> {
        if options.mode == Mode::Off {
            return Ok(Self::equal());
        }
        let rows = provenance(data)?;
        if rows.iter().all(Option::is_none) {
            let reason = format!(
                "{} has no row with auth_weight and prov_entropy; add them, or set mode = \"off\"",
                data.path().display()
            );
            return Err(Error::Config {
                key: "loss.distrust.mode",
                reason,
            });
        }
        let value = |row: &Option<Provenance>| row.map(|row| row.value(options.alpha)).transpose();
        let values = rows.iter().map(value).collect::<Result<Vec<_>, _>>()?;
        distrust::additive_total(0.0, 0.0, options.lambda)?;
        if options.mode == Mode::Additive {
            let notes = vec![
                "distrust mode additive: the added term is a constant of the data and has no gradient, so training is \
                 that of plain cross-entropy; use mode = \"weight\" to change what is learned"
                    .to_owned(),
            ];
            return Ok(Self {
                mode: Mode::Additive,
                weights: None,
                values,
                notes,
            });
        }
        let tokens: Vec<usize> = data.examples().iter().map(|example| example.n_targets).collect();
        let weights = distrust::weights(&rows, &tokens, &options.weighting)?;
        let notes = check_effective_share(&weights, options)?;
        Ok(Self {
            mode: options.mode,
            weights: Some(weights),
            values,
            notes,
        })
    }

    /// 1 for all.
    pub(crate) fn equal() -> Self {
        Self {
            mode: Mode::Off,
            weights: None,
            values: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Fixed weights.
    #[cfg(test)]
    pub(crate) fn fixed(weights: &[f64]) -> Self {
        let rows: Vec<Option<Provenance>> = vec![None; weights.len()];
        let mut made = distrust::weights(&rows, &vec![1; weights.len()], &distrust::Weighting::default())
            .expect("neutral weights");
        made.weights = weights.to_vec();
        Self {
            mode: Mode::Weight,
            weights: Some(made),
            values: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Sentences for the user.
    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What an example's token losses are multiplied by.
    pub(crate) fn of_example(&self, example: usize) -> f64 {
        match (&self.weights, self.mode) {
            (Some(weights), Mode::Weight) => weights.weights.get(example).copied().unwrap_or(1.0),
            _ => 1.0,
        }
    }

    /// `α·c²` of an example.
    pub(crate) fn value_of(&self, example: usize) -> Option<f64> {
        self.values.get(example).copied().flatten()
    }

    /// Whether the run reports distrust figures.
    pub(crate) fn is_on(&self) -> bool {
        self.mode != Mode::Off
    }

    /// Whether what is minimised differs from plain cross-entropy.
    pub(crate) fn changes_the_objective(&self) -> bool {
        self.mode == Mode::Weight
    }

    /// Weights for the plan, when examples are drawn in proportion.
    pub(crate) fn for_sampler(&self) -> Option<Vec<f64>> {
        self.weights
            .as_ref()
            .filter(|_| self.mode == Mode::Sampler)
            .map(|weights| weights.weights.clone())
    }

    /// Effective sample size as a share of the examples.
    pub(crate) fn effective_share(&self) -> Option<f64> {
        self.weights.as_ref().map(Weights::effective_share)
    }

    /// Weights of another split under this split's means; `None` where there are none to use.
    pub(crate) fn for_other(&self, data: &Dataset, options: &DistrustOptions) -> Option<Self> {
        let (own, rows) = (self.weights.as_ref()?, provenance(data).ok()?);
        if rows.iter().all(Option::is_none) {
            return None;
        }
        let weight = |row: &Option<Provenance>| options.weighting.weight(*row, &own.normalisers);
        Some(Self {
            mode: Mode::Weight,
            weights: Some(Weights {
                weights: rows.iter().map(weight).collect(),
                ..own.clone()
            }),
            ..Self::equal()
        })
    }
}

fn provenance(data: &Dataset) -> Result<Vec<Option<Provenance>>> {
    let of = |example| {
        data.provenance(example)
            .map(|p| Provenance::new(p.auth_weight, p.prov_entropy))
            .transpose()
    };
    Ok((0..data.len()).map(of).collect::<Result<Vec<_>, _>>()?)
}

fn check_effective_share(weights: &Weights, options: &DistrustOptions) -> Result<Vec<String>> {
    let share = weights.effective_share();
    let percent = 100.0 * share;
    if share < distrust::ESS_REFUSE && !options.force {
        let reason = format!(
            "only {percent:.1} % of the examples carry the weight (effective sample size {:.1} of {}); raise the floor, \
             lower the cap, or use link = \"tempered\"",
            weights.effective_sample_size,
            weights.weights.len()
        );
        return Err(Error::Config {
            key: "loss.distrust",
            reason,
        });
    }
    let mut notes = Vec::new();
    if share < distrust::ESS_WARN {
        notes.push(format!(
            "distrust: only {percent:.1} % of the examples carry the weight"
        ));
    }
    if weights.n_neutral > 0 {
        notes.push(format!(
            "distrust: {} examples without provenance have weight 1",
            weights.n_neutral
        ));
    }
    if options.weighting.link == distrust::Link::Literal && weights.n_coordinated > 0 {
        notes.push(format!(
            "distrust: link \"literal\" raises {} coordinated examples (ln(1 − w) + H < 0); \"hinge\" does not",
            weights.n_coordinated
        ));
    }
    Ok(notes)
}
