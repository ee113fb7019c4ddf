//! Supervised fine-tuning.

use std::path::Path;

use planish_core::run_config::RunConfig;
use planish_data::{BatchPlan, Cursor, Dataset, PlanOptions};
use planish_nn::{Model, Trainable};
use serde_json::{Map, Value};

use crate::best::Best;
use crate::evaluate::evaluate;
use crate::events::{
    End, EvalReport, Event, GuardReason, GuardReport, Observer, Position, RunPlan, StepReport, StopFlag, Summary,
};
use crate::guard::{Guard, Verdict};
use crate::interval::Interval;
use crate::metrics::Record;
use crate::optimizer::Optimizer;
use crate::options::{Length, SftOptions, Tuning};
use crate::run_dir::RunDir;
use crate::schedule::{Schedule, default_warmup};
use crate::weighting::ExampleWeights;
use crate::window::{apply, window_gradients};
use crate::{Error, Result};

/// A supervised run: teaches a model to continue the trained tokens of a data set.
///
/// Minimises `Σ ω·CE / N` over windows of `batch_size · accumulation` rows, `N` the trained tokens of the window, known
/// before its first micro-batch. Writes `adapters.safetensors`, `adapter_config.json` (mlx-lm's layout), `planish.json`,
/// `metrics.jsonl` and `plan.json` into the output folder; see [`SftOptions`] for what can be chosen.
///
/// # Example
/// ```no_run
/// use planish_data::{ChatTemplate, DataOptions, Dataset, TemplateOptions, Tokenizer};
/// use planish_nn::{LoadOptions, Model};
/// use planish_train::{Event, SftOptions, recipes::sft::Sft};
///
/// let base = "SmolLM2-135M".as_ref();
/// let tokenizer = Tokenizer::from_dir(base)?;
/// let template = ChatTemplate::from_dir(base, &tokenizer, &TemplateOptions::default())?;
/// let (train, _) = Dataset::load("data/train.jsonl".as_ref(), &tokenizer, template.as_ref(), &DataOptions::default())?;
/// let (mut model, _) = Model::load(base, &LoadOptions::default())?;
/// let mut print = |event: &Event| {
///     if let Event::Step(step) = event {
///         println!("{} {:.3}", step.position.step, step.loss);
///     }
/// };
/// let summary = Sft::new(SftOptions::default(), &train, "out".as_ref()).run(&mut model, &mut print)?;
/// println!("{} tokens", summary.tokens);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Sft<'a> {
    options: SftOptions,
    train: &'a Dataset,
    valid: Option<&'a Dataset>,
    out: &'a Path,
    stop: StopFlag,
    config: Option<&'a RunConfig>,
    context: Map<String, Value>,
}

impl<'a> Sft<'a> {
    /// A run on `train` that writes into `out`, which must be empty or not exist.
    pub fn new(options: SftOptions, train: &'a Dataset, out: &'a Path) -> Self {
        Self {
            options,
            train,
            valid: None,
            out,
            stop: StopFlag::default(),
            config: None,
            context: Map::new(),
        }
    }

    /// Evaluates on `valid` before the first update, at intervals, and after the last.
    pub fn valid(mut self, valid: &'a Dataset) -> Self {
        self.valid = Some(valid);
        self
    }

    /// Stops after the current update when the flag is set.
    pub fn stop(mut self, stop: &StopFlag) -> Self {
        self.stop = stop.clone();
        self
    }

    /// The configuration behind the options, to be written as `config.toml`.
    pub fn config(mut self, config: &'a RunConfig) -> Self {
        self.config = Some(config);
        self
    }

    /// Fields for the first line of `metrics.jsonl` that a recipe cannot know, such as `versions` and `backend`.
    pub fn context(mut self, context: Map<String, Value>) -> Self {
        self.context = context;
        self
    }

    /// Trains `model` and leaves it with the last values.
    ///
    /// # Errors
    /// [`Error::Config`] for settings, [`Error::Diverged`] when three updates in a row are not finite, and those of the
    /// model, the data and the files.
    pub fn run(self, model: &mut Model, observer: &mut dyn Observer) -> Result<Summary> {
        let mut run = Run::prepare(&self, model, observer)?;
        run.evaluate(model)?;
        while run.end.is_none() {
            run.update(model)?;
            if run.is_due(Some(self.options.report_every)) {
                run.report()?;
            }
            if run.is_due(self.options.eval_every) {
                run.evaluate(model)?;
            }
            if run.is_due(self.options.checkpoint_every) {
                run.save(model)?;
            }
        }
        run.finish(model)
    }
}

/// A run under way.
struct Run<'a> {
    sft: &'a Sft<'a>,
    observer: &'a mut dyn Observer,
    plan: BatchPlan,
    weights: ExampleWeights,
    schedule: Schedule,
    optimizer: Optimizer,
    files: RunDir,
    cursor: Cursor,
    position: Position,
    guard: Guard,
    interval: Interval,
    best: Best,
    /// The step whose adapter lies in the output folder.
    adapter_step: Option<usize>,
    last_loss: Option<f64>,
    evaluated_at: Option<usize>,
    end: Option<End>,
}

impl<'a> Run<'a> {
    fn prepare(sft: &'a Sft<'a>, model: &mut Model, observer: &'a mut dyn Observer) -> Result<Self> {
        let options = &sft.options;
        options.check()?;
        let weights = ExampleWeights::of(sft.train, &options.distrust)?;
        let plan = BatchPlan::new(sft.train, &plan_options(options, &weights))?;
        let schedule = schedule(options, &plan)?;
        let files = RunDir::create(sft.out)?;
        let modules = attach(model, options)?;
        let optimizer = Optimizer::new(options.rule.clone(), options.groups, &model.trainables())?;
        let mut run = Self {
            sft,
            plan,
            schedule,
            optimizer,
            files,
            cursor: Cursor::default(),
            position: Position::default(),
            guard: Guard::default(),
            interval: Interval::start(schedule.total_steps),
            best: Best::new(options.patience, options.min_delta),
            adapter_step: None,
            last_loss: None,
            evaluated_at: None,
            end: None,
            weights,
            observer,
        };
        run.announce(model, modules)?;
        Ok(run)
    }

    fn announce(&mut self, model: &Model, modules: Vec<String>) -> Result<()> {
        let plan = self.run_plan(model, modules)?;
        if let Some(config) = self.sft.config {
            self.files.write("config.toml", config.to_toml().as_bytes())?;
        }
        self.files.write_plan(&plan, self.sft.train, self.sft.valid)?;
        self.files.metrics().write(&Record::of_plan(&plan, &self.sft.context))?;
        self.observer.on_event(&Event::Started(Box::new(plan)));
        for note in self.weights.notes() {
            self.observer.on_event(&Event::Note(note.clone()));
        }
        Ok(())
    }

    fn run_plan(&self, model: &Model, modules: Vec<String>) -> Result<RunPlan> {
        let trainable: usize = model.trainables().iter().map(|(_, value)| value.size()).sum();
        let base: usize = model
            .config()
            .expected_tensors()
            .iter()
            .map(|t| t.shape.iter().product::<usize>())
            .sum();
        let (rank, scale) = rank_and_scale(&self.sft.options.tuning);
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
        })
    }

    /// One optimizer update: the next window, forward and backward, clip, step.
    fn update(&mut self, model: &mut Model) -> Result<()> {
        let options = &self.sft.options;
        let started = std::time::Instant::now();
        let window = self
            .plan
            .window(self.sft.train, self.cursor.epoch, self.cursor.window_index)?;
        let weights = &self.weights;
        let gradients = window_gradients(
            model,
            &self.optimizer,
            &window,
            &|example| weights.of_example(example),
            options,
            self.position.step,
        )?;
        let learning_rate = self.schedule.at(self.position.step);
        let applied = apply(model, &mut self.optimizer, &gradients, learning_rate, options.clip_norm)?;

        self.advance(window.micro_batches.len())?;
        let losses = &gradients.losses;
        let report = StepReport {
            position: self.position,
            total_steps: self.schedule.total_steps,
            loss: losses.loss(options.reduction),
            learning_rate,
            grad_norm: applied.grad_norm,
            tokens: losses.tokens,
            seconds: started.elapsed().as_secs_f64(),
            accepted: applied.accepted,
        };
        self.interval.add(&report, &window, losses, options, &self.weights);
        self.observer.on_event(&Event::Step(report));
        self.judge(&window, &gradients.losses.bad_examples, &applied)
    }

    fn advance(&mut self, micro_batches: usize) -> Result<()> {
        self.cursor = self.plan.advance(self.cursor)?;
        self.position.step += 1;
        self.position.micro_step += micro_batches;
        let windows = self.plan.windows_in_epoch(self.cursor.epoch)?;
        self.position.epoch = self.cursor.epoch as f64 + self.cursor.window_index as f64 / windows as f64;
        if self.position.step >= self.schedule.total_steps {
            self.end = Some(End::Completed);
        } else if self.sft.stop.is_set() {
            self.end = Some(End::Interrupted);
        }
        Ok(())
    }

    fn judge(&mut self, window: &planish_data::Window, bad: &[usize], applied: &crate::window::Applied) -> Result<()> {
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
        self.files.metrics().write(&Record::of_guard(&report))?;
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
        let file = self.sft.train.path().display();
        let known = self.sft.train.examples();
        examples
            .iter()
            .filter_map(|&i| known.get(i))
            .map(|example| format!("{file}:{}", example.line))
            .collect()
    }

    fn report(&mut self) -> Result<()> {
        let factor = self.sft.options.groups.lora_b_ratio;
        let report = self
            .interval
            .finish(self.position, self.schedule.total_steps, factor, &self.sft.options)?;
        self.last_loss = Some(report.loss);
        self.files.metrics().write(&Record::of_train(&report))?;
        self.observer.on_event(&Event::Report(Box::new(report)));
        Ok(())
    }

    /// Evaluates, keeps the adapter if it is the best, and ends the run when it has not improved for long enough.
    fn evaluate(&mut self, model: &Model) -> Result<()> {
        let Some(valid) = self.sft.valid else { return Ok(()) };
        if self.evaluated_at == Some(self.position.step) {
            return Ok(());
        }
        let started = std::time::Instant::now();
        let options = &self.sft.options;
        let weight = self.weights.for_other(valid, &options.distrust);
        let weight = weight.as_ref().map(|w| w as &dyn Fn(usize) -> f64);
        let found = evaluate(model, valid, options, options.val_batches, weight)?;
        let is_best = self.best.offer(self.position.step, found.loss);
        self.evaluated_at = Some(self.position.step);
        let report = EvalReport {
            position: self.position,
            loss: found.loss,
            perplexity: found.perplexity,
            perplexity_se: found.perplexity_se,
            tokens: found.tokens,
            best: is_best,
            best_step: self.best.step(),
            patience_left: self.best.patience_left(),
            loss_weighted: found.loss_weighted,
            seconds: started.elapsed().as_secs_f64(),
        };
        self.files.metrics().write(&Record::of_eval(&report))?;
        self.observer.on_event(&Event::Evaluated(report));
        if is_best && options.save_best && self.position.step > 0 {
            self.save_adapter(model)?;
        }
        if self.best.is_exhausted() && self.end.is_none() {
            self.end = Some(End::StoppedEarly);
        }
        Ok(())
    }

    fn save(&mut self, model: &Model) -> Result<()> {
        if self.sft.valid.is_none() || !self.sft.options.save_best {
            self.save_adapter(model)?;
        }
        Ok(())
    }

    fn save_adapter(&mut self, model: &Model) -> Result<()> {
        let report = self
            .files
            .save_adapter(model, &self.sft.options.tuning, self.position)?;
        self.files
            .metrics()
            .write(&Record::of_save(&report, "adapters.safetensors"))?;
        self.observer.on_event(&Event::Saved(report));
        self.adapter_step = Some(self.position.step);
        Ok(())
    }

    fn finish(mut self, model: &Model) -> Result<Summary> {
        if !self.interval.is_empty() {
            self.report()?;
        }
        if self.end != Some(End::Interrupted) {
            self.evaluate(model)?;
        }
        self.save(model)?;
        let keeps_best = self.sft.valid.is_some() && self.sft.options.save_best;
        if self.adapter_step != Some(self.position.step) && (!keeps_best || self.adapter_step.is_none()) {
            self.save_adapter(model)?;
        }
        let summary = Summary {
            end: self.end.unwrap_or(End::Completed),
            position: self.position,
            last_loss: self.last_loss,
            best: self.best.found(),
            adapter_step: self.adapter_step.unwrap_or(self.position.step),
            tokens: self.interval.tokens,
            skipped_steps: self.interval.skipped_steps,
            elapsed_seconds: self.interval.elapsed_seconds(),
            out: self.sft.out.to_owned(),
        };
        self.files.metrics().write(&Record::of_end(&summary))?;
        self.files.metrics().sync()?;
        self.observer.on_event(&Event::Finished(Box::new(summary.clone())));
        Ok(summary)
    }

    fn is_due(&self, every: Option<usize>) -> bool {
        every.is_some_and(|n| self.position.step.is_multiple_of(n))
    }
}

fn plan_options(options: &SftOptions, weights: &ExampleWeights) -> PlanOptions {
    PlanOptions {
        batch_size: options.batch_size,
        accumulation: options.accumulation,
        max_seq_length: options.max_seq_length,
        seed: options.seed,
        shuffle: true,
        packing: options.packing,
        rungs: options.rungs,
        sampler_weights: weights.for_sampler(),
        ..PlanOptions::default()
    }
}

fn schedule(options: &SftOptions, plan: &BatchPlan) -> Result<Schedule> {
    let total_steps = match options.length {
        Length::Steps(steps) => steps,
        Length::Epochs(epochs) => (epochs * plan.windows_in_epoch(0)? as f64).ceil() as usize,
    };
    Schedule::new(options.shape, options.learning_rate, total_steps)
        .with_min(options.min_learning_rate)?
        .with_warmup(options.warmup_steps.unwrap_or(default_warmup(total_steps)))
}

/// Makes the model trainable as asked, and names what is adapted.
fn attach(model: &mut Model, options: &SftOptions) -> Result<Vec<String>> {
    match &options.tuning {
        Tuning::Adapters(lora) => Ok(model.attach_lora(lora, options.seed)?),
        Tuning::Full => {
            model.train(Trainable::Weights)?;
            Ok(Vec::new())
        }
    }
}

pub(crate) fn rank_and_scale(tuning: &Tuning) -> (usize, f64) {
    match tuning {
        Tuning::Adapters(lora) => (lora.rank, lora.scale.factor(lora.scale.value(), lora.rank)),
        Tuning::Full => (0, 1.0),
    }
}
