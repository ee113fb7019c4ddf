//! The parts of a training step and of generation, ours beside MLX's operations: `part/shape/who`.
//!
//! `who` is `composed_f32` for MLX's operations, `native_f32` and `native_bf16` for our kernels, `ours` where the part is no
//! arithmetic. Shapes are those of a 135M model (576 wide, 9 and 3 heads of 64, feed-forward 1536, vocabulary 49,152) at
//! 512 tokens, on the CPU. Each part asserts its answer before it is timed.
//!
//! The end of a run prints device, commit, dtypes and medians, and writes them to `criterion/parts.json` in the target
//! folder.

#![allow(clippy::unwrap_used)] // A benchmark stops where it cannot go on.

mod record;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkGroup, Criterion, measurement::WallTime};
use mlx_rs::fast::{ScaledDotProductAttentionMask, rope, scaled_dot_product_attention};
use planish_core::model_config::ModelConfig;
use planish_data::{BatchPlan, ChatTemplate, DataOptions, Dataset, PlanOptions, TemplateOptions, Tokenizer};
use planish_kernels::{AttentionShape, Forward, LowRank, PackedLinear, Projections, Rotation};
use planish_loss::{Head, HeadKernel, HeadLoss, TrainedPositions, head_loss};
use planish_mlx::device::{self, DeviceKind};
use planish_mlx::transforms::value_and_grad;
use planish_mlx::{Array, Dtype, host};
use planish_nn::generate::{GenerateOptions, generate};
use planish_nn::{AttentionMask, Kernels, LoraConfig, Model, Sampling};
use planish_tensors::{self as tensors, HostTensor, TensorStore};
use planish_train::optimizer::{AdamW, Groups, Optimizer, Rule};

const ROWS: usize = 2;
const LENGTH: usize = 256;
const TOKENS: usize = ROWS * LENGTH;
const WIDTH: usize = 576;
const FEED_FORWARD: usize = 1536;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const VOCABULARY: usize = 49_152;

fn main() -> anyhow::Result<()> {
    planish_mlx::memory::keep_freed_memory();
    device::set_default(DeviceKind::Cpu)?;
    let record = record::Record::start()?;
    let mut criterion = Criterion::default()
        .output_directory(record.folder())
        .measurement_time(Duration::from_secs(4))
        .sample_size(10)
        .configure_from_args();
    matmul(&mut criterion);
    cross_entropy(&mut criterion);
    attention(&mut criterion);
    lora_linear(&mut criterion);
    optimizer(&mut criterion);
    data_pipeline(&mut criterion);
    safetensors(&mut criterion);
    generation(&mut criterion);
    criterion.final_summary();
    record.finish("parts")
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

fn array(shape: &[usize], seed: u32) -> Array {
    array_of(&numbers(shape.iter().product(), seed), shape)
}

fn array_of(values: &[f32], shape: &[usize]) -> Array {
    let shape: Vec<i32> = shape.iter().map(|&dim| dim as i32).collect();
    Array::from_slice(values, &shape)
}

/// Fails where two results differ by more than `tolerance` of the largest number in the second.
fn assert_close(found: &[f32], expect: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expect.len(), "{what}");
    let largest = expect.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let difference = found
        .iter()
        .zip(expect)
        .map(|(one, other)| (one - other).abs())
        .fold(0.0, f32::max);
    assert!(difference <= tolerance * largest, "{what}: {difference} of {largest}");
}

/// Inputs and weights rounded to bf16, which is 1/256 of each number; of sums, a few parts in a thousand remain.
const BF16: f32 = 1e-2;

/// A linear layer without anything: all tokens at once, and one as in generation.
fn matmul(criterion: &mut Criterion) {
    let (x, weight) = (numbers(TOKENS * WIDTH, 1), numbers(FEED_FORWARD * WIDTH, 2));
    let weight_array = array_of(&weight, &[FEED_FORWARD, WIDTH]);
    let composed = |x: &Array| {
        let y = x.matmul(weight_array.t()).unwrap();
        y.eval().unwrap();
        y
    };
    let packed = PackedLinear::new(&weight, FEED_FORWARD, WIDTH);
    let (x_array, mut y) = (array_of(&x, &[TOKENS, WIDTH]), vec![0.0; TOKENS * FEED_FORWARD]);
    packed.forward.multiply(&x, None, &mut y);
    assert_close(&y, composed(&x_array).as_slice(), BF16, "packed product");
    let mut all = group(criterion, &format!("matmul/t{TOKENS}_{WIDTH}x{FEED_FORWARD}"));
    all.bench_function("composed_f32", |bencher| bencher.iter(|| composed(&x_array)));
    all.bench_function("native_bf16", |bencher| {
        bencher.iter(|| planish_kernels::on_pool(|| packed.forward.multiply(&x, None, &mut y)));
    });
    all.finish();

    let (x, x_array) = (&x[..WIDTH], array_of(&x[..WIDTH], &[1, WIDTH]));
    let mut y = vec![0.0; FEED_FORWARD];
    planish_kernels::matrix_vector(&weight, x, &mut y);
    assert_close(&y, composed(&x_array).as_slice(), 1e-5, "matrix times vector");
    let mut one = group(criterion, &format!("matmul/t1_{WIDTH}x{FEED_FORWARD}"));
    one.bench_function("composed_f32", |bencher| bencher.iter(|| composed(&x_array)));
    one.bench_function("native_f32", |bencher| {
        bencher.iter(|| planish_kernels::on_pool(|| planish_kernels::matrix_vector(&weight, x, &mut y)));
    });
    one.finish();
}

/// Loss and gradient of the head for every token, a chunk of tokens at a time.
fn cross_entropy(criterion: &mut Criterion) {
    let hidden = array(&[ROWS, LENGTH, WIDTH], 1);
    let weight = array(&[VOCABULARY, WIDTH], 2).multiply(Array::from_f32(0.05)).unwrap();
    weight.eval().unwrap();
    let packed = Arc::new(PackedLinear::new(weight.as_slice(), VOCABULARY, WIDTH));
    let targets: Vec<i32> = (0..TOKENS).map(|token| (token * 97 % VOCABULARY) as i32).collect();
    let positions = TrainedPositions::select(&targets, &[1.0; TOKENS]).unwrap();
    let project = |states: &Array| Ok::<_, planish_loss::Error>(states.matmul(weight.t())?);
    let how = HeadLoss {
        chunk_tokens: Some(256),
        ..HeadLoss::default()
    };
    let gradient = |kernel: &HeadKernel| -> (f32, Array) {
        let head = Head {
            project: &project,
            vocab_size: VOCABULARY,
            kernel: kernel.clone(),
        };
        let total = |inputs: &[Array]| {
            let loss = head_loss(&inputs[0], &head, &positions, &how)
                .map_err(|error| planish_mlx::Error::Operation(error.to_string()))?;
            Ok::<_, planish_mlx::Error>(vec![loss.objective.sum(None)?])
        };
        let (value, mut gradients) = value_and_grad(total, std::slice::from_ref(&hidden), &[0]).unwrap();
        mlx_rs::transforms::eval([&value[0], &gradients[0]]).unwrap();
        (value[0].item_exact(), gradients.remove(0))
    };
    let packed = HeadKernel::Packed(packed);
    let composed = || gradient(&HeadKernel::Composed);
    let native = || gradient(&HeadKernel::Cpu);
    let fused = || gradient(&packed);
    let (expect, expect_gradient) = composed();
    for (found, tolerance) in [(native(), 1e-4), (fused(), BF16)] {
        assert!((found.0 / expect - 1.0).abs() < tolerance, "{} for {expect}", found.0);
        assert_close(
            found.1.as_slice(),
            expect_gradient.as_slice(),
            tolerance,
            "gradient of the loss",
        );
    }
    let mut group = group(criterion, &format!("loss/cross_entropy/t{TOKENS}v{VOCABULARY}"));
    group.bench_function("composed_f32", |bencher| bencher.iter(composed));
    group.bench_function("native_f32", |bencher| bencher.iter(native));
    group.bench_function("native_bf16", |bencher| bencher.iter(fused));
    group.finish();
}

/// Rotation, scores and weighted sum; then the same with the gradients of query, key and value.
fn attention(criterion: &mut Criterion) {
    let (query_width, kv_width) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let query = numbers(TOKENS * query_width, 1);
    let (key, value) = (numbers(TOKENS * kv_width, 2), numbers(TOKENS * kv_width, 3));
    let d_out = numbers(query.len(), 4);

    let arrays = [
        array_of(&query, &[ROWS, LENGTH, query_width]),
        array_of(&key, &[ROWS, LENGTH, kv_width]),
        array_of(&value, &[ROWS, LENGTH, kv_width]),
    ];
    let d_out_array = array_of(&d_out, &[ROWS, LENGTH, query_width]);
    let composed = || {
        let out = composed_attention(&arrays).unwrap();
        out.eval().unwrap();
        out
    };
    let composed_gradients = || {
        let total = |inputs: &[Array]| {
            let out = composed_attention(inputs)?.multiply(&d_out_array)?;
            Ok::<_, planish_mlx::Error>(vec![out.sum(None)?])
        };
        let (_, gradients) = value_and_grad(total, &arrays, &[0, 1, 2]).unwrap();
        mlx_rs::transforms::eval(&gradients).unwrap();
        gradients
    };

    let shape = AttentionShape {
        batch: ROWS,
        length: LENGTH,
        n_heads: HEADS,
        n_kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        window: None,
        segments: Vec::new(),
    };
    let half = HEAD_DIM / 2;
    let angle = |i: usize| (i / half) as f64 * f64::from(ROPE_THETA).powf(-((i % half) as f64) / half as f64);
    let angles: Vec<f64> = (0..LENGTH * half).map(angle).collect();
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
    let rotation = Rotation { cos: &cos, sin: &sin };
    let inputs = Projections {
        query: &query,
        key: &key,
        value: &value,
    };
    let native = |out: &mut [f32], log_sums: &mut [f32]| {
        planish_kernels::on_pool(|| planish_kernels::attention(&shape, rotation, inputs, out, log_sums));
    };
    let native_gradients = |out: &[f32], log_sums: &[f32], [dq, dk, dv]: &mut [Vec<f32>; 3]| {
        let forward = Forward { out, log_sums };
        planish_kernels::on_pool(|| {
            planish_kernels::attention_backward(&shape, rotation, inputs, forward, &d_out, (dq, dk, dv));
        });
    };

    let (mut out, mut log_sums) = (vec![0.0; query.len()], vec![0.0; TOKENS * HEADS]);
    native(&mut out, &mut log_sums);
    assert_close(&out, composed().as_slice(), 1e-4, "attention");
    let mut gradients = [query.clone(), key.clone(), value.clone()];
    native_gradients(&out, &log_sums, &mut gradients);
    for (found, expect) in gradients.iter().zip(composed_gradients()) {
        let expect = host::to_f32_vec(&expect).unwrap();
        assert_close(found, &expect, 1e-4, "gradients of attention");
    }

    let mut alone = group(criterion, &format!("attention/forward/b{ROWS}t{LENGTH}"));
    alone.bench_function("composed_f32", |bencher| bencher.iter(composed));
    alone.bench_function("native_f32", |bencher| bencher.iter(|| native(&mut out, &mut log_sums)));
    alone.finish();
    let mut both = group(criterion, &format!("attention/forward_backward/b{ROWS}t{LENGTH}"));
    both.bench_function("composed_f32", |bencher| bencher.iter(composed_gradients));
    both.bench_function("native_f32", |bencher| {
        bencher.iter(|| {
            native(&mut out, &mut log_sums);
            native_gradients(&out, &log_sums, &mut gradients);
        });
    });
    both.finish();
}

const ROPE_THETA: f32 = 10_000.0;

/// Query, key and value `[b, s, n · h_d]` → `[b, s, n_h · h_d]`.
fn composed_attention(inputs: &[Array]) -> Result<Array, planish_mlx::Error> {
    let (rows, length, head_dim) = (ROWS as i32, LENGTH as i32, HEAD_DIM as i32);
    let heads = |input: &Array| {
        input
            .reshape(&[rows, length, -1, head_dim])?
            .transpose_axes(&[0, 2, 1, 3]) // [b, n, s, h_d]
    };
    let rotated = |input: &Array| rope(heads(input)?, head_dim, false, ROPE_THETA, 1.0, 0, None);
    let (query, key, value) = (rotated(&inputs[0])?, rotated(&inputs[1])?, heads(&inputs[2])?);
    let scale = (HEAD_DIM as f32).sqrt().recip();
    let causal = ScaledDotProductAttentionMask::Causal;
    let out = scaled_dot_product_attention(query, key, value, scale, Some(causal), None)?; // [b, n_h, s, h_d]
    Ok(out.transpose_axes(&[0, 2, 1, 3])?.reshape(&[rows, length, -1])?)
}

/// `x Wᵀ + (x A) B` of the widest layer.
fn lora_linear(criterion: &mut Criterion) {
    let rank = 8;
    let (x, weight) = (numbers(TOKENS * WIDTH, 1), numbers(FEED_FORWARD * WIDTH, 2));
    let (a, b) = (numbers(rank * WIDTH, 3), numbers(rank * FEED_FORWARD, 4));
    let packed = PackedLinear::new(&weight, FEED_FORWARD, WIDTH);
    let (mut inner, mut y) = (vec![0.0; TOKENS * rank], vec![0.0; TOKENS * FEED_FORWARD]);
    let mut native = |y: &mut [f32]| {
        planish_kernels::on_pool(|| {
            planish_kernels::skinny_product(&x, &a, rank, 1.0, &mut inner);
            let update = LowRank {
                left: &inner,
                right: &b,
                rank,
            };
            packed.forward.multiply(&x, Some(update), y);
        });
    };
    let arrays = [
        array_of(&x, &[TOKENS, WIDTH]),
        array_of(&weight, &[FEED_FORWARD, WIDTH]),
        array_of(&a, &[rank, WIDTH]),
        array_of(&b, &[rank, FEED_FORWARD]),
    ];
    let composed = || {
        let update = arrays[0].matmul(arrays[2].t()).unwrap().matmul(&arrays[3]).unwrap();
        let y = arrays[0].matmul(arrays[1].t()).unwrap().add(update).unwrap();
        y.eval().unwrap();
        y
    };
    native(&mut y);
    assert_close(&y, composed().as_slice(), BF16, "linear layer with an update");
    let mut group = group(criterion, &format!("linear/lora/t{TOKENS}_{WIDTH}x{FEED_FORWARD}"));
    group.bench_function("composed_f32", |bencher| bencher.iter(composed));
    group.bench_function("native_bf16", |bencher| bencher.iter(|| native(&mut y)));
    group.finish();
}

/// AdamW over one flat buffer, beside the same formula tensor by tensor.
fn optimizer(criterion: &mut Criterion) {
    // 210 pairs of matrices: what rank 8 on every layer of a 135M model comes to.
    let weights: Vec<(String, Array)> = (0..420)
        .map(|index| (format!("{index}.lora_a"), array(&[8, 726], index)))
        .collect();
    let gradients: Vec<Array> = weights.iter().map(|(_, array)| array.clone()).collect();
    let mut optimizer = Optimizer::new(Rule::adamw(), Groups::default(), &weights).unwrap();
    let accept = Array::from_bool(true);
    let mut flat = || {
        let gradients = optimizer.gather(&gradients).unwrap();
        let values = optimizer.step(&gradients, 1e-4, &accept).unwrap();
        mlx_rs::transforms::eval(values.iter().chain(optimizer.pending())).unwrap();
        values
    };
    let mut step = 0;
    let mut states: Vec<[Array; 3]> = weights
        .iter()
        .map(|(_, weight)| {
            let zeros = || Array::zeros::<f32>(weight.shape()).unwrap();
            [weight.clone(), zeros(), zeros()]
        })
        .collect();
    let mut composed = || {
        step += 1;
        for (state, gradient) in states.iter_mut().zip(&gradients) {
            *state = adamw(state, gradient, 1e-4, step).unwrap();
        }
        mlx_rs::transforms::eval(states.iter().flatten()).unwrap();
        states[7][0].clone()
    };
    assert_close(flat()[7].as_slice(), composed().as_slice(), 1e-6, "AdamW");
    let mut group = group(criterion, "optimizer/adamw/2.4m");
    group.bench_function("composed_f32", |bencher| bencher.iter(&mut composed));
    group.bench_function("flat_f32", |bencher| bencher.iter(&mut flat));
    group.finish();
}

/// Weight and both moments after one step.
fn adamw([weight, m, v]: &[Array; 3], gradient: &Array, lr: f32, step: i32) -> mlx_rs::error::Result<[Array; 3]> {
    let rule = AdamW::default();
    let ([beta1, beta2], scalar) = (rule.betas, |value: f64| Array::from_f32(value as f32));
    let average =
        |old: &Array, new: &Array, beta: f64| old.multiply(scalar(beta))?.add(new.multiply(scalar(1.0 - beta))?);
    let (m, v) = (average(m, gradient, beta1)?, average(v, &gradient.square()?, beta2)?);
    let root = v.divide(scalar(1.0 - beta2.powi(step)))?.sqrt()?;
    let direction = m
        .divide(scalar(1.0 - beta1.powi(step)))?
        .divide(root.add(scalar(rule.eps))?)?
        .add(weight.multiply(scalar(rule.weight_decay))?)?;
    Ok([weight.subtract(direction.multiply(Array::from_f32(lr))?)?, m, v])
}

fn fixture() -> &'static Path {
    Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../crates/planish-nn/tests/fixtures/tiny-llama-1m"
    ))
}

/// From JSONL to the batches of an epoch.
fn data_pipeline(criterion: &mut Criterion) {
    let file = Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../examples/finetune/facts/train.jsonl"
    ));
    let tokenizer = Tokenizer::from_dir(fixture()).unwrap();
    let template = ChatTemplate::from_dir(fixture(), &tokenizer, &TemplateOptions::default()).unwrap();
    let epoch = |packing: bool| {
        let data = DataOptions {
            max_seq_length: 256,
            ..DataOptions::default()
        };
        let (data, _) = Dataset::load(file, &tokenizer, template.as_ref(), &data).unwrap();
        let options = PlanOptions {
            packing,
            max_seq_length: 256,
            ..PlanOptions::default()
        };
        let plan = BatchPlan::new(&data, &options).unwrap();
        (0..plan.windows_in_epoch(0).unwrap())
            .map(|index| plan.window(&data, 0, index).unwrap().target_tokens)
            .sum::<usize>()
    };
    assert!(
        epoch(true) == epoch(false) && epoch(true) > 100,
        "packing leaves nothing out"
    );
    let mut group = group(criterion, "data/epoch/facts");
    group.bench_function("packed", |bencher| bencher.iter(|| epoch(true)));
    group.bench_function("padded", |bencher| bencher.iter(|| epoch(false)));
    group.finish();
}

/// 64 MB from a file into arrays; ours looks for NaN and infinity on the way.
fn safetensors(criterion: &mut Criterion) {
    let open = || TensorStore::open(fixture()).unwrap().len();
    assert!(open() > 10);
    group(criterion, "safetensors/open/tiny-llama-1m").bench_function("ours", |bencher| bencher.iter(open));

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    let weights: BTreeMap<String, HostTensor> = (0..16)
        .map(|index| {
            let values = numbers(1000 * 1000, index);
            (format!("{index}.weight"), HostTensor::from_f32(&[1000, 1000], &values))
        })
        .collect();
    tensors::write(&file, &weights, &BTreeMap::new()).unwrap();
    let ours = || {
        let mut store = TensorStore::open(&file).unwrap();
        let mut arrays = Vec::with_capacity(weights.len());
        for name in weights.keys() {
            let view = store.require(name).unwrap();
            assert!(view.find_non_finite().is_none());
            arrays.push(host::array_from_bytes(view.bytes, view.shape, Dtype::Float32).unwrap());
            store.release_pages();
        }
        arrays
    };
    let composed = || {
        let arrays = Array::load_safetensors(&file).unwrap();
        mlx_rs::transforms::eval(arrays.values()).unwrap();
        arrays
    };
    let expect = composed();
    for (name, found) in weights.keys().zip(ours()) {
        assert_eq!(found.as_slice::<f32>(), expect[name].as_slice::<f32>(), "{name}");
    }
    let mut group = group(criterion, "safetensors/load/64mb");
    group.bench_function("composed_f32", |bencher| bencher.iter(composed));
    group.bench_function("ours_f32", |bencher| bencher.iter(ours));
    group.finish();
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
    let logits = |model: &Model| {
        let ids = model.token_array(&[&[1, 2, 3]]).unwrap();
        let hidden = model.hidden(&ids, &AttentionMask::Causal, None).unwrap();
        host::to_f32_vec(&model.logits(&hidden).unwrap()).unwrap()
    };
    let models = [Kernels::Composed, Kernels::Native].map(|kernels| {
        let mut model = Model::random_with(&config, Dtype::Float32, kernels, 0).unwrap();
        model.attach_lora(&LoraConfig::default(), 0).unwrap();
        model
    });
    assert_close(&logits(&models[1]), &logits(&models[0]), 1e-4, "logits");
    assert!(models.iter().all(|model| write(model).len() == 16));
    let mut group = group(criterion, "generate/6_layers_of_135m/16_tokens");
    group.bench_function("composed_f32", |bencher| bencher.iter(|| write(&models[0])));
    group.bench_function("native_f32", |bencher| bencher.iter(|| write(&models[1])));
    group.finish();
}
