//! What a probe found, as it is printed, cached and recorded with a run.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::files::MlxFiles;

/// Version of the layout.
pub(crate) const SCHEMA: u32 = 2;
/// Code for a device that this build of MLX has no kernels for.
pub(crate) const NOT_BUILT: &str = "NOT_BUILT";

/// Where MLX computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The main processor.
    Cpu,
    /// An Apple GPU.
    Metal,
    /// An NVIDIA GPU.
    Cuda,
}

impl Backend {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
        }
    }

    /// What `auto` tries on this system, best first.
    pub fn order() -> [Self; 2] {
        [
            if cfg!(target_os = "macos") {
                Self::Metal
            } else {
                Self::Cuda
            },
            Self::Cpu,
        ]
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = [Self::Cpu, Self::Metal, Self::Cuda];
        known
            .into_iter()
            .find(|b| b.name() == name)
            .ok_or_else(|| format!("{name:?} is none of cpu, metal, cuda"))
    }
}

/// What the parent concludes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every check passed.
    Ok,
    /// The same, on a virtual GPU with a wider bound.
    OkVirtual,
    /// Numbers differ from the CPU's: never used.
    WrongResults,
    /// There is no such device.
    NoDevice,
    /// Memory could not be had.
    Oom,
    /// Its files show that they cannot load on this system.
    Unloadable,
    /// The probe process died.
    Crashed,
    /// The probe process gave no answer in time.
    Hung,
    /// The probe process ended without a whole report.
    NoReport,
}

impl Verdict {
    /// Whether a run may use the device.
    pub fn is_usable(self) -> bool {
        matches!(self, Self::Ok | Self::OkVirtual)
    }

    /// As written in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::OkVirtual => "ok_virtual",
            Self::WrongResults => "wrong_results",
            Self::NoDevice => "no_device",
            Self::Oom => "oom",
            Self::Unloadable => "unloadable",
            Self::Crashed => "crashed",
            Self::Hung => "hung",
            Self::NoReport => "no_report",
        }
    }

    /// Whether the same machine would give it again, so that it may be remembered.
    pub(crate) fn is_lasting(self) -> bool {
        !matches!(self, Self::Hung | Self::NoReport | Self::Oom)
    }
}

/// What one device was found to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// Version of this layout.
    pub schema: u32,
    /// The probed device.
    pub backend: Backend,
    /// The conclusion.
    pub verdict: Verdict,
    /// Stable name of what went wrong; `NONE` when nothing did.
    pub code: String,
    /// The last stage that began.
    pub stage: String,
    /// Version of the MLX library.
    pub mlx_version: String,
    /// The program.
    pub app: String,
    /// Seed of the inputs.
    pub seed: u64,
    /// The device, as far as it was identified.
    pub device: DeviceReport,
    /// The MLX that computed.
    #[serde(default)]
    pub files: MlxFiles,
    /// Every check, in order.
    pub checks: Vec<Check>,
    /// Speed of an f32 product of two 2048 × 2048 matrices, in 10⁹ operations a second.
    pub gflops: Option<f64>,
    /// The same on the processor, measured beside it.
    #[serde(default)]
    pub cpu_gflops: Option<f64>,
    /// What went wrong, in words, where the code alone says too little.
    #[serde(default)]
    pub detail: Option<String>,
    /// How the probe process ended.
    pub child: ChildEnd,
    /// Whether the verdict was remembered and not measured now.
    pub cached: bool,
}

impl ProbeReport {
    /// Why the device is not used, in a few words; empty when it is.
    pub fn reason(&self) -> String {
        if self.verdict.is_usable() {
            return String::new();
        }
        let failed = self.checks.iter().find(|check| check.status == CheckStatus::Fail);
        let place = failed.map_or(self.stage.as_str(), |check| check.id.as_str());
        let mut reason = self.code.clone();
        if !place.is_empty() && self.verdict != Verdict::NoDevice {
            reason.push_str(&format!(" in {place}"));
        }
        if let Some(detail) = &self.detail {
            reason.push_str(&format!(": {detail}"));
        }
        if self.cached {
            reason.push_str(" (remembered)");
        }
        reason
    }

    /// What can be done about it today; `None` when nothing has to be.
    pub fn remedy(&self) -> Option<&'static str> {
        if self.verdict.is_usable() {
            return None;
        }
        if self.code == NOT_BUILT {
            // Where there is no such device either, nothing is missing.
            return (self.verdict != Verdict::NoDevice).then_some(match self.backend {
                Backend::Cuda => "cargo install --path crates/planish-cli --features cuda",
                _ => "cargo install --path crates/planish-cli",
            });
        }
        match (self.backend, self.code.as_str()) {
            // There is nothing to mend on a machine without such a device.
            (Backend::Cuda, "DEVICE_NONE") if self.stage.is_empty() => return None,
            (Backend::Cuda, "DEVICE_NONE") => {
                return Some("check that `nvidia-smi` lists the GPU, and that CUDA_VISIBLE_DEVICES does not hide it");
            }
            (_, "HUNG" | "NO_REPORT" | "CRASHED") => {
                return Some(
                    "planish doctor --no-probe-cache (a longer limit: PLANISH_PROBE_SECONDS=300); meanwhile --backend cpu",
                );
            }
            _ => {}
        }
        metal_check::catalogue::entry(&self.code).map(|entry| entry.remedy.as_str())
    }
}

/// What a device says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DeviceReport {
    /// How many there are.
    pub count: usize,
    /// Its name.
    pub name: Option<String>,
    /// Such as `applegpu_g16s` or `sm_90`.
    pub architecture: Option<String>,
    /// Its memory.
    pub memory_bytes: Option<u64>,
    /// Most of it that a program should use.
    pub recommended_bytes: Option<u64>,
    /// Whether it is a virtual machine's.
    #[serde(rename = "virtual")]
    pub is_virtual: bool,
}

/// One comparison with the CPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Such as `matmul.bf16.m9`.
    pub id: String,
    /// How it ended.
    pub status: CheckStatus,
    /// Largest difference relative to the largest expected value.
    pub max_rel: Option<f64>,
    /// Cosine of the angle between found and expected.
    pub cosine: Option<f64>,
    /// Elements that are not finite.
    pub nonfinite: usize,
    /// Milliseconds on the device.
    pub ms: f64,
    /// What went wrong, where it is more than a number.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub note: Option<String>,
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    /// Within its bound.
    Pass,
    /// Outside its bound.
    Fail,
    /// Worth a remark; not held against the device.
    Warn,
    /// Not run, with the reason in the note.
    Skipped,
}

/// How the probe process ended.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ChildEnd {
    /// Exit code.
    pub exit: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// Milliseconds it lived.
    pub wall_ms: u64,
    /// The last lines it wrote to standard error.
    pub stderr_tail: Vec<String>,
    /// Whether it was stopped because it took too long.
    pub timed_out: bool,
    /// The limits it was held to, in milliseconds: in all, and without a sign of life.
    pub limits_ms: [u64; 2],
}
