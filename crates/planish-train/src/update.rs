//! One optimizer update, set going and read: as it is written, or traced ([`crate::traced`]).

use mlx_rs::transforms::async_eval;
use mlx_rs::{Array, transforms::eval};
use planish_data::Window;
use planish_nn::Model;

use crate::optimizer::{Gradients, Optimizer};
use crate::recipes::{About, Objective};
use crate::traced::{self, Signature, Traces, Update};
use crate::window::{Applied, WindowLosses, apply, trained, window_gradients};
use crate::{Result, seeds};

/// Sets updates going.
#[derive(Debug)]
pub(crate) struct Updates {
    /// `None`: updates run as they are written.
    traces: Option<Traces>,
    /// Updates that were set going.
    launched: u64,
    /// What the last of them gives and nobody has asked for yet.
    unfinished: Vec<Array>,
}

/// An update that has been set going: model and optimizer already hold what it will give.
pub(crate) enum Launched {
    /// It was waited for.
    Done(WindowLosses, Applied),
    /// The device may still be at it.
    Running {
        /// Its number.
        number: u64,
        update: Update,
        /// Items of each micro-batch, and where those stand that count.
        items: Vec<(Array, Vec<usize>)>,
    },
}

/// Which update.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// Updates before it.
    pub(crate) step: usize,
    pub(crate) learning_rate: f64,
    /// False for an update of which nothing shall remain.
    pub(crate) counts: bool,
}

impl Updates {
    /// As the options ask for.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when updates shall be compiled and cannot be.
    pub(crate) fn new(model: &Model, objective: &dyn Objective, about: &About<'_>) -> Result<Self> {
        let is_traced = traced::is_wanted(model, objective, about.options)?;
        Ok(Self {
            traces: is_traced.then(Traces::default),
            launched: 0,
            unfinished: Vec::new(),
        })
    }

    /// Whether the host has time while the device computes.
    pub(crate) fn are_traced(&self) -> bool {
        self.traces.is_some()
    }

    /// A sentence for people where updates are traced: how many traces there can be.
    pub(crate) fn describe(&self, n_shapes: usize) -> Option<String> {
        let most = Signature::most(n_shapes);
        self.traces
            .is_some()
            .then(|| format!("updates are compiled: at most {most} traces, up to 4 for each shape of a batch"))
    }

    /// Forward and backward over the window, clip, step. A gradient or objective that is not finite changes nothing.
    pub(crate) fn launch(
        &mut self,
        model: &mut Model,
        optimizer: &mut Optimizer,
        window: &Window,
        objective: &dyn Objective,
        about: &About<'_>,
        place: Place,
    ) -> Result<Launched> {
        let Some(traces) = &mut self.traces else {
            let gradients = window_gradients(model, optimizer, window, objective, about, place.step)?;
            let applied = apply(model, optimizer, &gradients, place, about.options.clip_norm)?;
            return Ok(Launched::Done(gradients.losses, applied));
        };
        let traced = Traced::new(traces, model, optimizer, window, objective, about, place)?;
        // The device waits for nobody if its queue never runs dry. MLX waits where the queue is full, and describing an update
        // takes longer than what is left in the queue then; so that is done between the halves of the one before.
        self.finish()?;
        async_eval(traced.items.iter().map(|(items, _)| items))?;
        self.launched += 1;
        self.unfinished = optimizer.pending().into_iter().cloned().collect();
        self.unfinished
            .extend([traced.update.norm.clone(), traced.update.accept.clone()]);
        Ok(Launched::Running {
            number: self.launched,
            update: traced.update,
            items: traced.items,
        })
    }

    /// Waits for an update and reads what there is to report.
    pub(crate) fn read(
        &mut self,
        launched: Launched,
        window: &Window,
        objective: &dyn Objective,
        about: &About<'_>,
    ) -> Result<(WindowLosses, Applied)> {
        if matches!(&launched, Launched::Running { number, .. } if *number == self.launched) {
            self.finish()?;
        }
        launched.read(window, objective, about)
    }

    /// Forgets the last update, whose results nobody wants.
    pub(crate) fn forget(&mut self) {
        self.unfinished.clear();
    }

    /// Sets the second half of the last update going.
    fn finish(&mut self) -> Result<()> {
        Ok(async_eval(std::mem::take(&mut self.unfinished).iter())?)
    }
}

/// An update that is described, not set going.
struct Traced {
    update: Update,
    items: Vec<(Array, Vec<usize>)>,
}

impl Traced {
    fn new(
        traces: &mut Traces,
        model: &mut Model,
        optimizer: &mut Optimizer,
        window: &Window,
        objective: &dyn Objective,
        about: &About<'_>,
        place: Place,
    ) -> Result<Self> {
        let options = about.options;
        let mut items = Vec::new();
        let mut total: Option<(Gradients, Array)> = None;
        for (index, batch) in trained(window).enumerate() {
            let batch = objective.arguments(batch, window, about)?;
            let key = seeds::dropout_key(options.seed, place.step, index)?;
            let own = traces.gradients(model, optimizer, &batch, &key, options)?;
            let (mut gradients, mut minimised) = (own.gradients, own.outcome.objective);
            if let Some((sum, minimised_so_far)) = &total {
                gradients = sum.add(&gradients)?;
                minimised = minimised_so_far.add(minimised)?;
            }
            if window.micro_batches.len() > 1 {
                // One after the other, else the activations of all of them would exist at once.
                async_eval(gradients.arrays().iter().chain([&minimised, &own.outcome.items]))?;
            }
            items.push((own.outcome.items, batch.counted));
            total = Some((gradients, minimised));
        }
        let (gradients, minimised) = total.ok_or(planish_loss::Error::NoTrainedTokens { rows: window.examples })?;
        let update = traces.apply(optimizer, &gradients, &minimised, place, options.clip_norm)?;
        // Before anything is computed: what nobody holds any more can be overwritten.
        model.set_trainables(&optimizer.trainables()?)?;
        Ok(Self { update, items })
    }
}

impl Launched {
    fn read(self, window: &Window, objective: &dyn Objective, about: &About<'_>) -> Result<(WindowLosses, Applied)> {
        let (update, items) = match self {
            Self::Done(losses, applied) => return Ok((losses, applied)),
            Self::Running { update, items, .. } => (update, items),
        };
        eval(
            items
                .iter()
                .map(|(items, _)| items)
                .chain([&update.norm, &update.accept]),
        )?;
        let mut losses = WindowLosses::default();
        for (batch, (items, counted)) in trained(window).zip(items) {
            let all = items.to_vec_exact::<f32>()?;
            let own: Vec<f32> = counted.into_iter().map(|i| all[i]).collect();
            objective.account(batch, &own, about, &mut losses);
            losses.tokens += batch.target_tokens;
        }
        losses.mean_of_means /= window.micro_batches.len() as f64;
        let applied = Applied {
            grad_norm: f64::from(update.norm.try_item_exact::<f32>()?),
            accepted: update.accept.try_item_exact::<bool>()?,
        };
        Ok((losses, applied))
    }
}
