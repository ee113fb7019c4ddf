//! What the probe process computes, stage by stage.

use std::time::{Duration, Instant};

use mlx_rs::{Array, Device, Dtype, fast, ops, random, with_device};
use planish_mlx::device::{self, DeviceFact, DeviceKind};

use metal_check::predict::Prediction;

use crate::Result;
use crate::files::{self, MlxFiles};
use crate::machine::Machine;
use crate::report::{Backend, Check, CheckStatus, DeviceReport};

/// f32 on a GPU may round inputs to 10 bits (TF32) and sum in another order.
pub(crate) const F32_BOUND: f64 = 1e-3;
/// Without TF32 only the order of the sum differs.
const EXACT_F32_BOUND: f64 = 1e-5;
/// A virtual GPU may compute with less; it is used for tests, and the verdict says that it is virtual.
const VIRTUAL_F32_BOUND: f64 = 1e-2;
/// bf16 keeps 8 bits: with K = 512 terms the angle stays far inside this unless numbers are wrong.
pub(crate) const COSINE_BOUND: f64 = 0.999;
/// Rows of the products: 1 and 8 take vector paths, 9 is where the tensor-unit kernel of MLX 0.31 went wrong, 33 is no
/// multiple of a tile, 512 and 1024 reach split-K.
const ROWS: [i32; 6] = [1, 8, 9, 33, 512, 1024];

/// Receives what a probe finds, as it finds it.
pub(crate) trait Sink {
    fn stage(&mut self, name: &str) -> Result<()>;
    fn device(&mut self, device: &DeviceReport) -> Result<()>;
    fn check(&mut self, check: &Check) -> Result<()>;
    fn files(&mut self, files: &MlxFiles) -> Result<()>;
    fn predicted(&mut self, prediction: &Prediction) -> Result<()>;
    fn speed(&mut self, gflops: f64, cpu_gflops: f64) -> Result<()>;
}

/// Says whether every check of it passed.
type Stage = fn(&Probe, &mut dyn Sink) -> Result<bool>;

/// Runs all stages of one device; stops after the first stage with a failed check.
pub(crate) fn run(backend: Backend, seed: u64, sink: &mut dyn Sink) -> Result<()> {
    planish_mlx::install_error_handler();
    device::set_default(DeviceKind::Cpu)?;
    sink.stage("static")?;
    let library = planish_mlx::library::path();
    if let (Backend::Metal, Some(library), Some(macos)) = (backend, &library, Machine::look().macos) {
        let predictions = files::predict(library, macos);
        for prediction in &predictions {
            sink.predicted(prediction)?;
        }
        if !predictions.is_empty() {
            return Ok(());
        }
    }
    sink.files(&files::identify(library.as_deref()))?;
    let kind = if backend == Backend::Cpu {
        DeviceKind::Cpu
    } else {
        DeviceKind::Gpu
    };
    sink.stage("identify")?;
    let found = identify(kind)?;
    sink.device(&found)?;
    if found.count == 0 {
        return Ok(());
    }
    let probe = Probe {
        kind,
        compiles_on_use: backend == Backend::Cuda,
        seed,
        is_virtual: found.is_virtual,
    };
    let stages: [(&str, Stage); 4] = [
        ("add", Probe::add),
        ("matmul", Probe::matmul),
        ("ops", Probe::ops),
        ("memory", Probe::memory),
    ];
    for (name, stage) in stages {
        sink.stage(name)?;
        if !stage(&probe, sink)? {
            return Ok(());
        }
    }
    sink.stage("speed")?;
    let cpu_gflops = probe.gflops(DeviceKind::Cpu)?;
    let gflops = match kind {
        DeviceKind::Cpu => cpu_gflops,
        DeviceKind::Gpu => probe.gflops(kind)?,
    };
    sink.speed(gflops, cpu_gflops)
}

fn identify(kind: DeviceKind) -> Result<DeviceReport> {
    let count = device::count(kind)?;
    if count == 0 {
        return Ok(DeviceReport::default());
    }
    let facts = device::facts(kind)?;
    let text = |key: &str| match facts.get(key) {
        Some(DeviceFact::Text(text)) => Some(text.clone()),
        _ => None,
    };
    let number = |keys: &[&str]| {
        keys.iter().find_map(|key| match facts.get(*key) {
            Some(DeviceFact::Number(number)) => Some(*number as u64),
            _ => None,
        })
    };
    let name = text("device_name");
    Ok(DeviceReport {
        count,
        is_virtual: name
            .as_ref()
            .is_some_and(|name| name.to_lowercase().contains("paravirtual")),
        name,
        architecture: text("architecture"),
        memory_bytes: number(&["memory_size", "total_memory"]),
        recommended_bytes: number(&["max_recommended_working_set_size", "free_memory"]),
    })
}

struct Probe {
    kind: DeviceKind,
    /// Whether each kernel is compiled when it is first used.
    compiles_on_use: bool,
    seed: u64,
    is_virtual: bool,
}

impl Probe {
    fn f32_bound(&self) -> Bound {
        Bound::Relative(if self.is_virtual { VIRTUAL_F32_BOUND } else { F32_BOUND })
    }

    fn add(&self, sink: &mut dyn Sink) -> Result<bool> {
        let inputs = [
            Array::from_slice(&[1.0f32, 2.0, -3.0], &[3]),
            Array::from_slice(&[0.5f32, 0.25, 8.0], &[3]),
        ];
        let check = self.compare("add.f32", &inputs, &|a| Ok(a[0].add(&a[1])?), Bound::Relative(0.0))?;
        report(sink, check)
    }

    fn matmul(&self, sink: &mut dyn Sink) -> Result<bool> {
        let mut passed = true;
        for (dtype, name) in [
            (Dtype::Float32, "f32"),
            (Dtype::Bfloat16, "bf16"),
            (Dtype::Float16, "f16"),
        ] {
            let bound = match dtype {
                Dtype::Float32 if has_exact_f32() => Bound::Relative(EXACT_F32_BOUND),
                Dtype::Float32 => self.f32_bound(),
                _ => Bound::Cosine(COSINE_BOUND),
            };
            for rows in ROWS {
                let id = format!("matmul.{name}.m{rows}");
                passed &= self.product(sink, &id, [rows, 512, 512], dtype, bound)?;
            }
        }
        // The shape at which a split along K went wrong without a word (mlx#3797); on a processor it would only cost time.
        let room = 8 * (1u64 << 30);
        if self.kind == DeviceKind::Gpu && identify(self.kind)?.recommended_bytes.is_none_or(|bytes| bytes >= room) {
            passed &= self.large_product(sink)?;
        }
        Ok(passed)
    }

    /// `[1024, 12288] × [12288, 4096]` in bf16. The processor, which would need minutes for all of it without a fast BLAS,
    /// computes every 32nd row and column.
    fn large_product(&self, sink: &mut dyn Sink) -> Result<bool> {
        const STRIDE: i32 = 32;
        let a = self.normal(&[1024, 12288], 1, Dtype::Bfloat16)?;
        let narrow = self.normal(&[12288, 256], 2, Dtype::Bfloat16)?;
        let b = ops::concatenate(&vec![narrow; 16], 1)?;
        let sample = |array: &Array, axis: i32| -> Result<Array> {
            let picked: Vec<i32> = (0..array.dim(axis)).step_by(STRIDE as usize).collect();
            let picked = Array::from_slice(&picked, &[picked.len() as i32]);
            Ok(ops::indexing::take_axis(array, &picked, axis)?)
        };
        let expected = values(DeviceKind::Cpu, &|| {
            let (a, b) = (sample(&a, 0)?, sample(&b, 1)?);
            Ok(a.as_dtype(Dtype::Float32)?.matmul(b.as_dtype(Dtype::Float32)?)?)
        })?;
        let started = Instant::now();
        let found = values(self.kind, &|| sample(&sample(&a.matmul(&b)?, 0)?, 1));
        let bound = Bound::Cosine(COSINE_BOUND);
        report(
            sink,
            judged("matmul.bf16.k12288", found, &expected, bound, milliseconds(started)),
        )
    }

    /// `[rows, inner] × [inner, columns]`.
    fn product(
        &self,
        sink: &mut dyn Sink,
        id: &str,
        [rows, inner, columns]: [i32; 3],
        dtype: Dtype,
        bound: Bound,
    ) -> Result<bool> {
        let inputs = [
            self.normal(&[rows, inner], 1, dtype)?,
            self.normal(&[inner, columns], 2, dtype)?,
        ];
        report(sink, self.compare(id, &inputs, &|a| Ok(a[0].matmul(&a[1])?), bound)?)
    }

    /// One of each kind of operation that training uses.
    fn ops(&self, sink: &mut dyn Sink) -> Result<bool> {
        let x = self.normal(&[64, 128], 3, Dtype::Float32)?;
        let weight = self.normal(&[128], 4, Dtype::Float32)?;
        let heads = self.normal(&[2, 4, 32, 16], 5, Dtype::Float32)?;
        let rows = Array::from_slice(&[3i32, 9, 3, 63, 0, 9], &[6]);
        let updates = self.normal(&[6, 1, 128], 6, Dtype::Float32)?;
        type Op = fn(&[Array]) -> Result<Array>;
        let cases: Vec<(&str, Vec<Array>, Op)> = vec![
            ("softmax", vec![x.clone()], |a| Ok(ops::softmax_axis(&a[0], -1, true)?)),
            ("logsumexp", vec![x.clone()], |a| Ok(a[0].logsumexp_axis(-1, false)?)),
            ("rms_norm", vec![x.clone(), weight.clone()], |a| {
                Ok(fast::rms_norm(&a[0], Some(&a[1]), 1e-5)?)
            }),
            ("layer_norm", vec![x.clone(), weight], |a| {
                Ok(fast::layer_norm(&a[0], Some(&a[1]), None, 1e-5)?)
            }),
            ("gather", vec![x.clone(), rows.clone()], |a| {
                Ok(ops::indexing::take_axis(&a[0], &a[1], 0)?)
            }),
            ("scatter_add", vec![x.clone(), rows, updates], |a| {
                Ok(ops::indexing::scatter_add_single(&a[0], &a[1], &a[2], 0)?)
            }),
            ("sum", vec![x.clone()], |a| Ok(a[0].sum_axis(0, false)?)),
            ("max", vec![x.clone()], |a| Ok(a[0].max_axis(-1, false)?)),
            ("rope", vec![heads.clone()], |a| {
                Ok(fast::rope(&a[0], 16, false, 10_000.0, 1.0, 0, None)?)
            }),
            ("attention", vec![heads], |a| {
                Ok(fast::scaled_dot_product_attention(
                    &a[0], &a[0], &a[0], 0.25, None, None,
                )?)
            }),
            ("random", vec![x.clone()], |a| {
                let key = random::key(11)?;
                Ok(random::uniform::<_, f32>(0.0, 1.0, a[0].shape(), &key)?)
            }),
            (
                "quantized_matmul",
                vec![x.clone(), self.normal(&[96, 128], 8, Dtype::Float32)?],
                |a| {
                    let (packed, scales, biases) = ops::quantize(&a[1], 64, 4)?;
                    Ok(ops::quantized_matmul(&a[0], &packed, &scales, &biases, true, 64, 4)?)
                },
            ),
            (
                "gradient_step",
                vec![x, self.normal(&[128, 8], 7, Dtype::Float32)?],
                gradient_step,
            ),
        ];
        let mut passed = true;
        for (name, inputs, op) in cases {
            if name == "quantized_matmul" && self.compiles_on_use {
                // 57 s of a whole minute and a half on an H100, and training multiplies by dequantised weights.
                report(
                    sink,
                    skipped("ops.quantized_matmul", "its first use compiles for a minute"),
                )?;
                continue;
            }
            passed &= report(
                sink,
                self.compare(&format!("ops.{name}"), &inputs, &op, self.f32_bound())?,
            )?;
        }
        Ok(passed)
    }

    /// A small allocation, and one of a quarter of what the device recommends.
    fn memory(&self, sink: &mut dyn Sink) -> Result<bool> {
        let quarter = identify(self.kind)?.recommended_bytes.map(|bytes| bytes / 4);
        let sizes = [Some(1u64 << 20), quarter.filter(|_| self.kind == DeviceKind::Gpu)];
        let mut passed = true;
        for bytes in sizes.into_iter().flatten() {
            let elements = i32::try_from(bytes / 4).unwrap_or(i32::MAX);
            let started = Instant::now();
            let outcome = on(self.kind, || {
                let zeros = Array::zeros::<f32>(&[elements])?;
                zeros.eval()?;
                Ok(())
            });
            let status = if outcome.is_ok() {
                CheckStatus::Pass
            } else {
                CheckStatus::Fail
            };
            let note = outcome.err().map(|error| error.to_string());
            passed &= report(
                sink,
                Check {
                    id: format!("memory.{bytes}"),
                    status,
                    max_rel: None,
                    cosine: None,
                    nonfinite: 0,
                    ms: milliseconds(started),
                    note,
                },
            )?;
            planish_mlx::memory::clear_cache()?;
        }
        Ok(passed)
    }

    /// Median of seven products of 2048 × 2048 f32 matrices after three to warm up; of fewer once they have taken long.
    fn gflops(&self, kind: DeviceKind) -> Result<f64> {
        const N: i32 = 2048;
        const LONG: Duration = Duration::from_secs(2);
        let (a, b) = (
            self.normal(&[N, N], 9, Dtype::Float32)?,
            self.normal(&[N, N], 10, Dtype::Float32)?,
        );
        let time = || -> Result<f64> {
            let started = Instant::now();
            on(kind, || Ok(a.matmul(&b)?.eval()?))?;
            Ok(started.elapsed().as_secs_f64())
        };
        time()?; // loads libraries, and brings the matrices to the device
        let begun = Instant::now();
        let mut seconds = vec![time()?];
        while seconds.len() < 9 && begun.elapsed() <= LONG {
            seconds.push(time()?);
        }
        seconds.drain(..2.min(seconds.len() - 1)); // two more to warm up
        seconds.sort_by(f64::total_cmp);
        Ok(2.0 * f64::from(N).powi(3) / seconds[seconds.len() / 2] / 1e9)
    }

    fn normal(&self, shape: &[i32], stream: u64, dtype: Dtype) -> Result<Array> {
        on(DeviceKind::Cpu, || {
            let key = random::key(self.seed.wrapping_mul(1009).wrapping_add(stream))?;
            let values = random::normal::<f32>(shape, None, None, &key)?.as_dtype(dtype)?;
            values.eval()?;
            Ok(values)
        })
    }

    /// The operation on the device against f32 on the CPU, both from the same (rounded) inputs. The CPU itself is held
    /// against a second run of its own for 32 bits, and against f32 for 16.
    fn compare(
        &self,
        id: &str,
        inputs: &[Array],
        op: &dyn Fn(&[Array]) -> Result<Array>,
        bound: Bound,
    ) -> Result<Check> {
        let widened = |a: &Array| {
            if a.dtype().is_float() {
                a.as_dtype(Dtype::Float32)
            } else {
                Ok(a.clone())
            }
        };
        let exact: Vec<Array> = inputs.iter().map(widened).collect::<Result<_, _>>()?;
        let expected = values(DeviceKind::Cpu, &|| op(&exact))?;
        let started = Instant::now();
        let found = values(self.kind, &|| op(inputs));
        Ok(judged(id, found, &expected, bound, milliseconds(started)))
    }
}

fn skipped(id: &str, why: &str) -> Check {
    Check {
        id: id.to_owned(),
        status: CheckStatus::Skipped,
        max_rel: None,
        cosine: None,
        nonfinite: 0,
        ms: 0.0,
        note: Some(why.to_owned()),
    }
}

/// Compares numbers, where there are any.
fn judged(id: &str, found: Result<Vec<f32>>, expected: &[f32], bound: Bound, ms: f64) -> Check {
    match found {
        Ok(found) => judge(id, &found, expected, bound, ms),
        Err(error) => Check {
            id: id.to_owned(),
            status: CheckStatus::Fail,
            max_rel: None,
            cosine: None,
            nonfinite: 0,
            ms,
            note: Some(error.to_string()),
        },
    }
}

/// How far found may be from expected.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bound {
    /// Largest difference, relative to the largest expected value.
    Relative(f64),
    /// Least cosine.
    Cosine(f64),
}

/// Compares numbers.
pub(crate) fn judge(id: &str, found: &[f32], expected: &[f32], bound: Bound, ms: f64) -> Check {
    let nonfinite = found.iter().filter(|x| !x.is_finite()).count();
    let largest = expected.iter().fold(0f64, |most, &x| most.max(f64::from(x).abs()));
    let pairs = || found.iter().zip(expected).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let off = pairs().fold(0f64, |most, (a, b)| most.max((a - b).abs()));
    let dot: f64 = pairs().map(|(a, b)| a * b).sum();
    let norms: f64 = pairs().map(|(a, _)| a * a).sum::<f64>().sqrt() * pairs().map(|(_, b)| b * b).sum::<f64>().sqrt();
    let max_rel = off / largest.max(f64::MIN_POSITIVE);
    let cosine = if norms > 0.0 { dot / norms } else { 1.0 };
    let comparable = nonfinite == 0 && found.len() == expected.len() && expected.iter().all(|x| x.is_finite());
    let within = match bound {
        Bound::Relative(most) => max_rel <= most,
        Bound::Cosine(least) => cosine >= least,
    };
    Check {
        id: id.to_owned(),
        status: if comparable && within {
            CheckStatus::Pass
        } else {
            CheckStatus::Fail
        },
        max_rel: comparable.then_some(max_rel),
        cosine: comparable.then_some(cosine),
        nonfinite,
        ms,
        note: None,
    }
}

fn has_exact_f32() -> bool {
    std::env::var("MLX_ENABLE_TF32").is_ok_and(|value| value == "0")
}

/// One step of a low-rank update: the gradient of `mean((x A)²)`.
fn gradient_step(inputs: &[Array]) -> Result<Array> {
    let loss = |a: &[Array]| Ok::<_, planish_mlx::Error>(vec![inputs[0].matmul(&a[0])?.square()?.mean(false)?]);
    let (_, gradients) = planish_mlx::transforms::value_and_grad(loss, &inputs[1..2], &[0])?;
    Ok(inputs[1].subtract(gradients[0].multiply(Array::from_f32(0.1))?)?)
}

fn values(kind: DeviceKind, op: &dyn Fn() -> Result<Array>) -> Result<Vec<f32>> {
    on(kind, || Ok(planish_mlx::host::to_f32_vec(&op()?)?))
}

/// Runs with another default device.
fn on<T>(kind: DeviceKind, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let device = match kind {
        DeviceKind::Cpu => Device::cpu(),
        DeviceKind::Gpu => Device::gpu(),
    };
    with_device(device, work)
}

fn report(sink: &mut dyn Sink, check: Check) -> Result<bool> {
    sink.check(&check)?;
    Ok(check.status != CheckStatus::Fail)
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
