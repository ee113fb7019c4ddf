//! The loop that every recipe runs in.

mod saving;
mod trial;
mod under_way;

use std::path::Path;
use std::rc::Rc;

use planish_checkpoint::run_state::Input;
use planish_core::run_config::RunConfig;
use planish_data::{Dataset, Tokenizer};
use planish_nn::Model;
use serde_json::{Map, Value};

use crate::Result;
use crate::events::{End, Observer, StopFlag, Summary};
use crate::objective::Objective;
use crate::options::TrainOptions;
use crate::resume::{Identity, Resume};
use under_way::UnderWay;

/// A training run: a model, a data set and [`TrainOptions`] become an adapter in a folder.
///
/// The [recipe](crate::Recipe) decides what is minimised over windows of `batch_size · accumulation` rows; supervised
/// fine-tuning minimises `Σ ω·CE / N`, `N` the trained tokens of the window, known before its first micro-batch. Writes `adapters.safetensors`, `adapter_config.json` (mlx-lm's layout), `planish.json`,
/// `metrics.jsonl` and `plan.json` into the output folder; see [`TrainOptions`] for what can be chosen.
///
/// # Example
/// ```no_run
/// use planish_data::{ChatTemplate, DataOptions, Dataset, TemplateOptions, Tokenizer};
/// use planish_nn::{LoadOptions, Model};
/// use planish_train::{Event, TrainOptions, Trainer};
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
/// let summary = Trainer::new(TrainOptions::default(), &train, "out".as_ref()).run(&mut model, &mut print)?;
/// println!("{} tokens", summary.tokens);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Trainer<'a> {
    options: TrainOptions,
    train: &'a Dataset,
    valid: Option<&'a Dataset>,
    out: &'a Path,
    stop: StopFlag,
    config: Option<&'a RunConfig>,
    context: Map<String, Value>,
    resume: Resume,
    accepted: Vec<Input>,
    identity: Identity,
    base: Option<&'a Path>,
    samples: Option<(&'a Tokenizer, usize, usize)>,
    files: Vec<(String, Vec<u8>)>,
    memory_budget: Option<u64>,
    flops_per_second: Option<f64>,
    objective: Option<Rc<dyn Objective>>,
}

impl<'a> Trainer<'a> {
    /// A run on `train` that writes into `out`, which must be empty or not exist.
    pub fn new(options: TrainOptions, train: &'a Dataset, out: &'a Path) -> Self {
        Self {
            options,
            train,
            valid: None,
            out,
            stop: StopFlag::default(),
            config: None,
            context: Map::new(),
            resume: Resume::Fresh,
            accepted: Vec::new(),
            identity: Identity::default(),
            base: None,
            samples: None,
            files: Vec::new(),
            memory_budget: None,
            flops_per_second: None,
            objective: None,
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

    /// Inputs that may differ from those of the checkpoint that the run goes on from. It keeps its place in the data, the
    /// schedule and the optimizer, but is no longer the run that it would have been. The plan of batches follows from the
    /// data and the configuration, and may differ with them.
    pub fn accept_changed(mut self, inputs: &[Input]) -> Self {
        self.accepted = inputs.to_vec();
        self
    }

    /// What stands for the base model, the tokenizer and the template, compared when the run goes on.
    pub fn identity(mut self, identity: Identity) -> Self {
        self.identity = identity;
        self
    }

    /// The folder of the model that is trained. What the run writes then names it, and a full fine-tune is a model folder like
    /// it.
    pub fn base(mut self, base: &'a Path) -> Self {
        self.base = Some(base);
        self
    }

    /// Lets the model answer the first `count` prompts of the validation set (else of the training set) before and after,
    /// with at most `max_tokens` tokens each.
    pub fn samples(mut self, tokenizer: &'a Tokenizer, count: usize, max_tokens: usize) -> Self {
        self.samples = (count > 0 && max_tokens > 0).then_some((tokenizer, count, max_tokens));
        self
    }

    /// Another file to write into the output folder at the start.
    pub fn file(mut self, name: &str, bytes: Vec<u8>) -> Self {
        self.files.push((name.to_owned(), bytes));
        self
    }

    /// Bytes that the run may use, instead of what the machine recommends.
    pub fn memory_budget(mut self, bytes: u64) -> Self {
        self.memory_budget = Some(bytes);
        self
    }

    /// Speed of a device that ends work which takes it long, as the watchdog of a Mac's display does: micro-batches are cut so
    /// that no piece of work does.
    pub fn bound_work(mut self, flops_per_second: f64) -> Self {
        self.flops_per_second = Some(flops_per_second);
        self
    }

    /// Minimises an objective of your own instead of that of [`TrainOptions::recipe`].
    pub fn objective(mut self, objective: Rc<dyn Objective>) -> Self {
        self.objective = Some(objective);
        self
    }

    /// Trains `model` and leaves it with the last values.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for settings, [`Error::Diverged`](crate::Error::Diverged) when three updates
    /// in a row are not finite, [`Error::NotFinite`](crate::Error::NotFinite) when an evaluation or the end is not, and
    /// those of the model, the data and the files. A run that fails before its first update leaves nothing behind.
    pub fn run(self, model: &mut Model, observer: &mut dyn Observer) -> Result<Summary> {
        let mut run = UnderWay::prepare(&self, model, observer)?;
        if run.is_finished_already() {
            return Ok(run.summary(End::AlreadyFinished));
        }
        let trained = run.start(model).and_then(|()| run.train(model));
        match trained.and_then(|()| run.finish(model)) {
            Ok(summary) => Ok(summary),
            Err(error) => Err(run.fail(error)),
        }
    }
}
