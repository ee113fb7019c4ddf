//! A run between its first and its last update.

use std::path::Path;
use std::time::Instant;

use planish_checkpoint::adapter::{Adapter, ReadOptions};
use planish_checkpoint::run_state::{Environment, RunInputs};
use planish_data::{Cursor, Window};
use planish_nn::{Model, Trainable};

use super::Trainer;
use super::saving::{Opened, checkpoint_name, open};
use super::trial::Trial;
use crate::batches::Batches;
use crate::best::Best;
use crate::events::{
    End, EvalReport, Event, GuardReason, GuardReport, Observer, Position, RunPlan, SaveReport, StepReport, Summary,
};
use crate::export::Exporter;
use crate::guard::{Guard, Verdict};
use crate::interval::Interval;
use crate::metrics::Record;
use crate::optimizer::Optimizer;
use crate::options::{Length, TrainOptions, Tuning};
use crate::recipes::{About, Objective};
use crate::resume::{self, Resume};
use crate::run_dir::RunDir;
use crate::samples::Samples;
use crate::schedule::{Schedule, default_warmup};
use crate::update::{Launched, Place, Updates};
use crate::weighting::ExampleWeights;
use crate::window::Applied;
use crate::{Error, Result};

/// The state of a run.
pub(super) struct UnderWay<'a> {
    pub(super) setup: &'a Trainer<'a>,
    pub(super) observer: &'a mut dyn Observer,
    pub(super) plan: Batches,
    pub(super) objective: Box<dyn Objective>,
    pub(super) weights: ExampleWeights,
    pub(super) schedule: Schedule,
    pub(super) optimizer: Optimizer,
    updates: Updates,
    /// The next update, where it has been set going already.
    ahead: Option<Result<Ahead>>,
    /// When the last update was read.
    last_read: Option<Instant>,
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

/// An update that has been set going.
struct Ahead {
    window: Window,
    learning_rate: f64,
    launched: Launched,
    /// The optimizer before it, where the next update may have to be undone.
    before: Option<Optimizer>,
}

impl<'a> UnderWay<'a> {
    pub(super) fn prepare(setup: &'a Trainer<'a>, model: &mut Model, observer: &'a mut dyn Observer) -> Result<Self> {
        let options = &setup.options;
        options.check()?;
        let weights = ExampleWeights::of(setup.train, &options.distrust)?;
        let objective = options.recipe.objective(model, setup.train, options)?;
        let plan = Batches::for_training(setup.train, options, &weights)?;
        let schedule = schedule(options, &plan)?;
        let inputs = resume::inputs(options, &setup.identity, setup.train, &plan);
        let modules = attach(model, options)?;
        let exporter = Exporter::new(&options.tuning, &modules, model)?;
        if let Some(start) = options.start.as_ref().filter(|_| setup.resume == Resume::Fresh) {
            start_from(start, model, &exporter)?;
        }
        let mut optimizer = Optimizer::new(options.rule.clone(), options.groups, &model.trainables())?;
        let about = About {
            options,
            weights: &weights,
        };
        let mut updates = Updates::new(model, &*objective, &about)?;
        let mut step_memory_bytes = None;
        let mut notes: Vec<String> = model.plan()?.parts.iter().map(ToString::to_string).collect();
        notes.extend(updates.describe(plan.summary().shapes.len()));
        // Before anything is written; a run that goes on was tried when it began.
        if options.preflight && setup.resume == Resume::Fresh {
            let trial = Trial {
                setup,
                plan: &plan,
                objective: &*objective,
                weights: &weights,
            };
            let (measured, note) = trial.run(model, &mut optimizer, &mut updates)?;
            step_memory_bytes = measured;
            notes.push(note);
        }
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
            objective,
            schedule,
            optimizer,
            updates,
            ahead: None,
            last_read: None,
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
            metrics_offset: 0,
            modules,
            exporter,
            step_memory_bytes,
            inputs,
            environment: resume::environment(model)?,
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

    fn about(&self) -> About<'_> {
        About {
            options: &self.setup.options,
            weights: &self.weights,
        }
    }

    pub(super) fn is_finished_already(&self) -> bool {
        self.position.step >= self.schedule.total_steps || self.best.is_exhausted()
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
        if self.position.step == 0 {
            if let Some(config) = self.setup.config {
                self.files.write("config.toml", config.to_toml().as_bytes())?;
            }
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
        self.evaluate(model)
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

    /// One optimizer update: the next window, forward and backward, clip, step.
    ///
    /// Where updates are traced, the next one is set going before this one is read, so that the device never waits for
    /// the host: unless something looks at the model in between.
    pub(super) fn update(&mut self, model: &mut Model) -> Result<()> {
        let mut started = Instant::now();
        let this = match self.ahead.take() {
            Some(ahead) => {
                started = self.last_read.unwrap_or(started);
                ahead?
            }
            None => self.launch(model, self.cursor, self.position.step)?,
        };
        if self.may_launch_ahead() {
            let next = self.plan.advance(self.cursor)?;
            self.ahead = Some(self.launch(model, next, self.position.step + 1));
        }
        let window = this.window;
        let about = About {
            options: &self.setup.options,
            weights: &self.weights,
        };
        let objective = &*self.objective;
        let (losses, applied) = self.updates.read(this.launched, &window, objective, &about)?;
        self.last_read = Some(Instant::now());

        let options = &self.setup.options;
        self.advance(window.micro_batches.len())?;
        let report = StepReport {
            position: self.position,
            total_steps: self.schedule.total_steps,
            loss: losses.loss(options.reduction),
            learning_rate: this.learning_rate,
            grad_norm: applied.grad_norm,
            tokens: losses.tokens,
            seconds: started.elapsed().as_secs_f64(),
            accepted: applied.accepted,
        };
        self.interval.add(&report, &window, &losses, options, &self.weights);
        self.observer.on_event(&Event::Step(report));
        let judged = self.judge(&window, &losses.bad_examples, &applied);
        if self.end.is_some() || judged.is_err() {
            self.undo_ahead(model)?;
        }
        judged
    }

    fn launch(&mut self, model: &mut Model, cursor: Cursor, step: usize) -> Result<Ahead> {
        let window = self.plan.window(self.setup.train, cursor.epoch, cursor.window_index)?;
        let learning_rate = self.schedule.at(step);
        let about = About {
            options: &self.setup.options,
            weights: &self.weights,
        };
        let place = Place {
            step,
            learning_rate,
            counts: true,
        };
        let is_ahead = step > self.position.step;
        let before = is_ahead.then(|| self.optimizer.clone());
        let objective = &*self.objective;
        let launched = self
            .updates
            .launch(model, &mut self.optimizer, &window, objective, &about, place)?;
        Ok(Ahead {
            window,
            learning_rate,
            launched,
            before,
        })
    }

    /// Whether nothing looks at the model between this update and the next. Full tuning has no room for two states.
    fn may_launch_ahead(&self) -> bool {
        let options = &self.setup.options;
        let step = self.position.step + 1;
        let is_due = |every: Option<usize>| every.is_some_and(|n| step.is_multiple_of(n));
        self.updates.are_traced()
            && options.launch_ahead
            && options.tuning != Tuning::Full
            && step < self.schedule.total_steps
            && !self.setup.stop.is_set()
            && !is_due(options.eval_every)
            && !is_due(options.checkpoint_every)
    }

    /// Takes back what was set going and will not be read.
    fn undo_ahead(&mut self, model: &mut Model) -> Result<()> {
        if let Some(Ok(Ahead {
            before: Some(before), ..
        })) = self.ahead.take()
        {
            self.updates.forget();
            self.optimizer = before;
            model.set_trainables(&self.optimizer.trainables()?)?;
        }
        Ok(())
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

    fn judge(&mut self, window: &Window, bad: &[usize], applied: &Applied) -> Result<()> {
        let verdict = self.guard.judge(applied.grad_norm, applied.accepted);
        let reason = match verdict {
            Verdict::Normal => return Ok(()),
            Verdict::Spike => GuardReason::Spike,
            Verdict::Refused | Verdict::Diverged => GuardReason::NotFinite,
        };
        let all: Vec<usize> = window
            .micro_batches
            .iter()
            .flat_map(|batch| batch.row_ids.clone())
            .collect();
        let rows = self.locations(if bad.is_empty() { &all } else { bad });
        if reason == GuardReason::NotFinite {
            self.interval.skipped_steps += 1;
            self.files.append_bad_rows(self.position.step, &rows)?;
        }
        let report = GuardReport {
            position: self.position,
            reason,
            grad_norm: applied.grad_norm,
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

    pub(super) fn report(&mut self) -> Result<()> {
        let factor = self.setup.options.groups.lora_b_ratio;
        let report = self
            .interval
            .finish(self.position, self.schedule.total_steps, factor, &self.setup.options)?;
        self.last_loss = Some(report.loss);
        self.files.record(&Record::of_train(&report))?;
        self.observer.on_event(&Event::Report(Box::new(report)));
        Ok(())
    }

    /// Evaluates, keeps the adapter if it is the best, and ends the run when it has not improved for long enough.
    pub(super) fn evaluate(&mut self, model: &Model) -> Result<()> {
        let Some(valid) = self.setup.valid else { return Ok(()) };
        if self.evaluated_at == Some(self.position.step) {
            return Ok(());
        }
        let started = Instant::now();
        let found = self.objective.judge(model, valid, &self.about())?;
        let is_best = self.best.offer(self.position.step, found.loss);
        self.evaluated_at = Some(self.position.step);
        let report = EvalReport {
            position: self.position,
            loss: found.loss,
            perplexity: found.perplexity.map(|(perplexity, _)| perplexity),
            perplexity_se: found.perplexity.map(|(_, se)| se),
            tokens: found.tokens,
            preference: found.preference,
            best: is_best,
            best_step: self.best.step(),
            patience_left: self.best.patience_left(),
            loss_weighted: found.loss_weighted,
            seconds: started.elapsed().as_secs_f64(),
        };
        self.files.record(&Record::of_eval(&report))?;
        self.observer.on_event(&Event::Evaluated(report));
        if is_best && self.setup.options.save_best && self.position.step > 0 {
            self.save_adapter(model)?;
            self.save_checkpoint(model)?;
        }
        if self.best.is_exhausted() && self.end.is_none() {
            self.end = Some(End::StoppedEarly);
        }
        Ok(())
    }

    /// The last evaluation, the state, and the adapter that the run leaves behind.
    pub(super) fn finish(mut self, model: &Model) -> Result<Summary> {
        let end = self.end.unwrap_or(End::Completed);
        if end == End::Interrupted {
            // Before the unfinished interval is reported: a resumed run reports it whole.
            self.save_checkpoint(model)?;
        }
        if !self.interval.is_empty() {
            self.report()?;
        }
        if end != End::Interrupted {
            self.evaluate(model)?;
            self.sample(model, "after")?;
        }
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
            adapter_step: self.adapter_step.unwrap_or(self.position.step),
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
