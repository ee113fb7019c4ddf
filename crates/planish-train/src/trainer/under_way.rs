//! A run between its first and its last update.

use std::path::Path;
use std::time::{Duration, Instant};

use planish_checkpoint::adapter::{Adapter, ReadOptions};
use planish_checkpoint::run_state::{Environment, RunInputs};
use planish_data::Cursor;
use planish_nn::{Model, Trainable};

use super::Trainer;
use super::saving::{Opened, checkpoint_name, open};
use super::trial::Trial;
use crate::batches::{Batches, Planned};
use crate::best::Best;
use crate::evaluate::{Evaluation, judge};
use crate::events::{
    End, EvalReport, Event, GuardReason, GuardReport, Observer, Position, RunPlan, SaveReport, StepReport, Summary,
};
use crate::export::Exporter;
use crate::guard::{Guard, Verdict};
use crate::interval::Interval;
use crate::metrics::Record;
use crate::objective::{About, Item};
use crate::optimizer::Optimizer;
use crate::options::{Compat, Length, TrainOptions, Tuning};
use crate::preflight::{check_ranks, pieces};
use crate::resume::{self, Resume};
use crate::run_dir::RunDir;
use crate::samples::Samples;
use crate::schedule::{Schedule, default_warmup};
use crate::update::{Done, Place, Updates};
use crate::weighting::ExampleWeights;
use crate::{Error, Result};

/// The state of a run.
pub(super) struct UnderWay<'a> {
    pub(super) setup: &'a Trainer<'a>,
    pub(super) observer: &'a mut dyn Observer,
    pub(super) plan: Batches,
    pub(super) weights: ExampleWeights,
    pub(super) schedule: Schedule,
    pub(super) optimizer: Optimizer,
    updates: Updates,
    pub(super) files: RunDir,
    pub(super) cursor: Cursor,
    pub(super) position: Position,
    pub(super) guard: Guard,
    pub(super) interval: Interval,
    pub(super) best: Best,
    /// The step whose adapter lies in the output folder.
    pub(super) adapter_step: Option<usize>,
    pub(super) last_loss: Option<f64>,
    pub(super) evaluated_at: Option<usize>,
    /// The step whose state was saved last.
    pub(super) saved_at: Option<usize>,
    /// The checkpoint that the run goes on from: its line is cut from the metrics with everything after it.
    pub(super) saved_again: Option<SaveReport>,
    /// When the state was saved last, and how long that took.
    pub(super) last_save: (Instant, Duration),
    /// Whether the state is to be saved after the update that is being made because that was long ago.
    saves_by_time: bool,
    pub(super) metrics_offset: u64,
    pub(super) modules: Vec<String>,
    pub(super) exporter: Exporter,
    /// Peak of the trial update.
    pub(super) step_memory_bytes: Option<u64>,
    pub(super) inputs: RunInputs,
    pub(super) environment: Environment,
    pub(super) notes: Vec<String>,
    pub(super) end: Option<End>,
}

impl<'a> UnderWay<'a> {
    pub(super) fn prepare(setup: &'a Trainer<'a>, model: &mut Model, observer: &'a mut dyn Observer) -> Result<Self> {
        let options = &setup.options;
        options.check()?;
        let weights = ExampleWeights::of(setup.train, &options.distrust)?;
        let objective = match &setup.objective {
            Some(own) => own.clone(),
            None => options.recipe.objective(model, setup.train, options)?,
        };
        let plan = Batches::for_training(setup.train, options, &weights)?;
        let schedule = schedule(options, &plan)?;
        let inputs = resume::inputs(options, &setup.identity, setup.train, &plan);
        check_ranks(model.config(), options)?;
        // A run that goes on was tried when it began.
        let is_tried = options.preflight && setup.resume == Resume::Fresh;
        let trial = if is_tried {
            Trial::of(setup, model, &plan)?
        } else {
            None
        };
        let modules = attach(model, options)?;
        let exporter = Exporter::new(&options.tuning, &modules, model, setup.base)?;
        if let Some(start) = options.start.as_ref().filter(|_| setup.resume == Resume::Fresh) {
            start_from(start, model, &exporter)?;
        }
        let mut optimizer = Optimizer::new(options.rule.clone(), options.groups, &model.trainables())?;
        let mut updates = Updates::new(model, objective, options)?;
        let mut step_memory_bytes = None;
        let mut notes: Vec<String> = model.plan()?.parts.iter().map(ToString::to_string).collect();
        notes.extend(updates.describe(plan.summary().shapes.len()));
        if let Some(speed) = setup.flops_per_second {
            updates.cut_into(pieces(model.config(), plan.largest_shape(), speed));
        }
        // Before anything is written.
        match &trial {
            None if is_tried => {
                notes.push("the system does not tell its memory: whether the run fits is not checked".to_owned());
            }
            None => {}
            Some(trial) => {
                let about = about(setup, &weights);
                let (measured, note) = trial.run(model, &mut optimizer, &mut updates, &about)?;
                step_memory_bytes = Some(measured);
                notes.push(note);
            }
        }
        let environment = resume::environment(model)?;
        let Opened {
            files,
            checkpoint,
            notes: found,
        } = open(setup)?;
        notes.extend(found);
        notes.extend(weights.notes().iter().cloned());
        let mut run = Self {
            setup,
            plan,
            schedule,
            optimizer,
            updates,
            files,
            cursor: Cursor::default(),
            position: Position::default(),
            guard: Guard::default(),
            interval: Interval::start(),
            best: Best::new(options.patience, options.min_delta),
            adapter_step: None,
            last_loss: None,
            evaluated_at: None,
            saved_at: None,
            saved_again: None,
            last_save: (Instant::now(), Duration::ZERO),
            saves_by_time: false,
            metrics_offset: 0,
            modules,
            exporter,
            step_memory_bytes,
            inputs,
            environment,
            notes,
            end: None,
            weights,
            observer,
        };
        match (checkpoint, &options.start) {
            (Some((dir, checkpoint)), _) => run.go_on_from(&dir, checkpoint, model)?,
            (None, Some(start)) if setup.resume != Resume::Fresh => {
                start_from(start, model, &run.exporter)?;
                run.optimizer = Optimizer::new(options.rule.clone(), options.groups, &model.trainables())?;
            }
            _ => {}
        }
        Ok(run)
    }

    /// Whether the run would save its state at this step without being interrupted.
    pub(super) fn saves_here_anyway(&self) -> bool {
        let is_best =
            self.setup.options.save_best && self.best.found().is_some_and(|(step, _)| step == self.position.step);
        is_best || self.is_due(self.setup.options.checkpoint_every)
    }

    pub(super) fn epoch_now(&self) -> Result<f64> {
        self.plan.epoch_at(self.cursor)
    }

    pub(super) fn is_finished_already(&self) -> bool {
        (self.is_at_the_end() || self.best.is_exhausted()) && !self.evaluation_is_pending()
    }

    fn is_at_the_end(&self) -> bool {
        self.position.step >= self.schedule.total_steps
    }

    /// Whether an evaluation belongs to the state but was interrupted.
    pub(super) fn evaluation_is_pending(&self) -> bool {
        let is_due = self.is_at_the_end() || self.is_due(self.setup.options.eval_every);
        is_due && self.setup.valid.is_some() && self.evaluated_at != Some(self.position.step)
    }

    /// Updates until there is a reason to end.
    pub(super) fn train(&mut self, model: &mut Model) -> Result<()> {
        let options = &self.setup.options;
        while self.end.is_none() {
            match self.update(model) {
                Err(error) if may_shrink(&error, options) => {
                    self.go_on_in_smaller_pieces(model, error)?;
                    continue;
                }
                other => other?,
            }
            if self.is_due(Some(options.report_every)) {
                self.report()?;
            }
            if self.is_due(options.eval_every) {
                self.evaluate(model)?;
            }
            // An evaluation that is still to come belongs to the state.
            if self.is_due(options.checkpoint_every) && !self.evaluation_is_pending() {
                self.save_checkpoint(model)?;
            } else if self.saves_by_time && self.end.is_none() {
                self.save_unasked(model);
            }
        }
        Ok(())
    }

    /// Saves the state because the last time was long ago; nobody asked for it, so a full disk is no reason to end.
    fn save_unasked(&mut self, model: &Model) {
        if let Err(error) = self.save_checkpoint(model) {
            self.last_save.0 = Instant::now();
            let note = format!(
                "warning: the state of step {} was not saved: {error}",
                self.position.step
            );
            self.observer.on_event(&Event::Note(note));
        }
    }

    /// After the device has given up on an update: the state before it again, and micro-batches in more parts.
    fn go_on_in_smaller_pieces(&mut self, model: &mut Model, error: Error) -> Result<()> {
        let can = self.updates.shrink(self.plan.largest_shape().0);
        if !can || !(self.updates.undo(model, &mut self.optimizer)? || self.go_back(model)?) {
            return Err(error);
        }
        let step = self.position.step;
        let note =
            format!("warning: the device gave up ({error}); going on from step {step} with smaller pieces of work");
        self.observer.on_event(&Event::Note(note));
        Ok(())
    }

    /// Says what is going to happen, and takes the first evaluation.
    pub(super) fn start(&mut self, model: &Model) -> Result<()> {
        let plan = self.run_plan(model, self.modules.clone())?;
        self.files.metrics().cut(self.metrics_offset)?;
        if self.setup.options.tensorboard {
            self.files.start_tensorboard()?;
        }
        if let Some(report) = self.saved_again.take().filter(|_| self.saves_here_anyway()) {
            self.files
                .record(&Record::of_save(&report, &checkpoint_name(&report.path)))?;
        }
        // A run that goes on may have been given other settings.
        if let Some(config) = self.setup.config {
            self.files.write("config.toml", config.to_toml().as_bytes())?;
        }
        if self.position.step == 0 {
            for (name, bytes) in &self.setup.files {
                self.files.write(name, bytes)?;
            }
            self.files.write_plan(&plan, self.setup.train, self.setup.valid)?;
            self.files.record(&Record::of_plan(&plan, &self.setup.context))?;
        }
        self.observer.on_event(&Event::Started(Box::new(plan)));
        for note in &self.notes {
            self.observer.on_event(&Event::Note(note.clone()));
        }
        if self.position.step == 0 {
            self.sample(model, "before")?;
        }
        if self.position.step == 0 || self.evaluation_is_pending() {
            self.evaluate(model)?;
            if self.position.step > 0 && self.end.is_none() && self.is_due(self.setup.options.checkpoint_every) {
                self.save_checkpoint(model)?;
            }
        }
        if self.is_at_the_end() {
            self.end = self.end.or(Some(End::Completed));
        }
        Ok(())
    }

    /// Lets the model answer a few prompts.
    fn sample(&mut self, model: &Model, when: &'static str) -> Result<()> {
        let Some((tokenizer, count, max_tokens)) = self.setup.samples else {
            return Ok(());
        };
        let data = self.setup.valid.unwrap_or(self.setup.train);
        for report in Samples::of(data, tokenizer, count, max_tokens)?.answers(model, when)? {
            self.files.record(&Record::of_sample(self.position, &report))?;
            self.observer.on_event(&Event::Sampled(report));
        }
        Ok(())
    }

    fn run_plan(&self, model: &Model, modules: Vec<String>) -> Result<RunPlan> {
        let trainable: usize = model.trainables().iter().map(|(_, value)| value.size()).sum();
        let base = model.config().arch.n_parameters();
        let (rank, scale) = self.exporter.rank_and_scale();
        Ok(RunPlan {
            total_steps: self.schedule.total_steps,
            first_step: self.position.step,
            steps_per_epoch: self.plan.windows_in_epoch(0)?,
            modules,
            trainable,
            total: if rank > 0 { base + trainable } else { base },
            scale,
            rank,
            data: self.plan.summary().clone(),
            plan_hash: self.plan.plan_hash().to_owned(),
            warmup_steps: self.schedule.warmup_steps,
            effective_share: self.weights.effective_share(),
            step_memory_bytes: self.step_memory_bytes,
            own_rank_and_scale: self.exporter.of_modules(&self.modules),
        })
    }

    /// One optimizer update.
    fn update(&mut self, model: &mut Model) -> Result<()> {
        let options = &self.setup.options;
        let (last_save, took) = self.last_save;
        let is_late = |interval: Duration| last_save.elapsed() >= interval.max(20 * took);
        self.saves_by_time = options.checkpoint_interval.is_some_and(is_late);
        let this = self.place(self.cursor, self.position.step);
        let next = match self.may_launch_ahead() {
            true => Some(self.place(self.plan.advance(self.cursor)?, self.position.step + 1)),
            false => None,
        };
        let about = about(self.setup, &self.weights);
        let mut source = Planned {
            plan: &self.plan,
            data: self.setup.train,
        };
        let optimizer = &mut self.optimizer;
        let done = self.updates.make(model, optimizer, &mut source, &about, this, next)?;
        self.advance(done.window.micro_batches.len())?;
        let report = StepReport {
            position: self.position,
            total_steps: self.schedule.total_steps,
            loss: done.losses.mean(options.reduction),
            learning_rate: done.learning_rate,
            grad_norm: done.grad_norm,
            items: done.losses.n_items,
            tokens: done.losses.tokens,
            seconds: done.seconds,
            accepted: done.accepted,
        };
        self.interval.add(&report, &done, options, &self.weights);
        self.observer.on_event(&Event::Step(report));
        let judged = self.judge(&done);
        if self.end.is_some() || judged.is_err() {
            self.updates.undo_ahead(model, &mut self.optimizer)?;
        }
        judged
    }

    fn place(&self, cursor: Cursor, step: usize) -> Place {
        Place {
            cursor,
            step,
            learning_rate: self.schedule.at(step),
            counts: true,
        }
    }

    /// Whether nothing looks at the model between this update and the next.
    fn may_launch_ahead(&self) -> bool {
        let options = &self.setup.options;
        let step = self.position.step + 1;
        let is_due = |every: Option<usize>| every.is_some_and(|n| step.is_multiple_of(n));
        step < self.schedule.total_steps
            && !self.setup.stop.is_set()
            && !self.saves_by_time
            && !is_due(options.eval_every)
            && !is_due(options.checkpoint_every)
    }

    fn advance(&mut self, micro_batches: usize) -> Result<()> {
        self.cursor = self.plan.advance(self.cursor)?;
        self.position.step += 1;
        self.position.micro_step += micro_batches;
        self.position.epoch = self.epoch_now()?;
        if self.position.step >= self.schedule.total_steps {
            self.end = Some(End::Completed);
        } else if self.setup.stop.is_set() {
            self.end = Some(End::Interrupted);
        }
        Ok(())
    }

    fn judge(&mut self, done: &Done) -> Result<()> {
        let verdict = self.guard.judge(done.grad_norm, done.accepted);
        let reason = match verdict {
            Verdict::Normal => return Ok(()),
            Verdict::Spike => GuardReason::Spike,
            Verdict::Refused | Verdict::Diverged => GuardReason::NotFinite,
        };
        let bad = &done.losses.bad_examples;
        let all = done.window.micro_batches.iter().flat_map(|batch| batch.row_ids.clone());
        let rows = self.locations(&if bad.is_empty() { all.collect() } else { bad.clone() });
        if reason == GuardReason::NotFinite {
            self.interval.skipped_steps += 1;
            self.files.append_bad_rows(self.position.step, &rows)?;
        }
        let report = GuardReport {
            position: self.position,
            reason,
            grad_norm: done.grad_norm,
            rows: rows.clone(),
            skipped_steps: self.interval.skipped_steps,
        };
        self.files.record(&Record::of_guard(&report))?;
        self.observer.on_event(&Event::Guard(report));
        if verdict == Verdict::Diverged {
            let in_a_row = self.guard.refused_in_a_row();
            return Err(Error::Diverged {
                step: self.position.step,
                in_a_row,
                rows,
                kept: self.kept(),
            });
        }
        Ok(())
    }

    /// `file:line` of examples.
    fn locations(&self, examples: &[usize]) -> Vec<String> {
        let file = self.setup.train.path().display();
        let known = self.setup.train.examples();
        examples
            .iter()
            .filter_map(|&i| known.get(i))
            .map(|example| format!("{file}:{}", example.line))
            .collect()
    }

    fn report(&mut self) -> Result<()> {
        let total_steps = self.schedule.total_steps;
        let options = &self.setup.options;
        let report = self
            .interval
            .finish(self.position, total_steps, options, &self.weights)?;
        self.last_loss = Some(report.loss);
        self.files.record(&Record::of_train(&report))?;
        self.observer.on_event(&Event::Report(Box::new(report)));
        Ok(())
    }

    /// Evaluates, keeps the adapter if it is the best, and ends the run when it has not improved for long enough.
    fn evaluate(&mut self, model: &Model) -> Result<()> {
        let Some(valid) = self.setup.valid else { return Ok(()) };
        if self.evaluated_at == Some(self.position.step) {
            return Ok(());
        }
        let started = Instant::now();
        let options = &self.setup.options;
        let (own_weights, equal) = (
            self.weights.for_other(valid, &options.distrust),
            ExampleWeights::equal(),
        );
        let about = About {
            options,
            data: Some(valid),
            weights: own_weights.as_ref().unwrap_or(&equal),
        };
        let plan = Batches::for_evaluation(valid, options)?;
        let most = plan.windows_in_epoch(0)?.min(options.val_batches.unwrap_or(usize::MAX));
        let stop = &self.setup.stop;
        let windows = (0..most)
            .take_while(|_| !stop.is_set())
            .map(|index| plan.window(valid, 0, index));
        let objective = self.updates.objective();
        let found: Evaluation = judge(objective, model, windows, &about, self.updates.pieces())?.into();
        if stop.is_set() {
            // Evaluated again when the run goes on.
            self.end = Some(End::Interrupted);
            return Ok(());
        }
        let of_tokens = objective.item() == Item::Token;
        let is_best = self.best.offer(self.position.step, found.loss);
        self.evaluated_at = Some(self.position.step);
        let report = EvalReport {
            position: self.position,
            loss: found.loss,
            perplexity: of_tokens.then_some(found.perplexity),
            perplexity_se: of_tokens.then_some(found.perplexity_se),
            tokens: found.tokens,
            figures: found.figures,
            best: is_best,
            best_step: self.best.step(),
            patience_left: self.best.patience_left(),
            loss_weighted: own_weights.is_some().then_some(found.loss_weighted),
            seconds: started.elapsed().as_secs_f64(),
        };
        self.files.record(&Record::of_eval(&report))?;
        self.observer.on_event(&Event::Evaluated(report));
        self.require_finite(found.loss, "validation loss")?;
        if is_best && self.setup.options.save_best && self.position.step > 0 {
            self.save_adapter(model)?;
            self.save_checkpoint(model)?;
        }
        if self.best.is_exhausted() && self.end.is_none() {
            self.end = Some(End::StoppedEarly);
        }
        Ok(())
    }

    fn require_finite(&self, loss: f64, what: &'static str) -> Result<()> {
        match (loss.is_finite(), self.position.step) {
            (true, _) => Ok(()),
            (false, 0) => Err(Error::BadStart { what }),
            (false, step) => Err(Error::NotFinite {
                what,
                step,
                kept: self.kept(),
            }),
        }
    }

    /// What the run leaves behind when it ends here, in words.
    fn kept(&self) -> String {
        let out = self.setup.out.display();
        match (self.adapter_step, self.saved_at) {
            (Some(step), _) => format!("{out} has the adapter of step {step}, the last good one"),
            (None, Some(step)) => format!("{out}/checkpoints/step-{step:07} is the last good state"),
            (None, None) => "there is no good adapter to keep".to_owned(),
        }
    }

    /// Without a validation set, the first training batch tells whether the run has diverged.
    fn check_trained(&self, model: &Model) -> Result<()> {
        if self.setup.valid.is_some() {
            return Ok(());
        }
        let windows = std::iter::once(self.plan.window(self.setup.train, 0, 0));
        let (updates, about) = (&self.updates, about(self.setup, &self.weights));
        let losses = judge(updates.objective(), model, windows, &about, updates.pieces())?;
        self.require_finite(losses.sum, "training loss")
    }

    /// Says why the run ended with an error; of a run that had not begun nothing stays.
    pub(super) fn fail(&mut self, error: Error) -> Error {
        if self.has_left_nothing_to_keep() {
            self.files.remove();
            return error;
        }
        let end = if error.is_divergence() {
            End::Diverged
        } else {
            End::Failed
        };
        let record = Record::of_end(&self.summary(end));
        // The error itself is what to tell.
        let _ = self.files.record(&record).and_then(|()| self.files.metrics().sync());
        error
    }

    fn has_left_nothing_to_keep(&self) -> bool {
        self.position.step == 0 && self.setup.resume == Resume::Fresh
    }

    /// The last evaluation, the state, and the adapter that the run leaves behind.
    pub(super) fn finish(&mut self, model: &Model) -> Result<Summary> {
        if self.end == Some(End::Interrupted) {
            if self.has_left_nothing_to_keep() {
                self.files.remove();
                let summary = self.summary(End::Interrupted);
                self.observer.on_event(&Event::Finished(Box::new(summary.clone())));
                return Ok(summary);
            }
            // Before the unfinished interval is reported: a resumed run reports it whole.
            self.save_checkpoint(model)?;
        }
        if !self.interval.is_empty() {
            self.report()?;
        }
        if self.end != Some(End::Interrupted) {
            self.evaluate(model)?;
        }
        if self.end != Some(End::Interrupted) {
            self.check_trained(model)?;
            self.sample(model, "after")?;
        }
        let end = self.end.unwrap_or(End::Completed);
        let keeps_best = self.setup.valid.is_some() && self.setup.options.save_best && self.adapter_step.is_some();
        if !keeps_best && self.adapter_step != Some(self.position.step) {
            self.save_adapter(model)?;
        }
        self.save_checkpoint(model)?;
        let summary = self.summary(end);
        self.files.record(&Record::of_end(&summary))?;
        self.files.metrics().sync()?;
        self.observer.on_event(&Event::Finished(Box::new(summary.clone())));
        Ok(summary)
    }

    pub(super) fn summary(&self, end: End) -> Summary {
        Summary {
            end,
            position: self.position,
            last_loss: self.last_loss,
            best: self.best.found(),
            adapter_step: self.adapter_step,
            tokens: self.interval.tokens,
            skipped_steps: self.interval.skipped_steps,
            elapsed_seconds: self.interval.elapsed_seconds(),
            out: self.setup.out.to_owned(),
        }
    }

    pub(super) fn is_due(&self, every: Option<usize>) -> bool {
        every.is_some_and(|n| self.position.step.is_multiple_of(n))
    }
}

/// Whether an update may do in smaller pieces: the batches of mlx-lm must stay as they are.
pub(super) fn may_shrink(error: &Error, options: &TrainOptions) -> bool {
    error.is_of_the_device() && options.compat == Compat::Native
}

fn about<'a>(setup: &'a Trainer<'_>, weights: &'a ExampleWeights) -> About<'a> {
    About {
        options: &setup.options,
        data: Some(setup.train),
        weights,
    }
}

fn schedule(options: &TrainOptions, plan: &Batches) -> Result<Schedule> {
    let total_steps = match options.length {
        Length::Steps(steps) => steps,
        Length::Epochs(epochs) => (epochs * plan.windows_in_epoch(0)? as f64).ceil() as usize,
    };
    Schedule::new(options.shape, options.learning_rate, total_steps)
        .with_min(options.min_learning_rate)?
        .with_warmup(options.warmup_steps.unwrap_or(default_warmup(total_steps)))
}

/// Makes the model trainable as asked, and names what is adapted.
fn attach(model: &mut Model, options: &TrainOptions) -> Result<Vec<String>> {
    match &options.tuning {
        Tuning::Adapters(lora) => Ok(model.attach_lora(lora, options.seed)?),
        Tuning::Full => {
            model.train(Trainable::Weights)?;
            Ok(Vec::new())
        }
    }
}

/// Gives fresh adapters the values of an adapter folder, which must be of the same kind.
fn start_from(dir: &Path, model: &mut Model, exporter: &Exporter) -> Result<()> {
    let refuse = |reason: String| Error::Config {
        key: "lora.start",
        reason: format!("{}: {reason}", dir.display()),
    };
    let (found, _) = Adapter::read(dir, &ReadOptions::default())?;
    let wanted = exporter.adapter(model)?;
    if (found.method, found.rank, found.scale) != (wanted.method, wanted.rank, wanted.scale) {
        let kind = |adapter: &Adapter| {
            format!(
                "{} of rank {} and scale {}",
                adapter.method.name(),
                adapter.rank,
                adapter.scale
            )
        };
        return Err(refuse(format!("found {}, expected {}", kind(&found), kind(&wanted))));
    }
    if !exporter.is_plain() {
        return Err(refuse(
            "modules of different ranks or scales, and init = \"pissa\", start fresh".to_owned(),
        ));
    }
    let values = resume::trainables(&found.tensors, &model.trainables()).map_err(|error| refuse(error.to_string()))?;
    Ok(model.set_trainables(&values)?)
}
