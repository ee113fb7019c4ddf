//! One optimizer update: forward and backward over the micro-batches of a window, clip, step.
//!
//! Updates run as they are written, or are traced and compiled ([`crate::traced`]): the same functions either way. Traced,
//! the next update is launched before the last one is read, so that the device never waits for the host.

use std::borrow::Cow;
use std::rc::Rc;
use std::time::Instant;

use mlx_rs::transforms::async_eval;
use mlx_rs::{Array, transforms::eval};
use planish_data::{Batch, Cursor, Segment, Window};
use planish_mlx::transforms::value_and_grad;
use planish_nn::{Model, Training};

use crate::losses::Losses;
use crate::objective::{About, Collated, Counted, Fill, Item, Objective, Outcome, Pass, Signature};
use crate::optimizer::{Gradients, Optimizer};
use crate::options::{TrainOptions, Tuning};
use crate::traced::{self, Traces};
use crate::{Error, Result, clip, seeds};

/// Where the windows of a run come from: a plan over a data set, or a sampler that asks the model for rollouts.
pub trait WindowSource: std::fmt::Debug {
    /// The window at a place, one per update; `model` is as the update before has left it.
    ///
    /// # Errors
    /// Those of the data and the model.
    fn window(&mut self, at: Cursor, model: &Model) -> Result<Window>;

    /// Whether windows depend on what the model has learned, so that none can be made before the update ahead of it is done.
    fn follows_the_model(&self) -> bool {
        false
    }
}

/// Makes updates, one after another.
#[derive(Debug)]
pub(crate) struct Updates {
    objective: Rc<dyn Objective>,
    /// `None`: updates run as they are written.
    traces: Option<Traces>,
    /// The next update, where it has been launched already.
    ahead: Option<Ahead>,
    /// The optimizer before the last update, where there is room for two states: not in full tuning.
    before: Option<Optimizer>,
    /// What the last launched update gives and nobody has asked for yet.
    unfinished: Vec<Array>,
    /// When the last update was read.
    last_read: Option<Instant>,
    /// Parts that each micro-batch is cut into, for a device that cannot do more at a time.
    pieces: usize,
}

/// Which update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// Where its window is.
    pub(crate) cursor: Cursor,
    /// Updates before it.
    pub(crate) step: usize,
    pub(crate) learning_rate: f64,
    /// False for a dry run whose result is discarded.
    pub(crate) counts: bool,
}

/// An update that is done.
pub(crate) struct Done {
    pub(crate) window: Window,
    pub(crate) learning_rate: f64,
    pub(crate) losses: Losses,
    /// Global norm of the gradient before clipping.
    pub(crate) grad_norm: f64,
    /// Whether loss and gradient were finite, so that the step counted.
    pub(crate) accepted: bool,
    pub(crate) seconds: f64,
}

/// Figures of a micro-batch, and which of their items count.
type Reported = (Vec<Array>, Vec<Counted>);

/// An update that has been launched: model and optimizer already hold what it will give.
#[derive(Debug)]
struct Launched {
    place: Place,
    window: Window,
    figures: Vec<Reported>,
    step: Step,
}

/// An update that was launched before the one ahead of it was read, and may have to be undone.
#[derive(Debug)]
struct Ahead {
    launched: Result<Launched>,
    before: Optimizer,
}

/// Gradients of a whole window, however it is cut: flat and in the optimizer's layout, so that ranks can add theirs here.
#[derive(Debug, Clone)]
pub(crate) struct Summed {
    /// Summed over the micro-batches, f32.
    pub(crate) gradients: Gradients,
    /// What was minimised, a scalar.
    pub(crate) objective: Array,
}

/// What a step gives besides the optimizer's new state, not computed yet.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) norm: Array,
    pub(crate) accept: Array,
}

impl Updates {
    /// As the options ask for.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when compilation is requested but not possible.
    pub(crate) fn new(model: &Model, objective: Rc<dyn Objective>, options: &TrainOptions) -> Result<Self> {
        Ok(Self {
            objective,
            traces: traced::is_wanted(model, options)?.then(Traces::default),
            ahead: None,
            before: None,
            unfinished: Vec::new(),
            last_read: None,
            pieces: 1,
        })
    }

    pub(crate) fn objective(&self) -> &dyn Objective {
        &*self.objective
    }

    /// Parts that micro-batches are cut into.
    pub(crate) fn pieces(&self) -> usize {
        self.pieces
    }

    /// Cuts micro-batches into so many parts from now on.
    pub(crate) fn cut_into(&mut self, pieces: usize) {
        self.pieces = pieces;
    }

    /// Cuts micro-batches of `rows` rows into twice as many parts; false where a part has one row or pair already.
    pub(crate) fn shrink(&mut self, rows: usize) -> bool {
        let least = if self.objective.item() == Item::Pair { 2 } else { 1 };
        let can = rows.div_ceil(self.pieces) > least;
        self.pieces *= if can { 2 } else { 1 };
        can
    }

    /// A sentence for people where updates are traced: how many traces there can be.
    pub(crate) fn describe(&self, n_shapes: usize) -> Option<String> {
        let most = Signature::most(n_shapes);
        self.traces
            .is_some()
            .then(|| format!("updates are compiled: at most {most} traces, up to 4 for each shape of a batch"))
    }

    /// Makes the update at `this` place. Where nothing looks at the model before the `next` one, that may be launched too.
    pub(crate) fn make(
        &mut self,
        model: &mut Model,
        optimizer: &mut Optimizer,
        source: &mut dyn WindowSource,
        about: &About<'_>,
        this: Place,
        next: Option<Place>,
    ) -> Result<Done> {
        let mut started = Instant::now();
        let has_room = about.options.tuning != Tuning::Full;
        let launched = match self.ahead.take() {
            Some(Ahead { launched, before }) => {
                started = self.last_read.unwrap_or(started);
                self.before = Some(before);
                launched?
            }
            None => {
                self.before = has_room.then(|| optimizer.clone());
                self.launch(model, optimizer, source.window(this.cursor, model)?, about, this)?
            }
        };
        let may_launch = has_room && self.traces.is_some() && about.options.launch_ahead;
        if let Some(next) = next.filter(|_| may_launch && !source.follows_the_model()) {
            let before = optimizer.clone();
            let window = source.window(next.cursor, model);
            let launched = window.and_then(|window| self.launch(model, optimizer, window, about, next));
            self.ahead = Some(Ahead { launched, before });
        }
        let done = self.read(launched, about, started);
        self.last_read = Some(Instant::now());
        done
    }

    /// Takes back the update that was launched ahead and will not be read.
    pub(crate) fn undo_ahead(&mut self, model: &mut Model, optimizer: &mut Optimizer) -> Result<()> {
        if let Some(Ahead { before, .. }) = self.ahead.take() {
            self.unfinished.clear();
            *optimizer = before;
            model.set_trainables(&optimizer.trainables()?)?;
        }
        Ok(())
    }

    /// Takes back the last update, which failed; false where there was no room to keep the state before it.
    pub(crate) fn undo(&mut self, model: &mut Model, optimizer: &mut Optimizer) -> Result<bool> {
        self.ahead = None;
        self.unfinished.clear();
        let Some(before) = self.before.take() else {
            return Ok(false);
        };
        *optimizer = before;
        model.set_trainables(&optimizer.trainables()?)?;
        Ok(true)
    }

    /// Forward and backward over the window, clip, step. A gradient or objective that is not finite changes nothing.
    fn launch(
        &mut self,
        model: &mut Model,
        optimizer: &mut Optimizer,
        window: Window,
        about: &About<'_>,
        place: Place,
    ) -> Result<Launched> {
        let (summed, figures) = self.gradients(model, optimizer, &window, about, place.step)?;
        let clip_norm = about.options.clip_norm;
        let step = match &mut self.traces {
            Some(traces) => traces.step(optimizer, &summed, place, clip_norm)?,
            None => {
                let learning_rates = optimizer.learning_rates(place.learning_rate);
                step(
                    optimizer,
                    &summed,
                    &Array::from_bool(place.counts),
                    &learning_rates,
                    clip_norm,
                )?
            }
        };
        // Before anything is computed: what nobody holds any more can be overwritten.
        let values = optimizer.trainables()?;
        model.set_trainables(&values)?;
        let mut given: Vec<Array> = optimizer.pending().into_iter().cloned().collect();
        given.extend([step.norm.clone(), step.accept.clone()]);
        if self.traces.is_some() {
            // The device waits for nobody if its queue never runs dry. MLX waits where the queue is full, and describing an
            // update takes longer than what is left in the queue then; so that is done between the halves of the one before.
            self.finish()?;
            async_eval(figures.iter().flat_map(|(figures, _)| figures))?;
            self.unfinished = given;
        } else {
            eval(values.iter().chain(&given))?;
        }
        Ok(Launched {
            place,
            window,
            figures,
            step,
        })
    }

    /// Runs the micro-batches of a window and sums their gradients; gives the figures of each and which of them count.
    fn gradients(
        &mut self,
        model: &mut Model,
        optimizer: &Optimizer,
        window: &Window,
        about: &About<'_>,
        step: usize,
    ) -> Result<(Summed, Vec<Reported>)> {
        let fill = if self.traces.is_some() {
            Fill::Bounded
        } else {
            Fill::Exact
        };
        let mut figures = Vec::new();
        let mut total: Option<Summed> = None;
        let parts: Vec<Cow<'_, Batch>> = trained(window).flat_map(|batch| cut(batch, self.pieces)).collect();
        for (index, batch) in parts.iter().enumerate() {
            let batch = self.objective.collate(batch, window, about, fill)?;
            let key = seeds::dropout_key(about.options.seed, step, index)?;
            let (own, outcome) = match &mut self.traces {
                Some(traces) => traces.gradients(&self.objective, model, optimizer, &batch, &key, about.options)?,
                None => gradients_as_written(&*self.objective, model, optimizer, &batch, &key, about.options)?,
            };
            let summed = match &total {
                Some(sum) => Summed {
                    gradients: sum.gradients.add(&own)?,
                    objective: sum.objective.add(&outcome.objective)?,
                },
                None => Summed {
                    gradients: own,
                    objective: outcome.objective.clone(),
                },
            };
            // One after the other, else the activations of all of them would exist at once.
            let given = summed
                .gradients
                .arrays()
                .iter()
                .chain([&summed.objective])
                .chain(&outcome.figures);
            match &self.traces {
                None => eval(given)?,
                Some(_) if parts.len() > 1 => async_eval(given)?,
                Some(_) => drop(given),
            }
            figures.push((outcome.figures, batch.counted));
            total = Some(summed);
        }
        let summed = total.ok_or(planish_loss::Error::NoTrainedTokens { rows: window.examples })?;
        Ok((summed, figures))
    }

    /// Waits for an update and reads what there is to report.
    fn read(&mut self, launched: Launched, about: &About<'_>, started: Instant) -> Result<Done> {
        if !matches!(&self.ahead, Some(ahead) if ahead.launched.is_ok()) {
            self.finish()?;
        }
        let Launched {
            place,
            window,
            figures,
            step,
        } = launched;
        let mut losses = Losses {
            tokens: trained(&window).map(|batch| batch.target_tokens).sum(),
            ..Losses::default()
        };
        for (figures, counted) in &figures {
            losses.add(&*self.objective, figures, counted, about)?;
        }
        Ok(Done {
            losses,
            learning_rate: place.learning_rate,
            grad_norm: f64::from(step.norm.try_item_exact::<f32>()?),
            accepted: step.accept.try_item_exact::<bool>()?,
            seconds: started.elapsed().as_secs_f64(),
            window,
        })
    }

    /// Launches the second half of the last update.
    fn finish(&mut self) -> Result<()> {
        Ok(async_eval(std::mem::take(&mut self.unfinished).iter())?)
    }
}

/// The micro-batches that train something.
pub(crate) fn trained(window: &Window) -> impl Iterator<Item = &Batch> {
    window.micro_batches.iter().filter(|batch| batch.target_tokens > 0)
}

/// A batch in parts of equally many rows, the two answers of a pair together; parts that train nothing are left out.
pub(crate) fn cut(batch: &Batch, pieces: usize) -> Vec<Cow<'_, Batch>> {
    if pieces == 1 {
        return vec![Cow::Borrowed(batch)];
    }
    let unit = if batch.segments.iter().any(|segment| segment.side.is_some()) {
        2
    } else {
        1
    };
    let rows = batch.rows.div_ceil(pieces).next_multiple_of(unit);
    let starts = (0..batch.rows).step_by(rows);
    let parts = starts.map(|start| rows_of(batch, start, rows.min(batch.rows - start)));
    parts.filter(|part| part.target_tokens > 0).map(Cow::Owned).collect()
}

/// Some rows of a batch.
fn rows_of(batch: &Batch, start: usize, rows: usize) -> Batch {
    let positions = start * batch.length..(start + rows) * batch.length;
    let within = |segment: &&Segment| (start..start + rows).contains(&segment.row);
    let segments: Vec<Segment> = batch.segments.iter().filter(within).copied().collect();
    Batch {
        rows,
        length: batch.length,
        inputs: batch.inputs[positions.clone()].to_vec(),
        targets: batch.targets[positions.clone()].to_vec(),
        target_weights: batch.target_weights[positions.clone()].to_vec(),
        segment_ids: batch.segment_ids.as_ref().map(|ids| ids[positions].to_vec()),
        row_ids: segments.iter().map(|segment| segment.example).collect(),
        target_tokens: segments.iter().map(|segment| segment.target_tokens).sum(),
        used_positions: segments.iter().map(|segment| segment.len).sum(),
        segments: segments
            .into_iter()
            .map(|segment| Segment {
                row: segment.row - start,
                ..segment
            })
            .collect(),
    }
}

/// Outcome of a micro-batch and its gradients, in the order of the values of the trainables.
pub(crate) fn differentiate(
    objective: &dyn Objective,
    model: &mut Model,
    values: &[Array],
    batch: &Collated,
    pass: Pass<'_>,
) -> Result<(Vec<Array>, Outcome)> {
    let all: Vec<usize> = (0..values.len()).collect();
    let forward = |values: &[Array]| {
        model.set_trainables(values)?;
        let outcome = objective.forward(model, batch, pass)?;
        Ok::<_, Error>(std::iter::once(outcome.objective).chain(outcome.figures).collect())
    };
    let (mut figures, gradients) = value_and_grad(forward, values, &all)?;
    let objective = figures.remove(0);
    Ok((gradients, Outcome { objective, figures }))
}

fn gradients_as_written(
    objective: &dyn Objective,
    model: &mut Model,
    optimizer: &Optimizer,
    batch: &Collated,
    dropout_key: &Array,
    options: &TrainOptions,
) -> Result<(Gradients, Outcome)> {
    let pass = Pass {
        training: Some(training(dropout_key, options)),
        options,
    };
    let values: Vec<Array> = model.trainables().into_iter().map(|(_, value)| value).collect();
    let outcome = differentiate(objective, model, &values, batch, pass);
    // The differentiated function left its own arrays in the model.
    model.set_trainables(&values)?;
    let (gradients, outcome) = outcome?;
    Ok((optimizer.gather(&gradients)?, outcome))
}

/// How a forward pass of an update is run.
pub(crate) fn training<'a>(dropout_key: &'a Array, options: &TrainOptions) -> Training<'a> {
    Training {
        dropout_key: Some(dropout_key),
        activation_checkpointing: options.activation_checkpointing,
    }
}

/// Clips and steps; a gradient or an objective that is not finite changes nothing.
pub(crate) fn step(
    optimizer: &mut Optimizer,
    summed: &Summed,
    counts: &Array,
    learning_rates: &[Array],
    clip_norm: Option<f64>,
) -> Result<Step> {
    let norm = summed.gradients.norm()?;
    let is_finite = norm.is_finite()?.logical_and(summed.objective.is_finite()?)?;
    let accept = is_finite.logical_and(counts)?;
    match clip_norm {
        Some(most) => {
            let clipped = summed.gradients.scale(&clip::clip_factor(&norm, most)?)?;
            optimizer.step_at(&clipped, learning_rates, &accept)?;
        }
        None => optimizer.step_at(&summed.gradients, learning_rates, &accept)?,
    }
    Ok(Step { norm, accept })
}

#[cfg(test)]
mod tests;
