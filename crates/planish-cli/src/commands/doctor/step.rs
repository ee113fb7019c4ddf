//! A training step on a GPU against the same step on the processor: the loss and every gradient; then some updates as a run
//! makes them there, in bf16 and compiled. Where a run has fused blocks, the step is compared with and without them.
//!
//! The probe compares single operations; this compares what they make together. It runs in a child process, because a bad
//! driver ends the process it lives in.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use planish_backend::{Backend, Limits, ProbeReport, die_with_parent, run_guarded};
use planish_core::fs::write_atomic;
use planish_core::model_config::ModelConfig;
use planish_loss::{TokenLossOptions, cross_entropy};
use planish_mlx::device::{self, DeviceKind};
use planish_mlx::{Array, Dtype, host, transforms};
use planish_nn::{AttentionMask, ChosenKernels, Kernels, LoraConfig, Model, Purpose, Training};
use planish_train::{TrainOptions, timed_steps};
use serde::{Deserialize, Serialize};

/// The hidden subcommand of the child.
pub(crate) const STEP_COMMAND: &str = "__step";
/// Largest difference, relative to the largest value of the same array.
const BOUND: f64 = 1e-3;
/// TF32 keeps 10 bits of each factor, and the error of one layer goes on into the next.
const TF32_BOUND: f64 = 2e-2;
/// bf16 keeps 8 bits of weights and activations.
const BF16_BOUND: f64 = 1e-2;
const UPDATES: usize = 8;
const ROWS: usize = 2;
/// CUDA's fused attention has its backward for multiples of this.
const LENGTH: usize = 128;
const SEED: u64 = 7;
/// Grouped heads, an own head size and tied embeddings: what the families differ in.
const MODEL: &str = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 2048, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": true, "hidden_act": "silu", "eos_token_id": 0}"#;

/// Compare a training step; this program calls itself so
#[derive(clap::Args)]
pub(crate) struct StepArgs {
    /// cpu, metal or cuda
    backend: String,
    /// File to write
    report: PathBuf,
}

/// How far a device is from the processor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct StepReport {
    pub(super) backend: String,
    /// Whether products may round their factors to 10 bits, as they do in training unless `MLX_ENABLE_TF32=0`.
    pub(super) tf32: bool,
    pub(super) passed: bool,
    pub(super) bound: f64,
    pub(super) cpu_loss: f64,
    pub(super) device_loss: f64,
    /// Relative.
    pub(super) loss_error: f64,
    /// Largest of all arrays, relative to the largest gradient of the same array.
    pub(super) gradient_error: f64,
    /// The array with that error.
    pub(super) worst: String,
    pub(super) gradients: usize,
    /// Updates in bf16 that followed.
    pub(super) updates: usize,
    /// Largest difference of their losses from those of f32 on the processor, relative.
    pub(super) update_error: f64,
    /// Why there are no numbers.
    pub(super) failure: Option<String>,
}

/// One pair of reports (exact, and as it trains) for each usable GPU.
pub(super) fn compare_all(reports: &[ProbeReport]) -> Vec<StepReport> {
    reports
        .iter()
        .filter(|report| report.verdict.is_usable() && report.backend != Backend::Cpu)
        .flat_map(|report| [false, true].map(|tf32| compare(report.backend, tf32)))
        .collect()
}

fn compare(backend: Backend, tf32: bool) -> StepReport {
    in_child(backend, tf32).unwrap_or_else(|error| StepReport {
        backend: backend.name().to_owned(),
        tf32,
        failure: Some(format!("{error:#}")),
        ..StepReport::nothing()
    })
}

fn in_child(backend: Backend, tf32: bool) -> Result<StepReport> {
    let dir = scratch_dir()?;
    let report = dir.join("step.json");
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(STEP_COMMAND).arg(backend.name()).arg(&report);
    command.env("MLX_ENABLE_TF32", if tf32 { "1" } else { "0" });
    let mut limits = Limits::of(backend);
    limits.silent = limits.total; // It writes once, at its end.
    let end = run_guarded(command, &report, limits);
    let text = std::fs::read_to_string(&report);
    std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    let end = end?;
    let text = text.map_err(|_| {
        let words = end.stderr_tail.join("; ");
        anyhow::anyhow!(
            "the process ended (exit {:?}, signal {:?}) without an answer: {words}",
            end.exit,
            end.signal
        )
    })?;
    let mut found: StepReport = serde_json::from_str(&text)?;
    found.tf32 = tf32;
    found.bound = if tf32 { TF32_BOUND } else { BOUND };
    found.passed = found.is_within(found.bound);
    Ok(found)
}

fn scratch_dir() -> Result<PathBuf> {
    let dir = std::env::temp_dir().join(format!("planish-step-{}", std::process::id()));
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}

/// The child: computes on the processor, then on the device, and writes how far apart they are.
pub(crate) fn run_step(args: &StepArgs) -> Result<()> {
    die_with_parent();
    let backend: Backend = args.backend.parse().map_err(anyhow::Error::msg)?;
    let kind = match backend {
        Backend::Cpu => DeviceKind::Cpu,
        Backend::Metal | Backend::Cuda => DeviceKind::Gpu,
    };
    let kernels = of_training(kind)?;
    device::set_default(DeviceKind::Cpu)?;
    let mut model = model(kernels)?;
    let expected = step(&mut model)?;
    let expected_losses = losses(Dtype::Float32, DeviceKind::Cpu)?;
    device::set_default(kind)?;
    let mut report = judge(backend, &step(&mut model)?, &expected);
    if kernels == Kernels::Fused {
        report.add_fused(&judge(backend, &step(&mut model.joined()?)?, &expected));
    }
    judge_updates(&mut report, &losses(Dtype::Bfloat16, kind)?, &expected_losses);
    Ok(write_atomic(&args.report, serde_json::to_string(&report)?.as_bytes())?)
}

/// Loss and gradients by name.
struct Step {
    loss: f64,
    gradients: Vec<(String, Vec<f32>)>,
}

/// What adapters are trained with on a device.
fn of_training(kind: DeviceKind) -> Result<Kernels> {
    device::set_default(kind)?;
    Ok(match kind {
        DeviceKind::Cpu => Kernels::Composed,
        DeviceKind::Gpu => ChosenKernels::fastest(Dtype::Bfloat16, Purpose::Adapters, false)?.kernels,
    })
}

fn model(kernels: Kernels) -> Result<Model> {
    let config = ModelConfig::from_json_str(MODEL, Path::new("the model of planish doctor"))?;
    let mut model = Model::random_with(&config, Dtype::Float32, kernels, SEED)?;
    model.attach_lora(&LoraConfig::default(), SEED)?;
    // B starts at zero, which would leave A without a gradient.
    let mut numbers = Numbers(SEED);
    let mut values = Vec::new();
    for (_, array) in model.trainables() {
        let noise: Vec<f32> = (0..array.size()).map(|_| 0.1 * numbers.next()).collect();
        values.push(Array::from_slice(&noise, array.shape()));
    }
    model.set_trainables(&values)?;
    Ok(model)
}

fn step(model: &mut Model) -> Result<Step> {
    let (names, arrays): (Vec<String>, Vec<Array>) = model.trainables().into_iter().unzip();
    let vocabulary = model.config().arch.vocab_size as f32;
    let mut numbers = Numbers(SEED + 1);
    let mut tokens = || ((numbers.next() + 1.0) / 2.0 * (vocabulary - 1.0)) as i32;
    let ids: Vec<i32> = (0..ROWS * LENGTH).map(|_| tokens()).collect();
    let targets: Vec<i32> = (0..ROWS * LENGTH).map(|_| tokens()).collect();
    let shape = [ROWS as i32, LENGTH as i32];
    let (ids, targets) = (Array::from_slice(&ids, &shape), Array::from_slice(&targets, &shape));
    let all: Vec<usize> = (0..arrays.len()).collect();
    let objective = |arrays: &[Array]| -> Result<Vec<Array>, planish_mlx::Error> {
        let mut inner = || -> Result<Array> {
            model.set_trainables(arrays)?;
            let hidden = model.hidden_for_training(&ids, &AttentionMask::Causal, Training::default())?;
            let loss = cross_entropy(&model.logits(&hidden)?, &targets, &TokenLossOptions::default())?;
            Ok(loss.objective.mean(None)?)
        };
        inner()
            .map(|loss| vec![loss])
            .map_err(|error| planish_mlx::Error::Operation(format!("{error:#}")))
    };
    let (outputs, gradients) = transforms::value_and_grad(objective, &arrays, &all)?;
    model.set_trainables(&arrays)?;
    let mut found = Vec::with_capacity(names.len());
    for (name, gradient) in names.into_iter().zip(&gradients) {
        found.push((name, host::to_f32_vec(gradient)?));
    }
    let loss = host::to_f32_vec(&outputs[0])?.first().copied().context("no loss")?;
    Ok(Step {
        loss: f64::from(loss),
        gradients: found,
    })
}

/// Losses of updates on random tokens.
fn losses(dtype: Dtype, kind: DeviceKind) -> Result<Vec<f64>> {
    let kernels = of_training(kind)?;
    device::set_default(DeviceKind::Cpu)?;
    let config = ModelConfig::from_json_str(MODEL, Path::new("the model of planish doctor"))?;
    let mut model = Model::random_with(&config, dtype, kernels, SEED)?;
    model.attach_lora(&LoraConfig::default(), SEED)?;
    device::set_default(kind)?;
    let options = TrainOptions {
        learning_rate: 1e-3,
        ..TrainOptions::default()
    };
    let steps = timed_steps(&mut model, (ROWS, LENGTH), &options, UPDATES)?;
    Ok(steps.iter().map(|step| step.loss).collect())
}

fn judge_updates(report: &mut StepReport, found: &[f64], expected: &[f64]) {
    report.updates = found.len();
    let off = found
        .iter()
        .zip(expected)
        .map(|(found, expected)| (found / expected - 1.0).abs());
    // A NaN is the worst of all, and JSON has none.
    report.update_error = off.fold(0.0, |most, off| if off.is_finite() { off.max(most) } else { f64::MAX });
    if report.update_error == f64::MAX {
        report.failure = Some("losses of updates in bf16 are not finite".to_owned());
    }
}

fn judge(backend: Backend, found: &Step, expected: &Step) -> StepReport {
    let mut report = StepReport {
        backend: backend.name().to_owned(),
        cpu_loss: expected.loss,
        device_loss: found.loss,
        loss_error: ((found.loss - expected.loss) / expected.loss).abs(),
        gradients: expected.gradients.len(),
        ..StepReport::nothing()
    };
    for ((name, found), (_, expected)) in found.gradients.iter().zip(&expected.gradients) {
        let error = relative_error(found, expected);
        // A NaN is the worst of all.
        if error.is_nan() || error > report.gradient_error {
            (report.gradient_error, report.worst) = (error, name.clone());
        }
    }
    if !report.loss_error.is_finite() || !report.gradient_error.is_finite() {
        // JSON has no NaN.
        report.failure = Some(format!("loss or gradients are not finite ({})", report.worst));
        (report.loss_error, report.gradient_error, report.device_loss) = (f64::MAX, f64::MAX, f64::MAX);
    }
    report.passed = report.is_within(BOUND);
    report
}

fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let mut largest = f64::MIN_POSITIVE;
    let mut off = 0.0f64;
    for (found, expected) in found.iter().zip(expected) {
        if !found.is_finite() || !expected.is_finite() {
            return f64::NAN;
        }
        largest = largest.max(f64::from(*expected).abs());
        off = off.max((f64::from(*found) - f64::from(*expected)).abs());
    }
    off / largest
}

impl StepReport {
    fn nothing() -> Self {
        Self {
            backend: String::new(),
            tf32: false,
            passed: false,
            bound: BOUND,
            cpu_loss: 0.0,
            device_loss: 0.0,
            loss_error: 0.0,
            gradient_error: 0.0,
            worst: String::new(),
            gradients: 0,
            updates: 0,
            update_error: 0.0,
            failure: None,
        }
    }

    /// The same step by fused blocks.
    fn add_fused(&mut self, fused: &Self) {
        self.loss_error = self.loss_error.max(fused.loss_error);
        if fused.gradient_error > self.gradient_error {
            self.gradient_error = fused.gradient_error;
            self.worst = format!("{} of fused blocks", fused.worst);
        }
        self.failure = self.failure.take().or_else(|| fused.failure.clone());
    }

    fn is_within(&self, bound: f64) -> bool {
        let is_step = self.gradients > 0 && self.loss_error <= bound && self.gradient_error <= bound;
        self.failure.is_none() && is_step && self.update_error <= BF16_BOUND
    }
}

/// Numbers between −1 and 1 that are the same everywhere.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(loss: f64, gradient: &[f32]) -> Step {
        Step {
            loss,
            gradients: vec![("a".into(), vec![1.0, 2.0]), ("b".into(), gradient.to_vec())],
        }
    }

    #[test]
    fn any_difference_beyond_the_bound_fails_and_is_named() {
        let expected = of(7.0, &[1.0, -4.0]);
        let judged = |found: &Step| judge(Backend::Cuda, found, &expected);
        assert!(judged(&of(7.001, &[1.001, -4.0])).passed);
        assert!(!judged(&of(7.1, &[1.0, -4.0])).passed);
        let wrong = judged(&of(7.0, &[1.0, -3.9]));
        assert_eq!((wrong.passed, wrong.worst.as_str()), (false, "b"));
        let nan = judged(&of(7.0, &[f32::NAN, -4.0]));
        assert!(!nan.passed && nan.failure.is_some() && serde_json::to_string(&nan).is_ok());
        assert!(!judged(&of(f64::NAN, &[1.0, -4.0])).passed);
    }

    #[test]
    fn updates_that_are_off_or_not_finite_fail() {
        let judged = |found: &[f64]| {
            let step = of(7.0, &[1.0]);
            let mut report = judge(Backend::Cuda, &step, &step);
            judge_updates(&mut report, found, &[7.0, 6.0]);
            report.is_within(BOUND)
        };
        assert!(judged(&[7.01, 6.01]));
        assert!(!judged(&[7.01, 6.1]));
        assert!(!judged(&[f64::NAN, 6.0]));
    }

    #[test]
    fn bf16_updates_follow_f32() {
        let (f32, bf16) = (
            losses(Dtype::Float32, DeviceKind::Cpu).unwrap(),
            losses(Dtype::Bfloat16, DeviceKind::Cpu).unwrap(),
        );
        let mut report = StepReport::nothing();
        judge_updates(&mut report, &bf16, &f32);
        assert_eq!(report.updates, UPDATES);
        assert!(report.update_error <= BF16_BOUND, "{}", report.update_error);
        assert!(f32[UPDATES - 1] != f32[0]);
    }

    #[test]
    fn every_trainable_of_the_model_has_a_gradient() {
        let mut model = model(Kernels::Composed).unwrap();
        let step = step(&mut model).unwrap();
        assert!((step.loss - 2048f64.ln()).abs() < 2.0, "{}", step.loss);
        assert_eq!(step.gradients.len(), 4 * 7 * 2);
        for (name, gradient) in &step.gradients {
            assert!(gradient.iter().any(|x| *x != 0.0), "{name} has no gradient");
        }
    }
}
