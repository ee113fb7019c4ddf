//! Supervised fine-tuning.

use std::path::{Path, PathBuf};

use planish_checkpoint::ExactF64;
use planish_checkpoint::run_state::{
    Best as SavedBest, Checkpoint, Counters, Environment, Position as SavedPosition, RunInputs, RunState, Verify,
};
use planish_core::hash;
use planish_core::run_config::RunConfig;
use planish_data::{BatchPlan, Cursor, Dataset, PlanOptions};
use planish_nn::{Model, Trainable};
use serde_json::{Map, Value};

use crate::best::Best;
use crate::evaluate::evaluate;
use crate::events::{
    End, EvalReport, Event, GuardReason, GuardReport, Observer, Position, RunPlan, SaveReport, StepReport, StopFlag,
    Summary,
};
use crate::guard::{Guard, Verdict};
use crate::interval::Interval;
use crate::metrics::Record;
use crate::optimizer::Optimizer;
use crate::options::{Length, SftOptions, Tuning};
use crate::resume::{self, Identity, Resume, Snapshot};
use crate::run_dir::{RunDir, adapter_of, to_host};
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
    resume: Resume,
    identity: Identity,
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
            resume: Resume::Fresh,
            identity: Identity::default(),
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

    /// Goes on from what lies in the output folder.
    pub fn resume(mut self, resume: Resume) -> Self {
        self.resume = resume;
        self
    }

    /// What stands for the base model, the tokenizer and the template, compared when the run goes on.
    pub fn identity(mut self, identity: Identity) -> Self {
        self.identity = identity;
        self
    }

    /// Trains `model` and leaves it with the last values.
    ///
    /// # Errors
    /// [`Error::Config`] for settings, [`Error::Diverged`] when three updates in a row are not finite, and those of the
    /// model, the data and the files.
    pub fn run(self, model: &mut Model, observer: &mut dyn Observer) -> Result<Summary> {
        let mut run = Run::prepare(&self, model, observer)?;
        if run.is_finished_already() {
            return Ok(run.summary(End::AlreadyFinished));
        }
        run.start(model)?;
        while run.end.is_none() {
            run.update(model)?;
            if run.is_due(Some(self.options.report_every)) {
                run.report()?;
            }
            if run.is_due(self.options.eval_every) {
                run.evaluate(model)?;
            }
            if run.is_due(self.options.checkpoint_every) {
                run.save_checkpoint(model)?;
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
    /// The step whose state was saved last.
    saved_at: Option<usize>,
    /// The checkpoint that the run goes on from: its line is cut from the metrics with everything after it.
    saved_again: Option<SaveReport>,
    metrics_offset: u64,
    modules: Vec<String>,
    inputs: RunInputs,
    environment: Environment,
    notes: Vec<String>,
    end: Option<End>,
}

impl<'a> Run<'a> {
    fn prepare(sft: &'a Sft<'a>, model: &mut Model, observer: &'a mut dyn Observer) -> Result<Self> {
        let options = &sft.options;
        options.check()?;
        let weights = ExampleWeights::of(sft.train, &options.distrust)?;
        let plan = BatchPlan::new(sft.train, &plan_options(options, &weights))?;
        let schedule = schedule(options, &plan)?;
        let inputs = resume::inputs(options, &sft.identity, sft.train, &plan);
        let modules = attach(model, options)?;
        let optimizer = Optimizer::new(options.rule.clone(), options.groups, &model.trainables())?;
        let Opened {
            files,
            checkpoint,
            mut notes,
        } = open(sft)?;
        notes.extend(weights.notes().iter().cloned());
        let mut run = Self {
            sft,
            plan,
            schedule,
            optimizer,
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
            inputs,
            environment: resume::environment()?,
            notes,
            end: None,
            weights,
            observer,
        };
        if let Some((dir, checkpoint)) = checkpoint {
            run.go_on_from(&dir, checkpoint, model)?;
        }
        Ok(run)
    }

    /// Puts a checkpoint's tensors, counters and place in the data back.
    fn go_on_from(&mut self, dir: &Path, checkpoint: Checkpoint, model: &mut Model) -> Result<()> {
        let values = resume::trainables(&checkpoint.adapter.tensors, &model.trainables())?;
        model.set_trainables(&values)?;
        if self.sft.resume == Resume::WeightsOnly {
            self.optimizer = Optimizer::new(
                self.sft.options.rule.clone(),
                self.sft.options.groups,
                &model.trainables(),
            )?;
            self.notes
                .push("weights only: the optimizer is new and the run starts at step 0".to_owned());
            return Ok(());
        }
        let state = checkpoint.state;
        state.check_inputs(&self.inputs, &[])?;
        let changes = state.environment_changes(&self.environment);
        self.notes.extend(
            changes
                .into_iter()
                .map(|change| format!("{change}: the bits may differ from here on")),
        );
        self.optimizer.restore(
            &resume::arrays(&checkpoint.optimizer)?,
            &values,
            state.position.optimizer_t,
        )?;

        let step = state.position.step as usize;
        self.cursor = Cursor {
            epoch: state.data.epoch,
            window_index: state.data.window_index as usize,
        };
        self.position = Position {
            step,
            micro_step: state.position.micro_step as usize,
            epoch: self.epoch_now()?,
        };
        let kept = resume::plain(&state.accumulators);
        let list = |name: &str| kept.get(name).cloned().unwrap_or_default();
        self.interval.resume_from(&kept);
        self.interval.tokens = state.counters.trained_tokens;
        self.interval.tokens_total = state.counters.total_tokens;
        self.interval.examples = state.counters.examples;
        self.interval.skipped_steps = state.counters.skipped_steps;
        self.guard = Guard::with_memory(&list("grad_norms"), state.counters.consecutive_skipped_steps as usize);
        self.last_loss = list("last_loss").first().copied();
        self.adapter_step = list("adapter_step").first().map(|&step| step as usize);
        let without_new = list("evaluations_without_new_best").first().map_or(0, |&n| n as usize);
        let best = state.best.as_ref().map(|best| (best.step as usize, best.val_loss.0));
        self.best.restore(best, without_new);
        self.evaluated_at = Some(step);
        self.saved_at = Some(step);
        self.metrics_offset = state.metrics_offset;
        self.saved_again = Some(self.saved_before(dir)?);
        Ok(())
    }

    /// The report of a checkpoint that an earlier process wrote.
    fn saved_before(&self, dir: &Path) -> Result<SaveReport> {
        let is_full = self.sft.options.tuning == Tuning::Full;
        let trained = dir.join(if is_full {
            "model.safetensors.index.json"
        } else {
            "adapters.safetensors"
        });
        let io = |source| Error::Io {
            path: trained.clone(),
            action: "read",
            source,
        };
        let sha256 = hash::sha256_file(&trained).map_err(io)?;
        Ok(SaveReport {
            position: self.position,
            path: dir.to_owned(),
            sha256,
            seconds: 0.0,
        })
    }

    /// Whether the run would save its state at this step without being interrupted.
    fn saves_here_anyway(&self) -> bool {
        let is_best =
            self.sft.options.save_best && self.best.found().is_some_and(|(step, _)| step == self.position.step);
        is_best || self.is_due(self.sft.options.checkpoint_every)
    }

    fn epoch_now(&self) -> Result<f64> {
        let windows = self.plan.windows_in_epoch(self.cursor.epoch)?;
        Ok(self.cursor.epoch as f64 + self.cursor.window_index as f64 / windows as f64)
    }

    fn is_finished_already(&self) -> bool {
        self.position.step >= self.schedule.total_steps || self.best.is_exhausted()
    }

    /// Says what is going to happen, and takes the first evaluation.
    fn start(&mut self, model: &Model) -> Result<()> {
        let plan = self.run_plan(model, self.modules.clone())?;
        self.files.metrics().cut(self.metrics_offset)?;
        if self.sft.options.tensorboard {
            self.files.start_tensorboard()?;
        }
        if let Some(report) = self.saved_again.take().filter(|_| self.saves_here_anyway()) {
            self.files
                .record(&Record::of_save(&report, &checkpoint_name(&report.path)))?;
        }
        if self.position.step == 0 {
            if let Some(config) = self.sft.config {
                self.files.write("config.toml", config.to_toml().as_bytes())?;
            }
            self.files.write_plan(&plan, self.sft.train, self.sft.valid)?;
            self.files.record(&Record::of_plan(&plan, &self.sft.context))?;
        }
        self.observer.on_event(&Event::Started(Box::new(plan)));
        for note in &self.notes {
            self.observer.on_event(&Event::Note(note.clone()));
        }
        self.evaluate(model)
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
        self.position.epoch = self.epoch_now()?;
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
        self.files.record(&Record::of_train(&report))?;
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
        self.files.record(&Record::of_eval(&report))?;
        self.observer.on_event(&Event::Evaluated(report));
        if is_best && options.save_best && self.position.step > 0 {
            self.save_adapter(model)?;
            self.save_checkpoint(model)?;
        }
        if self.best.is_exhausted() && self.end.is_none() {
            self.end = Some(End::StoppedEarly);
        }
        Ok(())
    }

    /// Writes the adapter into the output folder.
    fn save_adapter(&mut self, model: &Model) -> Result<()> {
        let report = self
            .files
            .save_adapter(model, &self.sft.options.tuning, self.position)?;
        self.files.record(&Record::of_save(&report, "adapters.safetensors"))?;
        self.observer.on_event(&Event::Saved(report));
        self.adapter_step = Some(self.position.step);
        Ok(())
    }

    /// Writes everything that is needed to go on from here.
    fn save_checkpoint(&mut self, model: &Model) -> Result<()> {
        if self.saved_at == Some(self.position.step) {
            return Ok(());
        }
        let started = std::time::Instant::now();
        let checkpoint = Checkpoint {
            adapter: adapter_of(model, &self.sft.options.tuning)?,
            optimizer: self
                .optimizer
                .state()?
                .iter()
                .map(|(n, a)| Ok((n.clone(), to_host(a)?)))
                .collect::<Result<_>>()?,
            state: self.state()?,
        };
        let saved = self.files.save_checkpoint(&checkpoint, self.sft.options.keep_last)?;
        self.saved_at = Some(self.position.step);
        let report = SaveReport {
            position: self.position,
            path: saved.dir,
            sha256: saved.sha256,
            seconds: started.elapsed().as_secs_f64(),
        };
        self.files
            .record(&Record::of_save(&report, &checkpoint_name(&report.path)))?;
        self.observer.on_event(&Event::Saved(report));
        Ok(())
    }

    fn state(&mut self) -> Result<RunState> {
        let (norms, refused) = self.guard.memory();
        let mut accumulators = self.interval.unfinished();
        accumulators.insert("grad_norms".to_owned(), norms);
        accumulators.insert("last_loss".to_owned(), self.last_loss.into_iter().collect());
        accumulators.insert(
            "adapter_step".to_owned(),
            self.adapter_step.iter().map(|&step| step as f64).collect(),
        );
        accumulators.insert(
            "evaluations_without_new_best".to_owned(),
            vec![self.best.without_new() as f64],
        );
        let snapshot = Snapshot {
            options: &self.sft.options,
            inputs: &self.inputs,
            environment: &self.environment,
            position: SavedPosition {
                step: self.position.step as u64,
                optimizer_t: self.optimizer.count()?,
                micro_step: self.position.micro_step as u64,
                epoch: self.cursor.epoch,
            },
            window_index: self.cursor.window_index,
            schedule: &self.schedule,
            best: self.best.found().map(|(step, loss)| SavedBest {
                step: step as u64,
                val_loss: ExactF64(loss),
                patience_left: self.best.patience_left().unwrap_or(0) as u64,
                dir: format!("step-{step:07}"),
            }),
            counters: Counters {
                trained_tokens: self.interval.tokens,
                total_tokens: self.interval.tokens_total,
                examples: self.interval.examples,
                skipped_steps: self.interval.skipped_steps,
                consecutive_skipped_steps: refused as u64,
                ema_loss: None,
            },
            weights: &self.weights,
            accumulators,
            metrics_offset: self.files.metrics().offset(),
        };
        Ok(snapshot.to_state())
    }

    /// The last evaluation, the state, and the adapter that the run leaves behind.
    fn finish(mut self, model: &Model) -> Result<Summary> {
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
        }
        let keeps_best = self.sft.valid.is_some() && self.sft.options.save_best && self.adapter_step.is_some();
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

    fn summary(&self, end: End) -> Summary {
        Summary {
            end,
            position: self.position,
            last_loss: self.last_loss,
            best: self.best.found(),
            adapter_step: self.adapter_step.unwrap_or(self.position.step),
            tokens: self.interval.tokens,
            skipped_steps: self.interval.skipped_steps,
            elapsed_seconds: self.interval.elapsed_seconds(),
            out: self.sft.out.to_owned(),
        }
    }

    fn is_due(&self, every: Option<usize>) -> bool {
        every.is_some_and(|n| self.position.step.is_multiple_of(n))
    }
}

/// An output folder that is ready to be written to.
struct Opened {
    files: RunDir,
    /// What to go on from, and its directory.
    checkpoint: Option<(PathBuf, Checkpoint)>,
    /// What to say about it.
    notes: Vec<String>,
}

fn open(sft: &Sft<'_>) -> Result<Opened> {
    if sft.resume == Resume::Fresh {
        return Ok(Opened {
            files: RunDir::create(sft.out)?,
            checkpoint: None,
            notes: Vec::new(),
        });
    }
    let verify = if sft.options.tuning == Tuning::Full {
        Verify::SizesOnly
    } else {
        Verify::Everything
    };
    let (checkpoints, found) = RunDir::find(sft.out, verify)?;
    let note = found.to_string();
    Ok(Opened {
        files: RunDir::of(checkpoints)?,
        checkpoint: found.found,
        notes: vec![note],
    })
}

fn checkpoint_name(dir: &Path) -> String {
    format!("checkpoints/{}", dir.file_name().unwrap_or_default().to_string_lossy())
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
