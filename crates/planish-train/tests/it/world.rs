//! The tiny model, small data sets, and runs over them.

use std::path::{Path, PathBuf};

use mlx_rs::Array;
use planish_core::target_modules::{Blocks, TargetModules};
use planish_data::{ChatTemplate, DataOptions, Dataset, TemplateOptions, Tokenizer};
use planish_nn::{Kernels, LoadOptions, LoraConfig, LoraScale, Model};
pub(crate) use planish_testkit::{chat, tiny_model as tiny_dir};
use planish_train::{Event, Length, Summary, TrainOptions, Trainer, Tuning};

pub(crate) fn tiny_model() -> Model {
    Model::load(tiny_dir(), &LoadOptions::with_kernels(Kernels::Composed))
        .unwrap()
        .0
}

/// A folder that is removed at the end, for data and outputs.
pub(crate) struct World {
    dir: tempfile::TempDir,
}

impl World {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes rows and reads them as a data set.
    pub(crate) fn data(&self, name: &str, rows: &[String]) -> Dataset {
        self.data_with(
            name,
            rows,
            &DataOptions {
                max_seq_length: 128,
                ..DataOptions::default()
            },
        )
    }

    pub(crate) fn data_with(&self, name: &str, rows: &[String], options: &DataOptions) -> Dataset {
        let path = self.path(name);
        std::fs::write(&path, rows.join("\n")).unwrap();
        let tokenizer = Tokenizer::from_dir(tiny_dir()).unwrap();
        let template = ChatTemplate::from_dir(tiny_dir(), &tokenizer, &TemplateOptions::default()).unwrap();
        Dataset::load(&path, &tokenizer, template.as_ref(), options).unwrap().0
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    /// The lines of a run's metrics.
    pub(crate) fn metrics(&self, out: &str) -> Vec<serde_json::Value> {
        let text = String::from_utf8(self.read(&format!("{out}/metrics.jsonl"))).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// Rows of very different lengths.
pub(crate) fn uneven_rows(n: usize) -> Vec<String> {
    let words = [
        "tea",
        "Emma",
        "a walk",
        "the letter",
        "Mr. Knightley",
        "very well",
        "Bath",
        "so much",
    ];
    (0..n)
        .map(|i| {
            let answer: Vec<&str> = (0..1 + (i * 7) % 23)
                .map(|j| words[(i + j * j) % words.len()])
                .collect();
            chat(&format!("What of {}?", words[i % words.len()]), &answer.join(" and "))
        })
        .collect()
}

/// LoRA of rank 4 on everything, a short constant schedule, nothing random but the order.
pub(crate) fn options(steps: usize) -> TrainOptions {
    TrainOptions {
        tuning: Tuning::Adapters(Box::new(lora())),
        length: Length::Steps(steps),
        max_seq_length: 128,
        learning_rate: 5e-3,
        warmup_steps: Some(0),
        report_every: 1,
        ..TrainOptions::default()
    }
}

pub(crate) fn lora() -> LoraConfig {
    LoraConfig {
        rank: 4,
        scale: LoraScale::Alpha(8.0),
        targets: TargetModules::new(["all-linear"], Blocks::All),
        ..LoraConfig::default()
    }
}

/// A run with its trained values and events.
pub(crate) struct Trained {
    pub(crate) summary: Summary,
    pub(crate) model: Model,
    pub(crate) events: Vec<Event>,
}

impl Trained {
    pub(crate) fn losses(&self) -> Vec<f64> {
        let loss = |event: &Event| match event {
            Event::Step(step) => Some(step.loss),
            _ => None,
        };
        self.events.iter().filter_map(loss).collect()
    }

    pub(crate) fn values(&self) -> Vec<Vec<f32>> {
        values(&self.model.trainables())
    }
}

pub(crate) fn values(named: &[(String, Array)]) -> Vec<Vec<f32>> {
    named
        .iter()
        .map(|(_, value)| planish_mlx::host::to_f32_vec(value).unwrap())
        .collect()
}

pub(crate) fn train(options: TrainOptions, data: &Dataset, valid: Option<&Dataset>, out: &Path) -> Trained {
    train_model(tiny_model(), options, data, valid, out)
}

pub(crate) fn train_model(
    mut model: Model,
    options: TrainOptions,
    data: &Dataset,
    valid: Option<&Dataset>,
    out: &Path,
) -> Trained {
    let mut events = Vec::new();
    let mut sft = Trainer::new(options, data, out);
    if let Some(valid) = valid {
        sft = sft.valid(valid);
    }
    let summary = sft
        .run(&mut model, &mut |event: &Event| events.push(event.clone()))
        .unwrap();
    Trained { summary, model, events }
}

/// `‖a − b‖ / ‖b‖` over all tensors together.
pub(crate) fn relative_distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    let square = |x: f64| x * x;
    let pairs = || a.iter().flatten().zip(b.iter().flatten());
    let off: f64 = pairs().map(|(&x, &y)| square(f64::from(x) - f64::from(y))).sum();
    let size: f64 = pairs().map(|(_, &y)| square(f64::from(y))).sum();
    (off / size).sqrt()
}
