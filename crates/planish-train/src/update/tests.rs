use std::path::Path;

use planish_data::{BatchPlan, ChatTemplate, DataOptions, Dataset, PlanOptions, TemplateOptions, Tokenizer};
use planish_loss::{TokenLossOptions, cross_entropy, weighted_sum};
use planish_nn::{Kernels, LoadOptions, LoraConfig};

use super::*;
use crate::objective::Tokens;
use crate::objectives::Sft;
use crate::optimizer::{Groups, Rule};
use crate::weighting::ExampleWeights;

fn tiny(kernels: Kernels, n_rows: usize, nudge: f32) -> (Model, Dataset) {
    let dir = Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../planish-nn/tests/fixtures/tiny-llama-1m"
    ));
    let options = LoadOptions::with_kernels(kernels);
    let (mut model, _) = Model::load(dir, &options).unwrap();
    model
        .attach_lora(
            &LoraConfig {
                rank: 2,
                ..LoraConfig::default()
            },
            3,
        )
        .unwrap();
    // B = 0 has no gradient for A; move away from it.
    let moved: Vec<Array> = model
        .trainables()
        .iter()
        .enumerate()
        .map(|(i, (_, v))| nudged(v, i, nudge))
        .collect();
    model.set_trainables(&moved).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("train.jsonl");
    let row = |q: &str, a: &str| {
        format!(r#"{{"messages": [{{"role": "user", "content": "{q}"}}, {{"role": "assistant", "content": "{a}"}}]}}"#)
    };
    let rows = [
        row("What?", "Tea."),
        row("Who is there now?", "It is Emma, and Mr. Knightley with her."),
        row("Where?", "In Bath."),
        row("When?", "In the morning, before the others are down."),
        row("Is it far?", "Not at all."),
        row("Will Harriet come?", "She will, if the weather allows it."),
        row("And her letter?", "It is on the table."),
        row("Why?", "I cannot tell."),
    ];
    planish_core::fs::write_atomic(&file, rows[..n_rows].join("\n").as_bytes()).unwrap();
    let tokenizer = Tokenizer::from_dir(dir).unwrap();
    let template = ChatTemplate::from_dir(dir, &tokenizer, &TemplateOptions::default()).unwrap();
    let options = DataOptions {
        max_seq_length: 64,
        ..DataOptions::default()
    };
    (
        model,
        Dataset::load(&file, &tokenizer, template.as_ref(), &options).unwrap().0,
    )
}

fn nudged(value: &Array, seed: usize, size: f32) -> Array {
    let noise: Vec<f32> = (0..value.size())
        .map(|i| ((i * 37 + seed * 11) % 17) as f32 / 8.0 - 1.0)
        .collect();
    let noise: Vec<f32> = noise.iter().map(|x| x * size).collect();
    value.add(Array::from_slice(&noise, value.shape())).unwrap()
}

/// `Σ ω·CE / N` through the ordinary full logits.
fn plain_objective(model: &Model, window: &Window, weight: &dyn Fn(usize) -> f64) -> Array {
    let mut total = Array::from_f32(0.0);
    for batch in &window.micro_batches {
        let tokens = Tokens::collate(batch, Fill::Exact).unwrap().0;
        let (ids, mask) = (tokens.ids(), tokens.mask());
        let shape = [batch.rows as i32, batch.length as i32];
        let logits = model.logits(&model.hidden(ids, &mask, None).unwrap()).unwrap();
        let targets = Array::from_slice(&batch.targets, &shape);
        let weights = Array::from_slice(&batch.weighted(weight), &shape);
        let loss = cross_entropy(&logits, &targets, &TokenLossOptions::default()).unwrap();
        total = total.add(weighted_sum(&loss.objective, &weights).unwrap()).unwrap();
    }
    total.divide(Array::from_f32(window.target_tokens as f32)).unwrap()
}

#[test]
fn gradient_matches_full_logits_and_finite_differences() {
    let (mut model, data) = tiny(Kernels::Composed, 3, 0.016);
    let options = TrainOptions {
        batch_size: 2,
        accumulation: 2,
        max_seq_length: 64,
        chunk_tokens: Some(5),
        ..TrainOptions::default()
    };
    let plan = BatchPlan::new(
        &data,
        &PlanOptions {
            batch_size: 2,
            accumulation: 2,
            max_seq_length: 64,
            ..PlanOptions::default()
        },
    )
    .unwrap();
    let window = plan.window(&data, 0, 0).unwrap();
    let of_examples = [0.5, 1.25, 2.0];
    let weights = ExampleWeights::fixed(&of_examples);
    let about = About {
        options: &options,
        data: Some(&data),
        weights: &weights,
    };
    let weight = |example: usize| of_examples[example];
    let named = model.trainables();
    let optimizer = Optimizer::new(Rule::adamw(), Groups::default(), &named).unwrap();
    let (found, _) = gradients_of(&mut model, &optimizer, &window, &about);

    let start: Vec<Array> = named.iter().map(|(_, v)| v.clone()).collect();
    let all: Vec<usize> = (0..start.len()).collect();
    let (_, plain) = value_and_grad(
        |values: &[Array]| {
            model.set_trainables(values)?;
            Ok::<_, Error>(vec![plain_objective(&model, &window, &weight)])
        },
        &start,
        &all,
    )
    .unwrap();
    let plain: Vec<f32> = plain
        .iter()
        .flat_map(|g| planish_mlx::host::to_f32_vec(g).unwrap())
        .collect();
    let norm = |v: &[f32]| v.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let off: Vec<f32> = found.iter().zip(&plain).map(|(a, b)| a - b).collect();
    assert!(norm(&off) <= 1e-5 * norm(&plain), "{} of {}", norm(&off), norm(&plain));

    // Along the gradient itself the directional derivative is its norm.
    let along = |sign: f64| {
        let h = 2e-3;
        let mut at = 0;
        let moved: Vec<Array> = start
            .iter()
            .map(|value| {
                let own = &plain[at..at + value.size()];
                at += value.size();
                let step: Vec<f32> = own
                    .iter()
                    .map(|&g| (f64::from(g) * sign * h / norm(&plain)) as f32)
                    .collect();
                value.add(Array::from_slice(&step, value.shape())).unwrap()
            })
            .collect();
        model.clone().set_trainables(&moved).unwrap();
        let mut other = model.clone();
        other.set_trainables(&moved).unwrap();
        f64::from(plain_objective(&other, &window, &weight).item_exact::<f32>())
    };
    let difference = (along(1.0) - along(-1.0)) / (2.0 * 2e-3);
    assert!(
        (difference / norm(&plain) - 1.0).abs() < 1e-2,
        "{difference} is not {}",
        norm(&plain)
    );
}

/// The summed gradient of a window, flat, and its losses.
fn gradients_of(model: &mut Model, optimizer: &Optimizer, window: &Window, about: &About<'_>) -> (Vec<f32>, Losses) {
    let mut updates = Updates::new(model, Rc::new(Sft), about.options).unwrap();
    let (summed, figures) = updates.gradients(model, optimizer, window, about, 0).unwrap();
    let mut losses = Losses::default();
    for (figures, counted) in &figures {
        losses.add(&Sft, figures, counted, about).unwrap();
    }
    let gradient = planish_mlx::host::to_f32_vec(&summed.gradients.arrays()[0]).unwrap();
    (gradient, losses)
}

/// The gradient of one window over eight rows, flat, and its loss.
fn of_window(kernels: Kernels, options: &TrainOptions, reversed: bool, nudge: f32) -> (Vec<f32>, f64) {
    let (mut model, data) = tiny(kernels, 8, nudge);
    let plan = PlanOptions {
        batch_size: options.batch_size,
        accumulation: options.accumulation,
        max_seq_length: 64,
        packing: options.packing,
        ..PlanOptions::default()
    };
    let mut window = BatchPlan::new(&data, &plan).unwrap().window(&data, 0, 0).unwrap();
    assert_eq!(window.examples, 8);
    if reversed {
        window.micro_batches = window.micro_batches.iter().map(reversed_rows).collect();
    }
    let optimizer = Optimizer::new(Rule::adamw(), Groups::default(), &model.trainables()).unwrap();
    let weights = ExampleWeights::fixed(&[0.5, 1.25, 2.0, 1.0, 0.75, 1.5, 0.25, 0.75]);
    let about = About {
        options,
        data: Some(&data),
        weights: &weights,
    };
    let (gradient, losses) = gradients_of(&mut model, &optimizer, &window, &about);
    (gradient, losses.weighted_sum)
}

/// The same batch with its rows in the other order.
fn reversed_rows(batch: &Batch) -> Batch {
    fn flip<T: Copy>(values: &[T], length: usize) -> Vec<T> {
        values.chunks(length).rev().flatten().copied().collect()
    }
    let mut other = batch.clone();
    other.inputs = flip(&batch.inputs, batch.length);
    other.targets = flip(&batch.targets, batch.length);
    other.target_weights = flip(&batch.target_weights, batch.length);
    other
        .segments
        .iter_mut()
        .for_each(|segment| segment.row = batch.rows - 1 - segment.row);
    other
}

#[test]
fn weighted_gradient_does_not_depend_on_cut_packing_or_order() {
    let cut = |batch_size, accumulation, packing| TrainOptions {
        batch_size,
        accumulation,
        packing,
        max_seq_length: 64,
        ..TrainOptions::default()
    };
    let kinds = [Kernels::Composed, Kernels::Native, Kernels::NativeBf16];
    for (kernels, nudge) in kinds.into_iter().flat_map(|k| [0.0, 0.002, 0.016].map(|n| (k, n))) {
        // Our own products take a token's sums in one order wherever it lies in a batch, and so does the attention of our
        // kernels: what is left is the order of the sum over tokens (measured 6e-7 at most). OpenBLAS and MLX's attention
        // do not, and the tiny differences grow on the way back (measured 1.2e-5 at most, with AVX2's kernels).
        let bound = if kernels == Kernels::NativeBf16 { 1e-6 } else { 3e-5 };
        let (whole, loss) = of_window(kernels, &cut(8, 1, false), false, nudge);
        let norm = |v: &[f32]| v.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let others = [
            ("4x2", cut(4, 2, false), false),
            ("2x4", cut(2, 4, false), false),
            ("1x8", cut(1, 8, false), false),
            ("packed", cut(8, 1, true), false),
            ("reversed", cut(8, 1, false), true),
        ];
        for (name, options, reversed) in others {
            let (other, other_loss) = of_window(kernels, &options, reversed, nudge);
            let off: Vec<f32> = whole.iter().zip(&other).map(|(a, b)| a - b).collect();
            let (share, of_loss) = (norm(&off) / norm(&whole), (other_loss / loss - 1.0).abs());
            assert!(share <= bound, "{kernels:?} {name}: {share}");
            assert!(of_loss <= 1e-6, "{name}: {other_loss} {loss}");
        }
    }
}
