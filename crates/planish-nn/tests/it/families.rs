//! Tiny models of many families against what Hugging Face's own classes compute: a folder of goldens beside the checkout
//! (`shared/models/families`, or `PLANISH_FAMILIES`), whose README says what is in them.
//!
//! `cargo xtask parity --only families` prints the table. Families that planish does not read are listed and skipped.

use std::path::{Path, PathBuf};

use planish_checkpoint::adapter::{Adapter, ReadOptions};
use planish_core::arch::Mixer;
use planish_core::model_config::ModelConfig;
use planish_mlx::transforms::value_and_grad;
use planish_mlx::{Array, host};
use planish_nn::{AttentionMask, Error, Kernels, KvCache, LoadOptions, Model, Training};
use planish_tensors::TensorStore;

use crate::goldens::integers;
use crate::{largest, logits, max_difference};

/// Of the largest entry of each tensor; torch and MLX agree to 2e-5.
const GRADIENT_TOLERANCE: f32 = 1e-3;
/// Tokens that go through the cache, past every window.
const STEPS: usize = 150;

/// How far one model is from its golden, over the largest logit or gradient.
struct Row {
    name: String,
    tolerance: f32,
    logits: f32,
    padded: f32,
    adapter: f32,
    /// `None` where even the reference differs: the rotation depends on the length of the whole sequence.
    cached: Option<f32>,
    /// `None` where the golden has none.
    gradients: Option<f32>,
}

#[test]
fn golden_hugging_face_families() {
    let Some(folder) = goldens() else {
        eprintln!("skipped: no shared/models/families beside the checkout");
        return;
    };
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    dirs.sort();
    println!("| model | kernels | logits | padded | adapter | cached | gradients |\n|---|---|---|---|---|---|---|");
    let mut wrong = Vec::new();
    for dir in dirs.iter().filter(|dir| dir.join("golden.json").is_file()) {
        let name = dir.file_name().unwrap().to_string_lossy();
        match ModelConfig::from_file(&dir.join("config.json")) {
            Ok(config) if config.quantization.is_none() => {}
            Ok(_) => {
                println!("| {name} | quantised: not compared |||||");
                continue;
            }
            Err(_) => {
                println!("| {name} | another family |||||");
                continue;
            }
        }
        for kernels in [Kernels::Composed, Kernels::Native] {
            let row = check(dir, kernels);
            println!("{}", row.line());
            wrong.extend((!row.is_right()).then(|| row.line()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Rotary settings as programs and people write them, against what transformers makes of them.
#[test]
fn golden_hugging_face_rope_settings() {
    const TOKENS: [u32; 11] = [1, 45, 67, 89, 101, 150, 260, 2, 10, 1, 77];
    let options = LoadOptions {
        kernels: Some(Kernels::Composed),
        ..LoadOptions::default()
    };
    for case in ["rope-settings-passed-over", "theta-inside-rope-scaling"] {
        let Some(dir) = beside("cases").map(|cases| cases.join(case)) else {
            eprintln!("skipped: no shared/cases beside the checkout");
            return;
        };
        let (model, _) = Model::load(&dir, &options).unwrap();
        let want = TensorStore::open(&dir.join("want.safetensors")).unwrap();
        let expect = floats(&want, "logits");
        let difference = max_difference(&logits(&model, &[&TOKENS]), &expect) / largest(&expect);
        assert!(difference < 1e-4, "{case}: {difference}");
    }
}

/// `PLANISH_FAMILIES`, or the folder beside the checkout.
fn goldens() -> Option<PathBuf> {
    match std::env::var_os("PLANISH_FAMILIES") {
        Some(folder) => Some(folder.into()),
        None => beside("models/families"),
    }
}

/// A folder of `shared`, beside an ancestor of this crate.
fn beside(name: &str) -> Option<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let beside = here.ancestors().map(|ancestor| ancestor.join("shared").join(name));
    beside.into_iter().find(|folder| folder.is_dir())
}

fn check(dir: &Path, kernels: Kernels) -> Row {
    let options = LoadOptions {
        kernels: Some(kernels),
        ..LoadOptions::default()
    };
    let (mut model, _) = Model::load(dir, &options).unwrap();
    let golden = TensorStore::open(&dir.join("golden.safetensors")).unwrap();
    let facts: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
    let prompt = integers(&golden, "prompt.tokens");
    let positions = integers(&golden, "prompt.positions");
    let expect = floats(&golden, "prompt.logits");
    let largest_logit = facts["largest_logit"].as_f64().unwrap() as f32;
    let of = |found: &[f32], expect: &[f32]| max_difference(found, expect) / largest_logit;

    let vocab_size = model.config().arch.vocab_size;
    let at = |all: &[f32], positions: &[u32]| -> Vec<f32> {
        let rows = positions.iter().map(|&position| position as usize * vocab_size);
        rows.flat_map(|start| all[start..start + vocab_size].to_vec()).collect()
    };
    let whole = logits(&model, &[&prompt]);
    let prompt_difference = of(&at(&whole, &positions), &expect);
    let cached =
        is_constant(&model).then(|| of(&cached_logits(&model, &prompt[..STEPS]), &whole[..STEPS * vocab_size]));

    let (adapter, _) = Adapter::read(&dir.join("adapter"), &ReadOptions::default()).unwrap();
    let batch = golden.get("batch.tokens").is_some().then(|| Batch::of(&golden));
    let padded = batch
        .as_ref()
        .map(|batch| of(&batch.logits(&model), &floats(&golden, "batch.logits")));
    model.attach_adapter(&adapter).unwrap();
    let adapted = at(&logits(&model, &[&prompt]), &integers(&golden, "adapter.positions"));
    let gradients = dir.join("grads.safetensors").is_file().then(|| {
        let expect = TensorStore::open(&dir.join("grads.safetensors")).unwrap();
        batch.as_ref().unwrap().worst_gradient(&mut model, &expect)
    });
    Row {
        name: format!("{} | {kernels:?}", dir.file_name().unwrap().to_string_lossy()),
        tolerance: facts["tolerance"].as_f64().unwrap() as f32,
        logits: prompt_difference,
        padded: padded.unwrap_or(0.0),
        adapter: of(&adapted, &floats(&golden, "adapter.logits")),
        cached,
        gradients,
    }
}

impl Row {
    fn is_right(&self) -> bool {
        let logits = [self.logits, self.padded, self.adapter, self.cached.unwrap_or(0.0)];
        logits.iter().all(|difference| *difference <= self.tolerance)
            && self.gradients.is_none_or(|difference| difference <= GRADIENT_TOLERANCE)
    }

    fn line(&self) -> String {
        let optional = |number: Option<f32>| number.map_or("–".to_owned(), |number| format!("{number:.1e}"));
        format!(
            "| {} | {:.1e} | {:.1e} | {:.1e} | {} | {} |",
            self.name,
            self.logits,
            self.padded,
            self.adapter,
            optional(self.cached),
            optional(self.gradients)
        )
    }
}

/// Rows of different lengths, padded on the right.
struct Batch {
    tokens: Vec<u32>,
    lengths: Vec<u32>,
    prompt_lengths: Vec<u32>,
}

impl Batch {
    fn of(golden: &TensorStore) -> Self {
        Self {
            tokens: integers(golden, "batch.tokens"),
            lengths: integers(golden, "batch.lengths"),
            prompt_lengths: integers(golden, "batch.prompt_lengths"),
        }
    }

    fn width(&self) -> usize {
        self.tokens.len() / self.lengths.len()
    }

    fn rows(&self) -> Vec<&[u32]> {
        self.tokens.chunks(self.width()).collect()
    }

    /// Of the tokens that are no padding.
    fn logits(&self, model: &Model) -> Vec<f32> {
        let all = logits(model, &self.rows());
        let by_row = all.chunks(all.len() / self.lengths.len());
        let real = by_row
            .zip(&self.lengths)
            .flat_map(|(row, &length)| &row[..row.len() / self.width() * length as usize]);
        real.copied().collect()
    }

    /// Largest difference of a gradient of the loss, over the largest entry of its tensor.
    fn worst_gradient(&self, model: &mut Model, expect: &TensorStore) -> f32 {
        let (names, arrays): (Vec<String>, Vec<Array>) = model.trainables().into_iter().unzip();
        let everything: Vec<usize> = (0..arrays.len()).collect();
        let loss = |arrays: &[Array]| {
            model.set_trainables(arrays)?;
            Ok::<_, Error>(vec![self.loss(model)?])
        };
        let (_, gradients) = value_and_grad(loss, &arrays, &everything).unwrap();
        let differences = names.iter().zip(gradients).map(|(name, gradient)| {
            let expect = floats(expect, name);
            max_difference(&host::to_f32_vec(&gradient).unwrap(), &expect) / largest(&expect)
        });
        differences.fold(0.0, f32::max)
    }

    /// Mean of −log p over the tokens after each row's prompt.
    fn loss(&self, model: &Model) -> planish_nn::Result<Array> {
        let ids = model.token_array(&self.rows())?;
        let hidden = model.hidden_for_training(&ids, &AttentionMask::Causal, Training::default())?;
        let logits = model.logits(&hidden)?; // [b, s, v]
        let mut targets: Vec<i32> = self.tokens[1..].iter().map(|&token| token as i32).collect();
        targets.push(0);
        let (rows, width) = (self.lengths.len() as i32, self.width());
        let targets = Array::from_slice(&targets, &[rows, width as i32, 1]);
        let spans = self.lengths.iter().zip(&self.prompt_lengths);
        let counted = spans.flat_map(|(&length, &prompt)| {
            (1..=width as u32).map(move |target| f32::from(u8::from((prompt..length).contains(&target))))
        });
        let counted: Vec<f32> = counted.collect();
        let n_counted = counted.iter().sum::<f32>();
        let counted = Array::from_slice(&counted, &[rows, width as i32, 1]);
        let nll = logits
            .logsumexp_axis(-1, true)?
            .subtract(logits.take_along_axis(targets, -1)?)?;
        Ok(nll.multiply(counted)?.sum(None)?.divide(Array::from_f32(n_counted))?)
    }
}

/// Ten tokens at once, the others one by one.
fn cached_logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let (prompt, rest) = tokens.split_at(10);
    let mut cache = KvCache::new();
    let chunks = std::iter::once(prompt).chain(rest.chunks(1));
    let of_chunk = |chunk: &[u32]| {
        let ids = model.token_array(&[chunk]).unwrap();
        let hidden = model.hidden(&ids, &AttentionMask::Causal, Some(&mut cache)).unwrap();
        host::to_f32_vec(&model.logits(&hidden).unwrap()).unwrap()
    };
    chunks.flat_map(of_chunk).collect()
}

/// Whether no rotation depends on the length of these sequences.
fn is_constant(model: &Model) -> bool {
    model.config().arch.layers.iter().all(|layer| match &layer.mixer {
        Mixer::Attention(attention) => attention
            .rope
            .as_ref()
            .is_none_or(|rope| rope.constant_up_to() >= 2 * STEPS),
    })
}

fn floats(store: &TensorStore, name: &str) -> Vec<f32> {
    store.require(name).unwrap().to_f32().unwrap()
}
