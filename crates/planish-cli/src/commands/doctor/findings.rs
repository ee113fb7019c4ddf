//! What the machine, MLX and the probes say, and what follows from it.

use anyhow::Result;
use planish_backend::{Backend, Choice, Machine, MlxFiles, ProbeReport, Requested, budget, choose};
use planish_mlx::Dtype;
use planish_mlx::device::{self as mlx_device, DeviceKind};
use planish_mlx::library::{self, GpuLibrary};
use planish_nn::{ChosenKernels, Purpose};
use serde_json::{Value, json};

use super::deploy::{self, Deployment};
use super::step::{self, StepReport};
use crate::device;

/// Kernels of OpenBLAS that use half of what a processor with AVX-512 can do.
const NARROW_KERNELS: [&str; 8] = [
    "Prescott",
    "Core2",
    "Nehalem",
    "Sandybridge",
    "Haswell",
    "Zen",
    "Barcelona",
    "Bulldozer",
];

pub(super) struct Findings {
    pub(super) machine: Machine,
    pub(super) memory_bytes: Option<u64>,
    pub(super) mlx_version: String,
    pub(super) built_for: &'static str,
    pub(super) files: MlxFiles,
    /// One report a device, the best device of this system first.
    pub(super) reports: Vec<ProbeReport>,
    /// What `--backend auto` takes.
    pub(super) choice: Option<Choice>,
    /// What trains adapters there.
    pub(super) kernels: Option<ChosenKernels>,
    pub(super) blas: Option<String>,
    pub(super) blas_warning: Option<String>,
    pub(super) deployment: Deployment,
    /// What is in the way, and what to do about it.
    pub(super) missing: Vec<Missing>,
    /// Loss and gradients of a training step against the processor's; `None` when not asked for.
    pub(super) steps: Option<Vec<StepReport>>,
}

pub(super) struct Missing {
    pub(super) what: String,
    pub(super) mend: String,
}

impl Findings {
    pub(super) fn gather(deep: bool) -> Result<Self> {
        let prober = device::prober()?;
        let [gpu, cpu] = Backend::order();
        let other = if gpu == Backend::Metal {
            Backend::Cuda
        } else {
            Backend::Metal
        };
        let reports: Vec<ProbeReport> = [gpu, cpu, other].map(|backend| prober.report(backend)).into();
        let of = |backend: Backend| reports.iter().find(|report| report.backend == backend).cloned();
        let choice = choose(Requested::Auto, &Backend::order(), |backend| {
            Ok(of(backend).unwrap_or_else(|| prober.report(backend)))
        })
        .ok();
        let files = reports
            .iter()
            .map(|report| &report.files)
            .find(|files| files.library.is_some())
            .cloned()
            .unwrap_or_default();
        let kernels = choice.as_ref().map(|choice| kernels_on(choice.backend)).transpose()?;
        let blas = library::openblas_kernels();
        let mut findings = Self {
            memory_bytes: planish_core::memory::available_bytes(),
            mlx_version: planish_mlx::version()?,
            built_for: match library::gpu_support()? {
                Some(GpuLibrary::Metal) => "metal",
                Some(GpuLibrary::Cuda) => "cuda",
                None => "cpu",
            },
            files,
            choice,
            kernels,
            blas_warning: blas.as_deref().and_then(blas_warning),
            blas,
            deployment: deploy::of(&prober.machine),
            missing: Vec::new(),
            steps: deep.then(|| step::compare_all(&reports)),
            machine: prober.machine,
            reports,
        };
        findings.missing = findings.find_missing();
        Ok(findings)
    }

    fn find_missing(&self) -> Vec<Missing> {
        let mut missing = Vec::new();
        for report in &self.reports {
            if let Some(mend) = report.remedy() {
                missing.push(Missing {
                    what: format!("{}: {}", report.backend, report.reason()),
                    mend: mend.to_owned(),
                });
            }
        }
        if let Some(warning) = &self.blas_warning {
            missing.push(Missing {
                what: warning.clone(),
                mend: "unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE".to_owned(),
            });
        }
        missing.extend(self.deployment.missing.iter().map(|(what, mend)| Missing {
            what: what.clone(),
            mend: mend.clone(),
        }));
        missing
    }

    pub(super) fn selected(&self) -> Option<&ProbeReport> {
        self.choice.as_ref().map(|choice| &choice.report)
    }

    /// Bytes that a run may use on the selected device.
    pub(super) fn budget_bytes(&self) -> Option<u64> {
        budget(&self.selected()?.device, None).map(|budget| budget.total_bytes)
    }

    pub(super) fn to_json(&self) -> Value {
        let missing: Vec<Value> = self
            .missing
            .iter()
            .map(|missing| json!({"what": missing.what, "mend": missing.mend}))
            .collect();
        json!({
            "schema": 1,
            "planish": env!("CARGO_PKG_VERSION"),
            "mlx": {
                "version": self.mlx_version,
                "library": library::path(),
                "built_for": self.built_for,
                "sha256": self.files.library.as_ref().map(|file| &file.sha256),
                "metallib": self.files.metallib,
                "blas_kernels": self.blas,
            },
            "machine": {
                "os": std::env::consts::OS,
                "arch": std::env::consts::ARCH,
                "macos": self.machine.macos,
                "system": self.machine.system,
                "processor": self.machine.processor,
                "nvidia_driver": self.machine.nvidia_driver,
                "memory_bytes": self.memory_bytes,
            },
            "backends": self.reports.iter().map(backend_json).collect::<Vec<_>>(),
            "selected": self.choice.as_ref().map(|choice| choice.backend),
            "fail_over": self.choice.as_ref().and_then(Choice::fail_over),
            "kernels": self.kernels.map(|chosen| json!({"by": chosen.kernels.describe(), "obstacle": chosen.obstacle})),
            "budget_bytes": self.budget_bytes(),
            "coreml": self.deployment.to_json(),
            "missing": missing,
            "training_step": self.steps,
        })
    }
}

fn backend_json(report: &ProbeReport) -> Value {
    json!({
        "name": report.backend,
        "usable": report.verdict.is_usable(),
        "reason": report.reason(),
        "device": report.device.name,
        "gflops": report.gflops,
        "verdict": report.verdict,
        "code": report.code,
        "architecture": report.device.architecture,
        "memory_bytes": report.device.memory_bytes,
        "virtual": report.device.is_virtual,
        "cpu_gflops": report.cpu_gflops,
        "remedy": report.remedy(),
        "checks": report.checks,
        "probe_ms": report.child.wall_ms,
        "limits_ms": report.child.limits_ms,
        "stderr_tail": report.child.stderr_tail,
        "remembered": report.cached,
    })
}

/// The kernels that `planish train` takes for adapters on a device.
fn kernels_on(backend: Backend) -> Result<ChosenKernels> {
    let (kind, dtype) = match backend {
        Backend::Cpu => (DeviceKind::Cpu, Dtype::Float32),
        Backend::Metal | Backend::Cuda => (DeviceKind::Gpu, Dtype::Bfloat16),
    };
    mlx_device::set_default(kind)?;
    Ok(ChosenKernels::fastest(dtype, Purpose::Adapters, false)?)
}

/// OpenBLAS picks its kernels itself; a variable that holds it to others usually halves its speed.
fn blas_warning(kernels: &str) -> Option<String> {
    let held = std::env::var("OPENBLAS_CORETYPE").ok()?;
    (NARROW_KERNELS.contains(&kernels) && has_avx512()).then(|| {
        format!(
            "OPENBLAS_CORETYPE={held} holds OpenBLAS to its {kernels} kernels, about half of what this processor can do"
        )
    })
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx512() -> bool {
    false
}
