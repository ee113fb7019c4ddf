//! The parts of a training step and of generation, ours beside MLX's operations: `part/shape/who`.
//!
//! Shapes are those of a 135M model (576 wide, 9 and 3 heads of 64, feed-forward 1536, vocabulary 49,152) at 512 tokens,
//! on the CPU. Each part asserts its answer before it is timed.

#![allow(clippy::unwrap_used)] // A benchmark stops where it cannot go on.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkGroup, Criterion, measurement::WallTime};
use planish_checkpoint::tensors::TensorStore;
use planish_core::model_config::ModelConfig;
use planish_data::{BatchPlan, ChatTemplate, DataOptions, Dataset, PlanOptions, TemplateOptions, Tokenizer};
use planish_kernels::{AttentionShape, Forward, LowRank, PackedLinear, Projections, Rotation};
use planish_loss::{
    TokenLossOptions, TrainedPositions, chunked_cross_entropy, chunked_cross_entropy_native, packed_cross_entropy,
};
use planish_mlx::{Array, Dtype};
use planish_nn::generate::{GenerateOptions, generate};
use planish_nn::{Kernels, LoraConfig, Model, Sampling};
use planish_train::optimizer::{Groups, Optimizer, Rule};

const ROWS: usize = 2;
const LENGTH: usize = 256;
const TOKENS: usize = ROWS * LENGTH;
const WIDTH: usize = 576;
const VOCABULARY: usize = 49_152;

fn main() {
    planish_mlx::memory::keep_freed_memory();
    let mut criterion = Criterion::default()
        .measurement_time(Duration::from_secs(4))
        .sample_size(10)
        .configure_from_args();
    cross_entropy(&mut criterion);
    attention(&mut criterion);
    lora_linear(&mut criterion);
    optimizer(&mut criterion);
    data_pipeline(&mut criterion);
    safetensors(&mut criterion);
    generation(&mut criterion);
    criterion.final_summary();
}

fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    criterion.benchmark_group(name)
}

/// Numbers in [−1, 1] that look random and are the same every time.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_769).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn array(shape: &[i32], seed: u32) -> Array {
    let count: i32 = shape.iter().product();
    Array::from_slice(&numbers(count as usize, seed), shape)
}

/// Loss and gradient of the head for every token.
fn cross_entropy(criterion: &mut Criterion) {
    let hidden = array(&[ROWS as i32, LENGTH as i32, WIDTH as i32], 1);
    let weight = array(&[VOCABULARY as i32, WIDTH as i32], 2)
        .multiply(Array::from_f32(0.05))
        .unwrap();
    weight.eval().unwrap();
    let packed = Arc::new(PackedLinear::new(weight.as_slice(), VOCABULARY, WIDTH));
    let targets: Vec<i32> = (0..TOKENS).map(|token| (token * 97 % VOCABULARY) as i32).collect();
    let positions = TrainedPositions::select(&targets, &[1.0; TOKENS]).unwrap();
    let head = |states: &Array| Ok::<_, planish_loss::Error>(states.matmul(weight.t())?);
    let gradient = |loss: &dyn Fn(&Array) -> planish_loss::Result<planish_loss::TokenLoss>| -> f32 {
        let total = |inputs: &[Array]| {
            let loss = loss(&inputs[0]).map_err(|error| planish_mlx::Error::Operation(error.to_string()))?;
            Ok::<_, planish_mlx::Error>(vec![loss.objective.sum(None)?])
        };
        let (value, gradients) =
            planish_mlx::transforms::value_and_grad(total, std::slice::from_ref(&hidden), &[0]).unwrap();
        mlx_rs::transforms::eval([&value[0], &gradients[0]]).unwrap();
        value[0].item_exact()
    };
    let options = TokenLossOptions::default();
    let composed = || gradient(&|hidden| chunked_cross_entropy(hidden, &head, &positions, 256, &options));
    let native = || gradient(&|hidden| chunked_cross_entropy_native(hidden, &head, &positions, 256, &options));
    let fused = || gradient(&|hidden| packed_cross_entropy(hidden, &packed, &positions));
    let expect = composed();
    assert!((native() / expect - 1.0).abs() < 1e-5 && (fused() / expect - 1.0).abs() < 1e-2);
    let mut group = group(criterion, &format!("loss/cross_entropy/t{TOKENS}v{VOCABULARY}"));
    group.bench_function("composed_f32", |bencher| bencher.iter(composed));
    group.bench_function("native_f32", |bencher| bencher.iter(native));
    group.bench_function("native_bf16", |bencher| bencher.iter(fused));
    group.finish();
}

fn attention(criterion: &mut Criterion) {
    let shape = AttentionShape {
        batch: ROWS,
        length: LENGTH,
        n_heads: 9,
        n_kv_heads: 3,
        head_dim: 64,
        window: None,
        segments: Vec::new(),
    };
    let angles: Vec<f32> = (0..LENGTH * 32)
        .map(|i| (i / 32) as f32 * 0.7_f32.powi((i % 32) as i32))
        .collect();
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
    let rotation = Rotation { cos: &cos, sin: &sin };
    let (query, key, value) = (
        numbers(TOKENS * 576, 1),
        numbers(TOKENS * 192, 2),
        numbers(TOKENS * 192, 3),
    );
    let inputs = Projections {
        query: &query,
        key: &key,
        value: &value,
    };
    let (mut out, mut log_sums) = (vec![0.0; query.len()], vec![0.0; TOKENS * 9]);
    planish_kernels::attention(&shape, rotation, inputs, &mut out, &mut log_sums);
    // The first token sees itself alone.
    assert!(
        out[..64]
            .iter()
            .zip(&value[..64])
            .all(|(one, other)| (one - other).abs() < 1e-6)
    );
    let mut group = group(criterion, &format!("attention/b{ROWS}t{LENGTH}"));
    group.bench_function("forward", |bencher| {
        bencher.iter(|| {
            planish_kernels::on_pool(|| {
                planish_kernels::attention(&shape, rotation, inputs, &mut out, &mut log_sums);
            })
        });
    });
    let forward = (out.clone(), log_sums.clone());
    let d_out = numbers(query.len(), 4);
    let (mut dq, mut dk, mut dv) = (query.clone(), key.clone(), value.clone());
    group.bench_function("backward", |bencher| {
        bencher.iter(|| {
            planish_kernels::on_pool(|| {
                let forward = Forward {
                    out: &forward.0,
                    log_sums: &forward.1,
                };
                planish_kernels::attention_backward(
                    &shape,
                    rotation,
                    inputs,
                    forward,
                    &d_out,
                    (&mut dq, &mut dk, &mut dv),
                );
            })
        });
    });
    group.finish();
}

/// `x Wᵀ + (x A) B` of the widest layer.
fn lora_linear(criterion: &mut Criterion) {
    let (output, rank) = (1536, 8);
    let (x, weight) = (numbers(TOKENS * WIDTH, 1), numbers(output * WIDTH, 2));
    let (a, b) = (numbers(rank * WIDTH, 3), numbers(rank * output, 4));
    let packed = PackedLinear::new(&weight, output, WIDTH);
    let (mut inner, mut y) = (vec![0.0; TOKENS * rank], vec![0.0; TOKENS * output]);
    let mut ours = || {
        planish_kernels::on_pool(|| {
            planish_kernels::skinny_product(&x, &a, rank, 1.0, &mut inner);
            let update = LowRank {
                left: &inner,
                right: &b,
                rank,
            };
            packed.forward.multiply(&x, Some(update), &mut y);
            y[0]
        })
    };
    let arrays = [
        Array::from_slice(&x, &[TOKENS as i32, WIDTH as i32]),
        Array::from_slice(&weight, &[output as i32, WIDTH as i32]),
        Array::from_slice(&a, &[rank as i32, WIDTH as i32]),
        Array::from_slice(&b, &[rank as i32, output as i32]),
    ];
    let composed = || {
        let update = arrays[0].matmul(arrays[2].t()).unwrap().matmul(&arrays[3]).unwrap();
        let y = arrays[0].matmul(arrays[1].t()).unwrap().add(update).unwrap();
        y.eval().unwrap();
        y.as_slice::<f32>()[0]
    };
    // Sums of 576 products of numbers below 1, rounded to bf16.
    assert!((ours() - composed()).abs() < 0.5);
    let mut group = group(criterion, &format!("linear/lora/t{TOKENS}_{WIDTH}x{output}"));
    group.bench_function("composed_f32", |bencher| bencher.iter(composed));
    group.bench_function("native_bf16", |bencher| bencher.iter(&mut ours));
    group.finish();
}

fn optimizer(criterion: &mut Criterion) {
    // 210 pairs of matrices: what rank 8 on every layer of a 135M model comes to.
    let weights: Vec<(String, Array)> = (0..420)
        .map(|index| (format!("{index}.lora_a"), array(&[8, 726], index)))
        .collect();
    let gradients: Vec<Array> = weights.iter().map(|(_, array)| array.clone()).collect();
    let mut optimizer = Optimizer::new(Rule::adamw(), Groups::default(), &weights).unwrap();
    let accept = Array::from_bool(true);
    let mut step = || {
        let gradients = optimizer.gather(&gradients).unwrap();
        let values = optimizer.step(&gradients, 1e-4, &accept).unwrap();
        mlx_rs::transforms::eval(values.iter().chain(optimizer.pending())).unwrap();
        values[0].as_slice::<f32>()[0]
    };
    assert!((step() - weights[0].1.as_slice::<f32>()[0]).abs() < 2e-4);
    group(criterion, "optimizer/adamw/2.4m").bench_function("composed_f32", |bencher| bencher.iter(&mut step));
}

fn fixture() -> &'static Path {
    Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../crates/planish-nn/tests/fixtures/tiny-llama-1m"
    ))
}

/// From JSONL to packed batches.
fn data_pipeline(criterion: &mut Criterion) {
    let file = Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../examples/finetune/facts/train.jsonl"
    ));
    let tokenizer = Tokenizer::from_dir(fixture()).unwrap();
    let template = ChatTemplate::from_dir(fixture(), &tokenizer, &TemplateOptions::default()).unwrap();
    let options = PlanOptions {
        packing: true,
        max_seq_length: 256,
        ..PlanOptions::default()
    };
    let epoch = || {
        let data = DataOptions {
            max_seq_length: 256,
            ..DataOptions::default()
        };
        let (data, _) = Dataset::load(file, &tokenizer, template.as_ref(), &data).unwrap();
        let plan = BatchPlan::new(&data, &options).unwrap();
        (0..plan.windows_in_epoch(0).unwrap())
            .map(|index| plan.window(&data, 0, index).unwrap().target_tokens)
            .sum::<usize>()
    };
    assert!(epoch() > 100);
    group(criterion, "data/epoch/facts").bench_function("packed", |bencher| bencher.iter(epoch));
}

fn safetensors(criterion: &mut Criterion) {
    let read = || {
        let store = TensorStore::open(fixture()).unwrap();
        store
            .names()
            .map(|name| store.require(name).unwrap().bytes.len())
            .sum::<usize>()
    };
    assert!(read() > 1_000_000);
    group(criterion, "safetensors/open/tiny-llama-1m").bench_function("mmap", |bencher| bencher.iter(read));
}

fn generation(criterion: &mut Criterion) {
    let json = r#"{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": true}"#;
    let config = ModelConfig::from_json_str(json, Path::new("config.json")).unwrap();
    let options = GenerateOptions {
        max_tokens: 16,
        stop_tokens: Vec::new(),
        sampling: Sampling::default(),
    };
    let write = |model: &Model| -> Vec<u32> {
        generate(model, &[1, 2, 3], &options)
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap()
    };
    let models = [Kernels::Composed, Kernels::Native].map(|kernels| {
        let mut model = Model::random_with(&config, Dtype::Float32, kernels, 0).unwrap();
        model.attach_lora(&LoraConfig::default(), 0).unwrap();
        model
    });
    assert_eq!(write(&models[0]).len(), 16);
    let mut group = group(criterion, "generate/6_layers_of_135m/16_tokens");
    group.bench_function("composed_f32", |bencher| bencher.iter(|| write(&models[0])));
    group.bench_function("native_f32", |bencher| bencher.iter(|| write(&models[1])));
    group.finish();
}
